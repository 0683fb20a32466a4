"""The methods of the benchmark do what their names say, and their costs are counted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prograde.lab.models import workloads
from prograde.lab.studies.bench import methods


def dot(a, b):
    return sum(np.vdot(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def norm(tree):
    return float(np.sqrt(dot(tree, tree)))


def difference(a, b):
    return jax.tree.map(lambda x, y: np.asarray(x) - np.asarray(y), a, b)


def test_methods_move_the_weights_as_their_names_say(monkeypatch):
    monkeypatch.setattr(methods, "LEARNING_RATE", 1.0)  # so that the move is the gradient
    workload = workloads.logreg(batch=4)
    side = methods.JaxSide(workload)
    params, state, count = side.carry
    batch = side.batches[0]
    gradient, _ = jax.jit(jax.grad(workload.loss, has_aux=True))(params, state, *batch)

    def slope_along_signs(moved):
        direction = jax.tree.map(np.sign, moved)
        return dot(gradient, direction), direction

    assert set(side.methods) == {
        m for m in methods.METHODS if "torch" not in m and m != "backprop-unrolled"
    }
    for name in set(side.methods) - {"prograde-16"}:
        side.carry = jax.tree.map(jnp.copy, (params, state, count))
        assert side.compile(name)["compile_seconds"] > 0
        side.visit(name, 1)
        moved = difference(params, side.carry[0])
        assert int(side.carry[2]) == 1
        if name == "bare":
            assert norm(moved) == 0
        elif name in ("backprop", "checkpointed"):
            assert norm(difference(moved, gradient)) < 1e-5 * norm(gradient)
        elif name == "dense-jvp":  # moved = slope v, and |v|^2 is n or nearly
            n = sum(w.size for w in jax.tree.leaves(params))
            assert float(dot(gradient, moved)) == pytest.approx(norm(moved) ** 2 / n, rel=0.1)
        elif name in ("prograde-4", "blocks-1", "blocks-4"):  # sums of (g . v) v
            assert float(dot(gradient, moved)) > 0
        else:  # slope times signs; a central difference rounds
            slope, direction = slope_along_signs(moved)
            for m, v in zip(jax.tree.leaves(moved), jax.tree.leaves(direction), strict=True):
                np.testing.assert_allclose(m, slope * v, atol=5e-3 * norm(gradient))


def test_counted_ratios_are_those_of_multiply_adds():
    counted = methods.counted_ratios(workloads.logreg(batch=64))
    assert {name: ratio for name, ratio in counted.items() if "blocks" not in name} == {
        "prograde-1": pytest.approx(1.3031, rel=1e-4),
        "prograde-4": pytest.approx(1.8523, rel=1e-4),
        "prograde-16": pytest.approx(4.4458, rel=1e-4),
    }


def test_steps_of_a_visit_take_the_batches_in_turn(monkeypatch):
    side, seen = methods.JaxSide(workloads.logreg(batch=4)), []
    monkeypatch.setattr(
        side, "compiled", {"bare": lambda carry, key, batch: (seen.append(batch) or carry, 1.0)}
    )
    seconds, loss = side.visit("bare", 6)
    assert [next(i for i, b in enumerate(side.batches) if b is batch) for batch in seen] == [
        0, 1, 2, 3, 0, 1,
    ]  # fmt: skip
    assert (seconds > 0, loss) == (True, 1.0)
