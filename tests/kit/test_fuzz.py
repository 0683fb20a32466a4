"""Arguments drawn at random: each is accepted and works, or refused by an error that names it."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import prograde as pg

ESTIMATORS = [
    pg.WeightPerturbation,
    pg.CentralDifference,
    pg.ForwardJacobian,
    pg.Guided,
    pg.Scaled,
    pg.ActivityPerturbation,
    pg.LocalLosses,
    pg.LearnedFeedback,
    pg.Backprop,
    pg.CheckpointedBackprop,
    pg.LowRank,
    pg.Separable,
    pg.Sparse,
]
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 5),
    st.floats(),
    st.sampled_from(["mean", "exact", "inline", "error", "", "momentum", "rms"]),
    st.sampled_from([np.int64(2), np.float32("nan"), np.zeros(2), jnp.ones(()), (), [1], {}]),
    st.sampled_from([pg.Normal(), pg.LowRank(), pg.Normal, pg.Backprop(), math.sqrt]),
)


def examples(count):
    return settings(
        max_examples=count,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        derandomize=True,
    )


@pytest.mark.long
@examples(400)
@given(st.data())
def test_any_configuration_is_accepted_or_names_its_field(data):
    """An accepted one prints as its copy does, and holds no number that is not finite."""
    kind = data.draw(st.sampled_from(ESTIMATORS))
    names = [field.name for field in dataclasses.fields(kind)]
    if not names:
        return
    name = data.draw(st.sampled_from(names))
    value = data.draw(ODD)
    made, refusal = None, ""
    try:
        made = kind(**{name: value})
    except (ValueError, TypeError) as error:
        refusal = str(error)
    if made is None:
        assert f"{name}=" in refusal or f"{name}[" in refusal, f"{kind.__name__}: {refusal}"
        return
    assert repr(dataclasses.replace(made)) == repr(made)
    numbers = [x for x in [value] if isinstance(x, float)]
    assert all(math.isfinite(x) for x in numbers), f"{made!r} holds {value!r}"


@pytest.mark.long
@examples(30)
@given(
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=3),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16, jnp.float16]),
    scale=st.sampled_from([0.0, 1e-3, 1.0, 300.0]),
    num_tangents=st.integers(1, 3),
    distribution=st.sampled_from([pg.Normal(), pg.Rademacher(), pg.LowRank(1), pg.Sphere()]),
)
def test_parameters_of_any_shape_give_gradients_like_them(
    shapes, dtype, scale, num_tangents, distribution
):
    """Directional derivatives are those of the gradient along the very tangents, in any dtype."""
    params = [jnp.full(shape, scale, dtype) for shape in shapes]
    loss = lambda p: sum(jnp.sum(jnp.sin(x.astype(jnp.float32))) for x in p)
    estimator = pg.WeightPerturbation(distribution, num_tangents)
    found = estimator.estimate(loss, jax.random.key(0), None, params)
    assert [(g.shape, g.dtype) for g in found.grads] == [(w.shape, w.dtype) for w in params]
    exact = jax.grad(loss)(params)
    for k in range(num_tangents):
        v = distribution.sample(jax.random.key(0), params, k, num_tangents)
        dense = [x.dense() if hasattr(x, "dense") else x for x in v]
        expected = sum(
            float(np.sum(np.asarray(g, np.float64) * np.asarray(x, np.float64)))
            for g, x in zip(exact, dense, strict=True)
        )
        assert abs(float(found.directional[k]) - expected) <= 0.05 * (1 + abs(expected))
