"""Learn from a stream, one step at a time: a symbol is shown, and asked for eight steps later.

RTRL carries the influence of every parameter on the state along with the state. The network
therefore learns across the gap without keeping the past. Backpropagation through windows that are
shorter than the gap cannot see the symbol when the question comes. The run is saved in the middle,
and continued from the file.
"""

import tempfile
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import prograde as pg

DELAY, SYMBOLS, UNITS = 8, 4, 24


def stream(key, episodes):
    """Inputs and targets, step by step; a target of -1 is a step where nothing is asked."""
    shown = jax.random.randint(key, (episodes,), 0, SYMBOLS)
    inputs = (
        jnp.zeros((episodes, DELAY + 1, SYMBOLS + 1)).at[jnp.arange(episodes), 0, shown].set(1.0)
    )
    inputs = inputs.at[:, -1, -1].set(1.0)  # the question
    targets = jnp.full((episodes, DELAY + 1), -1).at[:, -1].set(shown)
    return inputs.reshape(-1, SYMBOLS + 1), targets.reshape(-1)


def cell(model, state, x):
    """A GRU, and a linear readout of its state."""
    state = model["gru"](x, state)
    return state, model["readout"](state)


def loss(output, target):
    """The cross entropy at steps where something is asked, otherwise 0."""
    return jnp.where(target >= 0, -jax.nn.log_softmax(output)[jnp.maximum(target, 0)], 0.0)


key_gru, key_readout, key_stream, key_learn = jax.random.split(jax.random.key(0), 4)
model = {
    "gru": eqx.nn.GRUCell(SYMBOLS + 1, UNITS, key=key_gru),
    "readout": eqx.nn.Linear(UNITS, SYMBOLS, key=key_readout),
}
learner, optimizer = pg.online.RTRL(cell, loss), optax.adam(3e-3)
carry = learner.init(model, jnp.zeros(UNITS))
opt_state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))

with tempfile.TemporaryDirectory() as folder:
    for chunk in range(10):
        inputs, targets = stream(jax.random.fold_in(key_stream, chunk), episodes=100)
        carry, opt_state, losses = pg.online.learn(
            learner, optimizer, key_learn, carry, opt_state, inputs, targets
        )
        found = float(losses.sum()) / 100
        guessing = float(jnp.log(SYMBOLS))
        print(f"after {int(carry.step):5} steps: loss {found:.3f} (guessing: {guessing:.3f})")
        if chunk == 4:
            eqx.tree_serialise_leaves(Path(folder) / "carry.eqx", (carry, opt_state))
            carry, opt_state = eqx.tree_deserialise_leaves(
                Path(folder) / "carry.eqx", (carry, opt_state)
            )
assert found < 0.3
