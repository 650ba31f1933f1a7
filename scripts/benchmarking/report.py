"""Tables of what was measured."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from benchmarking.measure import ATTENTION, STEPS, Record
from crystalframer_jax.text import table


class Column(NamedTuple):
    """A column of a table: what it is called and the entry of a record that it shows."""

    title: str
    key: str
    form: str = "s"  # texts stand first in a table, aligned left
    unit: float = 1

    def text(self, record: Record) -> str:
        """Writes an entry, or - if there is none."""
        value = record[self.key]
        return "-" if value is None else format(value if self.unit == 1 else value / self.unit, self.form)


NAMES = [Column(name, name) for name in ("case", "variant", "implementation")]
MEASURES = [
    Column("rounds", "rounds", "d"),
    Column("median ms", "median_s", ",.2f", 1e-3),
    Column("crystals/s", "crystals_per_s", ",.1f"),
    Column("atoms/s", "atoms_per_s", ",.0f"),
    Column("/ Crystalformer", "ratio_to_crystalformer", ".2f"),
    Column("compile s", "compile_s", ".1f"),
    Column("MB", "memory_bytes", ",.0f", 1e6),
    Column("MB/crystal", "memory_bytes_per_crystal", ",.2f", 1e6),
    Column("kB/atom", "memory_bytes_per_atom", ",.1f", 1e3),
    Column("floor ms", "floor_s", ",.2f", 1e-3),
    Column("share of floor", "share_of_floor", ".1f", 0.01),
]
TO_XLA = Column("/ xla", "ratio_to_xla", ".2f")
CASES = [
    Column("case", "case"),
    Column("crystals", "crystals", ",d"),
    Column("atoms", "atoms", ",d"),
    Column("neighbors per atom", "neighbors_per_atom", ".0f"),
    Column("atoms filled", "atoms_filled", ".0%"),
    Column("neighbors filled", "neighbors_filled", ".0%"),
    Column("columns filled", "columns_filled", ".0%"),
]
SLOPES = [
    Column("time ~ atoms^p", "measure"),
    *NAMES[1:],
    Column("from atoms", "least", ",d"),
    Column("to atoms", "most", ",d"),
    Column("p", "slope", ".2f"),
]
SHARED = [  # where devices share cores
    Column("/ min(devices, cores)", "efficiency_of_cores", ".0%"),
    Column("core s", "core_s", ".2f"),
    Column("of core s", "efficiency_of_core_s", ".0%"),
    Column("cores busy", "cores_busy", ".2f"),
]
DEVICES = [
    Column("devices", "devices", "d"),
    Column("crystals", "crystals", ",d"),
    Column("rounds", "rounds", "d"),
    Column("step ms", "median_s", ",.1f", 1e-3),
    Column("crystals/s", "crystals_per_s", ",.1f"),
    Column("speed-up", "speed_up", ".2f"),
    Column("/ devices", "efficiency", ".0%"),
    *SHARED,
    Column("sum ms", "sum_s", ".2f", 1e-3),
    Column("balance", "balance", ".3f"),
    Column("atoms filled", "atoms_filled", ".0%"),
    Column("neighbors filled", "neighbors_filled", ".0%"),
    Column("compile s", "compile_s", ".1f"),
    Column("MB", "memory_bytes", ",.0f", 1e6),
]
CHECK = [
    Column("series", "series"),
    Column("devices", "devices", "d"),
    Column("crystals", "crystals", "d"),
    Column("measured ms", "median_s", ",.0f", 1e-3),
    Column("predicted ms", "predicted_s", ",.0f", 1e-3),
    Column("predicted / measured", "predicted_to_measured", ".2f"),
]
CHECK_OF_CORES = [
    Column("measured core s", "core_s", ".2f"),
    Column("predicted core s", "predicted_core_s", ".2f"),
    Column("predicted / measured", "predicted_to_measured_core_s", ".2f"),
]
DEVICE_SERIES = {
    "strong": "strong scaling: the same crystals on more devices",
    "weak": "weak scaling: as many crystals for each device",
}


def show(title: str, columns: Sequence[Column], records: Sequence[Record]) -> None:
    """Prints a table with a row for each record."""
    rows = [[column.text(record) for column in columns] for record in records]
    num_left = sum(column.form == "s" for column in columns)
    print(f"\n{title}\n" + table([column.title for column in columns], rows, num_left))


def show_numbers(title: str, numbers: dict[str, float], unit: float = 1) -> None:
    """Prints names and numbers."""
    print("\n" + table([title, ""], [[name, f"{number / unit:,.1f}"] for name, number in numbers.items()]))


def print_pipeline(results: Record) -> None:
    """Prints preparation, storage and batches per second."""
    for part in ("preparation", "storage"):
        if part in results:
            show_numbers(f"{part}, {results['target_set']}", results[part])
    found = results["batches"]
    rows = [[way, *(f"{each['batches per s'][way]:,.0f}" for each in found)] for way in found[0]["batches per s"]]
    rows += [[f"{what} filled", *(f"{each['fill'][what]:.0%}" for each in found)] for what in found[0]["fill"]]
    print("\n" + table(["batches per s", *(f"{each['crystals']} crystals" for each in found)], rows))


def print_progress(records: Sequence[Record]) -> None:
    """Prints a line for each record, as soon as it is there."""
    for record in records:
        found = record["failure"] or f"{record['median_s'] * 1e3:,.2f} ms"
        print(f"    {record['variant']} {record['implementation']}: {found}", flush=True)


def print_models(results: Record) -> None:
    """Prints ceilings, cases, one table for each measure with the failures below it, and growth with the atoms."""
    show_numbers("measured ceilings, in 10⁹", results["ceilings"], 1e9)
    show("cases", CASES, results["cases"])
    for measure in (*STEPS, *ATTENTION):
        chosen = [record for record in results["measurements"] if record["measure"] == measure]
        if chosen:
            print_measure(measure, chosen)
    slopes = [found | {"least": min(found["atoms"]), "most": max(found["atoms"])} for found in results["atoms"]]
    if slopes:
        show("growth with the number of atoms", SLOPES, slopes)


def print_measure(title: str, records: Sequence[Record]) -> None:
    """Prints the table of a measure and, once for each reason, what failed."""
    kinds = {record["implementation"] for record in records}
    show(title, [*NAMES, *MEASURES, *([TO_XLA] if kinds - {"xla"} else [])], records)
    failures: dict[str, list[str]] = {}
    for record in records:
        if record["failure"]:
            failures.setdefault(record["failure"], []).append(" ".join(record[name.key] for name in NAMES))
    for reason, where in failures.items():
        print(f"failed: {', '.join(where)}: {reason}")


def print_devices(results: dict[str, Any]) -> None:
    """Prints scaling over devices: the measured steps, and how well a prediction fits them."""
    cores, forced = results["shared_cores"], results["forced_cpu_devices"]
    print(f"\n{results['variant']} {results['implementation']}, gradients of {results['gradient_bytes'] / 1e6:.2f} MB")
    if forced:
        print(
            f"{forced} forced CPU devices share {cores} cores: no speed-up beyond {cores} can show. What can: how even "
            "shares are,\nand what sharing out, summing and running several devices cost at equal work."
        )
    for series, title in DEVICE_SERIES.items():
        chosen = [record for record in results["steps"] if record["series"] == series]
        show(title, [column for column in DEVICES if cores or column not in SHARED], chosen)
        for record in chosen:
            if record["failure"]:
                print(f"failed: {record['devices']} devices, {record['crystals']} crystals: {record['failure']}")
    if results["fit"]:
        fixed, each = results["fit"]["fixed"] * 1e3, results["fit"]["per_crystal"] * 1e3
        title = f"one device: {fixed:.3g} ms + {each:.3g} ms for each crystal; steps predicted from that:"
        show(title, [*CHECK, *(CHECK_OF_CORES if cores else [])], results["check"])
