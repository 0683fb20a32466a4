"""The rules by which a perturbed weight passes an operation.

One function for each operation and position of the weight.
"""

from collections.abc import Callable
from typing import Any

Rule = Callable[..., Any]

RULES: dict[tuple[str, tuple[int, ...]], Rule] = {}
"""The rule for a primitive.

By its name and the positions of the operands that are perturbed weights.
"""


def rule(primitive: str, *positions: int) -> Callable[[Rule], Rule]:
    """Registers the rule for a primitive with perturbed weights at these positions.

    All other operands are arrays.

    The rule gets the operands by position and the parameters of the primitive by name. It returns
    the output (a list where the primitive has several): perturbed weights or arrays. It returns
    `NotImplemented` where the tangent must be formed after all.
    """

    def register(function: Rule) -> Rule:
        RULES[primitive, positions] = function
        return function

    return register
