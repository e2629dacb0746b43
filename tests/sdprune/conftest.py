"""Tiny models, tokenizers and data: built here, from configurations and made-up words, without any download."""

import json
import random
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizerFast,
    DataCollatorWithPadding,
    TrainingArguments,
)

from sdprune.data.examples import EncodedExamples, Examples, encode
from tests.sdprune.architectures import architecture, make_architecture, make_dense

__all__ = ["architecture", "make_architecture", "make_dense"]  # fixtures

GOOD = ("great", "moving", "witty", "brilliant", "warm", "fresh")
BAD = ("dull", "awful", "bland", "tired", "clumsy", "stale")
PLAIN = ("the", "film", "plot", "and", "a", "story", "with", "cast", "scene", "it", "is", "was", "very")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def make_texts(count: int, seed: int = 0) -> tuple[list[str], list[int]]:
    """Return sentences whose label is whether their one telling word is good."""
    chooser = random.Random(seed)
    texts, labels = [], []
    for index in range(count):
        label = index % 2
        words = [chooser.choice(PLAIN) for _ in range(chooser.randint(3, 12))]
        words.insert(chooser.randrange(len(words)), chooser.choice(GOOD if label else BAD))
        texts.append(" ".join(words))
        labels.append(label)
    return texts, labels


def make_model(seed: int = 0, **changes: object) -> BertForSequenceClassification:
    """Return a random BERT of two layers; equal seeds give equal weights."""
    values = {
        "vocab_size": len(SPECIAL + GOOD + BAD + PLAIN),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 32,
    }
    torch.manual_seed(seed)
    return BertForSequenceClassification(BertConfig(**(values | changes))).eval()


@pytest.fixture
def unopposed(monkeypatch):
    """Runs without the times of ONNX Runtime, where that is installed: an export would take most of a tiny run."""
    from sdprune.runs import results

    monkeypatch.setattr(results, "opponent_speedups", lambda model, inputs: {})


@pytest.fixture
def model() -> BertForSequenceClassification:
    return make_model()


@pytest.fixture(scope="session")
def model_factory():
    return make_model


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> BertTokenizerFast:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "vocab.txt").write_text("\n".join(SPECIAL + GOOD + BAD + PLAIN) + "\n")
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    BertTokenizerFast(vocab=str(folder / "vocab.txt"), model_max_length=32).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def dataset_factory(tokenizer: BertTokenizerFast):
    def make(count: int, seed: int = 0) -> EncodedExamples:
        texts, labels = make_texts(count, seed)
        return encode(Examples(tuple((text,) for text in texts), tuple(labels)), tokenizer, 32)

    return make


@pytest.fixture
def batch(dataset_factory, tokenizer: BertTokenizerFast) -> dict[str, torch.Tensor]:
    rows = dataset_factory(16, seed=5)
    return dict(DataCollatorWithPadding(tokenizer)([rows[index] for index in range(len(rows))]))


@pytest.fixture
def arguments(tmp_path: Path):
    """Return a maker of TrainingArguments for a few steps on the CPU."""

    def make(**changes: object) -> TrainingArguments:
        values = {
            "output_dir": str(tmp_path / "run"),
            "max_steps": 8,
            "per_device_train_batch_size": 8,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
            "logging_steps": 2,
            "save_strategy": "no",
            "report_to": "none",
            "seed": 3,
            "use_cpu": True,
            "dataloader_pin_memory": False,
            "disable_tqdm": True,
        }
        return TrainingArguments(**(values | changes))

    return make


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: BertTokenizerFast) -> Path:
    """Return a folder with a tiny classifier and its tokenizer, as save_pretrained writes them."""
    folder = tmp_path_factory.mktemp("model")
    make_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def csv_writer():
    def write(path: Path, count: int) -> Path:
        texts, labels = make_texts(count)
        rows = [f"{text},{'good' if label else 'bad'}" for text, label in zip(texts, labels, strict=True)]
        path.write_text("\n".join(["text,label", *rows]) + "\n")
        return path

    return write


@pytest.fixture(scope="session")
def csv_file(tmp_path_factory: pytest.TempPathFactory, csv_writer) -> Path:
    """Return a CSV file of 160 labelled sentences."""
    return csv_writer(tmp_path_factory.mktemp("data") / "reviews.csv", 160)
