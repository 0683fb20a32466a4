"""Runs experiments one after the other; each leaves a record when it is done."""

import importlib
import time
from pathlib import Path
from typing import Any

from prograde.lab import records
from prograde.lab.beyond import EXPERIMENTS
from prograde.lab.beyond.experiment import Experiment
from prograde.lab.display import Display


def experiment(name: str) -> Experiment:
    """The experiment of this name. Raises `ImportError` where a package that it needs is missing."""
    return getattr(importlib.import_module(f"prograde.lab.beyond.{name}"), EXPERIMENTS[name])()


def run(
    experiments: list[Experiment], full: bool, out: Path, resume: bool, display: Display
) -> None:
    """Measures what has no record in `out` yet; a record is written when its experiment is done."""
    paths = {e.name: out / f"{e.name}.json" for e in experiments}
    for path in filter(Path.exists, paths.values()):
        there = read(path)["full"]
        if there != full:
            raise records.RecordError(
                f"{path} is the record of a {_length(there)} run, and this is a {_length(full)} one. Choose another --out; nothing was "
                "changed."
            )
        if not resume:
            raise records.RecordError(
                f"{path} exists. Pass --resume to keep it and run the others, or another --out."
            )
    for e in experiments:
        if paths[e.name].exists():
            continue
        environment, begin = records.environment(), time.perf_counter()
        figures = e.measure(full, display)
        seconds = time.perf_counter() - begin
        records.write_json(
            paths[e.name],
            {"full": full, "seconds": seconds, "environment": environment, "figures": figures},
        )


def read(path: Path) -> dict[str, Any]:
    """A record of one experiment."""
    record = records.read_json(path)
    if not isinstance(record, dict) or not {"full", "environment", "figures"} <= record.keys():
        raise records.RecordError(
            f"{path} is not a record of prograde beyond. Choose another directory."
        )
    return record


def find(directory: Path) -> list[tuple[Experiment, dict[str, Any]]]:
    """The experiments that have records in a directory, in the order in which they are listed."""
    found = [(name, directory / f"{name}.json") for name in EXPERIMENTS]
    found = [(experiment(name), read(path)) for name, path in found if path.exists()]
    if not found:
        raise records.RecordError(f"{directory} holds no record of prograde beyond.")
    return found


def _length(full: bool) -> str:
    return "full" if full else "quick"
