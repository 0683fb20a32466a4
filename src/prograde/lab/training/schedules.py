"""Optimizers and learning-rate schedules by name."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array

DECAY = 1e-4  # of the paper's rate, for each step

OPTIMIZERS: dict[str, Callable[[optax.ScalarOrSchedule], optax.GradientTransformation]] = {
    "sgd": optax.sgd,
    "adam": optax.adam,
}

SCHEDULES: dict[str, Callable[[Any, Any], Any]] = {
    "exp": lambda t, length: jnp.exp(-DECAY * t),
    "cosine": lambda t, length: 0.5 * (1 + jnp.cos(math.pi * jnp.minimum(t / length, 1))),
}
"""The rate at step t of a run of `length` steps, divided by the rate at its start."""


class Rate(NamedTuple):
    """The learning rate of the first step, and the number of steps over which it may fall."""

    first: float | Array
    length: float | Array = 1
