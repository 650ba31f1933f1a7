"""The folder of compiled programs, so that only the first process of a user waits for the compiler."""

import contextlib
import os
import stat
from pathlib import Path
from typing import Any

import jax
import platformdirs

try:
    import grp
    import pwd
except ImportError:  # on Windows
    grp = pwd = None  # type: ignore[assignment]

SWITCH = "CRYSTALFRAMER_COMPILATION_CACHE"  # environment variable; "off": no folder is used
LARGEST = 2**30  # bytes of the folder; what was not used for longest goes first
SHORTEST = 0.2  # seconds of compiling that are worth a file


def keep_compiled_programs() -> None:
    """Makes JAX keep compiled programs in the user's cache folder, from now on in this process.

    It does not if JAX has been given a folder or been told to keep none, or if SWITCH is off. Nor does it if the folder
    cannot be written, or if somebody else may write into it: programs are code. Where files have no owners that Python
    knows of, on Windows, it does only if JAX has been given a folder.
    """
    config: Any = jax.config
    is_off = os.environ.get(SWITCH, "").lower() in ("off", "0", "no", "false")
    is_off |= not hasattr(os, "getuid")
    if config.jax_compilation_cache_dir is None and not is_off and config.jax_enable_compilation_cache:
        folder = platformdirs.user_cache_path("crystalframer_jax").absolute() / "xla"
        with contextlib.suppress(OSError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if is_private(folder) and os.access(folder, os.R_OK | os.W_OK | os.X_OK):
                _shorten(folder)
                config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        shortest = min(SHORTEST, config.jax_persistent_cache_min_compile_time_secs)
        config.update("jax_persistent_cache_min_compile_time_secs", shortest)


def is_private(folder: Path) -> bool:
    """Tells whether a folder, no link, is this user's, and nobody else may write into it or replace it."""
    own = folder.lstat()
    above = [parent.stat() for parent in {*folder.parents, *folder.resolve().parents}]
    return (
        stat.S_ISDIR(own.st_mode)
        and own.st_uid == os.getuid()
        and not _is_open(own)
        and all(found.st_uid in (0, os.getuid()) for found in above)
        and all(found.st_mode & stat.S_ISVTX or not _is_open(found) for found in above)
    )


def _is_open(found: os.stat_result) -> bool:
    """Tells whether others may write: everybody, or a group that has other members than this user."""
    if found.st_mode & stat.S_IWOTH or not found.st_mode & stat.S_IWGRP:
        return bool(found.st_mode & stat.S_IWOTH)
    try:
        user, group = pwd.getpwuid(os.getuid()), grp.getgrgid(found.st_gid)
    except KeyError:  # without names
        return True
    return (user.pw_gid, user.pw_name) != (group.gr_gid, group.gr_name) or bool({*group.gr_mem} - {user.pw_name})


def _shorten(folder: Path) -> None:
    """Removes the programs that were not used for longest, until the rest is not larger than LARGEST."""
    files = [(file, file.stat()) for file in folder.iterdir()]
    total = sum(found.st_size for _, found in files)
    for file, found in sorted(files, key=lambda item: max(item[1].st_atime, item[1].st_mtime)):
        if total <= LARGEST:
            break
        file.unlink()
        total -= found.st_size
