"""What bounds a structured step, and ways around it that did not help; the time to compile a deep unrolled network.

Run on an otherwise idle machine: `python benchmarks/bounds.py --out records/bounds.json`. Writes a record, prints it.
"""

import os
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

if metadata.version("jaxlib").startswith("0.10."):  # as the command line does
    os.environ.setdefault(
        "XLA_FLAGS",
        "--xla_cpu_experimental_ynn_fusion_type=-LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION",
    )

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax import lax

import prograde as pg
from prograde.lab import costs, models, records


@dataclass(frozen=True)
class Arguments:
    """What to measure and where to write it."""

    out: Path = Path("runs/bench/bounds.json")
    """The record."""
    rounds: int = 15
    """Rounds of the interleaved timings."""


def in_turns(programs: dict, rounds: int) -> dict:
    """Milliseconds of each (function, arguments), in turns: median and quartiles."""
    compiled = {
        name: (jax.jit(function), arguments) for name, (function, arguments) in programs.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for i in range(rounds + 1):
        for name, (function, arguments) in compiled.items():
            begin = time.perf_counter()
            for _ in range(3):
                out = function(*arguments)
            jax.block_until_ready(out)
            if i > 0:  # the first round compiles
                seconds[name].append(1e3 * (time.perf_counter() - begin) / 3)
    return {name: costs.quartiles(values) for name, values in seconds.items()}


def one_product(rounds: int) -> dict:
    """Primal and tangent rows in one product with a weight, or in two."""
    x, w = jnp.ones((64, 1024)), jnp.ones((1024, 1024))
    return in_turns(
        {
            "two products": (lambda x, v, w: (x @ w, v @ w), (x, 0.5 * x, w)),
            "one product of stacked rows": (
                lambda x, v, w: jnp.split(jnp.concatenate([x, v]) @ w, 2),
                (x, 0.5 * x, w),
            ),
        },
        rounds,
    )


def convolutional_network(rounds: int) -> dict:
    """The paper's CNN: the loss, its tangent along the input alone, and a forward gradient of all weights."""
    network = models.cnn()
    params = network.init(jax.random.key(0))
    x, labels = jax.random.uniform(jax.random.key(1), (64, 28, 28)), jnp.zeros(64, jnp.int32)
    loss = lambda params, x: network.loss(params, x, labels)
    grad_fn = pg.value_and_grad(loss, pg.WeightPerturbation())
    return in_turns(
        {
            "loss": (loss, (params, x)),
            "jax.jvp by the input": (
                lambda p, x, v: jax.jvp(lambda x: loss(p, x), (x,), (v,)),
                (params, x, 0.3 * x),
            ),
            "forward gradient": (grad_fn, (jax.random.key(2), params, x)),
            "backprop": (jax.value_and_grad(loss), (params, x)),
        },
        rounds,
    )


def convolution(rounds: int) -> dict:
    """One layer of it, 64 x 26 x 26 x 64 with a 3 x 3 kernel of 64: XLA's convolution, and products of shifted slices."""
    x = jax.random.normal(jax.random.key(0), (64, 26, 26, 64))
    w = jax.random.normal(jax.random.key(1), (3, 3, 64, 64))
    numbers = ("NHWC", "HWIO", "NHWC")
    conv = lambda x, w: lax.conv_general_dilated(x, w, (1, 1), "VALID", dimension_numbers=numbers)
    pool = lambda h: lax.reduce_window(h, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    layer = lambda x, w: jax.nn.relu(conv(x, w))
    shifted = lambda x, w: sum(
        x[:, i : i + 24, j : j + 24] @ w[i, j] for i in range(3) for j in range(3)
    )
    np.testing.assert_allclose(shifted(x, w), conv(x, w), rtol=1e-3, atol=1e-3)
    tangent = lambda x, v, w: jax.jvp(lambda x: layer(x, w), (x,), (v,))
    return in_turns(
        {
            "convolution": (conv, (x, w)),
            "convolution and ReLU": (layer, (x, w)),
            "convolution, ReLU and pooling": (lambda x, w: pool(layer(x, w)), (x, w)),
            "jvp of convolution and ReLU": (tangent, (x, 0.3 * x, w)),
            "primal and tangent as one batch": (
                lambda x, v, w: conv(jnp.concatenate([x, v]), w),
                (x, 0.3 * x, w),
            ),
            "products of shifted slices": (shifted, (x, w)),
        },
        rounds,
    )


def compilation(layers: int = 100, width: int = 1024, batch: int = 64, rounds: int = 3) -> dict:
    """Seconds to trace, lower and compile a step of an unrolled network, in turns."""
    shapes = [jax.ShapeDtypeStruct((width, width), jnp.float32)] * layers
    x = jax.ShapeDtypeStruct((batch, width), jnp.float32)

    def loss(params, x):
        for w in params:
            x = jax.nn.relu(x @ w)
        return jnp.mean(x**2)

    def step(estimator):
        def run(key, params, x):
            value, gradient = pg.value_and_grad(loss, estimator)(key, params, x)
            return jax.tree.map(lambda w, g: w - 1e-3 * g, params, gradient), value

        return run

    methods = {
        "backprop": pg.Backprop(),
        "prograde-1": pg.WeightPerturbation(),
        "prograde-4": pg.WeightPerturbation(num_tangents=4),
    }
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for i in range(rounds + 1):
        for name, estimator in methods.items():
            jax.clear_caches()
            begin = time.perf_counter()
            jax.jit(step(estimator), donate_argnums=1).lower(jax.random.key(0), shapes, x).compile()
            if i > 0:
                seconds[name].append(time.perf_counter() - begin)
    return {name: costs.quartiles(values) for name, values in seconds.items()}


def main(arguments: Arguments) -> None:
    record = {
        "environment": records.environment(),
        "one product, ms": one_product(arguments.rounds),
        "the paper's CNN, ms": convolutional_network(arguments.rounds),
        "a convolution, ms": convolution(arguments.rounds),
        "compilation of 100 layers, s": compilation(),
    }
    records.write_json(arguments.out, record)
    for title, figures in record.items():
        if title != "environment":
            print(title)
            for name, found in figures.items():
                print(
                    f"  {name:40} {found['median']:.3g} ({found['low']:.3g} to {found['high']:.3g})"
                )
    print(f"record: {arguments.out}")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
