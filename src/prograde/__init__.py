"""Training without backpropagation: forward gradients for any JAX function.

grad_fn = prograde.value_and_grad(loss_fn, prograde.WeightPerturbation(prograde.LowRank(rank=1)))
loss, grads = grad_fn(key, params, batch)
"""

from prograde import diagnostics, distributed, online, replay
from prograde._bounded import bounded_loops
from prograde._check import CheckReport, check
from prograde._forward_mode import forward_mode
from prograde._inject import inject
from prograde._value_and_grad import value_and_grad
from prograde.estimators import (
    ActivityPerturbation,
    Backprop,
    CentralDifference,
    CheckpointedBackprop,
    Estimate,
    Estimator,
    ForwardJacobian,
    Guided,
    LearnedBlocks,
    LearnedFeedback,
    LocalLosses,
    Scaled,
    SeededEstimator,
    Share,
    WeightPerturbation,
    total_loss,
)
from prograde.tangents import (
    Basis,
    Blocks,
    LowRank,
    Normal,
    Orthogonal,
    Rademacher,
    Separable,
    Sparse,
    Sphere,
    TangentDistribution,
)

__version__ = "0.1.0"

__all__ = [
    "ActivityPerturbation",
    "Backprop",
    "Basis",
    "Blocks",
    "CentralDifference",
    "CheckReport",
    "CheckpointedBackprop",
    "Estimate",
    "Estimator",
    "ForwardJacobian",
    "Guided",
    "LearnedBlocks",
    "LearnedFeedback",
    "LocalLosses",
    "LowRank",
    "Normal",
    "Orthogonal",
    "Rademacher",
    "Scaled",
    "SeededEstimator",
    "Separable",
    "Share",
    "Sparse",
    "Sphere",
    "TangentDistribution",
    "WeightPerturbation",
    "bounded_loops",
    "check",
    "diagnostics",
    "distributed",
    "forward_mode",
    "inject",
    "online",
    "replay",
    "total_loss",
    "value_and_grad",
]
