"""Weight perturbation: the forward gradient."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, PyTree

from prograde._custom_vjp import inline_custom_vjp
from prograde._structured import directional_derivative, is_structured, projected, weighted_sum
from prograde.estimators._chunks import in_groups, tangents_at_once
from prograde.estimators._estimator import (
    Estimate,
    check_choice,
    check_key,
    check_tangents,
    check_whole,
    float_leaves,
    split_params,
    unpack,
    wide,
    wide_dtype,
)
from prograde.estimators._seeded import SeededEstimator, Share
from prograde.tangents import LowRank, TangentDistribution


@dataclass(frozen=True)
class WeightPerturbation(SeededEstimator):
    """The forward gradient: random tangents of the weights, each weighed by its exact directional derivative.

        g = 1/K sum_k (grad f . v_k) v_k

    `WeightPerturbation(Normal(), num_tangents=1)` is the estimator of the paper, exactly.

    **Arguments:**

    - `tangents`: the distribution of v, such as `Normal()` or `LowRank(rank=1)`.
    - `num_tangents`: K, at least 1.
    - `chunk`: how many tangents are carried through the function together. When `None`, as many as fit into the memory of
      the parameters, or into 256 MiB where that is more, by a count of what is live at once. The result does not
      depend on it (up to rounding), the memory does: it holds the activations of one layer for `chunk` tangents.
    - `combine`: what to make of the K tangents, the columns of V, and their directional derivatives d = V^T grad f:
        - `"mean"`: g = V d / K, the unbiased estimate;
        - `"shrunk"`: a g with a = 1/c, c = E |g|^2 / |grad f|^2 of the mean. Of all multiples of the mean it has the least mean
          squared error (exactly so where c is the same for all leaves; the mean over parameters is taken where it is not);
        - `"projection"`: V (V^T V)^-1 d, the orthogonal projection of the gradient onto the span of the tangents. Where they
          are dependent, the pseudo-inverse takes the place of the inverse, and the result is still the projection.
    - `num_groups`: G. The batch is cut into G groups of examples, each with tangents of its own, which run in the same products: the
      estimate is the mean of the groups' estimates, and its variance that of G times as many tangents, as far as the groups
      have the same gradient. Arrays in the arguments have the examples along their first axis. The loss of a group is that of
      the function on the group alone (statistics of a batch are those of a group), and `aux` gets a leading axis for groups.
    - `custom_vjp`: what to do with a function that has a `jax.custom_vjp`, a hand-made rule for reverse mode, which JAX refuses
      to differentiate forward: `"error"`, or `"inline"` to differentiate the code of the function itself instead. The
      hand-made rule then has no say; where it does not equal the derivative of the code, neither does the result.

    **Bias:** none with `"mean"`, for any function and any K; groups estimate the gradient of the mean of the groups' losses, which is
    that of the batch where the loss is a mean over examples (or one loss for each), and not where it is a sum, or a mean with
    weights that groups have different amounts of. `"shrunk"` has E[g] = a grad f, with a = 1/(n + kappa_4 - 1) for one
    tangent of n independent entries of fourth moment kappa_4. `"projection"` has E[g] = (K/n) grad f where the span is
    uniformly distributed (`Normal`, `Sphere`, `Orthogonal`; K <= n), and grad f / n for one tangent of fixed length.

    **Variance:** one tangent gives E |g|^2 = sum_l c_l |grad_l f|^2 with c_l from `tangents.second_moment`, close to the
    number of parameters n. The mean of K independent tangents has 1/K of the variance; G groups divide what is left by G again, but
    see the smaller groups' own gradients, E |g|^2 = |grad f|^2 + sum_g (c - 1) |grad f_g|^2 / (K G^2). A projection never makes an error
    larger than the gradient: |g - grad f|^2 = (1 - cos^2) |grad f|^2, (1 - K/n) |grad f|^2 in the mean for uniform spans.

    **Cost:** one forward run gives the loss and a directional derivative. A dense tangent doubles the multiply-adds and
    draws n random numbers; a low-rank one adds little to each. K tangents share one evaluation of the function (one per
    chunk), one dropout mask and one update of batch statistics. No activation is stored, and structured tangents are not formed
    before their weighted sum is. `"projection"` needs all tangents at once: K times the parameters for dense ones, little for
    structured ones, whose inner products are products of those of their factors.

    **Errors:** `ValueError` for `num_tangents` or `chunk` or `num_groups` below 1, a batch that cannot be cut into the groups, another `combine` or `custom_vjp`; `TypeError` for complex parameters, an
    old-style key, a loss that is not real, or a function that forward mode cannot pass; all at trace time.

    **Source:** arXiv 2202.08587; several tangents and the least mean squared error: arXiv 2310.14168; projection: FROG, as in
    "How to guess a gradient" (arXiv 2312.04709) for the orthogonal projection onto a guessed subspace.

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
    combine: Literal["mean", "shrunk", "projection"] = "mean"
    num_groups: int = 1
    custom_vjp: Literal["error", "inline"] = "error"

    def __post_init__(self):
        check_tangents(self.tangents)
        check_whole("num_tangents", self.num_tangents)
        check_whole("num_groups", self.num_groups)
        if self.chunk is not None:
            check_whole("chunk", self.chunk)
        check_choice("combine", self.combine, ("mean", "shrunk", "projection"))
        check_choice("custom_vjp", self.custom_vjp, ("error", "inline"))
        if self.num_groups > 1 and self.combine != "mean":
            raise ValueError(
                f"combine={self.combine!r} with num_groups={self.num_groups}, but the directional derivatives of groups are those of "
                "different functions, whose only combination is the mean. Use combine='mean' or num_groups=1."
            )

    def estimate(self, fun, key, state, params, *args, has_aux=False):
        k, g = self.num_tangents, self.num_groups
        floats, one_chunk, chunks = self._runs(fun, key, params, args, has_aux, Share())

        def coefficients(directional, indices):
            # the last chunk may run over the number of tangents: what is over counts nothing
            return jnp.where(
                jnp.repeat(indices < k, g), self._coefficients(floats, directional, len(indices)), 0
            )

        def combined(tangents, directional, indices):
            along = coefficients(directional, indices)
            return weighted_sum(
                tangents, projected(tangents, along) if self.combine == "projection" else along
            )

        if len(chunks) == 1:
            value, aux, directional, tangents = one_chunk(chunks[0])
            grads = combined(tangents, directional, chunks[0])
        else:
            # dense tangents are summed chunk by chunk; structured ones are drawn again, from the same key, and summed at once,
            # and so are all where the weight of one depends on the others
            last = self._combined_last(key, floats)
            at_the_end, in_chunks = eqx.partition(floats, last)

            def add_chunk(carry, indices):
                value, aux, directional, tangents = one_chunk(indices)
                tangents = jax.tree.map(
                    lambda late, v: None if late else v, last, tangents, is_leaf=is_structured
                )
                total = weighted_sum(tangents, coefficients(directional, indices))
                return (value, aux, jax.tree.map(jnp.add, carry[2], total)), directional

            # the first chunk starts the sums: inside `shard_map` zeros vary along other axes than what is added
            start = jax.tree.map(lambda w: jnp.zeros(w.shape, wide_dtype(w.dtype)), in_chunks)
            start, first = add_chunk((None, None, start), chunks[0])
            (value, aux, sums), rest_of_them = lax.scan(add_chunk, start, chunks[1:])
            directional = _merged(jnp.concatenate([first[None], rest_of_them]))[: k * g]
            grads = sums
            if jax.tree.leaves(at_the_end):
                again = jax.vmap(lambda i: self.tangents.sample(key, at_the_end, i, k * g))(
                    jnp.arange(k * g)
                )
                grads = eqx.combine(sums, combined(again, directional, jnp.arange(k)))
        grads = jax.tree.map(lambda g, w: g.astype(w.dtype), grads, floats)
        if g > 1:
            directional = directional.reshape(k, -1)  # of the groups, or of all examples
        packed: Any = aux
        return Estimate(value, unpack(packed), grads, directional, state)

    def derivatives(self, fun, key, params, *args, has_aux=False, share=None):
        share = share or Share()
        k, g = share.of_tangents(self.num_tangents), share.of_groups(self.num_groups)
        _, one_chunk, chunks = self._runs(fun, key, params, args, has_aux, share)

        def of_chunk(indices):
            value, aux, directional, _ = one_chunk(indices)
            return value, aux, directional.reshape(len(indices), g, -1).mean(axis=2)

        value, aux, directional = of_chunk(chunks[0])
        if len(chunks) > 1:
            rest = lax.map(lambda indices: of_chunk(indices)[2], chunks[1:])
            directional = jnp.concatenate([directional, _merged(rest)])[:k]
        packed: Any = aux
        return value, unpack(packed), directional[..., None]

    def gradient(self, key, params, derivatives):
        check_key(key)
        floats = float_leaves(params)
        total = self.num_tangents * self.num_groups
        along = self._coefficients(floats, derivatives, self.num_tangents)
        sample = lambda params, index: self.tangents.sample(key, params, index, total)  # noqa: E731
        at_once, one_by_one = eqx.partition(floats, self._combined_last(key, floats))
        sums = jax.tree.map(lambda w: jnp.zeros(w.shape, wide_dtype(w.dtype)), one_by_one)
        if jax.tree.leaves(one_by_one):

            def add(sums, index_and_weight):
                index, weight = index_and_weight
                tangent = jax.tree.map(lambda v: v[None], sample(one_by_one, index))
                return jax.tree.map(jnp.add, sums, weighted_sum(tangent, weight[None])), None

            sums, _ = lax.scan(add, sums, (jnp.arange(total), along))
        if jax.tree.leaves(at_once):
            tangents = jax.vmap(lambda index: sample(at_once, index))(jnp.arange(total))
            if self.combine == "projection":
                along = projected(tangents, along)
            sums = eqx.combine(sums, weighted_sum(tangents, along))
        return jax.tree.map(lambda g, w: g.astype(w.dtype), sums, floats)

    def _runs(
        self, fun: Any, key: Any, params: Any, args: Any, has_aux: bool, share: Share
    ) -> tuple[PyTree[Array], Callable[[Array], tuple], Array]:
        """(floats, one_chunk, chunks): the runs along a share of the tangents, for a share of the groups.

        `one_chunk(indices)` is (value, packed aux, directional, tangents) of the tangents with these numbers.
        """
        check_key(key)
        total = self.num_tangents * self.num_groups
        k, g = share.of_tangents(self.num_tangents), share.of_groups(self.num_groups)
        # of the type of `lax.axis_index`, so that nothing has to be promoted where integers have 64 bits
        groups = (share.group * g if self.num_groups > 1 else 0) + jnp.arange(g, dtype=jnp.int32)
        _, floats = split_params(fun, params, args, has_aux)
        arrays, rest = in_groups(args, g)

        def of_group(arrays):
            f, _ = split_params(fun, params, eqx.combine(arrays, rest), has_aux)
            return inline_custom_vjp(f) if self.custom_vjp == "inline" else f

        def one_tangent(index, arrays):
            tangents = self.tangents.sample(key, floats, index, total)
            value, directional, aux = directional_derivative(of_group(arrays), floats, tangents)
            return jnp.mean(value), aux, wide(directional), tangents

        def one_for_each_group(index):
            """A tangent for each group, along a leading axis."""
            if g == 1:
                value, aux, directional, tangents = one_tangent(
                    index * self.num_groups + groups[0], arrays
                )
                return value, aux, *jax.tree.map(lambda x: x[None], (directional, tangents))
            value, *others = jax.vmap(one_tangent)(index * self.num_groups + groups, arrays)
            return jnp.mean(value), *others

        def one_chunk(indices):
            if len(indices) == 1:
                return one_for_each_group(indices[0])
            value, aux, directional, tangents = jax.vmap(one_for_each_group)(indices)
            value, aux = jax.tree.map(
                lambda x: x[0], (value, aux)
            )  # the primal is the same for all of them
            return value, aux, *jax.tree.map(_merged, (directional, tangents))

        whole = of_group(args) if g == 1 else of_group(jax.tree.map(lambda x: x[0], arrays))
        num_chunks = -(-k // tangents_at_once(self.chunk, k, whole, floats, one_chunk))
        size = -(-k // num_chunks)
        chunks = share.tangent * k + jnp.arange(num_chunks * size, dtype=jnp.int32).reshape(
            num_chunks, size
        )
        return floats, one_chunk, chunks

    def _coefficients(self, floats: PyTree[Array], directional: Array, num_tangents: int) -> Array:
        """What each tangent of each group is multiplied by, before a projection."""
        return self._scale(floats) * directional.reshape(num_tangents * self.num_groups, -1).mean(
            axis=1
        )

    def _scale(self, floats: PyTree[Array]) -> float:
        """What a directional derivative is multiplied by to weigh its tangent."""
        if self.combine == "projection":
            return 1.0
        num_tangents = self.num_tangents * self.num_groups
        if self.combine == "mean":
            return 1 / num_tangents
        sizes = [w.size for w in jax.tree.leaves(floats)]
        moments = jax.tree.leaves(self.tangents.second_moment_of_mean(floats, num_tangents))
        return sum(sizes) / sum(c * n for c, n in zip(moments, sizes, strict=True)) / num_tangents

    def _combined_last(self, key: Any, floats: PyTree[Array]) -> PyTree[bool]:
        """Which leaves' tangents are combined when all directional derivatives are known."""
        if self.combine == "projection":
            return jax.tree.map(lambda _: True, floats)
        num_tangents = self.num_tangents * self.num_groups
        tangents = jax.eval_shape(lambda: self.tangents.sample(key, floats, 0, num_tangents))
        return jax.tree.map(is_structured, tangents, is_leaf=is_structured)


def _merged(x: Array) -> Array:
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])  # not -1: a leaf may be empty
