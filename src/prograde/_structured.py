"""Structured tangents, and the Quax rules that let them pass through a program without being formed.

A tangent of a parameter leaf is either an array or a structured tangent such as `LowRankTangent`. A structured tangent
knows how to wrap the leaf as a Quax value. Each rule below is the product rule of one primitive, written for the
structure; a primitive without a rule materialises the value, which injects the dense tangent, so the directional
derivative is exact in every case and only the cost differs.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import quax
from jax import lax
from jax._src.core import set_current_trace
from jax.core import ShapedArray
from jaxtyping import Array, ArrayLike, Float, PyTree
from quax._compat import unpack_scan_args
from quax._trace import _QuaxTrace

from prograde._inject import inject


class LowRankTangent(eqx.Module):
    """The tangent a b^T of a matrix, or of a stack of matrices, kept as its factors."""

    a: Float[Array, "*stack m rank"]
    b: Float[Array, "*stack n rank"]

    def dense(self) -> Float[Array, "*stack m n"]:
        """The tangent as an array."""
        return jnp.einsum("...mr,...nr->...mn", self.a, self.b)

    def perturb(self, weight: Float[Array, "*stack m n"], s: Float[Array, ""]) -> "LowRankPerturbed":
        """The weight as a Quax value that carries this tangent with respect to `s`."""
        return LowRankPerturbed(weight, self.a, self.b, jnp.broadcast_to(s, weight.shape[:-2]))

    def weighted_sum(self, coefficients: Float[Array, " k"]) -> Float[Array, "*stack m n"]:
        """sum_k c_k a_k b_k^T, for a tangent whose factors have a leading axis k."""
        k, rank = self.a.shape[0], self.a.shape[-1]
        scale = coefficients.reshape((k,) + (1,) * (self.a.ndim - 1))
        a = scale * self.a.astype(coefficients.dtype)
        b = self.b.astype(coefficients.dtype)
        if k * rank == 1:  # an outer product that XLA fuses into whatever uses it
            return a[0, ..., :, 0, None] * b[0, ..., None, :, 0]
        return jnp.einsum("k...mr,k...nr->...mn", a, b)


class LowRankPerturbed(quax.ArrayValue):
    """A weight whose tangent with respect to `s` is a b^T. `s` is repeated over the stack so that `scan` can slice it."""

    weight: Float[Array, "*stack m n"]
    a: Float[Array, "*stack m rank"]
    b: Float[Array, "*stack n rank"]
    s: Float[Array, "*stack"]

    def aval(self) -> ShapedArray:
        return ShapedArray(self.weight.shape, self.weight.dtype)

    def materialise(self) -> Array:
        if self.weight.size == 0:
            return self.weight
        return inject(self.s[(0,) * self.s.ndim], self.weight, LowRankTangent(self.a, self.b).dense())


Tangent = Array | LowRankTangent


def _is_structured(x: Any) -> bool:
    return isinstance(x, LowRankTangent)


def directional_derivative(
    fun: Callable[[PyTree], tuple[Array, PyTree]], params: PyTree[Array], tangents: PyTree[Tangent]
) -> tuple[Array, Array, PyTree]:
    """(fun, grad fun . v, aux) at `params` along `tangents`, in one forward run. `fun` returns (value, aux)."""

    def along(s: Array) -> tuple[Array, PyTree]:
        perturbed = jax.tree.map(
            lambda v, w: v.perturb(w, s) if _is_structured(v) else inject(s, w, v),
            tangents,
            params,
            is_leaf=_is_structured,
        )
        out = quax.quaxify(fun)(perturbed)
        # a parameter that is returned as it came in, as auxiliary output, comes out as a Quax value
        is_value = lambda x: isinstance(x, LowRankPerturbed)  # noqa: E731
        return jax.tree.map(lambda x: x.materialise() if is_value(x) else x, out, is_leaf=is_value)

    return jax.jvp(along, (jnp.zeros(()),), (jnp.ones(()),), has_aux=True)


def weighted_sum(tangents: PyTree[Tangent], coefficients: Float[Array, " k"]) -> PyTree[Array]:
    """sum_k c_k v_k for tangents with a leading axis k, in the dtype of the coefficients or the tangents', the wider."""

    def leaf(v: Tangent) -> Array:
        c = coefficients.astype(
            jnp.promote_types(coefficients.dtype, v.a.dtype if isinstance(v, LowRankTangent) else v.dtype)
        )
        if isinstance(v, LowRankTangent):
            return v.weighted_sum(c)
        return jnp.sum(c.reshape((-1,) + (1,) * (v.ndim - 1)) * v.astype(c.dtype), axis=0)

    return jax.tree.map(leaf, tangents, is_leaf=_is_structured)


def _apply_factors(x: Array, contract_x: tuple[int, ...], inner: Array, outer: Array, weight_first: bool) -> Array:
    """The product of x and inner outer^T, with the weight's free axis first or last, in (m + n) rank multiply-adds a row."""
    projected = lax.dot_general(x, inner, ((contract_x, (0,)), ((), ())))
    if inner.shape[1] == 1:
        vector, factor = projected[..., 0], outer[:, 0]
        if weight_first:
            return factor.reshape((-1,) + (1,) * vector.ndim) * vector[None]
        return vector[..., None] * factor.reshape((1,) * vector.ndim + (-1,))
    if weight_first:
        return lax.dot_general(outer, projected, (((1,), (projected.ndim - 1,)), ((), ())))
    return lax.dot_general(projected, outer, (((projected.ndim - 1,), (1,)), ((), ())))


def _has_matrix_rule(p: LowRankPerturbed, contract: tuple[int, ...], batch: tuple[int, ...]) -> bool:
    return p.weight.ndim == 2 and len(contract) == 1 and not batch


@quax.register(lax.dot_general_p)
def _(x: ArrayLike, p: LowRankPerturbed, *, dimension_numbers, **kwargs):
    (contract_x, contract_p), (_, batch_p) = dimension_numbers
    if not _has_matrix_rule(p, contract_p, batch_p):
        return lax.dot_general(x, p.materialise(), dimension_numbers, **kwargs)
    inner, outer = (p.a, p.b) if contract_p[0] == 0 else (p.b, p.a)
    z = lax.dot_general(x, p.weight, dimension_numbers, **kwargs)
    direction = _apply_factors(jnp.asarray(x), contract_x, inner, outer, weight_first=False)
    return inject(p.s, z, direction)


@quax.register(lax.dot_general_p)
def _(p: LowRankPerturbed, x: ArrayLike, *, dimension_numbers, **kwargs):
    (contract_p, contract_x), (batch_p, _) = dimension_numbers
    if not _has_matrix_rule(p, contract_p, batch_p):
        return lax.dot_general(p.materialise(), x, dimension_numbers, **kwargs)
    inner, outer = (p.a, p.b) if contract_p[0] == 0 else (p.b, p.a)
    z = lax.dot_general(p.weight, x, dimension_numbers, **kwargs)
    direction = _apply_factors(jnp.asarray(x), contract_x, inner, outer, weight_first=True)
    return inject(p.s, z, direction)


@quax.register(lax.dot_general_p)
def _(p: LowRankPerturbed, q: LowRankPerturbed, *, dimension_numbers, **kwargs):
    # materialising one leaves a product with one perturbed factor, which has a rule
    product: Any = quax.quaxify(lax.dot_general)
    return product(p.materialise(), q, dimension_numbers, **kwargs)


@quax.register(lax.transpose_p)
def _(p: LowRankPerturbed, *, permutation):
    if p.weight.ndim == 2 and tuple(permutation) == (1, 0):
        return LowRankPerturbed(p.weight.T, p.b, p.a, p.s)
    return lax.transpose(p.materialise(), permutation)


def _materialise_where_quax_differentiates_or_carries(trace: type) -> None:
    """Makes perturbed weights dense where Quax would take them apart.

    - A custom JVP rule gets the tangents of a value's fields as if they were a value of its own. The tangent of a b^T is not
      that of its fields, so a rule applied to a weight itself (`softplus(w)`) would lose it.
    - What a loop carries, or the branches of a `cond` return, must not change its kind; a weight does with its first update.

    Quax has no hook for either, so its trace is extended here; other users' Quax values pass through as before.
    """

    def dense(self: Any, tracer: Any) -> Any:
        value = self.to_value(tracer)
        if not isinstance(value, LowRankPerturbed):
            return tracer
        with set_current_trace(self.parent_trace):
            return value.materialise()

    custom_jvp, primitive_rule = trace.process_custom_jvp_call, trace.process_primitive

    def process_custom_jvp_call(self: Any, primitive: Any, fun: Any, jvp: Any, tracers: Any, **kwargs: Any) -> Any:
        return custom_jvp(self, primitive, fun, jvp, [dense(self, t) for t in tracers], **kwargs)

    def process_primitive(self: Any, primitive: Any, tracers: Any, params: dict[str, Any]) -> Any:
        if primitive is lax.cond_p:
            tracers = [dense(self, t) for t in tracers]
        elif primitive is lax.while_p:
            num_consts = params["cond_nconsts"] + params["body_nconsts"]
            tracers = [*tracers[:num_consts], *(dense(self, t) for t in tracers[num_consts:])]
        elif primitive is lax.scan_p:
            consts, carry, xs = unpack_scan_args(tracers, params)
            tracers = [*consts, *(dense(self, t) for t in carry), *xs]
        return primitive_rule(self, primitive, tracers, params)

    trace.process_custom_jvp_call, trace.process_primitive = process_custom_jvp_call, process_primitive


_materialise_where_quax_differentiates_or_carries(_QuaxTrace)
