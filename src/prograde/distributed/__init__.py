"""Many machines that exchange a few bytes a step.

A forward gradient is a key and a few numbers. Workers that share keys and parameters each run their
share of the tangents on their share of the batch and exchange the directional derivatives. Each
then forms the same estimate from all of them: no gradient and no parameter is ever sent. JAX's
runtime does the rest: `shard_map`, and `jax.distributed` below it.

**Source:** the estimate is that of arXiv 2202.08587.

Examples:
    >>> import jax, jax.numpy as jnp, prograde as pg
    >>> mesh = jax.make_mesh((jax.device_count(),), ("workers",))
    >>> estimator = pg.WeightPerturbation(num_tangents=8)
    >>> loss_fn = lambda w, x: jnp.mean((x @ w) ** 2)
    >>> grad_fn = pg.distributed.value_and_grad(loss_fn, estimator, mesh, data="workers")
    >>> loss, grads = jax.jit(grad_fn)(jax.random.key(0), jnp.ones((8, 4)), jnp.ones((16, 8)))
    >>> pg.distributed.payload(estimator, jnp.ones((8, 4)))  # bytes from each worker: nine float32
    36
"""

from prograde.distributed._estimator import Distributed, payload, value_and_grad
from prograde.distributed._processes import StartError, agree, initialize
from prograde.distributed._replicas import ReplicaError, check_replicas, checksums

__all__ = [
    "Distributed",
    "ReplicaError",
    "StartError",
    "agree",
    "check_replicas",
    "checksums",
    "initialize",
    "payload",
    "value_and_grad",
]
