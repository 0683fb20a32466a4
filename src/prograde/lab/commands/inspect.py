"""`prograde inspect`: shows and verifies a replay log."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

if TYPE_CHECKING:
    from rich.console import Console

    from prograde.lab.report import Table
    from prograde.replay import ReplayLog


@dataclass(frozen=True)
class Inspect:
    """Show what a replay log holds, and verify it. Ends with 1 if the log is damaged."""

    log: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="LOG")]
    """A replay.log, or the directory of a run."""

    def __call__(self, console: "Console", errors: "Console", rest: tuple[str, ...]) -> int:
        """Reads, verifies and prints."""
        from prograde.lab.report.terminal import print_table, say
        from prograde.lab.study import UsageError
        from prograde.replay import LogError, ReplayLog

        path = self.log / "replay.log" if self.log.is_dir() else self.log
        try:
            log = ReplayLog.open(path, partial=True)
        except LogError as error:
            raise UsageError(str(error)) from None
        header = {name: value for name, value in log.header.items() if name != "config"}
        for name, value in (header | log.header["config"]).items():
            say(console, f"{name}: {value if isinstance(value, str) else json.dumps(value)}")
        planned = "" if log.planned is None else f" of {log.planned:,} planned"
        over = "; the run was over" if log.finished else ""
        say(console, f"size: {path.stat().st_size:,} bytes, {len(log):,} steps{planned}{over}")
        if len(log):
            print_table(steps_table(log), console)
        if log.damage:
            say(errors, f"prograde: {log.damage}")
        return int(bool(log.damage))


def steps_table(log: "ReplayLog") -> "Table":
    """Makes a table of the steps of a log, in ten parts."""
    import numpy as np

    from prograde.lab.report import Table

    rows = []
    for part in np.array_split(log.records, min(10, len(log.records))):
        derivatives = part["derivatives"].astype(np.float64)
        rates = {float(part["rate"][0]), float(part["rate"][-1])}
        rows.append(
            [
                f"{part['step'][0]} to {part['step'][-1]}",
                f"{part['value'].mean():.4f}",
                " to ".join(f"{rate:.3g}" for rate in sorted(rates, reverse=True)),
                f"{np.sqrt(np.mean(np.square(derivatives))):.4g}",
            ]
        )
    return Table("Steps", ["steps", "mean loss", "rate", "derivatives, root mean square"], rows)
