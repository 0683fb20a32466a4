"""Finds the equation of a program that made a value or a tangent infinite or not a number."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, JaxprEqn, jaxpr_as_fun
from jaxtyping import Array, Key, PyTree

from prograde._jaxprs import as_closed, bind, called, inner_programs, scan_groups, source, walk

_MANY = 6  # operands that are shown with their values


@dataclass(frozen=True)
class NonFinite:
    """The equation that made the first value or tangent that is not finite and reached the result.

    **Fields:** `primitive`: its operation; `source`: the line of the program, `file:line:column
    (function)`; `part`: whether its value or its tangent is not finite; `operands`, `tangents`: the
    values and tangents that it got; `path`: the loops around it, from the outside, with the number
    of the iteration, counted from 0.

    **Source:** this library; `jax.debug_nans` stops at values alone, and not inside loops.

    Examples:
        >>> import jax.numpy as jnp, prograde as pg
        >>> found = pg.diagnostics.first_nonfinite(lambda x: jnp.sqrt(x**2), jnp.zeros(()))
        >>> found.primitive, found.part, found.operands
        ('sqrt', 'tangent', (array(0., dtype=float32),))
    """

    primitive: str
    source: str
    part: Literal["value", "tangent"]
    operands: tuple[np.ndarray, ...]
    tangents: tuple[np.ndarray | None, ...]
    path: tuple[str, ...] = ()

    def __str__(self) -> str:
        where = "".join(f", in {step}" for step in reversed(self.path))
        lines = [f"{self.primitive} at {self.source}{where}: its {self.part} is not finite."]
        pairs = list(zip(self.operands, self.tangents, strict=True))
        for value, tangent in pairs[:_MANY]:
            moves = "" if tangent is None else f", tangent {_shown(tangent)}"
            lines.append(f"  operand {_shown(value)}{moves}")
        if len(pairs) > _MANY:
            lines.append(f"  and {len(pairs) - _MANY} more operands")
        return "\n".join(lines)


def _shown(x: np.ndarray) -> str:
    if x.ndim == 0:
        return f"{x[()]:.6g}" if np.issubdtype(x.dtype, np.number) else str(x[()])
    shape = f"{x.dtype}[{','.join(map(str, x.shape))}]"
    if not x.size or not np.issubdtype(x.dtype, np.number):
        return shape
    return f"{shape} from {np.min(x):.4g} to {np.max(x):.4g}"


def first_nonfinite(
    fun: Callable[..., Any], params: PyTree, *args: Any, key: Key[Array, ""] | None = None
) -> NonFinite | None:
    """Finds the equation that makes the value or the forward gradient of `fun` not finite.

    A directional derivative can be NaN where the value is finite, and where `jax.grad` is finite
    too: `sqrt` at 0 has an infinite derivative, and infinity times a tangent of 0 is NaN. This runs
    the program equation by equation, with a tangent, and names the culprit: the equation whose
    operands were finite and whose result was not, and from which the result got it. Infinities that
    a `where` or a maximum removes again are not reported.

    **Arguments:**

    - `fun`: a function of `params` and `args`, to any tree of arrays.
    - `params`: the parameters; tangents of random signs run along their float leaves.
    - `key`: draws the signs; by default a fixed key.

    **Returns:** a `NonFinite`, or `None` if the result and its tangent are finite. `print` it.

    **Cost:** every operation is dispatched by itself: seconds for a network. A loop is compiled,
    and run step by step only if its result is not finite.

    **Errors:** those of `fun`. A function with a custom reverse rule is run by its code.

    **Source:** this library.

    Examples:
        >>> import jax.numpy as jnp, prograde as pg
        >>> def loss_fn(params):
        ...     return jnp.linalg.norm(params)           # its derivative at 0 is 0 / 0
        >>> print(pg.diagnostics.first_nonfinite(loss_fn, jnp.zeros(3)).primitive)
        sqrt
        >>> pg.diagnostics.first_nonfinite(loss_fn, jnp.ones(3)) is None
        True
    """
    leaves, tree = jax.tree.flatten((params, args))
    moving = len(jax.tree.leaves(params))
    arrays = [i for i, x in enumerate(leaves) if isinstance(x, jax.Array | np.ndarray | float)]
    key = jax.random.key(0) if key is None else key

    def flat(*given: Any) -> list[Any]:
        everything = list(leaves)
        for i, x in zip(arrays, given, strict=True):
            everything[i] = x
        params, args = jax.tree.unflatten(tree, everything)
        out = jax.tree.leaves(fun(params, *args))
        return [x for x in out if isinstance(x, jax.Array | np.ndarray | float)]

    program = jax.make_jaxpr(flat)(*(leaves[i] for i in arrays))
    tracks = []
    for i in arrays:
        value = jnp.asarray(leaves[i])
        tangent = None
        if i < moving and jnp.issubdtype(value.dtype, jnp.floating):
            tangent = jax.random.rademacher(jax.random.fold_in(key, i), value.shape, value.dtype)
        tracks.append(_Track(value, tangent))
    out = walk(
        program, tracks, _run, number=_constant, consts=[_constant_of(c) for c in program.consts]
    )
    return _culprit(out)


@dataclass(frozen=True)
class _Track:
    """A value on its way through the program, its tangent, and who made it not finite."""

    value: Any
    tangent: Any = None
    origin: NonFinite | None = None


def _constant_of(value: Any) -> _Track:
    return _Track(value)


def _constant(literal: Any) -> _Track:
    return _Track(jnp.asarray(literal.val))


def _culprit(tracks: Sequence[_Track]) -> NonFinite | None:
    """The origin of the first track that is NaN; else of the first that is infinite."""
    for test in (_has_nan, _is_bad):
        for track in tracks:
            if track.origin is not None and test(track):
                return track.origin
    return None


def _is_bad(track: _Track) -> bool:
    return not (_finite(track.value) and (track.tangent is None or _finite(track.tangent)))


def _has_nan(track: _Track) -> bool:
    return any(
        x is not None and _is_float(x) and bool(jnp.isnan(x).any())
        for x in (track.value, track.tangent)
    )


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jnp.inexact)


def _finite(x: Any) -> bool:
    return not _is_float(x) or bool(jnp.isfinite(x).all())


def _run(eqn: JaxprEqn, tracks: list[_Track]) -> list[_Track]:
    """Runs one equation along the tangents of its operands."""
    program = called(eqn)
    if program is None and eqn.primitive.name.startswith("custom_vjp_call"):
        program = as_closed(inner_programs(eqn)[0])  # forward mode cannot pass its rule
    if program is not None:
        return _walked(program, tracks)
    values, tangents = _push(lambda *x: bind(eqn, x), tracks)
    out = [_Track(value, tangent) for value, tangent in zip(values, tangents, strict=True)]
    if not any(map(_is_bad, out)):
        return out
    origin = _culprit(tracks)
    if origin is None or not any(_is_bad(track) for track in tracks):
        origin = _found(eqn, tracks, out)
    return [_Track(t.value, t.tangent, origin if _is_bad(t) else None) for t in out]


def _walked(program: ClosedJaxpr, tracks: Sequence[_Track]) -> list[_Track]:
    consts = [_constant_of(c) for c in program.consts]
    return walk(program, tracks, _run, number=_constant, consts=consts)


def _push(fun: Callable[..., Any], tracks: Sequence[_Track]) -> tuple[list[Any], list[Any]]:
    """Values and tangents of the outputs; `None` for an output that has no tangent."""
    moved = [i for i, track in enumerate(tracks) if track.tangent is not None]

    def of_moved(*some: Any) -> list[Any]:
        complete = [track.value for track in tracks]
        for i, value in zip(moved, some, strict=True):
            complete[i] = value
        return list(fun(*complete))

    if not moved:
        values = of_moved()
        return values, [None] * len(values)
    primals = [tracks[i].value for i in moved]
    values, tangents = jax.jvp(of_moved, primals, [tracks[i].tangent for i in moved])
    return values, [t if t.dtype != jax.dtypes.float0 else None for t in tangents]


def _found(eqn: JaxprEqn, tracks: Sequence[_Track], out: Sequence[_Track]) -> NonFinite:
    """Describes an equation; of a loop or a branch, the equation inside."""
    inside = {"scan": _in_scan, "while": _in_while, "cond": _in_cond}.get(eqn.primitive.name)
    found = inside(eqn, tracks) if inside is not None else None
    if found is not None:
        return found
    part = "tangent" if all(_finite(track.value) for track in out) else "value"
    return NonFinite(
        eqn.primitive.name,
        source(eqn),
        part,
        tuple(_plain(track.value) for track in tracks),
        tuple(None if t.tangent is None else _plain(t.tangent) for t in tracks),
    )


def _plain(x: Any) -> np.ndarray:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    return np.asarray(x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x)


def _within(found: NonFinite | None, step: str) -> NonFinite | None:
    if found is None:
        return None
    return NonFinite(
        found.primitive,
        found.source,
        found.part,
        found.operands,
        found.tangents,
        (step, *found.path),
    )


def _in_cond(eqn: JaxprEqn, tracks: Sequence[_Track]) -> NonFinite | None:
    branches = eqn.params["branches"]
    chosen = int(np.clip(int(tracks[0].value), 0, len(branches) - 1))
    found = _culprit(_walked(branches[chosen], tracks[1:]))
    return _within(found, f"branch {chosen} of cond at {source(eqn)}")


def _in_scan(eqn: JaxprEqn, tracks: Sequence[_Track]) -> NonFinite | None:
    body = as_closed(inner_programs(eqn)[0])
    consts, carry, xs = scan_groups(eqn, tracks)
    length, reverse = eqn.params["length"], eqn.params["reverse"]
    step = jax.jit(lambda *tracks: _push(jaxpr_as_fun(body), tracks))
    for i in range(length):
        at = length - 1 - i if reverse else i
        slices = [_sliced(x, at) for x in xs]
        inputs = [*consts, *carry, *slices]
        out = _stepped(step, inputs)
        if any(map(_is_bad, out)):
            found = _culprit(_walked(body, inputs))
            return _within(found, f"iteration {i} of scan at {source(eqn)}")
        carry = out[: len(carry)]
    return None


def _in_while(eqn: JaxprEqn, tracks: Sequence[_Track]) -> NonFinite | None:
    condition, body = eqn.params["cond_jaxpr"], eqn.params["body_jaxpr"]
    first, second = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    of_condition, of_body = list(tracks[:first]), list(tracks[first : first + second])
    carry = list(tracks[first + second :])
    goes_on = jax.jit(jaxpr_as_fun(condition))
    step = jax.jit(lambda *tracks: _push(jaxpr_as_fun(body), tracks))
    i = 0
    while bool(goes_on(*(t.value for t in (*of_condition, *carry)))[0]):
        inputs = [*of_body, *carry]
        carry = _stepped(step, inputs)
        if any(map(_is_bad, carry)):
            found = _culprit(_walked(body, inputs))
            return _within(found, f"iteration {i} of while at {source(eqn)}")
        i += 1
    return None


def _sliced(track: _Track, i: int) -> _Track:
    return _Track(track.value[i], None if track.tangent is None else track.tangent[i])


def _stepped(step: Callable[..., Any], inputs: Sequence[_Track]) -> list[_Track]:
    """One iteration of a loop. Carries keep a tangent from the first iteration on."""
    inputs = [_with_tangent(track) for track in inputs]
    values, tangents = step(*inputs)
    return [_Track(v, t) for v, t in zip(values, tangents, strict=True)]


def _with_tangent(track: _Track) -> _Track:
    if track.tangent is not None or not jnp.issubdtype(track.value.dtype, jnp.floating):
        return track
    return _Track(track.value, jnp.zeros_like(track.value))


jax.tree_util.register_dataclass(_Track, ["value", "tangent"], ["origin"])
