"""Real-time recurrent learning."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree

from prograde._costs import multiply_adds
from prograde._structured import coordinate_tangent, count, directional_derivative, from_coordinates
from prograde.kit import check_whole, float_leaves, tangents_at_once, wide
from prograde.online._learner import OnlineLearner


@dataclass(frozen=True)
class RTRL(OnlineLearner):
    """Real-time recurrent learning: the exact gradient of every step, while the data flows.

        J_t = dF/ds J_(t-1) + dF/dtheta          g_t = dL/ds J_(t-1) + dL/dtheta

    The learner carries the influence: the whole Jacobian J of the state with respect to the
    parameters. The key is not used.

    **Arguments:**

    - `cell`, `loss`, `max_bytes`: as in `OnlineLearner`.
    - `chunk`: how many parameters are carried through a step together. When `None`, as many as fit
      into 256 MiB.

    **Bias and variance:** none while the parameters stay. The sum of the gradients over a sequence
    is then that of backpropagation through time, untruncated. Where the parameters change every
    step, J holds derivatives at earlier parameters: an error of the size of the learning rate.

    **Cost:** memory n s numbers, for n parameters and a state of s. A step takes n s^2
    multiply-adds for one stream, and n tangents through the cell where the state is that of many
    streams; for a GRU of 64 units some milliseconds. The tangent of a single entry of a matrix is
    kept as factors, so the parameters' own part costs n s. Independent of the length of the stream.

    **Errors:** as `OnlineLearner`; `ValueError` for a `chunk` below 1; `TypeError` for a cell that
    forward mode cannot pass.

    **Source:** Williams & Zipser 1989, Neural Computation 1(2); arXiv 1702.05043, section 2.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, prograde as pg
        >>> def cell(params, state, x):
        ...     state = jnp.tanh(params["a"] * state + params["b"] * x)
        ...     return state, state
        >>> learner = pg.online.RTRL(cell, lambda output, target: (output - target) ** 2)
        >>> params = {"a": jnp.array(0.1), "b": jnp.array(0.1)}
        >>> carry, optimizer = learner.init(params, jnp.array(0.0)), optax.adam(0.01)
        >>> inputs = jax.random.normal(jax.random.key(1), (2000,))
        >>> true_cell = lambda s, x: cell({"a": 0.8, "b": 0.5}, s, x)
        >>> _, targets = jax.lax.scan(true_cell, jnp.array(0.0), inputs)
        >>> opt_state, key = optimizer.init(params), jax.random.key(0)
        >>> carry, _, losses = pg.online.learn(
        ...     learner, optimizer, key, carry, opt_state, inputs, targets)
        >>> print(f"{carry.params['a']:.2f} {carry.params['b']:.2f}")
        0.80 0.50
    """

    chunk: int | None = None

    _less_memory: ClassVar[str] = (
        "RTRL keeps parameters x state numbers. DODGE with K tangents, or UORO with K products, "
        "keeps K (parameters + state). "
    )

    def __post_init__(self):
        if self.chunk is not None:
            check_whole("chunk", self.chunk)

    def memory(self, params, state, input, target):
        floats, (flat, _) = float_leaves(params), ravel_pytree(float_leaves(state))
        return jnp.zeros((count(floats), flat.size), flat.dtype)

    def advance(self, key, step, carry, input, target):
        floats, state = float_leaves(carry.params), float_leaves(carry.state)
        flat, unravel = ravel_pytree(state)
        influence, n = carry.memory, count(floats)

        def of_both(both):
            return step(both["params"], both["state"])

        def along(index, state_tangent):
            tangents = {
                "params": coordinate_tangent(index, floats),
                "state": unravel(state_tangent),
            }
            _, (slope, following), _ = directional_derivative(
                of_both, {"params": floats, "state": state}, tangents
            )
            return wide(slope), ravel_pytree(following)[0]

        def of_state(flat):
            (loss, following), _ = step(floats, unravel(flat))
            return loss, ravel_pytree(following)[0]

        indices = jnp.arange(n, dtype=jnp.int32)
        together = lambda i: jax.vmap(along)(i, influence[: len(i)])  # noqa: E731
        chunk = tangents_at_once(self.chunk, n, of_state, flat, together)
        (loss, following), rest = step(floats, state)
        if flat.size**2 < multiply_adds(jax.make_jaxpr(of_state)(flat).jaxpr):
            # dF/ds and one product with it cost less than n tangents of the state
            slope_of_state, across = jax.jacfwd(of_state)(flat)
            own_slopes, own = lax.map(
                lambda i: along(i, jnp.zeros_like(flat)), indices, batch_size=chunk
            )
            slopes = own_slopes + influence @ slope_of_state.astype(influence.dtype)
            influence = influence @ across.T + own
        else:
            slopes, influence = lax.map(
                lambda pair: along(*pair), (indices, influence), batch_size=chunk
            )
        return influence, (loss, following), rest, from_coordinates(slopes, floats)
