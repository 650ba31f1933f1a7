"""Crystals that are in two splits: by id, and by structure in any description."""

from pathlib import Path

import numpy as np
import pytest
from pymatgen.core import Structure
from small_sets import raw_records

from crystalframer_jax.batching.table import crystal_columns
from crystalframer_jax.data.leakage import Leak, find_leaks
from crystalframer_jax.structures.crystal import Crystal

RECORDS = raw_records(40)
CIF = Path(__file__).parents[2] / "examples" / "SrTiO3.cif"


def structure_of(record: dict) -> Structure:
    return Structure(record["lattice"], record["species"], record["frac_coords"])


def leaks_of(train: list[Structure], val: list[Structure], test: list[Structure], ids: list[str] | None = None):
    """The leaks as (kind, split, number there, other split, number there)."""
    structures = [*train, *val, *test]
    ids = ids or [str(number) for number in range(len(structures))]
    crystals = [Crystal.from_pymatgen(structure, id) for structure, id in zip(structures, ids, strict=True)]
    sizes = np.cumsum([0, len(train), len(val), len(test)])
    splits = {name: np.arange(*sizes[k : k + 2]) for k, name in enumerate(("train", "val", "test"))}
    first = {name: rows[0] if len(rows) else 0 for name, rows in splits.items()}
    found = find_leaks(crystal_columns(crystals), splits)
    return [(x.kind, x.split, x.held - first[x.split], x.other_split, x.other - first[x.other_split]) for x in found]


@pytest.fixture(scope="module")
def others() -> list[Structure]:
    """Crystals that are all different."""
    return [structure_of(record) for record in RECORDS[:30]]


def rotated(structure: Structure) -> Structure:
    rotation, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))
    rotation *= np.sign(np.linalg.det(rotation))
    return Structure(structure.lattice.matrix @ rotation, structure.species, structure.frac_coords)


def shuffled(structure: Structure) -> Structure:
    order = np.random.default_rng(1).permutation(len(structure))
    coords = structure.frac_coords[order] + [0.31, 0.17, -2.4]
    return Structure(structure.lattice, [structure.species[i] for i in order], coords)


def supercell(structure: Structure) -> Structure:
    return structure * [[1, 1, 0], [0, 2, 0], [0, 0, 1]]


def niggli(structure: Structure) -> Structure:
    return structure.get_reduced_structure()


def rounded(structure: Structure) -> Structure:
    return Structure(np.round(structure.lattice.matrix, 3), structure.species, np.round(structure.frac_coords, 4))


def stretched(structure: Structure) -> Structure:
    return Structure(structure.lattice.matrix * 1.006, structure.species, structure.frac_coords)


def moved(structure: Structure) -> Structure:
    coords = structure.frac_coords.copy()
    coords[0] += 0.15 / np.array(structure.lattice.abc)
    return Structure(structure.lattice, structure.species, coords)


def substituted(structure: Structure) -> Structure:
    return Structure(structure.lattice, ["Pu", *structure.species[1:]], structure.frac_coords)


@pytest.mark.parametrize("change", [rotated, shuffled, supercell, niggli, rounded])
@pytest.mark.parametrize("number", [30, 33, 37])
def test_the_same_structure_described_otherwise_is_found(others, change, number):
    structure = structure_of(RECORDS[number])
    assert leaks_of(others, [], [structure]) == []
    leaks = leaks_of(
        [*others[:7], structure, *others[7:]], [], [others[0].copy().scale_lattice(500.0), change(structure)]
    )
    assert leaks == [("structure", "test", 1, "train", 7)]


@pytest.mark.parametrize("change", [stretched, moved, substituted])
def test_another_structure_of_nearly_the_same_kind_is_not(change):
    structure = next(s for s in map(structure_of, RECORDS) if 4 <= len(s) <= 12)
    assert leaks_of([structure], [], [structure.copy()]) == [("structure", "test", 0, "train", 0)]
    assert leaks_of([structure], [], [change(structure)]) == []


def test_large_cells_are_the_same_only_if_they_are():
    cell = Structure(np.eye(3) * 3.7, ["Cu"] * 4, [[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]]) * (4, 4, 4)
    orderings = []
    for seed in range(4):
        gold = np.random.default_rng(seed).permutation(256)[:128]
        orderings.append(Structure(cell.lattice, ["Au" if i in gold else "Cu" for i in range(256)], cell.frac_coords))
    assert leaks_of(orderings[:3], [], orderings[3:]) == []
    assert leaks_of(orderings, [], [shuffled(orderings[2])]) == [("structure", "test", 0, "train", 2)]


def test_polymorphs_are_different():
    rutile = Structure.from_spacegroup(
        "P4_2/mnm", np.diag([4.59, 4.59, 2.96]), ["Ti", "O"], [[0, 0, 0], [0.305] * 2 + [0]]
    )
    anatase = Structure.from_spacegroup(
        "I4_1/amd", np.diag([3.78, 3.78, 9.51]), ["Ti", "O"], [[0, 0.75, 0.125], [0, 0.25, 0.081]]
    )
    assert rutile.composition.reduced_formula == anatase.composition.reduced_formula == "TiO2"
    assert leaks_of([rutile], [anatase], [supercell(anatase)]) == [("structure", "test", 0, "val", 0)]


def test_ids_come_first_and_every_pair_of_splits_is_looked_at(others):
    a, b, c, d = others[:4]
    ids = ["a", "b", "x", "d", "a", "y", "b", "d"]
    leaks = leaks_of([a, b, c, d], [b, c], [a, others[5]], [*ids[:4], "b", "y", "z", "d"])
    assert leaks == [
        ("structure", "test", 0, "train", 0),
        ("id", "test", 1, "train", 3),
        ("id", "val", 0, "train", 1),
        ("structure", "val", 1, "train", 2),
    ]


def test_duplicates_within_a_split_are_no_leaks(others):
    assert leaks_of([others[0], others[0]], [others[1], others[1]], [others[2], others[2]], list("aabbcc")) == []


def test_disordered_crystals():
    structure = Structure.from_file(CIF)
    mixed, other = structure.copy(), structure.copy()
    mixed.replace_species({"Sr": {"Sr": 0.7, "Ba": 0.3}})
    other.replace_species({"Sr": {"Sr": 0.6, "Ba": 0.4}})
    assert leaks_of([structure, mixed], [], [other]) == []
    assert leaks_of([structure, mixed], [], [rotated_sites(mixed)]) == [("structure", "test", 0, "train", 1)]


def rotated_sites(structure: Structure) -> Structure:
    rotation, _ = np.linalg.qr(np.random.default_rng(3).normal(size=(3, 3)))
    sites = [site.species for site in structure]
    return Structure(structure.lattice.matrix @ rotation, sites, structure.frac_coords)


def test_worker_processes_find_the_same(others):
    crystals = [Crystal.from_pymatgen(s, str(n)) for n, s in enumerate([*others, *map(shuffled, others)])]
    columns = crystal_columns(crystals)
    splits = {"train": np.arange(30), "val": np.arange(0), "test": np.arange(30, 60)}
    serial = find_leaks(columns, splits)
    assert serial == [Leak("structure", "test", row + 30, "train", row) for row in range(30)]
    assert find_leaks(columns, splits, workers=2) == serial
