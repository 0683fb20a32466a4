"""The methods that are compared, and their settings."""

from typing import Any

from prograde.lab.studies.finetune.plan import Plan

LABELS = (1109, 13321)  # the tokens " great" and " terrible" of SmolLM2
OURS = "forward gradient, K = 1"
_ALL = {"train": "all", "optimizer": "sgd", "label_tokens": LABELS}
STEPS = {
    OURS: Plan(**_ALL),
    "forward gradient, K = 8": Plan(**_ALL, tangents=8),
    "MeZO, rank-one directions": Plan(**_ALL, estimator="mezo", directions="low-rank"),
    "MeZO": Plan(**_ALL, estimator="mezo"),
    "backprop": Plan(**_ALL, estimator="backprop"),
    "backprop, checkpointed": Plan(**_ALL, estimator="checkpointed"),
}
"""All weights are trained by plain SGD, so that nothing but the estimator differs."""

_NORM = {"train": "norm", "optimizer": "adam", "batch_size": 200, "steps": 1500}
_MIDDLE = {"layers": "12-28"}
ALL_EXAMPLES = "the same with all 2,878 examples"
CURVES: dict[str, dict[str, Any]] = {
    "forward gradient, last norm, K = 32": {**_NORM, "tangents": 32, "rate": 0.03},
    ALL_EXAMPLES: {**_NORM, "tangents": 32, "rate": 0.03, "batch_size": 500, "steps": 2000},
    "MeZO, last norm, K = 32": {**_NORM, "estimator": "mezo", "tangents": 32, "rate": 0.03},
    "backprop, last norm": {**_NORM, "estimator": "backprop", "rate": 0.01},
    "backprop, all weights": {
        "train": "all",
        "estimator": "backprop",
        "optimizer": "adam",
        "rate": 2e-5,
    },
    "backprop, LoRA": {
        "train": "lora",
        **_MIDDLE,
        "estimator": "backprop",
        "optimizer": "adam",
        "rank": 4,
        "rate": 1e-3,
    },
    "forward gradient, layers 12 to 28": {
        "train": "matrices",
        **_MIDDLE,
        "optimizer": "sgd",
        "rate": 5e-4,
    },
    "MeZO (rank one), layers 12 to 28": {
        "train": "matrices",
        **_MIDDLE,
        "estimator": "mezo",
        "directions": "low-rank",
        "optimizer": "sgd",
        "rate": 5e-4,
    },
    "forward gradient, LOZO factors": {
        "train": "subspace",
        **_MIDDLE,
        "rank": 4,
        "optimizer": "momentum",
        "rate": 0.1,
    },
}
"""Rates are given, one for each method. Methods without `steps` have a time instead."""
