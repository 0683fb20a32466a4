"""Models and tokenizers to files: a Hugging Face directory, or its tensors alone."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError
from tokenizers import Tokenizer

from prograde.lm.architecture import ModelError
from prograde.lm.assembly import HUGGING_FACE, LAYER, NAMES, TOP
from prograde.lm.decoder import Decoder, LowRankUpdate
from prograde.lm.quantized import Quantized

# endings that promise a format, and what writes it
_WRITERS = {".safetensors": "save_weights", ".gguf": "save_gguf"}
_FOREIGN = (".bin", ".pt", ".pth", ".ckpt", ".onnx", ".npz", ".h5", ".msgpack", ".zip", ".json")


def save(directory: str | Path, model: Decoder, tokenizer: Tokenizer) -> None:
    """Writes config.json, model.safetensors and tokenizer.json, for `load` and `transformers`.

    A `LowRankUpdate` is added to its matrix, and `Quantized` matrices become numbers of the model's
    dtype. The sum is made in float32 and rounded once. The directory appears when all is written.

    **Arguments:**

    - `directory`: where; must not exist.
    - `model`, `tokenizer`: what is saved.

    **Errors:** `ModelError` for a directory that exists, for a name that promises another format,
    and where the disk refuses, which leaves nothing behind.

    **Source:** the safetensors format.

    Examples:
        >>> import pathlib, tempfile, jax
        >>> from prograde import lm
        >>> tiny = lm.Architecture(
        ...     vocab_size=256, width=64, num_layers=2, num_heads=4, num_kv_heads=2, hidden=128)
        >>> directory = pathlib.Path(tempfile.mkdtemp()) / "tiny"
        >>> lm.save(directory, lm.Decoder.create(jax.random.key(0), tiny), lm.byte_tokenizer())
        >>> sorted(path.name for path in directory.iterdir())
        ['config.json', 'model.safetensors', 'tokenizer.json']
    """
    directory = Path(directory)
    check_name(directory, "save", "")
    check_kinds(model, tokenizer)
    dtype = str(np.dtype(model.dtype))
    config = json.dumps(model.architecture.to_config() | {"dtype": dtype}, indent=2)
    with appearing(directory) as whole:
        whole.mkdir()
        (whole / "config.json").write_text(config)
        (whole / "tokenizer.json").write_text(tokenizer.to_str())
        _write_tensors(whole / "model.safetensors", model)


def save_weights(path: str | Path, model: Decoder) -> None:
    """Writes the tensors of `save` alone, as one .safetensors file with Hugging Face's names.

    **Arguments:** `path`, which must not exist; `model`.

    **Errors:** `ModelError` for a path that exists, for a name that promises another format, and
    where the disk refuses, which leaves nothing behind.

    **Source:** the safetensors format.

    Examples:
        >>> import pathlib, tempfile, jax
        >>> from prograde import lm
        >>> tiny = lm.Architecture(
        ...     vocab_size=256, width=64, num_layers=2, num_heads=4, num_kv_heads=2, hidden=128)
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "tiny.safetensors"
        >>> lm.save_weights(path, lm.Decoder.create(jax.random.key(0), tiny))
        >>> path.exists()
        True
    """
    path = Path(path)
    check_name(path, "save_weights", ".safetensors")
    check_kinds(model)
    with appearing(path) as whole:
        _write_tensors(whole, model)


def check_kinds(model: Any, tokenizer: Any = None) -> None:
    """Raises for something else than a model and a tokenizer."""
    if not isinstance(model, Decoder):
        raise TypeError(f"model is {type(model).__name__}, but a Decoder is needed.")
    if tokenizer is not None and not isinstance(tokenizer, Tokenizer):
        raise TypeError(
            f"tokenizer is {type(tokenizer).__name__}, but a tokenizers.Tokenizer is needed."
        )


def check_name(path: Path, writer: str, ending: str) -> None:
    """Raises where a path exists, or its ending promises another format than it gets."""
    suffix = path.suffix.lower()
    if suffix != ending and suffix in (*_WRITERS, *_FOREIGN):
        other = (
            f"Use {_WRITERS[suffix]}, or another name."
            if suffix in _WRITERS
            else "Nothing here writes that format: choose another name."
        )
        wanted = f"a {ending} file" if ending else "a directory with model.safetensors"
        raise ModelError(f"{path} ends in {suffix}, but {writer} writes {wanted}. {other}")
    if path.exists():
        raise ModelError(f"{path} exists. Choose another, or remove it; nothing was changed.")


@contextlib.contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """A temporary path; what is written there appears at `path` whole, or not at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as temporary:
            whole = Path(temporary) / "whole"
            yield whole
            for part in whole.iterdir() if whole.is_dir() else [whole]:
                with open(part, "rb") as file:
                    os.fsync(file.fileno())
            whole.rename(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"{path} could not be written ({error}). Nothing was left there."
        ) from error


def named_tensors(model: Decoder, column: int, dtype: Any) -> Iterator[tuple[str, str, np.ndarray]]:
    """(part, name, array) of each tensor, with outputs first; `column` chooses whose names."""
    start = 0
    for blocks in model.segments:
        for part, names in NAMES.items():
            if (stack := getattr(blocks, part)) is not None:
                for i in range(blocks.count):
                    layer = _plain(jax.tree.map(lambda x, i=i: x[i], stack), dtype)
                    yield part, LAYER[column].format(start + i) + names[column], layer
        start += blocks.count
    for part, names in TOP.items():
        if (value := getattr(model, part)) is not None:
            # an embedding has its outputs, the tokens, first, unless it is quantized
            plain = part == "embedding" and not isinstance(value, Quantized)
            array = np.asarray(value, dtype) if plain else _plain(value, dtype)
            yield part, names[column], array


def _write_tensors(path: Path, model: Decoder) -> None:
    from safetensors.numpy import save_file

    tensors = {name: array for _, name, array in named_tensors(model, HUGGING_FACE, model.dtype)}
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)  # the library makes it readable by its owner alone


def _plain(weight: Any, dtype: Any) -> np.ndarray:
    """The numbers of a matrix, with its outputs first, as files have them."""
    if isinstance(weight, LowRankUpdate):
        down, up = (np.asarray(factor, np.float32) for factor in (weight.down, weight.up))
        return (_plain(weight.base, np.float32) + (down @ up).T).astype(dtype)
    if isinstance(weight, Quantized):
        weight = weight.dense()
    return np.ascontiguousarray(np.asarray(weight, dtype).T)
