"""The interface of a network: plain functions of plain parameters."""

from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key, PyTree


@dataclass(frozen=True)
class Network:
    """A classifier of images.

    **Fields:** `init(key) -> params`; `logits(params, images) -> [batch, classes]`;
    `local_losses(params, images, labels)`: many losses of each example, for `LocalLosses`, if the
    network has them.
    """

    init: Callable[[Key[Array, ""]], PyTree]
    logits: Callable[[PyTree, Float[Array, "batch 28 28"]], Float[Array, "batch classes"]]
    local_losses: Callable[[PyTree, Array, Int[Array, " batch"]], PyTree[Array]] | None = None

    def loss(self, params: PyTree, images: Array, labels: Int[Array, " batch"]) -> Float[Array, ""]:
        """Mean softmax cross-entropy."""
        return jnp.mean(self.losses(params, images, labels))

    def losses(
        self, params: PyTree, images: Array, labels: Int[Array, " batch"]
    ) -> Float[Array, " batch"]:
        """Softmax cross-entropy of each example, for estimators that need separate examples."""
        return optax.softmax_cross_entropy_with_integer_labels(self.logits(params, images), labels)

    def loss_and_hits(self, params: PyTree, images: Array, labels: Array) -> tuple[Array, Array]:
        """The loss of each example, and whether it is classified correctly."""
        logits = self.logits(params, images)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses, jnp.argmax(logits, axis=-1) == labels
