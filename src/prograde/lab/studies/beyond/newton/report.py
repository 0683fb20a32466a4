"""What `prograde beyond newton` shows of its figures."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from prograde.lab.report import Table
from prograde.lab.report.figures import bars
from prograde.lab.report.words import size
from prograde.lab.studies.beyond.newton import solar_cell
from prograde.lab.studies.beyond.newton.run import BARE, BOUNDED, IMPLICIT, OURS, REFUSED, REVERSE

TITLE = "Newton's method until it has converged"
_COLOURS = {BARE: "#000000", OURS: "#009E73"}


def tables(record: dict[str, Any]) -> list[Table]:
    """Makes the tables of the figures."""
    costs = record["costs"]
    rows = []
    for name in (BARE, OURS, REFUSED, *REVERSE):
        if name == REFUSED:
            rows.append([name, "refused" if record["refused"] else "taken", "–", "–", "–", "–"])
            continue
        cost = costs[name]
        ratio = cost["ratio"]
        rows.append(
            [
                name,
                f"{1e6 * cost['seconds']['median']:,.1f}",
                f"{ratio['median']:.2f}",
                "–"
                if name == BARE
                else f"{cost['seconds']['median'] / costs[OURS]['seconds']['median']:.2f}",
                size(cost["temp_bytes"]),
                "the reference"
                if name == IMPLICIT
                else f"{cost['error']:.0e}"
                if "error" in cost
                else "–",
            ]
        )
    title = (
        "A step of the fit of a solar cell: 5 parameters, 26 implicit equations, "
        f"bound {record['bound']}"
    )
    columns = ["method", "µs", "/ bare", "/ ours", "XLA temp", "error"]
    tolerance = record["tolerance"]
    lines = [
        [f"{tol:.0e}", *(f"{tolerance[stop][i]:.0e}" for stop in ("step", "residual"))]
        for i, tol in enumerate(tolerance["tolerances"])
    ]
    network = record["network"]
    trained = [
        [
            name,
            f"{run['rate']:g}",
            f"{1e3 * run['seconds']:.2f}",
            f"{run['losses'][0]:.3g}",
            f"{run['losses'][-1]:.2g}",
        ]
        for name, run in network["runs"].items()
    ]
    return [
        Table(title, columns, rows),
        Table(
            "Relative error of the forward gradient, by when the loop ends",
            ["tolerance", "a small step", "a small residual"],
            lines,
        ),
        Table(
            f"An equilibrium network of {network['parameters']} weights, {network['steps']} steps "
            "of Adam",
            ["method", "rate found", "ms a step", "loss before", "loss after"],
            trained,
        ),
    ]


def conclusion(record: dict[str, Any]) -> str:
    """Says what the figures show, and where ours loses."""
    costs, fit, runs = record["costs"], record["fit"], record["network"]["runs"]
    seconds = {name: cost["seconds"]["median"] for name, cost in costs.items()}
    best = min(BOUNDED, key=lambda name: seconds[name])
    ratio, error = seconds[OURS] / seconds[best], costs[OURS]["error"]
    met = "met" if ratio <= 0.5 and error <= 1e-6 else "missed"
    faster, slower = _rivals(seconds)
    ours, reverse = (runs[name] for name in ("WeightPerturbation", IMPLICIT))
    text = (
        f"jax.grad {'refuses' if record['refused'] else 'takes'} the loop. Forward mode "
        f"differentiates it unchanged, with a relative error of {error:.0e} (central differences: "
        f"{record['differences']:.0e}). {len(fit['rmse']) - 1} steps of L-BFGS fit the cell to "
        f"{1e3 * fit['rmse'][-1]:.4f} mA in {1e3 * fit['seconds']:.0f} ms. A step of the fit "
        f"takes {ratio:.2f} of the time of the faster bounded scan (target: 0.5 at an error of "
        f"1e-6; {met})."
    )
    if faster:
        parts = [f"{n} ({seconds[n] / seconds[OURS]:.2f} of our time)" for n in faster]
        text += f" Faster than ours: {', '.join(parts)}."
    if slower:
        parts = [f"{n} ({seconds[n] / seconds[OURS]:.1f} times)" for n in slower]
        text += f" Slower: {', '.join(parts)}."
    text += (
        " Implicit differentiation has to be derived for each solver. Where that is done, use it. "
        f"WeightPerturbation lowers the loss of the network of {record['network']['parameters']} "
        f"weights from {ours['losses'][0]:.3g} to {ours['losses'][-1]:.2g}. In as many steps, "
        "reverse mode with implicit differentiation lowers it to "
        f"{reverse['losses'][-1]:.2g}."
    )
    return text


def draw(record: dict[str, Any], figure: Figure) -> None:
    """Draws the figures on an empty canvas."""
    figure.set_size_inches(10, 6.6)
    figure.set_layout_engine("constrained")
    (cell, plane), (bars, training) = figure.subplots(2, 2)
    fit = record["fit"]
    cell.plot(
        solar_cell.VOLTS,
        solar_cell.AMPERES,
        "o",
        color="#D55E00",
        markersize=4,
        label="measured, 1986",
    )
    cell.plot(fit["volts"], fit["before"], ":", color="#777777", label="start")
    after = f"fit, rms error {1e3 * fit['rmse'][-1]:.2f} mA"
    cell.plot(fit["volts"], fit["after"], color=_COLOURS[OURS], label=after)
    cell.set(xlabel="voltage (V)", ylabel="current (A)", ylim=(-0.3, 0.9))
    cell.set_title("A solar cell, each current the root of an equation", loc="left", fontsize=9)
    cell.legend(loc="lower left")
    _draw_counts(record, figure, plane)
    _draw_bars(record["costs"], bars)
    for name, run in record["network"]["runs"].items():
        colour = "#009E73" if name == "WeightPerturbation" else "#0072B2"
        at = run["seconds"] * np.array(run["at"])
        training.plot(at, run["losses"], color=colour, label=f"{name}, rate {run['rate']:g}")
    training.set(xlabel="time (s)", ylabel="loss", yscale="log")
    training.legend()
    title = f"An equilibrium network of {record['network']['parameters']} weights"
    training.set_title(title, loc="left", fontsize=9)


def _rivals(seconds: dict[str, float]) -> tuple[list[str], list[str]]:
    others = sorted(REVERSE, key=lambda name: seconds[name])
    return [n for n in others if seconds[n] < seconds[OURS]], [
        n for n in others if seconds[n] >= seconds[OURS]
    ]


def _draw_counts(record: dict[str, Any], figure: Figure, axes: Any) -> None:
    found = record["iterations"]
    image = axes.pcolormesh(
        found["series"], found["ideality"], found["counts"], cmap="viridis", rasterized=True
    )
    figure.colorbar(image, ax=axes, label="iterations")
    axes.set(xlabel="series resistance (ohm)", ylabel="ideality", xscale="log")
    start, end = record["fit"]["start"], record["fit"]["end"]
    axes.annotate(
        "",
        (end[3], end[2]),
        (start[3], start[2]),
        arrowprops={"arrowstyle": "->", "color": "white"},
    )
    axes.annotate(
        "the fit",
        (start[3], start[2]),
        xytext=(-4, 4),
        textcoords="offset points",
        color="white",
        ha="right",
    )
    axes.set_title(
        f"Length of the loop; its bound over all ranges: {record['bound']}", loc="left", fontsize=9
    )
    axes.grid(False)


def _draw_bars(costs: dict[str, Any], axes: Any) -> None:
    names = [BARE, OURS, IMPLICIT, *(n for n in REVERSE if n != IMPLICIT)]
    micros = [1e6 * costs[n]["seconds"]["median"] for n in names]
    bars(axes, names, micros, "time of a step of the fit (µs)", "{:,.0f}", _COLOURS, room=1.15)
    axes.set_title("Green forward, blue reverse mode", loc="left", fontsize=9)
