"""Numbers stated in small files are compared with what the file can hold before anything is made of them."""

import os
import time
from pathlib import Path

import pytest

from crystalframer_jax.structures.crystal import CrystalError
from crystalframer_jax.structures.files import LARGEST_FILE, cif_crystals, read_crystals, structures_in

CELL = "".join(f"_cell_length_{x} 5\n" for x in "abc") + "".join(
    f"_cell_angle_{x} 90\n" for x in ("alpha", "beta", "gamma")
)
SITES = "loop_\n_atom_site_label\n" + "".join(f"_atom_site_fract_{x}\n" for x in "xyz")
OPERATIONS = "loop_\n_symmetry_equiv_pos_as_xyz\n"
CIF = "data_x\n" + CELL + OPERATIONS + "'x,y,z'\n" + SITES + "Na1 0 0 0\nCl1 0.5 0.5 0.5\n"
POSCAR = "salt\n1.0\n3 0 0\n0 4 0\n0 0 5\nNa Cl\n1 1\nDirect\n0 0 0\n0.5 0.5 0.5\n"
XYZ = '2\nLattice="3 0 0 0 4 0 0 0 5" Properties=species:S:1:pos:R:3\nNa 0 0 0\nCl 1.5 2 2.5\n'
MANY = "'x,y,z'\n" + "".join(f"'x+0.{number},y,z'\n" for number in range(100_000))

REFUSED = {
    "poscar count": ("POSCAR", POSCAR.replace("1 1", "1 1000000000"), "1,000,000,000 atoms, of at most 50,000"),
    "poscar count with lines": ("POSCAR", POSCAR.replace("1 1", "1 1_000_000_000"), "1,000,000,000 atoms, of at most"),
    "poscar counts that sum up": ("POSCAR", POSCAR.replace("1 1", "1000000000 -999999998"), "1,000,000,000 atoms"),
    "poscar counts beyond the file": ("POSCAR", POSCAR.replace("1 1", "1 40000"), r"40,001 atoms in 11 lines"),
    "poscar negative count": ("POSCAR", POSCAR.replace("1 1", "3 -1"), "2 atoms in 11 lines"),
    "poscar of old VASP": ("POSCAR", POSCAR.replace("Na Cl\n1 1", "1 1000000000"), "1,000,000,000 atoms"),
    "poscar lattice": ("POSCAR", POSCAR.replace("3 0 0", "1e308 0 0"), r"lattice vector of 1e\+308 Å"),
    "poscar coordinate": ("POSCAR", POSCAR.replace("0.5 0.5 0.5", "1e308 0 0"), "site 2 is .* cells away|infinity"),
    "poscar digits": ("POSCAR", POSCAR.replace("1 1", "1 " + "9" * 5000), "cannot be read as POSCAR"),
    "xyz count": ("a.xyz", XYZ.replace("2\n", "1000000000\n", 1), "1,000,000,000 atoms, of at most 50,000"),
    "xyz count beyond the file": ("a.xyz", XYZ.replace("2\n", "40000\n", 1), "40,000 atoms in 3 lines"),
    "xyz negative count": ("a.xyz", XYZ.replace("2\n", "-2\n", 1), "-2 atoms"),
    "xyz columns": ("a.xyz", XYZ.replace("species:S:1", "species:R:1000000000"), "over 1,000 columns"),
    "xyz columns of another": ("a.xyz", XYZ.replace("R:3", "R:3:f:R:999999999"), "over 1,000 columns"),
    "xyz lattice": ("a.xyz", XYZ.replace("3 0 0 0", "1e308 0 0 0"), "lattice vector"),
    "xyz comment": ("a.xyz", XYZ.replace("\nNa", " x=" + "1" * 1_000_001 + "\nNa"), "a comment of 1,000,"),
    "xyz occupancy": ("a.xyz", XYZ.replace("\nNa", " occupancy=\"_JSON {'a': 1}\"\nNa"), "cannot be read|partial"),
    "cif operations": ("a.cif", CIF.replace("'x,y,z'\n", MANY), "769 symmetry operations|100,001 symmetry operations"),
    "cif operation": ("a.cif", CIF.replace("'x,y,z'", "'x,y,z+" + "9" * 15_000 + "'"), "operation .* too long"),
    "cif digits": ("a.cif", CIF.replace("'x,y,z'", "'x,y,z+" + "9" * 60 + "'"), "symmetry operation .* too long"),
    "cif line": ("a.cif", CIF.replace("'x,y,z'", "'x,y,z+" + "9" * 1_000_000 + "'"), "a line of 1,000,008 characters"),
    "cif quotes": ("a.cif", CIF.replace("'x,y,z'", "'x,y,z' " + "'x" * 9000), "too many quotes"),
    "cif lattice": ("a.cif", CIF.replace("_a 5", "_a 1e308"), "a.cif: "),
    "cif coordinate": ("a.cif", CIF.replace("0.5 0.5 0.5", "1e308 0.5 0.5"), "site Cl1 is .* cells away"),
    "cif sites": ("a.cif", CIF + "Na 0.1 0.1 0.1\n" * 20_000, "20,002 sites and 1 symmetry operations are over 10,000"),
    "cif sites of a group": (
        "a.cif",
        CIF.replace(OPERATIONS + "'x,y,z'\n", "_symmetry_space_group_name_H-M 'Fm-3m'\n") + "Na 0.1 0.1 0.1\n" * 200,
        "202 sites and 192 symmetry operations",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_numbers_that_a_file_cannot_hold(tmp_path, case):
    name, text, message = REFUSED[case]
    (tmp_path / name).write_text(text)
    start = time.process_time()
    with pytest.raises(CrystalError, match=message) as error:
        read_crystals(tmp_path / name)
    assert time.process_time() - start < 20
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("change", ["\n" * 100_000, " \n\t\n" * 50_000, "\n" + " " * 19_000])
def test_blank_lines_do_not_take_the_square_of_their_number(change):
    start = time.process_time()
    (crystal,) = cif_crystals(CIF.replace("loop_\n_atom", change + "\nloop_\n_atom"), "a.cif")
    assert crystal.formula == "NaCl"
    assert time.process_time() - start < 20


def test_large_cells_that_are_listed_in_full_are_read():
    """A group that is named P 1, or not named at all, multiplies nothing."""
    grid = "".join(f"Na {x / 6} {y / 6} {z / 6}\n" for x in range(6) for y in range(6) for z in range(6))
    text = ("data_x\n" + CELL + "_symmetry_space_group_name_H-M 'P 1'\n" + SITES + grid).replace(" 5\n", " 18\n")
    (crystal,) = cif_crystals(text, "a.cif")
    assert crystal.num_atoms == 216


def test_files_that_are_too_large_or_no_files(tmp_path):
    large, pipe = tmp_path / "large.cif", tmp_path / "pipe.cif"
    with large.open("wb") as stream:
        stream.truncate(LARGEST_FILE + 1)
    os.mkfifo(pipe)
    for file, message in ((large, r"large\.cif is larger than"), (pipe, r"pipe\.cif is not a regular file")):
        with pytest.raises(CrystalError, match=message):
            read_crystals(file)
    with pytest.raises(CrystalError, match="null"):
        read_crystals(Path("a\0.cif"))


def test_the_structures_of_a_file_are_read_one_by_one(tmp_path):
    """A wrong frame or block does not cost the others."""
    (tmp_path / "a.xyz").write_text(XYZ + XYZ.replace("Na", "Qq") + XYZ)
    (tmp_path / "a.cif").write_text(CIF + CIF.replace("0.5 0.5", "nan 0.5") + CIF)
    for name in ("a.xyz", "a.cif"):
        first, wrong, last = structures_in(tmp_path / name)
        assert first().formula == last().formula == "NaCl"
        assert first().id == f"{tmp_path / name}#1"
        with pytest.raises(CrystalError, match=r"#2: cannot be read"):
            wrong()
