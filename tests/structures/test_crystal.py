"""Crystals from pymatgen, ASE and files against hand-written coordinates; unusable input is an error."""

import itertools
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from pymatgen.core import DummySpecies, Lattice, Molecule, Species, Structure
from support import EXAMPLES, ROOT

from crystalframer_jax.structures.crystal import Crystal, CrystalError
from crystalframer_jax.structures.files import as_crystals, read_crystals

STRUCTURES = Path(__file__).parent / "files"

CELL = "".join(f"_cell_length_{x} 5\n" for x in "abc") + "".join(
    f"_cell_angle_{x} 90\n" for x in ("alpha", "beta", "gamma")
)
LOOP = "loop_\n_atom_site_label\n" + "".join(f"_atom_site_fract_{x}\n" for x in "xyz")
CIF = "data_x\n" + CELL + LOOP + "Na1 0 0 0\nCl1 0.5 0.5 0.5\n"
CIF_OCCUPANCY = "data_x\n" + CELL + LOOP + "_atom_site_occupancy\n"
POSCAR = "salt\n2.0\n1.5 0 0\n0 2.0 0\n0 0 2.5\nNa Cl\n1 1\nDirect\n0 0 0\n0.5 0.5 0.5\n"
XYZ = '2\nLattice="3 0 0 0 4 0 0 0 5" Properties=species:S:1:pos:R:3\nNa 0 0 0\nCl 1.5 2 2.5\n'


@pytest.fixture(autouse=True)
def _no_stray_warnings():
    """A warning that a test does not expect is a failure: reading a sound file is quiet."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def read_text(directory: Path, name: str, text: str) -> list[Crystal]:
    path = directory / name
    path.write_text(text, encoding="utf-8")
    return read_crystals(path)


def sorted_rows(rows: np.ndarray) -> np.ndarray:
    """Rows in lexicographic order after rounding away the noise of 1e-6."""
    rows = np.round(rows, 6) + 0.0
    return rows[np.lexsort(rows.T[::-1])]


def fractional(crystal: Crystal) -> np.ndarray:
    return crystal.positions @ np.linalg.inv(crystal.lattice)


def images(crystal: Crystal, reach: int = 1) -> np.ndarray:
    """[n, (2 reach + 1)^3, 3] positions of every atom in the surrounding cells."""
    shifts = np.array(list(itertools.product(range(-reach, reach + 1), repeat=3)))
    return crystal.positions[:, None] + shifts @ crystal.lattice


# Examples and sample files


def test_rock_salt_cif_is_expanded_to_the_conventional_cell():
    (crystal,) = read_crystals(EXAMPLES / "NaCl.cif")
    assert (Path(crystal.id).name, crystal.formula, crystal.num_atoms) == ("NaCl.cif", "NaCl", 8)
    assert crystal.species.dtype == np.int32 and crystal.occupancies is None
    np.testing.assert_allclose(crystal.lattice, 5.6402 * np.eye(3), atol=1e-12)
    half = 5.6402 / 2
    sodium = [[0, 0, 0], [0, half, half], [half, 0, half], [half, half, 0]]
    chlorine = [[half, half, half], [half, 0, 0], [0, half, 0], [0, 0, half]]
    for z, expected in ((11, sodium), (17, chlorine)):
        found = crystal.positions[crystal.species == z]
        np.testing.assert_allclose(sorted_rows(found), sorted_rows(np.array(expected)), atol=1e-6)


def test_perovskite_and_silicon_examples():
    (perovskite,) = read_crystals(EXAMPLES / "SrTiO3.cif")
    assert perovskite.formula == "SrTiO3"
    assert perovskite.species.tolist() == [38, 22, 8, 8, 8]
    titanium = perovskite.positions[1]
    bonds = np.linalg.norm(images(perovskite)[2:] - titanium, axis=-1).ravel()
    np.testing.assert_allclose(np.sort(bonds)[:7], [3.9053 / 2] * 6 + [np.sqrt(5) * 3.9053 / 2], atol=1e-9)

    (silicon,) = read_crystals(EXAMPLES / "POSCAR_Si")
    assert silicon.species.tolist() == [14, 14]
    np.testing.assert_allclose(silicon.lattice, 5.431 / 2 * (1 - np.eye(3)), atol=1e-12)
    np.testing.assert_allclose(silicon.positions, [[0, 0, 0], [5.431 / 4] * 3], atol=1e-12)


def test_cif_with_space_group_symbol_only_has_the_tetrahedra_of_quartz():
    (quartz,) = read_crystals(STRUCTURES / "quartz.cif")
    assert np.bincount(quartz.species)[[8, 14]].tolist() == [6, 3]
    oxygen = images(quartz)[quartz.species == 8].reshape(-1, 3)
    for silicon in quartz.positions[quartz.species == 14]:
        bonds = np.sort(np.linalg.norm(oxygen - silicon, axis=-1))
        assert np.all((bonds[:4] > 1.59) & (bonds[:4] < 1.62)) and bonds[4] > 3


def test_cif_rounded_to_three_digits_gives_no_duplicates():
    (zincite,) = read_crystals(STRUCTURES / "ZnO.cif")
    assert zincite.species.tolist() == [30, 30, 8, 8] and zincite.occupancies is None
    expected = [[1 / 3, 2 / 3, 0], [2 / 3, 1 / 3, 0.5], [1 / 3, 2 / 3, 0.345], [2 / 3, 1 / 3, 0.845]]
    np.testing.assert_allclose(fractional(zincite), expected, atol=4e-4)


def test_cif_with_several_blocks_of_one_name_and_a_disordered_site():
    mixed, pure = read_crystals(STRUCTURES / "disordered.cif")
    assert (Path(mixed.id).name, Path(pure.id).name) == ("disordered.cif#1", "disordered.cif#2")
    assert mixed.species.tolist() == [11, 17] and pure.species.tolist() == [19, 17]
    expected = np.zeros((2, 98))
    expected[0, 10], expected[0, 18], expected[1, 16] = 0.6, 0.3, 1
    np.testing.assert_allclose(mixed.occupancies, expected, atol=1e-12)
    assert mixed.formula == "K0.3Na0.6Cl1"
    assert pure.occupancies is None


def test_contcar_keeps_left_handed_cell_and_atoms_outside_it():
    (crystal,) = read_crystals(STRUCTURES / "CONTCAR")
    np.testing.assert_allclose(crystal.lattice, [[0, 4.2, 0], [4.2, 0, 0], [0, 0, 10]], atol=1e-12)
    assert np.linalg.det(crystal.lattice) < 0
    assert crystal.species.tolist() == [12, 8]
    np.testing.assert_allclose(crystal.positions, [[2.1, -1.05, 1], [0, 5.25, 1]], atol=1e-12)


def test_extxyz_frames_keep_positions():
    chloride, copper = read_crystals(STRUCTURES / "frames.extxyz")
    assert (Path(chloride.id).name, Path(copper.id).name) == ("frames.extxyz#1", "frames.extxyz#2")
    assert chloride.species.tolist() == [55, 17]
    np.testing.assert_array_equal(chloride.positions, [[0, 0, 0], [1.785] * 3])
    assert copper.species.tolist() == [29]
    np.testing.assert_array_equal(copper.positions, [[-7, 0.5, 0.25]])
    np.testing.assert_array_equal(copper.lattice, [[0, 1.8, 1.8], [1.8, 0, 1.8], [1.8, 1.8, 0]])


# Details of the formats


@pytest.mark.parametrize("name", ["POSCAR", "contcar.relaxed", "a.vasp", "b.poscar", "Grüße 晶体.vasp"])
def test_poscar_names_and_non_ascii_paths(tmp_path, name):
    (crystal,) = read_text(tmp_path, name, POSCAR)
    assert Path(crystal.id).name == name and crystal.species.tolist() == [11, 17]
    np.testing.assert_allclose(crystal.positions, [[0, 0, 0], [1.5, 2, 2.5]], atol=1e-12)


@pytest.mark.parametrize("name", ["é.cif", "é.CIF", "é.xyz", "é.extxyz"])
def test_non_ascii_names_of_other_kinds(tmp_path, name):
    (crystal,) = read_text(tmp_path, name, CIF if name.lower().endswith("cif") else XYZ)
    assert Path(crystal.id).name == name and crystal.formula == "NaCl"


def test_poscar_variants(tmp_path):
    direct = np.array([[0, 0, 0], [1.5, 2, 2.5]])
    cartesian = POSCAR.replace("Direct", "Cartesian").replace("0.5 0.5 0.5", "0.75 1 1.25")
    # a negative scale is the volume of the cell, here that of scale 2
    variants = [cartesian, POSCAR.replace("2.0\n", "-60\n"), cartesian.replace("2.0\n", "-60\n")]
    variants += [POSCAR.replace("\n", "\r\n"), POSCAR + "\n0 0 0\n0 0 0\n"]
    variants += [POSCAR.replace("Na Cl\n", "").replace("0 0 0\n0.5 0.5 0.5", "0 0 0 Na\n0.5 0.5 0.5 Cl")]
    for text in variants:
        (crystal,) = read_text(tmp_path, "POSCAR", text)
        assert crystal.species.tolist() == [11, 17]
        np.testing.assert_allclose(crystal.lattice, np.diag([3, 4, 5]), atol=1e-12)
        np.testing.assert_allclose(crystal.positions, direct, atol=1e-12)


def test_cif_labels(tmp_path):
    rows = "D1 0 0 0\nT1 0 0 0.5\nFe3+ 0.5 0 0\nOw2 0 0.5 0\n"
    (crystal,) = read_text(tmp_path, "a.cif", "data_x\n" + CELL + LOOP + rows)
    assert sorted(crystal.species.tolist()) == [1, 1, 8, 26] and crystal.occupancies is None


def test_cif_reads_through_byte_order_mark_and_windows_line_ends(tmp_path):
    (crystal,) = read_text(tmp_path, "a.cif", "\ufeff" + CIF.replace("\n", "\r\n"))
    assert crystal.species.tolist() == [11, 17]


def test_cif_occupancies(tmp_path):
    rows = "D1 0 0 0 0.7\nH1 0 0 0 0.3\nO1 0.5 0 0 1.04(3)\nNa1 0 0.5 0 0\nNa2 0 0 0.5 ?\n"
    (crystal,) = read_text(tmp_path, "a.cif", CIF_OCCUPANCY + rows)
    assert sorted(crystal.species.tolist()) == [1, 8, 11] and crystal.occupancies is None


def test_cif_warns_of_hydrogens_and_formulas_that_do_not_add_up(tmp_path):
    with pytest.warns(UserWarning, match=r"a\.cif: left out hydrogens"):
        (crystal,) = read_text(tmp_path, "a.cif", CIF.replace("Cl1", "Wat1"))
    assert crystal.species.tolist() == [11, 8]
    formula = "data_x\n_chemical_formula_sum 'H2 Na Cl'\n"
    with pytest.warns(UserWarning, match=r"a\.cif: the sites make NaCl, the file states H2 Na Cl"):
        read_text(tmp_path, "a.cif", CIF.replace("data_x\n", formula))


# pymatgen and ASE


def test_from_pymatgen_drops_charges_and_merges_isotopes():
    lattice = Lattice([[3, 0, 0], [0.5, 4, 0], [0, 1, 5]])
    species = [{"D": 0.5, "H": 0.5}, Species("T", 1), {Species("Fe", 3): 1.0}]
    fractional_positions = [[0, 0, 0], [0.5, 1.5, -0.25], [0.25, 0.5, 0.5]]
    crystal = Crystal.from_pymatgen(Structure(lattice, species, fractional_positions), id="mp-1")
    assert crystal.id == "mp-1"
    assert crystal.species.tolist() == [1, 1, 26] and crystal.occupancies is None
    expected = [[0, 0, 0], [2.25, 5.75, -1.25], [1, 2.5, 2.5]]
    np.testing.assert_allclose(crystal.positions, expected, atol=1e-12)
    np.testing.assert_array_equal(crystal.lattice, [[3, 0, 0], [0.5, 4, 0], [0, 1, 5]])


def test_from_pymatgen_keeps_partial_occupancies():
    sites = [{"D": 0.4, "H": 0.2, "Li+": 0.1}, "O"]
    crystal = Crystal.from_pymatgen(Structure(Lattice.cubic(4), sites, [[0, 0, 0], [0.5] * 3]))
    assert crystal.species.tolist() == [1, 8]
    expected = np.zeros((2, 98))
    expected[0, 0], expected[0, 2], expected[1, 7] = 0.6, 0.1, 1
    np.testing.assert_allclose(crystal.occupancies, expected, atol=1e-12)


def test_ase_round_trip(tmp_path):
    ase = pytest.importorskip("ase")
    from ase.io import write

    lattice = np.array([[0, 0, 3.0], [0, 4.0, 0.5], [5.0, 0, 0]])
    positions = np.array([[0.1, -7.0, 0.3], [2.5, 1.0, 9.0]])
    atoms = ase.Atoms("NaCl", positions=positions, cell=lattice, pbc=True)
    write(tmp_path / "a.extxyz", [atoms, atoms[[1]]], format="extxyz")
    write(tmp_path / "POSCAR", atoms, format="vasp", direct=False)
    (direct,), (poscar,) = as_crystals(atoms), as_crystals(tmp_path / "POSCAR")
    frame, single = as_crystals(str(tmp_path / "a.extxyz"))
    assert np.linalg.det(lattice) < 0
    for crystal in (direct, poscar, frame):
        assert crystal.species.tolist() == [11, 17]
        np.testing.assert_allclose(crystal.lattice, lattice, atol=1e-8)
        np.testing.assert_allclose(crystal.positions, positions, atol=1e-8)
    assert single.species.tolist() == [17]


def test_ase_errors():
    ase = pytest.importorskip("ase")
    slab = ase.Atoms("Na", cell=[3, 4, 5], pbc=[True, True, False])
    mixed = ase.Atoms("Na", cell=[3, 4, 5], pbc=True, info={"occupancy": {"0": {"Na": 0.5, "K": 0.5}}})
    for atoms, message in [
        (slab, "r7: not periodic in all three directions"),
        (ase.Atoms("Na", cell=[3, 4, 0], pbc=True), "r7: not periodic in all three directions"),
        (ase.Atoms(cell=[3, 4, 5], pbc=True), "r7: no atoms"),
        (ase.Atoms("NaX", positions=[[0] * 3, [1] * 3], cell=[3, 4, 5], pbc=True), "r7: site 2: element of"),
        (mixed, "r7: partial occupancies"),
    ]:
        with pytest.raises(CrystalError, match=message):
            Crystal.from_ase(atoms, id="r7")
    mixed.info["occupancy"] = {"0": {"Na": 1.0}}
    assert Crystal.from_ase(mixed).species.tolist() == [11]


def test_missing_ase_names_the_package_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ase.io.extxyz", None)
    with pytest.raises(CrystalError, match=r"a\.xyz: .*pip install ase"):
        read_text(tmp_path, "a.xyz", XYZ)


def test_import_is_light():
    code = "import sys, crystalframer_jax.structures.files; print({'ase', 'pymatgen'} & set(sys.modules))"
    root = ROOT
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert run.stdout.strip() == "set()"


def test_as_crystals_accepts_each_kind():
    crystal = Crystal([11], [[0, 0, 0]], np.eye(3) * 3)
    assert as_crystals(crystal)[0] is crystal
    assert as_crystals(Structure(Lattice.cubic(3), ["Na"], [[0, 0, 0]]))[0].species.tolist() == [11]
    assert as_crystals(EXAMPLES / "POSCAR_Si")[0].id == str(EXAMPLES / "POSCAR_Si")
    for item, message in [(3, "cannot make a crystal of 'int'"), (Molecule(["H"], [[0, 0, 0]]), "not periodic")]:
        with pytest.raises(CrystalError, match=message):
            as_crystals(item)


@pytest.mark.parametrize(
    ("structure", "message"),
    [
        (Structure(Lattice(np.eye(3) * 4, pbc=(True, True, False)), ["Na"], [[0] * 3]), "not periodic"),
        (Structure(Lattice.cubic(4), ["Na", "Es"], [[0] * 3, [0.5] * 3]), "r7: site 2: element Es"),
        (Structure(Lattice.cubic(4), [DummySpecies("X")], [[0] * 3]), "r7: site 1: element X"),
        (Structure(Lattice.cubic(4), [], []), "r7: no atoms"),
    ],
)
def test_pymatgen_errors(structure, message):
    with pytest.raises(CrystalError, match=message):
        Crystal.from_pymatgen(structure, id="r7")


# The checks of a crystal


def test_formula_with_noble_gases():
    crystal = Crystal([9, 54, 9], [[0, 0, 2], [0, 0, 0], [0, 0, -2]], np.eye(3) * 6)
    assert (crystal.formula, crystal.num_atoms) == ("XeF2", 3)


def test_arrays_are_copied_and_converted():
    positions = np.zeros((1, 3))
    crystal = Crystal(np.array([98], np.int64), positions, np.diag([-3, 4, 5]))
    positions += 1
    assert crystal.positions.dtype == crystal.lattice.dtype == np.float64
    assert crystal.species.dtype == np.int32 and not crystal.positions.any()
    assert np.linalg.det(crystal.lattice) == pytest.approx(-60)


def test_a_thousand_atoms_and_unusual_cells():
    grid = np.array(list(itertools.product(range(10), repeat=3)))
    assert Crystal(np.full(1000, 6), grid * 1.5, np.eye(3) * 15).formula == "C"
    Crystal([6], [[0, 0, 0]], [[4, 0, 0], [404, 4, 0], [0, -800, 4]])  # skewed, one atom
    Crystal([6, 6], [[1e3, -1e4, 0], [0, 0, 2]], np.eye(3) * 4.1)  # far outside
    Crystal([6, 6], [[0, 0, 0], [5e3, 5e3, 5e3]], np.eye(3) * 1e4)  # nearly empty


@pytest.mark.parametrize("seed", range(12))
def test_close_atoms_are_found_as_by_brute_force(seed):
    rng = np.random.default_rng(seed)
    lattice = rng.normal(size=(3, 3)) + np.diag(rng.choice([-3, 3], 3))
    positions = rng.uniform(-2, 3, (8, 3)) @ lattice
    shift = rng.integers(-3, 4, 3) @ lattice
    direction = rng.normal(size=3)
    direction /= np.linalg.norm(direction)
    species = rng.integers(1, 99, 8)
    positions[5] = positions[2] + shift + direction * 0.101
    wide = Crystal(species, positions, lattice)
    offsets = images(wide, 10)[None] - wide.positions[:, None, None]
    distances = np.linalg.norm(offsets, axis=-1)
    assert np.sort(distances.ravel())[8] == pytest.approx(0.101)  # the closest pair after the 8 zeros
    positions[5] = positions[2] + shift + direction * 0.099
    with pytest.raises(CrystalError, match=r"^r7: site 3 \(.*\) and site 6 \(.*\) are 0\.099 Å apart; "):
        Crystal(species, positions, lattice, id="r7")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"species": []}, "r7: no atoms"),
        ({"species": [11.0, 17.0]}, "r7: species are float64"),
        ({"species": [11, 0]}, "site 2: element of atomic number 0"),
        ({"species": [11, 99]}, "site 2: element Es"),
        ({"species": [-1, 17]}, "site 1: element of atomic number -1"),
        ({"positions": [[0, 0, 0]]}, r"r7: positions must have shape \[2, 3\]"),
        ({"positions": [[0, 0, 0], [0, np.nan, 0]]}, "r7: positions: NaN or infinity in row 2"),
        ({"positions": [[0, np.inf, 0], [0, 0, 0]]}, "r7: positions: NaN or infinity in row 1"),
        ({"lattice": np.eye(2)}, r"r7: lattice must have shape \[3, 3\]"),
        ({"lattice": np.diag([3, 3, np.nan])}, "r7: lattice: NaN or infinity in row 3"),
        ({"lattice": np.diag([3, 3, 0])}, "r7: the cell has no volume"),
        ({"lattice": [[300, 0, 0], [0, 300, 0], [300, 300, 1e-5]]}, "r7: the cell has no volume"),
        ({"lattice": np.eye(3) * 0.46}, "r7: the cell has no volume"),
        ({"lattice": np.diag([0.09, 9, 9])}, r"site 1 \(Na\) and its periodic image are 0\.090 Å apart"),
        ({"positions": [[0, 0, 0], [4.0, -4, 8.05]]}, r"site 1 \(Na\) and site 2 \(Cl\) are 0\.050 Å apart"),
        ({"occupancies": np.zeros((2, 98))}, "occupancies of site 1"),
        ({"occupancies": np.full((2, 98), 1.002 / 98)}, "occupancies of site 1 .* sum to 1.002"),
        ({"occupancies": np.eye(98)[[10, 16]] * 2 - np.eye(98)[[11, 17]]}, "site 1 .* are negative"),
        ({"occupancies": np.eye(97)[[10, 16]]}, "occupancies must have shape"),
    ],
)
def test_unusable_crystals(changes, message):
    arguments = {"species": [11, 17], "positions": [[0, 0, 0], [2, 2, 2]], "lattice": np.eye(3) * 4}
    Crystal(**arguments, id="r7")
    with pytest.raises(CrystalError, match=message) as error:
        Crystal(**(arguments | changes), id="r7")
    assert "\n" not in str(error.value)


NO_CELL = CIF.replace(CELL, "")
GROUP = "_symmetry_space_group_name_H-M '{}'\nloop_"
SYMOPS = "loop_\n_symmetry_equiv_pos_as_xyz\n'x,y,z'\n'{}'\nloop_"
BAD_FILES = {
    "empty": ("a.cif", " \n", "a.cif: the file is empty"),
    "kind": ("a.json", "{}", r"a.json: unknown kind of file; .*CIF \(.cif\), POSCAR .*, extended XYZ"),
    "garbage cif": ("a.cif", "\x00\x07 hello", "a.cif: no atoms"),
    "cif without atoms": ("a.cif", "data_x\n" + CELL, "a.cif: no atoms"),
    "cif without header": ("a.cif", CIF.replace("data_x", ""), "a.cif: no atoms; a CIF needs a data_ block"),
    "cif with empty loop": ("a.cif", "data_x\n" + CELL + LOOP, "a.cif: cannot be read as CIF"),
    "cif without lattice": ("a.cif", NO_CELL, "a.cif: no lattice; add the six"),
    "cif without an angle": ("a.cif", CIF.replace("_cell_angle_beta 90", ""), "a.cif: no lattice; add the six"),
    "cif without volume": ("a.cif", CIF.replace("_cell_length_b 5", "_cell_length_b 0"), "a.cif: .*no volume"),
    "cif cut short": ("a.cif", CIF[:-4], "a.cif: cannot be read as CIF"),
    "cif single site": ("a.cif", CIF.replace("loop_\n", "").replace("_label", "_label Na"), "put them in a loop_"),
    "cif unknown coordinate": ("a.cif", CIF.replace("0.5 0.5", "? 0.5"), "a.cif: cannot be read .*'?'"),
    "cif no coordinate": ("a.cif", CIF.replace("0.5 0.5", ". 0.5"), "a.cif: site Cl1 is not understood"),
    "cif nan": ("a.cif", CIF.replace("0.5 0.5", "nan 0.5"), "a.cif: cannot be read as CIF .*NaN"),
    "cif label dropped": ("a.cif", CIF.replace("Cl1", "OH1"), "a.cif: site OH1 is not understood"),
    "cif no element": ("a.cif", CIF.replace("Cl1", "?"), r"a.cif: site \? is not understood"),
    "cif dummy": ("a.cif", CIF.replace("Cl1", "X1"), "a.cif: site .: element X is not supported"),
    "cif einsteinium": ("a.cif", CIF.replace("Cl1", "Es1"), "a.cif: site .: element Es is not supported"),
    "cif occupancy .": ("a.cif", CIF_OCCUPANCY + "Na1 0 0 0 .\nCl1 0 .5 0 1", "site Na1 is not understood"),
    "cif occupancy < 0": ("a.cif", CIF_OCCUPANCY + "Na1 0 0 0 -1\nCl1 0 .5 0 1", "site Na1 is not understood"),
    "cif occupancy > 1": ("a.cif", CIF_OCCUPANCY + "Na1 0 0 0 1.1\n", r"site 1 \(Na\) sum to 1.1"),
    "cif two on one site": ("a.cif", CIF + "Br1 0.5 0.5 0.5\n", r"site 2 \(Cl, Br\) sum to 2"),
    "cif close": ("a.cif", CIF + "Br1 0.5 0.5 0.51\n", r"site . \(..\) and site 3 \(..\) are 0.050 Å apart"),
    "cif unknown group": ("a.cif", CIF.replace("loop_", GROUP.format("F m 3 q")), "symmetry not understood"),
    "cif bad operation": ("a.cif", CIF.replace("loop_", SYMOPS.format("x,y,w")), "a.cif: symmetry not understood"),
    "cif second block": ("a.cif", CIF + NO_CELL, "a.cif#2: no lattice"),
    "garbage poscar": ("POSCAR", "hello\nworld", "POSCAR: cannot be read as POSCAR"),
    "poscar cut short": ("POSCAR", POSCAR[:-12], r"POSCAR: .*\(it ends early\)"),
    "poscar no names": ("POSCAR", POSCAR.replace("Na Cl\n", ""), "POSCAR: no element names"),
    "poscar name dropped": ("POSCAR", POSCAR.replace("1 1", "1"), "POSCAR: 2 element names for 1 counts"),
    "poscar atom dropped": ("POSCAR", POSCAR + "0.1 0.1 -.2\n", "POSCAR: coordinates beyond the 2 atoms"),
    "poscar no atoms": ("POSCAR", POSCAR.replace("1 1", "0 0"), "POSCAR: cannot be read as POSCAR .*at least 1"),
    "poscar nan": ("POSCAR", POSCAR.replace("0.5 0.5", "nan 0.5"), "POSCAR: positions: NaN"),
    "poscar flat": ("POSCAR", POSCAR.replace("0 0 2.5", "1 1 0"), "POSCAR: the cell has no volume"),
    "poscar element": ("POSCAR", POSCAR.replace("Na", "Es"), "POSCAR: site 1: element Es"),
    "garbage xyz": ("a.xyz", "hello\n", "a.xyz: cannot be read as extended XYZ"),
    "molecule": ("a.xyz", "1\nmethane\nC 0 0 0\n", "a.xyz: not periodic .*; add a Lattice="),
    "xyz cluster": ("a.xyz", XYZ.replace("Prop", 'pbc="F F F" Prop'), "a.xyz: not periodic in all three"),
    "xyz zero vector": ("a.xyz", XYZ.replace("0 0 5", "0 0 0"), "a.xyz: not periodic in all three"),
    "xyz bad lattice": ("a.xyz", XYZ.replace("0 0 5", "5"), "a.xyz: cannot be read as extended XYZ"),
    "xyz cut short": ("a.xyz", XYZ + XYZ[:-15], "a.xyz: cannot be read as extended XYZ"),
    "xyz frame dropped": ("a.xyz", XYZ + "\n" + XYZ, "a.xyz: empty line before or after frame 1"),
    "xyz second frame": ("a.xyz", XYZ + XYZ.replace("1.5", "inf"), "a.xyz#2: positions: NaN or infinity in row 2"),
    "xyz unknown element": ("a.xyz", XYZ.replace("Na", "Qq"), "a.xyz: cannot be read .*'Qq'"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_unusable_files(tmp_path, case):
    name, text, message = BAD_FILES[case]
    with pytest.raises(CrystalError, match=message) as error:
        read_text(tmp_path, name, text)
    assert "\n" not in str(error.value)


def test_unreadable_paths(tmp_path):
    with pytest.raises(CrystalError, match=r"nothing\.cif: .*No such file"):
        read_crystals(tmp_path / "nothing.cif")
    (tmp_path / "folder.cif").mkdir()
    with pytest.raises(CrystalError, match=r"folder\.cif: cannot be read .*directory"):
        read_crystals(tmp_path / "folder.cif")
