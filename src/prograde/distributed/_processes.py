"""Processes that find each other, and agree on what they are about to run."""

import itertools
import json
import os
import time
from typing import Any

import jax


class StartError(RuntimeError):
    """Workers that cannot begin together; the message says what differs, or who did not come."""


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: int = 60,
) -> None:
    """`jax.distributed.initialize`, with an address that is bound as given, and times after which a lost worker is noticed.

    **Arguments:** what is `None` is taken from the environment variables `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and
    `JAX_PROCESS_ID`; the last two also from SLURM, Open MPI or Kubernetes, which JAX detects.

    - `coordinator`: HOST:PORT of the first process, which it binds and the others connect to. The service asks nobody who they
      are: choose an address of a private network. JAX by itself would bind every address of the machine.
    - `num_processes`, `process_id`: how many there are, and which this one is, from 0.
    - `timeout`: seconds that a process waits for the others at the start, and about as many until it is noticed later that one is gone
      without closing its connections. One that is killed is noticed at once.

    **Errors:** `ValueError` without an address; `StartError` when the others do not come, or differ in their number.
    """
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    if not coordinator or ":" not in coordinator:
        raise ValueError(
            f"coordinator={coordinator!r}, but HOST:PORT of the first process is needed, or the environment variable "
            "JAX_COORDINATOR_ADDRESS. The port is open to whoever reaches it: use an address of a private network."
        )
    if num_processes is None and "JAX_NUM_PROCESSES" in os.environ:
        num_processes = int(os.environ["JAX_NUM_PROCESSES"])
    if process_id is None and "JAX_PROCESS_ID" in os.environ:
        process_id = int(os.environ["JAX_PROCESS_ID"])
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            coordinator_bind_address=os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", coordinator),
            initialization_timeout=timeout,
            heartbeat_timeout_seconds=timeout,
            shutdown_timeout_seconds=5 * timeout,  # the first may have a report to write
        )
    except RuntimeError as error:
        raise StartError(
            f"process {process_id} of {num_processes} found no group at {coordinator} within {timeout} s: all of them need the same "
            f"address and number of processes, and a number of their own from 0. JAX says: {error}"
        ) from error
    agree({"number of processes": num_processes or _service().num_processes}, timeout=timeout)


def agree(facts: dict[str, Any], *, timeout: int = 60) -> None:
    """Raises unless all processes give the same facts, before they compute anything together. Does nothing where there is one.

    **Arguments:**

    - `facts`: what has to be equal, by name, as JSON: versions, configuration, data. The same number of calls on all processes.
    - `timeout`: seconds to wait for the facts of the others.

    **Errors:** `StartError`, on the processes that differ from the first and on the first, naming the facts and both values;
    also when one does not answer.

    Examples:
        >>> import prograde as pg
        >>> pg.distributed.agree({"learning rate": 0.1})
    """
    service = _service()
    if service.client is None:
        return
    own, count, here = json.loads(json.dumps(facts)), next(_agreements), service.process_id
    service.client.key_value_set(f"prograde/{count}/{here}", json.dumps(own))
    for other in range(service.num_processes) if here == 0 else [0]:
        try:
            found = json.loads(service.client.blocking_key_value_get(f"prograde/{count}/{other}", timeout * 1000))
        except jax.errors.JaxRuntimeError as error:
            raise StartError(f"process {other} did not say within {timeout} s what it is about to run.") from error
        differences = [
            f"{name} is {own.get(name)!r} on process {here} and {found.get(name)!r} on process {other}"
            for name in sorted(own.keys() | found.keys())
            if own.get(name) != found.get(name)
        ]
        if differences:
            time.sleep(1)  # so that the others find it too: the first takes the service with it
            raise StartError(f"the processes were not started alike: {'; '.join(differences)}.")


_agreements = itertools.count()


def _service() -> Any:
    """The client of the coordination service. JAX has no public name for it, and nothing else works before programs run."""
    from jax._src.distributed import global_state

    return global_state
