"""The report of a fine-tune, from records alone."""

import statistics
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure as Canvas

from prograde.lab.report import Figure, Report, Section, Table
from prograde.lab.report.figures import BLUE, GREEN, GREY, ORANGE
from prograde.lab.report.words import duration, listed, made_on, size
from prograde.lab.store import Store
from prograde.lab.studies.finetune.plan import Finetune

_INTRODUCTION = (
    "A language model, fine-tuned on this machine. All figures are on held-out examples, unless "
    "they say training."
)
_TERMS = (
    "Zero-shot is the model as it was. The repair of the label bias adds one constant to the logit "
    "of each label, chosen on training examples: accuracy may rise much by that alone, and the AUC "
    "not at all. Training starts from there, so that what follows is learning. AUC is the "
    "probability that a positive example gets a higher score than a negative one. Seconds are "
    "those of the steps, without reading, compiling and evaluating. Memory is the most that the "
    "process has had up to then."
)
_FORMATS = {
    "accuracy": lambda x: f"{100 * x:.1f} %",
    "loss": lambda x: f"{x:.3f}",
    "auc": lambda x: f"{x:.3f}",
    "perplexity": lambda x: f"{x:.1f}",
}


def report(stores: list[Store]) -> Report:
    """Shows each run in a section."""
    return Report("Fine-tuning", _INTRODUCTION, _TERMS, [_section(store) for store in stores])


def _section(store: Store) -> Section:
    study = Finetune.from_config(store.config)
    title = f"{study.model.model} on {study.data.data.name}"
    summary = store.read("summary", default={})
    if "final" not in summary:
        done = store.read_lines("curve")[-1]["step"] if "curve" in store else 0
        said = f"This run is not finished: {done:,} of {summary.get('steps', '?')} steps are done."
        return Section(store.directory.name, title, [said], made_on(store.manifest), store.manifest)
    curve = store.read_lines("curve")
    picture = Figure(
        f"{store.directory.name}-curve",
        "Loss and accuracy against the seconds of training",
        lambda canvas: draw(summary, curve, canvas),
    )
    content = [*_tables(store, summary), conclusion(store, summary, curve), picture]
    content += [part for part in (_spread(store, summary), _files(study, store, summary)) if part]
    return Section(store.directory.name, title, content, made_on(store.manifest), store.manifest)


def _tables(store: Store, summary: dict[str, Any]) -> list[Table]:
    """The figures before and after, the examples that are shown, and the search of the rate."""
    stages = [("zero-shot", summary["zero_shot"])]
    if "calibrated" in summary:
        stages.append(("label bias repaired", summary["calibrated"]))
    last = summary["final"]
    stages.append((f"after {last['step']:,} steps, {duration(last['seconds'])}", last))
    names = [name for name in _FORMATS if name in last]
    rows = [
        [title, *(_FORMATS[n](figures[n]) if n in figures else "" for n in names)]
        for title, figures in stages
    ]
    columns = ["", *("AUC" if name == "auc" else name for name in names)]
    found = [Table("Held-out figures", columns, rows)]
    if "after" in summary:
        labels = summary["names"]
        rows = [
            [_short(text), label, _answer(before, labels), _answer(after, labels)]
            for (text, label), before, after in zip(
                summary["shown"], summary["before"], summary["after"], strict=True
            )
        ]
        changed = summary.get("changed")
        title = "Held-out examples"
        if changed:
            title += (
                f": {changed['all']} of {changed['examples']} answers changed, "
                f"{changed['to_right']} to right and {changed['to_wrong']} to wrong; these first"
            )
        found.append(Table(title, ["text", "label", "zero-shot", "fine-tuned"], rows, 0))
    if "rates" in store:
        record = store.read("rates")
        rows = [
            [
                f"{trial['rate']:.3g}",
                "diverged" if trial["loss"] is None else f"{trial['loss']:.3f}",
            ]
            for trial in record["trials"]
        ]
        title = f"Learning rates tried, {record['steps']} steps each"
        found.append(Table(title, ["rate", "validation loss"], rows))
    return found


def _answer(probabilities: list[float], names: list[str]) -> str:
    best = int(np.argmax(probabilities))
    return f"{names[best]} ({100 * probabilities[best]:.0f} %)"


def _short(text: str, length: int = 90) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"


def draw(summary: dict[str, Any], curve: list[dict[str, Any]], canvas: Canvas) -> None:
    """Draws loss and accuracy against the seconds of training."""
    canvas.set_size_inches(9, 3.2)
    seconds, last = [point["seconds"] for point in curve], summary["final"]
    left, right = canvas.subplots(1, 2)
    left.plot(seconds, [p["loss"] for p in curve], color=BLUE, label="held out")
    training = [p["train_loss"] for p in curve[1:]]
    left.plot(seconds[1:], training, color=BLUE, alpha=0.45, linestyle="--", label="training")
    left.set(xlabel="seconds of training", ylabel="loss")
    right.plot(seconds, [100 * p["accuracy"] for p in curve], color=BLUE, label="accuracy")
    if all("auc" in point for point in curve):
        right.plot(seconds, [100 * p["auc"] for p in curve], color=GREEN, label="AUC")
    right.set(xlabel="seconds of training", ylabel="held out, %")
    for axes, key, scale in ((left, "loss", 1), (right, "accuracy", 100)):
        if last["step"] != curve[-1]["step"]:
            axes.axvline(last["seconds"], color=GREY, linewidth=1, label="kept")
        start = scale * summary["zero_shot"][key]
        axes.axhline(start, color=ORANGE, linewidth=1, linestyle=":", label="zero-shot")
        axes.legend(frameon=False)


def conclusion(store: Store, summary: dict[str, Any], curve: list[dict[str, Any]]) -> str:
    """Says what came of it."""
    from prograde.lab.studies.finetune.figures import in_words

    start = summary.get("calibrated", summary["zero_shot"])
    repaired = " (its label bias repaired)" if "calibrated" in summary else ""
    last = summary["final"]
    text = (
        f"From {in_words(start)}{repaired} to {in_words(last)} in {last['step']:,} steps and "
        f"{duration(last['seconds'])} of training, of {summary['trained']:,} numbers. "
        f"The process has had {max(p['rss'] for p in curve) / 1e9:.2f} GB at most."
    )
    if last["step"] != curve[-1]["step"]:
        text += (
            " These are the steps of least loss on a validation part of the training examples, of "
            f"{curve[-1]['step']:,} taken."
        )
    log = store.path("replay.log")
    if log.exists():
        text += f" The whole run is a log of {size(log.stat().st_size)}."
    return text


def _spread(store: Store, summary: dict[str, Any]) -> str:
    """Says how far the figures depend on the seed, and on the held-out examples."""
    last, seed = summary["final"], Finetune.from_config(store.config).plan.seed
    count = summary.get("examples", {}).get("held_out")
    text = f"The seed is {seed}."
    repeats = store.read("repeats") if "repeats" in store else []
    if repeats:
        names = [n for n in ("accuracy", "loss", "auc", "perplexity") if n in last]
        spread = []
        for name in names:
            values = [run[name] for run in (last, *repeats) if name in run]
            title = "AUC" if name == "auc" else name
            spread.append(
                f"{title} {_FORMATS[name](statistics.mean(values))} "
                f"({_FORMATS[name](min(values))} to {_FORMATS[name](max(values))})"
            )
        seeds = listed(str(s) for s in (seed, *(run["seed"] for run in repeats)))
        text += (
            f" With the seeds {seeds} for the order of examples and the directions, on the same "
            f"split: {', '.join(spread)}, as mean (least to greatest)."
        )
    else:
        text += " The spread over seeds was not measured (--repeats)."
    if diverged := [str(run["seed"]) for run in repeats if run["status"] == "diverged"]:
        text += f" The loss became infinite with seed {listed(diverged)}: figures are from before."
    if count and "perplexity" not in last:
        error = (last["accuracy"] * (1 - last["accuracy"]) / count) ** 0.5
        text += (
            f" {count:,} examples are held out: the standard error of the accuracy is "
            f"{100 * error:.1f} points."
        )
    return text


def _files(study: Finetune, store: Store, summary: dict[str, Any]) -> str:
    """Says where the weights are, or how they are made again."""
    import shlex

    log, exported = store.path("replay.log"), store.path("model")
    if log.exists():
        kept = str(summary["final"]["step"])
        out = Path(f"{store.directory}-tuned")
        words = ["prograde", "replay", study.model.model, log, "--steps", kept, "-o", out]
        again = shlex.join(map(str, words))
        return f"Log: {log}. The weights, wherever the model is:\n    {again}"
    return f"Weights: {exported}" if exported.exists() else ""
