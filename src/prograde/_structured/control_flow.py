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
        return [
            _dense(out)
            for out in quax.quaxify(jaxpr_as_fun(closed))(*jax.tree.unflatten(tree, leaves))
        ]

    return call


def _cond(index: Any, *operands: Any, branches: Sequence[ClosedJaxpr], **params: Any) -> list[Any]:
    if params.get("branches_platforms") is not None:
        return lax.cond_p.bind(index, *map(_dense, operands), branches=branches, **params)
    leaves, tree = jax.tree.flatten(operands)
    return lax.switch(index, [_flat_call(branch, tree) for branch in branches], *leaves)


def _checkpoint(*operands: Any, jaxpr: Any, prevent_cse: Any, policy: Any, **_: Any) -> list[Any]:
    leaves, tree = jax.tree.flatten(operands)
    return jax.checkpoint(_flat_call(jaxpr, tree), prevent_cse=prevent_cse, policy=policy)(*leaves)


def _along_axis_0(value: Any) -> Any:
    """Repeats factors that do not vary along axis 0, so that `scan` can slice them together with the weight."""
    if not isinstance(value, PerturbedArray):
        return value
    length = value.weight.shape[0]
    factors = [jnp.broadcast_to(f, (length, *f.shape[1:])) for f in value.factors]
    s = jnp.broadcast_to(value.scalar, (length,) + (1,) * (value.weight.ndim - 1))
    return PerturbedArray(value.weight, tuple(factors), s, value.recorder)


def _scan(
    *operands: Any, jaxpr: ClosedJaxpr, length: int, reverse: bool, unroll: int, **params: Any
) -> list[Any]:
    consts, carry, xs = unpack_scan_args(operands, params)
    carry = [_dense(value) for value in carry]
    leaves, tree = jax.tree.flatten([_along_axis_0(value) for value in xs])

    def body(carry: list[Any], leaves: list[Any]) -> tuple[list[Any], list[Any]]:
        values, tree_of_all = jax.tree.flatten([*consts, *carry, *jax.tree.unflatten(tree, leaves)])
        out = _flat_call(jaxpr, tree_of_all)(*values)
        return out[: len(carry)], out[len(carry) :]

    carry, ys = lax.scan(body, carry, leaves, length=length, reverse=reverse, unroll=unroll)
    return [*carry, *ys]


def _while(
    *operands: Any,
    cond_nconsts: int,
    cond_jaxpr: ClosedJaxpr,
    body_nconsts: int,
    body_jaxpr: ClosedJaxpr,
) -> list[Any]:
    cond_consts, body_consts = (
        operands[:cond_nconsts],
        operands[cond_nconsts : cond_nconsts + body_nconsts],
    )
    carry = [_dense(value) for value in operands[cond_nconsts + body_nconsts :]]

    def of_arrays(jaxpr: ClosedJaxpr, consts: Sequence[Any]) -> tuple[list[Any], ClosedJaxpr]:
        leaves, tree = jax.tree.flatten([*consts, *carry])
        return leaves[: len(leaves) - len(carry)], jax.make_jaxpr(_flat_call(jaxpr, tree))(*leaves)

    # bound as it was, and not built anew by `while_loop`: under `vmap` its condition may be a vector
    cond_leaves, new_cond = of_arrays(cond_jaxpr, cond_consts)
    body_leaves, new_body = of_arrays(body_jaxpr, body_consts)
    return lax.while_p.bind(
        *cond_leaves,
        *body_leaves,
        *carry,
        cond_nconsts=len(cond_leaves),
        cond_jaxpr=new_cond,
        body_nconsts=len(body_leaves),
        body_jaxpr=new_body,
    )


_WITH_FACTORS: dict[Any, Callable[..., Any]] = {
    lax.cond_p: _cond,
    lax.scan_p: _scan,
    lax.while_p: _while,
    remat_p: _checkpoint,
}


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


def _name(values: Sequence[Any], operation: str) -> None:
    """Tells the recorders of these values what is being done."""
    for value in values:
        if isinstance(value, PerturbedArray) and value.recorder is not None:
            value.recorder.primitive = operation


def _extend(trace: Any) -> None:
    custom_jvp, primitive_rule = trace.process_custom_jvp_call, trace.process_primitive

    def dense_tracers(self: Any, tracers: Sequence[Any], name: str) -> list[Any]:
        with set_current_trace(self.parent_trace):
            values = [self.to_value(t) for t in tracers]
            _name(values, name)
            return [
                _dense(v) if isinstance(v, PerturbedArray) else t
                for v, t in zip(values, tracers, strict=True)
            ]

    def process_custom_jvp_call(
        self: Any, primitive: Any, fun: Any, jvp: Any, tracers: Any, **kwargs: Any
    ) -> Any:
        dense = dense_tracers(self, tracers, fun.debug_info.func_name)
        return custom_jvp(self, primitive, fun, jvp, dense, **kwargs)

    def process_custom_vjp_call(
        self: Any, primitive: Any, fun: Any, fwd: Any, bwd: Any, tracers: Any, **params: Any
    ) -> list[Any]:
        dense = [
            _array(self.to_value(t)) for t in dense_tracers(self, tracers, fun.debug_info.func_name)
        ]
        with set_current_trace(self.parent_trace):
            out = call_without_reverse_rule(fun, dense)
        return [_QuaxTracer(self, self.to_value(x)) for x in out]

    def process_shard_map(
        self: Any, primitive: Any, fun: Any, tracers: Any, *, in_specs: Any, **params: Any
    ) -> Any:
        values = [self.to_value(t) for t in tracers]
        leaves, tree = jax.tree.flatten(values)
        specs = tuple(
            s for value, spec in zip(values, in_specs, strict=True) for s in _specs(value, spec)
        )

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
        if not any(isinstance(v, PerturbedArray) for v in values):
            return primitive_rule(self, primitive, tracers, params)
        _name(values, primitive.name)
        if primitive in _WITH_FACTORS:
            plain = [_array(v) for v in values]
            with set_current_trace(self.parent_trace):
                out = _WITH_FACTORS[primitive](*plain, **params)
            return [_QuaxTracer(self, self.to_value(x)) for x in out]
        return primitive_rule(self, primitive, tracers, params)

    trace.process_custom_jvp_call = process_custom_jvp_call
    trace.process_custom_vjp_call = process_custom_vjp_call
    trace.process_primitive = process_primitive
    trace.process_shard_map = process_shard_map


_extend(_QuaxTrace)
