"""Coordinates in which a parameter is measured by another unit.

The weight about which it is stretched stays as it is.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, ArrayLike, Float

from prograde._inject import varying_like
from prograde._structured.rules import rule
from prograde._structured.shapes import _merged_within_blocks
from prograde._structured.tangent import PerturbedArray


def stretch(
    u: Float[Array, "*shape"], about: Float[Array, "*shape"], c: Array
) -> Float[Array, "*shape"]:
    """The point about + c (u - about), with c of as many axes as u, each of size 1 or that of u.

    Where u is `about` itself, as in every derivative at the present parameters, the result is u, to
    the bit and without arithmetic; its tangent is c times that of u, and a tangent of factors keeps
    them where c varies along axes of one factor.
    """
    u = varying_like(u, about, c)
    return stretch_p.bind(u, varying_like(about, u), varying_like(c, u))


stretch_p: Any = Primitive("stretch")


@stretch_p.def_impl
def _stretch(u: Array, about: Array, c: Array) -> Array:
    return about + c * (u - about)


def _value(u: Array, about: Array, c: Array) -> Array:
    return u if u is about else stretch_p.bind(u, about, c)


@stretch_p.def_abstract_eval
def _(u: Any, about: Any, c: Any) -> Any:
    del about, c
    return u


mlir.register_lowering(stretch_p, mlir.lower_fun(_stretch, multiple_results=False))


def _jvp(primals: Any, tangents: Any) -> tuple[Array, Any]:
    u, about, c = primals
    udot, *others = tangents
    if all(type(t) is ad.Zero for t in others):
        out = _value(u, about, c)
        return out, ad.Zero(jax.typeof(out).to_tangent_aval()) if type(
            udot
        ) is ad.Zero else c * udot
    return jax.jvp(_stretch, primals, tuple(ad.instantiate_zeros(t) for t in tangents))


ad.primitive_jvps[stretch_p] = _jvp


def _batched(args: Any, axes: Any) -> tuple[Array, int]:
    size = next(x.shape[axis] for x, axis in zip(args, axes, strict=True) if axis is not None)
    u, about, c = (
        x[None] if axis is None else jnp.moveaxis(x, axis, 0)
        for x, axis in zip(args, axes, strict=True)
    )
    return stretch_p.bind(jnp.broadcast_to(u, (size, *u.shape[1:])), about, c), 0


batching.primitive_batchers[stretch_p] = _batched


@rule("stretch", 0)
def _(p: PerturbedArray, about: ArrayLike, c: Array):
    varying = [axis for axis in range(c.ndim) if c.shape[axis] > 1]
    factors = _merged_within_blocks(p.factors, [varying])
    if len(factors) == 1 < len(p.factors):
        return NotImplemented
    at = next((i for i, f in enumerate(factors) if all(f.shape[axis] > 1 for axis in varying)), 0)
    scale = lax.expand_dims(c, (c.ndim,))
    factors[at] = factors[at] * scale.astype(factors[at].dtype)
    weight = p.weight if p.weight is about else stretch_p.bind(p.weight, about, c)
    return p.replace(weight, factors)
