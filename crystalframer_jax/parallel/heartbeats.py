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
from collections.abc import Iterator
from typing import Any, NoReturn, Protocol

import jax

KEYS = "crystalframer_jax"
LONGEST_SILENCE = 60.0
CONTINUES = "the same command continues from the last checkpoint"


class KeyValueStore(Protocol):
    """What is used of JAX's coordination service, which runs in process 0. Any call may block if that is stopped."""

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None:
        """Raises JaxRuntimeError if the key exists and may not be overwritten, or if the service is gone."""

    def key_value_dir_get(self, key: str) -> list[tuple[str, str]]:
        """All keys below one, with their values."""


@dataclasses.dataclass
class Heartbeat:
    """What a process publishes of itself, again and again.

    Attributes:
      number: counts the heartbeats.
      reports: how often the main thread has reported its progress.
      progress: its last report.
      age: seconds since then.
      ended: how the work of the process ended; empty before.
      knows: it knows of a failure.
    """

    host: str
    number: int = 0
    reports: int = 0
    progress: str = ""
    age: float = 0.0
    ended: str = ""
    knows: bool = False


@dataclasses.dataclass
class Heard:
    """The last heartbeat of a process, and when it arrived by the clock of the reader."""

    beat: Heartbeat
    at: float

    def stalled(self, now: float) -> float:
        """Seconds since the main thread of the process reported."""
        return now - self.at + self.beat.age


class Watchdog:
    """Two threads of every process: one exchanges heartbeats and failures, one judges them and ends the process.

    They are two because the exchange may block for ever. Times are those of a clock of each process that stands still
    while the process is stopped, so that a job that is suspended and continued as a whole lives on.
    """

    def __init__(self, store: KeyValueStore | None, address: str, process: int, num_processes: int, seconds: float):
        """`address` is that of the store. Does nothing before `watching`, and without a store never."""
        self.seconds = seconds
        self.silence = min(seconds, LONGEST_SILENCE)
        self.interval = min(1.0, seconds / 10)
        self._store = store
        self._address = address
        self._process = process
        self._num_processes = num_processes
        self._clock = 0.0
        self._own = Heartbeat(socket.gethostname())
        self._reported_at = 0.0
        self._heard: dict[int, Heard] = {}
        self._contact_at = 0.0
        self._refusals = 0
        self._is_store_gone = False
        self._verdict = ""  # what this process has found; the store keeps the first that any process has found
        self._failure = ""  # that first one
        self._known = threading.Event()
        self._hurry = threading.Event()
        self._stopped = threading.Event()
        self._ending = threading.Lock()

    def report(self, progress: str) -> None:
        """Tell how far the main thread is: in all processes at the same points, such as every step dispatched.

        Until the first report, and after an empty one, the work may take any time.
        """
        self._own.progress = progress
        self._own.reports += 1
        self._reported_at = self._clock

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Run the threads."""
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
                    thread.join(self.interval)

    def finish(self, how: str) -> None:
        """Wait until all processes have finished their work; meanwhile their failures end this one as well."""
        self._own.ended = how
        self._hurry.set()
        # its own end included, for the others shall have read that when this process leaves
        while not (
            len(self._heard) == self._num_processes and all(heard.beat.ended for heard in list(self._heard.values()))
        ):
            time.sleep(self.interval / 4)

    def find_culprit(self) -> None:
        """After a collective operation failed: leave time to find, and end with, the process that is to blame.

        Returns if there is none.
        """
        self.silence = min(self.silence, 10.0)
        time.sleep(self.silence + 4 * self.interval)

    def fail(self, reason: str, trace: str = "", status: int = 1) -> NoReturn:
        """Tell the others why this process fails, print it, or the traceback if there is one, and end the process."""
        name = f"process {self._process} (host {self._own.host})"
        self._end(f"{name}: {reason}", f"{name}: {trace}" if trace else f"error: {name}: {reason}", status)

    def _end(self, verdict: str, text: str = "", status: int = 1) -> NoReturn:
        """Publish a verdict and end the process with the one that was published first, or with `text`.

        jax.distributed.shutdown would wait for processes that are gone or stuck.
        """
        self._ending.acquire()  # a second thread waits here for the end
        try:
            self._verdict = verdict
            self._hurry.set()
            if not self._is_store_gone:
                self._known.wait(2 + 2 * self.interval)
            if not (text and self._is_told_by_another(verdict)):
                sys.stderr.write((text or f"error: {self._failure or verdict}; {CONTINUES}") + "\n")
            sys.stderr.flush()
            sys.stdout.flush()
            deadline = time.monotonic() + 5
            while self._process == 0 and time.monotonic() < deadline and not self._all_know():
                time.sleep(self.interval / 4)  # the service must live until the others know
        finally:
            os._exit(status)

    def _is_told_by_another(self, verdict: str) -> bool:
        """Whether another process has failed for the same reason, and was first to say so."""
        return self._failure != verdict and self._failure.partition(": ")[2] == verdict.partition(": ")[2]

    def _all_know(self) -> bool:
        """Whether all processes know of the failure, except those that have not been heard of lately."""
        heard = list(self._heard.values())
        recent = self._clock - 2 - 2 * self.interval
        return len(heard) == self._num_processes and all(one.beat.knows or one.at < recent for one in heard)

    # The thread that talks to the store

    def _exchange_forever(self) -> None:
        while not self._stopped.is_set():
            self._hurry.clear()
            try:
                self._exchange()
                self._refusals = 0
            except jax.errors.JaxRuntimeError:  # the service is gone, or this process is being ended
                self._refusals += 1
            self._hurry.wait(self.interval)

    def _exchange(self) -> None:
        assert self._store is not None
        if self._verdict and not self._failure:
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # another process was first
                self._store.key_value_set(f"{KEYS}/failure", self._verdict)
        self._beat()
        for key, value in self._store.key_value_dir_get(KEYS):
            name = key.rpartition("/")[2]
            if name == "failure":
                self._failure = value
                continue
            beat, process = Heartbeat(**json.loads(value)), int(name)
            if process not in self._heard or self._heard[process].beat.number != beat.number:
                self._heard[process] = Heard(beat, self._clock)
        self._contact_at = self._clock
        if self._failure and not self._own.knows:
            self._own.knows = True
            self._beat()
            self._known.set()

    def _beat(self) -> None:
        assert self._store is not None
        self._own.number += 1
        self._own.age = self._clock - self._reported_at
        value = json.dumps(dataclasses.asdict(self._own))
        self._store.key_value_set(f"{KEYS}/heartbeats/{self._process}", value, allow_overwrite=True)

    # The thread that judges

    def _judge_forever(self) -> None:
        before = time.monotonic()
        while not self._stopped.wait(self.interval):
            now = time.monotonic()
            self._clock += min(now - before, 2 * self.interval)
            before = now
            if verdict := self._failure or self._judge():
                self._end(verdict)

    def _judge(self) -> str:
        """What is wrong, in one line; empty if nothing is."""
        silent = self._clock - self._contact_at
        if self._refusals > 1 or (silent > 2 * self.interval and _refuses_connections(self._address)):
            self._is_store_gone = True
            return f"lost {self._name(0)}: it has ended; {self._last_report(0)}"
        if silent > self.silence:
            self._is_store_gone = True
            return f"lost {self._name(0)}: no answer for {silent:.0f} s; {self._last_report(0)}"
        longest = silent
        for process in range(self._num_processes):
            if process not in self._heard:
                if self._clock > self.silence:
                    return f"lost process {process}: no sign of life since the start, {self._clock:.0f} s ago"
                continue
            heard = self._heard[process]
            silent = 0.0 if heard.beat.ended else self._contact_at - heard.at
            longest = max(longest, silent)
            if silent > self.silence:
                return f"lost {self._name(process)}: no sign of life for {silent:.0f} s; {self._last_report(process)}"
        if longest > 3 * self.interval:  # maybe lost, and then the others are waiting for it
            return ""
        return self._judge_progress()

    def _judge_progress(self) -> str:
        """If the main thread of a process has not reported for too long: which processes are furthest behind."""
        working = {process: heard for process, heard in sorted(self._heard.items()) if not heard.beat.ended}
        limited = [heard for heard in working.values() if heard.beat.progress]
        if all(heard.stalled(self._clock) <= self.seconds for heard in limited):
            return ""
        fewest = min(heard.beat.reports for heard in working.values())
        behind = [process for process, heard in working.items() if heard.beat.reports == fewest]
        others = [heard.beat for process, heard in list(self._heard.items()) if process not in behind]
        verdict = f"no progress in {', '.join(map(self._name, behind[:4]))}"
        if len(behind) > 4:
            verdict += f" and {len(behind) - 4} more"
        verdict += f"; {self._last_report(behind[0])}"
        if others:
            furthest = max(others, key=lambda beat: beat.reports)
            state = f"have ended: {furthest.ended}" if furthest.ended else f'are at "{furthest.progress}"'
            verdict += f", others {state}"
        return verdict

    def _name(self, process: int) -> str:
        heard = self._heard.get(process)
        return f"process {process} (host {heard.beat.host})" if heard else f"process {process}"

    def _last_report(self, process: int) -> str:
        heard = self._heard.get(process)
        if heard is None:
            return "it never reported"
        return f'last report "{heard.beat.progress}", {heard.stalled(self._clock):.0f} s ago'


def _refuses_connections(address: str) -> bool:
    """Whether nobody listens at host:port any more, although the host itself answers."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=1).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False


@contextlib.contextmanager
def _aborting_late() -> Iterator[None]:
    """Make abort() wait for 6 s (the number of its signal), time enough to say that process 0 is gone.

    As soon as a thread of JAX loses the service, it dumps its stack and aborts the process. A handler in Python would
    not run before the end; sleep() of the C library does. Meanwhile calls of the store hang.
    """
    library: Any = ctypes.CDLL(None)
    library.signal.restype = ctypes.c_void_p
    library.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    before = library.signal(signal.SIGABRT, ctypes.cast(library.sleep, ctypes.c_void_p))
    try:
        yield
    finally:
        library.signal(signal.SIGABRT, before)
