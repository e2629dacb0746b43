"""Separability, signal-to-noise and convergence: against few-line oracles, and as rows of a run's log."""

import json
import math

import pytest
import torch

from sdprune import SDPruneConfig, prune
from sdprune.analysis.measures import Recovery, class_separability, recoveries, signal_to_noise
from sdprune.training.diagnostics import scores


def scatter(rows):
    centred = (rows - rows.mean(0)).double()
    return centred.T @ centred


def test_separability_is_the_ratio_of_the_traces():
    torch.manual_seed(0)
    labels = torch.tensor([4, 0, 0, 4, 4, 2, 2, 0, 4])
    rows = torch.randn(9, 5) + labels.unsqueeze(1)
    within = sum(scatter(rows[labels == label]) for label in (0, 2, 4))
    between = scatter(rows) - within  # the total scatter is their sum
    assert class_separability(rows, labels) == pytest.approx(float(between.trace() / within.trace()))


def test_separability_at_its_ends():
    rows, labels = torch.tensor([[0.0, 1.0], [2.0, 1.0], [0.0, 1.0], [2.0, 1.0]]), torch.tensor([0, 0, 1, 1])
    assert class_separability(rows, labels) == 0.0
    assert class_separability(rows, torch.tensor([0, 1, 0, 1])) == math.inf
    assert math.isnan(class_separability(torch.ones(4, 2), labels))
    with pytest.raises(ValueError, match=r"labels must hold at least two classes, got \[3\]"):
        class_separability(rows, torch.full((4,), 3))
    with pytest.raises(ValueError, match=r"got shapes \(4, 2\) and \(3,\)"):
        class_separability(rows, labels[:3])


def test_signal_to_noise_in_decibels():
    teacher = torch.randn(6, 8)
    assert signal_to_noise(teacher * 0.9, teacher) == pytest.approx(20.0, abs=1e-4)
    assert signal_to_noise(torch.zeros(6, 8), teacher) == 0.0
    noise = torch.randn(6, 8)
    expected = 10 * math.log10(float(teacher.square().sum() / noise.square().sum()))
    assert signal_to_noise(teacher + noise, teacher) == pytest.approx(expected, abs=1e-4)
    assert signal_to_noise(teacher, teacher) == math.inf
    assert signal_to_noise(teacher, torch.zeros(6, 8)) == -math.inf
    with pytest.raises(ValueError, match=r"shape of teacher, \(6, 8\), got \(6, 7\)"):
        signal_to_noise(teacher[:, :7], teacher)


def test_convergence_counts_from_the_pruning_step():
    curve = [(5, 0.80), (10, 0.70), (15, 0.795), (20, 0.90), (25, 0.60), (40, 0.70)]
    found = recoveries(curve, [2, 5, 20])  # no score before the first
    assert found == [
        Recovery(5, 0.80, 10, pytest.approx((5 * 0.7475 + 5 * 0.8475) / 10)),
        Recovery(20, 0.90, None, pytest.approx(0.65)),
    ]
    assert recoveries(curve, [5, 20], fraction=0.75) == [
        Recovery(5, 0.80, 5, found[0].area),
        Recovery(20, 0.90, 20, found[1].area),
    ]
    assert recoveries([(5, 0.8), (8, 0.8)], [5, 9])[0].area is None
    assert recoveries(curve, []) == []  # a training that does not prune
    assert recoveries([], [5]) == []


def test_scores_are_the_first_metric_of_every_evaluation():
    history = [
        {"step": 1, "loss": 2.0},
        {"step": 2, "eval_loss": 1.0, "eval_runtime": 3.0, "eval_f1": 0.5, "eval_z": 1},
    ]
    assert scores(history) == [(2, 0.5)]


@pytest.fixture
def run(model_factory, dataset_factory, tokenizer, arguments, tmp_path):
    def run(name="run", evaluation=24, **fields):
        config = SDPruneConfig(**({"target_sparsity": 0.6, "pruning_steps": 2, "diagnostics_steps": 2} | fields))
        result = prune(
            model_factory(),
            config,
            dataset_factory(40),
            dataset_factory(evaluation, seed=1) if evaluation else None,
            args=arguments(
                output_dir=str(tmp_path / name), eval_strategy="steps" if evaluation else "no", eval_steps=1
            ),
            processing_class=tokenizer,
            compute_metrics=lambda prediction: {"accuracy": 0.5},
        )
        rows = [json.loads(line) for line in (result.output_dir / "metrics.jsonl").read_text().splitlines()]
        return result, rows

    return run


def test_a_run_logs_its_diagnostics(run, dataset_factory, tokenizer):
    result, rows = run(diagnostics_examples=10)
    measured = [row for row in rows if "separability" in row]
    assert [row["step"] for row in measured] == [2, 4, 6, 8]
    assert all(row["separability"] > 0 for row in measured)
    # the last one again, from the pruned model and its teacher
    batch = tokenizer.pad([dataset_factory(24, seed=1)[index] for index in range(10)], return_tensors="pt")
    labels, mask = batch.pop("labels"), batch["attention_mask"].unsqueeze(-1)
    means = []
    for model in (result.model, result.teacher):
        with torch.no_grad():
            hidden = model.eval().bert(**batch)[0]
        means.append((hidden * mask).sum(1) / mask.sum(1))
    assert measured[-1]["signal_to_noise"] == pytest.approx(signal_to_noise(*means), rel=1e-4)
    assert measured[-1]["separability"] == pytest.approx(class_separability(means[0], labels), rel=1e-4)
    (end,) = [row for row in rows if "recovered" in row]
    assert end["recovered"] == 1.0  # the score never moves
    assert end["recovery_steps"] == 1.0


def test_diagnostics_leave_the_training_as_it_is(run):
    states = [run(name, diagnostics_steps=steps)[0].model.state_dict() for name, steps in (("a", None), ("b", 1))]
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def test_without_a_teacher_there_is_no_noise(run):
    rows = run(distillation=None, representation="first")[1]
    measured = [row for row in rows if "separability" in row]
    assert len(measured) == 4
    assert not any("signal_to_noise" in row for row in rows)


def test_diagnostics_need_evaluation_data(run, tmp_path):
    with pytest.raises(ValueError, match="diagnostics_steps=2 measures on the evaluation data: pass one eval_dataset"):
        run(evaluation=0)
    assert not any(tmp_path.glob("run/*"))
