"""Kills workers of a training run many times, and compares the result with a run without kills."""

import dataclasses
import random
import shutil
from typing import Any

from prograde.lab.display import Display
from prograde.lab.store import Store
from prograde.lab.studies.kills.group import Group, begun_from, finals, kill_at_random

_STEPS_A_KILL = 60  # enough for a few steps and a flush between two kills
_TO_THE_END = 600.0  # seconds


def measure(store: Store, kills: int, seed: int, display: Display) -> None:
    """Records each kill, and then the result. Continues after the kills that are recorded.

    The random numbers of a kill derive from the seed and its number.
    """
    if "result" in store:
        return
    steps = _STEPS_A_KILL * kills
    disturbed, undisturbed = store.path("disturbed"), store.path("undisturbed")
    disturbed.mkdir(exist_ok=True)
    found = store.read_lines("kills") if "kills" in store else []
    with display.stage("kills", kills):
        display.reach(len(found))
        while len(found) < kills:
            chance = random.Random(f"{seed} {len(found)}")
            kill = kill_at_random(disturbed, steps, chance)
            if kill.status == 0:
                raise RuntimeError(f"the run ended after {len(found)} kills; it needs more steps.")
            found.append(dataclasses.asdict(kill))
            store.write_lines("kills", found)
            display.advance(1, f"worker {kill.victim}, ended after {kill.seconds:.2f} s")
    with display.stage("to the end, and once undisturbed", 2):
        for directory in (disturbed, undisturbed):
            if (status := Group(directory, steps).wait(_TO_THE_END)) != 0:
                raise RuntimeError(f"the run ended with status {status}.")
            display.advance(1, directory.name)
    same = len(set(finals(disturbed) + finals(undisturbed))) == 1
    lost = lost_steps(found, begun_from(disturbed))
    store.write("result", {"steps": steps, "lost_steps": lost, "same_parameters": same})
    for directory in (disturbed, undisturbed):
        shutil.rmtree(directory)


def lost_steps(kills: list[dict[str, Any]], last: int) -> int:
    """Counts the steps that were in a log after a kill, and lost at the next start.

    `last` is the step at which the start after the last kill began.
    """
    begun = [kill["begun"] for kill in kills[1:]] + [last]
    pairs = zip(kills, begun, strict=True)
    return sum(max(0, kill["flushed"] - start) for kill, start in pairs)
