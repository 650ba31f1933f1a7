"""Crystals that a model was trained on, known again by their ids, or by their structures, of which 8 bytes are stored.

These are a hash of the reduced formula and two of the sums over neighbors of `leakage.fingerprint`, which do not depend
on the choice of the cell. Nothing is compared site by site: polytypes with the same two sums count as the same.
"""

import dataclasses
import hashlib
import math
from collections.abc import Iterable

import numpy as np

from crystalframer_jax.structures.crystal import Crystal

SUMS = (0, 3)  # of a fingerprint: number of neighbors within 4 Å, charges within 6 Å
RESOLUTION = 1000  # steps of a logarithm of a sum
TOLERANCE = 2  # of these steps: a change of all lengths by 0.06 %


@dataclasses.dataclass(frozen=True)
class SeenCrystals:
    """Ids and traces of crystals, both ascending."""

    ids: np.ndarray  # [C] str
    traces: np.ndarray  # [C] uint64

    @classmethod
    def of(cls, ids: np.ndarray, crystals: Iterable[Crystal], workers: int = 0) -> "SeenCrystals":
        """Takes down crystals; `workers` are processes (0: one for each core)."""
        return cls(np.sort(ids), np.sort(_traces(crystals, len(ids), workers)))

    def hold(self, ids: np.ndarray, crystals: Iterable[Crystal], workers: int = 0) -> np.ndarray:
        """Tells which crystals [C] are among these, by id or by structure."""
        return np.isin(ids, self.ids) | self._hold_traces(_traces(crystals, len(ids), workers))

    def _hold_traces(self, traces: np.ndarray) -> np.ndarray:
        """Tells which traces [C] are, within the tolerance, among these."""
        first = np.searchsorted(self.traces, traces >> 32 << 32)
        end = np.searchsorted(self.traces, traces | (2**32 - 1), side="right")
        found = np.zeros(len(traces), bool)
        for i in np.flatnonzero(first < end):  # those whose formula is here
            steps = np.abs(_sums_of(self.traces[first[i] : end[i]]) - _sums_of(traces[i]))
            found[i] = (steps.max(axis=-1) <= TOLERANCE).any()
        return found


def trace_of(crystal: Crystal) -> int:
    """Returns the 8 bytes of a crystal: 4 of the formula, 2 of each sum."""
    from crystalframer_jax.data.leakage import fingerprint  # with the matcher of pymatgen, which takes long

    elements, counts = np.unique(crystal.species, return_counts=True)
    formula = np.stack([elements, counts // math.gcd(*counts.tolist())]).astype("<u4")
    digest = int.from_bytes(hashlib.blake2b(formula.tobytes(), digest_size=4).digest(), "big")
    first, second = np.clip(np.rint(RESOLUTION * fingerprint(crystal)[list(SUMS)]), 0, 2**16 - 1)
    return digest << 32 | int(first) << 16 | int(second)


def _traces(crystals: Iterable[Crystal], total: int, workers: int) -> np.ndarray:
    from crystalframer_jax.data.build import in_parallel
    from crystalframer_jax.data.leakage import CHUNK

    return np.array(in_parallel(trace_of, crystals, "fingerprints", total, workers, CHUNK), np.uint64)


def _sums_of(traces: np.ndarray) -> np.ndarray:
    """Returns the two sums of traces, [..., 2]."""
    return np.stack([traces >> 16 & 0xFFFF, traces & 0xFFFF], axis=-1).astype(np.int64)
