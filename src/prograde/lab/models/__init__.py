"""Models: the functions and networks of the paper, and other small networks."""

from prograde.lab.models.local_mixer import local_mixer
from prograde.lab.models.network import Network
from prograde.lab.models.paper import cnn, deep, logreg, mlp
from prograde.lab.models.patches import mixer, transformer
from prograde.lab.models.surfaces import BEALE, ROSENBROCK, Surface

__all__ = [
    "BEALE",
    "ROSENBROCK",
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
