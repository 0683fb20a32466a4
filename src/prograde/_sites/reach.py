"""Which losses a perturbation reaches.

And along which axes of a loss each part of it reaches its own part alone.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from jax.extend.core import Jaxpr, JaxprEqn

from prograde._jaxprs import subprograms
from prograde._sites.independence import Walk
from prograde._sites.labels import ANYWHERE, Along, Label, same_or_anywhere
from prograde._sites.records import Place, Site


@dataclass(frozen=True)
class Reach:
    """What the perturbation of one site reaches.

    For each loss `along` is `None` where it is not reached at all, and otherwise pairs (axis of the
    loss, where its positions lie in the site's value). `sites` are the places of the sites whose
    values it changes.
    """

    along: tuple[tuple[tuple[int, Along], ...] | None, ...]
    sites: frozenset[Place]


def reach_of(jaxpr: Jaxpr, num_losses: int, sites: Sequence[Site]) -> list[Reach]:
    """The reach of every site, by following its perturbation through the program.

    The noise of `sites` has no axis for tangents.
    """
    walk = _Reach(frozenset(site.place for site in sites))
    return [_reach(walk, jaxpr, num_losses, site) for site in sites]


def _reach(walk: "_Reach", jaxpr: Jaxpr, num_losses: int, site: Site) -> Reach:
    losses = [v.aval.shape for v in jaxpr.outvars[:num_losses]]  # pyright: ignore
    reached = walk.labels(jaxpr, num_losses, site.place, ANYWHERE)
    others = frozenset(walk.seen - {site.place})
    found: list[list[tuple[int, Along]]] = [[] for _ in losses]
    lengths = {
        n
        for shape, label in zip(losses, reached, strict=True)
        for n in shape[1:]
        if label is not None and n > 1
    }
    for start in _candidates(site, lengths):
        for label, pairs in zip(
            walk.labels(jaxpr, num_losses, site.place, _in_variable(start, site)),
            found,
            strict=True,
        ):
            if label is None or label == ANYWHERE or label.axis < 1 or label != Along(label.axis):
                continue
            taken = {axis for axis, _ in pairs}, {where.axis for _, where in pairs}
            if label.axis not in taken[0] and start.axis not in taken[1]:
                pairs.append((label.axis, start))
    return Reach(
        tuple(
            None if label is None else tuple(pairs)
            for label, pairs in zip(reached, found, strict=True)
        ),
        others,
    )


def _candidates(site: Site, lengths: Collection[int]) -> list[Along]:
    """Where positions of an axis of a loss may lie in a site: contiguous groups first.

    Then interleaved ones.
    """
    loops, shape = site.perturbation.shape[: site.depth], site.value_shape
    found = [Along(-1) for n in lengths if loops and loops[-1] == n]
    for axis, size in enumerate(shape):
        if axis == site.axis:
            continue
        for n in lengths:
            rest = size // n
            found += [
                Along(axis, rest // inner, inner)
                for inner in range(rest, 0, -1)
                if size % n == 0 and rest % inner == 0
            ]
    return found


def _in_variable(along: Along, site: Site) -> Along:
    """An axis of the site's value as one of the variable.

    Of which one axis may be three in the site (see `Site.split`).
    """
    if site.split is None or along.axis < site.split.axis:
        return along
    merged, after = site.split, along.axis - site.split.axis
    batch = site.value_shape[merged.axis + 1]
    if after == 0:
        return Along(merged.axis, along.outer, along.inner * batch * merged.inner)
    if after == 2:
        return Along(merged.axis, merged.outer * batch * along.outer, along.inner)
    return along._replace(axis=along.axis - 2)


class _Reach(Walk):
    """Starts at one site; where positions are joined.

    The label becomes `ANYWHERE` and is followed on.
    """

    def __init__(self, places: frozenset[Place]) -> None:
        super().__init__(batch=0)
        self.places = places
        self.start: tuple[Place, Label] = (((), None), None)
        self.seen: set[Place] = set()

    def labels(self, jaxpr: Jaxpr, num_losses: int, place: Place, label: Label) -> list[Label]:
        """The labels of the losses, when the value at that place has this one."""
        self.start, self.seen = (place, label), set()
        nothing = len(jaxpr.invars)
        return self.run(jaxpr, None, [None] * nothing, [False] * nothing)[0][:num_losses]

    def enters(self, eqn: JaxprEqn) -> bool:
        path = self.start[0][0]
        here = (*self.path, id(eqn))
        return path[: len(here)] == here and bool(subprograms(eqn))

    def began(self, var: Any, label: Label) -> Label:
        place = self.path, var
        if place == self.start[0] and not self.in_rule:
            label = self.same([label, self.start[1]])
        if label is not None and place in self.places:
            self.seen.add(place)
        return label

    def joined(self, eqn: JaxprEqn) -> list[Label]:
        return [ANYWHERE] * len(eqn.outvars)

    def passed_on(self, label: Label) -> Label:
        return ANYWHERE if label is not None and label.axis == -1 else label

    def same(self, labels: Any) -> Label:
        return same_or_anywhere(labels)

    def propagated(self, eqn: JaxprEqn, given: list[Label], counts: dict[Any, Any]) -> Label:
        return ANYWHERE if ANYWHERE in given else super().propagated(eqn, given, counts)
