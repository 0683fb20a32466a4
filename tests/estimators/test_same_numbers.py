"""Same key, same numbers: estimates and tangents equal those written down in `same_numbers.json`.

    python tests/estimators/test_same_numbers.py --write

writes the file from the code that is imported. A change of it belongs under "Numerics changed" in
CHANGELOG.md.
"""

import json
import math
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import prograde as pg

RECORD = Path(__file__).with_name("same_numbers.json")

TANGENTS = [
    "Normal()",
    "Rademacher()",
    "Sparse(0.3)",
    "Sphere()",
    "LowRank(1)",
    "LowRank(2, Normal())",
    "Separable(1)",
]
JOINT = ["Basis()", "Orthogonal()"]  # sort or factorise all parameters: small trees only
ON_BOTH_MODELS = [
    "WeightPerturbation()",
    "ActivityPerturbation()",
    "LearnedFeedback(num_tangents=2, use='control_variate')",
]
ESTIMATORS = [
    *ON_BOTH_MODELS,
    "WeightPerturbation(Normal(), 3, chunk=2)",
    "WeightPerturbation(LowRank(1), 3, chunk=2)",
    "WeightPerturbation(Basis(), 3)",
    "WeightPerturbation(LowRank(1), 3, combine='projection')",
    "WeightPerturbation(Normal(), 4, combine='shrunk')",
    "WeightPerturbation(LowRank(1), 2, num_groups=2)",
    "CentralDifference(step=0.01)",
    "CentralDifference(LowRank(1), 2, step=0.1, curvature_power=0.5)",
    "ActivityPerturbation(Normal(), 2, head='exact')",
    "ActivityPerturbation(per_example=False, scale='rms')",
    "LocalLosses(Normal(), 2, head='exact', scale='rms')",
    "LearnedFeedback()",
    "LearnedFeedback(every=2)",
    "Guided('previous', num_tangents=3)",
    "Guided('momentum', tangents=Normal(), num_tangents=2, chunk=1)",
    "Scaled(scales=2.0)",
    "Scaled(scales='gradient', every=1)",
    "Scaled(WeightPerturbation(LowRank(1), 2), 'curvature', precondition=True)",
    "ForwardJacobian()",
    "Backprop()",
    "CheckpointedBackprop()",
]

# 2^16 entries is the size at which draws change: leaves of one entry less, just that many, and
# more; (65534, 3) has factors of one entry more than that
LEAVES = {
    "vector": (5,),
    "matrix": (12, 9),
    "kernel": (3, 3, 4, 5),
    "below": (255, 257),
    "at": (256, 256),
    "above": (300, 301),
    "tall": (65534, 3),
}


def layers():
    """A perceptron with a loss for each example, from numbers that no PRNG of JAX makes."""
    number = np.random.default_rng(0)
    array = lambda *shape: jnp.asarray(number.normal(size=shape), jnp.float32)
    params = {"w": array(3, 8), "b": array(8), "out": array(8, 2)}

    def losses(params, x, y):
        h = jax.nn.relu(x @ params["w"] + params["b"])
        return jnp.sum(jnp.square(h @ params["out"] - y), axis=-1)

    return params, losses, (array(4, 3), array(4, 2))


def recurrent():
    """A loop over a sequence: the same weights at every step."""
    number = np.random.default_rng(1)
    array = lambda *shape: jnp.asarray(number.normal(size=shape) / 2, jnp.float32)
    params = [array(2, 6), array(6, 6), array(6, 1)]

    def losses(params, x):
        step = lambda h, x: (jnp.tanh(x @ params[0] + h @ params[1]), None)
        h, _ = jax.lax.scan(step, jnp.zeros((len(x), 6)), jnp.moveaxis(x, 1, 0))
        return jnp.square(h @ params[2])[:, 0]

    return params, losses, (array(4, 3, 2),)


MODELS = {"layers": layers, "recurrent": recurrent}


def figures(tree):
    """A few numbers of every array: its first and last entry, and its inner products with fixed
    vectors."""
    found = []
    for leaf in jax.tree.leaves(tree):
        flat = np.asarray(leaf, np.float64).reshape(-1)
        at = np.arange(flat.size)
        scale = 1 / math.sqrt(max(1, flat.size))
        sums = (flat @ np.cos(at) * scale, flat @ np.sin(1.7 * at) * scale)
        found.append([flat[0], flat[-1], *sums] if flat.size > 2 else flat.tolist())
    return found


def estimates(estimator, model):
    """The figures of two estimates in a row, the state carried from one to the other."""
    params, losses, args = MODELS[model]()
    step = jax.jit(lambda key, state: estimator.estimate(losses, key, state, params, *args))
    state, found = estimator.init(losses, params, *args), []
    for seed in (7, 8):
        result = step(jax.random.key(seed), state)
        state = result.state
        found.append(figures((result.value, result.grads, result.directional, state)))
    return found


def sampled(distribution, kind):
    """The figures of the third of four tangents; of every factor where there are factors."""
    dtype = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}.get(kind, jnp.float32)
    key = jax.random.key(11, impl="rbg" if kind == "rbg" else None)
    shapes = LEAVES
    if kind != "float32" or isinstance(distribution, pg.Basis | pg.Orthogonal):
        shapes = {name: shape for name, shape in LEAVES.items() if math.prod(shape) < 2**9}
    params = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in shapes.items()}
    return figures(distribution.sample(key, params, 2, 4))


CASES = {f"layers: {e}": (estimates, e, "layers") for e in ESTIMATORS}
CASES |= {f"recurrent: {e}": (estimates, e, "recurrent") for e in ON_BOTH_MODELS}
for kind in ("float32", "bfloat16", "rbg"):
    CASES |= {f"{kind}: {d}": (sampled, d, kind) for d in (*TANGENTS, *JOINT)}


def computed(case):
    of, subject, kind = CASES[case]
    return of(eval(subject, vars(pg)), kind)


@pytest.mark.parametrize("case", CASES)
def test_numbers_are_those_written_down(case):
    written, found = json.loads(RECORD.read_text())[case], computed(case)
    # a difference of two losses multiplies their rounding by 1 / step
    tolerance = 1e-4 if "CentralDifference" in case else 2e-6
    is_figures = lambda x: isinstance(x, list) and all(isinstance(n, float) for n in x)
    written, found = (jax.tree.leaves(x, is_leaf=is_figures) for x in (written, found))
    assert len(written) == len(found)
    for old, new in zip(written, found, strict=True):
        scale = max(1e-3, *np.abs(old), 0)
        np.testing.assert_allclose(new, old, rtol=tolerance, atol=tolerance * scale)


if __name__ == "__main__" and sys.argv[1:] == ["--write"]:
    lines = [f"{json.dumps(case)}: {json.dumps(computed(case))}" for case in CASES]
    RECORD.write_text("{\n" + ",\n".join(lines) + "\n}\n")
