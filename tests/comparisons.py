"""How estimates and tangents are compared, for all tests."""

import equinox as eqx
import jax
import numpy as np

from prograde._structured import LowRankTangent


def dense(tangents):
    """The slow twin of a structured tangent: every factor multiplied out."""
    return jax.tree.map(
        lambda t: t.dense() if isinstance(t, LowRankTangent) else t,
        tangents,
        is_leaf=lambda t: isinstance(t, LowRankTangent),
    )


def floats(params):
    return eqx.filter(params, eqx.is_inexact_array)


def close(actual, expected, tolerance, scale=1e-30):
    """Equal to `tolerance`, relative to the larger of a leaf's largest entry and `scale`."""
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        atol = tolerance * max(scale, np.abs(e).max())
        np.testing.assert_allclose(a, e, rtol=tolerance, atol=atol)
