"""Loading a classifier: heads, classes, label names, and predictions in the order of the data."""

import time

import numpy as np
import pytest
import torch

from sdprune.data.examples import Examples
from sdprune.data.tasks import Task
from sdprune.pipelines.evaluate import predict, speedup
from sdprune.pipelines.models import align_labels, load_classifier


def make_task(*names: str) -> Task:
    examples = Examples((("a film",), ("the plot",), ("a story",)), (0, 1, 1))
    return Task("own", names, examples, examples, examples, ("accuracy",))


def test_a_trained_head_is_kept(model_folder):
    classifier = load_classifier(str(model_folder), make_task("bad", "good"))
    assert classifier.trained_head
    again = load_classifier(str(model_folder), make_task("bad", "good"))
    assert torch.equal(classifier.model.classifier.weight, again.model.classifier.weight)


def test_half_precision_weights_train_in_full(model_factory, tokenizer, tmp_path):
    model_factory().half().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert load_classifier(str(tmp_path), make_task("a", "b")).model.dtype is torch.float32


def test_a_missing_head_is_made_for_the_task(model_factory, tokenizer, tmp_path):
    model_factory().bert.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    classifier = load_classifier(str(tmp_path), make_task("bad", "fine", "good"))
    assert not classifier.trained_head
    assert classifier.model.config.id2label == {0: "bad", 1: "fine", 2: "good"}
    assert load_classifier(str(tmp_path), make_task()).model.config.num_labels == 1  # regression


def test_other_classes_are_refused(model_folder):
    with pytest.raises(ValueError, match="has 2 classes, but the labels of 'own' are a, b, c: 3 expected"):
        load_classifier(str(model_folder), make_task("a", "b", "c"))


def test_labels_follow_the_names_of_the_model(model):
    model.config.id2label = {0: "Good", 1: "Bad"}
    task = align_labels(make_task("bad", "good"), model)
    assert task.label_names == ("good", "bad")
    assert task.train.labels == task.test.labels == (1, 0, 0)
    with pytest.raises(ValueError, match="the labels of 'own' are neg, pos, those of the model are good, bad; rename"):
        align_labels(make_task("neg", "pos"), model)
    assert align_labels(make_task("0", "1"), model) == make_task("0", "1")
    model.config.id2label = {0: "LABEL_0", 1: "LABEL_1"}
    assert align_labels(make_task("bad", "good"), model) == make_task("bad", "good")


def test_predictions_are_in_the_order_of_the_rows(model, dataset_factory, tokenizer):
    rows = dataset_factory(37)
    model.train()
    logits = predict(model, rows, tokenizer, batch_size=8)
    assert model.training
    assert logits.shape == (37, 2)
    assert logits.dtype == np.float32
    model.eval()
    for index in (0, 5, 36):
        with torch.inference_mode():
            inputs = {key: torch.tensor([value]) for key, value in rows[index].items() if key != "labels"}
            torch.testing.assert_close(torch.tensor(logits[index]), model(**inputs).logits[0], rtol=1e-4, atol=1e-5)


def test_speedup_compares_medians(model, model_factory, batch):
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    slow = model_factory().eval()
    slow.register_forward_pre_hook(lambda *_: time.sleep(0.2))
    assert speedup(slow, model, inputs) > 1.5 > 1.0 / 1.5 > speedup(model, slow, inputs)
