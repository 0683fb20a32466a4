"""Hypergradients: the derivative of the held-out loss by the hyperparameters, through a whole training run, forward."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, ScalarFormatter

import prograde as pg
from prograde.lab.display import Display
from prograde.lab.measure.timing import compiled, programs_in_turns
from prograde.lab.report import Table
from prograde.lab.report.words import milliseconds_spread, size
from prograde.lab.studies.beyond.horizon_loops import nested, straight
from prograde.lab.studies.beyond.hyper_training import Classifier, Cleaning, centre, prior
from prograde.lab.studies.beyond.problem import Problem

TARGET_ERROR, TARGET_MEMORY = 1e-5, 0.1
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
    """Method -> (hyperparameters -> (held-out loss, hypergradient)); the run by itself gives the loss."""

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
    """Time, memory and agreement of hypergradients through runs of several lengths."""
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
    """Adam on the hyperparameters by forward hypergradients: start -> (losses, test) of each meta-step."""
    grad_fn = pg.value_and_grad(run.outcome, pg.ForwardJacobian(), has_aux=True)
    optimizer = optax.chain(optax.zero_nans(), optax.clip_by_global_norm(1.0), optax.adam(rate))

    def meta_step(carry: Any, _: None) -> Any:
        hyper, state = carry
        (loss, test), grads = grad_fn(None, hyper)
        updates, state = optimizer.update(grads, state, hyper)
        return (optax.apply_updates(hyper, updates), state), (loss, test)

    return lambda start: lax.scan(meta_step, (start, optimizer.init(start)), None, meta_steps)[1]


def _best(seen: Any) -> tuple[list[float], dict[str, float]]:
    """(the least held-out loss until then, the test part at the least of all)."""
    losses = np.nan_to_num(np.asarray(seen[0]), nan=np.inf)
    at = int(losses.argmin())
    test = {k: float(v[at]) for k, v in seen[1].items()}
    return np.minimum.accumulate(losses).tolist(), {"validation": float(losses[at]), **test}


def tuning(plan: Plan, display: Display) -> dict[str, Any]:
    """Meta-steps from several starts, and random search for as long, from the same prior."""
    run = Classifier(plan.run_steps)
    draw = lambda seed: prior(jax.random.key(seed))  # noqa: E731
    begin = run.outcome(centre())
    program = jax.jit(tune(run, plan.meta_steps))
    jax.block_until_ready(program(centre()))
    trials = 64
    searches = {}
    for at_once in (1, 16):  # random search may run several trials together, where that is faster

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
            start = centre() if seed == 0 else draw(seed)  # the first is what one would begin with
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
                f"held-out loss {runs['hypergradient'][-1]['validation']:.3f} and {best['validation']:.3f}",
            )
    return found | {"runs": runs, "trial_seconds": per_trial, "meta_steps": plan.meta_steps}


def cleaning(plan: Plan, display: Display) -> dict[str, Any]:
    """Weights of examples by forward gradients, by exact ones in chunks, and by reverse mode, for equal times."""
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


def _median(values: list[float]) -> str:
    return f"{np.median(values):.3f} ({min(values):.2f}–{max(values):.2f})"


class Hyper(Problem):
    """Hypergradients of eight numbers through 10^4 training steps, and of hundreds through a short run.

    Forward hypergradients: Franceschi et al., arXiv 1703.01785. With s_t the weights and velocities after t steps and h the
    hyperparameters, Z_t = ds_t/dh follows Z_{t+1} = (d s_{t+1} / d s_t) Z_t + d s_{t+1} / d h, and the hypergradient is
    (d loss / d s_T) Z_T: one column of Z for each hyperparameter, and nothing of earlier steps is kept.
    """

    name = "hyper"
    title = "Hypergradients through a whole training run"

    def measure(self, full: bool, display: Display) -> dict[str, Any]:
        return self.measured(FULL if full else Plan(), display)

    def measured(self, plan: Plan, display: Display) -> dict[str, Any]:
        """The figures of a plan."""
        record = {
            "plan": asdict(plan),
            "long": long_runs(plan, display),
            "tuning": tuning(plan, display),
        }
        return record | {"cleaning": cleaning(plan, display)}

    def tables(self, record: dict[str, Any]) -> list[Table]:
        rows = []
        for steps, of in record["long"].items():
            for method, at in of["methods"].items():
                error = [
                    f"{of['errors'][p]:.0e}" if method == OURS else ""
                    for p in ("float32", "float64")
                ]
                part = at["temp_bytes"] / of["methods"][BACKPROP]["temp_bytes"]
                cells = [
                    f"{int(steps):,}",
                    method.removeprefix("backprop, "),
                    milliseconds_spread(at["seconds"]),
                    f"{at['ratio']['median']:.2f}",
                ]
                rows.append([*cells, size(at["temp_bytes"]), f"{part:.3f}", *error])
        columns = ["steps", "method", "ms", "/ run", "XLA temp", "/ rev."]
        errors = ["float32", "float64"]
        found = [
            Table(
                "Hypergradient in 8 hyperparameters of a training run; time over that of the run, memory over that of backprop, and distance from its gradient",
                [*columns, *errors],
                rows,
            )
        ]
        at, rows = record["tuning"], []
        start = at["start"]
        rows.append(
            [
                "not tuned",
                "1",
                "",
                f"{start['validation']:.3f}",
                f"{start['loss']:.3f}",
                f"{100 * start['accuracy']:.1f}",
            ]
        )
        for name, runs in at["runs"].items():
            column = lambda key, runs=runs: [run[key] for run in runs]  # noqa: E731
            seconds, accuracy = np.median(column("seconds")), 100 * np.median(column("accuracy"))
            trained = int(np.median([len(run["curve"]) for run in runs]))
            rows.append(
                [
                    name,
                    f"{trained:,}",
                    f"{seconds:.2f}",
                    _median(column("validation")),
                    _median(column("loss")),
                    f"{accuracy:.1f}",
                ]
            )
        columns = ["tuned by", "runs", "s", "held-out loss", "test loss", "test, %"]
        n = len(at["runs"]["hypergradient"])
        title = f"Eight hyperparameters of a run of {record['plan']['run_steps']} steps; {n} starts, median (range); test accuracy"
        found.append(Table(title, columns, rows, unbroken=len(columns)))
        at, rows = record["cleaning"], []
        everything = {"equal weights": at["start"] | {"meta_steps": 0}, **at["methods"]}
        for name, of in everything.items():
            cost = at["costs"].get(name)
            cells = [
                f"{of['auc']:.3f}",
                f"{of['validation']:.3f}",
                f"{100 * of['accuracy']:.1f}",
            ]
            step = (
                [milliseconds_spread(cost["seconds"]), size(cost["temp_bytes"])]
                if cost
                else ["", ""]
            )
            rows.append([name, str(of["meta_steps"]), *step, *cells])
        columns = ["weights by", "steps", "ms a step", "XLA temp", "AUC", "held-out", "test, %"]
        seconds = record["plan"]["cleaning_seconds"]
        title = f"Weights of {at['examples']} examples, 30 % with wrong labels; {seconds:g} s for each method; held-out loss, test accuracy"
        return [*found, Table(title, columns, rows, unbroken=len(columns))]

    def conclusion(self, record: dict[str, Any]) -> str:
        steps = min(record["long"], key=lambda t: abs(int(t) - 10_000))
        of = record["long"][steps]
        ours, backprop, checkpointed = (of["methods"][m] for m in (OURS, BACKPROP, CHECKPOINTED))
        memory = ours["temp_bytes"] / backprop["temp_bytes"]
        met = memory <= TARGET_MEMORY and min(of["errors"].values()) <= TARGET_ERROR
        in_single = "too" if of["errors"]["float32"] <= TARGET_ERROR else "not"
        over = [
            ours["seconds"]["median"] / other["seconds"]["median"]
            for other in (backprop, checkpointed)
        ]
        said = [
            f"Through {int(steps):,} training steps, the forward hypergradient of 8 hyperparameters needs {size(ours['temp_bytes'])}, "
            f"{memory:.2g} of unrolled reverse mode ({size(backprop['temp_bytes'])}), and differs from it by "
            f"{of['errors']['float64']:.0e} in float64 and {of['errors']['float32']:.0e} in float32: the target ({TARGET_MEMORY:g} of the "
            f"memory, {TARGET_ERROR:g} off) is {'met' if met else 'missed'} in float64, in float32 {in_single}. "
            f"It takes {over[0]:.2f} of the time of unrolled and {over[1]:.2f} of checkpointed reverse mode, which needs "
            f"{size(checkpointed['temp_bytes'])}."
        ]
        every = [record["long"][t]["methods"][OURS]["temp_bytes"] for t in record["long"]]
        if max(every) > 1.1 * min(every):
            said.append(
                f"Its memory grew by a factor of {max(every) / min(every):.2g} with the number of steps."
            )
        elif len(every) > 1:
            said.append("Its memory does not depend on the number of steps.")
        tuned = record["tuning"]
        hyper, search = (
            [run["validation"] for run in tuned["runs"][m]]
            for m in ("hypergradient", "random search")
        )
        test = {m: np.median([run["loss"] for run in runs]) for m, runs in tuned["runs"].items()}
        better = sum(a < b for a, b in zip(hyper, search, strict=True))
        said.append(
            f"Tuning with it lowers the held-out loss from {tuned['start']['validation']:.3f} to {np.median(hyper):.3f}, random search for as "
            f"long to {np.median(search):.3f}: hypergradients are ahead in {better} of {len(hyper)}. On the test part, which neither saw, "
            f"the losses are {test['hypergradient']:.3f} and {test['random search']:.3f} (before {tuned['start']['loss']:.3f})."
        )
        at = record["cleaning"]
        loss, auc = (
            {name: of[key] for name, of in at["methods"].items()} for key in ("validation", "auc")
        )
        best, tells = min(loss, key=lambda name: loss[name]), max(auc, key=lambda name: auc[name])
        listed = lambda values: ", ".join(f"{name} {value:.3f}" for name, value in values.items())  # noqa: E731
        said.append(
            f"For the weights of {at['examples']} examples in equal time, {best} reaches the least held-out loss ({listed(loss)}), and "
            f"{tells} tells the wrong labels best (AUC: {listed(auc)}). Through this short run unrolled reverse mode needs "
            f"{size(at['costs'][BACKPROP]['temp_bytes'])}, forward gradients {size(at['costs']['forward gradient']['temp_bytes'])}."
        )
        if best == BACKPROP:
            said.append(
                "With many hyperparameters and a run that fits into memory, reverse mode is the tool."
            )
        return " ".join(said)

    def draw(self, record: dict[str, Any], figure: Figure) -> None:
        figure.set_size_inches(10, 6.4)
        figure.set_layout_engine("constrained")
        (memory, seconds), (tuned, cleaned) = figure.subplots(2, 2)
        lengths = [int(t) for t in record["long"]]
        for method in next(iter(record["long"].values()))["methods"]:
            of = [at["methods"][method] for at in record["long"].values()]
            style = _STYLE[method] | {"label": method}
            memory.plot(lengths, [f["temp_bytes"] for f in of], **style)
            seconds.plot(lengths, [1e3 * f["seconds"]["median"] for f in of], **style)
        memory.set(
            xlabel="training steps", ylabel="XLA temporary memory", xscale="log", yscale="log"
        )
        memory.yaxis.set_major_formatter(FuncFormatter(lambda value, _: size(int(value))))
        memory.set_title("Hypergradient in 8 hyperparameters", loc="left", fontsize=9)
        seconds.set(xlabel="training steps", ylabel="time (ms)", xscale="log", yscale="log")
        seconds.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        seconds.yaxis.set_major_formatter(ScalarFormatter())
        for axes in (memory, seconds):
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.yaxis.set_minor_formatter(NullFormatter())
        seconds.legend(fontsize=8)
        for name, colour in (("hypergradient", "#D55E00"), ("random search", "#777777")):
            for i, run in enumerate(record["tuning"]["runs"][name]):
                x = np.linspace(0, run["seconds"], len(run["curve"]) + 1)[1:]
                tuned.plot(
                    x, run["curve"], color=colour, linewidth=1, label=name if i == 0 else None
                )
        start = record["tuning"]["start"]["validation"]
        tuned.axhline(start, color="#000000", linestyle=":", label="not tuned")
        tuned.set(xlabel="time (s)", ylabel="least held-out loss until then (nats)", yscale="log")
        tuned.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        tuned.yaxis.set_major_formatter(ScalarFormatter())
        tuned.yaxis.set_minor_formatter(NullFormatter())
        tuned.set_title("Tuning from several starts", loc="left", fontsize=9)
        tuned.legend(fontsize=8)
        at = record["cleaning"]
        names = ["equal weights", *at["methods"]]
        ofs = [at["start"], *at["methods"].values()]
        labels = {
            "auc": ("AUC of wrong labels", "#56B4E9"),
            "accuracy": ("test accuracy", "#E69F00"),
        }
        for offset, (key, (label, colour)) in zip((-0.2, 0.2), labels.items(), strict=True):
            bars = cleaned.bar(
                np.arange(len(names)) + offset,
                [of[key] for of in ofs],
                0.38,
                color=colour,
                label=label,
            )
            cleaned.bar_label(bars, fmt="%.2f", fontsize=8)
        cleaned.set_xticks(range(len(names)), [name.replace(" ", "\n") for name in names])
        cleaned.set(ylim=(0, 1.25))
        cleaned.grid(axis="x", visible=False)
        cleaned.set_axisbelow(True)
        cleaned.set_title("Data cleaning, equal time for each", loc="left", fontsize=9)
        cleaned.legend(fontsize=8, ncols=2, loc="upper left")
