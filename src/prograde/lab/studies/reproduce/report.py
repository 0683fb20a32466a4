"""The report of `prograde reproduce`, from records alone."""

from prograde.lab.models import Surface
from prograde.lab.report import Report, Section, Table
from prograde.lab.report.words import made_on, mebibytes, milliseconds_quartiles, warning
from prograde.lab.store import Store
from prograde.lab.studies.reproduce.experiments import (
    EXPERIMENTS,
    METHOD_TITLES,
    Experiment,
)
from prograde.lab.studies.reproduce.figures import figure
from prograde.lab.studies.reproduce.summary import Summary, summarise
from prograde.lab.training.outcomes import (
    Outcome,
    divergence_text,
    ended_text,
    ratio_text,
    spread_text,
)

_INTRODUCTION = (
    "Training by forward gradients, compared with backprop: the experiments of “Gradients "
    "without Backpropagation” (arXiv 2202.08587), run again. Figures marked “reported” are the "
    "paper's, at second hand; all others were measured here."
)
_TERMS = (
    "The methods: forward is the paper's estimator, a dense normal tangent; low-rank is a rank-one "
    "tangent, which is a vector of signs where the parameters are a vector; checkpointed is "
    "backprop that recomputes activations; bare is the forward pass alone. R is the time of a full "
    "training step divided by that of a bare forward pass on the same batches: all methods take "
    "turns in one run, and R is the median of the rounds' ratios. T is the time a method takes to "
    "reach the best held-out loss of backprop, divided by the time backprop takes, both at the "
    "same setting. Time is steps times the measured median cost of a step, and T is the median "
    "over the seeds. “> x” means that the median seed does not get there in a run of x times "
    "backprop's time (all methods run for the same number of steps). “paper” is the paper's "
    "learning rate, the same for all methods; “tuned” is a rate found for each method by a "
    "search of the same budget. Held-out is the data's test part; the search uses a validation "
    "part taken from the training data. All runs are plain SGD with the rate eta_0 exp(-1e-4 t). "
    "Losses are means over seeds, with the least and the greatest."
)


def report(stores: list[Store]) -> Report:
    """Shows each experiment in a section, in the paper's order."""
    order = list(EXPERIMENTS)
    summaries = sorted(map(summarise, stores), key=lambda s: order.index(s.experiment.name))
    sections = list(map(_section, summaries))
    return Report("Training without backpropagation", _INTRODUCTION, _TERMS, sections)


def _section(summary: Summary) -> Section:
    costs = [*summary.costs.values()]
    costs += [cost for depth in summary.depths.values() for cost in depth["costs"].values()]
    busy = max((cost.get("busy", 0.0) for cost in costs), default=None)
    found = [_conclusion(summary), figure(summary), *tables(summary), warning(busy)]
    return Section(
        summary.experiment.name,
        summary.experiment.title,
        [part for part in found if part],
        _made_on(summary),
        summary.manifest,
    )


def _reported_ratio(experiment: Experiment, outcome: Outcome) -> str:
    rates = dict(zip(experiment.paper_rates, experiment.reported.t_ratio, strict=False))
    if (
        outcome.method != "forward"
        or outcome.setting == "tuned"
        or outcome.learning_rate not in rates
    ):
        return ""
    return f"{rates[outcome.learning_rate]:g}"


def training_table(summary: Summary) -> Table:
    """Makes the table of what each method reached at each setting."""
    rows = []
    for o in summary.outcomes:
        rows.append(
            [
                o.setting,
                o.method,
                f"{o.learning_rate:.2g}",
                spread_text(o.final_loss),
                spread_text(o.final_accuracy, percent=True),
                ratio_text(o),
                _reported_ratio(summary.experiment, o),
                ended_text(o),
            ]
        )
    columns = ["setting", "method", "rate", "held-out loss", "accuracy", "T", "reported", "seeds"]
    if isinstance(summary.experiment.subject, Surface):
        keep = [i for i, c in enumerate(columns) if c not in ("accuracy", "T", "reported")]
        columns, rows = [columns[i] for i in keep], [[row[i] for i in keep] for row in rows]
        columns[columns.index("held-out loss")] = "final f"
    return Table(f"{summary.experiment.title}: what was reached", columns, rows)


def cost_table(summary: Summary) -> Table:
    """Makes the table of what a step of each method costs."""
    reported = {
        "forward": summary.experiment.reported.r_f,
        "backprop": summary.experiment.reported.r_b,
    }
    rows = []
    for method, cost in summary.costs.items():
        seconds, ratio, memory = cost["seconds"], cost["ratio"], summary.memory.get(method, {})
        rss = (memory.get("peak_rss"), memory.get("rss_before"))
        rows.append(
            [
                method,
                milliseconds_quartiles(seconds),
                f"{ratio['median']:.2f}",
                f"{reported[method]:g}" if reported.get(method) else "",
                mebibytes(memory.get("temp_bytes")),
                mebibytes(rss[0]),
            ]
        )
    columns = ["method", "ms a step (quartiles)", "R", "reported", "XLA temp, MiB", "peak RSS, MiB"]
    if not summary.memory:
        columns, rows = columns[:3], [row[:3] for row in rows]
    n = next(iter(summary.costs.values()))["seconds"]["n"]
    return Table(f"{summary.experiment.title}: cost of a step ({n} rounds)", columns, rows)


def depth_tables(summary: Summary) -> list[Table]:
    """Makes the tables of cost and of memory against depth."""
    methods = [m for m in METHOD_TITLES if m != "bare"]
    times, memories = [], []
    for depth, figures in sorted(summary.depths.items()):
        ratio = {m: figures["costs"][m]["ratio"]["median"] for m in methods}
        bare = f"{1e3 * figures['costs']['bare']['seconds']['median']:.3g}"
        quotients = [f"{ratio[m] / ratio['backprop']:.2f}" for m in ("forward", "low-rank")]
        times.append([str(depth), bare, *(f"{ratio[m]:.2f}" for m in methods), *quotients])
        memory = figures["memory"]
        memories.append(
            [
                str(depth),
                *(mebibytes(memory[m]["temp_bytes"]) for m in METHOD_TITLES),
                *(mebibytes(memory[m]["peak_rss"]) for m in METHOD_TITLES),
            ]
        )
    rounds = next(iter(summary.depths.values()))["costs"]["bare"]["seconds"]["n"]
    reported = f"reported: {summary.experiment.reported.note}"
    time_columns = [
        "layers",
        "bare, ms",
        *(f"R {m}" for m in methods),
        "forward/backprop",
        "low-rank/backprop",
    ]
    memory_columns = [
        "layers",
        *(f"temp {m}" for m in METHOD_TITLES),
        *(f"RSS {m}" for m in METHOD_TITLES),
    ]
    return [
        Table(f"{summary.experiment.title} ({rounds} rounds; {reported})", time_columns, times),
        Table(
            "Memory of a step, MiB: what XLA needs in addition to arguments, and peak RSS",
            memory_columns,
            memories,
        ),
    ]


def tables(summary: Summary) -> list[Table]:
    """Makes all tables of an experiment."""
    if summary.depths:
        return depth_tables(summary)
    found = [training_table(summary)] if summary.outcomes else []
    return [*found, *([cost_table(summary)] if summary.costs else [])]


def _conclusion(summary: Summary) -> str:
    """Says which figures agree with the paper and which do not."""
    if summary.depths:
        return _depth_conclusion(summary)
    if isinstance(summary.experiment.subject, Surface):
        return _surface_conclusion(summary)
    said = _cost_conclusion(summary)
    for o in summary.outcomes:
        claim = _reported_ratio(summary.experiment, o)
        if claim and o.compared:
            rate = f"rate {o.learning_rate:g} (reported T {claim})"
            said.append(f"At {rate}, {_reached(o)}: {_verdict(o)}.")
        elif o.setting == "tuned" and o.method != "backprop" and o.compared:
            said.append(f"With both tuned, {o.method}: {_reached(o)}.")
        if o.diverged:
            said.append(_divergence(o))
    return " ".join(said)


def _cost_conclusion(summary: Summary) -> list[str]:
    reported = summary.experiment.reported
    if not (summary.costs and reported.r_f and reported.r_b):
        return []
    r = {m: c["ratio"]["median"] for m, c in summary.costs.items()}
    share = {m: f"{r[m] / r['backprop']:.2f} of a backprop step" for m in ("forward", "low-rank")}
    confirmed = "confirmed" if r["forward"] < r["backprop"] else "not confirmed"
    return [
        f"The paper's estimator costs {r['forward']:.2f} bare forward passes here "
        f"(reported {reported.r_f:g}), backprop {r['backprop']:.2f} (reported {reported.r_b:g}), "
        f"the rank-one tangent {r['low-rank']:.2f}.",
        f"That a dense forward-gradient step is cheaper than a backprop step is {confirmed}: "
        f"it takes {share['forward']}; the rank-one step takes {share['low-rank']}.",
    ]


def _reached(o: Outcome) -> str:
    if o.time_ratio is not None:
        return f"T is {o.time_ratio:.2f}"
    if o.time_bound is not None:
        times = f"{o.time_bound:.2f} times backprop's time"
        return f"backprop's best loss was not reached in a run of {times}"
    return "backprop's best loss was not reached before the run diverged"


def _verdict(o: Outcome) -> str:
    if o.time_ratio is not None and o.time_ratio < 1:
        return "this agrees with a T below 1"
    if o.time_ratio is None and o.time_bound is not None and o.time_bound < 1:
        return "this does not decide whether T is below 1"
    return "this disagrees with a T below 1"


def _divergence(o: Outcome) -> str:
    return divergence_text(o, f"{o.method} at its {o.setting} rate")


def _surface_conclusion(summary: Summary) -> str:
    said = []
    finals = {(o.setting, o.method): o.final_loss for o in summary.outcomes}
    for setting in dict.fromkeys(o.setting for o in summary.outcomes):
        forward, backprop = finals.get((setting, "forward")), finals.get((setting, "backprop"))
        if forward and backprop:
            spread = f"mean of {forward.n}; {forward.low:.2g} to {forward.high:.2g}"
            said.append(
                f"At the {setting} rate, forward gradients end at f = {forward.mean:.2g} "
                f"({spread}), gradient descent at {backprop.mean:.2g}."
            )
    said += [_divergence(o) for o in summary.outcomes if o.diverged]
    return " ".join(said)


def _depth_conclusion(summary: Summary) -> str:
    least, most = min(summary.depths), max(summary.depths)

    def ratio(method: str, depth: int) -> float:
        costs = summary.depths[depth]["costs"]
        return costs[method]["ratio"]["median"] / costs["backprop"]["ratio"]["median"]

    def temp(method: str) -> str:
        found = (summary.depths[d]["memory"][method]["temp_bytes"] for d in (least, most))
        return " to ".join(map(mebibytes, found))

    def range_of(method: str) -> str:
        found = [summary.depths[d]["costs"][method]["ratio"]["median"] for d in summary.depths]
        return f"{min(found):.1f} to {max(found):.1f}"

    low_rank = [ratio("low-rank", d) for d in summary.depths]
    return (
        f"Reported: {summary.experiment.reported.note}. "
        f"Here R_f of the paper's estimator is {range_of('forward')}, R_b is "
        f"{range_of('backprop')}, and R of the rank-one tangent {range_of('low-rank')}, "
        f"{min(low_rank):.2f} to {max(low_rank):.2f} of R_b. "
        f"The paper's estimator takes {ratio('forward', least):.1f} times as long as backprop at "
        f"{least} layers and {ratio('forward', most):.1f} times at {most}; the rank-one tangent "
        f"{ratio('low-rank', least):.2f} and {ratio('low-rank', most):.2f} times. "
        f"From {least} to {most} layers the temporary memory of a rank-one step goes from "
        f"{temp('low-rank')} MiB, of backprop from {temp('backprop')}, of the dense tangent from "
        f"{temp('forward')}."
    )


def _made_on(summary: Summary) -> str:
    """Says where the numbers come from, and which rates the search found."""
    data = summary.manifest["config"]["data"]
    said = [f"Data: {data['name']}."] if data else []
    found = []
    for method, search in summary.searches.items():
        trials = search["trials"]
        rates = [trial["learning_rate"] for trial in trials]
        edge = " (the edge of the search)" if search["best"] in (min(rates), max(rates)) else ""
        if all(trial["loss"] is None for trial in trials):
            edge = " (all trials diverged)"
        found.append(
            f"{method} {search['best']:.2g}{edge} of {len(rates)} trials of {search['steps']} steps"
        )
    said += [f"Rates found: {'; '.join(found)}."] if found else []
    return made_on(summary.manifest, *said)
