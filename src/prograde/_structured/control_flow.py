"""Loops, branches and calls that a perturbed weight enters. Extends Quax's trace, which has no hook for it.

- The last branch of a decision, what a loop carries, and what a custom JVP rule is given must not be a perturbed weight:
  a carry must not change its kind, and the tangent of a b^T is not that of its factors. These are made dense.
- What enters otherwise keeps its factors: constants of loops, the stacked weights a `scan` runs over, operands of
  branches, of `jax.checkpoint` and of `shard_map`.

Other users' Quax values pass through as before.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import quax
from jax import lax
from jax._src.ad_checkpoint import remat_p
from jax._src.core import TraceTag, set_current_trace, take_current_trace
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from quax._compat import unpack_scan_args
from quax._trace import _QuaxTrace, _QuaxTracer
from quax._values import _DenseArrayValue

from prograde._custom_vjp import call_without_reverse_rule
from prograde._structured.tangent import PerturbedArray


def _dense(value: Any) -> Any:
    return value.materialise() if isinstance(value, PerturbedArray) else value


def _array(value: Any) -> Any:
    return value.array if type(value) is _DenseArrayValue else value


def _flat_call(jaxpr: Any, tree: Any) -> Callable[..., list[Any]]:
    """The jaxpr as a function of the arrays inside its values, which returns dense arrays."""
    closed = jaxpr if isinstance(jaxpr, ClosedJaxpr) else ClosedJaxpr(jaxpr, ())

    def call(*leaves: Any) -> list[Any]:
        return [_dense(out) for out in quax.quaxify(jaxpr_as_fun(closed))(*jax.tree.unflatten(tree, leaves))]

    return call


def _cond(index: Any, *operands: Any, branches: Sequence[ClosedJaxpr], **params: Any) -> list[Any]:
    if params.get("branches_platforms") is not None:
        return lax.cond_p.bind(index, *map(_dense, operands), branches=branches, **params)
    leaves, tree = jax.tree.flatten(operands)
    return lax.switch(index, [_flat_call(branch, tree) for branch in branches], *leaves)


def _checkpoint(*operands: Any, jaxpr: Any, prevent_cse: Any, policy: Any, **_: Any) -> list[Any]:
    leaves, tree = jax.tree.flatten(operands)
    return jax.checkpoint(_flat_call(jaxpr, tree), prevent_cse=prevent_cse, policy=policy)(*leaves)


_WITH_FACTORS: dict[Any, Callable[..., Any]] = {lax.cond_p: _cond, remat_p: _checkpoint}


def _along_axis_0(p: PerturbedArray) -> PerturbedArray:
    """Repeats factors that do not vary along axis 0, so that `scan` can slice them together with the weight."""
    length = p.weight.shape[0]
    factors = [jnp.broadcast_to(f, (length, *f.shape[1:])) for f in p.factors]
    s = jnp.broadcast_to(p.scalar, (length,) + (1,) * (p.weight.ndim - 1))
    return PerturbedArray(p.weight, tuple(factors), s, p.recorder)


def _specs(value: Any, spec: jax.P) -> list[jax.P]:
    """How the arrays inside a value are sharded: its factors as the weight, along the axes they vary along."""
    if not isinstance(value, PerturbedArray):
        return [spec]
    entries = (*spec, *[None] * (value.weight.ndim - len(spec)))
    factors = [
        jax.P(*(entry if n > 1 else None for entry, n in zip(entries, f.shape[:-1], strict=True)))
        for f in value.factors
    ]
    return [spec, *factors, jax.P()]


def _extend(trace: Any) -> None:
    custom_jvp, primitive_rule = trace.process_custom_jvp_call, trace.process_primitive

    def map_tracers(self: Any, function: Callable[[PerturbedArray], Any], tracers: Sequence[Any]) -> list[Any]:
        def one(tracer: Any) -> Any:
            value = self.to_value(tracer)
            if not isinstance(value, PerturbedArray):
                return tracer
            with set_current_trace(self.parent_trace):
                out = function(value)
            return _QuaxTracer(self, out) if isinstance(out, PerturbedArray) else out

        return [one(tracer) for tracer in tracers]

    def process_custom_jvp_call(self: Any, primitive: Any, fun: Any, jvp: Any, tracers: Any, **kwargs: Any) -> Any:
        tracers = map_tracers(self, PerturbedArray.materialise, tracers)
        return custom_jvp(self, primitive, fun, jvp, tracers, **kwargs)

    def process_custom_vjp_call(
        self: Any, primitive: Any, fun: Any, fwd: Any, bwd: Any, tracers: Any, **params: Any
    ) -> list[Any]:
        dense = [_array(self.to_value(t)) for t in map_tracers(self, PerturbedArray.materialise, tracers)]
        with set_current_trace(self.parent_trace):
            out = call_without_reverse_rule(fun, dense)
        return [_QuaxTracer(self, self.to_value(x)) for x in out]

    def process_shard_map(self: Any, primitive: Any, fun: Any, tracers: Any, *, in_specs: Any, **params: Any) -> Any:
        values = [self.to_value(t) for t in tracers]
        leaves, tree = jax.tree.flatten(values)
        specs = tuple(s for value, spec in zip(values, in_specs, strict=True) for s in _specs(value, spec))

        def inside(*leaves: Any) -> Any:
            with take_current_trace() as parent:
                inner = _QuaxTrace(parent, TraceTag())
                tracers = [_QuaxTracer(inner, value) for value in jax.tree.unflatten(tree, leaves)]
                with set_current_trace(inner):
                    out = fun(*tracers)
                with set_current_trace(parent):
                    return out.map(lambda t: _array(_dense(inner.to_value(t))))

        avals = [jax.typeof(x) for x in leaves]
        params |= {"subfuns": (inside,), "in_specs": specs}
        out = primitive.bind_with_trace(self.parent_trace, tuple(leaves), avals, params)
        return out.map(lambda x: _QuaxTracer(self, self.to_value(x)))

    def process_primitive(self: Any, primitive: Any, tracers: Any, params: dict[str, Any]) -> Any:
        values = [self.to_value(t) for t in tracers]
        perturbed = [v for v in values if isinstance(v, PerturbedArray)]
        if not perturbed:
            return primitive_rule(self, primitive, tracers, params)
        for value in perturbed:
            if value.recorder is not None:
                value.recorder.primitive = primitive.name
        if primitive in _WITH_FACTORS:
            plain = [_array(v) for v in values]
            with set_current_trace(self.parent_trace):
                out = _WITH_FACTORS[primitive](*plain, **params)
            return [_QuaxTracer(self, self.to_value(x)) for x in out]
        dense = PerturbedArray.materialise
        if primitive is lax.while_p:
            num_consts = params["cond_nconsts"] + params["body_nconsts"]
            tracers = [*tracers[:num_consts], *map_tracers(self, dense, tracers[num_consts:])]
        elif primitive is lax.scan_p:
            consts, carry, xs = unpack_scan_args(tracers, params)
            tracers = [*consts, *map_tracers(self, dense, carry), *map_tracers(self, _along_axis_0, xs)]
        return primitive_rule(self, primitive, tracers, params)

    trace.process_custom_jvp_call = process_custom_jvp_call
    trace.process_custom_vjp_call = process_custom_vjp_call
    trace.process_primitive = process_primitive
    trace.process_shard_map = process_shard_map


_extend(_QuaxTrace)
