"""`prograde replay`: computes fine-tuned weights again from the base model and a log."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Replay:
    """Compute fine-tuned weights again from the base model and a log, without any data.

    The log holds seeds and scalars. No example is run.
    """

    base: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="smollm2|DIR|FILE.gguf")]
    """Model that the run started from."""
    log: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="LOG")]
    """The replay.log of the run, or the directory of the run."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="DIR|FILE.safetensors|FILE.gguf")]
    """Where the weights go: a directory that `transformers` loads, or a file of the
    weights alone, or for llama.cpp."""
    steps: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Replay only the first N steps. Default: the steps that the run kept, or the whole log."""
    partial: bool = False
    """Replay a log that is damaged, or of a run that is not over, up to where it is whole."""
    no_verify: bool = False
    """Do not compare the weights with the fingerprints in the log: on another machine, or with
    other versions, they are the same to rounding only."""

    def __call__(self, console: "Console", errors: "Console", rest: tuple[str, ...]) -> int:
        """Loads, replays, saves."""
        from prograde.lab.cli import _needs
        from prograde.lab.display import Display
        from prograde.lab.report.terminal import say

        with _needs("lm"):
            from prograde.lab.studies.finetune.replaying import replay

            show = Display(console)
            whole = not self.no_verify
            replay(self.base, self.log, self.out, self.steps, show, self.partial, whole)
        say(console, f"Weights: {self.out}")
        return 0
