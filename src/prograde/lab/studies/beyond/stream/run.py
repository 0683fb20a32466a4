"""Learning from a stream: online learners compared with truncated backprop, in equal time."""

import functools
import hashlib
import importlib.util
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array

import prograde as pg
from prograde.lab.display import Display

_POINTS = 20  # of a curve
_ADAM = optax.inject_hyperparams(optax.adam)(
    learning_rate=1e-3
)  # its state holds the rate: one program for all rates
_MODULES = (
    "argparse",
    "ast",
    "asyncio.tasks",
    "dataclasses",
    "inspect",
    "pathlib",
    "subprocess",
    "tarfile",
    "typing",
)


@dataclass(frozen=True)
class Task:
    """A stream of inputs and targets.

    **Fields:** `draw(key, episodes)`: inputs and targets with axes [episodes, steps, ...]; `loss`:
    zero at steps without a question, which means do not count; `guessing`: the loss of the best
    answer that does not depend on the input.
    """

    name: str
    title: str
    inputs: int
    outputs: int
    episode: int
    draw: Callable[[Array, int], tuple[Array, Array]]
    loss: Callable[[Array, Array], Array]
    guessing: float
    unit: str = "nats"


def delayed_copy(delay: int, symbols: int = 4) -> Task:
    """Shows one of `symbols`, then nothing, and asks for it `delay` steps later by a mark."""

    def draw(key: Array, episodes: int) -> tuple[Array, Array]:
        shown = jax.random.randint(key, (episodes,), 0, symbols)
        inputs = (
            jnp.zeros((episodes, delay + 1, symbols + 1))
            .at[jnp.arange(episodes), 0, shown]
            .set(1.0)
        )
        return inputs.at[:, delay, symbols].set(1.0), jnp.full((episodes, delay + 1), -1).at[
            :, delay
        ].set(shown)

    title = f"delayed copy: one of {symbols} symbols, asked for {delay} steps later"
    return Task(
        "copy", title, symbols + 1, symbols, delay + 1, draw, _cross_entropy, math.log(symbols)
    )


def adding(length: int) -> Task:
    """Shows numbers, marks one in each half, and asks for the sum of the two at the last."""

    def draw(key: Array, episodes: int) -> tuple[Array, Array]:
        key_numbers, key_first, key_second = jax.random.split(key, 3)
        numbers = jax.random.uniform(key_numbers, (episodes, length))
        rows, half = jnp.arange(episodes), length // 2
        marks = (
            jnp.zeros((episodes, length))
            .at[rows, jax.random.randint(key_first, (episodes,), 0, half)]
            .set(1.0)
        )
        marks = marks.at[rows, jax.random.randint(key_second, (episodes,), half, length)].set(1.0)
        last = jnp.zeros((episodes, length)).at[:, -1].set(1.0)
        targets = jnp.full((episodes, length), -1.0).at[:, -1].set(jnp.sum(numbers * marks, axis=1))
        return jnp.stack([numbers - 0.5, marks, last], axis=-1), targets

    def loss(output: Array, target: Array) -> Array:
        return jnp.where(target >= 0, (output[0] - target) ** 2, 0.0)

    title = f"adding: two marked numbers of {length}"
    return Task("adding", title, 3, 1, length, draw, loss, 1 / 6, "squared error")


def characters(text: bytes) -> Task:
    """Asks for the next character of a text."""
    known, codes = np.unique(np.frombuffer(text, np.uint8), return_inverse=True)
    stream, size, episode = jnp.asarray(codes, jnp.int32), len(known), 64

    def draw(key: Array, episodes: int) -> tuple[Array, Array]:
        start = jax.random.randint(key, (), 0, len(stream) - episodes * episode - 1)
        read = lax.dynamic_slice(stream, (start,), (episodes * episode + 1,))
        shape = (episodes, episode)
        return jax.nn.one_hot(read[:-1], size).reshape(*shape, size), read[1:].reshape(shape)

    counts = np.bincount(codes) / len(codes)
    entropy = float(-np.sum(counts * np.log(counts)))
    return Task(
        "characters",
        f"next character of {size}",
        size,
        size,
        episode,
        draw,
        _cross_entropy,
        entropy,
    )


def library_text() -> bytes:
    """Returns a text that every machine has: source code of Python's standard library."""
    found = []
    for name in _MODULES:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None:
            found.append(Path(spec.origin).read_bytes())
    return b"\n".join(found)


def _cross_entropy(output: Array, target: Array) -> Array:
    return jnp.where(target >= 0, -jax.nn.log_softmax(output)[jnp.maximum(target, 0)], 0.0)


def gru(params: dict[str, Array], state: Array, x: Array) -> tuple[Array, Array]:
    """A gated recurrent unit with a linear readout (arXiv 1406.1078)."""
    from_x, from_h = jnp.split(x @ params["x"] + params["b"], 3), jnp.split(state @ params["h"], 3)
    update, reset = jax.nn.sigmoid(from_x[0] + from_h[0]), jax.nn.sigmoid(from_x[1] + from_h[1])
    state = (1 - update) * jnp.tanh(from_x[2] + reset * from_h[2]) + update * state
    return state, state @ params["out"] + params["bias"]


def start(key: Array, task: Task, units: int) -> dict[str, Array]:
    """Draws the initial parameters."""
    keys = jax.random.split(key, 3)
    normal = lambda key, *shape: jax.random.normal(key, shape) / shape[0] ** 0.5  # noqa: E731
    return {
        "x": normal(keys[0], task.inputs, 3 * units),
        "h": normal(keys[1], units, 3 * units),
        "b": jnp.zeros(3 * units),
        "out": normal(keys[2], units, task.outputs),
        "bias": jnp.zeros(task.outputs),
    }


@dataclass(frozen=True)
class Method:
    """An online learner, or truncated backprop, which updates once in `window` steps.

    A compiled program takes `chunk` steps.
    """

    title: str
    chunk: int
    learner: Callable[[Task], pg.online.OnlineLearner] | None = None
    window: int = 1

    def begin(self, task: Task, optimizer: Any, rate: float, units: int, seed: int) -> Any:
        """Returns the carry before the first step."""
        params = start(jax.random.key(seed), task, units)
        state, opt_state = jnp.zeros(units), optimizer.init(params)
        opt_state.hyperparams["learning_rate"] = jnp.asarray(rate)
        if self.learner is None:
            return params, state, opt_state
        example = jax.tree.map(lambda x: x[0, 0], task.draw(jax.random.key(0), 1))
        return self.learner(task).init(params, state, *example), opt_state

    def learn(self, task: Task, optimizer: Any) -> Callable[[Any, Array, Array], tuple[Any, Array]]:
        """Makes the program of one chunk: (carry, inputs, targets) -> (carry, losses)."""
        if self.learner is None:
            return lambda carry, inputs, targets: _truncated_backprop(
                task.loss, optimizer, self.window, carry, inputs, targets
            )
        online, key = self.learner(task), jax.random.key(1)

        def chunk(carry: Any, inputs: Array, targets: Array) -> tuple[Any, Array]:
            *after, losses = pg.online.learn(
                online, optimizer, key, carry[0], carry[1], inputs, targets
            )
            return tuple(after), losses

        return chunk


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _truncated_backprop(
    loss: Callable, optimizer: Any, window: int, carry: Any, inputs: Array, targets: Array
) -> tuple[Any, Array]:
    """Learns by reverse mode through each window. The state goes on from window to window."""

    def one_window(carry: Any, seen: tuple[Array, Array]) -> tuple[Any, Array]:
        params, state, opt_state = carry

        def total(params: Any) -> tuple[Array, tuple[Array, Array]]:
            def one(state: Array, now: tuple[Array, Array]) -> tuple[Array, Array]:
                state, output = gru(params, state, now[0])
                return state, loss(output, now[1])

            after, losses = lax.scan(one, state, seen)
            return jnp.sum(losses), (after, losses)

        grads, (state, losses) = jax.grad(total, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), state, opt_state), losses

    windows = jax.tree.map(lambda x: x.reshape(-1, window, *x.shape[1:]), (inputs, targets))
    carry, losses = lax.scan(one_window, carry, windows)
    return carry, losses.reshape(-1)


@dataclass(frozen=True)
class Setting:
    """Sizes, times and search ranges of the study."""

    units: int = 32
    delay: int = 10
    windows: tuple[int, ...] = (5, 10, 40)
    rates: tuple[float, ...] = (3e-3,)
    seconds: float = 3.0  # of the copy task
    other_seconds: float = 1.5  # of the others
    seeds: int = 1  # runs at the rate found
    directions: int = 16
    learners: tuple[str, ...] = ("RTRL", "DODGE", "UORO")
    tasks: tuple[str, ...] = ("copy", "adding", "characters")

    def methods(self) -> dict[str, Method]:
        """Returns the methods by name.

        Backprop with each window is a method of its own, so that the window is tuned too.
        """
        online = {
            "RTRL": Method("RTRL, exact", 200, lambda task: pg.online.RTRL(gru, task.loss)),
            "DODGE": Method(
                f"DODGE, {self.directions} random directions of rank one", 1000, self._dodge
            ),
            "DODGE, guess": Method(
                "DODGE along the truncated gradient, and a random one", 500, self._guess
            ),
            "UORO": Method(
                "UORO, unbiased rank one", 1000, lambda task: pg.online.UORO(gru, task.loss)
            ),
        }
        title = "backprop truncated to {} steps"
        online = {name: online[name] for name in self.learners}
        return online | {
            f"backprop {w}": Method(title.format(w), 20_000, None, w) for w in self.windows
        }

    def _dodge(self, task: Task) -> pg.online.OnlineLearner:
        return pg.online.DODGE(gru, task.loss, 2 * task.episode, pg.LowRank(1), self.directions)

    def _guess(self, task: Task) -> pg.online.OnlineLearner:
        return pg.online.DODGE(gru, task.loss, 2 * task.episode, pg.online.TruncatedBackprop(), 2)


def _tuned(
    method: Method,
    task: Task,
    setting: Setting,
    seconds: float,
    seeds: int,
    display: Display,
    name: str,
) -> dict[str, Any]:
    trials = {}
    for rate in setting.rates:
        trials[rate] = _run(method, task, setting, rate, 0, seconds)
        display.advance(seconds, f"{name}, rate {rate:g}: {trials[rate]['loss']:.3g}")
    rate = min(trials, key=lambda r: np.nan_to_num(trials[r]["loss"], nan=np.inf))
    runs = [trials[rate]]
    if seeds > 1:  # seeds that did not choose the rate
        runs = [_run(method, task, setting, rate, seed, seconds) for seed in range(1, seeds + 1)]
        display.advance(seeds * seconds, f"{name}: {runs[0]['loss']:.3g}")
    return {
        "title": method.title,
        "window": method.window if method.learner is None else None,
        "rate": rate,
        "trials": {f"{r:g}": trial["loss"] for r, trial in trials.items()},
        "runs": runs,
    }


def _run(
    method: Method, task: Task, setting: Setting, rate: float, seed: int, seconds: float
) -> dict[str, Any]:
    """Learns for some seconds.

    The loss of a point is the mean over the questions since the last point, each before the step
    that learns from it.
    """
    learn = method.learn(task, _ADAM)
    whole = math.lcm(task.episode, method.window if method.learner is None else 1)
    begin = method.begin(task, _ADAM, rate, setting.units, seed)

    def chunk(carry: Any, index: int, length: int) -> tuple[Any, Array, Array]:
        inputs, targets = _drawn(
            task, jax.random.key(1000 * seed + 7), index, length // task.episode
        )
        carry, losses = learn(carry, inputs, targets)
        asked = targets >= 0
        return carry, jnp.sum(losses), jnp.sum(asked)

    length = whole * -(-method.chunk // whole)
    jax.block_until_ready(chunk(begin, 0, length))  # compiles
    carry, steps, index, curve, pending = begin, 0, 0, [], (0.0, 0)
    clock = time.perf_counter()
    while (elapsed := time.perf_counter() - clock) < seconds:
        try:
            carry, loss, asked = chunk(carry, index, length)
        except pg.online.StreamError:  # diverged; backprop raises no error when it does
            curve.append((elapsed, math.nan))
            break
        pending = pending[0] + float(loss), pending[1] + int(asked)
        steps, index = steps + length, index + 1
        if elapsed >= len(curve) * seconds / _POINTS and pending[1]:
            curve.append((time.perf_counter() - clock, pending[0] / pending[1]))
            pending = (0.0, 0)
    last = [loss for _, loss in curve[-max(1, len(curve) // 10) :]]
    return {"loss": float(np.mean(last)), "steps": steps, "curve": curve}


def _drawn(task: Task, key: Array, index: int, episodes: int) -> tuple[Array, Array]:
    inputs, targets = _draw_episodes(task.draw, episodes, jax.random.fold_in(key, index))
    return inputs.reshape(-1, inputs.shape[-1]), targets.reshape(-1)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _draw_episodes(draw: Callable, episodes: int, key: Array) -> tuple[Array, Array]:
    return draw(key, episodes)


def measure(full: bool, display: Display) -> dict[str, Any]:
    """Runs every method on every task: tries rates for equal times, then runs at the best."""
    setting = Setting()
    if full:
        setting = Setting(units=64, windows=(5, 9, 33), rates=(1e-3, 3e-3), seconds=15.0)
    return measure_setting(setting, display)


def measure_setting(setting: Setting, display: Display) -> dict[str, Any]:
    """Does the same for any setting."""
    text = library_text()
    tasks = [delayed_copy(setting.delay), adding(setting.delay + 1), characters(text)]
    found: dict[str, Any] = {}
    for task in (task for task in tasks if task.name in setting.tasks):
        seconds = setting.seconds if task.name == "copy" else setting.other_seconds
        seeds = setting.seeds if task.name == "copy" else 1
        methods = setting.methods()
        each = (len(setting.rates) + (seeds if seeds > 1 else 0)) * seconds
        of_task: dict[str, Any] = {}
        with display.stage(f"stream: {task.name}", each * len(methods)):
            for name, method in methods.items():
                of_task[name] = _tuned(method, task, setting, seconds, seeds, display, name)
        found[task.name] = {
            "title": task.title,
            "unit": task.unit,
            "guessing": task.guessing,
            "episode": task.episode,
            "seconds": seconds,
            "methods": of_task,
        }
    described = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(setting).items()}
    return {
        "setting": described,
        "text_sha256": hashlib.sha256(text).hexdigest(),
        "tasks": found,
    }
