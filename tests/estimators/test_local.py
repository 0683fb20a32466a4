"""Local losses: what a perturbation is weighed by, first against exact Jacobians, then in the
mean."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from site_models import normal, relu_mlp

import prograde as pg
from prograde.testing import assert_mean, assert_unbiased


def standardised(x):
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    return x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-2)


def squares(h, out, y):
    return jnp.sum(jnp.square(h @ out - y), axis=-1)


def blocks(key):
    """Two blocks cut apart, a loss for each, and one loss without weights."""
    k = jax.random.split(jax.random.fold_in(key, 1), 6)
    params = {
        "first": normal(k[0], 3, 4),
        "second": normal(k[1], 4, 4),
        "out": [normal(k[2], 4, 2), normal(k[3], 4, 2)],
    }

    def losses(params, x, y):
        h = jnp.tanh(x @ params["first"])
        g = jnp.tanh(lax.stop_gradient(h) @ params["second"])
        return {
            "blocks": [squares(h, params["out"][0], y), squares(g, params["out"][1], y)],
            "data": jnp.sum(x, axis=-1),
        }

    return params, losses, (normal(k[4], 4, 3, scale=1), normal(k[5], 4, 2, scale=1))


def grouped(key, groups=3, interleaved=False):
    """Channels in groups: a shared layer whose units fall into groups, one layer of each group's
    own, and a shared classifier of which each group knows its own part."""
    k = jax.random.split(jax.random.fold_in(key, 2), 5)
    params = {
        "w": normal(k[0], 3, 4 * groups),
        "own": normal(k[1], groups, 4, 2, scale=0.5),
        "out": normal(k[2], groups, 2, 2),
    }

    def losses(params, x, y):
        h = x @ params["w"]
        h = (
            jnp.swapaxes(h.reshape(-1, 4, groups), 1, 2)
            if interleaved
            else h.reshape(-1, groups, 4)
        )
        h = jnp.tanh(standardised(h))
        h = jnp.tanh(jnp.einsum("bgc,gcd->bgd", h, params["own"]))
        parts = jnp.einsum("bgd,gdk->bgk", h, params["out"])
        whole = parts + lax.stop_gradient(jnp.sum(parts, axis=1, keepdims=True) - parts)
        return jnp.sum(jnp.square(whole - y[:, None]), axis=-1)

    return params, losses, (normal(k[3], 4, 3, scale=1), normal(k[4], 4, 2, scale=1))


def interleaved(key):
    return grouped(key, interleaved=True)


def before_the_groups(key, interleaved=False):
    """The noise comes before the channels are split into groups, so that positions of a group are
    found within an axis."""
    k = jax.random.split(jax.random.fold_in(key, 8), 4)
    params = {"w": normal(k[0], 3, 12), "out": normal(k[1], 3, 4, 2)}

    def losses(params, x, y):
        h = jnp.tanh(x @ params["w"])
        h = jnp.swapaxes(h.reshape(-1, 4, 3), 1, 2) if interleaved else h.reshape(-1, 3, 4)
        return jnp.sum(
            jnp.square(jnp.einsum("bgc,gck->bgk", h, params["out"]) - y[:, None]), axis=-1
        )

    return params, losses, (normal(k[2], 4, 3, scale=1), normal(k[3], 4, 2, scale=1))


def interleaved_before_the_groups(key):
    return before_the_groups(key, interleaved=True)


def patches(key):
    """A loss for each patch; the first block mixes channels alone, the second patches as well."""
    k = jax.random.split(jax.random.fold_in(key, 3), 6)
    params = {
        "in": normal(k[0], 2, 3),
        "mix": normal(k[1], 5, 5),
        "first": normal(k[2], 3, 2),
        "second": normal(k[3], 3, 2),
    }

    def losses(params, x, y):
        h = jnp.tanh(x @ params["in"])
        mixed = jnp.einsum("bpc,pq->bqc", lax.stop_gradient(h), params["mix"])
        g = jnp.tanh(mixed)
        return squares(h, params["first"], y[:, None]), jnp.cumsum(
            squares(g, params["second"], y[:, None]), axis=1
        )

    return params, losses, (normal(k[4], 4, 5, 2, scale=1), normal(k[5], 4, 2, scale=1))


def moved(key):
    """Positions that are kept apart, and yet are not where they were: nothing may be taken for
    position by position."""
    k = jax.random.split(jax.random.fold_in(key, 4), 3)
    params = {"w": normal(k[0], 2, 3)}

    def losses(params, x):
        h = jnp.tanh(x @ params["w"])
        order = jnp.array([2, 0, 1])
        return [
            jnp.sum(h[:, order], axis=-1),
            jnp.sum(jnp.roll(h, 1, axis=1), axis=-1),
            jnp.sum(h[:, ::-1] ** 2, axis=-1),
            jnp.sum(h, axis=1),
            jnp.max(h, axis=-1),
        ]

    return params, losses, (normal(k[1], 4, 3, 2, scale=1),)


def jitted(key):
    """The same compiled layer twice, so that both sites are the same place in the same inner
    program."""
    k = jax.random.split(jax.random.fold_in(key, 5), 5)
    params = {
        "w": [normal(k[0], 3, 3), normal(k[1], 3, 3)],
        "out": [normal(k[2], 3, 2), normal(k[3], 3, 2)],
    }
    layer = jax.jit(lambda w, h: jnp.tanh(h @ w))

    def losses(params, x, y):
        h = layer(params["w"][0], x)
        g = layer(params["w"][1], lax.stop_gradient(h))
        return [squares(h, params["out"][0], y), squares(g, params["out"][1], y)]

    return params, losses, (normal(k[4], 4, 3, scale=1), jnp.ones((4, 2)))


def hand_made(key):
    """A step whose hand-made derivative lets through what its value holds back (a straight-through
    estimator)."""
    k = jax.random.split(jax.random.fold_in(key, 6), 3)

    @jax.custom_jvp
    def quantised(x):
        return lax.stop_gradient(jnp.round(2 * x) / 2)

    @quantised.defjvp
    def _(primals, tangents):
        return quantised(*primals), jnp.cumsum(tangents[0], axis=1)

    params = {"w": normal(k[0], 2, 3)}

    def losses(params, x):
        return [
            jnp.sum(quantised(x @ params["w"]), axis=-1),
            jnp.sum(jnp.tanh(x @ params["w"]), axis=-1),
        ]

    return params, losses, (normal(k[1], 4, 3, 2, scale=1),)


def scanned(key):
    """Blocks in a loop, cut apart, with a loss for each."""
    k = jax.random.split(jax.random.fold_in(key, 7), 4)
    params = {"w": normal(k[0], 3, 4, 4, scale=0.6), "out": normal(k[1], 3, 4, 2, scale=0.6)}

    def losses(params, x, y):
        def block(h, p):
            h = jnp.tanh(lax.stop_gradient(h) @ p["w"])
            return h, squares(h, p["out"], y)

        return jnp.moveaxis(lax.scan(block, x, params)[1], 0, 1)

    return params, losses, (normal(k[2], 4, 4, scale=1), normal(k[3], 4, 2, scale=1))


def scanned_to_the_end(key):
    """The same with blocks that reach all later losses."""
    params, _, (x, y) = scanned(key)

    def losses(params, x, y):
        def block(h, p):
            h = jnp.tanh(h @ p["w"])
            return h, squares(h, p["out"], y)

        return jnp.moveaxis(lax.scan(block, x, params)[1], 0, 1)

    return params, losses, (x, y)


MODELS = [
    blocks, grouped, interleaved, before_the_groups, interleaved_before_the_groups, patches, moved,
    jitted, hand_made, scanned, scanned_to_the_end, relu_mlp,
]  # fmt: skip
APART = [blocks, grouped, interleaved, before_the_groups, interleaved_before_the_groups, jitted]


def program_of(model, key):
    params, losses, args = model(key)
    estimator = pg.LocalLosses()
    program, floats = estimator.program(losses, params, args, False)
    return estimator, program, floats


def allowed(site, reach, losses):
    """Which positions of each loss [batch, ...] each position of a site is weighed by, as arrays of
    0 and 1."""
    shape = site.perturbation.shape
    where = np.indices(shape)
    masks = []
    for loss, pairs in zip(losses, reach.along, strict=True):
        mask = np.zeros((*loss.shape, *shape), bool)
        if pairs is not None:
            mask[:] = True
            at = np.indices(loss.shape)
            of_loss = lambda k: at[k].reshape(*loss.shape, *(1,) * len(shape))
            if site.axis is not None:
                mask &= of_loss(0) == where[site.axis]
            for k, along in pairs:
                mask &= of_loss(k) == where[along.axis] // along.inner % loss.shape[k]
        masks.append(mask)
    return masks


@pytest.mark.parametrize(
    "model", [m for m in MODELS if "scanned" not in m.__name__], ids=lambda m: m.__name__
)
def test_what_is_not_counted_has_no_derivative(model, key):
    """The exact Jacobian of every loss by the value of every site is zero wherever a perturbation
    is not weighed."""
    estimator, program, floats = program_of(model, key)
    leaves = jax.tree.leaves(floats)
    for i, (site, reach) in enumerate(
        zip(estimator.shapes(program, floats), estimator.reach(program, floats), strict=True)
    ):
        run = lambda shift, i=i: (
            program.run(
                leaves, jnp.zeros(()), jax.random.key(0), estimator.noise.entries, {i: shift}
            ).losses
        )
        both = jax.jit(lambda shift, run=run: (jax.jacfwd(run)(shift), run(shift)))
        jacobians, values = both(jnp.zeros(site.perturbation.shape))
        for jacobian, mask in zip(jacobians, allowed(site, reach, values), strict=True):
            assert jacobian.shape == mask.shape
            assert not np.any(np.asarray(jacobian)[~mask])


@pytest.mark.parametrize("model", APART, ids=lambda m: m.__name__)
def test_what_is_counted_has_a_derivative(model, key):
    """Where nothing is mixed, not one product of losses and positions is counted in vain."""
    estimator, program, floats = program_of(model, key)
    leaves = jax.tree.leaves(floats)
    for i, (site, reach) in enumerate(
        zip(estimator.shapes(program, floats), estimator.reach(program, floats), strict=True)
    ):
        run = lambda shift, i=i: (
            program.run(
                leaves, jnp.zeros(()), jax.random.key(0), estimator.noise.entries, {i: shift}
            ).losses
        )
        both = jax.jit(lambda shift, run=run: (jax.jacfwd(run)(shift), run(shift)))
        jacobians, values = both(jnp.zeros(site.perturbation.shape))
        for jacobian, mask in zip(jacobians, allowed(site, reach, values), strict=True):
            assert np.all(np.asarray(jacobian)[mask] != 0)


def test_iterations_of_a_loop_reach_their_own_losses(key):
    cut, through = (
        estimator.reach(*rest)
        for estimator, *rest in (program_of(scanned, key), program_of(scanned_to_the_end, key))
    )
    for reach in cut:
        ((pairs),) = reach.along
        assert [(k, where.axis) for k, where in pairs] == [(1, -1)]
    # the layer goes on to later iterations, the classifier does not
    assert [len(reach.along[0]) for reach in through] == [0, 1]


@pytest.mark.parametrize("head", ["perturbed", "exact"])
@pytest.mark.parametrize("model", [m for m in MODELS if m is not moved], ids=lambda m: m.__name__)
def test_local_losses_are_unbiased(model, head, key):
    """Notices 10 % in the projection on the gradient of the sum of all losses."""
    if head == "exact" and "scanned" in model.__name__:
        pytest.skip("its classifiers are inside the loop")
    params, losses, args = model(key)
    assert_unbiased(pg.LocalLosses(head=head), losses, key, params, *args, effect=0.1)


def test_exact_heads_of_all_blocks_have_the_gradient_of_reverse_mode(key):
    params, losses, args = blocks(key)
    of = lambda e, f: eqx.filter_jit(e.estimate)(f, key, None, params, *args)
    found = of(pg.LocalLosses(head="exact"), losses)
    exact = of(pg.Backprop(), pg.total_loss(losses))
    np.testing.assert_allclose(found.value, exact.value, rtol=1e-6)
    for got, want in zip(found.grads["out"], exact.grads["out"], strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5)


def test_one_loss_is_activity_perturbation(key):
    params, losses, args = relu_mlp(key)
    for head in ("perturbed", "exact"):
        of = lambda e: eqx.filter_jit(e.estimate)(losses, key, None, params, *args)
        local, activity = of(pg.LocalLosses(head=head)), of(pg.ActivityPerturbation(head=head))
        np.testing.assert_array_equal(local.directional, activity.directional)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), local.grads, activity.grads
        )


def test_groups_divide_the_variance(key):
    """E |delta|^2 = sum over groups of U_g |grad loss_g|^2 / K for signs, against U |grad|^2 where
    all losses count."""
    params, losses, (x, y) = grouped(key)
    x, y = (
        x[:1],
        y[:1],
    )  # of one example, so that the cotangent of the second site is that of its weights
    estimator, (program, floats) = (
        pg.LocalLosses(),
        pg.LocalLosses().program(losses, params, (x, y), False),
    )
    leaves = jax.tree.leaves(floats)
    records = estimator.shapes(program, floats)
    run = lambda shifts: program.run(
        leaves, jnp.zeros(()), key, estimator.noise.entries, shifts
    ).losses[0]
    shifts = {i: jnp.zeros(r.perturbation.shape) for i, r in enumerate(records)}
    slopes = jax.jit(jax.jacrev(run))(shifts)
    # of group g's loss, by everything that is perturbed
    sizes = np.stack(
        [np.sum(np.square(s[0].reshape(3, -1)), axis=-1) for s in slopes.values()]
    ).sum(axis=0)
    at = next(i for i, r in enumerate(records) if r.perturbation.shape[-1] == 2 and i == 1)
    units = records[at].perturbation.shape[-1]
    draw = jax.jit(
        jax.vmap(lambda k: estimator.estimate(losses, k, None, params, x, y).grads["own"])
    )
    grads = np.asarray(draw(jax.random.split(key, 40_000)))
    h = jnp.tanh(standardised((x @ params["w"]).reshape(-1, 3, 4)))[0]
    for g in range(3):
        second = np.sum(np.square(grads[:, g]), axis=(1, 2)) / float(jnp.sum(h[g] ** 2))
        assert_mean(second / (units * sizes[g]), 1.0, effect=0.1)


def test_noise_of_the_size_of_what_is_perturbed_does_not_see_its_units(key):
    """Before a normalisation the size of a weight has no meaning: ten times the weight has a tenth
    of the estimate, draw by draw."""
    params, _, (x, _) = grouped(key)
    larger = params | {"w": 10 * params["w"]}

    def losses(params, x):
        z = x @ params["w"]
        h = z * lax.rsqrt(jnp.mean(z * z, axis=-1, keepdims=True))
        return jnp.sum(
            jnp.square(jnp.einsum("bgc,gcd->bgd", jnp.tanh(h.reshape(-1, 3, 4)), params["own"])),
            axis=(1, 2),
        )

    def estimates(estimator):
        of = jax.jit(lambda p: estimator.estimate(losses, key, None, p, x).grads)
        return [of(p) for p in (params, larger)]

    for estimator in (
        pg.LocalLosses(scale="rms"),
        pg.ActivityPerturbation(pg.Normal(), 3, scale="rms"),
    ):
        small, large = estimates(estimator)
        np.testing.assert_allclose(small["own"], large["own"], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(small["w"], 10 * large["w"], rtol=1e-4, atol=1e-6)
        small, large = estimates(dataclasses.replace(estimator, scale="one"))
        assert not np.allclose(small["own"], large["own"], rtol=1e-2)


@pytest.mark.parametrize(
    "estimator", [pg.LocalLosses(scale="rms"), pg.LocalLosses(scale="rms", head="exact")], ids=repr
)
def test_noise_of_any_size_is_unbiased(estimator, key):
    params, losses, args = grouped(key)
    assert_unbiased(estimator, losses, key, params, *args, effect=0.1)


def test_nothing_to_measure_noise_by_is_no_division_by_zero(key):
    """Weights that begin at zero: their pre-activations have no size."""
    params, losses, args = relu_mlp(key)
    params = jax.tree.map(jnp.zeros_like, params)
    estimate = eqx.filter_jit(pg.ActivityPerturbation(scale="rms").estimate)
    grads = estimate(losses, key, None, params, *args).grads
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    with pytest.raises(ValueError, match="scale='size', but it is one of 'one', 'rms'"):
        pg.ActivityPerturbation(scale="size")


def test_transformations_give_the_same(key):
    params, losses, args = grouped(key)
    estimator = pg.LocalLosses(num_tangents=2, head="exact")
    estimate = lambda k: estimator.estimate(losses, k, None, params, *args).grads
    keys = jax.random.split(key, 2)
    in_jit = jax.jit(estimate)
    wanted = jax.tree.map(lambda *g: np.stack(g), *(in_jit(k) for k in keys))
    near = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)
    jax.tree.map(near, jax.jit(jax.vmap(estimate))(keys), wanted)
    jax.tree.map(near, lax.scan(lambda c, k: (c, estimate(k)), None, keys)[1], wanted)


def test_aux_and_a_tree_of_losses_go_through(key):
    params, losses, args = blocks(key)
    found = pg.LocalLosses().estimate(
        lambda *a: (losses(*a), "note"), key, None, params, *args, has_aux=True
    )
    assert found.aux == "note"
    assert found.directional.shape == (1, 4)
    total, aux = pg.total_loss(lambda *a: (losses(*a), "note"), has_aux=True)(params, *args)
    assert aux == "note"
    np.testing.assert_allclose(found.value, jnp.mean(total), rtol=1e-6)


@pytest.mark.parametrize(
    ("losses", "error", "text"),
    [
        (
            lambda w, x: [x @ w, jnp.sum(x @ w)],
            ValueError,
            r"losses\[1\] is a scalar, but every loss needs the examples",
        ),
        (
            lambda w, x: {"a": x @ w, "b": jnp.zeros(7)},
            ValueError,
            r"different lengths, losses\['a'\] \(5,\), losses\['b'\] \(7,\)",
        ),
        (lambda w, x: [], TypeError, "an array of losses"),
        (lambda w, x: ["text"], TypeError, r"losses\[0\] is 'text'"),
        (lambda w, x: [x @ w, jnp.arange(5)], TypeError, r"losses\[1\] is .* real floating-point"),
        (
            lambda w, x: [x @ w, jnp.cumsum(jnp.tanh(x @ w))],
            ValueError,
            "examples depend on each other",
        ),
    ],
    ids=["scalar", "lengths", "none", "text", "integers", "joined"],
)
def test_bad_losses_are_refused(losses, error, text, key):
    with pytest.raises(error, match=text):
        pg.LocalLosses().estimate(losses, key, None, jnp.ones((3, 2))[:, 0], jnp.ones((5, 3)))


def test_the_loss_of_the_whole_batch_is_refused():
    with pytest.raises(ValueError, match="per_example=False, but LocalLosses"):
        pg.LocalLosses(per_example=False)
