"""What can be refused before the model is read, and before a directory is claimed."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from prograde import lm
from prograde.lab.data import DataError
from prograde.lab.studies.finetune import examples
from prograde.lab.studies.finetune.plan import Finetune, Plan
from prograde.lab.study import UsageError


def check(study: Finetune) -> None:
    """Raises `UsageError` or `DataError` for options and files that cannot be used."""
    model, data = study.model.model, study.data
    if not model or data.data == Path():
        raise UsageError(
            "finetune needs a model and examples: "
            "prograde finetune --model smollm2 --data examples/messages.csv"
        )
    for path in filter(None, (data.data, data.held_out_data)):
        if not path.is_file():
            raise DataError(f"{path} {'is no file' if path.exists() else 'does not exist'}.")
    if model != "smollm2" and not Path(model).exists():
        raise UsageError(
            f"--model {model} does not exist. Give a directory with config.json, a .gguf file, or "
            "smollm2."
        )
    data.problems()
    with refused(ValueError):
        plan = study.plan.resolved(data.plain_text)
    check_plan(study, plan)
    tokenizer = None
    with contextlib.suppress(lm.ModelError):  # what is wrong with a model is said when it is read
        if model != "smollm2" or lm.smollm2(fetch=False).exists():
            tokenizer = lm.load_tokenizer(model)
    if data.plain_text:
        if tokenizer is not None:
            examples.read(data, plan.seed, tokenizer)
        return
    _, _, labels, _ = examples.rows_of(data, plan.seed)
    if tokenizer is not None:
        examples.words_of(data, labels, tokenizer)


def check_plan(study: Finetune, plan: Plan) -> None:
    """Raises `UsageError` for options that exclude each other."""
    if study.rates is not None and plan.rate is not None:
        raise UsageError(f"--rate {plan.rate:g} and --rates {study.rates}: give one of them.")
    if study.repeats is not None and study.repeats < 0:
        raise UsageError(f"--repeats {study.repeats}: a whole number from 0 on is needed.")
    if study.memory_limit is not None and not study.memory_limit > 0:
        raise UsageError(f"--memory-limit {study.memory_limit:g}: more than 0 GB is needed.")
    thin = ("norm", "norms", "lora", "readout")
    for option, wanted in (
        ("--rates search", study.rates == "search"),
        (f"--repeats {study.repeats}", bool(study.repeats)),
    ):
        if wanted and plan.train not in thin:
            raise UsageError(
                f"{option} needs --train {', '.join(thin)}, not {plan.train}: only "
                "what is small is begun again."
            )
    if plan.train == "readout" and study.data.plain_text:
        raise UsageError("--train readout needs labels, and a .txt file has none. Use lora.")
    if study.model.quantized and plan.train not in thin:
        raise UsageError(f"--quantized needs --train {', '.join(thin)}, not {plan.train}.")


@contextlib.contextmanager
def refused(*errors: type[Exception]) -> Iterator[None]:
    """Turns errors that say what is wrong with the files or options into a `UsageError`."""
    try:
        yield
    except errors as error:
        raise UsageError(str(error)) from None
