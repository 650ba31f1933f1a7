"""The symmetry of a CIF: its operations, listed or by the name of the group; all must keep the metric of the cell."""

from __future__ import annotations

import functools
import re
import warnings
from typing import Any, NamedTuple

import numpy as np

from crystalframer_jax.structures.cif_syntax import Block, Item
from crystalframer_jax.structures.errors import CrystalError
from crystalframer_jax.structures.reading import UnreadableError, plain

MOST_OPERATIONS = 768  # a space group has 192 at most
LONGEST_OPERATION = 200  # characters
MODULATED = re.compile("_cell_(modulation_dimension|wave_vector)|_space_group_(symop_)?(magn_)?ssg")
METRIC_TOLERANCE = 0.01  # of a a* b b*, by which an operation may change the products of the lattice vectors
LISTED = ("_symmetry_equiv_pos_as_xyz", "_space_group_symop_operation_xyz")
MAGNETIC = "_space_group_symop_magn_operation_xyz"
CENTERING = "_space_group_symop_magn_centering_xyz"
NAMES = (  # those that pymatgen knows first
    "_symmetry_space_group_name_H-M",
    "_symmetry_space_group_name_H_M",
    "_space_group_name_H-M_alt",
    "_space_group_name_H-M",
    "_space_group_name_H-M_full",
)
NUMBERS = ("_space_group_IT_number", "_symmetry_Int_Tables_number")
HALL = ("_space_group_name_Hall", "_symmetry_space_group_name_Hall")
CODE = "_space_group_it_coordinate_system_code"  # 1, 2, h, r, b1
SETTING = re.compile(r"\s*[(:,]?\s*(?:origin(?:\s+choice)?\s*|setting\s*)?[:#]?([12]|[HR]|S|Z)\s*\)?$", re.IGNORECASE)
SAME_SETTING = {"S": "1", "Z": "2"}  # as the ICSD writes them
TERM = re.compile(r"([+-]?)(?:(\d(?=[xyz]))?([xyz])|(\d+(?:\.\d*)?|\.\d+)(?:/(\d+(?:\.\d*)?))?)", re.ASCII)
REMEDY = "list it as _space_group_symop_operation_xyz"


class Symmetry(NamedTuple):
    """The operations of a structure."""

    items: dict[str, Any]  # by which pymatgen finds them: a list of operations, or the names of the group
    operations: list[np.ndarray]  # [3, 4]; the last column is the translation
    warning: str = ""


def symmetry_of(block: Block, lattice: np.ndarray) -> Symmetry:
    """Finds the symmetry operations of a CIF; UnreadableError if they are not understood, or not those of the cell."""
    listed = next((name for name in LISTED if any(v not in ("?", ".") for v in block.column(name))), None)
    is_named = any(block.text(name.lower()) for name in (*NAMES, *NUMBERS))
    is_magnetic = any("magn" in name or name.startswith("_atom_site_moment") for name in block.items)
    if any(map(MODULATED.match, block.items)) and (is_magnetic or not (listed or is_named)):
        reason = "the structure is modulated: its symmetry has more than three dimensions"
        raise UnreadableError(reason, "give an approximant with a usual cell")
    if MAGNETIC in block.items:
        found = _magnetic(block)
    elif listed:
        texts = _operations(block.items[listed])
        found = Symmetry({"_symmetry_equiv_pos_as_xyz": texts}, [_matrix(text) for text in texts])
    elif any(name.startswith("_space_group_magn_n") for name in block.items):
        found = _magnetic_group(block)
    else:
        return _group(block, lattice)
    if not any(np.array_equal(operation[:, :3], np.eye(3)) for operation in found.operations):
        raise UnreadableError("symmetry not understood: x,y,z is not among the operations", "list all operations")
    wrong = next((i for i, op in enumerate(found.operations) if not keeps_metric(op, lattice)), None)
    if wrong is not None:
        raise _other_axes(f"operation {found.items['_symmetry_equiv_pos_as_xyz'][wrong]}")
    return found


def keeps_metric(operation: np.ndarray, lattice: np.ndarray) -> bool:
    """Tells whether an operation on fractional coordinates [3, 4] keeps lengths and angles of a lattice [3, 3]."""
    rotation = operation[:, :3]
    if np.array_equal(np.abs(rotation), np.eye(3)) and abs(rotation.trace()) == 3:
        return True
    with np.errstate(all="ignore"):
        metric = lattice @ lattice.T
        scale = np.sqrt(np.outer(metric.diagonal(), metric.diagonal()))
        return bool((np.abs(rotation.T @ metric @ rotation - metric) <= METRIC_TOLERANCE * scale).all())


def _other_axes(what: str) -> UnreadableError:
    reason = f"symmetry not understood: {what} does not keep lengths and angles of the cell, it is of other axes"
    return UnreadableError(reason, f"{REMEDY} for the axes of the cell, or correct the cell")


def _operations(item: Item) -> list[str]:
    """Lists operations as x,y,z+1/2; UnreadableError, with its line, for what is none."""
    if len(item.values) > MOST_OPERATIONS:
        raise _too_many(len(item.values))
    if any(text.endswith(",") for text in item.values):  # x, y, z without quotes
        rows: dict[int, str] = {}
        for text, line in zip(item.values, item.lines, strict=True):
            rows[line] = rows.get(line, "") + text
        item = Item(item.line, list(rows.values()), list(rows))
    texts = []
    for text, line in zip(item.values, item.lines, strict=True):
        if len(text) > LONGEST_OPERATION or re.search(r"[\d.]{25}", text):
            raise CrystalError(f"symmetry operation {text[:40]}... on line {line} is too long; write it as x,y,z+1/2")
        written = re.sub(r"\s", "", plain(text)).lower().strip("'\"")
        matrix = _matrix(written)
        if not abs(abs(np.linalg.det(matrix[:, :3])) - 1) < 1e-6:
            raise UnreadableError(f"symmetry not understood: line {line}: {text[:40]!r} is no operation", REMEDY)
        texts.append(written)
    return texts


def _too_many(number: int) -> CrystalError:
    return CrystalError(f"{number:,} symmetry operations, of at most {MOST_OPERATIONS}; list each once")


def _matrix(text: str) -> np.ndarray:
    """Reads an operation as [3, 4]; zeros for what is none, or is not written in the way that pymatgen understands."""
    matrix = np.zeros((3, 4))
    parts = text.split(",")
    for row, part in enumerate(parts):
        at, seen = 0, set()
        while (term := TERM.match(part, at)) and len(parts) == 3:
            sign, factor, axis, value, divisor = term.groups()
            column = "xyz".index(axis) if axis else 3
            if column in seen or (at and not sign) or (divisor and not float(divisor)):
                break
            size = float(factor or 1) if axis else float(value) / float(divisor or 1)
            matrix[row, column] = -size if sign == "-" else size
            seen.add(column)
            at = term.end()
        if at < len(part) or len(parts) != 3:
            return np.zeros((3, 4))
    return matrix


def _written(matrix: np.ndarray) -> str:
    """Writes an operation [3, 4] with all digits."""
    rows = []
    for *rotation, shift in matrix.tolist():
        axes = "".join(f"{'-' if f < 0 else '+'}{'' if abs(f) == 1 else int(abs(f))}{c}"
                       for f, c in zip(rotation, "xyz", strict=True) if f)  # fmt: skip
        rows.append(axes + (f"{shift:+.17f}" if shift else ""))
    return ",".join(rows)


def _magnetic(block: Block) -> Symmetry:
    """Reads the operations of a magnetic group as those of its atoms: without time reversal, with centering."""
    found = []
    for name in (MAGNETIC, CENTERING):
        item = block.items.get(name) or Item(0, ["x,y,z"], [0])
        cut = [text.rsplit(",", 1)[0] if text.count(",") == 3 else text for text in item.values]
        found.append(_operations(Item(item.line, cut, item.lines)))
    operations, centering = found
    if len(operations) * len(centering) > MOST_OPERATIONS:
        raise _too_many(len(operations) * len(centering))
    if len(centering) > 1:
        shifts = [_matrix(text)[:, 3] for text in centering]
        all_of = [(_matrix(text), shift) for text in operations for shift in shifts]
        matrices = [np.column_stack([op[:, :3], (op[:, 3] + shift) % 1]) for op, shift in all_of]
        operations = [_written(matrix) for matrix in matrices]
    return Symmetry({LISTED[0]: operations}, [_matrix(text) for text in operations])


def _magnetic_group(block: Block) -> Symmetry:
    """Finds the operations of a magnetic group by its name or number, as pymatgen knows them."""
    from pymatgen.io.cif import CifBlock, CifParser

    keys = {"_space_group_magn_name_bns": "_space_group_magn.name_BNS"}
    keys |= {"_space_group_magn_number_bns": "_space_group_magn.number_BNS"}
    data = {key: block.text(name) for name, key in keys.items() if block.text(name)}
    transform = block.text("_space_group_magn_transform_bns_pp_abc") or "a,b,c;0,0,0"
    data["_space_group_magn.transform_BNS_Pp_abc"] = transform
    parser = CifParser.__new__(CifParser)
    try:
        matrices = [np.array(op.affine_matrix[:3]) for op in parser.get_magsymops(CifBlock(data, [], ""))]
    except Exception as error:
        raise UnreadableError("symmetry not understood: the magnetic group is not known", REMEDY) from error
    return Symmetry({LISTED[0]: [_written(matrix) for matrix in matrices]}, matrices)


# Groups by name or number


def _group(block: Block, lattice: np.ndarray) -> Symmetry:
    """Finds the operations of a group that is only named: as pymatgen knows them, if these are the ones meant."""
    names = {key: block.text(key.lower()) for key in NAMES if block.text(key.lower())}
    numbers = {key: block.text(key.lower()) for key in NUMBERS if block.text(key.lower())}
    said = [re.sub(r"[\s_]", "", plain(text)) for text in (*names.values(), *numbers.values())]
    halls = [text for key in HALL if (text := block.text(key.lower()))]
    if not {text.upper() for text in said} - {"P1", "1"} and not set(halls) - {"P 1"}:
        return Symmetry({}, [np.eye(3, 4)])
    stated = ", ".join(dict.fromkeys([*names.values(), *numbers.values(), *halls]))[:60]
    try:
        taken = _of_pymatgen(tuple((names | numbers).items()))
    except Exception:  # whatever it raises, it does not know the group
        taken = Symmetry({}, [])
    settings, is_exact = _settings(list(names.values()), list(numbers.values()), halls, block.text(CODE))
    of_table = {
        _same(operations): (name, operations) for name, operations in settings if _all_keep(operations, lattice)
    }
    is_taken = bool(taken.operations) and _all_keep(taken.operations, lattice)
    if is_taken and (not settings or _same(taken.operations) in of_table):
        name = of_table.get(_same(taken.operations), ("", []))[0]
        if len(of_table) == 1 or not settings:
            return taken
        problem = f"{stated} alone does not tell which of {len(of_table)} origins or settings is meant"
        return taken._replace(warning=f"{problem}, {name} was taken; {REMEDY}")
    if not of_table:
        if settings or taken.operations:
            raise _other_axes(f"the group {stated}")
        raise UnreadableError(f"symmetry not understood: {stated!r} is not known as a group", REMEDY)
    name, operations = next(iter(of_table.values()))
    doubt = f"the group {stated} was read as {name}; {REMEDY}" if not is_exact else ""
    return Symmetry({LISTED[0]: [_written(matrix) for matrix in operations]}, operations, doubt)


@functools.lru_cache(maxsize=500)
def _of_pymatgen(stated: tuple[tuple[str, str], ...]) -> Symmetry:
    """Lets pymatgen find the operations of a group; none if it does not know it."""
    from pymatgen.io.cif import CifBlock, CifParser

    parser = CifParser.__new__(CifParser)
    parser.__dict__["warnings"] = []
    items = {key: plain(text) for key, text in stated}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        operations = parser.get_symops(CifBlock(items, [], ""))
    matrices = [np.array(operation.affine_matrix[:3]) for operation in operations]
    return Symmetry(items, matrices if len(matrices) > 1 else [])


def _all_keep(operations: list[np.ndarray], lattice: np.ndarray) -> bool:
    return all(keeps_metric(operation, lattice) for operation in operations)


def _same(operations: list[np.ndarray]) -> frozenset[bytes]:
    """Identifies a set of operations, whatever their order and the cell of their translations."""
    rows = np.array(operations)
    rows[:, :, 3] = np.round(rows[:, :, 3] * 48) % 48
    return frozenset(row.astype(np.int8).tobytes() for row in rows)


@functools.lru_cache(maxsize=1)
def _table() -> list[dict[str, Any]]:
    """Lists the groups in their conventional settings, as pymatgen has them."""
    from pymatgen.symmetry.groups import SpaceGroup

    return [entry for entry in SpaceGroup.SYMM_OPS if "(" not in entry["universal_h_m"]]


def _settings(
    names: list[str], numbers: list[str], halls: list[str], code: str
) -> tuple[list[tuple[str, list[np.ndarray]]], bool]:
    """Lists name and operations of all settings that may be meant, and whether the setting is stated."""
    compact = [re.sub(r"[\s_]", "", plain(text)).lower() for text in halls]
    found = [entry for entry in _table() if re.sub(r"[\s_]", "", entry["hall"]).lower() in compact]
    is_exact = bool(found)
    for name in names if found else ():
        known = {entry["number"] for entry in _entries(plain(name))}
        if known and not known & {entry["number"] for entry in found}:
            raise UnreadableError(f"symmetry not understood: {name} and {halls[0]} are different groups", REMEDY)
    for name in () if found else names:
        bare, setting = plain(name), SAME_SETTING.get(code.upper(), code.upper())
        if (suffix := SETTING.search(bare)) and not _entries(bare):
            bare, setting = bare[: suffix.start()], suffix[1].upper()
        found = found or _entries(bare)
        of_setting = [entry for entry in found if _setting(entry) == SAME_SETTING.get(setting, setting)]
        is_exact = bool(setting and of_setting) or ":" in bare
        found = of_setting if setting and of_setting else found
    for text in numbers:
        if found and text.isdecimal() and int(text) not in {entry["number"] for entry in found}:
            raise UnreadableError(
                f"symmetry not understood: {', '.join(names + halls)} is not the group {text}", REMEDY
            )
        if not found and text.isdecimal():
            found = [entry for entry in _table() if entry["number"] == int(text)]
            of_setting = [entry for entry in found if code and _setting(entry) == code.upper()]
            found, is_exact = of_setting or found, bool(of_setting)
    return [(e["universal_h_m"], [_matrix(op.replace(" ", "").lower()) for op in e["symops"]]) for e in found], is_exact


def _entries(name: str) -> list[dict[str, Any]]:
    """Finds a name in the table, whatever its blanks and capitals."""
    wanted = re.sub(r"[\s_]", "", name).lower()
    for keys in (("hermann_mauguin", "universal_h_m"), ("short_h_m",)):
        found = [e for e in _table() if wanted in {re.sub(r"[\s_]", "", e[key] or "").lower() for key in keys}]
        if found:
            is_monoclinic = found[0]["number"] <= 15  # short for the first, with b as unique axis
            return found[:1] if keys == ("short_h_m",) and is_monoclinic else found
    return []


def _setting(entry: dict[str, Any]) -> str:
    """Returns the setting of an entry of the table: 1 or 2, H or R."""
    return str(entry["universal_h_m"].partition(":")[2]).upper()
