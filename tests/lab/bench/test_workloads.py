"""Every workload of the benchmark means the same to every method, in JAX and in PyTorch."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import prograde as pg
from prograde.lab.models import workloads
from prograde.lab.processes.requests import RequestError
from prograde.lab.studies.bench import MODELS, WIDE
from prograde.lab.studies.bench.methods import BLOCKS, JaxSide, save_arrays
from prograde.lab.studies.bench.torch_side import TorchSide

RESNET = {"batch": 3, "size": 8, "width": 8}
TINY = {
    "logreg": {"batch": 4},
    "mlp": {"batch": 3},
    "resnet": RESNET | {"stages": 1},
    "transformer": {
        "layers": 2, "width": 16, "heads": 2, "vocabulary": 11, "batch": 2, "length": 6,
    },
}  # fmt: skip
LONG = {
    "cnn": {"batch": 2},
    "resnet": RESNET | {"stages": 2},
    "smollm2": {
        "layers": 2, "width": 24, "queries": 6, "keys": 2, "inner": 20,
        "vocabulary": 13, "batch": 2, "length": 5,
    },
}  # fmt: skip
CASES = [pytest.param(case, id=case[0]) for case in TINY.items()]
CASES += [pytest.param(case, id=f"{case[0]}-long", marks=pytest.mark.long) for case in LONG.items()]


quick = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)  # compiles faster


@pytest.fixture(scope="module", params=CASES)
def tiny(request, seed):
    """A small workload: (workload, params, state, batch, loss, gradient)."""
    name, sizes = request.param
    workload = workloads.WORKLOADS[name](**sizes)

    @quick
    def make(key):
        key_init, key_batch = jax.random.split(key)
        params, state = workload.init(key_init)
        batch = workload.batch(key_batch)
        (loss, _), gradient = jax.value_and_grad(workload.loss, has_aux=True)(params, state, *batch)
        return params, state, batch, loss, gradient

    return workload, *make(jax.random.key(seed))


def dot(a, b):
    return sum(np.vdot(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def norm(tree):
    return float(np.sqrt(dot(tree, tree)))


def difference(a, b):
    return jax.tree.map(lambda x, y: np.asarray(x) - np.asarray(y), a, b)


def test_names_of_models_are_those_of_the_workloads():
    assert tuple(workloads.WORKLOADS) == (*MODELS, *WIDE)


def test_loss_is_a_scalar_and_state_keeps_its_shape(tiny):
    workload, params, state, batch, _, _ = tiny
    loss, new = jax.eval_shape(workload.loss, params, state, *batch)
    assert loss.shape == ()
    assert jax.tree.map(lambda s: (s.shape, s.dtype), new) == jax.tree.map(
        lambda s: (s.shape, s.dtype), state
    )


def test_forward_gradient_is_the_slope_along_signs_times_the_signs(tiny):
    """A rank-one tangent of signs is read off the estimate; jax.jvp along it gives the slope."""
    workload, params, state, batch, _, gradient = tiny
    grad_fn = pg.value_and_grad(
        workload.loss, pg.WeightPerturbation(pg.LowRank(rank=1)), has_aux=True
    )

    @quick
    def both(key, params):
        (loss, new), estimate = grad_fn(key, params, state, *batch)
        direction = jax.tree.map(jnp.sign, estimate)
        along = jax.jvp(
            lambda p: workload.loss(p, state, *batch), (params,), (direction,), has_aux=True
        )
        return loss, new, estimate, direction, *along

    loss, new, estimate, direction, expected, slope, expected_new = both(jax.random.key(3), params)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), new, expected_new
    )
    for g, v in zip(jax.tree.leaves(estimate), jax.tree.leaves(direction), strict=True):
        assert np.all(np.asarray(v) != 0)
        np.testing.assert_allclose(g, slope * v, atol=1e-3 * norm(gradient))


@pytest.mark.long
def test_gradient_in_a_block_is_the_slope_along_its_signs_over_its_probability(tiny):
    workload, params, state, batch, _, gradient = tiny
    blocks = BLOCKS.get(workload.name, pg.Blocks())
    grad_fn = pg.value_and_grad(workload.loss, pg.WeightPerturbation(blocks), has_aux=True)
    p = blocks.probability(params)

    @quick
    def both(key, params):
        (loss, new), estimate = grad_fn(key, params, state, *batch)
        direction = jax.tree.map(jnp.sign, estimate)
        along = jax.jvp(
            lambda p: workload.loss(p, state, *batch), (params,), (direction,), has_aux=True
        )
        return loss, new, estimate, direction, *along, blocks.choice(key, p)

    seen = set()
    for i in range(3 * len(p)):
        loss, new, estimate, direction, expected, slope, expected_new, block = both(
            jax.random.key(i), params
        )
        close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
        close(loss, expected)
        jax.tree.map(close, new, expected_new)
        for g, v in zip(jax.tree.leaves(estimate), jax.tree.leaves(direction), strict=True):
            np.testing.assert_allclose(g, slope / p[block] * v, atol=2e-3 * norm(gradient))
        seen.add(int(block))
    assert len(seen) > len(p) / 2


def test_other_forms_of_the_loss_have_the_same_gradient(tiny):
    workload, params, state, batch, _, gradient = tiny
    losses = [f for f in (workload.checkpointed_loss, workload.unrolled_loss) if f is not None]
    gradients = quick(lambda p: [jax.grad(f, has_aux=True)(p, state, *batch)[0] for f in losses])
    for other in gradients(params):
        assert norm(difference(other, gradient)) < 1e-4 * norm(gradient)


def test_smollm2_has_the_parameters_of_the_model_that_it_is_named_after():
    shapes, _ = jax.eval_shape(lambda: workloads.smollm2().init(jax.random.key(0)))
    assert sum(w.size for w in jax.tree.leaves(shapes)) == 134_515_008


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own
def test_pytorch_computes_the_same_loss_and_gradient(tiny, tmp_path):
    if importlib.util.find_spec("torch") is None:
        pytest.skip("PyTorch is not installed")
    from prograde.lab.studies.bench.torch_worker import Worker, torch

    workload, params, state, batch, loss, gradient = tiny
    save_arrays(tmp_path / "arrays.npz", params, state, [batch])
    worker = Worker(workload.name, workload.sizes, str(tmp_path / "arrays.npz"))
    theirs = worker.loss(worker.leaves, worker.state, *worker.batches[0])
    np.testing.assert_allclose(theirs.item(), loss, rtol=1e-5)
    squares = [
        float((g**2).sum()) for g in torch.autograd.grad(theirs, list(worker.leaves.values()))
    ]
    np.testing.assert_allclose(sum(squares) ** 0.5, norm(gradient), rtol=1e-4)
    # attention and batch normalisation have forward derivatives
    _, value = worker.steps("torch-jvp", 1)
    assert np.isfinite(value)


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="PyTorch is not installed")
def test_process_of_pytorch_answers_and_says_what_is_wrong(tmp_path):
    workload = workloads.logreg(batch=4)
    side = JaxSide(workload)
    side.save(tmp_path / "arrays.npz")
    side.compile("bare")
    with TorchSide(workload, tmp_path / "arrays.npz") as torch_side:
        found = torch_side.compile("torch-bare")
        assert found["first_loss"] == pytest.approx(side.visit("bare", 1)[1], rel=1e-5)
        seconds, _ = torch_side.visit("torch-backprop", 2)
        assert seconds > 0
        with pytest.raises(RequestError, match="KeyError"):
            torch_side.visit("torch-nothing", 1)
        assert torch_side.memory("torch-jvp")["peak_rss"] > 0
        torch_side._server._process.kill()
        with pytest.raises(RequestError, match="ended"):
            torch_side.visit("torch-bare", 1)
