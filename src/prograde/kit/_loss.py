"""The function to differentiate, checked, as a function of the float arrays of its parameters."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float, PyTree

from prograde._custom_vjp import inline_custom_vjp
from prograde._structured import (
    Choice,
    Group,
    Tangent,
    derivative_in_block,
    directional_derivative,
    staged,
)
from prograde.kit._estimator import Estimate
from prograde.kit._trees import checked_floats, pack, unpack, wide


def checked_loss(loss: Any, hint: str = "") -> Array:
    """`loss` as an array: a real float scalar, or a vector with one loss for each example.

    **Errors:** `TypeError` for what is no array, with `hint` added, or no real float array;
    `ValueError` for more than one axis.

    Examples:
        >>> import jax.numpy as jnp
        >>> from prograde.kit import checked_loss
        >>> checked_loss(jnp.ones((3, 2)))
        Traceback (most recent call last):
        ...
        ValueError: the loss has shape (3, 2), but a scalar or one loss per example, ...
    """
    if not eqx.is_array_like(loss):
        raise TypeError(
            f"the function returned {type(loss).__name__} as its loss, but an array is needed."
            + hint
        )
    loss = jnp.asarray(loss)
    if not jnp.issubdtype(loss.dtype, jnp.floating):
        raise TypeError(
            f"the loss has dtype {loss.dtype}, but a real floating-point loss is needed."
        )
    if loss.ndim > 1:
        raise ValueError(
            f"the loss has shape {loss.shape}, but a scalar or one loss per example, [batch], is "
            "needed. Take the mean over the other axes."
        )
    return loss


class Loss:
    """The function to differentiate, as a function of the float arrays of its parameters alone.

    `loss(floats)` returns (losses, packed aux): a scalar or a vector [batch], and the auxiliary
    output with everything that is no array set apart, so that JAX transformations take it.

    **Arguments:** `fun`, `params`, `args`, `has_aux` as in `Estimator.estimate`. `custom_vjp` says
    what to do with functions that have a `jax.custom_vjp`: `"error"`, or `"inline"` to
    differentiate their code.

    **Fields:** `floats`, the float arrays of `params`, with `None` in place of other leaves.

    **Errors:** `ValueError` for parameters without float arrays; `TypeError` for complex ones; when
    called, `TypeError` or `ValueError` for a loss that is not a real scalar or vector.

    Examples:
        >>> import jax.numpy as jnp
        >>> from prograde.kit import Loss
        >>> loss = Loss(lambda p, x: (x @ p["w"]) ** 2, {"w": jnp.ones(3), "n": 7}, (jnp.eye(3),))
        >>> loss.floats
        {'n': None, 'w': Array([1., 1., 1.], dtype=float32)}
        >>> value, directional, aux = loss.along({"n": None, "w": jnp.arange(3.0)})
        >>> print(value, directional)             # the mean, and a derivative for each example
        1.0 [0. 2. 4.]
    """

    def __init__(
        self,
        fun: Callable[..., Any],
        params: PyTree,
        args: tuple[Any, ...] = (),
        has_aux: bool = False,
        custom_vjp: Literal["error", "inline"] = "error",
    ):
        self.floats, rest = checked_floats(params)

        def of_floats(floats: PyTree[Array]) -> tuple[Array, PyTree]:
            out = fun(eqx.combine(floats, rest), *args)
            if has_aux and not (isinstance(out, tuple) and len(out) == 2):
                raise TypeError(
                    f"has_aux=True, but the function returned {type(out).__name__} instead of a "
                    "pair (loss, aux)."
                )
            loss, aux = out if has_aux else (out, None)
            hint = "" if has_aux else " To return more than the loss, pass has_aux=True."
            return checked_loss(loss, hint), pack(aux)

        self._of_floats = inline_custom_vjp(of_floats) if custom_vjp == "inline" else of_floats

    def __call__(self, floats: PyTree[Array]) -> tuple[Float[Array, "*batch"], PyTree]:
        return self._of_floats(floats)

    def along(
        self, tangents: PyTree[Tangent]
    ) -> tuple[Float[Array, ""], Float[Array, "*batch"], PyTree]:
        """(value, directional, packed aux): the mean loss and grad f . v, in one forward run.

        `tangents` is a tree like `floats` of arrays, or of structured tangents, which are not
        formed where a rule for their factors exists. `directional` is in `wide_dtype`, a scalar,
        or [batch] where the loss is given per example. Outside of `jit` the function may branch on
        the values of arrays that have no tangent; structured tangents are then formed.
        """
        value, directional, aux = directional_derivative(self._of_floats, self.floats, tangents)
        return jnp.mean(value), wide(directional), aux

    def along_block(
        self, groups: Sequence[Group], choice: Choice
    ) -> tuple[Float[Array, ""], Float[Array, "*batch"], PyTree]:
        """`along`, for a tangent in one block: what comes before the block runs without a tangent.

        `groups` are those of `Blocks.groups`, of all `floats`. The function must not branch on the
        values of its parameters.
        """
        found = derivative_in_block(self._of_floats, self.floats, groups, choice)
        value, directional, aux = found
        return jnp.mean(value), wide(directional), aux

    def block_costs(
        self, groups: Sequence[Group], tangent: Callable[[int], list[Tangent]]
    ) -> list[int]:
        """The multiply-adds of a run along a tangent in each block."""
        return staged(self._of_floats, self.floats, groups)[0].costs(tangent)

    def estimate(
        self,
        value: Array,
        grads: PyTree[Array],
        directional: Array | None,
        aux: PyTree,
        state: PyTree,
    ) -> Estimate:
        """The `Estimate`: gradients in the dtypes of their parameters, `aux` unpacked.

        Outside of `jit` it warns where the loss is finite and its derivative is not.
        """
        grads = jax.tree.map(lambda g, w: g.astype(w.dtype), grads, self.floats)
        warn_of_tangents(value, grads if directional is None else directional)
        return Estimate(value, unpack(aux), grads, directional, state)


def warn_of_tangents(value: Array, derivatives: PyTree[Array]) -> None:
    """Warns where the loss is finite and its derivatives are not. Traced values pass silently.

    Examples:
        >>> import jax.numpy as jnp, warnings
        >>> from prograde.kit import warn_of_tangents
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     warn_of_tangents(jnp.ones(()), jnp.array([1.0, jnp.nan]))
        >>> print(caught[0].message)
        the loss is finite, 1, but 1 of 2 derivatives are not. ...
    """
    leaves = jax.tree.leaves(derivatives)
    if any(isinstance(x, Tracer) for x in (value, *leaves)) or not jnp.isfinite(value):
        return
    total = sum(x.size for x in leaves)
    if wrong := total - sum(int(jnp.sum(jnp.isfinite(x))) for x in leaves):
        warnings.warn(
            f"the loss is finite, {float(value):.4g}, but {wrong} of {total} derivatives are not. "
            "Look for an infinite slope times zero, such as sqrt at 0, which forward mode makes "
            "NaN where reverse mode may not; for a rule that custom_vjp='inline' left aside; or "
            "for an overflow of the dtype. diagnostics.first_nonfinite names the operation.",
            RuntimeWarning,
            stacklevel=3,
        )
