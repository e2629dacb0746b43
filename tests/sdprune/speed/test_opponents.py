"""The dense model as others run it: right, timed beside ours, and told where it is missing or errs."""

import importlib.util

import pytest
import torch

from sdprune.speed import benchmark as benchmark_module
from sdprune.speed import opponents
from sdprune.speed.benchmark import BenchmarkConfig, benchmark
from sdprune.speed.opponents import INT8, Contender, in_bfloat16, in_onnxruntime, opponent_speedups
from sdprune.speed.report import breaks, draw, outcome, table

NAMES = ["dense eager", "sparse eager", "dense bfloat16", "ONNX Runtime float32", INT8]
SMALL = {"batch": (2,), "sequence": (8,), "repeats": 3, "compile": False, "precision": (), "block_shape": (8, 8)}


@pytest.fixture
def model(model_factory):
    return model_factory(num_hidden_layers=1)


@pytest.fixture
def inputs(batch):
    return {name: batch[name][:3] for name in ("input_ids", "attention_mask")}


def needs_onnx(test):
    missing = [name for name in ("onnx", "onnxruntime", "onnxscript") if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason="needs the extra onnx: pip install 'sdprune[onnx]'")(test)


def without(monkeypatch, package):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else real(name))


@needs_onnx
def test_onnxruntime_computes_the_same_in_both_precisions(model, inputs):
    found = in_onnxruntime(model, inputs)
    with torch.no_grad():
        expected = model(**inputs).logits
        assert [(one.name, one.precision, one.failed) for one in found] == [
            ("ONNX Runtime float32", "float32", ""),
            (INT8, "int8", ""),
        ]
        plain, small = found
        errors = []
        for one in found:
            (logits,) = one.model(**inputs)
            errors.append(float((logits - expected).abs().max() / expected.abs().max()))
            assert one.model.session.get_session_options().intra_op_num_threads == torch.get_num_threads()
        assert errors[0] < 1e-5 < errors[1] < 0.1, "int8 weights round"
        assert small.weights_mib < plain.weights_mib
        kinds = [value.type for value in small.model.session.get_inputs()]
        assert kinds == ["tensor(int64)"] * 2


@needs_onnx
def test_speedups_of_a_small_model_are_measured_unasked(model, inputs):
    model.train()
    state = torch.get_rng_state()
    with torch.inference_mode():  # as a run does, whose probe is made in there
        found = opponent_speedups(model, {name: value.clone() for name, value in inputs.items()}, repeats=3)
    assert list(found) == ["ONNX Runtime float32", INT8]
    assert all(value > 0 for value in found.values())
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_speedups_are_not_measured_where_that_is_dear_or_impossible(model, inputs, monkeypatch):
    monkeypatch.setattr(opponents, "in_onnxruntime", lambda *arguments: pytest.fail("was exported"))
    monkeypatch.setattr(opponents, "missing_package", lambda: None)
    monkeypatch.setattr(opponents, "MOST_PARAMETERS", sum(value.numel() for value in model.parameters()) - 1)
    assert opponent_speedups(model, inputs) == {}
    monkeypatch.undo()
    without(monkeypatch, "onnx")
    assert opponent_speedups(model, inputs) == {}


@needs_onnx
def test_opponents_take_turns_with_ours(model, tmp_path):
    rows = benchmark(model, BenchmarkConfig(**SMALL | {"sparsity": (0.5, 0.75)}), tmp_path)
    assert [row["contender"] for row in rows] == NAMES * 2
    assert [row["role"] for row in rows] == ["dense", "ours", *["opponent"] * 3] * 2
    for row in rows:
        assert not outcome(row), row
        assert row["error"] <= row["allowed"]
        assert row["speedup_over_int8"] > 0
        assert row["weights_mib"] > 0
        assert row["onnxruntime"]
        assert ("peak_mib" in row) == (not row["contender"].startswith("ONNX"))
    assert [row["allowed"] for row in rows[:5]] == [1e-4, 1e-4, 5e-2, 1e-4, 2.5e-1]
    assert [row["speedup_over_int8"] for row in rows if row["contender"] == INT8] == [1.0, 1.0]
    assert rows[4]["median_ms"] / rows[1]["median_ms"] == pytest.approx(rows[1]["speedup_over_int8"])
    (axes,) = draw(rows).axes
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert {"dense bfloat16", "ONNX Runtime float32", INT8} <= set(lines)
    assert list(lines[INT8].get_ydata()) == [rows[4]["speedup_over_eager"], rows[9]["speedup_over_eager"]]
    assert axes.get_title(loc="left") == "float32, 2 x 8"


def test_without_onnxruntime_the_rows_say_what_to_install(model, tmp_path, monkeypatch):
    without(monkeypatch, "onnxruntime")
    rows = benchmark(model, BenchmarkConfig(**SMALL | {"sparsity": (0.5,)}), tmp_path)
    assert [row["contender"] for row in rows] == NAMES
    for row in rows[3:]:
        assert outcome(row) == "failed: onnxruntime is missing: pip install 'sdprune[onnx]'"
        assert "median_ms" not in row
        assert row["weights_mib"] is None
    assert not any(map(breaks, rows))
    assert rows[0]["speedup_over_int8"] is None
    assert rows[0]["onnxruntime"] is None
    assert "ONNX Runtime int8, float32, 2 x 8, 50%: failed: onnxruntime is missing" in table(rows)
    assert [INT8 in line for line in table(rows).splitlines()].count(True) == 2, "a line of the table and a note"


def test_an_export_that_fails_is_told(model, inputs, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("no such operator\nas that")

    monkeypatch.setattr(opponents, "write_onnx", fail)
    found = in_onnxruntime(model, inputs)
    assert [(one.failed, one.model) for one in found] == [("no such operator", None)] * 2


def test_an_opponent_that_errs_is_timed_and_marked_and_ours_is_not(model, tmp_path, monkeypatch):
    def wrong(given, role):
        other = in_bfloat16(given).model
        other.classifier.bias.data += 10.0
        return Contender("off", role, "int8", other)

    monkeypatch.setattr(benchmark_module, "_opponents", lambda given: [wrong(given, "opponent")])
    config = BenchmarkConfig(**SMALL | {"sparsity": (0.5,)})
    row = benchmark(model, config, tmp_path)[-1]
    assert row["median_ms"] > 0
    assert row["correct"] is False
    assert outcome(row).startswith("WRONG: error ")
    assert outcome(row).endswith("allowed 2.5e-01; timed all the same")
    assert not breaks(row)
    monkeypatch.setattr(benchmark_module, "_opponents", lambda given: [wrong(given, "ours")])
    row = benchmark(model, config, tmp_path)[-1]
    assert "median_ms" not in row
    assert outcome(row).endswith("not timed")
    assert breaks(row)


def test_a_dtype_that_is_measured_anyway_is_no_opponent(model, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark_module, "_opponents", lambda given: [in_bfloat16(given)])
    rows = benchmark(model, BenchmarkConfig(**SMALL | {"sparsity": (0.5,), "dtype": ("bfloat16",)}), tmp_path)
    assert [row["contender"] for row in rows] == ["dense eager", "sparse eager"]
