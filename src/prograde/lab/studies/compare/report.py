"""The report of `prograde compare`, from its records alone."""

from typing import Any

from prograde.lab.report import Report, Section, Table
from prograde.lab.report.words import (
    MISSING,
    made_on,
    mebibytes,
    milliseconds_quartiles,
    warning,
)
from prograde.lab.store import Store
from prograde.lab.studies.compare.figures import figure
from prograde.lab.studies.compare.plan import POINTS
from prograde.lab.studies.compare.summary import Comparison, Result, read
from prograde.lab.training.outcomes import (
    Spread,
    divergence_text,
    ended_text,
    ratio_text,
    spread_text,
)

_INTRODUCTION = (
    "Gradient estimators compared on one model: what a step costs, how noisy and how biased the "
    "estimate is, and what training with it reaches, each with a learning rate of its own. All "
    "figures were measured here."
)
_TERMS = (
    "R is the time of a full training step divided by that of a bare forward pass on the same "
    "batch: all take turns in one run, and R is the median of the rounds' ratios. XLA temp is what "
    "XLA says that a step needs in addition to parameters, data and optimizer. Bias and variance "
    "are those of the estimator at the start of the first seed, on its first batch, over "
    "independent estimates g of one gradient (an estimator that learns has learned at this point "
    "first). The cosine is that of a single g; projection is E g · grad / |grad|², 1 without bias; "
    "bias is |E g − grad|² / |grad|², free of the variance of the average, and “< x” means that "
    "none is seen but up to x would not be noticed; variance is E |g − E g|² / |grad|². The rate "
    "bound is the learning rate of SGD above which the expected loss no longer falls, to second "
    "order: an estimate of large variance is long, and leaves the range of the second order long "
    "before. “unclear” means that noise hides the curvature. “± x” is one standard error. Where no "
    "rates were given, the rate of each is found by the same number of trials of the same length, "
    "by the mean loss over the second half of a trial on a validation part of the training data. "
    "Losses are held-out, on the data's test part: means over seeds, with the least and the "
    "greatest. Time is steps times the measured median time of a step, without evaluation. The "
    "equal time is that of the shortest run, and losses at it are interpolated between the points "
    "of a curve. T is the time to reach the best held-out loss of backprop with the same "
    "optimizer, divided by the time that the faster of the backprops compared takes, the median "
    "over the seeds; “> x” means that the median seed does not get there in x times backprop's "
    "time. A frontier joins what nothing else beats in both respects."
)
_UNEQUAL = (
    "At equal time, runs of slower steps have not come to the end of their schedule; T and the "
    "losses after equal steps are free of that."
)
_ROUNDING = 1e-6  # of squares divided by that of the gradient


def report(stores: list[Store]) -> Report:
    """Shows each comparison in a section."""
    comparisons = list(map(read, stores))
    return Report("Gradient estimators", _INTRODUCTION, _TERMS, list(map(_section, comparisons)))


def _section(comparison: Comparison) -> Section:
    shown = {r.entry.estimator: r for r in reversed(comparison.results)}
    names = comparison.manifest["config"]["estimators"]
    parts = [
        conclusion(comparison),
        figure(comparison),
        cost_table(comparison),
        noise_table(comparison),
        result_table(comparison),
        warning(max(cost.get("busy", 0.0) for cost in comparison.costs.values())),
    ]
    return Section(
        comparison.name,
        comparison.title,
        [part for part in parts if part],
        _made_on(comparison),
        comparison.manifest,
        {"Signal to noise, leaf by leaf": [leaf_table(shown[name]) for name in names]},
    )


def _made_on(comparison: Comparison) -> str:
    """Says where the numbers come from."""
    config = comparison.manifest["config"]
    search = "rates given, not searched"
    if config["trials"]:
        search = f"{config['trials']} trials of {comparison.steps} steps"
    how = (
        f"Batches of {config['batch_size']}, {config['schedule']}, "
        f"losses of at most {config['eval_examples']} examples, {search}, "
        f"{config['seeds']} seeds, {POINTS} points on a curve."
    )
    return made_on(comparison.manifest, how)


def cost_table(comparison: Comparison) -> Table:
    """Makes the table of what a step costs."""
    rows = []
    for name, cost in comparison.costs.items():
        result = next((r for r in comparison.results if r.entry.name == name), None)
        seconds, ratio = cost["seconds"], cost["ratio"]
        rows.append(
            [
                "bare forward pass" if result is None else comparison.label(result.entry),
                milliseconds_quartiles(seconds),
                f"{ratio['median']:.2f}",
                mebibytes(cost["temp_bytes"]),
            ]
        )
    rounds = comparison.costs["bare"]["seconds"]["n"]
    columns = ["estimator", "ms a step (quartiles)", "R", "XLA temp, MiB"]
    return Table(f"{comparison.title}: cost of a step ({rounds} rounds)", columns, rows)


def noise_table(comparison: Comparison) -> Table:
    """Makes the table of the bias and the variance of each estimator."""
    rows, shown = [], set()
    for result in comparison.results:
        d = result.diagnosis
        if result.entry.estimator in shown:
            continue
        shown.add(result.entry.estimator)
        rows.append(
            [
                result.entry.estimator,
                f"{d['cosine']['value']:.2g}",
                _measured(d["projection"]),
                _bias(d),
                _measured(d["variance"]),
                _bound(d["learning_rate_bound"]),
            ]
        )
    columns = ["estimator", "cosine", "projection", "bias", "variance", "rate bound"]
    parameters = comparison.results[0].diagnosis["num_parameters"]
    numbers = ", ".join(
        f"{n} of {e}" for e, n in comparison.manifest["config"]["estimates"].items()
    )
    return Table(
        f"Bias and variance at the start; {parameters:,} parameters; estimates: {numbers}",
        columns,
        rows,
    )


def _measured(x: dict[str, Any]) -> str:
    if abs(x["value"]) < _ROUNDING:
        return "0"
    if x["error"] <= _ROUNDING:
        return f"{x['value']:.3g}"
    return f"{x['value']:.2g} ± {x['error']:.0g}"


def _bound(x: dict[str, Any]) -> str:
    """Formats a rate bound, or "unclear" if noise hides its curvature."""
    return "unclear" if x["value"] is None or x["error"] > x["value"] / 2 else _measured(x)


def _bias(diagnosis: dict[str, Any]) -> str:
    bias = diagnosis["bias_squared"]
    if diagnosis["bias_detected"]:
        return _measured(bias)
    least = bias["value"] + 4 * bias["error"]
    return f"< {least:.2g}" if least > _ROUNDING else "0"


def result_table(comparison: Comparison) -> Table:
    """Makes the table of what each entry reached."""
    rows = []
    for result in comparison.results:
        if (o := result.outcome) is None:
            continue
        rows.append(
            [
                comparison.label(result.entry),
                f"{o.learning_rate:.2g}{' (edge)' if result.at_edge else ''}",
                spread_text(o.final_loss),
                spread_text(o.final_accuracy, percent=True),
                spread_text(result.at_equal_time),
                ratio_text(o),
                ended_text(o),
            ]
        )
    after = f"loss after {comparison.steps} steps"
    columns = [
        "estimator",
        "rate",
        after,
        "accuracy",
        f"loss after {comparison.equal_seconds:.3g} s",
        "T",
        "seeds",
    ]
    return Table("Held-out loss at equal steps and at equal time", columns, rows)


def leaf_table(result: Result) -> Table:
    """Makes the table of signal to noise of an estimator, leaf by leaf."""
    rows = []
    for leaf in result.diagnosis["leaves"]:
        ratio, bias = leaf["signal_to_noise"], leaf["bias_squared"]
        rows.append(
            [
                leaf["path"],
                f"{leaf['size']:,}",
                f"{leaf['gradient_share']:.1%}",
                "no noise"
                if ratio["value"] is None
                else f"{ratio['value']:.2g} ± {ratio['error']:.0g}",
                MISSING if bias["value"] is None else _measured(bias),
            ]
        )
    columns = ["leaf", "size", "share of |grad|²", "signal to noise", "bias"]
    return Table(f"{result.entry.estimator}: leaf by leaf", columns, rows)


def conclusion(comparison: Comparison) -> str:
    """Says what the figures show."""
    final = [(r, r.outcome.final_loss) for r in comparison.trained if r.outcome]
    said = [
        _ranking(comparison, f"After {comparison.steps} steps each", final),
        _ranking(
            comparison,
            f"After {comparison.equal_seconds:.3g} s of steps each",
            [(r, r.at_equal_time) for r in comparison.results],
        ),
        _UNEQUAL if comparison.falls_to_zero else "",
    ]
    biased = dict.fromkeys(
        r.entry.estimator for r in comparison.results if r.diagnosis["bias_detected"]
    )
    said.append(f"Bias was seen in {', '.join(biased)}." if biased else "Bias was seen in none.")
    if edges := [comparison.label(r.entry) for r in comparison.trained if r.at_edge]:
        said.append(
            f"The rate found for {', '.join(edges)} is at the edge of the search: "
            "a better one may lie beyond."
        )
    said += [
        divergence_text(r.outcome, comparison.label(r.entry))
        for r in comparison.trained
        if r.outcome and r.outcome.diverged
    ]
    return " ".join(filter(None, said))


def _ranking(comparison: Comparison, when: str, losses: list[tuple[Result, Spread | None]]) -> str:
    found = sorted(
        ((loss.mean, comparison.label(r.entry)) for r, loss in losses if loss), key=lambda x: x[0]
    )
    if not found:
        return ""
    rest = (
        f" ({'; '.join(f'{label} {loss:.3g}' for loss, label in found[1:])})" if found[1:] else ""
    )
    return f"{when}, the least held-out loss is that of {found[0][1]}, {found[0][0]:.3g}{rest}."
