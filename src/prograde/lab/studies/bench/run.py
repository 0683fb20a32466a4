"""`prograde bench`: what a training step costs by each method, in time, memory and compilation; JAX and PyTorch in turns.

All methods of a workload take turns in one run, round by round, so that what disturbs the machine disturbs all; a ratio is
the median of the rounds' own ratios to the bare forward pass.
"""

import contextlib
import functools
import importlib.util
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from prograde.lab import costs, records
from prograde.lab.bench_methods import METHODS, JaxSide, counted_ratios, keep_freed_memory
from prograde.lab.display import Display
from prograde.lab.workloads import WORKLOADS, Workload

VISIT_SECONDS = 0.05  # a visit takes as many steps as fill this time
SETTLE_SECONDS = 0.01  # between visits, for the threads of the one before to go to sleep

# Waiting threads of PyTorch spin less than a millisecond, which is as fast for it as its default, and sleep when JAX has
# its turn. (OMP_WAIT_POLICY=PASSIVE, which does not spin at all, makes an MLP step of PyTorch a fifth slower.)
_SPINS = "20000"

Visit = Callable[
    [int], tuple[float, float]
]  # so many steps -> the seconds they took, the last loss


class TorchError(RuntimeError):
    """PyTorch, or its process, did not do what it was asked for."""


class TorchSide:
    """The same workload in PyTorch, in a process that works only while it is asked to."""

    def __init__(self, workload: Workload, arrays: Path, keep_memory: bool = True):
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115, closed with the process
        self._process = subprocess.Popen(
            [sys.executable, "-m", "prograde.lab.bench_torch"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=os.environ
            | {
                "GOMP_SPINCOUNT": _SPINS,
                "TORCHINDUCTOR_CACHE_DIR": str(arrays.parent / "inductor"),
            },
            start_new_session=True,  # Ctrl-C is for the command, which ends this process itself
        )
        try:
            given = {"name": workload.name, "sizes": workload.sizes, "arrays": str(arrays)}
            facts = self._ask(do="start", **given, keep_memory=keep_memory)
            self.methods, self.facts = facts.pop("methods"), facts
        except BaseException:
            self.close()
            raise

    def _ask(self, **request: Any) -> dict[str, Any]:
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
        reply = process.stdout.readline()
        if not reply:
            self._errors.seek(0)
            last = (
                self._errors.read().decode(errors="replace").strip().splitlines() or ["no message"]
            )[-1]
            raise TorchError(f"the process of PyTorch ended: {last}")
        found = json.loads(reply)
        if "error" in found:
            raise TorchError(found["error"])
        return found

    def compile(self, method: str) -> dict[str, Any]:
        """Takes the first step; what it took is the time of compilation where there is one."""
        return self._ask(do="compile", method=method)

    def visit(self, method: str, count: int) -> tuple[float, float]:
        """As `JaxSide.visit`."""
        found = self._ask(do="visit", method=method, count=count)
        return found["seconds"], found["loss"]

    def memory(self, method: str) -> dict[str, Any]:
        """Resident memory of the process before and during three steps."""
        return self._ask(do="memory", method=method)

    def __enter__(self) -> "TorchSide":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process."""
        with contextlib.suppress(OSError):
            if self._process.stdin is not None:
                self._process.stdin.close()
        self._process.kill()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._errors.close()


def calibrate(visit: Visit) -> int:
    """How many steps fill a visit."""
    count = 1
    while (seconds := visit(count)[0]) < VISIT_SECONDS / 2:
        count *= 4
    return max(1, math.ceil(count * VISIT_SECONDS / seconds))


def take_turns(
    visits: dict[str, Visit],
    counts: dict[str, int],
    rounds: int,
    on_visit: Callable[[str], None],
) -> dict[str, list[float]]:
    """Seconds a step of each method, round by round; each round in another order, so that no method follows always the same."""
    seconds: dict[str, list[float]] = {name: [] for name in visits}
    for i in range(rounds):
        for name in random.Random(i).sample(list(visits), len(visits)):
            time.sleep(SETTLE_SECONDS)
            taken, value = visits[name](counts[name])
            if not math.isfinite(value):
                raise RuntimeError(
                    f"{name}: the loss is not finite; what was measured would mean nothing."
                )
            seconds[name].append(taken / counts[name])
            on_visit(name)
    return seconds


class Measurement:
    """All figures of one workload. PyTorch, where it is installed, takes turns with JAX."""

    def __init__(self, workload: Workload, display: Display):
        self.workload, self.display = workload, display
        self.figures: dict[str, dict[str, Any]] = {}
        self.missing: dict[str, str] = {}  # methods of PyTorch that do not run here, and why

    def record(self, rounds: int, with_memory: bool) -> dict[str, Any]:
        """Measures, and returns what is recorded."""
        with tempfile.TemporaryDirectory() as folder:
            arrays = Path(folder) / "arrays.npz"
            parameters, torch = self._time(arrays, rounds)
            if with_memory:
                self._memory(arrays)
        return {
            "title": self.workload.title,
            "sizes": self.workload.sizes,
            "parameters": parameters,
            "torch": torch,
            "missing": self.missing,
            "methods": {name: self.figures[name] for name in METHODS if name in self.figures},
        }

    def _time(self, arrays: Path, rounds: int) -> tuple[int, dict[str, Any] | None]:
        jax_side = JaxSide(self.workload)
        parameters = sum(w.size for w in jax.tree.leaves(jax_side.carry[0]))
        with contextlib.ExitStack() as stack:
            torch_side = None
            if importlib.util.find_spec("torch") is not None:
                jax_side.save(arrays)
                try:
                    torch_side = stack.enter_context(TorchSide(self.workload, arrays))
                except TorchError as error:
                    self.missing["torch"] = str(error)
            visits = self._compile(jax_side, torch_side)
            counts = {name: calibrate(visit) for name, visit in visits.items()}
            expected = {
                name: visit(counts[name])[0] + SETTLE_SECONDS for name, visit in visits.items()
            }
            with self.display.stage(
                f"{self.workload.name}: {rounds} rounds", rounds * sum(expected.values())
            ):
                seconds = take_turns(
                    visits, counts, rounds, lambda name: self.display.advance(expected[name], name)
                )
        for name, values in seconds.items():
            self.figures[name] |= {
                "seconds": costs.quartiles(values),
                "ratio": costs.ratio_quartiles(values, seconds["bare"]),
                "steps_a_visit": counts[name],
                "rounds": [float(f"{value:.5g}") for value in values],
            }
        for name, ratio in counted_ratios(self.workload).items():
            self.figures[name]["counted_ratio"] = ratio
        return parameters, torch_side.facts if torch_side is not None else None

    def _compile(self, jax_side: JaxSide, torch_side: TorchSide | None) -> dict[str, Visit]:
        """Compiles everything; returns how each method is visited."""
        sides: dict[str, JaxSide | TorchSide] = dict.fromkeys(jax_side.methods, jax_side)
        if torch_side is not None:
            sides |= dict.fromkeys(torch_side.methods, torch_side)
        visits: dict[str, Visit] = {}
        jax.block_until_ready(
            jax.jit(lambda x: x @ x)(jnp.ones((8, 8)))
        )  # what the first compilation takes once
        with self.display.stage(f"{self.workload.name}: compiling", len(sides)):
            for name, side in sides.items():
                try:
                    self.figures[name] = side.compile(name)
                except TorchError as error:  # no C++ compiler, say: the others go on without it
                    self.missing[name] = str(error)
                else:
                    visits[name] = functools.partial(side.visit, name)
                self.display.advance(1, name)
        if "torch-bare" in visits:  # neither has moved its parameters yet
            ours, theirs = visits["bare"](1)[1], self.figures["torch-bare"]["first_loss"]
            if not math.isclose(ours, theirs, rel_tol=1e-3):
                raise RuntimeError(
                    f"{self.workload.name}: the loss is {ours:g} in JAX and {theirs:g} in PyTorch."
                )
        return visits

    def _memory(self, arrays: Path) -> None:
        """Each method in a process of its own, one after the other, with the C library's allocator as it comes."""
        with self.display.stage(f"{self.workload.name}: memory", len(self.figures)):
            for name, figures in self.figures.items():
                if name.startswith("torch"):
                    try:
                        with TorchSide(self.workload, arrays, keep_memory=False) as side:
                            figures |= side.memory(name)
                    except TorchError as error:
                        figures |= {"rss_before": None, "peak_rss": None, "error": str(error)}
                else:
                    found = costs.in_a_process("prograde.lab.bench", self.workload.name, name)
                    figures |= {k: v for k, v in found.items() if v is not None or k not in figures}
                self.display.advance(1, name)


def _measure_memory(name: str, method: str) -> dict[str, Any]:
    side = JaxSide(WORKLOADS[name]())
    side.compile(method)
    carry, side.carry = side.carry, None
    return costs.step_memory(side.compiled[method], carry, side._key, side.batches[0])


def load_average() -> float | None:
    """Processes that ran or waited in the last minute, where the system counts them."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def read(path: Path) -> dict[str, Any]:
    """A record of the benchmark."""
    record = records.read_json(path)
    if not isinstance(record, dict) or "models" not in record:
        raise records.RecordError(f"{path} is not a record of prograde bench. Choose another file.")
    return record


def claim(path: Path, names: list[str], rounds: int) -> dict[str, Any]:
    """The record at `path` to be continued by these models, or a new one; raises where that would mix or overwrite."""
    new = {"environment": records.environment(), "rounds": rounds, "models": {}}
    if not path.exists():
        return new
    old = read(path)
    here, there = ({**r["environment"], "rounds": r["rounds"]} for r in (new, old))
    differences = [k.replace("_", " ") for k in here if k != "started" and here[k] != there.get(k)]
    if differences:
        raise records.RecordError(
            f"{path} was made with another {', '.join(differences)}. Choose another --out; nothing was changed."
        )
    if measured := [name for name in names if name in old["models"]]:
        raise records.RecordError(
            f"{path} holds {', '.join(measured)} already. Choose another --out, or delete it; nothing was changed."
        )
    return old


def run(
    names: list[str], rounds: int, with_memory: bool, path: Path, display: Display
) -> Iterator[dict[str, Any]]:
    """Measures one workload after the other; the record is written, and yielded, after each."""
    facts = {
        "keeps_freed_memory": keep_freed_memory(),
        "load_average": load_average(),
    }  # before JAX starts its threads
    record = claim(path, names, rounds)
    record["environment"] |= facts
    for name in names:
        measured = Measurement(WORKLOADS[name](), display).record(rounds, with_memory)
        models = record["models"] | {name: measured}
        record["models"] = {name: models[name] for name in WORKLOADS if name in models}
        records.write_json(path, record)
        yield record


if __name__ == "__main__":
    print(json.dumps(_measure_memory(sys.argv[1], sys.argv[2])))
