"""The tangent of max-pooling, in as many operations as the window has entries.

JAX's own rule selects and gathers pair by pair over windows, which takes several times as long as the pooling itself (on a
CPU, seven times for 2 x 2). Here each entry of the window is compared with the maximum, over whole arrays.
"""

import itertools
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import quax
from jax import lax
from jaxtyping import Array, ArrayLike

_MOST_OFFSETS = 32  # the tangent is unrolled over the window


@quax.register(lax.reduce_window_max_p)
def _(x: ArrayLike, **params):
    window, dilation = params["window_dimensions"], params["base_dilation"]
    if math.prod(window) > _MOST_OFFSETS or any(d != 1 for d in dilation) or jnp.size(x) == 0:
        return lax.reduce_window_max_p.bind(x, **params)
    return _max_pool(tuple(params.items()), x)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _max_pool(params: Any, x: Array) -> Array:
    return lax.reduce_window_max_p.bind(x, **dict(params))


@_max_pool.defjvp
def _(params: Any, primals: Any, tangents: Any) -> tuple[Array, Array]:
    (x,), (xdot,) = primals, tangents
    named = dict(params)
    window, strides = named["window_dimensions"], named["window_strides"]
    padding, dilation = named["padding"], named["window_dilation"]
    out = _max_pool(params, x)
    config = [(low, high, 0) for low, high in padding]
    if any(low or high for low, high in padding):
        lowest = -jnp.inf if jnp.issubdtype(x.dtype, jnp.floating) else jnp.iinfo(x.dtype).min
        x = lax.pad(x, jnp.array(lowest, x.dtype), config)
        xdot = lax.pad(xdot, jnp.zeros((), xdot.dtype), config)
    tangent = None
    for offset in itertools.product(*(reversed(range(n)) for n in window)):
        start = [o * d for o, d in zip(offset, dilation, strict=True)]
        limit = [a + (n - 1) * s + 1 for a, n, s in zip(start, out.shape, strides, strict=True)]
        entry, slope = lax.slice(x, start, limit, strides), lax.slice(xdot, start, limit, strides)
        # of equal entries the first counts, as in JAX's rule
        tangent = slope if tangent is None else jnp.where(entry == out, slope, tangent)
    return out, jnp.asarray(tangent)
