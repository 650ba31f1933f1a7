"""The training run: epochs, validation, checkpoints, resume, and what is left at the end."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from crystalframer_jax.batching.batch import Batch
from crystalframer_jax.batching.coverage import Coverage
from crystalframer_jax.batching.device_table import Chunk
from crystalframer_jax.config import ConfigError, TrainConfig
from crystalframer_jax.data.loader import TrainingBatches, rows_to_train_on
from crystalframer_jax.data.splits import SPLITS
from crystalframer_jax.data.store import Dataset
from crystalframer_jax.files import is_disk_full, write_json
from crystalframer_jax.model.implementation import Implementation
from crystalframer_jax.model.regressor import CrystalFramer
from crystalframer_jax.ops.random_bits import seed_of
from crystalframer_jax.parallel.devices import ONE_DEVICE, Devices, on_one_device
from crystalframer_jax.parallel.interruption import Interruption, TrainingInterrupted
from crystalframer_jax.parallel.processes import is_first_process, json_from_first_process
from crystalframer_jax.reporting import plots
from crystalframer_jax.reporting.metrics import metrics_for
from crystalframer_jax.reporting.predictions import reporting
from crystalframer_jax.reporting.summary import describe, score_history, summary_text
from crystalframer_jax.runs.checkpoints import CheckpointError
from crystalframer_jax.runs.metadata import checked
from crystalframer_jax.runs.run_checkpoints import RunCheckpoints
from crystalframer_jax.runs.run_directory import (
    SUMMARY_FILE,
    as_json,
    data_of,
    read_summary,
    record_environment,
    sealed,
    store_config,
    stored_config,
    warn,
)
from crystalframer_jax.training.averages import averages_in, ready_for_swa, weights_of, with_batch_statistics
from crystalframer_jax.training.consensus import agreed_implementation
from crystalframer_jax.training.errors import TrainingError
from crystalframer_jax.training.layer_names import count_parameters, layer_mask
from crystalframer_jax.training.layout import for_steps
from crystalframer_jax.training.ledger import Ledger, StepResult
from crystalframer_jax.training.logging import Logbook, announced, read_metrics, say
from crystalframer_jax.training.nonfinite import batch_report
from crystalframer_jax.training.pretrained import seen_before, start_from
from crystalframer_jax.training.requests import SAVE, STOP, Requests
from crystalframer_jax.training.state import TrainState, Tree
from crystalframer_jax.training.step import LossFunction, initial_state, make_loss, make_recipe, make_train_step
from crystalframer_jax.training.targets import kept_references, labels_to_learn, statistics_of
from crystalframer_jax.training.validation import Evaluator


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
        checkpoints and the progress bar wait for the end of such a chunk.
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

    Attributes, none of which changes:
      config, workdir, dataset, options: as given.
      batches: the batches of all steps, and the devices that share them.
      statistics: what standardises the targets.
      coverage: what the crystals trained on hold, for predictions to compare with.
      recipe: loss, optimizer, learning rate, averages.
      model: the Flax module.
      evaluator: predictions for the splits of the dataset.
      step: one optimizer step, or a chunk of them in one dispatch, compiled.
      requests: what the training is asked to do: to save, to stop.
      checkpoints: those of the run directory.
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
        self.options = options or Options()
        self._interruption = interruption or Interruption()
        atoms = config.train_filter_min, config.train_filter_max
        rows = rows_to_train_on(dataset, *atoms)
        self.statistics = statistics_of(config, dataset, rows, kept_references(config, workdir))
        self.batches = TrainingBatches(
            dataset,
            config.batch_size,
            config.n_epochs,
            config.seed,
            config.model.parts,
            atoms,
            config.train_percent_check,
            on_device=self.options.on_device,
            devices=devices,
            learned=labels_to_learn(self.statistics, dataset),
        )
        if len(self.batches) >= 2**31:  # steps are counted in int32
            raise ConfigError(f"n_epochs={config.n_epochs} makes {len(self.batches):,} steps, which is out of bounds")
        self.coverage = Coverage.of(dataset.table, self.batches.indices)
        self._followed = f"val_{metrics_for(self.statistics).followed}"
        self.recipe = make_recipe(config, self.batches.steps_per_epoch)
        self.model = CrystalFramer(config.model, agreed_implementation(self.options.implementation, self._trace))
        self.evaluator = Evaluator(config, self.model, self.batches, self.statistics, self.options.report)
        step = make_train_step(self.recipe, self.loss(devices.axis), self.options.skip_nonfinite, devices)
        self.step = announced("the training step", step)
        self.requests = Requests(self._interruption, config.checkpoint_minutes, devices)
        self.checkpoints = RunCheckpoints(
            workdir, devices, config.model_checkpoint_save_top_k, config.keep_last_checkpoints
        )

    def initial_state(self, model: CrystalFramer | None = None) -> TrainState:
        """Makes the state that the training (of `model` instead, if given) starts from, on all devices."""
        devices, key = self.batches.devices, jax.random.fold_in(jax.random.key(self.config.seed), 0)
        return initial_state(model or self.model, self.recipe, devices.put(self.batches[0]), key, devices)

    def loss(self, axis: str | None, model: CrystalFramer | None = None) -> LossFunction:
        """Makes the loss of the part that every device of `axis` has of a batch, see `make_loss`."""
        return make_loss(model or self.model, self.recipe, self.statistics, int(seed_of(self.config.seed, 1)), axis)

    def _trace(self, implementation: Implementation) -> None:
        """Raises ImplementationError if a training step cannot be taken so by this process."""
        model = CrystalFramer(self.config.model, implementation)
        state, batch = jax.eval_shape(lambda: self.initial_state(model)), self.batches.parts_of(0)[0]
        jax.eval_shape(lambda state: self.loss(None, model)(state.params, state, batch, False), state)

    def finish(self) -> dict[str, Any]:
        """Trains the epochs that are left, evaluates, writes summary.json and prints it."""
        try:
            state, meta = self._start()
            summary = self._known_summary(meta)
            if meta["epoch"] + 1 < self.config.n_epochs:
                with self._interruption.stepping():
                    state, meta = self._epochs(state, meta)
            self.checkpoints.wait()
            if summary is None:
                summary = sealed(self._summary(state, meta))
                if is_first_process():
                    write_json(self.workdir / SUMMARY_FILE, summary)
        except TrainingInterrupted as request:
            with self._interruption.stepping():
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

    # Training

    def _epochs(self, state: TrainState, meta: dict[str, Any]) -> tuple[TrainState, dict[str, Any]]:
        """Trains to the end; every epoch ends with validation and, if it may be of use, a checkpoint."""
        config, batches, first = self.config, self.batches, meta["epoch"] + 1
        work = batches.dispatches(int(state.step), self.options.steps_per_dispatch)
        best = self.checkpoints.losses()
        with Logbook(self.workdir, batches, first, self.options.wandb_project, as_json(config)) as log:
            for epoch in range(first, config.n_epochs):
                ledger = Ledger(epoch, batches, int(state.step), meta, self.options.skip_nonfinite, log)
                state = self._epoch(state, ledger, work)
                metrics = self._validated(state, ledger)
                meta = self._meta(epoch, ledger.seconds, [], metrics[self._followed])
                is_last = epoch == config.n_epochs - 1
                if is_last:
                    state = with_batch_statistics(self.model, state, batches, self.options.report)
                log.write(metrics)
                best = sorted([*best, metrics["val_loss"]])[: config.model_checkpoint_save_top_k]
                request = self.requests.now()
                if request or is_last or metrics["val_loss"] in best:
                    self._save(state, meta, metrics["val_loss"])
                log.end_epoch(metrics, self.statistics)
                if request == STOP and not is_last:
                    raise self.requests.stopped(f"after epoch {epoch + 1}")
        return state, meta

    def _epoch(self, state: TrainState, ledger: Ledger, work: Iterator[Batch | Chunk]) -> TrainState:
        """Takes the steps of an epoch that are left, one or a chunk at a time; saves and stops when asked to."""
        epoch, freeze_norm = ledger.epoch, self._freezes_norm(ledger.epoch)
        replicate = self.batches.devices.replicate
        laid_out, undo = for_steps(state, self.config)
        state = replicate(laid_out)
        while not ledger.is_complete:
            state, result = self.step(state, ledger.next_of(work), freeze_norm=freeze_norm)
            ledger.add(result)
            self.options.report(f"epoch {epoch + 1}, step {ledger.position} of {ledger.steps}")
            request = self.requests.after_dispatch()
            is_due = request == STOP or (request == SAVE and not ledger.is_complete)
            if failed := ledger.look(at_all=is_due or ledger.is_complete):
                raise self._not_finite(failed, replicate(undo(state)), epoch)
            if is_due:
                meta = self._meta(epoch - 1, ledger.seconds, ledger.results, {})
                self._save(replicate(undo(state)), meta, None)
            if request == STOP:
                raise self.requests.stopped(f"in epoch {epoch + 1}")
        if not ledger.results:
            raise TrainingError(f"all steps of epoch {epoch + 1} were skipped; try a smaller lr")
        return replicate(undo(state))

    def _validated(self, state: TrainState, ledger: Ledger) -> dict[str, Any]:
        """Returns the metrics of an epoch whose steps were all taken, with those of validation."""
        trained, step = ledger.metrics(), int(state.step)
        val_loss, followed = self.evaluator.validate(weights_of(state), ledger.epoch)
        lr, skipped_steps = float(self.recipe.learning_rate(step - 1)), int(state.skipped_steps)
        validated = {"val_loss": val_loss, self._followed: followed, "lr": lr, "skipped_steps": skipped_steps}
        return {"epoch": ledger.epoch, "step": step} | trained | validated

    def _freezes_norm(self, epoch: int) -> bool:
        """Tells whether BatchNorm keeps its statistics in an epoch."""
        return epoch >= self.config.n_epochs - self.config.freeze_bn_epochs

    def _save(self, state: TrainState, meta: dict[str, Any], val_loss: float | None) -> None:
        self.checkpoints.save(state, meta, val_loss)
        self.requests.saved()

    def _meta(self, epoch: int, seconds: float, results: list, followed: dict[str, float]) -> dict[str, Any]:
        """Makes what a checkpoint tells beside its arrays.

        The last finished epoch and results of the steps since then, configuration and data.
        """
        targets = [dataclasses.asdict(s) for s in self.statistics]
        made_with = {"config": as_json(self.config), "data": data_of(self.dataset)}
        made_with["training_set"] = dataclasses.asdict(self.coverage)
        done = {"epoch": epoch, "seconds": seconds, "results": results, "targets": targets, self._followed: followed}
        return done | made_with

    def _not_finite(self, result: StepResult, state: TrainState, epoch: int) -> TrainingError:
        """Writes a report of the batch of a step that was not finite; returns its error."""
        step = result.step  # the weights stand still since then, also if later steps were taken
        self.checkpoints.wait()
        last = self.checkpoints.last()
        file = self.workdir / f"nonfinite_step_{step}.json"
        if is_first_process():
            frozen, state = self._freezes_norm(epoch), on_one_device(state)
            report = batch_report(self.loss(None), self.statistics, state, self.batches, result, frozen)
            write_json(file, {"epoch": epoch, "last_good_checkpoint": last, **report})
        json_from_first_process(None)  # wait for it: the error of the others would end this process before
        return TrainingError(
            f"the loss or its gradient is not finite at step {step} (epoch {epoch + 1}); {file} tells about its batch, "
            f"{'the last checkpoint is kept' if last else 'nothing was saved yet'}. Try a smaller lr (in a run that "
            "has a checkpoint: --config.lr=... --resume_with_changes=lr) or let such steps be skipped "
            "(--skip_nonfinite=10)"
        )

    # Its start and its end

    def _start(self) -> tuple[TrainState, dict[str, Any]]:
        """Returns the state to go on from, and the meta data of its checkpoint."""
        splits = ", ".join(f"{len(self.dataset.splits[name]):,} {name}" for name in SPLITS)
        like = jax.eval_shape(self.initial_state)
        for key in ("frozen_layers", "reinit_layers"):  # a misspelt layer is an error before anything is done
            layer_mask(like.params, getattr(self.config, key), key)
        found = self.checkpoints.restore_latest(like)
        if found is not None:
            state, meta = found
            self._check_resumable(state, meta)
            done = f"{int(state.step):,} of {len(self.batches):,} steps"
            say(f"{self.dataset.name}: {splits}; continuing {self.workdir} after {done}")
            return ready_for_swa(state, self.recipe.swa_first_step), meta
        state = self.initial_state()
        if self.config.pretrained_model:
            state = self.checkpoints.on_all(
                lambda: start_from(on_one_device(state), self.config, self.statistics), like
            )
            for told in seen_before(self.config, self.dataset) if is_first_process() else ():
                say(f"warning: {told}; errors on them are those of training")
        trainable = count_parameters(state.params, self.config.frozen_layers)
        say(f"{self.dataset.name}: {splits}; {trainable:,} trainable parameters")
        say(describe(self.config))
        say(self.batches.describe())
        return state, {"epoch": -1, "seconds": 0.0, "results": []}

    def _check_resumable(self, state: TrainState, meta: dict[str, Any]) -> None:
        """Raises UserError if this training cannot go on from a state, though its arrays fit."""
        step, skipped = int(state.step), int(state.skipped_steps)
        what = f"the checkpoint of step {step:,} of {self.workdir}"
        checked(meta, what, "epoch", "seconds", "results", "targets")
        since = step - (meta["epoch"] + 1) * self.batches.steps_per_epoch
        if not len(meta["results"]) <= since <= self.batches.steps_per_epoch:
            raise TrainingError(
                f"{what} is damaged: it tells of epoch {meta['epoch'] + 1:,} and {len(meta['results']):,} steps since "
                "then; move it away to go on from the one before it"
            )
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

    def _known_summary(self, meta: dict[str, Any]) -> dict[str, Any] | None:
        """Reads the summary of a finished run, unless values have changed; tells the directory what runs now."""
        file, found = self.workdir / SUMMARY_FILE, None
        if is_first_process():
            if meta["epoch"] + 1 < self.config.n_epochs or stored_config(self.workdir) != as_json(self.config):
                file.unlink(missing_ok=True)
            store_config(self.config, self.workdir)
            record_environment(self.workdir)
            try:
                found = read_summary(self.workdir)
            except CheckpointError as error:
                warn(f"{error}; it is made again")
        is_whole = found and "seal" in found and not found.get("not_written")
        return json_from_first_process(found if is_whole else None)

    def _summary(self, state: TrainState, meta: dict[str, Any]) -> dict[str, Any]:
        """Finds the errors of the last, best and averaged weights; writes the files and figures that go with them.

        Those that could not be written are listed as "not_written".
        """
        epochs = read_metrics(self.workdir) if is_first_process() else []
        epochs = [line for line in epochs if {"loss", "val_loss", "lr", "crystals_per_s"} <= line.keys()]
        if len(epochs) != self.config.n_epochs:
            say(f"warning: {self.workdir / 'metrics.jsonl'} tells of {len(epochs)} epochs only")
        first_swa_epoch = self.config.n_epochs - self.config.swa_epochs if self.config.swa_epochs else None
        not_written: list[str] = []
        if epochs:
            with reporting(self.workdir / "learning_curve.png", not_written):
                plots.write(plots.learning_curve(epochs, first_swa_epoch), self.workdir / "learning_curve.png")

        def stop_if_asked(split: str) -> None:
            if self.requests.now() == STOP:
                raise self.requests.stopped(f"before the errors on {split} crystals")

        folder = self.workdir if is_first_process() else None
        errors = self.evaluator.compare(self._candidates(state), stop_if_asked, folder, not_written)
        return errors | {
            "score_history": score_history([line["val_loss"] for line in epochs]),
            "epochs": self.config.n_epochs,
            "steps": int(state.step),
            "skipped_steps": int(state.skipped_steps),
            "seconds": meta["seconds"],
            "crystals_per_s": float(np.median([line["crystals_per_s"] for line in epochs] or [0.0])),
            "parameters": count_parameters(state.params, self.config.frozen_layers),
            "num_frame_samples": self.config.num_frame_samples,
            **({"not_written": not_written} if not_written else {}),
        }

    def _candidates(self, state: TrainState) -> dict[str, Tree]:
        """Lists the weights of which one is selected: last, best and, if there are any, averages."""
        candidates = {"last": weights_of(state)}
        if best := self.checkpoints.best_model(state):
            candidates["best"] = {name: best[name] for name in candidates["last"]}
        return candidates | {name: weights_of(state, name) for name in averages_in(state)}
