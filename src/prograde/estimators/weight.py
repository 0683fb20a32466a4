"""Weight perturbation: the forward gradient."""

from dataclasses import dataclass, field
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, PyTree

from prograde._custom_vjp import inline_custom_vjp
from prograde._jaxprs import live_bytes
from prograde._structured import directional_derivative, is_structured, weighted_sum
from prograde.estimators._estimator import Estimate, Estimator, check_key, check_whole, split_params, unpack
from prograde.tangents import LowRank, TangentDistribution

_CHUNK_BYTES = 2**28  # what the tangents of a chunk may take when `chunk` is not given; more for larger models


@dataclass(frozen=True)
class WeightPerturbation(Estimator):
    """The forward gradient: random tangents of the weights, each weighed by its exact directional derivative.

        g = 1/K sum_k (grad f . v_k) v_k

    `WeightPerturbation(Normal(), num_tangents=1)` is the estimator of the paper, exactly.

    **Arguments:**

    - `tangents`: the distribution of v, such as `Normal()` or `LowRank(rank=1)`.
    - `num_tangents`: K, at least 1.
    - `chunk`: how many tangents are carried through the function together. When `None`, as many as fit into the memory of
      the parameters, or into 256 MiB where that is more, by a count of what is live at once. The result does not
      depend on it (up to rounding), the memory does: it holds the activations of one layer for `chunk` tangents.
    - `custom_vjp`: what to do with a function that has a `jax.custom_vjp`, a hand-made rule for reverse mode, which JAX refuses
      to differentiate forward: `"error"`, or `"inline"` to differentiate the code of the function itself instead. The
      hand-made rule then has no say; where it does not equal the derivative of the code, neither does the result.

    **Bias:** none, for any function and any K.

    **Variance:** one tangent gives E |g|^2 = sum_l c_l |grad_l f|^2 with c_l from `tangents.second_moment`, close to the
    number of parameters n. The mean of K independent tangents has 1/K of the variance.

    **Cost:** one forward run gives the loss and a directional derivative. A dense tangent doubles the multiply-adds and
    draws n random numbers; a low-rank one adds little to each. K tangents share one evaluation of the function (one per
    chunk), one dropout mask and one update of batch statistics. No activation is stored, and structured tangents are not formed
    before their weighted sum is.

    **Errors:** `ValueError` for `num_tangents` or `chunk` below 1 or another `custom_vjp`; `TypeError` for complex parameters, an
    old-style key, a loss that is not real, or a function that forward mode cannot pass; all at trace time.

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
    custom_vjp: Literal["error", "inline"] = "error"

    def __post_init__(self):
        if not isinstance(self.tangents, TangentDistribution):
            raise TypeError(
                f"tangents={self.tangents!r}, but a tangent distribution is needed, such as Normal() or LowRank(rank=1)."
            )
        check_whole("num_tangents", self.num_tangents)
        if self.chunk is not None:
            check_whole("chunk", self.chunk)
        if self.custom_vjp not in ("error", "inline"):
            raise ValueError(f"custom_vjp={self.custom_vjp!r}, but it is 'error' or 'inline'.")

    def estimate(self, fun, key, state, params, *args, has_aux=False):
        check_key(key)
        f, floats = split_params(fun, params, args, has_aux)
        f = inline_custom_vjp(f) if self.custom_vjp == "inline" else f

        def one_tangent(index):
            tangents = self.tangents.sample(key, floats, index, self.num_tangents)
            value, directional, aux = directional_derivative(f, floats, tangents)
            return value, aux, _wide(directional), tangents

        def one_chunk(indices):
            if len(indices) == 1:
                value, aux, directional, tangents = one_tangent(indices[0])
                directional, tangents = jax.tree.map(lambda x: x[None], (directional, tangents))
            else:
                value, aux, directional, tangents = jax.vmap(one_tangent)(indices)
                value, aux = jax.tree.map(lambda x: x[0], (value, aux))  # the primal is the same for all of them
            return jnp.mean(value), aux, directional, tangents

        def coefficients(directional, indices):
            mean = directional.reshape(len(indices), -1).mean(axis=1)
            # the last chunk may run over the number of tangents: what is over counts nothing
            return jnp.where(indices < self.num_tangents, mean / self.num_tangents, 0)

        num_chunks = -(-self.num_tangents // self._chunk_size(f, floats, one_chunk))
        size = -(-self.num_tangents // num_chunks)
        indices = jnp.arange(num_chunks * size).reshape(num_chunks, size)
        if num_chunks == 1:
            value, aux, directional, tangents = one_chunk(indices[0])
            grads = weighted_sum(tangents, coefficients(directional, indices[0]))
        else:
            # dense tangents are summed chunk by chunk; structured ones are drawn again, from the same key, and summed at once
            structured = self._structured(key, floats)
            at_the_end, in_chunks = eqx.partition(floats, structured)

            def add_chunk(carry, indices):
                value, aux, directional, tangents = one_chunk(indices)
                tangents = jax.tree.map(lambda s, v: None if s else v, structured, tangents, is_leaf=is_structured)
                total = weighted_sum(tangents, coefficients(directional, indices))
                return (value, aux, jax.tree.map(jnp.add, carry[2], total)), directional

            # the first chunk starts the sums: inside `shard_map` zeros would vary along other axes than what is added
            start = jax.tree.map(lambda w: jnp.zeros(w.shape, _wide_dtype(w.dtype)), in_chunks)
            start, first = add_chunk((None, None, start), indices[0])
            (value, aux, sums), rest = lax.scan(add_chunk, start, indices[1:])
            directional = jnp.concatenate([first[None], rest])
            directional = directional.reshape(num_chunks * size, *directional.shape[2:])[: self.num_tangents]
            grads = sums
            if jax.tree.leaves(at_the_end):
                every = jnp.arange(self.num_tangents)
                again = jax.vmap(lambda index: self.tangents.sample(key, at_the_end, index, self.num_tangents))(every)
                grads = eqx.combine(sums, weighted_sum(again, coefficients(directional, every)))
        grads = jax.tree.map(lambda g, w: g.astype(w.dtype), grads, floats)
        return Estimate(value, unpack(aux), grads, directional, state)

    def _structured(self, key: Any, floats: PyTree[Array]) -> PyTree[bool]:
        """Which leaves have structured tangents."""
        tangents = jax.eval_shape(lambda: self.tangents.sample(key, floats, 0, self.num_tangents))
        return jax.tree.map(is_structured, tangents, is_leaf=is_structured)

    def _chunk_size(self, f: Any, floats: PyTree[Array], one_chunk: Any) -> int:
        if self.chunk is not None or self.num_tangents == 1:
            return min(self.chunk or 1, self.num_tangents)
        bare = live_bytes(jax.make_jaxpr(f)(floats).jaxpr)
        together = live_bytes(jax.make_jaxpr(one_chunk)(jnp.arange(self.num_tangents)).jaxpr) - bare
        budget = max(_CHUNK_BYTES, sum(w.nbytes for w in jax.tree.leaves(floats)))
        return min(self.num_tangents, max(1, budget * self.num_tangents // max(1, together)))


def _wide_dtype(dtype: Any) -> Any:
    """The dtype that directional derivatives and sums of tangents are kept in."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def _wide(x: Array) -> Array:
    return x.astype(_wide_dtype(x.dtype))
