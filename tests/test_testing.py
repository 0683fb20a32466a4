"""The judges themselves: what is not finite, and what is too little, never passes."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import prograde as pg
from prograde._measured import Measured, mean_of, ratio_of, squared_mean_of, variance_of
from prograde.testing import assert_mean, assert_unbiased, required_samples

NAN, INF = math.nan, math.inf
SIGNS = np.tile([1.0, -1.0], 50_000)


@pytest.mark.parametrize("expected", [NAN, INF, -INF])
def test_an_expected_mean_that_is_not_finite_is_refused(expected):
    with pytest.raises(ValueError, match="expected="):
        assert_mean(SIGNS, expected, effect=0.1)
    with pytest.raises(ValueError, match="expected="):
        assert_mean(np.stack([SIGNS, SIGNS], 1), [0.0, expected], effect=0.1)


@pytest.mark.parametrize("wrong", [NAN, INF, -INF])
def test_samples_that_are_not_finite_fail(wrong):
    samples = SIGNS.copy()
    samples[7] = wrong
    with pytest.raises(AssertionError, match=r"1 of 100000 samples are not finite.* number 7"):
        assert_mean(samples, 0.0, effect=0.1)
    with pytest.raises(AssertionError, match="not finite"):
        assert_mean(np.stack([SIGNS, samples], 1), 0.0, effect=0.1)


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"effect": NAN}, "effect"),
        ({"effect": INF}, "effect"),
        ({"effect": 0.0}, "effect"),
        ({"effect": -1.0}, "effect"),
        ({"deviation": NAN}, "deviation"),
        ({"deviation": INF}, "deviation"),
        ({"false_fail": NAN}, "false_fail"),
        ({"false_fail": 0.0}, "false_fail"),
        ({"false_pass": 1.0}, "false_pass"),
        ({"false_pass": NAN}, "false_pass"),
    ],
)
def test_figures_that_say_nothing_are_refused(changed, name):
    with pytest.raises(ValueError, match=f"{name}="):
        required_samples(**({"deviation": 1.0, "effect": 0.1} | changed))
    if name != "deviation":
        with pytest.raises(ValueError, match=f"{name}="):
            assert_mean(SIGNS, 0.0, **({"effect": 0.1} | changed))


@pytest.mark.parametrize("samples", [np.zeros(0), np.zeros(1), np.float64(0)])
def test_no_samples_prove_nothing(samples):
    with pytest.raises(AssertionError, match="at least 2"):
        assert_mean(samples, 0.0, effect=0.1)


def test_the_number_of_samples_is_that_of_the_z_test():
    """z(1 - 5e-7) = 4.8916, z(1 - 1e-6) = 4.7534: (9.6450 / effect)^2."""
    assert required_samples(1.0, 0.1) == math.ceil((4.891638 + 4.753424) ** 2 / 0.01)
    assert required_samples(1.0, 0.1, 0.05, 0.2) == math.ceil((1.959964 + 0.841621) ** 2 / 0.01)


@dataclasses.dataclass(frozen=True)
class Spoiled(pg.Estimator):
    """The exact gradient, but not finite for a few keys."""

    def estimate(self, fun, key, state, params, *args, has_aux=False):
        found = pg.Backprop().estimate(fun, key, state, params, *args, has_aux=has_aux)
        bad = jax.random.uniform(key) < 0.01
        grads = jax.tree.map(lambda g: jnp.where(bad, jnp.nan, g), found.grads)
        return dataclasses.replace(found, grads=grads)


@pytest.mark.filterwarnings("ignore:the loss is finite")
def test_estimates_and_gradients_that_are_not_finite_prove_nothing(key):
    with pytest.raises(AssertionError, match="of 2000 estimates are not finite"):
        assert_unbiased(Spoiled(), lambda w: jnp.sum(w**2), key, jnp.ones(3))
    for loss in (lambda w: jnp.sum(jnp.sqrt(w)), lambda w: jnp.sum(w) * jnp.nan):
        with pytest.raises(ValueError, match=r"squared norm of the gradient is (inf|nan)"):
            assert_unbiased(pg.Backprop(), loss, jax.random.clone(key), jnp.zeros(3))


def test_figures_of_samples_are_those_of_their_formulas():
    """Against numbers worked out by hand: divisors, ratios of means, and errors."""
    x, y = np.array([1.0, 2.0, 3.0, 6.0]), np.array([2.0, 1.0, 4.0, 1.0])
    # variance 14/3, over 4 samples
    assert mean_of(x) == Measured(3.0, pytest.approx(math.sqrt(14 / 12)))
    # 3 / 2, not the mean of ratios, 2.3125; residuals x - 1.5 y = -2, .5, -3, 4.5: squares 33.5
    ratio = ratio_of(x, y)
    assert ratio.value == 1.5
    assert ratio.error == pytest.approx(math.sqrt(33.5 / 3 / 4) / 2)
    assert ratio_of(-x, y).value == 0
    assert ratio_of(x, -y).value == math.inf
    assert variance_of(Measured(5.0, 0.3), Measured(2.0, 0.4)) == Measured(3.0, 0.5)
    # e = 1, 2, 4: pairs 0, 2 * 1, 4 * 3; the mean over the three pairs is 14 / 3
    assert squared_mean_of(np.array([0.0, 2.0, 12.0])).value == pytest.approx(14 / 3)
