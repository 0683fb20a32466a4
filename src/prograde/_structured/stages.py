"""A program cut into stages, each of which uses the weights of one group.

A tangent in one group enters no stage before the first that uses the group. `in_block` compiles a
stage without tangents, with a tangent that starts in its own weights, and with tangents that enter
it, and decides while the program runs. A `scan` over a stack of layers is a stage of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal, Var

from prograde._jaxprs import bind, called, scan_groups, walk

# what only looks at a weight in another way: run where the weight is used
_VIEWS = {
    "transpose", "squeeze", "rev", "slice", "split", "reshape", "broadcast_in_dim", "copy",
    "convert_element_type", "expand_dims",
}  # fmt: skip
_MOST_STAGES = 4  # for each group; a program with more runs in one stage


class Group(NamedTuple):
    """A block of the parameters, or the equal blocks of a stack of layers.

    **Fields:** `name`; `first`, the number of its first block; `leaves`, the positions of its
    leaves among those of the parameters; `layers`, the number of blocks along the first axis of its
    leaves, or `None` for a single block.
    """

    name: str
    first: int
    leaves: tuple[int, ...]
    layers: int | None

    @property
    def size(self) -> int:
        """The number of blocks."""
        return self.layers or 1


class Version(NamedTuple):
    """What has a tangent in a stage: a group of its own weights, and what enters it."""

    own: int | None
    entered: bool


BARE = Version(None, False)


@dataclass(frozen=True)
class Stage:
    """Some equations of a program, with the parts of a program that `walk` needs."""

    eqns: tuple[JaxprEqn, ...]
    invars: tuple[Var, ...]
    outvars: tuple[Var, ...]
    slopes: tuple[Var, ...]  # the outputs whose tangents are used
    groups: frozenset[int]
    stack: int | None = None  # the group whose layers the only equation, a `scan`, runs over
    constvars: tuple[Var, ...] = ()


class _Tagged(NamedTuple):
    """A value while a program is flattened, and whether it is a view of a weight."""

    value: Any
    is_weight: bool


def _flattened(program: ClosedJaxpr) -> ClosedJaxpr:
    """The program with the calls written out that are given weights."""

    def step(eqn: JaxprEqn, values: list[_Tagged]) -> list[_Tagged]:
        weighty = any(v.is_weight for v in values)
        inner = called(eqn)
        if weighty and inner is not None:
            consts = [_Tagged(c, False) for c in inner.consts]
            return walk(inner, values, step, consts=consts, number=number)
        out = bind(eqn, [v.value for v in values])
        return [_Tagged(x, weighty and _is_view(eqn)) for x in out]

    def number(literal: Literal) -> _Tagged:
        return _Tagged(literal.val, False)

    def flat(*leaves: Any) -> list[Any]:
        consts = [_Tagged(c, False) for c in program.consts]
        weights = [_Tagged(w, True) for w in leaves]
        out = walk(program, weights, step, consts=consts, number=number)
        return [x.value for x in out]

    return jax.make_jaxpr(flat)(*program.in_avals)


def _is_view(eqn: JaxprEqn) -> bool:
    """True where the only operand that is no number is the first; `stretch` has constants too."""
    if eqn.primitive.name == "stretch":
        return True
    return eqn.primitive.name in _VIEWS and all(isinstance(v, Literal) for v in eqn.invars[1:])


def is_float(v: Any) -> bool:
    return jnp.issubdtype(v.aval.dtype, jnp.inexact)


class Staged:
    """A program in stages, for weights in groups."""

    def __init__(self, program: ClosedJaxpr, weights: Sequence[Group]):
        self.weights = weights
        self.program = _flattened(program)
        jaxpr = self.program.jaxpr
        self.group = {jaxpr.invars[i]: g for g, w in enumerate(weights) for i in w.leaves}
        self.views: dict[Var, JaxprEqn] = {}  # what makes a view of a weight
        eqns = []
        for eqn in jaxpr.eqns:
            first = eqn.invars[0] if eqn.invars else None
            if isinstance(first, Var) and first in self.group and _is_view(eqn):
                self.views |= dict.fromkeys(eqn.outvars, eqn)
                self.group |= dict.fromkeys(eqn.outvars, self.group[first])
            else:
                eqns.append(eqn)
        cuts = self._cut(eqns)
        if len(cuts) > _MOST_STAGES * len(weights):
            cuts = [(eqns, frozenset(g for cut in cuts for g in cut[1]), None)]
        self.reach = self._reached(eqns)
        self.stages = self._stages(cuts)

    def of(self, v: Any) -> int | None:
        """The group of which a variable is a weight, or a view of one."""
        return None if isinstance(v, Literal) else self.group.get(v)

    def _cut(self, eqns: list[JaxprEqn]) -> list[tuple[list[JaxprEqn], frozenset[int], int | None]]:
        """(equations, groups whose weights they use, the stack that they run over), in order."""
        cuts: list[tuple[list[JaxprEqn], frozenset[int], int | None]] = []
        current, groups = [], frozenset()
        for eqn in eqns:
            used = frozenset(g for v in eqn.invars if (g := self.of(v)) is not None)
            stack = self._stack(eqn, used)
            if current and (stack is not None or (groups and not used <= groups)):
                cuts.append((current, groups, None))
                current, groups = [], frozenset()
            if stack is not None:
                cuts.append(([eqn], used, stack))
                continue
            current, groups = [*current, eqn], groups | used
        return [*cuts, (current, groups, None)] if current else cuts

    def _stack(self, eqn: JaxprEqn, used: frozenset[int]) -> int | None:
        """The group over whose layers a `scan` runs, and of which it uses nothing else."""
        if eqn.primitive.name != "scan" or len(used) != 1:
            return None
        (g,) = used
        consts, carry, xs = scan_groups(eqn, eqn.invars)
        if self.weights[g].layers != eqn.params["length"]:
            return None
        if any(self.of(v) is not None for v in (*consts, *carry)):
            return None
        return g if all(self.leaf(v) is not None for v in xs if self.of(v) == g) else None

    def leaf(self, v: Any) -> Var | None:
        """The weight of which a variable is a conversion; `None` for any other view."""
        while v in self.views:
            eqn = self.views[v]
            if eqn.primitive.name not in ("convert_element_type", "copy"):
                return None
            v = eqn.invars[0]
        return v

    def _reached(self, eqns: list[JaxprEqn]) -> dict[Var, frozenset[int]]:
        """The groups whose tangents reach a variable."""
        reach = {v: frozenset([g]) for v, g in self.group.items()}
        for eqn in eqns:
            found = frozenset[int]().union(
                *(reach.get(v, frozenset()) for v in eqn.invars if isinstance(v, Var))
            )
            reach |= {v: found if is_float(v) else frozenset() for v in eqn.outvars}
        return reach

    def _stages(self, cuts: list[Any]) -> list[Stage]:
        out = self.program.jaxpr.outvars
        later: set[Any] = {v for v in out if isinstance(v, Var)}
        differentiated: set[Any] = {v for v in out[:1] if isinstance(v, Var)}
        stages = []
        for eqns, groups, stack in reversed(cuts):
            eqns = eqns if stack is not None else self._with_views(eqns)
            made = dict.fromkeys(v for eqn in eqns for v in eqn.outvars)
            read = dict.fromkeys(v for eqn in eqns for v in eqn.invars if isinstance(v, Var))
            invars = tuple(v for v in read if v not in made)
            outvars = tuple(v for v in made if v in later and v not in self.views)
            slopes = tuple(v for v in self.moving(outvars) if v in differentiated)
            stages.append(Stage(tuple(eqns), invars, outvars, slopes, groups, stack))
            later |= set(invars)
            differentiated |= set(invars)
        return stages[::-1]

    def _with_views(self, eqns: list[JaxprEqn]) -> list[JaxprEqn]:
        """The equations, with those before them that make the views they use."""
        found: dict[int, JaxprEqn] = {}

        def make(v: Any) -> None:
            if not isinstance(v, Literal) and v in self.views:
                eqn = self.views[v]
                for operand in eqn.invars:
                    make(operand)
                found.setdefault(id(eqn), eqn)

        for eqn in eqns:
            for v in eqn.invars:
                make(v)
            found.setdefault(id(eqn), eqn)
        return list(found.values())

    def moving(self, variables: Sequence[Var]) -> list[Var]:
        """The variables that may have a tangent, without the weights."""
        return [v for v in variables if v not in self.group and self.reach.get(v)]

    def version(self, stage: Stage, g: int) -> Version:
        """What has a tangent in a stage where group g does."""
        entered = any(g in self.reach[v] for v in self.moving(stage.invars))
        return Version(g if g in stage.groups else None, entered)

    def versions(self, stage: Stage) -> list[Version]:
        """The versions of a stage that occur."""
        of_groups = [self.version(stage, g) for g in range(len(self.weights))]
        return list(dict.fromkeys(of_groups))
