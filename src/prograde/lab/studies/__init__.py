"""The studies: the name of each command, and the class that is its plan. One line adds a study."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prograde.lab.study import Study

STUDIES = {
    "reproduce": "reproduce.plan:Reproduce",
    "compare": "compare.plan:Compare",
    "beyond": "beyond.plan:Beyond",
    "finetune": "finetune.plan:Finetune",
    "bench": "bench.plan:Bench",
    "basics": "basics.plan:Basics",
    "bounds": "bounds.plan:Bounds",
    "replay-speed": "replay_speed.plan:ReplaySpeed",
    "finetune-methods": "finetune_methods.plan:FinetuneMethods",
    "links": "links.plan:Links",
    "kills": "kills.plan:Kills",
    "torch": "torch.plan:Torch",
}


def study(name: str) -> "type[Study]":
    """The class of a study."""
    module, _, cls = STUDIES[name].partition(":")
    return getattr(importlib.import_module(f"prograde.lab.studies.{module}"), cls)
