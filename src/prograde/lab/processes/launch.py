"""Starts the processes of one command on this machine, and watches them."""

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable

_GRACE = 15.0  # seconds for the other processes to end by themselves when one is gone


def launch(
    program: list[str], processes: int, coordinator: str | None, say: Callable[[str], None]
) -> int:
    """Runs a program in several processes, each on its share of the cores; returns the exit status.

    Only the first process prints to the terminal; the others print errors. When one fails or is
    killed, the others get some seconds to end, and are then stopped. No process is left behind, and
    none waits forever.
    """
    address = coordinator or f"127.0.0.1:{free_port()}"
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    workers = []
    for i in range(processes):
        environment = os.environ | {
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": str(processes),
            "JAX_PROCESS_ID": str(i),
        }
        worker = subprocess.Popen(
            program, env=environment, stdout=None if i == 0 else subprocess.DEVNULL
        )
        if len(cores) >= processes:  # no two processes share a core
            with contextlib.suppress(OSError):
                os.sched_setaffinity(worker.pid, cores[i::processes])
        workers.append(worker)
    try:
        return _watched(workers, say)
    except KeyboardInterrupt:
        for worker in workers:  # a terminal sends it to all processes, other senders do not
            worker.send_signal(signal.SIGINT)
        _ended(workers)
        return 130
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.kill()
            worker.wait()


def _watched(workers: list[subprocess.Popen], say: Callable[[str], None]) -> int:
    while True:
        ended = {i: code for i, worker in enumerate(workers) if (code := worker.poll()) is not None}
        failed = {i: code for i, code in ended.items() if code != 0}
        if failed:
            break
        if len(ended) == len(workers):
            return 0
        time.sleep(0.05)
    # JAX aborts processes that lose one, perhaps at the same moment as the killed one ends
    first, code = min(failed.items(), key=lambda pair: (pair[1] == -signal.SIGABRT, pair[1]))
    if code < 0:
        say(f"worker {first} was ended by {signal.Signals(-code).name}; the others are stopped.")
    elif code != 130:
        say(f"worker {first} ended with status {code}; the others are stopped.")
    _ended(workers)
    return code if code > 0 else 128 - code


def _ended(workers: list[subprocess.Popen]) -> None:
    """Waits some seconds until all have ended."""
    deadline = time.monotonic() + _GRACE
    while time.monotonic() < deadline and any(worker.poll() is None for worker in workers):
        time.sleep(0.05)


def free_port() -> int:
    """Returns a free port of 127.0.0.1."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
