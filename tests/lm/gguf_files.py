"""GGUF files of tiny models, written by the package gguf, and the numbers they stand for."""

import itertools
import json
import re

import gguf
import numpy as np
import reference_logits as reference

from prograde import lm

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
    """Random bytes of Q6_K, and their numbers by the loop of ggml's dequantize_row_q6_K."""
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


TEXTS = [
    "The capital of France is Paris.",
    "the theatre's winter in a 12th century, 1234 times",
    "  leading,   several \n\n\tand trailing spaces  ",
    "naïve Grüße, 世界 🙂 don't we'll they've I'm",
    "x_y(z)[0] = {'a': 1.5e-3}; // --> ok\r\n",
    "",
]


def bpe_twin(tokenizer, text, digits_apart):
    """Ids by the slow rule of GPT-2: split, spell in bytes, merge the first listed pair, repeat."""
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
