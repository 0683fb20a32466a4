"""The methods that `prograde bench` compares, and JAX's side of the comparison.

Each method is one plain SGD step of the same loss.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import PyTree

import prograde as pg
from prograde.lab.measure.memory import step_memory
from prograde.lab.models.workload import Loss, Workload
from prograde.lab.models.workloads import WORKLOADS

METHODS = {
    "bare": "forward pass alone",
    "prograde-1": "forward gradient, one rank-one tangent",
    "prograde-4": "forward gradient, 4 rank-one tangents",
    "prograde-16": "forward gradient, 16 rank-one tangents",
    "blocks-1": "forward gradient, one rank-one tangent in one block, in the mean over blocks",
    "blocks-4": "forward gradient, 4 rank-one tangents in one block, in the mean over blocks",
    "backprop": "backprop",
    "backprop-unrolled": "backprop, the scan over layers unrolled",
    "checkpointed": "backprop, checkpointed",
    "dense-jvp": "forward gradient, one normal tangent through jax.jvp",
    "mezo": "central difference, signs (MeZO, arXiv 2305.17333)",
    "mezo-low-rank": "central difference, rank one (LOZO, arXiv 2410.07698)",
    "torch-bare": "PyTorch, forward pass alone",
    "torch-backprop": "PyTorch, backprop",
    "torch-backprop-compiled": "PyTorch, backprop through torch.compile",
    "torch-jvp": "PyTorch, forward gradient, one normal tangent through torch.func.jvp",
}
LEARNING_RATE = 1e-6  # so small that no method diverges while it is timed
NUM_BATCHES = 4  # they alternate, so that no step gets the data of the step before
NUM_TANGENTS = (1, 4, 16)
IN_BLOCKS = (1, 4)  # numbers of tangents
_PERTURBATION = 1e-3  # of a central difference, MeZO's

Step = Callable[..., tuple[PyTree, PyTree, jax.Array]]
"""(params, state, key, *batch) -> (params, state, loss)"""


def _moved(params: PyTree, gradient: PyTree) -> PyTree:
    return jax.tree.map(lambda w, g: w - LEARNING_RATE * g, params, gradient)


def _by_backprop(loss: Loss) -> Step:
    def step(params, state, key, *batch):
        (value, state), gradient = jax.value_and_grad(loss, has_aux=True)(params, state, *batch)
        return _moved(params, gradient), state, value

    return step


def _estimator(num_tangents: int) -> pg.WeightPerturbation:
    return pg.WeightPerturbation(pg.LowRank(rank=1), num_tangents=num_tangents)


def _by_prograde(loss: Loss, num_tangents: int) -> Step:
    estimator = _estimator(num_tangents)

    def step(params, state, key, *batch):
        (value, state), gradient = pg.value_and_grad(loss, estimator, has_aux=True)(
            key, params, state, *batch
        )
        return _moved(params, gradient), state, value

    return step


def _part(path: str) -> str:
    """The block of a leaf of the decoders that is in no layer: what is before them or after."""
    return "embedding" if path.split("'")[1] in ("tokens", "positions", "embedding") else "head"


BLOCKS = {
    "transformer": pg.Blocks(blocks=_part, stacked=("layers",)),
    "smollm2": pg.Blocks(blocks=_part, stacked=("layers",)),
    "resnet": pg.Blocks(blocks=lambda path: path.split("'")[1]),
}
"""The blocks of a workload: the layers of a decoder, the residual blocks. Default: layers."""


def _in_blocks(workload: Workload, num_tangents: int) -> pg.WeightPerturbation:
    return pg.WeightPerturbation(BLOCKS.get(workload.name, pg.Blocks()), num_tangents)


def _by_blocks(workload: Workload, num_tangents: int) -> Step:
    estimator = _in_blocks(workload, num_tangents)

    def step(params, state, key, *batch):
        value, state, derivatives = estimator.derivatives(
            workload.loss, key, params, state, *batch, has_aux=True
        )
        return estimator.descend(key, params, derivatives, LEARNING_RATE), state, value

    return step


def _a_key_for_each_block(workload: Workload, params: PyTree) -> list[Any]:
    """Keys that choose one block after the other, so that a mean over them is one over blocks."""
    blocks = BLOCKS.get(workload.name, pg.Blocks())
    p, found = blocks.probability(params), {}
    keys = jax.random.split(jax.random.key(0), 100 * len(p))
    for key, block in zip(keys, jax.vmap(lambda key: blocks.choice(key, p))(keys), strict=True):
        found.setdefault(int(block), key)
    return [found[i] for i in range(len(p))]


def _by_dense_jvp(loss: Loss) -> Step:
    """Makes the forward gradient as users write it without a library."""

    def step(params, state, key, *batch):
        leaves, treedef = jax.tree.flatten(params)
        keys = jax.random.split(key, len(leaves))
        tangent = treedef.unflatten(
            [jax.random.normal(k, w.shape) for k, w in zip(keys, leaves, strict=True)]
        )
        value, slope, state = jax.jvp(
            lambda p: loss(p, state, *batch), (params,), (tangent,), has_aux=True
        )
        return (
            jax.tree.map(lambda w, v: w - LEARNING_RATE * slope * v, params, tangent),
            state,
            value,
        )

    return step


def _by_central_difference(loss: Loss, distribution: pg.TangentDistribution) -> Step:
    """Makes MeZO's step: weights move up, down and to their new values along one direction.

    The direction is drawn again for each move, so that it is never stored. The moves are a loop,
    because a loop keeps its carry in one buffer. For three moves in a row, XLA keeps a second copy
    of scanned weights. Each draw depends on whether a value of the carry is NaN. Without this, XLA
    would draw once before the loop and store the direction.
    """

    def step(params, state, key, *batch):
        def move(carry, i):
            params, state, values = carry
            slope = (values[0] - values[1]) / (2 * _PERTURBATION)
            amount = jnp.stack(
                [_PERTURBATION, -2 * _PERTURBATION, _PERTURBATION - LEARNING_RATE * slope]
            )[i]
            direction = distribution.sample(jax.random.fold_in(key, jnp.isnan(slope)), params)
            params = jax.tree.map(
                lambda w, v: w + amount * (v.dense() if hasattr(v, "dense") else v),
                params,
                direction,
            )
            value, state = lax.cond(
                i < 2, lambda: loss(params, state, *batch), lambda: (jnp.float32(0), state)
            )
            return (params, state, values.at[i].set(value)), None

        (params, state, values), _ = lax.scan(move, (params, state, jnp.zeros(3)), jnp.arange(3))
        return params, state, (values[0] + values[1]) / 2

    return step


def steps(workload: Workload) -> dict[str, Step]:
    """Returns the methods of JAX, each as one step of this workload."""

    def bare(params, state, key, *batch):
        value, state = workload.loss(params, state, *batch)
        return params, state, value

    found = {
        "bare": bare,
        **{f"prograde-{k}": _by_prograde(workload.loss, k) for k in NUM_TANGENTS},
        **{f"blocks-{k}": _by_blocks(workload, k) for k in IN_BLOCKS},
        "backprop": _by_backprop(workload.loss),
        "checkpointed": _by_backprop(workload.checkpointed_loss),
        "dense-jvp": _by_dense_jvp(workload.loss),
        "mezo": _by_central_difference(workload.loss, pg.Rademacher()),
        "mezo-low-rank": _by_central_difference(workload.loss, pg.LowRank(rank=1)),
    }
    if workload.unrolled_loss is not None:
        found["backprop-unrolled"] = _by_backprop(workload.unrolled_loss)
    return {name: found[name] for name in METHODS if name in found}


def counted_ratios(workload: Workload) -> dict[str, float | None]:
    """Counts the multiply-adds of an estimate over those of the loss, by number of tangents."""
    shapes = [jax.eval_shape(make, jax.random.key(0)) for make in (workload.init, workload.batch)]
    (params, state), batch = shapes

    def ratio(estimator: pg.WeightPerturbation) -> float | None:
        report = pg.check(
            workload.loss, params, state, *batch, estimator=estimator, has_aux=True, memory=False
        )
        return report.cost_ratio

    return {f"prograde-{k}": ratio(_estimator(k)) for k in NUM_TANGENTS} | {
        f"blocks-{k}": ratio(_in_blocks(workload, k)) for k in IN_BLOCKS
    }


def in_bfloat16(workload: Workload) -> Workload:
    """The workload with parameters, state and data in bfloat16."""

    def narrow(tree: PyTree) -> PyTree:
        is_float = lambda x: jnp.issubdtype(x.dtype, jnp.floating)  # noqa: E731
        return jax.tree.map(lambda x: x.astype(jnp.bfloat16) if is_float(x) else x, tree)

    return dataclasses.replace(
        workload,
        title=f"{workload.title}, bfloat16",
        init=lambda key: narrow(workload.init(key)),
        batch=lambda key: narrow(workload.batch(key)),
    )


class JaxSide:
    """The methods of JAX. All share one set of parameters, which each step takes and returns."""

    def __init__(self, workload: Workload, methods: Sequence[str] = ()):
        found = steps(workload)
        self.methods = {name: found[name] for name in found if not methods or name in methods}
        key_init, key_batches, self._key = jax.random.split(jax.random.key(0), 3)
        self.batches = [
            jax.jit(workload.batch)(key) for key in jax.random.split(key_batches, NUM_BATCHES)
        ]
        params, state = jax.jit(workload.init)(key_init)
        self.carry = (params, state, jnp.zeros((), jnp.int32))
        self.compiled: dict[str, Any] = {}
        self._of_blocks = _a_key_for_each_block(workload, params)

    def compile(self, method: str) -> dict[str, Any]:
        """Traces, lowers and compiles a step. Nothing that other methods compiled is reused."""
        step = self.methods[method]

        def counted(carry, key, batch):
            params, state, count = carry
            own = key if method.startswith("blocks") else jax.random.fold_in(key, count)
            params, state, value = step(params, state, own, *batch)
            return (params, state, count + 1), value

        jax.clear_caches()
        begin = time.perf_counter()
        jitted = jax.jit(counted, donate_argnums=0)
        self.compiled[method] = compiled = jitted.lower(
            self.carry, self._key, self.batches[0]
        ).compile()
        seconds = time.perf_counter() - begin
        analysis: Any = compiled.memory_analysis()
        figures = {"compile_seconds": seconds, "temp_bytes": analysis.temp_size_in_bytes}
        if stats := jax.local_devices()[0].memory_stats():  # on a GPU, of all methods so far
            figures["allocator_peak"] = stats.get("peak_bytes_in_use")
        return figures

    def visit(self, method: str, count: int) -> tuple[float, float]:
        """Takes `count` steps and waits for the last; returns the seconds and the last loss.

        In blocks it takes `count` steps in each block, and returns their mean over the blocks.
        """
        step, carry, batches = self.compiled[method], self.carry, self.batches
        keys = self._of_blocks if method.startswith("blocks") else [self._key]
        value = None
        begin = time.perf_counter()
        for i in range(count * len(keys)):
            carry, value = step(carry, keys[i % len(keys)], batches[i % NUM_BATCHES])
        jax.block_until_ready((carry, value))
        seconds = (time.perf_counter() - begin) / len(keys)
        self.carry = carry
        return seconds, float(jnp.asarray(value))

    def save(self, path: Path) -> None:
        """Saves parameters, state and batches for another implementation."""
        save_arrays(path, self.carry[0], self.carry[1], self.batches)


def save_arrays(
    path: Path, params: PyTree, state: PyTree, batches: list[tuple[jax.Array, ...]]
) -> None:
    """Writes arrays under the names `params/...`, `state/...` and `batch/NUMBER/...`."""
    tree = {"params": params, "state": state, "batch": [list(batch) for batch in batches]}
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    arrays: Any = {
        jax.tree_util.keystr(p, simple=True, separator="/"): np.asarray(x) for p, x in leaves
    }
    np.savez(path, **arrays)


def _measure_memory(name: str, method: str) -> dict[str, Any]:
    side = JaxSide(WORKLOADS[name]())
    side.compile(method)
    carry, side.carry = side.carry, None
    return step_memory(side.compiled[method], carry, side._key, side.batches[0])


if __name__ == "__main__":
    print(json.dumps(_measure_memory(sys.argv[1], sys.argv[2])))
