"""Outcomes of training runs, computed from their records alone."""

import statistics
from dataclasses import dataclass
from typing import Any

from prograde.lab.report.words import MISSING

Record = list[dict[str, Any]]
"""The lines of a run: `run`, a `point` for each point of the curve, `end`."""


@dataclass(frozen=True)
class Spread:
    """Mean, least and greatest value over n seeds."""

    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Divergence:
    """A run that diverged: its step, and the cause and the culprit if they are known."""

    seed: int
    step: int
    cause: str | None
    culprit: str | None = None


@dataclass(frozen=True)
class Outcome:
    """The outcome of a method at a setting.

    **Fields:**

    - `final_loss`, `final_accuracy`: held-out, over the seeds that completed.
    - `diverged`: the runs that diverged; `finished`: how many seeds completed or diverged.
    - `time_ratio`: T, the time to backprop's best held-out loss divided by backprop's time to it.
      It is the median over the seeds. Time is steps times the median cost of a step. None if the
      median seed does not reach that loss.
    - `time_bound`: a lower bound on T in that case, the time of the whole run divided by
      backprop's. None if that seed diverged.
    - `reached`: the number of seeds, of `compared`, that reach that loss. `compared` is 0 if
      backprop has not run, or did not improve on its start.
    """

    method: str
    setting: str
    learning_rate: float
    runs: list[Record]
    final_loss: Spread | None
    final_accuracy: Spread | None
    diverged: list[Divergence]
    finished: int
    time_ratio: float | None
    time_bound: float | None
    reached: int
    compared: int


def points(run: Record) -> list[dict[str, Any]]:
    """Returns the points of a curve that have a held-out loss."""
    return [line for line in run if line["kind"] == "point" and line.get("test_loss") is not None]


def spread(values: list[float]) -> Spread | None:
    """Returns the spread of values, or `None` without values."""
    if not values:
        return None
    return Spread(statistics.fmean(values), min(values), max(values), len(values))


def outcome_of(
    method: str,
    setting: str,
    runs: list[Record],
    backprop_runs: list[Record],
    costs: dict[str, Any],
) -> Outcome:
    """Computes the outcome of a method at a setting, compared with backprop at the same setting."""
    ended = [run for run in runs if run[-1]["kind"] == "end"]
    finals = [points(run)[-1] for run in ended if run[-1]["status"] == "completed"]
    times: list[tuple[int, float]] = []
    if costs and method != "backprop":
        references = {run[0]["seed"]: run for run in backprop_runs if run[-1]["kind"] == "end"}
        pairs = [(run, references[run[0]["seed"]]) for run in ended if run[0]["seed"] in references]
        found = (_time_ratio(run, reference, method, costs) for run, reference in pairs)
        times = sorted(time for time in found if time is not None)
    # (0, T) for a seed that reaches the loss, (1, bound) if it does not, (2, 0) if it diverged
    kind, value = times[len(times) // 2] if times else (2, 0.0)
    return Outcome(
        method,
        setting,
        runs[0][0]["learning_rate"],
        runs,
        spread([p["test_loss"] for p in finals]),
        spread([p["test_accuracy"] for p in finals if "test_accuracy" in p]),
        [
            Divergence(
                run[0]["seed"], run[-1]["step"], run[-1].get("cause"), run[-1].get("culprit")
            )
            for run in ended
            if run[-1]["status"] == "diverged"
        ],
        len(ended),
        value if kind == 0 else None,
        value if kind == 1 else None,
        sum(kind == 0 for kind, _ in times),
        len(times),
    )


def _time_ratio(
    run: Record, backprop_run: Record, method: str, costs: dict[str, Any]
) -> tuple[int, float] | None:
    """Returns (0, T), (1, bound of T), or (2, 0) if it diverged. None without a reference."""
    reference = min(points(backprop_run), key=lambda p: p["test_loss"])
    if reference["step"] == 0:
        return None
    seconds = {name: cost["seconds"]["median"] for name, cost in costs.items()}
    backprop_seconds = reference["step"] * seconds["backprop"]
    steps = (p["step"] for p in points(run) if p["test_loss"] <= reference["test_loss"])
    if (reached := next(steps, None)) is not None:
        return 0, reached * seconds[method] / backprop_seconds
    if run[-1]["status"] == "diverged":
        return 2, 0.0
    return 1, run[-1]["step"] * seconds[method] / backprop_seconds


def spread_text(spread: Spread | None, percent: bool = False) -> str:
    """Formats the mean and, of several values, the least and the greatest."""
    if spread is None:
        return MISSING
    values = spread.low, spread.mean, spread.high
    low, mean, high = (f"{100 * v:.1f}" if percent else f"{v:.3g}" for v in values)
    unit = " %" if percent else ""
    return f"{mean}{unit}" if spread.n == 1 or low == high else f"{mean}{unit} ({low} to {high})"


def ratio_text(outcome: Outcome) -> str:
    """Formats T, or its lower bound."""
    if outcome.method == "backprop":
        return "1"
    if not outcome.compared:
        return MISSING
    some = outcome.reached < outcome.compared
    seeds = f" ({outcome.reached} of {outcome.compared} seeds)" if some else ""
    if outcome.time_ratio is not None:
        return f"{outcome.time_ratio:.2f}{seeds}"
    bound = outcome.time_bound
    return f"> {bound:.2f}{seeds}" if bound is not None else f"diverged{seeds}"


def ended_text(outcome: Outcome) -> str:
    """Formats how many seeds ended and how many diverged, for a cell of a table."""
    some = outcome.finished < len(outcome.runs)
    said = f"{outcome.finished} of {len(outcome.runs)}" if some else str(len(outcome.runs))
    if not outcome.diverged:
        return said
    first = min(divergence.step for divergence in outcome.diverged)
    return f"{said}; {len(outcome.diverged)} diverged, first at step {first}"


def divergence_text(outcome: Outcome, name: str) -> str:
    """Says how many runs diverged, at which step the first did, and why if the records tell."""
    first = min(outcome.diverged, key=lambda divergence: divergence.step)
    because = {
        "value": ", where the loss overflowed and the parameters were finite",
        "gradient": ", after a step whose loss was finite and whose gradient was not",
    }.get(first.cause or "", "")
    if first.culprit:
        because += f": {first.culprit}"
    return (
        f"{name} diverged in {len(outcome.diverged)} of {outcome.finished} seeds, "
        f"first at step {first.step}{because}."
    )
