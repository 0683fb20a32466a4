"""Logits of tiny models as `transformers` computes them, recorded in reference_logits.json.

    python tests/lm/reference_logits.py     # makes them again; needs transformers and torch

The two take 1.2 GB, so the tests compare with the record. The weights are made from bits of
Philox, whose stream NumPy guarantees, and are not stored. The script needs nothing of prograde.
"""

import json
import math
import re
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

RECORD = Path(__file__).with_suffix(".json")
TOKENS = np.array([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]])
POSITIONS = [0, 4, 7, 11]  # whose logits are recorded

_TINY = {
    "vocab_size": 11,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-2,  # large, so that it shows
    "hidden_act": "silu",
    "rope_theta": 100.0,  # small, so that all pairs turn
    "tie_word_embeddings": False,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CONFIGS = {
    "llama_tied": _TINY
    | {"model_type": "llama", "num_key_value_heads": 4, "tie_word_embeddings": True},
    "llama_groups": _TINY | {"model_type": "llama"},
    "llama_one_key": _TINY
    | {"model_type": "llama", "num_key_value_heads": 1, "num_hidden_layers": 3},
    "llama3_positions": _TINY
    | {"model_type": "llama", "head_dim": 8, "rope_scaling": _LLAMA3, "rope_theta": 5000.0},
    "qwen2_biases": _TINY | {"model_type": "qwen2", "tie_word_embeddings": True},
    "mistral_wide_heads": _TINY | {"model_type": "mistral", "head_dim": 6, "sliding_window": None},
    "mistral_window": _TINY | {"model_type": "mistral", "sliding_window": 5},
}


def _tokens(stream, *shape):
    return (
        np.random.Philox(key=stream)
        .random_raw(math.prod(shape))
        .astype(np.uint32)
        .astype(int)
        .reshape(shape)
        % 11
    )


LONG_TOKENS, LONG_POSITIONS = _tokens(3, 2, 50), [12, 49]
PADDED_TOKENS, PADDED_VALID = _tokens(4, 2, 9), np.arange(9) >= np.array([[4], [0]])
ROUNDED_TOKENS = _tokens(5, 8, 24)

# what `lm.save` has to write as config.json, for changes of an architecture
_SAVED = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 11,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "head_dim": 4,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "rms_norm_eps": 1e-2,
    "tie_word_embeddings": True,
    "sliding_window": None,
    "max_position_embeddings": 2048,
    "hidden_act": "silu",
}
SAVED = {
    "plain": _SAVED,
    "untied": _SAVED | {"tie_word_embeddings": False, "head_dim": 6},
    "biases": _SAVED
    | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "rope_theta": 777.0},
    "window": _SAVED
    | {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 4},
    "llama3 positions": _SAVED | {"rope_scaling": _LLAMA3, "rope_theta": 5000.0, "head_dim": 8},
}


def shapes(config):
    """Names and shapes of the tensors, as Hugging Face has them."""
    width, hidden, vocabulary = (
        config["hidden_size"],
        config["intermediate_size"],
        config["vocab_size"],
    )
    head = config.get("head_dim") or width // config["num_attention_heads"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    found = {"model.embed_tokens.weight": (vocabulary, width), "model.norm.weight": (width,)}
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = (vocabulary, width)
    for i in range(config["num_hidden_layers"]):
        layer = {
            "input_layernorm.weight": (width,),
            "self_attn.q_proj.weight": (queries, width),
            "self_attn.k_proj.weight": (keys, width),
            "self_attn.v_proj.weight": (keys, width),
            "self_attn.o_proj.weight": (width, queries),
            "post_attention_layernorm.weight": (width,),
            "mlp.gate_proj.weight": (hidden, width),
            "mlp.up_proj.weight": (hidden, width),
            "mlp.down_proj.weight": (width, hidden),
        }
        if config["model_type"] == "qwen2":
            layer |= {"self_attn.q_proj.bias": (queries,), "self_attn.k_proj.bias": (keys,)}
            layer |= {"self_attn.v_proj.bias": (keys,)}
        found |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return found


def weights(config, seed=0):
    """Matrices that make attention far from uniform, and norms and biases far from one and zero."""
    drawn = {}
    for number, (name, shape) in enumerate(sorted(shapes(config).items())):
        bits = np.random.Philox(key=[seed, number]).random_raw(math.prod(shape))
        uniform = ((bits >> np.uint64(11)) * 2.0**-53 * 2 - 1).reshape(shape)
        if name.endswith("norm.weight"):
            uniform = 1 + 0.5 * uniform
        elif len(shape) == 2 and "embed" not in name:
            uniform = 3 * uniform / shape[1] ** 0.5
        drawn[name] = uniform.astype(np.float32)
    return drawn


def write(directory, config, tensors=None):
    """config.json and model.safetensors."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    tensors = weights(config) if tensors is None else tensors
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def logits_by_transformers(directory, tokens, **options):
    """All logits, and the names of tensors that were missing or too many."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=options.pop("dtype", torch.float32),
        output_loading_info=True,
        attn_implementation="eager",
    )
    with torch.no_grad():
        found = model.eval()(input_ids=torch.asarray(np.asarray(tokens)), **options).logits
    trouble = {k: v for k, v in report.items() if v}
    return found.float().numpy(), trouble


def rows(found):
    """Seven digits of each number."""
    return [[float(f"{x:.7g}") for x in row] for row in np.asarray(found).reshape(-1, 11)]


def in_bfloat16(directory):
    """Rounds the tensors of a directory to bfloat16."""
    from safetensors.torch import load_file, save_file

    path = directory / "model.safetensors"
    rounded = {name: x.bfloat16() for name, x in load_file(path).items()}
    save_file(rounded, path, metadata={"format": "pt"})


def recorded(directory, config, bfloat16):
    """What `transformers` makes of what `lm.save` writes."""
    import torch

    write(directory, config)
    if bfloat16:
        in_bfloat16(directory)
    found, trouble = logits_by_transformers(directory, TOKENS)
    assert not trouble, trouble
    if not bfloat16:
        return {"logits": rows(found[0, POSITIONS])}
    wide, _ = logits_by_transformers(directory, ROUNDED_TOKENS)
    narrow, _ = logits_by_transformers(directory, ROUNDED_TOKENS, dtype=torch.bfloat16)
    rounding = float(np.sqrt(np.mean((narrow - wide) ** 2)))
    return {"logits": rows(found[0, POSITIONS]), "rounding": float(f"{rounding:.4g}")}


def main():
    import torch
    import transformers

    record = {"transformers": transformers.__version__, "torch": torch.__version__}
    record |= {"logits": {}, "long": {}, "saved": {}}
    with tempfile.TemporaryDirectory() as temporary:
        for name, config in CONFIGS.items():
            directory = write(Path(temporary) / name, config)
            found, trouble = logits_by_transformers(directory, TOKENS)
            assert not trouble, trouble
            record["logits"][name] = rows(found[0, POSITIONS])
            found, _ = logits_by_transformers(directory, LONG_TOKENS)
            record["long"][name] = rows(found[:, LONG_POSITIONS])
        mask = torch.asarray(PADDED_VALID.astype(int))
        directory = Path(temporary) / "llama_groups"
        found, _ = logits_by_transformers(directory, PADDED_TOKENS, attention_mask=mask)
        record["padded"] = rows(found[PADDED_VALID])
        for name, config in SAVED.items():
            record["saved"][name] = {
                dtype: recorded(Path(temporary) / f"{name} {dtype}", config, dtype == "bfloat16")
                for dtype in ("float32", "bfloat16")
            }
    text = json.dumps(record, indent=1)
    text = re.sub(r"\[\s+(-?[\d.e-]+(?:,\s+-?[\d.e-]+)*)\s+\]", _on_one_line, text)
    RECORD.write_text(text + "\n")


def _on_one_line(numbers):
    return "[" + ", ".join(re.split(r",\s+", numbers[1])) + "]"


if __name__ == "__main__":
    main()
