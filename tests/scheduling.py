"""Which process of pytest-xdist runs which tests."""

from xdist.scheduler import WorkStealingScheduling

WAITING = "::test_distributed_", "::test_signals_save_", "::test_killed_at_random_", "::test_a_kill_at_any_"


def waits(name: str) -> bool:
    """Tells whether a test waits most of its time, for processes that it starts."""
    return any(beginning in name for beginning in WAITING)


class OneWaits(WorkStealingScheduling):
    """The last of three processes or more takes the tests that wait, and no others: it hardly needs a core."""

    def check_schedule(self) -> None:
        """Hands out tests; the first time those that wait."""
        if self.collection and len(self.pending) == len(self.collection) and self.numnodes > 2:
            node = self.nodes[-1]
            chosen = [number for number in self.pending if waits(self.collection[number])]
            if chosen:
                self.pending = [number for number in self.pending if number not in chosen]
                self.node2pending[node].extend(chosen)
                node.send_runtest_some(chosen)
            node.shutdown()  # when it is done
        super().check_schedule()
