"""Central differences along random directions, for functions that cannot be differentiated."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, PyTree

from prograde.kit import (
    Loss,
    SeededEstimator,
    Share,
    check_key,
    check_positive,
    check_tangents,
    check_whole,
    float_leaves,
    in_chunks,
    is_structured,
    unpack,
    weighted_sum,
    wide,
)
from prograde.tangents import Rademacher, TangentDistribution

_UNITS = 4  # the least displacement of a weight, in units of its rounding


@dataclass(frozen=True)
class CentralDifference(SeededEstimator):
    """Simultaneous perturbation (SPSA, MeZO): a difference of two function values, no derivative.

        d_k = (f(theta + h v_k) - f(theta - h v_k)) / (2 h)          g = 1/K sum_k d_k v_k / w_k

    with h = `step` and w_k = 1, or, for 1.5-SPSA, a weight from the measured curvature, p =
    `curvature_power`:

        c_k = (f(theta + h v_k) - 2 f(theta) + f(theta - h v_k)) / h^2
        w_k = max(|c_k|^p, curvature_floor)

    It asks nothing of the function but its values: no derivative rules, no smoothness. Where the
    function has derivatives, `WeightPerturbation` gives d_k exactly, for less.

    A weight that h would move by less than 4 times its rounding, h < 4 eps |w|, is moved by that
    much instead, and its part of g is divided by the displacement that was realised.

    **Arguments:**

    - `tangents`: the distribution of v, as in `WeightPerturbation`.
    - `num_tangents`: K, at least 1. They run one after the other.
    - `step`: h, in the unit of the parameters. With a large step the bias grows as h^2; with a
      small one the difference drowns in the rounding of f, whose part in d_k is about eps |f| / h.
    - `curvature_power`: `None`, or p in (0, 1] for 1.5-SPSA.
    - `curvature_floor`: the least weight w_k, positive.

    **Bias:** E[g] - grad f = (h^2 / 6) E[D^3 f(v, v, v) v] + O(h^4), none for quadratic functions.
    The weights of 1.5-SPSA depend on v, so that E[g] is a preconditioned gradient, whose size is
    not that of the gradient.

    **Variance:** that of `WeightPerturbation`, plus that of rounding: about (eps |f| / h)^2 n. In
    few bits, weights much larger than h / eps are moved further than the others, and add to the
    variance as if they were scaled: see `Scaled`.

    **Cost:** 2 K runs of the function (2 K + 1 for 1.5-SPSA), each on a moved copy of the
    parameters, and three draws of each tangent, which is drawn from the key each time and never
    stored. No tangent runs through the function. `value` is the mean of all function values,
    f + O(h^2), and `aux` that of the last run; for 1.5-SPSA both are those of theta itself.

    **Errors:** `ValueError` for a step, power or floor out of range, a step below the resolution of
    the loss's dtype, or `num_tangents` below 1; `TypeError` for complex parameters, an old-style
    key, or a loss that is not real; all at trace time. `RuntimeWarning` outside of `jit` where the
    two values differ by less than the rounding of the loss.

    **Source:** Spall 1992; in place, with seeds, for language models: MeZO, arXiv 2305.17333;
    1.5-SPSA: arXiv 2609.38095.

    Examples:
        >>> import jax, jax.numpy as jnp, prograde as pg
        >>> estimator = pg.CentralDifference(pg.Basis(), num_tangents=2, step=0.5)
        >>> grad_fn = pg.value_and_grad(lambda w: jnp.sum(w ** 2), estimator)
        >>> value, grads = grad_fn(jax.random.key(0), jnp.array([1.0, 2.0]))
        >>> print(grads.round(4))
        [2. 4.]
    """

    tangents: TangentDistribution = field(default_factory=Rademacher)
    num_tangents: int = 1
    step: float = 1e-3
    curvature_power: float | None = None
    curvature_floor: float = 1.0

    def __post_init__(self):
        check_tangents(self.tangents)
        check_whole("num_tangents", self.num_tangents)
        check_positive("step", self.step)
        if self.curvature_power is not None:
            check_positive("curvature_power", self.curvature_power, at_most=1)
        check_positive("curvature_floor", self.curvature_floor)

    @property
    def num_numbers(self):
        return 1 if self.curvature_power is None else 2  # the derivative, and the curvature

    def estimate(self, fun, key, state, params, *args, has_aux=False):
        check_key(key)
        loss = Loss(fun, params, args, has_aux)
        run = self._runs(loss, key)

        def one_tangent(sums, indices):
            value, aux, directional, numbers = run(indices[0])
            sums = self._add(sums, loss.floats, key, indices[0], self._coefficient(numbers))
            return sums, None, jax.tree.map(lambda x: x[None], (value, directional, aux))

        sums, _, found = in_chunks(one_tangent, None, self.num_tangents, 1)
        value, directional, aux = found
        aux = jax.tree.map(lambda x: x[-1], aux)
        return loss.estimate(jnp.mean(value), sums, directional, aux, state)

    def derivatives(self, fun, key, params, *args, has_aux=False, share=None):
        check_key(key)
        share = share or Share()
        run = self._runs(Loss(fun, params, args, has_aux), key)
        count = share.of_tangents(self.num_tangents)

        def one_tangent(_, indices):
            value, aux, _, numbers = run(indices[0])
            return None, None, jax.tree.map(lambda x: x[None], (value, aux, numbers))

        _, _, found = in_chunks(one_tangent, None, count, 1, share.tangent * count)
        value, aux, numbers = found
        return jnp.mean(value), unpack(jax.tree.map(lambda x: x[-1], aux)), numbers[:, None]

    def gradient(self, key, params, derivatives):
        check_key(key)
        floats = float_leaves(params)
        coefficients = jax.vmap(self._coefficient)(derivatives[:, 0])

        def one_tangent(sums, indices):
            weight = coefficients[indices[0]]
            return self._add(sums, floats, key, indices[0], weight), None, ()

        sums, _, _ = in_chunks(one_tangent, None, self.num_tangents, 1)
        return jax.tree.map(lambda g, w: g.astype(w.dtype), sums, floats)

    def _runs(
        self, loss: Loss, key: Any
    ) -> Callable[[int | Array], tuple[Array, PyTree, Array, Array]]:
        """The runs along one tangent: (value, aux, directional, numbers of the coefficient)."""
        clean = None if self.curvature_power is None else loss(loss.floats)

        def value_at(index, sign):
            tangent = self._tangent(loss.floats, key, index)
            moved = jax.tree.map(lambda w, v: self._moved(w, v, sign), loss.floats, tangent)
            losses, aux = loss(moved)
            if self.step < (resolution := float(jnp.finfo(losses.dtype).eps)):
                raise ValueError(
                    f"step={self.step:g}, but a loss of dtype {losses.dtype} resolves no less than "
                    f"{resolution:.2g} of its size, so that most differences would be rounding. "
                    "Compute the loss in float32, or use a larger step."
                )
            return losses, aux

        def run(index):
            above, _ = value_at(index, 1)
            below, aux = value_at(index, -1)
            _warn_of_rounding(above, below, self.step)
            above, below = wide(above), wide(below)
            directional = (above - below) / (2 * self.step)
            if clean is None:
                return jnp.mean(above + below) / 2, aux, directional, jnp.mean(directional)[None]
            value, aux = wide(clean[0]), clean[1]
            curvature = jnp.mean(above - 2 * value + below) / self.step**2
            numbers = jnp.stack([jnp.mean(directional), curvature])
            return jnp.mean(clean[0]), aux, directional, numbers

        return run

    def _coefficient(self, numbers: Array) -> Array:
        """The weight of a tangent: d_k / (K w_k)."""
        weight = jnp.ones(())
        if self.curvature_power is not None:
            weight = jnp.maximum(jnp.abs(numbers[1]) ** self.curvature_power, self.curvature_floor)
        return numbers[0] / weight / self.num_tangents

    def _tangent(self, floats: PyTree[Array], key: Any, index: int | Array) -> PyTree:
        return self.tangents.sample(key, floats, index, self.num_tangents)

    def _moved(self, weight: Array, tangent: PyTree, sign: int) -> Array:
        """Weight +- h v, with a displacement that the dtype of the weight resolves."""
        dense = tangent.dense() if is_structured(tangent) else tangent
        dense = jnp.broadcast_to(dense, weight.shape).astype(weight.dtype)
        return weight + sign * (jnp.maximum(self.step, _least(weight)) * dense)

    def _add(
        self,
        sums: PyTree[Array] | None,
        floats: PyTree[Array],
        key: Any,
        index: int | Array,
        coefficient: Array,
    ) -> PyTree:
        """`sums` plus the coefficient times the tangent, as it was realised where h is small."""

        def leaf(w: Array, v: PyTree) -> Array:
            with_axis = jax.tree.map(lambda x: x[None], v)
            as_drawn = weighted_sum(with_axis, coefficient[None])
            if w.size == 0:
                return as_drawn
            dense = jnp.broadcast_to(v.dense() if is_structured(v) else v, w.shape)
            dense = dense.astype(as_drawn.dtype)
            above, below = (self._moved(w, v, sign).astype(as_drawn.dtype) for sign in (1, -1))
            realised = (above - below) / (2 * self.step)
            ratio = dense / jnp.where(realised == 0, jnp.inf, realised)
            return jnp.where(_least(w) > self.step, coefficient * dense * ratio, as_drawn)

        tangent = self._tangent(floats, key, index)
        found = jax.tree.map(leaf, floats, tangent)
        return found if sums is None else jax.tree.map(jnp.add, sums, found)


def _least(weight: Array) -> Array:
    """The least displacement of each weight."""
    return _UNITS * float(jnp.finfo(weight.dtype).eps) * jnp.abs(weight)


def _warn_of_rounding(above: Array, below: Array, step: float) -> None:
    """Warns where values are known, and their difference is no more than their rounding."""
    if isinstance(above, Tracer) or isinstance(below, Tracer):
        return
    rounding = float(jnp.finfo(above.dtype).eps * jnp.max(jnp.abs(above), initial=0))
    difference = float(jnp.max(jnp.abs(wide(above) - wide(below)), initial=0))
    if difference <= 2 * rounding and rounding > 0:
        warnings.warn(
            f"step={step:g} changes the loss by {difference:.2g}, but its dtype {above.dtype} "
            f"rounds by {rounding:.2g}: the estimate is mostly rounding, or 0. Use a larger step, "
            "or compute the loss in a wider dtype.",
            RuntimeWarning,
            stacklevel=3,
        )
