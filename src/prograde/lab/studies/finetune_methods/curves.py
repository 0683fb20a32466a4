"""What methods of fine-tuning reach against wall-clock: sentiment of short snippets."""

import dataclasses
import re
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from prograde import lm
from prograde.lab.data import tables, texts
from prograde.lab.display import Display
from prograde.lab.store import Store
from prograde.lab.studies.finetune.examples import subset
from prograde.lab.studies.finetune.figures import calibration
from prograde.lab.studies.finetune.plan import Plan
from prograde.lab.studies.finetune.tuning import Batch, Tuning
from prograde.lab.studies.finetune_methods.methods import ALL_EXAMPLES

TRAIN, HELD_OUT = 1000, 1000
WORDS = {"negative": " terrible", "positive": " great"}
TEMPLATE = "{text} It was"
_TOKENS = 20  # of a snippet, at most


def measure(
    store: Store,
    data: Path,
    methods: dict[str, dict[str, Any]],
    minutes: float,
    seeds: int,
    display: Display,
) -> None:
    """Fills the records `data`, `zero-shot/SEED` and `runs/METHOD-SEED`."""
    model, tokenizer = lm.load("smollm2")
    rows = _short_rows(data, tokenizer)
    sizes = {"name": data.name, "rows": len(rows), "train": TRAIN, "held_out": HELD_OUT}
    store.once("data", lambda: sizes | {"words": WORDS, "template": TEMPLATE})
    examples = texts.examples(rows, WORDS, tokenizer, TEMPLATE, 32)
    tokens = tuple(int(i) for i in examples.label_tokens)
    plan = Plan(train="norm", tangents=1, batch_size=16, label_tokens=tokens)
    states = Tuning(plan, model).prepare(examples)  # before the last norm, of all
    for seed in range(seeds):
        train, held_out = split([text for text, _ in rows], seed)
        start = Tuning(dataclasses.replace(plan, seed=seed), model)
        of = lambda index: tuple(x[index] for x in states)  # noqa: E731
        few = train[:TRAIN]
        figures = {"raw": start.evaluate(of(held_out))}
        start.calibrate(calibration(start.logits(of(few)), examples.labels[few]))
        figures["calibrated"] = start.evaluate(of(held_out))
        store.once(f"zero-shot/{seed}", lambda figures=figures: figures)
        middle: tuple[Batch, Batch] | None = (
            None  # states before layer 12, which several methods share
        )
        for method, settings in methods.items():
            name = record_name(method, seed)
            if name in store:
                continue
            mine = dataclasses.replace(start.plan, **{"steps": 10**6} | settings)
            copied = mine.train in ("all", "matrices")  # they are taken over from the model
            tuning = Tuning(mine, jax.tree.map(jnp.array, model) if copied else model)
            cheap = mine.train == "norm"
            learned = train if method == ALL_EXAMPLES else few
            tested = held_out if cheap else held_out[: HELD_OUT // 2]
            if cheap:
                parts = of(learned), of(tested)
            elif tuning.prefix and middle is not None:
                parts = middle
            else:
                first, second = (subset(examples, index) for index in (learned, tested))
                parts = tuning.prepare(first), tuning.prepare(second)
                middle = parts if tuning.prefix else middle
            with display.stage(f"{method}, seed {seed}", 1):
                found = train_for(tuning, *parts, minutes, "steps" in settings)
            counts = {"examples": len(learned), "held_out": len(tested)}
            store.write(name, {"method": method, "seed": seed, **counts, **found})


def record_name(method: str, seed: int) -> str:
    """The name of the record of a run."""
    return f"runs/{re.sub('[^a-z0-9]+', '-', method.lower()).strip('-')}-{seed}"


def split(texts: list[str], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The training examples and the held-out ones, by number. No text is on both sides."""
    order = np.random.default_rng(seed).permutation(len(texts))
    train, held_out = order[HELD_OUT:], order[:HELD_OUT]
    there = {tables.same(texts[i]) for i in held_out}
    return np.asarray([i for i in train if tables.same(texts[i]) not in there]), held_out


def _short_rows(path: Path, tokenizer: Tokenizer) -> list[tables.Row]:
    rows = tables.read_table(path, "text", "label").rows
    return [row for row in rows if len(tokenizer.encode(row[0]).ids) <= _TOKENS]


def train_for(
    tuning: Tuning, train: Batch, held_out: Batch, minutes: float, counted: bool
) -> dict[str, Any]:
    """Trains for a number of steps, evaluated at four times, or for minutes, evaluated at the end.

    A method whose steps are counted evaluates often, for a step of it is cheap and so is that.
    """
    first = tuple(x[: tuning.plan.batch_size] for x in train)
    each = tuning.rehearse(first, 2)
    steps = (tuning.plan.steps or 1) if counted else max(8, int(60 * minutes / each))
    tuning.plan = dataclasses.replace(tuning.plan, steps=steps)
    curve: list[dict[str, Any]] = []
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
            jax.block_until_ready(tuning.state.params)  # steps that are dispatched must not pile up
        if step + 1 in marks:
            jax.block_until_ready(tuning.state.params)
            seconds += time.perf_counter() - begin
            mean = float(np.mean([float(x) for x in losses]))
            point = {"step": step + 1, "seconds": seconds, "train_loss": mean}
            evaluated = counted or step + 1 == steps
            curve.append(point | (tuning.evaluate(held_out) if evaluated else {}))
            losses, begin = [], time.perf_counter()
    return {"trained": tuning.num_trained, "step_seconds": each, "curve": curve}
