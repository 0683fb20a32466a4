"""A loop over a chunk of a stream."""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from prograde.kit import check_key, float_leaves, wide
from prograde.online._learner import Carry, OnlineLearner, check_carry, tree_differences


class StreamError(ValueError):
    """A step of a stream gave something that is not finite. What was learned before it is kept.

    **Fields:** `carry` and `opt_state`, as they were before the step; `losses` of the steps before
    it; `index` of the faulty step in the chunk. Continue from `carry` with what follows it.

    **Source:** none; a stream cannot be cleaned beforehand.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, prograde as pg
        >>> learner = pg.online.RTRL(
        ...     lambda w, s, x: (w * s + x,) * 2, lambda output, target: (output - target) ** 2)
        >>> params, optimizer, key = jnp.array(0.5), optax.sgd(0.1), jax.random.key(0)
        >>> carry, opt_state = learner.init(params, jnp.array(0.0)), optimizer.init(params)
        >>> inputs = jnp.array([0.1, 0.2, jnp.nan, 0.3])
        >>> try:
        ...     pg.online.learn(learner, optimizer, key, carry, opt_state, inputs, inputs)
        ... except pg.online.StreamError as error:
        ...     print(error.index, int(error.carry.step))
        2 2
    """

    def __init__(self, message: str, index: int, carry: Carry, opt_state: PyTree, losses: Array):
        super().__init__(message)
        self.index, self.carry, self.opt_state, self.losses = index, carry, opt_state, losses


def learn(
    learner: OnlineLearner,
    optimizer: Any,
    key: Key[Array, ""],
    carry: Carry,
    opt_state: PyTree,
    inputs: PyTree[Array],
    targets: PyTree[Array],
) -> tuple[Carry, PyTree, Float[Array, " steps"]]:
    """Learns from a chunk of a stream, in one compiled loop.

    Each input is one step of the learner and one of the optimizer.

    **Arguments:**

    - `learner`: such as `RTRL(cell, loss)`.
    - `optimizer`: an object with the method `update(grads, opt_state, params)` of Optax.
    - `opt_state`: its state, such as `optimizer.init(params)`, or
      `optimizer.init(equinox.filter(params, equinox.is_inexact_array))` where some leaves are not
      float arrays.
    - `key`: the same for the whole stream.
    - `carry`: what `learner.init` or the last chunk gave.
    - `inputs`, `targets`: trees of arrays with a leading axis of steps.

    **Returns:** `(carry, opt_state, losses)`, each loss before its update. The numbers are the same
    where a stream is cut into other chunks, or saved in the middle and continued
    (`equinox.tree_serialise_leaves` of carry and optimizer state).

    **Cost:** that of the learner's steps. The loop is compiled once for each length of a chunk, and
    again for another learner or optimizer: make them once. The host waits once a chunk.

    **Errors:** `StreamError` where a loss, the state, the gradient or the updated parameters are
    not finite, because of the input or of the rate; it holds what there was before. `ValueError`
    for leading axes that differ or have no steps, a carry of another learner, and an `opt_state` of
    another optimizer; `TypeError` for something else than a learner, an optimizer or a carry.
    Inside `jit` no `StreamError` can be raised: the loop then ends with the faulty step, and the
    losses from it on are NaN.

    **Source:** arXiv 1702.05043 for learning at every step.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, prograde as pg
        >>> learner = pg.online.RTRL(
        ...     lambda w, s, x: (w * s + x,) * 2, lambda output, target: (output - target) ** 2)
        >>> params, optimizer, key = jnp.array(0.1), optax.adam(0.03), jax.random.key(0)
        >>> carry, opt_state = learner.init(params, jnp.array(0.0)), optimizer.init(params)
        >>> inputs = jax.random.normal(jax.random.key(1), (1000,))
        >>> targets = jax.lax.scan(lambda s, x: (0.7 * s + x,) * 2, 0.0, inputs)[1]
        >>> carry, opt_state, losses = pg.online.learn(
        ...     learner, optimizer, key, carry, opt_state, inputs, targets)
        >>> print(carry.params.round(2))
        0.7
    """
    check_key(key)
    lengths = {np.shape(x)[:1] for x in jax.tree.leaves((inputs, targets))}
    if len(lengths) != 1 or () in lengths:
        shapes = [np.shape(x) for x in jax.tree.leaves((inputs, targets))]
        raise ValueError(
            f"inputs and targets have shapes {shapes}, but all need one leading axis, that of the "
            "steps."
        )
    (length,) = lengths.pop()
    if length == 0:
        raise ValueError("inputs and targets have no steps, but at least one is needed.")
    _check_arguments(learner, optimizer, carry, opt_state)
    shape = lambda x: jax.ShapeDtypeStruct(np.shape(x)[1:], jnp.result_type(x))  # noqa: E731
    learner._check_saved(carry, jax.tree.map(shape, inputs))
    arguments = (learner, optimizer, key, carry, opt_state, inputs, targets)
    _, sound, after, opt_after, losses = _steps(*arguments, jnp.asarray(length, jnp.int32), False)
    if isinstance(sound, Tracer) or sound:
        return after, opt_after, losses
    # rerun with full checks to find the faulty step, then rerun to just before it
    done, *_ = _steps(*arguments, jnp.asarray(length, jnp.int32), True)
    index = int(done) - 1
    _, _, carry, opt_state, losses = _steps(*arguments, jnp.asarray(index, jnp.int32), False)
    here = jax.tree.map(lambda x: x[index], (inputs, targets))
    names = [
        f"{name}{jax.tree_util.keystr(path)}"
        for name, tree in zip(("input", "target"), here, strict=True)
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
        if not _finite(x)
    ]
    what = (
        " and ".join(names)
        if names
        else "what the step makes of finite input (the loss, the state, the gradient or the update)"
    )
    remedy = "Leave this input out, and continue." if names else "A lower learning rate may help."
    raise StreamError(
        f"step {index} of the chunk, {int(carry.step)} of the stream: {what} is not finite. The "
        f"carry before it is in this error's `carry`. {remedy}",
        index,
        carry,
        opt_state,
        losses[:index],
    )


def _check_arguments(learner: Any, optimizer: Any, carry: Any, opt_state: PyTree) -> None:
    """Raises for arguments of other kinds, and for the state of another optimizer."""
    if not isinstance(learner, OnlineLearner):
        raise TypeError(
            f"learner={learner!r}, but an online learner is needed, such as RTRL(cell, loss)."
        )
    if not callable(getattr(optimizer, "update", None)):
        raise TypeError(
            f"optimizer={optimizer!r}, but an object with the method update(grads, opt_state, "
            "params) is needed, such as optax.sgd(0.1)."
        )
    check_carry(carry)
    if not callable(getattr(optimizer, "init", None)):
        return
    shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)  # noqa: E731
    floats, structure = jax.tree.flatten(jax.tree.map(shape, float_leaves(carry.params)))
    try:
        wanted = _first_state(optimizer.init, structure, tuple(floats))
    except TypeError:  # an optimizer that is not hashable
        wanted = _first_state.__wrapped__(optimizer.init, structure, tuple(floats))
    if differences := tree_differences(wanted, opt_state):
        raise ValueError(
            f"opt_state is not that of the optimizer for these parameters: {differences}. Use "
            "optimizer.init(params), with the float arrays of the parameters."
        )


@functools.lru_cache(maxsize=32)
def _first_state(init: Any, structure: Any, floats: tuple[jax.ShapeDtypeStruct, ...]) -> PyTree:
    """The shapes of an optimizer's state. Tracing them takes milliseconds, as long as a chunk."""
    return jax.eval_shape(init, structure.unflatten(floats))


def _finite(tree: PyTree) -> Bool[Array, ""]:
    """True if all floats are finite. Then 0 times them is 0, and their sum is too."""
    floats = jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array))
    return jnp.asarray(sum(jnp.sum(wide(x) * 0) for x in floats) == 0)


@eqx.filter_jit
def _steps(
    learner: OnlineLearner,
    optimizer: Any,
    key: Key[Array, ""],
    carry: Carry,
    opt_state: PyTree,
    inputs: PyTree[Array],
    targets: PyTree[Array],
    most: Int[Array, ""],
    thorough: bool,
) -> tuple[Int[Array, ""], Bool[Array, ""], Carry, PyTree, Float[Array, " steps"]]:
    """At most `most` steps: (how many, whether all were sound, carry, optimizer state, losses).

    The memory of the learner may be large. It is checked after each step where `thorough`, else
    after the last.
    """
    learning, fixed = eqx.partition((carry, opt_state), eqx.is_array)

    def one(loop: Any) -> Any:
        i, _, learning, losses = loop
        carry, opt_state = eqx.combine(learning, fixed)
        input, target = jax.tree.map(lambda x: jnp.asarray(x)[i], (inputs, targets))
        stepped, loss, grads = learner.step(key, carry, input, target)
        floats = float_leaves(carry.params)
        updates, opt_state = optimizer.update(grads, opt_state, floats)
        floats = jax.tree.map(lambda w, u: (w + u).astype(w.dtype), floats, updates)
        stepped = stepped.with_params(eqx.combine(floats, carry.params))
        sound = _finite((loss, stepped.state, stepped.params, grads)) & (
            not thorough or _finite(stepped.memory)
        )
        learning = eqx.filter((stepped, opt_state), eqx.is_array)
        return i + 1, sound, learning, losses.at[i].set(jnp.where(sound, loss, jnp.nan))

    first = jax.tree.map(lambda x: jnp.asarray(x)[0], (inputs, targets))
    loss = eqx.filter_eval_shape(learner.step, key, carry, *first)[1]
    length = len(jax.tree.leaves((inputs, targets))[0])
    loop = (
        jnp.zeros((), jnp.int32),
        jnp.array(True),
        learning,
        jnp.full(length, jnp.nan, loss.dtype),
    )
    i, sound, learning, losses = lax.while_loop(lambda loop: (loop[0] < most) & loop[1], one, loop)
    carry, opt_state = eqx.combine(learning, fixed)
    return i, sound & _finite(carry.memory), carry, opt_state, losses
