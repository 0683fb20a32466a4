"""An estimator whose runs are shared by the devices of a mesh."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Key, PyTree

from prograde._value_and_grad import value_and_grad as _value_and_grad
from prograde.distributed._mesh import (
    Axes,
    axis_names,
    check_mesh,
    checked_axes,
    is_array,
    is_key,
    laid_out_as,
    of_the_compiler,
)
from prograde.estimators import Estimate, Estimator, SeededEstimator, Share
from prograde.kit import float_leaves, pack, unpack, wide


@dataclass(frozen=True)
class Distributed(Estimator):
    """An estimator whose runs are shared by the devices of a mesh.

    The estimate is that of one device, to rounding.

    **Arguments:**

    - `estimator`: what is estimated, as on one device. `num_tangents` and `num_groups` count the
      tangents of all workers together.
    - `mesh`: the devices, with named axes. `jax.make_mesh((jax.device_count(),), ("workers",))` is
      one axis over all.
    - `data`: the axis, or axes, along which the batch is cut. Arrays in the arguments of the
      function have the examples along their first axis. Arrays without axes, and keys, are the same
      for all.
    - `tangents`: the axis, or axes, along which the tangents are cut.

    Axes of the mesh that neither names are left to the compiler. Parameters that are sharded along
    them stay sharded, and their tangents are drawn shard by shard, the same numbers as on one
    device.

    What the workers of a `WeightPerturbation` or a `CentralDifference` share:

    | | tangents | batch |
    |---|---|---|
    | `data="workers"` | the same for all | cut |
    | `tangents="workers"` | others for each | the same for all |
    | `data="workers"` and `num_groups` a multiple of the workers | others for each | cut |

    **Bias, variance:** those of the estimator on one device.

    **Cost:** each worker runs K / (workers along `tangents`) tangents on its part of the batch, and
    forms the gradient estimate from all K of them, whose factors it draws again from the key. One
    all-gather a step, of the loss and the derivatives: see `payload`. Other estimators, such as
    `Backprop`, run on their part of the batch and take the mean of their gradients, with an
    all-reduce as large as the parameters.

    **Errors:** `ValueError` for axes that the mesh does not have, one that is named twice, tangents
    or groups or examples that the workers do not divide; `TypeError` for something else than an
    estimator or a mesh, and for an estimator that learns, whose state would differ from worker to
    worker.

    **Source:** seeds and scalars in place of gradients: arXiv 2312.06353 (federated zeroth-order
    tuning); the estimate itself: arXiv 2202.08587.

    Examples:
        >>> import jax, jax.numpy as jnp, prograde as pg
        >>> mesh = jax.make_mesh((jax.device_count(),), ("workers",))
        >>> alone = pg.WeightPerturbation(num_tangents=8)
        >>> shared = pg.distributed.Distributed(alone, mesh, data="workers")
        >>> loss_fn = lambda w, x: jnp.mean((x @ w) ** 2)
        >>> key, w, x = jax.random.key(0), jnp.ones((8, 4)), jnp.ones((16, 8))
        >>> grads_of = lambda e: jax.jit(lambda: e.estimate(loss_fn, key, None, w, x).grads)()
        >>> grads = grads_of(alone), grads_of(shared)
        >>> bool(jnp.allclose(*grads))
        True
    """

    estimator: Estimator
    mesh: Mesh
    data: Axes = None
    tangents: Axes = None

    def __post_init__(self):
        if not isinstance(self.estimator, Estimator):
            raise TypeError(
                f"estimator={self.estimator!r}, but an estimator is needed, such as "
                "WeightPerturbation()."
            )
        check_mesh(self.mesh)
        named = checked_axes(self.mesh, "data", self.data)
        named += checked_axes(self.mesh, "tangents", self.tangents)
        if len(set(named)) < len(named):
            raise ValueError(
                f"data={self.data!r} and tangents={self.tangents!r} name an axis twice. For other "
                "tangents on each part of the batch, name it in `data` and give the estimator "
                "num_groups, a multiple of the workers along it."
            )
        object.__setattr__(self, "mesh", of_the_compiler(self.mesh))

    def init(self, fun, params, *args, has_aux=False):
        if self.estimator.init(fun, params, *args, has_aux=has_aux) is not None:
            raise TypeError(
                f"estimator={self.estimator!r} learns from step to step, and what it learns would "
                "differ from worker to worker. Keep to one worker, or take an estimator without "
                "state."
            )

    def objective(self, fun, has_aux=False):
        return self.estimator.objective(fun, has_aux)

    def estimate(self, fun, key, state, params, *args, has_aux=False):
        estimator = self.estimator
        if isinstance(estimator, SeededEstimator):
            value, aux, derivatives = self.derivatives(fun, key, params, *args, has_aux=has_aux)
            grads = estimator.gradient(key, params, derivatives)
            grads = jax.tree.map(laid_out_as, grads, float_leaves(params))
            directional = derivatives[:, :, 0] if estimator.num_groups > 1 else derivatives[:, 0, 0]
            return Estimate(value, aux, grads, directional, state)

        axes = self._axes

        def in_share(key, params, args):
            own: Any = None if key is None else jax.random.fold_in(key, lax.axis_index(axes))
            found = estimator.estimate(fun, own, None, params, *args, has_aux=has_aux)
            return (
                wide(found.value)[None],
                found.aux,
                jax.tree.map(lambda g: lax.pmean(g, axes), found.grads),
            )

        values, aux, grads = self._in_shares(in_share, key, params, args)
        return Estimate(jnp.mean(values), aux, grads, None, state)

    def derivatives(
        self,
        fun: Callable[..., Any],
        key: Key[Array, ""],
        params: PyTree,
        *args: Any,
        has_aux: bool = False,
    ) -> tuple[Float[Array, ""], Any, Float[Array, "num_tangents groups numbers"]]:
        """(value, aux, derivatives) of all workers, known to each of them.

        `SeededEstimator.gradient` makes the estimate from the derivatives.
        """
        estimator, tangents, data = self.estimator, self._size(self.tangents), self._size(self.data)
        if not isinstance(estimator, SeededEstimator):
            raise TypeError(
                f"estimator={estimator!r} makes its estimate from more than a seed and a few "
                "numbers. WeightPerturbation and CentralDifference have derivatives to share."
            )

        def in_share(key, params, args):
            share = Share(_index(self.tangents), tangents, _index(self.data), data)
            value, aux, found = estimator.derivatives(
                fun, key, params, *args, has_aux=has_aux, share=share
            )
            return jnp.concatenate([wide(value)[None], found.reshape(-1)]), aux, None

        numbers, aux, _ = self._in_shares(in_share, key, params, args)
        value, numbers = jnp.mean(numbers[:, 0]), numbers[:, 1:]
        k, g = estimator.num_tangents // tangents, max(1, estimator.num_groups // data)
        numbers = numbers.reshape(tangents, data, k, g, -1)
        if estimator.num_groups == 1:
            return value, aux, numbers.mean(axis=1).reshape(tangents * k, 1, -1)
        return value, aux, jnp.moveaxis(numbers, 2, 1).reshape(tangents * k, data * g, -1)

    def _in_shares(
        self, in_share: Callable[..., Any], key: Any, params: PyTree, args: tuple[Any, ...]
    ) -> tuple[Float[Array, "workers numbers"], Any, PyTree]:
        """The results of `in_share(key, params, args)` on each worker's part of the batch.

        They are numbers of its own, which all workers are told; auxiliary output, which stays where
        it is, along a leading axis; and what is the same for all.
        """
        batch, others = eqx.partition(args, lambda x: is_array(x) and jnp.ndim(x) > 0)
        shared, static = eqx.partition((params, others), is_array)
        self._check_batch(batch)
        axes = self._axes

        def of_worker(key, shared, batch):
            # numbers that vary by worker are added to the parameters: make their types equal
            shared = jax.tree.map(
                lambda x: x if is_key(x) else lax.pcast(x, axes, to="varying"), shared
            )
            params, others = eqx.combine(shared, static)
            numbers, aux, same = in_share(key, params, eqx.combine(batch, others))
            aux, static_aux = pack(aux)
            return jax.tree.map(lambda x: jnp.asarray(x)[None], (numbers, aux)), (same, static_aux)

        shares = jax.shard_map(
            of_worker,
            mesh=self.mesh,
            in_specs=(
                PartitionSpec(),
                PartitionSpec(),
                PartitionSpec(axis_names(self.data) or None),
            ),
            out_specs=(PartitionSpec(axes), PartitionSpec()),
            axis_names=set(axes),
        )
        # JAX counts a key that was given to `shard_map` as used
        key = None if key is None else jax.random.clone(key)
        # jitted, as JAX would else run it primitive by primitive outside `jit`
        (numbers, aux), (same, static_aux) = jax.jit(shares)(key, shared, batch)
        # the one exchange: the numbers of all workers, to all workers
        numbers = lax.with_sharding_constraint(numbers, NamedSharding(self.mesh, PartitionSpec()))
        return numbers, unpack((aux, static_aux)), same

    @property
    def _axes(self) -> tuple[str, ...]:
        return axis_names(self.tangents) + axis_names(self.data)

    def _size(self, axes: Axes) -> int:
        return math.prod(self.mesh.shape[name] for name in axis_names(axes))

    def _check_batch(self, batch: PyTree[Array]) -> None:
        parts = self._size(self.data)
        if uneven := [x.shape for x in jax.tree.leaves(batch) if x.shape[0] % parts]:
            raise ValueError(
                f"arrays of shapes {uneven} are cut along their first axis among {parts} workers, "
                "which must divide it. Close over arrays that are the same for all examples."
            )


def _index(axes: Axes) -> int | Array:
    return lax.axis_index(axis_names(axes)) if axes else 0


def value_and_grad(
    fun: Callable[..., Any],
    estimator: Estimator,
    mesh: Mesh,
    *,
    data: Axes = None,
    tangents: Axes = None,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
) -> Callable[..., tuple[Any, Any]]:
    """`prograde.value_and_grad` on the devices of a mesh.

        value_and_grad(fun, Distributed(estimator, mesh, data, tangents))

    **Arguments, bias, variance, cost, errors:** those of `Distributed` and of
    `prograde.value_and_grad`. With `has_aux=True`, the auxiliary output gets a leading axis, with
    one entry for each worker.

    **Source:** arXiv 2202.08587.

    Examples:
        >>> import jax, jax.numpy as jnp, prograde as pg
        >>> mesh = jax.make_mesh((jax.device_count(),), ("workers",))
        >>> loss_fn = lambda w, x: jnp.mean((x @ w) ** 2)
        >>> grad_fn = pg.distributed.value_and_grad(
        ...     loss_fn, pg.WeightPerturbation(), mesh, data="workers")
        >>> loss, grads = jax.jit(grad_fn)(jax.random.key(0), jnp.ones((8, 4)), jnp.ones((16, 8)))
        >>> float(loss), grads.shape
        (64.0, (8, 4))
    """
    shared = Distributed(estimator, mesh, data=data, tangents=tangents)
    return _value_and_grad(fun, shared, argnums=argnums, has_aux=has_aux)


def payload(estimator: Estimator, params: PyTree) -> int:
    """The bytes that one worker adds to the exchange of a step, without the network's own.

    For a `WeightPerturbation` or a `CentralDifference` of K tangents and G groups: 4 (K G + 1), or
    4 (2 K + 1) for 1.5-SPSA, whatever the size of the model; less where the tangents or groups are
    shared out. For every other estimator 8 n with n parameters. Its gradient estimate depends on
    what only the worker with the examples has: activations for `ActivityPerturbation`,
    `LocalLosses` and `LearnedFeedback`, cotangents for `Backprop`. So the sum over the workers has
    to be formed, and a ring sends each entry twice.

    **Arguments:**

    - `estimator`: as for one worker that has a part of the batch and all tangents. The number of
      workers does not matter.
    - `params`: the parameters, or their shapes.

    **Cost:** none; nothing is run.

    **Errors:** `TypeError` for something else than an estimator.

    **Source:** two transfers of each entry are those of a ring all-reduce, as in Horovod, arXiv
    1802.05799.

    Examples:
        >>> import jax.numpy as jnp, prograde as pg
        >>> params = {"w": jnp.zeros((1000, 1000))}
        >>> pg.distributed.payload(pg.WeightPerturbation(num_tangents=8), params)
        36
        >>> pg.distributed.payload(pg.Backprop(), params)
        8000000
    """
    if not isinstance(estimator, Estimator):
        raise TypeError(
            f"estimator={estimator!r}, but an estimator is needed, such as WeightPerturbation()."
        )
    estimator = estimator.estimator if isinstance(estimator, Distributed) else estimator
    if isinstance(estimator, SeededEstimator):
        return 4 * (estimator.num_tangents * estimator.num_groups * estimator.num_numbers + 1)
    arrays = [w for w in jax.tree.leaves(params) if hasattr(w, "dtype")]
    return 8 * sum(math.prod(w.shape) for w in arrays if jnp.issubdtype(w.dtype, jnp.inexact))
