"""Gradient estimates into `.grad`, in place of `loss.backward()`."""

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import torch

from prograde.estimators import Estimator
from prograde.torch import _arrays
from prograde.torch._functional import Functions, arrays_of, named_tensors
from prograde.torch._programs import Program, Programs


def value_and_grad(
    module: torch.nn.Module,
    loss_fn: Callable[..., Any],
    estimator: Estimator,
    *,
    seed: int | jax.Array = 0,
    has_aux: bool = False,
    functions: Functions = "refuse",
    compare: bool = True,
) -> "Step":
    """A step that puts an estimate of the gradient where `loss.backward()` puts the gradient.

        loss = loss_fn(module, *batch); loss.backward()                         # before
        step = prograde.torch.value_and_grad(module, loss_fn, estimator)        # after, once
        loss = step(*batch)                                                     # and each step

    Optimizers, schedulers, clipping and accumulation of gradients go on as they are. Afterwards
    `.grad` of each trainable parameter has grown by the estimate, and buffers have moved as in one
    call of the module. The loss runs in JAX, through torchax.

    **Arguments:**

    - `module`: on the CPU, or on CUDA where JAX has the GPU. Parameters with `requires_grad=True`
      are perturbed, and nothing else. They may be frozen and unfrozen between steps. A parameter
      that the loss does not depend on keeps its `.grad`, as in PyTorch.
    - `loss_fn`: ordinary PyTorch code `(module, *batch)` that returns a scalar, or a vector with
      one loss for each example, whose mean is differentiated.
    - `estimator`: the estimator, such as `WeightPerturbation(LowRank(rank=1))` or `Backprop()`.
    - `seed`: an integer or a key of JAX. Call number i takes its tangents and dropout masks from
      it and from i alone. All tangents of a call share one mask.
    - `has_aux`: whether the loss returns a pair of the loss and anything else. Then a call does so,
      with detached tensors.
    - `functions`: what to do with a `torch.autograd.Function`, whose backward forward mode cannot
      use: `"refuse"`, or `"inline"` to differentiate the code of its forward and ignore its
      backward.
    - `compare`: whether the first call compares the loss and the buffers, without dropout, with
      those of PyTorch itself. Losses that draw other random numbers are not compared.

    **Returns:** a step, called with the tensors of a batch in any tree. What is no tensor in it is
    a constant. The loss is a detached scalar. `step.calls` counts the calls; to resume a run, set
    it. The step takes from the module at each call: parameters, buffers, train or eval mode, and
    numbers and strings among the attributes of its submodules. Other Python values that the loss
    reads are constants from the first call on.

    **Bias, variance and cost:** those of the estimator. The first call compiles, as does one with a
    new shape, mode or constant.

    **Errors:** `TypeError` with file and line for what cannot be traced: `if` on a value, boolean
    masks that select, autograd inside the loss, autocast, hooks of the backward pass, writing to a
    parameter, an operation without a rule in torchax. `ValueError` for a module without trainable
    parameters, dtypes and devices that JAX lacks, float64 without `jax_enable_x64`, float16 on the
    CPU, a parameter of another shape than before, a tensor from outside that requires grad or has
    changed, a loss that differs from PyTorch's. `RuntimeError` for two threads in one step.
    `RuntimeWarning` where the loss is finite and its derivative is not.

    **Source:** forward gradients, arXiv 2202.08587.

    Examples:
        >>> import torch, prograde as pg, prograde.torch
        >>> _ = torch.manual_seed(0)
        >>> module = torch.nn.Linear(3, 1)
        >>> optimizer = torch.optim.SGD(module.parameters(), lr=0.02)
        >>> loss_fn = lambda module, x, y: (module(x) - y).square().mean()
        >>> estimator = pg.WeightPerturbation(pg.LowRank(rank=1), num_tangents=8)
        >>> step = pg.torch.value_and_grad(module, loss_fn, estimator)
        >>> x, y = torch.randn(32, 3), torch.ones(32, 1)
        >>> losses = []
        >>> for _ in range(60):
        ...     optimizer.zero_grad()
        ...     losses.append(step(x, y))              # was: loss = ...; loss.backward()
        ...     optimizer.step()
        >>> bool(losses[-1] < 0.1 * losses[0])
        True
    """
    return Step(module, loss_fn, estimator, seed, has_aux, functions, compare)


class Step:
    """What `value_and_grad` returns."""

    def __init__(
        self,
        module: torch.nn.Module,
        loss_fn: Callable[..., Any],
        estimator: Estimator,
        seed: int | jax.Array,
        has_aux: bool,
        functions: Functions,
        compare: bool,
    ):
        check_estimator(estimator)
        named_tensors(module)
        self.module, self.estimator, self.has_aux = module, estimator, has_aux
        self.calls = 0
        self.state: Any = None
        self._key = key_of(seed)
        self._shapes = {n: tuple(p.shape) for n, p in module.named_parameters()}
        self._programs = Programs(module, loss_fn, has_aux, functions, compare)
        self._compiled: dict[Program, Callable[..., Any]] = {}
        self._aliases: dict[str, tuple[Any, jax.Array]] = {}
        self._busy = threading.Lock()

    def __call__(self, *batch: Any) -> Any:
        with one_thread(self._busy):
            return self._run(batch)

    def _run(self, batch: tuple[Any, ...]) -> Any:
        tensors, other_tensors = named_tensors(self.module)
        self._check_shapes(tensors)
        params = self._arrays_of(tensors)
        buffers = self._arrays_of(other_tensors)
        program, arrays = self._programs.of(params, buffers, self._key, batch)
        used = {name: params[name] for name in program.used}
        others = {name: a for name, a in params.items() if name not in program.used}
        args = (used, others, buffers, self._key, arrays)
        if program not in self._compiled:
            if not self._compiled:
                state = self.estimator.init(program.fun, *args, has_aux=True)
                # the arrays share memory that the optimizer of PyTorch will write to
                self.state = jax.tree.map(
                    lambda x: jnp.array(x, copy=True) if isinstance(x, jax.Array) else x, state
                )
            self._compiled[program] = _compiled(self.estimator, program)
        value, grads, (moved, aux), self.state, lost = jax.block_until_ready(
            self._compiled[program](self.calls, self.state, *args)
        )
        self.calls += 1
        if lost:
            warnings.warn(
                f"the loss is finite in call {self.calls}, and its derivative along a tangent is "
                "not. Skip the step; prograde.diagnostics.first_nonfinite finds the operation.",
                RuntimeWarning,
                stacklevel=3,
            )
        self._write(tensors, grads)
        with torch.no_grad():
            for name, array in moved.items():
                other_tensors[name].copy_(_arrays.to_torch(array))
        loss = _arrays.to_torch(value)
        if not self.has_aux:
            return loss
        return loss, _arrays.joined(map(_arrays.to_torch, aux), program.rest)

    def _arrays_of(self, tensors: dict[str, Any]) -> dict[str, jax.Array]:
        """The tensors as arrays. One that shares the memory of its tensor is made once."""
        found = {}
        for name, tensor in tensors.items():
            place = (id(tensor), tensor.data_ptr(), tensor.dtype, tensor.shape)
            known, array = self._aliases.get(name, (None, None))
            if known != place or array is None:
                array = arrays_of({name: tensor})[name]
                if _arrays.shares_memory(array, tensor):
                    self._aliases[name] = place, array
            found[name] = array
        return found

    def _write(self, tensors: dict[str, Any], grads: dict[str, jax.Array]) -> None:
        """Adds to `.grad`, as `loss.backward()` does."""
        seen = set()
        for name, array in grads.items():
            parameter, grad = tensors[name], _arrays.to_torch(array)
            if parameter.grad is not None:
                parameter.grad.add_(grad)
                continue
            if self.state is not None or grad.data_ptr() in seen:
                grad = grad.clone()  # JAX holds another array in the same memory
            seen.add(grad.data_ptr())
            parameter.grad = grad

    def _check_shapes(self, tensors: dict[str, Any]) -> None:
        for name, p in tensors.items():
            if self._shapes.get(name) != tuple(p.shape):
                before = f"the shape {self._shapes[name]}" if name in self._shapes else "no place"
                raise ValueError(
                    f"the parameter {name!r} has shape {tuple(p.shape)}, but had {before} when the "
                    "step was made. Make a new step with prograde.torch.value_and_grad, and a new "
                    "optimizer."
                )


def _compiled(estimator: Estimator, program: Program) -> Callable[..., Any]:
    @jax.jit
    def run(count: Any, state: Any, used: Any, others: Any, buffers: Any, key: Any, batch: Any):
        found = program.estimate(estimator, count, key, state, used, others, buffers, batch)
        slopes = jnp.zeros(()) if found.directional is None else found.directional
        lost = jnp.isfinite(found.value) & ~jnp.all(jnp.isfinite(slopes))
        return found.value, found.grads, found.aux, found.state, lost

    return run


@contextlib.contextmanager
def one_thread(busy: threading.Lock) -> Iterator[None]:
    """Refuses a second thread while one runs the step."""
    if not busy.acquire(blocking=False):
        raise RuntimeError(
            "the step is already running in another thread. Parameters, buffers and gradients of a "
            "module belong to one step at a time: give each thread its own module and step."
        )
    try:
        yield
    finally:
        busy.release()


def check_estimator(estimator: Any) -> None:
    """Raises for what is no estimator."""
    if not isinstance(estimator, Estimator):
        raise TypeError(
            f"estimator={estimator!r}, but an instance of an estimator is needed, such as "
            "WeightPerturbation(LowRank(rank=1)) or Backprop()."
        )


def key_of(seed: int | jax.Array) -> jax.Array:
    """The key of a run: of a seed, or a key as it is."""
    return seed if isinstance(seed, jax.Array) else jax.random.key(seed)
