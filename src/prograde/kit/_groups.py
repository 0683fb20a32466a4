"""A batch cut into groups of examples with tangents of their own."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from prograde.kit._loss import Loss


def in_groups(args: tuple[Any, ...], num_groups: int) -> tuple[PyTree, PyTree]:
    """(arrays, rest) of the arguments, the arrays cut into groups of examples.

    Arrays with axes have the examples along the first one, and get a leading axis for the groups:
    [batch, ...] becomes [num_groups, batch / num_groups, ...]. One group changes nothing.

    **Errors:** `ValueError` where the first axes differ, or the groups do not divide them.

    Examples:
        >>> import jax.numpy as jnp
        >>> from prograde.kit import in_groups
        >>> (x, scale), rest = in_groups((jnp.ones((6, 2)), 3.0), num_groups=2)
        >>> x.shape, scale, rest
        ((2, 3, 2), None, (None, 3.0))
    """
    has_axes = lambda x: isinstance(x, jax.Array | np.ndarray) and x.ndim > 0  # noqa: E731
    arrays, rest = eqx.partition(args, has_axes)
    if num_groups == 1:
        return arrays, rest
    shapes = [x.shape for x in jax.tree.leaves(arrays)]
    lengths = {shape[0] for shape in shapes}
    batch = lengths.pop() if len(lengths) == 1 else None
    if batch is None or batch % num_groups:
        raise ValueError(
            f"num_groups={num_groups}, but the arrays in the arguments have shapes {shapes}. All "
            "need one first axis, that of the examples, which the number of groups divides. Close "
            "over what is the same for all examples, and choose num_groups accordingly."
        )
    cut = lambda x: jnp.reshape(x, (num_groups, batch // num_groups, *x.shape[1:]))  # noqa: E731
    return jax.tree.map(cut, arrays), rest


def group_ratio(
    fun: Callable[..., Any],
    params: PyTree,
    *args: Any,
    num_groups: int,
    has_aux: bool = False,
) -> float:
    """The mean of the groups' losses over the loss of the whole batch.

    `WeightPerturbation(num_groups=G)` estimates the gradient of the mean of the groups' losses. The
    ratio is 1 where that is the loss of the batch: for a mean over examples, and for one loss for
    each. It is 1/G for a sum over the batch, and another number for a mean with weights that differ
    between groups, or for statistics of a batch.

    **Arguments:** as for `value_and_grad`; all arrays are concrete, as the function is run.

    **Returns:** the ratio, or NaN where the loss of the batch is 0 or not finite.

    **Errors:** `ValueError` where the arguments cannot be cut into the groups.

    **Cost:** two forward runs.

    Examples:
        >>> import jax.numpy as jnp
        >>> from prograde.kit import group_ratio
        >>> params, x = jnp.ones(3), jnp.ones((8, 3))
        >>> group_ratio(lambda w, x: jnp.mean(x @ w), params, x, num_groups=4)
        1.0
        >>> group_ratio(lambda w, x: jnp.sum(x @ w), params, x, num_groups=4)
        0.25
    """
    if num_groups == 1:
        return 1.0
    arrays, rest = in_groups(args, num_groups)

    def mean_loss(args: tuple[Any, ...]) -> float:
        loss = Loss(fun, params, args, has_aux)
        return float(jnp.mean(loss(loss.floats)[0]))

    groups = [
        mean_loss(eqx.combine(jax.tree.map(lambda x, i=i: x[i], arrays), rest))
        for i in range(num_groups)
    ]
    whole = mean_loss(args)
    return sum(groups) / num_groups / whole if whole and np.isfinite(whole) else float("nan")
