"""A runner learns to run at a commanded speed, through the events of its simulation."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from matplotlib.figure import Figure

import prograde as pg
from prograde.lab.display import Display
from prograde.lab.report import Table
from prograde.lab.studies.beyond import runner
from prograde.lab.studies.beyond.problem import Problem

RATES = (0.003, 0.01, 0.03)
# the same numbers of directions for forward gradients as for differences
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
_COLOURS = {
    "forward gradients along 1": "#56B4E9",
    "differences along 1": "#E69F00",
    "differences along 4": "#D55E00",
}
_OURS = "#009E73"


def linear(params: dict[str, Any]) -> runner.Controller:
    """Eight numbers: angle and stiffness from height, speed and command."""
    return lambda sees: params["weights"] @ sees + params["bias"]


def network(params: dict[str, Any]) -> runner.Controller:
    """A hidden layer between the same."""
    return lambda sees: jnp.tanh(sees @ params["first"] + params["bias"]) @ params["second"]


def controllers() -> dict[
    str, tuple[Callable[[dict[str, Any]], runner.Controller], dict[str, Any]]
]:
    """How each is made, and the parameters with which it does nothing yet."""
    first = jax.random.normal(jax.random.key(1), (3, 32))
    return {
        "linear": (linear, {"weights": jnp.zeros((2, 3)), "bias": jnp.zeros(2)}),
        "network": (network, {"first": first, "bias": jnp.zeros(32), "second": jnp.zeros((32, 2))}),
    }


def runs(key: Any, batch: int, hops: int) -> tuple[runner.Apex, Any, Any]:
    """Starts, commanded speeds and ground of a batch of runs."""
    key_command, key_speed, key_drops = jax.random.split(key, 3)
    commands = jax.random.uniform(key_command, (batch,), minval=1.5, maxval=2.0)
    speeds = commands + 0.1 * jax.random.normal(key_speed, (batch,))
    apex = runner.Apex(jnp.full(batch, runner.USUAL_HEIGHT), speeds)
    return apex, commands, 0.02 * jax.random.normal(key_drops, (batch, hops))


def loss(make: Callable, params: Any, batch: tuple) -> Any:
    """Mean cost of a batch of runs."""
    return jnp.mean(jax.vmap(partial(runner.cost, make(params)))(*batch))


def outcome(make: Callable, params: Any, batch: tuple) -> dict[str, float]:
    """Mean cost, share of runs that ended in a fall, and rms error of the speed of the others after their last hop."""
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
    """A compiled function of the rate: the parameters after `steps` of Adam, and the losses on the way."""
    gradient = pg.value_and_grad(partial(loss, make), estimator)
    # some runs come close to a fall, where derivatives are large; all methods get the same remedy
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
    """Relative error of the forward gradient against central differences in double precision, and how many runs fell there."""
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


class Control(Problem):
    """Contact, lift-off and falls: a loop that ends at an event, differentiated with the time of the event."""

    name: ClassVar[str] = "control"
    title: ClassVar[str] = "A runner, through the events of its simulation"

    def measure(
        self, full: bool, display: Display, steps: int | None = None, batch_size: int = 32
    ) -> dict:
        """Another number of `steps` and a smaller batch, where it is to be quick."""
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
                            if np.isfinite(after) and (
                                name not in best or after < best[name]["after"]
                            ):
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
                    before, after = (
                        runner.path(make(params), *one, flat) for params in (start, ours)
                    )
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

    def tables(self, record: dict[str, Any]) -> list[Table]:
        columns = ["gradient", "rate", "ms a step", "to goal", "cost", "falls", "speed off"]
        tables = []
        for kind, found in record["found"].items():
            rows = [["before training", "", "", "", *_outcome_texts(found["start"])]]
            for name, run in found["runs"].items():
                told = [
                    f"{run['rate']:g}",
                    f"{1e3 * run['seconds']:.2f}",
                    _seconds_text(time_to(run, goal(found))),
                ]
                rows.append(
                    [name.replace("gradients ", ""), *told, *_outcome_texts(run["held_out"])]
                )
            rows.append(
                ["reverse mode", "", "refused" if record["refused"] else "taken", "", "", "", ""]
            )
            title = (
                f"A {kind} controller of {found['parameters']} numbers, {record['steps']} steps of Adam at the best of {len(RATES)} rates; seconds to the goal, which "
                "is a tenth above the lowest cost; cost, falls and error of speed are those of new runs"
            )
            tables.append(Table(title, columns, rows, unbroken=len(columns)))
        return tables

    def conclusion(self, record: dict[str, Any]) -> str:
        gradient = record["gradient"]
        text = (
            f"jax.grad {'refuses' if record['refused'] else 'takes'} the simulation; the forward gradient, with the times of the events, agrees with "
            f"central differences to {gradient['error']:.0e}."
        )
        for kind, found in record["found"].items():
            at = {name: time_to(run, goal(found)) for name, run in found["runs"].items()}
            (ours, forward), (other, differences) = (
                _soonest(at, names) for names in (FORWARD[kind], SEARCHES)
            )
            text += f" With the {kind} controller "
            if forward is None:
                text += "no forward gradient comes within a tenth of the lowest cost"
            else:
                text += f"{ours} comes within a tenth of the lowest cost after {forward:.2f} s"
            if differences is None:
                text += ", and no search by differences does."
            elif forward is None:
                text += f"; {other} does after {differences:.2f} s."
            else:
                verdict = "sooner" if forward < differences else "later"
                text += f", {verdict} than the fastest search by differences ({other}, {differences:.2f} s)."
        return text + (
            " A fall is a jump of the cost, of which no derivative knows: where most runs fall, differences over a finite step are "
            "the better guide, and the runners here begin with a leg that mostly carries them."
        )

    def draw(self, record: dict[str, Any], figure: Figure) -> None:
        figure.set_size_inches(10, 6)
        figure.set_layout_engine("constrained")
        grid = figure.add_gridspec(2, 2, height_ratios=(1, 1.3))
        picture = figure.add_subplot(grid[0, :])
        for kind, when, colour, style in (
            ("linear", "before", "#777777", ":"),
            ("linear", "after", _OURS, "-"),
            ("network", "after", "#0072B2", "--"),
        ):
            points = np.array(record["paths"][kind][when])
            label = "before training" if when == "before" else f"after, {kind} controller"
            picture.plot(*points.T, linestyle=style, color=colour, label=label)
        picture.axhline(0, color="black", linewidth=1)
        picture.set(xlabel="distance (leg lengths)", ylabel="height of the body", ylim=(-0.05, 2.1))
        title = "A run from a speed of 1.5 to a commanded 1.9 (root of leg length times gravity)"
        picture.set_title(title, loc="left", fontsize=9)
        picture.legend(ncols=3, loc="upper left")
        for i, (kind, found) in enumerate(record["found"].items()):
            axes = figure.add_subplot(grid[1, i])
            for name, run in found["runs"].items():
                at = run["seconds"] * np.arange(1, 1 + len(run["losses"]))
                axes.plot(
                    at,
                    run["losses"],
                    color=_COLOURS.get(name, _OURS),
                    label=f"{name}, rate {run['rate']:g}",
                    lw=1.2,
                )
            axes.set(xlabel="time (s)", ylabel="cost of the runs", yscale="log")
            axes.set_title(
                f"{kind.capitalize()} controller, {found['parameters']} parameters",
                loc="left",
                fontsize=9,
            )
            axes.legend()


def goal(found: dict[str, Any]) -> float:
    """A tenth above the lowest cost that any method ended with."""
    return 1.1 * min(run["after"] for run in found["runs"].values())


def time_to(run: dict[str, Any], cost: float) -> float | None:
    """Seconds until the cost of the training runs was first this low; `None` where it never was."""
    at = next((i + 1 for i, value in enumerate(run["losses"]) if value <= cost), None)
    return None if at is None else at * run["seconds"]


def _soonest(at: dict[str, float | None], names: Any) -> tuple[str, float | None]:
    reached = [(t, name) for name in names if (t := at.get(name)) is not None]
    return (min(reached)[1], min(reached)[0]) if reached else ("", None)


def _seconds_text(seconds: float | None) -> str:
    return "not" if seconds is None else f"{seconds:.2f}"


def _outcome_texts(found: dict[str, float]) -> list[str]:
    return [f"{found['cost']:.4f}", f"{100 * found['fell']:.1f} %", f"{found['speed']:.4f}"]
