"""`prograde inspect`: what a replay log holds."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Inspect:
    """Show what a replay log holds, and verify it."""

    log: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="LOG")]
    """A replay.log, or the directory of a run."""

    def __call__(self, console: "Console", errors: "Console", rest: tuple[str, ...]) -> int:
        """Reads, verifies and prints."""
        raise NotImplementedError
