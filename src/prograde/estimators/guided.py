"""A guess of the gradient, corrected by forward gradients."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from prograde.kit import (
    Estimator,
    Loss,
    check_choice,
    check_key,
    check_positive,
    check_tangents,
    check_whole,
    in_chunks,
    inner_products_with,
    tangents_at_once,
    weighted_sum,
    wide_dtype,
    wide_zeros,
)
from prograde.tangents import LowRank, TangentDistribution


@dataclass(frozen=True)
class Guided(Estimator):
    """A guess of the gradient, corrected by the forward gradient of the rest, or projected on.

        control variate:   g = guess + 1/K sum_k (grad f . v_k - guess . v_k) v_k
        projection:        g = (grad f . guess) guess / |guess|^2

    **Arguments:**

    - `guess`: `"previous"`, the previous estimate; `"momentum"`, the average
      m <- decay m + (1 - decay) g of the estimates; or a function `guess(params, *args)` of the
      arguments of the loss that returns a tree like the parameters, such as the gradient of local
      losses.
    - `use`: `"control_variate"` or `"projection"`. A projection on its own past never leaves its
      line, so it needs a function as the guess.
    - `tangents`, `num_tangents`, `chunk`: the v_k of the control variate, as in
      `WeightPerturbation`.
    - `decay`: of the momentum, in (0, 1).
    - `custom_vjp`: as in `WeightPerturbation`.

    **State:** the previous estimate or the average, a tree like the parameters in float32, zero at
    first; `None` for a function.

    **Bias:** none for the control variate, for any guess that does not depend on the tangents. The
    projection is exact along the guess and drops the rest of the gradient:
    |g - grad f|^2 = (1 - cos^2) |grad f|^2.

    **Variance:** the control variate has that of `WeightPerturbation` for grad f - guess in place
    of grad f. It is smaller where the cosine between guess and gradient is above
    |guess| / (2 |grad f|), and larger elsewhere. `"previous"` and `"momentum"` carry the noise of
    their own past, and help only where the gradient changes more slowly than K tangents learn it.
    The projection has none.

    **Cost:** the control variate costs what `WeightPerturbation` does, plus an inner product of the
    guess with each tangent; the projection costs one forward run along a dense tangent. The guess
    is extra in both cases.

    **Errors:** `ValueError` for a guess of another structure or shape than the parameters, a state
    that does not fit the model, `"projection"` with a guess from the past, arguments out of range;
    otherwise as `WeightPerturbation`.

    **Source:** Fournier et al., arXiv 2306.06968 (gradients of local losses as the guess,
    projection); the control variate is that of Monte Carlo integration.

    Examples:
        >>> import jax, jax.numpy as jnp, prograde as pg
        >>> loss = lambda w, x: jnp.sum((w - x) ** 2)
        >>> guess = lambda w, x: 2 * (w - x)                       # here the gradient itself
        >>> grad_fn = pg.value_and_grad(loss, pg.Guided(guess, use="projection"))
        >>> value, grads = grad_fn(jax.random.key(0), jnp.zeros(3), jnp.array([1.0, 2.0, 3.0]))
        >>> bool(jnp.allclose(grads, jnp.array([-2.0, -4.0, -6.0])))
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
        is_word = isinstance(self.guess, str) and self.guess in ("previous", "momentum")
        if not callable(self.guess) and not is_word:
            raise ValueError(
                f"guess={self.guess!r}, but it is 'previous', 'momentum' or a function of "
                "(params, *args)."
            )
        check_choice("use", self.use, ("control_variate", "projection"))
        if self.use == "projection" and not callable(self.guess):
            raise ValueError(
                f"use='projection' with guess={self.guess!r}, but a projection on its own past "
                "never leaves that line. Use 'control_variate', or a function as the guess."
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
        return wide_zeros(Loss(fun, params, args, has_aux).floats)

    def estimate(self, fun, key, state, params, *args, has_aux=False):
        check_key(key)
        loss = Loss(fun, params, args, has_aux, self.custom_vjp)
        if callable(self.guess):
            guess = eqx.filter(self.guess(params, *args), eqx.is_inexact_array)
            _check_like("the guess", guess, loss.floats)
        else:
            guess = state
            _check_like("state", guess, loss.floats)
        guess = jax.tree.map(lambda g, w: g.astype(wide_dtype(w.dtype)), guess, loss.floats)
        if self.use == "projection":
            value, aux, grads, directional = self._projection(loss, guess)
        else:
            value, aux, grads, directional = self._control_variate(loss, key, guess)
        if self.guess == "previous":
            state = grads
        elif self.guess == "momentum":
            state = jax.tree.map(lambda m, g: self.decay * m + (1 - self.decay) * g, state, grads)
        return loss.estimate(value, grads, directional, aux, state)

    def _projection(self, loss: Loss, guess: PyTree[Array]) -> Any:
        """(grad f . u) u along the unit vector u of the guess."""
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(guess)))
        unit = jax.tree.map(lambda g: g / jnp.where(norm > 0, norm, 1), guess)
        tangent = jax.tree.map(lambda u, w: u.astype(w.dtype), unit, loss.floats)
        value, directional, aux = loss.along(tangent)
        grads = jax.tree.map(lambda u: jnp.mean(directional) * u, unit)
        return value, aux, grads, directional[None]

    def _control_variate(self, loss: Loss, key: Any, guess: PyTree[Array]) -> Any:
        """Guess + 1/K sum_k (grad f . v_k - guess . v_k) v_k."""
        k = self.num_tangents

        @jax.vmap
        def along(index: Array) -> Any:
            tangents = self.tangents.sample(key, loss.floats, index, k)
            return *loss.along(tangents), tangents

        def add_chunk(grads: PyTree[Array], indices: Array) -> Any:
            value, directional, aux, tangents = along(indices)
            per_tangent = directional.reshape(len(indices), -1).mean(axis=1)
            left = per_tangent - inner_products_with(guess, tangents)
            weights = jnp.where(indices < k, left / k, 0)  # padding tangents get weight zero
            correction = weighted_sum(tangents, weights)
            grads = jax.tree.map(lambda g, c: g + c.astype(g.dtype), grads, correction)
            return grads, jax.tree.map(lambda x: x[0], (value, aux)), directional

        size = tangents_at_once(self.chunk, k, loss, loss.floats, along)
        grads, (value, aux), directional = in_chunks(add_chunk, guess, k, size)
        return value, aux, grads, directional


def _check_like(name: str, tree: PyTree, floats: PyTree[Array]) -> None:
    shapes = [jax.tree.map(jnp.shape, t) for t in (tree, floats)]
    if jax.tree.structure(tree) != jax.tree.structure(floats) or shapes[0] != shapes[1]:
        raise ValueError(
            f"{name} has the structure and shapes {shapes[0]}, but those of the parameters are "
            f"{shapes[1]}. They must be the same, with None in place of leaves that are no float "
            "arrays."
        )
