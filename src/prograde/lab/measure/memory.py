"""Memory of a step: what XLA plans, and what a process takes."""

import contextlib
import ctypes
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import psutil


def in_a_process(module: str, *arguments: str) -> dict[str, Any]:
    """Runs a module with these arguments, and reads the JSON figures on its last line of output.

    If the process fails, for example for lack of memory, the figures are null and `error` says why.
    """
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        missing = dict.fromkeys(("temp_bytes", "argument_bytes", "rss_before", "peak_rss"))
        said = f"{shlex.join(command[1:])} ended with {done.returncode}: {reason}"
        return {**missing, "error": said}
    return json.loads(done.stdout.splitlines()[-1])


def resident() -> int:
    """Returns the resident memory of this process, in bytes."""
    return psutil.Process().memory_info().rss


def available() -> int:
    """Returns the memory that is available on this machine, in bytes."""
    return psutil.virtual_memory().available


def peak_resident() -> int | None:
    """Returns the peak resident memory of this process since the last reset, in bytes."""
    with contextlib.suppress(OSError, StopIteration):  # psutil has no peak on Linux
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(x.split()[1] for x in lines if x.startswith("VmHWM")))
    return None


def resident_memory(steps: Callable[[], Any]) -> dict[str, int | None]:
    """Measures resident memory just before `steps` and at its peak during them, in bytes.

    The peak is null where the system cannot reset it.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        # the C library may keep memory of the compilation, which would hide what steps need
        ctypes.CDLL(None).malloc_trim(0)
    peak_is_of_steps = False
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of the compilation
        peak_is_of_steps = True
    before = resident()
    steps()
    peak = peak_resident() if peak_is_of_steps else None
    # Linux updates the peak every few pages only: it may be less than what is resident
    return {"rss_before": before, "peak_rss": None if peak is None else max(peak, before)}


def step_memory(compiled: Any, carry: Any, *arguments: Any) -> dict[str, int | None]:
    """Measures the memory of a compiled step `carry, _ = compiled(carry, *arguments)`.

    Takes one step, and measures during three more.
    """

    def steps(count: int) -> None:
        nonlocal carry
        for _ in range(count):
            carry, _ = compiled(carry, *arguments)
        jax.block_until_ready(carry)

    analysis = compiled.memory_analysis()
    steps(1)
    return {
        "temp_bytes": analysis.temp_size_in_bytes,
        "argument_bytes": analysis.argument_size_in_bytes,
        **resident_memory(lambda: steps(3)),
    }


def keep_freed_memory() -> bool:
    """Makes the C library keep memory that is freed, rather than return it to the system.

    Each backprop step allocates its temporary memory anew, and spends up to a fifth of its time on
    this otherwise. Returns False if the C library does not support it.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    arenas, mmaps, trim, pad = -8, -4, -1, -2
    options = ((arenas, 1), (mmaps, 0), (trim, -1), (pad, 2**26))
    return all(mallopt(*option) for option in options)


def load_average() -> float:
    """Returns the mean number of processes that ran or waited in the last minute."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else psutil.getloadavg()[0]
