"""Gradient estimators, one a file."""

from prograde.estimators._estimator import Estimate, Estimator
from prograde.estimators._seeded import SeededEstimator, Share
from prograde.estimators.activity import ActivityPerturbation
from prograde.estimators.backprop import Backprop, CheckpointedBackprop
from prograde.estimators.exact import ForwardJacobian
from prograde.estimators.feedback import LearnedFeedback
from prograde.estimators.guided import Guided
from prograde.estimators.local import LocalLosses, total_loss
from prograde.estimators.scaled import Scaled
from prograde.estimators.spsa import CentralDifference
from prograde.estimators.weight import WeightPerturbation

__all__ = [
    "ActivityPerturbation",
    "Backprop",
    "CentralDifference",
    "CheckpointedBackprop",
    "Estimate",
    "Estimator",
    "ForwardJacobian",
    "Guided",
    "LearnedFeedback",
    "LocalLosses",
    "Scaled",
    "SeededEstimator",
    "Share",
    "WeightPerturbation",
    "total_loss",
]
