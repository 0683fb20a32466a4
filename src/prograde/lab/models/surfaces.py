"""The paper's functions of a few variables to minimise."""

from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float


@dataclass(frozen=True)
class Surface:
    """A function of a few variables to minimise from one start.

    `minimum` is the point of its least value, 0. `window` is the part of the plane that figures
    show, ((x, x), (y, y)).
    """

    fun: Callable[[Float[Array, " n"]], Float[Array, ""]]
    start: tuple[float, ...]
    minimum: tuple[float, ...]
    window: tuple[tuple[float, float], tuple[float, float]]


def _beale(p: Float[Array, " 2"]) -> Float[Array, ""]:
    x, y = p
    return (1.5 - x + x * y) ** 2 + (2.25 - x + x * y**2) ** 2 + (2.625 - x + x * y**3) ** 2


def _rosenbrock(p: Float[Array, " n"]) -> Float[Array, ""]:
    return jnp.sum(100 * (p[1:] - p[:-1] ** 2) ** 2 + (1 - p[:-1]) ** 2)


BEALE = Surface(_beale, start=(1.0, 1.5), minimum=(3.0, 0.5), window=((0.0, 4.0), (-1.0, 2.0)))
ROSENBROCK = Surface(
    _rosenbrock, start=(-1.0, 0.0), minimum=(1.0, 1.0), window=((-1.6, 1.6), (-0.6, 1.6))
)
