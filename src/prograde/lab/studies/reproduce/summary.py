"""The records of one experiment, read back."""

from dataclasses import dataclass
from typing import Any

from prograde.lab.store import RecordError, Store
from prograde.lab.studies.reproduce.experiments import EXPERIMENTS, METHODS, Experiment, settings
from prograde.lab.training.outcomes import Outcome, outcome_of


@dataclass(frozen=True)
class Summary:
    """The records of one experiment. Only the depth experiment has `depths`."""

    experiment: Experiment
    manifest: dict[str, Any]
    costs: dict[str, Any]
    memory: dict[str, Any]
    depths: dict[int, Any]
    searches: dict[str, Any]
    outcomes: list[Outcome]


def summarise(store: Store) -> Summary:
    """Reads the records of one experiment. Missing records are empty."""
    manifest = store.manifest
    name = manifest["config"]["experiment"]
    if name not in EXPERIMENTS:
        raise RecordError(
            f"{store.directory}: records of {name!r}, which this version does not know."
        )
    experiment = EXPERIMENTS[name]
    costs = store.read("costs", default={})
    runs = [store.read_lines(run) for run in store.names("runs")]
    groups = {
        (method, setting.name): [
            r for r in runs if (r[0]["method"], r[0]["setting"]) == (method, setting.name)
        ]
        for setting in settings(experiment)
        for method in METHODS
    }
    outcomes = [
        outcome_of(method, setting, group, groups[("backprop", setting)], costs)
        for (method, setting), group in groups.items()
        if group
    ]
    depths = store.read("depths", default={})
    return Summary(
        experiment,
        manifest,
        costs,
        store.read("memory", default={}),
        {int(depth): figures for depth, figures in depths.items()},
        {search.split("/")[-1]: store.read(search) for search in store.names("search")},
        outcomes,
    )
