"""The quality of a gradient estimator on one batch: bias, variance, signal to noise, rates.

A single step tells little: the cosine of an unbiased estimate with the gradient is about 1/sqrt(n),
and a biased estimator with a larger one may train worse. The average of many estimates tells what
is left when the noise is gone.

**Source:** the averages of arXiv 2202.08587 and 2310.14168, with standard errors.

Examples:
    >>> import jax, jax.numpy as jnp, prograde as pg
    >>> loss, estimator = lambda w: jnp.sum(w ** 2) / 2, pg.WeightPerturbation(pg.Normal())
    >>> key, params = jax.random.key(0), jnp.ones(10)
    >>> found = pg.diagnostics.diagnose(loss, estimator, key, params, num_estimates=10_000)
    >>> found.bias_detected, abs(found.effective_dimension.value - 12) < 1    # n + 2
    (False, True)
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Key, PyTree

from prograde._inject import wider
from prograde._measured import (
    Measured,
    distance_of,
    mean_of,
    ratio_of,
    squared_mean_of,
    variance_of,
)
from prograde._nonfinite import NonFinite, first_nonfinite
from prograde.estimators import Backprop
from prograde.kit import Estimator, Loss, check_key, check_positive, wide

__all__ = [
    "Diagnosis",
    "LeafDiagnosis",
    "Measured",
    "NonFinite",
    "diagnose",
    "first_nonfinite",
]

_LEAST_ESTIMATES = 8  # fewer give no useful standard errors
_DETECTED = 4.0  # standard errors


@dataclass(frozen=True)
class LeafDiagnosis:
    """One leaf of the parameters in a `Diagnosis`.

    **Fields:**

    - `path`, `size`: where the leaf is in the tree, and its number of entries.
    - `gradient_share`: |grad_l|^2 / |grad|^2.
    - `signal_to_noise`: |grad_l|^2 / E |g_l - E g_l|^2, a ratio of powers: averaging K estimates
      multiplies it by K. Infinite where nothing is random.
    - `bias_squared`: |E g_l - grad_l|^2 / |grad_l|^2; NaN where the leaf's gradient is zero.

    **Source:** as `Diagnosis`.

    Examples:
        >>> import jax, jax.numpy as jnp, prograde as pg
        >>> from prograde.diagnostics import diagnose
        >>> params = {"a": jnp.ones(2), "b": jnp.ones(8)}
        >>> loss = lambda p: jnp.sum(p["a"] ** 2) + jnp.sum(p["b"] ** 2)
        >>> estimator, key = pg.WeightPerturbation(pg.Rademacher()), jax.random.key(0)
        >>> found = diagnose(loss, estimator, key, params, num_estimates=1000)
        >>> [(leaf.path, leaf.size, round(leaf.gradient_share, 2)) for leaf in found.leaves]
        [("params['a']", 2, 0.2), ("params['b']", 8, 0.8)]
    """

    path: str
    size: int
    gradient_share: float
    signal_to_noise: Measured
    bias_squared: Measured


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found, over independent estimates g of one gradient at one point.

    All squares are relative to |grad|^2, and carry standard errors. `print` shows a short text;
    `table()` has a line for each leaf.

    **Fields:**

    - `estimator`, `num_estimates`, `num_parameters`, `value` (the loss), `gradient_norm` (|grad|).
    - `cosine`: E cos(g, grad), of a single estimate.
    - `cosine_of_mean`: the cosine of the average of all estimates. Without bias it is near
      1/sqrt(1 + variance / num_estimates).
    - `projection`: E g . grad / |grad|^2; 1 without bias.
    - `relative_error`: E |g - grad|^2 / |grad|^2 = `bias_squared` + `variance`.
    - `bias_squared`: |E g - grad|^2 / |grad|^2, estimated without bias by the mean over all pairs
      i != j of (g_i - grad) . (g_j - grad). It does not contain the variance of the average, and
      may therefore be negative.
    - `bias_detected`: `True` where the average differs from the gradient by more than chance: the
      sum over pairs is more than 4 of its standard errors above 0, or `projection` is that far from
      1, after a correction for skewness. In both cases the bias exceeds the rounding of the
      parameters' dtype (a relative bias of sqrt(eps)). A hundred estimates of rank-one tangents
      give a false alarm about once in a thousand times. No detection is no proof: a squared bias of
      about `bias_squared.value + 4 * bias_squared.error` would not have been noticed.
    - `variance`: E |g - E g|^2 / |grad|^2.
    - `effective_dimension`: E |g|^2 / |grad|^2. One dense tangent of signs has the number of
      parameters here. The figure is therefore the dimension in which such a tangent is as noisy.
    - `learning_rate_bound`: 2 grad . E g / E [g^T H g], H the Hessian: the rate below which a step
      -rate * g lowers the expected loss of this batch, to second order; half of it lowers it most.
      Infinite where the loss does not bend upwards along the estimates, 0 where these point uphill,
      `None` where it was not asked for.
    - `leaves`: a `LeafDiagnosis` for each leaf.

    **Source:** second moments as in arXiv 2202.08587 and 2310.14168; the U-statistic of the
    averaging test is Hoeffding's (1948); the bound is that of stochastic gradient descent on a
    quadratic, arXiv 1606.04838, section 4.

    Examples:
        >>> import jax, jax.numpy as jnp, prograde as pg
        >>> loss = lambda w: jnp.sum(w ** 2)
        >>> half = pg.WeightPerturbation(pg.Basis(), 2, combine="shrunk")      # E g = grad / 2
        >>> key, params = jax.random.key(0), jnp.ones(4)
        >>> found = pg.diagnostics.diagnose(loss, half, key, params, num_estimates=2000)
        >>> found.bias_detected
        True
        >>> round(found.projection.value, 1), round(found.bias_squared.value, 2)
        (0.5, 0.25)
    """

    estimator: Estimator
    num_estimates: int
    num_parameters: int
    value: float
    gradient_norm: float
    cosine: Measured
    cosine_of_mean: float
    projection: Measured
    relative_error: Measured
    bias_squared: Measured
    bias_detected: bool
    variance: Measured
    effective_dimension: Measured
    learning_rate_bound: Measured | None
    leaves: tuple[LeafDiagnosis, ...]

    def tangents_needed(self, relative_error: float) -> int:
        """The number of tangents that bring E |g - grad|^2 down to `relative_error` |grad|^2.

            K' = K variance / (relative_error - bias_squared),   K = `estimator.num_tangents`

        It is extrapolated from the measured variance. The bias counts only where it was detected.
        The law, variance ~ 1/K, holds for the mean of independent tangents. It does not hold for
        `Basis` and `Orthogonal`, which need fewer, nor for `combine="projection"` or `"shrunk"`.
        For an estimator without tangents the result is a number of averaged estimates.

        **Errors:** `ValueError` for a `relative_error` that is not positive, or not above the bias.
        """
        check_positive("relative_error", relative_error)
        bias = max(self.bias_squared.value, 0.0) if self.bias_detected else 0.0
        if relative_error <= bias:
            raise ValueError(
                f"relative_error={relative_error!r}, but the squared bias alone is {bias:.3g}, "
                "which no number of tangents reduces. Ask for more than that, or take an estimator "
                "without bias."
            )
        return max(
            1,
            math.ceil(
                _num_tangents(self.estimator) * self.variance.value / (relative_error - bias)
            ),
        )

    def table(self) -> str:
        """A line for each leaf: path, size, gradient share, signal to noise, squared bias."""
        rows = [("leaf", "size", "share", "signal to noise", "bias squared")]
        rows += [
            (
                leaf.path,
                f"{leaf.size:,}",
                f"{leaf.gradient_share:.1%}",
                str(leaf.signal_to_noise),
                str(leaf.bias_squared),
            )
            for leaf in self.leaves
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        return "\n".join(
            "  ".join(
                [
                    row[0].ljust(widths[0]),
                    *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True)),
                ]
            )
            for row in rows
        )

    def __str__(self) -> str:
        unnoticed = self.bias_squared.value + _DETECTED * self.bias_squared.error
        verdict = (
            "detected"
            if self.bias_detected
            else f"not detected; less than {max(unnoticed, 0):.2g} might not be"
        )
        ideal = 1 / math.sqrt(1 + max(self.variance.value, 0) / self.num_estimates)
        lines = [
            f"{self.estimator}",
            f"  {self.num_estimates} estimates on one batch; loss {self.value:.4g}, "
            f"|gradient| {self.gradient_norm:.4g}, {self.num_parameters:,} parameters",
            f"  cosine with the gradient   {self.cosine}",
            f"    of the mean estimate     {self.cosine_of_mean:.3g} "
            f"(without bias about {ideal:.3g})",
            f"  projection on the gradient {self.projection}",
            f"  relative squared error     {self.relative_error}",
            f"    bias squared             {self.bias_squared} ({verdict})",
            f"    variance                 {self.variance}",
            f"  effective dimension        {self.effective_dimension}",
        ]
        if self.learning_rate_bound is not None:
            lines.append(f"  learning rate below        {self.learning_rate_bound}")
        return "\n".join(lines)


def diagnose(
    fun: Callable[..., Any],
    estimator: Estimator,
    key: Key[Array, ""],
    params: PyTree,
    *args: Any,
    num_estimates: int = 100,
    has_aux: bool = False,
    state: PyTree = None,
    curvature: bool = True,
    reference: Estimator | None = None,
) -> Diagnosis:
    """Draws independent estimates of one gradient and compares them with the exact one.

    **Arguments:**

    - `fun`, `params`, `args`, `has_aux`: as for `value_and_grad`, with a loss per example where the
      estimator needs one.
    - `estimator`: the estimator to diagnose.
    - `key`: a typed key, from which the keys of all estimates are split.
    - `num_estimates`: n, at least 8. Standard errors fall as 1/sqrt(n), that of `bias_squared` as
      1/n until the bias shows. A bias that is the same in each estimate is detected from n = 22 on.
    - `state`: of an estimator that learns, held fixed for all estimates; `None` for that of
      `estimator.init`.
    - `curvature`: `True` measures `learning_rate_bound`, by forward-over-forward products g^T H g.
      Pass `False` for functions that cannot be differentiated twice.
    - `reference`: an exact estimator, `Backprop()` when `None`. `ForwardJacobian()` works where
      reverse mode does not.

    **Returns:** a `Diagnosis`.

    **Cost:** n estimates, one reference gradient, and n times four forward passes for the
    curvature. Estimates are summed as they come: memory is that of one estimate and of three trees
    like the parameters. Compiled once for a function, an estimator and shapes.

    **Errors:** `ValueError` for fewer than 8 estimates, a gradient that is zero, or a loss,
    gradient, estimate or curvature that is not finite: the message says which of them, and how
    many; `TypeError` for a key of the old kind or what is no estimator; those of the estimator.

    **Source:** as `Diagnosis`.

    Examples:
        >>> import jax, jax.numpy as jnp, prograde as pg
        >>> def loss(w, x, y):
        ...     return jnp.mean((jnp.tanh(x @ w) - y) ** 2)
        >>> x, y = jax.random.normal(jax.random.key(1), (32, 20)), jnp.ones(32)
        >>> estimator = pg.WeightPerturbation(pg.Rademacher(), num_tangents=4)
        >>> found = pg.diagnostics.diagnose(
        ...     loss, estimator, jax.random.key(0), jnp.zeros(20), x, y, num_estimates=4000)
        >>> round(found.variance.value)                                            # (n - 1) / K
        5
        >>> abs(found.tangents_needed(0.1) - 190) < 20                             # (n - 1) / 0.1
        True
    """
    check_key(key)
    reference = Backprop() if reference is None else reference
    for name, given in (("estimator", estimator), ("reference", reference)):
        if not isinstance(given, Estimator):
            raise TypeError(
                f"{name}={given!r}, but an instance of an estimator is needed, such as "
                "WeightPerturbation(LowRank(rank=1))."
            )
    if (
        isinstance(num_estimates, bool)
        or not isinstance(num_estimates, int)
        or num_estimates < _LEAST_ESTIMATES
    ):
        raise ValueError(
            f"num_estimates={num_estimates!r}, but a whole number of at least {_LEAST_ESTIMATES} "
            "is needed for standard errors."
        )
    if state is None:
        state = estimator.init(fun, params, *args, has_aux=has_aux)
    floats = Loss(estimator.objective(fun, has_aux), params, args, has_aux).floats
    measured = _measure(
        fun, estimator, reference, num_estimates, curvature, has_aux, key, state, params, args
    )
    sums = _Sums(*(np.asarray(x, np.float64) for x in measured))
    paths = [
        (f"params{jax.tree_util.keystr(path)}", w)
        for path, w in jax.tree_util.tree_leaves_with_path(floats)
    ]
    return _diagnosis(estimator, sums, paths, curvature)


@dataclass(frozen=True)
class _Sums:
    """Sums over the entries of each of L leaves, for each of n estimates g_i and for their sum.

    With e_i = g_i - grad:

    - `along` [n, L]: g_i . grad; `squares` [n, L]: |g_i|^2; `errors` [n, L]: |e_i|^2;
    - `pairs` [n, L]: e_i . (e_1 + ... + e_(i-1));
    - `bent` [n]: g_i^T H g_i;
    - `gradient` [L]: |grad|^2; `total` [L]: |sum e|^2; `total_along` [L]: (sum e) . grad.
    """

    value: np.ndarray
    along: np.ndarray
    squares: np.ndarray
    errors: np.ndarray
    pairs: np.ndarray
    bent: np.ndarray
    gradient: np.ndarray
    total: np.ndarray
    total_along: np.ndarray


@eqx.filter_jit
def _measure(
    fun, estimator, reference, num_estimates, curvature, has_aux, key, state, params, args
) -> tuple:
    objective = estimator.objective(fun, has_aux)
    loss = Loss(objective, params, args, has_aux)
    key_reference, key_estimates = jax.random.split(key)
    exact = reference.estimate(objective, key_reference, None, params, *args, has_aux=has_aux)
    gradient = [wide(g) for g in jax.tree.leaves(exact.grads)]

    def one_estimate(total, key):
        grads = estimator.estimate(fun, key, state, params, *args, has_aux=has_aux).grads
        estimate = [wide(g) for g in jax.tree.leaves(grads)]
        error = [g - e for g, e in zip(estimate, gradient, strict=True)]
        figures = [
            _products(a, b)
            for a, b in ((estimate, gradient), (estimate, estimate), (error, error), (error, total))
        ]
        bent = _second_derivative(loss, grads) if curvature else jnp.zeros(())
        return [t + e for t, e in zip(total, error, strict=True)], (*figures, bent)

    total, figures = lax.scan(
        one_estimate,
        [jnp.zeros_like(g) for g in gradient],
        jax.random.split(key_estimates, num_estimates),
    )
    return (
        exact.value,
        *figures,
        _products(gradient, gradient),
        _products(total, total),
        _products(total, gradient),
    )


def _products(xs: list[Array], ys: list[Array]) -> Float[Array, " leaves"]:
    """Inner products, leaf by leaf."""
    dtype = wider(*(x.dtype for x in xs))
    return jnp.stack([jnp.sum(x * y).astype(dtype) for x, y in zip(xs, ys, strict=True)])


def _second_derivative(loss: Loss, direction: PyTree[Array]) -> Float[Array, ""]:
    """v^T H v: the second derivative of the mean loss along v, forward over forward."""

    def on_line(t):
        moved = jax.tree.map(lambda w, v: w + t.astype(w.dtype) * v, loss.floats, direction)
        return jnp.mean(wide(loss(moved)[0]))

    def slope(t):
        return jax.jvp(on_line, (t,), (jnp.ones_like(t),))[1]

    zero = jnp.zeros((), wider(jnp.float32, *(w.dtype for w in jax.tree.leaves(loss.floats))))
    return jax.jvp(slope, (zero,), (jnp.ones_like(zero),))[1]


def _diagnosis(
    estimator: Estimator, sums: _Sums, paths: list[tuple[str, Array]], curvature: bool
) -> Diagnosis:
    n, scale = len(sums.along), sums.gradient.sum()
    _check_finite(sums)
    if not scale > 0:
        raise ValueError(
            "the exact gradient at params is zero, but relative errors need one that is not zero. "
            "Choose other params, or another batch."
        )
    along, squares = sums.along.sum(axis=1), sums.squares.sum(axis=1)
    sizes = np.sqrt(squares * scale)
    projection = mean_of(along / scale)
    error = mean_of(sums.errors.sum(axis=1) / scale)
    pairs = sums.pairs.sum(axis=1) / scale
    bias = squared_mean_of(pairs)
    rounding = max(float(jnp.finfo(w.dtype).eps) for _, w in paths)
    found_in_pairs = bias.value > rounding and pairs.sum() > _DETECTED * math.sqrt((pairs**2).sum())
    found_in_projection = (
        abs(projection.value - 1) > math.sqrt(rounding)
        and abs(distance_of(along / scale, 1.0)) > _DETECTED
    )
    mean_along = scale + sums.total_along.sum() / n
    mean_square = scale + 2 * sums.total_along.sum() / n + sums.total.sum() / n**2
    bound = ratio_of(2 * along, sums.bent) if curvature else None
    return Diagnosis(
        estimator=estimator,
        num_estimates=n,
        num_parameters=sum(w.size for _, w in paths),
        value=float(sums.value),
        gradient_norm=math.sqrt(scale),
        cosine=mean_of(np.divide(along, sizes, out=np.zeros(n), where=sizes > 0)),
        cosine_of_mean=float(mean_along / math.sqrt(scale * mean_square))
        if mean_square > 0
        else 0.0,
        projection=projection,
        relative_error=error,
        bias_squared=bias,
        bias_detected=bool(found_in_pairs or found_in_projection),
        variance=variance_of(error, bias),
        effective_dimension=mean_of(squares / scale),
        learning_rate_bound=bound,
        leaves=tuple(_leaf(sums, i, path, w.size) for i, (path, w) in enumerate(paths)),
    )


def _check_finite(sums: _Sums) -> None:
    """Raises where a figure is not finite, and names it. A comparison with NaN would hide it."""
    n = len(sums.along)
    if not math.isfinite(sums.value):
        raise ValueError(
            f"the loss at params is {float(sums.value):g}, but a finite one is needed. Choose "
            "other params, or another batch."
        )
    if not math.isfinite(scale := float(sums.gradient.sum())):
        raise ValueError(
            f"the loss at params is finite, {float(sums.value):.4g}, but the squared norm of its "
            f"exact gradient is {scale:g}. Look for an infinite slope, such as that of sqrt at 0, "
            "or for gradients whose squares overflow."
        )
    finite = np.isfinite(np.stack([sums.along, sums.squares, sums.errors])).all(axis=(0, 2))
    if finite.all():  # otherwise the pairs after the first one that is not are not finite either
        finite = np.isfinite(sums.pairs).all(axis=1)
    if not finite.all():
        raise ValueError(
            f"{n - finite.sum()} of {n} estimates are not finite, or their squares are not, the "
            f"first is number {np.argmin(finite)}, but the loss and its exact gradient are. Look "
            "for an infinite slope along a tangent, or at the range of the parameters' dtype."
        )
    if not (finite := np.isfinite(sums.bent)).all():
        raise ValueError(
            f"g^T H g is not finite for {n - finite.sum()} of {n} estimates, but the estimates "
            "are. Pass curvature=False for a function that cannot be differentiated twice."
        )


def _leaf(sums: _Sums, i: int, path: str, size: int) -> LeafDiagnosis:
    scale = sums.gradient[i]
    bias = squared_mean_of(sums.pairs[:, i])
    variance = variance_of(mean_of(sums.errors[:, i]), bias)
    relative = (
        Measured(bias.value / scale, bias.error / scale)
        if scale > 0
        else Measured(math.nan, math.nan)
    )
    if variance.value > 0:
        ratio = scale / variance.value
        signal_to_noise = Measured(ratio, ratio * variance.error / variance.value)
    else:
        signal_to_noise = Measured(math.inf, math.nan)
    return LeafDiagnosis(path, size, float(scale / sums.gradient.sum()), signal_to_noise, relative)


def _num_tangents(estimator: Estimator) -> int:
    return getattr(estimator, "num_tangents", 1)
