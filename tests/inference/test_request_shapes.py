"""Requests of prediction meet very few shapes, so that nearly none of them waits for the compiler."""

import numpy as np
import pytest
from support import random_variables

from crystalframer_jax.batching.shapes import REQUEST_ATOMS, request_shapes, shared_out
from crystalframer_jax.batching.table import COLUMNS, CrystalTable
from crystalframer_jax.batching.targets import TargetStatistics
from crystalframer_jax.config import NO_PARTS, BatchParts, validate
from crystalframer_jax.configs import default
from crystalframer_jax.inference import predictor
from crystalframer_jax.inference.evaluation import groups_by_atoms
from crystalframer_jax.inference.predictor import Predictor
from crystalframer_jax.structures.crystal import Crystal


def table_of_rows(counts: list[np.ndarray]) -> CrystalTable:
    """A table that knows nothing but the lengths of the neighbor rows of its crystals."""
    values = {name: np.zeros(0) for name in COLUMNS} | {"count": np.concatenate(counts)}
    for name, sizes in ("atom_offset", map(len, counts)), ("edge_offset", map(np.sum, counts)):
        values[name] = np.cumsum([0, *sizes])
    return CrystalTable(**values)


def rows_of(sizes: np.ndarray, seed: int = 0) -> list[np.ndarray]:
    """Rows of 40 to 250 neighbors for crystals with so many atoms."""
    rng = np.random.default_rng(seed)
    return [rng.integers(40, 250) + rng.integers(0, 6, size) for size in sizes]


def test_single_structures_of_up_to_a_thousand_atoms_meet_three_shapes():
    sizes = np.concatenate([np.arange(1, 61), [64, 65, 256, 257, 1000, 1024]])
    table = table_of_rows(rows_of(sizes))
    shapes = [request_shapes(table, [np.array([row])], NO_PARTS) for row in range(len(sizes))]
    assert len({shape for (shape,) in shapes[:60]}) == 1 and len({shape for (shape,) in shapes}) == 3
    for row, (shape,) in enumerate(shapes):
        assert shape.num_atoms == next(size for size in REQUEST_ATOMS if size >= sizes[row])
        assert shared_out(table, np.array([row]), [shape]).shape == shape


@pytest.mark.parametrize("devices", [1, 4])
def test_many_structures_have_one_shape(devices):
    """Also the last group, which is smaller; crystals beyond the usual have shapes that fit them better."""
    sizes = np.clip(np.random.default_rng(3).lognormal(2.9, 0.85, 1000), 1, 200).astype(np.int64)
    table = table_of_rows(rows_of(sizes))
    groups = groups_by_atoms(table, devices)
    assert len(groups) > 5
    (shape,) = request_shapes(table, groups, NO_PARTS, devices)
    for group in groups:
        assert shared_out(table, group, [shape], devices).shape == shape
    larger = table_of_rows(rows_of(np.array([*sizes[:100], 3000, 2900, 9000])))
    groups = groups_by_atoms(larger)
    shapes = request_shapes(larger, groups, NO_PARTS)
    assert 3 <= len(shapes) <= 4 and shapes[0].num_atoms == 1024
    for group in groups:
        chosen = shared_out(larger, group, shapes).shape
        assert chosen.num_atoms <= max(1024, 1.5 * larger.num_atoms[group].sum())


def test_longer_rows_more_crystals_and_larger_cells_double_a_shape():
    table = table_of_rows([np.full(70, 300), *[np.full(1, 80)] * 200])
    parts = BatchParts(cells=True)
    (shape,) = request_shapes(table, [np.arange(201)], parts)
    assert (shape.num_atoms, shape.row_length, shape.num_crystals, shape.cell_length) == (1024, 512, 256, 128)
    assert shape.parts == parts
    assert request_shapes(table, [], parts) == []


def test_sixty_structures_one_by_one_compile_one_program():
    """From 1 to 60 atoms; predictions are those of all structures at once."""
    config = default.get_config()
    config.update(num_layers=1, model_dim=16, head_num=2, ff_dim=32, embedding_dim=(16,))
    config.update(frame_method="no", value_pe_angle_real=0)
    whole = validate(config)
    variables = random_variables(whole.model)
    model = Predictor(whole, variables, (TargetStatistics("e_form", "eV/atom", 0.0, 1.0),))
    rng = np.random.default_rng(6)
    crystals = [
        Crystal(rng.integers(1, 90, n), rng.uniform(0, (16 * n) ** (1 / 3), (n, 3)), (16 * n) ** (1 / 3) * np.eye(3))
        for n in range(1, 61)
    ]
    forward = predictor._forward_of(model.model, predictor.ONE_DEVICE, False)
    before = forward._cache_size()
    alone = np.concatenate([model.predict(crystal) for crystal in crystals])
    assert forward._cache_size() - before == 1
    np.testing.assert_allclose(model.predict(crystals), alone, rtol=1e-4, atol=1e-4)
