"""Estimators that perturb pre-activations: first exactly, then in the mean."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import site_models
from jax import lax

import prograde as pg
from prograde._sites import collect, sites, with_cotangents
from prograde.testing import assert_mean, assert_unbiased


def flat(tree):
    return jnp.concatenate([x.reshape(-1) for x in jax.tree.leaves(tree)])


def true_gradient(losses, params, args):
    return eqx.filter_jit(eqx.filter_grad(lambda p: jnp.mean(losses(p, *args))))(params)


def exact_cotangents(estimator, program, floats, key, batch):
    """Every site's exact cotangent.

    Directional derivatives are linear in the noise, so that enough of them determine it.
    """

    def sample(key):
        run = estimator.perturbed_run(program, floats, key)
        parts = []
        for site in sites(run.records):
            noise = jnp.moveaxis(site.perturbation, site.depth, 0)[0]
            if site.axis is None:
                noise = jnp.broadcast_to(noise, (batch, *noise.shape))
            else:
                noise = jnp.moveaxis(noise, site.depth + site.axis, 0)
            parts.append(noise.reshape(batch, -1))
        return jnp.concatenate(parts, axis=1), run.directional[0][0]

    run = eqx.filter_jit(estimator.perturbed_run)(program, floats, key)
    units = jax.eval_shape(sample, key)[0].shape[1]
    noise, directional = jax.jit(jax.vmap(sample))(jax.random.split(key, 2 * units + 20))
    noise, directional = np.asarray(noise, np.float64), np.asarray(directional, np.float64)
    solved = np.stack(
        [np.linalg.lstsq(noise[:, i], directional[:, i], rcond=1e-9)[0] for i in range(batch)]
    )
    cotangents, start = [], 0
    for site in sites(run.records):
        shape = site.perturbation.shape[: site.depth] + site.perturbation.shape[site.depth + 1 :]
        whole = site.axis is None
        size = int(np.prod(shape)) // (1 if whole else batch)
        part = solved[:, start : start + size] / batch
        start += size
        if whole:
            cotangents.append(part.sum(0).reshape(shape))
            continue
        at = site.depth + site.axis
        rest = shape[:at] + shape[at + 1 :]
        cotangents.append(np.moveaxis(part.reshape(batch, *rest), 0, at))
    return run.records, [jnp.asarray(c, jnp.float32) for c in cotangents]


@pytest.mark.parametrize("model", site_models.ALL, ids=lambda m: m.__name__)
def test_exact_cotangents_at_the_sites_give_the_gradient_of_reverse_mode(model, key):
    params, losses, args = model(key)
    estimator = pg.ActivityPerturbation()
    program, floats = estimator.program(losses, params, args, False)
    records, cotangents = exact_cotangents(estimator, program, floats, key, program.batch)
    of_sites = lambda r, c: collect(with_cotangents(r, c), jax.tree.leaves(floats))
    grads = eqx.filter_jit(of_sites)(records, cotangents)
    for got, want in zip(grads, jax.tree.leaves(true_gradient(losses, params, args)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (site_models.relu_mlp, [(4, 8), (4, 2)]),
        (site_models.jitted_softmax, [(3, 6), (6, 5)]),
        (site_models.scanned_layers, [(4, 4), (3, 4, 4), (4, 2)]),
        (site_models.recurrent, [(3, 4, 6), (4, 1)]),
        (site_models.convolution, [(5, 3, 3, 3), (5, 2)]),
        (site_models.equinox_mlp, [(4, 4), (4, 4), (4, 2)]),
        # where examples share an axis it is cut into [outer, batch, inner]
        (site_models.merged_axes, [(1, 3, 2, 3), (1, 3, 2, 4), (2, 3, 1, 2)]),
        (site_models.embedded_by_hand, [(3, 2, 3), (3, 2, 2)]),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_a_product_and_its_bias_are_one_site(model, expected, key):
    params, losses, args = model(key)
    estimator = pg.ActivityPerturbation()
    program, floats = estimator.program(losses, params, args, False)
    found = sites(estimator.shapes(program, floats))
    assert all(site.axis is not None for site in found)
    shapes = [site.perturbation.shape for site in found]
    assert [sorted(shape) for shape in shapes] == [sorted(shape) for shape in expected]


@pytest.mark.parametrize("head", ["perturbed", "exact"])
@pytest.mark.parametrize(
    "model",
    [site_models.relu_mlp, site_models.recurrent, site_models.used_otherwise],
    ids=lambda m: m.__name__,
)
def test_activity_perturbation_is_unbiased(model, head, key):
    """Notices 5 % in the projection on the gradient."""
    if head == "exact" and model is site_models.used_otherwise:
        pytest.skip("its last site is a weight")
    params, losses, args = model(key)
    assert_unbiased(pg.ActivityPerturbation(head=head), losses, key, params, *args, effect=0.05)


def test_the_exact_head_has_the_gradient_of_reverse_mode_and_lowers_the_variance(key):
    params, losses, args = site_models.relu_mlp(key)
    gradient = true_gradient(losses, params, args)
    keys = jax.random.split(key, 4000)
    second = {}
    for head in ("perturbed", "exact"):
        estimator = pg.ActivityPerturbation(head=head)
        grads = jax.jit(
            jax.vmap(lambda k, e=estimator: e.estimate(losses, k, None, params, *args).grads)
        )(keys)
        second[head] = float(
            jnp.mean(sum(jnp.sum(g**2, axis=range(1, g.ndim)) for g in (grads["w"], grads["b"])))
        )
        if head == "exact":
            np.testing.assert_allclose(grads["out"][0], gradient["out"], rtol=1e-5)
    assert second["exact"] < 0.9 * second["perturbed"]


def test_units_that_are_not_active_are_not_perturbed(key):
    params, losses, args = site_models.relu_mlp(key)
    estimator = pg.ActivityPerturbation()
    program, floats = estimator.program(losses, params, args, False)
    hidden = sites(estimator.perturbed_run(program, floats, key).records)[0]
    active = args[0] @ params["w"] + params["b"] > 0
    assert bool(jnp.array_equal(hidden.perturbation[0] != 0, active))
    assert 0 < active.sum() < active.size


def test_second_moment_is_the_number_of_perturbed_units(key):
    """E |delta_i|^2 = U |grad_z loss_i|^2 for signs, for a single layer without a nonlinearity.

    Notices 5 %.
    """
    w, x = jax.random.normal(jax.random.fold_in(key, 1), (3, 7)), jnp.eye(3)

    def losses(w, x):
        return jnp.sum(jnp.sin(x @ w), axis=-1)

    estimator = pg.ActivityPerturbation()
    grads = jax.jit(jax.vmap(lambda k: estimator.estimate(losses, k, None, w, x).grads))(
        jax.random.split(key, 20_000)
    )
    exact = jax.grad(lambda w: losses(w, x).mean())(w)
    moments = jnp.sum(grads**2, axis=-1) / (
        7 * jnp.sum(exact**2, axis=-1)
    )  # the rows of w are those of one example each
    assert_mean(moments, 1.0, effect=0.1)


def test_several_tangents_are_averaged(key):
    """K tangents: the mean of what each says.

    With the noise and derivatives that the estimate itself reports.
    """
    params, losses, args = site_models.scanned_layers(key)
    estimator = pg.ActivityPerturbation(num_tangents=5)
    program, floats = estimator.program(losses, params, args, False)
    run = estimator.perturbed_run(program, floats, key)
    assert run.directional[0].shape == (5, 4)
    for k in range(
        5
    ):  # each tangent is what a single run along its noise gives: the derivative is linear in it
        site = sites(run.records)[1]
        assert site.perturbation.shape == (3, 5, 4, 4)
        assert not bool(jnp.array_equal(site.perturbation[:, k], site.perturbation[:, (k + 1) % 5]))
    gradient = np.asarray(flat(true_gradient(losses, params, args)))
    samples = jax.jit(
        jax.vmap(lambda k: flat(estimator.estimate(losses, k, None, params, *args).grads))
    )
    keys = jax.random.split(jax.random.fold_in(key, 1), 4000)
    samples = np.asarray(samples(keys))
    single = jax.jit(
        jax.vmap(
            lambda k: flat(pg.ActivityPerturbation().estimate(losses, k, None, params, *args).grads)
        )
    )
    variance = np.asarray(single(jnp.copy(keys))).var(axis=0).sum()
    np.testing.assert_allclose(samples.var(axis=0).sum() * 5 / variance, 1, atol=0.15)
    assert_mean(samples @ gradient / (gradient @ gradient), 1.0, effect=0.15)


def test_the_whole_batch_as_one_example_is_unbiased_too(key):
    params, losses, args = site_models.relu_mlp(key)
    mean_loss = lambda *a: jnp.mean(losses(*a))
    assert_unbiased(
        pg.ActivityPerturbation(per_example=False), mean_loss, key, params, *args, effect=0.1
    )


def batch_normalised(params, x):
    h = x @ params["w"]
    h = (h - h.mean(axis=0)) / jnp.sqrt(h.var(axis=0) + 1e-3)
    return jnp.sum(jnp.square(jnp.tanh(h) @ params["out"]), axis=-1)


def test_examples_that_depend_on_each_other_are_refused_and_weighed_together_unbiased(key):
    params, _, (x, _) = site_models.relu_mlp(key)
    with pytest.raises(
        ValueError, match=r"examples depend on each other.*test_sites.py.*per_example=False"
    ):
        pg.value_and_grad(batch_normalised, pg.ActivityPerturbation())(key, params, x)
    assert_unbiased(
        pg.ActivityPerturbation(per_example=False),
        batch_normalised,
        jax.random.fold_in(key, 1),
        params,
        x,
        effect=0.1,
    )


DATA = jnp.arange(12.0).reshape(4, 3)


@jax.custom_jvp
def mean_free(h):
    return jnp.tanh(h)


mean_free.defjvp(lambda p, t: (jnp.tanh(p[0]), t[0] - t[0].mean(axis=0)))


@pytest.mark.parametrize(
    "mix",
    [
        lambda h: h[::-1],
        lambda h: jnp.cumsum(h, axis=0),
        lambda h: jnp.roll(h, 1, axis=0),
        lambda h: h[(jnp.arange(len(h)) + 1) % len(h)],
        lambda h: jnp.take(h, jnp.argsort(h[:, 0]), axis=0),
        lambda h: h @ (h.T @ h),
        lambda h: jax.nn.softmax(h @ h.T) @ h,
        lambda h: jnp.sort(h, axis=0),
        lambda h: h - h.reshape(-1).mean(),
        lambda h: lax.scan(lambda c, row: (c + row, c), jnp.zeros(8), h)[1],
        lambda h: jax.nn.softmax(DATA @ DATA.T) @ h,
        lambda h: jax.nn.one_hot(jnp.array([1, 0, 2, 3]), 4) @ h,
        lambda h: jnp.zeros_like(h).at[jnp.arange(len(h))[::-1]].add(h),
        lambda h: jax.ops.segment_sum(h, jnp.arange(len(h)) // 2, num_segments=len(h)),
        lambda h: h[jnp.arange(-1, len(h) - 1)],
        lambda h: h + h[jnp.zeros(len(h), int)],
        lambda h: lax.top_k(h.T, len(h))[0].T,
        lambda h: jnp.fft.fft(h, axis=0).real,
        lambda h: lax.conv_general_dilated(h.T[None], jnp.ones((8, 8, 3)), (1,), "SAME")[0].T,
        lambda h: lax.pad(h, 0.0, [(1, -1, 0), (0, 0, 0)]),
        lambda h: jnp.linalg.solve(jnp.eye(len(h)) + 1.0, h),
        lambda h: h - jnp.repeat(h.reshape(-1, 2, 8).mean(1), 2, axis=0),
        lambda h: jnp.tanh(h.reshape(-1, 16) @ jnp.ones((16, 16))).reshape(-1, 8),
        lambda h: h.reshape(8, -1).T,
        lambda h: lax.scan(lambda c, r: (c + r, c + r), jnp.zeros(()), h.reshape(-1))[1].reshape(
            h.shape
        ),
        lambda h: lax.scan(lambda c, r: (c + r, c + r), jnp.zeros((2, 8)), h.reshape(-1, 2, 8))[
            1
        ].reshape(h.shape),
        lambda h: mean_free(h),
    ],
)
def test_operations_that_join_examples_are_refused(mix, key):
    params, _, (x, _) = site_models.relu_mlp(key)
    with pytest.raises(
        ValueError,
        match=r"examples depend on each other|a second time with 8 examples|something else",
    ):
        pg.value_and_grad(
            lambda p, x: jnp.sum(mix(x @ p["w"]), axis=-1), pg.ActivityPerturbation()
        )(key, params, x)


@pytest.mark.parametrize(
    "mix",
    [
        lambda h: jnp.roll(h, 1, axis=0),
        lambda h: h[::-1],
        lambda h: jnp.repeat(h[: len(h) // 2], 2, axis=0),
        lambda h: h - h.mean(axis=0),
        lambda h: jnp.moveaxis(h.reshape(2, -1, 8), 0, 1).reshape(-1, 8),
    ],
)
def test_a_merged_axis_whose_examples_are_joined_is_no_site_of_examples(mix, key):
    """Then the weight is perturbed itself, and the estimate stays unbiased.

    No position is credited with another's loss.
    """
    w = site_models.normal(jax.random.fold_in(key, 1), 3, 8)
    x = site_models.normal(jax.random.fold_in(key, 2), 4, 2, 3, scale=1)
    losses = lambda w, x: jnp.sum(mix(x.reshape(-1, 3) @ w).reshape(-1, 16) ** 2, axis=-1)
    report = pg.check(losses, w, x, estimator=pg.ActivityPerturbation(), memory=False)
    assert report.sites == ((("params",), (3, 8), False),)


def test_a_merged_axis_is_followed_in_either_order(key):
    w = site_models.normal(jax.random.fold_in(key, 1), 3, 8)
    x = site_models.normal(jax.random.fold_in(key, 2), 4, 2, 3, scale=1)
    outer = lambda w, x: jnp.sum(jnp.tanh(x.reshape(-1, 3) @ w).reshape(-1, 16), axis=-1)
    inner = lambda w, x: jnp.sum(
        jnp.tanh(jnp.moveaxis(x, 0, 1).reshape(-1, 3) @ w).reshape(2, -1, 8), axis=(0, 2)
    )
    for losses, shape in ((outer, (1, 4, 2, 8)), (inner, (2, 4, 1, 8))):
        report = pg.check(losses, w, x, estimator=pg.ActivityPerturbation(), memory=False)
        assert report.sites == ((("params",), shape, True),)


def test_printing_from_a_function_is_no_operation_on_examples(key, capsys):
    params, losses, (x, y) = site_models.relu_mlp(key)

    def talking(params, x, y):
        jax.debug.print("first {}", x[0, 0])
        return losses(params, x, y)

    found, plain = (
        pg.ActivityPerturbation().estimate(f, jax.random.clone(key), None, params, x, y)
        for f in (talking, losses)
    )
    np.testing.assert_array_equal(found.grads["w"], plain.grads["w"])


def centred(h):
    @jax.custom_jvp
    def rule(h):
        return jnp.tanh(h)

    rule.defjvp(lambda p, t: (jnp.tanh(p[0]), t[0] - t[0].mean(axis=-1, keepdims=True)))
    return rule(h)


@pytest.mark.parametrize(
    "apart",
    [
        lambda h, y: jnp.take_along_axis(jax.nn.log_softmax(h), y[:, None], axis=1)[:, 0],
        lambda h, y: jax.nn.log_softmax(h)[jnp.arange(len(h)), y],
        lambda h, y: jnp.where(h > 0, 1.0, 0.2).sum(-1) * jax.nn.logsumexp(h, axis=-1),
        lambda h, y: centred(h)[:, 0],
        lambda h, y: lax.map(lambda row: jnp.sin(row).sum(), h),
        lambda h, y: jax.vmap(lambda row, i: row[i] ** 2)(h, y),
        lambda h, y: jnp.sort(h, axis=-1)[:, 0] + jnp.cumsum(h, axis=1)[:, -1],
        lambda h, y: lax.fori_loop(0, 3, lambda i, c: jnp.sin(c) + h, h).sum(-1),
        lambda h, y: jnp.linalg.norm(h, axis=-1) + h.max(-1),
        lambda h, y: jnp.fft.rfft(h).real.sum(-1),
        lambda h, y: jnp.concatenate([h, h[:, ::-1]], axis=1).reshape(len(h), 2, -1).mean((1, 2)),
        lambda h, y: (
            jnp.tanh(jnp.repeat(h, 3, axis=0).reshape(-1, 8)).reshape(len(h), 3, 8).sum((1, 2))
        ),
        lambda h, y: lax.scan(lambda c, col: (jnp.sin(c) + col, c), h[:, 0], h.T)[0],
        lambda h, y: (
            jax.nn.one_hot(y, 8).T[0] * h[:, 0] + (h @ DATA[:, :1].repeat(2, axis=0))[:, 0]
        ),
    ],
)
def test_operations_that_keep_examples_apart_are_allowed_and_the_estimate_is_exact(apart, key):
    """With the whole basis of noise.

    What many directional derivatives determine is the gradient of reverse mode.
    """
    params, _, (x, _) = site_models.relu_mlp(key)
    w, y = params["w"], jnp.array([1, 5, 0, 3])
    losses = lambda w, x, y: apart(x @ w, y)
    estimator = pg.ActivityPerturbation()
    program, floats = estimator.program(losses, w, (x, y), False)
    records, cotangents = exact_cotangents(
        estimator, program, floats, jax.random.fold_in(key, 1), program.batch
    )
    (grads,) = collect(with_cotangents(records, cotangents), [w])
    np.testing.assert_allclose(grads, true_gradient(losses, w, (x, y)), rtol=2e-3, atol=1e-4)


def test_statistics_of_the_batch_in_auxiliary_output_join_nothing(key):
    params, losses, (x, y) = site_models.relu_mlp(key)

    def with_aux(params, x, y):
        return losses(params, x, y), {"mean": jnp.mean(x @ params["w"]), "name": "relu"}

    (value, aux), grads = pg.value_and_grad(with_aux, pg.ActivityPerturbation(), has_aux=True)(
        key, params, x, y
    )
    np.testing.assert_allclose(value, losses(params, x, y).mean(), rtol=1e-6)
    np.testing.assert_allclose(aux["mean"], jnp.mean(x @ params["w"]), rtol=1e-6)
    assert aux["name"] == "relu"
    assert jax.tree.structure(grads) == jax.tree.structure(params)


def test_a_scalar_loss_is_refused(key):
    params, losses, args = site_models.relu_mlp(key)
    with pytest.raises(
        ValueError, match=r"scalar loss, but ActivityPerturbation.*per_example=False"
    ):
        pg.value_and_grad(lambda *a: losses(*a).mean(), pg.ActivityPerturbation())(
            key, params, *args
        )


def test_a_batch_that_is_closed_over_is_refused(key):
    params, losses, args = site_models.relu_mlp(key)
    with pytest.raises(ValueError, match=r"instead of closing over it"):
        pg.value_and_grad(lambda p: losses(p, *args), pg.ActivityPerturbation())(key, params)


def test_an_exact_head_inside_a_loop_is_refused(key):
    def losses(params, x):
        return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params)[0].sum(-1)

    with pytest.raises(ValueError, match=r"head='exact'.*inside a loop.*head='perturbed'"):
        pg.value_and_grad(losses, pg.ActivityPerturbation(head="exact"))(
            key, jnp.ones((2, 3, 3)), jnp.ones((5, 3))
        )


def test_learned_feedback_learns_the_jacobian_of_a_linear_network(key):
    """There the Jacobian is the same for all examples.

    So that the biased estimate goes to the gradient.
    """
    k = jax.random.split(jax.random.fold_in(key, 1), 4)
    params = {
        "a": site_models.normal(k[0], 3, 6),
        "b": site_models.normal(k[1], 6, 6),
        "c": site_models.normal(k[2], 6, 2),
    }
    x = jax.random.normal(k[3], (16, 3))

    def losses(params, x):
        return jnp.sum(jnp.square(x @ params["a"] @ params["b"] @ params["c"] - 1), axis=-1)

    estimator = pg.LearnedFeedback(rate=0.3)
    state = estimator.init(losses, params, x)

    @jax.jit
    def many(state, key):
        step = lambda s, k: (estimator.estimate(losses, k, s, params, x).state, None)
        return lax.scan(step, state, jax.random.split(key, 800))[0]

    state = many(state, key)
    np.testing.assert_allclose(state.feedback[1], params["c"], atol=1e-4)
    np.testing.assert_allclose(state.feedback[0], params["b"] @ params["c"], atol=1e-4)
    step = eqx.filter_jit(estimator.estimate)
    grads = step(losses, jax.random.fold_in(key, 2), state, params, x).grads
    np.testing.assert_allclose(
        flat(grads), flat(true_gradient(losses, params, (x,))), rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize(
    "model",
    [site_models.relu_mlp, site_models.scanned_layers, site_models.convolution],
    ids=lambda m: m.__name__,
)
def test_feedback_as_a_control_variate_is_unbiased_whatever_it_holds(model, key):
    params, losses, args = model(key)
    estimator = pg.LearnedFeedback(use="control_variate")
    state = estimator.init(losses, params, *args)
    feedback = [
        jax.random.normal(jax.random.fold_in(key, i), s.shape) for i, s in enumerate(state.feedback)
    ]
    state = eqx.tree_at(lambda s: s.feedback, state, feedback)
    assert_unbiased(
        estimator, losses, jax.random.fold_in(key, 99), params, *args, state=state, effect=0.1
    )


def test_feedback_that_has_learned_lowers_the_variance_of_the_unbiased_estimate(key):
    params, losses, args = site_models.relu_mlp(key)
    args = tuple(jnp.tile(a, (16, 1)) for a in args)
    estimator = pg.LearnedFeedback(use="control_variate", rate=0.2)
    state = start = estimator.init(losses, params, *args)
    step = jax.jit(lambda s, k: estimator.estimate(losses, k, s, params, *args).state)
    for k in jax.random.split(key, 300):
        state = step(state, k)
    variance = []
    for s in (start, state):
        of = lambda k, s=s: flat(estimator.estimate(losses, k, s, params, *args).grads)
        samples = jax.jit(jax.vmap(of))(jax.random.split(jax.random.fold_in(key, 1), 1000))
        variance.append(np.asarray(samples).var(axis=0).sum())
    assert variance[1] < 0.7 * variance[0]


def test_a_state_of_another_model_is_refused(key):
    params, losses, args = site_models.relu_mlp(key)
    other, other_losses, other_args = site_models.convolution(key)
    estimator = pg.LearnedFeedback()
    state = estimator.init(other_losses, other, *other_args)
    with pytest.raises(ValueError, match=r"state holds feedback of shapes .* need \[\(8, 2\)\]"):
        estimator.estimate(losses, key, state, params, *args)
    with pytest.raises(ValueError, match=r"state holds feedback of shapes NoneType"):
        estimator.estimate(losses, key, None, params, *args)


def test_an_estimator_that_learns_is_refused_by_the_function_without_state(key):
    params, losses, args = site_models.relu_mlp(key)
    with pytest.raises(TypeError, match=r"learns from step to step.*estimator.init"):
        pg.value_and_grad(losses, pg.LearnedFeedback())(key, params, *args)


def test_a_hand_made_reverse_rule_is_named_and_can_be_inlined(key):
    @jax.custom_vjp
    def doubled(x):
        return 2 * x

    doubled.defvjp(lambda x: (2 * x, None), lambda _, ct: (2 * ct,))

    def losses(w, x):
        return jnp.sum(doubled(x @ w), axis=-1)

    w, x = jnp.ones((3, 2)), jnp.ones((4, 3))
    with pytest.raises(TypeError, match=r"doubled \(.*test_sites.py.*custom_vjp='inline'"):
        pg.value_and_grad(losses, pg.ActivityPerturbation())(key, w, x)
    value, grads = pg.value_and_grad(
        losses, pg.ActivityPerturbation(head="exact", custom_vjp="inline")
    )(key, w, x)
    np.testing.assert_allclose(value, 12.0)
    np.testing.assert_allclose(grads, jnp.full((3, 2), 2.0))


def test_steps_without_noise_follow_the_feedback_and_leave_it(key):
    """Every third step learns, and is that of the estimator that always learns.

    The others have the same cotangents from F.
    """
    params, losses, args = site_models.scanned_layers(key)
    always, third = pg.LearnedFeedback(rate=0.1), pg.LearnedFeedback(rate=0.1, every=3)
    state = always.init(losses, params, *args)
    state = eqx.tree_at(
        lambda s: s.feedback,
        state,
        [jnp.sin(jnp.arange(f.size)).reshape(f.shape) for f in state.feedback],
    )
    both = jax.jit(lambda k, s: [e.estimate(losses, k, s, params, *args) for e in (always, third)])
    for i, k in enumerate(jax.random.split(jax.random.fold_in(key, 1), 6)):
        a, b = both(k, state)
        for x, y in zip(
            jax.tree.leaves((a.value, a.grads)), jax.tree.leaves((b.value, b.grads)), strict=True
        ):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
        assert b.directional is None
        expected = a.state.feedback if i % 3 == 0 else state.feedback
        for x, y in zip(b.state.feedback, expected, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
        assert int(b.state.step) == i + 1
        state = b.state
    with pytest.raises(ValueError, match=r"every=2 with use='control_variate'"):
        pg.LearnedFeedback(use="control_variate", every=2)


def test_the_tail_is_reverse_mode_and_what_is_before_it_feedback(key):
    """With all sites in it the tail is backprop.

    With two of three the first site alone is given feedback, and learns.
    """
    k = jax.random.split(jax.random.fold_in(key, 1), 4)
    params = {
        name: site_models.normal(k[i], n, m)
        for i, (name, n, m) in enumerate([("a", 3, 6), ("b", 6, 5), ("c", 5, 2)])
    }
    x = jax.random.normal(k[3], (16, 3))

    def losses(params, x):
        h = jnp.tanh(jnp.tanh(x @ params["a"]) @ params["b"])
        return jnp.sum(jnp.square(h @ params["c"] - 1), axis=-1)

    true = true_gradient(losses, params, (x,))
    for every in (1, 2):
        for tail in (2, 3):
            estimator = pg.LearnedFeedback(tail=tail, every=every)
            state = estimator.init(losses, params, x)
            assert [f.shape for f in state.feedback] == [(6, 2)] * (3 - tail)
            state = eqx.tree_at(
                lambda s: s.step, state, jnp.asarray(1)
            )  # with every=2 a step without noise
            found = eqx.filter_jit(estimator.estimate)(losses, key, state, params, x)
            for name in ("a", "b", "c")[3 - tail :]:
                np.testing.assert_allclose(found.grads[name], true[name], rtol=1e-4, atol=1e-5)
            if tail == 2:
                assert not jnp.any(found.grads["a"])  # F is zero
                assert every == 2 or jnp.any(found.state.feedback[0])
    with pytest.raises(ValueError, match=r"tail=4, but the function has only 3"):
        pg.LearnedFeedback(tail=4).init(losses, params, x)
    scanned, losses, args = site_models.scanned_layers(key)
    with pytest.raises(ValueError, match=r"tail=2, but one of .* inside a loop"):
        pg.LearnedFeedback(tail=2).init(losses, scanned, *args)


def test_feedback_stays_bounded_with_many_more_units_than_examples(key):
    """At the largest rate, with 400 units and two examples.

    Without the normalisation it grows without bound.
    """
    k = jax.random.split(jax.random.fold_in(key, 1), 3)
    params = {"a": site_models.normal(k[0], 3, 400), "b": site_models.normal(k[1], 400, 2)}
    x = jax.random.normal(k[2], (2, 3))
    losses = lambda p, x: jnp.sum(jnp.square(x @ p["a"] @ p["b"]), axis=-1)
    estimator = pg.LearnedFeedback(rate=1.0)
    step = jax.jit(lambda s, k: estimator.estimate(losses, k, s, params, x).state)
    state = estimator.init(losses, params, x)
    for k in jax.random.split(jax.random.fold_in(key, 2), 300):
        state = step(state, k)
    assert float(jnp.abs(state.feedback[0] - params["b"]).max()) < float(jnp.abs(params["b"]).max())
