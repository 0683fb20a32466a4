"""The report of `prograde replay-speed`, from records alone."""

from prograde.lab.report import Report, Section, Table
from prograde.lab.report.words import (
    made_on,
    milliseconds,
    quartiles,
    unsteady,
    warning,
)
from prograde.lab.store import Store

_INTRODUCTION = "A training run and its replay from the log: bits, times and sizes."
_TERMS = "Training and replaying take turns. Times are medians over the turns."


def report(stores: list[Store]) -> Report:
    """Shows each store in a section."""
    sections = [_section(store) for store in stores if "replay" in store]
    return Report("Training, and its replay from the log", _INTRODUCTION, _TERMS, sections)


def _section(store: Store) -> Section:
    found, config = store.read("replay"), store.config
    same = "the same bit by bit" if found["same_bits"] else "NOT the same"
    text = (
        f"The MLP of the paper has {found['parameter_bytes'] / 1e6:.1f} MB of parameters. The log "
        f"of {config['steps']:,} steps of batches of 64 takes {found['log_bytes'] / 1e3:.0f} KB, "
        f"because the rate changes at every step. The replayed parameters are {same}. Replaying "
        f"takes {quartiles(found['replay_over_training'])} of the time of training."
    )
    times = found["seconds_a_step"]
    rows = [[name, milliseconds(one["median"])] for name, one in times.items()]
    table = Table("A step, in ms", ["program", "ms"], rows)
    doubts = filter(None, [warning(found.get("busy")), unsteady(times)])
    name = store.directory.resolve().name
    content = [text, table, *doubts]
    return Section(name, "Replay", content, made_on(store.manifest), store.manifest)
