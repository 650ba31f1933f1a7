"""Target sets that come split: a folder with a file or folder for each of train, val and test."""

import dataclasses
import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from crystalframer_jax.data.custom.fields import SPLIT_NAMES, Item, Items
from crystalframer_jax.data.records import BadRecord, DataError
from crystalframer_jax.data.splits import SPLITS

PARTS = (
    *(".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".extxyz", ".xyz", ".zip", ".db", ".traj", ".pkl", ".pickle"),
    *(".csv.gz", ".tsv.gz", ".json.gz", ".jsonl.gz", ".ndjson.gz", ".extxyz.gz", ".xyz.gz"),
)


def split_paths(folder: Path) -> dict[str, Path]:
    """Finds the folders, else the files, that are named by their split, as val, data_train.csv or test-set; {} if none.

    Raises DataError if two of them are of one split.
    """
    entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    for are_folders in (True, False):
        found: dict[str, Path] = {}
        for path in entries:
            if path.is_dir() != are_folders or not (split := split_of(path.name, are_folders)):
                continue
            if split in found:
                problem = f"both {found[split].name} and {path.name} are for {split}"
                raise DataError(f"{folder}: {problem}; leave one of them there, or give a file")
            found[split] = path
        if "train" in found and len(found) > 1:
            return {split: found[split] for split in SPLITS if split in found}
    return {}


def split_of(name: str, is_folder: bool) -> str:
    """Returns the split that a file or folder is named by, "" for none or several."""
    name = name.lower()
    if not is_folder:
        ending = max((ending for ending in PARTS if name.endswith(ending)), key=len, default="")
        if not ending:
            return ""
        name = name.removesuffix(ending)
    words = {SPLIT_NAMES.get(word, "") for word in re.split("[^a-z]+", name) if word} - {""}
    return words.pop() if len(words) == 1 else ""


def joined(folder: Path, parts: Mapping[str, Items]) -> Items:
    """Reads the items of all parts, each with the split of its part."""

    def read() -> Iterator[Item | BadRecord]:
        for split, items in parts.items():
            for item in items.read():
                yield dataclasses.replace(item, split=split) if isinstance(item, Item) else item

    digest = hashlib.sha256("\n".join(f"{split} {items.sha256}" for split, items in parts.items()).encode())
    counts = [items.count for items in parts.values()]
    count = sum(filter(None, counts)) if all(number is not None for number in counts) else None
    no_labels = tuple(dict.fromkeys(name for items in parts.values() for name in items.no_labels))
    return Items(str(folder), digest.hexdigest(), read, count, no_labels)
