"""What `prograde beyond ode` shows of its figures."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from prograde.lab.report import Table
from prograde.lab.report.figures import bars
from prograde.lab.report.words import milliseconds_spread, size
from prograde.lab.studies.beyond.ode.run import BARE, FEWER, OURS, REVERSE

TITLE = "A stiff equation, solved by adaptive steps"
NAMES = ("s", "q", "w", "f")
_COLOURS = {BARE: "#000000", OURS: "#009E73", REVERSE: "#0072B2", FEWER: "#56B4E9"}


def tables(record: dict[str, Any]) -> list[Table]:
    """Makes the tables of the figures."""
    found, rows = record["fit"], []
    for name, cost in record["costs"].items():
        ratio, error = cost["ratio"], cost.get("error")
        seconds, memory = _over_reverse(record, name)
        rows.append(
            [
                name,
                milliseconds_spread(cost["seconds"]),
                f"{ratio['median']:.2f}",
                f"{seconds:.2f}",
                size(cost["temp_bytes"]),
                f"{memory:.3f}",
                "–" if name in (BARE, OURS) else "not finite" if error is None else f"{error:.0e}",
            ]
        )
    title = (
        f"The gradient through {record['steps']:,} adaptive steps (at most "
        f"{record['max_steps']:,} allowed); time over that of the bare solve; time and memory "
        "over those of reverse mode"
    )
    columns = ["method", "ms", "/ bare", "/ rev.", "XLA temp", "/ rev."]
    off = ", ".join(
        f"{n} {100 * np.expm1(v):+.2f} %" for n, v in zip(NAMES, found["end"], strict=True)
    )
    return [
        Table(title, [*columns, "off ours"], rows, unbroken=len(columns) + 1),
        Table(
            "A fit by L-BFGS, with both gradients at each point; misfit over the noise squared; "
            f"errors of the parameters: {off}",
            ["gradients by", "evaluations", "seconds", "misfit before", "misfit after"],
            [
                [
                    name,
                    str(len(found["losses"])),
                    f"{seconds[-1]:.1f}",
                    f"{found['losses'][0]:.3g}",
                    f"{min(found['losses']):.4g}",
                ]
                for name, seconds in found["seconds"].items()
            ],
        ),
    ]


def conclusion(record: dict[str, Any]) -> str:
    """Says what the figures show, and where ours loses."""
    found, costs = record["fit"], record["costs"]
    ours, reverse = (found["seconds"][name][-1] for name in (OURS, REVERSE))
    over = ours / reverse
    _, memory = _over_reverse(record, OURS)
    few_time, few_memory = _over_reverse(record, FEWER)
    ours_few = costs[OURS]["temp_bytes"] / costs[FEWER]["temp_bytes"]
    by_steps = ", ".join(
        f"{at[OURS] / at[REVERSE]:.3f} for {int(most):,}"
        for most, at in record["memory_by_max_steps"].items()
    )
    verdict = "met" if over <= 0.5 and memory <= 0.1 else "missed"
    return (
        f"Along the fit, the two gradients agree to {found['disagreement']:.0e}, so that they give "
        f"the same fit. Forward mode takes {over:.2f} of the time of reverse mode ({ours:.1f} s "
        f"compared with {reverse:.1f} s), and {memory:.3f} of its memory for a gradient (targets: "
        f"0.5 and 0.1; {verdict}). Reverse mode with an eighth of the checkpoints takes "
        f"{few_time:.2f} of the time and {few_memory:.2f} of the memory of its default. Forward "
        f"mode takes {ours_few:.2f} of that memory. Forward mode always keeps the stages of one "
        "implicit step with its tangents. Reverse mode keeps a number of states that grows as the "
        "square root of the maximum number of steps. Memory of forward mode over reverse mode, by "
        f"that maximum: {by_steps}. The memory at stake here is kilobytes. With many parameters "
        "reverse mode is faster: the time of forward mode grows with their number, that of "
        "reverse mode does not."
    )


def draw(record: dict[str, Any], figure: Figure) -> None:
    """Draws the figures on an empty canvas."""
    figure.set_size_inches(10, 6.4)
    figure.set_layout_engine("constrained")
    grid = figure.add_gridspec(2, 3, height_ratios=(1, 1))
    signals, clock = figure.add_subplot(grid[0, :]), figure.add_subplot(grid[1, 0])
    seconds, memory = figure.add_subplot(grid[1, 1]), figure.add_subplot(grid[1, 2])
    signal, before, after = (np.array(record[k]) for k in ("signal", "before", "after"))
    for i, (name, shift) in enumerate((("bromide", 0.0), ("oxidised catalyst", 4.0))):
        first = i == 0
        signals.plot(
            record["times"],
            signal[:, i] + shift,
            ".",
            color="#D55E00",
            ms=3,
            label="recorded" if first else None,
        )
        signals.plot(
            record["times"],
            before[:, i] + shift,
            ":",
            color="#777777",
            lw=1.2,
            label="start" if first else None,
        )
        signals.plot(
            record["times"],
            after[:, i] + shift,
            color=_COLOURS[OURS],
            lw=1,
            label="fit, forward mode" if first else None,
        )
        signals.text(record["times"][-1] * 1.01, np.median(after[:, i]) + shift, name, va="center")
    signals.set(xlabel="time (scaled)", ylabel="decades, the upper shifted by 4")
    signals.legend(ncols=3, loc="upper left", bbox_to_anchor=(0, 1.14))
    best = np.minimum.accumulate(record["fit"]["losses"])
    for name, at in record["fit"]["seconds"].items():
        clock.step(at, best, where="post", color=_COLOURS[name], label=name.split(",")[0])
    clock.set(xlabel="time of the fit (s)", ylabel="misfit (squares of the noise)", yscale="log")
    clock.legend()
    names = list(record["costs"])
    for axes, values, label, form in (
        (
            seconds,
            [record["costs"][n]["seconds"]["median"] for n in names],
            "time of a gradient (s)",
            "{:.2f}",
        ),
        (
            memory,
            [record["costs"][n]["temp_bytes"] / 2**10 for n in names],
            "XLA temp memory (KiB)",
            "{:.1f}",
        ),
    ):
        bars(axes, names, values, label, form, _COLOURS, room=1.2)
    seconds.set_yticks(range(len(names)), [n.replace(", ", ",\n") for n in names])
    memory.set_yticks(range(len(names)), [""] * len(names))


def _over_reverse(record: dict[str, Any], name: str) -> tuple[float, float]:
    cost, reverse = record["costs"][name], record["costs"][REVERSE]
    return cost["seconds"]["median"] / reverse["seconds"]["median"], cost["temp_bytes"] / reverse[
        "temp_bytes"
    ]
