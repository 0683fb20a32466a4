"""What holds for every estimator, on every kind of parameters, under every transformation. A new
estimator is one line here."""

import ast
import functools
import re
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import site_models
from cases import LONG
from jax import lax
from jax.sharding import PartitionSpec as P

import prograde as pg

ESTIMATORS = [
    pg.WeightPerturbation(pg.Normal()),
    pg.WeightPerturbation(pg.Rademacher(), 3, chunk=2),
    pg.WeightPerturbation(pg.Sphere(), 2),
    pg.WeightPerturbation(pg.Basis(), 2),
    pg.WeightPerturbation(pg.Sparse(0.3), 2),
    pg.WeightPerturbation(pg.Orthogonal(), 4, combine="projection"),
    pg.WeightPerturbation(pg.LowRank(1), 3, combine="projection"),
    pg.WeightPerturbation(pg.LowRank(1), 4, chunk=2, combine="shrunk"),
    pg.WeightPerturbation(pg.Separable(1), 2),
    pg.WeightPerturbation(pg.Blocks(pg.LowRank(1)), 2),
    pg.LearnedBlocks(),
    pg.CentralDifference(),
    pg.CentralDifference(pg.LowRank(1), 2, step=0.1, curvature_power=0.5),
    pg.ActivityPerturbation(),
    pg.ActivityPerturbation(pg.Normal(), 2, head="exact"),
    pg.ActivityPerturbation(per_example=False),
    pg.LocalLosses(pg.Normal(), 2, head="exact", scale="rms"),
    pg.LearnedFeedback(),
    pg.LearnedFeedback(every=2),
    pg.LearnedFeedback(num_tangents=2, use="control_variate"),
    pg.WeightPerturbation(pg.LowRank(1), num_groups=2),
    pg.Guided("previous", num_tangents=3),
    pg.Guided("momentum", tangents=pg.Normal(), num_tangents=2, chunk=1),
    pg.Scaled(scales=2.0),
    pg.Scaled(pg.WeightPerturbation(pg.LowRank(1), 2), "curvature", precondition=True),
    pg.ForwardJacobian(),
    pg.ForwardJacobian(chunk=5),
    pg.Backprop(),
    pg.CheckpointedBackprop(),
]
PAGE = Path(__file__).parents[2] / "docs" / "add_an_estimator.md"


def classes_on_the_page():
    """What the page for authors imports and defines, as it stands. `tests/docs` runs all of it."""
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S))
    tree, namespace = ast.parse(code), {}
    kept = (ast.Import, ast.ImportFrom, ast.ClassDef)
    tree.body = [statement for statement in tree.body if isinstance(statement, kept)]
    exec(compile(tree, str(PAGE), "exec"), namespace)
    return namespace


AUTHORS = classes_on_the_page()
ESTIMATORS += [
    AUTHORS["OneSign"](),
    AUTHORS["MeanOfMany"](),
    pg.WeightPerturbation(AUTHORS["Uniform"](), 2),
]
EXACT = (pg.ForwardJacobian, pg.Backprop, pg.CheckpointedBackprop)
CONTAINERS = [
    site_models.relu_mlp,
    site_models.scanned_layers,
    site_models.equinox_mlp,
    site_models.nnx_model,
]

every_estimator = pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)


def estimate(estimator, losses, key, params, *args, has_aux=False):
    state = estimator.init(losses, params, *args, has_aux=has_aux)
    return estimator.estimate(losses, key, state, params, *args, has_aux=has_aux)


in_one_program = eqx.filter_jit(estimate)
# a container is made once, so that all tests of an estimator on it share one program
made = functools.cache(lambda model, seed: model(jax.random.key(seed)))


def equal(a, b, rtol=1e-4, atol=1e-5):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=atol)


@pytest.mark.parametrize(
    ("estimator", "model"),
    # every estimator meets one container, and every container a quarter of the estimators
    [(estimator, CONTAINERS[i % len(CONTAINERS)]) for i, estimator in enumerate(ESTIMATORS)],
    ids=lambda x: getattr(x, "__name__", None) or repr(x),
)
def test_value_structure_shapes_dtypes_and_auxiliary_output(estimator, model, seed, key):
    params, losses, args = made(model, seed)

    def with_aux(params, *args):
        each = losses(params, *args)
        return each, {"losses": each, "count": jnp.asarray(3), "name": "text"}

    result = in_one_program(estimator, with_aux, key, params, *args, has_aux=True)
    mean = lambda p: jnp.mean(losses(p, *args))
    expected, grads = eqx.filter_jit(eqx.filter_value_and_grad(mean))(params)
    # a difference evaluates beside the parameters
    difference = isinstance(estimator, pg.CentralDifference)
    np.testing.assert_allclose(result.value, expected, rtol=1e-3 if difference else 1e-5)
    assert jax.tree.structure(result.grads) == jax.tree.structure(grads)
    for g, e in zip(jax.tree.leaves(result.grads), jax.tree.leaves(grads), strict=True):
        assert (g.shape, g.dtype) == (e.shape, e.dtype)
        assert np.isfinite(g).all()
    if isinstance(estimator, EXACT):
        equal(result.grads, grads)
    state = eqx.filter_eval_shape(estimator.init, with_aux, params, *args, has_aux=True)
    assert jax.tree.structure(result.state) == jax.tree.structure(state)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(result.state)] == [
        (x.shape, x.dtype) for x in jax.tree.leaves(state)
    ]
    each = eqx.filter_jit(losses)(params, *args)
    found = np.reshape(result.aux["losses"], each.shape)  # groups have an axis of their own
    np.testing.assert_allclose(found, each, rtol=0.1 if difference else 1e-4, atol=1e-5)
    assert set(np.ravel(result.aux["count"]).tolist()) == {3}
    assert result.aux["name"] == "text"


@every_estimator
def test_transformations_agree(estimator, seed, key):
    """A key gives one estimate in `jit`, compiled once, and in `vmap` and `scan` over keys."""
    params, losses, args = made(site_models.relu_mlp, seed)
    traced = 0

    def counted(params, x, y):
        nonlocal traced
        traced += 1
        return losses(params, x, y)

    keys, of = jax.random.split(key, 3), lambda k: estimate(estimator, losses, k, params, *args)
    step = jax.jit(lambda k: estimate(estimator, counted, k, params, *args))
    one_by_one, before = [step(keys[0])], traced
    one_by_one += [step(k) for k in keys[1:]]
    assert traced == before
    assert step._cache_size() == 1
    stacked = jax.tree.map(lambda *x: np.stack(x), *one_by_one)
    equal(jax.jit(jax.vmap(of))(keys), stacked)
    equal(lax.scan(lambda c, k: (c, of(k)), 0, keys)[1], stacked)
    if not isinstance(estimator, EXACT):
        pairs = zip(*(jax.tree.leaves((r.grads, r.state)) for r in one_by_one[:2]), strict=True)
        assert not all(np.allclose(a, b) for a, b in pairs)


@pytest.mark.parametrize(
    "estimator",
    [pytest.param(e, marks=LONG if i % 5 else ()) for i, e in enumerate(ESTIMATORS)],
    ids=repr,
)
def test_estimates_outside_jit_are_those_inside(estimator, seed, key):
    params, losses, args = made(site_models.relu_mlp, seed)
    inside = in_one_program(estimator, losses, key, params, *args)
    equal(estimate(estimator, losses, key, params, *args), inside)


@every_estimator
def test_half_precision(estimator, key):
    params, losses, args = site_models.relu_mlp(key)
    params, args = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (params, args))
    if isinstance(estimator, pg.CentralDifference) and estimator.step < 0.01:
        with pytest.raises(ValueError, match=r"step=0.001, but a loss of dtype bfloat16"):
            estimate(estimator, losses, key, params, *args)
        return
    exact = isinstance(estimator, EXACT)
    run = in_one_program if exact else eqx.filter_eval_shape
    result = run(*(() if exact else (estimate,)), estimator, losses, key, params, *args)
    assert {g.dtype for g in jax.tree.leaves(result.grads)} == {jnp.dtype(jnp.bfloat16)}
    if result.directional is not None:
        assert result.directional.dtype == jnp.float32
    if exact:
        expected = jax.jit(jax.grad(lambda p: losses(p, *args).mean()))(params)
        equal(result.grads, expected, rtol=0.1, atol=0.05)


@pytest.mark.parametrize(
    "estimator",
    [pytest.param(e, marks=LONG if i % 2 else ()) for i, e in enumerate(ESTIMATORS)],
    ids=repr,
)
def test_shard_map_over_four_devices(estimator, seed, key):
    """Each device estimates on its part of the batch: the same as one device after the other."""
    params, losses, (x, y) = made(site_models.relu_mlp, seed)
    rows = len(x)  # of each part, so that all devices run the program of other tests
    x = jax.random.normal(jax.random.fold_in(key, 100), (4 * rows, *x.shape[1:]))
    y = jnp.zeros((4 * rows, *y.shape[1:]))
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def local(params, x, y):
        k = jax.random.fold_in(key, lax.axis_index("data"))
        params = jax.tree.map(lambda w: lax.pcast(w, "data", to="varying"), params)
        grads = estimate(estimator, losses, k, params, x, y).grads
        return jax.tree.map(lambda g: g[None], grads)

    sharded = jax.jit(
        jax.shard_map(local, mesh=mesh, in_specs=(P(), P("data"), P("data")), out_specs=P("data"))
    )
    grads = sharded(params, x, y)
    for i in range(4):
        part = slice(rows * i, rows * (i + 1))
        expected = in_one_program(
            estimator, losses, jax.random.fold_in(key, i), params, x[part], y[part]
        ).grads
        # a difference of two losses multiplies their rounding by 1 / step
        tolerance = 1e-2 if isinstance(estimator, pg.CentralDifference) else 1e-5
        equal(jax.tree.map(lambda g, i=i: g[i], grads), expected, atol=tolerance)


@every_estimator
def test_printed_compared_and_hashed(estimator):
    names = AUTHORS | {name: getattr(pg, name) for name in pg.__all__}
    rebuilt = eval(repr(estimator), names)
    assert rebuilt == estimator
    assert hash(rebuilt) == hash(estimator)
