"""Pictures, made from summaries of records. Colours are those of Okabe and Ito, which colour-blind readers can tell apart."""

import io
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from prograde.lab.models import Surface
from prograde.lab.summary import Outcome, Summary

matplotlib.use("Agg")

STYLE: dict[str, dict[str, Any]] = {
    "bare": {"color": "#000000", "linestyle": ":", "marker": "v", "label": "bare forward pass"},
    "forward": {
        "color": "#D55E00",
        "linestyle": "-",
        "marker": "o",
        "label": "forward gradient (normal, the paper's)",
    },
    "low-rank": {
        "color": "#009E73",
        "linestyle": "-.",
        "marker": "s",
        "label": "forward gradient (rank one)",
    },
    "backprop": {"color": "#0072B2", "linestyle": "--", "marker": "^", "label": "backprop"},
    "checkpointed": {
        "color": "#CC79A7",
        "linestyle": (0, (1, 1)),
        "marker": "D",
        "label": "backprop, checkpointed",
    },
}
_RC: Any = {
    "font.size": 9,
    "font.family": "DejaVu Sans",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
    "svg.hashsalt": "prograde",
    "svg.fonttype": "path",
}


_DRAWN_PATHS = 5  # trajectories of a method on one plane


def _style(method: str, *, marker: bool = False) -> dict[str, Any]:
    style = dict(STYLE[method])
    return style if marker else {k: v for k, v in style.items() if k != "marker"}


def figure(summary: Summary) -> str | None:
    """The figure of an experiment as SVG text, or `None` where there is nothing to draw yet."""
    with matplotlib.rc_context(_RC):
        if summary.depths:
            fig = _depth(summary)
        elif not summary.outcomes:
            return None
        elif isinstance(summary.experiment.subject, Surface):
            fig = _trajectories(summary, summary.experiment.subject)
        else:
            fig = _curves(summary)
        buffer = io.StringIO()
        fig.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _settings(summary: Summary) -> list[str]:
    return list(dict.fromkeys(outcome.setting for outcome in summary.outcomes))


def _setting_title(summary: Summary, setting: str) -> str:
    if setting == "tuned":
        rates = ", ".join(
            f"{o.method} {o.learning_rate:.2g}" for o in summary.outcomes if o.setting == "tuned"
        )
        return f"rates found by search: {rates}"
    return f"the paper's rate: {next(o.learning_rate for o in summary.outcomes if o.setting == setting):g}"


def _points(run: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line for line in run if line["kind"] == "point"]


def _band(axes: Any, outcome: Outcome, x_of: Any, key: str) -> None:
    """Mean over seeds with a band from the least to the greatest, at each step over the seeds that got there."""
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
    for _, step in outcome.diverged:  # a cross where a seed diverged
        before = max((t for t in steps if t <= step), default=None)
        if before is not None:
            y = values[before][0] if len(values[before]) == 1 else float(np.mean(values[before]))
            axes.plot(
                x_of(np.array([before])), [y], marker="x", color=STYLE[outcome.method]["color"]
            )


def _curves(summary: Summary) -> Figure:
    settings = _settings(summary)
    fig = Figure(figsize=(10, 2.9 * len(settings) + 0.5), layout="constrained")
    panels = fig.subplots(len(settings), 3, squeeze=False)
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
    _legend(fig, panels[0, 0])
    return fig


def _legend(fig: Figure, axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    fig.legend(
        handles, labels, loc="outside lower center", ncols=len(labels), fontsize=9, handlelength=3.5
    )


def _trajectories(summary: Summary, surface: Surface) -> Figure:
    settings = _settings(summary)
    fig = Figure(figsize=(10, 3.6 * len(settings)), layout="constrained")
    panels = fig.subplots(len(settings), 2, squeeze=False, width_ratios=(1.15, 1))
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
            # on a function without matrices a rank-one tangent is a vector of signs
            label = {"label": "forward gradient (signs)"} if outcome.method == "low-rank" else {}
            style = _style(outcome.method) | label
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
    _legend(fig, panels[0, 1])
    return fig


def _depth(summary: Summary) -> Figure:
    fig = Figure(figsize=(10, 3.6), layout="constrained")
    time, ratio, memory = fig.subplots(1, 3)
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
    _legend(fig, time)
    return fig
