"""What `prograde beyond posterior` shows of its figures."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from prograde.lab.measure.timing import quartiles
from prograde.lab.report import Table
from prograde.lab.report.figures import bars
from prograde.lab.report.words import listed, milliseconds_spread, size
from prograde.lab.report.words import quartiles as quartiles_text

TITLE = "Posteriors of differential equations, by NUTS"
OURS, BARE = "forward_mode", "log density alone"
_COLOURS = {OURS: "#009E73", BARE: "#000000"}


def rates(equation: dict[str, Any]) -> dict[str, list[float]]:
    """Effective samples a second of each method, by seed."""
    return {
        name: [run["effective"] / run["seconds"] for run in runs]
        for name, runs in equation["chains"].items()
    }


def gains(equation: dict[str, Any]) -> tuple[str, dict[str, float]]:
    """The best reverse mode, and our effective samples a second over its own: median of seeds."""
    found = rates(equation)
    best = max(found.keys() - {OURS}, key=lambda name: np.median(found[name]))
    ratios = [ours / theirs for ours, theirs in zip(found[OURS], found[best], strict=True)]
    return best, quartiles(ratios)


def tables(record: dict[str, Any]) -> list[Table]:
    """Makes the tables of the figures."""
    found = []
    for title, equation in record["equations"].items():
        found += [_gradients(title, equation), _chains(title, equation)]
    found.append(_wrapper(record))
    if "contact" in record:
        seconds = record["contact"]["compile_seconds"]
        rows = [[name, f"{value:.0f}"] for name, value in seconds.items()]
        title = "A sphere that falls on a plane in MJX: seconds to trace and compile"
        found.append(Table(title, ["program", "s"], rows))
    return found


def _gradients(title: str, equation: dict[str, Any]) -> Table:
    rows, ours = [], equation["costs"][OURS]["seconds"]["median"]
    for name, cost in equation["costs"].items():
        error = "–" if name in (BARE, OURS) else "not finite"
        if cost.get("error") is not None and name != OURS:
            error = f"{cost['error']:.0e}"
        rows.append(
            [
                name,
                milliseconds_spread(cost["seconds"]),
                f"{cost['ratio']['median']:.2f}",
                f"{cost['seconds']['median'] / ours:.2f}",
                size(cost["temp_bytes"]),
                error,
            ]
        )
    rows += [[name, "refused", "–", "–", "–", "–"] for name in equation["refused"]]
    columns = ["gradient by", "ms", "/ bare", "/ ours", "XLA temp", "off ours"]
    return Table(
        f"{title}: value and gradient of the log posterior, {equation['parameters']} parameters, "
        f"{equation['steps']:,} adaptive steps (at most {equation['max_steps']:,} allowed)",
        columns,
        rows,
        unbroken=len(columns),
    )


def _chains(title: str, equation: dict[str, Any]) -> Table:
    rows, speed = [], rates(equation)
    for name, runs in equation["chains"].items():
        rows.append(
            [
                name,
                f"{np.median(speed[name]):.3g}",
                f"{min(speed[name]):.3g} to {max(speed[name]):.3g}",
                f"{np.median([run['effective'] for run in runs]):.0f}",
                f"{np.median([run['gradients'] for run in runs]):,.0f}",
                f"{np.median([run['seconds'] for run in runs]):.3g}",
                str(sum(run["divergent"] for run in runs)),
            ]
        )
    columns = ["gradient by", "eff. samples / s", "range", "eff.", "gradients", "s", "divergent"]
    return Table(
        f"{title}: {equation['draws']} draws of NUTS for each of {len(runs)} seeds, from a "
        f"sampler that forward_mode adapted in {equation['warmup']} steps; effective samples of "
        "the slowest parameter; medians over the seeds",
        columns,
        rows,
        unbroken=len(columns),
    )


def _wrapper(record: dict[str, Any]) -> Table:
    rows = [
        [name, milliseconds_spread(cost["seconds"]), quartiles_text(cost["ratio"])]
        for costs in record["wrapper"].values()
        for name, cost in costs.items()
    ]
    title = (
        "The wrapper itself, on the first log posterior: value and gradient over those of "
        "ForwardJacobian, and a jvp over that of the function"
    )
    return Table(title, ["program", "ms", "ratio"], rows)


def conclusion(record: dict[str, Any]) -> str:
    """Says what the figures show, and where ours loses."""
    said = []
    for title, equation in record["equations"].items():
        best, ratio = gains(equation)
        verdict = "met" if ratio["median"] >= 2 else "missed"
        cost = equation["costs"]
        gradient = cost[best]["seconds"]["median"] / cost[OURS]["seconds"]["median"]
        said.append(
            f"{title[0].upper() + title[1:]}: forward_mode gives {quartiles_text(ratio)} times "
            f"the effective samples a second of the best reverse mode, {_alone(best)} (target: 2; "
            f"{verdict}), whose gradient takes {gradient:.2f} of our time."
        )
        if failed := _failed(equation):
            said.append(f"{listed(failed)} {'gives' if len(failed) == 1 else 'give'} no gradient.")
    gradient, jvp = (record["wrapper"][name] for name in ("gradient", "jvp"))
    over = gradient["forward_mode"]["ratio"]["median"]
    push = jvp["jax.jvp of forward_mode"]["ratio"]["median"]
    said.append(
        "Where a solver takes few cheap steps, reverse mode that stores all of them is as fast or "
        "faster, the more so with more parameters. Implicit steps are dearer to reverse than to "
        f"push forward. The wrapper takes {over:.2f} of the time of ForwardJacobian (target: "
        f"1.05), and a jvp through it {push:.2f} of that of the function (target: 1.1)."
    )
    if "contact" in record:
        contact = record["contact"]
        seconds = contact["compile_seconds"]
        ours, theirs = seconds["jax.grad of forward_mode"], seconds["jax.jacfwd"]
        said.append(
            f"In MJX it takes {ours:.0f} s to trace and compile, and jax.jacfwd {theirs:.0f} s. "
            f"The gradient is off central differences by {contact['error']:.0e}. check takes "
            f"{seconds['check of it']:.0f} s."
        )
    return " ".join(said)


def _alone(name: str) -> str:
    """A name that says the same without the row above it."""
    return name.replace("the same, ", "RecursiveCheckpointAdjoint with ")


def _failed(equation: dict[str, Any]) -> list[str]:
    """The methods whose gradient is not finite, or is refused."""
    costs = equation["costs"]
    broken = [n for n in costs if n not in (BARE, OURS) and costs[n].get("error") is None]
    return [*broken, *equation["refused"]]


def draw(record: dict[str, Any], figure: Figure) -> None:
    """Draws the figures on an empty canvas."""
    figure.set_size_inches(10, 3.2 * len(record["equations"]))
    figure.set_layout_engine("constrained")
    axes = figure.subplots(len(record["equations"]), 2, squeeze=False)
    for (left, right), (title, equation) in zip(axes, record["equations"].items(), strict=True):
        costs = equation["costs"]
        names = [name for name in costs if name == BARE or costs[name].get("error") is not None]
        seconds = [1e3 * costs[name]["seconds"]["median"] for name in names]
        bars(left, names, seconds, "time of a gradient (ms)", "{:.3g}", _COLOURS)
        left.set_title(title)
        speed = rates(equation)
        medians = [float(np.median(speed[name])) for name in speed]
        bars(
            right,
            [_alone(name).replace(" with ", "\nwith ") for name in speed],
            medians,
            "effective samples a second",
            "{:.3g}",
            _COLOURS,
        )
        for i, values in enumerate(speed.values()):
            right.plot(values, [i] * len(values), "|", color="#D55E00", ms=12)
