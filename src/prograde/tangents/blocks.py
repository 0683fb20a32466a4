"""A tangent in one randomly chosen block of the parameters."""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int, Key, PyTree

from prograde._structured import Group, LowRankTangent, Tangent, is_structured
from prograde.tangents._distribution import TangentDistribution
from prograde.tangents._draw import threefry
from prograde.tangents.factored import Factored, LowRank

_CHOICE = 2**32 - 1  # folded into the key for the choice; no tangent of an estimate uses it


@dataclass(frozen=True)
class Blocks(TangentDistribution):
    """A tangent in one block of the parameters, chosen at random for each estimate.

        v = u / sqrt(p_l) in block l with probability p_l, and 0 in all other blocks

    u is drawn by another distribution, for the parameters of the block alone. All tangents of an
    estimate share the block. `WeightPerturbation` then runs the layers before the block without a
    tangent. `WeightPerturbation.descend` writes nothing but the block.

    **Arguments:**

    - `tangents`: the distribution of u.
    - `blocks`: a function of the path of a leaf, such as `"['layers'][0]['w']"`. Leaves for which
      it returns the same name are one block. `None` makes a block of the leaves that have the same
      parent, such as the weight and the bias of a layer. A leaf at the top is a block of its own.
    - `stacked`: names of containers whose arrays stack layers along their first axis, such as
      `("layers",)` for parameters that `jax.lax.scan` runs over. Each layer is a block.
    - `probabilities`: `"even"`; `"size"`, p_l = n_l / n; or a dictionary with a positive number for
      each block (or for a stack, whose layers share it), which are divided by their sum. An
      array [blocks] is taken as it is: positive, with the sum 1. Where it is traced, its values
      are not checked.

    **Second moment:** c_l / p_l for one tangent, with c_l of u in the block: n_l / p_l for signs.
    With `"size"` it is that of a tangent in all parameters, n: the choice costs no variance. For
    the mean over K tangents, c_l of their mean over p_l.

    **Cost:** `WeightPerturbation` runs one forward pass, and a tangent from the first use of the
    block to the loss. On average this is about half of the cost of a tangent in all parameters
    where blocks of equal cost are chosen evenly. The program is compiled once without and once with
    a tangent for each block. Layers of a `scan` over a stack share theirs. Weights that one
    operation uses together, such as those of a recurrent cell, are compiled once for each block.
    Other estimators get a tangent that is zero outside the block, at the cost of a full one.

    **Errors:** `TypeError` for something else than a distribution; `ValueError` for a distribution
    in blocks itself, stacks of different length, and a block without probability, which would bias
    the estimate.

    **Source:** the condition E[v v^T] = I of arXiv 2202.08587, for randomised block coordinate
    descent (Nesterov, 2012); the second moment is derived in the documentation and tested.

    Examples:
        >>> import jax, jax.numpy as jnp, prograde as pg
        >>> params = [{"w": jnp.eye(8, 6), "b": jnp.zeros(6)}, {"w": jnp.ones((6, 2))}]
        >>> blocks = pg.Blocks(pg.LowRank(rank=1), probabilities="size")
        >>> blocks.names(params)
        ('[0]', '[1]')
        >>> blocks.second_moment(params)
        [{'b': 66.0, 'w': 66.0}, {'w': 66.0}]
        >>> def loss_fn(params, x):
        ...     h = jnp.tanh(x @ params[0]["w"] + params[0]["b"])
        ...     return jnp.mean((h @ params[1]["w"]) ** 2)
        >>> grad_fn = pg.value_and_grad(loss_fn, pg.WeightPerturbation(blocks, num_tangents=4))
        >>> value, grads = grad_fn(jax.random.key(1), params, jnp.ones((3, 8)))
        >>> [bool(jnp.any(g["w"] != 0)) for g in grads]
        [True, False]
    """

    tangents: TangentDistribution = field(default_factory=LowRank)
    blocks: Callable[[str], Hashable] | None = None
    stacked: tuple[str, ...] = ()
    probabilities: Literal["even", "size"] | Mapping[str, float] | tuple | Array = "even"

    def __post_init__(self):
        if not isinstance(self.tangents, TangentDistribution):
            raise TypeError(
                f"tangents={self.tangents!r}, but a tangent distribution is needed, such as "
                "LowRank(rank=1)."
            )
        if isinstance(self.tangents, Blocks):
            raise ValueError(
                "tangents is a Blocks distribution itself. Give the distribution inside the block, "
                "such as LowRank(rank=1)."
            )
        if self.blocks is not None and not callable(self.blocks):
            raise TypeError(
                f"blocks={self.blocks!r}, but a function of the path of a leaf is needed, or None."
            )
        if isinstance(self.stacked, str) or not all(isinstance(x, str) for x in self.stacked):
            raise TypeError(
                f"stacked={self.stacked!r}, but a tuple of names is needed, such as ('layers',)."
            )
        object.__setattr__(self, "stacked", tuple(self.stacked))
        given = self.probabilities
        if isinstance(given, str):
            if given not in ("even", "size"):
                raise ValueError(
                    f"probabilities={given!r}, but it is 'even', 'size', or a dictionary with a "
                    "number for each block."
                )
        elif isinstance(given, np.ndarray):
            object.__setattr__(self, "probabilities", jnp.asarray(given))
        elif not isinstance(given, jax.Array):  # pairs, which can be hashed
            pairs = tuple(given.items()) if isinstance(given, Mapping) else tuple(given)
            object.__setattr__(self, "probabilities", pairs)

    def __repr__(self):
        blocks = self.blocks
        if blocks is not None:  # without its address, so that logs of a run know it again
            blocks = f"{blocks.__module__}.{getattr(blocks, '__qualname__', type(blocks).__name__)}"
        probabilities = self.probabilities
        if isinstance(probabilities, tuple):
            probabilities = dict(probabilities)
        return (
            f"Blocks({self.tangents!r}, blocks={blocks}, stacked={self.stacked!r}, "
            f"probabilities={probabilities!r})"
        )

    def groups(self, params: PyTree[Array]) -> tuple[Group, ...]:
        """The blocks of these parameters, those of a stack together, in the order of the leaves."""
        found: dict[Hashable, tuple[list[int], int | None]] = {}
        for i, (path, w) in enumerate(jax.tree_util.tree_leaves_with_path(params)):
            label, layers = self._label(path, w)
            leaves, known = found.setdefault(label, ([], layers))
            leaves.append(i)
            if known != layers:
                raise ValueError(
                    f"params{jax.tree_util.keystr(path)} stacks {layers} layers, but other arrays "
                    f"of {label} stack {known}. All arrays of a stack need one first axis."
                )
        groups, first = [], 0
        for label, (leaves, layers) in found.items():
            groups.append(Group(str(label), first, tuple(leaves), layers))
            first += layers or 1
        return tuple(groups)

    def _label(self, path: Any, w: Array) -> tuple[Hashable, int | None]:
        for depth, entry in enumerate(path):
            if jax.tree_util.keystr((entry,), simple=True) in self.stacked:
                name = jax.tree_util.keystr(path[: depth + 1])
                if not w.shape:
                    raise ValueError(
                        f"params{jax.tree_util.keystr(path)} has no axes, but {name} is said to "
                        "stack layers along the first axis. Keep it outside of the stack."
                    )
                return name, w.shape[0]
        if self.blocks is not None:
            return self.blocks(jax.tree_util.keystr(path)), None
        return jax.tree_util.keystr(path[:-1] or path), None

    def names(self, params: PyTree[Array]) -> tuple[str, ...]:
        """The names of the blocks of these parameters."""
        return tuple(
            group.name if group.layers is None else f"{group.name}[{i}]"
            for group in self.groups(params)
            for i in range(group.size)
        )

    def sizes(self, params: PyTree[Array]) -> tuple[int, ...]:
        """The number of parameters of each block."""
        leaves = jax.tree.leaves(params)
        return tuple(
            sum(math.prod(leaves[i].shape) for i in group.leaves) // group.size
            for group in self.groups(params)
            for _ in range(group.size)
        )

    def probability(self, params: PyTree[Array]) -> Float[np.ndarray, " blocks"]:
        """The probability of each block."""
        if isinstance(self.probabilities, jax.Array):
            return self._checked(self.probabilities, params)  # pyright: ignore[reportReturnType]
        if isinstance(self.probabilities, str) and self.probabilities == "even":
            weights = np.ones(len(self.names(params)))
        elif isinstance(self.probabilities, str):
            weights = np.asarray(self.sizes(params), float)
        else:
            weights = self._given(params)
        self._check_positive(weights, params)
        return weights / weights.sum()

    def _checked(self, given: Array, params: PyTree[Array]) -> Array:
        """The given array, which is refused where it does not fit; its values where it has some."""
        names = self.names(params)
        if given.shape != (len(names),):
            raise ValueError(
                f"probabilities has shape {given.shape}, but the blocks are {names}: one number "
                "for each is needed."
            )
        if not isinstance(given, Tracer):
            values = np.asarray(given, float)
            self._check_positive(values, params)
            if abs(values.sum() - 1) > 1e-4:
                raise ValueError(
                    f"probabilities has the sum {values.sum():g}, but an array is taken as it is. "
                    "Divide it by its sum."
                )
        return given

    def _check_positive(self, weights: np.ndarray, params: PyTree[Array]) -> None:
        for name, weight in zip(self.names(params), weights, strict=True):
            if not 0 < weight < math.inf:
                raise ValueError(
                    f"block {name} has probability {weight:g}, which would leave its gradient out "
                    "of the mean of the estimate. Give it a positive number, or pass its arrays to "
                    "the function as an argument that is not differentiated."
                )

    def _given(self, params: PyTree[Array]) -> Float[np.ndarray, " blocks"]:
        pairs: Any = self.probabilities
        given, groups = dict(pairs), self.groups(params)
        allowed = {*self.names(params), *(group.name for group in groups)}
        if unknown := [name for name in given if name not in allowed]:
            raise ValueError(
                f"probabilities name {unknown[0]!r}, but the blocks are {self.names(params)}."
            )
        of_stack = {
            f"{g.name}[{i}]": given.get(g.name, 0) / g.layers
            for g in groups
            if g.layers is not None
            for i in range(g.layers)
        }
        return np.asarray(
            [float(given.get(name, of_stack.get(name, 0))) for name in self.names(params)]
        )

    def choice(self, key: Key[Array, ""], probability: Float[Any, " blocks"]) -> Int[Array, ""]:
        """The number of the block that this key chooses."""
        key = jax.random.fold_in(jax.random.clone(threefry(key)), _CHOICE)
        upper = jnp.cumsum(jnp.asarray(probability, jnp.float32))
        at = jax.random.uniform(key, dtype=jnp.float32) * upper[-1]
        return jnp.sum(at >= upper[:-1], dtype=jnp.int32)

    def within(
        self,
        groups: Sequence[Group],
        key: Key[Array, ""],
        params: PyTree[Array],
        index: int | Array = 0,
        num_tangents: int = 1,
    ) -> dict[int, Tangent]:
        """The tangents u of some blocks, or of one layer of a stack, by the position of the leaf.

        They are not yet over sqrt(p).
        """
        part = self.part(groups, params)
        if isinstance(self.tangents, Factored):  # a rank may be too high for some of the blocks
            self.tangents.check_rank(params)
            found = self.tangents.sample_any(key, part, index)
        else:
            found = self.tangents.sample(key, part, index, num_tangents)
        positions = sorted(i for group in groups for i in group.leaves)
        return dict(zip(positions, jax.tree.leaves(found, is_leaf=is_structured), strict=True))

    def by_group(
        self,
        groups: Sequence[Group],
        draw: Callable[[Sequence[Group]], dict[int, Tangent]],
    ) -> Callable[[Group], list[Tangent]]:
        """What `draw` gives for the leaves of a group.

        Factors of all blocks come from one draw, which compiles fast and takes little time. Dense
        tangents are drawn for the group that is asked for.
        """
        if isinstance(self.tangents, Factored):
            everything = draw(groups)
            return lambda group: [everything[i] for i in group.leaves]
        return lambda group: list(draw([group]).values())

    @staticmethod
    def part(groups: Sequence[Group], params: PyTree[Array]) -> PyTree[jax.ShapeDtypeStruct]:
        """The shapes of some blocks, or of one layer of a stack, with `None` for other leaves."""
        leaves, treedef = jax.tree.flatten(params)
        first = {i: 0 if group.layers is None else 1 for group in groups for i in group.leaves}
        return treedef.unflatten(
            [
                jax.ShapeDtypeStruct(w.shape[first[i] :], w.dtype) if i in first else None
                for i, w in enumerate(leaves)
            ]
        )

    def sample(self, key, params, index=0, num_tangents=1):
        leaves, treedef = jax.tree.flatten(params)
        probability = jnp.asarray(self.probability(params), jnp.float32)
        chosen = self.choice(key, probability)
        found: list[Any] = [None] * len(leaves)
        groups = self.groups(params)
        drawn = self.by_group(
            groups, lambda some: self.within(some, key, params, index, num_tangents)
        )
        for group in groups:
            at = jnp.arange(group.first, group.first + group.size) == chosen
            scale = jnp.where(at, 1 / jnp.sqrt(probability[chosen]), 0)
            scale = scale if group.layers is not None else scale[0]
            for i, v in zip(group.leaves, drawn(group), strict=True):
                found[i] = _times(scale, v, leaves[i].dtype)
        return treedef.unflatten(found)

    def second_moment(self, params):
        return self.second_moment_of_mean(params, 1)

    def second_moment_of_mean(self, params, num_tangents):
        leaves, treedef = jax.tree.flatten(params)
        probability, found = self.probability(params), [0.0] * len(leaves)
        for group in self.groups(params):
            part = self.part([group], params)
            moments = jax.tree.leaves(self.tangents.second_moment_of_mean(part, num_tangents))
            own = probability[group.first : group.first + group.size]
            for i, c in zip(group.leaves, moments, strict=True):
                # layers of a stack are one leaf: the mean over them
                found[i] = float(c * np.mean(1 / own))
        return treedef.unflatten(found)


def _times(scale: Array, v: Tangent, dtype: Any) -> Tangent:
    """`v` times a number, or for each layer of a stack times a number of its own."""
    scale = scale.astype(dtype)
    if not isinstance(v, LowRankTangent):
        return scale.reshape(scale.shape + (1,) * v.ndim) * v
    if not scale.ndim:
        return LowRankTangent((v.factors[0] * scale, *v.factors[1:]))
    along = scale.reshape(scale.shape + (1,) * v.factors[0].ndim)
    first = jnp.broadcast_to(along, (*along.shape[:-1], v.factors[0].shape[-1]))
    return LowRankTangent((first, *(f[None] for f in v.factors)))
