"""The report of `prograde beyond`, from records alone."""

import importlib

from prograde.lab.report import Figure, Report, Section
from prograde.lab.report.words import made_on
from prograde.lab.store import Store
from prograde.lab.studies.beyond import PROBLEMS
from prograde.lab.studies.beyond.problem import Problem

_INTRODUCTION = (
    "Problems on which forward gradients are the only way, or plainly the better one: programs "
    "with loops of unknown length, long horizons, streams, hyperparameters. Backprop runs with the "
    "fastest settings and the best checkpointing found. Where it wins, the text says so."
)
_TERMS = (
    "Programs whose time is given take turns in one run, each round in another order. Times are "
    "medians, and a ratio is the median of the rounds' own ratios. Methods that learn for a given "
    "time run one after the other. Memory is what XLA plans for temporaries, in addition to "
    "arguments and results."
)


def problem(name: str) -> Problem:
    """The problem of this name. Raises `ImportError` where a package that it needs is missing."""
    module = importlib.import_module(f"prograde.lab.studies.beyond.{name}")
    return getattr(module, PROBLEMS[name])()


def report(stores: list[Store]) -> Report:
    """Shows each problem in a section, in the order in which they are listed."""
    ordered = sorted(stores, key=lambda store: list(PROBLEMS).index(store.config["problem"]))
    return Report(
        "Where reverse mode cannot go", _INTRODUCTION, _TERMS, list(map(_section, ordered))
    )


def _section(store: Store) -> Section:
    found, figures = problem(store.config["problem"]), store.read("figures")
    picture = Figure(found.name, found.title, lambda canvas: found.draw(figures, canvas))
    content = [found.conclusion(figures), picture, *found.tables(figures)]
    length = "Full" if store.config["full"] else "Quick"
    length = f"{length} run, {figures['run_seconds']:.0f} s."
    return Section(
        found.name, found.title, content, made_on(store.manifest, length), store.manifest
    )
