"""Tables of what was measured."""

from collections.abc import Sequence
from typing import Any

from benchmarking.measure import ATTENTION, STEPS
from crystalframer_jax.measuring.timing import Record
from crystalframer_jax.text import table

# Title, format and unit of the entries of records for which they do not follow from name and value, see `cell`.
COLUMNS: dict[str, tuple[str, str, float]] = {
    "crystals_per_s": ("crystals/s", ",.1f", 1),
    "atoms_per_s": ("atoms/s", ",.0f", 1),
    "compile_s": ("compile s", ".1f", 1),
    "compile_per_run": ("compile/run", ".0f", 1),
    "memory_bytes": ("MB", ",.0f", 1e6),
    "memory_bytes_per_crystal": ("MB/crystal", ",.2f", 1e6),
    "memory_bytes_per_atom": ("kB/atom", ",.1f", 1e3),
    "balance": ("balance", ".3f", 1),
}
COLUMNS |= {f"{name}_s": (f"{name} ms", ",.2f", 1e-3) for name in ("median", "floor", "sum")}
SHARES_OF_ONE = ("filled", "share_of_floor", "efficiency", "efficiency_of_cores")

# The entries that tables show.
NAMES = ("case", "variant", "implementation")
SPEED = ("rounds", "median_s", "crystals_per_s", "atoms_per_s", "ratio_to_crystalformer")
COMPILING = ("compile_s", "compile_per_run")
COST = ("memory_bytes", "memory_bytes_per_crystal", "memory_bytes_per_atom", "floor_s", "share_of_floor")
CASES = ("case", "crystals", "atoms", "neighbors_per_atom", "atoms_filled", "neighbors_filled", "columns_filled")
SLOPES = ("measure", "variant", "implementation", "atoms", "slope")
DEVICES = ("devices", "crystals", "rounds", "median_s", "crystals_per_s", "speed_up", "efficiency")
SHARES = ("sum_s", "balance", "atoms_filled", "neighbors_filled", "compile_s", "memory_bytes")


def cell(key: str, value: Any) -> str:
    """Writes an entry of a record: - if there is none, numbers as COLUMNS says or with two decimals."""
    if value is None:
        return "-"
    if key in COLUMNS:
        _, form, unit = COLUMNS[key]
        return format(value / unit, form)
    if isinstance(value, float):
        return format(value, ".0%" if key.endswith(SHARES_OF_ONE) else ",.2f")
    return f"{value:,d}" if isinstance(value, int) else str(value)


def show(title: str, keys: Sequence[str], records: Sequence[Record], label: str = "{case}") -> None:
    """Prints a table with a row for each record, if there are any, and, once for each reason, what failed."""
    if not records:
        return
    header = [COLUMNS[key][0] if key in COLUMNS else key.replace("_", " ") for key in keys]
    rows = [[cell(key, record[key]) for key in keys] for record in records]
    num_left = sum(isinstance(records[0][key], str | list) for key in keys)
    print(f"\n{title}\n" + table(header, rows, num_left))
    for reason in dict.fromkeys(record.get("failure") for record in records):
        if reason:
            failed = [label.format_map(record) for record in records if record["failure"] == reason]
            print(f"failed: {', '.join(failed)}: {reason}")


def print_pipeline(results: Record) -> None:
    """Prints preparation, storage and batches per second."""
    for part in ("preparation", "storage"):
        if part in results:
            show(f"{part}, {results['target_set']}", list(results[part]), [results[part]])
    show("batches per s", list(results["batches"][0]), results["batches"])


def print_models(results: Record) -> None:
    """Prints ceilings, cases, one table for each measure with the failures below it, and growth with the atoms."""
    ceilings = {name: rate / 1e9 for name, rate in results["ceilings"].items()}
    show("measured ceilings, in 10⁹", list(ceilings), [ceilings])
    show("cases", CASES, results["cases"])
    for measure in (*STEPS, *ATTENTION):
        chosen = [record for record in results["measurements"] if record["measure"] == measure]
        if chosen:
            to_xla = ["ratio_to_xla"] * any(record["implementation"] != "xla" for record in chosen)
            show(measure, [*NAMES, *SPEED, *COMPILING, *COST, *to_xla], chosen, "{case} {variant} {implementation}")
    if results["atoms"]:
        show("growth with the number of atoms: time ~ atoms^p", SLOPES, results["atoms"])


def print_devices(results: Record) -> None:
    """Prints strong and weak scaling over devices."""
    cores, forced = results["shared_cores"], results["forced_cpu_devices"]
    print(f"\n{results['variant']} {results['implementation']}, gradients of {results['gradient_bytes'] / 1e6:.2f} MB")
    if forced:
        print(f"{forced} forced CPU devices share {cores} cores: no speed-up beyond {cores} can show")
    keys = [*DEVICES, *(["efficiency_of_cores"] if cores else ()), *SHARES]
    for series, what in {"strong": "the same crystals on more", "weak": "as many crystals for each of the"}.items():
        chosen = [record for record in results["steps"] if record["series"] == series]
        show(f"{series} scaling: {what} devices", keys, chosen, "{devices} devices, {crystals} crystals")
