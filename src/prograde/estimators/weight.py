"""Weight perturbation: the forward gradient."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax import lax

from prograde._structured import directional_derivative, weighted_sum
from prograde.estimators._estimator import Estimate, Estimator, check_key, split_params, unpack
from prograde.tangents import LowRank, TangentDistribution


@dataclass(frozen=True)
class WeightPerturbation(Estimator):
    """The forward gradient: random tangents of the weights, each weighed by its exact directional derivative.

        g = 1/K sum_k (grad f . v_k) v_k

    `WeightPerturbation(Normal(), num_tangents=1)` is the estimator of the paper, exactly.

    **Arguments:**

    - `tangents`: the distribution of v, such as `Normal()` or `LowRank(rank=1)`.
    - `num_tangents`: K, at least 1.
    - `chunk`: how many tangents are carried through the function together; all of them when `None`. The result does not
      depend on it (up to rounding), the memory does: it holds the activations of one layer for `chunk` tangents.

    **Bias:** none, for any function and any K.

    **Variance:** one tangent gives E |g|^2 = sum_l c_l |grad_l f|^2 with c_l from `tangents.second_moment`, close to the
    number of parameters n. The mean of K independent tangents has 1/K of the variance.

    **Cost:** one forward run gives the loss and a directional derivative. A dense tangent doubles the multiply-adds and
    draws n random numbers; a low-rank one adds little to each. K tangents share one evaluation of the function (one per
    chunk). No activation is stored.

    **Errors:** `ValueError` for `num_tangents` or `chunk` below 1; `TypeError` for complex parameters, an old-style key
    or a loss that is not real; all at trace time.

    **Source:** arXiv 2202.08587; several tangents: arXiv 2310.14168.

    Examples:
        >>> import jax, jax.numpy as jnp, prograde as pg
        >>> def loss_fn(params, x, y):
        ...     return jnp.mean((x @ params["w"] + params["b"] - y) ** 2)
        >>> params = {"w": jnp.ones((8, 4)), "b": jnp.zeros(4)}
        >>> grad_fn = pg.value_and_grad(loss_fn, pg.WeightPerturbation(pg.LowRank(rank=1), num_tangents=16, chunk=8))
        >>> value, grads = jax.jit(grad_fn)(jax.random.key(0), params, jnp.ones((2, 8)), jnp.zeros((2, 4)))
        >>> float(value), grads["w"].shape
        (64.0, (8, 4))
    """

    tangents: TangentDistribution = field(default_factory=LowRank)
    num_tangents: int = 1
    chunk: int | None = None

    def __post_init__(self):
        if not isinstance(self.tangents, TangentDistribution):
            raise TypeError(
                f"tangents={self.tangents!r}, but a tangent distribution is needed, such as Normal() or LowRank(rank=1)."
            )
        for name, value in (("num_tangents", self.num_tangents), ("chunk", self.chunk)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}={value!r}, but a whole number of at least 1 is needed.")

    def estimate(self, fun, key, state, params, *args, has_aux=False):
        check_key(key)
        f, floats = split_params(fun, params, args, has_aux)
        num_chunks = -(-self.num_tangents // (self.chunk or self.num_tangents))
        size = -(-self.num_tangents // num_chunks)

        def one_tangent(index):
            tangents = self.tangents.sample(key, floats, index, self.num_tangents)
            value, directional, aux = directional_derivative(f, floats, tangents)
            return value, aux, directional.astype(jnp.promote_types(directional.dtype, jnp.float32)), tangents

        def one_chunk(indices):
            if size == 1:
                value, aux, directional, tangents = one_tangent(indices[0])
                directional, tangents = jax.tree.map(lambda x: x[None], (directional, tangents))
            else:
                value, aux, directional, tangents = jax.vmap(one_tangent)(indices)
                value, aux = jax.tree.map(lambda x: x[0], (value, aux))  # the primal is the same for all of them
            mean = directional.reshape(size, -1).mean(axis=1)
            # the last chunk may run over the number of tangents: what is over counts nothing
            coefficients = jnp.where(indices < self.num_tangents, mean / self.num_tangents, 0)
            return jnp.mean(value), aux, directional, weighted_sum(tangents, coefficients)

        indices = jnp.arange(num_chunks * size).reshape(num_chunks, size)
        if num_chunks == 1:
            value, aux, directional, grads = one_chunk(indices[0])
        else:

            def add_chunk(carry, indices):
                value, aux, directional, grads = one_chunk(indices)
                return (value, aux, jax.tree.map(jnp.add, carry[2], grads)), directional

            like = jax.eval_shape(one_chunk, indices[0])
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (like[0], like[1], like[3]))
            (value, aux, grads), directional = lax.scan(add_chunk, zeros, indices)
            directional = directional.reshape(num_chunks * size, *directional.shape[2:])[: self.num_tangents]
        grads = jax.tree.map(lambda g, w: g.astype(w.dtype), grads, floats)
        return Estimate(value, unpack(aux), grads, directional, state)
