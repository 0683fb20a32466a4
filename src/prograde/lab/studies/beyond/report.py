"""The report of `prograde beyond`, from records alone."""

import importlib
from types import ModuleType

from prograde.lab.report import Figure, Report, Section
from prograde.lab.report.words import made_on
from prograde.lab.store import Store
from prograde.lab.studies.beyond import PROBLEMS

_INTRODUCTION = (
    "Problems where forward gradients are the only way, or clearly the better one: programs with "
    "loops of unknown length, long horizons, streams, hyperparameters. Backprop runs with the "
    "fastest settings and the best checkpointing that we found. Where backprop wins, the text says "
    "so."
)
_TERMS = (
    "Programs that are timed take turns in one run, in a new order in each round. A time is a "
    "median, and a ratio is the median of the ratios of the rounds. Methods that learn for a fixed "
    "time run one after the other. Memory is what XLA plans for temporary arrays, in addition to "
    "arguments and results."
)


def module(problem: str, name: str) -> ModuleType:
    """Imports a module of a problem. Raises `ImportError` if a package that it needs is missing."""
    return importlib.import_module(f"prograde.lab.studies.beyond.{problem}.{name}")


def report(stores: list[Store]) -> Report:
    """Shows each problem in a section, in the order in which they are listed."""
    ordered = sorted(stores, key=lambda store: PROBLEMS.index(store.config["problem"]))
    sections = list(map(_section, ordered))
    return Report("Where reverse mode cannot go", _INTRODUCTION, _TERMS, sections)


def _section(store: Store) -> Section:
    name, figures = store.config["problem"], store.read("figures")
    problem = module(name, "report")
    picture = Figure(name, problem.TITLE, lambda canvas: problem.draw(figures, canvas))
    content = [problem.conclusion(figures), picture, *problem.tables(figures)]
    length = "Full" if store.config["full"] else "Quick"
    made = made_on(store.manifest, f"{length} run, {figures['run_seconds']:.0f} s.")
    return Section(name, problem.TITLE, content, made, store.manifest)
