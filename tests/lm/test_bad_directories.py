"""A directory that is damaged, or not supported, is named."""

import dataclasses
import json

import numpy as np
import pytest
import reference_logits as reference
from decoders import (
    TINY,
    a_random_model,
    assert_same,
    cut,
    directory,
    edit,
    with_tensors,
)
from safetensors.numpy import load_file, save_file

from prograde import lm


@pytest.fixture
def good(tmp_path):
    return directory(tmp_path / "good", reference.CONFIGS["llama_groups"])


def in_shards(path):
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {
        "model-00001-of-00002.safetensors": names[:7],
        "model-00002-of-00002.safetensors": names[7:],
    }
    for shard, part in shards.items():
        save_file({name: tensors[name] for name in part}, path / shard)
    weight_map = {name: shard for shard, part in shards.items() for name in part}
    (path / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return path


def test_shards_are_one_model(good):
    expected, _ = lm.load(good)
    assert_same(lm.load(in_shards(good))[0], expected)


def twice(path):
    tensors = load_file(path / "model-00001-of-00002.safetensors")
    tensors |= {"model.norm.weight": np.ones(16, np.float32)}
    save_file(tensors, path / "model-00001-of-00002.safetensors")


QUERY = "model.layers.1.self_attn.q_proj.weight"
DAMAGE = {
    "no config": (lambda p: (p / "config.json").unlink(), "good has no config.json"),
    "config cut off": (lambda p: cut(p / "config.json"), "config.json is damaged"),
    "config of bytes": (
        lambda p: (p / "config.json").write_bytes(b"\xff\xfe\x00"),
        "config.json is damaged",
    ),
    "config no object": (
        lambda p: (p / "config.json").write_text("[1]"),
        "config.json is damaged.*object",
    ),
    "config without a size": (
        lambda p: edit(p / "config.json", hidden_size=...),
        "good: .*no 'hidden_size'",
    ),
    "config with a word": (
        lambda p: edit(p / "config.json", hidden_size="wide"),
        "width='wide'.*whole number",
    ),
    "config with nothing": (
        lambda p: edit(p / "config.json", num_attention_heads=0),
        "num_heads=0.*at least 1",
    ),
    "config with a half": (lambda p: edit(p / "config.json", rope_theta="x"), "makes no sense"),
    "heads in no groups": (
        lambda p: edit(p / "config.json", num_key_value_heads=3),
        "num_heads=4 and num_kv_heads=3",
    ),
    "heads in no width": (
        lambda p: edit(p / "config.json", num_attention_heads=6),
        "width=16 and num_heads=6",
    ),
    "odd heads": (lambda p: edit(p / "config.json", head_dim=5), "head_size=5.*even"),
    "another architecture": (
        lambda p: edit(p / "config.json", model_type="mamba"),
        "'mamba' is not supported. Supported: llama, mistral, qwen2",
    ),
    "no architecture": (
        lambda p: edit(p / "config.json", model_type=...),
        "None is not supported. Supported: llama",
    ),
    "another activation": (
        lambda p: edit(p / "config.json", hidden_act="gelu"),
        "hidden_act='gelu'.*'silu' is",
    ),
    "other positions": (
        lambda p: edit(p / "config.json", rope_scaling={"rope_type": "yarn", "factor": 2.0}),
        "rope_scaling 'yarn'.*'llama3' is",
    ),
    "part of a head turned": (
        lambda p: edit(
            p / "config.json",
            rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5},
        ),
        "partial_rotary_factor=0.5",
    ),
    "positions without a factor": (
        lambda p: edit(p / "config.json", rope_scaling={"rope_type": "llama3"}),
        "no 'factor'",
    ),
    "a base of positions of zero": (
        lambda p: edit(p / "config.json", rope_theta=0),
        r"rope_theta=0\.0, but a positive number",
    ),
    "a base of positions that is no number": (
        lambda p: edit(p / "config.json", rope_theta=True),
        "makes no sense .True is no number",
    ),
    "a number beyond float": (
        lambda p: edit(p / "config.json", rope_theta=10**400),
        "makes no sense .*too large",
    ),
    "keys for no head": (
        lambda p: edit(p / "config.json", num_key_value_heads=0),
        "num_kv_heads=0.*at least 1",
    ),
    "heads of no size": (lambda p: edit(p / "config.json", head_dim="8"), "head_size='8'"),
    "a layer that is half": (
        lambda p: edit(p / "config.json", num_hidden_layers=1.5),
        r"num_layers=1\.5",
    ),
    "a tie of words": (
        lambda p: edit(p / "config.json", tie_word_embeddings="no"),
        "tied='no', but true or false",
    ),
    "biases of words": (
        lambda p: edit(p / "config.json", attention_bias="false"),
        "attention_bias='false', but true or false",
    ),
    "a rounding that is no number": (
        lambda p: edit(p / "config.json", rms_norm_eps=True),
        "norm_eps=True, but a positive number",
    ),
    "scaled by zero": (
        lambda p: edit(p / "config.json", rope_scaling=reference._LLAMA3 | {"factor": 0}),
        r"rope_scaling=\(0\.0, .*four positive numbers",
    ),
    "scaled between equal bounds": (
        lambda p: edit(
            p / "config.json", rope_scaling=reference._LLAMA3 | {"high_freq_factor": 1.0}
        ),
        "low below high",
    ),
    "a billion layers": (
        lambda p: edit(p / "config.json", num_hidden_layers=10**9),
        "config.json asks for 1,000,000,000 layers, but there are 21 tensors",
    ),
    "a vocabulary of a billion": (
        lambda p: edit(p / "config.json", vocab_size=10**9),
        r"embed_tokens.weight has shape \(11, 16\), and config.json asks for \(1000000000, 16\)",
    ),
    "lists in lists": (
        lambda p: (p / "config.json").write_text('{"a":' + "[" * 100_000),
        "config.json is damaged",
    ),
    "quantized weights": (
        lambda p: edit(p / "config.json", quantization_config={"quant_method": "gptq"}),
        "quantization_config",
    ),
    "config of a larger model": (
        lambda p: edit(p / "config.json", num_hidden_layers=3),
        r"no tensor model.layers.2.* and 6 more, which config.json asks for",
    ),
    "config of a smaller model": (
        lambda p: edit(p / "config.json", num_hidden_layers=1),
        r"holds model.layers.1.* and 6 more, .* no place",
    ),
    "config of a wider model": (
        lambda p: edit(p / "config.json", num_attention_heads=8, head_dim=4),
        r"q_proj.weight has shape \(16, 16\), and config.json asks for \(32, 16\)",
    ),
    "an untied head that is missing": (
        lambda p: with_tensors(p, lambda t: t.pop("lm_head.weight")),
        "no tensor lm_head.weight",
    ),
    "a tensor of another shape": (
        lambda p: with_tensors(p, lambda t: t.update({QUERY: np.zeros((16, 8), np.float32)})),
        rf"{QUERY} has shape \(16, 8\), and config.json asks for \(16, 16\)",
    ),
    "a tensor of whole numbers": (
        lambda p: with_tensors(p, lambda t: t.update({QUERY: np.zeros((16, 16), np.int8)})),
        f"{QUERY} is in I8. Supported: F64, F32, F16, BF16",
    ),
    "a bias without a place": (
        lambda p: with_tensors(
            p, lambda t: t.update({"model.layers.0.self_attn.o_proj.bias": np.ones(16, np.float32)})
        ),
        "holds model.layers.0.self_attn.o_proj.bias",
    ),
    "no weights": (lambda p: (p / "model.safetensors").unlink(), "good has no model.safetensors"),
    "weights cut off": (
        lambda p: cut(p / "model.safetensors"),
        "model.safetensors is cut off or damaged.*again",
    ),
    "weights empty": (
        lambda p: cut(p / "model.safetensors", 0),
        "model.safetensors is cut off or damaged",
    ),
    "weights of another kind": (
        lambda p: (p / "model.safetensors").write_text(
            "version https://git-lfs.github.com/spec/v1\n" * 9
        ),
        "model.safetensors is cut off or damaged",
    ),
    "a shard missing": (
        lambda p: (in_shards(p) / "model-00002-of-00002.safetensors").unlink(),
        "good has no model-00002-of-00002.safetensors. Copy it there",
    ),
    "a shard cut off": (
        lambda p: cut(in_shards(p) / "model-00002-of-00002.safetensors", 0.9),
        "model-00002-of-00002.safetensors is cut off or damaged",
    ),
    "index cut off": (
        lambda p: cut(in_shards(p) / "model.safetensors.index.json"),
        "model.safetensors.index.json is damaged",
    ),
    "index without a map": (
        lambda p: edit(in_shards(p) / "model.safetensors.index.json", weight_map=...),
        "model.safetensors.index.json is damaged .*weight_map",
    ),
    "index with another map": (
        lambda p: edit(in_shards(p) / "model.safetensors.index.json", weight_map=[1]),
        "model.safetensors.index.json is damaged",
    ),
    "index of another directory": (
        lambda p: edit(
            in_shards(p) / "model.safetensors.index.json", weight_map={"a": "../model.safetensors"}
        ),
        "names '../model.safetensors', which is not a file of the directory",
    ),
    "index of numbers": (
        lambda p: edit(in_shards(p) / "model.safetensors.index.json", weight_map={"a": 5}),
        "model.safetensors.index.json is damaged",
    ),
    "a tensor in two shards": (
        lambda p: twice(in_shards(p)),
        "model.norm.weight is in another shard as well",
    ),
    "no tokenizer": (
        lambda p: (p / "tokenizer.json").unlink(),
        "good has no tokenizer.json, which says how text",
    ),
    "tokenizer cut off": (lambda p: cut(p / "tokenizer.json"), "tokenizer.json is damaged"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_directory_is_named(case, good):
    damage, message = DAMAGE[case]
    damage(good)
    with pytest.raises(lm.ModelError, match=message):
        lm.load(good)


def test_what_can_be_ignored_is_ignored(good):
    expected, _ = lm.load(good)
    with_tensors(
        good,
        lambda t: t.update(
            {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)}
        ),
    )
    assert_same(lm.load(good)[0], expected)
    edit(good / "config.json", tie_word_embeddings=True)
    assert lm.load(good)[0].head is None


def test_arguments_that_make_no_sense_are_refused(good, tmp_path):
    with pytest.raises(lm.ModelError, match="dtype='float16', but float32 or bfloat16"):
        lm.load(good, dtype="float16")
    with pytest.raises(lm.ModelError, match="good holds no quantized weights"):
        lm.load(good, quantized=True)
    with pytest.raises(lm.ModelError, match=r"nowhere does not exist. Give a directory"):
        lm.load(tmp_path / "nowhere")
    with pytest.raises(lm.ModelError, match="is no GGUF file"):
        lm.load(good / "model.safetensors")
    with pytest.raises(ValueError, match="kind='Q5_1', but one of Q4_0, Q4_1, Q8_0"):
        lm.Quantized.from_gguf(np.zeros((2, 18), np.uint8), "Q5_1")
    with pytest.raises(ValueError, match="rows of uint8, 18 a block"):
        lm.Quantized.from_gguf(np.zeros((2, 20), np.uint8), "Q4_0")
    model = a_random_model()
    for first, last in ((0, 4), (2, 2), (-1, 1)):
        with pytest.raises(ValueError, match=f"layers {first} to {last} of 3"):
            model.split(first, last)
    with pytest.raises(lm.ModelError, match="window=0"):
        dataclasses.replace(TINY, window=0)
    with pytest.raises(lm.ModelError, match="norm_eps=0"):
        dataclasses.replace(TINY, norm_eps=0)
    with pytest.raises(lm.ModelError, match="window and attention_bias are both set"):
        dataclasses.replace(TINY, window=3, attention_bias=True).to_config()
