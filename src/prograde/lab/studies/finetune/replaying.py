"""The weights of a run again, from its base model and its log."""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

import prograde as pg
from prograde import lm
from prograde.lab import store
from prograde.lab.display import Display
from prograde.lab.studies.finetune.check import refused
from prograde.lab.studies.finetune.plan import Plan
from prograde.lab.studies.finetune.tuning import Tuning
from prograde.lab.study import UsageError

LOG = "replay.log"
_FILES = (".bin", ".pt", ".pth", ".ckpt", ".npz", ".h5", ".onnx")


def replay(
    base: str,
    path: Path,
    out: Path,
    steps: int | None,
    display: Display,
    partial: bool = False,
    verify: bool = True,
) -> None:
    """Makes the weights of a run from its base model and its log, and saves them.

    A log that is damaged, or ends before the planned steps, is replayed with `partial` or for a
    number of `steps` only. `verify` compares the weights with the fingerprints in the log. Raises
    `UsageError` for a log, a model or an output that does not fit; then nothing is written.
    """
    if out.exists():
        raise UsageError(f"{out} exists. Choose another path; nothing was changed.")
    if out.suffix in _FILES:
        raise UsageError(
            f"-o {out}: weights are written to a .safetensors or .gguf file, or to a directory "
            "that `transformers` loads."
        )
    if path.is_dir():  # of a run: the steps that it kept
        if steps is None and (summary := path / "summary.json").exists():
            steps = store.read_json(summary).get("final", {}).get("step")
        path = path / LOG
    with refused(pg.replay.LogError, lm.ModelError, ValueError):
        log = open_log(path, partial)
        if steps is not None and not 0 <= steps <= len(log):
            raise UsageError(f"--steps {steps}: {path} holds {len(log)}.")
        if steps is None and not partial and not ended(log):
            raise UsageError(
                f"{path} holds {len(log)} of {log.planned} planned steps, and does not say that "
                "the run was over. Continue the run by --resume, or add --partial to replay these."
            )
        tuning, tokenizer = _tuning(base, path, log, display)
        if out.suffix == ".gguf":
            lm.check_gguf(out, tuning.model, tokenizer)
        count = len(log) if steps is None else steps
        with display.stage("replaying", max(count, 1)):
            try:
                replay_steps(tuning, log, count, display, verify=verify)
            except pg.replay.LogError as error:
                said = str(error).replace("With verify=False", "With --no-verify")
                raise UsageError(said) from None
        with display.stage("saving", 1):
            if out.suffix == ".safetensors":
                lm.save_weights(out, tuning.model)
            elif out.suffix == ".gguf":
                lm.save_gguf(out, tuning.model, tokenizer)
            else:
                lm.save(out, tuning.model, tokenizer)


def open_log(path: Path, partial: bool) -> pg.replay.ReplayLog:
    """Opens a log. Raises `UsageError` for a damaged one, unless its whole part will do."""
    try:
        return pg.replay.ReplayLog.open(path, partial=partial)
    except pg.replay.LogError as error:
        if partial:
            raise
        try:
            whole = len(pg.replay.ReplayLog.open(path, partial=True))
        except pg.replay.LogError:
            raise error from None
        raise UsageError(f"{error} To use the {whole} whole steps, add --partial.") from None


def ended(log: pg.replay.ReplayLog) -> bool:
    """Whether a log holds all planned steps, or says that the run was over before."""
    return log.finished or log.planned is None or len(log) >= log.planned


def _tuning(base: str, path: Path, log: pg.replay.ReplayLog, display: Display):
    """The base model, prepared as the run prepared it, and its tokenizer."""
    config = log.header["config"]
    if not isinstance(config, dict) or config.get("kind") != "finetune":
        raise UsageError(f"{path} is the log of another kind of run than a fine-tune: {config}.")
    plan, here = Plan.from_config(config["plan"]), pg.__version__
    if (wrote := log.header["versions"]["prograde"]) != here:
        raise UsageError(
            f"{path} was written by prograde {wrote}, and this is {here}, which may draw other "
            "directions. Use that version."
        )
    with display.stage("reading the model", 1):
        model, tokenizer = lm.load(base, config["dtype"], config["quantized"])
        if (found := pg.replay.fingerprint(model)) != config["model_fingerprint"]:
            raise UsageError(
                f"{path} starts from {config['model']} with the fingerprint "
                f"{config['model_fingerprint'][:16]}..., and {base} has {found[:16]}.... "
                "Give the model that the run started from."
            )
    tuning = Tuning(plan, model)
    if repr(tuning.estimator) != log.header["estimator"]:
        raise UsageError(
            f"{path} is the log of {log.header['estimator']}, not of {tuning.estimator!r}."
        )
    return tuning, tokenizer


def replay_steps(
    tuning: Tuning,
    log: pg.replay.ReplayLog,
    count: int,
    display: Display,
    look: Callable[[int], None] = lambda step: None,
    verify: bool = False,
) -> None:
    """Applies the first `count` steps of a log. Calls `look` after each, and before the first.

    `verify` compares the parameters with the fingerprints of the log, and raises `LogError` where
    they differ.
    """
    look(0)
    for step in range(count):
        tuning.apply(step, jnp.asarray(log.records["derivatives"][step]))
        look(step + 1)
        if verify and step + 1 in log.fingerprints:
            log.verify(step + 1, tuning.changed)
        if step % 50 == 49:  # updates that are dispatched must not pile up
            jax.block_until_ready(tuning.state.params)
            display.reach(step + 1)
