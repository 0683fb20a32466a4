"""Loss and accuracy of a network on a part of the data.

Reports use the test part. The search of learning rates uses the validation part.
"""

import functools
from collections.abc import Callable

import jax
import numpy as np
from jaxtyping import PyTree

from prograde.lab.data import Dataset
from prograde.lab.models import Network

_CHUNK = 500  # examples that are evaluated together


def evaluate(
    network: Network, params: PyTree, part: tuple[np.ndarray, np.ndarray], limit: int
) -> tuple[float, float]:
    """Returns mean loss and accuracy on the first `limit` examples of a part of the data."""
    images, labels = part[0][:limit], part[1][:limit]
    sums = np.zeros(2)
    for i in range(0, len(labels), _CHUNK):
        chunk = slice(i, i + _CHUNK)
        losses, hits = _compiled(network)(params, images[chunk], labels[chunk])
        sums += [np.asarray(losses, np.float64).sum(), np.asarray(hits).sum()]
    return tuple((sums / len(labels)).tolist())


def figures_of(network: Network, data: Dataset, limit: int) -> Callable[[PyTree], dict[str, float]]:
    """Makes the figures of a point: loss and accuracy on the test and the training part."""

    def figures(params: PyTree) -> dict[str, float]:
        test_loss, test_accuracy = evaluate(network, params, data.test, limit)
        train_loss, train_accuracy = evaluate(network, params, data.train, limit)
        return {
            "test_loss": test_loss,
            "test_accuracy": test_accuracy,
            "train_loss": train_loss,
            "train_accuracy": train_accuracy,
        }

    return figures


def judge(network: Network, data: Dataset, limit: int) -> Callable[[PyTree], float]:
    """Makes the criterion of the search of a rate: the loss on the validation part."""
    return lambda params: evaluate(network, params, data.validation, limit)[0]


@functools.lru_cache(maxsize=8)
def _compiled(network: Network) -> Callable:
    """Compiles once for all trainers of a network."""
    return jax.jit(network.loss_and_hits)
