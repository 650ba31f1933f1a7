"""The benchmark: named cases, counts of the least work, measurements that go on when one fails, tables and JSON."""

import json
import math
import runpy
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from benchmarking import report, roofline
from benchmarking.measure import ATTENTION, describe_case, make_program, measure_case, over_atoms, slope
from support import batch_of, random_crystal, random_variables, rows_from, small_config

from crystalframer_jax.batching.batch import Batch, pack
from crystalframer_jax.batching.shapes import shape_for
from crystalframer_jax.batching.table import make_table
from crystalframer_jax.config import validate
from crystalframer_jax.configs import default
from crystalframer_jax.configs.variants import VARIANTS, with_variant
from crystalframer_jax.measuring.cases import CASES, SMALL, unit_cell
from crystalframer_jax.measuring.programs import Variant
from crystalframer_jax.measuring.timing import Program, Timing, take_turns
from crystalframer_jax.model.layers import Dense
from crystalframer_jax.ops import ties
from crystalframer_jax.structures.neighbors import neighbor_rows
from crystalframer_jax.training.layer_names import count_parameters

CEILINGS = roofline.work(1e9, 1e10, 1e10)


def small(variant):
    """A variant that compiles in a second or two."""
    config = with_variant(default.get_config(), variant)
    config.update(num_layers=1, model_dim=16, head_num=2, ff_dim=32, embedding_dim=(16,))
    return Variant(variant, validate(config))


# Cases


def test_a_supercell_is_the_repeated_cell_slightly_displaced():
    case = CASES["supercell-40"]
    batch, cell = case.batch(), unit_cell()
    assert batch.species.shape == (40,) and batch.crystal_sizes.tolist() == [40]
    assert sorted(batch.species) == sorted(np.tile(cell.species, 8))
    assert len({tuple(x) for x in np.asarray(batch.rows.fine)}) == 40
    mean = np.asarray(batch.rows.count).mean()
    density = cell.num_atoms / abs(np.linalg.det(cell.lattice))
    assert mean == pytest.approx(density * 4 / 3 * math.pi * 6.93**3, rel=0.05)
    assert (np.asarray(case.batch().rows.image) == np.asarray(batch.rows.image)).all()


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("supercell")])
def test_supercells_have_as_many_atoms_as_their_name_says(name):
    assert 5 * math.prod(CASES[name].repeats) == int(name.removeprefix("supercell-"))


def test_names_of_bundled_cases_are_batch_sizes():
    sizes = {name: case.batch_size for name, case in CASES.items() if name.startswith("bundled")}
    assert all(name == f"bundled-{size}" for name, size in sizes.items()) and set(SMALL) <= set(CASES)


# The least work


def primitives(jaxpr, times=1):
    """(equation, how often it is evaluated) of a jaxpr; of the branches of a `cond` the last, for the longest rows."""
    for equation in jaxpr.eqns:
        name, parameters = equation.primitive.name, equation.params
        if name == "cond":
            yield from primitives(parameters["branches"][-1].jaxpr, times)
        elif name == "scan":
            yield from primitives(parameters["jaxpr"].jaxpr, times * parameters["length"])
        elif name == "while":  # over blocks of atoms, or some columns after the others: full rows, cut out of `index`
            body = parameters["body_jaxpr"].jaxpr
            slices = [e for e in body.eqns if e.primitive.name == "dynamic_slice" and e.outvars[0].aval.ndim == 2]
            whole, part = slices[0].invars[0].aval, slices[0].outvars[0].aval
            yield from primitives(body, times * (whole.size // part.size))
        else:
            inner = [x for x in parameters.values() if hasattr(x, "jaxpr") or hasattr(x, "eqns")]
            for found in inner:
                yield from primitives(getattr(found, "jaxpr", found), times)
            if not inner:
                yield equation, times


ELEMENTWISE = {"add", "sub", "mul", "div", "max", "sqrt", "neg", "integer_pow", "square", "add_any", "abs"}


def operations(function, *arguments):
    """Exponentials and other floating-point operations of a function, counted in its jaxpr."""
    exponentials = flops = 0
    for equation, times in primitives(jax.make_jaxpr(function)(*arguments).jaxpr):
        name, out = equation.primitive.name, equation.outvars[0].aval
        if not jnp.issubdtype(out.dtype, jnp.floating):
            continue
        if name == "exp":
            exponentials += times * out.size
        elif name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            flops += times * 2 * out.size * math.prod(equation.invars[0].aval.shape[i] for i in contracted)
        elif name == "reduce_sum":
            flops += times * equation.invars[0].aval.size
        elif name in ELEMENTWISE:
            flops += times * out.size
    return exponentials, flops


def full_rows(num_atoms, length):
    """A batch whose rows are all of one length: no padding, and every atom its own first neighbor."""
    rng = np.random.default_rng(0)
    index = rng.integers(0, num_atoms, (num_atoms, length)).astype(np.int32)
    vector = rng.normal(size=(num_atoms, length, 3)).astype(np.float32)
    vector[:, 0] = 0
    rows = rows_from(index, vector, np.zeros_like(index), np.full(num_atoms, length, np.int32))
    sizes = np.array([num_atoms], np.int32)
    zeros = np.zeros(num_atoms, np.int32)
    return Batch(
        zeros + 1, None, zeros, zeros, rows, None, None, None, sizes, 0 * sizes, np.zeros((1, 1)), np.ones((1, 1), bool)
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_counts_are_those_of_the_lattice_sums_less_what_a_single_sweep_saves(variant, monkeypatch):
    """Counted in the program itself, on rows without padding."""
    monkeypatch.setattr(ties, "choose", lambda *given: given[5])  # no row has ties: what they cost is not counted
    chosen = Variant(variant, validate(with_variant(default.get_config(), variant)))
    N, M = 64, 64
    batch = full_rows(N, M)
    size = roofline.size_of(batch)
    assert size == roofline.Size(N, 1, N * M)
    programs = [make_program(measure, chosen, batch, "xla") for measure in ATTENTION]
    model = chosen.config.model
    H = model.head_num
    forward, both = (operations(program.function, *program.arguments()) for program, _ in programs)
    work, back = roofline.attention(model, size)  # exponentials, flops, bytes

    # Sums of earlier columns are rescaled once for every 64, the angle factors are evaluated for the atom itself too.
    factors = {"default": 16, "lightweight": 10, "crystalformer": 0}[variant]
    assert forward[0] == work[0] + N * H * (M // 64) + 3 * N * H * factors
    assert both[0] - forward[0] == back[0] + 3 * N * H * factors
    assert 0.6 * forward[1] < work[1] <= forward[1]
    assert 0.6 * (both[1] - forward[1]) < back[1] <= both[1] - forward[1]


def test_the_counts_of_dense_layers_are_those_of_the_compiler():
    rows, inputs, outputs = 96, 24, 40
    layer = Dense(outputs, jax.nn.initializers.normal(), jax.nn.initializers.normal(), np.dtype(np.float32))
    x = jnp.ones((rows, inputs))
    variables = layer.init(jax.random.key(0), x)

    def backward(variables, x, gradient):
        return jax.vjp(layer.apply, variables, x)[1](gradient)

    def analysed(function, *arguments):
        return jax.jit(function).lower(*arguments).compile().cost_analysis()

    forward, back = roofline.dense(rows, inputs, outputs)
    found = analysed(layer.apply, variables, x)
    assert found["flops"] == pytest.approx(forward[1], rel=1e-3)
    assert found["bytes accessed"] >= forward[2] == 4 * (x.size + rows * outputs + (inputs + 1) * outputs)
    found = analysed(backward, variables, x, jnp.ones((rows, outputs)))
    assert found["flops"] == pytest.approx(back[1], rel=1e-3)


def test_the_model_is_counted_layer_by_layer():
    """The parameters of the layers that are counted, and those that are known to be left out, are all there are."""
    config = small_config()
    params = random_variables(config)["params"]
    layers = roofline.dense_layers(config, roofline.Size(10, 2, 800))
    assert [rows for rows, _, _ in layers] == [10] * 4 * config.num_layers + [2] * (len(config.embedding_dim) + 1)
    counted = sum((i + 1) * o for _, i, o in layers)
    H, dk, dv = config.head_num, config.k_dim, config.v_dim
    encodings = H * dv * (config.value_pe_dist_real + 3 * config.value_pe_angle_real) + H * dk
    embedding = 98 * config.model_dim
    assert count_parameters(params) == counted + encodings * config.num_layers + embedding


def test_work_grows_with_the_neighbors_and_training_costs_more_than_twice_a_prediction():
    config = small_config()
    small, large = roofline.Size(10, 2, 800), roofline.Size(20, 4, 1600)
    for count in (roofline.attention, roofline.model):
        for twice, work in zip(count(config, large), count(config, small), strict=True):
            assert twice[:2] == pytest.approx(2 * work[:2])
    step, (forward, _) = roofline.train_step(config, small, 1000), roofline.model(config, small)
    assert step[0] == 2 * forward[0]
    assert 2 * forward[1] < step[1] < 4 * forward[1] and step[2] > 2 * forward[2]


def test_padding_is_not_counted():
    crystal = random_crystal(np.random.default_rng(0), 3)
    packed, alone = batch_of([crystal] * 2, 4.0), batch_of([crystal], 4.0)
    size = roofline.size_of(packed)
    assert size.atoms == 6 < len(packed.species) and size.crystals == 2
    assert size.neighbors == 2 * roofline.size_of(alone).neighbors == int((packed.rows.vector**2).any(-1).sum()) + 6


# Timing


def test_programs_take_turns_and_consumed_arguments_go_on():
    order = []
    both = [
        Program(FakeFunction(name, order), lambda: (0,), advance=lambda given, result: (given[0] + 1,)) for name in "ab"
    ]
    timings = take_turns(both, rounds=3)
    assert order == [(name, number) for number in range(4) for name in "ab"]  # the first round warms up
    assert [len(timing.seconds) for timing in timings] == [3, 3]
    assert timings[0].memory_bytes == 1 + 2 + 4 - 1


class FakeFunction:
    """Stands in for a compiled function."""

    argument_size_in_bytes, output_size_in_bytes, temp_size_in_bytes, alias_size_in_bytes = 1, 2, 4, 1

    def __init__(self, name, order, fails_at=None):
        self.name, self.order, self.fails_at = name, order, fails_at

    def lower(self, *arguments):
        return self

    def compile(self):
        return self

    def memory_analysis(self):
        return self

    def __call__(self, number):
        if number == self.fails_at:
            raise RuntimeError(f"no memory in run {number}\nand a trace")
        self.order.append((self.name, number))
        return number


@pytest.mark.parametrize("fails_at", [0, 2])
def test_a_program_that_fails_says_why_and_the_others_go_on(fails_at):
    def advance(given, result):
        return (given[0] + 1,)

    bad = Program(FakeFunction("bad", [], fails_at), lambda: (0,), advance)
    good = Program(FakeFunction("good", []), lambda: (0,), advance)
    failed, timed = take_turns([bad, good], rounds=3)
    assert failed.failure == f"RuntimeError: no memory in run {fails_at}" and failed.median is None
    assert len(timed.seconds) == 3 and not timed.failure
    assert timed.ratio_to(failed) is None and failed.ratio_to(timed) is None


def test_ratios_are_those_of_the_same_round():
    """A machine that is slow for a while slows both."""
    reference, twice = Timing([1.0, 10.0, 1.0]), Timing([2.0, 20.0, 30.0])
    assert twice.ratio_to(reference) == 2.0


def test_compile_times_are_not_those_of_the_persistent_cache(script, monkeypatch):
    """The script switches the cache off for its process, before anything is compiled."""
    asked = []
    monkeypatch.setattr(jax.config, "update", lambda *given: asked.append(given))
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--help"])
    with pytest.raises(SystemExit):
        runpy.run_path(script.__file__, run_name="__main__")
    assert asked == [("jax_enable_compilation_cache", False)]
    (timing,) = take_turns([Program(FakeFunction("a", []), lambda: (0,))], rounds=1)
    assert timing.compile_seconds > 0


# Cost against atoms


def test_the_slope_is_the_exponent_of_a_power_law():
    atoms = np.array([100, 1000, 10000])
    assert slope(atoms, 3e-5 * atoms**1.5) == pytest.approx(1.5)
    assert slope(atoms, np.array([1.0, 2.0, 100.0])) == pytest.approx(1.0)  # by hand: (2 - 0) / (4 - 2)


def test_the_slope_is_over_the_supercells_alone():
    cases = [
        {"case": name, "crystals": n, "atoms": atoms} for name, n, atoms in (("a", 1, 10), ("b", 1, 20), ("c", 5, 9))
    ]
    records = [
        {"case": case, "measure": "forward", "variant": variant, "implementation": "xla", "median_s": seconds}
        for case, variant, seconds in (
            ("a", "x", 1.0),
            ("b", "x", 2.0),
            ("c", "x", 50.0),
            ("a", "y", 1.0),
            ("b", "y", None),
        )
    ]
    (found,) = over_atoms(records, cases)
    assert found["variant"] == "x" and found["atoms"] == [10, 20] and found["slope"] == pytest.approx(1.0)


# Together


@pytest.fixture(scope="module")
def measured():
    """Small models on short rows, one implementation not available."""
    cell, case = unit_cell(), CASES["supercell-40"]
    table, indices = make_table([cell], [neighbor_rows(cell, 3.0)]), np.array([0])
    batch = pack(table, indices, shape_for(table, indices), np.zeros((1, 1)))
    variants = [small("lightweight"), small("crystalformer")]
    records = measure_case(case, batch, "attention and gradient", variants, ("xla", "none"), CEILINGS, rounds=2)
    for measure in ("forward", "train step"):
        records += measure_case(case, batch, measure, variants[1:], ("xla",), CEILINGS, rounds=2)
    return describe_case(case, batch), records


def test_every_variant_and_implementation_is_measured_side_by_side(measured):
    case, records = measured
    keys = [(r["measure"], r["variant"], r["implementation"]) for r in records]
    assert len(set(keys)) == len(keys) == 2 * 2 + 2
    assert case["atoms"] == 5 and 0 < case["neighbors_filled"] < 1
    for record in records:
        if record["implementation"] == "xla":
            assert record["rounds"] == 2 and record["median_s"] > 0 and record["compile_s"] > 0
            assert record["share_of_floor"] == record["floor_s"] / record["median_s"]
            work = [record[kind] for kind in ("exponentials", "flops", "bytes")]
            assert record["floor_s"] == max(work[0] / 1e9, work[1] / 1e10, work[2] / 1e10)  # the scarcest of three
            assert record["memory_bytes_per_atom"] == record["memory_bytes"] / 5 > 100
            assert (record["ratio_to_crystalformer"] == 1.0) == (record["variant"] == "crystalformer")
            assert record["ratio_to_xla"] == 1.0 and not record["failure"]


def test_an_implementation_that_fails_is_reported_and_the_rest_is_measured(measured, capsys):
    case, records = measured
    failed = [record for record in records if record["implementation"] == "none"]
    assert all("'none'" in record["failure"] and record["median_s"] is None for record in failed)
    report.print_models({"ceilings": {}, "cases": [case], "measurements": records, "atoms": []})
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("supercell-40  lightweight") for line in lines) == 2
    told = [line for line in lines if line.startswith("failed: ")]
    assert len(told) == 1 and "supercell-40 crystalformer none: ValueError" in told[0]


def test_the_script_writes_tables_and_json(script, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(script, "measure_ceilings", lambda: CEILINGS)
    file = tmp_path / "results.json"
    options = ["--part=attention", "--part=atoms", "--case=supercell-40", "--variant=crystalformer"]
    monkeypatch.setitem(script.MEASURES, "atoms", ("attention",))
    monkeypatch.setitem(script.MEASURES, "attention", ("attention",))
    script.main([*options, "--rounds=2", f"--json={file}"])
    results = json.loads(file.read_text())
    assert {"device", "cores", "jax", "date", "ceilings", "cases", "measurements", "atoms"} == set(results)
    (record,) = results["measurements"]
    assert record["measure"] == "attention" and record["rounds"] == 2 and record["share_of_floor"] > 0
    out = capsys.readouterr().out
    assert "share of floor" in out and "measured ceilings" in out and "pipeline" not in out


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--rounds=-1", "must be positive"),
        ("--json=missing/results.json", "no such folder"),
        ("--case=bundled", "choose"),
        ("--case=bundled-5", "'bundled-64'"),
    ],
)
def test_bad_arguments_are_told_before_anything_is_measured(script, argument, words, capsys):
    with pytest.raises(SystemExit):
        script.main([argument])
    assert words in capsys.readouterr().err


def test_an_unknown_target_set_is_told_before_anything_is_measured(script, tmp_path):
    with pytest.raises(SystemExit, match="error: target_set='nosuch' is not known"):
        script.main(["--target_set=nosuch", f"--data_dir={tmp_path}"])
