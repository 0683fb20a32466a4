"""Models: the functions and networks of the paper, and small networks of other kinds."""

from prograde.lab.models.networks import (
    BEALE,
    ROSENBROCK,
    InputRMS,
    Network,
    Surface,
    cnn,
    deep,
    local_mixer,
    logreg,
    mixer,
    mlp,
    transformer,
)

__all__ = [
    "BEALE",
    "ROSENBROCK",
    "InputRMS",
    "Network",
    "Surface",
    "cnn",
    "deep",
    "local_mixer",
    "logreg",
    "mixer",
    "mlp",
    "transformer",
]
