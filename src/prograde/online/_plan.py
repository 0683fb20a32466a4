"""What the influence of a cell will take, before anything is allocated."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from prograde._costs import multiply_adds
from prograde.kit import float_leaves
from prograde.online._learner import one_step
from prograde.online._sparse_influence import Layout, advanced


@dataclass(frozen=True)
class Plan:
    """What `RTRL` would carry for a cell: `print` it before `init`.

    **Fields:**

    - `influence`: `"sparse"` or `"dense"`; `reason`: why it is dense, or what was dropped.
    - `parameters`, `carried`, `state`: n, those of them whose influence is carried, and s.
    - `colours`: the number of tangents of each group of parameters; empty where it is dense.
    - `numbers`, `bytes`: of the memory.
    - `multiply_adds`: of carrying the influence through one step; `forward`: of the step itself.

    **Source:** arXiv 1702.05043 for the dense figures.

    Examples:
        >>> import jax, jax.numpy as jnp, prograde as pg
        >>> def cell(w, s, x):
        ...     s = jax.nn.sigmoid(w["decay"]) * s + w["into"] @ x
        ...     return s, s
        >>> learner = pg.online.RTRL(cell, lambda output, target: jnp.mean((output - target) ** 2))
        >>> w = {"decay": jnp.zeros(256), "into": jnp.zeros((256, 32))}
        >>> print(learner.plan(w, jnp.zeros(256), jnp.zeros(32)))
        sparse influence: 1 + 32 colours for 8,448 parameters and a state of 256 numbers
        memory: 8,448 numbers, 33.8 kB (dense: 8.65 MB)
        a step: ... multiply-adds for the influence, ... for the cell itself
    """

    influence: Literal["sparse", "dense"]
    reason: str
    parameters: int
    carried: int
    state: int
    colours: tuple[int, ...]
    numbers: int
    bytes: int
    multiply_adds: int
    forward: int

    def __str__(self) -> str:
        colours = " + ".join(f"{count:,}" for count in self.colours)
        of = (
            f"{colours} colours for {self.carried:,} parameters"
            if self.colours
            else (f"{self.parameters:,} parameters")
        )
        dense = self.bytes / max(1, self.numbers) * self.parameters * self.state
        beside = "" if self.influence == "dense" else f" (dense: {size(dense)})"
        lines = [
            f"{self.influence} influence: {of} and a state of {self.state:,} numbers",
            f"memory: {self.numbers:,} numbers, {size(self.bytes)}{beside}",
            f"a step: {self.multiply_adds:,} multiply-adds for the influence, {self.forward:,} for "
            "the cell itself",
        ]
        return "\n".join([*lines, *([self.reason] if self.reason else [])])


def size(count: float) -> str:
    """Bytes with a unit."""
    units = ["B", "kB", "MB", "GB"]
    while count >= 1000 and len(units) > 1:
        count, units = count / 1000, units[1:]
    return f"{count:.3g} {units[0]}" if count < 1000 else f"{count:,.0f} {units[0]}"


def multiply_adds_of_cell(
    cell: Callable[..., Any], params: PyTree, state: PyTree, input: PyTree, layout: Layout | None
) -> tuple[int, int]:
    """The multiply-adds of a step of the cell, and of carrying its influence through that step.

    Without a layout, of carrying one tangent of the state.
    """

    def leaves_of(params: PyTree, state: PyTree, input: PyTree) -> tuple[Any, ...]:
        step = one_step(cell, lambda output, target: jnp.zeros(()), params, state, input, None)
        floats, of_params = jax.tree.flatten(float_leaves(params))
        state, of_state = jax.tree.flatten(float_leaves(state))

        def following(floats: list[Any], state: list[Any]) -> list[Any]:
            (_, after), _ = step(of_params.unflatten(floats), of_state.unflatten(state))
            return jax.tree.leaves(after)

        return following, floats, state

    def forward(params: PyTree, state: PyTree, input: PyTree) -> PyTree:
        return cell(params, state, input)

    def carrying(params: PyTree, state: PyTree, input: PyTree) -> PyTree:
        following, floats, state = leaves_of(params, state, input)
        if layout is None:
            return jax.jvp(lambda s: following(floats, s), (state,), (state,))[1]
        return advanced(layout, following, floats, state, layout.zeros(state))

    if input is None:
        try:
            eqx.filter_eval_shape(forward, params, state, input)
        except Exception as error:
            raise ValueError(
                "input=None, but the cell needs one: pass plan(params, state, input) an example. "
                "Only its shapes and dtypes matter."
            ) from error
    counts = []
    for program in (forward, carrying):
        closed, _, _ = eqx.filter_make_jaxpr(program)(params, state, input)
        counts.append(multiply_adds(closed.jaxpr))
    return counts[0], counts[1]
