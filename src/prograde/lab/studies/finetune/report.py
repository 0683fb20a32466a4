"""The page of a fine-tune, and what its log shows, from records alone."""

import html
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from rich.console import Console

import prograde as pg
from prograde.lab import figures, records
from prograde.lab.finetune_run import CURVE, LOG, SUMMARY, in_words
from prograde.lab.report import PAGE, Table, html_table, print_table

_INTRODUCTION = "A language model, fine-tuned on this machine. All figures are on held-out examples, unless they say training."
_TERMS = """Zero-shot is the model as it was. "Label bias repaired" adds one constant to the logit of each label, chosen on training
examples: accuracy may rise much by that alone, and the AUC not at all. Training starts from there, so that what follows is learning. AUC is the
probability that a positive example gets a higher score than a negative one. Seconds are those of the steps, without reading,
compiling and evaluating. Memory is the most that the process has had up to then."""
_BLUE, _ORANGE, _GREEN = "#0072B2", "#D55E00", "#009E73"


def tables(directory: Path) -> list[Table]:
    """Figures before and after, and the examples that are shown."""
    summary = records.read_json(directory / SUMMARY)
    stages = [("zero-shot", summary["zero_shot"])]
    if "calibrated" in summary:
        stages.append(("label bias repaired", summary["calibrated"]))
    last = kept(directory)
    stages.append((f"after {last['step']:,} steps, {_duration(last['seconds'])}", last))
    names = [name for name in ("accuracy", "loss", "auc", "perplexity") if name in last]
    formats = {"accuracy": lambda x: f"{100 * x:.1f} %", "perplexity": lambda x: f"{x:.1f}"}
    rows = [
        [title, *(formats.get(n, lambda x: f"{x:.3f}")(figure[n]) for n in names)]
        for title, figure in stages
    ]
    found = [Table("Held-out figures", ["", *("AUC" if n == "auc" else n for n in names)], rows)]
    if "after" in summary:
        rows = []
        for (text, label), before, after in zip(
            summary["shown"], summary["before"], summary["after"], strict=True
        ):
            rows.append(
                [
                    _short(text),
                    label,
                    _named(before, summary["names"]),
                    _named(after, summary["names"]),
                ]
            )
        found.append(
            Table("Held-out examples", ["text", "label", "zero-shot", "fine-tuned"], rows, 0)
        )
    return found


def kept(directory: Path) -> dict[str, Any]:
    """The point of the curve whose parameters the run kept."""
    return records.read_json(directory / SUMMARY)["final"]


def _named(probabilities: list[float], names: list[str]) -> str:
    best = int(np.argmax(probabilities))
    return f"{names[best]} ({100 * probabilities[best]:.0f} %)"


def _short(text: str, length: int = 90) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 180 else f"{seconds / 60:.0f} min"


def figure(directory: Path) -> str:
    """Loss and accuracy against the seconds of training."""
    summary, curve = records.read_json(directory / SUMMARY), records.read_lines(directory / CURVE)
    seconds, last = [point["seconds"] for point in curve], kept(directory)
    with rc_context(figures._RC):
        fig = Figure(figsize=(9, 3.2), layout="constrained")
        left, right = fig.subplots(1, 2)
        left.plot(seconds, [p["loss"] for p in curve], color=_BLUE, label="held out")
        left.plot(
            seconds[1:],
            [p["train_loss"] for p in curve[1:]],
            color=_BLUE,
            alpha=0.45,
            linestyle="--",
            label="training",
        )
        left.set(xlabel="seconds of training", ylabel="loss")
        right.plot(seconds, [100 * p["accuracy"] for p in curve], color=_BLUE, label="accuracy")
        if "auc" in curve[-1]:
            right.plot(seconds, [100 * p["auc"] for p in curve], color=_GREEN, label="AUC")
        right.set(xlabel="seconds of training", ylabel="held out, %")
        if last["step"] != curve[-1]["step"]:
            for axes in (left, right):
                axes.axvline(last["seconds"], color="#888888", linewidth=1, label="kept")
        for axes, key, scale in ((left, "loss", 1), (right, "accuracy", 100)):
            axes.axhline(
                scale * summary["zero_shot"][key],
                color=_ORANGE,
                linewidth=1,
                linestyle=":",
                label="zero-shot",
            )
            axes.legend(frameon=False)
        buffer = io.StringIO()
        fig.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def conclusion(directory: Path) -> str:
    """What came of it, in words."""
    summary, curve = records.read_json(directory / SUMMARY), records.read_lines(directory / CURVE)
    start = summary.get("calibrated", summary["zero_shot"])
    repaired = " (its label bias repaired)" if "calibrated" in summary else ""
    last = kept(directory)
    text = (
        f"From {in_words(start)}{repaired} to {in_words(last)} in {last['step']:,} steps and "
        f"{_duration(last['seconds'])} of training, of {summary['trained']:,} numbers. The process has had "
        f"{max(p['rss'] for p in curve) / 1e9:.2f} GB at most."
    )
    if last["step"] != curve[-1]["step"]:
        text += f" These are the steps of least loss on a validation part of the training examples, of {curve[-1]['step']:,} taken."
    if (directory / LOG).exists():
        text += f" The whole run is a log of {(directory / LOG).stat().st_size:,} bytes."
    return text


def build(directory: Path) -> Path:
    """Writes `report.html` beside the records; returns its path."""
    manifest = records.read_json(directory / records.MANIFEST)
    job, plan = manifest["config"]["job"], manifest["config"]["plan"]
    title = f"{job['model']} on {Path(job['data']).name}"
    parts = [f"<section><h2>{html.escape(title)}</h2><p>{html.escape(conclusion(directory))}</p>"]
    parts.append(
        f'<figure role="img" aria-label="loss and accuracy against time">{figure(directory)}</figure>'
    )
    parts += [html_table(table) for table in tables(directory)]
    what = ", ".join(f"{name} {value}" for name, value in plan.items() if value is not None)
    parts.append(f"<p class=small>{html.escape(what)}</p>")
    parts.append(
        f"<details><summary>Manifest</summary><pre>{html.escape(json.dumps(manifest, indent=1))}</pre></details></section>"
    )
    page = PAGE.format(
        introduction=html.escape(_INTRODUCTION),
        terms=html.escape(_TERMS),
        contents="",
        sections="\n".join(parts),
    )
    path = directory / "report.html"
    records.write(path, page.encode())
    return path


def print_tables(directory: Path, console: Console) -> None:
    """The tables and the conclusion, on a terminal."""
    for table in tables(directory):
        print_table(table, console)
    console.print(conclusion(directory), markup=False, highlight=False, soft_wrap=True)


def print_log(log: pg.replay.ReplayLog, console: Console) -> None:
    """What a replay log holds: of what run it is, and its steps in ten parts."""
    header, found = log.header, log.records
    for name, value in header.items():
        if name != "config":
            console.print(
                f"{name}: {value if isinstance(value, str) else json.dumps(value)}",
                markup=False,
                highlight=False,
            )
    for name, value in header["config"].items():
        console.print(f"{name}: {json.dumps(value)}", markup=False, highlight=False)
    size = log.path.stat().st_size
    console.print(f"size: {size:,} bytes, {len(found):,} steps", markup=False, highlight=False)
    if not len(found):
        return
    rows = []
    for part in np.array_split(found, min(10, len(found))):
        derivatives = part["derivatives"].astype(np.float64)
        first, last = int(part["step"][0]), int(part["step"][-1])
        rates = {float(part["rate"][0]), float(part["rate"][-1])}
        rows.append(
            [
                f"{first} to {last}",
                f"{part['value'].mean():.4f}",
                " to ".join(f"{rate:.3g}" for rate in sorted(rates, reverse=True)),
                f"{np.sqrt(np.mean(np.square(derivatives))):.4g}",
            ]
        )
    print_table(
        Table("Steps", ["steps", "mean loss", "rate", "derivatives, root mean square"], rows),
        console,
    )


def replayed(config: dict[str, Any]) -> str:
    """Of what run a log is, in words."""
    plan = config["plan"]
    return f"{plan['steps']:,} steps of {plan['estimator']} on {plan['train']} of {config['model']}"
