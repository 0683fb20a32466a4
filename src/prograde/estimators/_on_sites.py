"""What estimators that perturb pre-activations have in common."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from prograde._custom_vjp import inline_custom_vjp
from prograde._inject import varying_like
from prograde._sites import Program, Site, collect, sites, with_cotangents
from prograde._sites.records import Record
from prograde.estimators._estimator import (
    Estimate,
    Estimator,
    check_choice,
    check_whole,
    split_params,
    unpack,
    wide,
)
from prograde.tangents import Normal, Rademacher
from prograde.tangents._draw import threefry


class Perturbed(eqx.Module):
    """A run with all sites perturbed: what every estimator on sites starts from.

    `directional` is [num_tangents, batch], or [num_tangents, 1] for the loss of the whole batch. With an exact head, `errors` are
    the derivatives of every example's loss by the values at the sites of the tail, the last of which is the head, and `at_head` is
    the derivative of the value at the head along each tangent.
    """

    value: Array
    aux: PyTree
    directional: Array
    records: tuple[Record, ...]
    errors: list[Array]
    at_head: Array | None


@dataclass(frozen=True)
class SiteEstimator(Estimator):
    """What estimators that perturb pre-activations have in common."""

    noise: Normal | Rademacher = field(default_factory=Rademacher)
    num_tangents: int = 1
    head: Literal["perturbed", "exact"] = "perturbed"
    per_example: bool = True
    custom_vjp: Literal["error", "inline"] = "error"

    def __post_init__(self):
        if not isinstance(self.noise, Normal | Rademacher):
            raise TypeError(f"noise={self.noise!r}, but noise has independent entries: Rademacher() or Normal().")
        check_whole("num_tangents", self.num_tangents)
        check_choice("head", self.head, ("perturbed", "exact"))
        check_choice("custom_vjp", self.custom_vjp, ("error", "inline"))

    def program(self, fun: Any, params: PyTree, args: tuple[Any, ...], has_aux: bool) -> tuple[Program, PyTree[Array]]:
        """The function as a program with sites, and the parameters it is differentiated by."""
        f, floats = split_params(fun, params, args, has_aux)
        f = inline_custom_vjp(f) if self.custom_vjp == "inline" else f

        def of_args(floats: PyTree[Array], *args: Any) -> tuple[Array, PyTree]:
            f, _ = split_params(fun, params, args, has_aux)
            return (inline_custom_vjp(f) if self.custom_vjp == "inline" else f)(floats)

        loss = jax.eval_shape(f, floats)[0]
        if self.per_example and loss.ndim == 0:
            raise ValueError(
                f"the function returned a scalar loss, but {type(self).__name__} weighs the perturbation of each example by that "
                "example's own loss. Return the losses of all examples, [batch], without taking their mean (the estimator "
                "takes it), or pass per_example=False."
            )
        batch = loss.shape[0] if self.per_example and loss.shape != (1,) else None
        return Program(of_args, floats, args, batch), floats

    def perturbed_run(self, program: Program, floats: PyTree[Array], key: Any) -> Perturbed:
        """The loss, and its derivative along `num_tangents` perturbations of all sites."""
        leaves = jax.tree.leaves(floats)
        key = threefry(key)
        tail = self._tail(program, floats) if self.head == "exact" else {}

        def one_tangent(index: Array) -> Perturbed:
            def along(s: Array, shifts: Mapping[int, Array]) -> Any:
                run = program.run(leaves, s, jax.random.fold_in(key, index), self.noise._entries, shifts)
                loss, *aux = run.outputs
                return (loss, run.at_head), (aux, run.records)

            def both(shifts: Mapping[int, Array]) -> Any:
                primals = jnp.zeros(()), jnp.ones(())
                out = jax.jvp(lambda s: along(s, shifts), primals[:1], primals[1:], has_aux=True)
                (loss, _), (directional, at_head), (aux, records) = out
                return loss, (directional, at_head, aux, records)

            if not tail:
                (loss, (directional, at_head, aux, records)), errors = both({}), []
            else:
                # reverse mode for the tail and what follows it, and nothing before
                zeros = self._no_shifts(program, leaves, tail)
                loss, pull, (directional, at_head, aux, records) = jax.vjp(both, zeros, has_aux=True)
                errors = self._errors(program, pull, loss)
            directional = wide(directional if program.batch is not None else jnp.mean(directional)[None])
            _, aux = jax.tree.unflatten(program.out_tree, [loss, *aux])
            return Perturbed(jnp.mean(loss), aux, directional, records, errors, at_head)

        # the records are the same for all tangents but for the noise, which gets an axis for them
        each = jax.eval_shape(one_tangent, jnp.asarray(0))
        axes = Perturbed(None, None, 0, _noise_axes(each.records), None, 0)  # pyright: ignore[reportArgumentType]
        return jax.vmap(one_tangent, out_axes=axes)(jnp.arange(self.num_tangents))

    def plain_run(self, program: Program, floats: PyTree[Array], key: Any) -> Perturbed:
        """The loss and its derivatives at the exact sites, without tangents. The noise in the records is not used."""
        leaves = jax.tree.leaves(floats)

        def loss_of(shifts: Mapping[int, Array]) -> Any:
            run = program.run(leaves, jnp.zeros(()), threefry(key), self.noise._entries, shifts)
            return run.outputs[0], (run.outputs[1:], run.records)

        zeros = self._no_shifts(program, leaves, self._tail(program, floats))
        loss, pull, (aux, records) = jax.vjp(loss_of, zeros, has_aux=True)
        errors = self._errors(program, pull, loss)
        _, aux = jax.tree.unflatten(program.out_tree, [loss, *aux])
        return Perturbed(jnp.mean(loss), aux, jnp.zeros((0, program.batch or 1)), records, errors, None)

    @staticmethod
    def _no_shifts(program: Program, leaves: Sequence[Array], tail: Mapping[int, Any]) -> dict[int, Array]:
        zeros = {i: jnp.zeros(value.shape, value.dtype) for i, value in tail.items()}
        return jax.tree.map(lambda x: varying_like(x, *leaves, *program.arrays), zeros)

    @staticmethod
    def _errors(program: Program, pull: Callable, loss: Array) -> list[Array]:
        (errors,) = pull(jnp.ones_like(loss) if program.batch is not None else jnp.ones_like(loss) / loss.size)
        return list(errors.values())

    def from_noise(self, site: Site, directional: Array) -> Array:
        """1/(K B) sum_k d_k u_k: a site's cotangent of the mean loss, from directional derivatives [num_tangents, batch]."""
        noise = jnp.moveaxis(site.noise, site.depth, 0)
        weights = site.per_example(directional)
        weights = weights.reshape(len(weights), *(1,) * site.depth, *weights.shape[1:])
        return jnp.mean(weights * noise.astype(weights.dtype), axis=0) / directional.shape[1]

    def from_cotangents(
        self, program: Program, run: Perturbed, floats: PyTree[Array], cotangents: Sequence[Array], state: PyTree
    ) -> Estimate:
        """The estimate that follows from a cotangent of the mean loss at each site; those of the tail are known."""
        leaves, treedef = jax.tree.flatten(floats)
        cotangents = [*cotangents, *(error / (program.batch or 1) for error in run.errors)]
        grads = collect(with_cotangents(run.records, cotangents), leaves)
        grads = [g.astype(w.dtype) for g, w in zip(grads, leaves, strict=True)]
        directional = run.directional if program.batch is not None else run.directional[:, 0]
        return Estimate(run.value, unpack(run.aux), treedef.unflatten(grads), directional, state)

    def shapes(self, program: Program, floats: PyTree[Array]) -> tuple[Record, ...]:
        """The records of a run, traced and not run; their noise has no axis for the tangents."""
        if program.shapes is not None:
            return program.shapes
        leaves = jax.tree.leaves(floats)
        run = jax.eval_shape(lambda: program.run(leaves, jnp.zeros(()), jax.random.key(0), self.noise._entries))
        program.shapes = run.records
        return run.records

    def _tail(self, program: Program, floats: PyTree[Array]) -> dict[int, Any]:
        """The records that are exact, and shape and dtype of the value at each. The last one is the head."""
        records = self.shapes(program, floats)
        last = records[-1] if records else None
        if not isinstance(last, Site) or (program.batch is not None and last.axis is None):
            raise ValueError(
                "head='exact', but the last weight that acts on the examples is inside a loop or acts on all of them together, "
                "so what follows it is no function of its output alone. Pass head='perturbed'."
            )
        count = self.num_exact
        tail = {i: record.noise for i, record in list(enumerate(records))[-count:] if isinstance(record, Site)}
        if len(tail) < count:
            why = (
                f"the function has only {len(tail)}"
                if len(records) < count
                else "one of its last weights is inside a loop"
            )
            raise ValueError(f"tail={count}, but {why}. Pass a smaller tail.")
        return tail

    @property
    def num_exact(self) -> int:
        """How many of the last sites have exact cotangents where the head is exact."""
        return 1


def _noise_axes(records: Sequence[Record]) -> Any:
    """The `out_axes` of records under `vmap` over tangents."""
    nothing = jax.tree.map(lambda _: None, tuple(records))
    depths = [site.depth for site in sites(records)]
    return with_cotangents(nothing, depths)  # pyright: ignore[reportArgumentType]


def by_example(x: Array, site: Site, lead: int) -> Array:
    """A value of a site, after `lead` other axes, as [..., batch, units]."""
    if site.axis is None:
        return x.reshape(*x.shape[:lead], 1, -1)
    x = jnp.moveaxis(x, lead + site.axis, lead)
    return x.reshape(*x.shape[: lead + 1], -1)


def as_value(x: Array, site: Site) -> Array:
    """Undoes `by_example` for [*loops, batch, units]."""
    shape = site.noise.shape[site.noise.ndim - site.ndim :]
    if site.axis is None:
        return x.reshape(*x.shape[: site.depth], *shape)
    rest = shape[: site.axis] + shape[site.axis + 1 :]
    x = x.reshape(*x.shape[: site.depth + 1], *rest)
    return jnp.moveaxis(x, site.depth, site.depth + site.axis)
