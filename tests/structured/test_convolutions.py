"""Structured kernels in convolutions, against the same tangent formed: every parameter.

Every path.
"""

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from structured_twins import DISTRIBUTIONS, array, directional_and_twin, fallbacks

import prograde as pg


def conv(x_shape, w_shape, **kwargs):
    kwargs = {"window_strides": (1,) * (len(x_shape) - 2), "padding": "SAME"} | kwargs
    return w_shape, lambda w: lax.conv_general_dilated(
        jnp.asarray(array(*x_shape), w.dtype), w, **kwargs
    )


NHWC = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
NHC = {"dimension_numbers": ("NHC", "HIO", "NHC")}
CONVOLUTIONS = {
    "2-D": conv((2, 8, 7, 3), (3, 3, 3, 4), **NHWC),
    "strides": conv(
        (2, 8, 7, 3), (3, 2, 3, 4), **NHWC | {"window_strides": (2, 3), "padding": "VALID"}
    ),
    "channels first, dilated kernel": conv(
        (2, 6, 8, 7),
        (4, 6, 3, 3),
        window_strides=(1, 2),
        padding=((1, 2), (0, 1)),
        rhs_dilation=(2, 1),
    ),
    "dilated kernel": conv(
        (2, 9, 11, 3), (3, 3, 3, 4), **NHWC | {"padding": ((2, 1), (0, 3)), "rhs_dilation": (2, 3)}
    ),
    "dilated kernel, strides": conv(
        (2, 9, 11, 3), (3, 2, 3, 4), **NHWC | {"rhs_dilation": (2, 4), "window_strides": (3, 2)}
    ),
    "dilated input and kernel": conv(
        (2, 5, 4, 3),
        (3, 2, 3, 4),
        **NHWC | {"padding": ((1, 2), (2, 0)), "lhs_dilation": (3, 2), "rhs_dilation": (2, 3)},
    ),
    "dilated input, strides": conv(
        (2, 6, 5, 3),
        (3, 3, 3, 4),
        **NHWC | {"padding": ((2, 0), (1, 1)), "lhs_dilation": (2, 3), "window_strides": (3, 2)},
    ),
    "groups, dilated kernel": conv(
        (2, 8, 7, 6), (3, 3, 3, 4), **NHWC | {"feature_group_count": 2, "rhs_dilation": (1, 2)}
    ),
    "groups, strides": conv(
        (2, 8, 7, 6), (3, 3, 3, 4), **NHWC | {"feature_group_count": 2, "window_strides": (2, 1)}
    ),
    "1-D, cut at the offsets, dilated kernel": conv(
        (2, 20, 16), (9, 16, 4), **NHC | {"rhs_dilation": (2,)}
    ),
    "1-D, cut at the offsets, strides": conv(
        (2, 20, 16), (9, 16, 4), **NHC | {"window_strides": (2,)}
    ),
    "batch groups": conv((4, 8, 7, 3), (3, 3, 3, 4), **NHWC | {"batch_group_count": 2}),
    "no offsets": conv((5, 6), (7, 6), padding=()),
    "groups": conv((2, 8, 7, 6), (3, 3, 3, 4), **NHWC | {"feature_group_count": 2}),
    "groups, channels first": conv((2, 6, 5, 7), (4, 3, 3, 3), feature_group_count=2),
    "depthwise": conv((2, 8, 7, 6), (3, 3, 1, 6), **NHWC | {"feature_group_count": 6}),
    "one channel": conv((2, 8, 7, 1), (3, 3, 1, 6), **NHWC),
    "1 x 1": conv((2, 8, 7, 5), (1, 1, 5, 6), **NHWC),
    "transposed": conv(
        (2, 6, 5, 3), (3, 3, 3, 4), **NHWC | {"padding": ((2, 2), (2, 3)), "lhs_dilation": (2, 2)}
    ),
    "negative padding": conv((2, 8, 7, 3), (3, 3, 3, 4), **NHWC | {"padding": ((-1, 0), (0, -2))}),
    "1-D": conv((2, 20, 3), (9, 3, 4), **NHC | {"window_strides": (2,)}),
    "1-D, cut at the offsets": conv((2, 20, 16), (9, 16, 4), **NHC),
    "1-D, cut at the offsets, groups": conv(
        (2, 20, 32), (9, 16, 4), **NHC | {"feature_group_count": 2}
    ),
    "3-D": conv(
        (1, 5, 6, 4, 3),
        (2, 3, 2, 3, 4),
        window_strides=(1, 1, 2),
        dimension_numbers=("NHWDC", "HWDIO", "NHWDC"),
    ),
    "input channels first": conv(
        (2, 9, 8, 8), (9, 4, 3, 3), dimension_numbers=("NCHW", "IOHW", "NCHW")
    ),
    "output before input": conv(
        (2, 8, 8, 5), (3, 3, 4, 5), dimension_numbers=("NHWC", "HWOI", "NHWC")
    ),
}
FORMED = {"batch groups", "no offsets"}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_structured_equals_dense_and_is_not_formed(name, key, x64, strict):
    shape, function = CONVOLUTIONS[name]
    w = jnp.asarray(array(*shape))
    loss = lambda w: jnp.sum(jnp.sin(function(w)))
    actual, expected = directional_and_twin(loss, w, DISTRIBUTIONS, key)
    assert np.abs(expected).min() > 1e-6
    np.testing.assert_allclose(actual, expected, rtol=1e-9)
    assert bool(fallbacks(loss, w, pg.LowRank(1))) == (name in FORMED)
