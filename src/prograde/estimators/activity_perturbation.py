"""Activity perturbation: forward gradients with respect to pre-activations."""

from dataclasses import dataclass

from prograde.estimators.site_estimator import SiteEstimator
from prograde.kit import check_key


@dataclass(frozen=True)
class ActivityPerturbation(SiteEstimator):
    """Forward gradients of the pre-activations, which give the gradients of the weights locally.

        z = x W + b                              is perturbed along noise u of deviation c,
                                                 independent for every example i and unit
        delta_i = 1/K sum_k d_ik u_ik / c^2      estimates the derivative of loss_i by z_i,
        d_ik = grad loss_i . u_k
        g_W = 1/B sum_i x_i delta_i^T,   g_b = 1/B sum_i delta_i

    Sites are found wherever a weight acts on the examples, in any JAX function: products and
    convolutions (also inside `scan`), embeddings, gains, with the bias that is added. Recurrent
    products that are summed, x W + h U, are one site. No cotangent crosses a layer and no reverse
    pass is run. Where the next operation is a ReLU (or any other function of one number), units
    with derivative zero are not perturbed, because their part in the gradient is known to be zero.
    A weight that is used in another way (in a custom rule, a branch, a `while` loop, or on examples
    merged with another axis) is perturbed itself, as by `WeightPerturbation`.

    **Arguments:**

    - `noise`: the distribution of the entries of u, `Rademacher()` or `Normal()`.
    - `num_tangents`: K, at least 1.
    - `head`: `"perturbed"`, or `"exact"` for the exact derivative of the loss by the output of the
      last site (the logits; by that of every site that no other follows), by reverse mode of what
      follows it alone. Its noise, and its part of the variance, are then gone.
    - `per_example`: `True` weights each example's perturbation by that example's loss. `False`
      weights it by the mean loss. It takes a scalar loss, and losses in which the examples depend
      on each other (batch normalisation).
    - `scale`: the deviation of the noise: `"one"`, or `"rms"`, the root mean square of the
      perturbed value, for each example and site. With `"rms"` no site drowns the others where they
      differ in size, as before a normalisation.
    - `custom_vjp`: as in `WeightPerturbation`.

    The examples are along the first axis of those arguments whose first axis has the length of the
    loss.

    **Bias:** none.

    **Variance:** with U perturbed units per example, E |delta_i|^2 = U |grad_z loss_i|^2 for signs
    and K = 1. With deviations c_s, site s has U_s / c_s^2 times the sum of c_t^2 |grad loss_i|^2
    over all sites t. The errors of examples average out in the weight gradients: weights shared by
    all B examples need about (fan-in x B) times fewer tangents than `WeightPerturbation` (arXiv
    2210.03310, table 1).

    **Cost:** one forward run with K tangents, and one product per weight for its gradient: as many
    multiply-adds as backprop for K = 1. The inputs of all sites are kept until the loss is known,
    as in backprop.

    **Errors:** `ValueError` for a scalar loss with `per_example`, examples that cannot be found or
    depend on each other, a head inside a loop, arguments out of range; `TypeError` as in
    `WeightPerturbation`; all at trace time.

    **Source:** Ren et al., arXiv 2210.03310; node perturbation is older (Widrow & Lehr 1990).

    Examples:
        >>> import jax, jax.numpy as jnp, prograde as pg
        >>> def losses(params, x, y):                   # [batch]
        ...     h = jax.nn.relu(x @ params["w"] + params["b"])
        ...     return jnp.sum((h @ params["out"] - y) ** 2, axis=-1)
        >>> params = {"w": jnp.ones((8, 16)) / 8, "b": jnp.zeros(16), "out": jnp.ones((16, 4))}
        >>> grad_fn = jax.jit(pg.value_and_grad(losses, pg.ActivityPerturbation(head="exact")))
        >>> x, y = jnp.ones((32, 8)), jnp.zeros((32, 4))
        >>> value, grads = grad_fn(jax.random.key(0), params, x, y)
        >>> float(value), grads["w"].shape
        (1024.0, (8, 16))
    """

    def estimate(self, fun, key, state, params, *args, has_aux=False):
        check_key(key)
        program, floats = self.program(fun, params, args, has_aux)
        run = self.perturbed_run(program, floats, key)
        cotangents = [self.from_noise(site, run.directional[0]) for site in self.hidden(run)]
        return self.from_cotangents(program, run, floats, cotangents, state)
