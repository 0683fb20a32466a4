"""Central differences along random directions, for functions that cannot be differentiated at all."""

from dataclasses import dataclass, field

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, PyTree

from prograde._structured import is_structured, weighted_sum
from prograde.estimators._estimator import (
    Estimate,
    Estimator,
    check_key,
    check_positive,
    check_tangents,
    check_whole,
    split_params,
    unpack,
    wide,
    wide_dtype,
)
from prograde.tangents import Rademacher, TangentDistribution


@dataclass(frozen=True)
class CentralDifference(Estimator):
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

    def estimate(self, fun, key, state, params, *args, has_aux=False):
        check_key(key)
        f, floats = split_params(fun, params, args, has_aux)
        for dtype in {w.dtype for w in jax.tree.leaves(floats)}:
            if self.step < (resolution := float(jnp.finfo(dtype).eps)):
                raise ValueError(
                    f"step={self.step:g}, but parameters of dtype {dtype} resolve no less than {resolution:.2g} of their size: most would not "
                    "move at all. Use a larger step, or float32 parameters."
                )

        def values_at(index, sign):
            tangents = self.tangents.sample(key, floats, index, self.num_tangents)
            value, aux = f(jax.tree.map(lambda w, v: _moved(w, v, sign * self.step), floats, tangents))
            return wide(value), aux

        def difference(index):
            above, _ = values_at(index, 1)
            below, aux = values_at(index, -1)
            return above, below, aux

        power = self.curvature_power
        clean = None if power is None else f(floats)

        def one_tangent(sums, index):
            above, below, aux = difference(index)
            directional = (above - below) / (2 * self.step)
            weight = jnp.ones(())
            if clean is not None and power is not None:
                curvature = jnp.mean(above - 2 * wide(clean[0]) + below) / self.step**2
                weight = jnp.maximum(jnp.abs(curvature) ** power, self.curvature_floor)
            coefficient = jnp.mean(directional) / weight / self.num_tangents
            tangents = self.tangents.sample(key, floats, index, self.num_tangents)
            tangents = jax.tree.map(lambda x: x[None], eqx.filter(tangents, eqx.is_array))
            sums = jax.tree.map(jnp.add, sums, weighted_sum(tangents, coefficient[None]))
            return sums, (jnp.mean(above + below) / 2, directional, aux)

        sums = jax.tree.map(lambda w: jnp.zeros(w.shape, wide_dtype(w.dtype)), floats)
        # the first is not in the loop: inside `shard_map` zeros vary along other axes than what is added
        sums, first = one_tangent(sums, jnp.asarray(0))
        value, directional, aux = jax.tree.map(lambda x: x[None], first)
        if self.num_tangents > 1:
            sums, rest = lax.scan(one_tangent, sums, jnp.arange(1, self.num_tangents))
            value, directional, aux = jax.tree.map(
                lambda a, b: jnp.concatenate([a, b]), (value, directional, aux), rest
            )
        value, aux = (jnp.mean(value), jax.tree.map(lambda x: x[-1], aux)) if clean is None else clean
        grads = jax.tree.map(lambda g, w: g.astype(w.dtype), sums, floats)
        return Estimate(jnp.mean(value), unpack(aux), grads, directional, state)


def _moved(weight: Array, tangent: PyTree, step: float) -> Array:
    dense = tangent.dense() if is_structured(tangent) else tangent
    return weight + jnp.asarray(step, weight.dtype) * jnp.broadcast_to(dense, weight.shape).astype(weight.dtype)
