"""Tables of what was measured."""

from collections.abc import Sequence
from typing import Any

from benchmarking.measure import ATTENTION, STEPS
from crystalframer_jax.text import table

NAMES = ["case", "variant", "implementation"]


def print_header(results: dict[str, Any]) -> None:
    """Where and when."""
    print(f"{results['device']}, {results['cores']} cores, JAX {results['jax']}, {results['date']}")


def print_pipeline(results: dict[str, Any]) -> None:
    """Preparation, storage and batches per second."""
    for part in ("preparation", "storage"):
        if part in results:
            rows = [[key, f"{value:,.1f}"] for key, value in results[part].items()]
            print("\n" + table([f"{part}, {results['target_set']}", ""], rows))
    header = ["batches per s", *(f"{found['crystals']} crystals" for found in results["batches"])]
    rows = [
        [way, *(f"{found['batches per s'][way]:,.0f}" for found in results["batches"])]
        for way in results["batches"][0]["batches per s"]
    ]
    rows += [
        [f"{what} filled", *(f"{found['fill'][what]:.0%}" for found in results["batches"])]
        for what in results["batches"][0]["fill"]
    ]
    print("\n" + table(header, rows))


def print_ceilings(ceilings: dict[str, float]) -> None:
    """What the device reaches at best."""
    rows = [[f"10⁹ {name}", f"{rate / 1e9:,.1f}"] for name, rate in ceilings.items()]
    print("\n" + table(["measured ceilings", ""], rows))


def print_cases(cases: Sequence[dict[str, Any]]) -> None:
    """Sizes and padding."""
    header = ["case", "crystals", "atoms", "neighbors per atom", "atoms filled", "neighbors filled", "columns filled"]
    rows = [
        [case["case"], f"{case['crystals']:,}", f"{case['atoms']:,}", f"{case['neighbors_per_atom']:.0f}"]
        + [f"{case[what]:.0%}" for what in ("atoms_filled", "neighbors_filled", "columns_filled")]
        for case in cases
    ]
    print("\n" + table(header, rows))


def print_progress(records: Sequence[dict[str, Any]]) -> None:
    """A line for each record, as soon as it is there."""
    for record in records:
        found = f"{_text(record['median_s'], 1e-3, ',.2f')} ms" if not record["failure"] else record["failure"]
        print(f"    {record['variant']} {record['implementation']}: {found}", flush=True)


def print_line(text: str) -> None:
    """A line of progress."""
    print(f"    {text}", flush=True)


def print_measures(records: Sequence[dict[str, Any]]) -> None:
    """One table for each measure; failures below it."""
    for measure in (*STEPS, *ATTENTION):
        chosen = [record for record in records if record["measure"] == measure]
        if not chosen:
            continue
        columns = [*COLUMNS, TO_XLA] if {record["implementation"] for record in chosen} - {"xla"} else COLUMNS
        header = [*NAMES, *(title for title, *_ in columns)]
        rows = [
            [record[name] for name in NAMES] + [_text(record[key], scale, form) for _, key, scale, form in columns]
            for record in chosen
        ]
        print(f"\n{measure}\n" + table(header, rows, num_left=len(NAMES)))
        failures: dict[str, list[str]] = {}
        for record in chosen:
            if record["failure"]:
                failures.setdefault(record["failure"], []).append(" ".join(record[name] for name in NAMES))
        for reason, where in failures.items():
            print(f"failed: {', '.join(where)}: {reason}")


def print_over_atoms(slopes: Sequence[dict[str, Any]]) -> None:
    """Growth of the time with the number of atoms."""
    if slopes:
        header = ["time ~ atoms^p", "variant", "implementation", "atoms", "p"]
        rows = [
            [
                *(found[name] for name in ("measure", "variant", "implementation")),
                f"{min(found['atoms']):,} to {max(found['atoms']):,}",
                f"{found['slope']:.2f}",
            ]
            for found in slopes
        ]
        print("\n" + table(header, rows, num_left=3))


def print_devices(results: dict[str, Any]) -> None:
    """Scaling over devices: the measured steps, the model on paper, and how well its arithmetic fits the former."""
    cores, forced = results["shared_cores"], results["forced_cpu_devices"]
    print(f"\n{results['variant']} {results['implementation']}, gradients of {results['gradient_bytes'] / 1e6:.2f} MB")
    if forced:
        print(
            f"{forced} forced CPU devices share {cores} cores: no speed-up beyond {cores} can show. What can: how even "
            "shares are,\nand what sharing out, summing and running several devices cost at equal work."
        )
    columns = [column for column in DEVICE_COLUMNS if cores or column not in SHARED_COLUMNS]
    for series, title in DEVICE_SERIES.items():
        chosen = [record for record in results["steps"] if record["series"] == series]
        rows = [[_text(record[key], scale, form) for _, key, scale, form in columns] for record in chosen]
        print(f"\n{title}\n" + table([name for name, *_ in columns], rows, num_left=0))
        for record in chosen:
            if record["failure"]:
                print(f"failed: {record['devices']} devices, {record['crystals']} crystals: {record['failure']}")
    if results["fit"]:
        fixed, each = results["fit"]["fixed"], results["fit"]["per_crystal"]
        print(f"\none device: {fixed * 1e3:.3g} ms + {each * 1e3:.3g} ms for each crystal; steps predicted from that:")
        checked = CHECK_COLUMNS if cores else CHECK_COLUMNS[:-3]
        rows = [
            [row["series"], *(_text(row[key], scale, form) for _, key, scale, form in checked)]
            for row in results["check"]
        ]
        print(table(["series", *(name for name, *_ in checked)], rows))
    print_paper(results["paper"])


def print_paper(paper: dict[str, Any]) -> None:
    """The model on paper, a table for each batch size."""
    fixed, each = paper["compute"]["fixed"], paper["compute"]["per_crystal"]
    origin = "measured here" if paper["compute"]["measured"] else "estimated, the least that a step can take"
    print(f"\non paper: {fixed * 1e3:.3g} ms + {each * 1e6:.3g} µs for each crystal ({origin})")
    first, *others = [network["name"] for network in paper["networks"]]
    header = ["GPUs", "crystals", "balance", "compute ms", "MB sent", f"sum ms: {first}", *others]
    header += [f"efficiency: {first}", *others, "share out ms", "step ms", "crystals/s", "efficiency", "packed"]
    groups: list[tuple[str, list[list[str]]]] = []
    for row in paper["rows"]:
        if row["gpus"] == 1:
            of = "in all" if row["series"] == "strong" else "for each GPU"
            groups.append((f"{row['series']} scaling, {row['batch']:,} crystals {of}", []))
        groups[-1][1].append(
            [f"{row['gpus']:,}", f"{row['batch']:,}", f"{row['balance']:.2f}", _text(row["compute"], 1e-3, ".2f")]
            + [_text(row["bytes"], 1e6, ".1f"), *(_text(x, 1e-3, ".2f") for x in row["sums"])]
            + [f"{x:.0%}" for x in row["efficiency_on_gpus"]]
            + [_text(row["sharing"], 1e-3, ".1f"), _text(row["step"], 1e-3, ".2f"), f"{row['crystals_per_s']:,.0f}"]
            + [f"{row[x]:.0%}" for x in ("efficiency", "packed_efficiency")]
        )
    for title, rows in groups:
        print(f"\n{title}\n" + table(header, rows, num_left=0))


COLUMNS = [  # title, key of the record, what it is divided by, format
    ("rounds", "rounds", 1, "d"),
    ("median ms", "median_s", 1e-3, ",.2f"),
    ("crystals/s", "crystals_per_s", 1, ",.1f"),
    ("atoms/s", "atoms_per_s", 1, ",.0f"),
    ("/ Crystalformer", "ratio_to_crystalformer", 1, ".2f"),
    ("compile s", "compile_s", 1, ".1f"),
    ("MB", "memory_bytes", 1e6, ",.0f"),
    ("MB/crystal", "memory_bytes_per_crystal", 1e6, ",.2f"),
    ("kB/atom", "memory_bytes_per_atom", 1e3, ",.1f"),
    ("floor ms", "floor_s", 1e-3, ",.2f"),
    ("share of floor", "share_of_floor", 0.01, ".1f"),
]
DEVICE_SERIES = {
    "strong": "strong scaling: the same crystals on more devices",
    "weak": "weak scaling: as many crystals for each device",
}
SHARED_COLUMNS = [  # where devices share cores
    ("/ min(devices, cores)", "efficiency_of_cores", 1, ".0%"),
    ("core s", "core_s", 1, ".2f"),
    ("of core s", "efficiency_of_core_s", 1, ".0%"),
    ("cores busy", "cores_busy", 1, ".2f"),
]
DEVICE_COLUMNS = [
    ("devices", "devices", 1, "d"),
    ("crystals", "crystals", 1, ",d"),
    ("rounds", "rounds", 1, "d"),
    ("step ms", "median_s", 1e-3, ",.1f"),
    ("crystals/s", "crystals_per_s", 1, ",.1f"),
    ("speed-up", "speed_up", 1, ".2f"),
    ("/ devices", "efficiency", 1, ".0%"),
    *SHARED_COLUMNS,
    ("sum ms", "sum_s", 1e-3, ".2f"),
    ("balance", "balance", 1, ".3f"),
    ("atoms filled", "atoms_filled", 1, ".0%"),
    ("neighbors filled", "neighbors_filled", 1, ".0%"),
    ("compile s", "compile_s", 1, ".1f"),
    ("MB", "memory_bytes", 1e6, ",.0f"),
]
CHECK_COLUMNS = [
    ("devices", "devices", 1, "d"),
    ("crystals", "crystals", 1, "d"),
    ("measured ms", "median_s", 1e-3, ",.0f"),
    ("predicted ms", "predicted_s", 1e-3, ",.0f"),
    ("predicted / measured", "predicted_to_measured", 1, ".2f"),
    ("measured core s", "core_s", 1, ".2f"),
    ("predicted core s", "predicted_core_s", 1, ".2f"),
    ("predicted / measured", "predicted_to_measured_core_s", 1, ".2f"),
]
TO_XLA = ("/ xla", "ratio_to_xla", 1, ".2f")


def _text(value: float | None, scale: float, form: str) -> str:
    if value is None:
        return "-"
    return format(value if scale == 1 else value / scale, form)
