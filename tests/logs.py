"""Logs of made-up numbers, for the tests of the file."""

import jax.numpy as jnp
import numpy as np
import optax

import prograde as pg
from prograde.replay import ReplayLog, Update

BASE = {"bias": jnp.zeros(16)}
SGD = {n: Update(pg.WeightPerturbation(num_tangents=n), optax.sgd(1.0)) for n in (1, 3)}


def steps(count, rates="constant", seeds="constant", num_tangents=3):
    """Arguments of `append`. The bits of losses and derivatives are any: NaNs, subnormals."""
    bits = np.random.default_rng(0).integers(0, 2**32, (count, 1 + num_tangents), np.uint32)
    bits[:2, 0] = 0x7F800001, 0x00000001  # a signaling NaN, and the smallest number
    floats = bits.view(np.float32)
    rate = {
        "constant": lambda i: 0.01,
        "steps": lambda i: 0.1 ** (1 + i // 3),
        "schedule": lambda i: 0.01 / (1 + i),
    }
    seed = {
        "constant": lambda i: 2**64 - 1,
        "steps": lambda i: 7 + i // 4,
        "each": lambda i: 2**40 * i,
    }
    return [
        (i, seed[seeds](i), rate[rates](i), floats[i, 0], floats[i, 1:].reshape(num_tangents, 1, 1))
        for i in range(count)
    ]


def written(path, entries, blocks, num_tangents=3, planned=None, finish=None):
    """Writes blocks of so many steps each: where the header and each of the blocks end.

    The block of parameters that `finish` adds is the last of them.
    """
    assert sum(blocks) == len(entries)
    entries, config = iter(entries), {"data": "none"}
    with ReplayLog.create(path, BASE, SGD[num_tangents], config, planned) as log:
        ends = [path.stat().st_size]
        for count in blocks:
            for _ in range(count):
                log.append(*next(entries))
            log.flush()
            ends.append(path.stat().st_size)
        if finish is not None:
            log.finish(finish)
            ends.append(path.stat().st_size)
    return ends


def same_records(log, other):
    """Bit for bit."""
    return log.records.tobytes() == other.records.tobytes()
