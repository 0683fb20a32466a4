"""The interface of online learners, what they carry, and the checks that all of them share."""

import abc
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree

from prograde.kit import check_key, check_whole, checked_floats, checked_loss, float_leaves

Step = Callable[[PyTree[Array], PyTree[Array]], tuple[tuple[Array, PyTree[Array]], PyTree[Array]]]


class Carry(eqx.Module):
    """What an online learner carries from step to step.

    It is a pytree, so `equinox.tree_serialise_leaves` saves it.

    **Fields:**

    - `params`: the parameters; replace them with `with_params` after an update.
    - `state`: the state of the cell.
    - `memory`: what the learner keeps in addition: the tangent of the state, directions, factors.
    - `step`: the number of steps so far.

    **Source:** for `RTRL` the memory is the influence of Williams & Zipser 1989, Neural Computation
    1(2).

    Examples:
        >>> import jax.numpy as jnp, prograde as pg
        >>> cell = lambda w, s, x: (jnp.tanh(w * s + x),) * 2
        >>> learner = pg.online.RTRL(cell, lambda output, target: (output - target) ** 2)
        >>> carry = learner.init(jnp.array(0.5), jnp.array(0.0))
        >>> carry.memory.shape           # d state / d parameter
        (1, 1)
    """

    params: PyTree
    state: PyTree[Array]
    memory: PyTree
    step: Int[Array, ""]

    def with_params(self, params: PyTree) -> "Carry":
        """The same carry with other parameters, of the same structure, shapes and dtypes.

        **Errors:** `ValueError` for parameters that differ in these.
        """
        if differences := tree_differences(self.params, params):
            raise ValueError(
                f"params differ from those of the carry: {differences}. Keep structure, shapes and "
                "dtypes."
            )
        return Carry(params, self.state, self.memory, self.step)


@dataclass(frozen=True)
class OnlineLearner(abc.ABC):
    """Learns the parameters of a recurrent cell from a stream, step by step: a frozen dataclass.

        state, output = cell(params, state, input)          loss(output, target)

    The loss of a step depends on the parameters through all steps before it, by way of the state:

        d L_t / d theta = dL/ds J_(t-1) + dL/dtheta
        J_t             = dF/ds J_(t-1) + dF/dtheta          J_t = d s_t / d theta

    A learner is a way to carry J, or as much of it as is needed. To write one, subclass and
    implement `memory` and `advance`.

    **Arguments:**

    - `cell`: a function `(params, state, input) -> (state, output)`. The state is any tree of
      arrays that keeps its structure, shapes and dtypes. A leading batch axis makes it the state of
      several streams at once.
    - `loss`: a function `(output, target) -> loss`, a float scalar, or a vector whose mean is
      taken.
    - `max_bytes`: the largest memory that `init` allocates, 8 GiB.

    **Errors:** `TypeError` or `ValueError` for a cell whose state changes structure, shape or
    dtype, with the leaf; at trace time. `ValueError` for a memory above `max_bytes`, before it is
    allocated, and for a carry of another learner.

    **Source:** Williams & Zipser 1989, Neural Computation 1(2); the notation is that of arXiv
    1702.05043.

    Examples:
        >>> import jax, jax.numpy as jnp, prograde as pg
        >>> cell = lambda w, s, x: (jnp.tanh(w * s + x),) * 2
        >>> learner = pg.online.RTRL(cell, lambda output, target: (output - target) ** 2)
        >>> carry = learner.init(jnp.array(0.5), jnp.array(0.0))
        >>> for x in (0.1, 0.2, 0.3):
        ...     carry, loss, grads = learner.step(jax.random.key(0), carry, x, 0.0)
        >>> int(carry.step), grads.shape
        (3, ())
    """

    cell: Callable[[PyTree, PyTree, PyTree], tuple[PyTree, PyTree]]
    loss: Callable[[PyTree, PyTree], Array]
    max_bytes: int = field(default=8 * 2**30, kw_only=True)

    _less_memory: ClassVar[str] = ""  # what to take where the memory is too large

    @abc.abstractmethod
    def memory(self, params: PyTree, state: PyTree[Array], input: PyTree, target: PyTree) -> PyTree:
        """The memory before the first step. The arguments are those of `init`."""

    @abc.abstractmethod
    def advance(
        self, key: Key[Array, ""], step: Step, carry: Carry, input: PyTree, target: PyTree
    ) -> tuple[PyTree, tuple[Array, PyTree[Array]], PyTree[Array], PyTree[Array]]:
        """One step: (memory, (loss, float state), the rest of the state, grads).

        `step(floats, state) -> ((loss, float state), rest)` is the cell and the loss at this input
        and target, as a function of the float arrays of the parameters and of the state, as
        `prograde.kit.float_leaves` takes them from those of `carry`.
        """

    def init(
        self, params: PyTree, state: PyTree, input: PyTree = None, target: PyTree = None
    ) -> Carry:
        """The carry before the first step.

        **Arguments:**

        - `params`: any tree with float arrays.
        - `state`: a tree of arrays.
        - `input`, `target`: examples of what will come, for learners that keep some of the stream
          (`DODGE` with a guess). Only their shapes and dtypes matter.

        **Errors:** `ValueError` or `TypeError` for parameters or a state without real float
        numbers; `ValueError` for a memory above `max_bytes`.
        """
        check_whole("max_bytes", self.max_bytes)
        for name in ("cell", "loss"):
            if not callable(function := getattr(self, name)):
                raise TypeError(f"{name}={function!r}, but a function is needed.")
        # weakly typed scalars would compile everything twice
        strong = lambda x: jnp.asarray(x, jnp.result_type(x))  # noqa: E731
        params = jax.tree.map(lambda x: strong(x) if eqx.is_inexact_array(x) else x, params)
        state = jax.tree.map(
            lambda x: strong(x) if eqx.is_inexact_array(jnp.asarray(x)) else jnp.asarray(x), state
        )
        floats = jax.tree_util.tree_leaves_with_path(float_leaves(state))
        if not any(x.size for _, x in floats):
            raise ValueError(
                "state has no floating-point numbers, so no derivative passes from one step to the "
                "next. Use value_and_grad of a step."
            )
        for path, x in floats:
            if jnp.issubdtype(x.dtype, jnp.complexfloating):
                raise TypeError(
                    f"state{jax.tree_util.keystr(path)} has dtype {x.dtype}, but learners work on "
                    "real states. Keep the real and imaginary parts as two leaves and join them "
                    "inside the cell."
                )
        checked_floats(params)
        self._check_size(params, state, input, target)
        memory = self.memory(params, state, input, target)
        return Carry(params, state, memory, jnp.zeros((), jnp.int32))

    def step(
        self, key: Key[Array, ""], carry: Carry, input: PyTree, target: PyTree
    ) -> tuple[Carry, Float[Array, ""], PyTree]:
        """Takes one input of the stream.

        `key` may be the same for the whole stream: each step folds in the number of steps so far.

        **Returns:** `(carry, loss, grads)`: the next carry, with the parameters as they were; the
        loss; the estimate of its gradient, a tree like the parameters, with `None` at leaves that
        are not float arrays. Works under `jit` and `scan`, and under `equinox.filter_jit` where
        leaves are not arrays. What is not finite passes through; `learn` stops before it.

        **Errors:** those of the class; `TypeError` for something else than a key or a carry.
        """
        check_key(key)
        check_carry(carry)
        self._check_memory(carry, input, target)
        step = one_step(self.cell, self.loss, carry.params, carry.state, input, target)
        key = jax.random.fold_in(key, carry.step)
        memory, (loss, floats), rest, grads = self.advance(key, step, carry, input, target)
        return Carry(carry.params, eqx.combine(floats, rest), memory, carry.step + 1), loss, grads

    def _check_size(self, params: PyTree, state: PyTree, input: PyTree, target: PyTree) -> None:
        """Raises where the memory would take more than `max_bytes`, before it is allocated."""
        wanted = eqx.filter_eval_shape(lambda: self.memory(params, state, input, target))
        arrays = [x for x in jax.tree.leaves(wanted) if hasattr(x, "dtype")]
        size = sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays)
        if size > self.max_bytes:
            counts = [
                sum(x.size for x in jax.tree.leaves(float_leaves(tree))) for tree in (params, state)
            ]
            raise ValueError(
                f"the memory of {type(self).__name__} for {counts[0]:,} parameters and a state of "
                f"{counts[1]:,} numbers takes {size / 1e9:,.1f} GB, and max_bytes={self.max_bytes} "
                f"allows {self.max_bytes / 1e9:,.1f}. {self._too_large(params, state, input)}Raise "
                "max_bytes where the device has the memory, which a step needs twice."
            )

    def _too_large(self, params: PyTree, state: PyTree, input: PyTree) -> str:
        """What to take where the memory is too large: sentences, with a space at the end."""
        return self._less_memory

    def _check_saved(self, carry: Carry, input: PyTree) -> None:  # noqa: B027
        """Raises where a carry has the right shapes and still cannot be read. Not traced."""

    def _check_memory(self, carry: Carry, input: PyTree, target: PyTree) -> None:
        """Raises unless the memory of the carry is one that this learner makes."""
        wanted = eqx.filter_eval_shape(
            lambda: self.memory(carry.params, carry.state, input, target)
        )
        if differences := tree_differences(wanted, carry.memory):
            raise ValueError(
                f"the carry is not one of this {type(self).__name__}: of its memory, "
                f"{differences}. Use the learner that made it, or begin with init."
            )


def check_carry(carry: Any) -> None:
    """Raises for something else than a carry."""
    if not isinstance(carry, Carry):
        raise TypeError(
            f"carry is {type(carry).__name__}, but what init or the last step gave is needed."
        )


def one_step(
    cell: Callable[..., Any],
    loss: Callable[..., Any],
    params: PyTree,
    state: PyTree,
    input: PyTree,
    target: PyTree,
) -> Step:
    """One step as a function of floats.

    It is `(float parameters, float state) -> ((loss, float state), rest of the state)`.
    """
    _, other_params = checked_floats(params)
    other_state = eqx.filter(state, eqx.is_inexact_array, inverse=True)

    def step(
        floats: PyTree[Array], float_state: PyTree[Array]
    ) -> tuple[tuple[Array, PyTree[Array]], PyTree[Array]]:
        out = cell(eqx.combine(floats, other_params), eqx.combine(float_state, other_state), input)
        if not (isinstance(out, tuple) and len(out) == 2):
            raise TypeError(
                f"the cell returned {type(out).__name__}, but a pair (state, output) is needed."
            )
        following, output = out
        if differences := tree_differences(state, following):
            raise ValueError(
                f"the cell returned another state than it was given: {differences}. A state keeps "
                "structure, shapes and dtypes from step to step: convert it at the end of the "
                "cell, or start with a state like the one it returns."
            )
        float_state, other = eqx.partition(
            jax.tree.map(jnp.asarray, following), eqx.is_inexact_array
        )
        return (jnp.mean(checked_loss(loss(output, target))), float_state), other

    return step


def tree_differences(before: PyTree, after: PyTree) -> str:
    """What two trees of arrays, or of their shapes, differ in, in words; empty where they agree."""
    then, now = jax.tree.structure(before), jax.tree.structure(after)
    if then != now:
        return f"its structure was {then} and is {now}"

    def kind(x: Any) -> str:
        return f"{getattr(x, 'dtype', type(x).__name__)}{list(jnp.shape(x))}"

    def difference(path: Any, old: Any, new: Any) -> str:
        if not hasattr(old, "dtype"):
            return ""
        name = jax.tree_util.keystr(path) or "it"
        new = new if hasattr(new, "dtype") else np.asarray(new)
        return "" if kind(old) == kind(new) else f"{name} was {kind(old)} and is {kind(new)}"

    found = jax.tree_util.tree_map_with_path(difference, before, after)
    return "; ".join(filter(None, jax.tree.leaves(found)))
