"""Learning rate, momentum and weight decay are tuned by their exact gradient through training.

A training run is a function of its hyperparameters that returns the held-out loss. `jax.grad` of
it would keep every step. Forward mode carries four tangents along, and its memory does not depend
on the length of the run.
"""

import jax
import jax.numpy as jnp
import optax
from jax import lax

import prograde as pg

STEPS = 1000


def make_data(key, count):
    """Points in 20 dimensions, of which three matter; a fifth of the answers is noise."""
    key_x, key_flip = jax.random.split(key)
    x = jax.random.normal(key_x, (count, 20))
    return x, (x[:, 0] + x[:, 1] * x[:, 2] > 0) ^ jax.random.bernoulli(key_flip, 0.1, (count,))


def loss_of(weights, x, y):
    """Mean logistic loss of a network of one hidden layer."""
    logits = jnp.tanh(x @ weights["hidden"]) @ weights["out"]
    return jnp.mean(jax.nn.softplus(jnp.where(y, -logits, logits)))


TRAIN, HELD_OUT, TEST = (make_data(jax.random.key(i), n) for i, n in enumerate((200, 400, 2000)))


def train(hyper, steps=STEPS):
    """The weights after a run of gradient descent with momentum, from 0.1 of a random start."""
    rate, momentum, decay = (
        jnp.exp(hyper["rate"]),
        jax.nn.sigmoid(hyper["momentum"]),
        jnp.exp(hyper["decay"]),
    )
    weights = {"hidden": jax.random.normal(jax.random.key(3), (20, 8)) / 5, "out": jnp.full(8, 0.1)}

    def step(_, carry):
        weights, velocity = carry
        grads = jax.grad(loss_of)(weights, *TRAIN)
        velocity = jax.tree.map(
            lambda v, g, w, d: momentum * v + g + d * w, velocity, grads, weights, decays
        )
        return jax.tree.map(lambda w, v: w - rate * v, weights, velocity), velocity

    decays = {"hidden": decay[0], "out": decay[1]}
    return lax.fori_loop(0, steps, step, (weights, jax.tree.map(jnp.zeros_like, weights)))[0]


hyper = {"rate": jnp.array(-3.0), "momentum": jnp.array(0.0), "decay": jnp.array([-8.0, -8.0])}
grad_fn = jax.jit(pg.value_and_grad(lambda h: loss_of(train(h), *HELD_OUT), pg.ForwardJacobian()))
test = jax.jit(lambda h: loss_of(train(h), *TEST))
optimizer = optax.adam(0.2)
state, before = optimizer.init(hyper), float(test(hyper))
for i in range(31):
    loss, grads = grad_fn(None, hyper)
    if i % 10 == 0:
        print(f"update {i:2d}: held-out loss after {STEPS:,} steps of training {loss:.4f}")
    updates, state = optimizer.update(grads, state)
    hyper = optax.apply_updates(hyper, updates)
after = float(test(hyper))
print(f"test loss, which the hyperparameters never saw: {before:.4f} before, {after:.4f} after")
assert after < before - 0.02
