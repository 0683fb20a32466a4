"""Formats numbers: times, sizes, ratios, and where they were measured."""

from collections.abc import Iterable, Mapping
from typing import Any

MISSING = "–"
BUSY = 0.1  # largest share of the machine that others may use during timing
SPREAD = 1 / 3  # largest distance of quartiles of a steady figure, over its median


def milliseconds(seconds: float) -> str:
    """Formats a time in ms, with three digits."""
    return f"{1e3 * seconds:.3g}" if seconds < 1 else f"{1e3 * seconds:,.0f}"


def milliseconds_spread(seconds: dict[str, float]) -> str:
    """Formats the median of a time in ms, with half the distance between its quartiles."""
    median, half = seconds["median"], (seconds["high"] - seconds["low"]) / 2
    said = f"{1e3 * median:.3g}" if median < 1 else f"{1e3 * median:,.0f}"
    return f"{said} ± {100 * half / median:.0f} %"


def milliseconds_quartiles(seconds: dict[str, float]) -> str:
    """Formats the median of a time in ms, with its quartiles in brackets."""
    median, low, high = (1e3 * seconds[name] for name in ("median", "low", "high"))
    return f"{median:.3g} ({low:.3g} to {high:.3g})"


def duration(seconds: float) -> str:
    """Formats a time in s or min."""
    return f"{seconds:.0f} s" if seconds < 180 else f"{seconds / 60:.0f} min"


def size(value: float) -> str:
    """Formats a number of bytes in B, kB or MB."""
    for unit, amount in (("MB", 1e6), ("kB", 1e3)):
        if value >= amount:
            digits = ",.3g" if value < 1000 * amount else ",.0f"
            return f"{value / amount:{digits}}\u00a0{unit}"
    return f"{value:.0f}\u00a0B"


def mebibytes(value: int | None) -> str:
    """Formats a number of bytes in MiB."""
    return MISSING if value is None else f"{value / 2**20:,.1f}"


def megabytes(value: int | None) -> str:
    """Formats a number of bytes in MB."""
    if value is None:
        return MISSING
    return f"{value / 1e6:.2g}" if value < 1e7 else f"{value / 1e6:,.0f}"


def quartiles(ratio: dict[str, float]) -> str:
    """Formats a median, with its quartiles in brackets."""
    return f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"


def listed(names: Iterable[str]) -> str:
    """Joins names as in a sentence: `a, b and c`."""
    *first, last = list(names)
    return f"{', '.join(first)} and {last}" if first else last


def made_on(manifest: dict[str, Any], *more: str) -> str:
    """Says where the numbers of a store were measured. `more` sentences follow."""
    environments = manifest["environments"]
    places = []
    for e in environments:
        dirty = " with local changes" if e["git_dirty"] else ""
        commit = f"commit {(e['git_commit'] or 'unknown')[:10]}{dirty}"
        device = "" if e["device"] == "cpu" else f"{e['device']}, "
        places.append(
            f"{device}{e['processor']}, {e['cores']} cores, jax {e['versions']['jax']}, {commit}, "
            f"{e['started'][:10]}"
        )
    flags = environments[0]["xla_flags"]
    said = [f"Made on {'; then on '.join(dict.fromkeys(places))}."]
    said += [f"XLA_FLAGS: {flags}."] if flags else []
    return " ".join([*said, *filter(None, more)])


def warning(busy: float | None) -> str:
    """Warns about times that were measured while other processes were busy.

    `busy` is the share of the machine's processor time that other processes used.
    """
    if busy is None or busy <= BUSY:
        return ""
    return (
        f"Other processes used {100 * busy:.0f} % of the machine while this was timed: do not "
        "trust these times and ratios."
    )


def unsteady(measured: Mapping[str, dict[str, float]]) -> str:
    """Names the times or ratios that vary much from round to round.

    `measured` holds a median and its quartiles for each name.
    """
    wide = [
        name
        for name, found in measured.items()
        if found["high"] - found["low"] > SPREAD * found["median"]
    ]
    if not wide:
        return ""
    return (
        f"Unsteady from round to round: {listed(wide)}. The quartiles are more than a third of the "
        "median apart: take these figures as rough."
    )
