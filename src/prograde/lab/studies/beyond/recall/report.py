"""What `prograde beyond recall` shows of its figures."""

import math
from typing import Any

import numpy as np

from prograde.lab.report import Table
from prograde.lab.report.words import MISSING, size

TITLE = "Recall: a symbol asked for after many distractors"
_LEARNED = 0.01  # nats
_COLOURS = {"RTRL": "#D55E00", "backprop": "#08519c", "UORO": "#009E73", "SnAp": "#CC79A7"}
_WINDOWS = ("#9ecae1", "#3182bd", "#6baed6")


def tables(record: dict[str, Any]) -> list[Table]:
    """Makes a table for each delay, one of memory, and one of the costs of a step."""
    found = [_learned(delay, task, record) for delay, task in record["tasks"].items()]
    rows = [
        [f"{int(delay):,}", size(at["RTRL"]), size(at["backprop"]), f"{_less(at):,.0f}"]
        for delay, at in record["memory"].items()
    ]
    columns = ["delay", "RTRL", "backprop through the episode", "times less"]
    title = "Memory: all that is carried, and temporaries, in addition to the episode itself"
    return [*found, Table(title, columns, rows, unbroken=1), _costs(record)]


def _learned(delay: str, task: dict[str, Any], record: dict[str, Any]) -> Table:
    rows = []
    for method in task["methods"].values():
        losses = _losses(method)
        spread = "" if len(losses) == 1 else f" ({min(losses):.2g} to {max(losses):.2g})"
        took = [run["learned_seconds"] for run in method["runs"]]
        rows.append(
            [
                method["title"],
                f"{method['rate']:g}",
                f"{np.mean([run['episodes'] for run in method['runs']]):,.0f}",
                MISSING if None in took else f"{np.mean(took):.1f}",
                f"{np.mean(losses):.2g}{spread}",
            ]
        )
    first = next(iter(task["methods"].values()))
    seeds, rates = len(first["runs"]), len(first["trials"])
    searched = f"Adam at the best of {rates} rates" if rates > 1 else "Adam"
    runs = f"{seeds} seeds" if seeds > 1 else "one seed"
    title = f"Delay {int(delay):,}: {task['seconds']:g} s each, {searched}, {runs}"
    columns = ["method", "rate", "episodes", f"s to {_LEARNED} nats", "loss at the end (nats)"]
    return Table(title, columns, rows, unbroken=1)


def _costs(record: dict[str, Any]) -> Table:
    rows = []
    for units, found in record["costs"].items():
        steps, plan = found["steps"], found["plan"]
        rows.append(
            [
                f"{int(units):,}",
                *(f"{1e6 * steps[name]['seconds']:,.3g}" for name in ("forward", "RTRL, sparse")),
                f"{steps['RTRL, sparse']['ratio']['median']:.1f}",
                f"{1e6 * steps['backprop']['seconds']:,.3g}",
                f"{1e6 * found['dense_seconds']:,.0f}",
                f"{plan['colours']:,} / {plan['parameters']:,}",
                f"{found['error']:.0e}",
            ]
        )
    title = (
        "A step of a minGRU of 32 inputs, one stream, in µs; gradients are summed over the stream"
    )
    columns = ["units", "forward", "RTRL", "/ forward", "backprop", "dense RTRL"]
    return Table(title, [*columns, "colours / parameters", "off backprop"], rows, unbroken=1)


def conclusion(record: dict[str, Any]) -> str:
    """Says who learned what, and where backprop wins."""
    said = []
    for delay, task in record["tasks"].items():
        ends = {name: float(np.mean(_losses(m))) for name, m in task["methods"].items()}
        learned = [name for name, end in ends.items() if end < _LEARNED]
        rest = [f"{name} ends at {end:.2g}" for name, end in ends.items() if end >= _LEARNED]
        sentence = f"After {int(delay):,} steps of distractors, "
        verb = "end" if len(learned) > 1 else "ends"
        sentence += f"{_listed(learned)} {verb} below {_LEARNED} nats" if learned else "none learns"
        said.append(sentence + (f"; {_listed(rest)}." if rest else "."))
        took = {
            name: task["methods"][name]["runs"] for name in ("RTRL", "backprop") if name in learned
        }
        if len(took) == 2:
            ours, theirs = (_mean_seconds(runs) for runs in took.values())
            if ours is not None and theirs is not None:
                said.append(
                    f"RTRL takes {ours:.1f} s to get there, backprop through the episode "
                    f"{theirs:.1f} s: {ours / theirs:.2f} of its time. In equal time RTRL learns "
                    f"from {_episodes(took['RTRL']) / _episodes(took['backprop']):.2f} of the "
                    "episodes."
                )
    said.append(f"Guessing gives {record['guessing']:.2f}.")
    at = {delay: _less(found) for delay, found in record["memory"].items()}
    last = max(at, key=int)
    ours = [found["RTRL"] for found in record["memory"].values()]
    said.append(
        f"The memory of RTRL is {size(min(ours))} to {size(max(ours))} at every delay; that of "
        f"backprop through {int(last):,} steps is {at[last]:,.0f} times as much."
    )
    for units, found in record["costs"].items():
        steps = found["steps"]
        dense = found["dense_seconds"] / steps["RTRL, sparse"]["seconds"]
        said.append(
            f"A learning step of {int(units):,} units takes "
            f"{steps['RTRL, sparse']['ratio']['median']:.1f} times the forward step, backprop "
            f"{steps['backprop']['ratio']['median']:.1f} times, and the dense influence "
            f"{dense:,.0f} times as long as the sparse one."
        )
    return " ".join(said)


def draw(record: dict[str, Any], figure: Any) -> None:
    """Draws loss against time, with a panel for each delay, and memory against delay."""
    tasks = record["tasks"]
    figure.set_size_inches(3.4 * (len(tasks) + 1), 3.6)
    *panels, last = figure.subplots(1, len(tasks) + 1, squeeze=False)[0]
    for axes, (delay, task) in zip(panels, tasks.items(), strict=True):
        shades = iter(_WINDOWS)
        for name, method in task["methods"].items():
            colour = _COLOURS.get(name) or next(shades, "#777777")
            seconds, losses = np.array(method["runs"][0]["curve"], float).T
            style = "-" if name in ("RTRL", "UORO", "SnAp") else "--"
            axes.plot(seconds, np.maximum(losses, 1e-4), style, color=colour, label=name, lw=1.4)
        axes.axhline(record["guessing"], color="#666666", lw=0.8, ls=":")
        axes.set(xlabel="time (s)", ylabel="loss (nats)", yscale="log")
        axes.set_title(f"delay {int(delay):,}", fontsize=9, loc="left")
        axes.legend(fontsize=7)
    delays = [int(delay) for delay in record["memory"]]
    for name in ("RTRL", "backprop"):
        used = [at[name] / 1e6 for at in record["memory"].values()]
        last.loglog(delays, used, "o-", color=_COLOURS[name], label=name, lw=1.4)
    last.set(xlabel="delay", ylabel="memory (MB)")
    last.legend(fontsize=7)


def _losses(method: dict[str, Any]) -> list[float]:
    """Returns the losses at the end of the runs, infinite for runs that diverged."""
    ends = [run["loss"] for run in method["runs"]]
    return [math.inf if end is None or math.isnan(end) else end for end in ends]


def _mean_seconds(runs: list[dict[str, Any]]) -> float | None:
    took = [run["learned_seconds"] for run in runs]
    return None if None in took else float(np.mean(took))


def _episodes(runs: list[dict[str, Any]]) -> float:
    return float(np.mean([run["episodes"] for run in runs]))


def _less(at: dict[str, int]) -> float:
    return at["backprop"] / at["RTRL"]


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
