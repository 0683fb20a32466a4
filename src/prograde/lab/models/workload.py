"""What a workload is: a training loss at one fixed shape, to measure the cost of."""

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
    """A loss to be trained.

    **Fields:** `init(key) -> (params, state)`: the state is what a step changes in addition to the
    parameters, which are running statistics of batch normalisation, or nothing;
    `batch(key) -> arrays`; `loss(params, state, *batch) -> (loss, state)`. Two more forms of the
    same loss are for backprop alone: `checkpointed_loss`, whose blocks are recomputed in reverse
    mode, and, where layers are scanned, `unrolled_loss`, which XLA reverses somewhat faster and
    compiles much slower. `sizes`: the arguments of the constructor, which another implementation
    of the same workload needs.
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
    """Leaves a block as it is, where another form of the loss checkpoints it."""
    return block


def matrices(key: Key[Array, ""], shapes: dict[str, tuple[int, ...]]) -> dict[str, Array]:
    """Draws normal entries of variance 1/fan-in for matrices, stacks of them and HWIO kernels.

    It is one draw for all, which compiles fast.
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
