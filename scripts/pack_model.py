"""Makes a model of the package of a finished run.

    python scripts/pack_model.py RUN NAME CARD.json

Writes crystalframer_jax/models/NAME.npz, NAME.seen.npz (by which its training crystals are known again) and its entry
in index.json; CARD.json is what the card says, words by subject, "in short" among them.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from crystalframer_jax.cli.common import reporting_errors
from crystalframer_jax.cli.evaluate import dataset_of
from crystalframer_jax.data.seen import SeenCrystals
from crystalframer_jax.data.store import crystals_of
from crystalframer_jax.files import read_json, write_json
from crystalframer_jax.inference.predictor import Predictor
from crystalframer_jax.inference.shipped import write_model, write_seen
from crystalframer_jax.runs.checkpoints import Checkpoints

MODELS = Path(__file__).parents[1] / "crystalframer_jax" / "models"


@reporting_errors()
def main() -> None:
    """Packs the model that prediction with a run uses."""
    parser = argparse.ArgumentParser("pack_model.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("run", metavar="RUN", help="run directory")
    parser.add_argument("name", metavar="NAME", help="of the model")
    parser.add_argument("card", metavar="CARD.json", type=Path, help="what its card says")
    arguments = parser.parse_args()
    predictor = Predictor.load(arguments.run)
    meta = Checkpoints(Path(arguments.run)).meta(predictor.step)
    file = MODELS / f"{arguments.name}.npz"
    checksum = write_model(file, predictor.variables, predictor.config, meta | {"step": predictor.step})
    dataset = dataset_of(predictor, arguments.run)
    rows = np.concatenate([dataset.splits["train"], dataset.splits["val"]])  # it was chosen by these
    seen = SeenCrystals.of(dataset.table.ids[rows], crystals_of(dataset.table, rows))
    index = json.loads((MODELS / "index.json").read_text())
    version = index.get(arguments.name, {}).get("version", 0) + 1
    index[arguments.name] = {
        "file": file.name,
        "sha256": checksum,
        "version": version,
        "seen": write_seen(MODELS / f"{arguments.name}.seen.npz", seen),
        "card": read_json(arguments.card),
    }
    write_json(MODELS / "index.json", index)
    print(f"{file}: {file.stat().st_size / 1e6:.2f} MB, version {version}")


if __name__ == "__main__":
    main()
