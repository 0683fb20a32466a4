"""Distributions of tangents: random directions v with E[v] = 0 and E[v v^T] = I.

Any of them gives an unbiased estimate g = (grad f . v) v. They differ in the second moment of that
estimate, which is known in closed form,

    E |g|^2 = sum over leaves l of  c_l |grad_l f|^2

(`second_moment` returns the c_l), and in the cost of a step: dense tangents need one random number
per parameter, low-rank ones a few per row and column.
"""

from prograde.tangents._distribution import TangentDistribution
from prograde.tangents._draw import threefry
from prograde.tangents.blocks import Blocks
from prograde.tangents.factored import LowRank, Separable
from prograde.tangents.independent import IndependentEntries, Normal, Rademacher, Sparse
from prograde.tangents.joint import Basis, Orthogonal, Sphere

__all__ = [
    "Basis",
    "Blocks",
    "IndependentEntries",
    "LowRank",
    "Normal",
    "Orthogonal",
    "Rademacher",
    "Separable",
    "Sparse",
    "Sphere",
    "TangentDistribution",
    "threefry",
]
