"""Where the examples lie in an axis that they share, as in `x.reshape(batch * time, width)`.

Two traces with different batch sizes tell which axis grows with the batch (see `examples`), but not
whether the examples are the outer or the inner part of it. That is found by following the arrays of
the batch through the program.
"""

from collections.abc import Sequence
from typing import Any

from jax.extend.core import Jaxpr, JaxprEqn

from prograde._sites.independence import Walk
from prograde._sites.labels import ANYWHERE, Along, Label, same_or_anywhere
from prograde._sites.records import Place


def layout_of(jaxpr: Jaxpr, is_batch: Sequence[bool], batch: int) -> dict[Place, Along]:
    """The label of every value whose examples share an axis with others.

    `is_batch` says which inputs hold the examples.
    """
    walk = _Layout(batch)
    start: list[Label] = [Along(0) if given else None for given in is_batch]
    walk.run(jaxpr, None, start, [False] * len(start))
    return walk.found


class _Layout(Walk):
    """Follows the batch, integers included; where examples are joined nothing is known any more."""

    floats_only = False

    def __init__(self, batch: int) -> None:
        super().__init__(batch)
        self.found: dict[Place, Along] = {}

    def began(self, var: Any, label: Label) -> Label:
        place = self.path, var
        self.found.pop(place, None)
        if label not in (None, ANYWHERE) and label.axis >= 0 and label.inner * label.outer > 1:
            self.found[place] = label
        return label

    def joined(self, eqn: JaxprEqn) -> list[Label]:
        return [ANYWHERE] * len(eqn.outvars)

    def passed_on(self, label: Label) -> Label:
        return ANYWHERE if label is not None and label.axis == -1 else label

    def same(self, labels: Any) -> Label:
        return same_or_anywhere(labels)

    def custom_rule(self, eqn: JaxprEqn, given: list[Label]) -> list[Label]:
        return [None] * len(eqn.outvars)  # a derivative has no say in where values lie

    def propagated(self, eqn: JaxprEqn, given: list[Label], counts: dict[Any, Any]) -> Label:
        if ANYWHERE in given:
            return ANYWHERE
        if eqn.primitive.name == "gather" and given[0] is None and given[1] is not None:
            return _of_indices(eqn, given[1])
        return super().propagated(eqn, given, counts)


def _of_indices(eqn: JaxprEqn, label: Along) -> Label:
    """The label of rows that are looked up by the examples, as tokens are in an embedding."""
    if label.axis < 0:
        return label
    out_ndim = len(eqn.outvars[0].aval.shape)  # pyright: ignore[reportAttributeAccessIssue]
    numbers = eqn.params["dimension_numbers"]
    of_index = [i for i in range(out_ndim) if i not in numbers.offset_dims]
    return label._replace(axis=of_index[label.axis]) if label.axis < len(of_index) else ANYWHERE
