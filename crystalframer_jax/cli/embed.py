"""Vectors of crystals and of their atoms, and the crystals of a set that are nearest."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pymatgen.core import Element

from crystalframer_jax.batching.table import table_of
from crystalframer_jax.cli.common import reporting_errors, shows_progress, tell
from crystalframer_jax.cli.inputs import read_all
from crystalframer_jax.cli.predict import model_of
from crystalframer_jax.config import ConfigError
from crystalframer_jax.data.datasets import open_dataset, target_names
from crystalframer_jax.files import FileError, check_replaceable, open_regular, replacing, write_csv
from crystalframer_jax.inference.embedding import Vectors, nearest
from crystalframer_jax.inference.predictor import Predictor
from crystalframer_jax.structures.crystal import Crystal
from crystalframer_jax.text import table


class Known(NamedTuple):
    """Crystals that others are compared with."""

    ids: np.ndarray  # [C] str
    vectors: np.ndarray  # [C, D]


@reporting_errors()
def run(arguments: argparse.Namespace) -> int:
    """Writes vectors, or tells what is nearest; returns 1 if a file could not be used."""
    if not arguments.output and not arguments.nearest:
        raise ConfigError("name a file for the vectors by --output, or ask for crystals that are near by --nearest=5")
    if arguments.output:
        check_replaceable(arguments.output.expanduser(), b"id," if arguments.output.suffix == ".csv" else b"PK")
    model = model_of(arguments)
    if not isinstance(model, Predictor):
        raise ConfigError(
            f"{arguments.model} is an ensemble, each model of which has vectors of its own: name a member"
        )
    read, errors = read_all(arguments.files, [model.cutoff])
    crystals = [found.crystal for found in read]
    tell(errors)
    if crystals:
        vectors = model.embed_table(table_of(crystals, model.cutoff), shows_progress(len(crystals)))
        if arguments.nearest:
            print(nearest_table(crystals, vectors.crystals, known_vectors(model, arguments), arguments.nearest))
        if arguments.output:
            write_vectors(arguments.output.expanduser(), crystals, vectors, arguments.atoms)
            print(f"wrote {arguments.output}: {len(crystals):,} crystals, {vectors.crystals.shape[1]} features")
    return 1 if errors else 0


def known_vectors(model: Predictor, arguments: argparse.Namespace) -> Known:
    """Reads the vectors of a file that embed wrote, or computes those of a prepared set."""
    among = arguments.among
    if among.endswith(".npz"):
        try:
            with open_regular(Path(among)) as stream, np.load(stream, allow_pickle=False) as content:
                return Known(content["ids"], content["vectors"])
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise FileError(f"{among}: holds no vectors ({error}); write it by crystalframer embed --output") from error
    dataset = open_dataset(among, target_names(among, arguments.data_dir)[:1], model.cutoff, arguments.data_dir)
    rows = len(dataset.table)
    print(f"embedding the {rows:,} crystals of {among}; --output and --among=FILE.npz spare that", file=sys.stderr)
    return Known(dataset.table.ids, model.embed_table(dataset.table, shows_progress(rows)).crystals)


def nearest_table(crystals: list[Crystal], vectors: np.ndarray, known: Known, number: int) -> str:
    """Tabulates the nearest of known crystals for each crystal."""
    if known.vectors.ndim != 2 or known.vectors.shape[1:] != vectors.shape[1:]:
        raise ConfigError(
            f"--among has vectors {list(known.vectors.shape)}, of another model than {list(vectors.shape)}"
        )
    rows, distances = nearest(vectors, known.vectors, number)
    lines = [
        [crystal.id, crystal.formula, rank, str(known.ids[row]), distance]
        for crystal, of_crystal, apart in zip(crystals, rows, distances.tolist(), strict=True)
        for rank, (row, distance) in enumerate(zip(of_crystal, apart, strict=True), 1)
    ]
    return table(["structure", "formula", "rank", "nearest", "distance"], lines)


def write_vectors(file: Path, crystals: list[Crystal], vectors: Vectors, atoms: bool) -> None:
    """Writes .npz (ids, vectors; with `atoms` also atom_vectors, atom_offset, species) or .csv (rows of either)."""
    file.parent.mkdir(parents=True, exist_ok=True)
    ids = [crystal.id for crystal in crystals]
    if file.suffix == ".csv":
        width = vectors.crystals.shape[1]
        header = ["id", *(["site", "element"] if atoms else ["formula"]), *(f"v{i}" for i in range(width))]
        write_csv(file, header, _atom_rows(crystals, vectors) if atoms else _rows(crystals, vectors))
        return
    arrays: dict[str, Any] = {"ids": np.array(ids), "vectors": vectors.crystals}
    if atoms:
        offset = np.cumsum([0, *(crystal.num_atoms for crystal in crystals)])
        species = np.concatenate([crystal.species for crystal in crystals])
        arrays |= {"atom_vectors": vectors.atoms, "atom_offset": offset, "species": species}
    with replacing(file) as temporary, temporary.open("wb") as stream:
        np.savez_compressed(stream, allow_pickle=False, **arrays)


def _rows(crystals: list[Crystal], vectors: Vectors) -> Iterator[list[Any]]:
    for crystal, vector in zip(crystals, vectors.crystals.tolist(), strict=True):
        yield [crystal.id, crystal.formula, *vector]


def _atom_rows(crystals: list[Crystal], vectors: Vectors) -> Iterator[list[Any]]:
    remaining = iter(vectors.atoms.tolist())
    for crystal in crystals:
        for site, number in enumerate(crystal.species.tolist(), 1):
            yield [crystal.id, site, Element.from_Z(number).symbol, *next(remaining)]
