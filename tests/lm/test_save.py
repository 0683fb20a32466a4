"""What is saved is what was there, whole or not at all."""

import dataclasses
import resource

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import combinations
from decoders import (
    TINY,
    a_random_model,
    assert_close,
    assert_same,
    logits,
    with_update,
)
from gguf_files import config_of, words, write_gguf

from prograde import lm


@pytest.mark.parametrize(
    ("changes", "dtype"),
    [
        ({}, "float32"),
        ({"tied": False, "attention_bias": True}, "bfloat16"),
        ({"window": 5, "head_size": 6, "context": 99}, "float32"),
        ({"rope_scaling": (8.0, 1.0, 4.0, 64.0), "rope_theta": 777.0}, "bfloat16"),
    ],
    ids=str,
)
def test_what_is_saved_is_loaded(changes, dtype, tmp_path):
    model = a_random_model(dataclasses.replace(TINY, **changes), dtype)
    lm.save(tmp_path / "new" / "saved", model, lm.byte_tokenizer())
    again, tokenizer = lm.load(tmp_path / "new" / "saved", dtype=dtype)
    assert again.architecture == model.architecture
    assert_same(again, model)
    assert tokenizer.get_vocab() == lm.byte_tokenizer().get_vocab()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["saved"]


def test_weights_that_are_saved_alone_are_those_of_a_directory(tmp_path):
    model = with_update(a_random_model(), up=0.5)
    lm.save(tmp_path / "saved", model, lm.byte_tokenizer())
    lm.save_weights(tmp_path / "new" / "alone.safetensors", model)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["alone.safetensors"]
    alone, whole = tmp_path / "new" / "alone.safetensors", tmp_path / "saved" / "model.safetensors"
    assert alone.read_bytes() == whole.read_bytes()
    with pytest.raises(lm.ModelError, match=r"alone.safetensors exists. Choose another"):
        lm.save_weights(alone, model)


def test_models_and_tokenizers_are_told_apart(tmp_path):
    model, tokenizer = a_random_model(), lm.byte_tokenizer()
    with pytest.raises(TypeError, match="model is Tokenizer, but a Decoder is needed"):
        lm.save(tmp_path / "saved", tokenizer, model)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"tokenizer is dict, but a tokenizers.Tokenizer is needed"):
        lm.save(tmp_path / "saved", model, {})  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="model is dict, but a Decoder is needed"):
        lm.save_weights(tmp_path / "saved.safetensors", {})  # pyright: ignore
    with pytest.raises(TypeError, match="model is Tokenizer, but a Decoder is needed"):
        lm.save_gguf(tmp_path / "saved.gguf", tokenizer, model)  # pyright: ignore
    with pytest.raises(lm.ModelError, match="model=None, but a path or a name is needed"):
        lm.load(None)  # pyright: ignore[reportArgumentType]
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_exists_is_not_touched(tmp_path):
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "note").write_text("mine")
    with pytest.raises(lm.ModelError, match=r"saved exists. Choose another"):
        lm.save(tmp_path / "saved", a_random_model(), lm.byte_tokenizer())
    assert [path.name for path in tmp_path.rglob("*")] == ["saved", "note"]


def test_a_name_that_promises_another_format_is_refused(tmp_path):
    model, tokenizer = a_random_model(), lm.byte_tokenizer()
    for name, hint in {
        "tuned.gguf": "Use save_gguf",
        "tuned.GGUF": "Use save_gguf",
        "tuned.safetensors": "Use save_weights",
        "tuned.bin": "Nothing here writes that format",
    }.items():
        with pytest.raises(
            lm.ModelError, match=f"{name} ends in .*save writes a directory.*{hint}"
        ):
            lm.save(tmp_path / name, model, tokenizer)
    for name, hint in {"tuned.gguf": "Use save_gguf", "tuned.onnx": "choose another name"}.items():
        with pytest.raises(
            lm.ModelError, match=f"save_weights writes a .safetensors file. .*{hint}"
        ):
            lm.save_weights(tmp_path / name, model)
    with pytest.raises(lm.ModelError, match="Use save_weights"):
        lm.save_gguf(tmp_path / "tuned.safetensors", model, tokenizer)
    with pytest.raises(lm.ModelError, match=r"does not end in \.gguf"):
        lm.save_gguf(tmp_path / "tuned", model, tokenizer)
    assert list(tmp_path.iterdir()) == []
    lm.save(tmp_path / "smollm-1.7", model, tokenizer)  # an ending that promises nothing


@pytest.mark.parametrize("limit", [100, 20_000])
def test_a_full_disk_leaves_nothing_behind(limit, tmp_path):
    """A limit on file size fills the disk at the tokenizer (7 KB), or at the weights (25 KB)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(lm.ModelError, match=r"saved could not be written .*Nothing was left"):
            lm.save(tmp_path / "saved", a_random_model(), lm.byte_tokenizer())
        with pytest.raises(lm.ModelError, match=r"alone could not be written .*Nothing was left"):
            lm.save_weights(tmp_path / "alone", a_random_model())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []
    lm.save(tmp_path / "saved", a_random_model(), lm.byte_tokenizer())


def test_an_update_of_zero_changes_nothing():
    model = a_random_model()
    expected = logits(model)
    for part in lm.matrix_shapes(TINY):
        model = with_update(model, part)
    np.testing.assert_array_equal(logits(model), expected)


@combinations(lambda part: part in ("query", "down"), part=lm.matrix_shapes(TINY))
def test_an_update_is_merged_where_a_model_is_saved(part, tmp_path):
    """Also where it is beside some of the layers alone."""
    model = with_update(a_random_model().split(2, 3), part, up=0.5, segment=1)
    lm.save(tmp_path / "saved", model, lm.byte_tokenizer())
    merged, _ = lm.load(tmp_path / "saved")
    assert jax.tree.structure(merged) == jax.tree.structure(a_random_model())
    assert_close(logits(merged), logits(model))
    assert np.abs(logits(merged) - logits(a_random_model())).max() > 0.1


def test_an_update_of_a_head_and_of_quantized_weights_is_merged(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", config_of(), "Q8_0")
    model, tokenizer = lm.load(tmp_path / "tiny.gguf", quantized=True)
    rng = np.random.default_rng(0)
    down, up = (
        jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((64, 1), (1, len(words())))
    )
    model = eqx.tree_at(lambda m: m.head, model, lm.LowRankUpdate(model.head, down, up))
    model = with_update(model, "gate", up=0.3)
    few = np.array([3, 200])
    assert_close(logits(model, few=few), logits(model)[..., few])
    lm.save(tmp_path / "saved", model, tokenizer)
    merged, _ = lm.load(tmp_path / "saved")
    assert not isinstance(merged.segments[0].gate, lm.Quantized | lm.LowRankUpdate)
    assert_close(logits(merged), logits(model))


def test_an_update_in_bfloat16_is_rounded_once(tmp_path):
    model = with_update(a_random_model(dtype=jnp.bfloat16), up=0.5, rank=8)
    lm.save(tmp_path / "saved", model, lm.byte_tokenizer())
    update = model.segments[0].query
    wide = [np.asarray(x, np.float64) for x in (update.base, update.down, update.up)]
    exact = wide[0] + wide[1] @ wide[2]
    found = np.asarray(lm.load(tmp_path / "saved", "bfloat16")[0].segments[0].query, np.float64)
    assert (np.abs(found - exact) <= 1.001 * 2.0**-8 * np.abs(exact) + 1e-6).all()
