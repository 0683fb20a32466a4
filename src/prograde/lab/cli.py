"""The command line. Every study is a command; other commands work on the records of studies.

This module does what all studies share: where records go, resuming, Ctrl-C, exit codes, and
showing the report. Exit codes: 0 done, 1 failed, 2 refused as given, 130 Ctrl-C.
"""

import contextlib
import dataclasses
import datetime
import inspect
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Union, get_type_hints

from prograde.lab.extras import install

try:
    import tyro
    from rich.console import Console
except ImportError as error:  # installed without the extra
    raise SystemExit(
        f"prograde: the command line needs more packages ({error.name}). {install('lab')}"
    ) from None

from prograde.lab.commands import COMMANDS
from prograde.lab.studies import STUDIES, study

# XLA hands single convolutions on a CPU to a library whose backward pass is slow. Without it,
# backprop of the CNN is much faster, and every comparison gives backprop the faster setting. The
# option is known to exist in jaxlib 0.10 only, and XLA ends the process on an unknown option.
_FASTER_CONVOLUTIONS = (
    "--xla_cpu_experimental_ynn_fusion_type=-LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION"
)

_DESCRIPTION = """Training without backpropagation: forward gradients, compared with backprop on
this machine.

  prograde reproduce                       the paper's six experiments, small, on digits
  prograde reproduce --data mnist --full   the same on MNIST; hours
  prograde compare --model transformer     estimators: cost, memory, bias, variance, loss reached
  prograde beyond newton stream            where reverse mode cannot go
  prograde finetune --model smollm2 --data reviews.csv   a language model at the memory of inference
  prograde bench mlp transformer           what a step costs, in JAX and in PyTorch
  prograde report DIR                      the report of recorded studies, built again
  prograde list                            the names that options accept

Every study writes records and a report into --out. To continue a study that was stopped, repeat its
command with --out DIR --resume."""


@dataclass(frozen=True)
class Records:
    """Where the records of a study go."""

    out: Annotated[
        Path | None,
        tyro.conf.arg(metavar="DIR", help_behavior_hint="(default: runs/DATE-TIME-STUDY)"),
    ] = None
    """Directory of the records and the report."""
    resume: bool = False
    """Continue the records in --out. The numbers are those of a run that was never stopped."""
    from_: Annotated[
        Path | None, tyro.conf.arg(name="from", metavar="DIR", help_behavior_hint="")
    ] = None
    """Run nothing. Show the records in DIR, and build their report again."""


def main() -> None:
    """Runs one command."""
    try:
        _main(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # `prograde --help | head`
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
    except KeyboardInterrupt:
        _leave(130)


def _main(arguments: list[str]) -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # pyright: ignore[reportAttributeAccessIssue]
    if arguments == ["--version"]:
        print(f"prograde {metadata.version('prograde')}")
        return
    # the words after two dashes are another command
    launching = arguments[:1] == ["launch"] and "--" in arguments
    cut = arguments.index("--") if launching else len(arguments)
    command: Any = tyro.cli(
        _commands(short=arguments[:1] in ([], ["-h"], ["--help"])),
        args=arguments[:cut],
        prog="prograde",
        description=_DESCRIPTION,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff, tyro.conf.SuppressFixed),
    )
    _use_faster_convolutions()
    console, errors = Console(), Console(stderr=True)
    try:
        if isinstance(command, tuple):
            plan, records = command
            _study(plan, records, console, errors)
        else:
            status = command(console, errors, tuple(arguments[cut + 1 :]))
            if status:
                raise SystemExit(status)
    except _refusals() as error:
        _say(errors, f"prograde: {error}")
        raise SystemExit(2) from None
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            raise
        _say(errors, f"prograde: {error}")
        raise SystemExit(1) from None


def _commands(short: bool) -> Any:
    """Returns the union of all commands, for tyro. `short` help is one line for each."""
    constructors = {name: _command(study(name)) for name in STUDIES} | COMMANDS
    choices = []
    for name, constructor in constructors.items():
        first = (inspect.getdoc(constructor) or name).partition("\n")[0] if short else None
        option = tyro.conf.subcommand(name, constructor=constructor, description=first)
        choices.append(Annotated[Any, option])
    return Union[tuple(choices)]  # noqa: UP007, the choices are known at run time only


def _command(cls: Any) -> Callable[..., tuple[Any, Records]]:
    """Returns a function whose parameters are the options of a study."""

    def command(study, records):
        return study, records

    command.__annotations__ = {"study": cls, "records": Records}
    missing = dataclasses.MISSING
    required = any(
        f.default is missing and f.default_factory is missing for f in dataclasses.fields(cls)
    )
    command.__defaults__ = (Records(),) if required else (cls(), Records())
    command.__doc__ = cls.__doc__
    return command


def _study(plan: Any, records: Records, console: Console, errors: Console) -> None:
    """Runs a study, or shows its records, and ends with its report."""
    from prograde.lab import store
    from prograde.lab.commands.report import show
    from prograde.lab.display import Display
    from prograde.lab.study import UsageError, directories

    if records.from_ is not None:
        changed = [word for word in _words(plan)[1:] if word.startswith("--")]
        if changed or records.out is not None or records.resume:
            raise UsageError(
                "--from DIR shows records and runs nothing. It takes no other option"
                f"{', but got ' + ' '.join(changed) if changed else ''}."
            )
        show(store.find([records.from_]), records.from_, console)
        return
    if records.resume and records.out is None:
        raise UsageError("--resume needs --out DIR, the directory to continue.")
    if getattr(plan, "distributed", False) and records.out is None:
        raise UsageError("--distributed needs --out DIR, the same for all processes.")
    with _needs(plan.extra):
        plan.prepare()
        worker = plan.join()
        configs = plan.configs()
    out = records.out or Path("runs") / f"{datetime.datetime.now():%Y%m%d-%H%M%S}-{plan.label}"
    if worker:  # each process writes its own records, of the same numbers
        out, console = out / "workers" / str(worker), Console(quiet=True)
    stores = store.claim(plan.name, directories(out, configs), records.resume, plan.current)
    _say(console, f"Records go to {out}.")
    with _continued(plan, Records(out, resume=True), errors), _needs(plan.extra):
        plan.run(dict(zip(configs, stores, strict=True)), Display(console))
    if not worker:
        show(stores, out, console)


@contextlib.contextmanager
def _needs(extra: str) -> Iterator[None]:
    """Turns a missing package into a message that says how to install it."""
    from prograde.lab.study import UsageError

    try:
        yield
    except ImportError as error:
        raise UsageError(f"this needs more packages ({error.name}). {install(extra)}") from None


@contextlib.contextmanager
def _continued(plan: Any, records: Records, errors: Console) -> Iterator[None]:
    """Says how to continue if the study is stopped or fails."""
    distributed = getattr(plan, "distributed", False)
    again = shlex.join([*_program(), *_words(plan), *_words(records)])
    try:
        yield
    except KeyboardInterrupt:
        if not distributed:  # `launch` says it once for all
            _say(errors, f"\nStopped; the records are complete. To continue: {again}")
        _leave(130)
    except _refusals():
        raise
    except (OSError, RuntimeError) as error:
        if distributed:
            _say(errors, f"prograde: this worker cannot go on: {error}")
            _leave(1)  # an orderly exit would wait for a process that is gone
        _say(errors, f"prograde: {error}\nThe records so far are complete. To continue: {again}")
        raise SystemExit(1) from None


def _refusals() -> tuple[type[Exception], ...]:
    """Returns the errors that say what is wrong with a command or with its files."""
    from prograde.lab.data import DataError
    from prograde.lab.store import RecordError
    from prograde.lab.study import UsageError

    return DataError, RecordError, UsageError


def _leave(status: int) -> None:
    """Ends the process at once, because device work that still runs can crash an orderly exit."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def _use_faster_convolutions() -> None:
    """Sets the option before JAX is imported."""
    if metadata.version("jaxlib").startswith("0.10."):
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} {_FASTER_CONVOLUTIONS}".strip()


def _say(console: Console, text: str) -> None:
    from prograde.lab.report.terminal import say

    say(console, text)


def _program() -> list[str]:
    """Returns the words that call this program, which need not be on the path."""
    if sys.argv[0].endswith(".py"):
        return [sys.executable, "-m", "prograde.lab.cli"]
    found = shutil.which("prograde")
    called = Path(sys.argv[0])
    is_found = found is not None and called.exists() and called.samefile(found)
    return ["prograde" if is_found else sys.argv[0]]


def _words(options: Any) -> list[str]:
    """Returns the words of a command line that give these options."""
    words = [options.name] if hasattr(options, "name") else []
    hints = get_type_hints(type(options), include_extras=True)
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if dataclasses.is_dataclass(value):
            words += _words(value)
            continue
        if value is None or value == field.default:
            continue
        values = value if isinstance(value, tuple) else () if value is True else (value,)
        if tyro.conf.Positional not in getattr(hints[field.name], "__metadata__", ()):
            words.append(f"--{field.name.strip('_').replace('_', '-')}")
        words += map(str, values)
    return words


if __name__ == "__main__":
    main()
