"""The command line: `prograde reproduce`, `report`, `compare`, `bench`, `beyond`, `list`."""

import contextlib
import dataclasses
import datetime
import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

try:
    import tyro
except ImportError as error:  # installed without the extra
    raise SystemExit(
        f"prograde: the command line needs more packages ({error.name}). pip install 'prograde[lab]'"
    ) from None

from prograde.lab import cli_beyond, cli_finetune

# XLA hands single convolutions on a CPU to a library whose backward pass is slow; without it backprop of the CNN is
# much faster. Every comparison gives backprop the faster setting. The option is known to exist in jaxlib 0.10 only,
# and XLA ends the process on an option it does not know.
_FASTER_CONVOLUTIONS = (
    "--xla_cpu_experimental_ynn_fusion_type=-LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION"
)

_DESCRIPTION = """Training without backpropagation: the experiments of "Gradients without Backpropagation" (arXiv 2202.08587),
beside backprop, on this machine.

  prograde reproduce                      all six experiments, quickly, on handwritten digits that come with the package
  prograde reproduce beale rosenbrock     only these
  prograde reproduce --data mnist --full  the real thing, on MNIST; hours
  prograde report runs/NAME               the report again, from the records alone
  prograde compare --model transformer    estimators beside each other: cost, memory, bias, variance, what they reach
  prograde beyond newton stream           where reverse mode cannot go: loops, streams, long horizons, hyperparameters
  prograde finetune --model smollm2 --data reviews.csv   a language model learns, at the memory of inference
  prograde replay smollm2 replay.log -o DIR   its weights again, from a log of a few kilobytes; inspect shows the log
  prograde bench mlp transformer          what a step costs, beside backprop in JAX and in PyTorch
  prograde launch --processes 2 -- reproduce mlp    in processes that share each batch and exchange scalars
  prograde list                           experiments, methods, and what the paper reports

What is stopped, by Ctrl-C or otherwise, is continued by the same command with --out DIR --resume."""


_LENGTH = tyro.conf.create_mutex_group(required=False, title="length")
_DURATION = tyro.conf.create_mutex_group(required=False, title="duration")


@dataclass(frozen=True)
class Reproduce:
    """Run experiments of the paper and write a report.

    Every experiment measures what a step costs, searches a learning rate for each method with the same budget, and trains
    by the paper's estimator, by rank-one forward gradients and by backprop, at the paper's rate and at the rate found.
    """

    experiments: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[NAME ...]")
    ] = ("all",)
    """Names of experiments (see `prograde list`), or all."""
    data: Annotated[str, tyro.conf.arg(metavar="digits|mnist|DIR")] = "digits"
    """digits (comes with the package), mnist (data directory, cache, or download), or a directory of idx files."""
    data_dir: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Where the MNIST files are; without it PROGRADE_DATA_DIR, then the cache, then the public mirrors."""
    quick: Annotated[bool, _LENGTH] = False
    """Minutes; the default."""
    full: Annotated[bool, _LENGTH] = False
    """The better part of an hour or more: long runs, several seeds, many rounds of timing."""
    seeds: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Runs of each method and setting; by default as many as the length affords."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Where the records and the report go; by default runs/DATE-TIME-DATA-LENGTH."""
    resume: bool = False
    """Continue what is in --out. The numbers are those of a run that was never stopped."""
    distributed: bool = False
    """Share each batch with the other processes of a group, found at JAX_COORDINATOR_ADDRESS; see `prograde launch`."""


@dataclass(frozen=True)
class Launch:
    """Run a command in several processes on this machine, which share each batch and exchange a few bytes a step.

    - prograde launch --processes 2 -- reproduce mlp
    - under SLURM, Open MPI or Kubernetes, start the command itself, with --distributed, in every process

    When one is killed the others stop; the same command with --out DIR --resume goes on from the logs.
    """

    command: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="-- COMMAND ...")
    ] = ()
    """What to run: a command that takes --distributed, after two dashes."""
    processes: Annotated[int, tyro.conf.arg(metavar="N")] = 2
    """How many; each gets its share of the cores."""
    coordinator: Annotated[str | None, tyro.conf.arg(metavar="HOST:PORT")] = None
    """What the first process listens at; by default a free port of 127.0.0.1. Whoever reaches it can join: private networks only."""


@dataclass(frozen=True)
class Report:
    """Build report.html again, from records alone."""

    directories: Annotated[
        tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="DIR [DIR ...]")
    ]
    """Directories of records; several are shown on one page."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Where report.html goes; by default into the first directory."""
    markdown: Annotated[Path | None, tyro.conf.arg(metavar="PAGE")] = None
    """Write figures and tables into this page of a documentation instead, between the marks it holds."""


@dataclass(frozen=True)
class Compare:
    """Compare gradient estimators on one model, each with a learning rate of its own.

    Each is timed in turns with the others; its memory, and its bias and variance at the start are measured; a learning rate
    is searched with the same budget, and it is trained for several seeds. Ends with held-out losses at equal steps and at
    equal time, a report page, and the frontiers of loss against time and against memory.
    """

    model: Annotated[
        str, tyro.conf.arg(metavar="mlp|cnn|mixer|transformer|local-mixer-s|local-mixer-m")
    ] = "mlp"
    """What is trained."""
    data: Annotated[str, tyro.conf.arg(metavar="digits|mnist|DIR")] = "digits"
    """digits (comes with the package), mnist (data directory, cache, or download), or a directory of idx files."""
    data_dir: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Where the MNIST files are; without it PROGRADE_DATA_DIR, then the cache, then the public mirrors."""
    estimators: Annotated[tuple[str, ...], tyro.conf.arg(metavar="[NAME ...]")] = ()
    """Names of estimators (see `prograde list`), or all; by default backprop and weight perturbations."""
    optimizers: Annotated[tuple[str, ...], tyro.conf.arg(metavar="[sgd|adam ...]")] = ("sgd",)
    """What follows the estimate, the same for all; with both, each estimator is tuned and trained with each."""
    rates: Annotated[tuple[float, ...], tyro.conf.arg(metavar="[RATE ...]")] = ()
    """Learning rates in place of the search, one for all or one for each of --estimators; searched for when not given."""
    minutes: Annotated[float | None, _DURATION, tyro.conf.arg(metavar="M")] = None
    """Runs and trials are as long as fits into so many minutes in all; 2.5 when neither this nor --steps is given."""
    steps: Annotated[int | None, _DURATION, tyro.conf.arg(metavar="N")] = None
    """Steps of each run and of each trial of the search."""
    seeds: Annotated[int, tyro.conf.arg(metavar="N")] = 3
    """Runs of each estimator at the rate found."""
    estimates: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """How many gradients bias and variance are measured with; by default 100, and 24 for the CNN."""
    batch_size: Annotated[int, tyro.conf.arg(metavar="N")] = 64
    """Examples a step, of all steps that are timed, searched and trained."""
    schedule: Annotated[str, tyro.conf.arg(metavar="exp|cosine")] = "exp"
    """How the rate falls: by exp(-1e-4 t), the paper's, or along a cosine to zero at the end of a run; the same for all."""
    eval_examples: Annotated[int, tyro.conf.arg(metavar="N")] = 2000
    """Of how many test images, at most, held-out loss and accuracy are the mean; as many of the validation part judge a rate."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Where the records and the report go; by default runs/DATE-TIME-compare-MODEL-DATA."""
    resume: bool = False
    """Continue what is in --out."""
    from_: Annotated[Path | None, tyro.conf.arg(name="from", metavar="DIR")] = None
    """Run nothing; show these records and build their page again."""


@dataclass(frozen=True)
class Bench:
    """Measure what a training step costs by each method, in time, memory and compilation.

    Forward gradients with 1, 4 and 16 tangents, backprop (plain, checkpointed, unrolled), a dense tangent through jax.jvp
    and MeZO, all as plain SGD steps in turns; where PyTorch is installed, its forward pass, backprop (eager and compiled)
    and torch.func.jvp take turns with them.

    - prograde bench: all models; the better part of an hour
    - prograde bench mlp cnn --rounds 5 --no-memory: a first look
    - prograde bench --from records/bench.json: the tables of a record
    - prograde bench --from records/bench.json --markdown docs/benchmarks.md: and the page
    """

    models: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[MODEL ...]")
    ] = ("all",)
    """Names of models, or all: logreg, mlp, mlp-512, cnn, resnet, transformer, smollm2."""
    rounds: Annotated[int, tyro.conf.arg(metavar="N")] = 20
    """How often each method is timed."""
    no_memory: bool = False
    """Leave out the memory of processes, which takes a process for each method."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE|DIR")] = None
    """Where the record goes; by default runs/bench/DATE-TIME.json. Other models may be added to a record."""
    from_: Annotated[Path | None, tyro.conf.arg(name="from", metavar="FILE")] = None
    """Measure nothing; show this record."""
    markdown: Annotated[Path | None, tyro.conf.arg(metavar="PAGE")] = None
    """Write figure and tables into this page of a documentation, between the marks it holds."""


@dataclass(frozen=True)
class List:
    """List the experiments, the methods, what the paper reports for each, and the estimators that `compare` knows."""


def say(console, text: str) -> None:
    """Prints a sentence as it is, however long."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


class UsageError(ValueError):
    """A command that cannot be carried out as given."""


def main() -> None:
    """The entry point of the command line. Exits with 2 on a bad request, 130 on Ctrl-C."""
    from rich.console import Console

    if sys.argv[1:] == ["--version"]:
        print(f"prograde {metadata.version('prograde')}")
        return
    commands = {
        "reproduce": Reproduce,
        "report": Report,
        "compare": Compare,
        "bench": Bench,
        "launch": Launch,
    }
    commands |= {"beyond": cli_beyond.Beyond}
    language = {
        "finetune": cli_finetune.Finetune,
        "replay": cli_finetune.Replay,
        "inspect": cli_finetune.Inspect,
    }
    arguments = sys.argv[1:]
    # what follows two dashes is a command of its own
    cut = (
        arguments.index("--")
        if arguments[:1] == ["launch"] and "--" in arguments
        else len(arguments)
    )
    launched: tuple[str, ...] = tuple(arguments[cut + 1 :])
    command = tyro.extras.subcommand_cli_from_dict(
        commands | language | {"list": List},
        args=arguments[:cut],
        prog="prograde",
        description=_DESCRIPTION,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
    )
    console, errors = Console(), Console(stderr=True)
    from prograde.lab.data import DataError
    from prograde.lab.records import RecordError

    try:
        if isinstance(command, List):
            _list(console)
        elif isinstance(command, Launch):
            raise SystemExit(
                _launch(dataclasses.replace(command, command=command.command + launched), errors)
            )
        elif isinstance(command, Report):
            _report(command, console)
        elif isinstance(command, tuple(language.values())):
            _language(command, console, errors)
        else:
            {Reproduce: _reproduce, Compare: _compare, Bench: _bench, cli_beyond.Beyond: _beyond}[
                type(command)
            ](command, console, errors)
    except (DataError, RecordError, UsageError) as error:
        say(errors, f"prograde: {error}")
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except OSError as error:
        say(errors, f"prograde: {error}")
        raise SystemExit(1) from None


def _launch(command: Launch, errors) -> int:
    from prograde.lab.launch import launch

    words = list(command.command)
    if words[:1] != ["reproduce"]:
        given = f"{shlex.join(words)!r}" if words else "nothing"
        raise UsageError(
            f"launch runs `reproduce`, and was given {given}: prograde launch --processes 2 -- reproduce mlp"
        )
    if command.processes < 1:
        raise UsageError(f"--processes {command.processes}: at least 1 is needed.")
    if not any(word == "--out" or word.startswith("--out=") for word in words):
        stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        words += ["--out", f"runs/{stamp}-{command.processes}-workers"]
    program = [sys.executable, "-m", "prograde.lab.cli", *words, "--distributed"]
    status = launch(
        program,
        command.processes,
        command.coordinator,
        lambda text: say(errors, f"prograde: {text}"),
    )
    if status not in (0, 2):
        again = words if "--resume" in words else [*words, "--resume"]
        options = ["--processes", str(command.processes)]
        if command.coordinator is not None:
            options += ["--coordinator", command.coordinator]
        say(errors, f"To continue: {shlex.join([*_program(), 'launch', *options, '--', *again])}")
    return status


def _language(
    command: cli_finetune.Finetune | cli_finetune.Replay | cli_finetune.Inspect, console, errors
) -> None:
    try:
        from prograde import lm
    except ImportError as error:
        raise UsageError(
            f"language models need more packages ({error.name}). pip install 'prograde[lm]'"
        ) from None
    from prograde.lab.display import Display
    from prograde.lab.finetune_run import DivergedError, MemoryLimitError
    from prograde.replay import LogError

    @contextlib.contextmanager
    def refusals() -> Iterator[None]:
        try:
            yield
        except (lm.ModelError, LogError, MemoryLimitError, DivergedError, ValueError) as error:
            raise UsageError(str(error)) from None

    if isinstance(command, cli_finetune.Inspect):
        with refusals():
            cli_finetune.inspect(command, console)
    elif isinstance(command, cli_finetune.Replay):
        with refusals():
            cli_finetune.replay(command, Display(console))
    else:
        out = command.out
        if out is None:
            out = (
                Path("runs")
                / f"{datetime.datetime.now():%Y%m%d-%H%M%S}-finetune-{Path(command.model).stem}"
            )
        say(console, f"Records go to {out}.")
        with _continued(command, out, errors), refusals():
            cli_finetune.finetune(command, out, Display(console))


def _use_faster_convolutions() -> None:
    """Before jax is imported."""
    if metadata.version("jaxlib").startswith("0.10."):
        os.environ["XLA_FLAGS"] = (
            f"{os.environ.get('XLA_FLAGS', '')} {_FASTER_CONVOLUTIONS}".strip()
        )


def _reproduce(command: Reproduce, console, errors) -> None:
    _use_faster_convolutions()
    from rich.console import Console

    from prograde.lab import report, reproduce
    from prograde.lab.data import BATCH_SIZE, load
    from prograde.lab.display import Display
    from prograde.lab.experiments import EXPERIMENTS

    possible = [
        name for name, e in EXPERIMENTS.items() if callable(e.subject) or not command.distributed
    ]
    names = list(dict.fromkeys(command.experiments)) or ["all"]
    if "all" in names:
        names = [name for name in names if name not in EXPERIMENTS and name != "all"] + possible
    if unknown := [name for name in names if name not in EXPERIMENTS]:
        raise UsageError(
            f"unknown experiment {', '.join(unknown)}. Valid names: all, {', '.join(EXPERIMENTS)}."
        )
    if command.seeds is not None and command.seeds < 1:
        raise UsageError(f"--seeds {command.seeds}: at least 1 is needed.")
    _check_common(command)
    if alone := [name for name in names if name not in possible]:
        raise UsageError(
            f"{', '.join(alone)} has no batch that --distributed could share. Valid names: all, {', '.join(possible)}."
        )
    worker = 0
    if command.distributed:
        if command.out is None:
            raise UsageError("--distributed needs --out DIR, the same for all processes.")
        worker = _join(BATCH_SIZE)
        console = Console(quiet=True) if worker else console
    chosen = [EXPERIMENTS[name] for name in names]
    data = (
        load(command.data, command.data_dir) if any(callable(e.subject) for e in chosen) else None
    )
    length = "full" if command.full else "quick"
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    out = command.out or Path("runs") / f"{stamp}-{data.name if data else 'functions'}-{length}"
    if worker:  # each has its own records, of the same numbers
        out = out / "workers" / str(worker)
    say(console, f"Records go to {out}.")
    with _continued(command, out, errors):
        reproduce.run_all(
            chosen,
            data,
            command.full,
            command.seeds,
            out,
            command.resume,
            Display(console),
            command.distributed,
        )
    if worker:
        return
    report.print_tables(report.find([out]), console)
    say(console, f"Report: {report.build([out], out)}")


def _join(batch_size: int) -> int:
    """Joins the other processes; the number of this one."""
    import jax

    import prograde as pg
    from prograde.lab.workers import TIMEOUT

    try:
        pg.distributed.initialize(timeout=TIMEOUT)
    except (ValueError, pg.distributed.StartError) as error:
        raise UsageError(str(error)) from None
    if batch_size % jax.device_count():
        raise UsageError(
            f"{jax.device_count()} devices do not divide a batch of {batch_size}. Start another number of processes."
        )
    return jax.process_index()


def _check_common(command: Reproduce | Compare) -> None:
    if command.resume and command.out is None:
        raise UsageError("--resume needs --out DIR, the directory to continue.")
    if command.data_dir is not None and command.data != "mnist":
        raise UsageError(
            f"--data-dir {command.data_dir} goes with --data mnist only; this is --data {command.data}."
        )


@contextlib.contextmanager
def _continued(
    command: Reproduce | Compare | cli_beyond.Beyond | cli_finetune.Finetune, out: Path, errors
) -> Iterator[None]:
    """Says how to continue what is stopped."""
    from prograde.lab.records import RecordError

    again = _command_line(dataclasses.replace(command, out=out, resume=True))
    try:
        yield
    except KeyboardInterrupt:
        if getattr(command, "distributed", False):
            os._exit(130)
        say(errors, f"\nStopped; the records are complete. To continue: {again}")
        raise SystemExit(130) from None
    except (OSError, RuntimeError) as error:
        if isinstance(error, RecordError) or (
            type(error).__module__ != "builtins" and not isinstance(error, OSError)
        ):
            raise
        if getattr(command, "distributed", False):
            say(errors, f"prograde: this worker cannot go on: {error}")
            os._exit(1)  # not waiting for one that is gone
        say(
            errors, f"prograde: {error}\nWhat was recorded before is complete. To continue: {again}"
        )
        raise SystemExit(1) from None


def _program() -> list[str]:
    if sys.argv[0].endswith(".py"):
        return [sys.executable, "-m", "prograde.lab.cli"]
    # as it was called: `make` calls a program that need not be on the path
    found = shutil.which("prograde")
    return ["prograde" if found and Path(found).samefile(sys.argv[0]) else sys.argv[0]]


def _command_line(command: Reproduce | Compare | cli_beyond.Beyond | cli_finetune.Finetune) -> str:
    words = [*_program(), type(command).__name__.lower(), *getattr(command, "experiments", ())]
    for field in dataclasses.fields(command):
        value = getattr(command, field.name)
        if field.name != "experiments" and value not in (None, field.default):
            values = value if isinstance(value, tuple) else () if value is True else (value,)
            words += [f"--{field.name.replace('_', '-')}", *map(str, values)]
    return shlex.join(words)


def _report(command: Report, console) -> None:
    from prograde.lab import report

    if not command.directories:
        raise UsageError("report needs at least one directory of records.")
    if command.markdown is not None:
        report.write_markdown(list(command.directories), command.markdown)
        say(console, f"Figures and tables are in {command.markdown}")
        return
    path = report.build(list(command.directories), command.out or command.directories[0])
    report.print_tables(report.find(list(command.directories)), console)
    say(console, f"Report: {path}")


def _compare(command: Compare, console, errors) -> None:
    _use_faster_convolutions()
    from prograde.lab import compare, compare_report
    from prograde.lab.data import load
    from prograde.lab.display import Display

    if command.from_ is not None:
        if dataclasses.replace(command, from_=None) != Compare():
            raise UsageError("--from DIR shows records and runs nothing; it takes no other option.")
        out = command.from_
    else:
        _check_common(command)
        every = compare.Plan.every_estimator(command.model)
        names = every if "all" in command.estimators else command.estimators or compare.DEFAULT
        command = dataclasses.replace(command, estimators=tuple(names))
        chosen: dict[str, Any] = {
            f.name: getattr(command, f.name) for f in dataclasses.fields(compare.Plan)
        }
        try:
            plan = compare.Plan(**chosen)
        except ValueError as error:
            raise UsageError(str(error)) from None
        data = load(command.data, command.data_dir)
        out = (
            command.out
            or Path("runs")
            / f"{datetime.datetime.now():%Y%m%d-%H%M%S}-compare-{plan.model}-{data.name}"
        )
        say(console, f"Records go to {out}.")
        with _continued(command, out, errors):
            compare.run(plan, data, out, command.resume, Display(console))
    compare_report.print_tables(compare_report.read(out), console)
    say(console, f"Report: {compare_report.build(out)}")


def _bench(command: Bench, console, errors) -> None:
    _use_faster_convolutions()
    from prograde.lab import bench, bench_report, records
    from prograde.lab.bench_methods import cores
    from prograde.lab.display import Display
    from prograde.lab.workloads import WORKLOADS

    names = list(dict.fromkeys(command.models)) or ["all"]
    if "all" in names:
        names = [name for name in names if name not in WORKLOADS and name != "all"] + list(
            WORKLOADS
        )
    if unknown := [name for name in names if name not in WORKLOADS]:
        raise UsageError(
            f"unknown model {', '.join(unknown)}. Valid names: all, {', '.join(WORKLOADS)}."
        )
    if command.rounds < 1:
        raise UsageError(f"--rounds {command.rounds}: at least 1 is needed.")
    if command.from_ is not None:
        if command.models != ("all",) or command.out is not None:
            raise UsageError(
                "--from FILE shows a record and measures nothing; it takes neither models nor --out."
            )
        record = bench.read(command.from_)
        bench_report.print_tables(record, list(record["models"]), console)
    else:
        stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        out = command.out or Path("runs") / "bench" / f"{stamp}.json"
        path = out if out.suffix == ".json" else out / "bench.json"
        say(console, f"The record goes to {path}.")
        if (load := bench.load_average() or 0) > 0.3 * cores():
            say(
                errors,
                f"The machine is busy (load average {load:.1f}, {cores()} cores): figures will not be those of an idle one.",
            )
        record, finished = {}, []
        try:
            for name, record in zip(
                names,
                bench.run(names, command.rounds, not command.no_memory, path, Display(console)),
                strict=False,
            ):
                finished.append(name)
                bench_report.print_tables(record, finished[-1:], console)
        except (KeyboardInterrupt, OSError, RuntimeError) as error:
            if isinstance(error, records.RecordError):
                raise
            kept = f"{path} holds {', '.join(finished)}." if finished else "Nothing was recorded."
            stopped = isinstance(error, KeyboardInterrupt)
            say(errors, f"\nStopped. {kept}" if stopped else f"prograde: {error}\n{kept}")
            raise SystemExit(130 if stopped else 1) from None
    bench_report.print_overview(record, console)
    if command.markdown is not None:
        bench_report.write_markdown(record, command.markdown)
        say(console, f"Figure and tables are in {command.markdown}")


def _beyond(command: cli_beyond.Beyond, console, errors) -> None:
    from prograde.lab.beyond import EXPERIMENTS, report, run
    from prograde.lab.display import Display

    names = list(dict.fromkeys(command.experiments)) or ["all"]
    if unknown := [name for name in names if name not in EXPERIMENTS and name != "all"]:
        raise UsageError(
            f"unknown experiment {', '.join(unknown)}. Valid names: all, {', '.join(EXPERIMENTS)}."
        )
    if command.from_ is not None:
        if dataclasses.replace(command, from_=None, markdown=None) != cli_beyond.Beyond():
            raise UsageError(
                "--from DIR shows records and runs nothing; it takes no other option than --markdown."
            )
        out = command.from_
    else:
        if command.resume and command.out is None:
            raise UsageError("--resume needs --out DIR, the directory to continue.")
        names = list(EXPERIMENTS) if "all" in names else names
        try:
            experiments = [run.experiment(name) for name in names]
        except ImportError as error:
            raise UsageError(
                f"this needs more packages ({error.name}). pip install 'prograde[beyond]'"
            ) from None
        out = command.out or Path("runs") / f"{datetime.datetime.now():%Y%m%d-%H%M%S}-beyond"
        say(console, f"Records go to {out}.")
        with _continued(command, out, errors):
            run.run(experiments, command.full, out, command.resume, Display(console))
    report.print_all(out, console)
    say(console, f"Report: {report.build(out)}")
    if command.markdown is not None:
        report.write_markdown(out, command.markdown)
        say(console, f"Figures and tables are in {command.markdown}")


def _list(console) -> None:
    from rich.padding import Padding
    from rich.text import Text

    from prograde.lab.compare import ESTIMATORS
    from prograde.lab.experiments import EXPERIMENTS, METHOD_TITLES, METHODS

    def entry(name: str, title: str, *details: str) -> None:
        console.print(f"  {name:14}{title}", highlight=False, markup=False)
        for detail in filter(None, details):
            console.print(Padding(Text(detail, style="dim"), (0, 0, 0, 14)))

    console.print(
        "Experiments. Figures reported by the paper are given at second hand.\n", highlight=False
    )
    for e in EXPERIMENTS.values():
        r = e.reported
        ratios = ", ".join(f"{t:g}" for t in r.t_ratio)
        figures = [
            f"R_f {r.r_f:g}" if r.r_f else "",
            f"R_b {r.r_b:g}" if r.r_b else "",
            f"T {ratios}" if ratios else "",
        ]
        reported = "; ".join(filter(None, [", ".join(filter(None, figures)), r.note]))
        rates = ", ".join(f"{p:g}" for p in e.paper_rates)
        entry(
            e.name,
            e.title,
            f"rate {rates}" if rates else "",
            f"reported: {reported}" if reported else "",
        )
    console.print("\nMethods\n")
    for name, estimator in METHODS.items():
        entry(name, METHOD_TITLES[name], repr(estimator))
    console.print("\nEstimators of prograde compare\n")
    for name, estimator in ESTIMATORS.items():
        entry(name, "", repr(estimator))
    with contextlib.suppress(ImportError):  # installed without the extra
        from prograde.lab import finetune

        console.print("\nWhat prograde finetune trains, and by which estimators\n")
        for name, title in (finetune.TRAIN | finetune.ESTIMATORS).items():
            entry(name, title)
    console.print(
        "\nR_f, R_b: a forward-gradient and a backprop step over a bare forward pass. "
        "T: time to backprop's best held-out loss, over backprop's.",
        highlight=False,
    )


if __name__ == "__main__":
    main()
