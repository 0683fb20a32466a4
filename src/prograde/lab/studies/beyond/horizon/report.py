"""What `prograde beyond horizon` shows of its figures."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from prograde.lab.report import Table
from prograde.lab.report.words import milliseconds_spread, size
from prograde.lab.studies.beyond.horizon.loops import (
    CHECKPOINTED,
    METHODS,
)
from prograde.lab.studies.beyond.horizon.run import _SETTINGS, _seconds

TITLE = "Long horizons at constant memory"
TARGET_STEPS, TARGET = 100_000, 0.5  # time over that of the fastest checkpointed backprop


def tables(record: dict[str, Any]) -> list[Table]:
    """Makes the tables of the figures."""
    found = []
    for setting, figures in record["pendulum"].items():
        for steps, at in figures["lengths"].items():
            fastest, rows = _fastest(at), []
            for method in at:
                error = (
                    "" if method == "bare" else f"{_error(figures['gradients'][steps], method):.0e}"
                )
                rows.append(
                    [
                        METHODS[method][2].removeprefix("backprop, "),
                        str(figures["unrolls"][method]),
                        milliseconds_spread(at[method]["seconds"]),
                        f"{at[method]['ratio']['median']:.3g}",
                        f"{_seconds(at, method) / _seconds(at, fastest):.2f}",
                        size(at[method]["temp_bytes"]),
                        error,
                    ]
                )
            columns = ["method", "unroll", "ms", "/ bare", "/ ckpt", "XLA temp", "error"]
            title = (
                f"Gradient in 8 gains of a pendulum, {int(steps):,} steps, {_SETTINGS[setting]}; "
                "time over that of the bare run, and of the fastest checkpointed backprop; error "
                "is the distance from backprop's"
            )
            found.append(Table(title, columns, rows, unbroken=len(columns)))
    cost = {f"{count} pendulums at once": at for count, at in record["wide"].items()}
    cost |= {f"GRU, {int(steps):,} steps": at for steps, at in record["recurrent"].items()}
    columns, rows = ["problem", "method", "ms", "over bare", "XLA temp"], []
    for problem, at in cost.items():
        for method, of in at.items():
            seconds, ratio = milliseconds_spread(of["seconds"]), f"{of['ratio']['median']:.2f}"
            rows.append(
                [
                    problem,
                    METHODS[method][2].removeprefix("backprop, "),
                    seconds,
                    ratio,
                    size(of["temp_bytes"]),
                ]
            )
    steps = record["plans"]["one kernel"]["search_length"]
    title = (
        f"Larger steps: pendulums ({steps:,} steps, 8 gains, loop as one kernel), "
        "and one tangent of a GRU of 32 units"
    )
    return [*found, Table(title, columns, rows, unbroken=len(columns))]


def conclusion(record: dict[str, Any]) -> str:
    """Says what the figures show, and where ours loses."""
    settings = record["pendulum"]
    steps = str(
        min(
            (int(t) for t in settings["one kernel"]["lengths"]),
            key=lambda t: abs(t - TARGET_STEPS),
        )
    )
    said = []
    # each method has the best setting and the best number of steps an iteration
    at = [f["lengths"][steps] for f in settings.values() if steps in f["lengths"]]
    best = {m: min(_seconds(f, m) for f in at) for m in settings["one kernel"]["unrolls"]}
    checkpointed = [m for m in CHECKPOINTED if m in best]
    fastest = min(checkpointed, key=lambda m: best[m])
    ratio, plain = (best["ours"] / best[m] for m in (fastest, "backprop"))
    memory = {m: settings["one kernel"]["lengths"][steps][m]["temp_bytes"] for m in best}
    said.append(
        "Every method has the compiler setting that is best for it. At "
        f"{int(steps):,} steps, forward mode takes {1e3 * best['ours']:.3g} ms for the exact "
        f"gradient in 8 gains. This is {ratio:.2f} of the time of the fastest checkpointed "
        f"backprop ({METHODS[fastest][2]}): the target of {TARGET} is "
        f"{'met' if ratio <= TARGET else 'missed'}. Plain backprop takes "
        f"{1e3 * best['backprop']:.3g} ms; forward mode is {'faster' if plain < 1 else 'slower'}, "
        f"at {plain:.2f} of its time."
    )
    lengths = [int(t) for t in settings["one kernel"]["lengths"]]
    ours = [settings["one kernel"]["lengths"][str(t)]["ours"]["temp_bytes"] for t in lengths]
    grew = (
        "does not grow"
        if max(ours) <= 1.1 * min(ours)
        else f"grew by a factor of {max(ours) / min(ours):.2g}"
    )
    said.append(
        f"The memory of forward mode {grew} from {min(lengths):,} to {max(lengths):,} steps "
        f"({size(ours[-1])}); at {int(steps):,} steps plain backprop needs "
        f"{size(memory['backprop'])}, and the least that checkpoints need is "
        f"{size(min(memory[m] for m in checkpointed))}."
    )
    longest, of = max(settings["default"]["lengths"].items(), key=lambda item: int(item[0]))
    over = [_seconds(of, "ours") / _seconds(of, m) for m in (_fastest(of), "backprop")]
    said.append(
        f"With XLA's default setting, forward mode takes {over[0]:.2f} of the time of the fastest "
        f"checkpointed and {over[1]:.2f} of plain backprop ({int(longest):,} steps)."
    )
    norms = [
        float(np.linalg.norm(g["backprop"])) for g in settings["one kernel"]["gradients"].values()
    ]
    worst = max(
        _error(f["gradients"][t], "ours") for f in settings.values() for t in f["gradients"]
    )
    said.append(
        f"In float32, the gradients of forward mode and backprop differ by {worst:.0e} at most. "
        "Friction, and gains that keep the pendulum upright, keep the gradient's norm between "
        f"{min(norms):.2g} and {max(norms):.2g}. In a chaotic regime no gradient would be of use."
    )
    for count, of in record["wide"].items():
        over = _seconds(of, "ours") / min(_seconds(of, m) for m in of if m not in ("bare", "ours"))
        said.append(
            f"With {count} pendulums, forward mode takes {over:.2f} of the fastest backprop's time."
        )
    steps, of = list(record["recurrent"].items())[-1]
    over = [_seconds(of, "ours") / _seconds(of, m) for m in ("backprop", _fastest(of))]
    said.append(
        f"Through {int(steps):,} steps of a GRU, one directional derivative takes {over[0]:.2f} "
        f"of the time of plain and {over[1]:.2f} of checkpointed backprop. It needs "
        f"{size(of['ours']['temp_bytes'])}, and plain backprop "
        f"{size(of['backprop']['temp_bytes'])}. But it is one noisy number where backprop gives "
        "thousands of exact ones: what forward mode saves there is memory."
    )
    return " ".join(said)


def draw(record: dict[str, Any], figure: Figure) -> None:
    """Draws the figures on an empty canvas."""
    figure.set_size_inches(10, 6.6)
    figure.set_layout_engine("constrained")
    rows = {
        "Pendulum, exact gradient in 8 gains": record["pendulum"]["one kernel"]["lengths"],
        "GRU, one tangent of ours": record["recurrent"],
    }
    panels = figure.subplots(2, 2)
    for (title, lengths), (time, memory) in zip(rows.items(), panels, strict=True):
        steps = [int(t) for t in lengths]
        for method, (_, _, label, style) in METHODS.items():
            if any(method not in at for at in lengths.values()):
                continue
            of = [at[method] for at in lengths.values()]
            style = style | {"label": label, "linewidth": 1.5, "markersize": 5}
            time.plot(steps, [1e3 * f["seconds"]["median"] for f in of], **style)
            memory.plot(steps, [f["temp_bytes"] for f in of], **style)
        for axes, what in ((time, "time (ms)"), (memory, "XLA temporary memory")):
            axes.set(xlabel="steps T", ylabel=what, xscale="log", yscale="log")
            axes.xaxis.set_minor_formatter(NullFormatter())
        memory.yaxis.set_major_formatter(FuncFormatter(lambda value, _: size(int(value))))
        time.set_title(title, loc="left", fontsize=9)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=4, fontsize=9, handlelength=3.5
    )


def _error(gradients: dict[str, list[float]], method: str, reference: str = "backprop") -> float:
    difference = np.subtract(gradients[method], gradients[reference])
    return float(np.linalg.norm(difference) / np.linalg.norm(gradients[reference]))


def _fastest(figures: dict[str, Any]) -> str:
    """Names the fastest checkpointed backprop that was measured."""
    return min((m for m in CHECKPOINTED if m in figures), key=lambda m: _seconds(figures, m))
