"""Fits the parameters of a stiff, oscillating reaction through diffrax's adaptive solver."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float
from scipy.optimize import minimize

import prograde as pg
from prograde.lab.display import Display
from prograde.lab.measure.timing import Program, programs_in_turns

BARE, OURS = "bare solve", "forward mode"
REVERSE, FEWER = "reverse mode, checkpoints", "reverse mode, few checkpoints"
TRUTH = np.array([77.27, 8.375e-6, 0.161, 1.0])
START = np.array([0.06, -0.1, 0.08, 0.03])  # logarithm of the start of the fit over the truth
INITIAL = np.array([1.0, 2.0, 3.0, 0.3, 0.5])
NOISE = 0.03  # decades
_ALLOWED = (2**13, 2**15, 2**17)  # steps


@dataclass(frozen=True)
class Oregonator:
    """The Oregonator, a model of the Belousov-Zhabotinsky reaction.

    It is from Field and Noyes (J. Chem. Phys. 60, 1974). Hairer and Wanner call it OREGO.

    a' = s (b - a b + a - q a^2)      b' = (f c - b - a b) / s      c' = w (a - c)
    """

    until: float = 650.0  # a little more than two periods
    rtol: float = 1e-5
    interval: float = 4.0  # between samples of the recorded signal
    solver: diffrax.AbstractSolver = field(default_factory=diffrax.Kvaerno3)
    response: float = 10.0  # of the electrodes, which low-pass filter the reaction

    def rates(self, y: Float[Array, " 5"], log_params: Float[Array, " 4"]) -> Float[Array, " 5"]:
        """Time derivatives of the reaction and of the signals of two electrodes.

        The signals are the low-pass filtered decades of bromide b and of oxidised catalyst c.
        """
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
        """Returns the signals of the electrodes at these times, and the number of steps."""
        save = diffrax.SaveAt(ts=times)
        rates = lambda t, y, p: self.rates(y, p)  # noqa: E731
        solution = self._solve(rates, INITIAL, log_params, diffrax.ForwardMode(), save, max_steps)
        ys: Any = solution.ys
        return ys[:, 3:], solution.stats["num_steps"]

    def misfit(
        self, adjoint: Any, max_steps: int, log_params: Array, signal: Float[Array, "samples 2"]
    ) -> Array:
        """Mean square over time of the difference from the signal, in units of the noise squared.

        The signal is linear between its samples. The misfit is integrated as one more state of the
        equation, so that neither mode has to store a curve.
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
        """The times at which the signal was sampled."""
        return np.arange(0.0, self.until + self.interval / 2, self.interval)


def programs(problem: Oregonator, max_steps: int) -> dict[str, Callable[..., tuple[Array, Array]]]:
    """Returns, for each method, the program of value and gradient. Reverse modes are diffrax's."""
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


def _memory_by_steps(
    problem: Oregonator, signal: Array, display: Display
) -> dict[str, dict[str, int]]:
    """Returns XLA's temporary memory of a gradient, by mode and maximum number of steps.

    The programs are compiled and not run.
    """
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
    """Fits by L-BFGS, and times the gradients of all methods at each point.

    Each evaluation is a value and a gradient. All methods are called at each point, in alternating
    order, so that other load on the machine affects all of them. Each has its own clock. Their
    gradients agree to rounding.
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


def measure(
    full: bool, display: Display, problem: Oregonator | None = None, evaluations: int = 40
) -> dict:
    """Takes all figures. Tests pass a smaller `problem` and fewer `evaluations` of a fit."""
    problem = problem or (Oregonator(until=2400.0, rtol=1e-6) if full else Oregonator())
    with jax.enable_x64(True):
        times, start = jnp.asarray(problem.times()), jnp.asarray(START)
        count = jax.jit(partial(problem.curves, times=times, max_steps=2**18))
        clean, steps = count(jnp.zeros(4))
        # a recorded signal has no more digits than float32, and this halves its memory
        signal = (clean + NOISE * jax.random.normal(jax.random.key(0), clean.shape)).astype(
            jnp.float32
        )
        before, steps_at_start = count(start)
        most = int(max(steps, steps_at_start))
        # parameters on the way of a fit may need more steps than its ends: allow a quarter more
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
