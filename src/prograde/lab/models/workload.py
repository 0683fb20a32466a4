"""The interface of a workload: a training loss of fixed shape, whose cost is measured."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key, PyTree

Loss = Callable[..., tuple[Float[Array, ""], PyTree]]


@dataclass(frozen=True)
class Workload:
    """A training loss, its parameters and its data.

    **Fields:** `init(key) -> (params, state)`: the state is what a step changes in addition to the
    parameters: running statistics of batch normalisation, or nothing; `batch(key) -> arrays`;
    `loss(params, state, *batch) -> (loss, state)`. Two more forms of the same loss are for
    backprop: `checkpointed_loss` recomputes its blocks in reverse mode. `unrolled_loss`, if layers
    are scanned, unrolls them, which makes XLA's reverse mode a little faster and compilation much
    slower. `sizes`: the arguments of the constructor, for other implementations of the workload.
    """

    name: str
    title: str
    sizes: dict[str, int]
    init: Callable[[Key[Array, ""]], tuple[PyTree, PyTree]]
    batch: Callable[[Key[Array, ""]], tuple[Array, ...]]
    loss: Loss
    checkpointed_loss: Loss
    unrolled_loss: Loss | None = None


def as_it_is(block: Callable) -> Callable:
    """Returns a block unchanged, where another form of the loss checkpoints it."""
    return block


def matrices(key: Key[Array, ""], shapes: dict[str, tuple[int, ...]]) -> dict[str, Array]:
    """Draws normal entries of variance 1/fan-in for matrices, stacks of matrices and HWIO kernels.

    All come from one draw, which compiles fast.
    """
    flat = jax.random.normal(key, (sum(map(math.prod, shapes.values())),))
    found, start = {}, 0
    for name, shape in shapes.items():
        fan_in = math.prod(shape[:-1]) if len(shape) == 4 else shape[-2]
        found[name] = flat[start : start + math.prod(shape)].reshape(shape) / math.sqrt(fan_in)
        start += math.prod(shape)
    return found


def cross_entropy(
    logits: Float[Array, "*batch classes"], labels: Int[Array, "*batch"]
) -> Float[Array, ""]:
    """The mean softmax cross-entropy."""
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))
