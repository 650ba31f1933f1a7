"""Whether a directory may become, or is, the directory of a run: nothing of anybody else's is written over."""

import re
import stat
from pathlib import Path

from crystalframer_jax.config import ConfigError
from crystalframer_jax.config.hyperparameters import KEYS
from crystalframer_jax.files import FileError, read_json
from crystalframer_jax.runs.checkpoints import DAMAGED_FOLDER, FOLDER, newest_meta
from crystalframer_jax.runs.run_directory import CONFIG_FILE, DATA_FILE, SUMMARY_FILE

LOCK = "lock"
MEMBER = r"member_(0|[1-9]\d{0,3})"  # of an ensemble
FILES = (
    *(LOCK, CONFIG_FILE, DATA_FILE, SUMMARY_FILE, "metrics.jsonl", "environment.jsonl", "config_changes.jsonl"),
    *("predictions_test.csv", "suspect_labels.csv", "parity_test.png", "roc_test.png", "learning_curve.png"),
    "wandb_id.txt",
)
FILE_NAMES = "|".join((*map(re.escape, FILES), r"calibration_test.*\.png", r"nonfinite_step_\d+\.json"))
FOLDER_NAMES = "|".join((FOLDER, DAMAGED_FOLDER, "tensorboard", "wandb", MEMBER))


def check_workdir(workdir: Path) -> None:
    """Raises ConfigError, naming the file, unless a run may be written into a directory.

    It may if that is new, holds none of the names that a run writes, or is the directory of a run. Of these names none
    may be a link, since nothing is written through links (the directory itself may be one), or of another kind.
    """
    if not workdir.exists():
        return
    if not workdir.is_dir():
        raise ConfigError(f"{workdir} is a file; choose another --workdir")
    names = sorted(path.name for path in workdir.iterdir())
    files = [workdir / name for name in names if re.fullmatch(FILE_NAMES, name)]
    folders = [workdir / name for name in names if re.fullmatch(FOLDER_NAMES, name)]
    unfinished = [path / "unfinished" for path in folders if path.name == FOLDER and (path / "unfinished").exists()]
    for paths, kind, is_kind in ((files, "file", stat.S_ISREG), ((*folders, *unfinished), "folder", stat.S_ISDIR)):
        for path in paths:
            mode = path.lstat().st_mode
            if stat.S_ISLNK(mode):
                raise ConfigError(
                    f"{path} is a link, and a run writes nothing through links inside its directory; put the {kind} "
                    "itself there, or choose another --workdir (which may be a link as a whole)"
                )
            if not is_kind(mode):
                raise ConfigError(f"{path} is no {kind}, as a run has it; move it away or choose another --workdir")
    if is_config(workdir / CONFIG_FILE) or newest_meta(workdir):
        return
    for path in (*files, *folders):
        if re.fullmatch(MEMBER, path.name):
            check_workdir(path)
        elif not _is_leftover(path):
            raise ConfigError(
                f"{workdir} is not the directory of a run, and {path.name} in it would be written over; choose "
                "another --workdir"
            )


def is_config(file: Path) -> bool:
    """Tells whether a file is a config.json of ours: hyperparameters, and hardly any that are missing."""
    try:
        values = read_json(file)
    except FileError:
        return False
    return values.keys() <= KEYS.keys() and 2 * len(values) > len(KEYS)


def _is_leftover(path: Path) -> bool:
    """Tells whether this is what the start of a run leaves that was killed before it wrote config.json."""
    if path.name == LOCK:
        return path.stat().st_size == 0
    if path.name == DATA_FILE:
        try:
            return read_json(path).keys() == {"target_set", "digest", "remark"}
        except FileError:
            return False
    return path.name == FOLDER and not any(path.iterdir())
