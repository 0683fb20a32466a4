"""A forward gradient finds wrong labels: it learns a weight for each of 200 examples.

Sixty labels are wrong. The exact derivative of the clean held-out loss in all weights would take
200 tangents through a training run. Eight random tangents a step estimate it without bias.
`jax.grad` would do as well through a run this short; a long one would not fit.
"""

import jax
import jax.numpy as jnp
import optax
from jax import lax

import prograde as pg

KEYS = jax.random.split(jax.random.key(0), 3)
DIRECTION = jnp.linspace(-1.0, 1.0, 10)


def make_data(key, count):
    """Points in ten dimensions, and on which side of a plane they lie."""
    x = jax.random.normal(key, (count, 10))
    return x, x @ DIRECTION > 0


X, TRUE = make_data(KEYS[0], 200)
WRONG = jnp.arange(200) < 60
GIVEN = TRUE ^ WRONG
HELD_OUT = make_data(KEYS[1], 500)


def losses(w, x, y):
    """The logistic loss of each example."""
    return jax.nn.softplus(jnp.where(y, -1.0, 1.0) * (x @ w))


def held_out_loss(scores):
    """The loss on clean examples after 100 steps of gradient descent on the weighted ones."""
    weights = jax.nn.sigmoid(scores)
    descend = jax.grad(lambda w: jnp.sum(weights * losses(w, X, GIVEN)) / jnp.sum(weights))
    w = lax.fori_loop(0, 100, lambda _, w: w - 0.5 * descend(w), jnp.zeros(10))
    return jnp.mean(losses(w, *HELD_OUT))


grad_fn = pg.value_and_grad(held_out_loss, pg.WeightPerturbation(pg.Rademacher(), num_tangents=8))
optimizer = optax.adam(0.05)


def update(carry, key):
    """A step of Adam on the scores."""
    scores, state = carry
    loss, grads = grad_fn(key, scores)
    updates, state = optimizer.update(grads, state)
    return (optax.apply_updates(scores, updates), state), loss


scores = jnp.zeros(200)
train = jax.jit(
    lambda key: lax.scan(update, (scores, optimizer.init(scores)), jax.random.split(key, 500))
)
(scores, _), loss = train(KEYS[2])
found = int(jnp.sum(WRONG[jnp.argsort(scores)[:60]]))
print(
    f"held-out loss {loss[0]:.3f} with equal weights, {loss[-1]:.3f} with those that were learned"
)
print(f"{found} of the 60 examples of least weight have a wrong label (18 by chance)")
assert found >= 45
