"""What is kept of a site, and the weight gradients that follow from a cotangent at each of them."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import JaxprEqn
from jaxtyping import Array

from prograde._inject import varying_like
from prograde._jaxprs import bind
from prograde._sites.labels import Along

Place = tuple[
    tuple[int, ...], Any
]  # the calls and loops that a value is inside, and its variable there


class Step:
    """An operation that is linear, or affine, in its operand number `position`."""

    def __init__(self, eqn: JaxprEqn, position: int, output: int) -> None:
        self.eqn, self.position, self.output = eqn, position, output

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Step) and hash(self) == hash(other)

    def __hash__(self) -> int:
        return hash((id(self.eqn), self.position, self.output))

    def __call__(self, value: Array, others: Sequence[Array]) -> Array:
        operands = [*others[: self.position], value, *others[self.position :]]
        return bind(self.eqn, operands)[self.output]


class Reshaped:
    """A change of shape, as a step."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Reshaped) and self.shape == other.shape

    def __hash__(self) -> int:
        return hash(self.shape)

    def __call__(self, value: Array, others: Sequence[Array]) -> Array:
        del others
        return value.reshape(self.shape)


class Use(eqx.Module):
    """How a value depends on one leaf: the steps that led to it, and the other operands of each."""

    leaf: int = eqx.field(static=True)
    steps: tuple[Step | Reshaped, ...] = eqx.field(static=True)
    operands: tuple[tuple[Array, ...], ...]

    def then(self, step: Step | Reshaped, others: Sequence[Array]) -> "Use":
        return Use(self.leaf, (*self.steps, step), (*self.operands, tuple(others)))

    def pull(self, leaf: Array, cotangent: Array) -> Array:
        """The cotangent of the leaf that one of the value makes: the transpose of the steps."""

        def forward(value: Array) -> Array:
            for step, others in zip(self.steps, self.operands, strict=True):
                value = step(value, others)
            return value

        zeros = varying_like(jnp.zeros(leaf.shape, leaf.dtype), leaf)
        out, transpose = jax.vjp(forward, zeros)
        return transpose(varying_like(cotangent.astype(out.dtype), out))[0]


class Site(eqx.Module):
    """A value that was perturbed: a pre-activation, or a weight where it is used in another way.

    **Fields:**

    - `uses`: how the value depends on the weights behind it.
    - `perturbation`: what was added to the value for a unit of s. Its axes are those of the
      enclosing loops, one for the tangents (absent in a single run), and those of the value. `None`
      once there is a cotangent.
    - `cotangent`: the derivative of the loss by the value, with the axes of the enclosing loops and
      of the value; `None` until `with_cotangents` gives one.
    - `gain`: the derivative of the nonlinearity that follows, where one does, with the axes of
      `cotangent`.
    - `scale`: the standard deviation of the perturbation, where it is not 1, with size 1 along the
      axes that share one.
    - `axis`: the axis of the examples within the value; `None` where it has none.
    - `depth`, `ndim`: the number of enclosing loops, and of axes of the value.
    - `split`: set where the examples share an axis of the program's variable with others. There the
      site's value has three axes in place of that one, [outer, batch, inner], and `axis` is the
      second of them.
    - `place`: where in the program the value is.
    """

    uses: tuple[Use, ...]
    perturbation: Any  # an array or None
    cotangent: Any
    gain: Array | None
    scale: Array | None
    axis: int | None = eqx.field(static=True)
    depth: int = eqx.field(static=True)
    ndim: int = eqx.field(static=True)
    split: Along | None = eqx.field(static=True)
    place: Place = eqx.field(static=True)

    @property
    def value_shape(self) -> tuple[int, ...]:
        """The shape of the value, without axes of loops and tangents."""
        known = self.cotangent if self.perturbation is None else self.perturbation
        return known.shape[known.ndim - self.ndim :]

    def per_example(self, values: Array) -> Array:
        """Numbers per example, [..., batch], as an array that broadcasts against the value.

        Their sum where it has no examples.
        """
        if self.axis is None:
            return jnp.sum(values, axis=-1).reshape(*values.shape[:-1], *(1,) * self.ndim)
        ones = (1,) * self.axis, (1,) * (self.ndim - self.axis - 1)
        return values.reshape(*values.shape[:-1], *ones[0], -1, *ones[1])


class Loop(eqx.Module):
    """The sites inside a loop, stacked along its iterations.

    And what the weights inside it are outside.
    """

    inside: tuple["Site | Loop", ...]
    entered: tuple[
        tuple[Use, ...], ...
    ]  # for each weight that entered; its leaf inside is its position here
    sliced: tuple[bool, ...] = eqx.field(static=True)
    leaves: tuple[Any, ...] = eqx.field(static=True)  # shapes and dtypes, as inside


Record = Site | Loop


def sites(records: Sequence[Record]) -> list[Site]:
    """All sites, those inside loops included, in the order of the program."""
    return [
        s
        for record in records
        for s in ([record] if isinstance(record, Site) else sites(record.inside))
    ]


def leaves_of(
    records: Sequence[Record], outside: Sequence[frozenset[int]] | None = None
) -> list[tuple[Site, frozenset[int]]]:
    """Every site with the leaves it depends on.

    `outside` are those of the weights that entered an enclosing loop.
    """

    def of(uses: Sequence[Use]) -> frozenset[int]:
        return frozenset().union(
            *({use.leaf} if outside is None else outside[use.leaf] for use in uses)
        )

    found: list[tuple[Site, frozenset[int]]] = []
    for record in records:
        if isinstance(record, Site):
            found.append((record, of(record.uses)))
        else:
            found += leaves_of(record.inside, [of(uses) for uses in record.entered])
    return found


def with_cotangents(records: Sequence[Record], cotangents: Sequence[Array]) -> tuple[Record, ...]:
    """The records with a cotangent for each site, in place of its perturbation."""
    remaining = iter(cotangents)
    return _with_each(records, lambda site: dict(perturbation=None, cotangent=next(remaining)))


def tangent_axes(records: Sequence[Record]) -> tuple[Record, ...]:
    """The `out_axes` of records under `vmap` over tangents: perturbations get an axis for them.

    And nothing else does.
    """
    nothing = jax.tree.map(lambda _: None, tuple(records))
    return _with_each(nothing, lambda site: dict(perturbation=site.depth))


def _with_each(records: Sequence[Record], fields: Callable[[Site], Any]) -> tuple[Record, ...]:
    def replaced(record: Record) -> Record:
        if isinstance(record, Site):
            return dataclasses.replace(record, **fields(record))
        return dataclasses.replace(record, inside=tuple(replaced(inner) for inner in record.inside))

    return tuple(replaced(record) for record in records)


def collect(records: Sequence[Record], leaves: Sequence[Any]) -> list[Array]:
    """The gradient of each leaf, from records with cotangents."""
    total: list[Array | None] = [None] * len(leaves)

    def add(use: Use, cotangent: Array) -> None:
        part = use.pull(leaves[use.leaf], cotangent)
        before = total[use.leaf]
        total[use.leaf] = part if before is None else before + part

    for record in records:
        if isinstance(record, Site):
            for use in record.uses:
                add(use, record.cotangent)
        else:
            for uses, cotangent in zip(record.entered, _collect_loop(record), strict=True):
                for use in uses:
                    add(use, cotangent)
    return [
        jnp.zeros(leaf.shape, leaf.dtype) if part is None else part
        for part, leaf in zip(total, leaves, strict=True)
    ]


def _collect_loop(loop: Loop) -> list[Array]:
    """The cotangents of the weights that entered a loop: summed over iterations.

    Or one for each where they were sliced.
    """

    def iteration(sums: list[Array], inside: tuple[Record, ...]) -> tuple[list[Array], list[Array]]:
        parts = collect(inside, loop.leaves)
        shared = [part for part, sliced in zip(parts, loop.sliced, strict=True) if not sliced]
        own = [part for part, sliced in zip(parts, loop.sliced, strict=True) if sliced]
        return [a + b for a, b in zip(sums, shared, strict=True)], own

    leaves = [leaf for leaf, sliced in zip(loop.leaves, loop.sliced, strict=True) if not sliced]
    arrays = jax.tree.leaves(loop.inside)
    zeros = [varying_like(jnp.zeros(leaf.shape, leaf.dtype), *arrays) for leaf in leaves]
    sums, own = lax.scan(iteration, zeros, loop.inside)
    shared, stacked = iter(sums), iter(own)
    return [next(stacked) if sliced else next(shared) for sliced in loop.sliced]
