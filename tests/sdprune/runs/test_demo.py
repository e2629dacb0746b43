"""The demo from end to end, with a tiny model and file in place of the fetched ones."""

import json
from dataclasses import replace
from itertools import pairwise

import pytest

from sdprune.masking.schedule import pruning_moments, sparsity_levels
from sdprune.recipe import DataConfig, TrainingConfig
from sdprune.runs import demo as module
from sdprune.runs.demo import FULL, QUICK, SDP_CC, DemoSize, demo


@pytest.fixture
def small(monkeypatch, model_factory, tokenizer, csv_writer, tmp_path):
    model_factory().bert.save_pretrained(tmp_path / "body")
    tokenizer.save_pretrained(tmp_path / "body")
    monkeypatch.setattr(module, "BUNDLED_MODEL", str(tmp_path / "body"))
    data = DataConfig(data=str(csv_writer(tmp_path / "reviews.csv", 240)), max_length=32)
    tuning = TrainingConfig(num_train_epochs=4.0, learning_rate=3e-3, warmup_steps=0, eval_steps=5, bf16=False)
    monkeypatch.setattr(module, "QUICK", DemoSize(data, tuning, recovery_steps=3))
    monkeypatch.setattr(module, "settled", lambda training: replace(training, bf16=False))
    return tmp_path


def test_the_demo_writes_what_it_promises(small):
    metrics = demo(small / "demo", quick=True, cache=small / "cache")
    assert json.loads((small / "demo" / "metrics.json").read_text()) == metrics
    assert set(metrics) == {"dense", "dense_same_steps", "baselines", "runs"}
    assert set(metrics["baselines"]) == {"majority", "tfidf"}
    assert [(row["method"], row["target_sparsity"]) for row in metrics["runs"]] == [
        (method, sparsity) for method in ("SDP-CC", "magnitude") for sparsity in (0.5, 0.7, 0.8)
    ]
    for row in metrics["runs"]:
        assert row["structure"] == "unstructured"
        assert row["sparsity"] == pytest.approx(row["target_sparsity"], abs=5e-4)
        assert row["reload_max_difference"] == 0.0
        assert {"model_sparsity", "accuracy", "macro_f1", "speedup", "standard_error"} <= set(row)
        assert ("difference_to_magnitude" in row) == (row["method"] != "magnitude")
    page = (small / "demo" / "report.html").read_text()
    assert "smoke test" in page
    assert len(list((small / "demo").glob("*.png"))) == 3
    with pytest.raises(ValueError, match="is not an empty folder"):
        demo(small / "demo", quick=True, cache=small / "cache")


def test_the_fine_tuned_model_is_made_once(small, monkeypatch):
    folder = module.fine_tuned(module.QUICK, False, small / "cache")
    made = (folder / "model.safetensors").stat().st_mtime_ns
    assert module.fine_tuned(module.QUICK, False, small / "cache") == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == made


@pytest.mark.parametrize("size", [FULL, QUICK], ids=["full", "quick"])
def test_every_snapshot_has_had_the_same_recovery(size):
    steps = size.training.max_steps
    ends = (*pruning_moments(SDP_CC, steps), steps)
    assert [after - before for before, after in pairwise(ends)] == [size.recovery_steps] * 8
    assert sparsity_levels(SDP_CC) == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8])
