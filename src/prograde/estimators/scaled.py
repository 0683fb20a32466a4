"""Scaled tangents: each leaf, row or column of the parameters perturbed in its own unit."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Float, Int, PyTree

from prograde._inject import varying_like
from prograde._structured import stretch
from prograde.estimators.site_estimator import SiteEstimator
from prograde.estimators.weight_perturbation import WeightPerturbation
from prograde.kit import (
    Estimate,
    Estimator,
    Loss,
    check_choice,
    check_key,
    check_positive,
    check_whole,
    wide,
)
from prograde.tangents import Rademacher

_PROBE = 2**31  # folded into the key for a probe's tangent; no tangent of an estimate uses it


class ScaleState(eqx.Module):
    """What `Scaled` carries from step to step where it learns.

    **Fields:**

    - `inner`: the state of the estimator inside.
    - `slopes`, `bends`: averages of (grad f . v)^2 and of v^T H v along signs v of one leaf alone,
      [leaves]. `bends` is `None` where the curvature is not learned.
    - `probes`, `step`: the number of probes and of steps so far.
    """

    inner: PyTree
    slopes: Float[Array, " leaves"]
    bends: Float[Array, " leaves"] | None
    probes: Int[Array, ""]
    step: Int[Array, ""]


@dataclass(frozen=True)
class Scaled(Estimator):
    """Scaled tangents: each leaf, row or column of the parameters perturbed in its own unit c.

        u = w / c,   h(u) = f(c u):
        g = estimate(h) / c,     E g = grad f              (`precondition=False`)
        g = c estimate(h),       E g = c^2 grad f          (`precondition=True`)

    For `WeightPerturbation` along eps this is v = c eps and g = (grad f . v) v / c^2, or
    (grad f . v) v.

    **Arguments:**

    - `estimator`: estimates the gradient of h: any estimator that perturbs weights, with its
      tangents, groups and combinations.
    - `scales`: c, or a rule that learns one scale for each leaf:
        - a positive number, or a tree of numbers and arrays like the parameters or like the top of
          it. An array broadcasts to its parameter: [rows, 1] is a scale for each row. Low-rank
          tangents stay so where c varies along the axes of one factor;
        - a function `scales(params, *args)` of the arguments of the loss that returns such a tree;
        - `"gradient"`: c_s^2 ~ sqrt(n_s) / |g_s|, which minimises E |g|^2. n_s is the size of leaf
          s, g_s its gradient;
        - `"curvature"`: c_s^2 ~ sqrt(n_s h_s) / |g_s|, which minimises E [g^T diag(h) g], the cost
          of the noise to second order. h_s is the mean of the Hessian's diagonal over the leaf.
          With `precondition=True` c_s^2 = 1 / (n h_s), n of all parameters: a Newton step for each
          leaf. The Hessian of h then has trace 1 for any function, also when the curvature changes.
          On a quadratic function a step along one tangent of signs lowers the loss at rates between
          0 and 2, and most at 1.
    - `precondition`: `True` returns an estimate of c^2 grad f instead of grad f: a learning rate
      for each scale.
    - `every`, `decay`: of learned scales. Every `every` steps a probe looks along signs v of one
      leaf, the leaves in turn (on each step until each leaf had one). It averages (grad f . v)^2,
      whose mean is |g_s|^2, and v^T H v, whose mean is n_s h_s. A new value has weight 1 - decay.
    - `limit`: the largest ratio of a learned scale to that of all leaves taken together, either
      way. With 1 and `precondition=True` all leaves share one scale, and only the rate is learned.

    **State:** that of `estimator`, inside a `ScaleState` where scales are learned. Until each leaf
    had a probe, learned scales are 1, or 0 with `precondition=True`, so that no step is made.
    Afterwards sum n_s c_s^2 = n, or the size above. The scales of a step come from the probes of
    earlier steps, which have keys of their own: given the state, they do not depend on the tangents
    of the step.

    **Bias:** that of `estimator` for h, over c or times c: none for the mean of forward gradients,
    for any scales, learned ones too. A function of scales must not be random.

    **Variance:** one tangent of signs (`Rademacher`, `LowRank`) has
    E |g|^2 = sum_i c_i^-2 * sum_i c_i^2 (grad_i f)^2, over parameters i; `Normal` has 2 |grad f|^2
    more. Preconditioned: sum_i c_i^2 * sum_i c_i^2 (grad_i f)^2, and 2 sum_i c_i^4 (grad_i f)^2
    more. The mean of K has 1/K of the variance. The best scales for `"gradient"` leave
    (sum_s sqrt(n_s) |g_s|)^2 of n |grad f|^2.

    **Cost:** that of `estimator`, plus a multiplication of each factor and each gradient by c. A
    probe is a forward run along a dense tangent, and for the curvature one along that again (about
    five forward passes, and as much memory as the parameters). Inside `vmap` each step pays for a
    probe.

    **Errors:** `TypeError` for an estimator of pre-activations, or scales that are not numbers;
    `ValueError` for scales that are not positive and finite or do not fit the parameters,
    `"gradient"` with `precondition=True`, `every`, `decay` or `limit` out of range, a state of
    another kind; those of `estimator`; all at trace time. A probe needs first derivatives, and
    second ones for the curvature. A guess of `Guided` that is a function has to be one of c grad f.

    **Source:** the second moment is that of arXiv 2202.08587 in other coordinates; `"gradient"` is
    Neyman's allocation of samples to strata (1934); v^T H v for the trace is Hutchinson's (1989).

    Examples:
        >>> import jax, jax.numpy as jnp, prograde as pg
        >>> def loss_fn(params, x):
        ...     return jnp.sum((x @ params["w"]) ** 2) + jnp.sum((params["b"] - 1) ** 2)
        >>> params, x = {"w": jnp.ones((3, 2)), "b": jnp.zeros(2)}, jnp.eye(3)
        >>> rows = {"w": jnp.array([[1.0], [2.0], [4.0]]), "b": 0.5}
        >>> grad_fn = pg.value_and_grad(loss_fn, pg.Scaled(pg.ForwardJacobian(), rows))
        >>> value, grads = grad_fn(jax.random.key(0), params, x)
        >>> jax.tree.map(lambda g: g.tolist(), grads)
        {'b': [-2.0, -2.0], 'w': [[2.0, 2.0], [2.0, 2.0], [2.0, 2.0]]}
        >>> estimator = pg.Scaled(pg.WeightPerturbation(), "curvature", precondition=True)
        >>> state = estimator.init(loss_fn, params, x)
        >>> for key in jax.random.split(jax.random.key(0), 4):
        ...     state = estimator.estimate(loss_fn, key, state, params, x).state
        >>> print(state.bends, int(state.probes))           # n h: 2 * 2 of b, 6 * 2 of w
        [ 4. 12.] 2
    """

    estimator: Estimator = field(default_factory=WeightPerturbation)
    scales: Literal["gradient", "curvature"] | Callable[..., PyTree] | PyTree = "curvature"
    precondition: bool = False
    every: int = 10
    decay: float = 0.9
    limit: float = 10.0

    def __post_init__(self):
        if not isinstance(self.estimator, Estimator) or isinstance(self.estimator, SiteEstimator):
            raise TypeError(
                f"estimator={self.estimator!r}, but an estimator that perturbs weights is needed, "
                "such as WeightPerturbation(LowRank(rank=1)): noise on pre-activations has no "
                "scale in the weights."
            )
        if isinstance(self.scales, str):
            check_choice("scales", self.scales, ("gradient", "curvature"))
        elif not callable(self.scales):
            _check_scales(self.scales)
        if not isinstance(self.precondition, bool):
            raise ValueError(f"precondition={self.precondition!r}, but it is True or False.")
        if self.precondition and isinstance(self.scales, str) and self.scales == "gradient":
            raise ValueError(
                "precondition=True with scales='gradient', but the second moment of preconditioned "
                "estimates is least when only one leaf is perturbed. Use scales='curvature', or "
                "precondition=False."
            )
        check_whole("every", self.every)
        check_positive("decay", self.decay)
        if self.decay >= 1:
            raise ValueError(f"decay={self.decay!r}, but a number above 0 and below 1 is needed.")
        check_positive("limit", self.limit)
        if self.limit < 1:
            raise ValueError(f"limit={self.limit!r}, but a number of at least 1 is needed.")

    def __eq__(self, other):
        return type(other) is type(self) and self._identity() == other._identity()

    def __hash__(self):
        return hash(self._identity())

    def _identity(self) -> Any:
        """The fields, with scales that are arrays or containers in a form that can be hashed."""
        scales: Any = self.scales
        if not isinstance(scales, str) and not callable(scales):
            leaves, treedef = jax.tree.flatten(scales)
            scales = (treedef, tuple(c if isinstance(c, int | float) else _bits(c) for c in leaves))
        return self.estimator, scales, self.precondition, self.every, self.decay, self.limit

    @property
    def learns(self) -> bool:
        """True where the scales are learned."""
        return isinstance(self.scales, str)

    def init(self, fun, params, *args, has_aux=False):
        fun, floats, _ = self.coordinates(fun, None, params, args, has_aux)
        inner = self.estimator.init(fun, floats, *args, has_aux=has_aux)
        if not isinstance(self.scales, str):
            return inner
        num_leaves = len(jax.tree.leaves(floats))
        # each call makes a buffer of its own, so that all of them may be donated
        zeros = lambda *shape, **kind: jnp.zeros(shape, **kind)  # noqa: E731
        bends = zeros(num_leaves) if self.scales == "curvature" else None
        return ScaleState(
            inner, zeros(num_leaves), bends, zeros(dtype=jnp.int32), zeros(dtype=jnp.int32)
        )

    def estimate(self, fun, key, state, params, *args, has_aux=False):
        learns, before = isinstance(self.scales, str), state
        loss = Loss(fun, params, args, has_aux, getattr(self.estimator, "custom_vjp", "error"))
        floats = loss.floats
        if learns:
            check_key(key)
            self._check_state(state, floats)
        h, floats, scales = self.coordinates(fun, state, params, args, has_aux)
        found = self.estimator.estimate(
            h, key, state.inner if learns else state, floats, *args, has_aux=has_aux
        )

        def leaf(g: Array, c: Array) -> Array:
            c = wide(c)
            return (wide(g) * c if self.precondition else wide(g) / c).astype(g.dtype)

        state = found.state
        if learns:
            state = self._next(loss, key, before, floats, args, state)
        return Estimate(
            found.value,
            found.aux,
            jax.tree.map(leaf, found.grads, scales),
            found.directional,
            state,
        )

    def coordinates(
        self,
        fun: Callable[..., Any],
        state: PyTree,
        params: PyTree,
        args: tuple[Any, ...],
        has_aux: bool,
    ) -> tuple[Callable[..., Any], PyTree[Array], PyTree[Array]]:
        """(h, floats, scales): the function of u = floats + (w - floats) / c, and floats, and c."""
        params = jax.tree.map(
            lambda x: jnp.asarray(x) if isinstance(x, np.ndarray | np.generic) else x, params
        )
        floats = Loss(fun, params, args, has_aux).floats
        rest = eqx.filter(params, eqx.is_inexact_array, inverse=True)
        if isinstance(self.scales, str):
            scales = self._learned(state, floats)
        else:
            given = self.scales(params, *args) if callable(self.scales) else self.scales
            scales = _like_leaves(given, floats)

        def h(u: PyTree[Array], *args: Any) -> Any:
            return fun(eqx.combine(jax.tree.map(stretch, u, floats, scales), rest), *args)

        return h, floats, scales

    def _learned(self, state: ScaleState | None, floats: PyTree[Array]) -> PyTree[Array]:
        """The scale of each leaf, as learned before this step."""
        if state is None:
            return jax.tree.map(lambda w: jnp.ones((1,) * w.ndim, w.dtype), floats)
        leaves, treedef = jax.tree.flatten(floats)
        sizes, tiny = jnp.asarray([float(w.size) for w in leaves]), jnp.finfo(jnp.float32).tiny
        share = lambda x: x / jnp.maximum(jnp.sum(x), tiny)  # noqa: E731
        bends = sizes if state.bends is None else jnp.abs(state.bends)
        above, below = (sizes, bends) if self.precondition else (bends, state.slopes)
        # compared with all leaves together: a leaf without gradient or curvature cannot move far
        ratio = jnp.maximum(share(above), tiny) / jnp.maximum(share(below), tiny)
        squares = jnp.clip(
            ratio if self.precondition else jnp.sqrt(ratio), self.limit**-2.0, self.limit**2.0
        )
        known, total = state.probes >= len(leaves), jnp.sum(bends)
        if self.precondition:
            c = jnp.where(known & (total > 0), jnp.sqrt(squares / jnp.maximum(total, tiny)), 0.0)
        else:
            c = jnp.where(known, jnp.sqrt(squares * jnp.sum(sizes) / jnp.sum(sizes * squares)), 1.0)
        return treedef.unflatten(
            [c[i].astype(w.dtype).reshape((1,) * w.ndim) for i, w in enumerate(leaves)]
        )

    def _next(
        self, f: Any, key: Array, state: ScaleState, floats: PyTree[Array], args: Any, inner: PyTree
    ) -> ScaleState:
        """The state after this step. A probe, where one is due, looks along one leaf in turn."""
        num_leaves = len(state.slopes)
        at = state.probes % num_leaves
        others = jax.tree.leaves((floats, eqx.filter(args, eqx.is_array), key))

        def probed() -> tuple[Array, Array | None]:
            slope, bend = self._probe(f, key, floats, at)
            # the plain mean of the first probes, until each has its weight in the long-run average
            rate = jnp.maximum(1 / (state.probes // num_leaves + 1), 1 - self.decay)

            def moved(old: Array, new: Array) -> Array:
                return old.at[at].add(rate * (new.astype(old.dtype) - old[at]))

            new = (
                moved(state.slopes, jnp.square(slope)),
                None if state.bends is None else moved(state.bends, bend),
            )
            return jax.tree.map(lambda x: varying_like(x, *others), new)

        def kept() -> tuple[Array, Array | None]:
            return jax.tree.map(lambda x: varying_like(x, *others), (state.slopes, state.bends))

        due = (state.step < num_leaves) | (state.step % self.every == 0)
        slopes, bends = lax.cond(due, probed, kept)
        return ScaleState(
            inner, slopes, bends, state.probes + due.astype(jnp.int32), state.step + 1
        )

    def _probe(self, f: Any, key: Array, floats: PyTree[Array], at: Array) -> tuple[Array, Array]:
        """(grad f . v, v^T H v) along signs v of the leaf number `at`."""
        signs, treedef = jax.tree.flatten(
            Rademacher().sample(jax.random.fold_in(key, _PROBE), floats)
        )
        v = treedef.unflatten(
            [jnp.where(at == i, x, jnp.zeros_like(x)) for i, x in enumerate(signs)]
        )

        def slope(w: PyTree[Array]) -> Array:
            return jax.jvp(lambda w: jnp.mean(wide(f(w)[0])), (w,), (v,))[1]

        return (
            jax.jvp(slope, (floats,), (v,))
            if self.scales == "curvature"
            else (slope(floats), jnp.zeros(()))
        )

    def _check_state(self, state: Any, floats: PyTree[Array]) -> None:
        wanted = (len(jax.tree.leaves(floats)), self.scales == "curvature")
        given = (
            (len(state.slopes), state.bends is not None)
            if isinstance(state, ScaleState)
            else type(state).__name__
        )
        if given != wanted:
            raise ValueError(
                f"state is for (leaves, curvature is learned) = {given}, but {wanted} is needed. "
                "Make the state by estimator.init with this estimator, function and parameters."
            )


def _bits(c: Any) -> Any:
    """An array in a form that can be hashed."""
    return np.shape(c), str(np.asarray(c).dtype), np.asarray(c).tobytes()


def _check_scales(scales: PyTree) -> None:
    """Raises unless the leaves of fixed scales are positive finite numbers."""
    for path, c in jax.tree_util.tree_leaves_with_path(scales):
        name = f"scales{jax.tree_util.keystr(path)}"
        if isinstance(c, bool) or not isinstance(
            c, int | float | np.ndarray | np.generic | jax.Array
        ):
            raise TypeError(
                f"{name}={c!r}, but a positive number or an array of them is needed, 'gradient', "
                "'curvature', or a function of (params, *args) that returns such a tree."
            )
        if isinstance(c, Tracer):
            continue
        values = np.asarray(c)
        if (
            values.dtype.kind not in "fiuV"
            or not (np.isfinite(values.astype(np.float64)) & (values > 0)).all()
        ):
            raise ValueError(f"{name}={c!r}, but all scales must be positive finite numbers.")


def _like_leaves(scales: PyTree, floats: PyTree[Array]) -> PyTree[Array]:
    """An array for each leaf, in its dtype and with its axes, each of size 1 or the leaf's."""
    _check_scales(scales)
    try:
        tree = jax.tree.broadcast(scales, floats)
    except ValueError:
        raise ValueError(
            f"scales has the structure {jax.tree.structure(scales)}, but the parameters have "
            f"{jax.tree.structure(floats)}. Give one number, or a tree like the parameters or like "
            "the top of it, with None in place of leaves that are no float arrays."
        ) from None

    def leaf(path: Any, w: Array, c: Any) -> Array:
        shape = np.shape(c)
        padded = (1,) * (w.ndim - len(shape)) + shape
        if len(padded) > w.ndim or any(
            n not in (1, m) for n, m in zip(padded, w.shape, strict=True)
        ):
            raise ValueError(
                f"the scale of params{jax.tree_util.keystr(path)} has shape {shape}, which does "
                f"not broadcast to that of the parameter, {w.shape}. Give a number, or an array "
                "with size 1 along the axes that share a scale: (rows, 1) for a scale for each row."
            )
        return jnp.asarray(c, w.dtype).reshape(padded)

    return jax.tree_util.tree_map_with_path(leaf, floats, tree)
