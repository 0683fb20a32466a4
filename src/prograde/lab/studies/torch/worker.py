"""A process that takes training steps of a PyTorch module on request, by PyTorch or by prograde.

`run` starts it and asks.
"""

import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from prograde.lab.measure.memory import keep_freed_memory
from prograde.lab.processes.requests import serve
from prograde.lab.store import cores
from prograde.lab.studies.torch.modules import Case, case

RATE = 1e-6

Step = Callable[[], Any]


def _with_optimizer(made: Case, backward: Step) -> Step:
    optimizer = torch.optim.SGD(made.module.parameters(), lr=RATE)

    def step() -> Any:
        optimizer.zero_grad()
        loss = backward()
        optimizer.step()
        return loss

    return step


def _of_torch(name: str) -> dict[str, Callable[[], Step]]:
    def step(loss_fn: Callable[..., Any], made: Case) -> Step:
        def backward() -> Any:
            loss = loss_fn(made.module, *made.batch)
            loss.backward()
            return loss.detach()

        return _with_optimizer(made, backward)

    def bare() -> Step:
        made = case(name)

        def forward() -> Any:
            with torch.inference_mode():
                return made.loss(made.module, *made.batch)

        return forward

    def eager() -> Step:
        made = case(name)
        return step(made.loss, made)

    def compiled() -> Step:
        made = case(name)
        return step(torch.compile(made.loss), made)

    return {"torch-bare": bare, "torch-backprop": eager, "torch-compiled": compiled}


def _of_prograde(name: str) -> dict[str, Callable[[], Step]]:
    import jax
    import optax

    import prograde as pg
    import prograde.torch

    rank_one = pg.WeightPerturbation(pg.LowRank(rank=1))

    def step(estimator: Any) -> Callable[[], Step]:
        def make() -> Step:
            made = case(name)
            run = pg.torch.value_and_grad(made.module, made.loss, estimator)
            return _with_optimizer(made, lambda: run(*made.batch))

        return make

    def whole() -> Step:
        made = case(name)
        run = pg.torch.TrainStep(made.module, made.loss, rank_one, optax.sgd(RATE))
        return lambda: jax.block_until_ready(run(*made.batch))

    def alone() -> Step:
        """The same function in JAX, with parameters and SGD in JAX."""
        made = case(name)
        params, buffers, f = pg.torch.functionalize(made.module, made.loss)
        key = jax.random.key(0)

        @jax.jit
        def run(key: Any, params: Any) -> Any:
            of_params = lambda params: f(params, buffers, key, *made.batch)  # noqa: E731
            (loss, _), grads = pg.value_and_grad(of_params, rank_one, has_aux=True)(key, params)
            return jax.tree.map(lambda p, g: p - RATE * g, params, grads), loss

        def next_step() -> Any:
            nonlocal params, key
            key, now = jax.random.split(key)
            params, loss = jax.block_until_ready(run(now, params))
            return loss

        return next_step

    return {
        "prograde": step(rank_one),
        "prograde-whole": whole,
        "jax-alone": alone,
        "jax-backprop": step(pg.Backprop()),
    }


SIDES = {"torch": _of_torch, "prograde": _of_prograde}


def _answer(makers: Any, steps: dict[str, Step], request: dict[str, Any]) -> dict[str, Any]:
    method, loss = request["method"], float("nan")
    begin = time.perf_counter()
    if method not in steps:
        steps[method] = makers[method]()
    for _ in range(request["count"]):
        loss = steps[method]()
    return {"seconds": time.perf_counter() - begin, "loss": float(loss)}


def main(side: str, name: str) -> None:
    """Answers requests until standard input ends."""

    def start() -> Callable[[dict[str, Any]], dict[str, Any]]:
        keep_freed_memory()
        torch.set_num_threads(cores())
        return partial(_answer, SIDES[side](name), {})

    warnings.simplefilter("ignore")
    serve(start)


if __name__ == "__main__":
    main(*sys.argv[1:])
