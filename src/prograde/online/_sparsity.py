"""Which state depends on which parameter and on which earlier state, read off the cell's program.

asdex propagates sets of indices through the program of the derivative itself. State, parameters
and input are all arguments of it, so that no value, such as a first state of zeros, hides a
dependence. A function with a rule of its own (`jax.custom_jvp`) is seen as its rule.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from prograde._costs import multiply_adds
from prograde.kit import float_leaves

INSTALL = "pip install 'prograde[sparse]'"
# asdex keeps a Python set for each number of each intermediate result
_MOST_MULTIPLY_ADDS = 2**24


Matrix = Any  # of scipy.sparse, by columns


class NoPatternError(Exception):
    """Why the pattern of a cell cannot be found, as the end of a sentence."""


@dataclass(frozen=True)
class Leaves:
    """The float leaves of a tree, laid out one after the other.

    **Fields:** `names`, `shapes`, and `starts`, the first entry of each leaf and the total.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    starts: tuple[int, ...]

    @classmethod
    def of(cls, tree: PyTree) -> "Leaves":
        """Lays out the leaves in the order of the tree."""
        found = jax.tree_util.tree_leaves_with_path(tree)
        names = tuple(jax.tree_util.keystr(path) for path, _ in found)
        shapes = tuple(tuple(x.shape) for _, x in found)
        starts = (0, *np.cumsum([math.prod(shape) for shape in shapes]).tolist())
        return cls(names, shapes, starts)

    @property
    def size(self) -> int:
        """The entries of all leaves together."""
        return self.starts[-1]

    def owner(self) -> np.ndarray:
        """The leaf of each entry."""
        return np.repeat(np.arange(len(self.shapes)), np.diff(self.starts))

    def entries(self, leaves: tuple[int, ...]) -> np.ndarray:
        """The entries of some leaves, in order."""
        parts = [np.arange(self.starts[i], self.starts[i + 1]) for i in leaves]
        return np.concatenate(parts) if parts else np.zeros(0, int)


@dataclass(frozen=True)
class Pattern:
    """The non-zeros of dF/ds [state, state] and dF/dtheta [state, parameters], as 0 and 1."""

    state: Leaves
    params: Leaves
    by_state: Matrix
    by_params: Matrix


def find_pattern(cell: Callable, params: PyTree, state: PyTree, input: PyTree) -> Pattern:
    """The pattern of a cell, from the shapes of its arguments alone.

    **Errors:** `NoPatternError` where it cannot be found, with the reason.
    """
    try:
        import asdex
        import scipy.sparse as sp
    except ImportError as error:
        raise NoPatternError(f"asdex is not installed: {INSTALL}") from error
    arrays, rest = eqx.partition((params, state), _is_array)
    numbers, rest_of_input = eqx.partition(input, lambda x: _is_array(x) or eqx.is_array_like(x))
    arrays, numbers = jax.tree.map(_shape_of, (arrays, numbers))
    floats, others = eqx.partition(arrays, is_float)

    def following(floats: PyTree, others: PyTree, numbers: PyTree) -> list[Any]:
        joined = eqx.combine(floats, others, rest)
        out = cell(*joined, eqx.combine(numbers, rest_of_input))[0]
        return jax.tree.leaves(float_leaves(out))

    def along(tangents: PyTree, floats: PyTree, others: PyTree, numbers: PyTree) -> list[Any]:
        of = lambda floats: following(floats, others, numbers)  # noqa: E731
        return jax.jvp(of, (floats,), (tangents,))[1]

    arguments = (floats, floats, others, numbers)
    try:
        program = jax.make_jaxpr(along)(*arguments)
    except Exception as error:
        if input is None:
            raise NoPatternError(
                "init was given no example of the input, and without it the cell cannot be traced"
            ) from error
        raise NoPatternError(f"the cell cannot be traced forward ({_first_line(error)})") from error
    try:
        jax.eval_shape(jax.grad(lambda *a: sum(map(jnp.sum, following(*a)))), *arguments[1:])
    except Exception as error:
        raise NoPatternError(
            f"one step of the cell has no reverse mode ({_first_line(error)})"
        ) from error
    adds = multiply_adds(program.jaxpr)
    if adds > _MOST_MULTIPLY_ADDS:
        raise NoPatternError(
            f"a step along one tangent takes {adds:,} multiply-adds, and the pattern is looked for "
            f"up to {_MOST_MULTIPLY_ADDS:,}"
        )
    try:
        with jax.ensure_compile_time_eval():  # also where a step is being traced
            found = asdex.jacobian_sparsity(along, *jax.tree.map(_zeros, arguments), argnums=0)
    except Exception as error:
        raise NoPatternError(f"asdex cannot read the cell ({_first_line(error)})") from error
    of_params, of_state = (Leaves.of(tree) for tree in floats)
    whole = sp.csc_matrix((np.ones(found.nnz, np.int32), (found.rows, found.cols)), found.shape)
    by_params, by_state = whole[:, : of_params.size], whole[:, of_params.size :]
    return Pattern(of_state, of_params, by_state.tocsr(), by_params.tocsc())


def is_float(x: Any) -> bool:
    """True for an array of floats, or its shape."""
    return _is_array(x) and jnp.issubdtype(x.dtype, jnp.inexact)


def described(params: PyTree, state: PyTree, input: PyTree) -> tuple[Any, tuple[Any, ...]]:
    """A cell's arguments as a structure and leaves: shapes of the arrays, and what is no array."""
    number = lambda x: _shape_of(x) if eqx.is_array_like(x) else x  # noqa: E731
    arrays = jax.tree.map(lambda x: _shape_of(x) if _is_array(x) else x, (params, state))
    leaves, structure = jax.tree.flatten((*arrays, jax.tree.map(number, input)))
    return structure, tuple(leaves)


def _is_array(x: Any) -> bool:
    return eqx.is_array(x) or isinstance(x, np.ndarray | np.generic | jax.ShapeDtypeStruct)


def _shape_of(x: Any) -> jax.ShapeDtypeStruct:
    dtype = x.dtype if hasattr(x, "dtype") else jnp.result_type(x)
    return jax.ShapeDtypeStruct(np.shape(x), dtype)


def _zeros(x: jax.ShapeDtypeStruct) -> Any:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jnp.broadcast_to(jax.random.key(0), x.shape)
    return np.zeros(x.shape, x.dtype)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
