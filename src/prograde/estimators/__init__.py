"""Gradient estimators, one a file. `prograde.kit` has the parts that they are built from."""

from prograde.estimators.activity_perturbation import ActivityPerturbation
from prograde.estimators.backprop import Backprop, CheckpointedBackprop
from prograde.estimators.central_difference import CentralDifference
from prograde.estimators.forward_jacobian import ForwardJacobian
from prograde.estimators.guided import Guided
from prograde.estimators.learned_blocks import LearnedBlocks
from prograde.estimators.learned_feedback import LearnedFeedback
from prograde.estimators.local_losses import LocalLosses, total_loss
from prograde.estimators.scaled import Scaled
from prograde.estimators.site_estimator import SiteEstimator
from prograde.estimators.weight_perturbation import WeightPerturbation
from prograde.kit import Estimate, Estimator, SeededEstimator, Share

__all__ = [
    "ActivityPerturbation",
    "Backprop",
    "CentralDifference",
    "CheckpointedBackprop",
    "Estimate",
    "Estimator",
    "ForwardJacobian",
    "Guided",
    "LearnedBlocks",
    "LearnedFeedback",
    "LocalLosses",
    "Scaled",
    "SeededEstimator",
    "Share",
    "SiteEstimator",
    "WeightPerturbation",
    "total_loss",
]
