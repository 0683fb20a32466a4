"""One step of training, given the derivatives."""

import functools
import hashlib
import math
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PyTree

from prograde.estimators import SeededEstimator
from prograde.kit import float_leaves

_LONGEST = 400  # letters that tell the state of an optimizer


class Optimizer(Protocol):
    """What Optax calls a gradient transformation: an object with `init` and `update`.

    **Source:** the interface of Optax.

    Examples:
        >>> import optax, prograde as pg
        >>> optimizer: pg.replay.Optimizer = optax.sgd(1.0)
    """

    @property
    def init(self) -> Callable[..., Any]: ...

    @property
    def update(self) -> Callable[..., Any]: ...


class TrainState(NamedTuple):
    """The parameters and the state of the optimizer.

    **Fields:** `params`, a tree; `opt_state`, what `optimizer.init` or the last update gave.

    **Source:** the pair that every Optax loop carries.

    Examples:
        >>> import jax.numpy as jnp, optax, prograde as pg
        >>> state = pg.replay.Update(pg.WeightPerturbation(), optax.sgd(1.0)).init(jnp.ones(3))
        >>> state.params.shape
        (3,)
    """

    params: PyTree
    opt_state: PyTree


@dataclass(frozen=True, eq=False)
class Update:
    """One step of training, given the derivatives: the same program trains and replays.

        params <- params + rate * optimizer.update(estimator.gradient(key, params, derivatives))

    **Arguments:**

    - `estimator`: a `WeightPerturbation` or a `CentralDifference`. For a `Distributed` estimator,
      pass the estimator inside it.
    - `optimizer`: an Optax optimizer with a learning rate of 1, such as `optax.sgd(1.0)`. Its
      updates are multiplied by the rate of the step, which the log holds.

    Call it with a `TrainState`, the step, the seed, the rate and the derivatives. It returns the
    next `TrainState`. It reuses the arrays of the one it was given, which must not be used again.
    Training and replaying use this program with the same numbers, so a replay gives the same bits
    as the run, on the same platform and versions.

    **Cost:** that of `estimator.gradient` and of the optimizer. The function is not run.

    **Errors:** `TypeError` for another estimator, for an object without `init` and `update`, and
    for derivatives that are not real; `ValueError` for a step, a seed or a rate that the log
    cannot hold, and for derivatives of another shape.

    **Source:** seeds and scalars as a record of training: MeZO, arXiv 2305.17333, section 2.1.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, prograde as pg
        >>> update = pg.replay.Update(pg.WeightPerturbation(), optax.sgd(1.0))
        >>> state, key = update.init(jnp.ones((8, 4))), update.key(7, 0)
        >>> loss = lambda w: jnp.sum(w ** 2)
        >>> value, _, derivatives = update.estimator.derivatives(loss, key, state.params)
        >>> state = update(state, 0, 7, 0.01, derivatives)
        >>> state.params.shape
        (8, 4)
    """

    estimator: SeededEstimator
    optimizer: Optimizer

    def __post_init__(self):
        if not isinstance(self.estimator, SeededEstimator):
            raise TypeError(
                f"estimator={self.estimator!r}, but only the estimates of WeightPerturbation and "
                "CentralDifference are a seed and a few numbers."
            )
        if not all(callable(getattr(self.optimizer, name, None)) for name in ("init", "update")):
            raise TypeError(
                f"optimizer={self.optimizer!r}, but an object with the methods init and update is "
                "needed, such as optax.sgd(1.0)."
            )

    def init(self, params: PyTree) -> TrainState:
        """The state before the first step. Copies the parameters, as each update reuses them."""
        params = jax.tree.map(
            lambda x: jnp.array(x) if isinstance(x, jax.Array | np.ndarray) else x, params
        )
        return TrainState(params, self.optimizer.init(float_leaves(params)))

    @staticmethod
    def key(seed: int, step: int) -> Key[Array, ""]:
        """The key of a step: that of the seed, which may have 64 bits, folded with the step.

        For seeds below 2^32 it is `jax.random.fold_in(jax.random.key(seed), step)`.
        """
        return _key(_words(checked_seed(seed)), np.uint32(step))

    def __call__(
        self,
        state: TrainState,
        step: int,
        seed: int,
        rate: float,
        derivatives: Float[Array, "num_tangents groups numbers"],
    ) -> TrainState:
        check_derivatives(derivatives, shape_of(self.estimator))
        step = checked_whole("step", step, 2**32)
        return self.apply(state, step, checked_seed(seed), checked_rate(rate), derivatives)

    def apply(
        self, state: TrainState, step: int, seed: int, rate: float, derivatives: Array | np.ndarray
    ) -> TrainState:
        """The update itself, with numbers that were checked before, such as those of a log."""
        floats, rest = eqx.partition(state.params, eqx.is_inexact_array)
        numbers = np.uint32(step), _words(seed), np.float32(rate)
        floats, opt_state = self._program(floats, state.opt_state, *numbers, derivatives)
        return TrainState(eqx.combine(floats, rest), opt_state)

    @functools.cached_property
    def _program(self) -> Callable[..., tuple[PyTree[Array], PyTree]]:
        def updated(
            floats: PyTree[Array],
            opt_state: PyTree,
            step: Array,
            words: Array,
            rate: Array,
            derivatives: Array,
        ) -> tuple[PyTree[Array], PyTree]:
            derivatives = derivatives.astype(jnp.float32)  # what the log holds
            grads = self.estimator.gradient(_key(words, step), floats, derivatives)
            updates, opt_state = self.optimizer.update(grads, opt_state, floats)
            return jax.tree.map(
                lambda w, u: (w + rate * u).astype(w.dtype), floats, updates
            ), opt_state

        return jax.jit(updated, donate_argnums=(0, 1))


def _words(seed: int) -> np.ndarray:
    return np.asarray([seed >> 32, seed & 0xFFFFFFFF], np.uint32)


def _key(words: Array | np.ndarray, step: Array | np.uint32) -> Key[Array, ""]:
    return jax.random.fold_in(
        jax.random.wrap_key_data(jnp.asarray(words), impl="threefry2x32"), step
    )


def shape_of(estimator: SeededEstimator) -> tuple[int, int, int]:
    """The shape of the derivatives of a step."""
    return estimator.num_tangents, estimator.num_groups, estimator.num_numbers


def checked_whole(name: str, value: Any, below: int) -> int:
    """The value as an `int`; raises unless it is a whole number from 0 to `below` - 1."""
    try:
        number = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = -1
    if not 0 <= number < below:
        most = f"2^{below.bit_length() - 1} - 1" if below >= 2**32 else str(below - 1)
        raise ValueError(f"{name}={value!r}, but a whole number from 0 to {most} is needed.")
    return number


def checked_seed(seed: Any) -> int:
    """The seed as an `int`; raises unless it has at most 64 bits."""
    return checked_whole("seed", seed, 2**64)


def checked_rate(rate: Any) -> float:
    """The rate in float32; raises where that is not finite, or zero for a rate that is not."""
    try:
        wide = float(rate)
    except (TypeError, ValueError, OverflowError):
        wide = math.nan
    with np.errstate(over="ignore", under="ignore"):
        narrow = np.float32(wide)
    if not np.isfinite(narrow) or (narrow == 0) != (wide == 0):
        raise ValueError(
            f"rate={rate!r}, but a number is needed that float32 can hold: 0, or of a size from "
            "1.4e-45 to 3.4e38."
        )
    return float(narrow)


def check_derivatives(derivatives: Any, shape: tuple[int, ...]) -> None:
    """Raises unless these are real numbers of this shape. Does not wait for their values."""
    found = tuple(np.shape(derivatives))
    if found != tuple(shape):
        raise ValueError(
            f"derivatives have shape {found}, but {tuple(shape)} is needed: [num_tangents, groups, "
            "numbers] of the estimator."
        )
    _check_real("derivatives", derivatives)


def check_value(value: Any) -> None:
    """Raises unless this is one real number. Does not wait for it."""
    if shape := tuple(getattr(value, "shape", ())):
        raise ValueError(f"value has shape {shape}, but one number, the loss, is needed.")
    _check_real("value", value)


def _check_real(name: str, x: Any) -> None:
    """Raises for what is known to be no real numbers; only computing tells for other objects."""
    kind = getattr(x, "dtype", np.dtype(type(x)) if isinstance(x, complex | str | bytes) else None)
    if kind is not None and not any(jnp.issubdtype(kind, k) for k in (np.floating, np.integer)):
        raise TypeError(
            f"{name} has dtype {kind}, but the log holds real numbers. Log the real and imaginary "
            "parts of complex numbers apart, as two runs or as two tangents."
        )


def described(optimizer: Optimizer, params: PyTree) -> dict[str, str]:
    """What tells optimizers apart, for these parameters: the kind of state, and the program.

    The state is told in words, with `params` for each tree like the parameters. The program is the
    SHA-256 of the jaxpr of an update with its constants, so it holds every setting.
    """
    floats = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), float_leaves(params))
    state = jax.eval_shape(optimizer.init, floats)
    structure = jax.tree.structure(floats)
    alike = lambda tree: jax.tree.structure(tree) == structure  # noqa: E731
    words = jax.tree.map(lambda x: "params" if alike(x) else "array", state, is_leaf=alike)
    traced = jax.make_jaxpr(optimizer.update)(floats, state, floats)
    program = hashlib.sha256(_without_addresses(traced.pretty_print(use_color=False)).encode())
    for constant in traced.consts:
        program.update(np.asarray(constant).tobytes())
    text = _without_addresses(repr(words))
    if len(text) > _LONGEST:
        text = f"{text[:_LONGEST]}... ({hashlib.sha256(text.encode()).hexdigest()[:16]})"
    return {"state": text, "program": program.hexdigest()}


def _without_addresses(text: str) -> str:
    return re.sub(r" at 0x[0-9a-f]+", "", text)
