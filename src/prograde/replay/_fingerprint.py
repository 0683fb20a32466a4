"""A digest of parameters."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree


def fingerprint(params: PyTree) -> str:
    """The SHA-256 of the arrays of a tree (paths, dtypes, shapes and bytes) as hexadecimal digits.

    **Arguments:**

    - `params`: any tree. Leaves that are not arrays are left out.

    **Cost:** copies the arrays to the host, one by one.

    **Errors:** `TypeError` for an array of Python objects.

    **Source:** FIPS 180-4 for the hash.

    Examples:
        >>> import jax.numpy as jnp, prograde as pg
        >>> pg.replay.fingerprint({"w": jnp.zeros(3)})[:16]
        'db2e2ab495f1d4b7'
    """
    digest = hashlib.sha256()
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        if not isinstance(x, jax.Array | np.ndarray | np.generic):
            continue
        name = jax.tree_util.keystr(path)
        if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        array = np.asarray(x)
        if array.dtype.hasobject:
            raise TypeError(
                f"params{name} has dtype {array.dtype}, but its bytes are addresses of objects. "
                "Use arrays of numbers."
            )
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
