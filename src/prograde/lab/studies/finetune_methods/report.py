"""The report of `prograde finetune-methods`, from records alone."""

import statistics
from typing import Any

from matplotlib.figure import Figure as Canvas

from prograde.lab.measure.timing import ratio_quartiles
from prograde.lab.report import Figure, Report, Section, Table
from prograde.lab.report.figures import BLACK, BLUE, GREEN, ORANGE, PINK, SKY, YELLOW
from prograde.lab.report.words import made_on, megabytes, warning
from prograde.lab.store import Store
from prograde.lab.studies.finetune_methods.methods import CURVES, OURS, STEPS

_INTRODUCTION = (
    "Methods of fine-tuning SmolLM2-135M: what a step costs, and what a run of a minute reaches."
)
_TERMS = (
    "The methods take turns, and a ratio is the median of the rounds' own ratios. The memory of "
    "each is measured in a process of its own. XLA temp is what a step needs in addition to "
    "weights and data. Figures of runs are the mean over seeds, with the least and the greatest."
)
_COLOURS = dict(
    zip(
        CURVES,
        (ORANGE, YELLOW, PINK, SKY, BLUE, BLACK, GREEN, "#7F3C8D", "#8B6F47"),
        strict=True,
    )
)
FORWARD = "bare forward"


def report(stores: list[Store]) -> Report:
    """Shows each part in a section."""
    sections = {"steps": _steps, "curves": _curves}
    return Report(
        "Methods of fine-tuning",
        _INTRODUCTION,
        _TERMS,
        [sections[store.config["part"]](store) for store in stores],
    )


def ratios(store: Store) -> dict[str, float]:
    """Median ratios of a step: of each method to a forward pass, and of ours to the others."""
    seconds = store.read("times")["seconds"]
    ratio = lambda a, b: ratio_quartiles(seconds[a], seconds[b])["median"]  # noqa: E731
    found = {name: ratio(name, FORWARD) for name in STEPS}
    return found | {f"ours / {name}": ratio(OURS, name) for name in STEPS if name != OURS}


def _steps(store: Store) -> Section:
    memory, times, found = store.read("memory"), store.read("times"), ratios(store)
    inference = memory["inference"]["peak_rss"]
    rows = [["inference", "1", "", megabytes(inference), "1"]]
    for name in STEPS:
        peak = memory[name]["peak_rss"]
        over = "" if peak is None else f"{peak / inference:.2f}"
        temp = megabytes(times["temp_bytes"][name])
        rows.append([name, f"{found[name]:.2f}", temp, megabytes(peak), over])
    columns = [
        "step on all weights, 4 × 64 tokens",
        "time over a forward pass",
        "XLA temp, MB",
        "peak RSS, MB",
        "over inference",
    ]
    ours = memory[OURS]["peak_rss"] / inference
    said = (
        f"A step of one direction takes {found['ours / backprop']:.2f} of backprop's time, "
        f"{found['ours / MeZO']:.2f} of MeZO's and {found['ours / MeZO, rank-one directions']:.2f} "
        f"of MeZO's with our rank-one directions, and {ours:.2f} of the memory of inference."
    )
    content = [Table("Time and memory of a step", columns, rows, 1), said]
    content += [text for text in (warning(times.get("busy")),) if text]
    return Section("steps", "What a step costs", content, made_on(store.manifest), store.manifest)


def _runs(store: Store) -> list[dict[str, Any]]:
    """The runs, in the order of the methods and seeds."""
    runs = [store.read(name) for name in store.names("runs")]
    return sorted(runs, key=lambda run: (list(CURVES).index(run["method"]), run["seed"]))


def _curves(store: Store) -> Section:
    zero = [store.read(name) for name in store.names("zero-shot")]
    runs = _runs(store)
    rows = []
    for title, key in (("zero-shot", "raw"), ("label bias repaired", "calibrated")):
        rows.append([title, "", "", *_figures([figures[key] for figures in zero])])
    for method in CURVES:
        mine = [run for run in runs if run["method"] == method]
        if not mine:
            continue
        last = [run["curve"][-1] for run in mine]
        steps, seconds = (
            f"{statistics.mean(point[name] for point in last):.0f}" for name in ("step", "seconds")
        )
        rows.append([f"{method} ({mine[0]['trained']:,})", steps, seconds, *_figures(last)])
    columns = ["method (numbers trained)", "steps", "seconds", "test accuracy, %", "loss", "AUC"]
    picture = Figure(
        "curves",
        "Training loss and held-out accuracy against time",
        lambda canvas: draw(runs, {str(i): figures for i, figures in enumerate(zero)}, canvas),
    )
    content = [Table("What the methods reach", columns, rows, 1), picture]
    return Section("curves", "What a run reaches", content, made_on(store.manifest), store.manifest)


def _figures(points: list[dict[str, Any]]) -> list[str]:
    return [
        _spread([100 * point["accuracy"] for point in points], ".1f"),
        _spread([point["loss"] for point in points], ".3f"),
        _spread([point["auc"] for point in points], ".3f"),
    ]


def _spread(values: list[float], form: str) -> str:
    """The mean, and the least and the greatest."""
    if len(values) == 1:
        return f"{values[0]:{form}} (one run)"
    return f"{statistics.mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def draw(runs: list[dict[str, Any]], zero: dict[str, Any], canvas: Canvas) -> None:
    """Draws training loss and held-out accuracy against the seconds of steps."""
    canvas.set_size_inches(9, 4.2)
    left, right = canvas.subplots(1, 2)
    for run in runs:
        colour = _COLOURS[run["method"]]
        label = run["method"] if run["seed"] == 0 else None
        curve, style = run["curve"], {"color": colour, "linewidth": 1, "marker": "."}
        seconds = [point["seconds"] for point in curve]
        left.plot(seconds, [point["train_loss"] for point in curve], label=label, **style)
        tested = [point for point in curve if "accuracy" in point]
        start = zero[str(run["seed"])]["calibrated"]["accuracy"]
        accuracy = [100 * a for a in (start, *(point["accuracy"] for point in tested))]
        right.plot([0.1, *(point["seconds"] for point in tested)], accuracy, **style)
    left.set(xscale="log", xlabel="seconds of steps", ylabel="training loss")
    right.set(xscale="log", xlabel="seconds of steps", ylabel="held-out accuracy, %")
    handles, labels = left.get_legend_handles_labels()
    canvas.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
