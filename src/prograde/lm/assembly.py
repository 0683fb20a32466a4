"""A decoder from the named tensors of any kind of file.

Names and shapes are compared with the architecture before anything is built or read.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from prograde.lm.architecture import Architecture, ModelError
from prograde.lm.decoder import Blocks, Decoder, matrix_shapes
from prograde.lm.quantized import Quantized

# what Hugging Face calls the parts of a layer, and what GGUF does
NAMES = {
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
TOP = {
    "embedding": ("model.embed_tokens.weight", "token_embd.weight"),
    "norm": ("model.norm.weight", "output_norm.weight"),
    "head": ("lm_head.weight", "output.weight"),
}
LAYER = ("model.layers.{}.", "blk.{}.")
HUGGING_FACE, GGUF = 0, 1  # columns


class Weights(Protocol):
    """The tensors of a file, or of several: `where` they are, and who asks for them."""

    where: Path
    asked_by: str
    column: int

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of each tensor."""
        ...

    def array(self, name: str) -> np.ndarray:
        """A tensor as numbers, [outputs, inputs]."""
        ...

    def quantized(self, names: list[str]) -> Quantized | None:
        """Tensors in one stack as the file has them, or `None` where they are to be numbers."""
        ...

    def may_be_ignored(self, name: str) -> bool:
        """Whether a tensor has no effect on the result."""
        ...


def assemble(a: Architecture, dtype: Any, weights: Weights) -> Decoder:
    """A decoder. Each tensor is read, converted and put in its place before the next one."""
    _check_counts(a, weights)
    parts = {name: tuple(reversed(shape)) for name, shape in matrix_shapes(a).items()}
    biases = {
        f"{name}_bias": parts[name][:1] for name in ("query", "key", "value") if a.attention_bias
    }
    parts |= {"attention_norm": (a.width,), "feed_norm": (a.width,)} | biases
    layers = {
        part: [
            LAYER[weights.column].format(i) + NAMES[part][weights.column]
            for i in range(a.num_layers)
        ]
        for part in parts
    }
    top = {
        part: names[weights.column] for part, names in TOP.items() if part != "head" or not a.tied
    }
    top_shapes = {
        "embedding": (a.vocab_size, a.width),
        "norm": (a.width,),
        "head": (a.vocab_size, a.width),
    }
    asked = {name: parts[part] for part, names in layers.items() for name in names}
    _compare(asked | {name: top_shapes[part] for part, name in top.items()}, weights)

    def stacked(part: str) -> Any:
        if (kept := weights.quantized(layers[part])) is not None:
            return kept
        whole = jnp.zeros((a.num_layers, *reversed(parts[part])), dtype)
        for i, name in enumerate(layers[part]):
            whole = jax.block_until_ready(_placed(whole, i, weights.array(name).T.astype(dtype)))
        return whole

    def alone(part: str) -> Any:
        if (kept := weights.quantized([top[part]])) is not None:
            return jax.tree.map(lambda x: x[0], kept)
        values = weights.array(top[part])
        values = values.T if part == "head" else values
        return jnp.array(values.astype(dtype, copy=False))

    head = None if a.tied else alone("head")
    return Decoder(
        alone("embedding"),
        (Blocks(**{part: stacked(part) for part in parts}),),
        alone("norm"),
        head,
        a,
    )


def _check_counts(a: Architecture, weights: Weights) -> None:
    """Raises where there are fewer tensors than layers: their names alone could fill the memory."""
    if a.num_layers > len(weights.shapes):
        raise ModelError(
            f"{weights.where}: {weights.asked_by} asks for {a.num_layers:,} layers, but there are "
            f"{len(weights.shapes):,} tensors. The two belong to two models."
        )


def _compare(asked: Mapping[str, tuple[int, ...]], weights: Weights) -> None:
    where, by = weights.where, weights.asked_by
    if missing := [name for name in asked if name not in weights.shapes]:
        raise ModelError(
            f"{where} has no tensor {_few(missing)}, which {by} asks for. The two belong to two "
            "models."
        )
    for name, shape in asked.items():
        if (found := weights.shapes[name]) != shape:
            raise ModelError(
                f"{where}: {name} has shape {found}, and {by} asks for {shape}. The two belong to "
                "two models."
            )
    if unknown := [
        name for name in weights.shapes if name not in asked and not weights.may_be_ignored(name)
    ]:
        raise ModelError(
            f"{where} holds {_few(unknown)}, for which a decoder as {by} describes it has no "
            "place: without it the logits would be others. This model is not supported."
        )


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


@functools.partial(jax.jit, donate_argnums=0)
def _placed(whole: Array, layer: Array, values: Array) -> Array:
    """A stack with one layer in its place, in memory of JAX: NumPy's could not be donated."""
    return lax.dynamic_update_index_in_dim(whole, values, layer, 0)
