"""What single operations do to weights and to pre-activations."""

import jax.numpy as jnp
from jax.extend.core import JaxprEqn
from jax.interpreters.partial_eval import dce_jaxpr
from jaxtyping import Array

from prograde._jaxprs import derivative_of, equations, subprograms

# what keeps a weight affine: for each operation the operands that may be one
AFFINE = {
    **{name: (0,) for name in (
        "transpose", "reshape", "squeeze", "expand_dims", "broadcast_in_dim",
        "convert_element_type", "copy", "copy_p", "neg", "rev", "slice", "split", "pvary", "pcast",
        "dynamic_slice", "gather", "reduce_sum", "pad", "div",
    )},
    **{name: (0, 1) for name in ("dot_general", "conv_general_dilated", "mul", "add", "sub")},
}  # fmt: skip
SUMS = {"add", "sub"}
KEEPS_ELEMENTS = {
    "transpose", "reshape", "squeeze", "expand_dims", "convert_element_type", "copy", "copy_p",
    "neg", "pvary", "pcast",
}  # fmt: skip
MEETS_ACTIVATION = {
    "dot_general",
    "conv_general_dilated",
    "mul",
    "add",
    "sub",
    "gather",
    "div",
    "custom_jvp_call",
}
_ELEMENTWISE = {
    "max", "min", "add", "sub", "mul", "div", "neg", "exp", "exp2", "log", "log1p", "expm1",
    "tanh", "logistic", "erf", "erfc", "sin", "cos", "tan", "atan", "asin", "acos", "sinh",
    "cosh", "abs", "sign", "sqrt", "rsqrt", "cbrt", "square", "integer_pow", "pow", "select_n",
    "gt", "ge", "lt", "le", "eq", "ne", "and", "or", "not", "clamp", "convert_element_type",
    "copy", "broadcast_in_dim", "stop_gradient", "is_finite", "nextafter", "jit", "pjit",
    "custom_jvp_call", "closed_call", "pvary", "pcast",
}  # fmt: skip


def linear_in(eqn: JaxprEqn, position: int) -> bool:
    """Whether the rule of a `jax.custom_jvp` needs the tangent of an operand, not its value."""
    rule = derivative_of(eqn, [position]).jaxpr
    _, used = dce_jaxpr(rule, [True] * len(rule.outvars), instantiate=False)
    return not used[position]


_LEAST_SIZE = 1e-4  # any will do: the estimate is unbiased for every scale


def size(z: Array, axis: int | None) -> Array:
    """The root mean square of each example's part of a value."""
    others = tuple(i for i in range(z.ndim) if i != axis)
    wide = z.astype(jnp.promote_types(z.dtype, jnp.float32))
    size = jnp.sqrt(jnp.mean(jnp.square(wide), axis=others, keepdims=True))
    return jnp.maximum(size, _LEAST_SIZE).astype(z.dtype)


def is_elementwise(eqn: JaxprEqn, shape: tuple[int, ...]) -> bool:
    """Whether an operation is a function of one number.

    Applied to every element of its only array.
    """
    arrays = [v for v in eqn.invars if v.aval.shape != ()]  # pyright: ignore
    if len(arrays) != 1 or len(eqn.outvars) != 1 or not _works_on_elements(eqn, shape):
        return False
    by_hand = [eqn, *(e for p in subprograms(eqn) for e in equations(p))]
    return all(
        _rule_works_on_elements(e, shape) for e in by_hand if e.primitive.name == "custom_jvp_call"
    )


def _rule_works_on_elements(eqn: JaxprEqn, shape: tuple[int, ...]) -> bool:
    """Whether a hand-made derivative is one of each element alone."""
    moved = [i for i, v in enumerate(eqn.invars) if v.aval.shape == shape]  # pyright: ignore
    if len(moved) != 1:
        return False
    return all(_works_on_elements(e, shape) for e in derivative_of(eqn, moved).jaxpr.eqns)


def _works_on_elements(eqn: JaxprEqn, shape: tuple[int, ...]) -> bool:
    if eqn.primitive.name not in _ELEMENTWISE:
        return False
    if any(v.aval.shape not in (shape, ()) for v in (*eqn.invars, *eqn.outvars)):  # pyright: ignore
        return False
    programs = subprograms(eqn)[:1]
    return all(
        not p.constvars and all(_works_on_elements(e, shape) for e in p.eqns) for p in programs
    )
