"""Real-time recurrent learning."""

import math
from dataclasses import dataclass, field, replace
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, PyTree

from prograde._costs import multiply_adds
from prograde._structured import coordinate_tangent, count, directional_derivative, from_coordinates
from prograde.kit import check_choice, check_whole, float_leaves, tangents_at_once, wide
from prograde.online._learner import OnlineLearner
from prograde.online._plan import Plan, multiply_adds_of_cell
from prograde.online._sparse_influence import (
    Layout,
    SparseInfluence,
    add_influence,
    advanced,
    find_layout,
)
from prograde.online._sparsity import NoPatternError, is_float
from prograde.online.keep import Keep, OwnLayer, SnAp


@dataclass(frozen=True)
class RTRL(OnlineLearner):
    """Real-time recurrent learning: the exact gradient of every step, while the data flows.

        J_t = dF/ds J_(t-1) + dF/dtheta          g_t = dL/ds J_(t-1) + dL/dtheta

    The learner carries the influence J, the Jacobian of the state with respect to the parameters.
    Where a parameter reaches a small part of the state, as in element-wise and block-diagonal
    recurrences (LRU, minGRU, RG-LRU), J is sparse, and is carried in a few rows: parameters whose
    columns never meet share one. `plan` says what that takes. The key is not used.

    **Arguments:**

    - `cell`, `loss`, `max_bytes`: as in `OnlineLearner`.
    - `chunk`: how many parameters are carried through a step together, of a dense influence. When
      `None`, as many as fit into 256 MiB.
    - `keep`: which part of the influence is kept. All of it when `None`. Else `SnAp(n)`, what
      arises within n steps; `OwnLayer()`, of each layer's parameters on its own state; or a
      function `(state leaf, parameter leaf) -> bool` of two names, as `jax.tree_util.keystr` gives
      them, such as `"['h']"`.
    - `influence`: `"sparse"`, `"dense"`, or `"auto"`, which takes the sparse one where it is at
      most half as large.

    The sparse influence needs asdex (`pip install 'prograde[sparse]'`), and an example of the input
    in `init`. Where it cannot be had, the dense one runs, and `plan` says why. A `keep` that cannot
    be followed is refused.

    **Bias and variance:** none without `keep` while the parameters stay. The sum of the gradients
    over a sequence is then that of backpropagation through time, untruncated. Where the parameters
    change every step, J holds derivatives at earlier parameters: an error of the size of the
    learning rate. With `keep`, what is dropped is missing.

    **Cost:** for n parameters and a state of s. *Dense:* memory n s numbers. A step takes n s^2
    multiply-adds for one stream, and n tangents through the cell where the state is that of many
    streams. The tangent of a single entry of a matrix is kept as factors, so the parameters' own
    part costs n s. The step is forward only. *Sparse:* memory c s numbers for c colours; for an
    element-wise cell that is n, for each stream of a batch. A step takes one forward run along c
    tangents, and one reverse run of this step alone for dL/ds and dL/dtheta: it stores nothing
    over time, and forward runs would take a tangent for each parameter. Both are independent of
    the length of the stream.

    **Errors:** as `OnlineLearner`; `ValueError` for a `chunk` below 1, and for `keep` or
    `influence="sparse"` where the pattern of the cell cannot be found, with the reason;
    `TypeError` for a cell that forward mode cannot pass.

    **Source:** Williams & Zipser 1989, Neural Computation 1(2); arXiv 1702.05043, section 2; for
    element-wise cells Mozer 1989, Complex Systems 3(4), and arXiv 2305.15947.

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
    keep: Keep | None = field(default=None, kw_only=True)
    influence: Literal["auto", "sparse", "dense"] = field(default="auto", kw_only=True)

    def __post_init__(self):
        if self.chunk is not None:
            check_whole("chunk", self.chunk)
        check_choice("influence", self.influence, ("auto", "sparse", "dense"))
        if not (self.keep is None or isinstance(self.keep, SnAp | OwnLayer) or callable(self.keep)):
            raise TypeError(
                f"keep={self.keep!r}, but None, SnAp(n), OwnLayer() or a function of the names of "
                "a state leaf and a parameter leaf is needed."
            )
        if self.keep is not None and self.influence == "dense":
            raise ValueError(
                f"keep={self.keep!r} and influence='dense', but a dense influence keeps all: leave "
                "one of the two out."
            )

    def plan(self, params: PyTree, state: PyTree, input: PyTree = None) -> Plan:
        """What a cell will take: colours, memory and multiply-adds. Nothing is allocated.

        **Arguments:** as those of `init`; shapes and dtypes are enough (`jax.ShapeDtypeStruct`).

        **Errors:** `ValueError` where `keep` or `influence="sparse"` cannot be followed.
        """
        layout, reason = self._layout(params, state, input)
        floats, of_state = (
            [x for x in jax.tree.leaves(tree) if is_float(x)] for tree in (params, state)
        )
        n, s = (sum(math.prod(x.shape) for x in leaves) for leaves in (floats, of_state))
        memory = jax.eval_shape(
            lambda state: _dense(n, state) if layout is None else layout.zeros(state), of_state
        )
        columns = memory if layout is None else memory.columns
        arrays = jax.tree.leaves(columns)
        forward, carrying = multiply_adds_of_cell(self.cell, params, state, input, layout)
        return Plan(
            "dense" if layout is None else "sparse",
            reason,
            n,
            n if layout is None else layout.carried,
            s,
            () if layout is None else layout.colours,
            sum(math.prod(x.shape) for x in arrays),
            sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays),
            n * min(s**2, carrying) if layout is None else carrying,
            forward,
        )

    def memory(self, params, state, input, target):
        layout, _ = self._layout(params, state, input)
        leaves = jax.tree.leaves(float_leaves(state))
        return (
            _dense(count(float_leaves(params)), leaves)
            if layout is None
            else (layout.zeros(leaves))
        )

    def advance(self, key, step, carry, input, target):
        if isinstance(carry.memory, SparseInfluence):
            layout, _ = self._layout(carry.params, carry.state, input)
            return _along_colours(layout, step, carry)
        return self._advance_dense(step, carry)

    def _layout(self, params, state, input) -> tuple[Layout | None, str]:
        """The layout of a sparse influence; or `None`, and why it is dense."""
        if self.influence == "dense":
            return None, "dense, as influence='dense' asks"
        try:
            found = find_layout(self.cell, self.keep, params, state, input)
        except NoPatternError as error:
            if self.keep is None and self.influence == "auto":
                return None, f"dense, as {error}"
            asked = "influence='sparse'" if self.keep is None else f"keep={self.keep!r}"
            raise ValueError(
                f"{asked}, but the pattern of the cell cannot be found: {error}."
            ) from error
        n, s = found.parameters, found.state
        if self.keep is None and self.influence == "auto" and 2 * found.numbers > n * s:
            colours = " + ".join(map(str, found.colours))
            return None, (
                f"dense, as the parameters need {colours} colours; keep=SnAp(1), which is biased, "
                "may need less"
            )
        if self.keep is not None and not found.exact:
            return found, f"biased: keep={self.keep!r} drops a part of the influence"
        return found, ""

    def _too_large(self, params, state, input):
        layout, reason = self._layout(params, state, input)
        others = "DODGE with K tangents, or UORO with K products, keeps K (parameters + state). "
        if layout is not None:
            return f"RTRL keeps {layout.numbers:,} numbers of a sparse influence. {others}"
        return f"RTRL keeps parameters x state numbers ({reason}). {others}"

    def _check_memory(self, carry, input, target):
        if isinstance(carry.memory, jax.Array) and self.keep is None and self.influence == "auto":
            # made by init without an example of the input, or where asdex is not installed
            dense = replace(self, influence="dense")
            return OnlineLearner._check_memory(dense, carry, input, target)
        super()._check_memory(carry, input, target)
        self._check_saved(carry, input)

    def _check_saved(self, carry, input):
        if not isinstance(carry.memory, SparseInfluence) or isinstance(carry.memory.code, Tracer):
            return
        layout, _ = self._layout(carry.params, carry.state, input)
        if layout is None or int(carry.memory.code) != layout.code:
            raise ValueError(
                "the carry was saved with other colours than this cell has now, so that its "
                "influence cannot be read. Use the versions of the cell and of asdex that made it, "
                "or begin with init."
            )

    def _advance_dense(self, step, carry):
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


def _dense(parameters: int, state: list[Array]) -> Array:
    flat = jax.eval_shape(lambda leaves: ravel_pytree(leaves)[0], state)
    return jnp.zeros((parameters, flat.size), flat.dtype)


def _along_colours(layout, step, carry):
    floats, of_params = jax.tree.flatten(float_leaves(carry.params))
    state, of_state = jax.tree.flatten(float_leaves(carry.state))

    def loss_of(floats, state):
        (loss, following), rest = step(of_params.unflatten(floats), of_state.unflatten(state))
        return loss, (following, rest)

    try:
        loss, pull_back, (following, rest) = jax.vjp(loss_of, floats, state, has_aux=True)
        by_params, by_state = pull_back(jnp.ones_like(loss))
    except ValueError as error:
        if "Reverse-mode differentiation" not in str(error):
            raise
        raise ValueError(
            "a sparse influence takes the reverse mode of the loss of one step, which this loss "
            f"does not have: {error} Use RTRL(..., influence='dense'), which is forward only."
        ) from error
    grads, memory = add_influence(layout, carry.memory, by_state, by_params)

    def following_of(floats, state):
        (_, following), _ = step(of_params.unflatten(floats), of_state.unflatten(state))
        return jax.tree.leaves(following)

    memory = advanced(layout, following_of, floats, state, memory)
    return memory, (loss, following), rest, of_params.unflatten(grads)
