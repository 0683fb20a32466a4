"""Shows the progress of experiments: live bars on a terminal, plain lines elsewhere."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column

_PLAIN_INTERVAL = 5.0  # seconds between plain lines of one stage


class Display:
    """Shows how far a stage of work is.

    Amounts of work are expected seconds, so that the time left is in proportion to the work.
    """

    def __init__(self, console: Console):
        self.console = console
        self._progress: Progress | None = None
        self._title, self._total, self._done, self._begin, self._last = "", 1.0, 0.0, 0.0, 0.0

    @contextmanager
    def stage(self, title: str, total: float) -> Iterator[None]:
        """Shows a stage of work of `total` units while the block runs."""
        self._title, self._total, self._done = title, total, 0.0
        self._begin = self._last = time.monotonic()
        if not self.console.is_terminal:
            self._line(f"{title}: started")
            yield
            self._line(f"{title}: done in {time.monotonic() - self._begin:.0f} s")
            return
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            TextColumn(
                "{task.fields[facts]}",
                markup=False,
                table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"),
            ),
        )
        with Progress(
            *columns,
            console=self.console,
            expand=True,
            transient=False,
            refresh_per_second=4,
            speed_estimate_period=1e6,
        ) as progress:
            self._progress, self._task = progress, progress.add_task(title, total=total, facts="")
            try:
                yield
                progress.update(self._task, completed=total, facts="done")
            finally:
                self._progress = None

    def reach(self, amount: float) -> None:
        """Sets the work done so far to `amount`, or leaves it where it is if that is more."""
        self._done = min(max(self._done, amount), self._total)
        if self._progress is not None:
            self._progress.update(self._task, completed=self._done)

    def advance(self, amount: float, facts: str) -> None:
        """Adds `amount` to the work done. `facts` is a short text that is shown with it."""
        self._done = min(self._done + amount, self._total)
        if self._progress is not None:
            self._progress.update(self._task, completed=self._done, facts=facts)
        elif (now := time.monotonic()) - self._last >= _PLAIN_INTERVAL:
            self._last = now
            left = (now - self._begin) * (self._total - self._done) / max(self._done, 1e-9)
            part = 100 * self._done / self._total
            self._line(f"{self._title}: {part:.0f}%, {left:.0f} s left, {facts}")

    def _line(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)
