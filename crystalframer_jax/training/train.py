"""Train one model, or the members of an ensemble, in a run directory."""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from crystalframer_jax.config import ConfigError, neighbor_cutoff, target_names, validate
from crystalframer_jax.data.datasets import open_dataset
from crystalframer_jax.data.store import Dataset
from crystalframer_jax.files import locked, write_json
from crystalframer_jax.inference.ensemble import Ensemble, ensemble_summary, ensemble_text, is_ensemble, member_names
from crystalframer_jax.training.checkpoint import FOLDER
from crystalframer_jax.training.interruption import Interruption
from crystalframer_jax.training.logging import say
from crystalframer_jax.training.loop import Options, Run
from crystalframer_jax.training.run_directory import as_json, check_config, check_data
from crystalframer_jax.training.step import working_precision


def train(
    config: ConfigDict,
    workdir: str | Path,
    options: Options | None = None,
    interruption: Interruption | None = None,
) -> dict[str, Any]:
    """Train a model as `config` says, in the run directory `workdir`, and return the summary of the run.

    The same call continues a run that was interrupted, from its last checkpoint; batches, random draws and results
    are those of a run that was not interrupted.

    Raises ConfigError for a configuration that cannot be run or differs from that of the run directory, TrainingError
    if the loss is not finite or the disk is full, and TrainingInterrupted after having saved what there is if a signal
    or the time limit of `interruption` ends the run.
    """
    validate(config)
    if not str(workdir):
        raise ConfigError("the workdir is empty; name the directory of the run")
    workdir, options, interruption = Path(workdir), options or Options(), interruption or Interruption()
    if config.ensemble_size > 1:
        return _train_ensemble(config, workdir, options, interruption)
    with interruption.listening():
        dataset = _open_dataset(config)
        if dataset.remark:
            say(f"{dataset.name}: {dataset.remark}")
        with locked(workdir / "lock", f"{workdir}: another process is training there; wait for it or choose another"):
            check_config(config, workdir, options.resume_with_changes)
            check_data(dataset, workdir)
            with working_precision(config):
                return Run(config, workdir, dataset, options, interruption).finish()


def _train_ensemble(config: ConfigDict, workdir: Path, options: Options, interruption: Interruption) -> dict[str, Any]:
    """Train the members of an ensemble one after the other in WORKDIR/member_N, with seeds that count up."""
    if (workdir / FOLDER).exists():
        raise ConfigError(f"{workdir} holds a run with one model; choose another --workdir for an ensemble")
    beyond = member_names(workdir)[config.ensemble_size :] if is_ensemble(workdir) else []
    if beyond:
        raise ConfigError(
            f"ensemble_size={config.ensemble_size}: {workdir} has {', '.join(beyond)} already; move them away"
        )
    with interruption.listening():
        for number in range(config.ensemble_size):
            say(f"\nmember {number + 1} of {config.ensemble_size}")
            member = config.copy_and_resolve_references()
            member.update(ensemble_size=1, seed=config.seed + number)
            train(member, workdir / f"member_{number}", options, interruption)
            write_json(workdir / "config.json", as_json(config))  # after the first, who checks it
        summary = ensemble_summary(Ensemble.load(workdir), _open_dataset(config), workdir)
    write_json(workdir / "summary.json", summary)
    say("\n" + ensemble_text(summary))
    return summary


def _open_dataset(config: ConfigDict) -> Dataset:
    return open_dataset(config.target_set, target_names(config), neighbor_cutoff(config), config.data_dir)
