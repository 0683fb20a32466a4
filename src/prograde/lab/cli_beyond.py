"""The command for what reverse mode cannot do: `prograde beyond`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from prograde.lab.beyond import EXPERIMENTS

_LENGTH = tyro.conf.create_mutex_group(required=False, title="length")


@dataclass(frozen=True)
class Beyond:
    """Problems on which forward gradients are the only way, or plainly the better one, beside the best reverse mode.

    - prograde beyond newton ode control: loops whose length depends on the parameters, up to stiff equations and contact
    - prograde beyond horizon: gradients through 10^3 to 10^6 steps, at constant memory
    - prograde beyond stream: learning while the data flows, beside truncated backprop
    - prograde beyond hyper: hyperparameters, by the derivative through a whole training run

    Without names all of them, a minute or so each. Ends with one report page.
    """

    experiments: Annotated[
        tuple[str, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar=f"[{'|'.join(EXPERIMENTS)} ...]"),
    ] = ("all",)
    """Which; by default all."""
    quick: Annotated[bool, _LENGTH] = False
    """About a minute each; the default."""
    full: Annotated[bool, _LENGTH] = False
    """Longer horizons, more rounds, larger networks: several minutes each."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Where records and report go; by default runs/DATE-TIME-beyond."""
    resume: bool = False
    """Keep the records that are in --out, and run the others."""
    from_: Annotated[Path | None, tyro.conf.arg(name="from", metavar="DIR")] = None
    """Run nothing; show these records and build their page again."""
    markdown: Annotated[Path | None, tyro.conf.arg(metavar="PAGE")] = None
    """Write figures and tables into this page of a documentation, between the marks it holds."""
