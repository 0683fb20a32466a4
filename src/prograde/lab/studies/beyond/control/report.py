"""What `prograde beyond control` shows of its figures."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from prograde.lab.report import Table
from prograde.lab.studies.beyond.control.run import FORWARD, RATES, SEARCHES

TITLE = "A runner, through the events of its simulation"
_COLOURS = {
    "forward gradients along 1": "#56B4E9",
    "differences along 1": "#E69F00",
    "differences along 4": "#D55E00",
}
_OURS = "#009E73"


def tables(record: dict[str, Any]) -> list[Table]:
    """Makes the tables of the figures."""
    columns = ["gradient", "rate", "ms a step", "to goal", "cost", "falls", "speed off"]
    tables = []
    for kind, found in record["found"].items():
        rows = [["before training", "", "", "", *_outcome_texts(found["start"])]]
        for name, run in found["runs"].items():
            told = [
                f"{run['rate']:g}",
                f"{1e3 * run['seconds']:.2f}",
                _seconds_text(time_to(run, goal(found))),
            ]
            rows.append([name.replace("gradients ", ""), *told, *_outcome_texts(run["held_out"])])
        rows.append(
            ["reverse mode", "", "refused" if record["refused"] else "taken", "", "", "", ""]
        )
        title = (
            f"A {kind} controller of {found['parameters']} numbers, {record['steps']} steps of "
            f"Adam at the best of {len(RATES)} rates; seconds to the goal, which is a tenth above "
            "the lowest cost; cost, falls and error of speed are those of new runs"
        )
        tables.append(Table(title, columns, rows, unbroken=len(columns)))
    return tables


def conclusion(record: dict[str, Any]) -> str:
    """Says what the figures show, and where ours loses."""
    gradient = record["gradient"]
    text = (
        f"jax.grad {'refuses' if record['refused'] else 'takes'} the simulation. The forward "
        "gradient, which includes the times of the events, agrees with central differences to "
        f"{gradient['error']:.0e}."
    )
    for kind, found in record["found"].items():
        at = {name: time_to(run, goal(found)) for name, run in found["runs"].items()}
        (ours, forward), (other, differences) = (
            _soonest(at, names) for names in (FORWARD[kind], SEARCHES)
        )
        text += f" With the {kind} controller "
        if forward is None:
            text += "no forward gradient comes within a tenth of the lowest cost"
        else:
            text += f"{ours} comes within a tenth of the lowest cost after {forward:.2f} s"
        if differences is None:
            text += ", and no search by differences does."
        elif forward is None:
            text += f"; {other} does after {differences:.2f} s."
        else:
            verdict = "sooner" if forward < differences else "later"
            rival = f"({other}, {differences:.2f} s)"
            text += f", {verdict} than the fastest search by differences {rival}."
    return text + (
        " A fall is a jump of the cost, which no derivative sees. Where most runs fall, "
        "differences over a finite step are the better guide. The runners here begin with a leg "
        "that carries them in most runs."
    )


def draw(record: dict[str, Any], figure: Figure) -> None:
    """Draws the figures on an empty canvas."""
    figure.set_size_inches(10, 6)
    figure.set_layout_engine("constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=(1, 1.3))
    picture = figure.add_subplot(grid[0, :])
    for kind, when, colour, style in (
        ("linear", "before", "#777777", ":"),
        ("linear", "after", _OURS, "-"),
        ("network", "after", "#0072B2", "--"),
    ):
        points = np.array(record["paths"][kind][when])
        label = "before training" if when == "before" else f"after, {kind} controller"
        picture.plot(*points.T, linestyle=style, color=colour, label=label)
    picture.axhline(0, color="black", linewidth=1)
    picture.set(xlabel="distance (leg lengths)", ylabel="height of the body", ylim=(-0.05, 2.1))
    title = "A run from a speed of 1.5 to a commanded 1.9 (root of leg length times gravity)"
    picture.set_title(title, loc="left", fontsize=9)
    picture.legend(ncols=3, loc="upper left")
    for i, (kind, found) in enumerate(record["found"].items()):
        axes = figure.add_subplot(grid[1, i])
        for name, run in found["runs"].items():
            at = run["seconds"] * np.arange(1, 1 + len(run["losses"]))
            axes.plot(
                at,
                run["losses"],
                color=_COLOURS.get(name, _OURS),
                label=f"{name}, rate {run['rate']:g}",
                lw=1.2,
            )
        axes.set(xlabel="time (s)", ylabel="cost of the runs", yscale="log")
        axes.set_title(
            f"{kind.capitalize()} controller, {found['parameters']} parameters",
            loc="left",
            fontsize=9,
        )
        axes.legend()


def goal(found: dict[str, Any]) -> float:
    """Returns the cost to reach: a tenth above the lowest final cost of all methods."""
    return 1.1 * min(run["after"] for run in found["runs"].values())


def time_to(run: dict[str, Any], cost: float) -> float | None:
    """Returns the seconds until the training cost was first this low, or `None` if it never was."""
    at = next((i + 1 for i, value in enumerate(run["losses"]) if value <= cost), None)
    return None if at is None else at * run["seconds"]


def _soonest(at: dict[str, float | None], names: Any) -> tuple[str, float | None]:
    reached = [(t, name) for name in names if (t := at.get(name)) is not None]
    return (min(reached)[1], min(reached)[0]) if reached else ("", None)


def _seconds_text(seconds: float | None) -> str:
    return "not" if seconds is None else f"{seconds:.2f}"


def _outcome_texts(found: dict[str, float]) -> list[str]:
    return [f"{found['cost']:.4f}", f"{100 * found['fell']:.1f} %", f"{found['speed']:.4f}"]
