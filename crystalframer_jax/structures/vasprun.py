"""Crystals of vasprun.xml: the last structure of a calculation of VASP."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from typing import Any

import numpy as np

from crystalframer_jax.structures.crystal import Crystal, check_number
from crystalframer_jax.structures.elements import is_element
from crystalframer_jax.structures.reading import UnreadableError, number, parsing, warn
from crystalframer_jax.text import brief

CHUNK = 1 << 20  # characters
WRITTEN = {"r": "Zr"}  # as old versions of VASP do


def crystal_of_vasprun(text: str, id: str) -> Crystal:
    """Makes the crystal of the last structure; raises CrystalError, warns if the file ends early."""
    symbols: list[str] = []
    structure, is_cut = None, False
    with parsing(id, "vasprun.xml"):
        if "<!DOCTYPE" in text or "<!ENTITY" in text:
            raise UnreadableError("it defines entities, which VASP does not", "give the file that VASP wrote")
        try:
            for element in _elements(text):
                if element.tag == "atominfo":
                    symbols = _symbols(element)
                elif element.tag == "structure":
                    structure = element
                elif element.tag in ("dos", "eigenvalues", "projected"):
                    element.clear()  # large, and not needed
        except ElementTree.ParseError as error:
            is_cut = True
            if structure is None or not symbols:
                raise UnreadableError(f"it is damaged: {error}", "give the file that VASP wrote") from error
        if structure is None or not symbols:
            raise UnreadableError("there is no structure in it", "give the file that VASP wrote")
        cell = _vectors(structure, "crystal/varray[@name='basis']")
        places = _vectors(structure, "varray[@name='positions']")
        if cell.shape != (3, 3) or len(places) != len(symbols):
            raise UnreadableError(f"{len(places)} positions of {len(symbols)} atoms in {len(cell)} lattice vectors")
        crystal = Crystal(_numbers(symbols), places @ cell, cell, id=id)
    if is_cut:
        warn(f"{id}: the file ends early; the last structure that is whole was taken")
    return crystal


def _elements(text: str) -> Iterator[ElementTree.Element]:
    """Yields the elements of an XML file as they end."""
    parser: Any = ElementTree.XMLPullParser(["end"])
    for start in range(0, len(text), CHUNK):
        parser.feed(text[start : start + CHUNK])
        for _, element in parser.read_events():
            yield element
    parser.close()


def _symbols(atominfo: ElementTree.Element) -> list[str]:
    found = [(row.findtext("c") or "").strip() for row in atominfo.iterfind("array[@name='atoms']/set/rc")]
    return [WRITTEN.get(symbol, symbol) for symbol in found]


def _numbers(symbols: list[str]) -> np.ndarray:
    from pymatgen.core import Element

    for symbol in symbols:
        if not is_element(symbol):
            raise UnreadableError(f"{brief(symbol)} is no element")
    return np.array([Element(symbol).Z for symbol in symbols])


def _vectors(structure: ElementTree.Element, path: str) -> np.ndarray:
    rows = [(row.text or "").split() for row in structure.iterfind(f"{path}/v")]
    check_number(len(rows), "vasprun.xml")
    if any(len(row) != 3 for row in rows):
        raise UnreadableError(f"a vector of {path} has not three numbers")
    return np.array([[number(x, "a coordinate") for x in row] for row in rows]).reshape(-1, 3)
