"""Time and memory of a step on all weights of SmolLM2-135M, 4 x 64 tokens.

Run as a module with the name of a method, it prints the memory of that method in its process.
"""

import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prograde import lm
from prograde.lab.display import Display
from prograde.lab.measure import memory, timing
from prograde.lab.store import Store
from prograde.lab.studies.finetune.tuning import Batch, Tuning
from prograde.lab.studies.finetune_methods.methods import OURS, STEPS

_BATCH, _LENGTH = 4, 64
INFERENCE, FORWARD = "inference", "bare forward"


def measure(store: Store, rounds: int, display: Display) -> None:
    """Fills the records `memory` and `times`."""
    store.once("memory", lambda: _measure_memory(display))
    store.once("times", lambda: _measure_times(rounds, display))


def _measure_memory(display: Display) -> dict[str, Any]:
    found = {}
    with display.stage("memory of the methods, each in a process", 1 + len(STEPS)):
        for method in (INFERENCE, *STEPS):
            found[method] = memory.in_a_process(__name__, method)
            display.advance(1, method)
    return found


def _measure_times(rounds: int, display: Display) -> dict[str, Any]:
    rows = _batch()
    model = lm.load("smollm2")[0]
    tunings = {name: Tuning(plan, jax.tree.map(jnp.array, model)) for name, plan in STEPS.items()}
    temp = {name: tuning.temporary_bytes(rows) for name, tuning in tunings.items()}

    def steps(tuning: Tuning, count: int) -> None:
        for _ in range(count):
            step(tuning, rows)

    def forward(count: int) -> None:
        for _ in range(count):
            inference(tunings["backprop"], rows)

    visits = {FORWARD: timing.timed(forward)} | {
        name: timing.timed(lambda count, tuning=tuning: steps(tuning, count))
        for name, tuning in tunings.items()
    }
    turns = timing.take_turns(visits, rounds, display, "a step on all weights", calls=1)
    return {"seconds": turns.seconds, "busy": turns.busy, "temp_bytes": temp}


def _batch() -> Batch:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 49152, (_BATCH, _LENGTH)).astype(np.int32)
    return tokens, np.ones(tokens.shape, bool), rng.integers(0, 2, _BATCH).astype(np.int32)


def step(tuning: Tuning, rows: Batch) -> None:
    """Takes a step with the rate zero, so that the loss stays what it is."""
    if tuning.update is not None:
        derivatives = tuning.derivatives(0, rows)[1]
        tuning.state = tuning.update(tuning.state, 0, 0, 0.0, derivatives)
    else:
        tuning.step(0, rows, rate=0.0)
    jax.block_until_ready(tuning.state.params)


def inference(tuning: Tuning, rows: Batch) -> None:
    """Runs the model."""
    tuning.logits(rows)


def _memory_of(method: str) -> dict[str, Any]:
    """The memory of one method, in this process."""
    tuning = Tuning(STEPS[OURS if method == INFERENCE else method], lm.load("smollm2")[0])
    rows = _batch()
    run = inference if method == INFERENCE else step
    run(tuning, rows)
    weights = sum(x.nbytes for x in jax.tree.leaves(tuning.state.params))
    return {
        "weights": weights,
        **memory.resident_memory(lambda: [run(tuning, rows) for _ in range(3)]),
    }


if __name__ == "__main__":
    print(json.dumps(_memory_of(sys.argv[1])))
