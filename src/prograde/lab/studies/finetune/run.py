"""A fine-tune from files to files: zero-shot first, then the steps, with records from which it can be continued or made again."""

import contextlib
import dataclasses
import json
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

import prograde as pg
from prograde import lm
from prograde.lab import records, texts
from prograde.lab.display import Display
from prograde.lab.finetune import Plan, Tuning, calibration, figures_of

LOG, CURVE, SUMMARY, STATE = "replay.log", "curve.jsonl", "summary.json", "state.npz"
POINTS = 20  # on the curve
_PATIENCE = 6  # points without a better one, after which a run ends
_PASSES = 300  # over the examples, at most, where the length is given in minutes
_SHOWN = 8  # held-out examples, before and after
_CALIBRATED_ON = 1000  # training examples
_REHEARSALS = 3


@dataclass(frozen=True)
class Job:
    """What is fine-tuned on what; with the plan, all that decides the run."""

    model: str
    data: Path
    held_out_data: Path | None = None
    text: str = "text"
    label: str = "label"
    template: str = "{text}\nLabel:"
    labels: dict[str, str] = field(default_factory=dict)
    first_token: bool = False
    held_out: int = 500
    examples: int | None = None
    max_length: int = 128
    dtype: lm.Dtype = "float32"
    quantized: bool = False
    calibrate: bool = True
    keep_last: bool = False
    minutes: float | None = None
    memory_limit: float | None = None  # GB


class MemoryLimitError(RuntimeError):
    """A run that would need more memory than there is, or than is allowed; nothing was run."""


class DivergedError(RuntimeError):
    """A loss that is not finite."""


@dataclass(frozen=True, eq=False)
class Split:
    """What is trained on, and what is held out."""

    train: texts.Examples | texts.Windows
    held_out: texts.Examples | texts.Windows

    @property
    def notes(self) -> list[str]:
        """What was done to the texts."""
        return [
            *(f"training: {n}" for n in self.train.notes),
            *(f"held out: {n}" for n in self.held_out.notes),
        ]


def read(job: Job, seed: int, tokenizer: Tokenizer) -> Split:
    """The data of a job, as tokens."""
    if job.data.suffix == ".txt":
        whole = texts.windows(job.data, tokenizer, job.max_length)
        if job.held_out_data is not None:
            return Split(whole, texts.windows(job.held_out_data, tokenizer, job.max_length))
        last = min(
            max(1, len(whole) // 10), job.held_out
        )  # the end of a text is new where the middle need not be
        return Split(
            texts.Windows(whole.tokens[:-last][: job.examples], whole.notes),
            texts.Windows(whole.tokens[-last:], ()),
        )
    rows = texts.read_table(job.data, job.text, job.label)
    words = texts.label_words(rows, job.labels, job.data)
    if job.held_out_data is not None:
        train, held_out = rows, texts.read_table(job.held_out_data, job.text, job.label)
        texts.label_words(held_out, words, job.held_out_data)
    else:
        train, held_out = texts.split_rows(rows, min(job.held_out, len(rows) // 2), seed)
    train = train[: job.examples]
    texts.label_words(train, words, job.data)
    made = [
        texts.examples(r, words, tokenizer, job.template, job.max_length, job.first_token)
        for r in (train, held_out)
    ]
    return Split(*made)


def run(job: Job, plan: Plan, out: Path, resume: bool, display: Display) -> None:
    """Trains, or goes on, and leaves records in `out`. What is stopped loses the steps since the last point of the curve at most."""
    say = lambda text: display.console.print(text, highlight=False, markup=False, soft_wrap=True)  # noqa: E731
    with display.stage("reading the model", 1):
        model, tokenizer = lm.load(job.model, job.dtype, job.quantized)
    data = read(job, plan.seed, tokenizer)
    for note in data.notes:
        say(f"  {note}")
    if isinstance(data.train, texts.Examples):
        plan = dataclasses.replace(
            plan, label_tokens=tuple(int(i) for i in data.train.label_tokens)
        )
    config = {
        "kind": "finetune",
        "job": {
            k: str(v) if isinstance(v, Path) else v
            for k, v in dataclasses.asdict(job).items()
            if k != "memory_limit"
        },
        "plan": dataclasses.asdict(plan),
        "data": {"train": texts.digest(data.train), "held_out": texts.digest(data.held_out)},
    }
    config["plan"].pop("steps" if job.minutes is not None else "offsets")
    records.claim({out: config}, resume)
    earlier = records.read_json(out / SUMMARY) if (out / SUMMARY).exists() else {}

    fingerprint = pg.replay.fingerprint(model)
    tuning = Tuning(plan, model)
    plan = tuning.plan
    del model
    parts = []
    with display.stage("states before the trained layers", len(data.train) + len(data.held_out)):
        for part in (data.train, data.held_out):
            parts.append(
                tuning.prepare(part, lambda count: display.advance(count, "once, for all steps"))
            )
    train, held_out = parts
    # where a run is to stop is not for the held-out examples to say
    apart = 0 if job.keep_last or not tuning.thin else min(500, len(train[0]) // 5)
    cut = len(train[0]) - apart
    validation = tuple(x[cut:] for x in train) if apart else None
    train = tuple(x[:cut] for x in train)

    summary: dict[str, Any] = {
        "zero_shot": tuning.evaluate(held_out),
        "trained": tuning.num_trained,
    }
    if isinstance(data.held_out, texts.Examples):
        summary |= {"names": data.held_out.names, "shown": _shown(data.held_out)}
        summary["before"] = _probabilities(tuning, held_out)
        if job.calibrate:
            some = tuple(x[:_CALIBRATED_ON] for x in train)
            offsets = calibration(tuning.logits(some), some[2])
            tuning.calibrate(offsets)
            summary["calibrated"] = figures_of(tuning.logits(held_out), held_out[2])
        say(f"Zero-shot: {in_words(summary['zero_shot'])}")
        if job.calibrate:
            say(
                f"with its label bias repaired: {in_words(summary['calibrated'])}   (what follows starts here)"
            )
    else:
        say(f"Before: {in_words(summary['zero_shot'])}")
    batch = tuple(x[: plan.batch_size] for x in train)
    summary["memory"] = check_memory(tuning, batch, job.memory_limit)
    steps, seconds = (
        plan.steps,
        tuning.rehearse(batch, _REHEARSALS),
    )  # compiled, before the clock runs
    if job.minutes is not None:
        passes = math.ceil(_PASSES * len(train[0]) / len(batch[0]))
        steps = earlier.get("steps") or min(_steps_in(job.minutes, seconds), passes)
    tuning.plan = plan = dataclasses.replace(tuning.plan, steps=steps)
    summary |= {
        "steps": steps,
        "model_fingerprint": fingerprint,
        "label_offsets": tuning.plan.offsets,
    }
    summary["tokens"] = int(
        data.train.valid.sum(axis=1).mean() * len(batch[0])
        if isinstance(data.train, texts.Examples)
        else batch[0].size
    )
    records.write_json(out / SUMMARY, summary)
    say(
        f"{tuning.num_trained:,} numbers are trained for {steps:,} steps of {len(batch[0])} examples: {tuning.estimator!r}"
    )
    kept = _steps(
        tuning,
        train,
        validation,
        held_out,
        out,
        {
            "model": str(job.model),
            "dtype": job.dtype,
            "quantized": job.quantized,
            "model_fingerprint": fingerprint,
        },
        summary,
        display,
    )
    if isinstance(data.held_out, texts.Examples):
        summary["after"] = _probabilities(tuning, held_out)
    if tuning.update is None and not exported(out).exists():  # there is no log to make them from
        with display.stage("saving the weights", 1):
            lm.save(exported(out), tuning.model, tokenizer)
    summary["final"] = kept
    records.write_json(out / SUMMARY, summary)


def exported(out: Path) -> Path:
    """Where a run without a log leaves its weights."""
    return out / "model"


def replay(base: str, path: Path, out: Path, steps: int | None, display: Display) -> None:
    """Makes the weights of a run from its base model and its log, and saves them."""
    if path.is_dir():  # of a run: the steps that it kept
        if steps is None and (path / SUMMARY).exists():
            steps = records.read_json(path / SUMMARY).get("final", {}).get("step")
        path = path / LOG
    log = pg.replay.ReplayLog.open(path)
    config = log.header["config"]
    if not isinstance(config, dict) or config.get("kind") != "finetune":
        raise pg.replay.LogError(
            f"{path} is the log of another kind of run than a fine-tune: {config}."
        )
    if steps is not None and not 0 <= steps <= len(log):
        raise pg.replay.LogError(f"--steps {steps}, but {path} holds {len(log)}.")
    if out.exists():
        raise pg.replay.LogError(f"{out} exists. Choose another path; nothing was changed.")
    plan, here = Plan.from_config(config["plan"]), pg.__version__
    if (wrote := log.header["versions"]["prograde"]) != here:
        raise pg.replay.LogError(
            f"{path} was written by prograde {wrote}, and this is {here}, which may draw other directions. Use that version."
        )
    with display.stage("reading the model", 1):
        model, tokenizer = lm.load(base, config["dtype"], config["quantized"])
        if (found := pg.replay.fingerprint(model)) != config["model_fingerprint"]:
            raise pg.replay.LogError(
                f"{path} starts from {config['model']} with the fingerprint {config['model_fingerprint'][:16]}..., and {base} has {found[:16]}.... "
                "Give the model that the run started from."
            )
    tuning = Tuning(plan, model)
    del model
    if repr(tuning.estimator) != log.header["estimator"]:
        raise pg.replay.LogError(
            f"{path} is the log of {log.header['estimator']}, not of {tuning.estimator!r}."
        )
    count = len(log) if steps is None else steps
    with display.stage("replaying", max(count, 1)):
        _replay_steps(tuning, log, count, display)
    with display.stage("saving", 1):
        if out.suffix == ".safetensors":
            lm.save_weights(out, tuning.model)
        else:
            lm.save(out, tuning.model, tokenizer)


def _replay_steps(
    tuning: Tuning,
    log: pg.replay.ReplayLog,
    count: int,
    display: Display,
    look: Callable[[Tuning, int], None] | None = None,
) -> None:
    if look is not None:
        look(tuning, 0)
    for step in range(count):
        tuning.apply(step, jnp.asarray(log.records["derivatives"][step]))
        if look is not None:
            look(tuning, step + 1)
        if (
            step % 50 == 49
        ):  # so that the updates dispatched do not pile up, and the bar tells the truth
            jax.block_until_ready(tuning.state.params)
            display.reach(step + 1)


def _steps_in(minutes: float, seconds: float) -> int:
    """How many steps fit, in round numbers."""
    steps = max(1, int(60 * minutes / seconds))
    return steps if steps < 1000 else steps // 100 * 100


class _Best:
    """The state of least validation loss, where there is a validation part; else the last."""

    def __init__(self, validation: tuple[np.ndarray, ...] | None, curve: list[dict[str, Any]]):
        self.validation, self.curve, self.params = validation, curve, None

    def point(self) -> dict[str, Any]:
        """Of the curve, the one that is kept."""
        if self.validation is None:
            return self.curve[-1]
        return min(self.curve, key=lambda point: point["validation_loss"])

    def over(self) -> bool:
        """Whether the best was long ago."""
        return (
            self.validation is not None
            and len(self.curve) - 1 - self.curve.index(self.point()) >= _PATIENCE
        )

    def look(self, tuning: Tuning, step: int) -> None:
        """Keeps the parameters, if they are the best."""
        if self.validation is not None and self.point()["step"] == step:
            self.params = jax.tree.map(np.array, tuning.state.params)

    def restore(self, tuning: Tuning) -> None:
        """Puts the best parameters back."""
        if self.params is not None:
            params = jax.tree.map(jnp.asarray, self.params)
            tuning.state = pg.replay.TrainState(params, tuning.optimizer.init(params))


def _steps(
    tuning: Tuning,
    train: tuple[np.ndarray, ...],
    validation: tuple[np.ndarray, ...] | None,
    held_out: tuple[np.ndarray, ...],
    out: Path,
    base: dict[str, Any],
    summary: dict[str, Any],
    display: Display,
) -> dict[str, Any]:
    """The steps, from wherever the records of `out` end; returns the point of the curve whose parameters are kept."""
    plan, log, curve = tuning.plan, None, []
    if (out / CURVE).exists():
        curve = records.read_lines(out / CURVE)

    def measured() -> dict[str, Any]:
        found = {**tuning.evaluate(held_out), "rss": _peak_rss()}
        return (
            found
            if validation is None
            else found | {"validation_loss": tuning.evaluate(validation)["loss"]}
        )

    best = _Best(validation, curve)
    if tuning.update is not None:
        config = {"kind": "finetune", **base, "plan": dataclasses.asdict(plan)}
        log = _log(tuning, out / LOG, config)
        done = len(log)
        curve[:] = [point for point in curve if point["step"] <= done]
        with display.stage("replaying the log", done) if done else _nothing():
            _replay_steps(tuning, log, done, display, best.look if curve else None)
    else:
        done = 0
        if (out / STATE).exists():
            like = {
                "state": tuning.state,
                "step": np.zeros((), int),
                "best": tuning.state.params if validation else None,
            }
            saved = records.load_state(out / STATE, like)
            done, best.params = int(saved["step"]), saved["best"]
            tuning.state = jax.tree.map(jnp.asarray, saved["state"])
        curve[:] = [point for point in curve if point["step"] <= done]
    seconds = (
        curve[-1]["seconds"] * (done / curve[-1]["step"] if curve[-1]["step"] else 1)
        if curve
        else 0.0
    )
    if not curve:
        curve.append({"step": 0, "seconds": 0.0, **measured(), "train_loss": None})
        records.write_lines(out / CURVE, curve)
        best.look(tuning, 0)
    interval = math.ceil(plan.steps / POINTS)
    count = len(train[0])
    with display.stage("training", plan.steps), _nothing() if log is None else log:
        display.reach(done)
        losses: list[Any] = []
        shown = done
        begin = time.perf_counter()
        left = 0 if best.over() else plan.steps - done
        for step, rows in zip(
            range(done, done + left), tuning.order(count, done, left), strict=True
        ):
            batch = tuple(x[rows] for x in train)
            if log is not None:
                value, derivatives = tuning.derivatives(step, batch)
                log.append(step, plan.seed, plan.rate_of(step), value, derivatives)
                tuning.apply(step, derivatives)
            else:
                value = tuning.step(step, batch)
            losses.append(value)
            due = (step + 1) % interval == 0 or step + 1 == plan.steps
            if not (due or step % 10 == 9):
                continue
            latest = float(value)  # waits for the steps: those ahead of it must not pile up
            speed = summary["tokens"] * len(losses) / max(time.perf_counter() - begin, 1e-9)
            held = f"{100 * curve[-1]['accuracy']:.1f} %"
            facts = f"loss {latest:.3f}, held out {held}, {speed:,.0f} tokens/s, {_peak_rss() / 1e9:.2f} GB"
            display.advance(step + 1 - shown, facts)
            shown = step + 1
            point: dict[str, Any] = {
                "step": step + 1,
                "seconds": seconds + time.perf_counter() - begin,
            }
            if due and math.isfinite(latest):
                point |= measured()
                point["train_loss"] = float(np.mean([float(x) for x in losses]))
                latest = point["loss"]
            if not math.isfinite(latest):
                raise DivergedError(
                    f"the loss at step {step + 1} is {latest}. Try a smaller --rate than {plan.rate:g}; {out} holds the run up to "
                    "there."
                )
            if due:
                curve.append(point)
                best.look(tuning, step + 1)
                if log is not None:
                    log.flush()
                else:
                    state = {
                        "state": tuning.state,
                        "step": np.asarray(step + 1),
                        "best": best.params,
                    }
                    records.save_state(out / STATE, state)
                records.write_lines(out / CURVE, curve)
                if best.over():
                    break
                seconds, losses, begin = point["seconds"], [], time.perf_counter()
    best.restore(tuning)
    return best.point()


def _log(tuning: Tuning, path: Path, config: dict[str, Any]) -> pg.replay.ReplayLog:
    assert tuning.update is not None
    if not path.exists():
        return pg.replay.ReplayLog.create(path, tuning.state.params, tuning.update, config)
    log = pg.replay.ReplayLog.open(path, append=True)
    if differences := records.differences(log.header["config"], json.loads(json.dumps(config))):
        log.close()
        raise records.RecordError(
            f"{path} is the log of another run: {'; '.join(differences)}. Choose another --out."
        )
    return log


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _shown(data: texts.Examples) -> list[list[str]]:
    """(text, label) of a few held-out examples."""
    return [[data.texts[i], data.names[data.labels[i]]] for i in range(min(_SHOWN, len(data)))]


def _probabilities(tuning: Tuning, held_out: tuple[np.ndarray, ...]) -> list[list[float]]:
    """Of the labels, for the examples that are shown."""
    logits = tuning.logits(tuple(x[:_SHOWN] for x in held_out)).astype(np.float64)
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return (weights / weights.sum(axis=1, keepdims=True)).tolist()


def in_words(figures: dict[str, Any]) -> str:
    """Figures on held-out data, on a line."""
    parts = [f"accuracy {100 * figures['accuracy']:.1f} %", f"loss {figures['loss']:.3f}"]
    if "auc" in figures:
        parts.append(f"AUC {figures['auc']:.3f}")
    if "perplexity" in figures:
        parts.append(f"perplexity {figures['perplexity']:.1f}")
    return ", ".join(parts)


def _peak_rss() -> int:
    """The most memory this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def _available() -> int | None:
    """Memory that is free, in bytes, where the system says so."""
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * int(
            next(line.split()[1] for line in lines if line.startswith("MemAvailable"))
        )
    return None


def check_memory(
    tuning: Tuning, batch: tuple[np.ndarray, ...], limit: float | None
) -> dict[str, int]:
    """What the run will take, in bytes; raises `MemoryLimitError` where that is too much, before anything is run."""
    step = tuning.temporary_bytes(batch)
    found = {"before": _resident(), "step": step}
    total, available = found["before"] + step, _available()
    lower = "a smaller --batch-size or --max-length"
    if tuning.plan.tangents > 1:
        lower += ", fewer --tangents"
    if isinstance(tuning.estimator, pg.Backprop):
        lower += ", --estimator weight"
    if limit is not None and total > limit * 1e9:
        raise MemoryLimitError(
            f"--memory-limit {limit:g} GB, but the run needs {total / 1e9:.2f} GB: {found['before'] / 1e9:.2f} for the model and the "
            f"data, {step / 1e9:.2f} for a step. Try {lower}."
        )
    if available is not None and step > available:
        raise MemoryLimitError(
            f"a step needs {step / 1e9:.2f} GB more, and {available / 1e9:.2f} GB are free. Try {lower}."
        )
    return found


def _resident() -> int:
    """The memory this process has now, in bytes."""
    with contextlib.suppress(OSError, ValueError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    return _peak_rss()
