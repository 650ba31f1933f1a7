"""What is wrong with processes, told by their last heartbeats alone."""

import pytest

from crystalframer_jax.parallel.heartbeats import Beat, Limits, verdict

NOW = 1000.0


def limits(processes: int) -> Limits:
    return Limits(processes, silence=60, standstill=600, interval=1)


def beat(at: float = NOW, reports: int = 5, progress: str = "step 5", age: float = 0.0, ended: str = "") -> Beat:
    return Beat("node", reports=reports, progress=progress, age=age, ended=ended, at=at)


SLOW, FAST = beat(reports=4, progress="step 4", age=601), beat(age=300)
STOPPED = beat(at=NOW - 61, age=2)
CASES = {
    "all are well": ([beat(), beat(at=NOW - 1)], ""),
    "silent, but not for long": ([beat(), beat(at=NOW - 60)], ""),
    "slow, but not too slow": ([beat(age=600), beat(age=600)], ""),
    "killed": (
        [beat(), STOPPED],
        'lost process 1 (host node): no sign of life for 61 s; last report "step 5", 63 s ago',
    ),
    "the first of two that are lost": ([STOPPED, STOPPED, beat()], "lost process 0 (host node): no sign of life for"),
    "never heard of": ([beat(), None], "lost process 1: no sign of life since the start, 1000 s ago"),
    "has ended, and is silent": ([beat(), beat(at=NOW - 900, ended="finished")], ""),
    "the store is stopped": (
        [beat(at=NOW - 62), beat(at=NOW - 61)],
        'lost process 0 (host node): no answer for 61 s; last report "step 5", 62 s ago',
    ),
    "the store has never answered": ([None, None], "lost process 0: no answer for 1000 s; it never reported"),
    "stuck": (
        [FAST, SLOW],
        'no progress in process 1 (host node); last report "step 4", 601 s ago, others are at "step 5"',
    ),
    "stuck, with what came after the beat": (
        [beat(at=NOW - 2, reports=6), beat(at=NOW - 2, age=599)],
        "no progress in",
    ),
    "all are stuck": (
        [SLOW, SLOW],
        'no progress in process 0 (host node), process 1 (host node); last report "step 4", 601 s ago',
    ),
    "many are stuck": ([SLOW] * 6 + [FAST], "no progress in process 0 (host node), process 1"),
    "stuck while others have ended": (
        [beat(age=900, ended="stopped by SIGTERM", reports=9), SLOW],
        'no progress in process 1 (host node); last report "step 4", 601 s ago, others have ended: stopped by SIGTERM',
    ),
    "waits for a process that reports nothing": (
        [beat(age=601), beat(reports=0, progress="", age=900)],
        'no progress in process 1 (host node); last report "", 900 s ago, others are at "step 5"',
    ),
    "work that may take any time": ([beat(progress="", age=5000), beat(progress="", age=5000)], ""),
    "waits for a process that may be lost": ([beat(age=601), beat(at=NOW - 4, reports=4)], ""),
}


@pytest.mark.parametrize("case", CASES)
def test_the_verdict_says_which_process_is_lost_or_stuck(case):
    beats, expected = CASES[case]
    found = verdict({i: beat for i, beat in enumerate(beats) if beat}, NOW, limits(len(beats)))
    assert found.startswith(expected) and bool(found) == bool(expected)


def test_the_verdict_names_four_of_many():
    found = verdict(dict(enumerate([SLOW] * 6 + [FAST])), NOW, limits(7))
    assert found.count("host node") == 4 and " and 2 more; last report" in found and 'others are at "step 5"' in found


def test_the_verdict_of_a_process_whose_port_is_closed():
    found = verdict({0: beat(at=NOW - 2), 1: beat(at=NOW - 2)}, NOW, limits(2), is_store_gone=True)
    assert found == 'lost process 0 (host node): it has ended; last report "step 5", 2 s ago'


def test_at_the_start_nothing_is_wrong():
    assert verdict({}, 59, limits(3)) == "" and verdict({0: beat(at=61)}, 61, limits(2)) != ""
