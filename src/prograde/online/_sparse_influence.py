"""The influence of the parameters on the state, where it is sparse: one tangent for each colour.

    J <- A J + B          A = dF/ds, B = dF/dtheta

Columns of J that never meet share a row of memory, `columns[colour]`, the sum of these columns.
One forward run along the seeds of the colours gives B in the same layout. A J comes by the way that
suits A: entry by entry where A is diagonal, by a product where A is dense, and else in the same
forward run, along `columns`.
"""

import functools
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, PyTree, UInt32

from prograde._structured import directional_derivative
from prograde.kit import wide
from prograde.online._colouring import colour, seeds, take
from prograde.online._sparsity import Matrix, NoPatternError, Pattern, described, find_pattern
from prograde.online.keep import Group, Keep, groups

# Numbers of influence, from which a decision can cost less than reading them. It also keeps the
# gradients from being fused with what uses them, so there have to be several for each parameter.
_LARGE = 2**15

Following = Callable[[list[Array], list[Array]], list[Array]]


class SparseInfluence(eqx.Module):
    """J by colours: for each group of parameters and each leaf of the state [colours, *leaf].

    Or [*leaf, colours], where the largest array of parameters is laid out in that way.
    """

    columns: tuple[tuple[Array, ...], ...]
    code: UInt32[Array, ""]  # of the layout, so that a saved influence is not read in another


@dataclass(frozen=True)
class _Block:
    """How the influence of one group of parameters is carried.

    **Fields:**

    - `param_leaves`, `state_leaves`: indices of the leaves.
    - `colours`, `count`: the colours of the parameters, leaf by leaf, and their number; `axis`, 0
      or -1, is that of the colours in J.
    - `by`: the way of A J.
    - `state_colours`, `state_count`: the columns of A that are evaluated together.
    - `mask`: of A where it is `by` a product, of J where it is carried along tangents; `None` where
      all entries count.
    - `sums`: how entries of dL/ds J are summed up to one for each kind of parameter and colour, as
      positions or as a matrix; `places`: where each parameter is found among these.
    """

    param_leaves: tuple[int, ...]
    state_leaves: tuple[int, ...]
    colours: tuple[np.ndarray, ...]
    count: int
    axis: Literal[0, -1]
    by: Literal["diagonal", "product", "tangents"]
    state_colours: np.ndarray
    state_count: int
    mask: np.ndarray | None
    sums: np.ndarray | Matrix
    places: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Layout:
    """How the influence of all parameters is carried, for one cell and one choice of `keep`."""

    blocks: tuple[_Block, ...]
    parameters: int
    state: int
    exact: bool

    @property
    def colours(self) -> tuple[int, ...]:
        """The number of tangents of each group."""
        return tuple(block.count for block in self.blocks)

    @property
    def numbers(self) -> int:
        """How many numbers the influence takes."""
        return sum(block.count * len(block.state_colours) for block in self.blocks)

    @property
    def carried(self) -> int:
        """How many parameters reach the state."""
        return sum(int(np.sum(c >= 0)) for block in self.blocks for c in block.colours)

    @functools.cached_property
    def code(self) -> int:
        """A checksum of where each number is found."""
        parts = (x.astype(np.int64) for block in self.blocks for x in block.places)
        return functools.reduce(lambda code, x: zlib.crc32(x.tobytes(), code), parts, 0)

    def zeros(self, state: list[Array]) -> SparseInfluence:
        """The influence before the first step."""
        return SparseInfluence(
            tuple(
                tuple(
                    jnp.moveaxis(
                        jnp.zeros((block.count, *state[i].shape), state[i].dtype), 0, block.axis
                    )
                    for i in block.state_leaves
                )
                for block in self.blocks
            ),
            jnp.asarray(self.code, jnp.uint32),
        )


def find_layout(
    cell: Callable[..., Any], keep: Keep | None, params: PyTree, state: PyTree, input: PyTree
) -> Layout:
    """How the influence of a cell is carried, from the shapes of its arguments alone.

    **Errors:** `NoPatternError` where the pattern cannot be found, `ValueError` where nothing is
    kept.
    """
    try:
        found = _cached_layout(cell, keep, *described(params, state, input))
    except TypeError:  # something is not hashable
        found = _cached_layout.__wrapped__(cell, keep, *described(params, state, input))
    if isinstance(found, NoPatternError):
        raise found
    return found


@functools.lru_cache(maxsize=64)
def _cached_layout(
    cell: Callable[..., Any], keep: Keep | None, structure: Any, leaves: tuple[Any, ...]
) -> Layout | NoPatternError:
    try:
        pattern = find_pattern(cell, *structure.unflatten(leaves))
    except NoPatternError as error:
        return error
    found = [part for group in groups(pattern, keep) for part in _by_leaf(pattern, group)]
    exact = keep is None or _entries(found) == _entries(groups(pattern, None))
    blocks = tuple(_block(pattern, group) for group in found)
    return Layout(blocks, pattern.params.size, pattern.state.size, exact)


def _by_leaf(pattern: Pattern, group: Group) -> list[Group]:
    """A group for each leaf of parameters, where that takes hardly more colours.

    A tangent of one leaf passes through less of the cell.
    """
    starts = np.cumsum([0, *(int(np.prod(pattern.params.shapes[i])) for i in group.param_leaves)])
    parts = [
        replace(
            group,
            param_leaves=(leaf,),
            param_entries=group.param_entries[start:stop],
            kind=group.kind[start:stop],
        )
        for leaf, start, stop in zip(group.param_leaves, starts, starts[1:], strict=False)
        if np.any(group.kind[start:stop] >= 0)
    ]
    counts = [np.bincount(part.kind[part.kind >= 0], minlength=1) for part in parts]
    together = np.max(np.bincount(group.kind[group.kind >= 0]))
    return parts if 4 * sum(int(np.max(c)) for c in counts) <= 5 * together else [group]


def _entries(found: list[Group]) -> int:
    """The entries of the influence that are kept."""
    return sum(int(np.sum(np.diff(g.kept.indptr)[g.kind[g.kind >= 0]])) for g in found)


def _block(pattern: Pattern, group: Group) -> _Block:
    import scipy.sparse as sp

    rows, kept = group.state_entries, group.kept
    size, across = len(rows), pattern.by_state[rows][:, rows].tocsc()
    closed = group.reached.nnz == kept.nnz
    disjoint = bool(np.all(np.bincount(kept.indices, minlength=size) <= 1))
    if closed or disjoint:  # what is dropped is left out of A
        colours, count = colour(group.kind, kept, kept)
    else:  # what is dropped of one column must not fall on what is kept of another
        colours, count = colour(group.kind, kept, group.reached)
    used: Matrix = across
    mask = None
    if not closed and disjoint:
        kind = np.full(size, -1)
        kind[kept.indices] = np.repeat(np.arange(kept.shape[1]), np.diff(kept.indptr))
        entries = across.tocoo()
        same = (kind[entries.row] == kind[entries.col]) & (kind[entries.row] >= 0)
        at = (np.ones(same.sum(), np.int32), (entries.row[same], entries.col[same]))
        used = sp.csc_matrix(at, across.shape)
    entries = used.tocoo()
    if np.all(entries.row == entries.col):
        by = "diagonal"
    elif (2 * across.nnz >= size**2) if closed else disjoint:
        by = "product"
    else:
        by = "tangents"
        if not closed:
            filled = group.kind >= 0
            table = np.zeros((count, size), bool)
            for c, k in {*zip(colours[filled], group.kind[filled], strict=True)}:
                table[c, kept.indices[kept.indptr[k] : kept.indptr[k + 1]]] = True
            mask = table
    state_colours, state_count = np.zeros(size, int), 0
    if by != "tangents":
        state_colours, state_count = colour(np.arange(size), used, across)
    if by == "product" and used.nnz < size**2:  # of columns evaluated together, each has its rows
        mask = used.toarray().astype(bool)
    kinds = kept.shape[1]
    lengths = np.diff(kept.indptr)
    shapes = [pattern.params.shapes[i] for i in group.param_leaves]
    axis = 0 if by == "product" else _axis(group.kind, colours, shapes)
    if disjoint and np.all(lengths == lengths[0]):
        of_kind = np.sort(kept.indices.reshape(kinds, lengths[0]), axis=1)
        if axis == 0:  # [colours, rows of a kind, kinds]
            sums = np.arange(count)[:, None, None] * size + of_kind.T
        else:  # [rows of a kind, kinds, colours]
            sums = of_kind.T[:, :, None] * count + np.arange(count)
    else:
        sums = kept
    at = colours * kinds + group.kind if axis == 0 else group.kind * count + colours
    places = np.where(group.kind >= 0, at, -1)
    cuts = np.cumsum([int(np.prod(shape)) for shape in shapes])[:-1]
    in_leaves = lambda x: tuple(  # noqa: E731
        part.reshape(shape) for part, shape in zip(np.split(x, cuts), shapes, strict=True)
    )
    return _Block(
        group.param_leaves,
        group.state_leaves,
        in_leaves(colours),
        count,
        axis,
        by,
        state_colours,
        state_count,
        mask,
        sums,
        in_leaves(places),
    )


def _axis(kind: np.ndarray, colours: np.ndarray, shapes: list[tuple[int, ...]]) -> Literal[0, -1]:
    """-1 where neighbours in the largest array are of one kind and of colours side by side."""
    sizes = [int(np.prod(shape)) for shape in shapes]
    largest = int(np.argmax(sizes))
    start = sum(sizes[:largest])
    part = slice(start, start + sizes[largest])
    kind, colours = kind[part], colours[part]
    return -1 if np.mean((np.diff(kind) == 0) & (np.diff(colours) == 1)) > 0.5 else 0


def advanced(
    layout: Layout,
    following: Following,
    floats: list[Array],
    state: list[Array],
    memory: SparseInfluence,
) -> SparseInfluence:
    """J after one step. `following(floats, state)` are the float leaves of the next state."""
    pairs = zip(layout.blocks, memory.columns, strict=True)
    columns = tuple(_advance(block, following, floats, state, each) for block, each in pairs)
    return SparseInfluence(columns, memory.code)


def _advance(
    block: _Block,
    following: Following,
    floats: list[Array],
    state: list[Array],
    columns: tuple[Array, ...],
) -> tuple[Array, ...]:
    def of(some: dict[str, list[Array]]) -> tuple[list[Array], tuple[()]]:
        out = following(
            _replaced(floats, block.param_leaves, some.get("params", [])),
            _replaced(state, block.state_leaves, some.get("state", [])),
        )
        return [out[i] for i in block.state_leaves], ()

    def along(at: dict[str, list[Array]], tangents: dict[str, Any]) -> list[Array]:
        in_axes = {"params": 0, "state": block.axis}
        in_axes = ({name: in_axes[name] for name in tangents},)
        return jax.vmap(lambda t: directional_derivative(of, at, t)[1], in_axes, block.axis)(
            tangents
        )

    at = {"params": [floats[i] for i in block.param_leaves]}
    tangents: dict[str, Any] = {
        "params": [
            seeds(colours, block.count, w.shape, w.dtype)
            for colours, w in zip(block.colours, at["params"], strict=True)
        ]
    }
    state_point = [state[i] for i in block.state_leaves]
    if block.by == "tangents":
        moved = along(at | {"state": state_point}, tangents | {"state": list(columns)})
        if block.mask is None:
            return tuple(moved)
        masks = _split(jnp.asarray(block.mask), state_point)
        return tuple(
            jnp.where(jnp.moveaxis(mask, 0, block.axis), x, 0)
            for mask, x in zip(masks, moved, strict=True)
        )
    own = along(at, tangents)
    of_colour = np.arange(block.state_count)[:, None] == block.state_colours
    unit = [
        part.astype(x.dtype)
        for part, x in zip(_split(jnp.asarray(of_colour), state_point), state_point, strict=True)
    ]
    slopes = jax.vmap(lambda t: directional_derivative(of, {"state": state_point}, {"state": t})[1])
    by_colour = _flat(slopes(unit))  # [colour, row]
    if block.by == "diagonal":
        entries = np.arange(by_colour.shape[1])
        diagonal = by_colour[0] if len(by_colour) == 1 else by_colour[block.state_colours, entries]
        return tuple(
            jnp.expand_dims(a[0], block.axis % j.ndim).astype(j.dtype) * j + b
            for a, j, b in zip(_split(diagonal[None], state_point), columns, own, strict=True)
        )
    across = by_colour[block.state_colours]  # [column, row]
    if block.mask is not None:
        across = jnp.where(jnp.asarray(block.mask.T), across, 0)
    moved = _split(_flat(list(columns)) @ across, state_point)
    return tuple(x.astype(b.dtype) + b for x, b in zip(moved, own, strict=True))


def add_influence(
    layout: Layout,
    memory: SparseInfluence,
    by_state: list[Array],
    by_params: list[Array],
) -> tuple[list[Array], SparseInfluence]:
    """dL/ds J + dL/dtheta, for each leaf of the parameters; and J, to go on with."""
    grads = list(by_params)
    if layout.numbers <= max(_LARGE, 4 * layout.parameters):
        return _added(layout, memory, by_state, grads), memory
    # Most steps of a stream may ask nothing. J is then not read, and where it is, that is done
    # before it is overwritten in place: what is returned depends on the decision, by a comparison
    # that always holds, and no copy is made.
    asked = sum(jnp.sum(jnp.abs(wide(s))) for s in by_state) != 0
    grads, done = lax.cond(
        asked,
        lambda: (_added(layout, memory, by_state, grads), jnp.int32(1)),
        lambda: (grads, jnp.int32(0)),
    )
    columns = jax.tree.map(lambda j: jnp.where(done < 2, j, 0), memory.columns)
    return grads, SparseInfluence(columns, memory.code)


def _added(
    layout: Layout, memory: SparseInfluence, by_state: list[Array], grads: list[Array]
) -> list[Array]:
    grads = list(grads)
    for block, columns in zip(layout.blocks, memory.columns, strict=True):
        slopes = [by_state[i] for i in block.state_leaves]
        products = [
            wide(j) * wide(jnp.expand_dims(s, block.axis % j.ndim))
            for j, s in zip(columns, slopes, strict=True)
        ]
        if block.axis == 0:
            products = _flat(products)
        else:
            products = jnp.concatenate([x.reshape(-1, block.count) for x in products])
        if isinstance(block.sums, np.ndarray):
            of_kinds = jnp.sum(take(products.ravel(), block.sums), axis=1 if block.axis == 0 else 0)
        else:
            kept = jnp.asarray(block.sums.toarray(), products.dtype)
            of_kinds = products @ kept if block.axis == 0 else kept.T @ products
        flat = of_kinds.ravel()
        for i, place in zip(block.param_leaves, block.places, strict=True):
            grads[i] = grads[i] + take(flat, place).astype(grads[i].dtype)
    return grads


def _replaced(leaves: list[Array], at: tuple[int, ...], by: list[Array]) -> list[Array]:
    leaves = list(leaves)
    for i, x in zip(at, by, strict=False):
        leaves[i] = x
    return leaves


def _flat(parts: list[Array]) -> Array:
    """Leaves [k, *leaf] as one array [k, state]."""
    flat = [x.reshape(x.shape[0], -1) for x in parts]
    return flat[0] if len(flat) == 1 else jnp.concatenate(flat, axis=1)


def _split(flat: Array, like: list[Array]) -> list[Array]:
    """An array [k, state] as leaves [k, *leaf]."""
    cuts = np.cumsum([x.size for x in like])[:-1]
    parts = jnp.split(flat, cuts, axis=1)
    return [part.reshape(len(flat), *x.shape) for part, x in zip(parts, like, strict=True)]
