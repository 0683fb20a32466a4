"""What a forward run meets on its way, kept for `check`.

While `watching()` is active, the code that runs a program forward notes what it finds here, and
goes on where it would otherwise raise. So `check` reports what the run itself does, and has no
second opinion.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class DenseFallback:
    """A place where the tangent of a weight was formed as an array: by which operation.

    In which shape, and where.
    """

    primitive: str
    shape: tuple[int, ...]
    source: str


@dataclass(eq=False)
class Findings:
    """What was found.

    Dictionaries keep the order, and each thing once. Compared by identity, as the key of a cache.

    - `refused`: what forward mode cannot pass, and what to do about it.
    - `inlined`: functions whose reverse rule was ignored although a tangent arrived there.
    - `dense`: (path of a parameter, the place where its tangent was formed).
    - `sites`: (paths of the weights, shape of what is perturbed, whether it has examples).
    """

    refused: dict[str, str] = field(default_factory=dict)
    inlined: dict[str, None] = field(default_factory=dict)
    dense: dict[tuple[str, DenseFallback], None] = field(default_factory=dict)
    sites: list[tuple[tuple[str, ...], tuple[int, ...], bool]] = field(default_factory=list)


_CURRENT: ContextVar[Findings | None] = ContextVar("findings", default=None)


def current() -> Findings | None:
    """Where to note findings; `None` outside `watching`."""
    return _CURRENT.get()


@contextmanager
def watching() -> Iterator[Findings]:
    """Collects what forward runs meet, in place of raising what they refuse."""
    findings = Findings()
    token: Any = _CURRENT.set(findings)
    try:
        yield findings
    finally:
        _CURRENT.reset(token)
