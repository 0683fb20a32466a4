"""Long horizons: the gradient of a loss along a trajectory, at a memory that does not grow with its length."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter
from rich.console import Console

from prograde.lab.display import Display
from prograde.lab.measure.timing import Program, compiled, programs_in_turns
from prograde.lab.report import Table
from prograde.lab.report.words import milliseconds_spread, size
from prograde.lab.studies.beyond.horizon_loops import (
    CHECKPOINTED,
    METHODS,
    Pendulum,
    Recurrent,
    gradient,
)
from prograde.lab.studies.beyond.problem import Problem

# XLA's CPU backend makes one piece of machine code of a loop whose step touches less than a kilobyte, and dispatches the
# operations of a larger one anew in every step, which costs more than what a small system computes. This raises the limit.
ONE_KERNEL = "--xla_backend_extra_options=xla_cpu_small_while_loop_byte_threshold=1000000"
TARGET_STEPS, TARGET = 100_000, 0.5  # time, as a part of that of the fastest checkpointed backprop
_SETTINGS = {"default": "as XLA comes", "one kernel": "loop as one kernel"}


@dataclass(frozen=True)
class Plan:
    """How much is measured, in a process with one setting of XLA."""

    lengths: tuple[int, ...] = (1_000, 100_000)  # beside that of the search
    unrolls: tuple[int, ...] = (
        1,
        2,
    )  # steps of an iteration of the loop: the search, the same for every method
    search_length: int = 10_000
    rounds: int = 5
    widths: tuple[int, ...] = (32,)  # pendulums at once
    recurrent: tuple[int, ...] = (1_000, 10_000)
    methods: tuple[str, ...] = tuple(METHODS)


# as XLA comes a compilation takes much longer, so that the quick plan leaves out the search there
QUICK = {"default": Plan(lengths=(), unrolls=(1,)), "one kernel": Plan()}
_FULL = Plan((1_000, 100_000, 1_000_000), (1, 4, 16), 10_000, 7, (8, 32), (1_000, 10_000, 100_000))
FULL = {"default": replace(_FULL, lengths=(1_000, 100_000)), "one kernel": _FULL}
_WIDE = ("bare", "ours", "backprop", "each step", "square root")


def _compiled(problem: Any, steps: int, unrolls: dict[str, int]) -> dict[str, Program]:
    """A program of each method, two compiled at a time."""
    params = problem.params()

    def make(item: tuple[str, int]) -> Program:
        return compiled(gradient(problem, item[0], steps, item[1]), jax.random.key(0), params)

    with ThreadPoolExecutor(max_workers=2) as pool:
        return dict(zip(unrolls, pool.map(make, unrolls.items()), strict=True))


def pendulum_figures(plan: Plan, setting: str, display: Display) -> dict[str, Any]:
    """The search, then time and memory of all methods against T, with XLA as this process was started."""
    title = f"pendulum, {_SETTINGS[setting]}"
    searched, programs = {}, {}
    for unroll in plan.unrolls:
        programs[unroll] = _compiled(
            Pendulum(), plan.search_length, dict.fromkeys(plan.methods, unroll)
        )
        said = f"{title}, {plan.search_length:,} steps, {unroll} an iteration"
        searched[unroll] = programs_in_turns(programs[unroll], plan.rounds, "bare", display, said)
    unrolls = {
        method: min(plan.unrolls, key=lambda u: _seconds(searched[u], method))
        for method in plan.methods
    }
    search = {str(u): {m: _seconds(at, m) for m in at} for u, at in searched.items()}
    lengths, gradients = {}, {}
    for steps in sorted({plan.search_length, *plan.lengths}):
        if steps == plan.search_length:  # the search has measured it
            best = {m: programs[u][m] for m, u in unrolls.items()}
            lengths[str(steps)] = {m: searched[u][m] for m, u in unrolls.items()}
        else:
            best = _compiled(Pendulum(), steps, unrolls)
            lengths[str(steps)] = programs_in_turns(
                best, plan.rounds, "bare", display, f"{title}, {steps:,} steps"
            )
        gradients[str(steps)] = {
            m: np.asarray(p.call()[1]).tolist() for m, p in best.items() if m != "bare"
        }
    return {"search": search, "unrolls": unrolls, "lengths": lengths, "gradients": gradients}


def wide_figures(plan: Plan, display: Display) -> dict[str, Any]:
    """Several pendulums at once, where arithmetic counts for more: number -> method -> figures."""
    found = {}
    for count in plan.widths:
        methods = [m for m in _WIDE if m in plan.methods]
        programs = _compiled(Pendulum(count), plan.search_length, dict.fromkeys(methods, 1))
        found[str(count)] = programs_in_turns(
            programs, plan.rounds, "bare", display, f"{count} pendulums at once"
        )
    return found


def recurrent_figures(plan: Plan, display: Display) -> dict[str, Any]:
    """The GRU: T -> method -> figures."""
    found = {}
    for steps in plan.recurrent:
        methods = [m for m in (*_WIDE, "cube root") if m in plan.methods]
        programs = _compiled(Recurrent(), steps, dict.fromkeys(methods, 1))
        found[str(steps)] = programs_in_turns(
            programs, plan.rounds, "bare", display, f"GRU, {steps:,} steps"
        )
    return found


def _one_kernel(plan: Plan) -> dict[str, Any]:
    """The figures of the pendulum from a process of its own: XLA reads its settings once."""
    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {ONE_KERNEL}".strip()
    }
    command = [sys.executable, "-m", __name__, json.dumps(asdict(plan))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode != 0:
        raise RuntimeError(
            f"the process that measures with XLA_FLAGS={environment['XLA_FLAGS']!r} ended with status {done.returncode}; "
            "what it said is above. Where XLA does not know the flag, use a jaxlib of 0.7.1 or later."
        )
    return json.loads(done.stdout.splitlines()[-1])


def _error(gradients: dict[str, list[float]], method: str, reference: str = "backprop") -> float:
    difference = np.subtract(gradients[method], gradients[reference])
    return float(np.linalg.norm(difference) / np.linalg.norm(gradients[reference]))


def _seconds(figures: dict[str, Any], method: str) -> float:
    return figures[method]["seconds"]["median"]


def _fastest(figures: dict[str, Any]) -> str:
    """The fastest checkpointed backprop of those that were measured."""
    return min((m for m in CHECKPOINTED if m in figures), key=lambda m: _seconds(figures, m))


class Horizon(Problem):
    """The gradient of a loss along 10^3 to 10^6 steps: time and memory of forward gradients and of checkpointed backprop."""

    name = "horizon"
    title = "Long horizons at constant memory"

    def measure(self, full: bool, display: Display) -> dict[str, Any]:
        return self.measured(FULL if full else QUICK, display)

    def measured(self, plans: dict[str, Plan], display: Display) -> dict[str, Any]:
        """The figures of a plan for each setting of XLA."""
        default, one_kernel = plans["default"], plans["one kernel"]
        record: dict[str, Any] = {
            "plans": {setting: asdict(plan) for setting, plan in plans.items()}
        }
        record["pendulum"] = {"default": pendulum_figures(default, "default", display)}
        record["recurrent"] = recurrent_figures(default, display)
        of_process = _one_kernel(one_kernel)
        record["pendulum"]["one kernel"], record["wide"] = (
            of_process["pendulum"],
            of_process["wide"],
        )
        return record

    def tables(self, record: dict[str, Any]) -> list[Table]:
        found = []
        for setting, figures in record["pendulum"].items():
            for steps, at in figures["lengths"].items():
                fastest, rows = _fastest(at), []
                for method in at:
                    error = (
                        ""
                        if method == "bare"
                        else f"{_error(figures['gradients'][steps], method):.0e}"
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
                    f"Gradient in 8 gains of a pendulum, {int(steps):,} steps, {_SETTINGS[setting]}; time over that of the bare run, and of "
                    "the fastest checkpointed backprop; error is the distance from backprop's"
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
        title = f"Larger steps: pendulums ({steps:,} steps, 8 gains, loop as one kernel), and one tangent of a GRU of 32 units"
        return [*found, Table(title, columns, rows, unbroken=len(columns))]

    def conclusion(self, record: dict[str, Any]) -> str:
        settings = record["pendulum"]
        steps = str(
            min(
                (int(t) for t in settings["one kernel"]["lengths"]),
                key=lambda t: abs(t - TARGET_STEPS),
            )
        )
        said = []
        # each method with the setting and the number of steps an iteration that suit it best
        at = [f["lengths"][steps] for f in settings.values() if steps in f["lengths"]]
        best = {m: min(_seconds(f, m) for f in at) for m in settings["one kernel"]["unrolls"]}
        checkpointed = [m for m in CHECKPOINTED if m in best]
        fastest = min(checkpointed, key=lambda m: best[m])
        ratio, plain = (best["ours"] / best[m] for m in (fastest, "backprop"))
        memory = {m: settings["one kernel"]["lengths"][steps][m]["temp_bytes"] for m in best}
        said.append(
            f"At {int(steps):,} steps, every method with the compiler setting that suits it, the exact gradient in 8 gains takes "
            f"{1e3 * best['ours']:.3g} ms by forward mode, {ratio:.2f} of the fastest checkpointed backprop ({METHODS[fastest][2]}): "
            f"the target of {TARGET} is {'met' if ratio <= TARGET else 'missed'}. Plain backprop takes {1e3 * best['backprop']:.3g} ms; "
            f"forward mode is {'faster' if plain < 1 else 'slower'}, at {plain:.2f} of its time."
        )
        lengths = [int(t) for t in settings["one kernel"]["lengths"]]
        ours = [settings["one kernel"]["lengths"][str(t)]["ours"]["temp_bytes"] for t in lengths]
        grew = (
            "does not grow"
            if max(ours) <= 1.1 * min(ours)
            else f"grew by a factor of {max(ours) / min(ours):.2g}"
        )
        said.append(
            f"Its memory {grew} from {min(lengths):,} to {max(lengths):,} steps ({size(ours[-1])}); at {int(steps):,} plain backprop "
            f"needs {size(memory['backprop'])}, and the leanest checkpoints {size(min(memory[m] for m in checkpointed))}."
        )
        longest, of = max(settings["default"]["lengths"].items(), key=lambda item: int(item[0]))
        over = [_seconds(of, "ours") / _seconds(of, m) for m in (_fastest(of), "backprop")]
        said.append(
            f"As XLA comes, it takes {over[0]:.2f} of the fastest checkpointed and {over[1]:.2f} of plain backprop "
            f"({int(longest):,} steps)."
        )
        norms = [
            float(np.linalg.norm(g["backprop"]))
            for g in settings["one kernel"]["gradients"].values()
        ]
        worst = max(
            _error(f["gradients"][t], "ours") for f in settings.values() for t in f["gradients"]
        )
        said.append(
            f"In float32 the two differ by {worst:.0e} at most. Friction and gains that hold the pendulum up keep the gradient's norm "
            f"between {min(norms):.2g} and {max(norms):.2g}; in a chaotic regime no method's gradient would be of use."
        )
        for count, of in record["wide"].items():
            over = _seconds(of, "ours") / min(
                _seconds(of, m) for m in of if m not in ("bare", "ours")
            )
            said.append(
                f"With {count} pendulums at once it takes {over:.2f} of the fastest backprop."
            )
        steps, of = list(record["recurrent"].items())[-1]
        over = [_seconds(of, "ours") / _seconds(of, m) for m in ("backprop", _fastest(of))]
        said.append(
            f"Through {int(steps):,} steps of a GRU, one directional derivative takes {over[0]:.2f} of plain and {over[1]:.2f} of checkpointed "
            f"backprop, in {size(of['ours']['temp_bytes'])} beside {size(of['backprop']['temp_bytes'])}; but it is one "
            "noisy number of thousands, where backprop has them all: there memory is what is won."
        )
        return " ".join(said)

    def draw(self, record: dict[str, Any], figure: Figure) -> None:
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


def _plan(text: str) -> Plan:
    figures: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(text).items()
    }
    return Plan(**figures)


if __name__ == "__main__":
    chosen, shown = _plan(sys.argv[1]), Display(Console(stderr=True))
    of_pendulum = pendulum_figures(chosen, "one kernel", shown)
    print(json.dumps({"pendulum": of_pendulum, "wide": wide_figures(chosen, shown)}))
