"""The training run: epochs, validation, checkpoints, resume, and what is left at the end."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from crystalframer_jax.batching.device_table import Stretch
from crystalframer_jax.batching.targets import TargetStatistics
from crystalframer_jax.config import ConfigError, TrainConfig
from crystalframer_jax.data.loader import TrainingBatches
from crystalframer_jax.data.splits import SPLITS
from crystalframer_jax.data.store import Dataset
from crystalframer_jax.files import is_disk_full, write_json
from crystalframer_jax.inference.evaluation import frame_draws
from crystalframer_jax.model.implementation import Implementation
from crystalframer_jax.model.regressor import CrystalFramer
from crystalframer_jax.parallel.devices import ONE_DEVICE, Devices, on_one_device
from crystalframer_jax.parallel.interruption import Interruption, TrainingInterrupted
from crystalframer_jax.parallel.processes import is_first_process, json_from_first_process
from crystalframer_jax.reporting import plots
from crystalframer_jax.reporting.summary import describe, score_history, summary_text
from crystalframer_jax.runs.checkpoints import read_json
from crystalframer_jax.runs.run_checkpoints import RunCheckpoints
from crystalframer_jax.runs.run_directory import (
    as_json,
    record_environment,
    store_config,
    stored_config,
)
from crystalframer_jax.training.averages import averages_in, batch_statistics_of_averages, ready_for_swa, weights_of
from crystalframer_jax.training.consensus import NOTHING, SAVE, STOP, Agreement, agreed_implementation
from crystalframer_jax.training.errors import TrainingError
from crystalframer_jax.training.layer_names import count_parameters, layer_mask
from crystalframer_jax.training.logging import MetricsLog, Progress, read_metrics, say
from crystalframer_jax.training.nonfinite import batch_report
from crystalframer_jax.training.pretrained import start_from
from crystalframer_jax.training.results import EpochResults, StepResult
from crystalframer_jax.training.state import TrainState, Tree
from crystalframer_jax.training.step import LossFunction, initial_state, make_loss, make_recipe, make_train_step
from crystalframer_jax.training.stretches import dispatches, make_stretch
from crystalframer_jax.training.validation import Evaluator, evaluate_candidates


@dataclasses.dataclass(frozen=True)
class Options:
    """How to run a training, as far as its result does not depend on it.

    Attributes:
      resume_with_changes: hyperparameters that may differ from those the run was started with.
      skip_nonfinite: how many steps without a finite loss and gradient may be skipped.
      wandb_project: Weights & Biases project to log to; empty: none.
      on_device: whether the crystals are kept on the device; None: if they fit.
      implementation: of the attention, see model.attention.framed_attention.
      steps_per_dispatch: how many steps the device takes at a time, if the crystals are kept there. Requests to stop,
        checkpoints and the progress bar wait for the end of such a stretch.
      report: called with what is being done, at every dispatch; of several processes at the same points in all.
    """

    resume_with_changes: Sequence[str] = ()
    skip_nonfinite: int = 0
    wandb_project: str = ""
    on_device: bool | None = None
    implementation: Implementation = "auto"
    steps_per_dispatch: int = 8
    report: Callable[[str], None] = lambda progress: None

    def __post_init__(self):
        if self.steps_per_dispatch < 1:
            raise ConfigError(f"steps_per_dispatch={self.steps_per_dispatch} must be at least 1")


class Run:
    """A training run in its directory.

    Several processes may share the work, each with a Run of its own that takes the same steps. Only the first writes
    into the directory.
    """

    def __init__(
        self,
        config: TrainConfig,
        workdir: Path,
        dataset: Dataset,
        options: Options | None = None,
        interruption: Interruption | None = None,
        devices: Devices = ONE_DEVICE,
    ):
        self.config, self.workdir, self.dataset = config, workdir, dataset
        self.options, self.interruption = options or Options(), interruption or Interruption()
        wanted = config.model
        self.batches = TrainingBatches(
            dataset,
            config.batch_size,
            config.n_epochs,
            config.seed,
            wanted.parts,
            (config.train_filter_min, config.train_filter_max),
            config.train_percent_check,
            on_device=self.options.on_device,
            devices=devices,
        )
        self.statistics = tuple(
            TargetStatistics.of(
                target.name, target.unit, dataset.labels[self.batches.indices, t], config.normalize_targets
            )
            for t, target in enumerate(dataset.targets)
        )
        self.recipe = make_recipe(config, self.batches.steps_per_epoch)
        self.model = CrystalFramer(wanted, agreed_implementation(self.options.implementation, self._trace))
        self.evaluator = Evaluator(config, self.model, self.batches, self.statistics, self.options.report)
        loss, skip_nonfinite = self.loss(devices.axis), self.options.skip_nonfinite
        self.step = make_train_step(self.recipe, loss, skip_nonfinite, devices)
        self.stretch = make_stretch(self.recipe, loss, skip_nonfinite, devices)
        self.agreement, self.request = Agreement(devices), ""
        self.saved_at = time.monotonic()
        self.checkpoints = RunCheckpoints(
            workdir, devices, config.model_checkpoint_save_top_k, config.keep_last_checkpoints
        )

    def initial_state(self) -> TrainState:
        """The state that the training starts from, on all devices."""
        devices, key = self.batches.devices, jax.random.fold_in(jax.random.key(self.config.seed), 0)
        return initial_state(self.model, self.recipe, devices.put(self.batches[0]), key, devices)

    def loss(self, axis: str | None) -> LossFunction:
        """The loss of the share that every device of `axis` has in a batch, see `make_loss`."""
        key = jax.random.fold_in(jax.random.key(self.config.seed), 1)
        return make_loss(self.model, self.recipe, self.statistics, key, axis)

    def _trace(self, implementation: Implementation) -> None:
        """Raise ImplementationError if a training step cannot be taken so by this process."""
        self.model = CrystalFramer(self.config.model, implementation)
        state, batch = jax.eval_shape(self.initial_state), self.batches.parts_of(0)[0]
        jax.eval_shape(lambda state: self.loss(None)(state.params, state, batch, False), state)

    def finish(self) -> dict[str, Any]:
        """Train the epochs that are left, evaluate, write summary.json and print it."""
        try:
            state, meta = self._start()
            summary = self._known_summary(meta)
            if meta["epoch"] + 1 < self.config.n_epochs:
                with self.interruption.stepping():
                    state, meta = self._epochs(state, meta)
            self.checkpoints.wait()
            if summary is None:
                summary = self._summary(state, meta)
                if is_first_process():
                    write_json(self.workdir / "summary.json", summary)
        except TrainingInterrupted as request:
            with self.interruption.stepping():
                self.checkpoints.wait()
            last = self.checkpoints.last()
            saved = f"saved at step {last:,}" if last else "nothing was trained yet"
            raise TrainingInterrupted(f"{request}, {saved}; the same command continues {self.workdir}") from None
        except OSError as error:
            if not is_disk_full(error):
                raise
            raise TrainingError(
                f"the disk of {self.workdir} is full; what was saved before is intact: make room, and the same command "
                "continues"
            ) from error
        finally:
            self.checkpoints.close()
        say("\n" + summary_text(summary))
        return summary

    def _known_summary(self, meta: dict[str, Any]) -> dict[str, Any] | None:
        """The summary of a finished run, unless hyperparameters have changed; tells the directory what runs now."""
        file, found = self.workdir / "summary.json", None
        if is_first_process():
            if meta["epoch"] + 1 < self.config.n_epochs or stored_config(self.workdir) != as_json(self.config):
                file.unlink(missing_ok=True)
            store_config(self.config, self.workdir)
            record_environment(self.workdir)
            found = read_json(file) if file.exists() else None
        return json_from_first_process(found)

    def _start(self) -> tuple[TrainState, dict[str, Any]]:
        """The state to go on from, and the meta data of its checkpoint."""
        splits = ", ".join(f"{len(self.dataset.splits[name]):,} {name}" for name in SPLITS)
        like = jax.eval_shape(self.initial_state)
        for key in ("frozen_layers", "reinit_layers"):  # a misspelt layer is an error before anything is done
            layer_mask(like.params, getattr(self.config, key), key)
        found = self.checkpoints.restore_latest(like)
        if found is not None:
            state, meta = found
            self._check_resumable(state)
            done = f"{int(state.step):,} of {len(self.batches):,} steps"
            say(f"{self.dataset.name}: {splits}; continuing {self.workdir} after {done}")
            return ready_for_swa(state, self.recipe.swa_first_step), meta
        state = self.initial_state()
        if self.config.pretrained_model:
            state = self.checkpoints.on_all(
                lambda: start_from(on_one_device(state), self.config, self.statistics), like
            )
        trainable = count_parameters(state.params, self.config.frozen_layers)
        say(f"{self.dataset.name}: {splits}; {trainable:,} trainable parameters")
        say(describe(self.config))
        say(self.batches.describe())
        return state, {"epoch": -1, "seconds": 0.0, "results": []}

    def _check_resumable(self, state: TrainState) -> None:
        """Raise UserError if this training cannot go on from a state, though its arrays fit."""
        step, skipped = int(state.step), int(state.skipped_steps)
        if step > len(self.batches):
            raise ConfigError(
                f"n_epochs={self.config.n_epochs}: {self.workdir} has trained longer already, {step:,} steps; give at "
                f"least n_epochs={-(-step // self.batches.steps_per_epoch)}"
            )
        if skipped > self.options.skip_nonfinite:
            raise TrainingError(
                f"{self.workdir} has skipped {skipped} steps that were not finite; go on with "
                f"--skip_nonfinite={skipped} or more"
            )

    def _epochs(self, state: TrainState, meta: dict[str, Any]) -> tuple[TrainState, dict[str, Any]]:
        """Train to the end; every epoch ends with validation and a checkpoint."""
        config, batches = self.config, self.batches
        first_epoch = meta["epoch"] + 1
        first_step, project = first_epoch * batches.steps_per_epoch, self.options.wandb_project
        log = (
            MetricsLog(self.workdir, first_epoch, first_step, project, as_json(config)) if is_first_process() else None
        )
        progress = Progress(config.n_epochs, first_epoch, batches.steps_per_epoch, batches.batch_size)
        source = dispatches(batches, int(state.step), self.options.steps_per_dispatch)
        best = self.checkpoints.losses()[: config.model_checkpoint_save_top_k]
        try:
            for epoch in range(first_epoch, config.n_epochs):
                done = meta["results"] if epoch == first_epoch else []
                state, metrics, seconds = self._epoch(state, epoch, source, list(done), meta["seconds"], progress)
                if epoch == config.n_epochs - 1 and jax.tree.leaves(state.batch_stats):
                    fields = batch_statistics_of_averages(self.model, state, batches, self.options.report)
                    state = dataclasses.replace(state, **fields)
                if log:
                    log.write(metrics)
                meta = self._meta(epoch, seconds, [], metrics["val_mae"])
                best = sorted([*best, metrics["val_loss"]])[: config.model_checkpoint_save_top_k]
                wish, is_last = self.agreement.now(self._wish()), epoch == config.n_epochs - 1
                if wish or is_last or metrics["val_loss"] in best:
                    self._save(state, meta, metrics["val_loss"])
                progress.end_epoch()
                say(self._epoch_line(metrics))
                if wish == STOP and not is_last:
                    raise self._stopped(f"after epoch {epoch + 1}")
        finally:
            progress.close()
            if log:
                log.close()
        return state, meta

    def _epoch(
        self, state: TrainState, epoch: int, source: Any, done: list, seconds: float, progress: Progress
    ) -> tuple[TrainState, dict[str, Any], float]:
        """The steps of an epoch that are left, and its validation: the state, its metrics and the seconds so far.

        `done` are [loss, gradient norm] of the steps that are done, without those that were skipped.
        """
        batches = self.batches
        start = time.perf_counter()
        first = int(state.step) - epoch * batches.steps_per_epoch
        freeze_norm = self._freezes_norm(epoch)
        progress.start_epoch(epoch, first)
        results = EpochResults(epoch, done, self.options.skip_nonfinite)
        position, waited = first, 0.0
        while position < batches.steps_per_epoch:
            asked = time.perf_counter()
            work = next(source)
            waited += time.perf_counter() - asked
            advance = self.stretch if isinstance(work, Stretch) else self.step
            state, result = advance(state, work, freeze_norm=freeze_norm)
            steps = results.add(result)
            position += steps
            self.options.report(f"epoch {epoch + 1}, step {position} of {batches.steps_per_epoch}")
            wish, is_last = self.agreement.after_dispatch(self._wish()), position == batches.steps_per_epoch
            is_due = wish == STOP or (wish == SAVE and not is_last)
            if failed := results.take(all_of_them=is_due or is_last):
                raise self._not_finite(failed, state, epoch)
            for _ in range(steps):
                progress.step(results.last_loss)
            if is_due:
                meta = self._meta(epoch - 1, seconds + time.perf_counter() - start, results.taken, {})
                self._save(state, meta, None)
                if wish == STOP:
                    raise self._stopped(f"in epoch {epoch + 1}")
        trained = time.perf_counter() - start
        if not results.taken:
            raise TrainingError(f"all steps of epoch {epoch + 1} were skipped; try a smaller lr")
        val_loss, val_mae = self.evaluator.validate(weights_of(state), epoch)
        metrics = {
            "epoch": epoch,
            "step": int(state.step),
            **results.means(),
            "val_loss": val_loss,
            "val_mae": val_mae,
            "lr": float(self.recipe.learning_rate(int(state.step) - 1)),
            "skipped_steps": int(state.skipped_steps),
            "crystals_per_s": (batches.steps_per_epoch - first) * batches.batch_size / trained,
            "waiting_share": waited / trained,
        }
        return state, metrics, seconds + time.perf_counter() - start

    def _freezes_norm(self, epoch: int) -> bool:
        """Whether BatchNorm keeps its statistics in an epoch."""
        return epoch >= self.config.n_epochs - self.config.freeze_bn_epochs

    def _wish(self) -> int:
        """What this process wishes to be done as soon as possible."""
        self.request = self.interruption.reason()
        if self.request:
            return STOP
        return SAVE if is_first_process() and self._is_save_due() else NOTHING

    def _is_save_due(self) -> bool:
        return time.monotonic() - self.saved_at > 60 * self.config.checkpoint_minutes

    def _stopped(self, where: str) -> TrainingInterrupted:
        return TrainingInterrupted(f"stopped by {self.request or 'a request to another process'} {where}")

    def _save(self, state: TrainState, meta: dict[str, Any], val_loss: float | None) -> None:
        self.checkpoints.save(state, meta, val_loss)
        self.saved_at = time.monotonic()

    def _not_finite(self, result: StepResult, state: TrainState, epoch: int) -> TrainingError:
        """Write a report of the batch of a step that was not finite; its error."""
        step = result.step  # the weights stand still since then, also if later steps were taken
        self.checkpoints.wait()
        last = self.checkpoints.last()
        file = self.workdir / f"nonfinite_step_{step}.json"
        if is_first_process():
            report = {"epoch": epoch, "last_good_checkpoint": last, "loss": str(result.loss)}
            report |= {"grad_norm": str(result.grad_norm)}
            frozen = self._freezes_norm(epoch)
            report |= batch_report(self.loss(None), self.statistics, on_one_device(state), self.batches, step, frozen)
            write_json(file, report)
        json_from_first_process(None)  # the others wait for the report: their error would end this process
        return TrainingError(
            f"the loss or its gradient is not finite at step {step} (epoch {epoch + 1}); {file} tells about its batch, "
            f"{'the last checkpoint is kept' if last else 'nothing was saved yet'}. Try a smaller lr (in a run that "
            "has a checkpoint: --config.lr=... --resume_with_changes=lr) or let such steps be skipped "
            "(--skip_nonfinite=10)"
        )

    def _meta(self, epoch: int, seconds: float, results: list, val_mae: dict[str, float]) -> dict[str, Any]:
        """What a checkpoint tells beside its arrays: the last finished epoch, the results of steps since then."""
        targets = [dataclasses.asdict(s) for s in self.statistics]
        return {"epoch": epoch, "seconds": seconds, "results": results, "targets": targets, "val_mae": val_mae}

    def _epoch_line(self, metrics: dict[str, Any]) -> str:
        errors = ", ".join(f"{s.name} {metrics['val_mae'][s.name]:.4f} {s.unit}" for s in self.statistics)
        number = f"{metrics['epoch'] + 1:>{len(str(self.config.n_epochs))}}/{self.config.n_epochs}"
        waited = f"  waited {metrics['waiting_share']:.0%} for data" if metrics["waiting_share"] >= 0.01 else ""
        return (
            f"epoch {number}  loss {metrics['loss']:.4f}  val MAE {errors}  lr {metrics['lr']:.2e}  "
            f"{metrics['crystals_per_s']:.0f} crystals/s{waited}"
        )

    def _summary(self, state: TrainState, meta: dict[str, Any]) -> dict[str, Any]:
        """The errors of the last, best and averaged weights, with the files and figures that go with them."""
        epochs = read_metrics(self.workdir) if is_first_process() else []
        if len(epochs) != self.config.n_epochs:
            say(f"warning: {self.workdir / 'metrics.jsonl'} tells of {len(epochs)} epochs only")
        first_swa_epoch = self.config.n_epochs - self.config.swa_epochs if self.config.swa_epochs else None
        if epochs:
            plots.learning_curve(epochs, self.workdir / "learning_curve.png", first_swa_epoch)
        samples = frame_draws(self.config)

        def predict(weights: Tree, split: str) -> np.ndarray:
            if self.agreement.now(self._wish()) == STOP:
                raise self._stopped(f"before the errors on {split} crystals")
            return self.evaluator.predict(weights, self.dataset.splits[split], samples)

        folder = self.workdir if is_first_process() else None
        errors = evaluate_candidates(
            self._candidates(state), predict, self.dataset, self.statistics, self.config.loss_func, folder
        )
        return errors | {
            "score_history": score_history([line["val_loss"] for line in epochs]),
            "epochs": self.config.n_epochs,
            "steps": int(state.step),
            "skipped_steps": int(state.skipped_steps),
            "seconds": meta["seconds"],
            "crystals_per_s": float(np.median([line["crystals_per_s"] for line in epochs] or [0.0])),
            "parameters": count_parameters(state.params, self.config.frozen_layers),
        }

    def _candidates(self, state: TrainState) -> dict[str, Tree]:
        """The weights of which one is selected: last, best and, if there are any, averages."""
        candidates = {"last": weights_of(state)}
        if best := self.checkpoints.best_model(state):
            candidates["best"] = {name: best[name] for name in ("params", "calibration", "batch_stats")}
        return candidates | {name: weights_of(state, name) for name in averages_in(state)}
