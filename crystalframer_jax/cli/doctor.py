"""Does everything work here? Versions, devices, folders, a prediction against a stored number; the speed of a GPU."""

import argparse
import importlib.metadata
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

import crystalframer_jax
from crystalframer_jax.cli.arguments import DEFAULT_MODEL
from crystalframer_jax.cli.common import reporting_errors
from crystalframer_jax.data.store import data_folder
from crystalframer_jax.errors import UserError
from crystalframer_jax.files import check_replaceable, write_json
from crystalframer_jax.inference.predictor import Predictor
from crystalframer_jax.kernels import backend
from crystalframer_jax.parallel.cores import use_cores
from crystalframer_jax.structures.crystal import Crystal
from crystalframer_jax.text import table, with_unit

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "scipy", "pymatgen", "ase", "torch")
EDGE = 5.64  # Å, of rock salt
EXPECTED = (-2.08494, 5.05417)  # of the default model for rock salt, on a CPU
TOLERANCE = 1e-3  # of them: other devices round otherwise


@reporting_errors()
def run(arguments: argparse.Namespace) -> int:
    """Prints what was found; returns 1 if something does not work."""
    if arguments.json:
        check_replaceable(arguments.json.expanduser(), b'{\n "versions"')
    use_cores()  # before JAX looks for devices
    found: dict[str, Any] = {"versions": versions()}
    _print("versions", [[name, version] for name, version in found["versions"].items()])
    found["devices"] = [f"{device.platform}:{device.id} {device.device_kind}" for device in jax.devices()]
    found["kernels"] = backend.problem() or "available"
    cores = os.cpu_count()
    rows = [["devices", text] for text in found["devices"]] + [["cores", str(cores)], ["kernels", found["kernels"]]]
    _print("machine", rows)
    if arguments.gpu:
        found["gpu"] = check_gpu(arguments.size)
    else:
        found["folders"] = folders()
        _print("folders", found["folders"])
        found["prediction"] = check_prediction()
        problem = found["prediction"]["problem"]
        print(f"\nprediction: {found['prediction']['told']}")
        print(f"error: {problem}" if problem else "all is well", file=sys.stderr if problem else sys.stdout)
    if arguments.json:
        write_json(arguments.json.expanduser(), found)
        print(f"wrote {arguments.json}")
    return 1 if _problems(found) else 0


def versions() -> dict[str, str]:
    """Lists the versions of what matters; - for what is not installed."""
    found = {"crystalframer_jax": crystalframer_jax.__version__, "Python": platform.python_version()}
    found["system"] = platform.platform()
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "-"
    return found


def folders() -> list[list[str]]:
    """Lists the folders that are used: what for, where, how large, whether they can be written."""
    cache = data_folder("")
    programs = jax.config.jax_compilation_cache_dir or cache / "xla"  # type: ignore[attr-defined]
    rows: list[tuple[str, Path]] = [
        ("package", Path(crystalframer_jax.__file__).parent),
        ("compiled programs", Path(programs)),
    ]
    sets = sorted(folder for folder in cache.glob("*") if (folder / "crystals").is_dir())
    rows += [("data", cache), *((f"  {folder.name}", folder) for folder in sets)]
    return [[what, str(folder), _size(folder), _state(folder)] for what, folder in rows]


def _size(folder: Path) -> str:
    """Tells how much is in a folder."""
    try:
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    except OSError:
        return "-"
    return f"{size / 1e6:,.1f} MB"


def _state(folder: Path) -> str:
    if not folder.is_dir():
        return "not there yet"
    return "can be written" if os.access(folder, os.W_OK) else "can only be read"


def rock_salt() -> Crystal:
    """Makes NaCl in its cubic cell."""
    sites = np.array([[0, 0, 0], [0, 1, 1], [1, 0, 1], [1, 1, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1]])
    return Crystal(np.array([11] * 4 + [17] * 4), EDGE / 2 * sites, EDGE * np.eye(3), id="NaCl")


def check_prediction() -> dict[str, Any]:
    """Predicts rock salt and compares that with the stored numbers."""
    start = time.perf_counter()
    model = Predictor.load(DEFAULT_MODEL)
    first = model.predict(rock_salt())[0]
    seconds = [time.perf_counter() - start]
    start = time.perf_counter()
    model.predict(rock_salt())
    seconds.append(time.perf_counter() - start)
    told = ", ".join(
        f"{with_unit(t.name, t.unit)} {value:.4f}" for t, value in zip(model.targets, first.tolist(), strict=True)
    )
    off = float(np.abs(first - EXPECTED).max())
    is_wrong = not off <= TOLERANCE
    problem = f"{DEFAULT_MODEL} is off by {off:.1e} for NaCl; install again, or report this output" if is_wrong else ""
    told = (
        f"NaCl by {DEFAULT_MODEL}: {told}, off by {off:.0e}; first in {seconds[0]:.1f} s, again in {seconds[1]:.2f} s"
    )
    return {"values": first.tolist(), "expected": EXPECTED, "seconds": seconds, "told": told, "problem": problem}


def check_gpu(size: str) -> dict[str, Any]:
    """Measures this GPU and prints a table."""
    from crystalframer_jax.measuring.gpu import FULL, SMALL, measure_gpu  # imports Optax

    if jax.default_backend() == "cpu" and size == "full":
        kinds = ", ".join(sorted({device.device_kind for device in jax.devices()}))
        raise UserError(
            f"--gpu needs a GPU that JAX can use, and there is none here ({kinds}); with one, pip install "
            "'crystalframer-jax[cuda12]' and try again"
        )
    found = measure_gpu(FULL if size == "full" else SMALL, ("xla", "pallas") if size == "full" else ("xla",))
    print(f"\n{gpu_table(found)}")
    if found["left_out"]:
        print(f"left out, for want of time: {', '.join(found['left_out'])}")
    return found


def gpu_table(found: dict[str, Any]) -> str:
    """Tabulates checks, times and memory: a line for each of what, variant and implementation."""
    rows: list[list[Any]] = []
    for check in found["checks"]:
        names = [check["variant"], check["implementation"]]
        figures = {"sums against float64": "sums", "gradients against float64": "gradients"}
        lines = [[what, *names, f"{check[key]:.1e}"] for what, key in figures.items() if key in check]
        if "same_frames" in check:
            lines.append(["frames as by XLA", *names, f"{check['same_frames']:.2%}"])
        rows += lines or [["sums against float64", *names, f"failed: {check['failure']}"]]
    for timed in found["times"]:
        what = f"{timed['measure']}, {timed['case']}"
        figure = timed["failure"] and f"failed: {timed['failure']}"
        figure = figure or f"{1e3 * timed['median_s']:,.2f} ms, compiled in {timed['compile_s']:.0f} s"
        rows.append([what, timed["variant"], timed["implementation"], figure])
    peak = f"{found['peak_bytes'] / 1e9:,.2f} GB" if found["peak_bytes"] else "not told"
    rows += [["peak memory", "all", "all", peak], ["time for all of this", "all", "all", f"{found['seconds']:.0f} s"]]
    return _left(["what", "variant", "by", "result"], rows)


def _problems(found: dict[str, Any]) -> list[str]:
    """Lists what does not work."""
    if "prediction" in found:
        return [found["prediction"]["problem"]] if found["prediction"]["problem"] else []
    return [record["failure"] for record in (*found["gpu"]["checks"], *found["gpu"]["times"]) if record["failure"]]


def _print(title: str, rows: list[list[str]]) -> None:
    header = [title, *[""] * (len(rows[0]) - 1)]
    print("\n" + _left(header, rows), flush=True)


def _left(header: list[str], rows: list[list[Any]]) -> str:
    """Tabulates text, without blanks at the ends of lines."""
    return "\n".join(line.rstrip() for line in table(header, rows, num_left=len(header)).splitlines())
