"""Two differential equations with data: their posteriors, and the ways to differentiate them.

The hares and lynxes are not stiff: an explicit solver takes some sixty steps. The kinetics are
stiff: their rates lie eleven decades apart, and an implicit solver takes hundreds.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.ode import odeint
from jaxtyping import Array, Float
from scipy.integrate import solve_ivp

import prograde as pg

OURS = "forward_mode"
CHECKPOINTED, STORED = "RecursiveCheckpointAdjoint", "the same, all steps stored"
DIRECT, BACKSOLVE, ODEINT = "DirectAdjoint", "BacksolveAdjoint", "odeint of JAX"

Solve = Callable[..., Float[Array, "times states"]]
"""Takes rates and unknown amounts at the start; returns the solution at the times of the data."""


@dataclass(frozen=True)
class Equation:
    """An equation with data.

    **Fields:** `initial`: the state at the start, from the amounts that are unknown there, so that
    nothing that is known has a derivative; `start`: parameters near the mode, at which gradients
    are timed;
    `log_density(solve, z)`: the log posterior of the parameters z, up to a constant; `max_steps`:
    how many steps reverse modes must allow for; `warmup`, `draws`: the steps of a window
    adaptation, and the draws for each seed of a full run.
    """

    name: str
    vector_field: Callable[[Any, Any, Any], Array]
    initial: Callable[[Array], Array]
    times: Float[np.ndarray, " times"]
    solver: Any
    rtol: float
    atol: float
    first_step: float
    max_steps: int
    start: Float[np.ndarray, " n"]
    log_density: Callable[[Solve, Float[Array, " n"]], Array]
    explicit: bool
    warmup: int
    draws: int

    def _solution(self, adjoint: Any, rates: Array, amounts: Array) -> Any:
        return diffrax.diffeqsolve(
            diffrax.ODETerm(self.vector_field),
            self.solver,
            t0=float(self.times[0]),
            t1=float(self.times[-1]),
            dt0=self.first_step,
            y0=self.initial(amounts),
            args=rates,
            saveat=diffrax.SaveAt(ts=jnp.asarray(self.times)),
            stepsize_controller=diffrax.PIDController(rtol=self.rtol, atol=self.atol),
            adjoint=adjoint,
            max_steps=self.max_steps,
            throw=False,
        )

    def solve(self, adjoint: Any, rates: Array, amounts: Array) -> Array:
        """The solution at the times of the data; not a number where steps did not suffice."""
        found = self._solution(adjoint, rates, amounts)
        return jnp.where(found.result == diffrax.RESULTS.successful, found.ys, jnp.nan)

    def forward_alone(self, rates: Array, amounts: Array) -> Array:
        """The solution, which forward mode alone can differentiate."""
        return self.solve(diffrax.ForwardMode(), rates, amounts)

    def steps(self) -> int:
        """The number of steps at the start."""
        counted: list[Array] = []

        def solve(rates: Array, amounts: Array) -> Array:
            found = self._solution(diffrax.ForwardMode(), rates, amounts)
            counted.append(found.stats["num_steps"])
            return found.ys  # pyright: ignore[reportReturnType]

        def count(z: Array) -> Array:
            self.log_density(solve, z)
            return counted[-1]

        return int(jax.jit(count)(jnp.asarray(self.start)))

    def methods(self) -> dict[str, Solve]:
        """The solver by each way to differentiate it: ours, and every reverse mode that runs."""
        controller = diffrax.PIDController(rtol=self.rtol, atol=self.atol)
        backsolve = diffrax.BacksolveAdjoint(solver=self.solver, stepsize_controller=controller)
        stored = diffrax.RecursiveCheckpointAdjoint(checkpoints=self.max_steps)
        found = {
            OURS: pg.forward_mode(self.forward_alone),
            CHECKPOINTED: partial(self.solve, diffrax.RecursiveCheckpointAdjoint()),
            STORED: partial(self.solve, stored),
            DIRECT: partial(self.solve, diffrax.DirectAdjoint()),
            BACKSOLVE: partial(self.solve, backsolve),
        }
        if self.explicit:
            found[ODEINT] = lambda rates, amounts: odeint(
                lambda y, t, rates: self.vector_field(t, y, rates),
                self.initial(amounts),
                jnp.asarray(self.times),
                rates,
                rtol=self.rtol,
                atol=self.atol,
            )
        return found


def _normal(x: Any, mean: Any, deviation: Any) -> Array:
    """The log density of normal numbers, up to a constant."""
    return jnp.sum(-0.5 * ((x - mean) / deviation) ** 2 - jnp.log(deviation))


# Hudson's Bay Company, thousands of pelts, 1900 to 1920
_HARES = (30.0, 47.2, 70.2, 77.4, 36.3, 20.6, 18.1, 21.4, 22.0, 25.4, 27.1)
_HARES += (40.3, 57.0, 76.6, 52.3, 19.5, 11.2, 7.6, 14.6, 16.2, 24.7)
_LYNXES = (4.0, 6.1, 9.8, 35.2, 59.4, 41.7, 19.0, 13.0, 8.3, 9.1, 7.4)
_LYNXES += (8.0, 12.3, 19.5, 45.7, 51.1, 29.7, 15.8, 9.7, 10.1, 8.6)


def hares_and_lynxes() -> Equation:
    """Hares u and lynxes v: u' = (a - b v) u, v' = (d u - c) v.

    The model and its priors are those of Carpenter's case study for Stan (2018). The eight
    parameters are logarithms: of a, b, c, d, of both initial values, and of the noise of both.
    """
    data = np.log(np.stack([_HARES, _LYNXES], axis=1))
    means, deviations = np.array([1.0, 0.05, 1.0, 0.05]), np.array([0.5, 0.05, 0.5, 0.05])

    def vector_field(t, y, rates):
        a, b, c, d = rates
        hares, lynxes = y
        return jnp.stack([(a - b * lynxes) * hares, (d * hares - c) * lynxes])

    def log_density(solve: Solve, z: Array) -> Array:
        rates, noise = jnp.exp(z[:4]), jnp.exp(z[6:])
        ys = solve(rates, jnp.exp(z[4:6]))
        of_rates = _normal(rates, means, deviations) + jnp.sum(z[:4])
        of_rest = _normal(z[4:6], np.log(10.0), 1.0) + _normal(z[6:], -1.0, 1.0)
        return _normal(data, jnp.log(ys), noise) + of_rates + of_rest

    return Equation(
        "hares and lynxes",
        vector_field,
        lambda amounts: amounts,
        np.arange(21.0),
        diffrax.Tsit5(),
        rtol=1e-6,
        atol=1e-6,
        first_step=0.05,
        max_steps=1024,
        start=np.log([0.55, 0.028, 0.8, 0.024, 33.9, 5.9, 0.25, 0.25]),
        log_density=log_density,
        explicit=True,
        warmup=100,
        draws=100,
    )


def kinetics(rtol: float = 1e-5) -> Equation:
    """Robertson's reactions A -> B, 2 B -> B + C, B + C -> A + C: a classic of stiff solvers.

    Five parameters, as deviations from the truth of a logarithm: three rates, the initial amount of
    A, and the noise of the logarithms of all amounts. The data are made from the truth.
    """
    truth = np.array([0.04, 3e7, 1e4])
    times = np.concatenate([[0.0], np.logspace(-1, 4, 16)])

    def vector_field(t, y, rates):
        first, second, third = rates
        a, b, c = y
        return jnp.stack(
            [
                -first * a + third * b * c,
                first * a - second * b * b - third * b * c,
                second * b * b,
            ]
        )

    def amounts(solve: Solve, z: Array) -> Array:
        ys = solve(jnp.asarray(truth) * jnp.exp(z[:3]), jnp.exp(z[3]))
        return jnp.log(jnp.maximum(ys[1:], 1e-12))

    def initial(amount: Array) -> Array:
        return jnp.stack([amount, jnp.zeros(()), jnp.zeros(())])

    def by_scipy(rates: Array, amount: Array) -> Array:
        field = lambda t, y: np.asarray(vector_field(t, y, rates))  # noqa: E731
        ends = times[0], times[-1]
        found = solve_ivp(field, ends, initial(amount), "Radau", times, rtol=1e-8, atol=1e-12)
        return jnp.asarray(found.y.T)

    noise = 0.05
    clean = np.asarray(amounts(by_scipy, jnp.zeros(5)))
    data = clean + noise * np.random.default_rng(0).normal(size=clean.shape)

    def log_density(solve: Solve, z: Array) -> Array:
        size = noise * jnp.exp(z[4])
        likelihood = _normal(data, amounts(solve, z), size)
        return likelihood + _normal(z[:4], 0.0, 1.0) + _normal(z[4], 0.0, 1.0)

    return Equation(
        "stiff kinetics",
        vector_field,
        initial,
        times,
        diffrax.Kvaerno3(),
        rtol=rtol,
        atol=1e-4 * rtol,
        first_step=1e-4,
        max_steps=1024,
        start=np.full(5, 0.05),
        log_density=log_density,
        explicit=False,
        warmup=80,
        draws=30,
    )
