"""Statistical assertions that know what they can detect.

A test of an estimator draws samples and compares their mean with what it should be. Two things can
go wrong: a correct estimator fails by chance, or a wrong one passes because the samples are too
few. Both rates are arguments here, and the number of samples follows from them.
"""

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Key, PyTree

from prograde.estimators import Backprop
from prograde.kit import Estimator


def required_samples(
    deviation: float, effect: float, false_fail: float = 1e-6, false_pass: float = 1e-6
) -> int:
    """The number of samples that tell a mean from one that is off by `effect`.

        n = ((z(1 - false_fail / 2) + z(1 - false_pass)) deviation / effect)^2

    **Arguments:**

    - `deviation`: the standard deviation of one sample.
    - `effect`: the smallest error of the mean that must be noticed, in the same unit.
    - `false_fail`: the rate at which a correct mean fails, two-sided.
    - `false_pass`: the rate at which a mean that is off by `effect` passes.

    **Returns:** the number of samples.

    **Errors:** `ValueError` for an effect that is not positive and finite, a deviation that is not
    finite and non-negative, or a rate outside (0, 1).

    **Source:** the power of a z-test; computed sample sizes follow `statistical_testing` of
    TensorFlow Probability.

    Examples:
        >>> from prograde.testing import required_samples
        >>> required_samples(deviation=2 ** 0.5, effect=0.02)
        465137
    """
    if not 0 < effect < math.inf:
        raise ValueError(f"effect={effect!r}, but a positive finite effect is needed.")
    if not 0 <= deviation < math.inf:
        raise ValueError(
            f"deviation={deviation!r}, but a finite standard deviation of at least 0 is needed."
        )
    for name, rate in (("false_fail", false_fail), ("false_pass", false_pass)):
        if not 0 < rate < 1:
            raise ValueError(f"{name}={rate!r}, but a rate between 0 and 1 is needed.")
    z = NormalDist().inv_cdf(1 - false_fail / 2) + NormalDist().inv_cdf(1 - false_pass)
    return max(2, math.ceil((z * deviation / effect) ** 2))


def assert_mean(
    samples: Float[ArrayLike, "n *coordinates"],
    expected: Float[ArrayLike, "*coordinates"],
    effect: float,
    false_fail: float = 1e-6,
    false_pass: float = 1e-6,
) -> None:
    """Asserts that the mean of samples is `expected`, and that an error of `effect` would show.

    With several coordinates each one is tested, and `false_fail` is the rate for all of them
    together.

    **Arguments:**

    - `samples`: independent samples along the first axis.
    - `expected`: what their mean should be.
    - `effect`: the smallest error of a mean that must be noticed, an absolute figure.
    - `false_fail`, `false_pass`: as in `required_samples`.

    **Errors:** `AssertionError` when a mean is off, when there are too few samples for the effect
    and the rates, and when a sample is not finite. `ValueError` for an `expected` that is not
    finite, and as `required_samples`. The mean must be near normal, so distributions with heavy
    tails need more samples than the formula says.

    **Source:** as `required_samples`.

    Examples:
        >>> import numpy as np
        >>> from prograde.testing import assert_mean
        >>> signs = np.random.default_rng(0).choice([-1.0, 1.0], 100_000)
        >>> assert_mean(signs, 0.0, effect=0.05)
        >>> assert_mean(signs + 0.05, 0.0, effect=0.05)
        Traceback (most recent call last):
        ...
        AssertionError: mean 0.04916 +- 0.00316 is 15.5 standard errors from the expected 0 ...
    """
    samples = np.asarray(samples, np.float64)
    if samples.ndim == 0 or len(samples) < 2:
        raise AssertionError(f"samples has shape {samples.shape}, but at least 2 are needed.")
    if not np.isfinite(expected).all():
        raise ValueError(f"expected={expected!r}, but a finite mean is needed to compare with.")
    _assert_finite("samples", samples)
    means = samples.mean(axis=0).reshape(-1)
    deviations = samples.std(axis=0, ddof=1).reshape(-1)
    targets = np.broadcast_to(np.asarray(expected, np.float64), samples.shape[1:]).reshape(-1)
    false_fail = false_fail / means.size
    needed = required_samples(float(deviations.max()), effect, false_fail, false_pass)
    limit = NormalDist().inv_cdf(1 - false_fail / 2)
    if len(samples) < needed:
        raise AssertionError(
            f"{len(samples)} samples cannot notice an error of {effect:g} at these rates: {needed} "
            "are needed."
        )
    errors = deviations / math.sqrt(len(samples))
    distances = np.abs(means - targets) / np.maximum(errors, np.finfo(np.float64).tiny)
    # a coordinate that never varies has no standard error: it must agree to rounding
    constant = errors <= 1e-12 * np.maximum(np.abs(targets), 1)
    wrong = np.where(
        constant, ~np.isclose(means, targets, rtol=1e-5, atol=1e-12), distances > limit
    )
    if wrong.any():
        i = int(np.argmax(np.where(wrong, distances, -1)))
        raise AssertionError(
            f"mean {means[i]:.4g} +- {errors[i]:.3g} is {distances[i]:.1f} standard errors from "
            f"the expected {targets[i]:g} (limit {limit:.1f})."
        )


def _assert_finite(name: str, samples: np.ndarray) -> None:
    finite = np.asarray(np.isfinite(samples.reshape(len(samples), -1)).all(axis=1))
    if not finite.all():
        raise AssertionError(
            f"{len(finite) - finite.sum()} of {len(finite)} {name} are not finite, the first is "
            f"number {np.argmin(finite)}."
        )


_PILOT = 2000  # estimates from which the spread is taken
_BATCH = 10_000


def assert_unbiased(
    estimator: Estimator,
    fun: Callable[..., Any],
    key: Key[Array, ""],
    params: PyTree,
    *args: Any,
    state: PyTree = None,
    effect: float = 0.05,
    false_fail: float = 1e-6,
    false_pass: float = 1e-6,
) -> None:
    """Asserts that the mean of an estimator's estimates is the gradient of reverse mode.

    Two things are tested: the projection g . grad / |grad|^2, whose mean is 1, to `effect`; and
    each coordinate of g / |grad|, to what the same number of samples can notice. The number of
    samples follows from the spread of the first 2000.

    **Arguments:**

    - `estimator`, `fun`, `params`, `args`: as in `Estimator.estimate`. Reverse mode must be able to
      differentiate `fun`.
    - `key`: a typed key.
    - `state`: for estimators that learn, the state at which they are tested; `None` for that of
      `estimator.init`.
    - `effect`: the smallest error of the projection that must be noticed.
    - `false_fail`, `false_pass`: as in `required_samples`, for each of the two tests.

    **Errors:** `AssertionError` when the mean is off or an estimate is not finite; `ValueError`
    where the gradient is zero or not finite.

    **Cost:** 2000 estimates, and (9.6 deviation / effect)^2 more, 10,000 at a time.

    **Source:** as `required_samples`.

    Examples:
        >>> import jax, jax.numpy as jnp, prograde as pg
        >>> from prograde.testing import assert_unbiased
        >>> fun, params = lambda w: jnp.sum(jnp.sin(w)), jnp.arange(5.0)
        >>> assert_unbiased(pg.WeightPerturbation(pg.Rademacher()), fun, jax.random.key(0), params)
        >>> assert_unbiased(pg.WeightPerturbation(combine="shrunk"), fun, jax.random.key(0), params)
        Traceback (most recent call last):
        ...
        AssertionError: mean 0.2024 +- 0.00241 is 330.3 standard errors from the expected 1 ...
    """
    if state is None:
        state = estimator.init(fun, params, *args)
    gradient = np.asarray(
        _flat(Backprop().estimate(estimator.objective(fun), key, None, params, *args).grads),
        np.float64,
    )
    draw = jax.jit(
        jax.vmap(lambda key: _flat(estimator.estimate(fun, key, state, params, *args).grads))
    )
    pilot_key, key = jax.random.split(key)
    size = float(gradient @ gradient)
    if not 0 < size < math.inf:
        raise ValueError(
            f"the squared norm of the gradient is {size:g} at these parameters, but a projection "
            "needs a gradient that is finite and not zero. Choose other parameters."
        )
    pilot = np.asarray(draw(jax.random.split(pilot_key, _PILOT)), np.float64)
    _assert_finite("estimates", pilot)
    # the spread of a pilot is itself uncertain, hence the margin
    deviation = 1.2 * float((pilot @ gradient / size).std())
    batches = -(-required_samples(deviation, effect, false_fail, false_pass) // _BATCH)
    keys = jax.random.split(key, batches)
    samples = np.concatenate(
        [np.asarray(draw(jax.random.split(k, _BATCH)), np.float64) for k in keys]
    )
    assert_mean(samples @ gradient / size, 1.0, effect, false_fail, false_pass)
    largest = 1.2 * float(samples.std(axis=0).max()) / size**0.5
    rate = false_fail / gradient.size  # all coordinates together
    noticed = largest * math.sqrt(required_samples(1.0, 1.0, rate, false_pass) / len(samples))
    assert_mean(
        samples / size**0.5, gradient / size**0.5, max(noticed, 1e-6), false_fail, false_pass
    )


def _flat(tree: PyTree[Array]) -> Array:
    return jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(tree)])
