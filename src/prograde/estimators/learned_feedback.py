"""Learned feedback: matrices that carry the error at the output straight to every hidden unit."""

import math
import warnings
from dataclasses import dataclass
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, PyTree

from prograde._inject import varying_like
from prograde._sites import Program, Site, sites
from prograde.estimators.site_estimator import Perturbed, SiteEstimator, as_value, by_example
from prograde.kit import Estimate, check_choice, check_key, check_positive, check_whole


class FeedbackState(eqx.Module):
    """What `LearnedFeedback` carries from step to step.

    **Fields:** `feedback`, a matrix for each site, `None` at sites without examples; `step`, the
    number of steps so far.
    """

    feedback: list[Array | None]
    step: Int[Array, ""]


def _is_none(x: Any) -> bool:
    return x is None


@dataclass(frozen=True)
class LearnedFeedback(SiteEstimator):
    """Feedback alignment whose feedback matrices learn the output's Jacobian, by forward gradients.

        delta_i = phi'(z_i) * (F e_i)        estimates the derivative of loss_i by z_i
        r_i = dy_i - sum over sites F^T (phi'(z_i) u_i)
        F <- F + rate / (1 + p) mean_i r_i (phi'(z_i) u_i)^T

    e_i is the exact derivative of loss_i by the output of the last site, u_i the noise, and dy_i
    the derivative of the output along it, which the forward run gives. phi is the nonlinearity that
    follows the site (phi' = 1 where none does). p = mean_i |phi'(z_i) u_i|^2 / (K B) is the number
    of active units over that of samples: with it the step is stable at any size of network
    (normalised least mean squares). F is the least-squares estimate of the output's Jacobian by the
    hidden activations, averaged over examples and over the recent past. Weight gradients follow
    from delta as in `ActivityPerturbation`.

    **Arguments:** those of `ActivityPerturbation`, where `head` is always `"exact"`, and

    - `rate`: how fast F follows, in (0, 1], relative to the fastest stable rate. A smaller rate
      means less noise in F, and more lag behind a changing network.
    - `use`: `"feedback"` takes F e as the cotangent. `"control_variate"` adds the forward gradient
      of the rest,

            delta_i = guess_i + 1/K sum_k (d_ik - sum over sites guess_i . u_ik) u_ik,

      which is unbiased for any F, since F does not depend on the noise of the step.
    - `every`: one step in `every` has noise, and F learns. The other steps cost a forward pass and
      the weight gradients alone. Their `directional` is `None`, and a weight that is not at a site
      gets zero, as it learns from noise only.
    - `tail`: the number of sites in a row, from the loss, with an exact cotangent, by reverse mode
      of them and what follows. With 1 no cotangent crosses a weight. With 2 it crosses the last
      one, which is cheap where outputs are few, and only the sites before it need a guess.

    **State:** a `FeedbackState`: F for every site before the tail, [units, outputs] in float32 (one
    for each iteration of an enclosing loop), zero at first; and the number of steps. `units` and
    `outputs` count all entries of a site's value for one example. For a value of a sequence both
    grow with its length, and the state with the square of it.

    **Bias:** `"feedback"`: E[delta_i] - delta_i = phi' * (E F - J_i) e_i: the Jacobian of the
    average example stands for each one's own. `"control_variate"`: none.

    **Variance:** `"feedback"`: that of F, which falls with `rate` and the batch;
    `"control_variate"`: that of `ActivityPerturbation` for the gradient that the guess leaves,
    |delta - guess|^2 instead of |delta|^2.

    **Cost:** that of `ActivityPerturbation` on steps with noise, a third less on the others, plus
    units x outputs multiply-adds per example and site, three times.

    **Errors:** as `ActivityPerturbation`; `ValueError` for a rate outside (0, 1], a state from
    another model, a tail longer than the number of sites outside of loops; `RuntimeWarning` from
    `init` for a state of more than 256 MiB and 16 times the parameters.

    **Source:** Bacho and Chu, arXiv 2212.07282 (FDFA), who average dy u^T. Here the residual of the
    regression is averaged, which drops the noise that the other units make.

    Examples:
        >>> import jax, jax.numpy as jnp, prograde as pg
        >>> def losses(params, x, y):
        ...     return jnp.sum((jnp.tanh(x @ params["in"]) @ params["out"] - y) ** 2, axis=-1)
        >>> params = {"in": jnp.ones((8, 16)) / 8, "out": jnp.ones((16, 4)) / 16}
        >>> x, y = jnp.ones((32, 8)), jnp.zeros((32, 4))
        >>> estimator = pg.LearnedFeedback(rate=0.1)
        >>> state = estimator.init(losses, params, x, y)
        >>> result = estimator.estimate(losses, jax.random.key(0), state, params, x, y)
        >>> result.grads["in"].shape, result.state.feedback[0].shape
        ((8, 16), (16, 4))
    """

    head: Literal["exact"] = "exact"
    rate: float = 0.2
    use: Literal["feedback", "control_variate"] = "feedback"
    every: int = 1
    tail: int = 1

    def __post_init__(self):
        super().__post_init__()
        check_choice("head", self.head, ("exact",))
        check_positive("rate", self.rate, at_most=1)
        check_choice("use", self.use, ("feedback", "control_variate"))
        check_whole("every", self.every)
        check_whole("tail", self.tail)
        if self.every > 1 and self.use == "control_variate":
            raise ValueError(
                f"every={self.every} with use='control_variate', but that needs the noise of every "
                "step. Use every=1."
            )

    def init(self, fun, params, *args, has_aux=False):
        program, floats = self.program(fun, params, args, has_aux)
        shapes = self._feedback_shapes(program, floats)
        _warn_of_size(4 * sum(math.prod(s) for s in shapes if s is not None), floats)
        feedback = [None if s is None else jnp.zeros(s, jnp.float32) for s in shapes]
        return FeedbackState(feedback, jnp.zeros((), jnp.int32))

    def estimate(self, fun, key, state, params, *args, has_aux=False):
        check_key(key)
        program, floats = self.program(fun, params, args, has_aux)
        self._check_state(state, self._feedback_shapes(program, floats))
        if self.every == 1:
            return self._learning(program, floats, key, state)

        # both kinds of step are functions of arrays alone, as branches must be
        results = []

        def branch(step: Any) -> Any:
            def arrays(key: Any, state: FeedbackState) -> Any:
                result = eqx.tree_at(
                    lambda r: r.directional,
                    step(program, floats, key, state),
                    None,
                    is_leaf=_is_none,
                )
                dynamic, static = eqx.partition(result, eqx.is_array)
                results.append(static)
                # inside `shard_map` both must vary along the same axes
                others = [*program.arrays, *jax.tree.leaves(floats), key]
                return jax.tree.map(lambda x: varying_like(x, *others), dynamic)

            return arrays

        due = state.step % self.every == 0
        dynamic = lax.cond(due, branch(self._learning), branch(self._following), key, state)
        return eqx.combine(dynamic, results[0])

    def _following(
        self, program: Program, floats: PyTree, key: Any, state: FeedbackState
    ) -> Estimate:
        """A step without noise and tangents, with the feedback as it is."""
        run = self.plain_run(program, floats, key)
        hidden = self.hidden(run)
        error = self._at_heads(program, floats, run, list(run.errors.values()), 0)
        cotangents = [
            jnp.zeros_like(site.perturbation)
            if feedback is None
            else as_value(self._guess(site, feedback, error), site) / len(error)
            for site, feedback in zip(hidden, state.feedback, strict=True)
        ]
        return self.from_cotangents(
            program, run, floats, cotangents, FeedbackState(state.feedback, state.step + 1)
        )

    def _learning(
        self, program: Program, floats: PyTree, key: Any, state: FeedbackState
    ) -> Estimate:
        """A step with noise at all sites, from which the feedback learns."""
        run = self.perturbed_run(program, floats, key)
        hidden = self.hidden(run)
        error = self._at_heads(program, floats, run, list(run.errors.values()), 0)
        residual = self._at_heads(program, floats, run, run.at_exact, 1).astype(
            jnp.float32
        )  # [num_tangents, batch, outputs]
        directional = run.directional[0]

        guesses, power = [], jnp.zeros(())
        predicted = jnp.zeros(directional.shape)
        for site, feedback in zip(hidden, state.feedback, strict=True):
            guess = None
            if feedback is not None:
                guess = self._guess(site, feedback, error)
                noise = by_example(site.perturbation, site, site.depth + 1).astype(feedback.dtype)
                felt = noise * _gain(site)[..., None, :, :]
                residual = residual - jnp.einsum(
                    "luo,lkbu->kbo", _flat_loops(feedback, 2), _flat_loops(felt, 3)
                )
                power = power + jnp.sum(jnp.square(felt)) / residual[..., 0].size
                predicted = predicted + jnp.einsum(
                    "lbu,lkbu->kb", _flat_loops(guess, 2), _flat_loops(noise, 3)
                )
            guesses.append(guess)

        # Normalised least mean squares: with many more units than examples a plain step overshoots.
        rate = self.rate / (1 + power / residual[..., 0].size)
        learned, cotangents = [], []
        for site, feedback, guess in zip(hidden, state.feedback, guesses, strict=True):
            cotangent = None
            if feedback is not None:
                noise = by_example(site.perturbation, site, site.depth + 1).astype(feedback.dtype)
                felt = noise * _gain(site)[..., None, :, :]
                correlation = (
                    jnp.einsum("kbo,...kbu->...uo", residual, felt) / residual[..., 0].size
                )
                feedback = feedback + rate * correlation
                cotangent = as_value(guess, site) / len(error)
            if feedback is None or self.use == "control_variate":
                left = directional if feedback is None else directional - predicted
                from_noise = self.from_noise(site, left)
                cotangent = from_noise if cotangent is None else cotangent + from_noise
            learned.append(feedback)
            cotangents.append(cotangent)
        return self.from_cotangents(
            program, run, floats, cotangents, FeedbackState(learned, state.step + 1)
        )

    @property
    def num_exact(self):
        return self.tail

    def _at_heads(
        self,
        program: Program,
        floats: PyTree[Array],
        run: Perturbed,
        values: list[Array],
        lead: int,
    ) -> Array:
        """The values at the heads, out of those at all exact sites: [..., batch, outputs]."""
        ranks = self.exact(program, floats)
        parts = []
        for i, value in zip(run.errors, values, strict=True):
            head = run.records[i]
            if ranks[i] == 0 and isinstance(head, Site):
                parts.append(by_example(value, head, lead))
        return jnp.concatenate(parts, axis=-1)

    def _guess(self, site: Site, feedback: Array, error: Array) -> Array:
        """phi'(z_i) * (F e_i), [*loops, batch, units]."""
        return jnp.einsum("...uo,bo->...bu", feedback, error.astype(feedback.dtype)) * _gain(site)

    def _feedback_shapes(self, program, floats):
        """The shape of each hidden site's feedback, `None` for sites without examples."""
        records = self.shapes(program, floats)
        ranks = self.exact(program, floats)
        heads = [records[i] for i, rank in ranks.items() if rank == 0]
        hidden = [site for site in sites(records) if not any(site is records[i] for i in ranks)]
        batch = program.batch or 1
        outputs = sum(head.perturbation.size // batch for head in heads if isinstance(head, Site))
        whole = lambda site: program.batch is not None and site.axis is None  # noqa: E731
        units = lambda site: math.prod(site.perturbation.shape[site.depth :]) // batch  # noqa: E731
        return [
            None if whole(site) else (*site.perturbation.shape[: site.depth], units(site), outputs)
            for site in hidden
        ]

    def _check_state(self, state, wanted):
        known = isinstance(state, FeedbackState)
        given = (
            [getattr(x, "shape", None) for x in state.feedback] if known else type(state).__name__
        )
        if given != wanted:
            raise ValueError(
                f"state holds feedback of shapes {given}, but the sites of this function need "
                f"{wanted}. Make the state by estimator.init with this function and parameters, "
                "and a batch like this one."
            )


def _warn_of_size(state_bytes: int, floats: PyTree[Array]) -> None:
    """Warns, before anything is allocated, of a state that is much larger than the parameters."""
    param_bytes = sum(w.nbytes for w in jax.tree.leaves(floats))
    if state_bytes > max(2**28, 16 * param_bytes):
        warnings.warn(
            f"the state of LearnedFeedback takes {state_bytes / 2**20:,.0f} MiB, the parameters "
            f"{param_bytes / 2**20:,.0f} MiB: it has units x outputs numbers for each site, which "
            "grows with the square of the length of a sequence. Shorten the sequence, reduce the "
            "output before the last product, or use ActivityPerturbation, which has no state.",
            RuntimeWarning,
            stacklevel=3,
        )


def _gain(site: Site) -> Array:
    """phi'(z) as [*loops, batch, units], or ones that broadcast to it."""
    if site.gain is None:
        return jnp.ones((1,) * (site.depth + 2))
    return by_example(site.gain, site, site.depth).astype(jnp.float32)


def _flat_loops(x: Array, last: int) -> Array:
    """The axes of loops, before the `last` ones, as one."""
    return x.reshape(-1, *x.shape[x.ndim - last :])
