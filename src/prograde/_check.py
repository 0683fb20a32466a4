"""What stands in the way of a forward run, and what it will cost, before a long one is begun."""

import logging
import math
import warnings
from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, JaxprEqn, jaxpr_as_fun
from jax.interpreters.partial_eval import dce_jaxpr
from jaxtyping import PyTree

from prograde._check_report import CheckReport
from prograde._costs import largest_array, multiply_adds
from prograde._custom_vjp import describe, inline_custom_vjp
from prograde._findings import Findings, watching
from prograde._jaxprs import equations, scan_groups, source, traced
from prograde.estimators import (
    Backprop,
    CheckpointedBackprop,
    Estimator,
    ForwardJacobian,
    WeightPerturbation,
)
from prograde.estimators.one_block import mean_cost
from prograde.kit import Loss, in_groups
from prograde.tangents import Blocks

__all__ = ["CheckReport", "check"]

_LOG = logging.getLogger("prograde.check")


def check(
    fun: Callable[..., Any],
    params: PyTree,
    *args: Any,
    estimator: Estimator | None = None,
    has_aux: bool = False,
    memory: bool | Literal["both"] = True,
    run: bool = False,
) -> CheckReport:
    """Says before a long run what blocks forward mode, what is always zero, and what it costs.

    The estimate is traced, and not run. So whatever the report says of blocked functions and formed
    tangents is what a run would meet.

    **Arguments:**

    - `fun`, `params`, `args`, `has_aux`: as for `value_and_grad`. Arrays may be
      `jax.ShapeDtypeStruct`.
    - `estimator`: what is going to be used; `WeightPerturbation()` when not given.
    - `memory`: whether to compile the estimate for XLA's figure of its temporary memory; `"both"`
      also compiles the function alone, to compare.
    - `run`: whether to compute one estimate, to say which parameters get one that is not finite
      although the loss is. Needs arrays, and the memory of an estimate.

    **Returns:** a `CheckReport`; print it.

    **Bias and variance:** none; the report is exact, except that costs are a count of operations
    and not a time.

    **Cost:** traces `fun` once (estimators on pre-activations: once more, with twice the batch).
    With `memory=True` it compiles the estimate. With `num_groups` above 1 and arrays given, it
    computes the loss of the batch and of each group, to see that the one is the mean of the others.
    It logs what it does, as `prograde.check` at level INFO.

    **Errors:** as `value_and_grad` for parameters and losses that no estimator takes; `ValueError`
    for `run=True` with shapes in place of arrays. What blocks forward mode is reported, and is no
    error here.

    **Source:** the rules of forward mode as in arXiv 2202.08587, section 2.

    Examples:
        >>> import jax, jax.numpy as jnp, prograde as pg
        >>> def loss_fn(params, x):
        ...     return jnp.mean(jnp.tanh(x @ params["w"]) @ jnp.exp(params["u"]))
        >>> params = {"w": jnp.ones((64, 32)), "u": jnp.ones((32, 16))}
        >>> report = pg.check(loss_fn, params, jnp.ones((256, 64)), memory=False)
        >>> [(path, fallback.primitive) for path, fallback in report.dense]
        [("params['u']", 'exp')]
        >>> report.ok, report.cost_ratio < 2
        (True, True)
    """
    estimator = WeightPerturbation() if estimator is None else estimator
    if not isinstance(estimator, Estimator):
        raise TypeError(f"estimator={estimator!r}, but an instance of an estimator is needed.")
    if memory not in (True, False, "both"):
        raise ValueError(f"memory={memory!r}, but it is True, False or 'both'.")
    shapes = [x for x in jax.tree.leaves((params, args)) if isinstance(x, jax.ShapeDtypeStruct)]
    if run and shapes:
        raise ValueError(
            f"run=True, but the arguments hold shapes in place of arrays, such as {shapes[0]}. "
            "Pass arrays, or run=False."
        )
    given = params, args
    is_array = lambda x: isinstance(x, jax.ShapeDtypeStruct)  # noqa: E731
    abstract = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if eqx.is_array(x) else x  # noqa: E731
    dynamic, static = eqx.partition(jax.tree.map(abstract, given), is_array)
    once = _traced_once(fun)

    def pieces(dynamic: PyTree) -> tuple[Callable, PyTree]:
        params, args = eqx.combine(dynamic, static)
        loss = Loss(estimator.objective(once, has_aux), params, args, has_aux)
        return loss, loss.floats

    def alone(dynamic: PyTree) -> Any:
        f, floats = pieces(dynamic)
        return f(floats)

    states: list[PyTree] = []

    def estimate(dynamic: PyTree) -> Any:
        params, args = eqx.combine(dynamic, static)
        key = jax.random.key(0)
        states.append(estimator.init(once, params, *args, has_aux=has_aux))
        result = estimator.estimate(once, key, states[-1], params, *args, has_aux=has_aux)
        return result.value, result.grads

    with watching() as findings, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        _LOG.info("tracing the function")
        program = jax.make_jaxpr(alone)(dynamic)
        _LOG.info("tracing the estimate")
        staged = _staged(estimate, dynamic, program, findings)
    with watching() as of_code:
        always_zero = _always_zero(pieces, dynamic)
    for w in said:
        if not issubclass(w.category, RuntimeWarning):
            warnings.warn_explicit(w.message, w.category, w.filename, w.lineno)
    blocking = tuple(findings.refused)
    compiled, own = None, None
    if (memory or run) and staged is not None and not blocking:
        _LOG.info("compiling the estimate")
        compiled = staged.lower().compile()
        own = jax.jit(alone).lower(dynamic).compile() if memory == "both" else None
    floats = eqx.filter_eval_shape(lambda dynamic: pieces(dynamic)[1], dynamic)
    sizes = [w.size * w.dtype.itemsize for w in jax.tree.leaves(floats)]
    num_parameters = sum(w.size for w in jax.tree.leaves(floats))
    state_bytes = sum(
        x.size * x.dtype.itemsize for x in jax.tree.leaves(states[-1]) if eqx.is_array(x)
    )
    largest: Any = None if staged is None else largest_array(staged.jaxpr.jaxpr)
    if largest and largest[0] <= max(_SMALL, largest_array(program.jaxpr)[0], *sizes):
        largest = None
    values = compiled(eqx.filter(given, eqx.is_array)) if run and compiled is not None else None
    return CheckReport(
        estimator=estimator,
        num_parameters=num_parameters,
        blocking=blocking,
        remedies=tuple(findings.refused.values()),
        bypassed=() if blocking else tuple(findings.inlined),
        always_zero=() if of_code.refused else always_zero,
        dense=() if blocking else tuple(findings.dense),
        sites=() if blocking else tuple(findings.sites),
        cost_ratio=None
        if blocking or staged is None
        else _cost(estimator, pieces, dynamic, staged.jaxpr.jaxpr, program.jaxpr),
        memory=_temporaries(compiled) if memory else None,
        memory_alone=_temporaries(own),
        state_bytes=state_bytes,
        largest=largest,
        advice=(
            *(str(w.message) for w in said if issubclass(w.category, RuntimeWarning)),
            *_advice(estimator, 0 if said else state_bytes, sum(sizes), largest),
            *_about_loops(estimator, num_parameters, program, bool(blocking)),
            *(() if shapes else _about_groups(fun, params, args, estimator, has_aux)),
        ),
        not_finite=() if values is None else _not_finite(*values),
    )


def _cost(
    estimator: Estimator, pieces: Callable, dynamic: PyTree, staged: Any, program: Any
) -> float:
    """The multiply-adds of the estimate over those of the function, in the mean over blocks."""
    bare, found = multiply_adds(program), []

    def in_blocks(dynamic: PyTree) -> None:
        found.append(mean_cost(estimator, pieces(dynamic)[0], bare))

    if isinstance(getattr(estimator, "tangents", None), Blocks):
        jax.eval_shape(in_blocks, dynamic)
    (cost,) = found or [None]
    return (multiply_adds(staged) if cost is None else cost) / max(1, bare)


_SMALL = 2**20  # bytes; nothing below is worth a word
_FEW = 100  # parameters, up to which the exact gradient by forward mode is the better choice
_LONG = 100  # steps of a loop
_ROOM = 2**28  # bytes of all tangents that run together

_WRAP = (
    "Its number of steps is not known before it runs. Wrap the function in pg.forward_mode, "
    "which jax.grad accepts, or take the estimator ForwardJacobian() for few parameters and "
    "WeightPerturbation() for many."
)


def _staged(
    estimate: Callable[..., Any], dynamic: PyTree, program: ClosedJaxpr, findings: Findings
) -> Any:
    """The traced estimate, or `None` where a loop blocks reverse mode, which is noted."""
    try:
        return jax.jit(estimate).trace(dynamic)
    except ValueError as error:
        if "Reverse-mode differentiation does not work" not in str(error):
            raise
    for eqn in equations(program.jaxpr):
        if eqn.primitive.name == "while":
            findings.refused[describe(eqn)] = _WRAP
    return None


def _about_loops(
    estimator: Estimator, num_parameters: int, program: ClosedJaxpr, blocked: bool
) -> list[str]:
    """What to take where few parameters stand behind long loops, and what their outputs cost."""
    loops = [eqn for eqn in equations(program.jaxpr) if _is_long(eqn)]
    if blocked or not loops or not num_parameters:
        return []
    found = []
    reverse = isinstance(estimator, Backprop | CheckpointedBackprop)
    if num_parameters <= _FEW and not isinstance(estimator, ForwardJacobian):
        gain = "and stores no step" if reverse else "exactly"
        found.append(
            f"{num_parameters} parameters are few, and a long loop follows, at {source(loops[0])}. "
            f"ForwardJacobian() computes the gradient by {num_parameters} tangents, {gain}. "
            "pg.forward_mode does so in libraries that call jax.grad."
        )
    together = num_parameters if isinstance(estimator, ForwardJacobian) else 1
    together = getattr(estimator, "num_tangents", together)
    chunk = getattr(estimator, "chunk", None)
    for eqn in loops if not reverse else []:
        saved = _saved_bytes(eqn)
        if saved > _SMALL and saved * (chunk or together) > _ROOM:
            found.append(
                f"the loop at {source(eqn)} saves {saved / 1e6:,.0f} MB, and as much for each of "
                f"{together} tangents. Put what follows into the loop, or pass "
                f"chunk={max(1, _ROOM // saved)}, which keeps tangents below 256 MiB."
            )
    return found


def _is_long(eqn: JaxprEqn) -> bool:
    name = eqn.primitive.name
    return name == "while" or (name == "scan" and eqn.params["length"] >= _LONG)


def _saved_bytes(eqn: JaxprEqn) -> int:
    """Bytes of what a loop saves at each step."""
    if eqn.primitive.name != "scan":
        return 0
    saved: list[Any] = [v.aval for v in eqn.outvars[len(scan_groups(eqn, eqn.invars)[1]) :]]
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in saved)


def _advice(estimator: Estimator, state: int, params: int, largest: Any) -> list[str]:
    """What to take instead where the state or a temporary is much larger than the parameters."""
    found = []
    if state > max(_SMALL, 4 * params):
        found.append(
            f"the state is {state / params:,.0f} times the parameters. ActivityPerturbation keeps "
            "none, and "
            "WeightPerturbation(LowRank(rank=1)) neither keeps state nor stores activations."
        )
    if largest is not None and largest[0] > 4 * params:
        smaller = (
            "Pass a smaller chunk"
            if hasattr(estimator, "chunk") and getattr(estimator, "num_tangents", 2) > 1
            else "Take a smaller batch, or WeightPerturbation(LowRank(rank=1))"
        )
        found.append(
            f"the largest temporary is {largest[0] / params:,.0f} times the parameters. {smaller}, "
            "if it does not fit."
        )
    return found


def _about_groups(
    fun: Callable, params: PyTree, args: tuple[Any, ...], estimator: Any, has_aux: bool
) -> list[str]:
    """A sentence where groups of examples get tangents of their own.

    And the loss is not the mean of theirs.
    """
    while not hasattr(estimator, "num_groups") and hasattr(estimator, "estimator"):
        estimator = estimator.estimator
    groups = getattr(estimator, "num_groups", 1)
    if groups == 1:
        return []
    arrays, rest = in_groups(args, groups)

    def losses(arrays: PyTree) -> tuple[Any, Any]:
        of = lambda args: Loss(fun, params, args, has_aux)  # noqa: E731
        whole = of(args)
        each = lambda arrays: jnp.mean(of(eqx.combine(arrays, rest))(whole.floats)[0])  # noqa: E731
        return jnp.mean(whole(whole.floats)[0]), jnp.mean(jax.vmap(each)(arrays))

    whole, mean = (float(x) for x in jax.jit(losses)(arrays))
    if np.isclose(whole, mean, rtol=1e-2, atol=1e-6):
        return []
    return [
        f"the loss of the batch is {whole:.4g}, but the mean of the losses of its {groups} groups "
        f"is {mean:.4g}, and "
        f"num_groups={groups} estimates the gradient of the latter. Return the mean over the "
        "examples, or the losses of all "
        "examples."
    ]


def _not_finite(value: Any, grads: PyTree) -> tuple[str, ...]:
    """Paths of parameters whose estimate is not finite, where the loss is."""
    if not np.isfinite(value):
        return ()
    return tuple(
        f"params{jax.tree_util.keystr(path)}"
        for path, g in jax.tree_util.tree_leaves_with_path(grads)
        if not np.isfinite(np.asarray(g, np.float64)).all()
    )


def _temporaries(compiled: Any) -> int | None:
    analysis = None if compiled is None else compiled.memory_analysis()
    return None if analysis is None else analysis.temp_size_in_bytes


def _traced_once(fun: Callable[..., Any]) -> Callable[..., Any]:
    """The function, traced once for each set of shapes it is called with, however often that is."""
    keys: list[Any] = []
    held: list[Any] = []
    programs: list[Any] = []

    def call(*args: Any) -> Any:
        is_array = lambda x: isinstance(x, jax.Array | np.ndarray)  # noqa: E731
        arrays, rest = eqx.partition(args, is_array)
        leaves, tree = jax.tree.flatten(arrays)
        others = jax.tree.leaves(rest)
        avals = [(x.shape, x.dtype, getattr(x, "weak_type", False)) for x in leaves]
        key = (tree, avals, [id(x) for x in others])
        if key not in keys:
            keys.append(key)
            held.append(others)  # so that no other object gets the id of one of these
            programs.append(traced(lambda arrays: fun(*eqx.combine(arrays, rest)), arrays))
        program, rebuilt = programs[keys.index(key)]
        return rebuilt(jaxpr_as_fun(program)(*leaves))

    return call


def _always_zero(pieces: Callable, dynamic: PyTree) -> tuple[str, ...]:
    """Paths of parameters whose tangents the derivative does not use."""
    paths: list[str] = []

    def slope(tangents: list[Any] | None, dynamic: PyTree) -> Any:
        f, floats = pieces(dynamic)
        found, tree = jax.tree_util.tree_flatten_with_path(floats)
        paths[:] = [f"params{jax.tree_util.keystr(path)}" for path, _ in found]
        if tangents is None:
            return jax.tree.leaves(floats)
        f = inline_custom_vjp(f)
        return jax.jvp(lambda w: f(w)[0], (floats,), (jax.tree.unflatten(tree, tangents),))[1]

    shapes = jax.eval_shape(lambda dynamic: slope(None, dynamic), dynamic)
    program = jax.make_jaxpr(slope)(shapes, dynamic).jaxpr
    _, used = dce_jaxpr(program, [True] * len(program.outvars))
    return tuple(path for path, reaches in zip(paths, used, strict=False) if not reaches)
