"""Random changes of files, and a process of its own to read them in, which a file could end or fill."""

import contextlib
import os
import random
import re
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import forks

SECONDS, BYTES = 2.0, 1 << 30  # that a file may take
EXTREME = ["1e308", "-0", "nan", "inf", "1000000000", "-1", "0", "1e-320", "1e999999"]
EXTREME += ["9" * 5000, "7" * 1_000_000, "0." + "3" * 100_000]
INSERTED = ["\x00", "\x1b[2J", "\ud800", "\u202e", "\n", "\r", '"', "'", "[" * 200]
INSERTED += ["{", ",", "#", ";", "=", "\t", "(", "\ufeff"]


def changed(content: bytes, rng: random.Random) -> bytes:
    """Applies one to four random changes."""
    for _ in range(rng.randint(1, 4)):
        content = rng.choice(CHANGES)(content, rng)
    return content


def flip_bit(content: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(content) or 1)
    return content[:at] + bytes(byte ^ 1 << rng.randrange(8) for byte in content[at : at + 1]) + content[at + 1 :]


def span(content: bytes, rng: random.Random) -> tuple[int, int]:
    start = rng.randrange(len(content) + 1)
    return start, min(len(content), start + rng.choice([1, 3, 10, 100, 1000]))


def delete(content: bytes, rng: random.Random) -> bytes:
    start, end = span(content, rng)
    return content[:start] + content[end:]


def repeat(content: bytes, rng: random.Random) -> bytes:
    start, end = span(content, rng)
    return content[:end] + content[start:end] * rng.choice([1, 2, 50]) + content[end:]


def insert(content: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(content) + 1)
    return content[:at] + rng.choice(INSERTED).encode(errors="surrogatepass") + content[at:]


def replace_number(content: bytes, rng: random.Random) -> bytes:
    numbers = list(re.finditer(rb"-?\d+(\.\d*)?", content))
    if not numbers:
        return content
    start, end = rng.choice(numbers).span()
    return content[:start] + rng.choice(EXTREME).encode() + content[end:]


def swap_lines(content: bytes, rng: random.Random) -> bytes:
    lines = content.split(b"\n")
    a, b = rng.randrange(len(lines)), rng.randrange(len(lines))
    lines[a], lines[b] = lines[b], lines[a]
    return b"\n".join(lines)


CHANGES: list[Callable[[bytes, random.Random], bytes]] = [
    flip_bit, delete, repeat, insert, replace_number, replace_number, replace_number, swap_lines,
]  # fmt: skip


def numbers_of_last_line(script: str, folder: Path, first: int, end: int) -> list[int]:
    """Runs `script FOLDER FIRST END`, which prints a number before it reads the file of that number, to its end."""
    done = forks.run(script, folder, first, end)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, f"it ended in number {lines[-1] if lines else '?'}: {done.stderr[-2000:]}"
    assert lines[-1].startswith("read"), done.stdout
    return list(map(int, re.findall(r"\d+", lines[-1])))


class _Late(BaseException):
    """What takes too long; nothing may catch it."""


def limit_memory() -> None:
    """Limits this process to BYTES more than it has now."""
    virtual = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")
    resource.setrlimit(resource.RLIMIT_AS, (virtual + BYTES, virtual + BYTES))


@contextlib.contextmanager
def in_time(what: str) -> Iterator[None]:
    """Ends the process, naming `what` was read, at any exception, or if it takes longer than SECONDS."""

    def late(*_: object) -> None:
        raise _Late

    signal.signal(signal.SIGALRM, late)
    start = time.process_time()
    signal.alarm(int(4 * SECONDS))
    try:
        yield
    except BaseException:
        print(f"{what}: {traceback.format_exc()}", file=sys.stderr)
        raise
    finally:
        signal.alarm(0)
    seconds = time.process_time() - start
    assert seconds < SECONDS, f"{what}: {seconds:.1f} s"
