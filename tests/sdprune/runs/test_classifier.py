"""Loading a classifier: heads, classes, label names, and predictions in the order of the data."""

import copy
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2Model, GPT2TokenizerFast

from sdprune.data.examples import Examples, encode
from sdprune.data.tasks import Task
from sdprune.runs.classifier import align_labels, load_classifier
from sdprune.runs.predict import Batches, best_device, predict, speedup


def make_task(*names: str) -> Task:
    examples = Examples((("a film",), ("the plot",), ("a story",)), (0, 1, 1))
    return Task("own", names, examples, examples, examples, ("accuracy",))


def test_a_torch_built_for_a_gpu_that_is_not_there_runs_on_the_cpu(monkeypatch):
    def current_accelerator(check_available=False):
        return None if check_available else torch.device("cuda")

    monkeypatch.setattr(torch.accelerator, "current_accelerator", current_accelerator)
    assert best_device() == torch.device("cpu")


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


def test_token_classifiers_may_know_more_tags(model_factory, tokenizer, tmp_path):
    rows = Examples((("a", "film"), ("plot",)), ((0, 1), (1,)))
    task = Task("own", ("B-LOC", "O"), rows, rows, rows, ("span_f1",), {"fr": rows})
    model_factory().bert.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    classifier = load_classifier(str(tmp_path), task)
    assert not classifier.trained_head
    assert type(classifier.model).__name__ == "BertForTokenClassification"
    assert classifier.model.config.id2label == {0: "B-LOC", 1: "O"}
    names = ("O", "B-PER", "B-LOC")
    config = classifier.model.config
    config.num_labels, config.id2label = 3, dict(enumerate(names))
    type(classifier.model)(config).save_pretrained(tmp_path)
    classifier = load_classifier(str(tmp_path), task)
    assert classifier.trained_head
    aligned = align_labels(task, classifier.model)
    assert aligned.label_names == names
    assert aligned.train.labels == aligned.zero_shot["fr"].labels == ((2, 0), (0,))
    with pytest.raises(ValueError, match="the labels of 'own' are b-date, o, those of the model are o, b-per, b-loc"):
        align_labels(replace(task, label_names=("B-DATE", "O")), classifier.model)
    with pytest.raises(ValueError, match="has 3 classes, but the labels of 'own' are a, b, c, d: 4 expected"):
        load_classifier(str(tmp_path), replace(task, label_names=("a", "b", "c", "d")))


def test_byte_level_tokenizers_see_a_space_before_every_word(tmp_path):
    vocabulary = {token: index for index, token in enumerate(("<|endoftext|>", "a", "b", "Ġ", "Ġa", "Ġb"))}
    config = GPT2Config(vocab_size=6, n_embd=8, n_layer=1, n_head=1, n_positions=16, bos_token_id=0, eos_token_id=0)
    GPT2Model(config).save_pretrained(tmp_path)
    GPT2TokenizerFast(vocab=vocabulary, merges=[("Ġ", "a"), ("Ġ", "b")]).save_pretrained(tmp_path)
    rows = Examples((("a", "b"),), ((0, 1),))
    classifier = load_classifier(str(tmp_path), Task("own", ("x", "y"), rows, rows, rows, ("accuracy",)))
    assert classifier.tokenizer(["a", "b"], is_split_into_words=True).tokens() == ["Ġa", "Ġb"]
    texts = make_task("x", "y")
    assert load_classifier(str(tmp_path), texts).tokenizer("a b").tokens() == ["a", "Ġb"]


@pytest.mark.parametrize("side", ["right", "left"])
def test_predictions_of_tokens(tokenizer, side):
    """In the order of the rows, without their padding, which may stand on either side."""
    rows = encode(Examples((("a", "film"), ("the", "dull", "plot"), ("it",)), ((0, 1), (1, 0, 0), (1,))), tokenizer, 32)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = side
    logits = predict(Echo(), Batches.of(rows, tokenizer, 2))
    assert logits.shape == (3, 5, 2)
    for row, ids in zip(logits, rows.columns["input_ids"], strict=True):
        assert row[:, 0].tolist() == ids + [0] * (5 - len(ids))


class Echo(torch.nn.Module):
    """A token classifier whose logits are the numbers of the tokens."""

    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def forward(self, input_ids, **inputs):
        return SimpleNamespace(logits=torch.stack([input_ids, -input_ids], dim=-1))


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
    logits = predict(model, Batches.of(rows, tokenizer, 8))
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
