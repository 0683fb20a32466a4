"""The report of `prograde basics`, from records alone."""

from typing import Any

from prograde.lab.report import Report, Section, Table
from prograde.lab.report.words import made_on, milliseconds, unsteady, warning
from prograde.lab.store import Store

_INTRODUCTION = "The costs that the project promises to keep to, measured."
_TERMS = (
    "Programs take turns in one run, in a new order in each round. A time is a median, and a ratio "
    "is the median of the ratios of the rounds. The training loop is a `lax.scan` over steps."
)
_METHODS = {"low-rank": "rank-one", "backprop": "backprop"}
IMPORT, BEALE, STEP, LOOP = 0.5, 20.0, 1.9, 1.05
"""The maximum of each cost: seconds, seconds, and two ratios."""


def report(stores: list[Store]) -> Report:
    """Shows each store in a section."""
    return Report("What prograde costs", _INTRODUCTION, _TERMS, list(map(_section, stores)))


def _section(store: Store) -> Section:
    rows, records, ratios = [], [], {}

    def add(what: str, value: float, most: float | None, unit: str, digits: int) -> None:
        missed = "" if most is None or value <= most else ", missed"
        limit = "" if most is None else f"{most:g}{unit}{missed}"
        rows.append([what, f"{value:.{digits}f}{unit}", limit])

    if found := store.read("imports", {}):
        add("`import prograde`, in addition to `import jax`", found["seconds"], IMPORT, " s", 2)
        records.append(found)
    if found := store.read("beale", {}):
        what = "`prograde reproduce beale`, from the start of the process"
        add(what, found["seconds"], BEALE, " s", 1)
        records.append(found)
    if found := store.read("mlp-step", {}):
        bare = milliseconds(found["bare"]["seconds"]["median"])
        what = "MLP 784-1024-1024-10, batch 64, {} SGD step over the bare forward pass ({} ms)"
        add(what.format("rank-one", bare), found["low-rank"]["ratio"]["median"], STEP, "", 2)
        what = "the same, backprop (the fastest setting known to us)"
        add(what, found["backprop"]["ratio"]["median"], None, "", 2)
        records += found.values()
        ratios |= {f"the step of {name}": one["ratio"] for name, one in found.items()}
    for name, one in store.read("loop", {}).items():
        what = f"training loop over a bare jitted step, {_METHODS[name]}"
        add(what, one["ratio"]["median"], LOOP, "", 2)
        records.append(one)
        ratios[f"the loop of {name}"] = one["ratio"]
    busy: list[Any] = [one["busy"] for one in records if one.get("busy") is not None]
    doubts = [warning(max(busy, default=None)), unsteady(ratios)]
    table = Table("Costs of prograde", ["what", "measured", "target, at most"], rows, unbroken=0)
    name = store.directory.resolve().name
    content = [table, *filter(None, doubts)]
    return Section(name, "Costs of prograde", content, made_on(store.manifest), store.manifest)
