"""A step of training compiled as a whole, with parameters and optimizer in JAX."""

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import torch

from prograde.estimators import Estimator
from prograde.torch import _arrays
from prograde.torch._functional import Functions, arrays_of, named_tensors
from prograde.torch._programs import Program, Programs
from prograde.torch._step import check_estimator, key_of, one_thread


class TrainStep:
    """Training steps compiled as a whole: estimate, optimizer of Optax and buffers in one program.

        step = prograde.torch.TrainStep(module, loss_fn, estimator, optax.adam(1e-3))
        for batch in loader:
            loss = step(*batch)
        step.to_module()                   # parameters and buffers go back into the module

    Parameters, buffers and the state of the optimizer stay in JAX. No gradient is written, so that
    a step moves less memory than `value_and_grad` with an optimizer of PyTorch. The module keeps
    its old parameters until `to_module`. Changes that are made to it in between are not seen.

    **Arguments:** those of `value_and_grad`, and `optimizer`, a gradient transformation of Optax
    (anything with its `init` and `update`).

    **Returns:** called with a batch, the loss, a scalar array of JAX (with `has_aux=True` a pair of
    it and the auxiliary output, as tensors). It does not wait for the result: `float(loss)` does.

    **Bias, variance and cost:** those of the estimator. The first call compiles.

    **Errors:** those of `value_and_grad`, without its warning: where the loss is finite and its
    derivative is not, the next loss is NaN.

    **Source:** forward gradients, arXiv 2202.08587.

    Examples:
        >>> import optax, torch, prograde as pg, prograde.torch
        >>> _ = torch.manual_seed(0)
        >>> module = torch.nn.Linear(3, 1)
        >>> x, y = torch.randn(32, 3), torch.ones(32, 1)
        >>> loss_fn = lambda module, x, y: (module(x) - y).square().mean()
        >>> estimator = pg.WeightPerturbation(num_tangents=4)
        >>> step = pg.torch.TrainStep(module, loss_fn, estimator, optax.sgd(0.1))
        >>> losses = [step(x, y) for _ in range(100)]
        >>> step.to_module()
        >>> bool(loss_fn(module, x, y) < 0.01)
        True
    """

    def __init__(
        self,
        module: torch.nn.Module,
        loss_fn: Callable[..., Any],
        estimator: Estimator,
        optimizer: Any,
        *,
        seed: int | jax.Array = 0,
        has_aux: bool = False,
        functions: Functions = "refuse",
        compare: bool = True,
    ):
        check_estimator(estimator)
        if not (
            callable(getattr(optimizer, "init", 0)) and callable(getattr(optimizer, "update", 0))
        ):
            raise TypeError(
                f"optimizer={optimizer!r}, but a transformation of Optax is needed, such as "
                "optax.sgd(1e-3). Optimizers of PyTorch work with prograde.torch.value_and_grad."
            )
        self.module, self.estimator, self.optimizer = module, estimator, optimizer
        self.has_aux = has_aux
        tensors, others = named_tensors(module)
        self.params, self.buffers = arrays_of(tensors, copy=True), arrays_of(others, copy=True)
        self.calls = 0
        self.state: Any = None
        self._optimizer_state: Any = None
        self._used: frozenset[str] = frozenset()
        self._key = key_of(seed)
        self._programs = Programs(module, loss_fn, has_aux, functions, compare)
        self._compiled: dict[Program, Callable[..., Any]] = {}
        self._busy = threading.Lock()

    def __call__(self, *batch: Any) -> Any:
        with one_thread(self._busy):
            # the step may read its batch when a loader already fills the memory with the next one
            program, arrays = self._programs.of(
                self.params, self.buffers, self._key, batch, copy=True
            )
            if program not in self._compiled:
                self._compiled[program] = self._compile(program, arrays)
            used = {name: self.params[name] for name in program.used}
            others = {name: a for name, a in self.params.items() if name not in used}
            carry = used, self.buffers, self.state, self._optimizer_state
            value, aux, (used, moved, self.state, self._optimizer_state) = self._compiled[program](
                carry, others, self.calls, self._key, arrays
            )
            self.params, self.buffers = self.params | used, self.buffers | moved
            self.calls += 1
            if not self.has_aux:
                return value
            return value, _arrays.joined(map(_arrays.to_torch, aux), program.rest)

    def _compile(self, program: Program, arrays: Any) -> Callable[..., Any]:
        estimator, optimizer = self.estimator, self.optimizer
        used = {name: self.params[name] for name in program.used}
        others = {name: a for name, a in self.params.items() if name not in used}
        if not self._compiled:
            args = used, others, self.buffers, self._key, arrays
            state = estimator.init(program.fun, *args, has_aux=True)
            # the arrays of a step are given away to the next, so that each is held once
            self.state, self._optimizer_state = jax.tree.map(
                lambda x: jnp.array(x, copy=True) if isinstance(x, jax.Array) else x,
                (state, optimizer.init(used)),
            )
            self._used = program.used
        if program.used != self._used:
            names = ", ".join(sorted(program.used ^ self._used))
            raise ValueError(
                f"the loss depends on some parameters in one step and not in another: {names}. "
                "Use prograde.torch.value_and_grad, whose optimizer skips parameters without .grad."
            )

        @partial(jax.jit, donate_argnums=0)
        def run(carry: Any, others: Any, count: Any, key: Any, batch: Any) -> Any:
            used, buffers, state, optimizer_state = carry
            found = program.estimate(estimator, count, key, state, used, others, buffers, batch)
            updates, optimizer_state = optimizer.update(found.grads, optimizer_state, used)
            used = {name: p + updates[name].astype(p.dtype) for name, p in used.items()}
            moved, aux = found.aux
            return found.value, aux, (used, buffers | moved, found.state, optimizer_state)

        return run

    def to_module(self) -> None:
        """Copies parameters and buffers into the module."""
        tensors = dict(self.module.named_parameters()) | dict(self.module.named_buffers())
        with torch.no_grad():
            for name, array in (self.params | self.buffers).items():
                tensors[name].copy_(_arrays.to_torch(array))
