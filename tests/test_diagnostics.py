"""Diagnostics: exact where the figures are known, a stored-estimates twin for all of them, then
computed sample sizes."""

import dataclasses
import math
import re
from pathlib import Path
from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import prograde as pg
from prograde import diagnostics
from prograde._measured import distance_of
from prograde.diagnostics import Measured, diagnose
from prograde.testing import assert_mean, required_samples

pytestmark = pytest.mark.optimised

LIMIT = NormalDist().inv_cdf(
    1 - 0.5e-6
)  # standard errors that a right figure exceeds once in a million


@dataclasses.dataclass(frozen=True)
class Shifted(pg.WeightPerturbation):
    """A forward gradient with a known bias."""

    shift: float = 0.0
    across: bool = False  # at a right angle to the gradient of `bowl` at its start

    def estimate(self, fun, key, state, params, *args, has_aux=False):
        found = super().estimate(fun, key, state, params, *args, has_aux=has_aux)
        bias = jax.tree.map(
            lambda g: self.shift * (_across(g) if self.across else jnp.ones_like(g)), found.grads
        )
        return dataclasses.replace(found, grads=jax.tree.map(jnp.add, found.grads, bias))


@dataclasses.dataclass(frozen=True)
class Learning(pg.Estimator):
    """The gradient times its state, which grows from step to step."""

    def init(self, fun, params, *args, has_aux=False):
        return jnp.ones(())

    def estimate(self, fun, key, state, params, *args, has_aux=False):
        found = pg.Backprop().estimate(fun, key, None, params, *args, has_aux=has_aux)
        return dataclasses.replace(
            found, grads=jax.tree.map(lambda g: state * g, found.grads), state=state + 1
        )


def _across(g):
    signs = jnp.where(jnp.arange(g.size) % 2 == 0, 1, -1)
    return signs.reshape(g.shape).astype(g.dtype)


def bowl(w):
    return jnp.sum(w**2) / 2


def problem():
    generator = np.random.default_rng(5)
    params = {
        "vector": jnp.asarray(generator.normal(size=5), jnp.float32),
        "matrix": jnp.asarray(generator.normal(size=(4, 5)), jnp.float32),
    }
    x = jnp.asarray(generator.normal(size=(6, 4)), jnp.float32)

    def losses(params, x):
        return jnp.sum(jnp.tanh(x @ params["matrix"] + params["vector"][None]) ** 2, axis=-1)

    return losses, params, x


def same(found, expected):
    assert found.value == pytest.approx(expected, rel=2e-4, abs=1e-9)


def test_exact_gradient_has_neither_bias_nor_variance(key, strict):
    losses, params, x = problem()
    found = diagnose(losses, pg.Backprop(), key, params, x, num_estimates=30)
    for name, value in (
        ("cosine", 1),
        ("projection", 1),
        ("relative_error", 0),
        ("bias_squared", 0),
        ("variance", 0),
    ):
        assert getattr(found, name).value == pytest.approx(value, abs=1e-6)
        assert getattr(found, name).error == pytest.approx(0, abs=1e-6)
    assert found.cosine_of_mean == pytest.approx(1, abs=1e-6)
    assert found.effective_dimension.value == pytest.approx(1, abs=1e-6)
    assert not found.bias_detected
    assert found.tangents_needed(1e-3) == 1
    gradient = jax.grad(lambda p: jnp.mean(losses(p, x)))(params)
    assert found.gradient_norm == pytest.approx(
        math.sqrt(sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(gradient)))
    )
    assert sum(leaf.gradient_share for leaf in found.leaves) == pytest.approx(1)
    assert [(leaf.path, leaf.size) for leaf in found.leaves] == [
        ("params['matrix']", 20),
        ("params['vector']", 5),
    ]


def test_all_tangents_of_a_basis_are_an_exact_gradient(key):
    losses, params, x = problem()
    found = diagnose(
        losses, pg.WeightPerturbation(pg.Basis(), num_tangents=25), key, params, x, num_estimates=30
    )
    assert found.relative_error.value < 1e-10
    assert not found.bias_detected


def test_streamed_figures_are_those_of_stored_estimates(key):
    """Every figure against its definition, with all estimates in memory: exact up to rounding."""
    losses, params, x = problem()
    estimator, n = pg.WeightPerturbation(pg.Normal(), num_tangents=3), 60
    found = diagnose(losses, estimator, key, params, x, num_estimates=n)
    keys = jax.random.split(jax.random.split(jax.random.clone(key))[1], n)
    draw = jax.jit(jax.vmap(lambda k: estimator.estimate(losses, k, None, params, x).grads))
    estimates = draw(keys)
    mean_loss = lambda p: jnp.mean(losses(p, x))
    gradient = jax.jit(jax.grad(mean_loss))(params)

    def flat(tree, axes):
        return np.concatenate(
            [np.asarray(v, np.float64).reshape(*v.shape[:axes], -1) for v in jax.tree.leaves(tree)],
            -1,
        )

    g, exact = flat(estimates, 1), flat(gradient, 0)
    of_flat = lambda p: mean_loss({"matrix": p[:20].reshape(4, 5), "vector": p[20:]})
    hessian = jax.jit(jax.hessian(of_flat))(flat(params, 0).astype(np.float32))

    def moments(g, exact):
        errors, scale = g - exact, exact @ exact
        gram = errors @ errors.T
        bias = (gram.sum() - np.trace(gram)) / (n * (n - 1)) / scale
        variance = ((g - g.mean(0)) ** 2).sum() / (n - 1) / scale
        return bias, variance, (errors**2).sum(1).mean() / scale

    bias, variance, relative = moments(g, exact)
    same(found.bias_squared, bias)
    same(found.variance, variance)
    same(found.relative_error, relative)
    same(found.cosine, np.mean(g @ exact / np.linalg.norm(g, axis=1) / np.linalg.norm(exact)))
    same(found.projection, np.mean(g @ exact) / (exact @ exact))
    same(found.effective_dimension, (g**2).sum(1).mean() / (exact @ exact))
    mean = g.mean(0)
    assert found.cosine_of_mean == pytest.approx(
        mean @ exact / np.linalg.norm(mean) / np.linalg.norm(exact), rel=1e-5
    )
    bent = np.einsum("ni,ij,nj->n", g, np.asarray(hessian, np.float64), g)
    same(
        found.learning_rate_bound,
        max(2 * np.mean(g @ exact) / bent.mean(), 0) if bent.mean() > 0 else math.inf,
    )
    assert found.value == pytest.approx(float(mean_loss(params)))
    for leaf, part in zip(found.leaves, (slice(0, 20), slice(20, 25)), strict=True):
        bias, variance, _ = moments(g[:, part], exact[part])
        same(leaf.bias_squared, bias)
        same(leaf.signal_to_noise, 1 / variance)


def test_second_moment_of_signs_is_the_number_of_parameters(key):
    """Notices 3 %: (u . v)^2 of a unit u has a variance of at most 2 for signs."""
    losses, params, x = problem()
    count = required_samples(2**0.5, 0.03)
    found = diagnose(
        losses,
        pg.WeightPerturbation(pg.Rademacher()),
        key,
        params,
        x,
        num_estimates=count,
        curvature=False,
    )
    assert found.effective_dimension.value / 25 == pytest.approx(
        1, abs=LIMIT * found.effective_dimension.error / 25
    )
    assert 2 * LIMIT * found.effective_dimension.error / 25 < 0.03
    # of a leaf: E |g_l|^2 = n_l |grad|^2, of which |E g_l|^2 is no noise
    for leaf in found.leaves:
        noise = (leaf.size - leaf.gradient_share) / leaf.gradient_share
        assert leaf.signal_to_noise.value * noise == pytest.approx(1, abs=0.03)
    assert not found.bias_detected
    assert found.learning_rate_bound is None


@pytest.mark.parametrize("across", [pytest.param(False, marks=pytest.mark.long), True])
def test_a_known_bias_is_detected_and_measured(across, key):
    """Along the gradient and at a right angle to it, where the projection says nothing."""
    estimator = Shifted(pg.Rademacher(), num_tangents=4, shift=0.5, across=across)
    found = diagnose(bowl, estimator, key, jnp.ones(20), num_estimates=2000)
    assert found.bias_detected
    assert found.bias_squared.value == pytest.approx(0.25, abs=LIMIT * found.bias_squared.error)
    assert found.bias_squared.error < 0.02
    assert found.projection.value == pytest.approx(
        1 if across else 1.5, abs=LIMIT * found.projection.error
    )
    assert found.variance.value == pytest.approx(19 / 4, abs=LIMIT * found.variance.error)
    assert found.relative_error.value == pytest.approx(
        found.bias_squared.value + found.variance.value
    )


def test_shrinking_is_a_bias(key):
    estimator = pg.WeightPerturbation(pg.Rademacher(), num_tangents=5, combine="shrunk")
    found = diagnose(bowl, estimator, key, jnp.ones(20), num_estimates=2000)
    shrunk = 5 / (5 + 19)
    assert found.bias_detected
    assert found.projection.value == pytest.approx(shrunk, abs=LIMIT * found.projection.error)
    assert found.bias_squared.value == pytest.approx(
        (1 - shrunk) ** 2, abs=LIMIT * found.bias_squared.error
    )


def test_bias_of_few_noisy_estimates_is_zero_in_the_mean_and_its_error_is_right(key):
    """30 estimates of variance 19: their average is off by 0.63 |grad|^2, of which nothing may be
    called bias."""
    estimator = pg.WeightPerturbation(pg.Rademacher())
    found = [
        diagnose(bowl, estimator, k, jnp.ones(20), num_estimates=30)
        for k in list(jax.random.split(key, 400))
    ]
    values = np.array([f.bias_squared.value for f in found])
    errors = np.array([f.bias_squared.error for f in found])
    assert_mean(values, 0, effect=0.15)
    assert 0.8 < math.sqrt(np.mean(errors**2)) / values.std() < 1.7
    assert sum(f.bias_detected for f in found) <= 4  # of 400, at a rate of about 0.001


def test_false_alarms_of_skewed_projections_are_rare(seed):
    """Squares of products of two normals, as rank-one tangents give: 4 standard errors are passed
    in 2 % of the means of 100."""
    generator = np.random.default_rng(seed)
    samples = (generator.normal(size=(4000, 100)) * generator.normal(size=(4000, 100))) ** 2
    assert (
        sum(abs(distance_of(row, 1.0)) > 4 for row in samples) <= 14
    )  # expected 2; 14 once in 10^7 times
    plain = (samples.mean(1) - 1) / samples.std(1, ddof=1) * 10
    assert (np.abs(plain) > 4).mean() > 0.01
    assert all(distance_of(row, 10.0) < -4 for row in samples[:50])
    assert distance_of(np.ones(9), 1.0) == 0
    assert distance_of(np.ones(9), 2.0) == -math.inf


@pytest.mark.long
def test_the_error_of_a_bias_is_right(key):
    estimator = Shifted(pg.Rademacher(), shift=0.6)
    found = [
        diagnose(bowl, estimator, k, jnp.ones(20), num_estimates=100)
        for k in jax.random.split(key, 300)
    ]
    values = np.array([f.bias_squared.value for f in found])
    assert 0.75 < np.mean([f.bias_squared.error for f in found]) / values.std() < 1.4


@pytest.mark.long
def test_predicted_tangents_reach_the_error(key):
    key_one, key_four, key_many = jax.random.split(key, 3)
    one = diagnose(
        bowl, pg.WeightPerturbation(pg.Rademacher()), key_one, jnp.ones(20), num_estimates=4000
    )
    four = diagnose(
        bowl,
        pg.WeightPerturbation(pg.Rademacher(), num_tangents=4),
        key_four,
        jnp.ones(20),
        num_estimates=4000,
    )
    needed = one.tangents_needed(0.5)
    assert needed == pytest.approx(19 / 0.5, rel=0.1)
    assert four.tangents_needed(0.5) == pytest.approx(needed, rel=0.1)
    reached = diagnose(
        bowl,
        pg.WeightPerturbation(pg.Rademacher(), num_tangents=needed),
        key_many,
        jnp.ones(20),
        num_estimates=4000,
    )
    assert reached.relative_error.value == pytest.approx(0.5, rel=0.1)


def test_tangents_cannot_reduce_a_bias(key):
    found = diagnose(
        bowl,
        Shifted(pg.Rademacher(), num_tangents=8, shift=0.5),
        key,
        jnp.ones(20),
        num_estimates=500,
    )
    with pytest.raises(ValueError, match="bias alone"):
        found.tangents_needed(0.1)
    assert found.tangents_needed(0.5) == pytest.approx(19 / 0.25, rel=0.3)
    with pytest.raises(ValueError, match="relative_error=0"):
        found.tangents_needed(0)


@pytest.mark.parametrize("curvature", [pytest.param(0.5, marks=pytest.mark.long), 4.0])
def test_rate_bound_of_normal_tangents_on_a_bowl(curvature, key):
    """2 / (a (n + 2)), to 3 %."""
    n, estimator = 10, pg.WeightPerturbation(pg.Normal())
    found = diagnose(
        lambda w: curvature * bowl(w), estimator, key, jnp.ones(n), num_estimates=100_000
    )
    expected = 2 / (curvature * (n + 2))
    assert found.learning_rate_bound.value == pytest.approx(
        expected, abs=LIMIT * found.learning_rate_bound.error
    )
    assert LIMIT * found.learning_rate_bound.error < 0.06 * expected


def test_rate_bound_of_the_gradient_is_that_of_a_quadratic(key):
    a = jnp.array([[3.0, 1.0], [1.0, 2.0]])
    found = diagnose(
        lambda w: w @ a @ w / 2,
        pg.Backprop(),
        jax.random.clone(key),
        jnp.array([1.0, 2.0]),
        num_estimates=8,
    )
    g = np.asarray(a @ jnp.array([1.0, 2.0]))
    assert found.learning_rate_bound.value == pytest.approx(2 * g @ g / (g @ np.asarray(a) @ g))
    downwards = diagnose(lambda w: -bowl(w), pg.Backprop(), key, jnp.ones(2), num_estimates=8)
    assert downwards.learning_rate_bound.value == math.inf


def test_state_of_an_estimator_that_learns_is_held_fixed(key):
    for state, projection in ((None, 1.0), (jnp.full((), 2.0), 2.0)):
        found = diagnose(
            bowl, Learning(), jax.random.clone(key), jnp.ones(5), num_estimates=30, state=state
        )
        assert found.projection.value == pytest.approx(projection)
        assert found.variance.value == pytest.approx(0, abs=1e-6)
        assert found.bias_squared.value == pytest.approx((projection - 1) ** 2, abs=1e-6)
        assert found.bias_detected == (projection == 2)


def test_functions_with_auxiliary_output_and_leaves_that_are_no_floats(key):
    params = {"w": jnp.ones(3), "steps": 7}
    fun = lambda p, x: (jnp.sum(p["w"] * x) ** 2, {"steps": p["steps"]})
    found = diagnose(
        fun,
        pg.WeightPerturbation(pg.Normal()),
        key,
        params,
        jnp.ones(3),
        num_estimates=8,
        has_aux=True,
    )
    assert found.num_parameters == 3
    assert found.value == 9


def test_reference_goes_where_reverse_mode_does_not(key):
    def root(a):
        return jax.lax.while_loop(lambda x: jnp.abs(x * x - a) > 1e-4, lambda x: (x + a / x) / 2, a)

    estimator = pg.WeightPerturbation(pg.Rademacher())
    found = diagnose(
        root, estimator, key, jnp.array(4.0), num_estimates=30, reference=pg.ForwardJacobian()
    )
    assert found.gradient_norm == pytest.approx(0.25, rel=1e-3)
    assert found.relative_error.value == pytest.approx(
        0, abs=1e-6
    )  # one sign for one parameter is exact


@pytest.mark.long
def test_half_precision_rounding_is_no_bias(key, strict):
    """The gradient of bfloat16 parameters is only as exact as they are."""
    losses, params, x = problem()
    params, x = jax.tree.map(lambda v: v.astype(jnp.bfloat16), (params, x))
    loss = lambda p, x: losses(p, x).astype(jnp.float32)
    for estimator in (pg.Backprop(), pg.WeightPerturbation(pg.Basis(), num_tangents=25)):
        found = diagnose(loss, estimator, jax.random.clone(key), params, x, num_estimates=30)
        assert found.cosine.value > 0.99
        assert not found.bias_detected


def test_memory_does_not_grow_with_the_number_of_estimates():
    """Of a function of 100,000 parameters, 1000 more estimates take less than one more copy of
    them."""
    params = jnp.ones(100_000)

    def temp_bytes(count):
        arguments = (
            bowl,
            pg.WeightPerturbation(),
            pg.Backprop(),
            count,
            True,
            False,
            jax.random.key(0),
            None,
            params,
            (),
        )
        lowered = diagnostics._measure.lower(*arguments)
        return lowered.compile().compiled.memory_analysis().temp_size_in_bytes

    assert temp_bytes(1024) - temp_bytes(24) < params.nbytes


def test_compiled_once(key):
    traced = []

    def fun(w):
        traced.append(1)
        return bowl(w)

    keys = jax.random.split(key)
    diagnose(fun, pg.WeightPerturbation(pg.Normal()), keys[0], jnp.ones(4), num_estimates=8)
    before = len(traced)
    diagnose(fun, pg.WeightPerturbation(pg.Normal()), keys[1], 2 * jnp.ones(4), num_estimates=8)
    assert len(traced) == before


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"num_estimates": 7}, ValueError, "num_estimates=7.*at least 8"),
        ({"num_estimates": True}, ValueError, "num_estimates=True"),
        ({"estimator": pg.Normal()}, TypeError, "estimator=Normal"),
        ({"reference": jax.grad}, TypeError, "reference="),
        ({"key": None}, TypeError, "typed PRNG key"),
        ({"params": jnp.zeros(3)}, ValueError, "gradient .* not zero"),
        ({"fun": lambda w: jnp.sum(jnp.sqrt(w - 1))}, ValueError, "finite"),
        ({"fun": lambda w: jnp.sum(w**2) * 1e30}, ValueError, "finite"),
    ],
)
def test_errors_say_what_is_needed(changed, error, words, key):
    given = {
        "fun": bowl,
        "estimator": pg.WeightPerturbation(pg.Normal()),
        "key": key,
        "params": jnp.ones(3),
    } | changed
    options = {k: given.pop(k) for k in ("num_estimates", "reference") if k in given}
    with pytest.raises(error, match=words):
        diagnose(*given.values(), **options)


def test_a_diagnosis_reads_as_a_text(key):
    losses, params, x = problem()
    found = diagnose(
        losses,
        pg.WeightPerturbation(pg.LowRank(), num_tangents=2),
        key,
        params,
        x,
        num_estimates=50,
    )
    text = str(found)
    for words in (
        "LowRank",
        "50 estimates",
        "cosine",
        "bias squared",
        "not detected",
        "variance",
        "learning rate below",
    ):
        assert words in text
    header, *rows = found.table().splitlines()
    assert "signal to noise" in header
    assert [row.split()[0] for row in rows] == ["params['matrix']", "params['vector']"]
    assert str(Measured(0.5, 0.025)) == "0.5 +- 0.025"


def test_api_page_lists_exactly_the_public_names():
    page = (Path(__file__).parents[1] / "docs" / "api.md").read_text()
    assert set(re.findall(r"^::: prograde\.diagnostics\.(\w+)$", page, re.M)) == set(
        diagnostics.__all__
    )
    for name in diagnostics.__all__:
        text = getattr(diagnostics, name).__doc__
        assert ">>>" in text
        assert "**Source:**" in text


@dataclasses.dataclass(frozen=True)
class Sometimes(pg.WeightPerturbation):
    """A forward gradient that is multiplied by `factor` for one key in four."""

    factor: float = math.nan

    def estimate(self, fun, key, state, params, *args, has_aux=False):
        found = super().estimate(fun, key, state, params, *args, has_aux=has_aux)
        spoiled = jax.random.uniform(jax.random.fold_in(key, 3)) < 0.25
        grads = jax.tree.map(lambda g: jnp.where(spoiled, self.factor * g, g), found.grads)
        return dataclasses.replace(found, grads=grads)


@pytest.mark.parametrize(
    ("fun", "estimator", "words"),
    [
        (lambda w: jnp.sum(w) * jnp.nan, pg.Backprop(), "the loss at params is nan"),
        (lambda w: jnp.sum(w) / 0, pg.Backprop(), "the loss at params is inf"),
        (
            lambda w: jnp.sum(jnp.sqrt(w - 1)),
            pg.Backprop(),
            "the loss at params is finite, 0, but .* exact gradient is inf",
        ),
        (bowl, Sometimes(), "of 20 estimates are not finite.*the loss and its exact gradient are"),
        (bowl, Sometimes(factor=1e25), "or their squares are not"),
        (
            lambda w: jnp.sum(jnp.abs(w - 1) ** 1.5) + jnp.sum(w),
            pg.Backprop(),
            r"g\^T H g is not finite for 20 of 20 .* curvature=False",
        ),
    ],
    ids=["nan", "inf", "slope", "estimates", "squares", "curvature"],
)
def test_what_is_not_finite_is_named_and_never_judged(fun, estimator, words, key):
    with pytest.raises(ValueError, match=words):
        diagnose(fun, estimator, key, jnp.ones(3), num_estimates=20)
