"""Tables, figures and the page of `prograde compare`, from its records alone."""

import html
import io
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from rich.console import Console

from prograde.lab import figures, records
from prograde.lab.compare import POINTS, SAME_GRADIENT
from prograde.lab.compare_summary import Comparison, Result, read
from prograde.lab.report import (
    PAGE,
    Table,
    html_table,
    mebibytes,
    print_table,
    ratio_text,
    spread_text,
)
from prograde.lab.summary import Spread, points

_INTRODUCTION = (
    "Gradient estimators beside each other on one model: what a step costs, how noisy and how biased it is, and what training "
    "with it reaches, each with a learning rate of its own. All figures were measured here."
)
_TERMS = """R is the time of a full training step over that of a bare forward pass on the same batch: all take turns in one
run, and R is the median of the rounds' ratios. XLA temp is what XLA says that a step needs beside parameters, data and
optimizer. Bias and variance are those of the estimator at the start of the first seed, on its first batch, over independent
estimates g of one gradient (of an estimator that learns, after it has learned at this point): cosine is that of a single g; projection is E g · grad / |grad|², 1 without bias; bias is
|E g − grad|² / |grad|² and is free of the variance of the average, and “< x” where none is seen but up to x might
not be; variance is E |g − E g|² / |grad|²; the rate
bound is the learning rate of SGD above which the expected loss no longer falls, to second order (an estimate of large variance
is long, and leaves the range of the second order long before; “unclear” where noise hides the curvature). “± x” is one standard error.
Where no rates were given, the rate is found for each by the same number of trials of the same length, by the mean loss over the second half of a trial on a
validation part of the training data.
Losses are held-out, on the data's test part: means over seeds, with the least and the greatest. Time is steps times the measured
median time of a step, evaluation left out; the equal time is that of the shortest run, and losses at it are interpolated between
the points of a curve. T is the time to reach the best held-out loss of backprop with the same
optimizer, over the time that the faster of the backprops compared takes, the median over the seeds; “> x” means that
the median seed does not get there in x times backprop's time. A frontier joins what nothing else beats in both respects."""

_UNEQUAL = (
    "At equal time, runs of slower steps have not come to the end of their schedule; T and the losses after equal steps are "
    "free of that."
)

# Okabe and Ito; backprop has the blue that it has everywhere
_COLOURS = ("#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8B6F47", "#7F3C8D")
_MARKERS = "osDv<>Ph"
_ROUNDING = 1e-6  # of squares relative to that of the gradient
_DASHES = {"sgd": "-", "adam": (0, (4, 1.5))}
_DOTS = {"sgd": ":", "adam": (0, (3, 1, 1, 1, 1, 1))}


def cost_table(comparison: Comparison) -> Table:
    """What a step costs."""
    rows = []
    for name, cost in comparison.costs.items():
        result = next((r for r in comparison.results if r.entry.name == name), None)
        seconds, ratio = cost["seconds"], cost["ratio"]
        rows.append(
            [
                "bare forward pass" if result is None else comparison.label(result.entry),
                f"{1e3 * seconds['median']:.3g} ({1e3 * seconds['low']:.3g} to {1e3 * seconds['high']:.3g})",
                f"{ratio['median']:.2f}",
                mebibytes(cost["temp_bytes"]),
            ]
        )
    rounds = comparison.costs["bare"]["seconds"]["n"]
    columns = ["estimator", "ms a step (quartiles)", "R", "XLA temp, MiB"]
    return Table(f"{comparison.title}: cost of a step ({rounds} rounds)", columns, rows)


def noise_table(comparison: Comparison) -> Table:
    """Bias and variance of each estimator."""
    rows, shown = [], set()
    for result in comparison.results:
        d = result.diagnosis
        if result.entry.estimator in shown:
            continue
        shown.add(result.entry.estimator)
        rows.append(
            [
                result.entry.estimator,
                f"{d['cosine']['value']:.2g}",
                _measured(d["projection"]),
                _bias(d),
                _measured(d["variance"]),
                _bound(d["learning_rate_bound"]),
            ]
        )
    columns = ["estimator", "cosine", "projection", "bias", "variance", "rate bound"]
    parameters = comparison.results[0].diagnosis["num_parameters"]
    numbers = ", ".join(
        f"{n} of {e}" for e, n in comparison.manifest["config"]["estimates"].items()
    )
    return Table(
        f"Bias and variance at the start; {parameters:,} parameters; estimates: {numbers}",
        columns,
        rows,
    )


def _measured(x: dict[str, Any]) -> str:
    if abs(x["value"]) < _ROUNDING:
        return "0"
    return f"{x['value']:.2g} ± {x['error']:.0g}" if x["error"] > _ROUNDING else f"{x['value']:.3g}"


def _bound(x: dict[str, Any]) -> str:
    """A rate bound; unclear where its curvature is lost in noise."""
    return "unclear" if x["value"] is None or x["error"] > x["value"] / 2 else _measured(x)


def _bias(diagnosis: dict[str, Any]) -> str:
    bias = diagnosis["bias_squared"]
    if diagnosis["bias_detected"]:
        return _measured(bias)
    least = bias["value"] + 4 * bias["error"]
    return f"< {least:.2g}" if least > _ROUNDING else "0"


def result_table(comparison: Comparison) -> Table:
    """What each reached."""
    rows = []
    for result in comparison.results:
        if (o := result.outcome) is None:
            continue
        ended = f"{o.finished} of {len(o.runs)}" if o.finished < len(o.runs) else str(len(o.runs))
        rows.append(
            [
                comparison.label(result.entry),
                f"{o.learning_rate:.2g}{' (edge)' if result.at_edge else ''}",
                spread_text(o.final_loss),
                spread_text(o.final_accuracy, percent=True),
                spread_text(result.at_equal_time),
                ratio_text(o),
                ended + (f"; {len(o.diverged)} diverged" if o.diverged else ""),
            ]
        )
    after = f"loss after {comparison.steps} steps"
    columns = [
        "estimator",
        "rate",
        after,
        "accuracy",
        f"loss after {comparison.equal_seconds:.3g} s",
        "T",
        "seeds",
    ]
    return Table("Held-out loss at equal steps and at equal time", columns, rows)


def tables(comparison: Comparison) -> list[Table]:
    """All tables."""
    return [cost_table(comparison), noise_table(comparison), result_table(comparison)]


def leaf_table(result: Result) -> Table:
    """Signal to noise of an estimator, leaf by leaf."""
    rows = []
    for leaf in result.diagnosis["leaves"]:
        ratio, bias = leaf["signal_to_noise"], leaf["bias_squared"]
        rows.append(
            [
                leaf["path"],
                f"{leaf['size']:,}",
                f"{leaf['gradient_share']:.1%}",
                "no noise"
                if ratio["value"] is None
                else f"{ratio['value']:.2g} ± {ratio['error']:.0g}",
                "–" if bias["value"] is None else _measured(bias),
            ]
        )
    columns = ["leaf", "size", "share of |grad|²", "signal to noise", "bias"]
    return Table(f"{result.entry.estimator}: leaf by leaf", columns, rows)


def conclusion(comparison: Comparison) -> str:
    """What the figures say, in a few sentences."""
    final = [(r, r.outcome.final_loss) for r in comparison.trained if r.outcome]
    said = [
        _ranking(comparison, f"After {comparison.steps} steps each", final),
        _ranking(
            comparison,
            f"After {comparison.equal_seconds:.3g} s of steps each",
            [(r, r.at_equal_time) for r in comparison.results],
        ),
        _UNEQUAL if comparison.falls_to_zero else "",
    ]
    biased = dict.fromkeys(
        r.entry.estimator for r in comparison.results if r.diagnosis["bias_detected"]
    )
    said.append(f"Bias was seen in {', '.join(biased)}." if biased else "Bias was seen in none.")
    if edges := [comparison.label(r.entry) for r in comparison.trained if r.at_edge]:
        said.append(
            f"The rate found for {', '.join(edges)} is at the edge of the search: a better one may lie beyond."
        )
    return " ".join(filter(None, said))


def _ranking(comparison: Comparison, when: str, losses: list[tuple[Result, Spread | None]]) -> str:
    found = sorted(
        ((loss.mean, comparison.label(r.entry)) for r, loss in losses if loss), key=lambda x: x[0]
    )
    if not found:
        return ""
    rest = (
        f" ({'; '.join(f'{label} {loss:.3g}' for loss, label in found[1:])})" if found[1:] else ""
    )
    return f"{when}, the least held-out loss is that of {found[0][1]}, {found[0][0]:.3g}{rest}."


def figure(comparison: Comparison) -> str | None:
    """Held-out loss against steps, time and memory, with the frontiers, as SVG text; `None` before anything was trained."""
    if not any(r.runs for r in comparison.results):
        return None
    with rc_context(figures._RC):
        fig = Figure(figsize=(10, 4.1), layout="constrained")
        by_steps, by_time, by_memory = fig.subplots(1, 3, sharey=True)
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
                by_steps.fill_between(
                    steps, low, high, color=style["color"], alpha=0.13, linewidth=0
                )
        _draw_frontier(
            by_time,
            *_frontier(
                np.concatenate([c[0][1:] for c in curves]),
                np.concatenate([c[1][1:] for c in curves]),
            ),
        )
        _memory_panel(by_memory, comparison)
        # the start, the same for all, would leave the curves no room
        shown = np.concatenate([mean[1:] for _, mean in curves])
        by_steps.set_ylim(shown.min() / 1.15, shown.max() * 1.15)
        by_steps.set(xlabel="steps", ylabel="held-out loss (nats), mean over seeds", yscale="log")
        by_time.set(xlabel="time (s)", xscale="log")
        by_time.axvline(comparison.equal_seconds, color="#888888", linewidth=0.8, linestyle=":")
        by_memory.set(xlabel="XLA temporary memory (MiB)", xscale="log")
        by_memory.set_title(
            f"after {comparison.equal_seconds:.3g} s; dashed: forward pass", loc="left", fontsize=9
        )
        for axis in (by_steps.yaxis, by_time.xaxis, by_memory.xaxis):
            narrow = axis is by_steps.yaxis and shown.max() < 8 * shown.min()
            axis.set_major_locator(
                LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7) if narrow else (1, 2, 5))
            )
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_formatter(NullFormatter())
        handles, labels = by_time.get_legend_handles_labels()
        fig.legend(
            handles, labels, loc="outside lower center", ncols=min(len(labels), 6), handlelength=3.2
        )
        buffer = io.StringIO()
        fig.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


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
        "color": "#0072B2" if reverse else _COLOURS[i % len(_COLOURS)],
        "marker": "^" if reverse else _MARKERS[i % len(_MARKERS)],
        "linestyle": (_DOTS if name in SAME_GRADIENT else _DASHES)[
            result.entry.optimizer if several else "sgd"
        ],
        "alpha": 0.55 if several and result.entry.optimizer == "adam" else 1,
        "hollow": name in SAME_GRADIENT,
        "label": comparison.label(result.entry),
    }


def _curve(result: Result) -> tuple[np.ndarray, ...] | None:
    """Steps, and mean, least and greatest loss over the seeds that got there."""
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
    """The points that no other beats in both: the least loss so far, in the order of x."""
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
            [memory], [loss.mean], yerr=spread, fmt=style["marker"], color=style["color"], markerfacecolor=face,
            markersize=7, elinewidth=1, alpha=style["alpha"],
        )  # fmt: skip
    axes.axvline(
        comparison.costs["bare"]["temp_bytes"] / 2**20,
        color="#888888",
        linewidth=0.8,
        linestyle="--",
    )


def print_tables(comparison: Comparison, console: Console) -> None:
    """The tables and what they say, on the terminal."""
    for table in tables(comparison):
        print_table(table, console)
    console.print(conclusion(comparison), highlight=False, markup=False)


def build(directory: Path) -> Path:
    """Writes `report.html` beside the records; returns its path."""
    comparison = read(directory)
    parts = [
        f"<section><h2>{html.escape(comparison.title)}</h2><p>{html.escape(conclusion(comparison))}</p>"
    ]
    if svg := figure(comparison):
        parts.append(
            f'<figure role="img" aria-label="held-out loss by steps, time and memory">{svg}</figure>'
        )
    parts += [html_table(table) for table in tables(comparison)]
    shown = {r.entry.estimator: r for r in reversed(comparison.results)}
    leaves = "\n".join(
        html_table(leaf_table(shown[name])) for name in comparison.manifest["config"]["estimators"]
    )
    parts.append(f"<details><summary>Signal to noise, leaf by leaf</summary>{leaves}</details>")
    parts.append(f"<p class=small>{html.escape(made_on(comparison))}</p>")
    parts.append(
        f"<details><summary>Manifest</summary><pre>{html.escape(json.dumps(comparison.manifest, indent=1))}</pre></details></section>"
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


def made_on(comparison: Comparison) -> str:
    """Where the numbers come from, in a sentence."""
    config, places = comparison.manifest["config"], []
    for e in comparison.manifest["environments"]:
        dirty = " with local changes" if e["git_dirty"] else ""
        commit = f"commit {(e['git_commit'] or 'unknown')[:10]}{dirty}"
        places.append(
            f"{e['processor']}, {e['cores']} cores, jax {e['versions']['jax']}, {commit}, {e['started'][:10]}"
        )
    search = (
        f"{config['trials']} trials of {comparison.steps} steps"
        if config["trials"]
        else "rates given, not searched"
    )
    return (
        f"Made on {'; then on '.join(dict.fromkeys(places))}. Batches of {config['batch_size']}, {config['schedule']}, "
        f"losses of {config['eval_examples']} examples at most, {search}, {config['seeds']} seeds, {POINTS} points on a curve."
    )
