"""The base of estimators that perturb pre-activations."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from prograde._custom_vjp import unwatched
from prograde._inject import varying_like
from prograde._sites import (
    Program,
    Reach,
    Run,
    Site,
    collect,
    reach_of,
    sites,
    tangent_axes,
    with_cotangents,
)
from prograde._sites.records import Place, Record
from prograde.kit import (
    Estimate,
    Estimator,
    Loss,
    check_choice,
    check_whole,
    unpack,
    warn_of_tangents,
    wide,
)
from prograde.tangents import Normal, Rademacher, threefry


class Perturbed(eqx.Module):
    """A run with all sites perturbed, from which every estimator on sites starts.

    **Fields:**

    - `value`, `aux`: the mean loss and the packed auxiliary output.
    - `directional`: an array for each loss, [num_tangents, batch, ...], or [num_tangents, 1] for
      the loss of the whole batch.
    - `records`: what happened at each site.
    - `errors`: for each exact site, by the number of its record, the derivative of every example's
      loss by the value there.
    - `at_exact`: the derivative of that value along each tangent.
    """

    value: Array
    aux: PyTree
    directional: list[Array]
    records: tuple[Record, ...]
    errors: dict[int, Array]
    at_exact: list[Array]


@dataclass(frozen=True)
class SiteEstimator(Estimator):
    """The base of estimators that perturb pre-activations; see `ActivityPerturbation`.

    A subclass implements `estimate`: it makes the `program`, takes a `perturbed_run`, computes a
    cotangent for each of the `hidden` sites, and returns `from_cotangents`.
    """

    noise: Normal | Rademacher = field(default_factory=Rademacher)
    num_tangents: int = 1
    head: Literal["perturbed", "exact"] = "perturbed"
    per_example: bool = True
    scale: Literal["one", "rms"] = "one"
    custom_vjp: Literal["error", "inline"] = "error"

    def __post_init__(self):
        if not isinstance(self.noise, Normal | Rademacher):
            raise TypeError(
                f"noise={self.noise!r}, but noise needs independent entries: Rademacher() or "
                "Normal()."
            )
        check_whole("num_tangents", self.num_tangents)
        check_choice("head", self.head, ("perturbed", "exact"))
        check_choice("per_example", self.per_example, (True, False))
        check_choice("scale", self.scale, ("one", "rms"))
        check_choice("custom_vjp", self.custom_vjp, ("error", "inline"))

    def program(
        self, fun: Any, params: PyTree, args: tuple[Any, ...], has_aux: bool
    ) -> tuple[Program, PyTree[Array]]:
        """The function as a program with sites, and the parameters it is differentiated by."""
        floats = Loss(fun, params, args, has_aux).floats

        def of_args(floats: PyTree[Array], *args: Any) -> tuple[list[Array], PyTree]:
            with unwatched():  # the tangents of the program are transposed
                return self.losses(Loss(fun, params, args, has_aux, self.custom_vjp)(floats))

        loss = jax.eval_shape(lambda floats: of_args(floats, *args)[0][0], floats)
        if self.per_example and loss.ndim == 0:
            raise ValueError(
                f"the function returned a scalar loss, but {type(self).__name__} weights the "
                "perturbation of each example by that example's own loss. Return the losses of all "
                "examples, [batch], without taking their mean (the estimator takes it), or pass "
                "per_example=False."
            )
        batch = loss.shape[0] if self.per_example and loss.shape[0] != 1 else None
        return Program(of_args, floats, args, batch), floats

    def losses(self, found: tuple[Array, PyTree]) -> tuple[list[Array], PyTree]:
        """(losses, aux): the losses that weight perturbations, from what the `Loss` returned."""
        loss, aux = found
        return [loss], aux

    def perturbed_run(self, program: Program, floats: PyTree[Array], key: Any) -> Perturbed:
        """The loss, and its derivative along `num_tangents` perturbations of all sites."""
        leaves = jax.tree.leaves(floats)
        key = threefry(key)
        exact = self.exact(program, floats) if self.head == "exact" else {}

        def one_tangent(index: Array) -> Perturbed:
            def along(s: Array, shifts: dict[int, Array]) -> Any:
                run = self._run(program, leaves, s, jax.random.fold_in(key, index), shifts)
                return (run.losses, run.at_exact), (run.aux, run.records)

            def both(shifts: dict[int, Array]) -> Any:
                primals = jnp.zeros(()), jnp.ones(())
                out = jax.jvp(lambda s: along(s, shifts), primals[:1], primals[1:], has_aux=True)
                (losses, _), (directional, at_exact), (aux, records) = out
                return losses, (directional, at_exact, aux, records)

            if not exact:
                (losses, (directional, at_exact, aux, records)), errors = both({}), {}
            else:
                losses, errors, (directional, at_exact, aux, records) = self._errors(
                    program, floats, exact, both
                )
            directional = [wide(d) for d in directional]
            if not self.per_example:
                directional = [jnp.mean(d)[None] for d in directional]
            return Perturbed(
                _mean(losses),
                jax.tree.unflatten(program.aux_tree, aux),
                directional,
                records,
                errors,
                at_exact,
            )

        # all tangents have the same records but for the noise, which gets an axis for them
        each = jax.eval_shape(one_tangent, jnp.asarray(0))
        noise: Any = tangent_axes(each.records)
        axes: Any = Perturbed(*(None, None, 0, noise, None, 0))  # pyright: ignore
        return jax.vmap(one_tangent, out_axes=axes)(jnp.arange(self.num_tangents))

    def plain_run(self, program: Program, floats: PyTree[Array], key: Any) -> Perturbed:
        """The loss and its derivatives at the exact sites, without tangents or noise."""
        leaves = jax.tree.leaves(floats)

        def losses_of(shifts: dict[int, Array]) -> Any:
            run = self._run(program, leaves, jnp.zeros(()), threefry(key), shifts)
            return run.losses, (run.aux, run.records)

        losses, errors, (aux, records) = self._errors(
            program, floats, self.exact(program, floats), losses_of
        )
        directional = [
            jnp.zeros((0, *loss.shape) if self.per_example else (0, 1)) for loss in losses
        ]
        return Perturbed(
            _mean(losses),
            jax.tree.unflatten(program.aux_tree, aux),
            directional,
            records,
            errors,
            [],
        )

    def _run(
        self, program: Program, leaves: list[Array], s: Array, key: Any, shifts: dict[int, Array]
    ) -> Run:
        return program.run(leaves, s, key, self.noise.entries, shifts, relative=self.scale == "rms")

    def _errors(
        self, program: Program, floats: PyTree[Array], exact: Mapping[int, int], losses_of: Any
    ) -> Any:
        """(losses, errors, others): reverse mode of what follows the exact sites, no further."""
        records = self.shapes(program, floats)
        origin = [*jax.tree.leaves(floats), *program.arrays]
        values = {
            i: site.perturbation
            for i, site in enumerate(records)
            if i in exact and isinstance(site, Site)
        }
        zeros = {
            i: varying_like(jnp.zeros(value.shape, value.dtype), *origin)
            for i, value in values.items()
        }
        losses, pull, others = jax.vjp(losses_of, zeros, has_aux=True)
        ones = [jnp.ones_like(x) if self.per_example else jnp.ones_like(x) / x.size for x in losses]
        return losses, pull(ones)[0], others

    def from_noise(self, site: Site, directional: Array) -> Array:
        """1/(K B) sum_k d_k u_k, a site's cotangent of the mean loss, for d [tangents, batch]."""
        weights = site.per_example(directional)
        weights = weights.reshape(len(weights), *(1,) * site.depth, *weights.shape[1:])
        return weighted_noise(site, weights) / directional.shape[1]

    def from_cotangents(
        self,
        program: Program,
        run: Perturbed,
        floats: PyTree[Array],
        cotangents: Sequence[Array],
        state: PyTree,
    ) -> Estimate:
        """The estimate, from a cotangent of the mean loss at each site that is not exact."""
        leaves, treedef = jax.tree.flatten(floats)
        remaining = iter(cotangents)
        known = {id(run.records[i]): error for i, error in run.errors.items()}
        cotangents = [
            known[id(site)] / (program.batch or 1) if id(site) in known else next(remaining)
            for site in sites(run.records)
        ]
        grads = collect(with_cotangents(run.records, cotangents), leaves)
        grads = [g.astype(w.dtype) for g, w in zip(grads, leaves, strict=True)]
        directional = sum(jnp.sum(d, axis=tuple(range(2, d.ndim))) for d in run.directional)
        assert isinstance(directional, jax.Array)  # there is a loss
        directional = directional if program.batch is not None else directional[:, 0]
        warn_of_tangents(run.value, directional)
        return Estimate(run.value, unpack(run.aux), treedef.unflatten(grads), directional, state)

    def hidden(self, run: Perturbed) -> list[Site]:
        """The sites that are not exact."""
        exact = [run.records[i] for i in run.errors]
        return [site for site in sites(run.records) if not any(site is other for other in exact)]

    def shapes(self, program: Program, floats: PyTree[Array]) -> tuple[Record, ...]:
        """The records of a traced run; their noise has no axis for the tangents."""
        if program.shapes is not None:
            return program.shapes
        leaves = jax.tree.leaves(floats)
        run = jax.eval_shape(
            lambda: self._run(program, leaves, jnp.zeros(()), jax.random.key(0), {})
        )
        program.shapes = run.records
        return run.records

    def reach(self, program: Program, floats: PyTree[Array]) -> list[Reach]:
        """What the perturbation of each site reaches."""
        if program.reach is None:
            program.reach = reach_of(
                program.closed.jaxpr, program.num_losses, sites(self.shapes(program, floats))
            )
        return program.reach

    @property
    def num_exact(self) -> int:
        """The number of sites in a row, from the loss, that an exact head makes exact."""
        return 1

    def exact(self, program: Program, floats: PyTree[Array]) -> dict[int, int]:
        """The records with exact cotangents, and the number of sites in a row that follow each."""
        records = self.shapes(program, floats)
        reach = dict(
            zip((site.place for site in sites(records)), self.reach(program, floats), strict=True)
        )

        ranks: dict[Place, int] = {}
        for rank in range(self.num_exact):
            due = [
                place
                for place in reach
                if place not in ranks and reach[place].sites <= ranks.keys()
            ]
            ranks |= dict.fromkeys(due, rank)
        found = {
            i: ranks[record.place]
            for i, record in enumerate(records)
            if isinstance(record, Site)
            and record.place in ranks
            and (program.batch is None or record.axis is not None)
        }
        if 0 not in found.values():
            raise ValueError(
                "head='exact', but the last weight that acts on the examples is inside a loop or "
                "acts on all of them together, so what follows it is no function of its output "
                "alone. Pass head='perturbed'."
            )
        if missing := [rank for rank in range(self.num_exact) if rank not in found.values()]:
            why = f"the function has only {missing[0]}"
            if len(ranks) < len(reach) or missing[0] in ranks.values():
                why = "one of its last weights is inside a loop, or acts on all examples together"
            raise ValueError(f"tail={self.num_exact}, but {why}. Pass a smaller tail.")
        return found


def weighted_noise(site: Site, weights: Array) -> Array:
    """1/K sum_k weights_k u_k / scale^2.

    `weights` has the axes of the tangents, of loops and of the value, or size 1 in their place.
    """
    noise = jnp.moveaxis(site.perturbation, site.depth, 0).astype(weights.dtype)
    if site.scale is not None:  # divided twice, for a square may be too small
        noise = noise / site.scale / site.scale
    return jnp.mean(weights * noise, axis=0)


def _mean(losses: Sequence[Array]) -> Array:
    """The mean over examples of the sum of all losses of an example."""
    total = sum(jnp.mean(loss) * math.prod(loss.shape[1:]) for loss in losses)
    assert isinstance(total, jax.Array)
    return total


def by_example(x: Array, site: Site, lead: int) -> Array:
    """A value of a site, after `lead` other axes, as [..., batch, units]."""
    if site.axis is None:
        return x.reshape(*x.shape[:lead], 1, -1)
    x = jnp.moveaxis(x, lead + site.axis, lead)
    return x.reshape(*x.shape[: lead + 1], -1)


def as_value(x: Array, site: Site) -> Array:
    """Undoes `by_example` for [*loops, batch, units]."""
    shape = site.perturbation.shape[site.perturbation.ndim - site.ndim :]
    if site.axis is None:
        return x.reshape(*x.shape[: site.depth], *shape)
    rest = shape[: site.axis] + shape[site.axis + 1 :]
    x = x.reshape(*x.shape[: site.depth + 1], *rest)
    return jnp.moveaxis(x, site.depth, site.depth + site.axis)
