"""Checks of arguments. Each raises an error that names the argument, its value, and the remedy."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prograde.tangents import TangentDistribution


def check_key(key: Any) -> None:
    """Raises `TypeError` unless `key` is one typed PRNG key.

    Examples:
        >>> import jax
        >>> from prograde.kit import check_key
        >>> check_key(jax.random.key(0))
        >>> check_key(0)
        Traceback (most recent call last):
        ...
        TypeError: key=0, but a typed PRNG key is needed, such as jax.random.key(0). ...
    """
    if not (isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)):
        raise TypeError(
            f"key={key!r}, but a typed PRNG key is needed, such as jax.random.key(0). "
            "jax.random.wrap_key_data(key) makes one from a key of the old kind (two uint32)."
        )
    if key.shape != ():
        raise TypeError(
            f"key has shape {key.shape}, but one key is needed. "
            "Use keys[i], or jax.vmap over the keys."
        )


def check_whole(name: str, value: Any) -> None:
    """Raises `ValueError` unless `value` is a Python `int` of at least 1.

    Examples:
        >>> from prograde.kit import check_whole
        >>> check_whole("num_tangents", 0)
        Traceback (most recent call last):
        ...
        ValueError: num_tangents=0, but a whole number of at least 1 is needed.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        whole = isinstance(value, np.integer) and value >= 1
        remedy = f" Pass a Python int: int({name})." if whole else ""
        raise ValueError(f"{name}={value!r}, but a whole number of at least 1 is needed.{remedy}")


def check_positive(name: str, value: Any, at_most: float = math.inf) -> None:
    """Raises `ValueError` unless `value` is a positive finite number, and no more than `at_most`.

    Examples:
        >>> from prograde.kit import check_positive
        >>> check_positive("rate", 2.0, at_most=1)
        Traceback (most recent call last):
        ...
        ValueError: rate=2.0, but a number above 0 and at most 1 is needed.
    """
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not 0 < value <= at_most
        or math.isinf(value)
    ):
        allowed = (
            "a positive finite number"
            if math.isinf(at_most)
            else f"a number above 0 and at most {at_most:g}"
        )
        raise ValueError(f"{name}={value!r}, but {allowed} is needed.")


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Raises `ValueError` unless `value` is one of the choices, of the same type.

    Examples:
        >>> from prograde.kit import check_choice
        >>> check_choice("combine", "sum", ("mean", "projection"))
        Traceback (most recent call last):
        ...
        ValueError: combine='sum', but it is one of 'mean', 'projection'.
    """
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        raise ValueError(f"{name}={value!r}, but it is one of {', '.join(map(repr, choices))}.")


def check_tangents(tangents: Any) -> None:
    """Raises `TypeError` unless `tangents` is a distribution of tangents.

    Examples:
        >>> from prograde.kit import check_tangents
        >>> check_tangents("normal")
        Traceback (most recent call last):
        ...
        TypeError: tangents='normal', but a tangent distribution is needed, such as Normal() ...
    """
    if not isinstance(tangents, TangentDistribution):
        raise TypeError(
            f"tangents={tangents!r}, but a tangent distribution is needed, such as Normal() or "
            "LowRank(rank=1)."
        )
