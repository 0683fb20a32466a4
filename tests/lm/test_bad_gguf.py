"""A GGUF file that is damaged, or not supported, is named."""

import struct

import gguf
import numpy as np
import pytest
import reference_logits as reference
from decoders import cut
from gguf_files import config_of, write_gguf

from prograde import lm

GGUF_DAMAGE = {
    "cut off in its tensors": (
        lambda p: cut(p, 0.9),
        "tiny.gguf is cut off or damaged at 'blk.*bytes .* of ",
    ),
    "cut off in its words": (lambda p: cut(p, 0.01), "cut off or damaged at 'tokenizer.ggml"),
    "cut off at once": (
        lambda p: p.write_bytes(b"GGUF\3\0\0\0"),
        "cut off or damaged at 'its beginning'",
    ),
    "empty": (lambda p: p.write_bytes(b""), "cannot be read"),
    "big-endian": (
        lambda p: p.write_bytes(b"GGUF\0\0\0\3" + bytes(32)),
        "version 50331648; 2 and 3",
    ),
    "another kind of file": (
        lambda p: p.write_text("{}" * 50),
        "is no GGUF file: it begins with b'{}{}'. Give",
    ),
    "a number too large": (
        lambda p: p.write_bytes(struct.pack("<4sIQQQ", b"GGUF", 3, 1, 1, 2**62)),
        "cut off or damaged",
    ),
    "a list too long": (
        lambda p: p.write_bytes(
            struct.pack("<4sIQQQ1sIIQ", b"GGUF", 3, 0, 1, 1, b"a", 9, 4, 2**60)
        ),
        "cut off or damaged at 'a'",
    ),
    "lists in lists": (
        lambda p: p.write_bytes(
            struct.pack("<4sIQQQ1sI", b"GGUF", 3, 0, 1, 1, b"a", 9)
            + struct.pack("<IQ", 9, 1) * 5000
        ),
        "damaged at 'a' .lists in lists, more than 8 deep",
    ),
    "a field twice": (
        lambda p: p.write_bytes(
            struct.pack("<4sIQQ", b"GGUF", 3, 0, 2) + struct.pack("<Q1sIB", 1, b"a", 0, 1) * 2
        ),
        "damaged at 'a' .the field is there twice",
    ),
    "a tensor twice": (
        lambda p: p.write_bytes(
            struct.pack("<4sIQQ", b"GGUF", 3, 2, 0)
            + struct.pack("<Q1sIQIQ", 1, b"w", 1, 2, 0, 0) * 2
            + bytes(64)
        ),
        "damaged at 'w' .the tensor is there twice",
    ),
    "an alignment of words": (
        lambda p: p.write_bytes(
            struct.pack("<4sIQQ", b"GGUF", 3, 0, 1)
            + struct.pack("<Q17sIQ1s", 17, b"general.alignment", 8, 1, b"x")
        ),
        "damaged at 'general.alignment' .general.alignment='x'",
    ),
    "a value of no kind": (
        lambda p: p.write_bytes(struct.pack("<4sIQQQ1sI", b"GGUF", 3, 0, 1, 1, b"a", 77)),
        "damaged at 'a' .a value of kind 77",
    ),
}


@pytest.mark.parametrize("case", GGUF_DAMAGE)
def test_a_damaged_gguf_file_is_named(case, tmp_path):
    write_gguf(tmp_path / "tiny.gguf", config_of(num_hidden_layers=1), "F32")
    damage, message = GGUF_DAMAGE[case]
    damage(tmp_path / "tiny.gguf")
    with pytest.raises(lm.ModelError, match=message):
        lm.load(tmp_path / "tiny.gguf")


def test_wherever_a_gguf_file_ends_early_that_is_said(tmp_path):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, config_of(num_hidden_layers=1), "Q8_0")
    whole = path.read_bytes()
    for keep in np.random.default_rng(0).integers(
        0, len(whole) - 40, 30
    ):  # the last bytes only fill a block of 32
        path.write_bytes(whole[:keep])
        with pytest.raises(lm.ModelError, match=r"again|cannot be read|no GGUF"):
            lm.load(path)


def without_norm(config):
    tensors = reference.weights(config)
    del tensors["model.norm.weight"]
    return tensors


def of_another_shape(config):
    return reference.weights(config) | {"model.norm.weight": np.ones(32, np.float32)}


GGUF_UNSUPPORTED = {
    "kind": (
        {"kind": "Q5_1"},
        "weight is in Q5_1. Supported: F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q6_K",
    ),
    "architecture": (
        {"model_type": "gemma"},
        "tiny.gguf: .*'gemma' is not supported. Supported: llama, mistral, qwen2",
    ),
    "tokenizer": ({"fields": {"tokenizer_model": "llama"}}, "tokenizer 'llama' .*tokenizer.json"),
    "rule": ({"fields": {"tokenizer_pre": "qwen2"}}, "rule 'qwen2'; .*'smollm'"),
    "no rule": ({"leave_out": ["tokenizer_pre"]}, "rule None"),
    "positions": (
        {"fields": {"rope_scaling_type": gguf.RopeScalingType.YARN}},
        "rope.scaling.type='yarn'",
    ),
    "part of a head turned": ({"fields": {"rope_dimension_count": 8}}, "rope.dimension_count=8"),
    "no size": (
        {"leave_out": ["embedding_length"]},
        "tiny.gguf: the header has no 'embedding_length'",
    ),
    "no words": ({"leave_out": ["token_list", "vocab_size"]}, "no 'tokenizer.ggml.tokens'"),
    "no merges": ({"leave_out": ["token_merges"]}, "no 'tokenizer.ggml.merges'"),
    "words without a kind": ({"fields": {"token_types": [1, 1]}}, "tokenizer is damaged"),
    "a size that is none": (
        {"fields": {"feed_forward_length": [1, 2]}},
        r"hidden=\[1, 2\].*whole number",
    ),
    "a tensor missing": (
        {"tensors": without_norm},
        "tiny.gguf has no tensor output_norm.weight, which the header asks",
    ),
    "a tensor of another shape": (
        {"tensors": of_another_shape},
        r"output_norm.weight has shape \(32,\), and the header asks for \(64,\)",
    ),
    "two billion layers": (
        {"fields": {"block_count": 2**31}},
        "the header asks for 2,147,483,648 layers, but there are 21 tensors",
    ),
    "a base of positions of zero": (
        {"fields": {"rope_freq_base": 0.0}},
        r"rope_theta=0\.0, but a positive number",
    ),
    "no head": ({"fields": {"head_count": 0}}, "a value that makes no sense"),
    "keys for no head": ({"fields": {"head_count_kv": 0}}, "num_kv_heads=0.*at least 1"),
    "a vocabulary of nothing": ({"fields": {"vocab_size": 0}}, "vocab_size=0.*at least 1"),
    "layers too many": ({"fields": {"block_count": 1}}, "holds blk.1.* and 6 more, .*no place"),
}


@pytest.mark.parametrize("case", GGUF_UNSUPPORTED)
def test_a_gguf_file_that_is_not_supported_is_named(case, tmp_path):
    options, message = GGUF_UNSUPPORTED[case]
    config = config_of(options.get("model_type", "llama"))
    tensors = options["tensors"](config) if "tensors" in options else None
    write_gguf(
        tmp_path / "tiny.gguf",
        config,
        options.get("kind", "F32"),
        tensors,
        options.get("fields", {}).items(),
        options.get("leave_out", ()),
    )
    with pytest.raises(lm.ModelError, match=message):
        lm.load(tmp_path / "tiny.gguf")


def test_scaled_positions_of_a_gguf_file_are_refused(tmp_path):
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    write_gguf(path, config_of(), "F32")
    fields = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(tmp_path / "scaled.gguf", "llama")
    for name, field in fields.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            sub = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub)
    for tensor in fields.tensors:
        writer.add_tensor(tensor.name, np.asarray(tensor.data))
    writer.add_tensor("rope_freqs.weight", np.ones(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(
        lm.ModelError, match=r"rope_freqs.weight, which is not supported. Give a directory"
    ):
        lm.load(tmp_path / "scaled.gguf")
