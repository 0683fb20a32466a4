"""What is trained of a model: the low-rank updates added to it, and the arrays that change."""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from prograde.lab.studies.finetune.plan import Plan
from prograde.lm import Decoder, LowRankUpdate, Quantized, matrix_shapes

_MATRICES = ("query", "key", "value", "output", "gate", "up", "down")
_WRITERS = ("output", "down")  # the matrices that write to the residual stream


def with_updates(model: Decoder, plan: Plan) -> Decoder:
    """Adds low-rank updates to the matrices of the first segment, where the plan trains such."""
    if plan.train not in ("lora", "readout", "subspace"):
        return model
    blocks = model.segments[0]
    names = _WRITERS if plan.train == "readout" else _MATRICES
    key = jax.random.fold_in(jax.random.key(plan.seed), 0x10A)
    for name, (inputs, outputs) in matrix_shapes(model.architecture).items():
        if name not in names:
            continue
        key, own = jax.random.split(key)
        base, layers = getattr(blocks, name), blocks.count
        down = jnp.zeros((layers, inputs, plan.rank), model.dtype)
        up = jnp.zeros((layers, plan.rank, outputs), model.dtype)
        if plan.train == "lora":
            down = jax.random.normal(own, down.shape, down.dtype) / math.sqrt(inputs)
        elif plan.train == "subspace":
            if isinstance(base, Quantized):
                raise ValueError(
                    "--train subspace merges into the matrices, which are quantized. Use lora."
                )
            up = _directions(own, up)
        else:
            rows = _label_directions(model, plan.label_tokens or ())
            up = jnp.broadcast_to(rows, (layers, *rows.shape)).astype(model.dtype)
            down = jnp.zeros((layers, inputs, len(rows)), model.dtype)
        blocks = eqx.tree_at(lambda b, n=name: getattr(b, n), blocks, LowRankUpdate(base, down, up))
    return eqx.tree_at(lambda m: m.segments[0], model, blocks)


def mask(model: Decoder, train: str | None) -> PyTree[bool]:
    """Says of each array whether it is trained."""
    none = jax.tree.map(lambda _: False, model)
    if train == "all":
        return jax.tree.map(eqx.is_inexact_array, model)
    if train in ("norm", "norms", "readout"):
        none = eqx.tree_at(lambda m: m.norm, none, True)
    if train == "norm":
        return none
    blocks = none.segments[0]

    def chosen(blocks: Any) -> list[Any]:
        if train == "norms":
            biases = (blocks.query_bias, blocks.key_bias, blocks.value_bias)
            found = [bias for bias in biases if bias is not None]
            return [blocks.attention_norm, blocks.feed_norm, *found]
        if train == "attention":
            return [blocks.query, blocks.key, blocks.value, blocks.output]
        if train == "matrices":
            return [getattr(blocks, name) for name in _MATRICES]
        names = _WRITERS if train == "readout" else _MATRICES
        updates = [getattr(blocks, name) for name in names]
        ups = [u.up for u in updates] if train == "lora" else []
        return [u.down for u in updates] + ups

    if train in ("attention", "matrices") and any(
        isinstance(x, Quantized) for x in chosen(model.segments[0])
    ):
        raise ValueError(
            f"--train {train}: these matrices are quantized. Train lora, readout or norms."
        )
    return eqx.tree_at(
        lambda m: m.segments[0], none, eqx.tree_at(chosen, blocks, replace_fn=lambda _: True)
    )


def _label_directions(
    model: Decoder, label_tokens: tuple[int, ...]
) -> Float[np.ndarray, "labels-1 width"]:
    """Orthonormal directions in which the labels' logits differ."""
    # the logits of the unit vectors are the labels' columns of the head
    unit = jnp.eye(model.architecture.width, dtype=model.dtype)
    columns = np.asarray(model.logits(unit, np.asarray(label_tokens)), np.float64)
    q, _ = np.linalg.qr(columns[:, 1:] - columns[:, :1])
    return q.T


def _directions(key: Array, up: Array) -> Array:
    return jax.random.normal(key, up.shape, up.dtype) / math.sqrt(up.shape[-1])


def refreshed(params: PyTree, frozen: PyTree, round: np.uint32, seed: int) -> tuple[PyTree, PyTree]:
    """Merges the low-rank updates into their matrices, and begins new ones along new directions.

    **Source:** LOZO, arXiv 2410.07698.
    """
    where = lambda model: [getattr(model.segments[0], name) for name in _MATRICES]  # noqa: E731
    model = eqx.combine(params, frozen)
    trained = jax.tree.map(lambda x: x is not None, params, is_leaf=lambda x: x is None)
    redrawn = _redrawn(jnp.uint32(seed & 0xFFFFFFFF), jnp.asarray(round), where(model))
    return eqx.partition(eqx.tree_at(where, model, redrawn), trained)


@eqx.filter_jit(donate="all-except-first")
def _redrawn(seed: Array, round: Array, updates: list[LowRankUpdate]) -> list[LowRankUpdate]:
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 0x10B), round)
    found = []
    for i, u in enumerate(updates):
        assert isinstance(u.base, jax.Array)  # quantized ones were refused
        base = (u.base + u.down @ u.up).astype(u.base.dtype)
        up = _directions(jax.random.fold_in(key, i), u.up)
        found.append(LowRankUpdate(base, jnp.zeros_like(u.down), up))
    return found
