"""What the heads of a block see from an atom, and its pictures."""

import io

import matplotlib.image
import numpy as np
import pytest
from pymatgen.core import Structure
from support import EXAMPLES
from tiny import tiny_config

from crystalframer_jax.config import ConfigError, validate
from crystalframer_jax.inference.predictor import Predictor
from crystalframer_jax.inference.views import views
from crystalframer_jax.reporting.plots import style
from crystalframer_jax.reporting.view_figures import attention_figure, frames_figure, shown_neighbors
from crystalframer_jax.reporting.view_page import write_frames_page
from crystalframer_jax.structures.crystal import CrystalError

FILE = EXAMPLES / "SrTiO3.cif"
FRAME = '1\nLattice="3 0 0 0 3 0 0 0 3" Properties=species:S:1:pos:R:3\nPo 0 0 0\n'


@pytest.fixture(scope="module")
def predictor():
    return Predictor.load("mp-2018")


@pytest.fixture(scope="module")
def first_block(predictor):
    return views(predictor, FILE, 0)


def weights_by_hand(predictor, structure):
    """Attention of block 0 in float64, from the parameters: sums [H] for every atom, species and rounded distance."""
    config, params = predictor.config.model, predictor.variables["params"]
    own = params["block_0"]["attention"]
    scale, shift = (predictor.variables["calibration"]["block_0"]["attention"][key] for key in ("scale", "shift"))
    numbers = np.array([site.specie.Z for site in structure])
    x = np.asarray(params["embedding"], np.float64)[numbers - 1]
    shape = (len(x), config.head_num, -1)
    q, k = ((x @ np.float64(own[n]["kernel"]) + np.float64(own[n]["bias"])).reshape(shape) for n in ("q", "k"))
    width = (np.sum(q * np.float64(own["w_pos"]), axis=-1) + shift) * scale
    floor, beta = config.gauss_lb_real, config.positive_func_beta
    scaled = beta * width / (1 - floor)
    rho = (1 - floor) * np.where(scaled > 0, scaled, np.expm1(scaled)) + 1
    a = -rho / (2 * config.scale_of_block(0) ** 2)
    found = []
    for i in range(len(x)):
        near = structure.get_sites_in_sphere(structure[i].coords, predictor.cutoff)
        distance, index = np.array([n.nn_distance for n in near]), [n.index for n in near]
        logits = np.einsum("hk,mhk->hm", q[i], k[index]) / np.sqrt(q.shape[-1]) + a[i][:, None] * distance**2
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        found.append(summed(numbers[index], distance, weights / weights.sum(axis=1, keepdims=True)))
    return found


def summed(species, distance, weights):
    sums = {}
    for number, d, of_heads in zip(species, distance, weights.T, strict=True):
        key = int(number), round(float(d), 2)
        sums[key] = sums.get(key, 0) + of_heads
    return sums


def test_weights_are_those_of_the_attention(predictor, first_block):
    expected = weights_by_hand(predictor, Structure.from_file(FILE))
    for view, by_hand in zip(first_block, expected, strict=True):
        found = summed(view.species[:-1], np.linalg.norm(view.vectors, axis=1), view.weights)
        assert found.keys() == by_hand.keys()
        for key in found:
            np.testing.assert_allclose(found[key], by_hand[key], rtol=1e-4, atol=1e-6)
    assert [int(view.species[-1]) for view in first_block] == [38, 22, 8, 8, 8]


def test_max_frames_begin_with_the_neighbor_that_has_most_weight(predictor):
    for view in views(predictor, FILE, 3):
        others = np.linalg.norm(view.vectors, axis=1) > 1e-3
        unit = view.vectors[others] / np.linalg.norm(view.vectors[others], axis=1, keepdims=True)
        for frame, weights in zip(view.frames, view.weights[:, others], strict=True):
            np.testing.assert_allclose(frame @ frame.T, np.eye(3), atol=1e-5)
            along = weights[unit @ frame[0] > 1 - 1e-5]
            assert along.max() > weights.max() * (1 - 1e-3)


def test_what_cannot_be_looked_at(predictor, tmp_path):
    with pytest.raises(ConfigError, match=r"block 4 does not exist; this model has blocks 0 to 3"):
        views(predictor, FILE, 4)
    config = validate(tiny_config(tmp_path, domain="reci", frame_method="no", value_pe_angle_real=0))
    with pytest.raises(ConfigError, match=r"block 0 attends in reciprocal space"):
        views(Predictor(config, {}, ()), FILE, 0)
    (tmp_path / "two.xyz").write_text(FRAME * 2)
    with pytest.raises(CrystalError, match=r"two\.xyz: 2 structures; give one of them"):
        views(predictor, tmp_path / "two.xyz", 0)


def test_neighbors_are_left_out_together_with_those_that_are_equal():
    weights = np.array([0.5, 0.49, 0.004, 0.004, 0.001, 0.001])
    vectors = np.array([[0, 0, 0], [1, 0, 0], [0, 2, 0], [0, 0, 2], [3, 0, 0], [0, 3, 0]], float)
    assert shown_neighbors(weights, vectors).tolist() == [1, 2, 3]
    assert shown_neighbors(weights[:1], vectors[:1]).tolist() == []


def ink(figure, dark):
    """The share of pixels that are not the ground, and how bright that is."""
    file = io.BytesIO()
    with style(dark):
        figure.savefig(file, format="png", dpi=60)
    file.seek(0)
    pixels = matplotlib.image.imread(file)[..., :3]
    return np.mean(np.abs(pixels - pixels[0, 0]).max(axis=-1) > 0.1), pixels[0, 0].mean()


@pytest.mark.parametrize("dark", [False, True])
def test_pictures_show_something_on_a_ground_as_asked_for(first_block, dark):
    view = first_block[1]
    few, ground = ink(frames_figure(view, [0], "Ti", dark), dark)
    many, _ = ink(frames_figure(view, range(8), "Ti", dark), dark)
    curves, _ = ink(attention_figure(view, "Ti", dark), dark)
    assert (ground < 0.2) == dark and few > 0.03 and many > 0.03 and curves > 0.01
    without, _ = ink(frames_figure(view._replace(frames=None), [0], "Ti", dark), dark)
    assert 0.02 < without < few  # without the arrows


def test_the_page_needs_no_network(first_block, tmp_path):
    write_frames_page(first_block[1], "Ti in SrTiO3", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "Ti in SrTiO3" in page and "head 7" in page and '"e3"' in page and "Å, weight 0." in page
    assert "<script src=" not in page and "plotly.js v" in page
