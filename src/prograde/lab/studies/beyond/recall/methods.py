"""Methods that learn episode by episode: online learners, and backprop through a last window."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array

import prograde as pg
from prograde.lab.models.recurrent import Cell, Params, first_state, gru, min_gru, start
from prograde.lab.studies.beyond.recall.task import INPUTS, SYMBOLS, loss, with_episodes

# its state holds the rate
_ADAM: Any = optax.inject_hyperparams(optax.adam)(learning_rate=1e-3)
UNROLL = 4  # steps in an iteration of backprop's loop; of 1, 4, 8 and 16 the fastest


@dataclass(frozen=True)
class Method:
    """How a cell learns from an episode.

    **Fields:** `learner`: makes an online learner; where it is `None`, backprop goes back `window`
    steps from the question, or to the start of the episode for `None`. `units`: where they are
    other than those of the study.
    """

    title: str
    learner: Callable[[Cell], pg.online.OnlineLearner] | None = None
    window: int | None = None
    cell: Cell = min_gru
    units: int | None = None

    def begin(
        self, units: int, streams: int, delay: int, rate: float, seed: int
    ) -> tuple[Any, Any]:
        """The carry of the learner, or the parameters, and the state of the optimizer."""
        key, units = jax.random.key(seed), self.units or units
        params = start(self.cell, key, INPUTS, units, SYMBOLS, 2.0 * delay)
        inner = _ADAM.init(params)
        inner.hyperparams["learning_rate"] = jnp.asarray(rate)
        if self.learner is None:
            return params, inner
        input = {"x": jnp.zeros((streams, INPUTS)), "first": jnp.zeros(())}
        state = first_state(self.cell, units, (streams,))
        target = jnp.zeros(streams, jnp.int32)
        carry = self.learner(with_episodes(self.cell)).init(params, state, input, target)
        return carry, eqx.tree_at(lambda s: s.state, _every(delay).init(params), inner)

    def learn(
        self, delay: int, carry: Any, opt_state: Any, inputs: Any, targets: Array
    ) -> tuple[Any, Any, Array]:
        """One update from one episode: (carry, opt_state, loss of the question)."""
        if self.learner is None:
            return backprop(self.cell, self.window, carry, opt_state, inputs, targets)
        online = self.learner(with_episodes(self.cell))
        carry, opt_state, losses = pg.online.learn(
            online, _every(delay), jax.random.key(1), carry, opt_state, inputs, targets
        )
        return carry, opt_state, losses[-1]


@functools.cache
def _every(delay: int) -> pg.online.Every:
    return pg.online.Every(_ADAM, delay + 1)


@functools.partial(jax.jit, static_argnums=(0, 1))
def backprop(
    cell: Cell,
    window: int | None,
    params: Params,
    opt_state: Any,
    inputs: dict[str, Array],
    targets: Array,
) -> tuple[Params, Any, Array]:
    """One update by reverse mode through the last `window` steps.

    Only the last step has a loss, so the steps before the window run forward, once.
    """
    length, streams = targets.shape
    split = 0 if window is None else max(0, length - window)

    def run(params: Params, state: Any, part: slice) -> Any:
        step = lambda state, x: (cell(params, state, x)[0], None)  # noqa: E731
        return lax.scan(step, state, inputs["x"][part], unroll=UNROLL)[0]

    units = params["out"].shape[0]
    state = lax.stop_gradient(run(params, first_state(cell, units, (streams,)), slice(split)))

    def of(params: Params) -> Array:
        before = run(params, state, slice(split, length - 1))
        return jnp.mean(loss(cell(params, before, inputs["x"][-1])[1], targets[-1]))

    value, grads = jax.value_and_grad(of)(params)
    updates, opt_state = _ADAM.update(grads, opt_state, params)
    return jax.tree.map(jnp.add, params, updates), opt_state, value


def methods(delay: int, windows: tuple[int, ...], noisy: bool) -> dict[str, Method]:
    """RTRL, backprop through the episode and each window; with `noisy` the approximations too."""
    found = {
        "RTRL": Method("RTRL, exact", _rtrl),
        "backprop": Method(f"backprop, all {delay + 1:,} steps"),
    }
    for window in windows:
        title = "d = 0: no recurrent term" if window == 1 else f"backprop, last {window:,} steps"
        found["d = 0" if window == 1 else f"window {window}"] = Method(title, None, window)
    if noisy:
        found["UORO"] = Method("UORO, unbiased rank one", _uoro)
        found["SnAp"] = Method("SnAp(1) of a GRU of 32, biased", _snap, cell=gru, units=32)
    return found


@functools.cache
def _rtrl(cell: Cell) -> pg.online.OnlineLearner:
    return pg.online.RTRL(cell, loss)


@functools.cache
def _uoro(cell: Cell) -> pg.online.OnlineLearner:
    return pg.online.UORO(cell, loss)


@functools.cache
def _snap(cell: Cell) -> pg.online.OnlineLearner:
    return pg.online.RTRL(cell, loss, keep=pg.online.SnAp(1))
