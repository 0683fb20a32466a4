"""Language models: Llama-family decoders from files, as trees of arrays that every estimator takes.

model, tokenizer = prograde.lm.load("smollm2")
states = model(tokens)
"""

from importlib.util import find_spec as _find_spec

if _missing := [
    name
    for name in ("gguf", "platformdirs", "safetensors", "tokenizers")
    if _find_spec(name) is None
]:
    raise ImportError(
        f"prograde.lm needs more packages ({', '.join(_missing)}). In a checkout of prograde, run: "
        "pip install '.[lm]'",
        name=_missing[0],
    )

from prograde.lm.architecture import Architecture, ModelError
from prograde.lm.decoder import Blocks, Decoder, LowRankUpdate, matrix_shapes
from prograde.lm.files import Dtype, byte_tokenizer, load, load_tokenizer
from prograde.lm.gguf_output import check_gguf, save_gguf
from prograde.lm.known_models import smollm2
from prograde.lm.quantized import Quantized
from prograde.lm.saving import save, save_weights

__all__ = [
    "Architecture",
    "Blocks",
    "Decoder",
    "Dtype",
    "LowRankUpdate",
    "ModelError",
    "Quantized",
    "byte_tokenizer",
    "check_gguf",
    "load",
    "load_tokenizer",
    "matrix_shapes",
    "save",
    "save_gguf",
    "save_weights",
    "smollm2",
]
