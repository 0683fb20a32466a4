"""The parameters after the steps of a log."""

from collections.abc import Callable

from jaxtyping import PyTree

from prograde.replay._fingerprint import fingerprint
from prograde.replay._format import LogError
from prograde.replay._log import ReplayLog, version_of
from prograde.replay._update import TrainState, Update, checked_whole, described


def replay(
    log: ReplayLog,
    update: Update,
    base: PyTree,
    on_step: Callable[[int], None] | None = None,
    *,
    steps: int | None = None,
    verify: bool = True,
) -> TrainState:
    """The parameters, and the state of the optimizer, after the steps of a log.

    **Arguments:**

    - `log`: what happened.
    - `update`: the update of the run, with the same estimator and optimizer.
    - `base`: the parameters the run started from.
    - `on_step`: called with the number of steps that were dispatched, to show progress.
    - `steps`: replay only so many; all of them by default.
    - `verify`: compare the parameters with the fingerprints in the log. Each comparison waits for
      the parameters and copies them to the host.

    **Returns:** the same bits as the run had, on the same platform and versions, with the same
    number of processor cores; elsewhere the same to rounding, for which `verify=False` is needed
    where the log has fingerprints.

    **Cost:** one update a step. The function is not run, and no data is read.

    **Errors:** `LogError` for other base parameters, another estimator or another optimizer than
    those of the log; for parameters that differ from a fingerprint; and for a log that ends before
    the planned steps and was not finished, unless `steps` is given or the log was opened with
    `partial=True` or to be continued. `ValueError` for more steps than the log holds.

    **Source:** MeZO, arXiv 2305.17333, section 2.1.

    Examples:
        >>> import tempfile, pathlib, jax.numpy as jnp, optax, prograde as pg
        >>> base, path = jnp.ones((8, 4)), pathlib.Path(tempfile.mkdtemp()) / "run.log"
        >>> update = pg.replay.Update(pg.WeightPerturbation(), optax.adam(1.0))
        >>> state, loss = update.init(base), lambda w: jnp.sum(w ** 2)
        >>> with pg.replay.ReplayLog.create(path, base, update) as log:
        ...     for step in range(5):
        ...         key = update.key(7, step)
        ...         value, _, derivatives = update.estimator.derivatives(loss, key, state.params)
        ...         log.append(step, 7, 0.01, value, derivatives)
        ...         state = update(state, step, 7, 0.01, derivatives)
        ...     log.finish(state.params)
        >>> again = pg.replay.replay(pg.replay.ReplayLog.open(path), update, base)
        >>> bool((again.params == state.params).all())
        True
    """
    _check_same_run(log, update, base)
    log.flush()
    if steps is None:
        _check_complete(log)
        steps = len(log)
    steps = checked_whole("steps", steps, len(log) + 1)
    state = update.init(base)
    if verify:
        log.verify(0, state.params)
    for i, record in enumerate(log.records[:steps]):
        numbers = int(record["step"]), int(record["seed"]), float(record["rate"])
        state = update.apply(state, *numbers, record["derivatives"])
        if verify:
            log.verify(i + 1, state.params)
        if on_step is not None:
            on_step(i + 1)
    return state


def _check_same_run(log: ReplayLog, update: Update, base: PyTree) -> None:
    """Raises unless update and base are those of the run."""
    if not isinstance(log, ReplayLog):
        raise TypeError(f"log={log!r}, but a ReplayLog is needed, such as ReplayLog.open(path).")
    if not isinstance(update, Update):
        raise TypeError(f"update={update!r}, but an Update is needed.")
    if repr(update.estimator) != log.header["estimator"]:
        raise LogError(
            f"{log.path} is the log of {log.header['estimator']}, not of {update.estimator!r}."
        )
    if (found := fingerprint(base)) != log.header["base"]:
        raise LogError(
            f"{log.path} starts from parameters with the fingerprint {log.header['base'][:16]}..., "
            f"and these have {found[:16]}.... Replay it from the parameters the run started from."
        )
    wrote = log.header.get("optimizer")
    if wrote is None:  # a log of format 2
        return
    here = described(update.optimizer, base)
    if here["state"] != wrote["state"]:
        raise LogError(
            f"{log.path} is the log of a run whose optimizer keeps {wrote['state']}, and this one "
            f"keeps {here['state']}. Replay it with the optimizer of the run."
        )
    versions = log.header["versions"]
    same = all(versions.get(name) == version_of(name) for name in ("jax", "optax"))
    if same and here["program"] != wrote["program"]:
        raise LogError(
            f"{log.path} is the log of a run whose optimizer has other settings than this one. "
            f"Both keep {here['state']}, but they compute other updates. Replay it with the "
            "optimizer of the run."
        )


def _check_complete(log: ReplayLog) -> None:
    """Raises where steps are missing and nobody asked for fewer."""
    if log.partial or log.appending or log.finished or log.planned is None:
        return
    if len(log) < log.planned:
        raise LogError(
            f"{log.path} holds {len(log)} of {log.planned} planned steps, and does not say that "
            f"the run was over. To replay these, pass steps={len(log)}, or open it with "
            "partial=True."
        )
