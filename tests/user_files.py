"""Crystals and labels as users have them: a few bundled crystals written in many ways, prepared by the command."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from small_sets import raw_records

from crystalframer_jax.cli.prepare import prepare_main
from crystalframer_jax.data.store import read_set

LABEL = "formation_energy_per_atom"


def records(count: int = 12) -> list[dict[str, Any]]:
    """Records with id, lattice, species, frac_coords and e_form."""
    kept = ("id", "lattice", "species", "frac_coords")
    return [{key: raw[key] for key in kept} | {"e_form": raw[LABEL]} for raw in raw_records(count)]


def as_dict(record: dict[str, Any]) -> dict[str, Any]:
    """The crystal as pymatgen's Structure.as_dict() has it."""
    pairs = zip(record["species"], record["frac_coords"], strict=True)
    sites = [{"species": [{"element": symbol, "occu": 1}], "abc": abc, "label": symbol} for symbol, abc in pairs]
    return {"@class": "Structure", "charge": 0, "lattice": {"matrix": record["lattice"]}, "sites": sites}


def cif(record: dict[str, Any]) -> str:
    """The crystal as a CIF without symmetry."""
    lattice = np.array(record["lattice"])
    lengths = np.linalg.norm(lattice, axis=1)
    cosines = [lattice[i] @ lattice[j] / lengths[i] / lengths[j] for i, j in ((1, 2), (0, 2), (0, 1))]
    lines = ["data_x"]
    lines += [f"_cell_length_{name} {value:.10f}" for name, value in zip("abc", lengths, strict=True)]
    angles = zip(("alpha", "beta", "gamma"), np.degrees(np.arccos(cosines)), strict=True)
    lines += [f"_cell_angle_{name} {value:.10f}" for name, value in angles]
    lines += ["loop_", "_atom_site_label", "_atom_site_type_symbol", *(f"_atom_site_fract_{axis}" for axis in "xyz")]
    for number, (symbol, abc) in enumerate(zip(record["species"], record["frac_coords"], strict=True)):
        lines.append(f"{symbol}{number} {symbol} {' '.join(f'{x:.12f}' for x in abc)}")
    return "\n".join(lines) + "\n"


def write_cifs(folder: Path, count: int = 12, suffix: str = ".cif") -> list[dict[str, Any]]:
    """Writes the crystals as ID.cif; returns their records."""
    folder.mkdir(parents=True, exist_ok=True)
    for record in records(count):
        (folder / f"{record['id']}{suffix}").write_text(cif(record))
    return records(count)


class Prepared(NamedTuple):
    """What the command made and told."""

    columns: dict[str, np.ndarray]
    text: str
    folder: Path

    def ids(self, split: str) -> list[str]:
        return [str(id) for id in self.columns["ids"][self.columns[split]]]


def prepared(data: Path, source: Path, capsys, *flags: str) -> Prepared:
    """Prepares a source as `prepare_data.py` does, in one process."""
    prepare_main(["--target_set=x", f"--source={source}", f"--data_dir={data}", "--workers=1", *flags])
    captured = capsys.readouterr()
    _, columns = read_set(data / "x")
    return Prepared(columns, captured.out + captured.err, data / "x" / "crystals")


def refused(data: Path, source: Path, *flags: str) -> str:
    """The one line that the command ends with."""
    with pytest.raises(SystemExit) as ended:
        prepare_main(["--target_set=x", f"--source={source}", f"--data_dir={data}", "--workers=1", *flags])
    message = str(ended.value)
    assert message.startswith("error: ") and "\n" not in message
    return message
