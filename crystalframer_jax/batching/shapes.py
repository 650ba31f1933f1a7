"""The few shapes that crystals are packed into: each is one compiled program."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from crystalframer_jax.batching.planning import best_sizes, exceeded_once, random_needs
from crystalframer_jax.batching.table import CrystalTable, edges_and_atoms, ranges_of
from crystalframer_jax.config import NO_PARTS, BatchParts, ConfigError
from crystalframer_jax.parallel.devices import Shares

CELL_BLOCK = 8  # the length of cell rows is padded to a multiple of this
ATOM_BLOCK = 32  # atoms are padded to multiples of this, the block size of the lattice sums
COLUMN_BLOCKS = 64, 32  # so many neighbors of each atom are taken at once, by the first that divides the row length
MOST_PLACES = 2**31 - 1  # of neighbors in a batch, which are counted in int32
EDGE_BLOCK = 128  # neighbors are padded to multiples of this
TRIALS = 20, 1000, 256_000  # random batches for a plan: at least, at most, and crystals in them if more than the least
MOST_SHAPES = 4  # for the usual batches of a plan
LEAST_SAVING = 0.03  # of the places that are needed
REQUEST_ATOMS = 64, 256, 1024, 1536  # padded numbers of atoms for requests that are not larger
REQUEST_ROW, REQUEST_CRYSTALS, REQUEST_CELL = 256, 128, 64  # and of other things; twice as many if they are more
# Atoms that a step is trained on in the time in which its program is compiled: by estimate, of the default model.
ATOMS_PER_COMPILATION = {"cpu": 30_000, "gpu": 3_000_000}


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """Padded sizes of a batch and what it holds; one compiled program each."""

    num_atoms: int
    row_length: int
    num_crystals: int
    cell_length: int = 0  # atoms of the largest cell, if parts.cells
    parts: BatchParts = NO_PARTS
    num_edges: int = 0  # neighbors of all atoms; 0: as many as the rows can hold

    def __post_init__(self):
        if self.num_atoms * self.row_length > MOST_PLACES:
            raise ConfigError(
                f"{self.num_atoms} atoms with up to {self.row_length} neighbors are too many for one batch; choose a "
                "smaller batch_size or cutoff_radius"
            )

    @property
    def edges(self) -> int:
        """Padded number of neighbors."""
        return self.num_edges or self.num_atoms * self.row_length


def round_up(value: float, least: int) -> int:
    """Returns the next of least * (1, 1.5, 2, 3, 4, 6, 8, ...): few shapes, at most a third of padding."""
    step = least
    while step < value:
        if step + step // 2 >= value:
            return step + step // 2
        step *= 2
    return step


def plan_shapes(
    table: CrystalTable,
    indices: np.ndarray,
    batch_size: int,
    longest_row: int,
    parts: BatchParts = NO_PARTS,
    devices: int = 1,
    batches: int = 1,
) -> list[BatchShape]:
    """Plans few shapes for the shares of devices in random batches among crystals `indices` [C] of the table.

    They are those that are filled best, ascending in atoms and neighbors; the last but one holds practically all of so
    many random `batches`, the last the largest share that can occur at all. One is added as long as it saves a
    LEAST_SAVING of all places, and more in all batches together than it costs to compile its program.
    """
    numbers = np.stack([table.num_atoms[indices], table.num_edges[indices]], axis=1)
    crystals = -(-batch_size // devices)
    largest = np.sort(numbers, axis=0)[::-1][:crystals].sum(axis=0)
    blocks = np.array([ATOM_BLOCK, EDGE_BLOCK])
    drawn, trials = min(batch_size, len(numbers)), max(TRIALS[0], min(TRIALS[1], TRIALS[2] // batch_size))
    needs = random_needs(numbers, drawn, trials, devices, Shares) if drawn else np.ones((1, 2))
    usual = np.minimum(exceeded_once(needs, batches), largest)
    last, largest = (blocks * np.ceil(np.maximum(x, 1) / blocks) for x in (usual, largest))
    found = best_sizes(np.minimum(needs, last), last, blocks, MOST_SHAPES)
    compiling = ATOMS_PER_COMPILATION.get(jax.default_backend(), ATOMS_PER_COMPILATION["gpu"])
    least = max(LEAST_SAVING, compiling / (batches * needs[:, 0].mean()))
    savings = [cost - better for (cost, _), (better, _) in itertools.pairwise(found)]
    sizes = found[next((k for k, saving in enumerate(savings) if saving < least), len(savings))][1]
    row_length = round_up(longest_row, ATOM_BLOCK)
    cell_length = round_up(int(numbers[:, 0].max(initial=1)), CELL_BLOCK) if parts.cells else 0
    return [
        BatchShape(int(atoms), row_length, crystals, cell_length, parts, int(edges))
        for atoms, edges in np.unique([*sizes, largest], axis=0)
    ]


class Shared(NamedTuple):
    """A batch that is shared out among devices."""

    rows: np.ndarray  # of the table
    shares: Shares  # which of them every device gets
    shape: BatchShape  # that holds the largest share


def shared_out(
    table: CrystalTable, rows: np.ndarray, shapes: Sequence[BatchShape] | BatchParts, devices: int = 1
) -> Shared:
    """Shares crystals out by their neighbors; the shape is the first of `shapes` that fits, or one with these parts.

    Raises ValueError if none of the shapes fits.
    """
    shares, needed = _shares(table, rows, devices)
    shape = _rounded(needed, shapes) if isinstance(shapes, BatchParts) else fitting_shape(needed, shapes)
    return Shared(rows, shares, shape)


def shared_as_planned(rows: np.ndarray, sizes: np.ndarray, shapes: Sequence[BatchShape], devices: int) -> Shared:
    """Shares crystals with `sizes` out likewise, among which there are none but those that the shapes are planned for.

    These hold every row and cell, so that nothing need be looked up.
    """
    shares = Shares(sizes, devices)
    return Shared(rows, shares, fitting_shape(_largest(shares, len(rows)), shapes))


def _shares(table: CrystalTable, rows: np.ndarray, devices: int) -> tuple[Shares, BatchShape]:
    """Shares crystals out; the shape holds the largest share and no more."""
    sizes = table.sizes.take(rows)
    shares = Shares(sizes, devices)
    row_length = int(np.asarray(table.count)[ranges_of(table.atom_offset, rows)].max(initial=1))
    cell_length = int(edges_and_atoms(sizes)[1].max(initial=0))
    return shares, dataclasses.replace(_largest(shares, len(rows)), row_length=row_length, cell_length=cell_length)


def _largest(shares: Shares, crystals: int) -> BatchShape:
    """Returns what the largest share of so many crystals needs, but for rows and cells."""
    edges, atoms = edges_and_atoms(shares.loads)
    return BatchShape(int(atoms.max()), 0, -(-crystals // len(shares)), num_edges=int(edges.max()))


def request_shapes(
    table: CrystalTable, groups: Sequence[np.ndarray], parts: BatchParts, devices: int = 1
) -> list[BatchShape]:
    """Returns shapes for the shares of groups of crystals that somebody asks for, the same for nearly all requests.

    They are far too large for most: a program takes seconds to compile, padding milliseconds. All groups up to
    REQUEST_ATOMS have one shape; those of larger crystals have shapes that fit better.
    """
    needed = [_shares(table, group, devices)[1] for group in groups]
    small = [shape for shape in needed if shape.num_atoms <= REQUEST_ATOMS[-1]]
    large = [shape for shape in needed if shape.num_atoms > REQUEST_ATOMS[-1]]
    shapes = {_standard([shape], parts) for shape in large} | ({_standard(small, parts)} if small else set())
    return sorted(shapes, key=lambda shape: (shape.num_atoms, shape.edges))


def _standard(needed: Sequence[BatchShape], parts: BatchParts) -> BatchShape:
    """Returns one of very few shapes that holds some others."""

    def most(name: str) -> int:
        return max(getattr(shape, name) for shape in needed)

    row_length = _doubled(REQUEST_ROW, most("row_length"))
    num_crystals = _doubled(REQUEST_CRYSTALS, most("num_crystals"))
    cell_length = _doubled(REQUEST_CELL, most("cell_length")) if parts.cells else 0
    num_atoms, num_edges = next((size for size in REQUEST_ATOMS if size >= most("num_atoms")), 0), 0
    if not num_atoms:
        num_atoms = round_up(most("num_atoms"), ATOM_BLOCK)
        num_edges = _halved(num_atoms * row_length, most("num_edges"))
    return BatchShape(num_atoms, row_length, num_crystals, cell_length, parts, num_edges)


def _doubled(number: int, least: int) -> int:
    """Doubles a number until it is at least `least`."""
    while number < least:
        number *= 2
    return number


def _halved(number: int, least: int) -> int:
    """Halves a number as long as it is even and remains at least `least`."""
    while number % 2 == 0 and number // 2 >= least:
        number //= 2
    return number


def shape_for(table: CrystalTable, indices: np.ndarray, parts: BatchParts = NO_PARTS) -> BatchShape:
    """Returns a shape that holds these crystals, rounded up so that similar requests need one compiled program."""
    return shared_out(table, indices, parts).shape


def _rounded(needed: BatchShape, parts: BatchParts) -> BatchShape:
    """Returns one of few shapes that hold a batch with these numbers."""
    num_atoms, row_length = round_up(needed.num_atoms, ATOM_BLOCK), round_up(needed.row_length, ATOM_BLOCK)
    num_edges = _halved(num_atoms * row_length, needed.num_edges)
    cell_length = round_up(needed.cell_length, CELL_BLOCK) if parts.cells else 0
    return BatchShape(num_atoms, row_length, round_up(needed.num_crystals, 1), cell_length, parts, num_edges)


def fitting_shape(needed: BatchShape, shapes: Sequence[BatchShape]) -> BatchShape:
    """Returns the first of `shapes` in which a batch with these numbers fits; ValueError if there is none."""
    for shape in shapes:
        if (
            needed.num_atoms <= shape.num_atoms
            and needed.num_edges <= shape.edges
            and needed.row_length <= shape.row_length
            and needed.num_crystals <= shape.num_crystals
            and (needed.cell_length <= shape.cell_length or not shape.parts.cells)
        ):
            return shape
    raise ValueError(
        f"{needed.num_crystals} crystals with {needed.num_atoms} atoms, {needed.num_edges} neighbors and rows up to "
        f"{needed.row_length} fit none of {shapes}"
    )


def width_of(row_length: int) -> int:
    """Returns how many columns of rows of this length the lattice sums take at once; all, if no block divides it."""
    return next((block for block in COLUMN_BLOCKS if row_length % block == 0), row_length)
