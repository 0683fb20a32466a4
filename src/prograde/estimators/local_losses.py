"""Local losses: many losses, and noise that is weighted by the losses that it can reach."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from prograde._sites import Reach, Site, sites
from prograde.estimators.site_estimator import SiteEstimator, weighted_noise
from prograde.kit import check_key, pack, unpack


def total_loss(fun: Callable[..., Any], has_aux: bool = False) -> Callable[..., Any]:
    """The sum of many losses for each example, [batch], which `LocalLosses` differentiates.

        total_i = sum over losses and their positions of loss_i

    **Arguments:**

    - `fun`: returns an array [batch, ...], or a tree of such; with `has_aux` a pair of that and
      anything else.
    - `has_aux`: `True` where `fun` returns a pair; then the result returns a pair as well.

    **Returns:** a function of the same arguments, for any estimator, such as `Backprop`.

    **Errors:** `ValueError` for a loss without an axis for the examples, or losses that differ in
    its length; `TypeError` for losses that are not real floating-point arrays.

    **Source:** arXiv 2210.03310, section 4, where losses are summed.

    Examples:
        >>> import jax, jax.numpy as jnp, prograde as pg
        >>> fun = pg.total_loss(lambda w, x: {"first": (x * w) ** 2, "second": jnp.sum(x, axis=-1)})
        >>> fun(jnp.ones(2), jnp.ones((3, 2))).shape
        (3,)
    """

    def total(*args: Any, **kwargs: Any) -> Any:
        out = fun(*args, **kwargs)
        if has_aux and not (isinstance(out, tuple) and len(out) == 2):
            raise TypeError(
                f"has_aux=True, but the function returned {type(out).__name__} instead of a pair "
                "(losses, aux)."
            )
        losses, aux = out if has_aux else (out, None)
        summed = sum(jnp.sum(loss, axis=tuple(range(1, loss.ndim))) for loss in _checked(losses))
        return (summed, aux) if has_aux else summed

    return total


def _checked(losses: PyTree) -> list[Array]:
    """The losses of a tree. Each must have the examples along its first axis."""
    found = [
        (jax.tree_util.keystr(path), loss)
        for path, loss in jax.tree_util.tree_leaves_with_path(losses)
    ]
    if not found:
        raise TypeError(
            f"the function returned {losses!r}, but an array of losses [batch, ...], or a tree of "
            "such, is needed."
        )
    for path, loss in found:
        if not eqx.is_array_like(loss) or not jnp.issubdtype(jnp.result_type(loss), jnp.floating):
            raise TypeError(
                f"losses{path} is {loss!r}, but a real floating-point array [batch, ...] is needed."
            )
        if jnp.ndim(loss) == 0:
            raise ValueError(
                f"losses{path} is a scalar, but every loss needs the examples along its first "
                "axis, [batch, ...]. Return the losses of all examples, without taking their mean "
                "(the estimator takes it)."
            )
    if len({jnp.shape(loss)[0] for _, loss in found}) > 1:
        shapes = ", ".join(f"losses{path} {jnp.shape(loss)}" for path, loss in found)
        raise ValueError(
            f"the losses have first axes of different lengths, {shapes}, but all need the same "
            "examples along it."
        )
    return [jnp.asarray(loss) for _, loss in found]


@dataclass(frozen=True)
class LocalLosses(SiteEstimator):
    """Activity perturbation with many losses: noise is weighted by the losses that it can reach.

        g_W = 1/B sum_i x_i delta_i^T
        delta_i[p] = 1/K sum_k (sum of d_ikl over the losses l that p reaches) u_ik[p]
        d_ikl = grad loss_il . u_k                       for every position p of a site

    It estimates the gradient of the mean over examples of the sum of all losses, as `Backprop` of
    `total_loss(fun)` has it. The function returns an array of losses, [batch, ...], or a tree of
    such: one for each block, and along further axes one for each patch or group of channels. The
    estimator reads off the program what a perturbation reaches. A block whose input is
    `jax.lax.stop_gradient(h)` does not reach back, so its loss has no weight for earlier blocks.
    Where a patch, a group of channels, or an iteration of a `scan` is not mixed with others on the
    way to a loss, its noise is weighted by its own positions of that loss. Where they are mixed, or
    an operation is not known to keep them apart, all positions count, with more variance and no
    bias.

    **Arguments:** those of `ActivityPerturbation`; losses are always per example. With
    `head="exact"` the derivative by the output of every site that no other follows is exact, such
    as that of each block's own classifier.

    **Bias:** none, with respect to the sum of the losses. Where `stop_gradient` cuts blocks apart,
    that sum has another gradient than the loss at the end of the network: greedy learning follows
    it.

    **Variance:** with U_l perturbed units that reach loss l of an example,
    E |delta_i|^2 = sum_l U_l |grad_z loss_il|^2 / K for signs where each unit reaches one loss. G
    groups with the same gradient divide the variance by G.

    **Cost:** that of `ActivityPerturbation`. Reach is found once, while tracing.

    **Errors:** `ValueError` for a loss without an axis for the examples, losses of different
    batches, examples that depend on each other, `per_example=False`; `TypeError` for losses that
    are no real arrays; all at trace time.

    **Source:** Ren et al., arXiv 2210.03310, section 4 (LG-FG-A).

    Examples:
        >>> import jax, jax.numpy as jnp, prograde as pg
        >>> def losses(params, x, y):
        ...     first = jax.nn.relu(x @ params["w1"])
        ...     second = jax.nn.relu(jax.lax.stop_gradient(first) @ params["w2"])
        ...     heads = zip((first, second), params["out"])
        ...     return [jnp.sum((h @ out - y) ** 2, axis=-1) for h, out in heads]
        >>> params = {"w1": jnp.ones((8, 16)) / 8, "w2": jnp.ones((16, 16)) / 16}
        >>> params["out"] = [jnp.ones((16, 4)) / 16] * 2
        >>> x, y = jnp.ones((32, 8)), jnp.zeros((32, 4))
        >>> estimator, key = pg.LocalLosses(head="exact"), jax.random.key(0)
        >>> result = estimator.estimate(losses, key, None, params, x, y)
        >>> float(result.value), result.grads["w1"].shape
        (8.0, (8, 16))
    """

    def __post_init__(self):
        super().__post_init__()
        if not self.per_example:
            raise ValueError(
                "per_example=False, but LocalLosses weights noise by the losses of single examples."
                " Use ActivityPerturbation(per_example=False) for the loss of a whole batch."
            )

    def objective(self, fun, has_aux=False):
        return total_loss(fun, has_aux)

    def program(self, fun, params, args, has_aux):
        def with_parts(*args: Any) -> Any:
            out = fun(*args)
            total = total_loss(lambda: out, has_aux)()
            losses, aux = (out[0], total[1]) if has_aux else (out, None)
            return total[0] if has_aux else total, (_checked(losses), aux)

        return super().program(with_parts, params, args, True)

    def losses(self, found):
        _, packed = found
        losses, aux = unpack(packed)
        return losses, pack(aux)

    def estimate(self, fun, key, state, params, *args, has_aux=False):
        check_key(key)
        program, floats = self.program(fun, params, args, has_aux)
        run = self.perturbed_run(program, floats, key)
        hidden = self.hidden(run)
        places = [site.place for site in sites(self.shapes(program, floats))]
        reach = dict(zip(places, self.reach(program, floats), strict=True))
        batch = run.directional[0].shape[1]
        cotangents = [
            weighted_noise(site, _weights(site, reach[site.place], run.directional)) / batch
            for site in hidden
        ]
        return self.from_cotangents(program, run, floats, cotangents, state)


def _weights(site: Site, reach: Reach, directional: Sequence[Array]) -> Array:
    """The weights of `weighted_noise`: for each position, the sum over the losses it reaches."""
    num_tangents = len(directional[0])
    total = jnp.zeros((num_tangents, *(1,) * (site.depth + site.ndim)), directional[0].dtype)
    first = 1 + site.depth  # axis of the value
    for d, pairs in zip(directional, reach.along, strict=True):
        if pairs is None:
            continue
        # where each axis of the derivatives goes: (axis, tiled so often, repeated so often)
        to = {k + 1: (first + where.axis, where.outer, where.inner) for k, where in pairs}
        if site.axis is not None:
            to[1] = (first + site.axis, 1, 1)
        d = jnp.sum(d, axis=tuple(k for k in range(1, d.ndim) if k not in to))
        kept = sorted(to)
        order = sorted(range(len(kept)), key=lambda i: to[kept[i]][0])
        d = jnp.transpose(d, (0, *(1 + i for i in order)))
        placed = {to[kept[i]][0]: n for i, n in zip(order, d.shape[1:], strict=True)}
        d = d.reshape(num_tangents, *(placed.get(axis, 1) for axis in range(1, total.ndim)))
        for axis, outer, inner in to.values():
            if outer * inner > 1:
                d = jnp.tile(
                    jnp.repeat(d, inner, axis), [outer if i == axis else 1 for i in range(d.ndim)]
                )
        total = total + d
    return total
