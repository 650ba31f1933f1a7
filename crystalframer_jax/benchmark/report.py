"""Tables of what was measured."""

from collections.abc import Sequence
from typing import Any

from crystalframer_jax.benchmark.measure import ATTENTION, STEPS
from crystalframer_jax.training.logging import table

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


def print_scaling(slopes: Sequence[dict[str, Any]]) -> None:
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
TO_XLA = ("/ xla", "ratio_to_xla", 1, ".2f")


def _text(value: float | None, scale: float, form: str) -> str:
    if value is None:
        return "-"
    return format(value if scale == 1 else value / scale, form)
