"""Samples posteriors of differential equations by NUTS, with the gradient of each method."""

import importlib.util
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
from blackjax.diagnostics import effective_sample_size
from jaxtyping import Array

import prograde as pg
from prograde.lab.display import Display
from prograde.lab.measure.timing import compiled, orders, programs_in_turns
from prograde.lab.studies.beyond.posterior.equations import (
    OURS,
    Equation,
    hares_and_lynxes,
    kinetics,
)

BARE = "log density alone"
CLOSE = 1.2  # reverse modes up to so many times the fastest one are sampled
ACCURATE = 1e-2  # relative error of a gradient, above which a method is not sampled


def _costs(
    equation: Equation, densities: dict[str, Callable], rounds: int, display: Display
) -> tuple[dict[str, Any], dict[str, str]]:
    """Times value and gradient of each method in turns; also returns what JAX refuses."""
    start = jnp.asarray(equation.start)
    ready = {BARE: compiled(densities[OURS], start)}
    refused = {}
    with display.stage(f"{equation.name}: compiling", len(densities)):
        for name, density in densities.items():
            try:
                ready[name] = compiled(jax.value_and_grad(density), start)
            except (TypeError, ValueError) as error:
                refused[name] = str(error).split("\n")[0]
            display.advance(1, name)
    costs = programs_in_turns(ready, rounds, BARE, display, f"{equation.name}: the gradient")
    exact = ready[OURS].call()[1]
    for name in ready.keys() - {BARE}:
        error = jnp.linalg.norm(ready[name].call()[1] - exact) / jnp.linalg.norm(exact)
        costs[name]["error"] = float(error) if jnp.isfinite(error) else None
    return costs, refused


def sampled_methods(costs: dict[str, Any]) -> list[str]:
    """Ours, and every accurate reverse mode that could be the best one."""
    reverse = {
        name: cost["seconds"]["median"]
        for name, cost in costs.items()
        if name not in (BARE, OURS) and (cost["error"] or np.inf) < ACCURATE
    }
    return [OURS, *(n for n, s in reverse.items() if s <= CLOSE * min(reverse.values()))]


def _chain(density: Callable[[Array], Array], draws: int) -> Callable[..., Any]:
    """The program of a chain: draws of NUTS, the number of gradients, and of divergences."""

    def chain(key: Array, state: Any, parameters: dict[str, Any]) -> Any:
        step: Any = blackjax.nuts(density, **parameters).step

        def draw(state, key):
            state, info = step(key, state)
            return state, (state.position, info.num_integration_steps, info.is_divergent)

        _, (positions, gradients, divergent) = jax.lax.scan(
            draw, state, jax.random.split(key, draws)
        )
        return positions, jnp.sum(gradients), jnp.sum(divergent)

    return chain


def _sample(
    equation: Equation,
    densities: dict[str, Callable],
    seeds: int,
    draws: int,
    display: Display,
) -> dict[str, list[dict[str, float]]]:
    """Samples by all methods in turns, from the same adapted sampler, with the same keys."""
    start = jnp.asarray(equation.start)
    adaptation: Any = blackjax.window_adaptation(blackjax.nuts, densities[OURS])
    adapt = jax.jit(lambda key: adaptation.run(key, start, num_steps=equation.warmup)[0])
    key_adapt, key_draws = jax.random.split(jax.random.key(0))
    with display.stage(f"{equation.name}: adapting", 1):
        state, parameters = jax.block_until_ready(adapt(key_adapt))
        display.advance(1, OURS)
    chains = {}
    with display.stage(f"{equation.name}: compiling the samplers", len(densities)):
        for name, density in densities.items():
            program = jax.jit(_chain(density, draws))
            chains[name] = program.lower(key_draws, state, parameters).compile()
            display.advance(1, name)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in densities}
    with display.stage(f"{equation.name}: {seeds} seeds", seeds * len(densities)):
        for seed, order in zip(range(seeds), orders(list(densities)), strict=False):
            for name in order:
                begin = time.perf_counter()
                key = jax.random.fold_in(key_draws, seed)
                positions, gradients, divergent = jax.block_until_ready(
                    chains[name](key, state, parameters)
                )
                seconds = time.perf_counter() - begin
                found[name].append(
                    {
                        "seconds": seconds,
                        "effective": float(jnp.min(effective_sample_size(positions[None]))),
                        "gradients": int(gradients),
                        "divergent": int(divergent),
                        "mean": np.mean(positions, axis=0).tolist(),
                        "deviation": np.std(positions, axis=0).tolist(),
                    }
                )
                display.advance(1, name)
    return found


def _equation(
    equation: Equation, rounds: int, seeds: int, shorter: int, display: Display
) -> dict[str, Any]:
    """All figures of one equation, by chains that are so many times shorter."""
    densities = {
        name: partial(equation.log_density, solve) for name, solve in equation.methods().items()
    }
    costs, refused = _costs(equation, densities, rounds, display)
    chosen = {name: densities[name] for name in sampled_methods(costs)}
    return {
        "parameters": len(equation.start),
        "steps": equation.steps(),
        "max_steps": equation.max_steps,
        "costs": costs,
        "refused": refused,
        "warmup": equation.warmup,
        "draws": equation.draws // shorter,
        "chains": _sample(equation, chosen, seeds, equation.draws // shorter, display),
    }


def _wrapper(equation: Equation, rounds: int, display: Display) -> dict[str, Any]:
    """What the wrapper costs in addition to the forward mode that it runs."""
    start, v = jnp.asarray(equation.start), jnp.ones(len(equation.start))
    bare = partial(equation.log_density, equation.forward_alone)
    wrapped = pg.forward_mode(bare)
    push = lambda f: lambda z, v: jax.jvp(f, (z,), (v,))  # noqa: E731
    exact = partial(pg.value_and_grad(bare, pg.ForwardJacobian()), None)
    gradients = {
        "ForwardJacobian": compiled(exact, start),
        "forward_mode": compiled(jax.value_and_grad(wrapped), start),
    }
    products = {
        "jax.jvp": compiled(push(bare), start, v),
        "jax.jvp of forward_mode": compiled(push(wrapped), start, v),
    }
    return {
        "gradient": programs_in_turns(
            gradients, rounds, "ForwardJacobian", display, "the wrapper: value and gradient"
        ),
        "jvp": programs_in_turns(products, rounds, "jax.jvp", display, "the wrapper: jvp"),
    }


def measure(
    full: bool,
    display: Display,
    equations: tuple[Equation, ...] | None = None,
    contact: bool = True,
) -> dict[str, Any]:
    """Takes all figures. Tests pass other `equations`, and leave out `contact`."""
    rounds, seeds = (9, 3) if full else (5, 2)
    with jax.enable_x64(True):
        equations = equations or (hares_and_lynxes(), kinetics())
        found = {
            equation.name: _equation(equation, rounds, seeds, 1 if full else 3, display)
            for equation in equations
        }
        record = {"equations": found, "wrapper": _wrapper(equations[0], 3 * rounds, display)}
        if contact and importlib.util.find_spec("mujoco") is not None:
            from prograde.lab.studies.beyond.posterior import contact as in_contact

            record["contact"] = in_contact.measure(display)
    return record
