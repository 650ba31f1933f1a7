"""How much predictions depend on how a crystal is written down: its atoms in another order, another cell, a supercell.

python scripts/check_descriptions.py RUN [--target_set=mp_flla_2015] [--data_dir=DIR] [--crystals=400]
    [--most_atoms=25] [--precision=float32]
"""

import argparse
import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from scipy.spatial.transform import Rotation

from crystalframer_jax.cli.arguments import PRECISIONS
from crystalframer_jax.cli.common import reporting_errors
from crystalframer_jax.data.datasets import folder_of
from crystalframer_jax.data.store import crystal_at, read_set
from crystalframer_jax.errors import UserError
from crystalframer_jax.inference.ensemble import load_model
from crystalframer_jax.structures.crystal import Crystal
from crystalframer_jax.text import table

Description = Callable[[Crystal, np.random.Generator], Crystal]
SHEARS = np.eye(3) + np.array([np.eye(3, k=1) * [0, 1, 0], np.eye(3, k=1) * [0, 0, -1], np.eye(3, k=-2) * 2])


def reordered(crystal: Crystal, rng: np.random.Generator) -> Crystal:
    """Lists the atoms in another order."""
    order = rng.permutation(crystal.num_atoms)
    return dataclasses.replace(crystal, species=crystal.species[order], positions=crystal.positions[order])


def recelled(crystal: Crystal, rng: np.random.Generator) -> Crystal:
    """Takes another cell of the same volume, and atoms of other cells."""
    lattice = np.linalg.multi_dot([*rng.permutation(SHEARS), crystal.lattice])
    images = rng.integers(-2, 3, (crystal.num_atoms, 3))
    return dataclasses.replace(crystal, positions=crystal.positions + images @ lattice, lattice=lattice)


def niggli(crystal: Crystal, _: np.random.Generator) -> Crystal:
    """Takes the Niggli cell."""
    from pymatgen.core import Lattice

    given = Lattice(crystal.lattice)
    found = given.find_mapping(given.get_niggli_reduced_lattice())
    return dataclasses.replace(crystal, lattice=np.rint(found[2]) @ crystal.lattice) if found else crystal


def doubled(crystal: Crystal, rng: np.random.Generator) -> Crystal:
    """Doubles the cell along one vector."""
    axis = rng.integers(3)
    lattice = crystal.lattice.copy()
    lattice[axis] *= 2
    positions = np.concatenate([crystal.positions, crystal.positions + crystal.lattice[axis]])
    return dataclasses.replace(crystal, species=np.tile(crystal.species, 2), positions=positions, lattice=lattice)


def turned(crystal: Crystal, rng: np.random.Generator) -> Crystal:
    """Turns it as a whole and moves the origin."""
    turn = Rotation.random(None, rng).as_matrix()
    origin = rng.uniform(size=3) @ crystal.lattice
    return dataclasses.replace(
        crystal, positions=(crystal.positions + origin) @ turn.T, lattice=crystal.lattice @ turn.T
    )


def all_but_niggli(crystal: Crystal, rng: np.random.Generator) -> Crystal:
    """All of these together; the Niggli cell would undo another cell."""
    for describe in (recelled, doubled, reordered, turned):
        crystal = describe(crystal, rng)
    return crystal


DESCRIPTIONS: dict[str, Description] = {
    "atoms in another order": reordered,
    "another cell": recelled,
    "Niggli cell": niggli,
    "supercell of two": doubled,
    "turned, origin moved": turned,
    "all of these but the Niggli cell": all_but_niggli,
}


@reporting_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Predicts crystals in all descriptions and prints how far the predictions move."""
    parser = argparse.ArgumentParser("check_descriptions.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("run", metavar="RUN", help="run directory, or a model of the package")
    parser.add_argument(
        "--target_set", default="mp_flla_2015", metavar="NAME", help="prepared target set of the crystals"
    )
    parser.add_argument("--data_dir", default="", metavar="DIR")
    parser.add_argument("--crystals", type=int, default=400, metavar="N", help="how many, drawn at random")
    parser.add_argument("--most_atoms", type=int, default=25, metavar="N", help="of a crystal")
    parser.add_argument("--precision", choices=PRECISIONS, help="to predict with; default: float64 on a CPU")
    arguments = parser.parse_args(argv)
    model = load_model(arguments.run, precision=arguments.precision)
    found = read_set(folder_of(arguments.target_set, arguments.data_dir))
    if found is None:
        raise UserError(f"{arguments.target_set} is not prepared; run scripts/prepare_data.py")
    columns, rng = found[1], np.random.default_rng(0)
    small = np.flatnonzero(np.diff(columns["atom_offset"]) <= arguments.most_atoms)
    rows = rng.choice(small, min(arguments.crystals, len(small)), replace=False)
    crystals = [crystal_at(columns, row) for row in rows.tolist()]
    expected = model.predict(crystals)
    lines = []
    for title, describe in DESCRIPTIONS.items():
        predictions = model.predict([describe(crystal, rng) for crystal in crystals])
        moved = np.abs(predictions - expected)
        for t, s in enumerate(model.targets):
            unit = 1e3 if s.unit.startswith("eV") else 1
            share = np.mean(moved[:, t] > 1e-3)
            found_here = unit * np.array([moved[:, t].mean(), np.percentile(moved[:, t], 99), moved[:, t].max()])
            name = f"m{s.unit}" if unit > 1 else s.unit
            lines.append([title, s.name, name or None, f"{share:.1%}", *(f"{x:.2g}" for x in found_here)])
    print(table([f"{len(crystals)} crystals", "target", "unit", "moved by 0.001", "mean", "99 %", "largest"], lines, 3))


if __name__ == "__main__":
    main()
