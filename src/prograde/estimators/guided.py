"""A guess of the gradient, corrected by forward gradients."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, PyTree

from prograde._custom_vjp import inline_custom_vjp
from prograde._structured import directional_derivative, inner_products_with, weighted_sum
from prograde.estimators._chunks import tangents_at_once
from prograde.estimators._estimator import (
    Estimate,
    Estimator,
    check_choice,
    check_key,
    check_positive,
    check_tangents,
    check_whole,
    split_params,
    unpack,
    wide,
    wide_dtype,
)
from prograde.tangents import LowRank, TangentDistribution


@dataclass(frozen=True)
class Guided(Estimator):
    """Forward gradients of what a guess of the gradient leaves over, or along the guess alone.

        control variate:   g = guess + 1/K sum_k (grad f . v_k - guess . v_k) v_k
        projection:        g = (grad f . guess) guess / |guess|^2

    **Arguments:**

    - `guess`: `"previous"`, the previous estimate; `"momentum"`, the average m <- decay m + (1 - decay) g of the estimates; or a
      function `guess(params, *args)` of the arguments of the loss that returns a tree like the parameters, such as the
      gradient of local losses.
    - `use`: `"control_variate"` or `"projection"`. A projection on its own past never leaves its line, so that it needs a
      function.
    - `tangents`, `num_tangents`, `chunk`: the v_k of the control variate, as in `WeightPerturbation`.
    - `decay`: of the momentum, in (0, 1).
    - `custom_vjp`: as in `WeightPerturbation`.

    **State:** the previous estimate or the average, a tree like the parameters in float32, zero at first; `()` for a function.

    **Bias:** none for the control variate, whatever the guess, as it does not depend on the tangents. The projection has no
    error along the guess, and leaves out the rest of the gradient: |g - grad f|^2 = (1 - cos^2) |grad f|^2.

    **Variance:** of the control variate, that of `WeightPerturbation` for grad f - guess in place of grad f: less where the guess has
    a cosine above |guess| / (2 |grad f|), more where it has not. "previous" and "momentum" carry the noise of their own past,
    and help only where the gradient changes more slowly than K tangents learn it. None for the projection.

    **Cost:** of the control variate, that of `WeightPerturbation`, and an inner product of the guess with each tangent; of the
    projection, one forward run along a dense tangent; and in both cases the guess.

    **Errors:** `ValueError` for a guess of another structure or shape than the parameters, a state that is not one of this model,
    `"projection"` with a guess from the past, arguments out of range; as `WeightPerturbation` else.

    **Source:** Fournier et al., arXiv 2306.06968 (gradients of local losses as guess, projection); the control variate is that of
    Monte Carlo integration.

    Examples:
        >>> import jax, jax.numpy as jnp, prograde as pg
        >>> loss = lambda w, x: jnp.sum((w - x) ** 2)
        >>> guess = lambda w, x: {"w": 2 * (w["w"] - x)}           # here the gradient itself
        >>> grad_fn = pg.value_and_grad(lambda w, x: loss(w["w"], x), pg.Guided(guess, use="projection"))
        >>> value, grads = grad_fn(jax.random.key(0), {"w": jnp.zeros(3)}, jnp.array([1.0, 2.0, 3.0]))
        >>> bool(jnp.allclose(grads["w"], jnp.array([-2.0, -4.0, -6.0])))
        True
    """

    guess: Literal["previous", "momentum"] | Callable[..., PyTree] = "momentum"
    use: Literal["control_variate", "projection"] = "control_variate"
    tangents: TangentDistribution = field(default_factory=LowRank)
    num_tangents: int = 1
    chunk: int | None = None
    decay: float = 0.9
    custom_vjp: Literal["error", "inline"] = "error"

    def __post_init__(self):
        if not callable(self.guess) and self.guess not in ("previous", "momentum"):
            raise ValueError(
                f"guess={self.guess!r}, but it is 'previous', 'momentum' or a function of (params, *args)."
            )
        check_choice("use", self.use, ("control_variate", "projection"))
        if self.use == "projection" and not callable(self.guess):
            raise ValueError(
                f"use='projection' with guess={self.guess!r}, but what is projected on its own past never leaves that line. Use "
                "'control_variate', or a function as the guess."
            )
        check_tangents(self.tangents)
        check_whole("num_tangents", self.num_tangents)
        if self.chunk is not None:
            check_whole("chunk", self.chunk)
        check_positive("decay", self.decay)
        if self.decay >= 1:
            raise ValueError(f"decay={self.decay!r}, but a number above 0 and below 1 is needed.")
        check_choice("custom_vjp", self.custom_vjp, ("error", "inline"))

    def init(self, fun, params, *args, has_aux=False):
        if callable(self.guess):
            return None
        _, floats = split_params(fun, params, args, has_aux)
        return jax.tree.map(lambda w: jnp.zeros(w.shape, wide_dtype(w.dtype)), floats)

    def estimate(self, fun, key, state, params, *args, has_aux=False):
        check_key(key)
        f, floats = split_params(fun, params, args, has_aux)
        f = inline_custom_vjp(f) if self.custom_vjp == "inline" else f
        guess = (
            eqx.filter(self.guess(params, *args), eqx.is_inexact_array)
            if callable(self.guess)
            else state
        )
        _check_like("the guess" if callable(self.guess) else "state", guess, floats)
        guess = jax.tree.map(lambda g, w: g.astype(wide_dtype(w.dtype)), guess, floats)
        run = self._projection if self.use == "projection" else self._control_variate
        value, aux, grads, directional = run(f, key, floats, guess)
        if self.guess == "previous":
            state = grads
        elif self.guess == "momentum":
            state = jax.tree.map(lambda m, g: self.decay * m + (1 - self.decay) * g, state, grads)
        grads = jax.tree.map(lambda g, w: g.astype(w.dtype), grads, floats)
        return Estimate(jnp.mean(value), unpack(aux), grads, directional, state)

    def _projection(self, f: Any, key: Array, floats: PyTree[Array], guess: PyTree[Array]) -> Any:
        del key
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(guess)))
        unit = jax.tree.map(lambda g: g / jnp.where(norm > 0, norm, 1), guess)
        tangent = jax.tree.map(lambda u, w: u.astype(w.dtype), unit, floats)
        value, directional, aux = directional_derivative(f, floats, tangent)
        directional = wide(directional)[None]
        return value, aux, jax.tree.map(lambda u: jnp.mean(directional) * u, unit), directional

    def _control_variate(
        self, f: Any, key: Array, floats: PyTree[Array], guess: PyTree[Array]
    ) -> Any:
        def one_tangent(index: Array) -> Any:
            tangents = self.tangents.sample(key, floats, index, self.num_tangents)
            value, directional, aux = directional_derivative(f, floats, tangents)
            return jnp.mean(value), aux, wide(directional), tangents

        def add_chunk(grads: PyTree[Array], indices: Array) -> Any:
            value, aux, directional, tangents = jax.vmap(one_tangent)(indices)
            left = directional.reshape(len(indices), -1).mean(axis=1) - inner_products_with(
                guess, tangents
            )
            # the last chunk may run over the number of tangents: what is over counts nothing
            weights = jnp.where(indices < self.num_tangents, left / self.num_tangents, 0)
            correction = weighted_sum(tangents, weights)
            grads = jax.tree.map(lambda g, c: g + c.astype(g.dtype), grads, correction)
            return grads, (value[0], jax.tree.map(lambda x: x[0], aux), directional)

        k = self.num_tangents
        size = tangents_at_once(self.chunk, k, f, floats, jax.vmap(one_tangent))
        indices = jnp.arange(-(-k // size) * size).reshape(-1, size)
        # the first chunk is not in the loop: inside `shard_map` the guess varies along other axes than what is added
        grads, (value, aux, directional) = add_chunk(guess, indices[0])
        if len(indices) > 1:
            grads, (_, _, others) = lax.scan(add_chunk, grads, indices[1:])
            directional = jnp.concatenate([directional[None], others]).reshape(
                -1, *directional.shape[1:]
            )[:k]
        return value, aux, grads, directional


def _check_like(name: str, tree: PyTree, floats: PyTree[Array]) -> None:
    shapes = [jax.tree.map(jnp.shape, t) for t in (tree, floats)]
    if jax.tree.structure(tree) != jax.tree.structure(floats) or shapes[0] != shapes[1]:
        raise ValueError(
            f"{name} has the structure and shapes {shapes[0]}, but those of the parameters are {shapes[1]}. They must be the same, "
            "with None in place of leaves that are no float arrays."
        )
