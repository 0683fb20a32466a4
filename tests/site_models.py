"""Models with a loss per example, for estimators that perturb pre-activations. Each is (params,
losses, args).
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax


def normal(key, *shape, scale=None):
    return jax.random.normal(key, shape) * (shape[0] ** -0.5 if scale is None else scale)


def relu_mlp(key):
    k = jax.random.split(jax.random.fold_in(key, 1), 6)
    params = {"w": normal(k[0], 3, 8), "b": normal(k[1], 8, scale=0.3), "out": normal(k[2], 8, 2)}

    def losses(params, x, y):
        h = jax.nn.relu(x @ params["w"] + params["b"])
        return jnp.sum(jnp.square(h @ params["out"] - y), axis=-1)

    return params, losses, (normal(k[3], 4, 3, scale=1), normal(k[4], 4, 2, scale=1))


def jitted_softmax(key):
    """Under `jit`, with a gelu and integer labels picked by a count of the examples."""
    k = jax.random.split(jax.random.fold_in(key, 2), 4)
    params = [normal(k[0], 4, 3), normal(k[1], 5, 4)]

    @jax.jit
    def losses(params, x, y):
        h = jax.nn.gelu(params[0].T @ x.T).T  # the examples along the second axis
        logits = h @ params[1].T[:3]
        return -jax.nn.log_softmax(logits)[jnp.arange(len(y)), y]

    return params, losses, (normal(k[2], 6, 4, scale=1), jax.random.randint(k[3], (6,), 0, 5))


def scanned_layers(key):
    k = jax.random.split(jax.random.fold_in(key, 3), 6)
    params = {
        "in": normal(k[0], 3, 4), "out": normal(k[3], 4, 2),
        "hidden": {"w": normal(k[1], 3, 4, 4, scale=0.6), "b": normal(k[2], 3, 4, scale=0.3)},
    }  # fmt: skip

    def losses(params, x, y):
        def layer(h, p):
            return h + jax.nn.relu(h @ p["w"] + p["b"]), None

        h, _ = lax.scan(jax.checkpoint(layer), x @ params["in"], params["hidden"])
        return jnp.sum(jnp.square(h @ params["out"] - y), axis=-1)

    return params, losses, (normal(k[4], 4, 3, scale=1), normal(k[5], 4, 2, scale=1))


def recurrent(key):
    """A GRU-like cell: the same weights at every step, two products summed, and one product of them
    gated.
    """
    k = jax.random.split(jax.random.fold_in(key, 4), 5)
    params = {"w": normal(k[0], 2, 6), "u": normal(k[1], 3, 6), "out": normal(k[2], 3, 1)}

    def losses(params, x, y):
        def cell(h, x):
            gate, candidate = jnp.split(x @ params["w"] + h @ params["u"], 2, axis=-1)
            gate = jax.nn.sigmoid(gate)
            return (1 - gate) * h + gate * jnp.tanh(candidate), None

        h, _ = lax.scan(cell, jnp.zeros((x.shape[0], 3)), jnp.moveaxis(x, 1, 0))
        return jnp.square(h @ params["out"] - y)[:, 0]

    return params, losses, (normal(k[3], 4, 3, 2, scale=1), normal(k[4], 4, 1, scale=1))


def attention(key):
    """Embedding, one perturbed head, layer normalisation with gain and shift, and the embedding
    once more at the end.
    """
    k = jax.random.split(jax.random.fold_in(key, 5), 5)
    params = {
        "embedding": normal(k[0], 5, 4, scale=0.7), "qkv": normal(k[1], 4, 3, 4),
        "gain": jnp.ones(4), "shift": jnp.zeros(4),
    }  # fmt: skip

    def losses(params, tokens):
        h = params["embedding"][tokens]
        q, k, v = jnp.moveaxis(jnp.einsum("bsm,mcd->bscd", h, params["qkv"]), 2, 0)
        h = h + jax.nn.softmax(jnp.einsum("bsd,btd->bst", q, k)) @ v
        mean, variance = h.mean(-1, keepdims=True), h.var(-1, keepdims=True)
        h = (h - mean) * lax.rsqrt(variance + 1e-3) * params["gain"] + params["shift"]
        logits = h[:, -1] @ params["embedding"].T
        return -jnp.sum(jax.nn.log_softmax(logits) * jax.nn.one_hot(tokens[:, 0], 5), axis=-1)

    return params, losses, (jax.random.randint(k[4], (4, 3), 0, 5),)


def convolution(key):
    k = jax.random.split(jax.random.fold_in(key, 6), 4)
    params = {
        "kernel": normal(k[0], 2, 2, 1, 3, scale=0.7),
        "bias": normal(k[1], 3, scale=0.3),
        "out": normal(k[2], 3, 2),
    }

    def losses(params, x):
        h = lax.conv_general_dilated(
            x, params["kernel"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        h = jax.nn.relu(h + params["bias"])
        h = lax.reduce_window(h, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 1, 1, 1), "VALID").mean(
            axis=(1, 2)
        )
        return jnp.sum(jnp.square(h @ params["out"]), axis=-1)

    return params, losses, (normal(k[3], 5, 4, 4, 1, scale=1),)


def used_otherwise(key):
    """Weights in a branch, squared, multiplied with each other, and on examples merged with another
    axis.
    """
    k = jax.random.split(jax.random.fold_in(key, 7), 6)
    params = {
        "a": normal(k[0], 3, 3),
        "b": normal(k[1], 3, 3),
        "c": normal(k[2], 3, 2),
        "branch": normal(k[3], 3),
        "flat": normal(k[5], 3, 3),
    }

    def losses(params, x):
        b, s, _ = x.shape
        h = (x.reshape(b * s, 3) @ params["flat"]).reshape(b, s, 3).mean(1)
        h = jnp.tanh(h @ (params["a"] @ params["b"] + jnp.square(params["a"])))
        h = h * lax.cond(
            params["branch"][0] > 9, lambda w: w, lambda w: jnp.sin(w), params["branch"]
        )
        return jnp.sum(jnp.square(h @ params["c"]), axis=-1) + jnp.sum(params["c"] ** 2)

    return params, losses, (normal(k[4], 4, 2, 3, scale=1),)


def merged_axes(key):
    """Batch and time are one axis where tokens are looked up and weights act.

    And time is the outer one at the end.
    """
    k = jax.random.split(jax.random.fold_in(key, 12), 6)
    params = {
        "embedding": normal(k[0], 5, 3), "place": normal(k[1], 2, 3), "w": normal(k[2], 3, 4),
        "b": normal(k[3], 4),
        "out": normal(k[4], 4, 2),
    }  # fmt: skip

    def losses(params, tokens):
        time = tokens.shape[1]
        h = params["embedding"][tokens.reshape(-1)].reshape(-1, time, 3) + params["place"]
        h = jnp.tanh(h.reshape(-1, 3) @ params["w"] + params["b"]).reshape(-1, time, 4)
        h = jnp.sin(jnp.moveaxis(h, 1, 0).reshape(-1, 4) @ params["out"])
        return jnp.sum(jnp.square(h).reshape(time, -1, 2), axis=(0, 2))

    return params, losses, (jax.random.randint(k[5], (3, 2), 0, 5),)


@jax.custom_jvp
def looked_up(table, tokens):
    return table[tokens]


looked_up.defjvp(lambda p, t: (looked_up(*p), t[0][p[1]]))


def embedded_by_hand(key):
    """A function with a rule of its own around the look-up.

    The rule needs the tangent of the table, and not the table.
    """
    k = jax.random.split(jax.random.fold_in(key, 13), 3)
    params = {"embedding": normal(k[0], 5, 3), "out": normal(k[1], 3, 2)}

    def losses(params, tokens):
        h = jnp.tanh(looked_up(params["embedding"], tokens))
        return jnp.sum(jnp.square(h @ params["out"]), axis=(1, 2))

    return params, losses, (jax.random.randint(k[2], (3, 2), 0, 5),)


def equinox_mlp(key):
    model = eqx.nn.MLP(3, 2, 4, 2, activation=jax.nn.tanh, key=jax.random.fold_in(key, 8))

    def losses(model, x):
        return jnp.sum(jnp.square(jax.vmap(model)(x)), axis=-1)

    return model, losses, (normal(jax.random.fold_in(key, 9), 4, 3, scale=1),)


class _NNXModel(nnx.Module):
    def __init__(self, rngs):
        self.first, self.second = nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)
        self.norm = nnx.LayerNorm(4, rngs=rngs)

    def __call__(self, x):
        return self.second(nnx.silu(self.norm(self.first(x))))


def nnx_model(key):
    graph, params = nnx.split(_NNXModel(nnx.Rngs(jax.random.fold_in(key, 10))))

    def losses(params, x):
        return jnp.sum(jnp.square(nnx.merge(graph, params)(x)), axis=-1)

    return params, losses, (normal(jax.random.fold_in(key, 11), 4, 3, scale=1),)


ALL = [
    relu_mlp, jitted_softmax, scanned_layers, recurrent, attention, convolution, used_otherwise,
    equinox_mlp, nnx_model, merged_axes,
    embedded_by_hand,
]  # fmt: skip
