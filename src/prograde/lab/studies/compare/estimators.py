"""Estimators and models of `prograde compare`, by name."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, PyTree

import prograde as pg
from prograde.lab import models
from prograde.lab.models.layers import dense, flatten


@dataclass(frozen=True)
class InputRMS:
    """Scales for the rows of the weights of `mlp`, from the batch at hand.

    The scale of a row is rms^-1/2, where rms is the root mean square of the row's input. A row's
    gradient is about as large as its input, so that these scales nearly minimise the second moment.
    `Scaled(scales="gradient")` learns the same for leaves. An input below `floor` times the root
    mean square of its layer counts as that value.

    **Errors:** `ValueError` for parameters of another model.
    """

    floor: float = 0.1

    def __call__(self, params: PyTree, images: Array, labels: Array) -> PyTree:
        """Returns the scales of all leaves."""
        del labels
        if list(params) != ["hidden1", "hidden2", "out"]:
            raise ValueError(
                "InputRMS knows the layers hidden1, hidden2 and out of mlp, "
                f"but these are {', '.join(params)}."
            )
        h, scales = flatten(images), {}
        for name, layer in params.items():
            squares = jnp.mean(jnp.square(h), axis=0)
            rms = jnp.sqrt(jnp.maximum(squares, self.floor**2 * jnp.mean(squares)))
            scales[name] = {"w": lax.rsqrt(rms)[:, None], "b": jnp.ones(())}
            h = jax.nn.relu(dense(layer, h))
        return scales


_ONE = pg.LowRank(rank=1)

ESTIMATORS: dict[str, pg.Estimator] = {
    "backprop": pg.Backprop(),
    "checkpointed": pg.CheckpointedBackprop(),
    "weight": pg.WeightPerturbation(_ONE),
    "weight-16": pg.WeightPerturbation(_ONE, num_tangents=16),
    "blocks": pg.WeightPerturbation(pg.Blocks(_ONE)),
    "blocks-size": pg.WeightPerturbation(pg.Blocks(_ONE, probabilities="size")),
    "blocks-learned": pg.LearnedBlocks(pg.WeightPerturbation(pg.Blocks(_ONE))),
    "projection-16": pg.WeightPerturbation(_ONE, num_tangents=16, combine="projection"),
    "weight-16-groups-16": pg.WeightPerturbation(_ONE, num_tangents=16, num_groups=16),
    "groups-8": pg.WeightPerturbation(_ONE, num_groups=8),
    "dense": pg.WeightPerturbation(pg.Normal()),
    "momentum": pg.Guided("momentum"),
    "scaled-rows": pg.Scaled(scales=InputRMS()),
    "scaled-gradient": pg.Scaled(scales="gradient"),
    "scaled-curvature": pg.Scaled(scales="curvature"),
    "preconditioned": pg.Scaled(scales="curvature", precondition=True),
    "preconditioned-one": pg.Scaled(scales="curvature", precondition=True, limit=1.0),
    "activity": pg.ActivityPerturbation(head="exact", scale="rms"),
    "activity-4": pg.ActivityPerturbation(num_tangents=4, head="exact", scale="rms"),
    "activity-16": pg.ActivityPerturbation(num_tangents=16, head="exact", scale="rms"),
    "local": pg.LocalLosses(head="exact", scale="rms"),
    "local-4": pg.LocalLosses(num_tangents=4, head="exact", scale="rms"),
    "local-backprop": pg.Backprop(),
    "feedback": pg.LearnedFeedback(every=8),
    "feedback-tail": pg.LearnedFeedback(rate=0.5, every=8, tail=2),
    "feedback-unbiased": pg.LearnedFeedback(use="control_variate"),
    "difference": pg.CentralDifference(_ONE),
}
TITLES = {
    "backprop": "reverse mode",
    "checkpointed": "reverse mode that recomputes activations",
    "weight": "one rank-one tangent for all weights",
    "weight-16": "16 rank-one tangents, averaged",
    "blocks": "one rank-one tangent in one layer, each as often",
    "blocks-size": "one rank-one tangent in one layer, chosen by the number of its weights",
    "blocks-learned": "one rank-one tangent in one layer, chosen by what the layers bring",
    "projection-16": "16 rank-one tangents, the gradient projected on their span",
    "weight-16-groups-16": "16 rank-one tangents for each of 16 groups of examples",
    "groups-8": "a rank-one tangent for each of 8 groups of examples",
    "dense": "one dense normal tangent for all weights, as in the paper",
    "momentum": "a tangent along the momentum, and one for the rest",
    "scaled-rows": "a rank-one tangent with a scale for each row, from its input (mlp only)",
    "scaled-gradient": "a rank-one tangent with a learned scale for each leaf, by its gradient",
    "scaled-curvature": "a rank-one tangent with a learned scale for each leaf, by its curvature",
    "preconditioned": "the same, and the estimate is scaled by the curvature too",
    "preconditioned-one": "the same with one scale for all leaves",
    "activity": "noise on activities, the last layer's gradient exact",
    "activity-4": "the same with 4 tangents",
    "activity-16": "the same with 16 tangents",
    "local": "noise on activities, each local loss read by its own layers (local mixers only)",
    "local-4": "the same with 4 tangents (local mixers only)",
    "local-backprop": "reverse mode of the local losses (local mixers only)",
    "feedback": "learned feedback, with a tangent on every eighth step",
    "feedback-tail": "the same, with the last two layers exact",
    "feedback-unbiased": "learned feedback as a control variate, without bias",
    "difference": "central difference along a rank-one tangent: two evaluations",
}
DEFAULT = ("backprop", "checkpointed", "weight", "weight-16", "activity", "feedback")
# these minimise the sum of the local losses, not the loss at the end of the network
LOCAL = ("local", "local-4", "local-backprop")
# these have the gradient of another at another cost: measured, but not trained again
SAME_GRADIENT = {"checkpointed": "backprop"}

# estimators that do not need separate examples get the faster network
MERGED = (
    pg.Backprop
    | pg.CheckpointedBackprop
    | pg.WeightPerturbation
    | pg.CentralDifference
    | pg.Guided
    | pg.Scaled
    | pg.LearnedBlocks
)


@dataclass(frozen=True)
class Entry:
    """An estimator with an optimizer. Each entry has its own learning rate."""

    estimator: str
    optimizer: str

    @property
    def name(self) -> str:
        """The name of its records."""
        return f"{self.estimator}-{self.optimizer}"


@dataclass(frozen=True)
class Model:
    """A model to train.

    **Fields:** `build(merged)`: the network, in which examples may be merged with other axes;
    `visit`: number of steps that are timed together; `estimates`: number of gradients for bias and
    variance; `local`: true if it has local losses.
    """

    title: str
    build: Callable[[bool], models.Network]
    visit: int
    estimates: int
    local: bool = False


MODELS = {
    "mlp": Model("MLP 784-1024-1024-10", lambda merged: models.mlp(), visit=10, estimates=100),
    "cnn": Model("the paper's CNN", lambda merged: models.cnn(), visit=1, estimates=24),
    "mixer": Model("MLP-mixer, 4 blocks of width 64", models.mixer, visit=4, estimates=100),
    "transformer": Model(
        "vision transformer, 4 blocks of width 64", models.transformer, visit=4, estimates=100
    ),
    "local-mixer-s": Model(
        "LocalMixer S/1/1", models.local_mixer, visit=10, estimates=100, local=True
    ),
    "local-mixer-m": Model(
        "LocalMixer M/1/16",
        lambda merged: models.local_mixer(merged, width=512, groups=16),
        visit=10,
        estimates=100,
        local=True,
    ),
}
