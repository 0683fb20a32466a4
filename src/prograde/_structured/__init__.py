"""Structured tangents, and how they pass through a program without being formed.

- `tangent`: the factors of a tangent (`LowRankTangent`) and a weight that carries them
  (`PerturbedArray`);
- `contractions`, `shapes`: the product rule of one primitive each, written for the factors;
- `stretch`: other units for a parameter;
- `rules`: the registry of these rules;
- `interpreter`: runs a program on perturbed weights, and enters loops, branches and calls;
- `derivative`: a forward run along a tree of tangents, and the sum of weighted tangents;
- `stages`: a program cut into stages, each of which uses the weights of one group;
- `in_block`: a forward run along a tangent in one group of weights, chosen while it runs;
- `coordinates`: tangents along single entries of the parameters.

A primitive without a rule materialises the weight, which injects the dense tangent: the directional
derivative is exact in every case, and only the cost differs.
"""

from prograde._structured import contractions, shapes  # noqa: F401  (they register rules)
from prograde._structured.coordinates import coordinate_tangent, count, from_coordinates
from prograde._structured.derivative import (
    NEEDS_VALUES,
    Tangent,
    directional_derivative,
    inner_products,
    inner_products_with,
    is_structured,
    projected,
    weighted_sum,
)
from prograde._structured.in_block import Choice, derivative_in_block, staged
from prograde._structured.stages import Group
from prograde._structured.stretch import stretch
from prograde._structured.tangent import LowRankTangent, PerturbedArray

__all__ = [
    "NEEDS_VALUES",
    "Choice",
    "Group",
    "LowRankTangent",
    "PerturbedArray",
    "Tangent",
    "coordinate_tangent",
    "count",
    "derivative_in_block",
    "directional_derivative",
    "from_coordinates",
    "inner_products",
    "inner_products_with",
    "is_structured",
    "projected",
    "staged",
    "stretch",
    "weighted_sum",
]
