"""What the processes of a training know of one another: who is alive, how far each is, who has failed."""

import contextlib
import ctypes
import dataclasses
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import jax

KEYS = "crystalframer_jax"
LONGEST_SILENCE = 60.0
CONTINUES = "the same command continues from the last checkpoint"


@dataclasses.dataclass
class Beat:
    """What a process publishes of itself, again and again."""

    host: str
    number: int = 0  # counts the beats
    reports: int = 0  # how often the main thread has reported its progress
    progress: str = ""  # its last report
    age: float = 0.0  # seconds since then
    ended: str = ""  # how the work of the process ended; empty before
    knows: bool = False  # it knows of a failure
    at: float = 0.0  # when the beat arrived, by the clock of the reader

    def stalled(self, now: float) -> float:
        """Counts the seconds since the main thread of the process reported."""
        return now - self.at + self.age


@dataclasses.dataclass(frozen=True)
class Limits:
    """How many processes there are, and how many seconds they may keep silent or make no progress."""

    processes: int
    silence: float
    standstill: float
    interval: float  # from one beat to the next


# What is wrong


def verdict(beats: Mapping[int, Beat], now: float, limits: Limits, is_store_gone: bool = False) -> str:
    """Tells in one line what is wrong with the processes whose last `beats` these are; empty if nothing is.

    The store of the beats is in process 0.
    """
    answered_at = _answered_at(beats)
    longest = now - answered_at  # of the silences
    if is_store_gone:
        return _lost(beats, 0, "it has ended", now)
    if longest > limits.silence:
        return _lost(beats, 0, f"no answer for {longest:.0f} s", now)
    for process in range(limits.processes):
        beat = beats.get(process)
        if beat is None and now > limits.silence:
            return f"lost process {process}: no sign of life since the start, {now:.0f} s ago"
        silent = answered_at - beat.at if beat and not beat.ended else 0.0
        if silent > limits.silence:
            return _lost(beats, process, f"no sign of life for {silent:.0f} s", now)
        longest = max(longest, silent)
    is_one_lost = longest > 3 * limits.interval  # maybe, and then the others are waiting for it
    return "" if is_one_lost else _standstill(beats, now, limits)


def _answered_at(beats: Mapping[int, Beat]) -> float:
    """Tells when the store has answered last: every answer has the reader's own beat, if no other."""
    return max((beat.at for beat in beats.values()), default=0.0)


def _standstill(beats: Mapping[int, Beat], now: float, limits: Limits) -> str:
    """Tells which processes are furthest behind, if the main thread of one has not reported for too long."""
    working = {process: beat for process, beat in sorted(beats.items()) if not beat.ended}
    if not any(beat.progress and beat.stalled(now) > limits.standstill for beat in working.values()):
        return ""
    fewest = min(beat.reports for beat in working.values())
    behind = [process for process, beat in working.items() if beat.reports == fewest]
    names = ", ".join(_name(beats, process) for process in behind[:4])
    more = f" and {len(behind) - 4} more" if len(behind) > 4 else ""
    found = f"no progress in {names}{more}; {_last_report(beats, behind[0], now)}"
    if others := [beat for process, beat in beats.items() if process not in behind]:
        furthest = max(others, key=lambda beat: beat.reports)
        found += ", others " + (f"have ended: {furthest.ended}" if furthest.ended else f'are at "{furthest.progress}"')
    return found


def _lost(beats: Mapping[int, Beat], process: int, how: str, now: float) -> str:
    return f"lost {_name(beats, process)}: {how}; {_last_report(beats, process, now)}"


def _name(beats: Mapping[int, Beat], process: int) -> str:
    return f"process {process} (host {beats[process].host})" if process in beats else f"process {process}"


def _last_report(beats: Mapping[int, Beat], process: int, now: float) -> str:
    if process not in beats:
        return "it never reported"
    return f'last report "{beats[process].progress}", {beats[process].stalled(now):.0f} s ago'


# Who finds it


class Watchdog:
    """Two threads of every process: one exchanges beats and failures, one judges them and ends the process.

    They are two because calls of the store have no deadline: they block for ever if process 0 is stopped. Times are
    those of a clock of each process that stands still while the process is stopped, so that a job that is suspended and
    continued as a whole lives on.
    """

    def __init__(self, store: Any, address: str, process: int, processes: int, seconds: float):
        """Sets up what `watching` runs; `store` is JAX's coordination service, in process 0 at `address`."""
        self.limits = Limits(processes, min(seconds, LONGEST_SILENCE), seconds, min(1.0, seconds / 10))
        self.store, self._address, self._process = store, address, process
        self._clock = self._reported_at = 0.0
        self._own = Beat(socket.gethostname())
        self._beats: dict[int, Beat] = {}
        self._refusals = 0  # of the store, one after the other
        self._found = ""  # what is wrong, as this process says; the store keeps what any process was first to say
        self._failure = ""  # that first one
        self._hurry, self._known, self._stopped = threading.Event(), threading.Event(), threading.Event()
        self._ending = threading.Lock()

    def report(self, progress: str) -> None:
        """Tells how far the main thread is: in all processes at the same points, such as every step dispatched.

        Until the first report, and after an empty one, the work may take any time.
        """
        self._own.progress = progress
        self._own.reports += 1
        self._reported_at = self._clock

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Runs the threads."""
        threads = [threading.Thread(target=run, daemon=True) for run in (self._exchange_forever, self._judge_forever)]
        with _aborting_late():
            for thread in threads:
                thread.start()
            try:
                yield
            finally:
                self._stopped.set()
                self._hurry.set()
                for thread in threads:
                    thread.join(self.limits.interval)

    def finish(self, how: str) -> None:
        """Waits until all processes have finished their work; meanwhile their failures end this one as well."""
        self._own.ended = how
        self._hurry.set()
        # its own end included, for the others shall have read that when this process leaves
        while sum(bool(beat.ended) for beat in self._beats.values()) < self.limits.processes:
            time.sleep(self.limits.interval / 4)

    def find_culprit(self) -> None:
        """Leaves time to find, and end with, the process to blame for a failed collective operation, if any."""
        self.limits = dataclasses.replace(self.limits, silence=min(self.limits.silence, 10.0))
        time.sleep(self.limits.silence + 4 * self.limits.interval)

    def fail(self, reason: str, trace: str = "", status: int = 1) -> NoReturn:
        """Tells the others why this process fails, prints it, or the traceback if there is one, and ends it."""
        name = f"process {self._process} (host {self._own.host})"
        self._end(f"{name}: {reason}", f"{name}: {trace}" if trace else f"error: {name}: {reason}", status)

    def _end(self, found: str, text: str = "", status: int = 1) -> NoReturn:
        """Publishes what is wrong and ends the process with what was published first, or with `text`.

        jax.distributed.shutdown would wait for processes that are gone or stuck.
        """
        self._ending.acquire()  # a second thread waits here for the end
        try:
            self._found = found
            self._hurry.set()
            self._known.wait(2 + 2 * self.limits.interval)
            is_told_by_another = self._failure != found and self._failure.partition(": ")[2] == found.partition(": ")[2]
            if not (text and is_told_by_another):
                sys.stderr.write((text or f"error: {self._failure or found}; {CONTINUES}") + "\n")
            sys.stderr.flush()
            sys.stdout.flush()
            deadline = time.monotonic() + 5
            while self._process == 0 and time.monotonic() < deadline and not self._all_know():
                time.sleep(self.limits.interval / 4)  # the service must live until the others know
        finally:
            os._exit(status)

    def _all_know(self) -> bool:
        """Tells whether all processes know of the failure, except those that have not been heard of lately."""
        beats, recent = self._beats.values(), self._clock - 2 - 2 * self.limits.interval
        return len(beats) == self.limits.processes and all(beat.knows or beat.at < recent for beat in beats)

    def _exchange_forever(self) -> None:
        while not self._stopped.is_set():
            self._hurry.clear()
            try:
                self._exchange()
                self._refusals = 0
            except jax.errors.JaxRuntimeError:  # the service is gone, or this process is being ended
                self._refusals += 1
            self._hurry.wait(self.limits.interval)

    def _exchange(self) -> None:
        if self._found and not self._failure:
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # another process was first
                self.store.key_value_set(f"{KEYS}/failure", self._found)
        own = self._own
        own.number, own.age, own.knows = own.number + 1, self._clock - self._reported_at, bool(self._failure)
        value = json.dumps(dataclasses.asdict(own))
        self.store.key_value_set(f"{KEYS}/beats/{self._process}", value, allow_overwrite=True)
        if own.knows:
            self._known.set()
        values, beats = dict(self.store.key_value_dir_get(KEYS)), {}
        if failure := values.pop(f"{KEYS}/failure", ""):
            self._failure = failure
            if not own.knows:
                self._hurry.set()  # to say so
        for key, value in values.items():
            process = int(key.rpartition("/")[2])
            beat, last = Beat(**{**json.loads(value), "at": self._clock}), self._beats.get(process)
            beats[process] = last if last and last.number == beat.number else beat
        self._beats = beats

    def _judge_forever(self) -> None:
        before = time.monotonic()
        while not self._stopped.wait(self.limits.interval):
            now = time.monotonic()
            self._clock += min(now - before, 2 * self.limits.interval)
            before = now
            beats, silent = self._beats, self._clock - _answered_at(self._beats)
            is_gone = self._refusals > 1 or (silent > 2 * self.limits.interval and _refuses_connections(self._address))
            if is_gone or silent > self.limits.silence:
                self._known.set()  # nothing more will be heard
            if found := self._failure or verdict(beats, self._clock, self.limits, is_gone):
                self._end(found)


def _refuses_connections(address: str) -> bool:
    """Tells whether nobody listens at host:port any more, although the host itself answers."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=1).close()
    except OSError as error:
        return isinstance(error, ConnectionRefusedError)
    return False


@contextlib.contextmanager
def _aborting_late() -> Iterator[None]:
    """Makes abort() wait for 6 s (the number of its signal), time enough to say that process 0 is gone.

    As soon as a thread of JAX loses the service, it dumps its stack and aborts the process, with
    jax_enable_recoverability too. A handler in Python would not run before the end; sleep() of the C library does.
    Meanwhile calls of the store hang.
    """
    library: Any = ctypes.CDLL(None)
    library.signal.restype = ctypes.c_void_p
    before = library.signal(signal.SIGABRT, library.sleep)
    try:
        yield
    finally:
        library.signal(signal.SIGABRT, ctypes.c_void_p(before))
