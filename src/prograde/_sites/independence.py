"""Whether the noise of one example can reach the loss of another.

A value that noise has reached is labelled with the axis along which the examples lie: a position
along it depends on the noise of one example only. Values without noise (data, and weights that were
perturbed as a whole) have no label and may be mixed.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend.core import Jaxpr, JaxprEqn

from prograde._custom_vjp import is_custom_vjp
from prograde._jaxprs import CALLS, as_closed, derivative_of, scan_groups, source, subprograms, walk
from prograde._sites.examples import MIXED, ExamplesError, twins_of, where
from prograde._sites.labels import (
    Along,
    Joined,
    Label,
    count,
    inside,
    moved,
    outside,
    propagated,
    same,
)
from prograde._sites.records import Place


def check_independent(
    jaxpr: Jaxpr,
    twin: Jaxpr,
    weights: Sequence[bool],
    batch: int,
    layout: Mapping[Place, Along],
) -> None:
    """Raises unless the loss of an example depends on the noise of that example alone.

    `weights` says which inputs are weights, `layout` where examples share an axis with others.
    """
    for loss in Walk(batch, layout).run(jaxpr, twin, [None] * len(weights), list(weights))[0]:
        if loss not in (None, Along(0)):
            raise ExamplesError(
                f"the examples do not lie along the first axis of the loss, but along {loss}."
            )


class Walk:
    """Follows labels through a program, and refuses what joins examples."""

    floats_only = True  # whether integers, which carry no noise, are left out

    def __init__(self, batch: int, layout: Mapping[Place, Along] | None = None) -> None:
        self.batch = batch
        self.layout = layout or {}
        self.path: tuple[int, ...] = ()  # the calls and loops that the walk is inside
        self.in_rule = False  # inside a hand-made derivative, where others are not looked at
        self.derivatives: dict[Any, Jaxpr] = {}  # of functions with a hand-made one

    def enters(self, eqn: JaxprEqn) -> bool:
        """Whether something begins inside an operation that no label has reached."""
        return False

    def began(self, var: Any, label: Label) -> Label:
        """The label of a variable, given that of what it was computed from."""
        return label

    def joined(self, eqn: JaxprEqn) -> list[Label]:
        """The labels of the outputs of an operation that joins examples.

        Or is not known to keep them apart.
        """
        raise ExamplesError(
            f"examples depend on each other, or cannot be told apart, after {eqn.primitive.name} "
            f"at {source(eqn)}: it joins "
            "values of several examples, as batch normalisation does, or is not known to keep them "
            "apart. Pass "
            "per_example=False, so that every perturbation is weighed by the loss of the whole "
            "batch (more variance, no "
            "bias), or write it for each example by itself."
        )

    def passed_on(self, label: Label) -> Label:
        """The label, in the next iteration of a loop, of what an iteration hands on."""
        if label is not None and label.axis == -1:
            raise Joined  # something goes on from example to example
        return label

    def same(self, labels: Any) -> Label:
        """The one label of values that come together."""
        return same(labels)

    def run(
        self, jaxpr: Jaxpr, twin: Jaxpr | None, labels: Sequence[Label], weights: Sequence[bool]
    ) -> tuple[list[Label], list[bool]]:
        """The labels of the outputs.

        And which are functions of weights that noise has not reached.
        """
        counts: dict[Any, Any] = {}
        twins = twins_of(jaxpr, twin)

        def operation(eqn: JaxprEqn, values: list[tuple[Label, bool]]) -> list[tuple[Label, bool]]:
            count(eqn, counts)
            given, from_weights = [label for label, _ in values], [weight for _, weight in values]
            out: list[Label] = [None] * len(eqn.outvars)
            out_weights = [False] * len(eqn.outvars)
            if any(g is not None for g in given) or any(from_weights) or self.enters(eqn):
                before, self.path = self.path, (*self.path, id(eqn))
                try:
                    out, out_weights = self.equation(
                        eqn, twins.get(id(eqn)), given, from_weights, counts
                    )
                except Joined:
                    out = self.joined(eqn)
                finally:
                    self.path = before
            return list(zip(out, out_weights, strict=True))

        def arrived(var: Any, value: tuple[Label, bool]) -> tuple[Label, bool]:
            carries_noise = not self.floats_only or jnp.issubdtype(var.aval.dtype, jnp.inexact)
            label, weight = value if carries_noise else (None, False)
            return self.began(var, label), weight

        outputs = walk(
            jaxpr,
            list(zip(labels, weights, strict=True)),
            operation,
            consts=[(None, False)] * len(jaxpr.constvars),
            number=lambda literal: (None, False),
            arrived=arrived,
        )
        return [label for label, _ in outputs], [weight for _, weight in outputs]

    def equation(
        self,
        eqn: JaxprEqn,
        twin: JaxprEqn | None,
        given: list[Label],
        weights: list[bool],
        counts: dict[Any, Any],
    ) -> tuple[list[Label], list[bool]]:
        name = eqn.primitive.name
        if not eqn.outvars:  # such as `jax.debug.print`
            return [], []
        doubles = [None] * len(subprograms(eqn)) if twin is None else subprograms(twin)
        if name in CALLS or is_custom_vjp(eqn):
            return self.run(subprograms(eqn)[0], doubles[0], given, weights)
        if name == "custom_jvp_call":
            labels, from_weights = self.run(subprograms(eqn)[0], doubles[0], given, weights)
            if not self.in_rule:
                by_rule = self.custom_rule(eqn, given)
                labels = [self.same(both) for both in zip(labels, by_rule, strict=True)]
            return labels, from_weights
        if name == "scan":
            return self.scan(eqn, doubles[0], given, weights)
        if name == "while":
            return self.loop(eqn, doubles, given, weights)
        if name == "cond":
            branches = [
                self.run(b, d, given[1:], weights[1:])
                for b, d in zip(subprograms(eqn), doubles, strict=True)
            ]
            labels = [
                self.same(branch[0][i] for branch in branches) for i in range(len(eqn.outvars))
            ]
            return labels, [
                any(branch[1][i] for branch in branches) for i in range(len(eqn.outvars))
            ]
        if name == "stop_gradient":
            return [None] * len(eqn.outvars), [False] * len(eqn.outvars)
        if any(g is not None for g in given):
            label = self.propagated(eqn, given, counts)
            # where more noise is injected it must lie along the same axis
            if any(weights) and label is not None and label.axis >= 0:
                here = [at for at in self._where(eqn, twin) if at is not None and at is not MIXED]
                if any(at != label for at in here):
                    raise Joined
            return [label] * len(eqn.outvars), [False] * len(eqn.outvars)
        # weights meet the examples: there noise may be injected, along the axis that grows with
        # them
        here = self._where(eqn, twin)
        labels = [None if at is MIXED else at for at in here]
        return labels, [at is None for at in here]

    def _where(self, eqn: JaxprEqn, twin: JaxprEqn | None) -> list[Any]:
        """Where the examples lie in each output of an equation; `None` without a double."""
        if twin is None:
            return [None] * len(eqn.outvars)
        path = self.path[:-1]  # `self.path` ends with this equation
        return [
            where(v, w, self.batch, self.layout.get((path, v)))
            for v, w in zip(eqn.outvars, twin.outvars, strict=True)
        ]

    def propagated(self, eqn: JaxprEqn, given: list[Label], counts: dict[Any, Any]) -> Label:
        """The label of the outputs of an operation that noise reaches."""
        return propagated(eqn, given, counts)

    def custom_rule(self, eqn: JaxprEqn, given: list[Label]) -> list[Label]:
        """A hand-made derivative must keep the examples apart as well.

        The labels of the outputs by it.
        """
        moved = [i for i, g in enumerate(given) if g is not None]
        if not moved:
            return [None] * len(eqn.outvars)
        known = id(eqn), tuple(moved)
        if known not in self.derivatives:
            self.derivatives[known] = derivative_of(eqn, moved).jaxpr
        jaxpr = self.derivatives[known]
        labels = [*given, *(given[i] for i in moved)]
        self.in_rule = True
        try:
            return self.run(jaxpr, None, labels, [False] * len(labels))[0]
        finally:
            self.in_rule = False

    def scan(
        self, eqn: JaxprEqn, double: Any, given: list[Label], weights: list[bool]
    ) -> tuple[list[Label], list[bool]]:
        consts, carry, xs = scan_groups(eqn, list(zip(given, weights, strict=True)))
        consts, carry = (
            [(inside(label), weight) for label, weight in part] for part in (consts, carry)
        )
        slices = [(moved(label, -1), weight) for label, weight in xs]
        for _ in range(len(carry) + 2):
            inputs = [*consts, *carry, *slices]
            labels, from_weights = self.run(
                subprograms(eqn)[0], double, [i[0] for i in inputs], [i[1] for i in inputs]
            )
            new = [
                (self.same([old, self.passed_on(label)]), old_weight or weight)
                for (old, old_weight), label, weight in zip(
                    carry, labels, from_weights, strict=False
                )
            ]
            if new == carry:
                break
            carry = new
        stacked = [moved(label, 1) for label in labels[len(carry) :]]
        return [outside(label) for label, _ in carry] + stacked, [
            w for _, w in carry
        ] + from_weights[len(carry) :]

    def loop(
        self, eqn: JaxprEqn, doubles: Any, given: list[Label], weights: list[bool]
    ) -> tuple[list[Label], list[bool]]:
        skipped, num_consts = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        inputs = list(zip(given, weights, strict=True))[skipped:]
        consts, carry = inputs[:num_consts], inputs[num_consts:]
        body = as_closed(eqn.params["body_jaxpr"]).jaxpr
        at = subprograms(eqn).index(body)
        for _ in range(len(carry) + 2):
            every = [*consts, *carry]
            labels, from_weights = self.run(
                body,
                doubles[at],
                [i[0] for i in every],
                [i[1] for i in every],
            )
            new = [
                (self.same([c[0], label]), c[1] or w)
                for c, label, w in zip(carry, labels, from_weights, strict=True)
            ]
            if new == carry:
                break
            carry = new
        return [c[0] for c in carry], [c[1] for c in carry]
