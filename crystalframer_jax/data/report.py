"""What a preparation tells: the size of a set, and what the user should look at."""

from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from crystalframer_jax.data.build import Columns
from crystalframer_jax.data.extensive import size_exponent
from crystalframer_jax.data.leakage import Leak
from crystalframer_jax.data.records import Target
from crystalframer_jax.data.splits import SPLITS

Warnings = list[tuple[str, str, str]]  # id and place of a record, or those of none, and what is to be known


def extensive_targets(targets: Sequence[Target], columns: Columns) -> Warnings:
    """Warns of targets that grow with the number of atoms, which the model, a mean over atoms, cannot follow well."""
    found = []
    for target, column in zip(targets, columns["labels"].T, strict=True):
        labels = 10.0**column if target.log10 else column
        if (exponent := size_exponent(labels, np.diff(columns["atom_offset"]))) is not None:
            problem = f"{target.name} grows with the number of atoms of the cell (as N^{exponent:.1f})"
            remedy = "the model predicts what does not: divide the labels by the number of atoms (eV becomes eV/atom)"
            found.append(("", target.name, f"{problem}; {remedy}"))
    return found


def in_no_split(columns: Columns, num_contradicting: int, num_copies: int) -> str:
    """Counts the crystals that are in no split, by the reason; "" if there are none."""
    is_known = np.isfinite(columns["labels"])
    is_out = np.ones(len(is_known), bool)
    is_out[np.concatenate([columns[split] for split in SPLITS])] = False
    number = int(is_out.sum())
    partly = is_out & is_known.any(axis=1) & ~is_known.all(axis=1)
    rest = "left over when shares are rounded" + (", or without one of the labels" if partly.any() else "")
    reasons = {
        "without a label": int((is_out & ~is_known.any(axis=1)).sum()) - num_contradicting - num_copies,
        "with contradicting labels (crystals/skipped.csv)": num_contradicting,
        "listed twice (crystals/skipped.csv)": num_copies,
    }
    reasons[rest] = number - sum(reasons.values())
    told = ", ".join(f"{count:,} {reason}" for reason, count in reasons.items() if count > 0)
    return f"{number:,} {'crystal is' if number == 1 else 'crystals are'} in no split: {told}" if number else ""


def report(name: str, targets: tuple[Target, ...], columns: Columns, leaks: list[Leak]) -> None:
    """Prints what was prepared."""
    atoms = np.diff(columns["atom_offset"])
    sizes = ", ".join(f"{len(columns[split]):,} {split}" for split in SPLITS)
    tqdm.write(f"{name}: {len(atoms):,} crystals of {atoms.min()} to {atoms.max()} atoms; {sizes}")
    for target, column in zip(targets, columns["labels"].T, strict=True):
        values = column[np.isfinite(column)]
        extent = f"{values.min():.4g} to {values.max():.4g} {target.unit}".rstrip() if len(values) else "none is known"
        if len(values) and np.isin(values, (0, 1)).all():
            extent = f"{values.mean():.1%} are 1, the others 0: classes, to be trained with task=classification"
        tqdm.write(f"  {target.name}: {len(values):,} labels, {extent}")
    for split in ("test", "val"):
        kinds = [leak.kind for leak in leaks if (leak.split, leak.other_split) == (split, "train")]
        if kinds:
            number = f"1 {split} crystal is" if len(kinds) == 1 else f"{len(kinds):,} {split} crystals are"
            tqdm.write(
                f"  {number} also in training: {kinds.count('id'):,} by id, {kinds.count('structure'):,} by structure "
                "(crystals/leakage.csv)"
            )
