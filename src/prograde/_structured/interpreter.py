"""Runs a program in which some values are weights that carry a structured tangent.

Each operation on such a weight has a rule (see `rules`), or the tangent is formed and the plain
operation runs. Loops, branches and calls are entered, with these exceptions, which get arrays: what
a loop carries, because a carry must not change its kind; and what a function with a
`jax.custom_jvp` is given, except where its rule does not need the weight itself.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, JaxprEqn

from prograde._control_flow import enter
from prograde._custom_vjp import bind_forward, is_custom_vjp, naming
from prograde._inject import inject_product
from prograde._jaxprs import (
    CALLS,
    as_closed,
    derivative_of,
    function_name,
    scan_groups,
    source,
    walk,
)
from prograde._structured.rules import RULES
from prograde._structured.tangent import PerturbedArray, Recorder

_ARITHMETIC = {"add", "sub", "mul", "div"}
_ENTERED = CALLS | {"cond", "scan", "while", "shard_map"}


def run(program: ClosedJaxpr, values: Sequence[Any]) -> list[Any]:
    """Runs a program on arrays and perturbed weights.

    The outputs are arrays and perturbed weights.
    """
    return walk(program, values, operation)


def dense(value: Any) -> Any:
    """The array that a value stands for."""
    return value.materialise() if isinstance(value, PerturbedArray) else value


def operation(eqn: JaxprEqn, values: list[Any]) -> Sequence[Any]:
    positions = tuple(i for i, v in enumerate(values) if isinstance(v, PerturbedArray))
    if not positions:
        return bind_forward(eqn, values)
    _tell_recorders(eqn, [values[i] for i in positions])
    name = eqn.primitive.name
    if name in _ENTERED:
        if name == "scan":
            num_slices = len(scan_groups(eqn, values)[2])
            first = len(values) - num_slices
            values = [*values[:first], *map(_along_axis_0, values[first:])]
        return naming(eqn, lambda: enter(eqn, values, run, dense, _specs))
    if name == "custom_jvp_call" and (out := _by_its_rule(eqn, values, positions)) is not None:
        return out
    if (rule := RULES.get((name, positions))) is not None:
        out = rule(*values, **eqn.params)
        if out is not NotImplemented:
            return out if eqn.primitive.multiple_results else [out]
    return bind_forward(eqn, [dense(_unless_small(v, eqn)) for v in values])


def _unless_small(value: Any, eqn: JaxprEqn) -> Any:
    """The weight without its recorder where forming its tangent costs less than the operation.

    A bias that is broadcast.
    """
    if isinstance(value, PerturbedArray) and eqn.primitive.name in _ARITHMETIC:
        formed = math.prod(np.broadcast_shapes(*(f.shape[:-1] for f in value.factors)))
        if formed < max(math.prod(v.aval.shape) for v in eqn.outvars):  # pyright: ignore
            return PerturbedArray(value.weight, value.factors, value.s)
    return value


def _tell_recorders(eqn: JaxprEqn, weights: Sequence[PerturbedArray]) -> None:
    recorders = [w.recorder for w in weights if w.recorder is not None]
    if not recorders:
        return
    by_hand = eqn.primitive.name == "custom_jvp_call" or is_custom_vjp(eqn)
    name = function_name(as_closed(eqn.params["call_jaxpr"])) if by_hand else eqn.primitive.name
    for recorder in recorders:
        recorder.primitive, recorder.place = name, source(eqn)


def _along_axis_0(value: Any) -> Any:
    """Repeats factors that do not vary along axis 0.

    So that `scan` can slice them together with the weight.
    """
    if not isinstance(value, PerturbedArray):
        return value
    length = value.weight.shape[0]
    factors = [jnp.broadcast_to(f, (length, *f.shape[1:])) for f in value.factors]
    s = jnp.broadcast_to(value.scalar, (length,) + (1,) * (value.weight.ndim - 1))
    return PerturbedArray(value.weight, tuple(factors), s, value.recorder)


def _specs(value: Any, spec: jax.P) -> list[jax.P]:
    """How the arrays inside a value are sharded: factors like the weight.

    Along the axes they vary along.
    """
    if not isinstance(value, PerturbedArray):
        return [spec]
    entries = (*spec, *[None] * (value.weight.ndim - len(spec)))
    factors = [
        jax.P(*(entry if n > 1 else None for entry, n in zip(entries, f.shape[:-1], strict=True)))
        for f in value.factors
    ]
    return [spec, *factors, jax.P()]


def _by_its_rule(eqn: JaxprEqn, values: list[Any], positions: tuple[int, ...]) -> list[Any] | None:
    """The outputs of a function with a `jax.custom_jvp`, whose rule is run on the factors.

    `None` where the rule needs the tangent formed.

    A rule is linear in the tangents. With t for that of the weight, the tangent of its output along
    s t is s times that along t: so the rule is a program with a perturbed weight of value 0, and
    its derivative by s is what is injected.
    """
    if len(positions) != 1 or any(
        not jnp.issubdtype(v.aval.dtype, jnp.inexact)  # pyright: ignore[reportAttributeAccessIssue]
        for v in (*eqn.outvars,)
    ):
        return None
    p = values[positions[0]]
    rule = derivative_of(eqn, positions)
    plain = [v.weight if isinstance(v, PerturbedArray) else v for v in values]

    def direction(k: int, recorder: Recorder | None) -> Callable[..., Any]:
        def along(*operands: Any) -> Any:
            plain, factors = operands[: len(values)], operands[len(values) :]

            def tangent(s: Any) -> Any:
                zero = PerturbedArray(
                    jnp.zeros_like(p.weight), factors, s.reshape(p.s.shape), recorder
                )
                return dense(run(rule, [*plain, zero])[k])

            return jax.jvp(tangent, (jnp.zeros(()),), (jnp.ones(()),))[1]

        return along

    trial = Recorder()
    for k in range(len(eqn.outvars)):
        jax.eval_shape(direction(k, trial), *plain, *p.factors)
    if trial.formed:
        return None
    out = bind_forward(eqn, plain)
    return [
        inject_product(p.scalar, z, direction(k, None), *plain, *p.factors)
        for k, z in enumerate(out)
    ]
