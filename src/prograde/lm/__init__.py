"""Language models: Llama-family decoders from files, as trees of arrays that every estimator takes.

model, tokenizer = prograde.lm.load("smollm2")
states = model(tokens)
"""

from prograde.lm.architecture import Architecture, ModelError
from prograde.lm.decoder import Blocks, Decoder, LowRankUpdate
from prograde.lm.files import Dtype, byte_tokenizer, load, save, save_weights, smollm2
from prograde.lm.quantized import Quantized

__all__ = [
    "Architecture",
    "Blocks",
    "Decoder",
    "Dtype",
    "LowRankUpdate",
    "ModelError",
    "Quantized",
    "byte_tokenizer",
    "load",
    "save",
    "save_weights",
    "smollm2",
]
