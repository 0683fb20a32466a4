"""A PyTorch module and its loss as a pure function of JAX."""

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import torch

from prograde.torch import _refusals
from prograde.torch._arrays import joined, split, to_jax

Functions = Literal["refuse", "inline"]

# PyTorch's modes and the parameters of a module change while a loss is traced.
_TRACE = threading.RLock()


def named_tensors(
    module: torch.nn.Module,
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The trainable parameters of a module, and its other parameters and buffers, by name.

    Tied parameters appear once.
    """
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"module is {type(module).__name__}, but a torch.nn.Module is needed.")
    params = {n: p for n, p in module.named_parameters() if p.requires_grad}
    rest = {n: p for n, p in module.named_parameters() if not p.requires_grad}
    if not params:
        raise ValueError(
            "the module has no parameter with requires_grad=True, so that there is nothing to "
            "train. Call module.requires_grad_(True)."
        )
    for name, p in params.items():
        if isinstance(p, torch.nn.parameter.UninitializedTensorMixin):
            raise ValueError(
                f"the parameter {name!r} of a lazy module has no shape yet. Run the module once."
            )
        if not p.dtype.is_floating_point:
            raise ValueError(
                f"the parameter {name!r} has dtype {p.dtype}, but a real floating-point dtype is "
                "needed. Call requires_grad_(False) on it."
            )
    return params, rest | dict(module.named_buffers())


def arrays_of(tensors: dict[str, torch.Tensor], copy: bool = False) -> dict[str, jax.Array]:
    """Named tensors as arrays, which share their memory unless they are copied."""
    arrays = {name: to_jax(x, repr(name)) for name, x in tensors.items()}
    return {name: jnp.array(a, copy=True) for name, a in arrays.items()} if copy else arrays


class LossModule(torch.nn.Module):
    """The loss as the forward of a module, whose parameters `functional_call` replaces."""

    def __init__(self, module: torch.nn.Module, loss_fn: Callable[..., Any]):
        super().__init__()
        self.module, self.loss_fn = module, loss_fn

    def forward(self, *batch: Any) -> Any:
        with _cumulative_averages(self.module):
            return self.loss_fn(self.module, *batch)


@contextlib.contextmanager
def _cumulative_averages(module: torch.nn.Module) -> Iterator[None]:
    """The momentum of a batch norm that averages all batches, as a tensor: it changes by step."""
    norms = [
        m
        for m in module.modules()
        if isinstance(m, torch.nn.modules.batchnorm._NormBase)
        and m.momentum is None
        and m.num_batches_tracked is not None
    ]
    for norm in norms:
        norm.momentum = 1.0 / (norm.num_batches_tracked + 1)
    try:
        yield
    finally:
        for norm in norms:
            norm.momentum = None


class Traceable:
    """The loss of a module as a function of arrays, and what its last trace has met.

    - `constants`: the tensors from outside that became constants.
    - `draws`: how often random numbers were drawn.
    - `changed`: the buffers that the loss has changed.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        loss_fn: Callable[..., Any],
        has_aux: bool = False,
        functions: Functions = "refuse",
    ):
        if not callable(loss_fn):
            raise TypeError(f"loss_fn={loss_fn!r}, but a function (module, *batch) is needed.")
        if functions not in ("refuse", "inline"):
            raise ValueError(f"functions={functions!r}, but 'refuse' or 'inline' is needed.")
        self.module, self.loss_fn = module, loss_fn
        self.has_aux, self.functions = has_aux, functions
        self.constants: list[torch.Tensor] = []
        self.draws = 0
        self.changed: list[str] = []

    def __call__(
        self,
        params: dict[str, jax.Array],
        buffers: dict[str, jax.Array],
        key: jax.Array | None,
        arrays: list[jax.Array],
        rest: Any,
        dropout: bool = True,
    ) -> tuple[jax.Array, tuple[dict[str, jax.Array], Any]]:
        """(loss, (buffers after it, auxiliary output)) for a batch that `split` took apart."""
        from prograde.torch._environment import TRACED, environment

        _refusals.refuse_hooks(self.module)
        key = jax.random.key(0) if key is None else key
        with _TRACE, _quiet(), _refusals.explained():
            wrapped = environment.wrap({**params, **buffers})
            given = {f"module.{name}": x for name, x in wrapped.items()}
            entered = dict(given)
            with (
                _attributes_kept(self.module, TRACED),
                environment.tracing(key, dropout),
                _refusals.functions_traced(self.functions == "inline"),
                torch.enable_grad(),
            ):
                out = torch.func.functional_call(
                    LossModule(self.module, self.loss_fn),
                    given,
                    joined(environment.wrap(arrays), rest),
                )
                loss, aux = self._parts(out, TRACED, environment)
                moved = {n: given[f"module.{n}"].jax() for n in buffers}
                for name, array in params.items():
                    now = given[f"module.{name}"]
                    if now is not entered[f"module.{name}"] or now.jax() is not array:
                        raise _refusals.Refused(
                            f"the loss changes the parameter {name!r} in place, which would be "
                            "lost. Change it after the step, or make it a buffer."
                        )
            self.constants, self.draws = list(environment.constants), environment.draws
            self.changed = [name for name, old in buffers.items() if moved[name] is not old]
        for name, old in buffers.items():
            if moved[name].shape != old.shape or moved[name].dtype != old.dtype:
                raise _refusals.Refused(
                    f"the loss changes the buffer {name!r} from {jax.typeof(old)} to "
                    f"{jax.typeof(moved[name])}, but its shape and dtype have to stay."
                )
        fixed = partial(torch.utils._pytree.tree_map_only, jax.Array, jax.lax.stop_gradient)
        return loss, (fixed(moved), fixed(aux))

    def _parts(self, out: Any, traced: Any, environment: Any) -> tuple[jax.Array, Any]:
        aux = None
        if self.has_aux:
            if not (isinstance(out, tuple) and len(out) == 2):
                raise TypeError(
                    f"has_aux=True, but the loss returned {type(out).__name__} instead of a pair "
                    "(loss, aux)."
                )
            out, aux = out
            aux = environment.t2j_iso(aux)
        if not isinstance(out, torch.Tensor):
            hint = " Return its .loss." if hasattr(out, "loss") else ""
            raise TypeError(
                f"the loss returned {type(out).__name__}, but a tensor is needed: a scalar, or a "
                f"vector with one loss for each example.{hint}"
            )
        if not isinstance(out, traced):
            raise TypeError(
                "the loss does not depend on the parameters of the module. Use the module that is "
                "passed to it, not one from outside."
            )
        if not out.dtype.is_floating_point:
            raise TypeError(f"the loss has dtype {out.dtype}, but a real float is needed.")
        if out.ndim > 1:
            raise ValueError(
                f"the loss has shape {tuple(out.shape)}, but a scalar or one loss for each "
                "example, [batch], is needed. Take the mean over the other axes."
            )
        return out.jax(), aux


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Integers of 64 bits become 32 bits without a word; floats of 64 bits raise."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*dtype.*int64.*")
        warnings.filterwarnings("ignore", message=".*dtype.*uint64.*")
        warnings.filterwarnings("error", message=".*dtype.*(float64|complex128).*")
        yield


@contextlib.contextmanager
def _attributes_kept(module: torch.nn.Module, traced: Any) -> Iterator[None]:
    """Restores attributes that hold traced tensors afterwards, which no later code could use."""
    before = [(m, dict(vars(m))) for m in module.modules()]
    try:
        yield
    finally:
        for part, attributes in before:
            for name, value in list(vars(part).items()):
                if isinstance(value, traced):
                    if name in attributes:
                        vars(part)[name] = attributes[name]
                    else:
                        del vars(part)[name]


def functionalize(
    module: torch.nn.Module,
    loss_fn: Callable[..., Any],
    *,
    has_aux: bool = False,
    functions: Functions = "refuse",
) -> tuple[dict[str, jax.Array], dict[str, jax.Array], Callable[..., Any]]:
    """(params, buffers, f): a PyTorch module and its loss as a pure function of JAX.

        loss, new_buffers = f(params, buffers, key, *batch)

    It is for everything in prograde and JAX that takes functions: `pg.check`, estimators,
    `pg.diagnostics`, `jax.grad`.

    **Arguments:** `module`, `loss_fn`, `has_aux` and `functions` as in `value_and_grad`.

    **Returns:** `params` and `buffers`, dictionaries by the names of the module, copied; tied
    parameters appear once, and parameters with `requires_grad=False` are among the buffers. `f`
    returns the loss and the buffers after it, or with `has_aux=True` the loss and the pair
    (buffers, auxiliary output). `key` is a key of JAX for dropout and other random numbers, or
    `None`. A batch may hold tensors and arrays of JAX. Train or eval mode is read when `f` is
    traced.

    **Bias, variance and cost:** none; each trace runs the code of the module once.

    **Errors:** those of `value_and_grad`. The loss is not compared with that of PyTorch.

    **Source:** torchax, whose rules give the operations of PyTorch their meaning in JAX.

    Examples:
        >>> import jax, torch, prograde as pg, prograde.torch
        >>> _ = torch.manual_seed(0)
        >>> module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
        >>> loss_fn = lambda module, x: (module(x) - 1).square().mean()
        >>> params, buffers, f = pg.torch.functionalize(module, loss_fn)
        >>> sorted(params)
        ['0.bias', '0.weight', '1.bias', '1.weight']
        >>> x = torch.randn(8, 3)
        >>> (loss, moved), grads = jax.value_and_grad(f, has_aux=True)(params, buffers, None, x)
        >>> grads["0.weight"].shape, moved["1.running_mean"].shape
        ((4, 3), (4,))
    """
    params, rest = named_tensors(module)
    traceable = Traceable(module, loss_fn, has_aux, functions)

    def f(
        params: dict[str, jax.Array],
        buffers: dict[str, jax.Array],
        key: jax.Array | None,
        *batch: Any,
    ) -> tuple[jax.Array, Any]:
        loss, (moved, aux) = traceable(params, buffers, key, *split(batch, of_jax=True))
        return loss, (moved, aux) if has_aux else moved

    return arrays_of(params, copy=True), arrays_of(rest, copy=True), f
