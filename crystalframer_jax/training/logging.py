"""What a run writes about itself: progress on the terminal, metrics.jsonl, TensorBoard events, tables."""

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter
from tqdm import tqdm


class MetricsLog:
    """One JSON line and TensorBoard scalars per epoch; a resumed run continues after the epochs it keeps."""

    def __init__(self, workdir: Path, first_epoch: int, first_step: int):
        self.file = workdir / "metrics.jsonl"
        kept = [line for line in _lines(self.file) if line["epoch"] < first_epoch]
        if self.file.exists():
            temporary = self.file.with_suffix(".new")
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
            os.replace(temporary, self.file)
        self.writer = SummaryWriter(str(workdir / "tensorboard"), purge_step=first_step, write_to_disk=True)

    def write(self, metrics: dict[str, Any]) -> None:
        """Append the metrics of an epoch: numbers, or dictionaries of numbers."""
        with self.file.open("a") as stream:
            stream.write(json.dumps(metrics, allow_nan=False) + "\n")
        for name, value in metrics.items():
            values = value.items() if isinstance(value, dict) else [(None, value)]
            for part, number in values:
                self.writer.add_scalar(name if part is None else f"{name}/{part}", number, metrics["step"])
        self.writer.flush()

    def close(self) -> None:
        """Finish writing."""
        self.writer.close()


def _lines(file: Path) -> list[dict[str, Any]]:
    """The complete lines of a JSON lines file; the torn last line of a killed run is dropped."""
    lines = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """The metrics of every epoch of a run."""
    return _lines(workdir / "metrics.jsonl")


def progress_bar(total: int, done: int, batch_size: int) -> tqdm:
    """A bar over the crystals of the whole run; silent where the output is no terminal."""
    return tqdm(
        total=total * batch_size,
        initial=done * batch_size,
        desc="training",
        unit=" crystals",
        unit_scale=True,
        dynamic_ncols=True,
        disable=None,
    )


def say(text: str) -> None:
    """Print a line above a progress bar, at once, also into a file."""
    tqdm.write(text)
    sys.stdout.flush()


def table(header: list[str], rows: list[list[Any]]) -> str:
    """Text columns, the first aligned left and the others right; numbers with four significant decimals."""
    cells = [header] + [[_cell(value) for value in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = []
    for row in cells:
        first = row[0].ljust(widths[0])
        lines.append("  ".join([first, *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]))
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}" if math.isfinite(value) else "-"
    return str(value)


def duration(seconds: float) -> str:
    """Seconds as 3 h 05 min, 4 min 07 s or 12 s."""
    hours, rest = divmod(round(seconds), 3600)
    minutes, seconds = divmod(rest, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
