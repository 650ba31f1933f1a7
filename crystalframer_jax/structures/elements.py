"""Elements as structure files name them: type symbols and labels of sites, decided before any library guesses."""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

from crystalframer_jax.structures.crystal import MAX_ATOMIC_NUMBER
from crystalframer_jax.structures.reading import NUMBER, UnreadableError, plain
from crystalframer_jax.text import LONGEST, brief

VACANT = ("va", "vac", "vacancy", "vc")  # type symbols of sites that are left empty
DUMMY = ("x", "xx", "q", "m", "me", "r", "du", "dum", "dummy", "cg", "cen", "cnt", "ct", "cp", "lp", "bq", *VACANT)
USUAL = {"Wat": "O", "wat": "O", "WAT": "O", "Ow": "O", "OW": "O", "Hw": "H", "HW": "H"}
USUAL |= {"Cval": "C", "Siva": "Si", "Hiso": "H"}  # scattering factors, of which there are others for one element
HIGH = "\u2070\u00b9\u00b2\u00b3\u2074-\u207b\u2080-\u208b"  # digits and signs above or below the line
CHARGE = re.compile(rf"\d*\*?|\d*\.?\d*[+\-]+|[+\-]\d+\.?\d*|[{HIGH}]+|\([A-Z\d+\-]+\)")  # or the number of a site
TAKEN = "elements are taken from the beginning of labels"
PART = re.compile(r"(?:(\d*\.?\d+)(?:\(\d*\))?\s*([A-Z][a-z]?)|([A-Z][a-z]?)\s*(\d*\.?\d+)(?:\(\d*\))?)([\d.]*[+\-])?")
MIXED = re.compile(r"[A-Z][a-z]?[\d.+\-]*\s*[/,+|&;]\s*[\d.]*\s*[A-Z]|[A-Z][a-z]?\d*[_\-][A-Z][a-z](?![a-z])")


class Named(NamedTuple):
    """What a site is said to hold."""

    elements: dict[str, float]  # symbols, D and T among them, and how much there is of each
    warning: str = ""  # what is not certain about it
    with_hydrogen: str = ""  # water or hydroxyl, as pymatgen knows it: the hydrogen has no coordinates


@functools.lru_cache(maxsize=1)
def _symbols() -> frozenset[str]:
    from pymatgen.core import Element

    return frozenset(element.value for element in Element) | {"D", "T"}


def _supported(symbol: str) -> str:
    from pymatgen.core import Element

    if Element(symbol).Z > MAX_ATOMIC_NUMBER:
        raise UnreadableError(f"element {symbol} is not supported", "use H to Cf (1 to 98)")
    return symbol


def is_element(symbol: str) -> bool:
    """Tells whether this is an element in the usual writing, D or T."""
    return symbol in _symbols()


def of_type_symbol(text: str) -> Named:
    """Reads an _atom_site_type_symbol: an element, with or without charge, or shares of several; else UnreadableError.

    No elements are left of vacancies.
    """
    text = plain(text).strip()
    letters, rest = _letters(text[:LONGEST])
    if len(text) > LONGEST:
        raise _unknown(text, letters)
    if is_element(letters.title()) and CHARGE.fullmatch(rest):
        return Named({_supported(letters.title()): 1.0})
    if water := _water(text, letters):
        return water
    if letters.lower() in VACANT and CHARGE.fullmatch(rest):
        return Named({}, f"{text} is no atom but a vacancy")
    if shares := _shares(text):
        return Named(shares)
    raise _unknown(text, letters)


def of_label(text: str) -> Named:
    """Reads the label of a site that has no type symbol: it begins with the element; else UnreadableError."""
    text = plain(text).strip()
    letters, _ = _letters(text[:LONGEST])
    if len(text) > LONGEST or MIXED.match(text) or letters.lower() in DUMMY:
        raise _unknown(text, letters)
    if water := _water(text, letters):
        return water
    if is_element(letters.title()):
        return Named({_supported(letters.title()): 1.0})
    for length in (2, 1):  # a letter after the element may tell its site, as in Oa1, FeA
        element, more = letters[:length].title(), letters[length:]
        if is_element(element) and len(more) == 1 and not (element == "O" and more == "H"):
            return Named({element: 1.0}, TAKEN)
    raise _unknown(text, letters)


def is_mixed(label: str) -> bool:
    """Tells whether a label names several elements, as Fe/Co1."""
    return bool(MIXED.match(plain(label)))


def _water(text: str, letters: str) -> Named | None:
    """Reads atoms of water and hydroxyl: Ow, Hw, Wat, O-H."""
    if re.fullmatch(r"O-H\d*", text):
        return Named({"O": 1.0}, with_hydrogen="O-H")
    if letters in USUAL:
        return Named({USUAL[letters]: 1.0}, with_hydrogen="Wat" if letters.lower() == "wat" else "")
    return None


def _letters(text: str) -> tuple[str, str]:
    found = re.match("[A-Za-z]*", text)
    end = found.end() if found else 0
    return text[:end], text[end:]


def _shares(text: str) -> dict[str, float]:
    """Reads shares of elements, as in 0.75Si + 0.25Al or Si0.75Al0.25; {} for anything else."""
    shares: dict[str, float] = {}
    at = 0
    while found := PART.match(text, at):
        before, element, other, after, _ = found.groups()
        element, share = element or other, before or after
        if not (is_element(element) and NUMBER.fullmatch(share)) or element in shares:
            return {}
        shares[element] = float(share)
        at = found.end()
        between = re.match(r"\s*[+,/&;]?\s*", text[at:])
        at += between.end() if between else 0
    return shares if at == len(text) and "." in text and sum(shares.values()) <= 1.001 else {}


def _unknown(text: str, letters: str) -> UnreadableError:
    if letters.lower() in DUMMY:
        reason = f"element {letters} is not supported: it stands for no atom"
        return UnreadableError(reason, "remove the site, or give it an _atom_site_type_symbol that is an element")
    remedy = "give it an _atom_site_type_symbol that is an element, in a row for each element of a shared site"
    return UnreadableError(f"{brief(text)} is no element", remedy)
