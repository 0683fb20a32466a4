"""The parameters of a stiff, oscillating reaction, fitted through an adaptive implicit solver (diffrax)."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float
from matplotlib.figure import Figure
from scipy.optimize import minimize

import prograde as pg
from prograde.lab.display import Display
from prograde.lab.measure.timing import Program, programs_in_turns
from prograde.lab.report import Table
from prograde.lab.report.words import milliseconds_spread, size
from prograde.lab.studies.beyond.problem import Problem

BARE, OURS = "bare solve", "forward mode"
REVERSE, FEWER = "reverse mode, checkpoints", "reverse mode, few checkpoints"
NAMES = ("s", "q", "w", "f")
TRUTH = np.array([77.27, 8.375e-6, 0.161, 1.0])
START = np.array([0.06, -0.1, 0.08, 0.03])  # logarithms of what the fit begins with, over the truth
INITIAL = np.array([1.0, 2.0, 3.0, 0.3, 0.5])
NOISE = 0.03  # decades
_ALLOWED = (2**13, 2**15, 2**17)  # steps
_COLOURS = {BARE: "#000000", OURS: "#009E73", REVERSE: "#0072B2", FEWER: "#56B4E9"}


@dataclass(frozen=True)
class Oregonator:
    """The Belousov-Zhabotinsky reaction as Field and Noyes have it (J. Chem. Phys. 60, 1974), the problem OREGO of Hairer and Wanner.

    a' = s (b - a b + a - q a^2)      b' = (f c - b - a b) / s      c' = w (a - c)
    """

    until: float = 650.0  # a little more than two periods
    rtol: float = 1e-5
    interval: float = 4.0  # between samples of the recorded signal
    solver: diffrax.AbstractSolver = field(default_factory=diffrax.Kvaerno3)
    response: float = 10.0  # of the electrodes, which follow the reaction's jumps with a delay

    def rates(self, y: Float[Array, " 5"], log_params: Float[Array, " 4"]) -> Float[Array, " 5"]:
        """The reaction, and what two electrodes show: decades of bromide b and of oxidised catalyst c, low-pass filtered."""
        s, q, w, f = jnp.asarray(TRUTH) * jnp.exp(log_params)
        a, b, c = y[:3]
        reaction = jnp.stack(
            [s * (b - a * b + a - q * a * a), (f * c - b - a * b) / s, w * (a - c)]
        )
        return jnp.append(reaction, (jnp.log10(jnp.maximum(y[1:3], 1e-6)) - y[3:]) / self.response)

    def _solve(
        self, vector_field: Any, y0: Any, params: Any, adjoint: Any, saveat: Any, max_steps: int
    ) -> Any:
        return diffrax.diffeqsolve(
            diffrax.ODETerm(vector_field),
            self.solver,
            t0=0.0,
            t1=self.until,
            dt0=1e-3,
            y0=y0,
            args=params,
            saveat=saveat,
            stepsize_controller=diffrax.PIDController(rtol=self.rtol, atol=1e-3 * self.rtol),
            adjoint=adjoint,
            max_steps=max_steps,
            throw=False,
        )

    def curves(self, log_params: Array, times: Array, max_steps: int) -> tuple[Array, Array]:
        """What the electrodes show at these times, and the number of steps."""
        save = diffrax.SaveAt(ts=times)
        rates = lambda t, y, p: self.rates(y, p)  # noqa: E731
        solution = self._solve(rates, INITIAL, log_params, diffrax.ForwardMode(), save, max_steps)
        ys: Any = solution.ys
        return ys[:, 3:], solution.stats["num_steps"]

    def misfit(
        self, adjoint: Any, max_steps: int, log_params: Array, signal: Float[Array, "samples 2"]
    ) -> Array:
        """Mean square over time of the difference to the signal, drawn straight between its samples, in squares of the noise.

        It is integrated as one more state of the equation, so that neither mode has to keep a curve.
        """

        def rates_and_error(t, y, args):
            params, signal = args
            place = t / self.interval
            i = jnp.clip(place.astype(jnp.int32), 0, len(signal) - 2)
            below, above = signal[i].astype(y.dtype), signal[i + 1].astype(y.dtype)
            recorded = below + (place - i) * (above - below)
            error = jnp.sum((y[3:5] - recorded) ** 2) / (NOISE**2 * self.until)
            return jnp.append(self.rates(y[:5], params), error)

        start = np.append(INITIAL, 0.0)
        args = (log_params, lax.stop_gradient(signal))
        solution = self._solve(
            rates_and_error, start, args, adjoint, diffrax.SaveAt(t1=True), max_steps
        )
        ys: Any = solution.ys
        return jnp.where(solution.result == diffrax.RESULTS.successful, ys[0, -1], jnp.nan)

    def times(self) -> np.ndarray:
        """When the signal was sampled."""
        return np.arange(0.0, self.until + self.interval / 2, self.interval)


def programs(problem: Oregonator, max_steps: int) -> dict[str, Callable[..., tuple[Array, Array]]]:
    """Value and gradient of the misfit by each method. The reverse modes are diffrax's own."""
    checkpoints = max(2, int(np.sqrt(2 * max_steps)) // 8)
    loss = lambda adjoint: partial(problem.misfit, adjoint, max_steps)  # noqa: E731
    found = {
        OURS: partial(pg.value_and_grad(loss(diffrax.ForwardMode()), pg.ForwardJacobian()), None),
        REVERSE: jax.value_and_grad(loss(diffrax.RecursiveCheckpointAdjoint())),
        FEWER: jax.value_and_grad(
            loss(diffrax.RecursiveCheckpointAdjoint(checkpoints=checkpoints))
        ),
    }
    return found


class ODEFit(Problem):
    """A few parameters behind thousands of adaptive steps."""

    name: ClassVar[str] = "ode"
    title: ClassVar[str] = "A stiff equation, solved by adaptive steps"

    def measure(
        self, full: bool, display: Display, problem: Oregonator | None = None, evaluations: int = 40
    ) -> dict:
        """Another `problem`, and at most how many `evaluations` a fit may take, where it is to be smaller."""
        problem = problem or (Oregonator(until=2400.0, rtol=1e-6) if full else Oregonator())
        with jax.enable_x64(True):
            times, start = jnp.asarray(problem.times()), jnp.asarray(START)
            count = jax.jit(partial(problem.curves, times=times, max_steps=2**18))
            clean, steps = count(jnp.zeros(4))
            # what was recorded has no more digits than that, and takes half of the memory
            signal = (clean + NOISE * jax.random.normal(jax.random.key(0), clean.shape)).astype(
                jnp.float32
            )
            before, steps_at_start = count(start)
            most = int(max(steps, steps_at_start))
            # a fit passes through parameters that take more steps than its ends: a quarter more
            max_steps = 2 ** int(np.ceil(np.log2(1.25 * most)))
            methods = programs(problem, max_steps)
            ready: dict[str, Program] = {}
            gradients: dict[str, Callable[[Array], Any]] = {}
            with display.stage("compiling", len(methods) + 1):
                bare = partial(problem.misfit, diffrax.ForwardMode(), max_steps)
                for name, method in {BARE: bare, **methods}.items():
                    began = time.perf_counter()
                    program = jax.jit(method).lower(start, signal).compile()
                    gradients[name] = lambda p, program=program: jax.block_until_ready(
                        program(p, signal)
                    )
                    analysis: Any = program.memory_analysis()
                    ready[name] = Program(
                        partial(gradients[name], start),
                        analysis.temp_size_in_bytes,
                        time.perf_counter() - began,
                    )
                    display.advance(1, name)
            costs = programs_in_turns(ready, 5 if full else 3, BARE, display, "the gradient")
            exact = ready[OURS].call()[1]
            for name in methods:
                error = jnp.linalg.norm(ready[name].call()[1] - exact) / jnp.linalg.norm(exact)
                costs[name]["error"] = float(error) if jnp.isfinite(error) else None
            allowed = _memory_by_steps(problem, signal, display)
            found = fit(
                {name: gradients[name] for name in (OURS, REVERSE)}, START, evaluations, display
            )
            after = count(jnp.asarray(found["end"]))[0]
            return {
                "problem": {"until": problem.until, "rtol": problem.rtol},
                "steps": most,
                "max_steps": max_steps,
                "costs": costs,
                "memory_by_max_steps": allowed,
                "fit": found,
                "times": times.tolist(),
                "signal": signal.tolist(),
                "before": before.tolist(),
                "after": after.tolist(),
            }

    def tables(self, record: dict[str, Any]) -> list[Table]:
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
                    "–"
                    if name in (BARE, OURS)
                    else "not finite"
                    if error is None
                    else f"{error:.0e}",
                ]
            )
        title = (
            f"The gradient through {record['steps']:,} adaptive steps (at most {record['max_steps']:,} allowed for); time over that of the "
            "bare solve; time and memory over those of reverse mode"
        )
        columns = ["method", "ms", "/ bare", "/ rev.", "XLA temp", "/ rev."]
        off = ", ".join(
            f"{n} {100 * np.expm1(v):+.2f} %" for n, v in zip(NAMES, found["end"], strict=True)
        )
        return [
            Table(title, [*columns, "off ours"], rows, unbroken=len(columns) + 1),
            Table(
                f"A fit by L-BFGS, both gradients at each of its points; misfit in squares of the noise; parameters off the truth by {off}",
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

    def conclusion(self, record: dict[str, Any]) -> str:
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
            f"Along the fit both gradients agree to {found['disagreement']:.0e}, so that its points and its misfit are the same. With forward "
            f"mode it takes {over:.2f} of the time ({ours:.1f} against {reverse:.1f} s), and a gradient "
            f"{memory:.3f} of its memory (targets: 0.5 and 0.1; {verdict}). Reverse mode with an eighth of the checkpoints takes {few_time:.2f} "
            f"of the time and {few_memory:.2f} of the memory of its default; ours takes {ours_few:.2f} of that memory. What bounds the ratio are the "
            f"stages of one implicit step with its tangents, which ours always keeps; reverse mode keeps states as the square root of the steps "
            f"that are allowed for: {by_steps}. Kilobytes are at stake here. With many "
            f"parameters the ratio turns: the time of forward mode grows with their number, that of reverse mode does not."
        )

    def draw(self, record: dict[str, Any], figure: Figure) -> None:
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
            signals.text(
                record["times"][-1] * 1.01, np.median(after[:, i]) + shift, name, va="center"
            )
        signals.set(xlabel="time (scaled)", ylabel="decades, the upper shifted by 4")
        signals.legend(ncols=3, loc="upper left", bbox_to_anchor=(0, 1.14))
        best = np.minimum.accumulate(record["fit"]["losses"])
        for name, at in record["fit"]["seconds"].items():
            clock.step(at, best, where="post", color=_COLOURS[name], label=name.split(",")[0])
        clock.set(
            xlabel="time of the fit (s)", ylabel="misfit (squares of the noise)", yscale="log"
        )
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
            axes.barh(names, values, color=[_COLOURS[n] for n in names], height=0.65)
            for i, value in enumerate(values):
                axes.annotate(
                    form.format(value),
                    (value, i),
                    xytext=(3, 0),
                    textcoords="offset points",
                    va="center",
                )
            axes.invert_yaxis()
            axes.grid(False, axis="y")
            axes.set_axisbelow(True)
            axes.set(xlabel=label, xlim=(0, 1.2 * max(values)))
        seconds.set_yticks(range(len(names)), [n.replace(", ", ",\n") for n in names])
        memory.set_yticks(range(len(names)), [""] * len(names))


def _memory_by_steps(
    problem: Oregonator, signal: Array, display: Display
) -> dict[str, dict[str, int]]:
    """XLA's temporary memory of a gradient by each mode, by the number of steps that are allowed for; nothing is run."""
    found: dict[str, dict[str, int]] = {}
    with display.stage("memory by the number of steps", 2 * len(_ALLOWED)):
        for most in _ALLOWED:
            methods = programs(problem, most)
            found[str(most)] = {}
            for name in (OURS, REVERSE):
                analysis: Any = (
                    jax.jit(methods[name])
                    .lower(jnp.asarray(START), signal)
                    .compile()
                    .memory_analysis()
                )
                found[str(most)][name] = analysis.temp_size_in_bytes
                display.advance(1, f"{most:,} steps, {name}")
    return found


def fit(
    gradients: dict[str, Callable[[Array], tuple[Array, Array]]],
    start: np.ndarray,
    evaluations: int,
    display: Display,
) -> dict[str, Any]:
    """L-BFGS, each of whose evaluations is a value and a gradient. Every method has a clock of its own.

    All are called at each point, in alternating order: what disturbs the machine disturbs all of them, and they agree to rounding.
    """
    losses, disagreement = [], 0.0
    seconds: dict[str, list[float]] = {name: [] for name in gradients}

    def evaluate(params):
        nonlocal disagreement
        answers = {}
        for name in list(gradients) if len(losses) % 2 else reversed(list(gradients)):
            began = time.perf_counter()
            answers[name] = gradients[name](jnp.asarray(params))
            seconds[name].append(time.perf_counter() - began + (seconds[name] or [0.0])[-1])
        (value, grads), *others = (
            tuple(np.asarray(x) for x in answers[name]) for name in gradients
        )
        if not np.isfinite(value):
            value, grads = np.asarray(1e6), np.zeros_like(grads)  # a wall for the line search
        else:
            for _, other in others:
                disagreement = max(
                    disagreement, float(np.linalg.norm(other - grads) / np.linalg.norm(grads))
                )
        losses.append(float(value))
        display.advance(1, f"misfit {value:.4g}")
        return float(value), grads

    with display.stage("a fit", evaluations):
        options = {"maxfun": evaluations, "ftol": 1e-4}
        limits = [(-0.7, 0.7)] * len(start)
        found = minimize(
            evaluate, start, jac=True, method="L-BFGS-B", bounds=limits, options=options
        )
    return {
        "losses": losses,
        "seconds": seconds,
        "end": found.x.tolist(),
        "disagreement": disagreement,
    }


def _over_reverse(record: dict[str, Any], name: str) -> tuple[float, float]:
    cost, reverse = record["costs"][name], record["costs"][REVERSE]
    return cost["seconds"]["median"] / reverse["seconds"]["median"], cost["temp_bytes"] / reverse[
        "temp_bytes"
    ]
