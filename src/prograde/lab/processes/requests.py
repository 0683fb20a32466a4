"""A process that works on request: a line of JSON in for each request, a line out as its answer."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

# Waiting threads of PyTorch spin for less than a millisecond, and sleep during JAX's turns. PyTorch
# is as fast with this as by default. (With OMP_WAIT_POLICY=PASSIVE threads do not spin at all, and
# an MLP step of PyTorch is a fifth slower.)
_SPINS = {"GOMP_SPINCOUNT": "20000"}


class RequestError(RuntimeError):
    """A process failed to carry out a request, or ended."""


class Server:
    """A process that runs a module, whose `serve` answers requests.

    **Arguments:** `title`: what the process is, for errors; `module`: its name; `arguments`: those
    of its command line; `settings`: environment variables in addition to those of this process.
    """

    def __init__(self, title: str, module: str, *arguments: str, **settings: str):
        self._title = title
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115, closed with the process
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=os.environ | _SPINS | settings,
            start_new_session=True,  # Ctrl-C goes to the command, which ends this process
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        """Sends a request and waits for its answer. Raises `RequestError` if it fails."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
        reply = process.stdout.readline()
        if not reply:
            self._errors.seek(0)
            lines = self._errors.read().decode(errors="replace").strip().splitlines()
            raise RequestError(f"{self._title} ended: {(lines or ['no message'])[-1]}")
        found = json.loads(reply)
        if "error" in found:
            raise RequestError(found["error"])
        return found

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


def serve(start: Callable[[], Callable[[dict[str, Any]], dict[str, Any]]]) -> None:
    """Answers requests until standard input ends, by the function that `start` returns.

    An exception is answered as an error. What is printed, also by `start`, goes to standard error.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # keeps the output of libraries and of compilers out of the answers
    answer = start()
    for line in sys.stdin:
        try:
            found = answer(json.loads(line))
        except Exception as error:
            words = str(error).strip().splitlines()
            found = {"error": f"{type(error).__name__}: {words[0] if words else 'no message'}"}
        answers.write(json.dumps(found) + "\n")
