"""Gradient estimators, one a file."""

from prograde.estimators._estimator import Estimate, Estimator
from prograde.estimators.backprop import Backprop
from prograde.estimators.weight import WeightPerturbation

__all__ = ["Backprop", "Estimate", "Estimator", "WeightPerturbation"]
