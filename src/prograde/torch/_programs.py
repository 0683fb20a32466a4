"""The loss of a module as programs of JAX: one for each shape of the batch and mode of the module.

PyTorch code runs once for each program. A program knows which parameters the loss depends on, which
buffers it changes, and which tensors from outside became constants.
"""

import warnings
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.extend.core import jaxpr_as_fun
from jax.interpreters.partial_eval import dce_jaxpr
from torch.overrides import TorchFunctionMode

from prograde.estimators import Estimate, Estimator
from prograde.torch import _arrays, _operations
from prograde.torch._functional import Functions, LossModule, Traceable

Arrays = dict[str, jax.Array]


@dataclass(frozen=True, eq=False)
class Program:
    """A loss for batches of one shape, in one mode of the module.

    - `fun(used, others, buffers, key, batch)`: the loss, and the pair (changed buffers, auxiliary
      arrays).
    - `used`: the names of the parameters whose derivative is not zero everywhere.
    - `rest`: what the auxiliary output holds besides arrays.
    - `constants`: tensors from outside, each with the version that was read.
    """

    fun: Callable[..., Any]
    used: frozenset[str]
    rest: Any
    constants: tuple[tuple[torch.Tensor, int], ...]

    def estimate(
        self, estimator: Estimator, call: Any, key: jax.Array, state: Any, *args: Any
    ) -> Estimate:
        """The estimate of call number `call`: its tangents and masks come from this and the key.

        `args` are (used, others, buffers, batch).
        """
        tangents, noise = jax.random.split(jax.random.fold_in(key, call))
        *args, batch = args
        return estimator.estimate(self.fun, tangents, state, *args, noise, batch, has_aux=True)

    def check_constants(self) -> None:
        """Raises where a tensor that became a constant has changed since."""
        for tensor, version in self.constants:
            if tensor._version != version:
                raise ValueError(
                    f"a tensor of shape {tuple(tensor.shape)} that the loss uses from outside has "
                    "changed since the loss was traced, when it became a constant. Pass it as part "
                    "of the batch, or register it as a buffer of the module."
                )


class Programs:
    """Traces the loss of a module where no program fits, and compares it with PyTorch's own."""

    def __init__(
        self,
        module: torch.nn.Module,
        loss_fn: Callable[..., Any],
        has_aux: bool,
        functions: Functions,
        compare: bool,
    ):
        self.module, self.compare = module, compare
        self.traceable = Traceable(module, loss_fn, has_aux, functions)
        self._programs: dict[Hashable, Program] = {}
        self.compared: dict[Hashable, bool] = {}  # by mode: whether it could be done
        self._counters: set[tuple[int, str]] = set()

    def of(
        self, params: Arrays, buffers: Arrays, key: jax.Array, batch: Any, copy: bool = False
    ) -> tuple[Program, list[jax.Array]]:
        """The program for these parameters and this batch, and the arrays of the batch.

        `copy` says whether these have memory of their own.
        """
        arrays, rest = _arrays.split(batch, copy=copy)
        settings = self._settings()
        mode = (tuple(params), frozenset(settings.items()))
        signature = (mode, rest, tuple((x.shape, x.dtype) for x in arrays))
        if signature not in self._programs:
            if self.compare and mode not in self.compared:
                self.compared[mode] = self._compare(batch, params, buffers, arrays, rest)
            self._programs[signature] = self._trace(params, buffers, key, arrays, rest)
            self._note_counters(settings)
        program = self._programs[signature]
        program.check_constants()
        return program, arrays

    def _settings(self) -> dict[tuple[int, str], Any]:
        """Attributes of the submodules that a program has baked in: modes, rates, switches."""
        return {
            (i, name): value
            for i, part in enumerate(self.module.modules())
            for name, value in vars(part).items()
            if type(value) in (bool, int, float, str) and (i, name) not in self._counters
        }

    def _note_counters(self, before: dict[tuple[int, str], Any]) -> None:
        """Warns of attributes that the loss changes: they change only when it is traced."""
        names = [name for name, _ in self.module.named_modules()]
        for (i, name), value in self._settings().items():
            if before.get((i, name), value) != value or (i, name) not in before:
                self._counters.add((i, name))
                warnings.warn(
                    f"the loss changes the attribute {'.'.join((names[i], name)).lstrip('.')!r} of "
                    "the module, which happens only when it is traced, not at every step. Make it "
                    "a buffer if it should.",
                    RuntimeWarning,
                    stacklevel=4,
                )

    def _trace(
        self, params: Arrays, buffers: Arrays, key: jax.Array, batch: Any, rest: Any
    ) -> Program:
        found = {}

        def loss(params: Arrays, buffers: Arrays, key: jax.Array, batch: Any) -> Any:
            value, (moved, aux) = self.traceable(params, buffers, key, batch, rest)
            arrays, found["rest"] = _arrays.split(aux, of_jax=True)
            return value, ({name: moved[name] for name in self.traceable.changed}, arrays)

        args = (params, buffers, key, batch)
        closed, shape = jax.make_jaxpr(loss, return_shape=True)(*args)
        flat, structure = jaxpr_as_fun(closed), jax.tree.structure(shape)

        def fun(used: Arrays, others: Arrays, buffers: Arrays, key: jax.Array, batch: Any) -> Any:
            ordered = {name: used[name] if name in used else others[name] for name in params}
            return jax.tree.unflatten(
                structure, flat(*jax.tree.leaves((ordered, buffers, key, batch)))
            )

        def slope(tangents: Arrays, *args: Any) -> jax.Array:
            alone = lambda params: fun(params, {}, *args[1:])[0]  # noqa: E731
            return jax.jvp(alone, args[:1], (tangents,))[1]

        program = jax.make_jaxpr(slope)(params, *args).jaxpr
        _, reached = dce_jaxpr(program, [True])
        used = frozenset(name for name, is_used in zip(sorted(params), reached) if is_used)  # noqa: B905
        if not used:
            raise ValueError(
                "the loss does not depend on any trainable parameter of the module, or depends on "
                "them through detached tensors alone."
            )
        constants = {id(x): (x, x._version) for x in self.traceable.constants}
        return Program(fun, used, found["rest"], tuple(constants.values()))

    def _compare(self, batch: Any, params: Arrays, buffers: Arrays, arrays: Any, rest: Any) -> bool:
        """Raises where JAX finds another loss or other buffers than PyTorch, without dropout.

        Losses that draw random numbers for anything else cannot be compared. Returns whether they
        were.
        """
        ours = jax.jit(self._without_dropout(rest))
        value, moved = ours(params, buffers, jax.random.key(0), arrays)
        if self.traceable.draws:
            return False
        wanted, wanted_moved = self._in_torch(batch, params, buffers)
        if wanted is None:
            return False
        pairs = {"the loss": (jnp.mean(value), wanted.double().mean())}
        pairs |= {
            f"the buffer {name!r} after it": (moved[name], wanted_moved[name])
            for name in self.traceable.changed
        }
        for name, (array, tensor) in pairs.items():
            a = np.asarray(array, np.float64)
            b = tensor.detach().cpu().to(torch.float64).numpy()
            with np.errstate(invalid="ignore"):
                scale = max(np.max(np.abs(b), initial=0), 1e-3)
                exact = wanted.dtype in (torch.float32, torch.float64)
                close = np.abs(a - b) <= (1e-3 if exact else 5e-2) * scale
            if not np.all(close | (np.isnan(a) & np.isnan(b)) | (a == b)):
                raise ValueError(
                    f"{name} is {_shown(a)} in JAX, but {_shown(b)} in PyTorch: an operation has "
                    "another meaning there. Compute the parts of the loss one by one with "
                    "prograde.torch.functionalize to find it, and replace it by others; or pass "
                    "compare=False if PyTorch's own is not deterministic."
                )
        return True

    def _without_dropout(self, rest: Any) -> Callable[..., Any]:
        def loss(*args: Any) -> Any:
            value, (moved, _) = self.traceable(*args, rest, dropout=False)
            return value, moved

        return loss

    def _in_torch(
        self, batch: Any, params: Arrays, buffers: Arrays
    ) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
        """PyTorch's own loss and buffers; no loss where it draws random numbers."""
        own = dict(self.module.named_parameters()) | dict(self.module.named_buffers())
        state = {
            f"module.{name}": _arrays.to_torch(array).to(own[name].dtype, copy=name in buffers)
            for name, array in (params | buffers).items()
        }
        random = torch.random.get_rng_state()
        try:
            with torch.no_grad(), _NoDropout():
                loss = LossModule(self.module, self.traceable.loss_fn)
                out = torch.func.functional_call(loss, state, batch)
            drawn = not torch.equal(random, torch.random.get_rng_state())
        finally:
            torch.random.set_rng_state(random)
        value = out[0] if self.traceable.has_aux else out
        return None if drawn else value, {n.removeprefix("module."): x for n, x in state.items()}


class _NoDropout(TorchFunctionMode):
    """Within, dropout in PyTorch's own operations keeps everything."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        args, kwargs = _operations.without_dropout(func, args, kwargs)
        return func(*args, **(kwargs or {}))


def _shown(x: np.ndarray) -> str:
    return f"{float(x):.6g}" if x.ndim == 0 else f"an array with mean {x.mean():.6g}"
