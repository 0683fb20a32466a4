"""The figure of an experiment. Methods have the same names as in the tables."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from prograde.lab.models import Surface
from prograde.lab.report import Figure
from prograde.lab.report.figures import BLACK, BLUE, GREEN, ORANGE, PINK, legend_below
from prograde.lab.studies.reproduce.summary import Summary
from prograde.lab.training.outcomes import Outcome, Record

STYLE: dict[str, dict[str, Any]] = {
    "bare": {"color": BLACK, "linestyle": ":", "marker": "v"},
    "forward": {"color": ORANGE, "linestyle": "-", "marker": "o"},
    "low-rank": {"color": GREEN, "linestyle": "-.", "marker": "s"},
    "backprop": {"color": BLUE, "linestyle": "--", "marker": "^"},
    "checkpointed": {"color": PINK, "linestyle": (0, (1, 1)), "marker": "D"},
}
_DRAWN_PATHS = 5  # trajectories of a method on one plane


def figure(summary: Summary) -> Figure | None:
    """Makes the figure of an experiment, or None if there is nothing to draw yet."""
    if summary.depths:
        draw = _depth
    elif not summary.outcomes:
        return None
    else:
        draw = _trajectories if isinstance(summary.experiment.subject, Surface) else _curves
    experiment = summary.experiment
    return Figure(experiment.name, experiment.title, lambda canvas: draw(summary, canvas))


def _style(method: str, *, marker: bool = False) -> dict[str, Any]:
    style = STYLE[method] | {"label": method}
    return style if marker else {k: v for k, v in style.items() if k != "marker"}


def _settings(summary: Summary) -> list[str]:
    return list(dict.fromkeys(outcome.setting for outcome in summary.outcomes))


def _setting_title(summary: Summary, setting: str) -> str:
    if setting == "tuned":
        rates = ", ".join(
            f"{o.method} {o.learning_rate:.2g}" for o in summary.outcomes if o.setting == "tuned"
        )
        return f"rates found by search: {rates}"
    rate = next(o.learning_rate for o in summary.outcomes if o.setting == setting)
    return f"the paper's rate: {rate:g}"


def _points(run: Record) -> Record:
    return [line for line in run if line["kind"] == "point"]


def _band(axes: Any, outcome: Outcome, x_of: Any, key: str) -> None:
    """Draws the mean over the seeds that reached a step, with a band from least to greatest."""
    values: dict[int, list[float]] = {}
    for run in outcome.runs:
        for point in _points(run):
            if point.get(key) is not None:
                values.setdefault(point["step"], []).append(point[key])
    steps = sorted(values)
    x = x_of(np.array(steps))
    axes.plot(x, [np.mean(values[t]) for t in steps], **_style(outcome.method), linewidth=1.6)
    low, high = [min(values[t]) for t in steps], [max(values[t]) for t in steps]
    axes.fill_between(x, low, high, color=STYLE[outcome.method]["color"], alpha=0.15, linewidth=0)
    for divergence in outcome.diverged:  # a cross marks a divergence
        before = max((t for t in steps if t <= divergence.step), default=None)
        if before is not None:
            y = values[before][0] if len(values[before]) == 1 else float(np.mean(values[before]))
            axes.plot(
                x_of(np.array([before])), [y], marker="x", color=STYLE[outcome.method]["color"]
            )


def _curves(summary: Summary, canvas: Canvas) -> None:
    settings = _settings(summary)
    canvas.set_size_inches(10, 2.9 * len(settings) + 0.5)
    panels = canvas.subplots(len(settings), 3, squeeze=False)
    cost = {name: figures["seconds"]["median"] for name, figures in summary.costs.items()}
    for row, setting in zip(panels, settings, strict=True):
        for outcome in (o for o in summary.outcomes if o.setting == setting):
            _band(row[0], outcome, lambda steps: steps, "test_loss")
            _band(row[1], outcome, lambda steps, o=outcome: steps * cost[o.method], "test_loss")
            _band(row[2], outcome, lambda steps, o=outcome: steps * cost[o.method], "test_accuracy")
        row[0].set(xlabel="iteration", ylabel="held-out loss (nats)", yscale="log")
        row[1].set(xlabel="time (s)", ylabel="held-out loss (nats)", yscale="log")
        row[2].set(xlabel="time (s)", ylabel="held-out accuracy", ylim=(0, 1))
        for axes in row[:2]:
            axes.yaxis.set_major_formatter(ScalarFormatter())
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_minor_formatter(NullFormatter())
        row[0].set_title(_setting_title(summary, setting), loc="left", fontsize=9)
    legend_below(canvas, panels[0, 0])


def _trajectories(summary: Summary, canvas: Canvas) -> None:
    surface = summary.experiment.subject
    assert isinstance(surface, Surface)
    settings = _settings(summary)
    canvas.set_size_inches(10, 3.6 * len(settings))
    panels = canvas.subplots(len(settings), 2, squeeze=False, width_ratios=(1.15, 1))
    (x_low, x_high), (y_low, y_high) = surface.window
    x, y = np.meshgrid(np.linspace(x_low, x_high, 160), np.linspace(y_low, y_high, 160))
    height = np.asarray(jax.vmap(surface.fun)(jnp.stack([x.ravel(), y.ravel()], -1))).reshape(
        x.shape
    )
    for row, setting in zip(panels, settings, strict=True):
        plane, loss = row
        levels = np.geomspace(max(height.min(), 1e-2), height.max(), 14)
        plane.contour(x, y, height, levels=levels, colors="#bbbbbb", linewidths=0.6)
        for outcome in (o for o in summary.outcomes if o.setting == setting):
            style = _style(outcome.method)
            curves: dict[int, list[float]] = {}
            for i, run in enumerate(outcome.runs):
                points = _points(run)[1:]
                if i < _DRAWN_PATHS:
                    path = np.array([surface.start, *(v for p in points for v in p["visited"])])
                    plane.plot(path[:, 0], path[:, 1], **style | {"linewidth": 0.9, "alpha": 0.8})
                losses = [(p["every"], v) for p in points for v in p["losses"]]
                for j, (every, v) in enumerate(losses):
                    curves.setdefault((1 + j) * every, []).append(max(v, 1e-30))
            steps = sorted(curves)
            loss.plot(steps, [np.median(curves[t]) for t in steps], **style, linewidth=1.4)
            low, high = [min(curves[t]) for t in steps], [max(curves[t]) for t in steps]
            loss.fill_between(
                steps, low, high, color=STYLE[outcome.method]["color"], alpha=0.15, linewidth=0
            )
        plane.plot(*surface.start, "o", color="black", markersize=5)
        plane.annotate("start", surface.start, xytext=(5, 5), textcoords="offset points")
        plane.plot(*surface.minimum, "*", color="black", markersize=10)
        plane.annotate("minimum", surface.minimum, xytext=(5, -12), textcoords="offset points")
        plane.set(xlabel="x", ylabel="y", xlim=(x_low, x_high), ylim=(y_low, y_high))
        plane.set_title(_setting_title(summary, setting), loc="left", fontsize=9)
        loss.set(xlabel="iteration", ylabel="f, median and range of seeds", yscale="log")
    legend_below(canvas, panels[0, 1])


def _depth(summary: Summary, canvas: Canvas) -> None:
    canvas.set_size_inches(10, 3.6)
    time, ratio, memory = canvas.subplots(1, 3)
    depths = sorted(summary.depths)
    for method in STYLE:
        if any(method not in summary.depths[d]["costs"] for d in depths):
            continue
        style = _style(method, marker=True) | {"linewidth": 1.4, "markersize": 4}
        costs = [summary.depths[d]["costs"][method] for d in depths]
        time.plot(depths, [1e3 * c["seconds"]["median"] for c in costs], **style)
        if method != "bare":
            ratio.plot(depths, [c["ratio"]["median"] for c in costs], **style)
        memory.plot(
            depths,
            [(summary.depths[d]["memory"][method]["temp_bytes"] or np.nan) / 2**20 for d in depths],
            **style,
        )
    time.set(ylabel="time a step (ms)", yscale="log")
    ratio.set(ylabel="step over bare forward pass", ylim=(0, None))
    memory.set(ylabel="XLA temporary memory (MiB)", yscale="log")
    for axes in (time, ratio, memory):
        axes.set(xlabel="layers", xscale="log")
        axes.set_xticks(depths, [str(d) for d in depths])
        axes.xaxis.set_minor_formatter(NullFormatter())
    legend_below(canvas, time)
