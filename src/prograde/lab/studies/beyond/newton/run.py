"""Newton's method in a loop that ends at convergence.

Two functions are computed like this: the current of a solar cell, of which five parameters are
fitted, and the output of a network in equilibrium.
"""

import itertools
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import prograde as pg
from prograde.lab.display import Display
from prograde.lab.measure.timing import Program, compiled, programs_in_turns
from prograde.lab.studies.beyond.newton import equilibrium, solar_cell

BARE, OURS, REFUSED = "bare function", "while loop, ForwardJacobian", "while loop, jax.grad"
BOUNDED = {
    "bounded scan, lax.cond": solar_cell.by_scan_cond,
    "bounded scan, jnp.where": solar_cell.by_scan_where,
}
IMPLICIT = "implicit differentiation"
REVERSE = BOUNDED | {
    "checkpointed while loop": solar_cell.by_checkpoints,
    IMPLICIT: solar_cell.by_implicit_function,
}
START = np.array([0.7, 1e-6, 1.7, 0.02, 30.0])
# search ranges of published fits of this cell: photocurrent, saturation current, ideality and
# two resistances
RANGES = (
    (0.1, 0.5, 1.0),
    (1e-9, 1e-7, 1e-6),
    (1.0, 1.25, 1.5, 2.0),
    (1e-3, 0.03, 0.1, 0.25, 0.5),
    (1.0, 100.0),
)
TOLERANCES = (1e-2, 1e-4, 1e-6, 1e-8, 1e-10)
RATES = (0.003, 0.01, 0.03)
_STEPS = 50  # steps of the fit in one timed call, because one step takes less time than a call


def refusal(fun: Callable[..., Any], *args: Any) -> str | None:
    """Returns the first line of the error of `jax.grad`, or `None` if it takes the function."""
    try:
        jax.grad(fun)(*args)
    except ValueError as error:
        return str(error).strip().splitlines()[0]
    return None


def steps_of_a_fit(gradient: Callable[[Any], tuple[Any, Any]], params: Any) -> Any:
    """Takes `_STEPS` steps of Adam; returns the parameters after them."""
    optimizer = optax.adam(2e-3)

    def body(carry, _):
        params, state = carry
        value, grads = gradient(params)
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    return lax.scan(body, (params, optimizer.init(params)), None, length=_STEPS)


def fitted(
    gradient: Callable[[Any], tuple[Any, Any]], loss: Callable[[Any], Any], params: Any, steps: int
) -> Any:
    """Fits by L-BFGS, whose line search needs values only; returns parameters and losses."""
    search = optax.scale_by_backtracking_linesearch(max_backtracking_steps=25, store_grad=False)
    optimizer = optax.chain(optax.scale_by_lbfgs(), optax.scale(-1.0), search)

    def body(carry, _):
        params, state = carry
        value, grads = gradient(params)
        updates, state = optimizer.update(
            grads, state, params, value=value, grad=grads, value_fn=loss
        )
        return (optax.apply_updates(params, updates), state), value

    (params, _), losses = lax.scan(body, (params, optimizer.init(params)), None, length=steps)
    return params, losses


def smallest_bound() -> int:
    """Returns the largest number of iterations at any corner of the search ranges."""
    corners = jnp.log(jnp.array(list(itertools.product(*RANGES))))
    return int(
        jax.jit(jax.vmap(lambda p: solar_cell.solve(p, jnp.asarray(solar_cell.VOLTS))[1]))(
            corners
        ).max()
    )


def iterations() -> dict[str, Any]:
    """Counts the iterations of the loop on a grid over two of the five parameters."""
    series, ideality = np.geomspace(1e-3, 0.5, 60), np.linspace(1, 2, 40)
    plane = jnp.log(jnp.array([[0.76, 3e-7, n, r, 53.0] for n in ideality for r in series]))
    counts = jax.jit(jax.vmap(lambda p: solar_cell.solve(p, jnp.asarray(solar_cell.VOLTS))[1]))(
        plane
    )
    counts = counts.reshape(len(ideality), len(series))
    return {"series": series.tolist(), "ideality": ideality.tolist(), "counts": counts.tolist()}


def _errors_by_tolerance(params: Any, exact: Any) -> dict[str, Any]:
    errors: dict[str, Any] = {"tolerances": list(TOLERANCES)}
    stops: tuple[Literal["step", "residual"], ...] = ("step", "residual")
    for stop in stops:

        def loss(params, tolerance, stop: Literal["step", "residual"] = stop):
            return solar_cell.misfit(
                lambda p, v, _: solar_cell.solve(p, v, tolerance, stop)[0], params, 0
            )

        gradient = jax.jit(partial(pg.value_and_grad(loss, pg.ForwardJacobian()), None))
        found = [gradient(params, tolerance)[1] for tolerance in TOLERANCES]
        errors[stop] = [float(jnp.linalg.norm(g - exact) / jnp.linalg.norm(exact)) for g in found]
    return errors


def _train_network(steps: int, display: Display) -> dict[str, Any]:
    key_examples, key_weights, key_train = jax.random.split(jax.random.key(0), 3)
    inputs, targets = equilibrium.examples(key_examples, 64)
    weights = equilibrium.initial(key_weights, 16)

    def loss(weights, implicit):
        return jnp.mean((equilibrium.predict(weights, inputs, implicit) - targets) ** 2)

    estimator = pg.WeightPerturbation(pg.Rademacher(), num_tangents=16)
    gradients = {
        "WeightPerturbation": pg.value_and_grad(partial(loss, implicit=False), estimator),
        IMPLICIT: pg.value_and_grad(partial(loss, implicit=True), pg.Backprop()),
    }
    runs: dict[str, Any] = {}
    with display.stage("an equilibrium network", len(gradients) * len(RATES)):
        for name, gradient in gradients.items():

            def train(rate, gradient=gradient):
                optimizer = optax.adam(optax.schedules.cosine_decay_schedule(1.0, steps))

                def body(carry, key):
                    weights, state = carry
                    value, grads = gradient(key, weights)
                    updates, state = optimizer.update(grads, state, weights)
                    moved = jax.tree.map(lambda w, u: w + rate * u, weights, updates)
                    return (moved, state), value

                start = (weights, optimizer.init(weights))
                (last, _), losses = lax.scan(body, start, jax.random.split(key_train, steps))
                return jnp.append(losses, loss(last, False))

            program = jax.jit(train).lower(RATES[0]).compile()
            for rate in RATES:
                begin = time.perf_counter()
                losses = np.asarray(program(rate))
                seconds = (time.perf_counter() - begin) / steps
                display.advance(1, f"{name}, rate {rate:g}: {losses[-1]:.2g}")
                if np.isfinite(losses[-1]) and (
                    name not in runs or losses[-1] < runs[name]["losses"][-1]
                ):
                    at = np.unique(np.linspace(0, steps, 201).astype(int))
                    kept = {"at": at.tolist(), "losses": losses[at].tolist()}
                    runs[name] = {"rate": rate, "seconds": seconds, **kept}
    return {
        "parameters": sum(w.size for w in jax.tree.leaves(weights)),
        "steps": steps,
        "runs": runs,
    }


def measure(
    full: bool, display: Display, steps: int | None = None, rounds: int | None = None
) -> dict:
    """Takes all figures.

    `steps` of training the network and `rounds` of timing replace the numbers of the quick or the
    full run.
    """
    with jax.enable_x64(True):
        params = jnp.log(jnp.asarray(START))
        bound = smallest_bound()
        losses = {
            name: partial(solar_cell.misfit, solver, bound=bound)
            for name, solver in REVERSE.items()
        }
        program = partial(solar_cell.misfit, solar_cell.by_while_loop, bound=bound)
        gradients = {name: jax.value_and_grad(loss) for name, loss in losses.items()}
        gradients[OURS] = partial(pg.value_and_grad(program, pg.ForwardJacobian()), None)
        exact = gradients[IMPLICIT](params)[1]
        relative = lambda g: float(jnp.linalg.norm(g - exact) / jnp.linalg.norm(exact))  # noqa: E731
        h = 1e-5
        differences = [
            (program(params + h * e) - program(params - h * e)) / (2 * h) for e in jnp.eye(5)
        ]

        def bare(params):
            # the value enters the parameters, scaled to a negligible size, so that XLA cannot leave
            # out its evaluation
            def body(p, _):
                value = program(p)
                return p + 1e-12 * value, value

            return lax.scan(body, params, None, length=_STEPS)

        programs: dict[str, Program] = {BARE: compiled(bare, params)}
        for name in (OURS, *REVERSE):
            programs[name] = compiled(partial(steps_of_a_fit, gradients[name]), params)
        costs = programs_in_turns(
            programs,
            rounds or (31 if full else 11),
            BARE,
            display,
            "steps of the solar cell's fit",
        )
        for row in costs.values():
            row["seconds"] |= {k: row["seconds"][k] / _STEPS for k in ("median", "low", "high")}
        for name, gradient in gradients.items():
            costs[name]["error"] = relative(gradient(params)[1])
        fit = compiled(lambda p: fitted(gradients[OURS], program, p, 120), params)
        begin = time.perf_counter()
        best, path = fit.call()
        seconds = time.perf_counter() - begin
        curve = jnp.linspace(-0.22, 0.6, 120)
        return {
            "bound": bound,
            "refused": refusal(program, params),
            "costs": costs,
            "differences": relative(jnp.stack(differences)),
            "tolerance": _errors_by_tolerance(params, exact),
            "iterations": iterations(),
            "fit": {
                "start": START.tolist(),
                "end": jnp.exp(best).tolist(),
                "seconds": seconds,
                "rmse": (1e-2 * jnp.sqrt(jnp.append(path, program(best)))).tolist(),
                "volts": curve.tolist(),
                "before": solar_cell.solve(params, curve)[0].tolist(),
                "after": solar_cell.solve(best, curve)[0].tolist(),
            },
            "network": _train_network(steps or (2000 if full else 500), display),
        }
