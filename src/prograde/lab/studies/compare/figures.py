"""The figure of a comparison: held-out loss against steps, time and memory, with the frontiers."""

import statistics
from typing import Any

import numpy as np
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from prograde.lab.report import Figure
from prograde.lab.report.figures import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PINK,
    SKY,
    YELLOW,
    legend_below,
)
from prograde.lab.studies.compare.estimators import SAME_GRADIENT
from prograde.lab.studies.compare.summary import Comparison, Result
from prograde.lab.training.outcomes import points

# backprop is blue, as in all figures
_COLOURS = (ORANGE, GREEN, PINK, YELLOW, SKY, BLACK, "#8B6F47", "#7F3C8D")
_MARKERS = "osDv<>Ph"
_DASHES = {"sgd": "-", "adam": (0, (4, 1.5))}
_DOTS = {"sgd": ":", "adam": (0, (3, 1, 1, 1, 1, 1))}


def figure(comparison: Comparison) -> Figure | None:
    """Makes the figure: held-out loss against steps, time and memory, with the frontiers.

    Returns None if nothing was trained yet.
    """
    if not any(_curve(r) is not None for r in comparison.results):
        return None
    title = "held-out loss by steps, time and memory"
    return Figure(comparison.name, title, lambda canvas: _draw(comparison, canvas))


def _draw(comparison: Comparison, canvas: Canvas) -> None:
    canvas.set_size_inches(10, 4.1)
    by_steps, by_time, by_memory = canvas.subplots(1, 3, sharey=True)
    curves = []
    for result in comparison.results:
        curve, style = _curve(result), _style(comparison, result)
        if curve is None:
            continue
        steps, mean, low, high = curve
        line = {
            "color": style["color"],
            "linestyle": style["linestyle"],
            "linewidth": 1.5,
            "label": style["label"],
        }
        by_time.plot(steps[1:] * result.seconds, mean[1:], **line)
        curves.append((steps * result.seconds, mean))
        if result in comparison.trained:
            by_steps.plot(steps, mean, **line)
            by_steps.fill_between(steps, low, high, color=style["color"], alpha=0.13, linewidth=0)
    _draw_frontier(
        by_time,
        *_frontier(
            np.concatenate([c[0][1:] for c in curves]),
            np.concatenate([c[1][1:] for c in curves]),
        ),
    )
    _memory_panel(by_memory, comparison)
    # the start, which is the same for all, is cut off to leave room for the curves
    shown = np.concatenate([mean[1:] for _, mean in curves])
    by_steps.set_ylim(shown.min() / 1.15, shown.max() * 1.15)
    by_steps.set(xlabel="steps", ylabel="held-out loss (nats), mean over seeds", yscale="log")
    by_time.set(xlabel="time (s)", xscale="log")
    by_time.axvline(comparison.equal_seconds, color=GREY, linewidth=0.8, linestyle=":")
    by_memory.set(xlabel="XLA temporary memory (MiB)", xscale="log")
    by_memory.set_title(
        f"after {comparison.equal_seconds:.3g} s; dashed: forward pass", loc="left", fontsize=9
    )
    for axis in (by_steps.yaxis, by_time.xaxis, by_memory.xaxis):
        narrow = axis is by_steps.yaxis and shown.max() < 8 * shown.min()
        axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7) if narrow else (1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
    legend_below(canvas, by_time, columns=5)


def _style(comparison: Comparison, result: Result) -> dict[str, Any]:
    name = result.entry.estimator
    others = [
        e
        for e in comparison.manifest["config"]["estimators"]
        if e != "backprop" and e not in SAME_GRADIENT
    ]
    i = others.index(name) if name in others else 0
    several = len(comparison.manifest["config"]["optimizers"]) > 1
    reverse = name == "backprop" or name in SAME_GRADIENT
    return {
        "color": BLUE if reverse else _COLOURS[i % len(_COLOURS)],
        "marker": "^" if reverse else _MARKERS[i % len(_MARKERS)],
        "linestyle": (_DOTS if name in SAME_GRADIENT else _DASHES)[
            result.entry.optimizer if several else "sgd"
        ],
        "alpha": 0.55 if several and result.entry.optimizer == "adam" else 1,
        "hollow": name in SAME_GRADIENT,
        "label": comparison.label(result.entry),
    }


def _curve(result: Result) -> tuple[np.ndarray, ...] | None:
    """Returns steps, and mean, least and greatest loss of the seeds. None for fewer than two."""
    values: dict[int, list[float]] = {}
    for run in result.runs:
        for point in points(run):
            values.setdefault(point["step"], []).append(point["test_loss"])
    if len(values) < 2:
        return None
    steps = sorted(values)
    columns = [(statistics.fmean(values[t]), min(values[t]), max(values[t])) for t in steps]
    return np.array(steps), *np.array(columns).T


def _frontier(x: np.ndarray, loss: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the points that no other point beats in both x and loss, in order of x."""
    order = np.lexsort((loss, x))
    x, loss = x[order], loss[order]
    best = np.minimum.accumulate(loss)
    kept = np.concatenate([[True], best[1:] < best[:-1]])
    return x[kept], loss[kept]


def _draw_frontier(axes: Any, x: np.ndarray, loss: np.ndarray) -> None:
    axes.step(
        x, loss, where="post", color="#bbbbbb", linewidth=6, alpha=0.6, zorder=0, label="frontier"
    )


def _memory_panel(axes: Any, comparison: Comparison) -> None:
    placed = [
        (r, r.cost["temp_bytes"] / 2**20, r.at_equal_time)
        for r in comparison.results
        if r.at_equal_time
    ]
    if not placed:
        return
    _draw_frontier(
        axes,
        *_frontier(
            np.array([m for _, m, _ in placed]), np.array([loss.mean for *_, loss in placed])
        ),
    )
    for result, memory, loss in placed:
        style = _style(comparison, result)
        spread = [[loss.mean - loss.low], [loss.high - loss.mean]]
        face = "white" if style["hollow"] else style["color"]
        axes.errorbar(
            [memory],
            [loss.mean],
            yerr=spread,
            fmt=style["marker"],
            color=style["color"],
            markerfacecolor=face,
            markersize=7,
            elinewidth=1,
            alpha=style["alpha"],
        )
    axes.axvline(
        comparison.costs["bare"]["temp_bytes"] / 2**20,
        color=GREY,
        linewidth=0.8,
        linestyle="--",
    )
