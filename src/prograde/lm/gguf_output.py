"""Models and tokenizers to GGUF files."""

import json
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from tokenizers import Tokenizer

from prograde.lm.architecture import Architecture, ModelError
from prograde.lm.assembly import GGUF
from prograde.lm.decoder import Decoder
from prograde.lm.quantized import BLOCK
from prograde.lm.saving import appearing, check_kinds, check_name, named_tensors

Kind = Literal["F32", "F16", "Q8_0"]
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # kinds of token
_FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7}


def save_gguf(path: str | Path, model: Decoder, tokenizer: Tokenizer, kind: Kind = "F16") -> None:
    """Writes one GGUF file, for `load` and llama.cpp.

    A `LowRankUpdate` is added to its matrix. The file appears when all of it is written.

    **Arguments:**

    - `path`: where; must not exist, and end in .gguf.
    - `model`, `tokenizer`: what is saved.
    - `kind`: of the matrices, `"F32"`, `"F16"` or `"Q8_0"` (8 bits, a scale for every 32 inputs).
      Norms and biases are in F32.

    **Cost:** holds all tensors in memory, as they are written.

    **Errors:** `ModelError` for a path that exists or ends otherwise; for a model with a window or
    scaled positions, which such a file has no place for; for a tokenizer that is not byte-level BPE
    with the rule of GPT-2 or SmolLM2; for numbers that F16 cannot hold; for rows that are not whole
    blocks of Q8_0; and where the disk refuses, which leaves nothing behind.

    **Source:** the GGUF format of the ggml project.

    Examples:
        >>> import pathlib, tempfile, jax
        >>> from prograde import lm
        >>> tiny = lm.Architecture(
        ...     vocab_size=256, width=64, num_layers=2, num_heads=4, num_kv_heads=2, hidden=128)
        >>> model = lm.Decoder.create(jax.random.key(0), tiny)
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "tiny.gguf"
        >>> lm.save_gguf(path, model, lm.byte_tokenizer(), "F32")
        >>> again, tokenizer = lm.load(path)
        >>> bool((again.embedding == model.embedding).all())
        True
    """
    from gguf import GGMLQuantizationType, GGUFWriter, quantize

    path = Path(path)
    check_gguf(path, model, tokenizer, kind)
    a = model.architecture
    words, kinds, merges, rule = _tokens(tokenizer, a.vocab_size)
    heads = {} if a.attention_bias else {"query": a.num_heads, "key": a.num_kv_heads}
    with appearing(path) as whole:
        writer = GGUFWriter(whole, "qwen2" if a.attention_bias else "llama")
        _add_sizes(writer, a, _FILE_TYPES[kind])
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(rule)
        writer.add_token_list(words)
        writer.add_token_types(kinds)
        writer.add_token_merges(merges)
        for part, name, array in named_tensors(model, GGUF, np.float32):
            if part in heads:  # llama.cpp turns neighbouring numbers of a head, not its halves
                pairs = array.reshape(heads[part], 2, -1, array.shape[1]).swapaxes(1, 2)
                array = pairs.reshape(array.shape)
            stored = kind if array.ndim == 2 else "F32"
            _check_fits(name, array, stored)
            data = quantize(array, GGMLQuantizationType[stored])
            writer.add_tensor(name, data, raw_dtype=GGMLQuantizationType[stored])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def check_gguf(path: Path, model: Decoder, tokenizer: Tokenizer, kind: Kind = "F16") -> None:
    """Raises for what `save_gguf` refuses, apart from the values of the weights.

    It is for work that ends with such a file and should not begin in vain.

    **Arguments, errors:** those of `save_gguf`.

    **Source:** the GGUF format of the ggml project.

    Examples:
        >>> import pathlib, jax
        >>> from prograde import lm
        >>> tiny = lm.Architecture(
        ...     vocab_size=256, width=64, num_layers=2, num_heads=4, num_kv_heads=2, hidden=128)
        >>> model = lm.Decoder.create(jax.random.key(0), tiny)
        >>> lm.check_gguf(pathlib.Path("tiny.gguf"), model, lm.byte_tokenizer())
    """
    check_name(path, "save_gguf", ".gguf")
    check_kinds(model, tokenizer)
    a = model.architecture
    if path.suffix.lower() != ".gguf":
        raise ModelError(f"{path} does not end in .gguf, but save_gguf writes a .gguf file.")
    if kind not in get_args(Kind):
        raise ModelError(f"kind={kind!r}, but one of {', '.join(get_args(Kind))} is needed.")
    if a.window is not None or a.rope_scaling is not None:
        name = "window" if a.window is not None else "rope_scaling"
        raise ModelError(
            f"the model has {name}={getattr(a, name)}, which a GGUF file of Llama has no place "
            "for. Use save, which writes a directory."
        )
    _tokens(tokenizer, a.vocab_size)


def _add_sizes(writer: Any, a: Architecture, file_type: int) -> None:
    writer.add_file_type(file_type)
    writer.add_vocab_size(a.vocab_size)
    writer.add_context_length(a.context)
    writer.add_embedding_length(a.width)
    writer.add_block_count(a.num_layers)
    writer.add_feed_forward_length(a.hidden)
    writer.add_head_count(a.num_heads)
    writer.add_head_count_kv(a.num_kv_heads)
    writer.add_key_length(a.head_size)
    writer.add_value_length(a.head_size)
    writer.add_rope_dimension_count(a.head_size)
    writer.add_rope_freq_base(a.rope_theta)
    writer.add_layer_norm_rms_eps(a.norm_eps)


def _check_fits(name: str, array: np.ndarray, kind: str) -> None:
    """Raises for numbers or rows that this kind cannot hold."""
    largest = np.finfo(np.float16).max
    if kind == "F16" and np.abs(array).max(initial=0) > largest:
        raise ModelError(
            f"{name} has numbers above {largest:g}, which F16 cannot hold. Use kind='F32'."
        )
    if kind == "Q8_0" and array.shape[-1] % BLOCK:
        raise ModelError(
            f"{name} has rows of {array.shape[-1]}, which are not whole blocks of {BLOCK} as Q8_0 "
            "has them. Use kind='F16'."
        )


def _tokens(tokenizer: Tokenizer, count: int) -> tuple[list[str], list[int], list[str], str]:
    """(words, kinds of words, merges, name of the rule that splits text)."""
    content = json.loads(tokenizer.to_str())
    rule = _rule(content)
    if rule is None:
        raise ModelError(
            "the tokenizer is not byte-level BPE that splits text by the rule of GPT-2 or SmolLM2, "
            "and others cannot be written to a GGUF file. Use save, which writes a directory."
        )
    words = {i: word for word, i in tokenizer.get_vocab(with_added_tokens=True).items()}
    if words and max(words) >= count:
        raise ModelError(
            f"the tokenizer has tokens up to number {max(words)}, but the model has {count}."
        )
    added = {token["id"]: token["special"] for token in content["added_tokens"]}
    kinds = [
        (_NORMAL if i not in added else _CONTROL if added[i] else _USER_DEFINED)
        if i in words
        else _UNUSED
        for i in range(count)
    ]
    listed = [words.get(i, f"[PAD{i}]") for i in range(count)]
    merges = [m if isinstance(m, str) else " ".join(m) for m in content["model"]["merges"]]
    return listed, kinds, merges, rule


def _rule(content: dict[str, Any]) -> str | None:
    """`smollm` or `gpt-2` where the tokenizer splits text so, else `None`."""
    bytes_alone = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}

    def of(step: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in step.items() if k != "trim_offsets"}

    splits = content["pre_tokenizer"] or {}
    steps = splits["pretokenizers"] if splits.get("type") == "Sequence" else [splits]
    plain = content["model"]["type"] == "BPE" and content["normalizer"] is None
    after = content["post_processor"] is None or content["post_processor"]["type"] == "ByteLevel"
    if not (plain and after):
        return None
    rules = {"gpt-2": [bytes_alone], "smollm": [digits, bytes_alone]}
    found = [of(step) for step in steps]
    return next((name for name, wanted in rules.items() if found == wanted), None)
