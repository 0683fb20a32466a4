"""Small models on which identities are tested. Each is (params, loss, args); the loss is a
scalar."""

import equinox as eqx
import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax


def _normal(key, *shape, dtype=jnp.float32):
    return jax.random.normal(key, shape, dtype) / jnp.asarray(shape[0], dtype) ** jnp.asarray(
        0.5, dtype
    )


def mlp(key, dtype=jnp.float32):
    k = jax.random.split(jax.random.fold_in(key, 17), 5)
    params = {
        "hidden": {"w": _normal(k[0], 5, 7, dtype=dtype), "b": _normal(k[1], 7, dtype=dtype)},
        "out": _normal(k[2], 7, 3, dtype=dtype),
    }

    def loss(params, x, y):
        h = jnp.tanh(x @ params["hidden"]["w"] + params["hidden"]["b"][None])
        return jnp.mean(jnp.square(h @ params["out"] - y))

    return params, loss, (_normal(k[3], 4, 5, dtype=dtype), _normal(k[4], 4, 3, dtype=dtype))


def scan_over_layers(key, dtype=jnp.float32):
    k = jax.random.split(jax.random.fold_in(key, 17), 5)
    params = {
        "in": _normal(k[0], 5, 6, dtype=dtype),
        "hidden": jnp.stack([_normal(key, 6, 6, dtype=dtype) for key in jax.random.split(k[1], 4)]),
        "out": _normal(k[2], 3, 6, dtype=dtype),
    }

    def loss(params, x, y):
        def layer(h, w):
            return h + jnp.tanh(h @ w), None

        h, _ = lax.scan(jax.checkpoint(layer), x @ params["in"], params["hidden"])
        return jnp.mean(jnp.square(h @ params["out"].T - y))

    return params, loss, (_normal(k[3], 4, 5, dtype=dtype), _normal(k[4], 4, 3, dtype=dtype))


def attention(key, dtype=jnp.float32):
    k = jax.random.split(jax.random.fold_in(key, 17), 6)
    params = {name: _normal(k[i], 6, 2, 3, dtype=dtype) for i, name in enumerate("qkv")}
    params["o"] = _normal(k[3], 2, 3, 6, dtype=dtype)

    def loss(params, x):
        q, k, v = (jnp.einsum("bsm,mhd->bshd", x, params[name]) for name in "qkv")
        weights = jax.nn.softmax(jnp.einsum("bshd,bthd->bhst", q, k), axis=-1)
        out = jnp.einsum("bhst,bthd,hdm->bsm", weights, v, params["o"])
        return jnp.mean(jnp.square(x + out))

    return params, loss, (_normal(k[4], 2, 5, 6, dtype=dtype),)


def tied_embedding(key, dtype=jnp.float32):
    k = jax.random.split(jax.random.fold_in(key, 17), 3)
    params = {
        "embedding": _normal(k[0], 8, 5, dtype=dtype),
        "mix": _normal(k[1], 5, 5, dtype=dtype),
    }
    tokens = jax.random.randint(k[2], (3, 4), 0, 8)

    def loss(params, tokens):
        h = params["embedding"][tokens]
        h = jax.nn.gelu(h @ params["mix"])
        logits = h @ params["embedding"].T
        targets = jax.nn.one_hot(jnp.roll(tokens, 1, axis=1), 8, dtype=logits.dtype)
        return -jnp.mean(jnp.sum(jax.nn.log_softmax(logits) * targets, axis=-1))

    return params, loss, (tokens,)


def convolution(key, dtype=jnp.float32):
    k = jax.random.split(jax.random.fold_in(key, 17), 3)
    params = {
        "kernel": _normal(k[0], 3, 3, 3, 4, dtype=dtype),
        "out": _normal(k[1], 4, 2, dtype=dtype),
    }

    def loss(params, x):
        h = lax.conv_general_dilated(
            x, params["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jnp.mean(jnp.square(jax.nn.relu(h).mean(axis=(1, 2)) @ params["out"]))

    return params, loss, (_normal(k[2], 2, 6, 6, 3, dtype=dtype),)


def equinox_model(key, dtype=jnp.float32):
    model = eqx.nn.MLP(
        5, 3, 8, 2, activation=jax.nn.gelu, dtype=dtype, key=jax.random.fold_in(key, 17)
    )

    def loss(model, x):
        return jnp.mean(jnp.square(jax.vmap(model)(x)))

    return model, loss, (_normal(jax.random.fold_in(key, 18), 4, 5, dtype=dtype),)


class _NNXModel(nnx.Module):
    def __init__(self, rngs, dtype):
        self.first = nnx.Linear(5, 8, dtype=dtype, param_dtype=dtype, rngs=rngs)
        self.norm = nnx.LayerNorm(8, dtype=dtype, param_dtype=dtype, rngs=rngs)
        self.second = nnx.Linear(8, 3, dtype=dtype, param_dtype=dtype, rngs=rngs)

    def __call__(self, x):
        return self.second(nnx.relu(self.norm(self.first(x))))


def nnx_model(key, dtype=jnp.float32):
    graph, params = nnx.split(_NNXModel(nnx.Rngs(jax.random.fold_in(key, 17)), dtype))

    def loss(params, x):
        return jnp.mean(jnp.square(nnx.merge(graph, params)(x)))

    return params, loss, (_normal(jax.random.fold_in(key, 18), 4, 5, dtype=dtype),)


ALL = [mlp, scan_over_layers, attention, tied_embedding, convolution, equinox_model, nnx_model]
STRICT = [mlp, attention, convolution]  # those whose own code promotes nothing
