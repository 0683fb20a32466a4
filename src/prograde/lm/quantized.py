"""Weights that keep the few bits GGUF gives them, and become numbers where a layer uses them."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

BLOCK = 32  # weights that share a scale

# bytes of a block: two for a scale, for Q4_1 two more for a minimum, then the weights
BYTES = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}


class Quantized(eqx.Module):
    """A matrix [inputs, outputs] of 4 or 8 bits a weight, in blocks of 32 inputs with a scale each.

        W[32 i + j, o] = scale[o, i] * q[o, i, j] + offset[o, i]

    **Fields:** `codes`, the weights, two to a byte where they have 4 bits; `scale` and `offset`, in
    float16; `kind`, one of Q4_0, Q4_1, Q8_0.

    **Cost:** 0.56 to 1.06 bytes a weight at rest, and the dense matrix while it is used. It has no
    float leaf that an optimizer would update: give it a `LowRankUpdate`, or train other leaves.

    **Errors:** `ValueError` for an unknown kind, and for rows that are not whole blocks.

    **Source:** the GGUF format of the ggml project.

    Examples:
        >>> import numpy as np
        >>> from gguf import GGMLQuantizationType, quantize
        >>> from prograde.lm import Quantized
        >>> w = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)  # 4 outputs
        >>> q = Quantized.from_gguf(quantize(w, GGMLQuantizationType.Q8_0), "Q8_0")
        >>> bool(abs(np.asarray(q.dense()) - w.T).max() < 0.02)
        True
    """

    codes: UInt8[Array, "*layers outputs blocks bytes"] | Int[Array, "*layers outputs blocks bytes"]
    scale: UInt8[Array, "*layers outputs blocks 2"]
    offset: UInt8[Array, "*layers outputs blocks 2"] | None
    kind: str = eqx.field(static=True)

    @classmethod
    def from_gguf(cls, data: UInt8[np.ndarray, "*layers outputs bytes"], kind: str) -> "Quantized":
        """From the bytes of a tensor [outputs, inputs] in a GGUF file."""
        if kind not in BYTES:
            raise ValueError(f"kind={kind!r}, but one of {', '.join(BYTES)} is needed.")
        if data.dtype != np.uint8 or data.shape[-1] % BYTES[kind]:
            raise ValueError(
                f"data is {data.dtype} {list(data.shape)}, but rows of uint8, {BYTES[kind]} a "
                f"block of {kind}, are needed."
            )
        parts = {name: jnp.asarray(part) for name, part in split_blocks(data, kind).items()}
        return cls(parts["codes"], parts["scale"], parts.get("offset"), kind)

    def dense(self, dtype: Any = jnp.float32) -> Float[Array, "*layers inputs outputs"]:
        """The matrix as numbers."""
        return self._numbers(self.codes, self.scale, self.offset).astype(dtype).mT

    def rows(self, outputs: Int[Array, "*batch"]) -> Float[Array, "*batch inputs"]:
        """The weights of some outputs. For an embedding, those are tokens."""
        offset = None if self.offset is None else self.offset[outputs]
        return self._numbers(self.codes[outputs], self.scale[outputs], offset)

    def _numbers(self, codes: Array, scale: Array, offset: Array | None) -> Array:
        """[..., outputs, inputs] in float32."""
        if self.kind == "Q8_0":
            weights = jax.lax.bitcast_convert_type(codes, jnp.int8).astype(jnp.float32)
        else:
            weights = jnp.concatenate([codes & 0xF, codes >> 4], axis=-1).astype(jnp.float32)
            weights = weights - 8 if self.kind == "Q4_0" else weights
        weights = weights * _half(scale)
        weights = weights if offset is None else weights + _half(offset)
        return weights.reshape(*weights.shape[:-2], -1)


def split_blocks(data: np.ndarray, kind: str) -> dict[str, np.ndarray]:
    """The parts of the blocks of a tensor, as views of its bytes."""
    blocks = data.reshape(*data.shape[:-1], -1, BYTES[kind])
    if kind == "Q4_1":
        return {"scale": blocks[..., :2], "offset": blocks[..., 2:4], "codes": blocks[..., 4:]}
    return {"scale": blocks[..., :2], "codes": blocks[..., 2:]}


def _half(x: Array) -> Array:
    """Pairs of bytes read as float16, [..., 1] in float32."""
    return jax.lax.bitcast_convert_type(x, jnp.float16).astype(jnp.float32)[..., None]
