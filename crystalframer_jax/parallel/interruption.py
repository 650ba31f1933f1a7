"""What ends a training early on purpose: SIGTERM, SIGUSR1, Ctrl-C, or the end of the time it was given."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

NAMES = ("SIGTERM", "SIGUSR1", "SIGINT")  # Windows has no SIGUSR1
SIGNALS = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))


class TrainingInterrupted(BaseException):
    """A training that stopped because it was asked to; all that it did is saved. The message says where.

    Like KeyboardInterrupt it is no Exception: it may come at any moment, and nobody shall take it for an error.
    """


class Interruption:
    """Requests to stop.

    While the training is `stepping` a request is only noted, for `reason` to tell at the next safe moment; outside,
    where nothing can be lost, it raises TrainingInterrupted at once. A second Ctrl-C raises KeyboardInterrupt.
    """

    def __init__(self, max_minutes: float | None = None, start: float | None = None):
        """`max_minutes` count from `start` (time.monotonic(), default: now)."""
        self.max_minutes = max_minutes
        self.start = time.monotonic() if start is None else start
        self.slowest = 0.0  # seconds that the longest of the units took between which `reason` is asked
        self._requested = ""
        self._is_stepping = False
        self._asked_at: float | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Catches the signals (in the main thread of the process; elsewhere there are none to catch)."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._catch) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def stepping(self) -> Iterator[None]:
        """Only notes requests, because the training is between two safe moments."""
        before, self._is_stepping = self._is_stepping, True
        try:
            yield
        finally:
            self._is_stepping = before

    def reason(self) -> str:
        """Tells why to stop now: "SIGTERM", "--max_minutes=5"; empty to go on. To be asked at every safe moment.

        The time is up when the slowest unit so far, three times over, would not fit in any more: that leaves room for
        saving.
        """
        now = time.monotonic()
        if self._asked_at is not None:
            self.slowest = max(self.slowest, now - self._asked_at)
        self._asked_at = now
        if not self._requested and self.max_minutes is not None:
            left = 60 * self.max_minutes - (now - self.start)
            if left < 3 * self.slowest + 2:
                self._requested = f"--max_minutes={self.max_minutes:g}"
        return self._requested

    def _catch(self, number: int, _: FrameType | None) -> None:
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        if not self._is_stepping:
            raise TrainingInterrupted(f"stopped by {name}")
        if self._requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._requested = name
