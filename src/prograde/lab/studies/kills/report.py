"""The report of `prograde kills`, from records alone."""

import statistics
from typing import Any

from prograde.lab.report import Report, Section, Table
from prograde.lab.report.words import made_on, warning
from prograde.lab.store import Store
from prograde.lab.studies.kills.group import WORKERS

_INTRODUCTION = "Workers of a training run are killed at random moments, and the run is resumed."
_TERMS = (
    "Seconds are counted from the kill until all workers have ended. A lost step is one that a log "
    "held, but the state of the next start did not include."
)


def report(stores: list[Store]) -> Report:
    """Shows each store in a section."""
    sections = [_section(store) for store in stores if "kills" in store]
    return Report("Killed workers", _INTRODUCTION, _TERMS, sections)


def _section(store: Store) -> Section:
    kills, result = store.read_lines("kills"), store.read("result", {})
    seconds = [kill["seconds"] for kill in kills]
    hangs = sum(kill["hung"] for kill in kills)
    if result:
        same = "equal" if result["same_parameters"] else "DIFFER from"
        run = f"of {result['steps']} steps by two processes"
        end = (
            f", {result['lost_steps']} lost steps after the last flushed record. The parameters at "
            f"the end {same} those of a run that nobody disturbed, bit by bit"
        )
    else:
        run, end = "by two processes", ". The series is not complete"
    text = (
        f"A run {run} was disturbed: one of them was killed with SIGKILL {len(kills)} times, and "
        f"chance decided which and when. {hangs} hangs{end}. The other worker had ended after "
        f"{statistics.median(seconds):.2f} s in the median, and after {max(seconds):.2f} s at most."
    )
    rows = [_row(worker, [k for k in kills if k["victim"] == worker]) for worker in range(WORKERS)]
    columns = ["killed worker", "kills", "seconds, median", "seconds, longest", "hangs"]
    table = Table("Kills", columns, rows)
    busy = max((kill["busy"] for kill in kills if "busy" in kill), default=None)
    name = store.directory.resolve().name
    content = [text, table, *filter(None, [warning(busy)])]
    return Section(name, "Killed workers", content, made_on(store.manifest), store.manifest)


def _row(worker: int, kills: list[dict[str, Any]]) -> list[str]:
    seconds = [kill["seconds"] for kill in kills] or [0.0]
    median, longest = f"{statistics.median(seconds):.2f}", f"{max(seconds):.2f}"
    return [str(worker), str(len(kills)), median, longest, str(sum(k["hung"] for k in kills))]
