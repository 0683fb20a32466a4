"""Value and directional derivative of a program, as one primitive that reverse mode accepts.

`evaluate` runs a traced program. Its derivative is the primitive `pushforward`,

    (x, v) -> (f(x), J(x) v),

which a plain `jax.jvp` runs as it stands: one forward run along v. Reverse mode asks for the part
that is linear in v. Then the primitive runs f along all unit vectors, keeps the Jacobian J(x), and
leaves the product `J v`, which reverse mode transposes. So it never meets the loops of f.

The Jacobian is computed by a program that goes through `evaluate` in its turn. That gives every
higher order.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import ShapedArray
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import ClosedJaxpr, Primitive, Var, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir
from jax.interpreters import partial_eval as pe
from jaxtyping import Array

from prograde._costs import live_bytes
from prograde._custom_vjp import run_forward

MAX_INPUTS = 20_000
_CHUNK_BYTES = 2**28  # of intermediate values, that all tangents of a chunk may take together


class Level(NamedTuple):
    """One `vmap` around the program: its size, and which primals and tangents it maps over."""

    size: int
    primals: tuple[bool, ...]
    tangents: tuple[bool, ...]


class Program(NamedTuple):
    """A traced program, and how its Jacobian is computed.

    **Fields:** `jaxpr`: its constants are concrete; `chunk`: the number of tangents that run
    together, or `None`; `gradient(active, *primals)`: computes values and an estimate of the
    gradient by the active inputs, in place of the exact Jacobian.
    """

    jaxpr: ClosedJaxpr
    chunk: int | None = None
    gradient: Callable[..., Any] | None = None

    @property
    def num_inputs(self) -> int:
        """The number of primal inputs."""
        return len(self.jaxpr.in_avals)

    @property
    def outputs(self) -> list[ShapedArray]:
        """Shapes and dtypes of the values."""
        return self.jaxpr.out_avals  # pyright: ignore[reportReturnType]

    @property
    def float_outputs(self) -> list[int]:
        """The positions of the outputs that have a tangent."""
        return [i for i, aval in enumerate(self.outputs) if jnp.issubdtype(aval.dtype, jnp.inexact)]


def evaluate(program: Program, *primals: Any) -> list[Array]:
    """Runs a program. Derivatives of the result, of any order and mode, run forward."""

    @jax.custom_jvp
    def call(*primals):
        return jaxpr_as_fun(program.jaxpr)(*primals)

    @functools.partial(call.defjvp, symbolic_zeros=True)
    def rule(primals, tangents):
        # a leaf that nobody differentiates by has a symbolic zero, and costs nothing
        active = tuple(i for i, t in enumerate(tangents) if not isinstance(t, SymbolicZero))
        values = [None] * len(program.outputs)
        dots: list[Any] = [SymbolicZero(aval.to_tangent_aval()) for aval in program.outputs]
        if not active:
            return call(*primals), dots
        out = pushforward_p.bind(
            *primals, *(tangents[i] for i in active), program=program, active=active, levels=()
        )
        values, found = out[: len(values)], out[len(values) :]
        for i, dot in zip(program.float_outputs, found, strict=True):
            dots[i] = dot
        return values, dots

    return call(*primals)


def push(program: Program, active: Sequence[int], *inputs: Any) -> list[Array]:
    """Runs the program along one tangent: its values, and the tangents of the float outputs.

    Without active inputs it returns the values alone.
    """
    primals, tangents = inputs[: program.num_inputs], inputs[program.num_inputs :]
    if not active:
        return jaxpr_as_fun(program.jaxpr)(*primals)

    def of_active(*chosen: Any) -> list[Array]:
        given = list(primals)
        for i, x in zip(active, chosen, strict=True):
            given[i] = x
        return run_forward(program.jaxpr, given)

    chosen = tuple(primals[i] for i in active)
    values, dots = jax.jvp(of_active, chosen, tuple(tangents))
    return [*values, *(dots[i] for i in program.float_outputs)]


def value_and_jacobian(program: Program, active: Sequence[int], *primals: Any) -> list[Array]:
    """The values, and for each float output its Jacobian [n, *shape] by all active inputs.

    n is the number of all entries of the active inputs. One forward run carries the value and the
    tangents of a chunk.
    """
    shapes = [program.jaxpr.in_avals[i] for i in active]
    n = sum(math.prod(aval.shape) for aval in shapes)  # pyright: ignore[reportAttributeAccessIssue]
    if program.gradient is not None:
        return program.gradient(active, *primals)
    if n > MAX_INPUTS and program.chunk is None:
        floats: list[Any] = [program.outputs[i] for i in program.float_outputs]
        size = n * sum(math.prod(aval.shape) * aval.dtype.itemsize for aval in floats)
        raise ValueError(
            f"forward_mode: reverse mode asks for the derivative by {n:,} numbers. It takes "
            f"{n:,} tangents, each at about the arithmetic of the function, and a Jacobian of "
            f"{size / 1e6:,.1f} MB. At most {MAX_INPUTS:,} are allowed unless `chunk` is given. "
            "Pass `estimator=` for a random estimate of the gradient of a scalar, differentiate by "
            "fewer inputs, or use reverse mode where the program has one."
        )

    def along(index: Array) -> list[Array]:
        return push(program, active, *primals, *_unit(index, shapes))

    num = len(program.outputs)
    if n == 0:
        values = jaxpr_as_fun(program.jaxpr)(*primals)
        floats = [program.outputs[i] for i in program.float_outputs]
        return [*values, *(jnp.zeros((0, *aval.shape), aval.dtype) for aval in floats)]
    size = program.chunk or _chunk(along, n)
    out = (
        lax.map(along, jnp.arange(n), batch_size=size)
        if size < n
        else jax.vmap(along)(jnp.arange(n))
    )
    return [*(x[0] for x in out[:num]), *out[num:]]  # all tangents have the same primal


def _unit(index: Array, shapes: Sequence[Any]) -> list[Array]:
    """The unit vector of this index, as arrays of these shapes."""
    found, first = [], 0
    for aval in shapes:
        size = math.prod(aval.shape)
        entries = (jnp.arange(first, first + size) == index).astype(aval.dtype)
        found.append(entries.reshape(aval.shape))
        first += size
    return found


def _chunk(along: Callable[[Array], Any], n: int) -> int:
    """The number of tangents whose intermediate values and results fit into `_CHUNK_BYTES`."""
    each = live_bytes(jax.make_jaxpr(along)(0).jaxpr)
    return max(1, min(n, _CHUNK_BYTES // max(each, 1)))


def product(num: int, *inputs: Any) -> list[Array]:
    """The tangents J v of the outputs, from Jacobians [n, *shape] and tangents of the inputs."""
    jacobians, tangents = inputs[:num], inputs[num:]
    flat = [jnp.ravel(t) for t in tangents]
    dtype = jnp.result_type(*flat)
    v = jnp.concatenate([x.astype(dtype) for x in flat])
    return [
        jnp.tensordot(v, jacobian, 1, preferred_element_type=jnp.result_type(v, jacobian)).astype(
            jacobian.dtype
        )
        for jacobian in jacobians
    ]


def _mapped(
    fun: Callable[..., list[Array]], levels: Sequence[tuple[int, Sequence[bool]]]
) -> Callable[..., list[Array]]:
    """`fun` under the `vmap` of each level, innermost first."""
    for size, flags in levels:
        axes = tuple(0 if mapped else None for mapped in flags)
        fun = jax.vmap(fun, in_axes=axes, axis_size=size)
    return fun


# the primitive (x, v) -> (f(x), J(x) v)

pushforward_p = Primitive("forward_mode_pushforward")
pushforward_p.multiple_results = True


def _pushed(
    *inputs: Any, program: Program, active: tuple[int, ...], levels: tuple[Level, ...]
) -> Any:
    fun, num = functools.partial(push, program, active), len(program.outputs)
    for level in levels:
        fun = _pushed_mapped(fun, level, num)
    return fun(*inputs)


def _pushed_mapped(fun: Callable[..., list[Array]], level: Level, num: int) -> Callable:
    """`fun` under one `vmap`. Values do not have its axis where it maps over tangents alone."""
    mapped = _mapped(fun, [(level.size, level.primals + level.tangents)])

    def run(*inputs: Any) -> list[Array]:
        out = mapped(*inputs)
        return out if any(level.primals) else [*(x[0] for x in out[:num]), *out[num:]]

    return run


def _pushed_shapes(
    *inputs: Any, program: Program, active: tuple[int, ...], levels: tuple[Level, ...]
) -> list[ShapedArray]:
    of_values = tuple(level.size for level in reversed(levels) if any(level.primals))
    of_dots = tuple(level.size for level in reversed(levels))
    floats = [program.outputs[i] for i in program.float_outputs]
    # an update keeps over which axes of a mesh a value varies
    values = [aval.update(shape=(*of_values, *aval.shape)) for aval in program.outputs]
    if not active:
        return values
    return values + [aval.update(shape=(*of_dots, *aval.shape)) for aval in floats]


def _pushed_jvp(primals: Any, tangents: Any, *, program: Program, active: Any, levels: Any) -> Any:
    """The derivative is the pushforward of the pushforward."""
    nonzero = tuple(i for i, t in enumerate(tangents) if not isinstance(t, ad.Zero))
    inner = [*program.jaxpr.in_avals, *(program.jaxpr.in_avals[i] for i in active)]
    traced = jax.make_jaxpr(functools.partial(push, program, active))(*inner)
    outer = Program(traced, program.chunk)
    deeper = []
    for level in levels:
        flags = level.primals + level.tangents
        deeper.append(Level(level.size, flags, tuple(flags[i] for i in nonzero)))
    out = pushforward_p.bind(
        *primals,
        *(tangents[i] for i in nonzero),
        program=outer,
        active=nonzero,
        levels=tuple(deeper),
    )
    values, found = out[: len(outer.outputs)], out[len(outer.outputs) :]
    dots: list[Any] = [ad.Zero(jax.typeof(value).to_tangent_aval()) for value in values]
    for i, dot in zip(outer.float_outputs, found, strict=True):
        dots[i] = dot
    return values, dots


def _pushed_batched(inputs: Any, dims: Any, *, program: Program, active: Any, levels: Any) -> Any:
    mapped = [dim is not None for dim in dims]
    moved = [
        jnp.moveaxis(x, d, 0) if m else x for x, d, m in zip(inputs, dims, mapped, strict=True)
    ]
    size = next(x.shape[0] for x, m in zip(moved, mapped, strict=True) if m)
    num = program.num_inputs
    level = Level(size, tuple(mapped[:num]), tuple(mapped[num:]))
    out = pushforward_p.bind(*moved, program=program, active=active, levels=(*levels, level))
    values = len(program.outputs)
    of_values = 0 if any(level.primals) else None
    return out, [of_values] * values + [0] * (len(out) - values)


def _pushed_known(trace: Any, *tracers: Any, program: Program, active: Any, levels: Any) -> Any:
    """Linearization: where only the tangents are unknown, the Jacobian is a known value."""
    num = program.num_inputs
    primals, tangents = tracers[:num], tracers[num:]
    parameters = {"program": program, "active": active, "levels": levels}
    if not all(x.is_known() for x in primals) or all(x.is_known() for x in tangents):
        return trace.default_process_primitive(pushforward_p, tracers, parameters)
    known = [x.pval.get_known() for x in primals]
    values, jacobians = _values_and_jacobians(known, program, active, levels)
    flags = _product_levels(levels, len(jacobians))
    dots = trace.default_process_primitive(
        product_p, [*jacobians, *tangents], {"num": len(jacobians), "levels": flags}
    )
    return [*values, *dots]


def _pushed_split(
    saveable: Any, unknown: Sequence[bool], instantiated: Sequence[bool], eqn: Any
) -> tuple[Any, Any, list[bool], list[bool], list[Any]]:
    """The same under `jax.checkpoint`: values are computed first, and the rest once more later."""
    del saveable
    program, levels = eqn.params["program"], eqn.params["levels"]
    num, values = program.num_inputs, len(program.outputs)
    needed = [
        x
        for x, there in zip(eqn.invars, instantiated, strict=True)
        if isinstance(x, Var) and not there
    ]
    everything = [True] * len(eqn.outvars)
    if any(unknown[:num]):
        return None, eqn, everything, everything, needed
    mapped = tuple(Level(level.size, level.primals, ()) for level in levels if any(level.primals))
    known = eqn.replace(
        invars=eqn.invars[:num],
        outvars=eqn.outvars[:values],
        params=eqn.params | {"active": (), "levels": mapped},
    )
    unknown_out = [False] * values + [True] * (len(eqn.outvars) - values)
    return known, eqn, unknown_out, everything, needed


def _values_and_jacobians(
    primals: Sequence[Any], program: Program, active: Any, levels: Sequence[Level]
) -> tuple[list[Array], list[Array]]:
    """Values and Jacobians under all levels, by a program whose derivatives run forward again."""
    traced = jax.make_jaxpr(functools.partial(value_and_jacobian, program, active))(
        *program.jaxpr.in_avals
    )
    run = functools.partial(evaluate, Program(traced, program.chunk))
    mapped = [(level.size, level.primals) for level in levels if any(level.primals)]
    out = _mapped(run, mapped)(*primals)
    return out[: len(program.outputs)], out[len(program.outputs) :]


def _pushed_transposed(
    cotangents: Any, *inputs: Any, program: Program, active: Any, levels: Any
) -> Any:
    """The pushforward is linear in its tangents: the cotangent of v is J^T times that of J v."""
    num = program.num_inputs
    primals, tangents = inputs[:num], inputs[num:]
    values, jacobians = _values_and_jacobians(primals, program, active, levels)
    flags = _product_levels(levels, len(jacobians))
    found = _product_transposed(
        cotangents[len(values) :], *jacobians, *tangents, num=len(jacobians), levels=flags
    )
    return [*([None] * num), *found[len(jacobians) :]]


# the product J v, which waits for its tangents

product_p = Primitive("forward_mode_product")
product_p.multiple_results = True


def _product_levels(levels: Sequence[Level], num: int) -> tuple[tuple[int, tuple[bool, ...]], ...]:
    """Each level of a pushforward as a level of its product, with `num` Jacobians first."""
    return tuple((level.size, (any(level.primals),) * num + level.tangents) for level in levels)


def _product(*inputs: Any, num: int, levels: Any) -> list[Array]:
    return _mapped(functools.partial(product, num), levels)(*inputs)


def _product_shapes(*inputs: Any, num: int, levels: Any) -> list[ShapedArray]:
    traced = jax.make_jaxpr(functools.partial(_product, num=num, levels=levels))(*inputs)
    return list(traced.out_avals)  # pyright: ignore[reportReturnType]


def _product_jvp(primals: Any, tangents: Any, **parameters: Any) -> Any:
    tangents = [ad.instantiate_zeros(t) for t in tangents]
    return jax.jvp(functools.partial(_product, **parameters), tuple(primals), tuple(tangents))


def _product_batched(inputs: Any, dims: Any, **parameters: Any) -> Any:
    axes = tuple(None if dim is None else dim for dim in dims)
    out = jax.vmap(functools.partial(_product, **parameters), in_axes=axes)(*inputs)
    return out, [0] * len(out)


def _product_transposed(cotangents: Any, *inputs: Any, num: int, levels: Any) -> Any:
    jacobians, tangents = inputs[:num], inputs[num:]
    unknown = [ad.is_undefined_primal(t) for t in tangents]
    avals = [t.aval for t, u in zip(tangents, unknown, strict=True) if u]

    def of_unknown(*chosen: Any) -> list[Array]:
        # what is known contributes a constant, which has no part in the transpose
        given, rest = iter(chosen), []
        for t, u in zip(tangents, unknown, strict=True):
            rest.append(next(given) if u else jnp.zeros_like(t))
        return _product(*jacobians, *rest, num=num, levels=levels)

    found = iter(
        jax.linear_transpose(of_unknown, *avals)([ad.instantiate_zeros(c) for c in cotangents])
    )
    return [*([None] * num), *(next(found) if u else None for u in unknown)]


for _primitive, _run, _shapes, _jvp, _batched, _transposed in (
    (pushforward_p, _pushed, _pushed_shapes, _pushed_jvp, _pushed_batched, _pushed_transposed),
    (product_p, _product, _product_shapes, _product_jvp, _product_batched, _product_transposed),
):
    _primitive.def_impl(_run)  # without jit, operation by operation
    _primitive.def_abstract_eval(_shapes)
    mlir.register_lowering(_primitive, mlir.lower_fun(_run, multiple_results=True))
    ad.primitive_jvps[_primitive] = _jvp
    ad.primitive_transposes[_primitive] = _transposed
    batching.primitive_batchers[_primitive] = _batched
pe.custom_partial_eval_rules[pushforward_p] = _pushed_known
pe.partial_eval_jaxpr_custom_rules[pushforward_p] = _pushed_split
