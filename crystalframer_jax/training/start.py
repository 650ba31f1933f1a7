"""Starts a training: one model, or the members of an ensemble."""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from crystalframer_jax.config import ConfigError, TrainConfig, validate
from crystalframer_jax.data.datasets import open_dataset
from crystalframer_jax.data.store import Dataset
from crystalframer_jax.files import locked, write_json
from crystalframer_jax.inference.compilation import keep_compiled_programs
from crystalframer_jax.inference.ensemble import Ensemble, ensemble_summary, is_ensemble, member_names
from crystalframer_jax.inference.forward import working_precision
from crystalframer_jax.parallel.cores import use_cores
from crystalframer_jax.parallel.devices import Devices
from crystalframer_jax.parallel.interruption import Interruption
from crystalframer_jax.parallel.processes import is_first_process, json_from_first_process
from crystalframer_jax.reporting.summary import ensemble_text
from crystalframer_jax.runs.checkpoints import FOLDER
from crystalframer_jax.runs.claims import LOCK, check_workdir
from crystalframer_jax.runs.run_directory import CONFIG_FILE, SUMMARY_FILE, as_json, check_config, check_data, sealed
from crystalframer_jax.training.consensus import check_alike
from crystalframer_jax.training.logging import say
from crystalframer_jax.training.loop import Options, Run


def train(
    config: ConfigDict | TrainConfig,
    workdir: str | Path,
    options: Options | None = None,
    interruption: Interruption | None = None,
) -> dict[str, Any]:
    """Trains a model as `config` says, in the run directory `workdir`, and returns the summary of the run.

    The same call continues a run that was interrupted, from its last checkpoint; batches, random draws and results
    are those of a run that was not interrupted. All devices share the work, also those of several processes (see
    crystalframer_jax.parallel.processes) that make the same call; the first process writes into `workdir`.

    Raises ConfigError for a configuration that cannot be run or differs from that of the run directory, TrainingError
    if the loss is not finite or the disk is full, and TrainingInterrupted after having saved what there is if a signal
    or the time limit of `interruption` ends the run.
    """
    config = validate(config)
    if not str(workdir):
        raise ConfigError("the workdir is empty; name the directory of the run")
    workdir, options, interruption = Path(workdir), options or Options(), interruption or Interruption()
    use_cores()
    devices = Devices.of_all_processes(config.num_devices)
    keep_compiled_programs()
    with interruption.listening(), contextlib.ExitStack() as stack:
        if jax.process_count() > 1:  # a request to stop waits until all processes can follow it
            stack.enter_context(interruption.stepping())
        alike = ("skip_nonfinite", "implementation", "on_device", "steps_per_dispatch")
        check_alike(config, {name: getattr(options, name) for name in alike})
        if is_first_process():
            check_workdir(workdir)
        options.report("")  # preparing data may take its time
        if config.ensemble_size > 1:
            return _train_ensemble(config, workdir, options, interruption)
        dataset = _open_dataset(config)
        if dataset.remark:
            say(f"{dataset.name}: {dataset.remark}")
        if is_first_process():
            busy = f"{workdir}: another process is training there; wait for it or choose another"
            stack.enter_context(locked(workdir / LOCK, busy, "choose another --workdir"))
            check_config(config, workdir, options.resume_with_changes)
            check_data(dataset, workdir)
        with working_precision(config):
            return Run(config, workdir, dataset, options, interruption, devices).finish()


def _train_ensemble(config: TrainConfig, workdir: Path, options: Options, interruption: Interruption) -> dict[str, Any]:
    """Trains the members of an ensemble one after the other in WORKDIR/member_N, with seeds that count up."""
    if is_first_process():
        _check_ensemble(config, workdir)
    for number in range(config.ensemble_size):
        say(f"\nmember {number + 1} of {config.ensemble_size}")
        member = dataclasses.replace(config, ensemble_size=1, seed=config.seed + number)
        train(member, workdir / f"member_{number}", options, interruption)
        if is_first_process():
            write_json(workdir / CONFIG_FILE, as_json(config))  # after the first, who checks it
    options.report("")  # one process predicts with all members, and the others wait
    summary = None
    if is_first_process():
        summary = sealed(ensemble_summary(Ensemble.load(workdir), _dataset(config), workdir))
        write_json(workdir / SUMMARY_FILE, summary)
        say("\n" + ensemble_text(summary))
    return json_from_first_process(summary)


def _check_ensemble(config: TrainConfig, workdir: Path) -> None:
    """Raises ConfigError if a directory holds something else than this ensemble."""
    if (workdir / FOLDER).exists():
        raise ConfigError(f"{workdir} holds a run with one model; choose another --workdir for an ensemble")
    beyond = member_names(workdir)[config.ensemble_size :] if is_ensemble(workdir) else []
    if beyond:
        raise ConfigError(
            f"ensemble_size={config.ensemble_size}: {workdir} has {', '.join(beyond)} already; move them away"
        )


def _open_dataset(config: TrainConfig) -> Dataset:
    """Opens the data set of a training; of several processes the first prepares it before the others open it.

    Raises ConfigError if they find different data.
    """
    prepared = _dataset(config) if is_first_process() else None
    digest = json_from_first_process(prepared and prepared.digest)
    dataset = prepared or _dataset(config)
    if digest != dataset.digest:
        raise ConfigError(
            f"data_dir={config.data_dir!r}: process {jax.process_index()} finds other data under the name "
            f"{dataset.name} ({dataset.digest}) than the first ({digest}); copy the prepared folder or use a shared one"
        )
    return dataset


def _dataset(config: TrainConfig) -> Dataset:
    return open_dataset(config.target_set, config.targets, config.cutoff, config.data_dir)
