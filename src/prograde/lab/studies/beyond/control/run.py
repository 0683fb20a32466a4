"""A runner learns to run at a commanded speed, through the events of its simulation."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import prograde as pg
from prograde.lab.display import Display
from prograde.lab.studies.beyond.control import runner

RATES = (0.003, 0.01, 0.03)
# forward gradients and differences get the same numbers of directions
FORWARD: dict[str, dict[str, pg.Estimator]] = {
    "linear": {"ForwardJacobian": pg.ForwardJacobian()},
    "network": {
        "forward gradients along 1": pg.WeightPerturbation(pg.Rademacher(), num_tangents=1),
        "forward gradients along 4": pg.WeightPerturbation(pg.Rademacher(), num_tangents=4),
    },
}
SEARCHES = {
    "differences along 1": pg.CentralDifference(num_tangents=1, step=1e-2),
    "differences along 4": pg.CentralDifference(num_tangents=4, step=1e-2),
}


def linear(params: dict[str, Any]) -> runner.Controller:
    """Linear controller of eight numbers: angle and stiffness from height, speed and command."""
    return lambda sees: params["weights"] @ sees + params["bias"]


def network(params: dict[str, Any]) -> runner.Controller:
    """Controller with one hidden layer, with the inputs and outputs of the linear one."""
    return lambda sees: jnp.tanh(sees @ params["first"] + params["bias"]) @ params["second"]


def controllers() -> dict[
    str, tuple[Callable[[dict[str, Any]], runner.Controller], dict[str, Any]]
]:
    """Returns each controller with its first parameters, with which it changes nothing."""
    first = jax.random.normal(jax.random.key(1), (3, 32))
    return {
        "linear": (linear, {"weights": jnp.zeros((2, 3)), "bias": jnp.zeros(2)}),
        "network": (network, {"first": first, "bias": jnp.zeros(32), "second": jnp.zeros((32, 2))}),
    }


def runs(key: Any, batch: int, hops: int) -> tuple[runner.Apex, Any, Any]:
    """Draws starts, commanded speeds and ground of a batch of runs."""
    key_command, key_speed, key_drops = jax.random.split(key, 3)
    commands = jax.random.uniform(key_command, (batch,), minval=1.5, maxval=2.0)
    speeds = commands + 0.1 * jax.random.normal(key_speed, (batch,))
    apex = runner.Apex(jnp.full(batch, runner.USUAL_HEIGHT), speeds)
    return apex, commands, 0.02 * jax.random.normal(key_drops, (batch, hops))


def loss(make: Callable, params: Any, batch: tuple) -> Any:
    """Mean cost of a batch of runs."""
    return jnp.mean(jax.vmap(partial(runner.cost, make(params)))(*batch))


def outcome(make: Callable, params: Any, batch: tuple) -> dict[str, float]:
    """Returns the mean cost, the share of falls, and the rms error of the other final speeds."""
    hops, upright = jax.vmap(partial(runner.run, make(params)))(*batch)
    stands = upright[:, -1] * (1 - hops.fell[:, -1])
    error = jnp.sum(stands * (hops.apex.speed[:, -1] - batch[1]) ** 2) / jnp.maximum(
        stands.sum(), 1
    )
    cost = loss(make, params, batch)
    return {"cost": float(cost), "fell": float(1 - stands.mean()), "speed": float(jnp.sqrt(error))}


def train(
    make: Callable, start: Any, batch: tuple, estimator: pg.Estimator, steps: int
) -> Callable:
    """Compiles training: rate -> (parameters after `steps` steps of Adam, losses)."""
    gradient = pg.value_and_grad(partial(loss, make), estimator)
    # derivatives are large close to a fall; all methods get the same remedy
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1.0))

    def run(rate):
        def body(carry, key):
            params, state = carry
            value, grads = gradient(key, params, batch)
            updates, state = optimizer.update(grads, state, params)
            return (jax.tree.map(lambda p, u: p + rate * u, params, updates), state), value

        carry = (start, optimizer.init(start))
        (params, _), losses = lax.scan(body, carry, jax.random.split(jax.random.key(2), steps))
        return params, losses

    program = jax.jit(run).lower(RATES[0]).compile()
    return lambda rate: jax.block_until_ready(program(rate))


def gradient_errors() -> dict[str, float]:
    """Compares the forward gradient with central differences in float64.

    Returns the relative error, and how many of the runs fell.
    """
    with jax.enable_x64(True):
        make = linear
        flat = jnp.zeros(8)
        batch = jax.tree.map(lambda x: x.astype(jnp.float64), runs(jax.random.key(3), 4, 3))
        fun = jax.jit(lambda p: loss(make, {"weights": p[2:].reshape(2, 3), "bias": p[:2]}, batch))
        exact = jax.jit(partial(pg.value_and_grad(fun, pg.ForwardJacobian()), None))(flat)[1]
        h = 1e-6
        differences = jnp.stack(
            [(fun(flat + h * e) - fun(flat - h * e)) / (2 * h) for e in jnp.eye(8)]
        )
        fell = outcome(make, {"weights": flat[2:].reshape(2, 3), "bias": flat[:2]}, batch)["fell"]
        return {
            "error": float(jnp.linalg.norm(exact - differences) / jnp.linalg.norm(differences)),
            "fell": fell,
        }


def measure(full: bool, display: Display, steps: int | None = None, batch_size: int = 32) -> dict:
    """Takes all figures. Tests pass fewer `steps` and a smaller batch."""
    steps, hops = steps or (1000 if full else 200), 6
    with jax.enable_x64(False):
        batch, held_out = (
            runs(jax.random.key(4), batch_size, hops),
            runs(jax.random.key(5), 256, hops),
        )
        try:
            jax.grad(partial(loss, linear))(controllers()["linear"][1], batch)
            refused = None
        except ValueError as error:
            refused = str(error).strip().splitlines()[0]
        found: dict[str, Any] = {}
        paths = {}
        with display.stage(
            "runners learn", sum(len(f) + len(SEARCHES) for f in FORWARD.values()) * len(RATES)
        ):
            for kind, (make, start) in controllers().items():
                methods = FORWARD[kind] | SEARCHES
                programs = {n: train(make, start, batch, e, steps) for n, e in methods.items()}
                taken: dict[str, list[float]] = {name: [] for name in methods}
                best: dict[str, Any] = {}
                for rate in RATES:  # the methods take turns
                    for name, program in programs.items():
                        began = time.perf_counter()
                        params, losses = program(rate)
                        taken[name].append((time.perf_counter() - began) / steps)
                        after = float(loss(make, params, batch))
                        display.advance(1, f"{kind}, {name}, rate {rate:g}: {after:.3g}")
                        if np.isfinite(after) and (name not in best or after < best[name]["after"]):
                            best[name] = {
                                "after": after,
                                "rate": rate,
                                "losses": losses.tolist(),
                                "params": params,
                            }
                ours = best[min(FORWARD[kind], key=lambda name: best[name]["after"])]["params"]
                for name, run in best.items():
                    run["seconds"] = float(np.median(taken[name]))
                    run["held_out"] = outcome(make, run.pop("params"), held_out)
                one = (
                    runner.Apex(jnp.asarray(runner.USUAL_HEIGHT), jnp.asarray(1.5)),
                    jnp.asarray(1.9),
                )
                flat = jnp.zeros(hops + 2)
                before, after = (runner.path(make(params), *one, flat) for params in (start, ours))
                paths[kind] = {"before": before, "after": after}
                number = sum(p.size for p in jax.tree.leaves(start))
                found[kind] = {
                    "parameters": number,
                    "start": outcome(make, start, held_out),
                    "runs": best,
                }
    return {
        "steps": steps,
        "refused": refused,
        "gradient": gradient_errors(),
        "found": found,
        "paths": paths,
    }
