"""Models of the package, by name."""

import hashlib
import itertools
import json

import numpy as np
import pytest
from small_sets import raw_records
from support import EXAMPLES, GOLDEN, real_crystals
from tiny import NO_FRAMES, open_tiny, tiny_config, tiny_runs

from crystalframer_jax.cli.evaluate import evaluate_main
from crystalframer_jax.cli.predict import predict_main
from crystalframer_jax.data.registry import target_set
from crystalframer_jax.data.seen import SeenCrystals
from crystalframer_jax.data.store import crystals_of
from crystalframer_jax.inference import shipped
from crystalframer_jax.inference.predictor import Predictor
from crystalframer_jax.runs.checkpoints import CheckpointError, Checkpoints
from crystalframer_jax.runs.run_directory import warn
from crystalframer_jax.structures.crystal import Crystal
from crystalframer_jax.training.start import train

SHORT = NO_FRAMES | {"n_epochs": 1, "swa_epochs": 0}
NACL = EXAMPLES / "NaCl.cif"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shipped")
    with tiny_runs():
        train(tiny_config(folder / "data", **SHORT, element_references=True), folder / "run")
        yield folder / "run"


@pytest.fixture
def models(run, tmp_path, monkeypatch):
    """A folder of models with one, "tiny", which is that of the run."""
    predictor = Predictor.load(run)
    meta = Checkpoints(run).meta(predictor.step) | {"step": predictor.step}
    checksum = shipped.write_model(tmp_path / "tiny.npz", predictor.variables, predictor.config, meta)
    entry = {
        "file": "tiny.npz",
        "sha256": checksum,
        "version": 3,
        "card": {"data": "sixty crystals", "not for": "much"},
    }
    (tmp_path / "index.json").write_text(json.dumps({"tiny": entry}))
    monkeypatch.setattr(shipped, "_folder", lambda: tmp_path)
    return tmp_path


def test_a_model_by_name_is_that_of_its_run(run, models, capsys):
    own, found = Predictor.load(run), Predictor.load("tiny")
    assert shipped.model_names() == ["tiny"]
    assert (found.targets, found.coverage, found.data_digest, found.step) == (
        own.targets, own.coverage, own.data_digest, own.step,
    )  # fmt: skip
    np.testing.assert_array_equal(found.predict(NACL), own.predict(NACL))
    assert found.card.splitlines() == ["tiny, version 3", "data     sixty crystals", "not for  much"]
    assert found.config.data_dir == "" and "tiny" in found.origin and own.card == ""
    assert predict_main(["tiny", str(NACL)]) == 0
    assert f"{own.predict(NACL)[0, 0]:.4f}" in capsys.readouterr().out


def test_a_directory_of_that_name_comes_first(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    with pytest.raises(CheckpointError, match="tiny has no checkpoints folder"):
        Predictor.load("tiny")


@pytest.mark.parametrize("content", [None, b"", "flipped"])
def test_a_file_that_is_not_the_one_that_was_shipped(models, content):
    file = models / "tiny.npz"
    if content is None:
        file.unlink()
    else:
        whole = bytearray(file.read_bytes())
        whole[1000] ^= 1
        file.write_bytes(bytes(whole) if content == "flipped" else content)
    with pytest.raises(
        CheckpointError, match=r"tiny: .*tiny\.npz, a file of the package, is (damaged|missing); install"
    ):
        Predictor.load("tiny")


def test_arrays_of_another_model(run, models):
    predictor = Predictor.load(run)
    variables = predictor.variables | {"params": {**predictor.variables["params"], "embedding": np.zeros((98, 3))}}
    meta = Checkpoints(run).meta(predictor.step)
    checksum = shipped.write_model(models / "tiny.npz", variables, predictor.config, meta)
    index = json.loads((models / "index.json").read_text())
    index["tiny"]["sha256"] = checksum
    (models / "index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="another model than its configuration"):
        Predictor.load("tiny")


def test_there_is_one_set_of_weights(models):
    with pytest.raises(CheckpointError, match="one set of weights"):
        Predictor.load("tiny", "swa")


def test_training_may_start_from_a_name(run, models, tmp_path):
    config = tiny_config(run.parent / "data", **SHORT, lr=1e-12, pretrained_model="tiny")
    config.element_references = True
    train(config, tmp_path / "tuned")
    np.testing.assert_allclose(
        Predictor.load(tmp_path / "tuned").predict(NACL), Predictor.load(run).predict(NACL), rtol=1e-4
    )


# Those that are there


def test_the_model_of_the_materials_project_predicts_what_it_did_when_it_was_made():
    known = target_set("mp_flla_2015")
    records = itertools.islice(known.source.open(known.targets).records(), 10)
    crystals = {record.id: record.crystal(6.93) for record in records}
    expected = json.loads((GOLDEN / "mp-2018.json").read_text())
    predictor = Predictor.load("mp-2018")
    assert [(s.name, s.unit) for s in predictor.targets] == [("e_form", "eV/atom"), ("gap_pbe", "eV")]
    assert list(crystals) == list(expected)
    np.testing.assert_allclose(predictor.predict([*crystals.values()]), [*expected.values()], rtol=0, atol=1e-5)
    assert predictor.card.startswith("mp-2018, version ") and "MAE" in predictor.card


def test_it_warns_of_what_it_has_not_seen():
    with pytest.warns(UserWarning, match="not among the elements of the training set: Po"):
        Predictor.load("mp-2018").predict(Crystal(np.array([84]), np.zeros((1, 3)), 3.35 * np.eye(3)))


# What they were trained on


@pytest.fixture
def seen_half(run, models):
    """The test crystals that the model "tiny" has seen, half of them, by other ids."""
    dataset = open_tiny(tiny_config(run.parent / "data"))
    rows = dataset.splits["test"][::2]
    ids = np.array([f"other-{row}" for row in rows])
    seen = SeenCrystals.of(ids, crystals_of(dataset.table, rows))
    index = json.loads((models / "index.json").read_text())
    index["tiny"]["seen"] = shipped.write_seen(models / "tiny.seen.npz", seen)
    (models / "index.json").write_text(json.dumps(index))
    return dataset, rows


def test_crystals_that_the_model_was_pretrained_on_are_told(run, seen_half, models, tmp_path, capsys):
    dataset, seen = seen_half
    data = str(run.parent / "data")
    config = tiny_config(data, **SHORT, pretrained_model="tiny", element_references=True)
    train(config, tmp_path / "tuned")
    told = "tiny was trained on 3 of 6 test crystals of small, with labels of e_form: errors on them"
    assert "warning: tiny was trained on 3 of 6 test crystals, with labels of e_form" in capsys.readouterr().out
    for model in (str(tmp_path / "tuned"), "tiny"):
        warn.cache_clear()  # it tells nothing twice
        assert evaluate_main([model, f"--data_dir={data}", f"--output={tmp_path / 'out.csv'}"]) == 0
        out, err = capsys.readouterr()
        assert told in err and "e_form, without leaks" in out
        assert len((tmp_path / "out.csv").read_text().splitlines()) == 7
        arguments = [f"--data_dir={data}", "--exclude-leaked", f"--output={tmp_path / 'out.csv'}"]
        assert evaluate_main([model, *arguments]) == 0
        assert "3 of 6 test crystals are left out" in (out := capsys.readouterr().out) and "without leaks" not in out
        left = {line.split(",")[0] for line in (tmp_path / "out.csv").read_text().splitlines()[1:]}
        assert left == set(dataset.table.ids[dataset.splits["test"]]) - set(dataset.table.ids[seen])
    config.update(targets="e_above_hull", element_references=False)
    train(config, tmp_path / "other")
    assert "was trained on" not in capsys.readouterr().out
    assert evaluate_main([str(tmp_path / "other")]) == 0
    assert "was trained on" not in capsys.readouterr().err


def test_the_crystals_of_mp_2018():
    """Their ids are those of which the card has the checksum; most bundled crystals of 2015 are among them."""
    model = shipped.read_model("mp-2018")
    checksum = hashlib.sha256("\n".join(model.seen.ids).encode()).hexdigest()
    assert checksum in model.card and len(model.seen.ids) == len(model.seen.traces) == 31_623
    ids = np.array([record["id"] for record in raw_records(100)])
    by_id = np.isin(ids, model.seen.ids)
    by_structure = model.seen.hold(np.char.add("my-", ids), real_crystals(ids))
    assert by_id.sum() == 64 and (by_id & by_structure).sum() >= 0.9 * by_id.sum()
    assert (~by_id & by_structure).sum() <= 5


def test_damaged_lists_of_crystals(seen_half, models):
    (models / "tiny.seen.npz").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"tiny: .*tiny\.seen\.npz, a file of the package, is missing; install"):
        Predictor.load("tiny")
