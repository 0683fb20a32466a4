"""GGUF files: their header, their tensors, and the tokenizer in them."""

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from prograde.lm.architecture import Architecture, ModelError
from prograde.lm.assembly import GGUF, assemble
from prograde.lm.decoder import Decoder
from prograde.lm.quantized import BYTES, Quantized, split_blocks

_KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q6_K")
_NUMBERS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # kinds of token
_DEEPEST = 8  # lists in lists


def from_gguf(path: Path, dtype: Any, quantized: bool) -> tuple[Decoder, Tokenizer]:
    """A decoder and its tokenizer."""
    fields, tensors = read_header(path)
    try:
        a = Architecture.from_gguf(
            fields,
            tied="output.weight" not in tensors,
            attention_bias="blk.0.attn_q.bias" in tensors,
        )
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None
    tokenizer = gguf_tokenizer(fields, path)
    if "rope_freqs.weight" in tensors:
        raise ModelError(
            f"{path} has rotary positions that are scaled by rope_freqs.weight, which is not "
            "supported. Give a directory with config.json."
        )
    # llama.cpp turns neighbouring numbers of a head, Hugging Face turns the two halves
    heads = (
        {"attn_q": a.num_heads, "attn_k": a.num_kv_heads}
        if fields["general.architecture"] == "llama"
        else {}
    )
    return assemble(a, dtype, _Weights(path, tensors, heads, quantized)), tokenizer


@dataclass(frozen=True)
class Stored:
    """A tensor as the file has it: rows of bytes."""

    kind: str
    shape: tuple[int, ...]
    data: np.ndarray


class _Weights:
    """The tensors of a file."""

    asked_by, column = "the header", GGUF

    def __init__(
        self, path: Path, tensors: Mapping[str, Stored], heads: Mapping[str, int], quantized: bool
    ):
        for name, tensor in tensors.items():
            if tensor.kind not in _KINDS:
                raise ModelError(
                    f"{path}: {name} is in {tensor.kind}. Supported: {', '.join(_KINDS)}."
                )
        self.where, self.tensors, self.heads, self.keep = path, tensors, heads, quantized
        self.shapes = {name: tensor.shape for name, tensor in tensors.items()}

    def array(self, name: str) -> np.ndarray:
        from gguf import GGMLQuantizationType, dequantize

        tensor = self.tensors[name]
        return self._halves(
            name, dequantize(tensor.data, GGMLQuantizationType[tensor.kind]).reshape(tensor.shape)
        )

    def quantized(self, names: list[str]) -> Quantized | None:
        kinds = {self.tensors[name].kind for name in names}
        if (
            not self.keep
            or len(kinds) > 1
            or not kinds <= BYTES.keys()
            or len(self.shapes[names[0]]) != 2
        ):
            return None
        (kind,) = kinds
        parts = split_blocks(self.tensors[names[0]].data, kind)
        wholes = {
            part: _aligned((len(names), *views.shape), np.uint8) for part, views in parts.items()
        }
        for i, name in enumerate(names):
            for part, views in split_blocks(
                self._halves(name, self.tensors[name].data), kind
            ).items():
                wholes[part][i] = views
        arrays = {part: jax.device_put(whole) for part, whole in wholes.items()}
        return Quantized(arrays["codes"], arrays["scale"], arrays.get("offset"), kind)

    def may_be_ignored(self, name: str) -> bool:
        return False

    def _halves(self, name: str, rows: np.ndarray) -> np.ndarray:
        heads = next((count for part, count in self.heads.items() if f".{part}." in name), None)
        if heads is None:
            return rows
        return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Memory aligned so that on the CPU `jax.device_put` takes it over without a copy."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, Stored]]:
    """The fields of a header, and the tensors, which are mapped into memory and not read.

    The package gguf makes a view of the file for each word of the vocabulary, which takes seconds.

    **Errors:** `ModelError` for a file of another kind, and for one that is cut off or damaged.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        with open(path, "rb") as file:
            raw = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: the file is empty
        raise ModelError(f"{path} cannot be read ({error}).") from None
    if raw[:4] != b"GGUF":
        raise ModelError(
            f"{path} is no GGUF file: it begins with {raw[:4]!r}. Give a .gguf file, or a "
            "directory with config.json."
        )
    if (version := int.from_bytes(raw[4:8], "little")) not in (2, 3):
        raise ModelError(
            f"{path} is GGUF of version {version}; 2 and 3, little-endian, are supported."
        )
    fields: dict[str, Any] = {}
    tensors: dict[str, Stored] = {}
    name = ""
    try:
        cursor = _Cursor(raw, 8)
        num_tensors, num_fields = cursor.number("Q"), cursor.number("Q")
        for _ in range(num_fields):
            name = cursor.text()
            if name in fields:
                raise ValueError("the field is there twice")
            fields[name] = cursor.value(cursor.number("I"))
        found = []
        for _ in range(num_tensors):
            name = cursor.text()
            shape = tuple(cursor.number("Q") for _ in range(cursor.number("I")))
            found.append((name, shape[::-1], cursor.number("I"), cursor.number("Q")))
        alignment = fields.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1:
            raise ValueError(f"general.alignment={alignment!r}")
        start = -(-cursor.at // alignment) * alignment
        for name, shape, number, offset in found:
            known = {kind.value: kind for kind in GGMLQuantizationType}
            if number not in known:
                raise ModelError(
                    f"{path}: {name} is in a kind with the number {number}. Supported: "
                    f"{', '.join(_KINDS)}."
                )
            if name in tensors:
                raise ValueError("the tensor is there twice")
            block, size = GGML_QUANT_SIZES[known[number]]
            if not shape or shape[-1] % block:
                raise ValueError(f"rows of {shape} in blocks of {block}")
            bytes_shape = (*shape[:-1], shape[-1] // block * size)
            cursor.need(start + offset, count := int(np.prod(bytes_shape, dtype=object)))
            data = np.frombuffer(raw, np.uint8, count, start + offset).reshape(bytes_shape)
            tensors[name] = Stored(known[number].name, shape, data)
    except (struct.error, ValueError, TypeError, ArithmeticError, EOFError) as error:
        raise ModelError(
            f"{path} is cut off or damaged at {name or 'its beginning'!r} ({error}). "
            "Fetch it again."
        ) from None
    return fields, tensors


class _Cursor:
    """A place in a file that moves on as values are read."""

    def __init__(self, raw: mmap.mmap, at: int):
        self.raw, self.at = raw, at

    def need(self, at: int, count: int) -> None:
        if at < 0 or at + count > len(self.raw):
            raise EOFError(f"bytes {at:,} to {at + count:,} of {len(self.raw):,}")

    def number(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self.raw, self.at)
        self.at += struct.calcsize(f"<{code}")
        return value

    def text(self) -> str:
        count = self.number("Q")
        self.need(self.at, count)
        self.at += count
        return self.raw[self.at - count : self.at].decode()

    def value(self, kind: int, depth: int = 0) -> Any:
        if depth > _DEEPEST:
            raise ValueError(f"lists in lists, more than {_DEEPEST} deep")
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            return self.number(self._code(kind))
        kind, count = self.number("I"), self.number("Q")
        if kind == _STRING:
            return [self.text() for _ in range(count)]
        if kind == _ARRAY:
            return [self.value(_ARRAY, depth + 1) for _ in range(count)]
        code = self._code(kind)
        self.need(self.at, count * struct.calcsize(f"<{code}"))
        values = struct.unpack_from(f"<{count}{code}", self.raw, self.at)
        self.at += struct.calcsize(f"<{count}{code}")
        return list(values)

    def _code(self, kind: int) -> str:
        if kind not in _NUMBERS:
            raise ValueError(f"a value of kind {kind}")
        return _NUMBERS[kind]


def gguf_tokenizer(fields: Mapping[str, Any], path: Path) -> Tokenizer:
    """The tokenizer in a header."""
    kind, rule = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    if kind != "gpt2" or rule not in ("smollm", "gpt-2"):
        raise ModelError(
            f"{path} has the tokenizer {kind!r} with the rule {rule!r}; in GGUF files 'gpt2' with "
            "'smollm' or 'gpt-2' is supported. Give a directory with tokenizer.json."
        )
    try:
        words = fields["tokenizer.ggml.tokens"]
        kinds = fields.get("tokenizer.ggml.token_type", [_NORMAL] * len(words))
        normal = [word for word, k in zip(words, kinds, strict=True) if k == _NORMAL]
        # the package gguf leaves out a list that is empty, as it is where all words are bytes
        fields = ({"tokenizer.ggml.merges": []} if max(map(len, normal)) == 1 else {}) | dict(
            fields
        )
        merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
        tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
        for special, of in ((True, _CONTROL), (False, _USER_DEFINED)):
            added = [
                AddedToken(word, normalized=False, special=special)
                for word, k in zip(words, kinds, strict=True)
                if k == of
            ]
            (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(added)
    except KeyError as error:
        raise ModelError(f"{path}: the header has no {error.args[0]!r}.") from None
    except Exception as error:  # the library raises no narrower class
        raise ModelError(f"{path}: its tokenizer is damaged ({error}).") from None
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits_apart = [pre_tokenizers.Digits(individual_digits=True)] if rule == "smollm" else []
    # the library declares no types that can be assigned
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*digits_apart, by_bytes])  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    return tokenizer
