"""Delayed copy with distractors, as several streams side by side."""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from prograde.lab.models.recurrent import Cell, Params, State

SYMBOLS, DISTRACTORS = 4, 8
INPUTS = SYMBOLS + DISTRACTORS + 1  # and a mark at the question
GUESSING = math.log(SYMBOLS)


@functools.partial(jax.jit, static_argnums=(1, 2))
def episode(key: Key[Array, ""], delay: int, streams: int) -> tuple[dict[str, Array], Array]:
    """One of 4 symbols, one of 8 distractors at every step, and the question `delay` steps later.

    **Returns:** inputs `x` [delay + 1, streams, INPUTS] and `first` [delay + 1], which is 1 at the
    start of an episode; and the symbol asked for, -1 at steps without a question.
    """
    of_symbols, of_distractors = jax.random.split(key)
    shown = jax.random.randint(of_symbols, (streams,), 0, SYMBOLS)
    distractors = SYMBOLS + jax.random.randint(of_distractors, (delay + 1, streams), 0, DISTRACTORS)
    which = distractors.at[0].set(shown).at[delay].set(INPUTS - 1)
    first = jnp.zeros(delay + 1).at[0].set(1)
    targets = jnp.full((delay + 1, streams), -1).at[delay].set(shown)
    return {"x": jax.nn.one_hot(which, INPUTS), "first": first}, targets


def loss(output: Array, target: Array) -> Array:
    """The cross entropy of each stream, zero where nothing is asked."""
    right = jnp.take_along_axis(jax.nn.log_softmax(output), jnp.maximum(target, 0)[:, None], 1)
    return jnp.where(target >= 0, -right[:, 0], 0.0)


@functools.cache
def with_episodes(cell: Cell) -> Cell:
    """A cell that forgets its state at the start of an episode."""

    def begun(params: Params, state: State, input: dict[str, Array]) -> tuple[State, Array]:
        return cell(params, jax.tree.map(lambda s: s * (1 - input["first"]), state), input["x"])

    return begun
