"""A GGUF file that was written is the model: loaded back here, and read by the package gguf."""

import dataclasses

import gguf
import jax
import numpy as np
import pytest
from decoders import TINY, a_random_model, assert_same, with_update
from gguf_files import (
    TEXTS,
    as_llama_cpp_turns,
    config_of,
    write_gguf,
)

from prograde import lm

BYTES = dataclasses.replace(TINY, vocab_size=256, width=32, hidden=64, head_size=0)


@pytest.mark.parametrize(
    "changes",
    [{}, {"tied": False, "head_size": 6}, {"attention_bias": True, "num_kv_heads": 4}],
    ids=lambda x: "-".join(x) or "plain",
)
def test_what_is_written_in_f32_is_loaded_bit_for_bit(changes, tmp_path):
    architecture = dataclasses.replace(BYTES, **({"head_size": 0} | changes))
    model = a_random_model(architecture)
    lm.save_gguf(tmp_path / "tiny.gguf", model, lm.byte_tokenizer(), "F32")
    again, tokenizer = lm.load(tmp_path / "tiny.gguf")
    assert again.architecture == architecture
    assert_same(again, model)
    for text in TEXTS:
        assert tokenizer.encode(text).ids == lm.byte_tokenizer().encode(text).ids
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]


@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
def test_narrower_kinds_are_rounded_once_and_norms_are_not(kind, tmp_path):
    """Queries and keys as llama.cpp turns them, and an update merged before it is rounded."""
    model = with_update(a_random_model(BYTES), "up", up=0.5)
    lm.save_gguf(tmp_path / "tiny.gguf", model, lm.byte_tokenizer(), kind)
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "tiny.gguf").tensors}
    assert len(tensors) == 2 + 3 * 9
    blocks = model.segments[0]
    update = blocks.up
    merged = np.asarray(update.base) + np.asarray(update.down) @ np.asarray(update.up)
    query = as_llama_cpp_turns(np.asarray(blocks.query[1]).T, 4)
    for name, wanted in {
        "blk.1.attn_q.weight": query,
        "blk.2.ffn_up.weight": merged[2].T,
        "token_embd.weight": np.asarray(model.embedding),
    }.items():
        assert tensors[name].tensor_type.name == kind
        if kind == "F16":
            np.testing.assert_array_equal(tensors[name].data, wanted.astype(np.float16))
        else:
            number = gguf.GGMLQuantizationType.Q8_0
            np.testing.assert_array_equal(tensors[name].data, gguf.quantize(wanted, number))
    norm = tensors["blk.0.attn_norm.weight"]
    assert norm.tensor_type.name == "F32"
    np.testing.assert_array_equal(norm.data, blocks.attention_norm[0])


def test_a_tokenizer_of_gguf_comes_back_with_its_special_tokens(tmp_path):
    for rule in ("smollm", "gpt-2"):
        given = tmp_path / f"{rule}.gguf"
        write_gguf(given, config_of(), "F32", fields={"tokenizer_pre": rule}.items())
        model, tokenizer = lm.load(given)
        lm.save_gguf(tmp_path / f"{rule}-again.gguf", model, tokenizer, "F32")
        again, same = lm.load(tmp_path / f"{rule}-again.gguf")
        assert_same(again, model)
        for text in [*TEXTS, "in 12<|im_start|>the<tool>"]:
            assert same.encode(text).ids == tokenizer.encode(text).ids
        fields = [gguf.GGUFReader(path).fields for path in (given, tmp_path / f"{rule}-again.gguf")]
        for name in ("tokens", "token_type", "merges", "pre", "model"):
            a, b = (f[f"tokenizer.ggml.{name}"].contents() for f in fields)
            assert a == b, name


def test_what_a_gguf_file_has_no_place_for_is_refused(tmp_path):
    path, tokenizer = tmp_path / "tiny.gguf", lm.byte_tokenizer()
    model = a_random_model(BYTES)
    write = lambda model, tokenizer=tokenizer, kind="F32": lm.save_gguf(
        path, model, tokenizer, kind
    )
    with pytest.raises(lm.ModelError, match=r"has window=4.*Use save"):
        write(a_random_model(dataclasses.replace(BYTES, window=4)))
    scaled = dataclasses.replace(BYTES, rope_scaling=(8.0, 1.0, 4.0, 64.0))
    with pytest.raises(lm.ModelError, match="has rope_scaling="):
        write(a_random_model(scaled))
    with pytest.raises(lm.ModelError, match="tokens up to number 255, but the model has 11"):
        write(a_random_model())
    with pytest.raises(lm.ModelError, match="kind='Q4_0', but one of F32, F16, Q8_0"):
        write(model, kind="Q4_0")
    narrow = a_random_model(dataclasses.replace(BYTES, width=16, head_size=0))
    with pytest.raises(lm.ModelError, match=r"rows of 16, which are not whole blocks of 32"):
        write(narrow, kind="Q8_0")
    with pytest.raises(lm.ModelError, match="above 65504, which F16 cannot hold"):
        write(jax.tree.map(lambda x: 1e6 * x, model), kind="F16")
    from tokenizers import normalizers, pre_tokenizers

    other = lm.byte_tokenizer()
    other.normalizer = normalizers.NFC()  # pyright: ignore
    spaced = lm.byte_tokenizer()
    spaced.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)  # pyright: ignore
    for changed in (other, spaced):
        with pytest.raises(lm.ModelError, match="the rule of GPT-2 or SmolLM2"):
            write(model, changed)
    assert list(tmp_path.iterdir()) == []
