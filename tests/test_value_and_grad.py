"""The drop-in: the same calls as jax.value_and_grad, the same structures back, under every
transformation."""

import dataclasses
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import models
import numpy as np
import optax
import pytest
from cases import LONG
from flax import nnx
from jax.experimental.sparse import BCOO

import prograde as pg

LOW_RANK = pg.WeightPerturbation(pg.LowRank(1), num_tangents=2)
ESTIMATORS = [
    pg.WeightPerturbation(pg.Normal()),
    LOW_RANK,
    pg.WeightPerturbation(pg.LowRank(1), 3, chunk=2),
    pg.Backprop(),
]


def written(x):
    """An id that is the same in all processes: `repr` of a function holds its address."""
    return re.sub(" at 0x[0-9a-f]+", "", repr(x))


def equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("model", models.ALL, ids=lambda m: m.__name__)
def test_grads_are_like_those_of_reverse_mode(model, key):
    """Backprop's equal them; every estimator's have their structure, shapes and dtypes."""
    params, loss, args = model(key)

    @eqx.filter_jit
    def of_all(key, params, args):
        reverse = eqx.filter_value_and_grad(loss)(params, *args)
        backprop = pg.value_and_grad(loss, pg.Backprop())(None, params, *args)
        random = [pg.value_and_grad(loss, e)(key, params, *args) for e in ESTIMATORS[:-1]]
        return reverse, backprop, random

    (expected, expected_grads), backprop, random = of_all(key, params, args)
    equal(backprop, (expected, expected_grads))
    for value, grads in random:
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        assert jax.tree.structure(grads) == jax.tree.structure(expected_grads)
        for g, e in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
            assert (g.shape, g.dtype) == (e.shape, e.dtype)
            assert np.isfinite(g).all()


def test_grads_go_into_optax_and_train_an_equinox_and_an_nnx_model(key):
    for i, model in enumerate((models.equinox_model, models.nnx_model)):
        params, loss, args = model(key)
        optimizer = optax.adam(1e-2)
        opt_state = optimizer.init(eqx.filter(params, eqx.is_inexact_array))
        grad_fn = pg.value_and_grad(loss, pg.WeightPerturbation(pg.LowRank(1), num_tangents=8))

        @eqx.filter_jit
        def step(key, params, opt_state, grad_fn=grad_fn, optimizer=optimizer, args=args):
            value, grads = grad_fn(key, params, *args)
            updates, opt_state = optimizer.update(
                grads, opt_state, eqx.filter(params, eqx.is_inexact_array)
            )
            return eqx.apply_updates(params, updates), opt_state, value

        values = []
        for k in jax.random.split(jax.random.fold_in(key, i), 200):
            params, opt_state, value = step(k, params, opt_state)
            values.append(value)
        assert values[-1] < 0.2 * values[0]


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=written)
def test_argnums(estimator, key):
    def loss(x, w, v):
        return jnp.sum(jnp.tanh(x @ w) * v)

    x, w, v = jnp.ones((3, 4)), jnp.ones((4, 2)) / 7, jnp.arange(2.0)

    def shapes(argnums):
        grad_fn = pg.value_and_grad(loss, estimator, argnums=argnums)
        grads = jax.eval_shape(grad_fn, key, x, w, v)[1]
        return jax.tree.map(lambda g: g.shape, grads)

    assert shapes(1) == (4, 2)
    assert shapes((2, 1)) == ((2,), (4, 2))
    assert shapes(-1) == (2,)
    grad_fn = pg.value_and_grad(lambda w, *, x: jnp.sum(x @ w), estimator)
    _, grads = jax.jit(grad_fn)(key, w, x=x)
    assert grads.shape == (4, 2)
    _, both = jax.jit(pg.value_and_grad(loss, pg.Backprop(), argnums=(2, 1)))(key, x, w, v)
    equal(both, jax.grad(loss, (2, 1))(x, w, v))


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=written)
def test_aux_passes_arrays_integers_and_other_objects(estimator, key):
    def loss(w, x):
        h = x @ w
        return jnp.sum(h**2), {
            "h": h,
            "count": jnp.asarray(3),
            "name": "text",
            "none": None,
            "fun": jnp.tanh,
            "w": w,
            "np": np.ones(2),
        }

    w, x = jnp.ones((4, 2)), jnp.ones((3, 4))
    (value, aux), grads = pg.value_and_grad(loss, estimator, has_aux=True)(key, w, x)
    np.testing.assert_allclose(aux["h"], x @ w)
    assert (int(aux["count"]), aux["name"], aux["none"], aux["fun"]) == (3, "text", None, jnp.tanh)
    np.testing.assert_array_equal(aux["w"], w)
    np.testing.assert_array_equal(aux["np"], np.ones(2))
    assert value == 96
    assert grads.shape == (4, 2)


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=written)
def test_leaves_that_are_not_float_arrays_pass_through(estimator, key):
    params = {
        "w": jnp.ones((3, 2)),
        "count": jnp.arange(3),
        "scale": 2.0,
        "act": jnp.tanh,
        "key": jax.random.key(1),
    }

    def loss(params, x):
        noise = jax.random.normal(params["key"], (2,))
        return (
            jnp.sum(params["act"](x @ params["w"]) * params["scale"] + noise)
            + params["count"].sum()
        )

    # every chunk evaluates the function, and with it uses the model's key, anew
    with jax.debug_key_reuse(False):
        _, grads = eqx.filter_jit(pg.value_and_grad(loss, estimator))(key, params, jnp.ones((4, 3)))
    assert grads["w"].shape == (3, 2)
    assert [grads[k] for k in ("count", "scale", "act", "key")] == [None] * 4


def test_per_example_losses_give_per_example_directional_derivatives(key):
    params, loss, (x, y) = models.mlp(key)
    per_example = lambda params, x, y: jax.vmap(lambda x, y: loss(params, x[None], y[None]))(x, y)
    of = lambda loss: eqx.filter_jit(LOW_RANK.estimate)(loss, key, None, params, x, y)
    result, mean = of(per_example), of(loss)
    assert result.directional.shape == (2, 4)
    np.testing.assert_allclose(result.directional.mean(1), mean.directional, rtol=1e-4)
    equal((result.value, result.grads), (mean.value, mean.grads))


def test_jit_vmap_and_scan_change_nothing(key):
    params, loss, args = models.scan_over_layers(key)
    grad_fn = pg.value_and_grad(loss, LOW_RANK)
    of = lambda k: grad_fn(k, params, *args)
    keys = jax.random.split(key, 3)
    with jax.debug_key_reuse(False):  # the same keys on purpose
        stacked = jax.jit(jax.vmap(of))(keys)
        equal(stacked, jax.lax.scan(lambda c, k: (c, of(k)), None, keys)[1])
        first = jax.tree.map(lambda x: np.asarray(x)[0], stacked)
        equal(first, jax.jit(grad_fn)(keys[0], params, *args))
        equal(first, of(keys[0]))


def test_shard_map_over_the_batch(key):
    """Each device its part of the batch, the same tangent on all: the mean of the parts is the
    whole."""
    assert jax.device_count() >= 4
    params, loss, args = models.mlp(key)
    grad_fn = pg.value_and_grad(loss, LOW_RANK)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    mean = lambda params, *args: jax.lax.pmean(grad_fn(key, params, *args), "data")
    sharded = jax.shard_map(
        mean,
        mesh=mesh,
        in_specs=(spec(), spec("data"), spec("data")),
        out_specs=spec(),
        check_vma=False,
    )
    equal(jax.jit(sharded)(params, *args), jax.jit(grad_fn)(key, params, *args))


def test_second_call_does_not_compile_again(key):
    params, loss, args = models.mlp(key)
    traces = []

    def counted(params, *args):
        traces.append(None)
        return loss(params, *args)

    grad_fn = jax.jit(pg.value_and_grad(counted, LOW_RANK))
    grad_fn(key, params, *args)
    first = len(traces)
    for k in jax.random.split(key, 3):
        grad_fn(k, params, *args)
    assert len(traces) == first
    assert grad_fn._cache_size() == 1


def test_dropout_mask_and_statistics_are_shared_by_all_tangents(key):
    """The primal runs once for all tangents: one mask, one update of the statistics, the value of a
    plain call."""

    class Model(nnx.Module):
        def __init__(self):
            self.linear = nnx.Linear(5, 4, rngs=nnx.Rngs(0))
            self.norm = nnx.BatchNorm(4, rngs=nnx.Rngs(1))
            self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(2))

        def __call__(self, x):
            return self.dropout(self.norm(self.linear(x)))

    graph, params, rest = nnx.split(Model(), nnx.Param, ...)

    def loss(params, rest, x):
        model = nnx.merge(graph, params, rest, copy=True)  # as under jax.value_and_grad
        value = jnp.mean(model(x) ** 2)
        return value, nnx.split(model, nnx.Param, ...)[2]

    x = jax.random.normal(key, (6, 5))
    value, state = eqx.filter_jit(loss)(params, rest, x)
    grad_fn = eqx.filter_jit(pg.value_and_grad(loss, LOW_RANK, has_aux=True))
    (estimated, new_state), _ = grad_fn(key, params, rest, x)
    np.testing.assert_allclose(estimated, value, rtol=1e-6)
    statistics = lambda state: [
        leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    equal(statistics(new_state), statistics(state))
    assert not np.array_equal(statistics(state)[0], statistics(rest)[0])


def test_programs_without_reverse_mode(key):
    """A while loop whose length depends on the parameters: reverse mode refuses it, the forward
    gradient is exact."""

    def newton_root(a):
        step = lambda x: x - (x**2 - a) / (2 * x)
        return jax.lax.while_loop(lambda x: jnp.abs(x**2 - a) > 1e-5, step, a)

    with pytest.raises(ValueError, match="while_loop"):
        jax.grad(newton_root)(3.0)
    value, grad = pg.value_and_grad(newton_root, pg.WeightPerturbation(pg.Basis()))(
        key, jnp.asarray(3.0)
    )
    np.testing.assert_allclose([value, grad], [3**0.5, 0.5 / 3**0.5], rtol=1e-5)


def test_estimators_are_values():
    for estimator in ESTIMATORS:
        assert dataclasses.is_dataclass(estimator)
        assert estimator == dataclasses.replace(estimator)
        assert hash(estimator) == hash(dataclasses.replace(estimator))
        assert eval(repr(estimator), vars(pg)) == estimator
    assert ESTIMATORS[0] != ESTIMATORS[1]


W = jnp.ones((3, 2))


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: pg.WeightPerturbation(num_tangents=0), ValueError, r"num_tangents=0.*at least 1"),
        (lambda: pg.WeightPerturbation(chunk=0), ValueError, r"chunk=0.*at least 1"),
        (lambda: pg.WeightPerturbation(num_tangents=2.5), ValueError, r"num_tangents=2.5"),
        (
            lambda: pg.WeightPerturbation(tangents="normal"),
            TypeError,
            r"tangents='normal'.*Normal\(\)",
        ),
        (lambda: pg.WeightPerturbation(tangents=pg.Normal), TypeError, r"tangents=.*Normal\(\)"),
        (lambda: pg.LowRank(rank=0), ValueError, r"rank=0.*at least 1"),
        (
            lambda: pg.LowRank(factors=pg.Sphere()),
            ValueError,
            r"factors=Sphere\(\).*Rademacher\(\)",
        ),
        (lambda: pg.value_and_grad(jnp.sum, pg.Backprop), TypeError, r"estimator=.*instance"),
    ],
)
def test_bad_configuration(make, error, words):
    with pytest.raises(error, match=words):
        make()


@pytest.mark.parametrize(
    ("fun", "key_of", "args", "error", "words"),
    [
        (jnp.sum, lambda: jax.random.PRNGKey(0), (W,), TypeError, r"typed PRNG key.*wrap_key_data"),
        (jnp.sum, lambda: 0, (W,), TypeError, r"key=0.*typed PRNG key"),
        (
            jnp.sum,
            lambda: jax.random.split(jax.random.key(0)),
            (W,),
            TypeError,
            r"key has shape \(2,\).*vmap",
        ),
        (jnp.sum, None, (), ValueError, r"argnums=0.*0 positional arguments"),
        (jnp.sum, None, (jnp.arange(3),), ValueError, r"no floating-point array"),
        (jnp.sum, None, ({},), ValueError, r"no floating-point array"),
        (
            lambda p: jnp.sum(p["w"] ** 2).real,
            None,
            ({"w": W + 0j},),
            TypeError,
            r"\['w'\] has dtype complex64",
        ),
        (lambda w: w, None, (W,), ValueError, r"loss has shape \(3, 2\).*\[batch\]"),
        (lambda w: jnp.argmax(w), None, (W,), TypeError, r"loss has dtype int32"),
        (lambda w: (jnp.sum(w), 1), None, (W,), TypeError, r"returned tuple.*has_aux=True"),
        (lambda w: None, None, (W,), TypeError, r"returned NoneType"),
    ],
)
@pytest.mark.parametrize("jit", [False, True])
def test_bad_call_is_named_at_trace_time(fun, key_of, args, error, words, jit):
    grad_fn = pg.value_and_grad(fun, LOW_RANK)
    key = key_of() if key_of else jax.random.key(0)
    with pytest.raises(error, match=words if not (jit and key_of) else "key"):
        (jax.jit(grad_fn) if jit else grad_fn)(key, *args)


def test_has_aux_without_a_pair(key):
    with pytest.raises(TypeError, match=r"has_aux=True.*instead of a pair"):
        pg.value_and_grad(jnp.sum, LOW_RANK, has_aux=True)(key, W)


def test_more_basis_tangents_than_parameters(key):
    with pytest.raises(ValueError, match=r"num_tangents=7.*hold 6"):
        pg.value_and_grad(jnp.sum, pg.WeightPerturbation(pg.Basis(), num_tangents=7))(key, W)


@pytest.mark.parametrize("argnums", [(0, 0), (1, -1), (0, -2), [0, 1, 0]])
def test_an_argument_named_twice_is_refused(argnums, key):
    """Zeros for one and the whole gradient for the other would be wrong for both."""
    grad_fn = pg.value_and_grad(lambda w, v: jnp.sum(w * v), pg.Backprop(), argnums=argnums)
    with pytest.raises(ValueError, match=r"argnums=.* name the arguments .* named\s+once"):
        grad_fn(key, W, W)
    with pytest.raises(ValueError, match=r"argnums=\(\)"):
        pg.value_and_grad(jnp.sum, pg.Backprop(), argnums=())


def branches(w, x, flag):
    """A loss that branches on a concrete argument, and on the number of its entries that are not
    0."""
    sparse = BCOO.fromdense(x)
    return jnp.sum((sparse @ w) ** 2) * (2.0 if flag > 0 else 1.0)


@pytest.mark.parametrize(
    "estimator",
    [
        pytest.param(pg.WeightPerturbation(), marks=LONG),
        pg.WeightPerturbation(pg.Normal(), 3, chunk=2),
        pg.CentralDifference(num_tangents=3),
        pg.ForwardJacobian(),
        pytest.param(pg.ForwardJacobian(chunk=4), marks=LONG),
        pytest.param(pg.Guided(lambda w, *args: w, num_tangents=2), marks=LONG),
        pytest.param(pg.Scaled(scales=2.0), marks=LONG),
        pg.Backprop(),
    ],
    ids=written,
)
def test_arguments_that_are_not_differentiated_stay_concrete(estimator, key):
    """As under `jax.value_and_grad`, and with the estimate of a function that does not branch."""
    w, x = jnp.arange(6.0).reshape(3, 2) / 6, jnp.eye(3)
    value, grads = pg.value_and_grad(branches, estimator)(key, w, x, jnp.asarray(1))
    plain = lambda w: 2 * jnp.sum((x @ w) ** 2)
    expected = jax.jit(pg.value_and_grad(lambda w, x, flag: plain(w), estimator))(
        jax.random.clone(key), w, x, jnp.asarray(1)
    )
    np.testing.assert_allclose(value, expected[0], rtol=1e-5)
    tolerance = 1e-2 if isinstance(estimator, pg.CentralDifference) else 1e-5
    np.testing.assert_allclose(grads, expected[1], rtol=tolerance, atol=tolerance)


def test_estimators_that_trace_the_function_say_so(key):
    losses = lambda w, x, flag: jnp.sum((x @ w) ** 2, axis=-1) * (2.0 if flag > 0 else 1.0)
    grad_fn = pg.value_and_grad(losses, pg.ActivityPerturbation())
    with pytest.raises(jax.errors.ConcretizationTypeError) as caught:
        grad_fn(key, W, jnp.ones((4, 3)), jnp.asarray(1))
    assert any("traces the function" in note for note in caught.value.__notes__)
    value, _ = grad_fn(jax.random.clone(key), W, jnp.ones((4, 3)), 1)
    assert value == 36


@pytest.mark.parametrize(
    "estimator",
    [
        pg.WeightPerturbation(),
        pg.WeightPerturbation(pg.Normal(), 2, combine="shrunk"),
        pg.WeightPerturbation(pg.Sphere(), 2, combine="projection"),
        pg.CentralDifference(),
        pg.ForwardJacobian(),
        pg.ForwardJacobian(chunk=2),
        pg.Guided(lambda p: p, "projection"),
        pg.Scaled(scales=2.0),
        pg.Backprop(),
    ],
    ids=written,
)
@pytest.mark.parametrize("others", [{}, {"w": W}])
@pytest.mark.filterwarnings("ignore:step=")
def test_empty_leaves_have_empty_gradients(estimator, others, key):
    params = {"empty": jnp.zeros((0, 3)), **others}
    loss = lambda p: sum(jnp.sum(x**2) for x in p.values())
    value, grads = jax.jit(pg.value_and_grad(loss, estimator))(key, params)
    assert grads["empty"].shape == (0, 3)
    assert np.isfinite(value)
    if others:
        assert np.isfinite(grads["w"]).all()
