"""What stands in the way of a forward run, and what it will cost, before a long one is begun."""

from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import numpy as np
from jax.extend.core import jaxpr_as_fun
from jax.interpreters.partial_eval import dce_jaxpr
from jaxtyping import PyTree

from prograde._check_report import CheckReport
from prograde._costs import multiply_adds
from prograde._custom_vjp import inline_custom_vjp
from prograde._findings import watching
from prograde._jaxprs import traced
from prograde.estimators import Estimator, WeightPerturbation
from prograde.kit import Loss

__all__ = ["CheckReport", "check"]


def check(
    fun: Callable[..., Any],
    params: PyTree,
    *args: Any,
    estimator: Estimator | None = None,
    has_aux: bool = False,
    memory: bool | Literal["both"] = True,
    run: bool = False,
) -> CheckReport:
    """Looks at a function before a long run: what blocks forward mode, what is always zero, and what it costs.

    The estimate is traced, and not run. So whatever the report says of blocked functions and formed tangents is what a
    run would meet.

    **Arguments:**

    - `fun`, `params`, `args`, `has_aux`: as for `value_and_grad`. Arrays may be `jax.ShapeDtypeStruct`.
    - `estimator`: what is going to be used; `WeightPerturbation()` when not given.
    - `memory`: whether to compile the estimate for XLA's figure of its temporary memory; `"both"` also compiles the
      function alone, to compare.
    - `run`: whether to compute one estimate, to say which parameters get one that is not finite although the loss is. Needs
      arrays, and the memory of an estimate.

    **Returns:** a `CheckReport`; print it.

    **Bias and variance:** none; the report is exact, except that costs are a count of operations and not a time.

    **Cost:** traces `fun` once (estimators on pre-activations: once more, with twice the batch). With `memory=True` it
    compiles the estimate. With `num_groups` above 1 and arrays given, it computes the loss of the batch and of each
    group, to see that the one is the mean of the others.

    **Errors:** as `value_and_grad` for parameters and losses that no estimator takes; `ValueError` for `run=True` with
    shapes in place of arrays. What blocks forward mode is reported, and is no error here.

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
            f"run=True, but the arguments hold shapes in place of arrays, such as {shapes[0]}. Pass arrays, or run=False."
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

    def start(dynamic: PyTree) -> PyTree:
        params, args = eqx.combine(dynamic, static)
        return estimator.init(once, params, *args, has_aux=has_aux)

    def estimate(dynamic: PyTree) -> Any:
        params, args = eqx.combine(dynamic, static)
        key = jax.random.key(0)
        result = estimator.estimate(once, key, start(dynamic), params, *args, has_aux=has_aux)
        return result.value, result.grads

    with watching() as findings:
        program = jax.make_jaxpr(alone)(dynamic)
        whole = jax.make_jaxpr(estimate)(dynamic)
    with watching() as of_code:
        always_zero = _always_zero(pieces, dynamic)
    blocking = tuple(findings.refused)
    compiled, own = None, None
    if memory and not blocking:
        compiled = jax.jit(estimate).lower(dynamic).compile()
        own = jax.jit(alone).lower(dynamic).compile() if memory == "both" else None
    return CheckReport(
        estimator=estimator,
        num_parameters=sum(
            w.size for w in jax.tree.leaves(eqx.filter_eval_shape(pieces, dynamic)[1])
        ),
        blocking=blocking,
        remedies=tuple(findings.refused.values()),
        bypassed=() if blocking else tuple(findings.inlined),
        always_zero=() if of_code.refused else always_zero,
        dense=() if blocking else tuple(findings.dense),
        sites=() if blocking else tuple(findings.sites),
        cost_ratio=None
        if blocking
        else multiply_adds(whole.jaxpr) / max(1, multiply_adds(program.jaxpr)),
        memory=_temporaries(compiled),
        memory_alone=_temporaries(own),
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
