"""Which part of the influence of the parameters on the state `RTRL` keeps."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from prograde.kit import check_whole
from prograde.online._sparsity import Matrix, Pattern


@dataclass(frozen=True)
class SnAp:
    """Keeps the influence that arises within n steps: the sparse n-step approximation.

        kept = pattern of B + A B + ... + A^(n-1) B          A = dF/ds, B = dF/dtheta

    An entry of the influence is carried where a parameter reaches a part of the state within n
    steps, and dropped elsewhere. `SnAp(1)` keeps, for a gated cell without a reset gate before its
    product, one number for each parameter: what a unit's own weights do to that unit.

    **Bias:** what is dropped is missing from every later step. It is none where n steps reach all
    that the parameters ever reach: `SnAp(n)` of a large n is `RTRL`. For element-wise cells
    `SnAp(1)` is.

    **Cost:** `learner.plan(params, state, input)` says it. A step with a dense recurrent matrix
    evaluates dF/ds, which takes s tangents of the state; the influence itself then takes one
    multiply-add for each number that is kept.

    **Source:** Menick, Elsen, Evci, Osindero, Simonyan & Graves, arXiv 2006.07232.

    Examples:
        >>> import jax, jax.numpy as jnp, prograde as pg
        >>> cell = lambda w, s, x: (jnp.tanh(w @ s + x),) * 2
        >>> loss = lambda output, target: jnp.sum((output - target) ** 2)
        >>> learner = pg.online.RTRL(cell, loss, keep=pg.online.SnAp(1))
        >>> learner.plan(jnp.eye(8), jnp.zeros(8), jnp.ones(8)).numbers     # of 8 x 64
        64
    """

    n: int

    def __post_init__(self):
        check_whole("n", self.n)


@dataclass(frozen=True)
class OwnLayer:
    """Keeps the influence of each layer's parameters on the state of that layer.

    A layer is a leaf of the state, or several that depend on each other, such as real and imaginary
    parts. The own layer of a parameter is the first that it reaches: one of which no other that it
    reaches lies upstream. The readout of a layer that feeds another belongs to the layer it feeds.

    **Bias:** what the parameters of a layer do to the states of later layers, beyond the step
    itself, is dropped: an error of one stale path for each pair of layers. The derivative of the
    step itself is exact through all layers, so the last layer's gradient is exact. One layer is
    `RTRL`.

    **Cost:** the sum of those of the layers, each alone.

    **Source:** Zucchet, Meier, Schug, Mujika & Sacramento, arXiv 2305.15947.

    Examples:
        >>> import jax, jax.numpy as jnp, prograde as pg
        >>> def cell(w, s, x):
        ...     low = 0.9 * s["low"] + w["low"] * x
        ...     high = 0.9 * s["high"] + w["high"] @ low
        ...     return {"low": low, "high": high}, high
        >>> loss = lambda output, target: jnp.sum((output - target) ** 2)
        >>> params = {"low": jnp.ones(8), "high": jnp.eye(8)}
        >>> state = {"low": jnp.zeros(8), "high": jnp.zeros(8)}
        >>> learner = pg.online.RTRL(cell, loss, keep=pg.online.OwnLayer())
        >>> learner.plan(params, state, jnp.ones(())).colours      # eight for high, one for low
        (8, 1)
    """


Keep = SnAp | OwnLayer | Callable[[str, str], bool]


@dataclass(frozen=True)
class Group:
    """Parameter leaves whose influence is kept on the same leaves of the state.

    **Fields:** indices of the parameter and state leaves; the entries of the parameters, all that
    these leaves have, and of the state; `kind`, for each of these parameters the index of its kind,
    or -1 where nothing is kept; and the patterns [state entries, kinds] of what is kept (`kept`)
    and of what one more step makes of it (`reached`).
    """

    param_leaves: tuple[int, ...]
    state_leaves: tuple[int, ...]
    param_entries: np.ndarray
    state_entries: np.ndarray
    kind: np.ndarray
    kept: Matrix
    reached: Matrix


def groups(pattern: Pattern, keep: Keep | None) -> list[Group]:
    """What is kept, by groups of leaves, in the order of the parameters.

    **Errors:** `ValueError` where nothing is kept.
    """
    import scipy.sparse as sp

    allowed: dict[tuple[int, ...], list[int]] = {}
    for leaf, states in enumerate(_allowed(pattern, keep)):
        if states:
            allowed.setdefault(states, []).append(leaf)
    found = []
    for states, leaves in allowed.items():
        rows, columns = pattern.state.entries(states), pattern.params.entries(tuple(leaves))
        across = pattern.by_state[rows][:, rows]
        kind, own = _kinds(pattern.by_params[rows][:, columns])
        if own.shape[1] == 0:
            continue
        kept = _closed(across, own) if not isinstance(keep, SnAp) else own
        for _ in range(keep.n - 1 if isinstance(keep, SnAp) else 0):
            kept = _ones(kept + across @ kept)
        reached = _ones(kept + across @ kept)
        merged, both = _kinds(sp.vstack([kept, reached]).tocsc())
        kind = np.where(kind >= 0, merged[kind], -1)
        kept, reached = _ones(both[: len(rows)]), _ones(both[len(rows) :])
        found.append(Group(tuple(leaves), states, columns, rows, kind, kept, reached))
    if not found:
        raise ValueError(
            f"keep={keep!r} keeps no influence of a parameter on the state. Keep a pair that "
            f"exists: parameters {pattern.params.names}, states {pattern.state.names}."
        )
    return found


def _allowed(pattern: Pattern, keep: Keep | None) -> list[tuple[int, ...]]:
    """For each parameter leaf the state leaves on which its influence is kept."""
    of_state, of_params = pattern.state.owner(), pattern.params.owner()
    states, leaves = len(pattern.state.shapes), len(pattern.params.shapes)

    def between(matrix: Matrix, owner: np.ndarray, count: int) -> np.ndarray:
        found, matrix = np.zeros((states, count), bool), matrix.tocoo()
        found[of_state[matrix.row], owner[matrix.col]] = True
        return found

    upstream = between(pattern.by_state, of_state, states) | np.eye(states, dtype=bool)
    for _ in range(states.bit_length()):
        upstream |= upstream @ upstream  # [i, j]: j reaches i, in any number of steps
    direct = between(pattern.by_params, of_params, leaves)
    found = []
    for leaf in range(leaves):
        reached = np.flatnonzero(upstream @ direct[:, leaf])
        if isinstance(keep, OwnLayer):
            first = np.flatnonzero(direct[:, leaf])
            reached = [i for i in first if all(upstream[j, i] or not upstream[i, j] for j in first)]
        elif callable(keep):
            name = pattern.params.names[leaf]
            reached = [i for i in reached if keep(pattern.state.names[i], name)]
        found.append(tuple(int(i) for i in reached))
    return found


def _kinds(own: Matrix) -> tuple[np.ndarray, Matrix]:
    """Parameters with the same column are of one kind: the kind of each, and a column of each."""
    own = _ones(own)
    words = np.random.default_rng(0).integers(1, 2**62, (own.shape[0], 2), dtype=np.int64)
    codes = own.T.astype(np.int64) @ words  # sums that wrap; equal for equal columns alone
    codes = np.ascontiguousarray(codes).view([("a", np.int64), ("b", np.int64)])[:, 0]
    _, first, kind = np.unique(codes, return_index=True, return_inverse=True)
    order = np.argsort(first)  # kinds in the order of their first parameters
    rank = np.empty(len(order), int)
    rank[order] = np.arange(len(order))
    kind, first = rank[kind.ravel()], first[order]
    filled = np.diff(own.indptr)[first] > 0
    index = np.where(filled, np.cumsum(filled) - 1, -1)
    return index[kind], own[:, first[filled]]


def _closed(across: Matrix, own: Matrix) -> Matrix:
    """B + A B + A^2 B + ..., by way of the strongly connected parts of the state."""
    import scipy.sparse as sp
    from scipy.sparse import csgraph

    count, part = csgraph.connected_components(across, connection="strong")
    rows = across.shape[0]
    member = sp.csr_matrix((np.ones(rows, np.int32), (part, np.arange(rows))), (count, rows))
    between, kept = _ones(member @ across @ member.T), _ones(member @ own)
    while True:
        grown = _ones(kept + between @ kept)
        if grown.nnz == kept.nnz:
            return _ones(member.T @ grown)
        kept, between = grown, _ones(between + between @ between)


def _ones(matrix: Matrix) -> Matrix:
    import scipy.sparse as sp

    matrix = matrix.tocsc()
    matrix.sum_duplicates()
    matrix.eliminate_zeros()
    return sp.csc_matrix(
        (np.ones(matrix.nnz, np.int32), matrix.indices, matrix.indptr), matrix.shape
    )
