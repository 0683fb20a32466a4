"""What `check` found, and how it reads."""

import math
from dataclasses import dataclass

from prograde._findings import DenseFallback
from prograde.estimators import Estimator


@dataclass(frozen=True)
class CheckReport:
    """What `check` found. Printed, it reads as a short text.

    **Fields:**

    - `estimator`: what was checked.
    - `num_parameters`: the number of entries in all float arrays of the parameters.
    - `blocking`: what forward mode cannot pass: functions with a `jax.custom_vjp`, and operations
      without a rule; for an estimator by reverse mode, loops of unknown length. Each is
      `name (file:line:column (caller))`.
    - `remedies`: what to do about each of these, such as the argument to pass to an adjoint of
      diffrax.
    - `bypassed`: functions whose reverse rule is ignored because the estimator has
      `custom_vjp="inline"`.
    - `always_zero`: paths of parameters whose tangent never reaches the loss: unused, or behind
      argmax, `stop_gradient` or a conversion to integers. Their gradient is 0, and their estimate
      is only noise.
    - `dense`: (path, `DenseFallback`) for each place where a structured tangent had to be formed.
    - `sites`: (paths, shape, has examples) for each site of an estimator that perturbs
      pre-activations: the weights behind it, and the shape of what is perturbed, with an axis for
      each enclosing loop. A site without examples is a weight that is used in another way and
      perturbed itself.
    - `cost_ratio`: multiply-adds of the estimate over those of the function, by a count; `None`
      where something blocks. A loop of unknown length counts as one iteration on both sides. With
      `Blocks` it is the mean over the choice of the block.
    - `memory`: bytes of temporaries that XLA plans for the estimate; `None` where not asked for or
      blocked.
    - `memory_alone`: the same for the function alone; `None` unless `memory="both"`.
    - `state_bytes`: bytes of the estimator's state, before it is made; 0 without a state.
    - `largest`: (bytes, shape, what makes it) of the largest temporary array of the estimate that
      is larger than any in the function alone; `None` where there is none. A compiler that fuses
      operations may never make it.
    - `advice`: sentences: what to take instead where the state or a temporary is large, and other
      things to know.
    - `not_finite`: paths of parameters whose estimate is not finite although the loss is; empty
      unless `run=True`.

    **Source:** what forward mode cannot pass is what JAX refuses; the count is that of arXiv
    2202.08587, section 2.

    Examples:
        >>> import jax.numpy as jnp, prograde as pg
        >>> report = pg.check(lambda w: jnp.sum(jnp.round(w)), jnp.ones((8, 8)), memory=False)
        >>> report.always_zero
        ('params',)
    """

    estimator: Estimator
    num_parameters: int
    blocking: tuple[str, ...]
    remedies: tuple[str, ...]
    bypassed: tuple[str, ...]
    always_zero: tuple[str, ...]
    dense: tuple[tuple[str, DenseFallback], ...]
    sites: tuple[tuple[tuple[str, ...], tuple[int, ...], bool], ...]
    cost_ratio: float | None
    memory: int | None
    memory_alone: int | None
    state_bytes: int = 0
    largest: tuple[int, tuple[int, ...], str] | None = None
    advice: tuple[str, ...] = ()
    not_finite: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing blocks the estimate and nothing in it was found to be not finite."""
        return not self.blocking and not self.not_finite

    def __str__(self) -> str:
        lines = [f"{self.estimator}", f"  parameters: {self.num_parameters:,} numbers"]
        for name, sentence in zip(self.blocking, self.remedies, strict=True):
            mode = "reverse" if name.startswith("while (") else "forward"
            lines.append(f"  BLOCKED by {name}, which {mode} mode cannot pass. {sentence}")
        for name in self.bypassed:
            lines.append(f"  bypassed: the rule of {name}; its code is differentiated instead.")
        for path in self.not_finite:
            lines.append(f"  NOT FINITE: the estimate for {path}, although the loss is finite.")
        for path in self.always_zero:
            lines.append(
                f"  always zero: {path} never reaches the loss through a derivative "
                "(unused, argmax, stop_gradient, integers)."
            )
        for path, fallback in self.dense:
            lines.append(
                f"  dense: the tangent of {path} is formed, {list(fallback.shape)}, for "
                f"{fallback.primitive} at {fallback.source}."
            )
        lines += self._about_sites()
        if not (self.blocking or self.not_finite or self.dense or self.sites):
            lines.append("  nothing is blocked, and no structured tangent is formed")
        if self.cost_ratio is not None:
            lines.append(
                f"  cost: {self.cost_ratio:.2f} x the function alone, by a count of multiply-adds"
            )
        if self.state_bytes:
            lines.append(f"  state: {_size(self.state_bytes)}, kept from step to step")
        if self.largest is not None:
            size, shape, what = self.largest
            lines.append(f"  largest temporary: {_size(size)}, {list(shape)}, by {what}")
        if self.memory is not None:
            alone = (
                ""
                if self.memory_alone is None
                else f", the function alone {_size(self.memory_alone)}"
            )
            lines.append(f"  temporary memory: {_size(self.memory)}{alone}")
        lines += [f"  note: {sentence}" for sentence in self.advice]
        return "\n".join(lines)

    def _about_sites(self) -> list[str]:
        lines = []
        if activations := [shape for _, shape, has_examples in self.sites if has_examples]:
            numbers = sum(map(math.prod, activations))
            lines.append(f"  sites: {len(activations)}, with {numbers:,} numbers to perturb")
        for paths, shape, has_examples in self.sites:
            if not has_examples:
                lines.append(
                    f"  perturbed itself: {' and '.join(paths)}, as {list(shape)}: its result is "
                    "no pre-activation of "
                    "single examples."
                )
        return lines


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB" if num_bytes >= 1e5 else f"{num_bytes / 1e3:,.1f} kB"
