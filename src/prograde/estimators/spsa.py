"""Central differences along random directions, for functions that cannot be differentiated at all."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, PyTree

from prograde._structured import is_structured, weighted_sum
from prograde.estimators._estimator import (
    Estimate,
    check_key,
    check_positive,
    check_tangents,
    check_whole,
    float_leaves,
    split_params,
    unpack,
    wide,
    wide_dtype,
)
from prograde.estimators._seeded import SeededEstimator, Share
from prograde.tangents import Rademacher, TangentDistribution


@dataclass(frozen=True)
class CentralDifference(SeededEstimator):
    """Simultaneous perturbation (SPSA, MeZO): a difference of two function values in place of a directional derivative.

        d_k = (f(theta + h v_k) - f(theta - h v_k)) / (2 h)          g = 1/K sum_k d_k v_k / w_k

    with h = `step` and w_k = 1, or, for 1.5-SPSA, the weight of the measured curvature,

        w_k = max(|f(theta + h v_k) - 2 f(theta) + f(theta - h v_k)|^p / h^(2 p), `curvature_floor`),   p = `curvature_power`.

    It asks nothing of the function but its values: no derivative rules, no smoothness. Where the function has derivatives,
    `WeightPerturbation` gives d_k exactly, for less.

    **Arguments:**

    - `tangents`: the distribution of v, as in `WeightPerturbation`.
    - `num_tangents`: K, at least 1, run one after the other.
    - `step`: h, in the unit of the parameters. Too large, and the bias grows as h^2; too small, and the difference drowns in
      rounding, whose part in d_k is about eps |f| / h.
    - `curvature_power`: `None`, or p in (0, 1] for 1.5-SPSA.
    - `curvature_floor`: the least weight w_k, positive.

    **Bias:** E[g] - grad f = (h^2 / 6) E[D^3 f(v, v, v) v] + O(h^4), none for quadratic functions. The weights of 1.5-SPSA depend on v,
    so that its expectation is a preconditioned gradient, whose size is not that of the gradient.

    **Variance:** that of `WeightPerturbation`, and that of rounding: about (eps |f| / h)^2 n.

    **Cost:** 2 K runs of the function (2 K + 1 for 1.5-SPSA), each on a moved copy of the parameters, and three draws of
    each tangent: they are drawn again from the key, never stored. No tangent runs through the function. `value` is the mean of
    all the function values, f + O(h^2), and `aux` that of the last run; for 1.5-SPSA both are those of theta itself.

    **Errors:** `ValueError` for a step, power or floor out of range, a step below the resolution of the parameters' dtype, or `num_tangents` below 1; `TypeError` for complex parameters,
    an old-style key, or a loss that is not real; all at trace time.

    **Source:** Spall 1992; in place, with seeds, for language models: MeZO, arXiv 2305.17333; 1.5-SPSA: arXiv 2609.38095.

    Examples:
        >>> import jax, jax.numpy as jnp, prograde as pg
        >>> grad_fn = pg.value_and_grad(lambda w: jnp.sum(w ** 2), pg.CentralDifference(pg.Basis(), num_tangents=2, step=0.5))
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
        f, floats = split_params(fun, params, args, has_aux)
        run = self._runs(f, floats, key)

        def one_tangent(sums, index):
            value, aux, directional, numbers = run(index)
            return self._add(sums, floats, key, index, self._coefficient(numbers)), (
                value,
                directional,
                aux,
            )

        sums = jax.tree.map(lambda w: jnp.zeros(w.shape, wide_dtype(w.dtype)), floats)
        # the first is not in the loop: inside `shard_map` zeros vary along other axes than what is added
        sums, first = one_tangent(sums, jnp.asarray(0))
        value, directional, aux = jax.tree.map(lambda x: x[None], first)
        if self.num_tangents > 1:
            sums, rest = lax.scan(one_tangent, sums, jnp.arange(1, self.num_tangents))
            value, directional, aux = jax.tree.map(
                lambda a, b: jnp.concatenate([a, b]), (value, directional, aux), rest
            )
        aux = jax.tree.map(lambda x: x[-1], aux)
        grads = jax.tree.map(lambda g, w: g.astype(w.dtype), sums, floats)
        return Estimate(jnp.mean(value), unpack(aux), grads, directional, state)

    def derivatives(self, fun, key, params, *args, has_aux=False, share=None):
        check_key(key)
        share = share or Share()
        f, floats = split_params(fun, params, args, has_aux)
        run, count = self._runs(f, floats, key), share.of_tangents(self.num_tangents)

        def one_tangent(index):
            value, aux, _, numbers = run(index)
            return value, aux, numbers

        value, aux, numbers = lax.map(
            one_tangent, share.tangent * count + jnp.arange(count, dtype=jnp.int32)
        )
        return jnp.mean(value), unpack(jax.tree.map(lambda x: x[-1], aux)), numbers[:, None]

    def gradient(self, key, params, derivatives):
        check_key(key)
        floats = float_leaves(params)
        coefficients = jax.vmap(self._coefficient)(derivatives[:, 0])

        def add(sums, index):
            return self._add(sums, floats, key, index, coefficients[index]), None

        sums = jax.tree.map(lambda w: jnp.zeros(w.shape, wide_dtype(w.dtype)), floats)
        sums, _ = lax.scan(add, sums, jnp.arange(self.num_tangents))
        return jax.tree.map(lambda g, w: g.astype(w.dtype), sums, floats)

    def _runs(
        self, f: Callable[[PyTree], tuple[Array, PyTree]], floats: PyTree[Array], key: Any
    ) -> Callable[[int | Array], tuple[Array, PyTree, Array, Array]]:
        """The runs along one tangent: (value, aux, directional, what the coefficient is made from)."""
        for dtype in {w.dtype for w in jax.tree.leaves(floats)}:
            if self.step < (resolution := float(jnp.finfo(dtype).eps)):
                raise ValueError(
                    f"step={self.step:g}, but parameters of dtype {dtype} resolve no less than {resolution:.2g} of their size: most would not "
                    "move at all. Use a larger step, or float32 parameters."
                )
        clean = None if self.curvature_power is None else f(floats)

        def value_at(index, sign):
            tangents = self.tangents.sample(key, floats, index, self.num_tangents)
            value, aux = f(
                jax.tree.map(lambda w, v: _moved(w, v, sign * self.step), floats, tangents)
            )
            return wide(value), aux

        def run(index):
            above, _ = value_at(index, 1)
            below, aux = value_at(index, -1)
            directional = (above - below) / (2 * self.step)
            if clean is None:
                return jnp.mean(above + below) / 2, aux, directional, jnp.mean(directional)[None]
            curvature = jnp.mean(above - 2 * wide(clean[0]) + below) / self.step**2
            return (
                jnp.mean(clean[0]),
                clean[1],
                directional,
                jnp.stack([jnp.mean(directional), curvature]),
            )

        return run

    def _coefficient(self, numbers: Array) -> Array:
        """What a tangent is multiplied by: its derivative, over K and over the weight of the measured curvature."""
        weight = jnp.ones(())
        if self.curvature_power is not None:
            weight = jnp.maximum(jnp.abs(numbers[1]) ** self.curvature_power, self.curvature_floor)
        return numbers[0] / weight / self.num_tangents

    def _add(
        self,
        sums: PyTree[Array],
        floats: PyTree[Array],
        key: Any,
        index: int | Array,
        weight: Array,
    ) -> PyTree:
        tangents = self.tangents.sample(key, floats, index, self.num_tangents)
        tangents = jax.tree.map(lambda x: x[None], eqx.filter(tangents, eqx.is_array))
        return jax.tree.map(jnp.add, sums, weighted_sum(tangents, weight[None]))


def _moved(weight: Array, tangent: PyTree, step: float) -> Array:
    dense = tangent.dense() if is_structured(tangent) else tangent
    return weight + jnp.asarray(step, weight.dtype) * jnp.broadcast_to(dense, weight.shape).astype(
        weight.dtype
    )
