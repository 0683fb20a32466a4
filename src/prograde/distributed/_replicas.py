"""Checks that workers hold the same bits."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree, UInt32

from prograde.distributed._mesh import (
    Axes,
    check_mesh,
    checked_axes,
    is_array,
    is_key,
    of_the_compiler,
)


def checksums(params: PyTree) -> UInt32[Array, "leaves 2"]:
    """A checksum of the bits of each array of a tree.

    It is two sums, modulo 2^32, of the words of the array, mixed with their positions. Sums of
    whole numbers do not depend on their order, so the checksum does not depend on how an array is
    laid out over devices. Two arrays that differ in one bit have other checksums. Arrays that
    differ otherwise have the same one with a probability of about 2^-64.

    **Arguments:**

    - `params`: any tree. Leaves that are not arrays are left out.

    **Cost:** one pass over the arrays, on their devices.

    **Errors:** none of its own.

    **Source:** the mixing of the words is the finaliser of MurmurHash3 (Appleby, public domain).

    Examples:
        >>> import jax.numpy as jnp, prograde as pg
        >>> one, other = jnp.zeros(1000), jnp.zeros(1000).at[7].set(1e-45)
        >>> bool((pg.distributed.checksums(one) == pg.distributed.checksums(other)).all())
        False
    """
    arrays = [x for x in jax.tree.leaves(params) if is_array(x)]
    return (
        jnp.stack([_checksum(jnp.asarray(x)) for x in arrays])
        if arrays
        else jnp.zeros((0, 2), jnp.uint32)
    )


def _checksum(x: Array) -> UInt32[Array, "2"]:
    if is_key(x):
        x = jax.random.key_data(x)
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    bits = jax.dtypes.itemsize_bits(x.dtype)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x, bits = jnp.stack([x.real, x.imag]), bits // 2
    words = lax.bitcast_convert_type(
        x, jnp.uint32 if bits >= 32 else jnp.dtype(f"uint{max(bits, 8)}")
    )
    words = words.astype(jnp.uint32)
    position = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate(words.shape):  # not reshaped, so that shards stay where they are
        position = position * jnp.uint32(size) + lax.broadcasted_iota(jnp.uint32, words.shape, axis)

    def mixed(x: Array) -> Array:
        x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
        x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
        return x ^ (x >> 16)

    one, other = (
        mixed(words + mixed(position)),
        mixed(words ^ mixed(position + jnp.uint32(0x9E3779B9))),
    )
    return jnp.stack([jnp.sum(one, dtype=jnp.uint32), jnp.sum(other, dtype=jnp.uint32)])


class ReplicaError(RuntimeError):
    """Workers hold other parameters than they should. The message names workers, step and leaves.

    **Source:** none; `check_replicas` raises it.

    Examples:
        >>> import prograde as pg
        >>> issubclass(pg.distributed.ReplicaError, RuntimeError)
        True
    """


def check_replicas(params: PyTree, mesh: Mesh, step: int, axes: Axes = None) -> None:
    """Raises unless all workers hold the same bits.

    **Arguments:**

    - `params`: the parameters (and whatever else should be equal) of each worker, replicated over
      `mesh`.
    - `mesh`, `axes`: the workers: all axes of the mesh, unless some are named.
    - `step`: how far the training is, for the message.

    **Cost:** one pass over the parameters on each worker, and one exchange of 8 bytes from each,
    which the host waits for. The checksums of the leaves are sent only where those differ.

    **Errors:** `ReplicaError`, on every worker, with the workers that differ from the majority, the
    step and the leaves. `TypeError` and `ValueError` for a mesh or axes that are none.

    **Source:** those of `checksums`.

    Examples:
        >>> import jax, jax.numpy as jnp, prograde as pg
        >>> mesh = jax.make_mesh((jax.device_count(),), ("workers",))
        >>> pg.distributed.check_replicas({"w": jnp.ones(3)}, mesh, step=100)
    """
    check_mesh(mesh)
    names = checked_axes(mesh, "axes", axes) or mesh.axis_names
    arrays = [
        (jax.tree_util.keystr(path), x)
        for path, x in jax.tree_util.tree_leaves_with_path(params)
        if is_array(x)
    ]
    leaves = [x for _, x in arrays]
    totals = np.asarray(_of_workers(mesh, names, True)(leaves))
    if (totals == totals[0]).all():
        return
    each = np.asarray(_of_workers(mesh, names, False)(leaves))
    kinds, counts = np.unique(totals, axis=0, return_counts=True)
    usual = kinds[np.argmax(counts)]
    if counts.max() * 2 <= len(totals):  # no majority: compare with the first
        usual = totals[0]
    like = np.flatnonzero((totals == usual).all(axis=1))
    odd = np.flatnonzero((totals != usual).any(axis=1))
    differing = [
        name for i, (name, _) in enumerate(arrays) if (each[odd, i] != each[like[0], i]).any()
    ]
    raise ReplicaError(
        f"after step {step} the parameters of worker {', '.join(map(str, odd))} differ from those "
        f"of worker {', '.join(map(str, like))}, in {', '.join(differing)}. They are equal by "
        "construction, so memory or a program was altered. Go back to a replay log or checkpoint "
        "from before, and check the machines."
    )


@functools.lru_cache(maxsize=8)
def _of_workers(mesh: Mesh, names: tuple[str, ...], in_all: bool) -> Callable[[list[Array]], Array]:
    """The checksums of the workers on their own devices, along a leading axis, for all."""

    def of_one(leaves: list[Array]) -> Array:
        found = checksums(leaves)
        return _checksum(found)[None] if in_all else found[None]

    def of_all(leaves: list[Array]) -> Array:
        found = jax.shard_map(
            of_one,
            mesh=mesh,
            in_specs=PartitionSpec(),
            out_specs=PartitionSpec(names),
            axis_names=set(names),
            check_vma=False,
        )(leaves)
        return lax.with_sharding_constraint(found, NamedSharding(mesh, PartitionSpec()))

    mesh = of_the_compiler(mesh)
    return jax.jit(of_all)
