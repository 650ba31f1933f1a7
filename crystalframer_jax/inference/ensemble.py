"""Deep ensembles: several trainings of a model, their mean prediction and how far they disagree."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from crystalframer_jax.batching.table import table_of
from crystalframer_jax.config import ConfigError
from crystalframer_jax.data.splits import SPLITS
from crystalframer_jax.data.store import Dataset
from crystalframer_jax.inference.evaluation import Predictions
from crystalframer_jax.inference.given import predict_usable
from crystalframer_jax.inference.predictor import Predictor
from crystalframer_jax.reporting import metrics
from crystalframer_jax.reporting.predictions import plot_calibration, reporting, write_split
from crystalframer_jax.reporting.suspects import SUSPECTS_FILE, suspect_labels, write_suspects
from crystalframer_jax.runs.checkpoints import CheckpointError
from crystalframer_jax.runs.claims import MEMBER
from crystalframer_jax.runs.run_directory import CONFIG_FILE, SUMMARY_FILE, read_config
from crystalframer_jax.structures.crystal import Crystal
from crystalframer_jax.structures.neighbors import LatticeBox


class Ensemble:
    """Predicts with several models: the mean over them, and their standard deviation as its uncertainty.

    The standard deviation is that of a sample, with the divisor M - 1 for M models (0 for one model). Where frames are
    drawn, each model averages its draws first. Lakshminarayanan et al., NeurIPS 2017.

    Attributes:
      members: the models.
      names: of their run directories, or numbers.
      targets: name and unit of each target, which all members share; mean and standard deviation of the first member.
      config: of the first member.
      origin: where they come from, in words.
    """

    def __init__(self, members: Sequence[Predictor], names: Sequence[str] = (), folder: Path | None = None):
        """Raises ConfigError if there are no members, or some that predict other targets or in other units."""
        if not members:
            raise ConfigError("an ensemble needs at least one model")
        self.members = tuple(members)
        self.names = tuple(names) or tuple(str(number) for number in range(len(members)))
        self.targets, self.config = members[0].targets, members[0].config
        outputs = [", ".join(s.title for s in member.targets) for member in members]
        self._common("predicts", outputs, "the models of an ensemble must predict the same")
        used = ", ".join(sorted({member.weights for member in self.members}))
        of_folder = f"{used} weights of the {self.spread_over()} in {folder}"
        self.origin = of_folder if folder else f"ensemble of {self.spread_over()}"

    @classmethod
    def load(cls, run_dir: str | Path, weights: str | None = None, precision: str | None = None) -> "Ensemble":
        """Loads the ensemble of a run directory with member_0, member_1, ...; the rest as for `Predictor.load`.

        Raises CheckpointError, naming it, for a member that is missing or not trained to its end.
        """
        folder = Path(run_dir).expanduser()
        names = member_names(folder)
        for name in names:
            if not (folder / name / SUMMARY_FILE).is_file():
                raise CheckpointError(
                    f"{folder / name} is not trained to its end; the training command of the ensemble continues it"
                )
        return cls([Predictor.load(folder / name, weights, precision) for name in names], names, folder)

    card = ""  # as of a `Predictor` that does not come with the package

    @property
    def cutoff(self) -> float | LatticeBox:
        """Radius of the neighbor rows that serve all members, Å; ConfigError if they have different ones."""
        cutoffs = [member.cutoff for member in self.members]
        why = "no table of neighbors serves both; predict structures, or evaluate them one by one"
        return self._common("has the cutoff", cutoffs, why)

    def predict(
        self,
        structures: Iterable[Any] | Any,
        num_frame_samples: int | None = None,
        progress: bool = False,
        return_std: bool = False,
    ) -> Any:
        """Predicts the median, or mean (`ensemble_combine`), over the members [B, T] in label units.

        Arguments and errors as for `Predictor.predict`; the standard deviation is that over the members.
        """
        found = self.predict_with_spread(structures, num_frame_samples, progress)
        return found.pair(self.spread_over(num_frame_samples)) if return_std else found.value

    def predict_with_spread(
        self, structures: Iterable[Any] | Any, num_frame_samples: int | None = None, progress: bool = False
    ) -> Predictions:
        """Predicts as `predict`, with the standard deviation over the members: value and spread, both [B, T]."""

        def predict(crystals: list[Crystal]) -> Predictions:
            tables = {cutoff: table_of(crystals, cutoff) for cutoff in {member.cutoff for member in self.members}}
            samples = [
                member.predict_all(tables[member.cutoff], num_frame_samples, progress, f"model {name}").value
                for name, member in zip(self.names, self.members, strict=True)
            ]
            return Predictions.over(np.stack(samples), self.config.ensemble_combine)

        return predict_usable(self, structures, predict)

    def predict_dataset(self, dataset: Dataset, rows: np.ndarray, num_frame_samples: int | None = None) -> Predictions:
        """Predicts value and spread for rows of a data set whose neighbor rows have the cutoff of all members."""
        samples = self.predict_members(dataset, rows, num_frame_samples)
        return Predictions.over(samples, self.config.ensemble_combine)

    def predict_members(self, dataset: Dataset, rows: np.ndarray, num_frame_samples: int | None = None) -> np.ndarray:
        """Predicts them with every member, [M, C, T]."""
        _ = self.cutoff  # raises if there is none
        return np.stack([member.predict_dataset(dataset, rows, num_frame_samples).value for member in self.members])

    def predict_splits(self, dataset: Dataset, num_frame_samples: int | None = None) -> dict[str, np.ndarray]:
        """Predicts the crystals of every split with every member, [M, C, T] by split."""
        return {split: self.predict_members(dataset, dataset.splits[split], num_frame_samples) for split in SPLITS}

    def spread_over(self, num_frame_samples: int | None = None) -> str:
        """Tells what the spread of predictions is over: "3 models"."""
        return f"{len(self.members)} model{'s' if len(self.members) > 1 else ''}"

    def _common(self, verb: str, values: Sequence[Any], why: str) -> Any:
        """Returns the value that all members share; ConfigError naming two members that do not."""
        names = [
            f"member {n.removeprefix('member_')} ({m.origin})" for n, m in zip(self.names, self.members, strict=True)
        ]
        for name, value in zip(names, values, strict=True):
            if value != values[0]:
                raise ConfigError(f"{names[0]} {verb} {values[0]}, {name} {value}: {why}")
        return values[0]


def is_ensemble(folder: Path) -> bool:
    """Tells whether a run directory holds members."""
    return bool(_members(folder))


def member_names(folder: Path) -> list[str]:
    """Returns member_0, member_1, ...: as many as config.json says, or up to the last that is there."""
    found = _members(folder)
    planned = read_config(folder).ensemble_size if (folder / CONFIG_FILE).is_file() else 0
    if not found:
        raise CheckpointError(f"{folder} holds no member_0; is it the run directory of an ensemble?")
    return [f"member_{number}" for number in range(max(planned, max(found) + 1))]


def _members(folder: Path) -> list[int]:
    """Returns the numbers of the members in a folder."""
    matches = [re.fullmatch(MEMBER, path.name) for path in folder.glob("member_*") if path.is_dir()]
    return [int(match[1]) for match in matches if match]


def load_model(run_dir: str | Path, weights: str | None = None, precision: str | None = None) -> Predictor | Ensemble:
    """Loads the ensemble or the single model of a run directory, or the model of RUN/checkpoints/STEP."""
    return (Ensemble if is_ensemble(Path(run_dir).expanduser()) else Predictor).load(run_dir, weights, precision)


# Evaluation


def ensemble_summary(ensemble: Ensemble, dataset: Dataset, folder: str | Path) -> dict[str, Any]:
    """Sums up the errors of an ensemble and of its members on all splits, as plain JSON.

    Besides the errors (`target_metrics`) it has the mean standard deviation of crystals with a label and, on the
    test crystals, the area between the calibration curve and the diagonal. Writes predictions_test.csv (with the
    spread), parity_test.png, calibration_test.png (with several targets calibration_test_TARGET.png) and
    suspect_labels.csv into `folder`, which must exist; those that could not be written are listed as "not_written".
    Classes have roc_test.png, and no calibration: their errors have no Gaussian to compare with.
    """
    targets, folder = ensemble.targets, Path(folder)
    train_labels = dataset.labels[dataset.splits["train"]]
    members: list[dict[str, Any]] = [
        {"run": name, "weights": member.weights} for name, member in zip(ensemble.names, ensemble.members, strict=True)
    ]
    judged = metrics.metrics_for(targets)
    baselines = f"mean_predictor_{judged.main}"
    summary: dict[str, Any] = {"ensemble_size": len(members), "members": members, baselines: {}}
    not_written: list[str] = []
    samples_of = ensemble.predict_splits(dataset)
    for split, samples in samples_of.items():
        labels = dataset.labels[dataset.splits[split]]
        value, spread = Predictions.over(samples, ensemble.config.ensemble_combine)
        baseline = metrics.mean_predictor_errors(labels, targets, train_labels)
        errors = metrics.with_baseline(metrics.target_metrics(value, labels, targets), baseline, targets)
        for t, s in enumerate(targets):
            of_known = spread[np.isfinite(labels[:, t]), t]
            errors[s.name]["mean_std"] = float(of_known.mean()) if of_known.size else None
        if split == "test":
            write_split(folder, dataset, split, value, targets, not_written, spread)
        if split == "test" and judged.task == "regression":
            figure = folder / "calibration_test.png"
            with reporting(figure, not_written):
                _, found = plot_calibration(figure, labels, value, spread, targets)
                for name, numbers in found.items():
                    errors[name]["miscalibration_area"] = numbers["miscalibration_area"]
        summary[baselines][split] = baseline
        summary[split] = errors
        for member, sample in zip(members, samples, strict=True):
            member[split] = metrics.main_metrics(sample, labels, targets)
    summary["task"] = judged.task
    summary["units"] = {s.name: s.unit for s in targets}
    suspects = suspect_labels(dataset, samples_of, targets)
    summary["suspect_labels"] = {split: sum(line[0] == split for line in suspects) for split in samples_of}
    with reporting(folder / SUSPECTS_FILE, not_written):
        write_suspects(folder / SUSPECTS_FILE, suspects)
    return summary | ({"not_written": not_written} if not_written else {})
