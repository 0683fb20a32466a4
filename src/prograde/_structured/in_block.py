"""A forward run along a tangent in one of several groups of weights, chosen while it runs.

Stages before the chosen group run without a tangent, and cost no more than the program alone. The
whole compiles to the program once without and about once with a tangent. A `scan` over a stack of
layers makes the decision in its body, for each layer.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import JaxprEqn, Literal, Var
from jaxtyping import Array, Int, PyTree

from prograde._costs import multiply_adds
from prograde._custom_vjp import bind_forward
from prograde._inject import inject, varying_like
from prograde._jaxprs import as_closed, bind, scan_groups, traced, walk
from prograde._structured.derivative import Tangent, recorded
from prograde._structured.interpreter import dense, operation
from prograde._structured.stages import BARE, Group, Stage, Staged, Version, is_float
from prograde._structured.tangent import LowRankTangent, Recorder, perturb


class Choice(NamedTuple):
    """The block that has a tangent, and its tangent.

    `tangent(group)` gives the tangents of the leaves of a group; for a stack, of one layer of each.
    """

    block: Int[Array, ""]
    tangent: Callable[[int], list[Tangent]]


class DerivativeInBlock(Staged):
    """A program in stages, which is run along a tangent in the chosen block."""

    def run(
        self, leaves: Sequence[Array], choice: Choice, recorders: Sequence[Recorder | None]
    ) -> tuple[list[Any], list[Any]]:
        """The outputs of the program, and the tangent of the first: `None` for all others."""
        jaxpr = self.program.jaxpr
        values: dict[Any, Any] = dict(zip(jaxpr.constvars, self.program.consts, strict=True))
        values |= dict(zip(jaxpr.invars, leaves, strict=True))
        watched = dict(zip(jaxpr.invars, recorders, strict=True))
        tangents: dict[Any, Any] = {}
        group = jnp.asarray(
            [g for g, w in enumerate(self.weights) for _ in range(w.size)], jnp.int32
        )[choice.block]
        for stage in self.stages:
            operands = (
                [self._value(v, values) for v in stage.invars],
                [tangents[v] for v in self.moving(stage.invars)],
            )
            if stage.stack is not None:
                found = self._scanned(stage, operands, group, choice, watched)
            else:
                versions = self.versions(stage)
                table = [versions.index(self.version(stage, g)) for g in range(len(self.weights))]
                branches = [self._branch(stage, v, choice, watched) for v in versions]
                found = _switch(jnp.asarray(table, jnp.int32)[group], branches, *operands)
            values |= dict(zip(stage.outvars, found[0], strict=True))
            tangents |= dict(zip(stage.slopes, found[1], strict=True))
        return (
            [self._value(v, values) for v in jaxpr.outvars],
            [None if isinstance(v, Literal) else tangents.get(v) for v in jaxpr.outvars],
        )

    def _value(self, v: Any, values: dict[Any, Any]) -> Any:
        """The value of a variable; a view is made from its weight."""
        if isinstance(v, Literal):
            return v.val
        if v not in values:
            eqn = self.views[v]
            out = bind(eqn, [self._value(operand, values) for operand in eqn.invars])
            values |= dict(zip(eqn.outvars, out, strict=True))
        return values[v]

    def _branch(
        self, stage: Stage, version: Version, choice: Choice, watched: dict[Var, Any]
    ) -> Callable[..., tuple[list[Array], list[Array]]]:
        """A version of a stage, as a function of the values and the tangents that enter it."""

        def perturbed(values: list[Array], tangents: list[Array], s: Array) -> list[Any]:
            own = {} if version.own is None else self._own(version.own, choice)
            entering = dict(zip(self.moving(stage.invars), tangents, strict=True))
            found = []
            for v, x in zip(stage.invars, values, strict=True):
                if v in own:
                    x = _with_tangent(x, own[v], s, watched[v])
                elif version.entered and v in entering:
                    x = inject(s, x, entering[v])
                found.append(x)
            return found

        def run(values: list[Any], of: Any) -> list[Any]:
            return walk(stage, values, of, consts=())  # pyright: ignore[reportArgumentType]

        moving = set(stage.slopes)
        return _differentiated(
            run, perturbed, [v in moving for v in stage.outvars], version != BARE
        )

    def _own(self, g: int, choice: Choice) -> dict[Var, Tangent]:
        """The tangents of the leaves of a group. In a stack they are zero in other layers."""
        group, found = self.weights[g], choice.tangent(g)
        if group.layers is not None:
            found = [_in_layer(v, choice.block - group.first, group.layers) for v in found]
        invars = self.program.jaxpr.invars
        return {invars[i]: v for i, v in zip(group.leaves, found, strict=True)}

    def _scanned(
        self,
        stage: Stage,
        operands: tuple[list[Array], list[Array]],
        group: Array,
        choice: Choice,
        watched: dict[Var, Any],
    ) -> tuple[list[Array], list[Array]]:
        """A `scan` over a stack, which decides in its body what has a tangent in each layer."""
        (eqn,), g = stage.eqns, stage.stack
        assert g is not None
        of = dict(zip(stage.invars, operands[0], strict=True))
        tangent_of = dict(zip(self.moving(stage.invars), operands[1], strict=True))
        consts, carry, xs = scan_groups(eqn, eqn.invars)
        value = lambda v: v.val if isinstance(v, Literal) else of[v]  # noqa: E731

        def zeros_or_tangent(v: Any) -> Array | None:
            if not is_float(v):
                return None
            if not isinstance(v, Literal) and v in tangent_of:
                return tangent_of[v]
            zeros = jnp.zeros(v.aval.shape, v.aval.dtype)  # pyright: ignore
            return varying_like(zeros, *map(_typed, operands[0]))

        const_tangents = [None if isinstance(v, Literal) else tangent_of.get(v) for v in consts]
        x_tangents = [None if isinstance(v, Literal) else tangent_of.get(v) for v in xs]
        versions = self._of_layers(stage)
        entered = jnp.asarray([self.version(stage, i).entered for i in range(len(self.weights))])
        here, layer = group == g, choice.block - self.weights[g].first

        def body(carried: Any, sliced: Any) -> Any:
            (c, c_dot), (x, x_dot, i) = carried, sliced
            passed = (i < layer) if eqn.params["reverse"] else (i > layer)
            own = here & (i == layer)
            which = jnp.where(own, 1, jnp.where(entered[group] | (here & passed), 2, 0))
            branches = [self._layer_branch(eqn, g, v, choice, watched) for v in versions]
            inner = ([*map(value, consts), *c, *x], [*const_tangents, *c_dot, *x_dot])
            out, out_dot = _switch(which, branches, *inner)
            k = len(c)
            return (out[:k], out_dot[:k]), (out[k:], out_dot[k:])

        start = (  # a number that is written into the program takes the dtype of its carry
            [_typed(v.val, v) if isinstance(v, Literal) else of[v] for v in carry],
            [zeros_or_tangent(v) for v in carry],
        )
        kinds = list(map(_typed, operands[0])) + list(operands[1])
        start = jax.tree.map(lambda x: varying_like(jnp.asarray(x), *kinds), start)
        along = (list(map(value, xs)), x_tangents, jnp.arange(eqn.params["length"]))
        (last, last_dot), (ys, ys_dot) = lax.scan(
            body,
            start,
            along,
            length=eqn.params["length"],
            reverse=eqn.params["reverse"],
            unroll=eqn.params["unroll"],
        )
        values = dict(zip(eqn.outvars, [*last, *ys], strict=True))
        tangents = dict(zip(eqn.outvars, [*last_dot, *ys_dot], strict=True))
        return (
            [values[v] for v in stage.outvars],
            [tangents[v] for v in stage.slopes],
        )

    def _of_layers(self, stage: Stage) -> list[Version]:
        """Before the tangent, where it starts, and after."""
        assert stage.stack is not None
        again = self.version(stage, stage.stack).entered
        return [BARE, Version(stage.stack, again), Version(None, True)]

    def _layer_branch(
        self, eqn: JaxprEqn, g: int, version: Version, choice: Choice, watched: dict[Var, Any]
    ) -> Callable[..., tuple[list[Array], list[Array]]]:
        """A version of the body of a `scan`."""
        program, group = as_closed(eqn.params["jaxpr"]), self.weights[g]
        at = {self.program.jaxpr.invars[i]: k for k, i in enumerate(group.leaves)}

        def perturbed(values: list[Array], tangents: list[Any], s: Array) -> list[Any]:
            own = choice.tangent(g) if version.own is not None else []
            found = []
            for v, x, x_dot in zip(eqn.invars, values, tangents, strict=True):
                leaf = self.leaf(v) if self.of(v) == g else None
                if leaf is not None and own:
                    x = _with_tangent(x, own[at[leaf]], s, watched[leaf])
                elif leaf is None and version.entered and x_dot is not None:
                    x = inject(s, x, x_dot)
                found.append(x)
            return found

        def run(values: list[Any], of: Any) -> list[Any]:
            return walk(program, values, of)

        moving = [is_float(v) for v in program.jaxpr.outvars]  # pyright: ignore
        found = _differentiated(run, perturbed, moving, version != BARE)
        if version != BARE:
            return _spread(found, moving)
        num_consts, num_carry = (len(part) for part in scan_groups(eqn, eqn.invars)[:2])

        def bare(values: list[Array], tangents: list[Any]) -> tuple[list[Array], list[Any]]:
            out, out_dot = _spread(found, moving)(values, tangents)
            # a carry without tangents keeps its zeros, which are not written again
            kept = tangents[num_consts : num_consts + num_carry]
            return out, [*kept, *out_dot[num_carry:]]

        return bare

    def costs(self, tangent: Callable[[int], list[Tangent]]) -> list[int]:
        """The multiply-adds of a run, by block."""
        choice = Choice(jnp.zeros((), jnp.int32), tangent)
        watched = dict.fromkeys(self.program.jaxpr.invars)
        total = [0] * sum(w.size for w in self.weights)

        def of(branch: Callable, invars: Sequence[Any], moving: Sequence[Any]) -> int:
            given = [v.aval for v in invars], [None if v is None else v.aval for v in moving]
            return multiply_adds(jax.make_jaxpr(branch)(*given).jaxpr)

        for stage in self.stages:
            for_version: dict[Any, int] = {}
            if stage.stack is not None:
                (eqn,), g = stage.eqns, stage.stack
                program = as_closed(eqn.params["jaxpr"]).jaxpr
                num_consts = len(scan_groups(eqn, eqn.invars)[0])
                moving = [
                    v if is_float(v) and (self.of(w) is None) else None  # pyright: ignore
                    for v, w in zip(program.invars, eqn.invars, strict=True)
                ]
                moving[:num_consts] = [None] * num_consts
                before, start, after = (
                    of(self._layer_branch(eqn, g, v, choice, watched), program.invars, moving)
                    for v in self._of_layers(stage)
                )
            for g, w in enumerate(self.weights):
                version = self.version(stage, g)
                for layer in range(w.size):
                    if stage.stack is None:
                        if version not in for_version:
                            branch = self._branch(stage, version, choice, watched)
                            for_version[version] = of(
                                branch, stage.invars, self.moving(stage.invars)
                            )
                        cost = for_version[version]
                    else:
                        length = eqn.params["length"]
                        passed = layer if not eqn.params["reverse"] else length - 1 - layer
                        if g == stage.stack:
                            cost = passed * before + start + (length - 1 - passed) * after
                        else:
                            cost = length * (after if version.entered else before)
                    total[w.first + layer] += cost
        return total


def _typed(x: Any, v: Any = None) -> Any:
    return jnp.asarray(x, None if v is None else v.aval.dtype)


def _switch(which: Array, branches: list[Callable], *operands: Any) -> Any:
    return branches[0](*operands) if len(branches) == 1 else lax.switch(which, branches, *operands)


def _with_tangent(x: Array, v: Tangent, s: Array, recorder: Recorder | None) -> Any:
    """A weight with a tangent, which is converted as the weight was."""
    if isinstance(v, LowRankTangent):
        v = LowRankTangent(tuple(f.astype(x.dtype) for f in v.factors))
        return perturb(v, x, s, recorder)
    return inject(s, x, v.astype(x.dtype))


def _in_layer(v: Tangent, layer: Array, layers: int) -> Tangent:
    """The tangent of one layer as one of the whole stack."""
    at = jnp.arange(layers) == layer
    if not isinstance(v, LowRankTangent):
        return at.reshape(-1, *(1,) * v.ndim).astype(v.dtype) * v
    rank = v.factors[0].shape[-1]
    at = at.reshape(-1, *(1,) * v.factors[0].ndim).astype(v.factors[0].dtype)
    first = jnp.broadcast_to(at, (*at.shape[:-1], rank))
    return LowRankTangent((first, *(f[None] for f in v.factors)))


def _differentiated(
    run: Callable[[list[Any], Any], list[Any]],
    perturbed: Callable[[list[Array], list[Any], Array], list[Any]],
    moving: list[bool],
    has_tangents: bool,
) -> Callable[..., tuple[list[Array], list[Array]]]:
    """(outputs, tangents of those that are moving), as a function of values and tangents.

    All branches of a decision return the same types, so each output varies over devices as much as
    everything that enters.
    """

    def found(values: list[Array], tangents: list[Any]) -> tuple[list[Array], list[Array]]:
        def along(s: Array) -> tuple[list[Array], list[Array]]:
            given = perturbed(values, tangents, s)
            out = [jnp.asarray(dense(x)) for x in run(given, operation)]
            return (
                [x for x, m in zip(out, moving, strict=True) if m],
                [x for x, m in zip(out, moving, strict=True) if not m],
            )

        if has_tangents:
            some, dots, others = jax.jvp(along, (jnp.zeros(()),), (jnp.ones(()),), has_aux=True)
            parts = iter(some), iter(others)
            out = [next(parts[0] if m else parts[1]) for m in moving]
        else:
            out = [jnp.asarray(x) for x in run(list(values), bind_forward)]
            dots = [jnp.zeros_like(x) for x, m in zip(out, moving, strict=True) if m]
        kinds = [_typed(x) for x in jax.tree.leaves((values, tangents))]
        return jax.tree.map(lambda x: varying_like(x, *kinds), (out, dots))

    return found


def _spread(found: Callable, moving: list[bool]) -> Callable:
    """`found`, with `None` in place of the tangents of outputs that have none."""

    def spread(values: list[Array], tangents: list[Any]) -> tuple[list[Array], list[Any]]:
        out, dots = found(values, tangents)
        remaining = iter(dots)
        return out, [next(remaining) if m else None for m in moving]

    return spread


def staged(
    fun: Callable[[PyTree], tuple[PyTree[Array], PyTree]],
    params: PyTree[Array],
    weights: Sequence[Group],
) -> tuple[DerivativeInBlock, Callable[[Sequence[Any]], Any]]:
    """The function as a program in stages, and how its result follows from the outputs."""
    program, rebuilt = traced(fun, params)
    return DerivativeInBlock(program, weights), rebuilt


def derivative_in_block(
    fun: Callable[[PyTree], tuple[Array, PyTree]],
    params: PyTree[Array],
    weights: Sequence[Group],
    choice: Choice,
) -> tuple[Array, Array, PyTree]:
    """(fun, grad fun . v, aux) at `params` along a tangent v in the chosen block."""

    def as_product(params: PyTree) -> tuple[Array, PyTree]:
        # a value that is a weight itself would be no result of any stage
        value, aux = fun(params)
        return value * jnp.ones((), value.dtype), aux

    with recorded(params) as recorders:
        program, rebuilt = staged(as_product, params, weights)
        out, dots = program.run(jax.tree.leaves(params), choice, recorders)
    value, aux = rebuilt(out)
    found = [x for x in dots if x is not None]
    slope = rebuilt(dots)[0]
    if not any(slope is x for x in found):  # nothing reaches the value
        slope = jnp.zeros_like(jnp.asarray(value))
    return value, slope, aux
