"""Figures of a classifier from the logits of its labels, and the repair of its label bias."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float, Int
from scipy import special, stats

import prograde as pg


def figures_of(
    logits: Float[np.ndarray, "examples labels"], labels: Int[np.ndarray, " examples"]
) -> dict[str, float]:
    """Loss, accuracy, and for two labels the area under the ROC curve (AUC).

    The AUC is the probability that an example of the second label has a larger margin than one of
    the first; ties count one half. No offset of the logits changes it.
    """
    logits = logits.astype(np.float64)
    with np.errstate(invalid="ignore"):  # an infinite logit gives a loss that is no number
        chosen = special.log_softmax(logits, axis=1)[np.arange(len(labels)), labels]
    found = {
        "loss": float(-chosen.mean()),
        "accuracy": float((logits.argmax(axis=1) == labels).mean()),
    }
    if logits.shape[1] == 2 and 0 < labels.sum() < len(labels):
        margin = logits[:, 1] - logits[:, 0]
        positive, negative = margin[labels == 1], margin[labels == 0]
        if np.isfinite(margin).all():
            wins = stats.mannwhitneyu(positive, negative, method="asymptotic").statistic
            found["auc"] = float(wins / (len(positive) * len(negative)))
    return found


def in_words(figures: dict[str, Any]) -> str:
    """Held-out figures, on one line."""
    parts = [f"accuracy {100 * figures['accuracy']:.1f} %", f"loss {figures['loss']:.3f}"]
    if "auc" in figures:
        parts.append(f"AUC {figures['auc']:.3f}")
    if "perplexity" in figures:
        parts.append(f"perplexity {figures['perplexity']:.1f}")
    return ", ".join(parts)


def probabilities(logits: Float[np.ndarray, "examples labels"]) -> list[list[float]]:
    """The probability of each label."""
    return special.softmax(logits.astype(np.float64), axis=1).tolist()


def calibration(
    logits: Float[np.ndarray, "examples labels"], labels: Int[np.ndarray, " examples"]
) -> tuple[float, ...]:
    """The offsets of the labels' logits with the least loss on these examples; their sum is zero.

    This is what a moved bias alone reaches.
    """

    def loss_fn(offsets: Array) -> Array:
        moved = jnp.asarray(logits) + offsets
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(moved, jnp.asarray(labels)))

    exact = pg.value_and_grad(loss_fn, pg.ForwardJacobian())

    def newton(offsets: Array, _: None) -> tuple[Array, None]:
        hessian = jax.jacfwd(lambda x: exact(jax.random.key(0), x)[1])(offsets)
        _, grads = exact(jax.random.key(0), offsets)
        # the loss does not change with the sum of the offsets, which the pseudo-inverse leaves
        # alone; the damping is for labels that the model tells apart without a mistake
        step = jnp.linalg.pinv(hessian + 1e-4 * jnp.eye(len(grads)), hermitian=True) @ grads
        return offsets - jnp.clip(step, -2, 2), None

    found = jax.jit(lambda: lax.scan(newton, jnp.zeros(logits.shape[1]), None, length=30)[0])()
    return tuple(float(x) for x in np.asarray(found) - float(np.mean(found)))
