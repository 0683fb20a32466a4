"""Directional gradients in deep time: a few directions, kept for a window."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Key, PyTree

from prograde._structured import directional_derivative, projected, weighted_sum
from prograde.kit import check_choice, check_whole, float_leaves, wide
from prograde.online._learner import OnlineLearner, tree_differences
from prograde.online.directions import PastWindow
from prograde.tangents import Rademacher, TangentDistribution


@dataclass(frozen=True)
class DODGE(OnlineLearner):
    """Deep online directional gradient estimation: directional derivatives, window by window.

        u_k <- dF/ds u_k + dF/dtheta v_k
        d_k  = dL/ds u_k + dL/dtheta v_k
        g_t  = (1/K) sum_k d_k v_k

    The learner carries the tangent u_k = J v_k of the state along each direction v_k. When a window
    ends, new directions are drawn and the tangents start again from zero.

    **Arguments:**

    - `cell`, `loss`, `max_bytes`: as in `OnlineLearner`.
    - `window`: steps for which directions stay. The gradient reaches back to the start of the
      window. A longer window costs nothing, and brings fewer new directions.
    - `directions`: a `TangentDistribution`; or a direction function `(key, past) -> directions` of
      a `PastWindow`, which returns a tree like the float arrays of the parameters with a leading
      axis of `num_tangents`: `Momentum()`, `TruncatedBackprop()`, or your own.
    - `num_tangents`: K, the number of directions.
    - `combine`: `"mean"`, as above, for directions of zero mean and unit covariance; or
      `"projection"`, V (V^T V)^+ d, the projection of the gradient onto the span of any directions.
      When `None`, `"mean"` for a distribution and `"projection"` for a function.

    **Bias:** none with `"mean"` for the sum of the losses of a window as a function of the
    parameters, its first state given: the gradient of backpropagation through the window. A
    projection has none only where the gradient lies in the span. **Variance:** as
    `WeightPerturbation`: n times the squared gradient for one direction, falling as 1/K.

    **Cost:** a forward run with K tangents a step; memory K (n + s) numbers, for structured
    directions far less than K n. A direction function also keeps the inputs of a window. Else
    independent of the window, and always of the length of the stream.

    **Errors:** as `OnlineLearner`; `ValueError` for `window` or `num_tangents` below 1, directions
    of another structure or shape, or no example of inputs where a direction function needs one;
    `TypeError` for a cell that forward mode cannot pass.

    **Source:** Silver, Goyal, Danihelka, Hessel & van Hasselt 2022, Learning by directional
    gradient descent (ICLR); arXiv 2202.08587.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, prograde as pg
        >>> cell = lambda params, s, x: (jnp.tanh(params @ jnp.append(s, x)), s)
        >>> loss = lambda output, target: jnp.mean((output - target) ** 2)
        >>> learner = pg.online.DODGE(cell, loss, window=20, num_tangents=4)
        >>> params = 0.1 * jnp.ones((3, 4))
        >>> carry, optimizer = learner.init(params, jnp.zeros(3)), optax.sgd(0.05)
        >>> opt_state, key = optimizer.init(params), jax.random.key(0)
        >>> inputs = jnp.sin(jnp.arange(200) / 5)
        >>> carry, _, losses = pg.online.learn(
        ...     learner, optimizer, key, carry, opt_state, inputs, 0.5 * inputs)
        >>> losses.shape, int(carry.step)
        ((200,), 200)
    """

    window: int
    directions: TangentDistribution | Callable[[Key[Array, ""], PastWindow], PyTree] = field(
        default_factory=Rademacher
    )
    num_tangents: int = 1
    combine: Literal["mean", "projection"] | None = None

    _less_memory: ClassVar[str] = (
        "DODGE keeps num_tangents x (parameters + state), and a window of inputs for a direction "
        "function: lower num_tangents or window, or take directions of few numbers, LowRank(1). "
    )

    def __post_init__(self):
        check_whole("window", self.window)
        check_whole("num_tangents", self.num_tangents)
        if self.combine is not None:
            check_choice("combine", self.combine, ("mean", "projection"))
        if not callable(self.directions) and not isinstance(self.directions, TangentDistribution):
            raise TypeError(
                f"directions={self.directions!r}, but a distribution of tangents is needed, such "
                "as Rademacher(), or a function (key, past) -> directions, such as Momentum()."
            )

    def memory(self, params, state, input, target):
        floats, k = float_leaves(params), self.num_tangents

        def of_each(tree):
            return jax.tree.map(lambda x: jnp.zeros((k, *jnp.shape(x)), jnp.result_type(x)), tree)

        tangents = of_each(float_leaves(state))
        if isinstance(self.directions, TangentDistribution):
            drawn = jax.eval_shape(lambda key: self._draw(key, params, None), jax.random.key(0))
            return _Memory(
                jax.tree.map(lambda v: jnp.zeros(v.shape, v.dtype), drawn), tangents, None
            )
        if input is None and target is None:
            raise ValueError(
                f"input=None and target=None, but directions={self.directions!r} look at the "
                "inputs of a window: pass init(params, state, input, target) examples of what "
                "will come. Only their shapes and dtypes matter."
            )
        kept = lambda tree: jax.tree.map(  # noqa: E731
            lambda x: jnp.zeros((self.window, *jnp.shape(x)), jnp.result_type(x)), tree
        )
        grads = jax.tree.map(jnp.zeros_like, floats)
        count = jnp.zeros((), jnp.int32)
        past = PastWindow(
            self, params, state, kept(input), kept(target), of_each(floats), grads, count
        )
        drawn = jax.eval_shape(lambda key: self._draw(key, params, past), jax.random.key(0))
        if differences := tree_differences(past.directions, drawn):
            raise ValueError(
                f"directions={self.directions!r} returned other directions than a tree like the "
                "float arrays of the parameters with a leading axis of "
                f"num_tangents={k}: {differences}."
            )
        return _Memory(past.directions, tangents, _Window(state, past.inputs, past.targets, grads))

    def advance(self, key, step, carry, input, target):
        floats, state = float_leaves(carry.params), float_leaves(carry.state)
        place = carry.step % self.window

        def begin(memory: _Memory) -> _Memory:
            window = memory.window
            past = None
            if window is not None:
                grads = jax.tree.map(lambda g: g / self.window, window.grads)
                count = carry.step // self.window
                past = PastWindow(
                    self,
                    carry.params,
                    window.state,
                    window.inputs,
                    window.targets,
                    memory.directions,
                    grads,
                    count,
                )
                window = _Window(
                    carry.state,
                    window.inputs,
                    window.targets,
                    jax.tree.map(jnp.zeros_like, window.grads),
                )
            zeros = jax.tree.map(jnp.zeros_like, memory.state_tangents)
            return _Memory(self._draw(key, carry.params, past), zeros, window)

        memory = lax.cond(place == 0, begin, lambda memory: memory, carry.memory)

        def along(direction, tangent):
            point, tangents = (
                {"params": floats, "state": state},
                {"params": direction, "state": tangent},
            )
            (loss, following), (slope, moved), rest = directional_derivative(
                lambda both: step(both["params"], both["state"]), point, tangents
            )
            return (loss, following), rest, wide(slope), moved

        value, rest, slopes, tangents = jax.vmap(along, out_axes=(None, None, 0, 0))(
            memory.directions, memory.state_tangents
        )
        random = isinstance(self.directions, TangentDistribution)
        mean = self.combine == "mean" or (self.combine is None and random)
        weights = slopes / self.num_tangents if mean else projected(memory.directions, slopes)
        grads = weighted_sum(memory.directions, weights)
        grads = jax.tree.map(lambda g, w: g.astype(w.dtype), grads, floats)
        window = memory.window
        if window is not None:

            def put(kept, x):
                return jax.tree.map(lambda k, v: k.at[place].set(v), kept, x)

            window = _Window(
                window.state,
                put(window.inputs, input),
                put(window.targets, target),
                jax.tree.map(jnp.add, window.grads, grads),
            )
        return _Memory(memory.directions, tangents, window), value, rest, grads

    def _check_memory(self, carry, input, target):
        if (window := getattr(carry.memory, "window", None)) is not None:
            kept = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype),
                (window.inputs, window.targets),
            )
            if differences := tree_differences(kept, (input, target)):
                raise ValueError(
                    "input and target are not like the examples that init was given: "
                    f"{differences}."
                )
        super()._check_memory(carry, input, target)

    def _draw(self, key: Key[Array, ""], params: PyTree, past: PastWindow | None) -> PyTree:
        if not isinstance(self.directions, TangentDistribution):
            assert past is not None
            return self.directions(key, past)
        floats, k = float_leaves(params), self.num_tangents
        sample = self.directions.sample
        return jax.vmap(lambda index: sample(key, floats, index, k))(jnp.arange(k, dtype=jnp.int32))


class _Window(eqx.Module):
    """The window for a direction function: its first state, inputs, and the sum of estimates."""

    state: PyTree[Array]
    inputs: PyTree[Array]
    targets: PyTree[Array]
    grads: PyTree[Array]


class _Memory(eqx.Module):
    """The directions v_k, and the tangent J v_k of the state along each of them."""

    directions: PyTree
    state_tangents: PyTree[Array]
    window: _Window | None
