"""Tiny decoders, their logits, and directories that hold them, for the tests of `prograde.lm`."""

import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import reference_logits as reference
from safetensors.numpy import load_file, save_file

from prograde import lm

TOLERANCE = 1e-5  # of the largest logit: float32 sums in another order
TOKENS = reference.TOKENS

TINY = lm.Architecture(
    vocab_size=11, width=16, num_layers=3, num_heads=4, num_kv_heads=2, hidden=24, norm_eps=1e-2
)


def logits(model, tokens=TOKENS, valid=None, few=None):
    return np.asarray(raw_logits(model, jnp.asarray(tokens), valid, few), np.float64)


@eqx.filter_jit
def raw_logits(model, tokens, valid=None, few=None):
    return model.logits(model(tokens, valid), few)


def assert_close(actual, expected, tolerance=TOLERANCE):
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()


def assert_same(model, other):
    """Bit for bit."""
    assert jax.tree.structure(model) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(model), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def directory(path, config, tensors=None):
    reference.write(path, config, tensors)
    lm.byte_tokenizer().save(str(path / "tokenizer.json"))
    return path


def a_random_model(architecture=TINY, dtype=jnp.float32, seed=0):
    """With norms and biases that are not one and zero."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: lm.Decoder.create(jax.random.key(0), architecture))

    def drawn(path, x):
        name = jax.tree_util.keystr(path)
        one = "norm" in name
        scale = 0.3 if one or "bias" in name else 1 if "embedding" in name else x.shape[-2] ** -0.5
        return jnp.asarray(one + scale * rng.normal(size=x.shape), dtype)

    return jax.tree_util.tree_map_with_path(drawn, shapes)


def rms(x):
    return np.sqrt((x**2).mean())


def edit(path, **changes):
    content = json.loads(path.read_text())
    content = {k: v for k, v in (content | changes).items() if v is not ...}
    path.write_text(json.dumps(content))


def cut(path, keep=0.5):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])


def with_tensors(path, change):
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


def with_update(model, part="query", up=0.0, rank=2, segment=0, seed=0):
    """A model with a product of thin matrices beside one of its matrices."""
    rng = np.random.default_rng(seed)
    blocks = model.segments[segment]
    inputs, outputs = lm.matrix_shapes(model.architecture)[part]
    down = jnp.asarray(rng.normal(size=(blocks.count, inputs, rank)), model.dtype)
    up = jnp.asarray(up * rng.normal(size=(blocks.count, rank, outputs)), model.dtype)
    beside = lm.LowRankUpdate(getattr(blocks, part), down, up)
    return eqx.tree_at(lambda m: getattr(m.segments[segment], part), model, beside)
