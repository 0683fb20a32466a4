"""The report of `prograde bounds`, from records alone."""

from typing import Any

from prograde.lab.report import Report, Section, Table
from prograde.lab.report.words import MISSING, made_on, quartiles, unsteady, warning
from prograde.lab.store import Store

_INTRODUCTION = "What bounds a structured step, and remedies that did not help."
_TERMS = (
    "Programs take turns in one run, in a new order in each round. A time is a median, with its "
    "quartiles in brackets, and a ratio is the median of the ratios of the rounds."
)
TITLES = {
    "product": ("One product with a weight, or two (batch 64, 1024 x 1024)", "two products"),
    "cnn": ("The paper's CNN, batch 64", "loss"),
    "convolution": ("A layer of it: 64 x 26 x 26 x 64, 3 x 3 kernel of 64", "convolution"),
    "compilation": ("Tracing and compiling a step of an unrolled MLP of 100 layers", "backprop"),
}
"""For each record, its title and the program that the others are compared with."""


def report(stores: list[Store]) -> Report:
    """Shows each store in a section."""
    return Report(
        "What bounds a structured step", _INTRODUCTION, _TERMS, list(map(_section, stores))
    )


def _section(store: Store) -> Section:
    content: list[Any] = []
    for name in TITLES:
        if name in store:
            found = store.read(name)
            busy = max((one["busy"] for one in found.values() if "busy" in one), default=None)
            steady = {program: one["seconds"] for program, one in found.items()}
            content += [_table(name, found), *filter(None, [warning(busy), unsteady(steady)])]
    label = store.directory.resolve().name
    title = "What bounds a structured step"
    return Section(label, title, content, made_on(store.manifest), store.manifest)


def _table(name: str, found: dict[str, dict[str, Any]]) -> Table:
    title, base = TITLES[name]
    unit, scale = ("s", 1) if name == "compilation" else ("ms", 1e3)
    rows = []
    for program, one in found.items():
        low, middle, high = (scale * one["seconds"][k] for k in ("low", "median", "high"))
        time = f"{middle:.3g} ({low:.3g} to {high:.3g})"
        ratio = quartiles(one["ratio"]) if "ratio" in one else MISSING
        rows.append([program, time, ratio])
    columns = ["program", f"{unit} (quartiles)", f"over {base}"]
    if all(row[2] == MISSING for row in rows):  # records of version 0.1 have no ratios
        columns, rows = columns[:2], [row[:2] for row in rows]
    return Table(title, columns, rows)
