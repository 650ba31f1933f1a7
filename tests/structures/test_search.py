"""Neighbors of atoms far outside the cell, and cells that no search could finish: refused before it starts."""

import dataclasses
import resource
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from support import random_crystal

from crystalframer_jax.structures.crystal import Crystal, CrystalError
from crystalframer_jax.structures.neighbors import LatticeBox, check_neighbors, displacements, neighbor_rows

RADIUS = 6.93
OBLIQUE = np.array([[1, 3, -2], [0, 1, 4], [0, 0, 1]])


def brute_force(crystal, radius):
    """All (i, j, n) within the radius of atoms that are in a cell which is hardly oblique, by looking at a box."""
    p, lattice = crystal.positions, crystal.lattice
    reach = np.ceil(radius * np.linalg.norm(np.linalg.inv(lattice), axis=0)).astype(int) + 1
    images = np.stack(np.meshgrid(*[np.arange(-limit, limit + 1) for limit in reach], indexing="ij"), -1).reshape(-1, 3)
    distance = np.linalg.norm(p[None, :, None] - p[:, None, None] + images @ lattice, axis=-1)
    i, j, k = np.nonzero(distance <= radius)
    return np.column_stack([i, j, images[k]]), distance[i, j, k]


def in_order(edges):
    return edges[np.lexsort(edges.T)]


@pytest.mark.parametrize(
    ("shift", "change"),
    [(300, np.eye(3)), (1_000_000, np.eye(3)), (300, OBLIQUE), (400_000, OBLIQUE)],
    ids=["300", "a million", "300, oblique", "400,000, oblique"],
)
def test_atoms_far_outside_have_the_neighbors_of_those_inside(shift, change):
    """Images are relative to the positions as they are stored."""
    inside = random_crystal(np.random.default_rng(5), 6, volume_per_atom=14.0)
    inside = dataclasses.replace(
        inside, positions=(inside.positions @ np.linalg.inv(inside.lattice) % 1) @ inside.lattice
    )
    cells = np.random.default_rng(6).integers(-shift, shift + 1, (6, 3))
    moved = inside.positions + cells @ inside.lattice
    crystal = dataclasses.replace(inside, positions=moved, lattice=change @ inside.lattice)
    rows = neighbor_rows(crystal, RADIUS)
    expected, distance = brute_force(inside, RADIUS)
    i, j, n = expected[:, 0], expected[:, 1], expected[:, 2:]
    n = np.rint((n + cells[i] - cells[j]) @ np.linalg.inv(change)).astype(int)
    found = np.column_stack([rows.center, rows.index, rows.image])
    np.testing.assert_array_equal(in_order(found), in_order(np.column_stack([i, j, n])))
    length = np.linalg.norm(displacements(crystal, rows), axis=1)
    np.testing.assert_allclose(np.sort(length), np.sort(distance), atol=1e-5)


def test_parts_of_a_search_find_what_one_finds(monkeypatch):
    crystal = random_crystal(np.random.default_rng(7), 40, volume_per_atom=60.0)
    whole = neighbor_rows(crystal, 4.0)
    monkeypatch.setattr("crystalframer_jax.structures.search.MOST_AT_ONCE", 100)
    parts = neighbor_rows(crystal, 4.0)
    for field in dataclasses.fields(whole):
        np.testing.assert_array_equal(getattr(parts, field.name), getattr(whole, field.name))


CASES = {
    "dense": "grid(12, 0.15), np.eye(3) * 1.8",
    "cluster": "grid(20, 0.15), np.eye(3) * 60.0",
    "huge": "5e3 * np.eye(3)[:2], np.eye(3) * 1e4",
    "longer": "np.zeros((1, 3)), np.eye(3) * 1e5",
    "infinite": "np.zeros((1, 3)), np.eye(3) * 1e308",
    "needle": "np.random.default_rng(0).random((4000, 3)) * [1e4, 1, 1], np.diag([1e4, 1, 1])",
    "flat": "np.zeros((1, 3)), np.array([[9, 0, 0], [9, 1e-4, 0], [0, 0, 90]])",
    "far": "np.array([[0, 0, 0], [1e20, 0, 0]]), np.eye(3) * 5.0",
    "lost": "np.array([[0, 0, 0], [1e308, 0, 0]]), np.eye(3) * 5.0",
    "doubled": "np.zeros((9000, 3)), np.eye(3) * 50.0",
    "gas": "np.random.default_rng(0).random((5000, 3)) * 1200, np.eye(3) * 1200",
    "many": "grid(37, 3.0), np.eye(3) * 111.0",
}


def test_cells_that_cannot_be_searched_are_refused():
    """In a process of its own with 1 GB; each would take minutes or many GB otherwise."""
    code = """
        import sys
        import numpy as np
        from crystalframer_jax.structures.crystal import Crystal, CrystalError
        from crystalframer_jax.structures.neighbors import check_neighbors, neighbor_rows

        def grid(k, a):
            return a * np.stack(np.meshgrid(*[np.arange(k)] * 3), -1).reshape(-1, 3)

        for name, text in eval(sys.argv[1]).items():
            positions, lattice = eval(text)
            for check in (check_neighbors, neighbor_rows):
                try:
                    check(Crystal([6] * len(positions), positions, lattice, id=name), 6.93)
                    print(name, "was accepted")
                except CrystalError as error:
                    print(error)
    """
    limit = lambda: resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))  # noqa: E731  # of which libraries take 1
    command = [sys.executable, "-c", textwrap.dedent(code), repr(CASES)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, preexec_fn=limit)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == [name for name in CASES for _ in range(2)], done.stdout
    of = dict(zip(CASES, lines[::2], strict=True))
    assert "1,728 atoms have about 713,770,591 neighbors within 6.93 Å, over 5,000,000; are lengths in Å" in of["dense"]
    assert "cell (1e+04 x 1e+04 x 1e+04 Å" in of["huge"]
    assert "site 2 is 2e+19 cells away" in of["far"]
    assert "50,653 atoms, of at most 50,000" in of["many"]


def test_boxes_are_counted_before_they_are_made():
    crystal = Crystal([6], [[0, 0, 0]], np.eye(3) * 3, id="box")
    for check in (check_neighbors, neighbor_rows):
        with pytest.raises(CrystalError, match=r"box: 8,012,006,001 neighbors of 1 atoms"):
            check(crystal, LatticeBox(1000))
    check_neighbors(crystal, LatticeBox(1))
