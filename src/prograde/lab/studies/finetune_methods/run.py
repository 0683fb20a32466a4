"""Fine-tuning SmolLM2-135M: what a step costs in time and memory, and what methods reach against wall-clock.

- `python benchmarks/finetune.py steps --out records/finetune-steps.json`: all weights, 4 x 64 tokens: the methods take turns; the memory of
  each in a process of its own, beside inference.
- `python benchmarks/finetune.py curves --data movie_snippets.tsv --out records/finetune-curves.json`: sentiment of short snippets, 1,000
  training examples, the methods at given rates, three seeds. Can be stopped and continued: a method and seed that the record has is left out.
"""

import dataclasses
import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from prograde import lm
from prograde.lab import costs, records, texts
from prograde.lab.finetune import Plan, Tuning, calibration

BATCH, LENGTH = 4, 64
LABELS = (1109, 13321)  # " great" and " terrible"
STEPS = {
    "forward gradient, K = 1": Plan(
        train="all", estimator="weight", optimizer="sgd", label_tokens=LABELS
    ),
    "forward gradient, K = 8": Plan(
        train="all", estimator="weight", tangents=8, optimizer="sgd", label_tokens=LABELS
    ),
    "MeZO, rank-one directions": Plan(
        train="all", estimator="mezo", directions="low-rank", optimizer="sgd", label_tokens=LABELS
    ),
    "MeZO": Plan(train="all", estimator="mezo", optimizer="sgd", label_tokens=LABELS),
    "backprop": Plan(train="all", estimator="backprop", optimizer="sgd", label_tokens=LABELS),
    "backprop, checkpointed": Plan(
        train="all", estimator="checkpointed", optimizer="sgd", label_tokens=LABELS
    ),
}
SGD, ADAM = {"optimizer": "sgd"}, {"optimizer": "adam"}
LAST_NORM = {"train": "norm", "optimizer": "adam", "batch_size": 200, "steps": 1500}
MIDDLE = {"layers": (12, 29)}
CURVES: dict[str, dict[str, Any]] = {
    "forward gradient, last norm, K = 32": {**LAST_NORM, "tangents": 32, "rate": 0.03},
    "the same with all 2,878 examples": {
        **LAST_NORM,
        "tangents": 32,
        "rate": 0.03,
        "batch_size": 500,
        "steps": 2000,
    },
    "MeZO, last norm, K = 32": {**LAST_NORM, "estimator": "mezo", "tangents": 32, "rate": 0.03},
    "backprop, last norm": {**LAST_NORM, "estimator": "backprop", "rate": 0.01},
    "backprop, all weights": {
        "train": "all",
        "estimator": "backprop",
        "optimizer": "adam",
        "rate": 2e-5,
    },
    "backprop, LoRA": {
        "train": "lora",
        **MIDDLE,
        "estimator": "backprop",
        "optimizer": "adam",
        "rank": 4,
        "rate": 1e-3,
    },
    "forward gradient, layers 12 to 28": {
        "train": "matrices",
        **MIDDLE,
        "optimizer": "sgd",
        "rate": 5e-4,
    },
    "MeZO (rank one), layers 12 to 28": {
        "train": "matrices",
        **MIDDLE,
        "estimator": "mezo",
        "directions": "low-rank",
        "optimizer": "sgd",
        "rate": 5e-4,
    },
    "forward gradient, LOZO factors": {
        "train": "subspace",
        **MIDDLE,
        "rank": 4,
        "optimizer": "momentum",
        "rate": 0.1,
    },
}
ALL = "the same with all 2,878 examples"
TRAIN, HELD_OUT = 1000, 1000


@dataclass(frozen=True)
class Steps:
    """Time and memory of a step on all weights."""

    out: Annotated[Path, tyro.conf.arg(metavar="FILE")] = Path("runs/bench/finetune-steps.json")
    """The record."""
    rounds: int = 12
    """How often each method is timed."""


@dataclass(frozen=True)
class Curves:
    """What methods reach against wall-clock."""

    data: Annotated[Path, tyro.conf.arg(metavar="FILE.tsv")]
    """A table with the columns text and label, which are positive and negative."""
    out: Annotated[Path, tyro.conf.arg(metavar="FILE")] = Path("runs/bench/finetune-curves.json")
    """The record."""
    minutes: float = 1.0
    """Of steps, for each run of methods that have no number of steps."""
    seeds: int = 3
    """Runs of each method, on other splits of the data."""
    methods: tuple[str, ...] = ()
    """Only these."""


@dataclass(frozen=True)
class Memory:
    """The memory of one method, in this process; what `steps` calls."""

    method: Annotated[str, tyro.conf.Positional]
    """A method, or inference."""


def batch(rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    tokens = rng.integers(0, 49152, (BATCH, LENGTH)).astype(np.int32)
    return tokens, np.ones(tokens.shape, bool), rng.integers(0, 2, BATCH).astype(np.int32)


def one_step(tuning: Tuning, rows: tuple[np.ndarray, ...], step: int = 0) -> None:
    """A step with the rate zero, so that the loss stays what it is."""
    if tuning.update is not None:
        derivatives = tuning.derivatives(step, rows)[1]
        tuning.state = tuning.update(tuning.state, step, 0, 0.0, derivatives)
    else:
        tuning.step(step, rows, rate=0.0)
    jax.block_until_ready(tuning.state.params)


def inference(tuning: Tuning, rows: tuple[np.ndarray, ...]) -> None:
    jax.block_until_ready(tuning._label_logits(tuning.state.params, tuning.frozen, *rows[:2]))


def measure_memory(method: str) -> None:
    plan = STEPS["forward gradient, K = 1" if method == "inference" else method]
    tuning = Tuning(plan, lm.load("smollm2")[0])
    rows = batch(np.random.default_rng(0))
    run = inference if method == "inference" else one_step
    run(tuning, rows)
    weights = sum(x.nbytes for x in jax.tree.leaves(tuning.state.params))
    found = costs.resident_memory(lambda: [run(tuning, rows) for _ in range(3)])
    print(json.dumps({"weights": weights, **found}))


def measure_steps(arguments: Steps) -> None:
    memory = {}
    for method in ("inference", *STEPS):
        print(f"memory of {method}", flush=True)
        memory[method] = costs.in_a_process(str(Path(__file__).stem), "memory", method)
    rows = batch(np.random.default_rng(0))
    model = lm.load("smollm2")[0]
    copy = lambda: jax.tree.map(jnp.array, model)
    tunings = {name: Tuning(plan, copy()) for name, plan in STEPS.items()}
    temp = {name: tuning.temporary_bytes(rows) for name, tuning in tunings.items()}
    bare = tunings["backprop"]
    seconds: dict[str, list[float]] = {name: [] for name in ("bare forward", *STEPS)}
    for turn in range(arguments.rounds + 2):
        for name, times in seconds.items():
            begin = time.perf_counter()
            inference(bare, rows) if name == "bare forward" else one_step(tunings[name], rows)
            if turn > 1:
                times.append(time.perf_counter() - begin)
        print(
            turn,
            {name: round(times[-1], 3) for name, times in seconds.items() if times},
            flush=True,
        )
    ratio = lambda a, b: statistics.median(
        x / y for x, y in zip(seconds[a], seconds[b], strict=True)
    )
    ours = "forward gradient, K = 1"
    record = {
        "kind": "finetune-steps",
        "config": {
            "model": "smollm2",
            "batch": BATCH,
            "length": LENGTH,
            "train": "all",
            "rounds": arguments.rounds,
        },
        "environment": records.environment(),
        "seconds": seconds,
        "over_forward": {name: ratio(name, "bare forward") for name in STEPS},
        "over_backprop": ratio(ours, "backprop"),
        "over_mezo": {name: ratio(ours, name) for name in STEPS if name.startswith("MeZO")},
        "temp_bytes": temp,
        "memory": memory,
    }
    records.write_json(arguments.out, record)
    print(
        json.dumps(
            {k: v for k, v in record.items() if k not in ("seconds", "environment")}, indent=1
        )
    )


def short_rows(path: Path, tokenizer: Any) -> list[tuple[str, str]]:
    return [
        row
        for row in texts.read_table(path, "text", "label")
        if len(tokenizer.encode(row[0]).ids) <= 20
    ]


def measure_curves(arguments: Curves) -> None:
    model, tokenizer = lm.load("smollm2")
    rows, words = (
        short_rows(arguments.data, tokenizer),
        {"negative": " terrible", "positive": " great"},
    )
    record: dict[str, Any] = {
        "kind": "finetune-curves",
        "config": {
            "model": "smollm2",
            "data": {
                "name": arguments.data.name,
                "rows": len(rows),
                "train": 1000,
                "held_out": HELD_OUT,
                "words": words,
            },
            "template": "{text} It was",
            "minutes": arguments.minutes,
            "methods": CURVES,
        },
        "environments": [],
        "zero_shot": {},
        "runs": [],
    }
    if arguments.out.exists():
        record = records.read_json(arguments.out)
    record["environments"].append(records.environment())
    have = {(run["method"], run["seed"]) for run in record["runs"]}
    examples = texts.examples(rows, words, tokenizer, "{text} It was", 32)
    plan = Plan(train="norm", label_tokens=tuple(int(i) for i in examples.label_tokens))
    states = Tuning(plan, model).prepare(examples)  # before the last norm, of all
    for seed in range(arguments.seeds):
        order = np.random.default_rng(seed).permutation(len(rows))
        held_out, train = order[:HELD_OUT], order[HELD_OUT:]
        start = Tuning(dataclasses.replace(plan, seed=seed), model)
        of = lambda index: tuple(x[index] for x in states)
        offsets = calibration(start.logits(of(train[:TRAIN])), examples.labels[train[:TRAIN]])
        figures = {"raw": start.evaluate(of(held_out))}
        start.calibrate(offsets)
        record["zero_shot"][str(seed)] = figures | {"calibrated": start.evaluate(of(held_out))}
        middle: Any = None
        for method, settings in CURVES.items():
            if (method, seed) in have or (arguments.methods and method not in arguments.methods):
                continue
            mine = dataclasses.replace(start.plan, **{"tangents": 1, "steps": 10**6} | settings)
            tuning = Tuning(
                mine, jax.tree.map(jnp.array, model) if mine.train in ("all", "matrices") else model
            )
            few = mine.train != "norm"  # they are slow to evaluate
            mine_train, mine_held_out = (
                train if method == ALL else train[:TRAIN],
                held_out[: HELD_OUT // (1 + few)],
            )
            if mine.train == "norm":
                parts = of(mine_train), of(mine_held_out)
            else:
                chosen = [_subset(examples, index) for index in (mine_train, mine_held_out)]
                if not tuning.prefix or middle is None:
                    parts = [tuning.prepare(part) for part in chosen]
                    middle = parts if tuning.prefix else middle
                else:
                    parts = middle
            found = train_for(tuning, *parts, arguments.minutes, "steps" in settings)
            sizes = {"examples": len(mine_train), "held_out": len(mine_held_out)}
            record["runs"].append({"method": method, "seed": seed, **sizes, **found})
            records.write_json(arguments.out, record)
            print(seed, method, found["curve"][-1], flush=True)


def _subset(examples: texts.Examples, index: np.ndarray) -> texts.Examples:
    arrays = {name: getattr(examples, name)[index] for name in ("tokens", "valid", "labels")}
    return dataclasses.replace(examples, **arrays, texts=tuple(examples.texts[i] for i in index))


def train_for(
    tuning: Tuning, train: Any, held_out: Any, minutes: float, counted: bool
) -> dict[str, Any]:
    """Trains for a number of steps, evaluated at four times, or for minutes of steps, evaluated at the end."""
    first = tuple(x[: tuning.plan.batch_size] for x in train)
    each = tuning.rehearse(first, 2)
    steps = tuning.plan.steps if counted else max(8, int(60 * minutes / each))
    tuning.plan = dataclasses.replace(tuning.plan, steps=steps)
    curve: list[dict[str, Any]] = []  # it begins with the zero-shot figures, calibrated
    losses: list[Any] = []
    parts = 4 if counted else 8
    marks, seconds = {round(steps * part / parts) for part in range(1, parts + 1)}, 0.0
    begin = time.perf_counter()
    for step, rows in enumerate(tuning.order(len(train[0]), 0, steps)):
        batch = tuple(x[rows] for x in train)
        if tuning.update is not None:
            value, derivatives = tuning.derivatives(step, batch)
            tuning.apply(step, derivatives)
        else:
            value = tuning.step(step, batch)
        losses.append(value)
        if step % 20 == 0:
            jax.block_until_ready(tuning.state.params)  # those ahead must not pile up
        if step + 1 in marks:
            jax.block_until_ready(tuning.state.params)
            seconds += time.perf_counter() - begin
            point = {
                "step": step + 1,
                "seconds": seconds,
                "train_loss": float(np.mean([float(x) for x in losses])),
            }
            curve.append(
                point | (tuning.evaluate(held_out) if counted or step + 1 == steps else {})
            )
            losses, begin = [], time.perf_counter()
    return {"trained": tuning.num_trained, "step_seconds": each, "curve": curve}


if __name__ == "__main__":
    command = tyro.extras.subcommand_cli_from_dict(
        {"steps": Steps, "curves": Curves, "memory": Memory}, args=sys.argv[1:]
    )
    match command:
        case Steps():
            measure_steps(command)
        case Curves():
            measure_curves(command)
        case Memory():
            measure_memory(command.method)
