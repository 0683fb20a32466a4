"""Runs one equation that holds inner programs, and lets the caller run these.

An inner program is run on the values it is given: arrays, or pytrees of arrays that stand for one
array, such as a weight with the factors of its tangent. Such values may enter a loop, a branch or a
call. They leave only a `jit`; from everything else come arrays.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from prograde import _findings
from prograde._jaxprs import CALLS, as_closed, bind, called, scan_groups

Run = Callable[[ClosedJaxpr, Sequence[Any]], list[Any]]
"""Runs a program on values, and returns the values of its outputs."""


def enter(
    eqn: JaxprEqn,
    values: Sequence[Any],
    run: Run,
    dense: Callable[[Any], Any] = lambda value: value,
    specs: Callable[[Any, Any], list[Any]] = lambda value, spec: [spec],
) -> list[Any]:
    """Runs an equation with `run` in place of JAX for the programs inside it.

    **Arguments:**

    - `eqn`, `values`: the equation and one value for each of its inputs.
    - `run`: runs an inner program. What it did is cached together with it, so it must be the same
      function for the same result.
    - `dense`: the array that a value stands for. It is applied where only arrays can be: to what a
      loop carries, and to what leaves anything but a `jit`.
    - `specs`: how the arrays inside a value are sharded over a mesh, given how the array is that it
      stands for.

    **Returns:** one value for each output of the equation.
    """
    name = eqn.primitive.name
    if name in ("jit", "pjit"):
        leaves, tree = jax.tree.flatten(list(values))
        return _jitted(run, called(eqn), tree, _findings.current(), *leaves)
    arrays: Run = lambda program, values: list(map(dense, run(program, values)))  # noqa: E731
    if name == "shard_map":
        return _shard_map(eqn, values, arrays, specs)
    if name in _ENTERED:
        return _ENTERED[name](eqn, values, arrays, dense)
    if name in CALLS:
        program = called(eqn)
        assert program is not None
        return arrays(program, values)
    # An operation that is not known here: its programs are replaced by what `run` makes of them.
    replaced = {k: _replaced(v, arrays) for k, v in eqn.params.items()}
    return bind(eqn.replace(params=replaced), list(map(dense, values)))


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _jitted(
    run: Run, program: ClosedJaxpr, tree: Any, findings: _findings.Findings | None, *leaves: Any
) -> list[Any]:
    del (
        findings
    )  # what ran while `check` was watching is not taken from the cache, nor the other way round
    return run(program, jax.tree.unflatten(tree, leaves))


def _replaced(value: Any, run: Run) -> Any:
    if isinstance(value, Jaxpr | ClosedJaxpr):
        program = as_closed(value)
        new = jax.make_jaxpr(lambda *args: run(program, args))(*program.in_avals)
        if isinstance(value, ClosedJaxpr):
            return new
        return value if new.consts else new.jaxpr
    if type(value) in (tuple, list):
        return type(value)(_replaced(item, run) for item in value)
    return value


def _flat(program: ClosedJaxpr, tree: Any, run: Run) -> Callable[..., list[Any]]:
    """The program as a function of the arrays inside its values."""
    return lambda *leaves: run(program, jax.tree.unflatten(tree, leaves))


def _cond(eqn: JaxprEqn, values: Sequence[Any], run: Run, dense: Any) -> list[Any]:
    if eqn.params.get("branches_platforms") is not None:
        return bind(eqn, list(map(dense, values)))
    index, *operands = values
    leaves, tree = jax.tree.flatten(operands)
    branches = [_flat(as_closed(branch), tree, run) for branch in eqn.params["branches"]]
    return lax.switch(dense(index), branches, *leaves)


def _checkpoint(eqn: JaxprEqn, values: Sequence[Any], run: Run, dense: Any) -> list[Any]:
    del dense
    program = called(eqn)
    assert program is not None
    leaves, tree = jax.tree.flatten(list(values))
    again = jax.checkpoint(
        _flat(program, tree, run),
        prevent_cse=eqn.params["prevent_cse"],
        policy=eqn.params["policy"],
    )
    return again(*leaves)


def _scan(eqn: JaxprEqn, values: Sequence[Any], run: Run, dense: Any) -> list[Any]:
    consts, carry, xs = scan_groups(eqn, values)
    program = as_closed(eqn.params["jaxpr"])

    def body(carry: list[Any], slices: list[Any]) -> tuple[list[Any], list[Any]]:
        out = run(program, [*consts, *carry, *slices])
        return out[: len(carry)], out[len(carry) :]

    carry, ys = lax.scan(
        body,
        list(map(dense, carry)),
        xs,
        length=eqn.params["length"],
        reverse=eqn.params["reverse"],
        unroll=eqn.params["unroll"],
    )
    return [*carry, *ys]


def while_parts(
    eqn: JaxprEqn, values: Sequence[Any]
) -> tuple[tuple[ClosedJaxpr, list[Any]], tuple[ClosedJaxpr, list[Any]], list[Any]]:
    """(condition, its constants), (body, its constants), and the carry of a `while_loop`."""
    in_cond, in_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    cond, body = as_closed(eqn.params["cond_jaxpr"]), as_closed(eqn.params["body_jaxpr"])
    of_body = list(values[in_cond : in_cond + in_body])
    return (cond, list(values[:in_cond])), (body, of_body), list(values[in_cond + in_body :])


def _while(eqn: JaxprEqn, values: Sequence[Any], run: Run, dense: Any) -> list[Any]:
    cond, body, carry = while_parts(eqn, values)
    carry = list(map(dense, carry))

    def of_arrays(program: ClosedJaxpr, consts: list[Any]) -> tuple[list[Any], ClosedJaxpr]:
        leaves, tree = jax.tree.flatten([*consts, *carry])
        inside = leaves[: len(leaves) - len(carry)]
        return inside, jax.make_jaxpr(_flat(program, tree, run))(*leaves)

    # The primitive is bound, because `lax.while_loop` refuses a condition that `vmap` made a
    # vector.
    cond_leaves, new_cond = of_arrays(*cond)
    body_leaves, new_body = of_arrays(*body)
    return lax.while_p.bind(
        *cond_leaves,
        *body_leaves,
        *carry,
        cond_nconsts=len(cond_leaves),
        cond_jaxpr=new_cond,
        body_nconsts=len(body_leaves),
        body_jaxpr=new_body,
    )


def _shard_map(
    eqn: JaxprEqn, values: Sequence[Any], run: Run, specs: Callable[[Any, Any], list[Any]]
) -> list[Any]:
    params = eqn.params
    leaves, tree = jax.tree.flatten(list(values))
    in_specs = [
        s for v, spec in zip(values, params["in_specs"], strict=True) for s in specs(v, spec)
    ]
    sharded = jax.shard_map(
        _flat(as_closed(params["jaxpr"]), tree, run),
        mesh=params["mesh"],
        in_specs=tuple(in_specs),
        out_specs=list(params["out_specs"]),
        axis_names=params["newly_manual_axes"],
        check_vma=params["check_vma"],
    )
    return sharded(*leaves)


_ENTERED = {
    "cond": _cond,
    "scan": _scan,
    "while": _while,
    "checkpoint": _checkpoint,
    "remat2": _checkpoint,
}
