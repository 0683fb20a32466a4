"""Runs a program with a perturbation injected at every site.

A weight is followed through what is done to it as long as that is affine: transposed, sliced,
multiplied with an activation, added to. Where something else is done to the result, it is
perturbed. So x @ W + b is one site with two weights, and so is x @ W + h @ U.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal
from jax.interpreters.partial_eval import dce_jaxpr
from jaxtyping import Array, Key, PyTree

from prograde import _findings
from prograde._custom_vjp import bind_forward
from prograde._inject import inject
from prograde._jaxprs import (
    as_closed,
    bind,
    called,
    scan_groups,
    subprograms,
    walk,
)
from prograde._sites.examples import MIXED, ExamplesError, doubled, is_traced, twins_of, where
from prograde._sites.independence import check_independent
from prograde._sites.labels import Along
from prograde._sites.layout import layout_of
from prograde._sites.operations import (
    AFFINE,
    KEEPS_ELEMENTS,
    MEETS_ACTIVATION,
    SUMS,
    is_elementwise,
    linear_in,
    size,
)
from prograde._sites.reach import Reach
from prograde._sites.records import Loop, Place, Record, Reshaped, Site, Step, Use, leaves_of

Entries = Callable[[Key[Array, ""], tuple[int, ...], Any], Array]


class Linear(NamedTuple):
    """A value that is affine in leaves: a weight.

    Or (`active`) a pre-activation that has not been perturbed yet.
    """

    value: Array
    uses: tuple[Use, ...]
    axis: Along | None = None
    active: bool = False
    place: Place = ((), None)
    split: Along | None = None  # see `Site.split`


class Frame:
    """The sites of one body: of the program, or of a loop in it."""

    def __init__(
        self, key: Key[Array, ""], s: Array, entries: Entries, relative: bool, depth: int = 0
    ) -> None:
        self.key, self.s, self.entries, self.relative, self.depth = key, s, entries, relative, depth
        self.records: list[Record] = []
        self.drawn = 0
        self.exact: dict[
            int, Array
        ] = {}  # which records are not perturbed, and what is added to their values
        self.at_exact: list[Array] = []

    def next_key(self) -> Key[Array, ""]:
        self.drawn += 1
        return jax.random.fold_in(self.key, self.drawn)


class Run(eqx.Module):
    """What one run gives: the losses and other outputs of the program, the records of its sites.

    The values at the exact ones.
    """

    losses: list[Array]
    aux: list[Any]
    records: tuple[Record, ...]
    at_exact: list[Array]


class Program:
    """A function as a program whose sites can be perturbed.

    The function is `of_args(params, *args) -> (losses, aux)`, where `losses` is a list.

    With `batch` the losses are given per example, `[batch, ...]`, the examples are found in every
    value, and must be independent.
    """

    def __init__(
        self,
        of_args: Callable[..., Any],
        params: PyTree[Array],
        args: tuple[Any, ...],
        batch: int | None,
    ) -> None:
        arrays, rest = eqx.partition(args, is_traced)
        self.closed, shape = jax.make_jaxpr(
            lambda params, arrays: of_args(params, *eqx.combine(arrays, rest)), return_shape=True
        )(params, arrays)
        self.aux_tree = jax.tree.structure(shape[1])
        self.num_losses = len(shape[0])
        self.arrays = jax.tree.leaves(arrays)
        paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        self.paths = [f"params{jax.tree_util.keystr(path)}" for path in paths]
        self.num_leaves = len(paths)
        self.batch = batch
        # of the records of a run, and what they reach, once they are known
        self.shapes: tuple[Record, ...] | None = None
        self.reach: list[Reach] | None = None
        self.twin: ClosedJaxpr | None = None
        self.layout: dict[Place, Along] = {}
        if batch is not None:
            self.twin = doubled(of_args, params, args, batch, self.num_losses)
            wanted = [i < self.num_losses for i in range(len(self.closed.jaxpr.outvars))]
            losses, twin = (
                dce_jaxpr(c.jaxpr, wanted, instantiate=True)[0] for c in (self.closed, self.twin)
            )
            perturbed = [i < self.num_leaves for i in range(len(losses.invars))]
            is_batch = [False] * self.num_leaves + [x.shape[:1] == (batch,) for x in self.arrays]
            layout = layout_of(losses, is_batch, batch)
            try:
                check_independent(losses, twin, perturbed, batch, layout)
            except ExamplesError:
                if not layout:
                    raise
                # what is behind an axis that examples share with others is perturbed itself
                check_independent(losses, twin, perturbed, batch, {})
                return
            self.layout = layout_of(self.closed.jaxpr, is_batch, batch)

    def run(
        self,
        leaves: Sequence[Array],
        s: Array,
        key: Key[Array, ""],
        entries: Entries,
        exact: Mapping[int, Array] | None = None,
        relative: bool = False,
    ) -> Run:
        """One run, with every site perturbed by `s` times the `entries` drawn for it.

        With `relative` the entries are multiplied by the size of what is perturbed.

        `exact` are the records of sites that are not perturbed, and what is added to their values
        instead.
        """
        frame = Frame(key, s, entries, relative)
        frame.exact = dict(exact or {})
        inputs = [*(Linear(w, (Use(i, (), ()),)) for i, w in enumerate(leaves)), *self.arrays]
        twin = None if self.twin is None else self.twin.jaxpr
        outputs = self._evaluate(self.closed, twin, inputs, frame)
        losses = [self._perturbed(loss, frame) for loss in outputs[: self.num_losses]]
        # auxiliary output is not perturbed
        aux = [x.value if isinstance(x, Linear) else x for x in outputs[self.num_losses :]]
        if (findings := _findings.current()) is not None:
            findings.sites = [
                (
                    tuple(self.paths[i] for i in sorted(leaves)),
                    site.perturbation.shape,
                    site.axis is not None or self.batch is None,
                )
                for site, leaves in leaves_of(frame.records)
            ]
        return Run(losses, aux, tuple(frame.records), frame.at_exact)

    def _evaluate(
        self,
        program: ClosedJaxpr,
        twin: Jaxpr | None,
        inputs: Sequence[Any],
        frame: Frame,
        path: tuple[int, ...] = (),
    ) -> list[Any]:
        times_used = Counter(
            v
            for v in [*(v for e in program.jaxpr.eqns for v in e.invars), *program.jaxpr.outvars]
            if not isinstance(v, Literal)
        )
        twins = twins_of(program.jaxpr, twin)

        def operation(eqn: JaxprEqn, values: list[Any]) -> list[Any]:
            if any(isinstance(v, Linear) for v in values):
                return self._equation(eqn, twins.get(id(eqn)), values, frame, (*path, id(eqn)))
            return bind_forward(eqn, values)

        def arrived(variable: Any, value: Any) -> Any:
            if not isinstance(value, Linear):
                return value
            value = value._replace(place=(path, variable))
            # what is used in two ways gets one perturbation for both
            several = value.active and times_used[variable] > 1
            return self._perturbed(value, frame) if several else value

        return walk(program, inputs, operation, arrived=arrived)

    def _equation(
        self,
        eqn: JaxprEqn,
        twin: JaxprEqn | None,
        values: list[Any],
        frame: Frame,
        path: tuple[int, ...],
    ) -> list[Any]:
        name = eqn.primitive.name
        if (inner := called(eqn)) is not None:
            double = None if twin is None else subprograms(twin)[0]
            return self._evaluate(inner, double, values, frame, path)
        if name == "scan":
            return self._scan(eqn, twin, values, frame, path)
        affine = self._affine(eqn, twin, values, path)
        if affine is None and any(isinstance(v, Linear) and not v.active for v in values):
            # a pre-activation that meets the next weight is an activation
            values = [
                self._perturbed(v, frame) if isinstance(v, Linear) and v.active else v
                for v in values
            ]
            affine = self._affine(eqn, twin, values, path)
        if affine is not None:
            return affine
        gain = None
        positions = [i for i, v in enumerate(values) if isinstance(v, Linear)]
        if (
            len(positions) == 1
            and values[positions[0]].active
            and is_elementwise(eqn, values[positions[0]].value.shape)
        ):
            z = lax.stop_gradient(values[positions[0]].value)

            def of_z(z):
                return bind(eqn, [z if i == positions[0] else v for i, v in enumerate(values)])[0]

            if jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.floating):  # pyright: ignore
                _, gain = jax.jvp(of_z, (z,), (jnp.ones_like(z),))
            else:  # a choice has no derivative
                gain = jnp.zeros_like(z)
        values = [self._perturbed(v, frame, gain) for v in values]
        return bind_forward(eqn, values)

    def _where(self, var: Any, twin: Any, path: tuple[int, ...]) -> Any:
        """Where the examples lie in a variable of the equation at the end of this path."""
        assert self.batch is not None
        merged = None if isinstance(var, Literal) else self.layout.get((path[:-1], var))
        return where(var, twin, self.batch, merged)

    def _affine(
        self, eqn: JaxprEqn, twin: JaxprEqn | None, values: list[Any], path: tuple[int, ...]
    ) -> list[Linear] | None:
        """The outputs as affine functions of leaves, or `None` where they are not."""
        name = eqn.primitive.name
        positions = [i for i, v in enumerate(values) if isinstance(v, Linear)]
        if name == "custom_jvp_call":
            if (
                len(positions) > 1
                or values[positions[0]].active
                or not linear_in(eqn, positions[0])
            ):
                return None
        elif not set(positions) <= set(AFFINE.get(name, ())) or (
            len(positions) > 1 and name not in SUMS
        ):
            return None
        if not all(jnp.issubdtype(v.aval.dtype, jnp.floating) for v in eqn.outvars):  # pyright: ignore
            return None
        given = [i for i in range(len(values)) if i not in positions]
        active = any(values[i].active for i in positions)
        if active and name not in SUMS | KEEPS_ELEMENTS:
            scales = name in ("mul", "div") and all(jnp.ndim(values[i]) == 0 for i in given)
            if not scales:
                return None
        axis = None
        if twin is not None:
            axes = [self._where(v, w, path) for v, w in zip(eqn.outvars, twin.outvars, strict=True)]
            of_given = [self._where(eqn.invars[i], twin.invars[i], path) for i in given]
            if (
                MIXED in axes
                or len(set(axes)) > 1
                or (axes[0] is None and any(a is not None for a in of_given))
            ):
                return None
            axis = axes[0]
            active = axis is not None
        elif name in MEETS_ACTIVATION:
            active = active or any(
                jnp.ndim(values[i]) > 0 and not isinstance(eqn.invars[i], Literal) for i in given
            )
        plain = [v.value if isinstance(v, Linear) else v for v in values]
        outputs = []
        for k, value in enumerate(bind(eqn, plain)):
            uses = tuple(
                use.then(Step(eqn, i, k), [v for j, v in enumerate(plain) if j != i])
                for i in positions
                for use in values[i].uses
            )
            outputs.append(Linear(value, uses, axis, active))
        return outputs

    def _perturbed(self, value: Any, frame: Frame, gain: Array | None = None) -> Any:
        if not isinstance(value, Linear):
            return value
        z = value.value
        if value.axis is not None and value.axis != Along(value.axis.axis):
            return self._perturbed_in_parts(value, value.axis, frame, gain)
        axis = None if value.axis is None else value.axis.axis
        if (shift := frame.exact.get(len(frame.records))) is not None:
            z = z + shift.astype(z.dtype)
            frame.at_exact.append(z)
            frame.records.append(
                Site(
                    value.uses,
                    jnp.zeros_like(z),
                    None,
                    None,
                    None,
                    axis,
                    frame.depth,
                    z.ndim,
                    value.split,
                    value.place,
                )
            )
            return z
        noise, scale = frame.entries(frame.next_key(), z.shape, z.dtype), None
        if frame.relative and value.active:
            scale = size(lax.stop_gradient(z), axis)
            noise = noise * scale
        if gain is not None:  # a unit that is not active has no part in the loss
            noise = jnp.where(gain != 0, noise, jnp.zeros_like(noise))
        frame.records.append(
            Site(
                value.uses,
                noise,
                None,
                gain,
                scale,
                axis,
                frame.depth,
                z.ndim,
                value.split,
                value.place,
            )
        )
        return inject(frame.s, z, noise)

    def _perturbed_in_parts(
        self, value: Linear, axis: Along, frame: Frame, gain: Array | None
    ) -> Array:
        """Perturbs a value in the shape in which the examples have an axis of their own."""
        assert self.batch is not None
        z, at = value.value, axis.axis
        shape = (*z.shape[:at], axis.outer, self.batch, axis.inner, *z.shape[at + 1 :])
        apart = value._replace(
            value=z.reshape(shape),
            uses=tuple(use.then(Reshaped(shape), ()) for use in value.uses),
            axis=Along(at + 1),
            split=axis,
        )
        gain = None if gain is None else gain.reshape(shape)
        return self._perturbed(apart, frame, gain).reshape(z.shape)

    def _scan(
        self,
        eqn: JaxprEqn,
        twin: JaxprEqn | None,
        values: list[Any],
        frame: Frame,
        path: tuple[int, ...],
    ) -> list[Any]:
        params = eqn.params
        is_weight = lambda v: isinstance(v, Linear) and not v.active  # noqa: E731
        num_consts, num_carry = (len(part) for part in scan_groups(eqn, values)[:2])
        first_slice = num_consts + num_carry
        values = [
            v if is_weight(v) and not num_consts <= i < first_slice else self._perturbed(v, frame)
            for i, v in enumerate(values)
        ]
        weights = [i for i, v in enumerate(values) if isinstance(v, Linear)]
        if not weights:
            return bind_forward(eqn, values)
        body, double = as_closed(params["jaxpr"]), None if twin is None else subprograms(twin)[0]
        key = frame.next_key()
        consts, carry, xs = (
            values[:num_consts],
            values[num_consts:first_slice],
            values[first_slice:],
        )
        plain_xs = [v.value if isinstance(v, Linear) else v for v in xs]

        def iteration(
            carry: list[Array], sliced: tuple[Array, list[Array]]
        ) -> tuple[list[Array], Any]:
            index, slices = sliced
            inner_key = jax.random.fold_in(key, index)
            inner = Frame(inner_key, frame.s, frame.entries, frame.relative, frame.depth + 1)
            arrays = [*(v.value if isinstance(v, Linear) else v for v in consts), *carry, *slices]
            inputs = [
                Linear(x, (Use(weights.index(i), (), ()),)) if i in weights else x
                for i, x in enumerate(arrays)
            ]
            out = self._evaluate(body, double, inputs, inner, path)
            out = [self._perturbed(v, inner) for v in out]
            return out[: len(carry)], (out[len(carry) :], tuple(inner.records))

        length = params["length"]
        carry, (ys, inside) = lax.scan(
            iteration,
            carry,
            (jnp.arange(length), plain_xs),
            length,
            params["reverse"],
            params["unroll"],
        )
        if inside:
            avals = {i: jax.typeof(values[i].value) for i in weights}
            shapes = [avals[i].update(shape=avals[i].shape[i >= first_slice :]) for i in weights]
            entered = tuple(values[i].uses for i in weights)
            frame.records.append(
                Loop(inside, entered, tuple(i >= first_slice for i in weights), tuple(shapes))
            )
        return [*carry, *ys]
