"""A decoder computes the same however it is padded, split, or stored; forward gradients pass it."""

import dataclasses
import subprocess
import sys
import tracemalloc

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_logits as reference
from comparisons import close, floats
from comparisons import dense as dense_tangents
from decoders import (
    TINY,
    TOKENS,
    a_random_model,
    assert_close,
    assert_same,
    directory,
    logits,
    raw_logits,
    rms,
    with_update,
)
from gguf_files import config_of, write_gguf

import prograde as pg
from prograde import lm


@pytest.mark.parametrize("changes", [{}, {"window": 3}], ids=str)
def test_left_padding_changes_nothing(changes):
    model = a_random_model(dataclasses.replace(TINY, **changes))
    rng = np.random.default_rng(0)
    lengths, longest = [7, 3, 1], 7
    texts = [rng.integers(0, 11, (1, n)) for n in lengths]
    tokens, valid = (
        rng.integers(0, 11, (3, longest)),
        np.zeros((3, longest), bool),
    )  # what is not valid may be anything
    for i, text in enumerate(texts):
        tokens[i, longest - len(text[0]) :], valid[i, longest - len(text[0]) :] = text[0], True
    together = logits(model, tokens, jnp.asarray(valid))
    assert np.isfinite(together).all()
    for i, text in enumerate(texts):
        assert_close(together[i, longest - len(text[0]) :], logits(model, text)[0])


def test_nothing_comes_from_later_tokens_nor_from_beyond_the_window():
    model = a_random_model(dataclasses.replace(TINY, num_layers=1, window=4))
    later, earlier = TOKENS.copy(), TOKENS.copy()
    later[0, 8], earlier[0, 3] = 0, 0
    np.testing.assert_array_equal(logits(model, later)[0, :8], logits(model)[0, :8])
    same = (logits(model, earlier) == logits(model)).all(axis=-1)[0]
    assert same.tolist() == [True] * 3 + [False] * 4 + [True] * 5


@pytest.mark.parametrize("cut", [(0, 3), (0, 1), (1, 2), (2, 3)], ids=str)
def test_splitting_and_joining_change_nothing(cut):
    model = a_random_model(dataclasses.replace(TINY, attention_bias=True))
    parts = model.split(*cut)
    assert cut[1] - cut[0] in [blocks.count for blocks in parts.segments]
    assert sum(blocks.count for blocks in parts.segments) == 3
    assert_close(logits(parts), logits(model), 1e-6)
    assert_same(parts.joined(), model)
    assert_same(parts.split(1, 3).joined(), model)


def test_segments_of_two_kinds_are_not_joined():
    model = with_update(a_random_model().split(1, 2), segment=1)
    assert_close(logits(model), logits(a_random_model()), 1e-6)
    with pytest.raises(ValueError, match="segments differ"):
        model.joined()
    with pytest.raises(ValueError, match="segments differ"):
        model.split(0, 1)


def test_program_is_as_long_for_many_layers_as_for_few():
    def length(layers):
        model = jax.eval_shape(
            lambda: lm.Decoder.create(
                jax.random.key(0), dataclasses.replace(TINY, num_layers=layers)
            )
        )
        return len(str(jax.make_jaxpr(lambda m, t: m.logits(m(t)))(model, TOKENS)).splitlines())

    assert length(2) == length(30)


def test_computation_in_bfloat16_is_near():
    narrow = a_random_model(dtype=jnp.bfloat16)
    tokens = np.random.default_rng(0).integers(0, 11, (8, 24))
    assert raw_logits(narrow, jnp.asarray(tokens)).dtype == jnp.bfloat16
    expected = logits(jax.tree.map(lambda x: x.astype(jnp.float32), narrow), tokens)
    assert 0 < rms(logits(narrow, tokens) - expected) < 0.05 * rms(expected)


def test_no_dtype_is_promoted_silently():
    model = with_update(a_random_model(dataclasses.replace(TINY, attention_bias=True, window=5)))
    with jax.numpy_dtype_promotion("strict"):
        logits(model, valid=jnp.asarray(TOKENS > 1))


def test_created_models_are_of_the_size_of_one():
    model = lm.Decoder.create(
        jax.random.key(0), dataclasses.replace(TINY, tied=False), jnp.bfloat16
    )
    assert {x.dtype for x in jax.tree.leaves(model)} == {jnp.dtype("bfloat16")}
    assert 0.5 < logits(model).std() < 2


def test_logits_of_a_few_tokens_are_those_of_all():
    for tied in (True, False):
        model = a_random_model(dataclasses.replace(TINY, tied=tied))
        few = np.array([10, 0, 7])
        assert_close(logits(model, few=few), logits(model)[..., few])


def test_weights_that_were_loaded_can_be_donated(tmp_path):
    """A step writes over them: memory that is not JAX's own would stay, beside the new weights."""
    path = directory(tmp_path / "tiny", reference.CONFIGS["llama_groups"])
    for dtype in ("float32", "bfloat16"):
        model, _ = lm.load(path, dtype)
        before = {x.unsafe_buffer_pointer() for x in jax.tree.leaves(model)}
        step = jax.jit(lambda model: jax.tree.map(lambda x: x * 2, model), donate_argnums=0)
        assert {x.unsafe_buffer_pointer() for x in jax.tree.leaves(step(model))} == before


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("F32", {}),
        ("Q4_1", {"dtype": "bfloat16"}),
        ("Q4_1", {"quantized": True}),
        ("directory", {}),
    ],
    ids=str,
)
def test_loading_takes_the_memory_of_the_weights_and_of_few_tensors(kind, options, tmp_path):
    """Of what NumPy has: XLA's own memory, a stack of layers at a time, is not counted here."""
    config = config_of(width=128, num_hidden_layers=12, intermediate_size=512)
    path = tmp_path / "tiny"
    directory(path, config) if kind == "directory" else write_gguf(path, config, kind)
    lm.load(path, **options)
    tracemalloc.start()
    try:
        model, _ = lm.load(path, **options)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    held = sum(x.nbytes for x in jax.tree.leaves(model))
    largest = 4 * 128 * 512
    assert peak <= held + 3.2 * largest  # of which the words of the tokenizer are 0.1


def next_token_loss(model, tokens):
    found = model.logits(model(tokens[:, :-1]))
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(found), tokens[:, 1:, None], axis=-1))


def equals_plain_jvp(model, tokens, key):
    """The estimate along one tangent, beside jax.jvp along the same tangent, multiplied out."""
    tangent = dense_tangents(pg.LowRank(1).sample(key, floats(model), 0, 1))

    @eqx.filter_jit
    def both(key, model, tangent):
        part, rest = eqx.partition(model, eqx.is_inexact_array)
        along = jax.jvp(
            lambda part: next_token_loss(eqx.combine(part, rest), tokens), (part,), (tangent,)
        )
        return along, pg.value_and_grad(next_token_loss, pg.WeightPerturbation(pg.LowRank(1)))(
            key, model, tokens
        )

    (value, directional), (found, grads) = both(key, model, tangent)
    assert abs(directional) > 1e-3
    close(found, value, 1e-5)
    close(grads, jax.tree.map(lambda t: directional * t, tangent), 1e-4)
    return grads


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, marks=pytest.mark.long),
        {"tied": False, "attention_bias": True, "window": 4},
    ],
    ids=str,
)
def test_estimate_equals_plain_jvp_through_the_whole_decoder(changes, key):
    model = a_random_model(dataclasses.replace(TINY, **changes)).split(1, 3)
    grads = equals_plain_jvp(
        model, jnp.asarray(np.random.default_rng(0).integers(0, 11, (2, 8))), key
    )
    assert jax.tree.structure(grads) == jax.tree.structure(model)
    assert all(jax.tree.leaves(jax.tree.map(lambda g: bool((g != 0).any()), grads)))


def test_full_gradient_of_the_last_norm_is_that_of_reverse_mode():
    model = a_random_model()
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 11, (2, 8)))
    loss = lambda norm: next_token_loss(eqx.tree_at(lambda m: m.norm, model, norm), tokens)
    both = lambda norm: (
        pg.value_and_grad(loss, pg.ForwardJacobian())(None, norm),
        jax.value_and_grad(loss)(norm),
    )
    close(*eqx.filter_jit(both)(model.norm), 1e-5)


def test_what_is_quantized_is_not_trained_and_what_is_beside_it_is(tmp_path, key):
    write_gguf(tmp_path / "tiny.gguf", config_of(), "Q4_1")
    model = with_update(lm.load(tmp_path / "tiny.gguf", quantized=True)[0], up=0.1)
    grads = equals_plain_jvp(model, jnp.asarray(TOKENS), key)
    trained = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(grads)}
    beside = (
        f".segments[0].{name}" for name in ("attention_norm", "feed_norm", "query.down", "query.up")
    )
    assert trained == {".norm", *beside}


def test_without_the_extra_it_is_said_what_to_install():
    code = "import sys; sys.modules['tokenizers'] = None\n"
    code += "try:\n    import prograde.lm\nexcept ImportError as e:\n    print(e)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "pip install '.[lm]'" in done.stdout
