"""Scores against numbers worked out by hand, and the bootstrap against plain resampling."""

import numpy as np
import pytest

from sdprune.data.examples import Examples
from sdprune.data.metrics import compute, paired_bootstrap_standard_error
from sdprune.data.tasks import Task
from sdprune.runs.demo import majority_baseline, tfidf_baseline


def one_hot(predictions: list[int], classes: int = 2) -> np.ndarray:
    return np.eye(classes)[predictions]


def examples(texts: list[str], labels: list) -> Examples:
    return Examples(tuple((text,) for text in texts), tuple(labels))


def test_classification_by_hand():
    labels, predictions = [1, 1, 1, 0, 0], [1, 1, 0, 0, 1]  # tp 2, fn 1, tn 1, fp 1
    scores = compute(("accuracy", "f1", "macro_f1", "matthews"), one_hot(predictions), labels)
    assert scores["accuracy"] == pytest.approx(3 / 5)
    assert scores["f1"] == pytest.approx(2 / 3)
    assert scores["macro_f1"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert scores["matthews"] == pytest.approx((2 * 1 - 1 * 1) / 6)
    assert all(type(score) is float for score in scores.values())


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_regression_by_hand(shape):
    scores = compute(("pearson", "spearman"), np.array([1.0, 2.0, 3.0, 10.0]).reshape(shape), [0.0, 1.0, 2.0, 3.0])
    assert scores["spearman"] == pytest.approx(1.0)
    assert scores["pearson"] == pytest.approx(14 / np.sqrt(5 * 50))


def test_constant_predictions_score_nothing():
    assert compute(("pearson", "spearman"), np.ones(3), [0.0, 1.0, 2.0]) == {"pearson": 0.0, "spearman": 0.0}
    assert compute(("matthews", "f1"), one_hot([0, 0, 0]), [0, 1, 1]) == {"matthews": 0.0, "f1": 0.0}


@pytest.mark.parametrize(
    ("metrics", "logits", "labels", "message"),
    [
        (("bleu",), np.eye(2), [0, 1], "unknown metric 'bleu'; known are accuracy"),
        (("accuracy",), np.full((2, 2), np.nan), [0, 1], "NaN or infinity"),
        (("accuracy",), np.eye(2), [0, 1, 1], "must have the same rows"),
        (("accuracy",), np.empty((0, 2)), [], "at least one"),
    ],
)
def test_bad_input(metrics, logits, labels, message):
    with pytest.raises(ValueError, match=message):
        compute(metrics, logits, labels)


def test_bootstrap_agrees_with_resampling_and_repeats():
    generator = np.random.default_rng(1)
    correct_a, correct_b = generator.random(400) < 0.8, generator.random(400) < 0.7
    found = paired_bootstrap_standard_error(correct_a, correct_b)
    rows = generator.integers(0, 400, size=(2000, 400))
    resampled = (correct_a[rows].mean(1) - correct_b[rows].mean(1)).std(ddof=1)
    assert found == pytest.approx(resampled, rel=0.1)
    assert found == paired_bootstrap_standard_error(correct_a, correct_b)
    assert found != paired_bootstrap_standard_error(correct_a, correct_b, seed=1)


def test_bootstrap_pairs_the_rows():
    correct = np.arange(100) % 3 > 0
    assert paired_bootstrap_standard_error(correct, correct) == 0.0


@pytest.mark.parametrize(
    ("correct_b", "samples", "message"), [([True], 10, "same rows"), ([True, False], 1, "at least 2")]
)
def test_bootstrap_refuses(correct_b, samples, message):
    with pytest.raises(ValueError, match=message):
        paired_bootstrap_standard_error([True, False], correct_b, samples=samples)


def test_baselines_of_classes():
    train = examples(["a good film", "good fun", "a bad film", "good good"] * 5, [1, 1, 0, 1] * 5)
    test = examples(["good", "bad", "bad film"], [1, 0, 0])
    task = Task("x", ("bad", "good"), train, test, test, ("accuracy", "macro_f1"))
    assert majority_baseline(task) == {"accuracy": pytest.approx(1 / 3), "macro_f1": pytest.approx(0.25)}
    assert tfidf_baseline(task) == {"accuracy": 1.0, "macro_f1": 1.0}


def test_baselines_of_numbers():
    train = examples(["good film", "bad film"] * 10, [4.5, 1.5] * 10)
    test = examples(["good", "bad", "film"], [5.0, 1.0, 3.0])
    task = Task("x", (), train, test, test, ("pearson", "spearman"))
    assert majority_baseline(task) == {"pearson": 0.0, "spearman": 0.0}
    assert tfidf_baseline(task)["spearman"] == pytest.approx(1.0)
