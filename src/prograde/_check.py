"""What stands in the way of a forward run, and what it will cost, before a long one is begun."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
from jax._src.interpreters.partial_eval import dce_jaxpr
from jaxtyping import Array, PyTree

from prograde._custom_vjp import describe, inline_custom_vjp, is_custom_vjp, remedy
from prograde._jaxprs import equations, multiply_adds, source
from prograde._sites import leaves_of
from prograde._structured import DenseFallback, Recorder, directional_derivative
from prograde.estimators import Estimator, Guided, Scaled, SiteEstimator, WeightPerturbation
from prograde.kit import Loss


@dataclass(frozen=True)
class CheckReport:
    """What `check` found. Printed, it reads as a short text.

    **Fields:**

    - `estimator`: what was checked.
    - `num_parameters`: n, the numbers in the float arrays of the parameters.
    - `blocking`: functions with a `jax.custom_vjp` that forward mode cannot pass, each as `name (file:line (caller))`.
    - `remedies`: what to do about each of these: for a reverse-only adjoint of diffrax, the argument to pass.
    - `bypassed`: the same, where the estimator has `custom_vjp="inline"` and so leaves the hand-made rule aside.
    - `always_zero`: paths of parameters whose tangent never reaches the loss, whatever their value: unused, or behind argmax,
      `stop_gradient`, a conversion to integers. Their gradient is 0, and the estimate only gets noise from them.
    - `dense`: (path, `DenseFallback`) for each place where a structured tangent had to be formed.
    - `sites`: (paths, shape, whether it has examples) for each site of an estimator that perturbs pre-activations: the weights behind
      it, and the shape of what is perturbed, once for each iteration of an enclosing loop. One without examples is a weight
      that is used in another way and perturbed itself.
    - `cost_ratio`: multiply-adds of the estimate over those of the function, by a count; `None` where forward mode is blocked.
      A loop of unknown length counts as one iteration on both sides.
    - `memory`, `memory_alone`: bytes of temporaries that XLA plans for the estimate and for the function alone; `None`
      where not asked for or blocked.

    **Source:** what forward mode cannot pass is what JAX refuses; the count is that of arXiv 2202.08587, section 2.

    Examples:
        >>> import jax.numpy as jnp, prograde as pg
        >>> report = pg.check(lambda w: jnp.sum(jnp.round(w)), jnp.ones((8, 8)), memory=False)
        >>> report.always_zero
        ('params',)
    """

    estimator: Estimator
    num_parameters: int
    blocking: tuple[str, ...]
    remedies: tuple[str, ...]
    bypassed: tuple[str, ...]
    always_zero: tuple[str, ...]
    dense: tuple[tuple[str, DenseFallback], ...]
    sites: tuple[tuple[tuple[str, ...], tuple[int, ...], bool], ...]
    cost_ratio: float | None
    memory: int | None
    memory_alone: int | None

    @property
    def ok(self) -> bool:
        """Whether nothing blocks the estimate."""
        return not self.blocking

    def __str__(self) -> str:
        lines = [f"{self.estimator}", f"  parameters: {self.num_parameters:,} numbers"]
        for name, sentence in zip(self.blocking, self.remedies, strict=True):
            lines.append(
                f"  BLOCKED by {name}: a jax.custom_vjp, which forward mode cannot pass. {sentence}"
            )
        for name in self.bypassed:
            lines.append(f"  bypassed: the rule of {name}; its code is differentiated instead.")
        for path in self.always_zero:
            lines.append(
                f"  always zero: {path} never reaches the loss through a derivative (unused, argmax, stop_gradient, integers)."
            )
        for path, fallback in self.dense:
            lines.append(
                f"  dense: the tangent of {path} is formed, {list(fallback.shape)}, for {fallback.primitive} at "
                f"{fallback.source}."
            )
        if activations := [shape for _, shape, has_examples in self.sites if has_examples]:
            lines.append(
                f"  sites: {len(activations)}, with {sum(map(math.prod, activations)):,} numbers to perturb"
            )
        for paths, shape, has_examples in self.sites:
            if not has_examples:
                lines.append(
                    f"  perturbed itself: {' and '.join(paths)}, as {list(shape)}, where no pre-activation of single examples follows."
                )
        if self.ok and not self.dense and not self.sites:
            lines.append("  nothing is blocked, and no structured tangent is formed")
        if self.cost_ratio is not None:
            lines.append(
                f"  cost: {self.cost_ratio:.2f} x the function alone, by a count of multiply-adds"
            )
        if self.memory is not None and self.memory_alone is not None:
            lines.append(
                f"  temporary memory: {self.memory / 1e6:,.1f} MB, the function alone {self.memory_alone / 1e6:,.1f} MB"
            )
        return "\n".join(lines)


def check(
    fun: Callable[..., Any],
    params: PyTree,
    *args: Any,
    estimator: Estimator | None = None,
    has_aux: bool = False,
    memory: bool = True,
) -> CheckReport:
    """Looks at a function before a long run: what blocks forward mode, what is always zero, what falls back, what it costs.

    Nothing is computed: the function is traced, and compiled when `memory` is asked for.

    **Arguments:**

    - `fun`, `params`, `args`, `has_aux`: as for `value_and_grad`. Arrays may be `jax.ShapeDtypeStruct`.
    - `estimator`: what is going to be used; `WeightPerturbation()` when not given.
    - `memory`: whether to compile the function and the estimate for XLA's figure of their temporary memory.

    **Returns:** a `CheckReport`; print it.

    **Bias and variance:** none; the report is exact, except that costs are a count of operations and not a time.

    **Cost:** traces the function a few times; with `memory`, compiles it twice.

    **Errors:** as `value_and_grad` for parameters and losses that no estimator takes. A blocked function is no error here.

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
    abstract = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if eqx.is_array(x) else x  # noqa: E731
    params, args = jax.tree.map(abstract, (params, args))
    dynamic, static = eqx.partition((params, args), lambda x: isinstance(x, jax.ShapeDtypeStruct))

    def pieces(dynamic: PyTree) -> tuple[Callable, PyTree]:
        params, args = eqx.combine(dynamic, static)
        loss = Loss(estimator.objective(fun, has_aux), params, args, has_aux)
        return loss, loss.floats

    def alone(dynamic: PyTree) -> Any:
        f, floats = pieces(dynamic)
        return f(floats)

    def estimate(dynamic: PyTree) -> Any:
        params, args = eqx.combine(dynamic, static)
        key = jax.random.key(0)
        result = estimator.estimate(
            fun,
            key,
            estimator.init(fun, params, *args, has_aux=has_aux),
            params,
            *args,
            has_aux=has_aux,
        )
        return result.value, result.grads

    def perturbed(dynamic: PyTree) -> tuple[Callable, PyTree]:
        """`pieces` of the function as the innermost estimator sees it."""
        (params, args), within, wrapped = eqx.combine(dynamic, static), fun, estimator
        while isinstance(wrapped, Scaled):
            within, params, _ = wrapped.coordinates(within, None, params, args, has_aux)
            wrapped = wrapped.estimator
        loss = Loss(within, params, args, has_aux)
        return loss, loss.floats

    inner = estimator
    while isinstance(inner, Scaled):
        inner = inner.estimator
    program = jax.make_jaxpr(alone)(dynamic).jaxpr
    by_hand = {describe(eqn): source(eqn) for eqn in equations(program) if is_custom_vjp(eqn)}
    remedies = {describe(eqn): remedy(eqn) for eqn in equations(program) if is_custom_vjp(eqn)}
    forward = hasattr(inner, "custom_vjp")
    reached = _reached_by_tangents(pieces, dynamic) if forward and by_hand else set()
    differentiated = tuple(name for name, place in by_hand.items() if place in reached)
    inline = getattr(inner, "custom_vjp", None) == "inline"
    blocking = () if inline else differentiated
    cost_ratio = None
    if not blocking:
        cost_ratio = multiply_adds(jax.make_jaxpr(estimate)(dynamic).jaxpr) / max(
            1, multiply_adds(program)
        )
    sizes = _compiled_bytes(alone, estimate, dynamic) if memory and not blocking else (None, None)
    return CheckReport(
        estimator=estimator,
        num_parameters=sum(
            w.size for w in jax.tree.leaves(eqx.filter_eval_shape(pieces, dynamic)[1])
        ),
        blocking=blocking,
        remedies=tuple(remedies[name] for name in blocking),
        bypassed=differentiated if inline else (),
        always_zero=_always_zero(pieces, dynamic, bool(by_hand)),
        dense=_dense_fallbacks(perturbed, dynamic, inner)
        if isinstance(inner, WeightPerturbation | Guided) and not blocking
        else (),
        sites=_sites(fun, dynamic, static, estimator, has_aux)
        if isinstance(estimator, SiteEstimator) and not blocking
        else (),
        cost_ratio=cost_ratio,
        memory=sizes[1],
        memory_alone=sizes[0],
    )


def _compiled_bytes(
    alone: Callable, estimate: Callable, dynamic: PyTree
) -> tuple[int | None, int | None]:
    def temporaries(function: Callable) -> int | None:
        analysis: Any = jax.jit(function).lower(dynamic).compile().memory_analysis()
        return None if analysis is None else analysis.temp_size_in_bytes

    return temporaries(alone), temporaries(estimate)


def _sites(
    fun: Callable, dynamic: PyTree, static: PyTree, estimator: SiteEstimator, has_aux: bool
) -> tuple[tuple[tuple[str, ...], tuple[int, ...], bool], ...]:
    found: list[tuple[tuple[str, ...], tuple[int, ...], bool]] = []

    def run(dynamic: PyTree) -> None:
        params, args = eqx.combine(dynamic, static)
        program, floats = estimator.program(fun, params, args, has_aux)
        paths = _paths(floats)
        for site, leaves in leaves_of(estimator.shapes(program, floats)):
            has_examples = site.axis is not None or program.batch is None
            found.append((tuple(paths[i] for i in sorted(leaves)), site.noise.shape, has_examples))

    jax.eval_shape(run, dynamic)
    return tuple(found)


def _paths(floats: PyTree[Array]) -> list[str]:
    return [
        f"params{jax.tree_util.keystr(path)}"
        for path, _ in jax.tree_util.tree_leaves_with_path(floats)
    ]


def _reached_by_tangents(pieces: Callable, dynamic: PyTree) -> set[str]:
    """Where functions with a custom reverse rule are called with an argument that has a tangent."""

    def slope(dynamic: PyTree) -> Any:
        f, floats = pieces(dynamic)
        return jax.jvp(lambda w: f(w)[0], (floats,), (floats,))

    # JAX leaves a marker that it refuses to compile
    return {
        source(eqn)
        for eqn in equations(jax.make_jaxpr(slope)(dynamic).jaxpr)
        if eqn.primitive.name == "custom_lin"
    }


def _always_zero(pieces: Callable, dynamic: PyTree, by_hand: bool) -> tuple[str, ...]:
    paths: list[str] = []

    def slope(tangents: list[Array] | None, dynamic: PyTree) -> Any:
        f, floats = pieces(dynamic)
        f = inline_custom_vjp(f) if by_hand else f
        paths[:] = _paths(floats)
        if tangents is None:
            return jax.tree.leaves(floats)
        tree = jax.tree.structure(floats)
        return jax.jvp(lambda w: f(w)[0], (floats,), (jax.tree.unflatten(tree, tangents),))[1]

    shapes = jax.eval_shape(lambda dynamic: slope(None, dynamic), dynamic)
    program = jax.make_jaxpr(slope)(shapes, dynamic).jaxpr
    _, used = dce_jaxpr(program, [True] * len(program.outvars))
    return tuple(path for path, reaches in zip(paths, used, strict=False) if not reaches)


def _dense_fallbacks(
    pieces: Callable, dynamic: PyTree, estimator: WeightPerturbation | Guided
) -> tuple[tuple[str, DenseFallback], ...]:
    recorders: dict[str, Recorder] = {}

    def run(dynamic: PyTree) -> Any:
        f, floats = pieces(dynamic)
        f = inline_custom_vjp(f) if estimator.custom_vjp == "inline" else f
        recorders.update((path, Recorder()) for path in _paths(floats))
        tangents = estimator.tangents.sample(jax.random.key(0), floats, 0, estimator.num_tangents)
        tree = jax.tree.structure(floats)
        return directional_derivative(
            f, floats, tangents, jax.tree.unflatten(tree, list(recorders.values()))
        )[:2]

    jax.make_jaxpr(run)(dynamic)
    found = dict.fromkeys(
        (path, fallback) for path, recorder in recorders.items() for fallback in recorder.fallbacks
    )
    return tuple(found)
