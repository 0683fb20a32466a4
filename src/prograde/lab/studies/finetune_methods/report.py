"""Tables and figure of docs/finetune.md from the records: `python benchmarks/finetune_page.py` writes them between the marks of the page."""

import io
import statistics
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from prograde.lab import figures, records

ROOT = Path(__file__).parents[1]
PAGE, PICTURE = ROOT / "docs" / "finetune.md", ROOT / "docs" / "finetune.svg"
BEGIN, END = "<!-- {}: begin, written by benchmarks/finetune_page.py -->", "<!-- {}: end -->"
_COLOURS = {
    "forward gradient, last norm, K = 32": "#D55E00",
    "the same with all 2,878 examples": "#E69F00",
    "MeZO, last norm, K = 32": "#CC79A7",
    "backprop, last norm": "#56B4E9",
    "backprop, all weights": "#0072B2",
    "backprop, LoRA": "#000000",
    "forward gradient, layers 12 to 28": "#009E73",
    "MeZO (rank one), layers 12 to 28": "#7F3C8D",
    "forward gradient, LOZO factors": "#8B6F47",
}


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def steps_table(record: dict[str, Any]) -> str:
    inference = record["memory"]["inference"]["peak_rss"]
    rows = [["inference", "1", "", f"{inference / 1e6:,.0f}", "1"]]
    for name, ratio in record["over_forward"].items():
        peak = record["memory"][name]["peak_rss"]
        temp = f"{record['temp_bytes'][name] / 1e6:,.0f}"
        rows.append([name, f"{ratio:.2f}", temp, f"{peak / 1e6:,.0f}", f"{peak / inference:.2f}"])
    columns = [
        "step on all weights, 4 × 64 tokens",
        "time over a forward pass",
        "XLA temp, MB",
        "peak RSS, MB",
        "over inference",
    ]
    return markdown(columns, rows)


def spread(values: list[float], form: str) -> str:
    """Mean, and the least and the greatest."""
    if len(values) == 1:
        return form.format(values[0]) + " (one run)"
    return f"{form.format(statistics.mean(values))} ({form.format(min(values))} to {form.format(max(values))})"


def curves_table(record: dict[str, Any]) -> str:
    zero = record["zero_shot"].values()
    rows = []
    for title, key in (("zero-shot", "raw"), ("label bias repaired", "calibrated")):
        found = [z[key] for z in zero]
        figures_ = [[f[name] for f in found] for name in ("accuracy", "loss", "auc")]
        rows.append([title, "", "", *_figures(figures_)])
    for method in record["config"]["methods"]:
        runs = [run for run in record["runs"] if run["method"] == method]
        if not runs:
            continue
        last = [run["curve"][-1] for run in runs]
        figures_ = [[point[name] for point in last] for name in ("accuracy", "loss", "auc")]
        steps = spread([point["step"] for point in last], "{:.0f}").split(" (")[0]
        seconds = spread([point["seconds"] for point in last], "{:.0f}").split(" (")[0]
        rows.append([f"{method} ({runs[0]['trained']:,})", steps, seconds, *_figures(figures_)])
    return markdown(
        ["method (numbers trained)", "steps", "seconds", "test accuracy, %", "loss", "AUC"], rows
    )


def _figures(found: list[list[float]]) -> list[str]:
    accuracy, loss, auc = found
    return [
        spread([100 * x for x in accuracy], "{:.1f}"),
        spread(loss, "{:.3f}"),
        spread(auc, "{:.3f}"),
    ]


def draw(record: dict[str, Any]) -> str:
    """Training loss and held-out accuracy against the seconds of steps."""
    with rc_context(figures._RC):
        fig = Figure(figsize=(9, 4.2), layout="constrained")
        left, right = fig.subplots(1, 2)
        for run in record["runs"]:
            colour = _COLOURS[run["method"]]
            label = run["method"] if run["seed"] == 0 else None
            seconds = [point["seconds"] for point in run["curve"]]
            left.plot(
                seconds,
                [p["train_loss"] for p in run["curve"]],
                color=colour,
                label=label,
                linewidth=1,
                marker=".",
            )
            start = record["zero_shot"][str(run["seed"])]["calibrated"]["accuracy"]
            held_out = [(0.1, start)] + [
                (p["seconds"], p["accuracy"]) for p in run["curve"] if "accuracy" in p
            ]
            right.plot(
                [s for s, _ in held_out],
                [100 * a for _, a in held_out],
                color=colour,
                linewidth=1,
                marker=".",
            )
        left.set(xscale="log", xlabel="seconds of steps", ylabel="training loss")
        right.set(xscale="log", xlabel="seconds of steps", ylabel="held-out accuracy, %")
        fig.legend(
            *left.get_legend_handles_labels(),
            loc="outside lower center",
            ncols=3,
            frameon=False,
            fontsize=8,
        )
        buffer = io.StringIO()
        fig.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def between(page: str, name: str, content: str) -> str:
    begin, end = BEGIN.format(name), END.format(name)
    head, rest = page.split(begin)
    return f"{head}{begin}\n\n{content}\n\n{end}{rest.split(end)[1]}"


def written(page: str) -> str:
    """The page with what the records say."""
    page = between(
        page, "steps", steps_table(records.read_json(ROOT / "records" / "finetune-steps.json"))
    )
    return between(
        page, "curves", curves_table(records.read_json(ROOT / "records" / "finetune-curves.json"))
    )


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
    PICTURE.write_text(draw(records.read_json(ROOT / "records" / "finetune-curves.json")))
