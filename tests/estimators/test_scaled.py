"""Scaled tangents: identities, unbiasedness, second moments, and what the scales learn."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import site_models
from jax import lax

import prograde as pg
from prograde._structured import is_structured, stretch
from prograde.estimators.scaled import ScaleState
from prograde.testing import assert_mean, assert_unbiased, required_samples

SCALES = {
    "w": np.asarray([[0.5], [1.0], [3.0]], np.float32),
    "b": np.linspace(0.5, 2, 8, dtype=np.float32),
    "out": 0.25,
}


def problem(key):
    params, losses, args = site_models.relu_mlp(key)
    loss = lambda p, *args: losses(p, *args).mean()
    return params, loss, args, jax.jit(jax.grad(loss))(params, *args)


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]).astype(np.float64)


def flat_scales(params, scales=None):
    scales = SCALES if scales is None else scales
    return flat({name: np.broadcast_to(scales[name], w.shape) for name, w in params.items()})


@pytest.mark.parametrize(
    "inner",
    [pg.ForwardJacobian(), pg.Backprop()],
    ids=repr,
)
@pytest.mark.parametrize("precondition", [False, True])
def test_all_derivatives_give_reverse_mode_and_its_multiple(inner, precondition, key):
    params, loss, args, gradient = problem(key)
    estimator = pg.Scaled(inner, SCALES, precondition)
    value, grads = jax.jit(pg.value_and_grad(loss, estimator))(key, params, *args)
    factor = flat_scales(params) ** 2 if precondition else 1
    np.testing.assert_allclose(flat(grads), factor * flat(gradient), rtol=2e-5, atol=1e-5)
    assert value == jax.jit(loss)(params, *args)


@pytest.mark.parametrize(
    "inner",
    [
        pg.WeightPerturbation(num_tangents=3, chunk=2),
        pg.WeightPerturbation(pg.Normal(), num_groups=2),
        pg.CentralDifference(step=0.1),
        pg.Guided("momentum", num_tangents=2),
    ],
    ids=repr,
)
def test_scales_of_one_are_the_estimator_inside_bit_for_bit(inner, key):
    params, loss, args, _ = problem(key)
    state = inner.init(loss, params, *args)
    plain, scaled = (
        jax.jit(lambda k, p, s, e=e: e.estimate(loss, k, s, p, *args))(key, params, state)
        for e in (inner, pg.Scaled(inner, 1.0))
    )
    assert jax.tree.structure(plain) == jax.tree.structure(scaled)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(scaled), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("distribution", [pg.LowRank(1), pg.LowRank(2, pg.Normal())], ids=repr)
@pytest.mark.parametrize(("precondition", "chunk"), [(False, 2), (True, None)])
def test_against_numpy(distribution, precondition, chunk, key):
    """v_k = c eps_k; d_k = grad . v_k; g = mean d_k v_k / c^2, or without the division."""
    params, loss, args, gradient = problem(key)
    c, k, gradient = flat_scales(params), 3, flat(gradient)
    expected, slopes = np.zeros(len(c)), []
    for i in range(k):
        tangent = distribution.sample(key, params, i, k)
        dense = jax.tree.map(
            lambda v: v.dense() if is_structured(v) else v, tangent, is_leaf=is_structured
        )
        v = c * flat(dense)
        slopes.append(gradient @ v)
        expected += slopes[-1] * (v if precondition else v / c**2) / k
    estimator = pg.Scaled(pg.WeightPerturbation(distribution, k, chunk), SCALES, precondition)
    found = jax.jit(lambda k, p: estimator.estimate(loss, k, None, p, *args))(key, params)
    np.testing.assert_allclose(found.directional, slopes, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        flat(found.grads), expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max()
    )


def test_a_central_difference_has_its_step_in_units_of_the_scale(key):
    """(h^2 / 6) E[D^3 f(v, v, v) v] / c^2 of f = sum a x^3 along all v = c sqrt(n) e_i is h^2 c_i^2
    n a_i."""
    a, x, c, h = (
        jnp.asarray([1.0, -2.0, 0.5]),
        jnp.asarray([0.3, 0.2, -1.0]),
        np.asarray([0.5, 1.0, 2.0]),
        0.25,
    )
    estimator = pg.Scaled(pg.CentralDifference(pg.Basis(), 3, step=h), c)
    grads = estimator.estimate(lambda x: jnp.sum(a * x**3), key, None, x).grads
    np.testing.assert_allclose(grads, 3 * a * x**2 + h**2 * c**2 * 3 * a, rtol=1e-4)


ROW, COLUMN = np.arange(1.0, 31.0)[:, None], np.arange(1.0, 21.0)


@pytest.mark.parametrize(
    ("c", "kept"),
    [(2.0, True), (ROW, True), (COLUMN, True), (ROW * COLUMN, False)],
    ids=["leaf", "row", "column", "entry"],
)
@pytest.mark.parametrize("distribution", [pg.LowRank(1), pg.LowRank(2)], ids=repr)
def test_low_rank_tangents_stay_so_unless_every_entry_has_a_scale(c, kept, distribution, key):
    loss = lambda p, x: jnp.mean(jnp.tanh(x @ p["w"]))
    params, x = (
        {"w": jax.random.normal(key, (30, 20))},
        jax.random.normal(jax.random.fold_in(key, 1), (64, 30)),
    )
    plain, scaled = (
        pg.WeightPerturbation(distribution, 3),
        pg.Scaled(pg.WeightPerturbation(distribution, 3), {"w": c}),
    )
    report = pg.check(loss, params, x, estimator=scaled, memory=False)
    assert [f.primitive for _, f in report.dense] == ([] if kept else ["stretch"])
    if kept:  # a multiplication of the factors, and of the gradient
        assert (
            report.cost_ratio
            < 1.02 * pg.check(loss, params, x, estimator=plain, memory=False).cost_ratio
        )
    tangent = distribution.sample(key, params)["w"].dense()
    v = jnp.asarray(c) * tangent
    expected = jax.jvp(lambda w: loss({"w": w}, x), (params["w"],), (v,))[1]
    one = pg.Scaled(pg.WeightPerturbation(distribution), {"w": c}).estimate(
        loss, key, None, params, x
    )
    np.testing.assert_allclose(one.directional[0], expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(
        one.grads["w"], expected * v / np.asarray(c) ** 2, rtol=1e-4, atol=1e-6
    )


def test_convolutions_and_stacked_layers_keep_factors_too(key):
    params = {"kernel": jnp.ones((3, 3, 4, 8)), "stack": jnp.ones((5, 8, 8))}

    def loss(p, x):
        x = lax.conv_general_dilated(
            x, p["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jnp.mean(lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["stack"])[0])

    estimator = pg.Scaled(
        scales={"kernel": np.arange(1.0, 9.0), "stack": np.arange(1.0, 6.0)[:, None, None]}
    )
    assert not pg.check(
        loss, params, jnp.ones((2, 6, 6, 4)), estimator=estimator, memory=False
    ).dense


def test_stretch_is_the_line_through_the_parameters(key):
    u, about, c = jnp.arange(6.0).reshape(2, 3), jnp.ones((2, 3)), jnp.asarray([[2.0], [3.0]])
    expected = lambda u, about, c: about + c * (u - about)
    np.testing.assert_allclose(stretch(u, about, c), expected(u, about, c))
    tangents = (jnp.ones((2, 3)), jnp.full((2, 3), 0.5), jnp.asarray([[1.0], [-1.0]]))
    for a, b in zip(
        jax.jvp(stretch, (u, about, c), tangents),
        jax.jvp(expected, (u, about, c), tangents),
        strict=True,
    ):
        np.testing.assert_allclose(a, b)
    for axes in ((0, None, None), (None, 0, None), (None, None, 0), (1, 0, 0)):
        args = [
            x if a is None else jnp.stack([x, 2 * x], a)
            for x, a in zip((u, about, c), axes, strict=True)
        ]
        batched = [jax.jit(jax.vmap(f, axes))(*args) for f in (stretch, expected)]
        np.testing.assert_allclose(*batched)
    # no arithmetic touches the parameters where they are the point itself
    w = jax.random.normal(key, (7,))
    np.testing.assert_array_equal(jax.jit(lambda w: stretch(w, w, jnp.asarray([0.3])))(w), w)
    jaxpr = jax.make_jaxpr(lambda w, v: jax.jvp(lambda u: stretch(u, w, jnp.ones(1)), (w,), (v,)))(
        w, w
    )
    assert "stretch" not in str(jaxpr)


LEARNED = [("gradient", False), ("curvature", False), ("curvature", True)]


def test_unbiased(key):
    """With scales from the data at hand, which are no function of the tangents."""
    params, loss, args, _ = problem(key)
    scales = lambda p, x, y: {"w": jnp.mean(jnp.abs(x), 0)[:, None], "b": 1.0, "out": 2.0}
    assert_unbiased(
        pg.Scaled(scales=scales), loss, jax.random.fold_in(key, 1), params, *args, effect=0.1
    )


@pytest.mark.parametrize("mode", ["gradient", "curvature"])
def test_unbiased_whatever_was_learned(mode, key):
    params, loss, args, _ = problem(key)
    bends = jnp.asarray([2.0, 1.0, 30.0]) if mode == "curvature" else None
    state = ScaleState(None, jnp.asarray([1.0, 40.0, 0.5]), bends, jnp.asarray(7), jnp.asarray(21))
    assert_unbiased(
        pg.Scaled(scales=mode),
        loss,
        jax.random.fold_in(key, 1),
        params,
        *args,
        state=state,
        effect=0.1,
    )


def test_the_scales_of_a_step_are_those_of_the_state_before_it(key):
    """The same state gives the same scales with every key, so that they are independent of the
    tangents of the step."""
    params, loss, args, _ = problem(key)
    estimator = pg.Scaled(scales="curvature", every=1)
    state = ScaleState(
        None, jnp.ones(3), jnp.asarray([1.0, 2.0, 40.0]), jnp.asarray(3), jnp.asarray(3)
    )
    expected = np.asarray(estimator._learned(state, params)["w"]).item()
    assert expected != 1
    fixed = pg.Scaled(
        scales={name: float(c.reshape(())) for name, c in estimator._learned(state, params).items()}
    )
    of_state = jax.jit(lambda k: estimator.estimate(loss, k, state, params, *args).grads)
    of_fixed = jax.jit(lambda k: fixed.estimate(loss, k, None, params, *args).grads)
    for k in jax.random.split(key, 3):
        np.testing.assert_allclose(flat(of_state(k)), flat(of_fixed(k)), rtol=1e-5, atol=1e-6)


def test_the_mean_of_preconditioned_estimates(key):
    """E g = c^2 grad f: the projection on it is 1. Notices 10 %."""
    params, loss, args, gradient = problem(key)
    target = flat_scales(params) ** 2 * flat(gradient)
    estimator = pg.Scaled(scales=SCALES, precondition=True)
    draw = jax.jit(jax.vmap(lambda k: estimator.estimate(loss, k, None, params, *args).grads))
    assert_mean(_sampled(draw, key, lambda g: g @ target / (target @ target), 0.1), 1.0, effect=0.1)


def _sampled(draw, key, figure, effect):
    """As many figures of estimates as an error of the mean needs to be noticed; the spread is that
    of a first 2000."""
    of = lambda keys: figure(
        np.concatenate([np.reshape(g, (len(keys), -1)) for g in jax.tree.leaves(draw(keys))], 1)
    )
    pilot = of(jax.random.split(jax.random.fold_in(key, 0), 2000))
    needed = required_samples(1.2 * float(pilot.std()), effect)
    batches = jax.random.split(jax.random.fold_in(key, 1), (-(-needed // 10_000), 10_000))
    return np.concatenate([of(keys) for keys in batches])


@pytest.mark.parametrize(
    ("distribution", "excess"), [(pg.LowRank(1), 0), (pg.Normal(), 2)], ids=repr
)
@pytest.mark.parametrize("precondition", [False, True])
def test_second_moment(distribution, excess, precondition, key):
    """sum c^-2 sum c^2 grad^2 (+ 2 |grad|^2), or sum c^2 sum c^2 grad^2 (+ 2 sum c^4 grad^2).
    Notices 10 %."""
    w = jnp.asarray(np.linspace(-1, 2, 24).reshape(4, 6), jnp.float32)
    c = np.asarray([[0.5], [0.8], [1.0], [1.5]])
    squares, gradient = np.broadcast_to(c**2, w.shape), np.asarray(w, np.float64)
    power = squares if precondition else 1 / squares
    expected = (
        power.sum() * (squares * gradient**2).sum() + excess * (power * squares * gradient**2).sum()
    )
    estimator = pg.Scaled(pg.WeightPerturbation(distribution), c, precondition)
    draw = jax.jit(
        jax.vmap(lambda k: estimator.estimate(lambda w: jnp.sum(w**2) / 2, k, None, w).grads)
    )
    assert_mean(_sampled(draw, key, lambda g: (g**2).sum(1) / expected, 0.1), 1.0, effect=0.1)


# f = sum_s sum over its entries of bend_s (w - start_s)^2 / 2, whose blocks have known gradients
# and curvatures
BENDS, STARTS, SIZES = (
    {"a": 0.5, "b": 8.0, "c": 2.0},
    {"a": 4.0, "b": 0.1, "c": -8.0},
    {"a": (8, 8), "b": (3,), "c": (20,)},
)


def bowl(params):
    return sum(
        bend * jnp.sum((params[name] - STARTS[name]) ** 2) / 2 for name, bend in BENDS.items()
    )


def optimum(mode, precondition):
    sizes = np.asarray([np.prod(SIZES[name]) for name in BENDS])
    bends, starts = (np.asarray(list(x.values())) for x in (BENDS, STARTS))
    gradients = np.sqrt(sizes) * bends * np.abs(starts)  # |g_s| at 0
    squares = np.sqrt(sizes * (bends if mode == "curvature" else 1)) / gradients
    c = (
        1 / np.sqrt(sizes.sum() * bends)
        if precondition
        else np.sqrt(squares * sizes.sum() / (sizes @ squares))
    )
    return c, sizes, gradients, bends


@pytest.mark.parametrize(("mode", "precondition"), LEARNED)
def test_scales_converge_to_the_optimum(mode, precondition, key):
    params = {name: jnp.zeros(shape) for name, shape in SIZES.items()}
    estimator = pg.Scaled(scales=mode, precondition=precondition, every=1, decay=0.998)
    state = estimator.init(bowl, params)
    state = lax.scan(
        lambda s, k: (estimator.estimate(bowl, k, s, params).state, 0),
        state,
        jax.random.split(key, 3000),
    )[0]
    learned = flat(estimator._learned(state, params))
    expected, sizes, gradients, bends = optimum(mode, precondition)
    # (grad f . v)^2 has a relative deviation of at most sqrt(2), which 500 probes make 6 %, and a
    # fourth root 1.6 %
    np.testing.assert_allclose(learned, expected, rtol=0.1)
    weights = {"gradient": sizes, "curvature": sizes * bends}[mode]
    criterion = lambda c: (weights / c**2).sum() * (c**2 * gradients**2).sum()
    if not precondition:
        assert criterion(learned) < 1.02 * (np.sqrt(weights) @ gradients) ** 2
        assert criterion(np.ones(3)) > 1.2 * (np.sqrt(weights) @ gradients) ** 2


@pytest.mark.parametrize("limit", [1.0, 10.0])
def test_the_rate_of_a_preconditioned_step_is_in_units_of_the_curvature(limit, key):
    """f(w - r g) - f(w) = (r^2 / 2 - r) (grad f . v)^2 for every draw, where the Hessian is
    diagonal; no step before that is known."""
    params = {name: jnp.zeros(shape) for name, shape in SIZES.items()}
    estimator = pg.Scaled(scales="curvature", precondition=True, limit=limit)
    state = estimator.init(bowl, params)
    step = jax.jit(lambda k, s: estimator.estimate(bowl, k, s, params))
    for k in jax.random.split(key, 3):
        found = step(k, state)
        assert not flat(found.grads).any()
        state = found.state
    for rate, k in zip(
        (0.5, 1.0, 2.0), jax.random.split(jax.random.fold_in(key, 1), 3), strict=True
    ):
        found = step(k, state)
        after = bowl(jax.tree.map(lambda w, g, rate=rate: w - rate * g, params, found.grads))
        change, square = float(after - found.value), float(found.directional[0]) ** 2
        assert change == pytest.approx((rate**2 / 2 - rate) * square, rel=1e-3, abs=1e-3 * square)


@pytest.mark.parametrize(("mode", "precondition"), LEARNED)
def test_probes_are_due_on_the_first_steps_and_then_every_so_often(mode, precondition, key):
    params = {name: jnp.zeros(shape) for name, shape in SIZES.items()}
    estimator = pg.Scaled(scales=mode, precondition=precondition, every=4, decay=0.5)
    state, probes, slopes = estimator.init(bowl, params), [], []
    step = jax.jit(lambda k, s: estimator.estimate(bowl, k, s, params).state)
    for k in jax.random.split(key, 10):
        state = step(k, state)
        probes.append(int(state.probes))
        slopes.append(np.asarray(state.slopes))
    assert probes == [1, 2, 3, 3, 4, 4, 4, 4, 5, 5]
    changed = [np.flatnonzero(a != b).tolist() for a, b in itertools.pairwise(slopes)]
    due = [[1], [2], [], [0], [], [], [], [1], []]  # what is found again may be what was known
    assert all(set(a) <= set(b) for a, b in zip(changed, due, strict=True))
    if state.bends is not None:  # signs see the trace of a diagonal Hessian without error
        np.testing.assert_allclose(state.bends, [32, 24, 40], rtol=1e-5)


def test_no_scale_runs_away(key):
    """A leaf without gradient or curvature is held by the limit, and leaves those of the others as
    they are."""
    params = {name: jnp.zeros(shape) for name, shape in SIZES.items()}
    state = ScaleState(
        None,
        jnp.asarray([1e4, 0.0, 400.0]),
        jnp.asarray([32.0, 0.0, -40.0]),
        jnp.asarray(3),
        jnp.asarray(3),
    )
    for mode, precondition in LEARNED:
        held = state if mode == "curvature" else eqx.tree_at(lambda s: s.bends, state, None)
        c = flat(
            pg.Scaled(scales=mode, precondition=precondition, limit=4.0)._learned(held, params)
        )
        assert np.isfinite(c).all()
        assert c.max() / c.min() <= 16 * 1.001
        if not precondition:
            sizes = np.asarray([64, 3, 20])
            np.testing.assert_allclose((sizes * c**2).sum(), sizes.sum(), rtol=1e-5)
    nothing = ScaleState(None, jnp.zeros(3), None, jnp.asarray(3), jnp.asarray(3))
    assert np.isfinite(flat(pg.Scaled(scales="gradient")._learned(nothing, params))).all()


def test_the_state_of_the_estimator_inside_is_carried(key):
    params, loss, args, _ = problem(key)
    inner = pg.Guided("previous")
    estimator = pg.Scaled(inner, "gradient")
    step = jax.jit(lambda k, s: estimator.estimate(loss, k, s, params, *args), donate_argnums=1)
    found = step(key, estimator.init(loss, params, *args))
    for a, b in zip(jax.tree.leaves(found.state.inner), jax.tree.leaves(found.grads), strict=True):
        np.testing.assert_array_equal(a, b)  # the scales are 1 before all leaves were probed
    assert int(step(key, found.state).state.step) == 2
    with pytest.raises(TypeError, match="learns from step to step"):
        pg.value_and_grad(loss, estimator)(key, params, *args)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nothing_is_promoted(dtype, key, strict):
    params = {"w": jnp.ones((8, 8), dtype), "b": jnp.ones(8, dtype)}
    loss = lambda p, x: jnp.mean(jnp.square(jnp.tanh(x @ p["w"]) @ p["b"]))
    for scales, precondition in [
        (2.0, False),
        ({"w": np.full((8, 1), 2.0), "b": 3.0}, True),
        *LEARNED,
    ]:
        estimator = pg.Scaled(scales=scales, precondition=precondition)
        state = estimator.init(loss, params, jnp.ones((4, 8), dtype))
        step = lambda k, s, e=estimator: e.estimate(loss, k, s, params, jnp.ones((4, 8), dtype))
        found = jax.eval_shape(step, key, state)
        assert {g.dtype for g in jax.tree.leaves(found.grads)} == {jnp.dtype(dtype)}
        assert jax.tree.map(jnp.shape, found.state) == jax.tree.map(jnp.shape, state)


def test_other_leaves_pass_and_prefixes_are_taken():
    params = {
        "block": {"w": jnp.ones((3, 2)), "b": np.ones(2, np.float32)},
        "count": 3,
        "name": "x",
    }
    loss = lambda p: jnp.sum(p["block"]["w"] ** 2) + p["count"] * jnp.sum(p["block"]["b"] ** 2)
    scales = {"block": 2.0, "count": None, "name": None}
    for given in (scales, 2.0):
        grad_fn = eqx.filter_jit(
            pg.value_and_grad(loss, pg.Scaled(pg.ForwardJacobian(), given, True))
        )
        _, grads = grad_fn(None, params)
        assert grads["count"] is None
        np.testing.assert_allclose(grads["block"]["w"], 8 * np.ones((3, 2)))
        np.testing.assert_allclose(grads["block"]["b"], 24 * np.ones(2))


def test_compared_and_hashed_by_their_values():
    a, b = (pg.Scaled(scales={"w": np.asarray([1.0, 2.0]), "b": 3.0}) for _ in range(2))
    assert a == b
    assert hash(a) == hash(b)
    assert a != pg.Scaled(scales={"w": np.asarray([1.0, 2.5]), "b": 3.0})
    assert a != pg.Scaled(a.estimator, a.scales, precondition=True)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"estimator": pg.ActivityPerturbation()}, TypeError, "perturbs weights"),
        ({"estimator": "weight"}, TypeError, "estimator='weight'"),
        ({"scales": "variance"}, ValueError, "scales='variance'.*'gradient', 'curvature'"),
        ({"scales": 0.0}, ValueError, "scales=0.0.*positive finite"),
        ({"scales": {"w": np.asarray([1.0, -1.0])}}, ValueError, r"scales\['w'\].*positive finite"),
        ({"scales": [np.inf]}, ValueError, "positive finite"),
        ({"scales": {"w": "large"}}, TypeError, r"scales\['w'\]='large'"),
        (
            {"scales": "gradient", "precondition": True},
            ValueError,
            "only one leaf is perturbed",
        ),
        ({"precondition": 1}, ValueError, "precondition=1"),
        ({"every": 0}, ValueError, "every=0"),
        ({"decay": 1.0}, ValueError, "decay=1.0"),
        ({"limit": 0.5}, ValueError, "limit=0.5"),
    ],
)
def test_bad_arguments_are_named(arguments, error, words):
    with pytest.raises(error, match=words):
        pg.Scaled(**arguments)


def test_scales_and_states_that_do_not_fit_are_refused(key):
    params, loss, args, _ = problem(key)
    grads = lambda scales: jax.eval_shape(
        pg.value_and_grad(loss, pg.Scaled(scales=scales)), key, params, *args
    )
    with pytest.raises(ValueError, match=r"scales has the structure"):
        grads({"w": 1.0, "b": 2.0})
    with pytest.raises(ValueError, match=r"scale of params\['w'\] has shape \(3,\).*\(3, 8\)"):
        grads({"w": np.ones(3), "b": 1.0, "out": 1.0})
    with pytest.raises(ValueError, match="positive finite"):
        grads(lambda p, *args: {"w": np.zeros(()), "b": 1.0, "out": 1.0})
    learned = pg.Scaled(scales="curvature")
    for state in (None, pg.Scaled(scales="gradient").init(loss, params, *args)):
        with pytest.raises(ValueError, match=r"estimator\.init"):
            learned.estimate(loss, key, state, params, *args)


def test_probes_average_plainly_first_and_then_with_the_decay(key):
    """v^T H v of a bowl of curvature b is n b: the averages are those of a list, worked out
    here."""
    estimator = pg.Scaled(scales="curvature", every=2, decay=0.75)
    params = {"a": jnp.ones(3), "b": jnp.ones((2, 2))}
    loss = lambda p, bend: bend * (jnp.sum(p["a"] ** 2) + 2 * jnp.sum(p["b"] ** 2)) / 2
    state = estimator.init(loss, params, jnp.ones(()))
    step = jax.jit(lambda k, s, bend: estimator.estimate(loss, k, s, params, bend).state)
    bends = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 3.0, 5.0, 7.0, 9.0, 11.0, 13.0]
    found = [np.asarray(state.bends)]
    for i, bend in enumerate(bends):
        state = step(jax.random.fold_in(key, i), state, jnp.asarray(bend))
        found.append(np.asarray(state.bends))
    # both leaves on the first two steps, then one on every second step, in turn
    expected = np.zeros((13, 2))
    average, count, at = [0.0, 0.0], [0, 0], 0
    for i, bend in enumerate(bends):
        if i < 2 or i % 2 == 0:
            rate = max(1 / (count[at] + 1), 0.25)
            average[at] += rate * (bend * (3, 8)[at] - average[at])
            count[at] += 1
            at = 1 - at
        expected[i + 1] = average
    assert count == [4, 3]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
