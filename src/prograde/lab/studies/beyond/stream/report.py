"""What `prograde beyond stream` shows of its figures."""

import math
from typing import Any

import numpy as np

from prograde.lab.report import Table

TITLE = "Streams: what is asked for later than a window is long"


def tables(record: dict[str, Any]) -> list[Table]:
    """Makes a table for each task."""
    found = []
    for task in record["tasks"].values():
        rows = []
        for method in task["methods"].values():
            runs = _losses(method)
            spread = "" if len(runs) == 1 else f" ({min(runs):.3g} to {max(runs):.3g})"
            steps = np.mean([run["steps"] for run in method["runs"]])
            loss = f"{np.mean(runs):.3g}{spread}"
            rows.append(
                [
                    method["title"],
                    f"{method['rate']:g}",
                    f"{steps:,.0f}",
                    loss,
                    _share(runs, task),
                ]
            )
        rates = len(record["setting"]["rates"])
        title = f"{task['title']}; {task['seconds']:g} s each, Adam at the best of {rates} rates"
        columns = [
            "method",
            "rate",
            "steps",
            f"loss at the end ({task['unit']})",
            "of guessing",
        ]
        found.append(Table(title, columns, rows, unbroken=1))
    return found


def conclusion(record: dict[str, Any]) -> str:
    """Says which method wins on which task."""
    said = []
    for kind, task in record["tasks"].items():
        runs = {name: _losses(m) for name, m in task["methods"].items()}
        ends = {name: float(np.mean(losses)) for name, losses in runs.items()}
        windows = {name: m["window"] for name, m in task["methods"].items() if m["window"]}
        online = min((n for n in ends if n not in windows), key=ends.__getitem__)
        title = task["title"].capitalize()
        short = [n for n, w in windows.items() if w < task["episode"]]
        if kind != "characters" and short:  # a text has no delay to compare a window with
            best = min(short, key=ends.__getitem__)
            said.append(
                f"{title}: {online} ends at {ends[online]:.3g}, and backprop with the best window "
                f"shorter than an episode ({windows[best]} steps) at {ends[best]:.3g}: "
                f"{_verdict(online, runs, best)}. Guessing gives {task['guessing']:.3g}."
            )
            title = "With any window"
        best = min(windows, key=ends.__getitem__)
        said.append(
            f"{title}: {online} ends at {ends[online]:.3g}, truncated backprop with "
            f"{windows[best]} steps at {ends[best]:.3g}: {_verdict(online, runs, best)}."
        )
    at_edge = [
        f"{name} ({kind})"
        for kind, task in record["tasks"].items()
        for name, m in task["methods"].items()
        if len(m["trials"]) > 2
        and m["rate"] in (min(map(float, m["trials"])), max(map(float, m["trials"])))
    ]
    if at_edge:
        said.append(f"The best rate is at the edge of those tried for {', '.join(at_edge)}.")
    return " ".join(said)


def draw(record: dict[str, Any], figure: Any) -> None:
    """Draws loss against time, with a panel for each task."""
    tasks = record["tasks"]
    figure.set_size_inches(10, 3.6)
    panels = figure.subplots(1, len(tasks), squeeze=False)[0]
    blues = iter(("#9ecae1", "#6baed6", "#3182bd", "#08519c", "#08306b"))
    online = iter(("#D55E00", "#009E73", "#E69F00", "#CC79A7"))
    names = next(iter(tasks.values()))["methods"]
    colours = {name: next(blues if m["window"] else online) for name, m in names.items()}
    for axes, task in zip(panels, tasks.values(), strict=True):
        for name, method in task["methods"].items():
            run = method["runs"][0]
            style = {"linestyle": "--"} if method["window"] else {}
            seconds, losses = np.array(run["curve"], float).T
            axes.plot(
                seconds,
                np.maximum(losses, 1e-4),
                color=colours[name],
                label=name,
                linewidth=1.4,
                **style,
            )
        axes.axhline(task["guessing"], color="#666666", linewidth=0.8, linestyle=":")
        axes.annotate(
            "guessing",
            (0, task["guessing"]),
            xytext=(3, 3),
            textcoords="offset points",
            fontsize=7,
            color="#666666",
        )
        losses = [
            loss
            for m in task["methods"].values()
            for _, loss in m["runs"][0]["curve"]
            if loss is not None
        ]
        scale = "log" if max(losses) > 10 * max(min(losses), 1e-4) else "linear"
        axes.set(xlabel="time (s)", ylabel=f"loss ({task['unit']})", yscale=scale)
        axes.set_title(task["title"], fontsize=8, loc="left", wrap=True)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(8, len(labels)), fontsize=8
    )


def _losses(method: dict[str, Any]) -> list[float]:
    """Returns the losses at the end of the runs, infinite for runs that diverged."""
    return [math.inf if run["loss"] is None else run["loss"] for run in method["runs"]]


def _verdict(ours: str, runs: dict[str, list[float]], theirs: str) -> str:
    """Says whether our losses are lower. Ranges that overlap show no clear difference."""
    if max(runs[ours]) < min(runs[theirs]):
        return f"{ours} is lower"
    return f"{ours} is higher" if min(runs[ours]) > max(runs[theirs]) else "no clear difference"


def _share(runs: list[float], task: dict[str, Any]) -> str:
    """Returns the mean loss over that of guessing."""
    return f"{np.mean(runs) / task['guessing']:.2f}"
