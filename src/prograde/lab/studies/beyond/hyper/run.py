"""Hypergradients: derivatives of the held-out loss by the hyperparameters of a training run.

Forward mode computes them along the whole run.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import prograde as pg
from prograde.lab.display import Display
from prograde.lab.measure.timing import compiled, programs_in_turns
from prograde.lab.studies.beyond.horizon.loops import nested, straight
from prograde.lab.studies.beyond.hyper.training import Classifier, Cleaning, centre, prior

_STYLE = {
    "forward run": {"color": "#000000", "linestyle": ":", "marker": "v"},
    "forward mode": {"color": "#D55E00", "linestyle": "-", "marker": "o"},
    "backprop": {"color": "#0072B2", "linestyle": "--", "marker": "^"},
    "backprop, √T segments": {"color": "#CC79A7", "linestyle": "-.", "marker": "D"},
    "forward gradient": {"color": "#009E73", "linestyle": "-", "marker": "s"},
}
OURS, BACKPROP, CHECKPOINTED = "forward mode", "backprop", "backprop, √T segments"


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    lengths: tuple[int, ...] = (1_000, 10_000)  # training steps that are differentiated through
    rounds: int = 3
    run_steps: int = 300  # of the run that is tuned
    meta_steps: int = 40
    starts: int = 5
    cleaning_steps: int = 100
    cleaning_seconds: float = 1.0  # of training for each method
    cleaning_rates: tuple[float, ...] = (0.03, 0.1, 0.3)
    num_tangents: int = 16


FULL = Plan((1_000, 10_000, 30_000), 7, meta_steps=60, starts=10, cleaning_seconds=8.0)


def hypergradients(outcome: Callable) -> dict[str, Callable[[Any], Any]]:
    """Makes method -> (hyperparameters -> (held-out loss, hypergradient)).

    "forward run" gives the loss alone.
    """

    def by(estimator, loop):
        return lambda h: pg.value_and_grad(lambda h: outcome(h, loop)[0], estimator)(None, h)

    return {
        "forward run": lambda h: outcome(h, straight)[0],
        OURS: by(pg.ForwardJacobian(), straight),
        BACKPROP: by(pg.Backprop(), straight),
        CHECKPOINTED: by(pg.Backprop(), nested(2)),
    }


def _flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]).astype(np.float64)


def long_runs(plan: Plan, display: Display) -> dict[str, Any]:
    """Measures time, memory and agreement of hypergradients through runs of several lengths."""
    found = {}
    for steps in plan.lengths:
        run, gradients = Classifier(steps), {}
        programs = {
            name: compiled(fun, centre()) for name, fun in hypergradients(run.outcome).items()
        }
        figures = programs_in_turns(
            programs,
            plan.rounds,
            "forward run",
            display,
            f"hypergradient, {steps:,} training steps",
        )
        gradients["float32"] = {m: _flat(programs[m].call()[1]) for m in (OURS, BACKPROP)}
        with jax.enable_x64(True):
            twins = hypergradients(run.outcome)
            gradients["float64"] = {
                m: _flat(jax.jit(twins[m])(centre())[1]) for m in (OURS, BACKPROP)
            }
        errors = {
            precision: float(np.linalg.norm(g[OURS] - g[BACKPROP]) / np.linalg.norm(g[BACKPROP]))
            for precision, g in gradients.items()
        }
        found[str(steps)] = {"methods": figures, "errors": errors}
    return found


def tune(run: Classifier, meta_steps: int, rate: float = 0.15) -> Callable[[Any], Any]:
    """Makes Adam on the hyperparameters by hypergradients: start -> (losses, test) by meta-step."""
    grad_fn = pg.value_and_grad(run.outcome, pg.ForwardJacobian(), has_aux=True)
    optimizer = optax.chain(optax.zero_nans(), optax.clip_by_global_norm(1.0), optax.adam(rate))

    def meta_step(carry: Any, _: None) -> Any:
        hyper, state = carry
        (loss, test), grads = grad_fn(None, hyper)
        updates, state = optimizer.update(grads, state, hyper)
        return (optax.apply_updates(hyper, updates), state), (loss, test)

    return lambda start: lax.scan(meta_step, (start, optimizer.init(start)), None, meta_steps)[1]


def _best(seen: Any) -> tuple[list[float], dict[str, float]]:
    """Returns (least held-out loss so far, by trial; test figures where it is least)."""
    losses = np.nan_to_num(np.asarray(seen[0]), nan=np.inf)
    at = int(losses.argmin())
    test = {k: float(v[at]) for k, v in seen[1].items()}
    return np.minimum.accumulate(losses).tolist(), {"validation": float(losses[at]), **test}


def tuning(plan: Plan, display: Display) -> dict[str, Any]:
    """Tunes from several starts, and by random search for as long from the same prior."""
    run = Classifier(plan.run_steps)
    draw = lambda seed: prior(jax.random.key(seed))  # noqa: E731
    begin = run.outcome(centre())
    program = jax.jit(tune(run, plan.meta_steps))
    jax.block_until_ready(program(centre()))
    trials = 64
    searches = {}
    for at_once in (1, 16):  # random search may run several trials together if that is faster

        def search(keys: jax.Array, at_once: int = at_once) -> Any:
            return lax.map(lambda key: run.outcome(prior(key)), keys, batch_size=at_once)

        compiled_search = jax.jit(search)
        keys = jax.random.split(jax.random.key(7), trials)
        jax.block_until_ready(compiled_search(keys))
        since = time.perf_counter()
        jax.block_until_ready(compiled_search(jax.random.split(jax.random.key(8), trials)))
        searches[at_once] = ((time.perf_counter() - since) / trials, compiled_search)
    per_trial, compiled_search = min(searches.values(), key=lambda found: found[0])
    found: dict[str, Any] = {
        "start": {"validation": float(begin[0]), **{k: float(v) for k, v in begin[1].items()}}
    }
    runs: dict[str, list] = {"hypergradient": [], "random search": []}
    with display.stage("tuning: hypergradients and random search", plan.starts):
        for seed in range(plan.starts):
            start = centre() if seed == 0 else draw(seed)  # the first start is the usual choice
            since = time.perf_counter()
            seen = jax.block_until_ready(program(start))
            seconds = time.perf_counter() - since
            curve, best = _best(seen)
            runs["hypergradient"].append({"seconds": seconds, "curve": curve, **best})
            batches, since = [], time.perf_counter()
            key = jax.random.key(1000 + seed)
            while (spent := time.perf_counter() - since) < seconds or not batches:
                key, now = jax.random.split(key)
                batches.append(
                    jax.block_until_ready(compiled_search(jax.random.split(now, trials)))
                )
            seen = jax.tree.map(lambda *parts: np.concatenate(parts), *batches)
            curve, best = _best(seen)
            runs["random search"].append({"seconds": spent, "curve": curve, **best})
            display.advance(
                1,
                f"held-out loss {runs['hypergradient'][-1]['validation']:.3f} and "
                f"{best['validation']:.3f}",
            )
    return found | {"runs": runs, "trial_seconds": per_trial, "meta_steps": plan.meta_steps}


def cleaning(plan: Plan, display: Display) -> dict[str, Any]:
    """Learns weights of examples by each method, in equal time.

    The methods are forward gradients, exact gradients in chunks of tangents, and reverse mode.
    """
    run = Cleaning(plan.cleaning_steps)
    estimators: dict[str, pg.Estimator] = {
        OURS: pg.ForwardJacobian(chunk=64),
        "forward gradient": pg.WeightPerturbation(pg.Rademacher(), num_tangents=plan.num_tangents),
        BACKPROP: pg.Backprop(),
    }
    grads = {
        name: pg.value_and_grad(lambda h: run.outcome(h)[0], e) for name, e in estimators.items()
    }
    grads[CHECKPOINTED] = pg.value_and_grad(lambda h: run.outcome(h, nested(2))[0], pg.Backprop())
    programs = {name: compiled(fun, jax.random.key(0), run.start()) for name, fun in grads.items()}
    programs["forward run"] = compiled(lambda h: run.outcome(h)[0], run.start())
    figures = programs_in_turns(programs, plan.rounds, "forward run", display, "data cleaning")
    outcome, found = jax.jit(run.outcome), {}

    def described(hyper: jax.Array) -> dict[str, float]:
        loss, test = outcome(hyper)
        return {
            "validation": float(loss),
            **{k: float(v) for k, v in test.items()},
            **run.found(hyper),
        }

    with display.stage("data cleaning: training", len(estimators) * len(plan.cleaning_rates)):
        for name in estimators:
            count, fun, tried = (
                max(1, round(plan.cleaning_seconds / figures[name]["seconds"]["median"])),
                grads[name],
                {},
            )

            def train(
                rate: jax.Array, hyper: jax.Array, fun: Callable = fun, count: int = count
            ) -> jax.Array:
                def update(carry: Any, key: jax.Array) -> Any:
                    hyper, state = carry
                    _, g = fun(key, hyper)
                    updates, state = optax.scale_by_adam().update(g, state)
                    updates = jax.tree.map(lambda u: -rate * u, updates)
                    return (optax.apply_updates(hyper, updates), state), None

                start = (hyper, optax.scale_by_adam().init(hyper))
                return lax.scan(update, start, jax.random.split(jax.random.key(1), count))[0][0]

            program = jax.jit(train)
            for rate in plan.cleaning_rates:
                tried[rate] = described(program(jnp.float32(rate), run.start()))
                display.advance(1, f"{name} at rate {rate:g}: AUC {tried[rate]['auc']:.3f}")
            rate = min(tried, key=lambda r: tried[r]["validation"])
            found[name] = {"meta_steps": count, "rate": rate, **tried[rate]}
    return {
        "costs": figures,
        "start": described(run.start()),
        "methods": found,
        "examples": run.examples,
    }


def measure(full: bool, display: Display) -> dict[str, Any]:
    """Takes all figures. On two cores this takes a minute, and several with `full`."""
    return measured(FULL if full else Plan(), display)


def measured(plan: Plan, display: Display) -> dict[str, Any]:
    """Takes the figures of a plan."""
    record = {
        "plan": asdict(plan),
        "long": long_runs(plan, display),
        "tuning": tuning(plan, display),
    }
    return record | {"cleaning": cleaning(plan, display)}
