"""The training run: data, epochs, validation, checkpoints, resume, and the table at the end."""

import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from crystalframer_jax.config import ConfigError, model_config, neighbor_cutoff, target_names, validate
from crystalframer_jax.data.loader import TrainingBatches
from crystalframer_jax.data.registry import target_set
from crystalframer_jax.data.splits import SPLITS
from crystalframer_jax.data.store import Dataset, open_dataset
from crystalframer_jax.errors import UserError
from crystalframer_jax.files import locked, write_json
from crystalframer_jax.inference.evaluation import groups_of, mean_absolute_errors, mean_predictor_errors, predict_rows
from crystalframer_jax.model.regressor import CrystalFramer
from crystalframer_jax.training.checkpoint import FOLDER, MODEL_FIELDS, Checkpoints, on_this_device, read_json
from crystalframer_jax.training.logging import MetricsLog, duration, progress_bar, read_metrics, say, table
from crystalframer_jax.training.optimizer import learning_rate, make_optimizer
from crystalframer_jax.training.pretrained import start_from
from crystalframer_jax.training.state import TargetStatistics, TrainState, Tree
from crystalframer_jax.training.step import (
    initial_state,
    make_batch_statistics,
    make_forward,
    make_train_step,
    working_precision,
)


class TrainingError(UserError, RuntimeError):
    """Training cannot go on; the message says where and why."""


def train(config: ConfigDict, workdir: str | Path) -> dict[str, Any]:
    """Train a model as `config` says, in the run directory `workdir`, and return the summary of the run.

    The same call continues a run that was interrupted, from its last checkpoint; batches, random draws and results
    are those of a run that was not interrupted.

    Raises ConfigError for a configuration that cannot be run or differs from that of the run directory, and
    TrainingError if the loss is not finite.
    """
    validate(config)
    if not str(workdir):
        raise ConfigError("the workdir is empty; name the directory of the run")
    workdir = Path(workdir)
    names = target_names(config)
    dataset = open_dataset(target_set(config.target_set), names, neighbor_cutoff(config), config.data_dir)
    with locked(workdir / "lock", f"{workdir}: another process is training there; wait for it or choose another"):
        _claim(config, workdir)
        with working_precision(config):
            return Run(config, workdir, dataset).finish()


class Run:
    """A training run in its directory."""

    def __init__(self, config: ConfigDict, workdir: Path, dataset: Dataset):
        self.config, self.workdir, self.dataset = config, workdir, dataset
        train_labels = dataset.labels[dataset.splits["train"]]
        self.statistics = tuple(
            TargetStatistics.of(target, train_labels[:, t]) for t, target in enumerate(dataset.targets)
        )
        parts = model_config(config).parts
        self.batches = TrainingBatches(dataset, config.batch_size, config.n_epochs, config.seed, parts)
        first_swa_epoch = config.n_epochs - config.swa_epochs
        swa_first_step = first_swa_epoch * self.batches.steps_per_epoch if config.swa_epochs else None
        self.model = model = CrystalFramer(model_config(config))
        optimizer = make_optimizer(config, swa_first_step)
        key = jax.random.key(config.seed)
        self.forward, self.batch_statistics = make_forward(model), make_batch_statistics(model)
        self.step = make_train_step(model, optimizer, self.statistics, jax.random.fold_in(key, 1), swa_first_step)
        self.schedule = learning_rate(config, swa_first_step)
        self.initial_state = lambda: initial_state(model, optimizer, self.batches[0], jax.random.fold_in(key, 0))
        self.checkpoints = Checkpoints(workdir, writable=True)

    def finish(self) -> dict[str, Any]:
        """Train the epochs that are left, evaluate, write summary.json and print it."""
        state, meta = self._start()
        first_epoch = meta["epoch"] + 1
        if first_epoch < self.config.n_epochs:
            state, meta = self._epochs(state, first_epoch, meta["seconds"])
        self.checkpoints.wait()
        summary = self._summary(state, meta)
        self.checkpoints.close()
        write_json(self.workdir / "summary.json", summary)
        say("\n" + summary_text(summary))
        return summary

    def _start(self) -> tuple[TrainState, dict[str, Any]]:
        """The state to go on from, and the meta data of its checkpoint."""
        splits = ", ".join(f"{len(self.dataset.splits[name]):,} {name}" for name in SPLITS)
        last = self.checkpoints.last()
        if last is None:
            state = self.initial_state()
            if self.config.pretrained_model:
                state = start_from(state, self.config.pretrained_model, self.config, self.statistics)
            say(f"{self.dataset.name}: {splits}; {count_parameters(state.params):,} trainable parameters")
            say(describe(self.config))
            shape, (atoms, neighbors) = self.batches.shapes[0], self.batches.fill_factors()
            say(
                f"batches of {shape.num_crystals} crystals in {shape.num_atoms} atom slots ({atoms:.0%} filled) with "
                f"up to {shape.row_length} neighbors ({neighbors:.0%} filled)"
            )
            return state, {"epoch": -1, "seconds": 0.0}
        like = jax.eval_shape(self.initial_state)
        state, meta = self.checkpoints.restore_state(last, on_this_device(like))
        say(f"{self.dataset.name}: {splits}; continuing {self.workdir} after epoch {meta['epoch'] + 1}")
        return state, meta

    def _epochs(self, state: TrainState, first_epoch: int, seconds: float) -> tuple[TrainState, dict[str, Any]]:
        """Train from `first_epoch` to the end; every epoch ends with validation and a checkpoint."""
        config, batches = self.config, self.batches
        first_step = first_epoch * batches.steps_per_epoch
        log = MetricsLog(self.workdir, first_epoch, first_step)
        bar = progress_bar(len(batches), first_step, batches.batch_size)
        source = batches.iterate(first_step)
        meta: dict[str, Any] = {}
        for epoch in range(first_epoch, config.n_epochs):
            start = time.perf_counter()
            results = []
            for _ in range(batches.steps_per_epoch):
                state, result = self.step(state, next(source))
                results.append(result)
                bar.update(batches.batch_size)
                if not bar.disable and len(results) > 1:  # of the step before: this one may still be running
                    bar.set_postfix(loss=f"{float(results[-2]['loss']):.3f}", refresh=False)
            losses, norms = (np.array([float(result[name]) for result in results]) for name in ("loss", "grad_norm"))
            trained = time.perf_counter() - start
            validation = self.errors(_weights(state), "val", num_frame_samples=1)
            self._check_finite(epoch, losses + norms, validation)
            seconds += time.perf_counter() - start
            metrics = {
                "epoch": epoch,
                "step": int(state.step),
                "loss": float(losses.mean()),
                "grad_norm": float(norms.mean()),
                "val_mae": validation,
                "lr": float(self.schedule(state.step - 1)),
                "crystals_per_s": batches.steps_per_epoch * batches.batch_size / trained,
            }
            log.write(metrics)
            if epoch == config.n_epochs - 1 and jax.tree.leaves(state.batch_stats) and int(state.swa_steps):
                state = dataclasses.replace(state, swa_batch_stats=self._swa_batch_statistics(state))
            meta = self._meta(epoch, seconds, validation)
            self.checkpoints.save(state, meta, self._standardised(validation))
            say(self._epoch_line(metrics))
        bar.close()
        log.close()
        return state, meta

    def _check_finite(self, epoch: int, steps: np.ndarray, validation: dict[str, float]) -> None:
        """Raise TrainingError, with the last good checkpoint safe on disk, unless all of an epoch is finite."""
        where = ""
        if not np.isfinite(steps).all():
            step = epoch * self.batches.steps_per_epoch + int(np.flatnonzero(~np.isfinite(steps))[0])
            where = f"the loss or its gradient is not finite at step {step} (epoch {epoch + 1})"
        elif not np.isfinite(list(validation.values())).all():
            where = f"the validation error is not finite after epoch {epoch + 1}"
        if where:
            self.checkpoints.wait()
            raise TrainingError(f"{where}; the checkpoint before it is kept, start again with a smaller lr")

    def _meta(self, epoch: int, seconds: float, validation: dict[str, float]) -> dict[str, Any]:
        """What a checkpoint tells beside its arrays."""
        targets = [dataclasses.asdict(s) for s in self.statistics]
        return {"epoch": epoch, "seconds": seconds, "targets": targets, "val_mae": validation}

    def errors(self, weights: Tree, split: str, num_frame_samples: int) -> dict[str, float]:
        """MAE of every target on a split, label units."""
        indices = self.dataset.splits[split]
        groups = groups_of(indices, self.batches.batch_size)
        predictions = predict_rows(
            self.forward,
            weights,
            self.dataset.table,
            groups,
            self.statistics,
            self.batches.shapes,
            num_frame_samples,
        )
        return mean_absolute_errors(predictions.mean, self.dataset.labels[indices], self.statistics)

    def _swa_batch_statistics(self, state: TrainState) -> Tree:
        """BatchNorm statistics of the averaged weights: means over the batches of the last epoch."""
        weights = {"params": state.swa_params, "calibration": state.calibration, "batch_stats": state.batch_stats}
        steps = range(len(self.batches) - self.batches.steps_per_epoch, len(self.batches))
        total = jax.tree.map(jnp.zeros_like, state.batch_stats)
        for step in steps:
            total = jax.tree.map(jnp.add, total, self.batch_statistics(weights, self.batches[step]))
        return jax.tree.map(lambda x: x / len(steps), total)

    def _standardised(self, errors: dict[str, float]) -> float:
        """Sum over targets of the MAE in standard deviations: what checkpoints compete in."""
        return sum(errors[s.name] / s.std for s in self.statistics)

    def _epoch_line(self, metrics: dict[str, Any]) -> str:
        errors = ", ".join(f"{s.name} {metrics['val_mae'][s.name]:.4f} {s.unit}" for s in self.statistics)
        number = f"{metrics['epoch'] + 1:>{len(str(self.config.n_epochs))}}/{self.config.n_epochs}"
        return (
            f"epoch {number}  loss {metrics['loss']:.4f}  val MAE {errors}  lr {metrics['lr']:.2e}  "
            f"{metrics['crystals_per_s']:.0f} crystals/s"
        )

    def _summary(self, state: TrainState, meta: dict[str, Any]) -> dict[str, Any]:
        """Errors of the last, best and averaged weights; those with the smallest validation error are selected."""
        candidates = {"last": _weights(state)}
        best = self.checkpoints.best()
        if best not in (None, self.checkpoints.last()):
            like = {name: getattr(on_this_device(jax.eval_shape(lambda: state)), name) for name in MODEL_FIELDS}
            model = self.checkpoints.restore_model(best, like)
            candidates["best"] = {name: model[name] for name in ("params", "calibration", "batch_stats")}
        if int(state.swa_steps):
            candidates["swa"] = {
                "params": state.swa_params,
                "calibration": state.calibration,
                "batch_stats": state.swa_batch_stats,
            }
        samples = self.config.num_frame_samples if self.model.config.uses_frames else 1
        by_weights = {name: {s: self.errors(w, s, samples) for s in ("val", "test")} for name, w in candidates.items()}
        selected = min(by_weights, key=lambda name: self._standardised(by_weights[name]["val"]))
        baseline = {
            split: mean_predictor_errors(self.dataset.labels[self.dataset.splits[split]], self.statistics)
            for split in SPLITS
        }
        train_errors = self.errors(candidates[selected], "train", samples)
        epochs = read_metrics(self.workdir)
        return {
            "test": {
                s.name: {
                    "mae": by_weights[selected]["test"][s.name],
                    "mean_predictor_mae": baseline["test"][s.name],
                    "unit": s.unit,
                }
                for s in self.statistics
            },
            "selected_weights": selected,
            "mae": {**by_weights, selected: {"train": train_errors, **by_weights[selected]}},
            "mean_predictor_mae": baseline,
            "units": {s.name: s.unit for s in self.statistics},
            "epochs": self.config.n_epochs,
            "seconds": meta["seconds"],
            "crystals_per_s": float(np.median([line["crystals_per_s"] for line in epochs])),
            "parameters": count_parameters(state.params),
        }


def summary_text(summary: dict[str, Any]) -> str:
    """The table at the end of a run."""
    rows = []
    for target, unit in summary["units"].items():
        for name, errors in summary["mae"].items():
            label = f"{target} ({unit}), {name} weights" + (" *" if name == summary["selected_weights"] else "")
            rows.append([label, *(errors.get(split, {}).get(target, math.nan) for split in SPLITS)])
        baseline = summary["mean_predictor_mae"]
        rows.append([f"{target} ({unit}), mean predictor", *(baseline[split][target] for split in SPLITS)])
    text = table(["MAE", *SPLITS], rows)
    return (
        f"{text}\n* selected: smallest validation error\n"
        f"{summary['epochs']} epochs in {duration(summary['seconds'])}, {summary['crystals_per_s']:.0f} crystals/s, "
        f"{summary['parameters']:,} trainable parameters"
    )


def describe(config: ConfigDict) -> str:
    """What model a configuration is, in a line."""
    frames = f"{config.frame_method} frames" if config.value_pe_angle_real else "no frames (Crystalformer)"
    cutoff = neighbor_cutoff(config)
    reach = (
        f"within {cutoff:.2f} Å" if isinstance(cutoff, float) else f"in a box of {2 * cutoff.lattice_range + 1}^3 cells"
    )
    start = f", starting from {config.pretrained_model}" if config.pretrained_model else ""
    return (
        f"{config.num_layers} blocks of {config.head_num} heads, {frames}, domain {config.domain}, neighbors {reach}, "
        f"{config.precision}{start}"
    )


def count_parameters(params: Tree) -> int:
    """Number of trainable parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _weights(state: TrainState) -> Tree:
    return {"params": state.params, "calibration": state.calibration, "batch_stats": state.batch_stats}


def _claim(config: ConfigDict, workdir: Path) -> None:
    """Write config.json into a new run directory; a run that exists must have been started with the same values."""
    file, values = workdir / "config.json", json.loads(config.to_json())
    summary = workdir / "summary.json"
    if summary.exists() and "imported_from" in read_json(summary):
        raise ConfigError(
            f"{workdir} holds imported weights; to train them further choose another --workdir and "
            f"--config.pretrained_model={workdir}"
        )
    values["targets"] = ",".join(target_names(config))
    if not file.exists() or not any((workdir / FOLDER).glob("[0-9]*")):  # nothing was trained that could be lost
        write_json(file, values)
        return
    before = read_json(file)
    keys = {*values, *before} - {"data_dir"}  # where the data are kept does not change the run
    changed = [key for key in sorted(keys) if values.get(key) != before.get(key)]
    if changed:
        changes = ", ".join(f"{key} {before.get(key)!r} -> {values.get(key)!r}" for key in changed)
        raise ConfigError(f"{workdir} holds a run with other hyperparameters ({changes}); choose another --workdir")
