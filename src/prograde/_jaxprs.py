"""The walker of traced programs.

JAX writes a traced function down as a program (a *jaxpr*): a list of equations
`outputs = primitive(inputs)`, some of which hold inner programs, such as the body of a loop. Every
part of this package that reads programs does it through this module:

- `equations` and `subprograms` look at a program, `source` says which line of the user wrote an
  equation;
- `called` and `CALLS` say which operations only call another program;
- `walk` runs a program on values of any kind: arrays, weights with tangents, labels;
- `_control_flow.enter` runs one equation that holds inner programs, and lets the caller run these.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import equinox as eqx
import jax
from jax.core import Tracer
from jax.extend import source_info_util
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

# `source` names a line of the user, not one of the packages in between.
_HERE = os.path.dirname(__file__)
for _prefix in (
    eqx.__path__[0],
    f"{_HERE}/_",
    f"{_HERE}/estimators",
    f"{_HERE}/kit",
    f"{_HERE}/tangents",
):
    source_info_util.register_exclusion(_prefix)

CALLS = frozenset({"jit", "pjit", "closed_call", "core_call", "checkpoint", "remat2"})
"""The primitives that run their one inner program on their operands, and do nothing else.

Names differ between versions of JAX: `jit` was `pjit`, `checkpoint` is `remat2` in a program.
Functions with a derivative of their own (`custom_jvp_call`, `custom_vjp_call`) are not among them:
what to do with these is the caller's decision. `checkpoint` is, because it changes what reverse
mode stores and nothing else.
"""

UNKNOWN = "an unknown place"


# The equations that `walk` is inside, the innermost first.
_INSIDE: ContextVar[tuple[JaxprEqn, ...]] = ContextVar("inside", default=())


def source(eqn: JaxprEqn) -> str:
    """The line of the user's code that made an equation, `file:line:column (function)`.

    An equation that a library made has no such line. Then it is the line of the call or loop around
    it.
    """
    for place in (eqn, *_INSIDE.get()):
        if found := source_info_util.summarize(place.source_info):
            return found
    return UNKNOWN


def files_of(eqn: JaxprEqn) -> list[str]:
    """The source files on the way to an equation, the innermost first."""
    traceback = eqn.source_info.traceback
    frames = traceback.frames if traceback is not None else ()
    return [frame.file_name.replace("\\", "/") for frame in frames]


def bind(eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    """Runs one equation on arrays."""
    stack = source_info_util.current_name_stack() + eqn.source_info.name_stack
    with (
        source_info_util.user_context(eqn.source_info.traceback, name_stack=stack),
        eqn.ctx.manager,
    ):
        out = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
    return list(out) if eqn.primitive.multiple_results else [out]


def as_closed(program: Jaxpr | ClosedJaxpr) -> ClosedJaxpr:
    """The program with its constants; a program without any where it comes as a bare `Jaxpr`."""
    return program if isinstance(program, ClosedJaxpr) else ClosedJaxpr(program, ())


def bare(program: Jaxpr | ClosedJaxpr) -> Jaxpr:
    """The program without its constants."""
    return program.jaxpr if isinstance(program, ClosedJaxpr) else program


def inner_programs(eqn: JaxprEqn) -> list[Jaxpr | ClosedJaxpr]:
    """The programs in an equation's parameters: bodies of loops, branches, called functions."""
    found = []
    for value in eqn.params.values():
        for item in value if isinstance(value, list | tuple) else [value]:
            if isinstance(item, Jaxpr | ClosedJaxpr):
                found.append(item)
    return found


def subprograms(eqn: JaxprEqn) -> list[Jaxpr]:
    """`inner_programs` without their constants: some rules keep a program with open ones."""
    return [bare(program) for program in inner_programs(eqn)]


def called(eqn: JaxprEqn) -> ClosedJaxpr | None:
    """The program that a call runs on its operands; `None` for what is no call (see `CALLS`)."""
    return as_closed(inner_programs(eqn)[0]) if eqn.primitive.name in CALLS else None


def equations(jaxpr: Jaxpr) -> Iterator[JaxprEqn]:
    """All equations, those of inner programs included."""
    for eqn in jaxpr.eqns:
        yield from with_inner(eqn)


def with_inner(eqn: JaxprEqn) -> Iterator[JaxprEqn]:
    """An equation, and all equations of the programs inside it."""
    yield eqn
    for inner in subprograms(eqn):
        yield from equations(inner)


def function_name(closed: ClosedJaxpr) -> str:
    """The name of the function that was traced."""
    info = closed.jaxpr.debug_info
    return info.func_name if info is not None else "a function"


def scan_groups(eqn: JaxprEqn, values: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
    """The operands of a `scan`: its constants, its carry, and the arrays it runs over."""
    if "ft_in" in eqn.params:  # JAX from 0.11 on keeps the groups as trees
        consts, carry, xs = eqn.params["ft_in"].update(values).unpack()
        return list(consts.vals), list(carry.vals), list(xs.vals)
    first, second = eqn.params["num_consts"], eqn.params["num_carry"]
    return (
        list(values[:first]),
        list(values[first : first + second]),
        list(values[first + second :]),
    )


def traced(
    fun: Callable[..., Any], *args: Any
) -> tuple[ClosedJaxpr, Callable[[Sequence[Any]], Any]]:
    """A function as a program, and how its result follows from the values of the outputs.

    Outputs that depend on none of the arguments stay as they are, so that an array of numpy stays
    one of numpy.
    """
    results: list[Any] = []

    def outputs(*args: Any) -> list[Any]:
        leaves, tree = jax.tree.flatten(fun(*args))
        computed = [isinstance(leaf, Tracer) for leaf in leaves]
        results.append(
            (tree, [None if c else leaf for c, leaf in zip(computed, leaves, strict=True)])
        )
        results.append(computed)
        return [leaf for c, leaf in zip(computed, leaves, strict=True) if c]

    program = jax.make_jaxpr(outputs)(*args)
    (tree, constants), computed = results

    def rebuilt(values: Sequence[Any]) -> Any:
        remaining = iter(values)
        leaves = [next(remaining) if c else x for c, x in zip(computed, constants, strict=True)]
        return jax.tree.unflatten(tree, leaves)

    return program, rebuilt


def walk(
    program: Jaxpr | ClosedJaxpr,
    args: Sequence[Any],
    operation: Callable[[Any, list[Any]], Sequence[Any]],
    *,
    consts: Sequence[Any] | None = None,
    parts: Sequence[Any] | None = None,
    number: Callable[[Literal], Any] = lambda literal: literal.val,
    arrived: Callable[[Any, Any], Any] = lambda variable, value: value,
) -> list[Any]:
    """Runs a program equation by equation, on values of any kind.

    **Arguments:**

    - `program`, `args`: the program and one value for each of its inputs.
    - `operation`: gets an equation and the values of its inputs, returns the values of its outputs.
    - `consts`: the values of the program's constants, where they are not the arrays themselves.
    - `parts`: what to run in place of the program's equations: anything with `invars` and
      `outvars`.
    - `number`: the value of a number that is written into the program.
    - `arrived`: gets a variable and its value, returns what is kept of it.

    **Returns:** the values of the outputs.
    """
    jaxpr = bare(program)
    values: dict[Any, Any] = {}

    def read(atoms: Sequence[Any]) -> list[Any]:
        return [number(a) if isinstance(a, Literal) else values[a] for a in atoms]

    def write(variables: Sequence[Any], found: Sequence[Any]) -> None:
        for variable, value in zip(variables, found, strict=True):
            values[variable] = arrived(variable, value)

    write(jaxpr.constvars, as_closed(program).consts if consts is None else consts)
    write(jaxpr.invars, args)
    outside = _INSIDE.get()
    for eqn in jaxpr.eqns if parts is None else parts:
        token = _INSIDE.set((eqn, *outside))
        try:
            write(eqn.outvars, operation(eqn, read(eqn.invars)))
        finally:
            _INSIDE.reset(token)
    return read(jaxpr.outvars)


def derivative_of(eqn: JaxprEqn, moved: Sequence[int]) -> ClosedJaxpr:
    """The derivative of one equation along some of its operands, by its own rule if it has one.

    The inputs of the program are all operands, then the tangents of the operands `moved`; its
    outputs are the tangents of the outputs.
    """

    def derivative(values: list[Any], tangents: list[Any]) -> Any:
        def of_moved(*some: Any) -> list[Any]:
            complete = list(values)
            for i, value in zip(moved, some, strict=True):
                complete[i] = value
            return bind(eqn, complete)

        return jax.jvp(of_moved, [values[i] for i in moved], tangents)[1]

    avals = [v.aval for v in eqn.invars]
    return jax.make_jaxpr(derivative)(avals, [avals[i] for i in moved])
