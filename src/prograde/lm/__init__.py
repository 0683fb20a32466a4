"""Language models: Llama-family decoders from files, as trees of arrays that every estimator takes.

model, tokenizer = prograde.lm.load("smollm2")
states = model(tokens)
"""

from prograde.lm.architecture import Architecture, ModelError
from prograde.lm.decoder import Blocks, Decoder, LowRankUpdate
from prograde.lm.files import byte_tokenizer, load, save, smollm2
from prograde.lm.quantized import Quantized

__all__ = [
    "Architecture",
    "Blocks",
    "Decoder",
    "LowRankUpdate",
    "ModelError",
    "Quantized",
    "byte_tokenizer",
    "load",
    "save",
    "smollm2",
]
