"""The folder of compiled programs: on when a model is used; off when it is not wanted, not safe or not writable."""

import os
import stat
import subprocess
import sys

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from crystalframer_jax.inference import compilation
from crystalframer_jax.inference.compilation import SWITCH, is_private, keep_compiled_programs

SETTINGS = {
    "jax_compilation_cache_dir": None,
    "jax_enable_compilation_cache": True,
    "jax_persistent_cache_min_compile_time_secs": 1.0,
}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder that is to be used, in a process that has no settings of its own."""
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    for name, value in SETTINGS.items():
        jax.config.update(name, value)
    for name in (SWITCH, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    compilation_cache.reset_cache()
    yield tmp_path / "cache" / "crystalframer_jax" / "xla"
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def used() -> str | None:
    """The folder that JAX uses after the call."""
    keep_compiled_programs()
    return jax.config.jax_compilation_cache_dir


def test_programs_are_kept_from_then_on_in_a_folder_for_the_user_alone(cache, monkeypatch):
    """Though JAX has compiled others before, and however open new folders are made."""
    jax.jit(lambda x: x + 3)(1).block_until_ready()
    before = os.umask(0)
    try:
        cache.parent.parent.mkdir(mode=0o755)
        cache.parent.mkdir(mode=0o755)
        assert used() == str(cache)
    finally:
        os.umask(before)
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700 and not list(cache.iterdir())
    assert jax.config.jax_persistent_cache_min_compile_time_secs == compilation.SHORTEST
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.jit(lambda x: x * 7 - 2)(1).block_until_ready()
    assert [file.name for file in cache.iterdir() if file.name.endswith("-cache")]


@pytest.mark.parametrize("word", ["off", "OFF", "0", "no", "false"])
def test_it_can_be_switched_off(cache, monkeypatch, word):
    monkeypatch.setenv(SWITCH, word)
    assert used() is None and not cache.exists()


def test_settings_of_jax_come_first(cache, tmp_path, monkeypatch):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "1.0")
    assert used() == str(tmp_path / "own") and not cache.exists()
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 1.0
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_enable_compilation_cache", False)
    assert used() is None and not cache.exists()


@pytest.mark.parametrize("place", ["folder", "folder above", "cache folder"])
@pytest.mark.parametrize("mode", [0o777, 0o775])
def test_a_folder_that_others_may_write_is_not_used(cache, capfd, monkeypatch, place, mode):
    """Nor one that they may replace; a group without others is no danger."""
    cache.mkdir(parents=True, mode=0o700)
    folder = {"folder": cache, "folder above": cache.parent, "cache folder": cache.parent.parent}[place]
    folder.chmod(mode)
    user = compilation.pwd.getpwuid(os.getuid())
    group = compilation.grp.getgrgid(folder.stat().st_gid)

    def with_members(*names):
        monkeypatch.setattr(compilation.grp, "getgrgid", lambda _: type(group)((user.pw_name, "x", user.pw_gid, names)))

    with_members("somebody")
    assert used() is None
    with_members(user.pw_name)
    assert used() == (str(cache) if mode == 0o775 else None)
    assert capfd.readouterr() == ("", "")


def test_a_folder_of_somebody_else_is_not_used(cache, monkeypatch):
    cache.mkdir(parents=True)
    assert is_private(cache)
    monkeypatch.setattr(os, "getuid", lambda: cache.stat().st_uid + 1)
    assert used() is None


def test_a_link_is_not_used(cache, tmp_path):
    cache.parent.mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    cache.symlink_to(tmp_path / "elsewhere")
    assert used() is None


def test_a_folder_that_cannot_be_written_is_silently_not_used(cache, capfd, monkeypatch):
    cache.parent.mkdir(parents=True)
    cache.write_text("a file")
    assert used() is None
    cache.unlink()
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert used() is None
    monkeypatch.undo()
    assert capfd.readouterr() == ("", "")


def test_what_was_not_used_for_longest_goes_first(cache, monkeypatch):
    cache.mkdir(parents=True)
    for number, name in enumerate(("c", "a", "b", "d")):
        (cache / name).write_bytes(bytes(10))
        os.utime(cache / name, (1000 + number, 1))
    monkeypatch.setattr(compilation, "LARGEST", 25)
    assert used() == str(cache) and sorted(file.name for file in cache.iterdir()) == ["b", "d"]


def test_an_import_changes_no_setting(tmp_path):
    code = (
        "import crystalframer_jax, jax; from crystalframer_jax.inference import Predictor;"
        "print(jax.config.jax_compilation_cache_dir)"
    )
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "CRYSTALFRAMER_"))}
    environment = kept | {"XDG_CACHE_HOME": str(tmp_path)}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout == "None\n" and not list(tmp_path.iterdir())
