"""All workloads: training losses whose cost is measured, as plain JAX functions.

Only cost matters here, so parameters and data are random. Sizes are arguments, so that tests can
run small versions.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from prograde.lab import models
from prograde.lab.data import IMAGE_SIZE, NUM_CLASSES
from prograde.lab.models.decoders import smollm2, transformer
from prograde.lab.models.resnet import resnet
from prograde.lab.models.workload import Workload, as_it_is, matrices


def _network(
    name: str, title: str, network: Callable[[bool], models.Network], batch: int
) -> Workload:
    """Makes a workload of a network of the paper."""

    def images_and_labels(key):
        key_x, key_y = jax.random.split(key)
        return (
            jax.random.uniform(key_x, (batch, IMAGE_SIZE, IMAGE_SIZE)),
            jax.random.randint(key_y, (batch,), 0, NUM_CLASSES),
        )

    def loss(checkpointed):
        return lambda params, state, images, labels: (
            network(checkpointed).loss(params, images, labels),
            state,
        )

    init = network(False).init
    return Workload(
        name,
        title,
        {"batch": batch},
        lambda key: (init(key), {}),
        images_and_labels,
        loss(False),
        loss(True),
    )


def logreg(batch: int = 64) -> Workload:
    """Multinomial logistic regression, 784-10."""
    return _network("logreg", f"Logistic regression, batch {batch}", models.logreg, batch)


def mlp(batch: int = 64) -> Workload:
    """The paper's multilayer perceptron."""
    return _network("mlp", f"MLP 784-1024-1024-10, batch {batch}", models.mlp, batch)


def mlp_large_batch(batch: int = 512) -> Workload:
    """The same MLP with a batch so large that products of matrices outweigh the update."""
    return _network("mlp-512", f"MLP 784-1024-1024-10, batch {batch}", models.mlp, batch)


def cnn(batch: int = 64) -> Workload:
    """The paper's convolutional network."""
    return _network("cnn", f"The paper's CNN, batch {batch}", models.cnn, batch)


def wide(batch: int = 1, width: int = 2048, depth: int = 4) -> Workload:
    """Layers whose weights take longer to read than a few rows take to multiply."""

    def init(key):
        drawn = matrices(key, {f"layer{i}": (width, width) for i in range(depth)})
        return {name: {"w": w} for name, w in drawn.items()}, {}

    def build(wrap=as_it_is):
        layer = wrap(lambda p, h: jax.nn.relu(h @ p["w"]))

        def loss(params, state, x):
            for i in range(depth):
                x = layer(params[f"layer{i}"], x)
            return jnp.mean(x * x), state

        return loss

    title = f"{depth} layers of {width:,}, {batch} row{'s' if batch > 1 else ''}"
    sizes = {"batch": batch, "width": width, "depth": depth}
    rows = lambda key: (jax.random.normal(key, (batch, width)),)  # noqa: E731
    return Workload(f"wide-{batch}", title, sizes, init, rows, build(), build(jax.checkpoint))


WORKLOADS: dict[str, Callable[..., Workload]] = {
    "logreg": logreg,
    "mlp": mlp,
    "mlp-512": mlp_large_batch,
    "cnn": cnn,
    "resnet": resnet,
    "transformer": transformer,
    "smollm2": smollm2,
    "wide-1": wide,
    "wide-8": partial(wide, 8),
    "wide-16": partial(wide, 16),
}
