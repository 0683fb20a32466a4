"""`prograde launch`: one study in several processes on this machine."""

import datetime
import shlex
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import tyro

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Launch:
    """Run a study in several processes that share each batch and exchange a few bytes a step.

    - prograde launch --processes 2 -- reproduce mlp
    - under SLURM, Open MPI or Kubernetes, start the study with --distributed in every process

    When one process is killed, the others stop. Repeat the command with --out DIR --resume after
    the two dashes to go on from the logs.
    """

    processes: Annotated[int, tyro.conf.arg(metavar="N")] = 2
    """Number of processes. Each gets its share of the cores."""
    coordinator: Annotated[str | None, tyro.conf.arg(metavar="HOST:PORT")] = None
    """Address of the first process; by default a free port of 127.0.0.1. Anyone who reaches it can
    join: use it in private networks only."""

    def __call__(self, console: "Console", errors: "Console", rest: tuple[str, ...]) -> int:
        """Starts the processes, and watches them."""
        from prograde.lab.cli import _program
        from prograde.lab.processes.launch import launch
        from prograde.lab.report.terminal import say
        from prograde.lab.study import UsageError

        words = list(rest)
        if words[:1] != ["reproduce"]:
            given = f"{shlex.join(words)!r}" if words else "nothing"
            raise UsageError(
                f"launch runs `reproduce`, and got {given}: "
                "prograde launch --processes 2 -- reproduce mlp"
            )
        if self.processes < 1:
            raise UsageError(f"--processes {self.processes}: at least 1 is needed.")
        if not any(word == "--out" or word.startswith("--out=") for word in words):
            stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
            words += ["--out", f"runs/{stamp}-{self.processes}-workers"]
        program = [sys.executable, "-m", "prograde.lab.cli", *words, "--distributed"]
        tell = lambda text: say(errors, f"prograde: {text}")  # noqa: E731
        say(
            console,
            f"Starting {self.processes} processes. Each compiles its programs before the first "
            "step, which takes up to a minute.",
        )
        status = launch(program, self.processes, self.coordinator, tell)
        if status not in (0, 2):
            again = words if "--resume" in words else [*words, "--resume"]
            options = ["--processes", str(self.processes)]
            if self.coordinator is not None:
                options += ["--coordinator", self.coordinator]
            say(
                errors,
                f"To continue: {shlex.join([*_program(), 'launch', *options, '--', *again])}",
            )
        return status
