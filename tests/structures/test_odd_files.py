"""Structure files as people have them: read as what they plainly mean, or refused with the reason; never in silence.

`odd_files/` are inputs made after public reports; their frames are crystals of the Materials Project, CC BY 4.0.
"""

import gzip
import warnings
from pathlib import Path

import numpy as np
import pytest

from crystalframer_jax.cli.predict import read_all
from crystalframer_jax.structures import files
from crystalframer_jax.structures.crystal import Crystal, CrystalError
from crystalframer_jax.structures.files import as_crystals, read_crystals

ODD = Path(__file__).parent / "odd_files"

# Name of the file: formula and atoms of its crystals, what a warning says of it ("": there is none).
READ = {
    "unicode_minus.cif": ("MgO", 2, ""),
    "r3c_by_name_rhombohedral_axes.cif": ("Al2O3", 10, "R -3 c was read as R-3c:R"),
    "spinel_by_name_no_formula.cif": ("Mg2AlO4", 56, "F d -3 m alone does not tell which of 2 origins"),
    "vacancy_va.cif": ("Cu", 1, r"left out site Va1 \(line 18\): Va is no atom but a vacancy"),
    "dummy_centroid_cg.cif": ("Ca", 1, r"left out site Cg1, which the file calls a dummy \(line 20\)"),
    "POSCAR_in_nanometres": ("NaCl", 2, "closer than any bond; are lengths in Å"),
    "hydrogen_shares_site.cif": ("La2Fe2P2H1.8O0.2", 8, ""),
    "all_atoms_and_operations.cif": ("Mg2O", 3, r"sites are listed twice.* \(Mg1A on line 20 is Mg1\): left out 1"),
    "occupancies_in_type_symbol.cif": ("Al0.25Si0.75O1", 2, ""),
    "two_digits_thirds.cif": ("Mg", 2, r"site Mg1 \(line 14\) at 0.33 0.67 0.25 was read as 0.3333 0.6667 0.25"),
    "data_word_in_text_field.cif": ("MgO", 2, ""),
    "gzipped.cif.gz": ("MgO", 2, ""),
    "POSCAR.gz": ("MgO", 2, ""),
    "magnetic.mcif": ("FeO", 2, ""),
    "cartesian_coordinates.cif": ("MgO", 2, ""),
    "no_label_column.cif": ("Se", 3, ""),
    "question_mark_coordinate.cif": ("MgO", 2, "left out hydrogens of water or others without coordinates"),
    "attached_hydrogens.cif": ("MgO", 2, "left out hydrogens of water or others without coordinates"),
}


def read(path: Path) -> tuple[list[Crystal], str]:
    """The crystals of a file, and its warnings on lines; all of them are ours."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", DeprecationWarning)  # ASE has some of Python 3.12
        crystals = read_crystals(path)
    assert {warning.category for warning in caught} <= {UserWarning}
    texts = [str(warning.message) for warning in caught]
    assert all(text.startswith(str(path)) and "\n" not in text for text in texts)
    return crystals, "\n".join(texts)


def write(folder: Path, name: str, text: str, encoding: str = "utf-8") -> Path:
    (folder / name).write_bytes(text.encode(encoding))
    return folder / name


@pytest.mark.parametrize("name", READ)
def test_odd_files(name):
    formula, atoms, warning = READ[name]
    (crystal,), told = read(ODD / name)
    assert (crystal.formula, crystal.num_atoms) == (formula, atoms)
    if warning:
        with pytest.warns(UserWarning, match=warning):
            read_crystals(ODD / name)
    else:
        assert not told


def test_positions_of_odd_files():
    (oxide,), _ = read(ODD / "unicode_minus.cif")
    np.testing.assert_allclose(oxide.positions[1] @ np.linalg.inv(oxide.lattice) % 1, [0.5, 0.5, 0.7], atol=1e-9)
    (metal,), _ = read(ODD / "two_digits_thirds.cif")
    places = np.sort(metal.positions @ np.linalg.inv(metal.lattice) % 1, axis=0)
    np.testing.assert_allclose(places, [[1 / 3, 1 / 3, 0.25], [2 / 3, 2 / 3, 0.75]], atol=1e-9)
    (shared,), _ = read(ODD / "hydrogen_shares_site.cif")
    np.testing.assert_allclose(shared.occupancies[:, [0, 7]].sum(axis=0), [1.8, 0.2], atol=1e-9)
    (corundum,), _ = read(ODD / "r3c_by_name_rhombohedral_axes.cif")
    assert np.bincount(corundum.species)[[8, 13]].tolist() == [6, 4]


def test_one_bad_frame_costs_itself(capsys):
    crystals, errors = read_all([ODD / "one_bad_frame_of_24.extxyz"])
    assert len(crystals) == 23 and len(errors) == 1 and "#4: " in errors[0]


def test_slabs_are_the_cells_they_are():
    read, errors = read_all([ODD / "slabs_pbc_TTF.extxyz"])
    assert len(read) == 24 and not errors
    assert {warning for item in read for warning in item.warnings} == {
        "pbc is T T F; taken as the periodic cell that it has, vacuum included"
    }
    molecule = "2\nProperties=species:S:1:pos:R:3\nC 0 0 0\nO 0 0 1.1\n"
    for text in (molecule, molecule.replace("Prop", 'Lattice="9 0 0 0 9 0 0 0 9" pbc="F F F" Prop')):
        with pytest.raises(CrystalError, match=r"a\.xyz: not periodic"):
            files.extxyz_crystals(text, "a.xyz")
    ase = pytest.importorskip("ase")
    with pytest.warns(UserWarning, match="pbc is T F F; taken as"):
        assert as_crystals(ase.Atoms("Na", cell=[4, 4, 9], pbc=[True, False, False]))[0].num_atoms == 1


# Variants of each kind, in a file that a change of one text makes

CELL = "".join(f"_cell_length_{x} 5\n" for x in "abc") + "".join(
    f"_cell_angle_{x} 90\n" for x in ("alpha", "beta", "gamma")
)
OPERATIONS = "loop_\n_symmetry_equiv_pos_as_xyz\n'x,y,z'\n"
SITES = "loop_\n_atom_site_label\n_atom_site_type_symbol\n" + "".join(f"_atom_site_fract_{x}\n" for x in "xyz")
CIF = "data_x\n" + CELL + OPERATIONS + SITES + "Na1 Na 0 0 0\nCl1 Cl 0.5 0.5 0.3\n"
HEXAGONAL = CIF.replace("_b 5", "_b 5.0").replace("gamma 90", "gamma 120").replace("_c 5", "_c 7")
LAST = "Cl1 Cl 0.5 0.5 0.3"
POSCAR = "salt\n1.0\n3 0 0\n0 4 0\n0 0 5\nNa Cl\n1 1\nDirect\n0 0 0\n0.5 0.5 0.3\n"
XYZ = '2\nLattice="3 0 0 0 4 0 0 0 5" Properties=species:S:1:pos:R:3\nNa 0 0 0\nCl 1.5 2 1.5\n'


def named(group: str, rest: str = "", cell: str = CELL) -> str:
    """A CIF whose group is only named."""
    sites = "loop_\n_atom_site_label\n" + "".join(f"_atom_site_fract_{x}\n" for x in "xyz") + "Na1 0.1 0.2 0.3\n"
    return f"data_x\n_symmetry_space_group_name_H-M '{group}'\n{rest}{cell}{sites}"


NUMBERS = {  # what stands instead of 0.3, and what it is; None: refused
    "minus": ("\u22120.3", -0.3),
    "dash": ("\u20130.3", -0.3),
    "hyphen that does not break": ("\u20110.3", -0.3),
    "full width": ("\uff0d\uff10\uff0e\uff13", -0.3),
    "arabic digits": ("\u0660.\u0663", 0.3),
    "devanagari digits": ("\u0966.\u0969", 0.3),
    "blank that does not break": ("\u00a00.3", 0.3),
    "narrow blank": ("0.3\u202f", 0.3),
    "no width": ("0\u200b.3", None),
    "soft hyphen": ("\u00ad0.3", None),
    "superscript": ("0.3\u00b2", None),
    "arabic point": ("\u0660\u066b\u0663", None),
    "comma": ("0,3", None),
    "underscore": ("0_3", None),
    "letter": ("O.3", None),
    "replaced": ("\ufffd0.3", None),
}


@pytest.mark.parametrize("case", NUMBERS)
@pytest.mark.parametrize("name", ["a.cif", "POSCAR", "a.xyz"])
def test_numbers_that_are_not_ascii(tmp_path, name, case):
    text, value = NUMBERS[case]
    whole = {"a.cif": CIF, "POSCAR": POSCAR, "a.xyz": XYZ.replace("1.5\n", "0.3\n")}[name]
    file = write(tmp_path, name, whole.replace("0.3\n", f"{text}\n"))
    if value is None:
        with pytest.raises(CrystalError, match=r"line 18:|line 10:|atom 2:"):
            read_crystals(file)
    else:
        (crystal,), _ = read(file)
        third = crystal.positions[1, 2] / (1 if name == "a.xyz" else 5)
        assert abs((third - value) % 1) < 1e-9 or abs((third - value) % 1 - 1) < 1e-9


OPERATION_CASES = {  # what stands instead of 'x,y,z', number of atoms; 0: refused
    "minus": ("'x,y,z'\n'\u2212x,\u2212y,\u2212z'", 3),
    "dash": ("'x,y,z'\n'\u2013x,\u2013y,\u2013z'", 3),
    "full width": ("'x,y,z'\n'\uff0dx,\uff0dy,\uff0dz'", 3),
    "capitals and blanks": ("'X,Y,Z'\n' -X , -Y , -Z '", 3),
    "translation first": ("'x,y,z'\n'1/2+x,y,z'", 4),
    "no quotes": ("x, y, z\n-x, -y, -z", 3),
    "vulgar fraction": ("'x,y,z'\n'x+\u00bd,y,z'", 0),
    "hexagonal in a cubic cell": ("'x,y,z'\n'-y,x-y,z'", 0),
    "no identity": ("'-x,-y,-z'", 0),
    "two translations": ("'x,y,z'\n'x+1/4+1/4,y,z'", 0),
    "an axis twice": ("'x,y,z'\n'x,x,z'", 0),
    "four parts": ("'x,y,z,t'", 0),
    "two parts": ("'x,y'", 0),
    "scaled": ("'x,y,z'\n'2x,y,z'", 0),
}


@pytest.mark.parametrize("case", OPERATION_CASES)
def test_operations(tmp_path, case):
    text, atoms = OPERATION_CASES[case]
    file = write(tmp_path, "a.cif", CIF.replace("'x,y,z'", text))
    if atoms:
        (crystal,), _ = read(file)
        assert crystal.num_atoms == atoms
    else:
        with pytest.raises(CrystalError, match=r"a\.cif: symmetry not understood.*; list"):
            read_crystals(file)


RHOMBOHEDRAL = CELL.replace(" 90", " 55")
HEX = CELL.replace("gamma 90", "gamma 120")
MONOCLINIC = CELL.replace("beta 90", "beta 100")
TETRAGONAL = CELL.replace("_c 5", "_c 7")
GROUPS = {  # text of the file, atoms (0: refused), what is warned of ("": nothing)
    "hexagonal axes": (named("R -3 c", cell=HEX), 36, ""),
    "rhombohedral axes": (named("R -3 m", cell=RHOMBOHEDRAL), 12, "read as R-3m:R"),
    "by number, rhombohedral": (named("?", "_space_group_IT_number 167\n", RHOMBOHEDRAL), 12, "read as R-3c:R"),
    "axes stated": (named("R -3 c :R", cell=RHOMBOHEDRAL), 12, ""),
    "axes that are not those of the cell": (named("R -3 c :H", cell=RHOMBOHEDRAL), 0, ""),
    "cubic group in a tetragonal cell": (named("F m -3 m", cell=TETRAGONAL), 0, ""),
    "hexagonal group in a cubic cell": (named("P 63/m m c"), 0, ""),
    "monoclinic with another axis": (named("P 1 1 21/b", cell=MONOCLINIC), 0, ""),
    "monoclinic": (named("P 1 21/c 1", cell=MONOCLINIC), 4, ""),
    "two origins": (named("I 41/a m d", cell=TETRAGONAL), 32, "which of 2 origins"),
    "two origins, by number": (named("?", "_symmetry_Int_Tables_number 227\n"), 96, "which of 2 origins"),
    "two origins, orthorhombic": (named("P n n n"), 8, "which of 2 origins"),
    "origin stated": (named("F d -3 m :2"), 192, ""),
    "origin of the ICSD": (named("F d -3 m Z"), 192, ""),
    "origin by Hall": (named("F d -3 m", "_space_group_name_Hall '-F 4vw 2vw 3'\n"), 192, ""),
    "settings, by number": (named("?", "_space_group_IT_number 14\n", MONOCLINIC), 4, "which of 3 origins or settings"),
    "name and number disagree": (named("P n m a", "_space_group_IT_number 63\n"), 0, ""),
    "name and Hall symbol disagree": (named("P n m a", "_space_group_name_Hall '-F 4vw 2vw 3'\n"), 0, ""),
    "no quotes": (named("P 63/m m c", cell=HEX).replace("'", ""), 12, ""),
    "unknown": (named("F m 3 q"), 0, ""),
    "one setting": (named("P 63/m m c", cell=HEX), 12, ""),
}


@pytest.mark.parametrize("case", GROUPS)
def test_groups_by_name(tmp_path, case):
    text, atoms, warning = GROUPS[case]
    file = write(tmp_path, "a.cif", text)
    if not atoms:
        with pytest.raises(CrystalError, match=r"a\.cif: symmetry not understood.*; list"):
            read_crystals(file)
        return
    (crystal,), told = read(file)
    told = "\n".join(line for line in told.split("\n") if "closer than" not in line)
    assert crystal.num_atoms == atoms and (warning in told if warning else not told), told


def test_the_stated_origin_is_that_of_the_operations():
    """Magnesium on 1/8 is one of 8 in origin 2, where pymatgen alone makes 16 of it."""
    spinel = (ODD / "spinel_by_name_no_formula.cif").read_text()
    for name in ("F d -3 m :2", "F d -3 m Z", "F d -3 m (origin choice 2)"):
        (crystal,) = files.cif_crystals(spinel.replace("F d -3 m", name), "a.cif")
        assert (crystal.formula, crystal.num_atoms) == ("MgAl2O4", 56)


SYMBOLS = {  # label and type symbol, element that they are; None: refused; "": left out
    "charge": ("Cl1 Cl1-", 17), "as the label": ("O1w O1w", 8), "valence": ("C1 Cval", 6),
    "charge before": ("Cl1 Cl-1", 17), "charge above": ("Fe1 Fe\u00b3\u207a", 26),
    "capitals": ("Cl1 CL", 17), "small": ("Cl1 cl", 17), "number": ("Cl1 Cl1", 17), "deuterium": ("D1 D", 1),
    "tritium": ("T1 T", 1), "charge of two signs": ("O1 O--", 8), "unknown symbol": ("Cl1 ?", 17),
    "vacancy": ("Va1 Va", ""), "vacancy in full": ("Vac1 Vac", ""),
    "centroid": ("Cg1 Cg", None), "dummy": ("Du1 Du", None), "x": ("X1 X", None), "q": ("Q1 Q", None),
    "metal": ("M1 M", None), "mixed": ("M1 Fe/Co", None), "mixed with comma": ("M1 Fe,Co", None),
    "mixed in one": ("M1 FeCo", None), "no element": ("A1 Aa", None), "cyrillic": ("C1 \u0421", None),
    "nitrate": ("N1 NO3", None), "hydroxyl": ("O1 OH", None), "shares over 1": ("M1 '0.8Fe + 0.8Co'", None),
}  # fmt: skip
LABELS = {
    "site letter": ("Ow2", 8), "charge": ("Fe3+", 26), "two letters": ("Cl1A", 17), "prime": ("C1'", 6),
    "mixed": ("Fe/Co1", None), "mixed with comma": ("Fe,Co1", None), "mixed in one": ("FeCo1", None),
    "mixed by underscore": ("Al_Si1", None), "mixed in brackets": ("(Fe,Co)1", None), "mixed by plus": ("Fe+Co1", None),
    "vacancy": ("Va1", None), "centroid": ("Cg1", None), "dummy": ("Du1", None), "x": ("X1", None),
    "metal": ("M1", None), "number": ("1", None), "hydroxyl": ("OH1", None), "lone pair": ("Lp1", None),
}  # fmt: skip


@pytest.mark.parametrize("case", [*SYMBOLS, *(f"label: {case}" for case in LABELS)])
def test_elements(tmp_path, case):
    if case in SYMBOLS:
        symbol, expected = SYMBOLS[case]
        text = CIF.replace("Cl1 Cl", symbol)
    else:
        symbol, expected = LABELS[case.removeprefix("label: ")]
        text = CIF.replace("_atom_site_type_symbol\n", "").replace("Na1 Na", "Na1").replace("Cl1 Cl", symbol)
    file = write(tmp_path, "a.cif", text)
    if expected is None:
        with pytest.raises(CrystalError, match=r"a\.cif: site \S+.*line 1[78].*; (remove|give|use)"):
            read_crystals(file)
        return
    (crystal,), told = read(file)
    assert sorted(crystal.species.tolist()) == sorted([11, expected] if expected else [11])
    assert ("left out site" in told) == (expected == "")


@pytest.mark.parametrize("name", ["Va", "Cg", "X", "Na1", "Fe/Co", "NaCl"])
def test_elements_of_a_poscar(tmp_path, name):
    if "/" in name:
        (crystal,), _ = read(
            write(tmp_path, "POSCAR", POSCAR.replace("Na Cl", f"{name} Cl"))
        )  # a potential and its hash
        assert crystal.species.tolist() == [26, 17]
        return
    with pytest.raises(CrystalError, match="on line 6 is no element"):
        read_crystals(write(tmp_path, "POSCAR", POSCAR.replace("Na Cl", f"{name} Cl")))


@pytest.mark.parametrize(("name", "z"), [("D", 1), ("na", 11), ("Va", None), ("Cg", None), ("Fe/Co", None)])
def test_elements_of_extended_xyz(tmp_path, name, z):
    file = write(tmp_path, "a.xyz", XYZ.replace("Na", name))
    if z is None:
        with pytest.raises(CrystalError, match=r"\(atom 1: '.*' is no element\)"):
            read_crystals(file)
    else:
        assert read(file)[0][0].species.tolist() == [z, 17]


SHARES = {
    "'0.75Si + 0.25Al'": {14: 0.75, 13: 0.25},
    "'0.75Si+0.25Al'": {14: 0.75, 13: 0.25},
    "'Si0.75 + Al0.25'": {14: 0.75, 13: 0.25},
    "Si0.75Al0.25": {14: 0.75, 13: 0.25},
    "'0.5Fe3+ + 0.25Co2+'": {26: 0.5, 27: 0.25},
    "'.8Nb + .2Zr'": {41: 0.8, 40: 0.2},
    "Fe0.8": {26: 0.8},
}


@pytest.mark.parametrize("symbol", SHARES)
def test_shares_in_type_symbols(tmp_path, symbol):
    (crystal,), _ = read(write(tmp_path, "a.cif", CIF.replace("Cl1 Cl", f"M1 {symbol}")))
    found = crystal.occupancies.sum(axis=0)
    for z, share in SHARES[symbol].items():
        assert found[z - 1] == pytest.approx(share)
    assert found.sum() == pytest.approx(1 + sum(SHARES[symbol].values()))


INVERSION = CIF.replace("'x,y,z'\n", "'x,y,z'\n'-x,-y,-z'\n").replace("_fract_z\n", "_fract_z\n_atom_site_occupancy\n")
TWICE = {  # rows, sodium and chlorine in the cell (None: refused), whether it is warned
    "same row": (["Na1 Na 0 0 0 1", "Na1 Na 0 0 0 1"], (1, 0), True),
    "other label": (["Na1 Na 0 0 0 1", "Na2 Na 0 0 0 1"], (1, 0), True),
    "image": (["Na1 Na 0.1 0.2 0.3 1", "Na2 Na -0.1 -0.2 -0.3 1"], (2, 0), True),
    "image in another cell": (["Na1 Na 0.1 0.2 0.3 1", "Na2 Na 1.9 0.8 0.7 1"], (2, 0), True),
    "image of a partly occupied one": (["Na1 Na 0.1 0.2 0.3 .4", "Na2 Na 0.9 0.8 0.7 .4"], (0.8, 0), True),
    "three times": (["Na1 Na 0 0 0 1"] * 3, (1, 0), True),
    "mixed, and its image": (
        ["Na1 Na .1 .2 .3 .5", "Cl1 Cl .1 .2 .3 .5", "Na2 Na .9 .8 .7 .5", "Cl2 Cl .9 .8 .7 .5"], (1, 1), True,
    ),
    "two charges on a site": (["Na1 Na .1 .2 .3 .4", "Na2 Na .1 .2 .3 .3"], (1.4, 0), False),
    "mixed": (["Na1 Na 0.1 0.2 0.3 .5", "Cl1 Cl 0.1 0.2 0.3 .5"], (1, 1), False),
    "two full elements": (["Na1 Na 0 0 0 1", "Cl1 Cl 0 0 0 1"], None, False),
    "rounded otherwise": (["Na1 Na .333 0 0 1", "Na2 Na .6667 0 0 1"], (2, 0), True),
}  # fmt: skip


@pytest.mark.parametrize("case", TWICE)
def test_rows_listed_twice(tmp_path, case):
    rows, expected, is_warned = TWICE[case]
    file = write(tmp_path, "a.cif", INVERSION.split("Na1 Na")[0] + "\n".join(rows) + "\n")
    if expected is None:
        with pytest.raises(CrystalError, match=r"sum to 2 .*\(Na1 on line 19, Cl1 on line 20\)"):
            read_crystals(file)
        return
    (crystal,), told = read(file)
    amounts = np.zeros(98)
    np.add.at(amounts, crystal.species - 1, 1)
    amounts = amounts if crystal.occupancies is None else crystal.occupancies.sum(axis=0)
    assert (amounts[10], amounts[16]) == pytest.approx(expected)
    assert ("listed twice" in told) == is_warned


SHARED = ["H1 H 0 0 0 .9\nO1 O 0 0 0 .1", "O1 O 0 0 0 .5\nH1 H 0 0 0 .5", "O1 O2- 0 0 0 .5\nD1 D 0 0 0 .5"]
SHARED += ["H1 H 0 0 0 .25\nO1 O 0 0 0 .25\nF1 F 0 0 0 .5"]


@pytest.mark.parametrize("rows", SHARED)
def test_hydrogen_on_a_shared_site(tmp_path, rows):
    (crystal,), told = read(write(tmp_path, "a.cif", INVERSION.split("Na1 Na")[0] + rows + "\n"))
    share = float(rows.split("\n")[0].split()[-1])
    assert crystal.num_atoms == 1 and not told
    assert crystal.occupancies[0, 7 if rows.startswith("O") else 0] == pytest.approx(share)


SPECIAL = {  # group, cell, coordinates as given, atoms with exact ones
    "truncated": ("P 63/m m c", HEX, "0.33 0.66 0.25", 2),
    "other way": ("P 63/m m c", HEX, "0.67 0.33 0.75", 2),
    "of three digits": ("P 63/m m c", HEX, "0.333 0.667 0.25", 2),
    "negative": ("P 63/m m c", HEX, "0.33 -0.33 0.25", 2),
    "axis": ("P -3 m 1", HEX, "0.33 0.67 0.2", 2),
    "x, 2x": ("P 63/m m c", HEX, "0.17 0.33 0.25", 6),
    "general": ("P 63/m m c", HEX, "0.13 0.37 0.1", 24),
}


@pytest.mark.parametrize("case", SPECIAL)
def test_special_positions_of_two_digits(tmp_path, case):
    group, cell, place, atoms = SPECIAL[case]
    text = named(group, cell=cell.replace("_a 5", "_a 9").replace("_b 5", "_b 9").replace("_c 5", "_c 9"))
    (crystal,), told = read(write(tmp_path, "a.cif", text.replace("0.1 0.2 0.3", place)))
    assert crystal.num_atoms == atoms
    assert ("where symmetry puts it" in told) == (case not in ("of three digits", "general"))


def test_atoms_too_close_name_the_sites_of_the_file(tmp_path):
    text = named("P 63/m m c", cell=HEX).replace("0.1 0.2 0.3", "0.351 0.649 0.2490")
    with pytest.raises(CrystalError, match=r"\(Na1 on line 14\); more digits of its coordinates may be needed"):
        read_crystals(write(tmp_path, "a.cif", text.replace("_c 5", "_c 9")))


DISTANCES = {
    "hydrogen molecule": ("H H", 0.74, False), "nitrogen": ("N N", 1.1, False), "uranyl": ("U O", 1.75, False),
    "salt in nanometres": ("Na Cl", 0.28, True), "oxygen": ("O O", 0.7, True), "carbon": ("C C", 0.8, True),
    "metal": ("Fe Fe", 1.2, True), "hydrogen": ("H H", 0.4, True),
}  # fmt: skip


@pytest.mark.parametrize("case", DISTANCES)
def test_atoms_closer_than_any_bond(tmp_path, case):
    names, distance, is_warned = DISTANCES[case]
    text = POSCAR.replace("3 0 0\n0 4 0\n0 0 5", "9 0 0\n0 9 0\n0 0 9").replace("Direct", "Cartesian")
    file = write(tmp_path, "POSCAR", text.replace("Na Cl", names).replace("0.5 0.5 0.3", f"0 0 {distance}"))
    (_, told) = read(file)
    a, b = names.split()
    wanted = f"site 1 ({a}) and site 2 ({b}) are {distance:.2f} Å apart, closer than any bond"
    assert (wanted in told) == is_warned and bool(told) == is_warned


def test_positions_that_exclude_each_other_may_be_close(tmp_path):
    rows = "Na1 Na 0 0 0 0.5\nNa2 Na 0 0 0.1 0.5\n"
    assert not read(
        write(tmp_path, "a.cif", CIF.split("Na1 Na")[0].replace("_z\n", "_z\n_atom_site_occupancy\n") + rows)
    )[1]


# The syntax

SOUND = {
    "field with data_": CIF.replace("loop_", ";\ndata_1 by Q\n;\nloop_", 1).replace(
        "gamma 90\n", "gamma 90\n_publ_x\n"
    ),
    "field with loop_": CIF.replace("data_x\n", "data_x\n_publ_x\n;\nloop_\n_cell_length_a\n;\n"),
    "one of several lines": CIF.replace("data_x\n", "data_x\n_publ_x\n;\n data_y\ndata_z\n\n _cell_length_a 3\n;\n"),
    "capitals of names": CIF.replace("_cell_length", "_Cell_Length")
    .replace("loop_", "LOOP_")
    .replace("data_", "DATA_"),
    "names with points": CIF.replace("_cell_", "_cell.").replace("_atom_site_", "_atom_site."),
    "comments": CIF.replace("\n_cell_length_b", " # 'a comment\n# loop_\n_cell_length_b"),
    "two blanks, tabs": CIF.replace(" ", " \t "),
    "uncertainties": CIF.replace(" 0.3\n", " 0.3(1)\n").replace("_c 5", "_c 5.0(2"),
    "fraction": CIF.replace("0.5 0.5", "1/2 2/4"),
    "quoted numbers": CIF.replace("0.5 0.5", "'0.5' \"0.5\""),
    "formula twice": CIF.replace("data_x\n", "data_x\n_chemical_formula_sum 'Na Cl'\n_chemical_formula_sum 'NaCl'\n"),
    "another table after": CIF + "loop_\n_atom_site_aniso_label\n_atom_site_aniso_U_11\nNa1 0.1\n",
    "cartesian": CIF.replace("_fract_", "_Cartn_").replace("0.5 0.5 0.3", "2.5 2.5 1.5"),
    "no labels": CIF.replace("_atom_site_label\n", "").replace("Na1 ", "").replace("Cl1 ", ""),
    "magnetic": CIF.replace("_symmetry_equiv_pos_as_xyz", "_space_group_symop_magn_operation.xyz").replace(
        "x,y,z", "x,y,z,-1"
    ),
    "old Macintosh": CIF.replace("\n", "\r"),
}


@pytest.mark.parametrize("case", SOUND)
def test_syntax_that_is_read(tmp_path, case):
    (crystal,), told = read(write(tmp_path, "a.cif", SOUND[case]))
    assert crystal.species.tolist() == [11, 17] and not told
    np.testing.assert_allclose(crystal.positions[1] % 5, [2.5, 2.5, 1.5], atol=1e-9)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-8-sig", "utf-32"])
@pytest.mark.parametrize("name", ["a.cif", "POSCAR", "a.xyz"])
def test_encodings(tmp_path, name, encoding):
    text = {"a.cif": CIF, "POSCAR": POSCAR, "a.xyz": XYZ}[name]
    (crystal,), _ = read(write(tmp_path, name, text, encoding))
    assert crystal.species.tolist() == [11, 17]


def test_windows_characters(tmp_path):
    file = tmp_path / "a.cif"
    file.write_bytes(CIF.replace("data_x\n", "data_x\n# 5 Å\n").replace("0.3\n", "\u20130.3\n").encode("cp1252"))
    np.testing.assert_allclose(read(file)[0][0].positions[1, 2], 3.5)


WRONG = {  # text, what the sentence says
    "question marks": (CIF.replace(LAST, "Cl1 Cl ? ? ?"), r"line 18: coordinate x of site Cl1 is '\?', not a number"),
    "one question mark": (CIF.replace("0.5 0.3", "? 0.3"), r"line 18: coordinate y of site Cl1 is '\?'"),
    "question mark in the cell": (CIF.replace("_b 5", "_b ?"), r"line 3: _cell_length_b is '\?'"),
    "no third coordinate": (
        CIF.replace("_atom_site_fract_z\n", "").replace(" 0\n", "\n").replace(" 0.3\n", "\n"),
        "no column _atom_site_fract_z",
    ),
    "no element": (
        CIF.replace("_label\n", "_Wyckoff_symbol\n").replace("_type_symbol", "_B_iso"),
        r"says nothing of elements\); add a column",
    ),
    "cartesian in an oblique cell": (HEXAGONAL.replace("_fract_", "_Cartn_"), "nothing says how their axes lie"),
    "row too short": (
        CIF.replace("0.5 0.5 0.3", "0.5 0.5"),
        r"line 12: the table of _atom_site_label has 9 values in 5 columns",
    ),
    "no value": (CIF.replace("_b 5", "_b"), r"line 3: _cell_length_b is ''"),
    "two tables": (CIF + SITES + "Na1 Na 0.1 0 0\n", "_atom_site_label is given twice"),
    "negative length": (CIF.replace("_b 5", "_b -5"), "line 3: _cell_length_b is negative"),
    "modulated": (
        CIF.replace("_symmetry_equiv_pos_as_xyz", "_space_group_symop_magn_ssg_operation.algebraic"),
        "modulated",
    ),
    "two cells": (CIF.replace("_b 5", "_b 5\n_cell_length_b 6"), "_cell_length_b is given twice"),
    "occupancy": (
        CIF.replace("_z\n", "_z\n_atom_site_occupancy\n").replace(" 0\n", " 0 1\n").replace("0.3\n", "0.3 90%\n"),
        "line 19: the occupancy of site Cl1",
    ),
    "endless field": (
        CIF.replace("data_x", "data_x\n_publ_x\n;\nendless"),
        "line 3: the text that begins with ; does not end",
    ),
    "unit": (CIF.replace("_b 5", "_b 5 nm"), "line 3: _cell_length_b is '5 nm', not a number"),
}


@pytest.mark.parametrize("case", WRONG)
def test_sentences(tmp_path, case):
    text, message = WRONG[case]
    assert_refused(write(tmp_path, "a.cif", text), message)


def assert_refused(file: Path, message: str) -> None:
    """It is refused in a sentence with a remedy."""
    with pytest.raises(CrystalError, match=message) as error:
        read_crystals(file)
    assert "Error" not in str(error.value) and "\n" not in str(error.value) and "; " in str(error.value)


# Several structures in a file

BAD_BLOCKS = [LAST.replace("0.3", "?"), LAST.replace(" Cl ", " Qq "), "Cl1 Cl 0.5 0.5", LAST.replace("0.3", "0.3 0.4")]


@pytest.mark.parametrize("row", BAD_BLOCKS)
@pytest.mark.parametrize("place", range(3))
def test_a_bad_block_costs_itself(tmp_path, capsys, row, place):
    blocks = [CIF] * 3
    blocks[place] = CIF.replace(LAST, row)
    crystals, errors = read_all([write(tmp_path, "a.cif", "".join(blocks))])
    assert len(crystals) == 2 and len(errors) == 1 and f"#{place + 1}: " in errors[0]


def test_a_field_without_an_end_costs_its_block(tmp_path, capsys):
    file = write(tmp_path, "a.cif", CIF + CIF.replace("data_x", "data_x\n_publ_x\n;\nendless") + CIF)
    crystals, errors = read_all([file])
    assert len(crystals) == 2 and len(errors) == 1 and "#2: " in errors[0]


BAD_FRAMES = {
    "element": XYZ.replace("Na", "Qq"),
    "number": XYZ.replace("1.5 2", "1.5 ?"),
    "count": XYZ.replace("2\n", "x\n", 1),
    "count too large": XYZ.replace("2\n", "3\n", 1),
    "count too small": XYZ.replace("2\n", "1\n", 1),
    "huge count": XYZ.replace("2\n", "1000000000\n", 1),
    "negative count": XYZ.replace("2\n", "-2\n", 1),
    "no cell": XYZ.replace('Lattice="3 0 0 0 4 0 0 0 5" ', ""),
    "flat cell": XYZ.replace("0 0 5", "0 0 0"),
    "close": XYZ.replace("1.5 2 1.5", "0 0 0.01"),
    "row cut": XYZ.replace(" 2 1.5", ""),
    "no comment": XYZ.split("\n")[0] + "\n" + XYZ[-20:],
}


@pytest.mark.parametrize("case", BAD_FRAMES)
@pytest.mark.parametrize("place", range(3))
def test_a_bad_frame_costs_itself(tmp_path, capsys, case, place):
    texts = [XYZ] * 3
    texts[place] = BAD_FRAMES[case]
    crystals, errors = read_all([write(tmp_path, "a.xyz", "".join(texts))])
    assert (len(crystals), len(errors)) == (2, 1), errors


# Packed files, POSCAR with three scales, vasprun.xml


@pytest.mark.parametrize(
    "name", ["a.cif.gz", "A.CIF.GZ", "POSCAR_1.gz", "a.vasp.gz", "CONTCAR.gz", "a.xyz.gz", "a.extxyz.gz"]
)
def test_packed_files(tmp_path, name):
    lower = name.lower()
    text = CIF if "cif" in lower else XYZ if "xyz" in lower else POSCAR
    (tmp_path / name).write_bytes(gzip.compress(text.encode()))
    (crystal,), _ = read(tmp_path / name)
    assert crystal.species.tolist() == [11, 17] and crystal.id == str(tmp_path / name)


def test_packed_files_that_cannot_be_used(tmp_path, monkeypatch):
    packed = gzip.compress(CIF.encode())
    monkeypatch.setattr(files, "LARGEST_FILE", 10_000)
    for content, message in [
        (packed[:-10], "cannot be unpacked"),
        (packed[:20] + b"\x00\x01" + packed[22:], "cannot be unpacked|no atoms"),
        (gzip.compress(b"#" * 10_001), "unpacked it is larger than the 10,000 bytes"),
        (gzip.compress(b""), "empty"),
    ]:
        (tmp_path / "a.cif.gz").write_bytes(content)
        with pytest.raises(CrystalError, match=rf"a\.cif\.gz: .*({message})"):
            read_crystals(tmp_path / "a.cif.gz")


@pytest.mark.parametrize("mode", ["Direct", "Cartesian", "Selective\nCartesian"])
def test_three_scales_of_a_poscar(tmp_path, mode):
    """They are of x, y and z, of the vectors and of Cartesian positions, as ASE has it."""
    flags = " T T F" if mode[0] == "S" else ""
    text = f"salt\n1.0 2.0 3.0\n3 1 0\n0 4 0\n0.5 0 5\nNa Cl\n1 1\n{mode}\n0 0 0{flags}\n0.5 0.25 0.3{flags}\n"
    (crystal,), _ = read(write(tmp_path, "POSCAR", text))
    lattice = np.array([[3, 2, 0], [0, 8, 0], [0.5, 0, 15]])
    np.testing.assert_allclose(crystal.lattice, lattice)
    expected = np.array([0.5, 0.25, 0.3]) @ lattice if mode == "Direct" else [0.5, 0.5, 0.9]
    np.testing.assert_allclose(crystal.positions[1], expected)
    ase = pytest.importorskip("ase.io")
    np.testing.assert_allclose(ase.read(tmp_path / "POSCAR", format="vasp").positions, crystal.positions, atol=1e-9)
    with pytest.raises(CrystalError, match="line 2: three scales must be positive"):
        read_crystals(write(tmp_path, "POSCAR", text.replace("2.0", "-2.0")))


POSCAR_SENTENCES = {
    "scale": (POSCAR.replace("1.0\n", "one\n"), "line 2: the scale is 'one'"),
    "vector": (POSCAR.replace("0 4 0", "0 4"), "line 4: '0 4' instead of three numbers of a lattice vector"),
    "count": (POSCAR.replace("1 1", "1 1.5"), "line 7: '1.5' is no number of atoms"),
    "position": (POSCAR.replace("0.5 0.5 0.3", "0.5 x 0.3"), "line 10: a position is 'x', not a number"),
    "no counts": (POSCAR.replace("1 1\n", ""), "POSCAR: "),
}


@pytest.mark.parametrize("case", POSCAR_SENTENCES)
def test_sentences_of_a_poscar(tmp_path, case):
    text, message = POSCAR_SENTENCES[case]
    assert_refused(write(tmp_path, "POSCAR", text), message)


VASPRUN = """<?xml version="1.0" encoding="ISO-8859-1"?>
<modeling><generator><i name="program" type="string">vasp</i></generator>
<atominfo><atoms>2</atoms><array name="atoms"><field type="string">element</field><set>
<rc><c>Mg</c><c>1</c></rc><rc><c>O </c><c>2</c></rc></set></array></atominfo>
<structure name="initialpos"><crystal><varray name="basis"><v>5 0 0</v><v>0 5 0</v><v>0 0 5</v></varray></crystal>
<varray name="positions"><v>0 0 0</v><v>.5 .5 .5</v></varray></structure>
<calculation><structure><crystal><varray name="basis"><v>4 0 0</v><v>0 4 0</v><v>0 1 4</v></varray>
<i name="volume">64</i></crystal><varray name="positions"><v>0 0 0</v><v>.5 .5 .25</v></varray></structure>
</calculation></modeling>
"""


def test_vasprun(tmp_path):
    """The last structure is taken, also of a calculation that was ended."""
    (crystal,), told = read(write(tmp_path, "vasprun.xml", VASPRUN))
    assert crystal.species.tolist() == [12, 8] and not told
    np.testing.assert_allclose(crystal.lattice, [[4, 0, 0], [0, 4, 0], [0, 1, 4]])
    np.testing.assert_allclose(crystal.positions[1], [2, 2.25, 1])
    (tmp_path / "vasprun.xml.gz").write_bytes(gzip.compress(VASPRUN.encode()))
    assert read(tmp_path / "vasprun.xml.gz")[0][0].num_atoms == 2
    (crystal,), told = read(write(tmp_path, "vasprun.xml", VASPRUN[:-60]))
    assert crystal.lattice[0, 0] == 5 and "ends early; the last structure that is whole" in told
    for text, message in [
        ("<modeling></modeling>", "there is no structure in it"),
        ("not xml", "it is damaged"),
        (VASPRUN.replace("<modeling>", '<!DOCTYPE a [<!ENTITY b "c">]><modeling>'), "it defines entities"),
        (VASPRUN.replace(">Mg<", ">X<"), "'X' is no element"),
        (VASPRUN.replace(".5 .5 .25", ".5 .5 **"), "a coordinate is .*, not a number"),
    ]:
        with pytest.raises(CrystalError, match=rf"vasprun\.xml: cannot be read as vasprun.xml \({message}"):
            read_crystals(write(tmp_path, "vasprun.xml", text))
