"""Models in the style of other people's code: the examples of Equinox, Flax and Haiku, and Llama as
Hugging Face writes it.

Each takes a `Draw` and returns (params, loss, args), at toy sizes. The loss is a scalar; of those
in `STATEFUL`, whose first argument after the parameters is a state, it is a pair of the loss and
{"state": the new state, "dropped": what dropout left}.

The libraries say which arrays there are, and NumPy fills them: their own initialisation takes
longer to compile than all tests take, and sets to zero what would then go untested.
"""

import functools
import math

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax

VOCAB, WIDTH, HEADS, CLASSES = 11, 8, 2, 5


class Draw:
    """Inputs, and values for the arrays of a model made under `eval_shape`."""

    def __init__(self, key):
        self.generator = np.random.default_rng(np.asarray(jax.random.key_data(key)))

    def normal(self, *shape):
        return jnp.asarray(self.generator.normal(size=shape), jnp.float32)

    def tokens(self, *shape):
        return jnp.asarray(self.generator.integers(1, VOCAB, shape), jnp.int32)

    def key(self):
        return jax.random.key(int(self.generator.integers(2**31)))

    def fill(self, tree, positive=False):
        def concrete(x):
            if not isinstance(x, jax.ShapeDtypeStruct):
                return x
            if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
                return self.key()
            if not jnp.issubdtype(x.dtype, jnp.floating):
                return jnp.zeros(x.shape, x.dtype)
            if positive:  # means and variances
                return jnp.asarray(self.generator.uniform(0.5, 1.5, x.shape), x.dtype)
            return jnp.asarray(0.4 * self.generator.normal(size=x.shape), x.dtype)

        return jax.tree.map(concrete, tree)

    def equinox(self, make):
        return self.fill(eqx.filter_eval_shape(make, jax.random.key(0)))


def _cross_entropy(logits, labels):
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def _next_token_loss(logits, tokens):
    return _cross_entropy(logits[:, :-1], tokens[:, 1:])


# --- Equinox
# ----------------------------------------------------------------------------------------------


class _EqxMLP(eqx.Module):
    layers: list
    extra_bias: jax.Array

    def __init__(self, key):
        k = jax.random.split(key, 3)
        self.layers = [
            eqx.nn.Linear(6, WIDTH, key=k[0]),
            eqx.nn.Linear(WIDTH, WIDTH, key=k[1]),
            eqx.nn.Linear(WIDTH, 2, key=k[2]),
        ]
        self.extra_bias = jnp.ones(2)

    def __call__(self, x):
        for layer in self.layers[:-1]:
            x = jax.nn.relu(layer(x))
        return self.layers[-1](x) + self.extra_bias


def _mean_squared(model, x, y):
    return jnp.mean((y - jax.vmap(model)(x)) ** 2)


def eqx_mlp(draw):
    return draw.equinox(_EqxMLP), _mean_squared, (draw.normal(4, 6), draw.normal(4, 2))


def eqx_frozen_layers(draw):
    """Only the last layer is trained; the others are merged in from outside."""
    model = draw.equinox(_EqxMLP)
    spec = jax.tree.map(lambda _: False, model)
    spec = eqx.tree_at(
        lambda m: (m.layers[-1].weight, m.layers[-1].bias), spec, replace=(True, True)
    )
    trained, frozen = eqx.partition(model, spec)

    def loss(trained, frozen, x, y):
        return _mean_squared(eqx.combine(trained, frozen), x, y)

    return trained, loss, (frozen, draw.normal(4, 6), draw.normal(4, 2))


def eqx_cnn(draw):
    """The classifier of digits: layers and activations in one list, the batch by `vmap`."""

    class CNN(eqx.Module):
        layers: list

        def __init__(self, key):
            k = jax.random.split(key, 3)
            self.layers = [
                eqx.nn.Conv2d(1, 3, kernel_size=4, key=k[0]),
                eqx.nn.MaxPool2d(kernel_size=2),
                jax.nn.relu,
                jnp.ravel,
                eqx.nn.Linear(3 * 8 * 8, 16, key=k[1]),
                jax.nn.sigmoid,
                eqx.nn.Linear(16, CLASSES, key=k[2]),
                jax.nn.log_softmax,
            ]

        def __call__(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    def loss(model, x, y):
        return -jnp.mean(jnp.take_along_axis(jax.vmap(model)(x), jnp.expand_dims(y, 1), axis=1))

    return draw.equinox(CNN), loss, (draw.normal(3, 1, 12, 12), jnp.arange(3))


class _EqxRNN(eqx.Module):
    hidden_size: int
    cell: eqx.Module
    linear: eqx.nn.Linear
    bias: jax.Array

    def __init__(self, cell, key):
        cell_key, linear_key = jax.random.split(key)
        self.hidden_size = WIDTH
        self.cell = cell(3, WIDTH, key=cell_key)
        self.linear = eqx.nn.Linear(WIDTH, 1, use_bias=False, key=linear_key)
        self.bias = jnp.zeros(1)

    def __call__(self, inputs):
        lstm = isinstance(self.cell, eqx.nn.LSTMCell)
        zeros = jnp.zeros(self.hidden_size)

        def step(carry, x):
            return self.cell(x, carry), None

        hidden, _ = lax.scan(step, (zeros, zeros) if lstm else zeros, inputs)
        return jax.nn.sigmoid(self.linear(hidden[0] if lstm else hidden) + self.bias)


def _eqx_rnn(cell, draw):
    def loss(model, x, y):
        p = jax.vmap(model)(x)[:, 0]
        return -jnp.mean(y * jnp.log(p) + (1 - y) * jnp.log(1 - p))

    return (
        draw.equinox(functools.partial(_EqxRNN, cell)),
        loss,
        (draw.normal(4, 6, 3), jnp.array([0, 1, 0, 1])),
    )


def eqx_gru(draw):
    return _eqx_rnn(eqx.nn.GRUCell, draw)


def eqx_lstm(draw):
    return _eqx_rnn(eqx.nn.LSTMCell, draw)


class _EqxFeedForward(eqx.Module):
    mlp: eqx.nn.Linear
    output: eqx.nn.Linear
    layernorm: eqx.nn.LayerNorm
    dropout: eqx.nn.Dropout

    def __init__(self, key):
        mlp_key, output_key = jax.random.split(key)
        self.mlp = eqx.nn.Linear(WIDTH, 2 * WIDTH, key=mlp_key)
        self.output = eqx.nn.Linear(2 * WIDTH, WIDTH, key=output_key)
        self.layernorm = eqx.nn.LayerNorm(WIDTH)
        self.dropout = eqx.nn.Dropout(0.2)

    def __call__(self, x, key):
        return self.layernorm(x + self.dropout(self.output(jax.nn.gelu(self.mlp(x))), key=key))


class _EqxTransformerLayer(eqx.Module):
    attention: eqx.nn.MultiheadAttention
    layernorm: eqx.nn.LayerNorm
    dropout: eqx.nn.Dropout
    feed_forward: _EqxFeedForward

    def __init__(self, key):
        attention_key, ff_key = jax.random.split(key)
        bias = {f"use_{name}_bias": True for name in ("query", "key", "value", "output")}
        self.attention = eqx.nn.MultiheadAttention(
            HEADS, WIDTH, dropout_p=0.2, key=attention_key, **bias
        )
        self.layernorm = eqx.nn.LayerNorm(WIDTH)
        self.dropout = eqx.nn.Dropout(0.2)
        self.feed_forward = _EqxFeedForward(ff_key)

    def __call__(self, x, mask, key):
        attention_key, dropout_key, ff_key = (
            (None, None, None) if key is None else jax.random.split(key, 3)
        )
        attended = self.attention(x, x, x, mask=mask, key=attention_key)
        x = jax.vmap(self.layernorm)(x + self.dropout(attended, key=dropout_key))
        return jax.vmap(self.feed_forward)(
            x, None if key is None else jax.random.split(ff_key, x.shape[0])
        )


def eqx_bert(draw):
    """Three embeddings, biased attention with a padding mask, dropout everywhere, a classifier on
    the first token."""

    class Bert(eqx.Module):
        tokens: eqx.nn.Embedding
        segments: eqx.nn.Embedding
        positions: eqx.nn.Embedding
        layernorm: eqx.nn.LayerNorm
        layer: _EqxTransformerLayer
        pooler: eqx.nn.Linear
        classifier: eqx.nn.Linear

        def __init__(self, key):
            k = jax.random.split(key, 6)
            self.tokens, self.segments, self.positions = (
                eqx.nn.Embedding(size, WIDTH, key=key)
                for size, key in zip((VOCAB, 2, 6), k[:3], strict=True)
            )
            self.layernorm = eqx.nn.LayerNorm(WIDTH)
            self.layer = _EqxTransformerLayer(k[3])
            self.pooler = eqx.nn.Linear(WIDTH, WIDTH, key=k[4])
            self.classifier = eqx.nn.Linear(WIDTH, CLASSES, key=k[5])

        def __call__(self, tokens, key):
            seq = tokens.shape[0]
            positions, segments = jnp.arange(seq), jnp.zeros(seq, jnp.int32)
            x = (
                jax.vmap(self.tokens)(tokens)
                + jax.vmap(self.segments)(segments)
                + jax.vmap(self.positions)(positions)
            )
            present = tokens != 0
            mask = jnp.repeat((present[:, None] & present[None])[None], HEADS, axis=0)
            x = self.layer(jax.vmap(self.layernorm)(x), mask, key)
            return self.classifier(jnp.tanh(self.pooler(x[0])))

    def loss(model, tokens, labels, key):
        return _cross_entropy(jax.vmap(model)(tokens, jax.random.split(key, 3)), labels)

    tokens = draw.tokens(3, 6).at[0, 4:].set(0)
    return draw.equinox(Bert), loss, (tokens, jnp.arange(3), draw.key())


def eqx_vit(draw):
    """Patches by reshape and transpose, a class token in front, learned positions, dropout switched
    off."""
    patch, patches = 2, 9

    class ViT(eqx.Module):
        patch_embedding: eqx.nn.Linear
        positional_embedding: jax.Array
        cls_token: jax.Array
        blocks: list
        head: eqx.nn.Sequential
        patch_size: int

        def __init__(self, key):
            k = jax.random.split(key, 6)
            self.patch_embedding = eqx.nn.Linear(3 * patch**2, WIDTH, key=k[0])
            self.positional_embedding = jax.random.normal(k[1], (patches + 2, WIDTH))
            self.cls_token = jax.random.normal(k[2], (1, WIDTH))
            self.blocks = [_EqxTransformerLayer(k[3]), _EqxTransformerLayer(k[4])]
            self.head = eqx.nn.Sequential(
                [eqx.nn.LayerNorm(WIDTH), eqx.nn.Linear(WIDTH, CLASSES, key=k[5])]
            )
            self.patch_size = patch

        def __call__(self, x):
            channels, height, width = x.shape
            x = x.reshape(channels, height // patch, patch, width // patch, patch)
            x = x.transpose(1, 3, 0, 2, 4).reshape(-1, channels * self.patch_size**2)
            x = jnp.concatenate((self.cls_token, jax.vmap(self.patch_embedding)(x)), axis=0)
            x += self.positional_embedding[: x.shape[0]]
            for block in self.blocks:
                x = block(x, None, None)
            return self.head(x[0])

    def loss(model, images, labels):
        return _cross_entropy(jax.vmap(model)(images), labels)

    return eqx.nn.inference_mode(draw.equinox(ViT)), loss, (draw.normal(3, 3, 6, 6), jnp.arange(3))


def eqx_unet(draw):
    """Down by a strided convolution, linear attention by 1x1 convolutions, up by a transposed one,
    a skip, a time embedding."""

    class UNet(eqx.Module):
        frequencies: jax.Array
        time: eqx.nn.MLP
        first: eqx.nn.Conv2d
        down: eqx.nn.Conv2d
        norm: eqx.nn.GroupNorm
        to_qkv: eqx.nn.Conv2d
        to_out: eqx.nn.Conv2d
        up: eqx.nn.ConvTranspose2d
        last: eqx.nn.Conv2d

        def __init__(self, key):
            k = jax.random.split(key, 7)
            self.frequencies = jnp.exp(-jnp.arange(4.0))
            self.time = eqx.nn.MLP(8, WIDTH, 16, 1, activation=jax.nn.silu, key=k[0])
            self.first = eqx.nn.Conv2d(2, WIDTH, 3, padding=1, key=k[1])
            self.down = eqx.nn.Conv2d(WIDTH, WIDTH, 3, stride=2, padding=1, key=k[2])
            self.norm = eqx.nn.GroupNorm(2, WIDTH)
            self.to_qkv = eqx.nn.Conv2d(WIDTH, 3 * WIDTH, 1, key=k[3])
            self.to_out = eqx.nn.Conv2d(WIDTH, WIDTH, 1, key=k[4])
            self.up = eqx.nn.ConvTranspose2d(
                WIDTH, WIDTH, kernel_size=4, stride=2, padding=1, key=k[5]
            )
            self.last = eqx.nn.Conv2d(2 * WIDTH, 2, 3, padding=1, key=k[6])

        def __call__(self, x, t):
            t = self.time(
                jnp.concatenate((jnp.sin(t * self.frequencies), jnp.cos(t * self.frequencies)))
            )
            skip = h = jax.nn.silu(self.first(x) + t[:, None, None])
            h = self.down(h)
            c, height, width = h.shape
            q, k, v = self.to_qkv(self.norm(h)).reshape(3, HEADS, -1, height * width)
            context = jnp.einsum("hdn,hen->hde", jax.nn.softmax(k, axis=-1), v)
            h = h + self.to_out(jnp.einsum("hde,hdn->hen", context, q).reshape(c, height, width))
            h = jnp.concatenate((self.up(jax.nn.silu(h)), skip))
            return self.last(h)

    def loss(model, x, t, noise):
        return jnp.mean(jnp.square(jax.vmap(model)(x + noise, t) - noise))

    return (
        draw.equinox(UNet),
        loss,
        (draw.normal(2, 2, 8, 8), jnp.array([0.3, 0.7]), draw.normal(2, 2, 8, 8)),
    )


def eqx_scan_over_layers(draw):
    """Layers made by `filter_vmap`, kept as one stack, run by `scan` under `filter_checkpoint`."""
    make = lambda key: eqx.nn.MLP(WIDTH, WIDTH, 16, 1, activation=jax.nn.gelu, key=key)
    layers = draw.equinox(lambda key: eqx.filter_vmap(make)(jax.random.split(key, 3)))

    def loss(layers, x):
        dynamic, static = eqx.partition(layers, eqx.is_array)

        @eqx.filter_checkpoint
        def step(x, layer):
            return x + jax.vmap(eqx.combine(layer, static))(x), None

        return jnp.mean(jnp.square(lax.scan(step, x, dynamic)[0]))

    return layers, loss, (draw.normal(4, WIDTH),)


def eqx_mamba(draw):
    """A selective state space: a depthwise causal convolution and a recurrence whose decay is a
    parameter exponentiated."""
    inner, states, rank = 16, 4, 3

    class Mamba(eqx.Module):
        embedding: eqx.nn.Embedding
        norm: eqx.nn.RMSNorm
        in_proj: eqx.nn.Linear
        conv: eqx.nn.Conv1d
        x_proj: eqx.nn.Linear
        dt_proj: eqx.nn.Linear
        a_log: jax.Array
        d: jax.Array
        out_proj: eqx.nn.Linear

        def __init__(self, key):
            k = jax.random.split(key, 6)
            self.embedding = eqx.nn.Embedding(VOCAB, WIDTH, key=k[0])
            self.norm = eqx.nn.RMSNorm(WIDTH)
            self.in_proj = eqx.nn.Linear(WIDTH, 2 * inner, use_bias=False, key=k[1])
            self.conv = eqx.nn.Conv1d(
                inner, inner, kernel_size=3, groups=inner, padding=2, key=k[2]
            )
            self.x_proj = eqx.nn.Linear(inner, rank + 2 * states, use_bias=False, key=k[3])
            self.dt_proj = eqx.nn.Linear(rank, inner, key=k[4])
            self.a_log = jnp.log(jnp.broadcast_to(jnp.arange(1.0, states + 1), (inner, states)))
            self.d = jnp.ones(inner)
            self.out_proj = eqx.nn.Linear(inner, WIDTH, use_bias=False, key=k[5])

        def __call__(self, tokens):
            h = jax.vmap(self.embedding)(tokens)
            x, gate = jnp.split(jax.vmap(self.in_proj)(jax.vmap(self.norm)(h)), 2, axis=1)
            x = jax.nn.silu(self.conv(x.T)[:, : x.shape[0]].T)
            delta, b, c = jnp.split(jax.vmap(self.x_proj)(x), [rank, rank + states], axis=-1)
            delta = jax.nn.softplus(jax.vmap(self.dt_proj)(delta))
            decay = jnp.exp(jnp.einsum("l d, d n -> l d n", delta, -jnp.exp(self.a_log)))
            drive = jnp.einsum("l d, l n, l d -> l d n", delta, b, x)

            def step(state, inputs):
                decay, drive, c = inputs
                state = decay * state + drive
                return state, state @ c

            _, y = lax.scan(step, jnp.zeros((inner, states)), (decay, drive, c))
            h = h + jax.vmap(self.out_proj)((y + x * self.d) * jax.nn.silu(gate))
            return h @ self.embedding.weight.T

    loss = lambda model, tokens: _next_token_loss(jax.vmap(model)(tokens), tokens)
    return draw.equinox(Mamba), loss, (draw.tokens(2, 6),)


def eqx_shared_embedding(draw):
    """An embedding tied to the output by `eqx.nn.Shared`, and a layer under `eqx.nn.WeightNorm`."""

    class LanguageModel(eqx.Module):
        shared: eqx.nn.Shared
        hidden: eqx.nn.WeightNorm

        def __init__(self, key):
            k = jax.random.split(key, 3)
            embedding = eqx.nn.Embedding(VOCAB, WIDTH, key=k[0])
            linear = eqx.nn.Linear(WIDTH, VOCAB, key=k[1])
            self.shared = eqx.nn.Shared(
                (embedding, linear), lambda pair: pair[1].weight, lambda pair: pair[0].weight
            )
            self.hidden = eqx.nn.WeightNorm(eqx.nn.Linear(WIDTH, WIDTH, key=k[2]))

        def __call__(self, tokens):
            embedding, linear = self.shared()
            return jax.vmap(lambda token: linear(jnp.tanh(self.hidden(embedding(token)))))(tokens)

    loss = lambda model, tokens: _next_token_loss(jax.vmap(model)(tokens), tokens)
    return draw.equinox(LanguageModel), loss, (draw.tokens(2, 6),)


def eqx_batch_norm_and_dropout(draw):
    class Model(eqx.Module):
        conv: eqx.nn.Conv2d
        spectral: eqx.nn.SpectralNorm
        norm: eqx.nn.BatchNorm
        dropout: eqx.nn.Dropout
        head: eqx.nn.Linear

        def __init__(self, key):
            k = jax.random.split(key, 4)
            self.conv = eqx.nn.Conv2d(2, WIDTH, 3, key=k[0])
            self.spectral = eqx.nn.SpectralNorm(
                eqx.nn.Linear(WIDTH, WIDTH, key=k[1]), "weight", key=k[2]
            )
            self.norm = eqx.nn.BatchNorm(WIDTH, axis_name="batch", mode="batch")
            self.dropout = eqx.nn.Dropout(0.5)
            self.head = eqx.nn.Linear(WIDTH, CLASSES, key=k[3])

        def __call__(self, x, state, key):
            x, state = self.norm(self.conv(x), state)
            x, state = self.spectral(jnp.tanh(x).mean((1, 2)), state)
            x = self.dropout(x, key=key)
            return self.head(x), x, state

    model, state = eqx.filter_eval_shape(eqx.nn.make_with_state(Model), jax.random.key(0))

    def loss(model, state, x, y, key):
        batched = jax.vmap(model, in_axes=(0, None, 0), out_axes=(0, 0, None), axis_name="batch")
        logits, dropped, state = batched(x, state, jax.random.split(key, 4))
        return _cross_entropy(logits, y), {"state": state, "dropped": dropped}

    args = (draw.fill(state, positive=True), draw.normal(4, 2, 5, 5), jnp.arange(4), draw.key())
    return draw.fill(model), loss, args


# --- Flax NNX and Linen
# ----------------------------------------------------------------------------------------------


def _nnx(draw, make, loss, *args, of=nnx.Param):
    """The functional form: `loss` takes the model, the result takes its parameters and merges it
    with the rest."""
    graph, params, rest = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))), of, ...)
    merged = lambda params, rest, *args: loss(nnx.merge(graph, params, rest, copy=True), *args)
    return draw.fill(params), merged, (draw.fill(rest, positive=True), *args)


def nnx_mlp(draw):
    def make(rngs):
        return nnx.Sequential(
            nnx.Linear(6, WIDTH, rngs=rngs),
            nnx.relu,
            nnx.LayerNorm(WIDTH, rngs=rngs),
            nnx.LinearGeneral(WIDTH, (2, 4), rngs=rngs),
            nnx.gelu,
            nnx.LinearGeneral((2, 4), 2, axis=(-2, -1), rngs=rngs),
        )

    return _nnx(
        draw,
        make,
        lambda model, x, y: jnp.mean((model(x) - y) ** 2),
        draw.normal(4, 6),
        draw.normal(4, 2),
    )


class _NNXBlock(nnx.Module):
    def __init__(self, rngs):
        self.norm_1, self.norm_2 = nnx.LayerNorm(WIDTH, rngs=rngs), nnx.RMSNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.up, self.down = (
            nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs),
            nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs),
        )

    def __call__(self, x):
        x = x + self.attention(self.norm_1(x), mask=nnx.make_causal_mask(x[..., 0]))
        return x + self.down(nnx.gelu(self.up(self.norm_2(x))))


def nnx_transformer(draw):
    """Embeddings with the output tied by `attend`, two blocks of attention."""

    class Transformer(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
            self.positions = nnx.Param(0.1 * rngs.params.normal((6, WIDTH)))
            self.blocks = nnx.List([_NNXBlock(rngs) for _ in range(2)])

        def __call__(self, tokens):
            x = self.embed(tokens) + self.positions[None, : tokens.shape[1]]
            for block in self.blocks:
                x = block(x)
            return self.embed.attend(x)

    loss = lambda model, tokens: _next_token_loss(model(tokens), tokens)
    return _nnx(draw, Transformer, loss, draw.tokens(2, 5))


def nnx_scan_over_layers(draw):
    """Blocks made by `nnx.vmap` and run by `nnx.scan` under `nnx.remat`."""

    class Stack(nnx.Module):
        def __init__(self, rngs):
            @nnx.split_rngs(splits=3)
            @nnx.vmap(in_axes=(0,), out_axes=0)
            def create(rngs):
                return _NNXBlock(rngs)

            self.blocks = create(rngs)

        def __call__(self, x):
            @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
            @nnx.remat
            def forward(block, x):
                return block(x)

            return forward(self.blocks, x)

    loss = lambda model, x: jnp.mean(jnp.square(model(x)))
    return _nnx(draw, Stack, loss, draw.normal(2, 4, WIDTH))


def nnx_rnn(draw):
    """An LSTM and a GRU by `nnx.RNN`, one of them in both directions."""

    class Model(nnx.Module):
        def __init__(self, rngs):
            cell = lambda kind, size: nnx.RNN(kind(size, WIDTH, rngs=rngs))
            self.lstm = cell(nnx.OptimizedLSTMCell, 3)
            self.both = nnx.Bidirectional(
                cell(nnx.GRUCell, WIDTH), cell(nnx.GRUCell, WIDTH), rngs=rngs
            )
            self.head = nnx.Linear(2 * WIDTH, CLASSES, rngs=rngs)

        def __call__(self, x):
            return self.head(self.both(self.lstm(x)).mean(axis=1))

    loss = lambda model, x, y: _cross_entropy(model(x), y)
    return _nnx(draw, Model, loss, draw.normal(4, 5, 3), jnp.arange(4))


def nnx_experts(draw):
    """A mixture of experts: the two best of four for each token, dispatched and combined by
    `nnx.Einsum`."""
    experts = 4

    class Experts(nnx.Module):
        def __init__(self, rngs):
            self.router = nnx.Linear(WIDTH, experts, use_bias=False, rngs=rngs)
            self.up = nnx.Einsum(
                "etd,edf->etf", (experts, WIDTH, 2 * WIDTH), (experts, 1, 2 * WIDTH), rngs=rngs
            )
            self.down = nnx.Einsum("etf,efd->etd", (experts, 2 * WIDTH, WIDTH), rngs=rngs)

        def __call__(self, x):
            weights, chosen = lax.top_k(nnx.softmax(self.router(x)), 2)
            gates = jnp.einsum("tk,tke->te", weights, nnx.one_hot(chosen, experts))
            h = self.down(
                nnx.silu(self.up(jnp.einsum("te,td->etd", (gates > 0).astype(x.dtype), x)))
            )
            return x + jnp.einsum("te,etd->td", gates, h)

    loss = lambda model, x, y: jnp.mean((model(x) - y) ** 2)
    return _nnx(draw, Experts, loss, draw.normal(6, WIDTH), draw.normal(6, WIDTH))


def nnx_lora(draw):
    """Only the two factors of each update are trained: products of two perturbed matrices."""

    def make(rngs):
        linear = lambda n_in, n_out: nnx.LoRALinear(n_in, n_out, lora_rank=3, rngs=rngs)
        return nnx.Sequential(linear(6, WIDTH), nnx.tanh, linear(WIDTH, WIDTH))

    loss = lambda model, x, y: jnp.mean((model(x) - y) ** 2)
    return _nnx(draw, make, loss, draw.normal(4, 6), draw.normal(4, WIDTH), of=nnx.LoRAParam)


def nnx_cnn(draw):
    """The classifier of digits, with batch normalisation and dropout."""

    class CNN(nnx.Module):
        def __init__(self, rngs):
            self.conv_1 = nnx.Conv(1, 4, kernel_size=(3, 3), rngs=rngs)
            self.norm_1 = nnx.BatchNorm(4, rngs=rngs)
            self.dropout_1 = nnx.Dropout(0.1, rngs=rngs)
            self.conv_2 = nnx.Conv(4, WIDTH, kernel_size=(3, 3), strides=2, rngs=rngs)
            self.norm_2 = nnx.BatchNorm(WIDTH, rngs=rngs)
            self.linear_1 = nnx.Linear(4 * WIDTH, 16, rngs=rngs)
            self.dropout_2 = nnx.Dropout(0.5, rngs=rngs)
            self.linear_2 = nnx.Linear(16, CLASSES, rngs=rngs)
            self.pool = functools.partial(nnx.avg_pool, window_shape=(2, 2), strides=(2, 2))

        def __call__(self, x):
            x = self.pool(nnx.relu(self.norm_1(self.dropout_1(self.conv_1(x)))))
            x = nnx.relu(self.norm_2(self.conv_2(x)))
            x = self.dropout_2(nnx.tanh(self.linear_1(x.reshape(x.shape[0], -1))))
            return self.linear_2(x), x

    def loss(model, x, y):
        logits, dropped = model(x)
        return _cross_entropy(logits, y), {
            "state": nnx.split(model, nnx.Param, ...)[2],
            "dropped": dropped,
        }

    return _nnx(draw, CNN, loss, draw.normal(4, 8, 8, 1), jnp.arange(4))


def linen_scan_over_layers(draw):
    """`nn.scan` over `nn.remat`: the way most large Linen models are written."""

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            x = x + nn.MultiHeadDotProductAttention(HEADS)(nn.LayerNorm()(x))
            return x + nn.Dense(WIDTH)(nn.gelu(nn.Dense(2 * WIDTH)(nn.LayerNorm()(x)))), None

    class Model(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            embed = nn.Embed(VOCAB, WIDTH)
            stack = nn.scan(
                nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=2
            )
            return embed.attend(stack()(embed(tokens), None)[0])

    model, tokens = Model(), draw.tokens(2, 5)
    loss = lambda params, tokens: _next_token_loss(model.apply(params, tokens), tokens)
    return draw.fill(jax.eval_shape(model.init, draw.key(), tokens)), loss, (tokens,)


def linen_batch_norm_and_dropout(draw):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.BatchNorm(use_running_average=False)(
                nn.Conv(WIDTH, (3, 3), feature_group_count=2)(x)
            )
            x = nn.Dropout(0.5, deterministic=False)(
                nn.tanh(nn.max_pool(x, (2, 2)).reshape(x.shape[0], -1))
            )
            return nn.Dense(CLASSES)(x), x

    model, x = Model(), draw.normal(4, 4, 4, 2)
    variables = jax.eval_shape(model.init, {"params": draw.key(), "dropout": draw.key()}, x)

    def loss(params, statistics, x, y, key):
        variables = {"params": params, "batch_stats": statistics}
        (logits, dropped), new = model.apply(
            variables, x, rngs={"dropout": key}, mutable=["batch_stats"]
        )
        return _cross_entropy(logits, y), {"state": new["batch_stats"], "dropped": dropped}

    statistics = draw.fill(variables["batch_stats"], positive=True)
    return draw.fill(variables["params"]), loss, (statistics, x, jnp.arange(4), draw.key())


# --- Haiku
# ----------------------------------------------------------------------------------------------


def _haiku(draw, make, loss_of_output, *args):
    """`make(hk)` gives the function to transform; its arguments are `args` but the last, which is
    what to predict."""
    hk = pytest.importorskip("haiku")
    network = hk.without_apply_rng(hk.transform(make(hk)))
    params = jax.eval_shape(network.init, draw.key(), *args[:-1])
    return (
        draw.fill(params),
        lambda params, *args: loss_of_output(network.apply(params, *args[:-1]), args[-1]),
        args,
    )


def haiku_mlp(draw):
    def make(hk):
        def forward(images):
            x = images.astype(jnp.float32) / 255.0
            mlp = hk.Sequential(
                [
                    hk.Flatten(),
                    hk.Linear(16),
                    jax.nn.relu,
                    hk.Linear(WIDTH),
                    jax.nn.relu,
                    hk.Linear(5),
                ]
            )
            return mlp(x)

        return forward

    images = jnp.asarray(draw.generator.integers(0, 256, (4, 4, 4, 1)), jnp.uint8)
    return _haiku(draw, make, _cross_entropy, images, jnp.arange(4))


def haiku_lstm(draw):
    """A deep recurrent core: an LSTM and a GRU, unrolled by `hk.dynamic_unroll`."""

    def make(hk):
        def forward(sequence):
            core = hk.DeepRNN([hk.LSTM(WIDTH), jax.nn.relu, hk.GRU(WIDTH)])
            output, _ = hk.dynamic_unroll(core, sequence, core.initial_state(sequence.shape[1]))
            return hk.BatchApply(hk.Linear(1))(output)

        return forward

    return _haiku(
        draw,
        make,
        lambda out, y: jnp.mean((out - y) ** 2),
        draw.normal(5, 3, 2),
        draw.normal(5, 3, 1),
    )


def haiku_autoencoder(draw):
    """Convolutions down and up again, separable ones among them, group and instance normalisation,
    pooling."""

    def make(hk):
        def forward(x):
            x = jax.nn.elu(hk.GroupNorm(2)(hk.Conv2D(WIDTH, 3, stride=2)(x)))
            x = hk.InstanceNorm(True, True)(hk.SeparableDepthwiseConv2D(1, 3, padding="SAME")(x))
            x = hk.max_pool(x, (2, 2, 1), (1, 1, 1), "SAME") + hk.avg_pool(
                x, (2, 2, 1), (1, 1, 1), "SAME"
            )
            return hk.Conv2DTranspose(2, 4, stride=2)(x)

        return forward

    x = draw.normal(2, 6, 6, 2)
    return _haiku(draw, make, lambda out, x: jnp.mean((out - x) ** 2), x, x)


def haiku_layer_stack(draw):
    """`hk.experimental.layer_stack`: the loop of AlphaFold."""

    def make(hk):
        def block(x):
            h = hk.LayerNorm(-1, True, True)(x)
            return x + hk.Linear(WIDTH)(jax.nn.gelu(hk.nets.MLP([2 * WIDTH, WIDTH])(h)))

        return lambda x: hk.experimental.layer_stack(3)(block)(x)

    mean_squared = lambda out, y: jnp.mean((out - y) ** 2)
    return _haiku(draw, make, mean_squared, draw.normal(4, WIDTH), draw.normal(4, WIDTH))


def haiku_transformer(draw):
    """A causal language model with padding, dropout, and learned positions."""
    hk = pytest.importorskip("haiku")

    def forward(tokens):
        init = hk.initializers.TruncatedNormal(stddev=0.5)
        seq = tokens.shape[1]
        mask = (tokens > 0)[:, None, None] * jnp.tril(jnp.ones((1, 1, seq, seq)))
        x = hk.Embed(VOCAB, embed_dim=WIDTH, w_init=init)(tokens)
        x = x + hk.get_parameter("positions", [seq, WIDTH], init=init)
        for _ in range(2):
            h = hk.LayerNorm(-1, True, True)(x)
            attention = hk.MultiHeadAttention(HEADS, key_size=4, model_size=WIDTH, w_init=init)
            x = x + hk.dropout(hk.next_rng_key(), 0.2, attention(h, h, h, mask=mask))
            dense = hk.Sequential([hk.Linear(2 * WIDTH), jax.nn.gelu, hk.Linear(WIDTH)])
            x = x + hk.dropout(hk.next_rng_key(), 0.2, dense(hk.LayerNorm(-1, True, True)(x)))
        return hk.Linear(VOCAB)(hk.LayerNorm(-1, True, True)(x))

    network = hk.transform(forward)
    tokens = draw.tokens(2, 5).at[0, 4:].set(0)
    loss = lambda params, tokens, key: _next_token_loss(network.apply(params, key, tokens), tokens)
    return draw.fill(jax.eval_shape(network.init, draw.key(), tokens)), loss, (tokens, draw.key())


def haiku_resnet(draw):
    """A residual block with batch normalisation and a projection, and dropout before the head."""
    hk = pytest.importorskip("haiku")

    def forward(x):
        norm = {"create_scale": True, "create_offset": True, "decay_rate": 0.9}
        block = hk.nets.ResNet.BlockV1(
            WIDTH, 2, use_projection=True, bn_config=norm, bottleneck=False
        )
        x = block(hk.Conv2D(4, 3)(x), is_training=True, test_local_stats=False)
        x = hk.dropout(hk.next_rng_key(), 0.5, jnp.tanh(hk.Linear(WIDTH)(x.mean((1, 2)))))
        return hk.Linear(CLASSES)(x), x

    network, x = hk.transform_with_state(forward), draw.normal(4, 6, 6, 2)
    params, state = jax.eval_shape(network.init, draw.key(), x)

    def loss(params, state, x, y, key):
        (logits, dropped), state = network.apply(params, state, key, x)
        return _cross_entropy(logits, y), {"state": state, "dropped": dropped}

    return draw.fill(params), loss, (draw.fill(state, positive=True), x, jnp.arange(4), draw.key())


# --- Llama
# ----------------------------------------------------------------------------------------------

Q_HEADS, KV_HEADS, HEAD_DIM = 4, 2, 4


def _rms_norm(x, weight):
    return weight * (x * lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6))


def _rotate(x):
    """Rotary positions on [batch, seq, ..., head_dim]: the halves are the two coordinates of a
    rotation."""
    seq, dim = x.shape[1], x.shape[-1]
    angles = jnp.outer(jnp.arange(seq), 10000.0 ** (-jnp.arange(0, dim, 2) / dim))
    angles = jnp.concatenate((angles, angles), axis=-1).reshape(1, seq, *(1,) * (x.ndim - 3), dim)
    first, second = jnp.split(x, 2, axis=-1)
    return x * jnp.cos(angles) + jnp.concatenate((-second, first), axis=-1) * jnp.sin(angles)


def _causal_softmax(scores):
    allowed = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    return jax.nn.softmax(
        jnp.where(allowed, scores / math.sqrt(HEAD_DIM), jnp.finfo(scores.dtype).min), axis=-1
    )


def _attention_by_reshape(layer, x):
    """Weights [out, in]; products reshaped to heads, keys and values repeated for the heads that
    share them."""
    batch, seq, _ = x.shape
    q = _rotate((x @ layer["q_proj"].T).reshape(batch, seq, Q_HEADS, HEAD_DIM))
    k = _rotate((x @ layer["k_proj"].T).reshape(batch, seq, KV_HEADS, HEAD_DIM))
    v = (x @ layer["v_proj"].T).reshape(batch, seq, KV_HEADS, HEAD_DIM)
    k, v = (jnp.repeat(t, Q_HEADS // KV_HEADS, axis=2) for t in (k, v))
    q, k, v = (t.transpose(0, 2, 1, 3) for t in (q, k, v))
    out = _causal_softmax(q @ k.swapaxes(-1, -2)) @ v
    return out.transpose(0, 2, 1, 3).reshape(batch, seq, -1) @ layer["o_proj"].T


def _attention_by_einsum(layer, x):
    """Weights with the heads as axes: [in, kv heads, group, head_dim]."""
    q = _rotate(jnp.einsum("bsd,dkgh->bskgh", x, layer["q_proj"]))
    k = _rotate(jnp.einsum("bsd,dkh->bskh", x, layer["k_proj"]))
    v = jnp.einsum("bsd,dkh->bskh", x, layer["v_proj"])
    weights = _causal_softmax(jnp.einsum("bskgh,btkh->bkgst", q, k))
    return jnp.einsum("bkgst,btkh,kghd->bsd", weights, v, layer["o_proj"])


def _llama(attention, loop, draw):
    group = Q_HEADS // KV_HEADS
    shapes = (
        {"q_proj": (16, WIDTH), "k_proj": (8, WIDTH), "v_proj": (8, WIDTH), "o_proj": (WIDTH, 16)}
        if attention is _attention_by_reshape
        else {
            "q_proj": (WIDTH, KV_HEADS, group, HEAD_DIM),
            "k_proj": (WIDTH, KV_HEADS, HEAD_DIM),
            "v_proj": (WIDTH, KV_HEADS, HEAD_DIM),
            "o_proj": (KV_HEADS, group, HEAD_DIM, WIDTH),
        }
    )
    shapes |= {"gate_proj": (12, WIDTH), "up_proj": (12, WIDTH), "down_proj": (WIDTH, 12)}

    def layer():
        matrices = {name: draw.normal(*shape) / 3 for name, shape in shapes.items()}
        return matrices | {"input_norm": draw.normal(WIDTH), "post_norm": draw.normal(WIDTH)}

    layers = [layer(), layer()]
    params = {
        "embed_tokens": draw.normal(VOCAB, WIDTH),
        "layers": layers if loop == "python" else jax.tree.map(lambda *x: jnp.stack(x), *layers),
        "norm": draw.normal(WIDTH),
    }

    def block(x, layer):
        x = x + attention(layer, _rms_norm(x, layer["input_norm"]))
        h = _rms_norm(x, layer["post_norm"])
        return (
            x
            + (jax.nn.silu(h @ layer["gate_proj"].T) * (h @ layer["up_proj"].T))
            @ layer["down_proj"].T
        )

    def loss(params, tokens):
        x = params["embed_tokens"][tokens]
        if loop == "python":
            for layer in params["layers"]:
                x = block(x, layer)
        elif loop == "scan":
            x, _ = lax.scan(
                jax.checkpoint(lambda x, layer: (block(x, layer), None)), x, params["layers"]
            )
        else:
            x = lax.fori_loop(
                0, 2, lambda i, x: block(x, jax.tree.map(lambda w: w[i], params["layers"])), x
            )
        logits = _rms_norm(x, params["norm"]) @ params["embed_tokens"].T
        return _next_token_loss(logits, tokens)

    return params, loss, (draw.tokens(2, 5),)


def llama_by_reshape(draw):
    return _llama(_attention_by_reshape, "python", draw)


def llama_by_reshape_in_scan(draw):
    return _llama(_attention_by_reshape, "scan", draw)


def llama_by_einsum(draw):
    return _llama(_attention_by_einsum, "python", draw)


def llama_by_einsum_in_scan(draw):
    return _llama(_attention_by_einsum, "scan", draw)


def llama_by_einsum_in_fori_loop(draw):
    return _llama(_attention_by_einsum, "fori", draw)


# --- Plain JAX
# ----------------------------------------------------------------------------------------------


def experts_by_ragged_dot(draw):
    """Tokens sorted by expert, one ragged product for all of them, and back by a gather of each
    token's own matrix."""
    params = {
        "router": draw.normal(WIDTH, 3),
        "up": draw.normal(3, WIDTH, 6),
        "down": draw.normal(3, 6, WIDTH),
    }

    def loss(params, x):
        gates = jax.nn.softmax(x @ params["router"])
        expert = jnp.argmax(gates, axis=-1)
        order = jnp.argsort(expert)
        h = lax.ragged_dot(x[order], params["up"], jnp.bincount(expert, length=3))
        h = jax.nn.silu(h)[jnp.argsort(order)]
        out = jnp.einsum("tf,tfd->td", h, params["down"][expert])
        return jnp.mean(jnp.square(x + out * jnp.take_along_axis(gates, expert[:, None], axis=1)))

    return params, loss, (draw.normal(6, WIDTH),)


def graph_network(draw):
    """Messages along edges, summed by `segment_sum`, as in Jraph."""
    params = [
        {"message": draw.normal(2 * WIDTH, WIDTH), "update": draw.normal(WIDTH, WIDTH)}
        for _ in range(2)
    ]

    def loss(params, nodes, senders, receivers):
        for layer in params:
            messages = (
                jnp.concatenate((nodes[senders], nodes[receivers]), axis=-1) @ layer["message"]
            )
            received = jax.ops.segment_sum(jax.nn.relu(messages), receivers, len(nodes))
            nodes = jnp.tanh(nodes @ layer["update"] + received)
        return jnp.mean(jnp.square(nodes.sum(axis=0)))

    return (
        params,
        loss,
        (draw.normal(5, WIDTH), jnp.array([0, 1, 2, 3, 4, 0]), jnp.array([1, 2, 3, 4, 0, 2])),
    )


def fourier_operator(draw):
    """Complex weights from two real ones, applied to the lowest frequencies."""
    modes = 3
    params = {
        "real": draw.normal(4, 4, modes),
        "imag": draw.normal(4, 4, modes),
        "bypass": draw.normal(4, 4),
    }

    def loss(params, x):
        frequencies = jnp.fft.rfft(x)
        weight = params["real"] + 1j * params["imag"]
        mixed = jnp.einsum("bim,iom->bom", frequencies[..., :modes], weight)
        mixed = jnp.zeros_like(frequencies).at[..., :modes].set(mixed)
        bypass = jnp.einsum("bin,io->bon", x, params["bypass"])
        return jnp.mean(jnp.square(jax.nn.gelu(jnp.fft.irfft(mixed, n=x.shape[-1]) + bypass)))

    return params, loss, (draw.normal(2, 4, 10),)


STATELESS = [
    *(
        eqx_mlp,
        eqx_frozen_layers,
        eqx_cnn,
        eqx_gru,
        eqx_lstm,
        eqx_bert,
        eqx_vit,
        eqx_unet,
        eqx_mamba,
    ),
    *(eqx_scan_over_layers, eqx_shared_embedding),
    *(
        nnx_mlp,
        nnx_transformer,
        nnx_scan_over_layers,
        nnx_rnn,
        nnx_experts,
        nnx_lora,
        linen_scan_over_layers,
    ),
    *(haiku_mlp, haiku_lstm, haiku_autoencoder, haiku_layer_stack, haiku_transformer),
    *(llama_by_reshape, llama_by_reshape_in_scan),
    *(llama_by_einsum, llama_by_einsum_in_scan, llama_by_einsum_in_fori_loop),
    *(experts_by_ragged_dot, graph_network, fourier_operator),
]
STATEFUL = [eqx_batch_norm_and_dropout, nnx_cnn, linen_batch_norm_and_dropout, haiku_resnet]
