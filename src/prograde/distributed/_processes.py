"""Processes that find each other and agree on what they are about to run."""

import contextlib
import itertools
import json
import os
import re
import socket
import sys
import threading
import time
from typing import Any

import jax

from prograde.kit import check_whole


class StartError(RuntimeError):
    """Workers cannot begin together. The message says what differs, or who did not come.

    **Source:** none; `initialize` and `agree` raise it.

    Examples:
        >>> import prograde as pg
        >>> issubclass(pg.distributed.StartError, RuntimeError)
        True
    """


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: int = 60,
) -> None:
    """`jax.distributed.initialize` that binds one address only and notices lost workers.

    Call it before anything else of JAX.

    **Arguments:** what is `None` is taken from the environment variables `JAX_COORDINATOR_ADDRESS`,
    `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`; the last two also from Open MPI, and from SLURM or
    Kubernetes where JAX detects them.

    - `coordinator`: HOST:PORT of the first process. It binds this address (or the one in
      `JAX_COORDINATOR_BIND_ADDRESS`), and the others connect to it. The service asks nobody who
      they are: choose an address of a private network. JAX by itself would bind every address of
      the machine.
    - `num_processes`, `process_id`: how many there are, and which this one is, from 0.
    - `timeout`: seconds that a process waits for the others at the start, and about as many until
      it is noticed later that one is gone without closing its connections. A killed process is
      noticed at once.

    **Errors:** `ValueError` without an address or a number; `StartError` where JAX has run
    something before, where processes were initialised before, where the address cannot be bound, or
    where the numbers of processes differ. Where the others do not come JAX ends the process. Before
    it does, a line on the error output says who was waited for.

    **Source:** none; it starts `jax.distributed`.

    Examples:
        >>> import prograde as pg
        >>> try:
        ...     pg.distributed.initialize("no-port-here")
        ... except ValueError as error:
        ...     print(str(error)[:40])
        coordinator='no-port-here', but HOST:POR
    """
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    if not isinstance(coordinator, str) or not re.fullmatch(r".+:\d+", coordinator):
        raise ValueError(
            f"coordinator={coordinator!r}, but HOST:PORT of the first process is needed, or the "
            "environment variable JAX_COORDINATOR_ADDRESS. The port is open to whoever reaches it: "
            "use an address of a private network."
        )
    check_whole("timeout", timeout)
    num_processes = _number(num_processes, "JAX_NUM_PROCESSES", "OMPI_COMM_WORLD_SIZE")
    process_id = _number(process_id, "JAX_PROCESS_ID", "OMPI_COMM_WORLD_RANK")
    _check_place(num_processes, process_id)
    _check_first()
    bound = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", coordinator)
    if process_id == 0:
        _check_free(bound)
    with contextlib.suppress(AttributeError):  # the service would catch SIGTERM and go on
        jax.config.update("jax_enable_preemption_service", False)
    who = "this process" if process_id is None else f"process {process_id} of {num_processes}"
    missing = (
        f"prograde: {who} did not find all the others at {coordinator} within {timeout} s. All "
        "need the same address and number of processes, and a number of their own from 0."
    )
    waiting = threading.Timer(timeout - 0.5, lambda: print(missing, file=sys.stderr, flush=True))
    waiting.daemon = True
    waiting.start()
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            cluster_detection_method=None if None in (num_processes, process_id) else "deactivate",
            coordinator_bind_address=bound,
            initialization_timeout=timeout,
            heartbeat_timeout_seconds=timeout,
            shutdown_timeout_seconds=5 * timeout,  # the first may have a report to write
        )
    except ValueError as error:
        raise ValueError(
            f"num_processes={num_processes}, process_id={process_id}: {error} Set "
            "JAX_NUM_PROCESSES and JAX_PROCESS_ID."
        ) from error
    except RuntimeError as error:
        raise StartError(f"{missing.removeprefix('prograde: ')} JAX says: {error}") from error
    finally:
        waiting.cancel()
    agree({"number of processes": _service().num_processes}, timeout=timeout)


def _check_place(num_processes: int | None, process_id: int | None) -> None:
    """Raises for numbers of processes that cannot be; those that are `None` JAX finds."""
    if num_processes is not None:
        check_whole("num_processes", num_processes)
    count = 2**31 if num_processes is None else num_processes
    if process_id is not None and (type(process_id) is not int or not 0 <= process_id < count):
        raise ValueError(
            f"process_id={process_id!r}, but a whole number from 0 to num_processes - 1 = "
            f"{count - 1} is needed."
        )


def _check_first() -> None:
    """Raises where it is too late: JAX has chosen its devices, or processes have met."""
    from jax._src.xla_bridge import backends_are_initialized

    if _service().client is not None:
        raise StartError(
            "the processes were initialised before, and can be only once. Remove one of the calls "
            "of initialize."
        )
    if backends_are_initialized():
        raise StartError(
            "JAX has run something before initialize, or has counted its devices, and so knows "
            "only those of this process. Call initialize first, before any array is made, and "
            "before modules are imported that make some."
        )


def _number(given: int | None, *names: str) -> int | None:
    """The number that was given, else that of the first of these environment variables."""
    found = [name for name in names if name in os.environ]
    if given is not None or not found:
        return given
    try:
        return int(os.environ[found[0]])
    except ValueError:
        raise ValueError(
            f"{found[0]}={os.environ[found[0]]!r} in the environment, but a whole number is needed."
        ) from None


def _check_free(address: str) -> None:
    """Raises unless this process can listen there.

    JAX would crash where the address is not this machine's, and take over a port that another run
    listens at.
    """
    host, port = address.rsplit(":", 1)
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(
            host.strip("[]"), int(port), type=socket.SOCK_STREAM
        )[0]
        with socket.socket(family, kind, protocol) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind(place)
    except (OSError, ValueError) as error:
        raise StartError(
            f"the first process cannot listen at {address} ({error}). Give an address of this "
            "machine and a port that is free, or another address to bind in "
            "JAX_COORDINATOR_BIND_ADDRESS."
        ) from error


def agree(facts: dict[str, Any], *, timeout: int = 60) -> None:
    """Raises unless all processes give the same facts. Does nothing where there is one process.

    Call it before the processes compute anything together, and equally often on all of them.

    **Arguments:**

    - `facts`: what has to be equal, by name, as JSON: versions, configuration, data.
    - `timeout`: seconds to wait for the facts of the others.

    **Errors:** `StartError`, on the processes that differ from the first and on the first, naming
    the facts and both values; also when one does not answer. `TypeError` for facts that JSON cannot
    hold.

    **Source:** none; it compares what the coordination service of JAX passes on.

    Examples:
        >>> import prograde as pg
        >>> pg.distributed.agree({"learning rate": 0.1})
    """
    check_whole("timeout", timeout)
    try:
        own = json.loads(json.dumps(facts))
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"facts cannot be compared as JSON ({error}). Use text, numbers, lists and "
            "dictionaries."
        ) from None
    service = _service()
    if service.client is None:
        return
    count, here = next(_agreements), service.process_id
    service.client.key_value_set(f"prograde/{count}/{here}", json.dumps(own))
    for other in range(service.num_processes) if here == 0 else [0]:
        try:
            found = json.loads(
                service.client.blocking_key_value_get(f"prograde/{count}/{other}", timeout * 1000)
            )
        except jax.errors.JaxRuntimeError as error:
            raise StartError(
                f"process {other} did not say within {timeout} s what it is about to run."
            ) from error
        differences = [
            f"{name} is {own.get(name)!r} on process {here} and {found.get(name)!r} on process "
            f"{other}"
            for name in sorted(own.keys() | found.keys())
            if own.get(name) != found.get(name)
        ]
        if differences:
            time.sleep(1)  # let the others find it too: the service ends with the first process
            raise StartError(f"the processes were not started alike: {'; '.join(differences)}.")


_agreements = itertools.count()


def _service() -> Any:
    """The client of the coordination service, for which JAX has no public name."""
    from jax._src.distributed import global_state

    return global_state
