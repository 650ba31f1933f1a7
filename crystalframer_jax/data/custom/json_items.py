"""Crystals and labels in JSON, and what a record of it, or of a pickle, holds."""

import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from crystalframer_jax.data.custom.fields import CustomData, Item, Items, is_cif_text, is_json_text, text
from crystalframer_jax.data.io.layouts import Row, json_rows
from crystalframer_jax.data.io.streams import json_lines
from crystalframer_jax.data.records import BadRecord
from crystalframer_jax.data.structures import (
    FLAT,
    JARVIS,
    PYMATGEN,
    dict_loader,
    from_dict,
    from_json,
    from_pymatgen,
    from_text,
)
from crystalframer_jax.files import sha256
from crystalframer_jax.structures.crystal import Crystal
from crystalframer_jax.text import escaped

STRUCTURE_KEYS = ("structure", "atoms", "cif", "poscar")
MAY_LACK = ("charge", "cartesian")  # of the keys of a structure
LINES = (".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz")


def json_items(file: Path, options: CustomData) -> Items:
    """Reads the records of JSON in any layout (also gzipped, or alone in a zip archive) or of JSON lines."""

    def read() -> Iterator[Item | BadRecord]:
        if file.name.lower().endswith(LINES):
            rows: Iterator[Row] = (Row(number, "", record) for number, record in json_lines(file))
            place = f"{file}:"
        else:
            rows, place = json_rows(file, _is_record, STRUCTURE_KEYS), f"{file} record "
        for row in rows:
            fallback = f"{escaped(file.name)}:{row.number}"
            yield item_of(row.record, f"{place}{row.number}", fallback, options, label=row.label)

    return Items(str(file), sha256(file), read)


def item_of(
    record: dict[str, Any] | str, where: str, fallback: str, options: CustomData, split: str = "", label: str = ""
) -> Item | BadRecord:
    """Makes the item of a record, or of the reason why it is none.

    Its id is `label`, under which the file has it, unless that only counts; else what the record says; else `fallback`.
    """
    is_name = bool(label) and not label.isdecimal() and not options.id_column
    if isinstance(record, str):
        return BadRecord(label if is_name else fallback, where, record)
    id = label if is_name else text(record, *options.id_names()) or label or fallback
    keys, load = _structure(record, where, id)
    if load is None:
        remedy = "give it under structure, atoms or cif, or as lattice, species and frac_coords"
        return BadRecord(id, where, f"no structure; {remedy}")
    return Item(id, where, load, {key: value for key, value in record.items() if key not in keys}, split)


def _structure(record: Mapping[str, Any], where: str, id: str) -> tuple[tuple[str, ...], Callable[[], Crystal] | None]:
    """Returns the keys that the structure of a record is made of, and what makes it; None if it has none."""
    for key in STRUCTURE_KEYS:
        value = record.get(key)
        if load := _loader(value, where, id):
            return (key,), load
        if key == "poscar" and isinstance(value, str) and "\n" in value.strip():
            return (key,), functools.partial(from_text, value, where, "poscar", id)
    for keys in (PYMATGEN, FLAT, JARVIS):  # records that are structures themselves
        if all(key in record or key in MAY_LACK for key in keys):
            return keys, functools.partial(from_dict, {key: record[key] for key in keys if key in record}, id)
    return (), None


def _loader(value: Any, where: str, id: str) -> Callable[[], Crystal] | None:
    """Returns what makes the crystal of a value, a dict, a text or a pymatgen Structure; None for anything else."""
    if is_cif_text(value):
        return functools.partial(from_text, value, where, "cif", id)
    if is_json_text(value):
        return functools.partial(from_json, value, where, id)
    if isinstance(value, Mapping):
        return dict_loader(value, id)
    return functools.partial(from_pymatgen, value, id) if hasattr(value, "sites") else None


def _is_record(value: Any) -> bool:
    """Tells whether a value of a JSON object is a record with a structure, or the text of a structure."""
    if isinstance(value, Mapping):
        inner = [value[key] for key in STRUCTURE_KEYS if isinstance(value.get(key), Mapping)]
        are_structures = all({"lattice", "lattice_mat", "sites"} & cell.keys() for cell in inner)  # not cells by label
        return are_structures and _structure(value, "", "")[1] is not None
    return is_cif_text(value) or is_json_text(value)
