"""A classifier and the encoded splits of its task: what a run is trained and measured on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from sdprune.data.examples import EncodedExamples, encode
from sdprune.data.metrics import compute
from sdprune.data.sample import sample_model
from sdprune.data.tasks import Task, load_task
from sdprune.pipelines.evaluate import collate, predict
from sdprune.pipelines.models import Classifier, align_labels, load_classifier
from sdprune.recipe import DataConfig

BUNDLED_MODEL = "bundled-minilm"
PROBE_ROWS = 32


@dataclass(frozen=True)
class Workbench:
    """What a run is trained and measured on.

    Args:
        task: the labelled text.
        source: folder or hub id of the model.
        classifier: the model and its tokenizer.
        max_length: longest input in tokens.
        batch_size: rows of a test batch.
    """

    task: Task
    source: str
    classifier: Classifier
    max_length: int
    batch_size: int = 64

    @cached_property
    def train(self) -> EncodedExamples:
        """Encoded training rows."""
        return encode(self.task.train, self.classifier.tokenizer, self.max_length)

    @cached_property
    def validation(self) -> EncodedExamples:
        """Encoded validation rows."""
        return encode(self.task.validation, self.classifier.tokenizer, self.max_length)

    @cached_property
    def test(self) -> EncodedExamples:
        """Encoded test rows."""
        return encode(self.task.test, self.classifier.tokenizer, self.max_length)

    def renewed(self) -> Workbench:
        """Return a workbench with the model as it was loaded, untouched by any training."""
        return replace(self, classifier=load_classifier(self.source, self.task))

    def predict_test(self, model: nn.Module, description: str, *, bf16: bool = False) -> NDArray[np.float32]:
        """Return the logits (rows, classes) of a model on the test rows, with a progress bar."""
        tokenizer, size = self.classifier.tokenizer, self.batch_size
        return predict(model, self.test, tokenizer, batch_size=size, bf16=bf16, description=description)

    @property
    def collator(self) -> Any:
        """What makes a training batch of rows; None: the Trainer's own choice for the tokenizer."""
        return None

    @property
    def probe(self) -> dict[str, Tensor]:
        """One batch of test rows, to time models and to compare their logits to the bit."""
        rows = [self.test[index] for index in range(min(PROBE_ROWS, len(self.test)))]
        return collate(self.classifier.tokenizer, rows)

    def score(self, logits: NDArray[np.float32]) -> dict[str, float]:
        """Return the task's metrics of test logits."""
        return compute(self.task.metrics, logits, self.task.test.labels)

    def compute_metrics(self, prediction: Any) -> dict[str, float]:
        """Return the task's metrics of what the Trainer predicted."""
        return compute(self.task.metrics, prediction.predictions, prediction.label_ids)


def load_workbench(model: str, data: DataConfig, cache: Path | None = None, batch_size: int = 64) -> Workbench:
    """Load a model and its data.

    Args:
        model: folder, hub id, or "bundled-minilm": all-MiniLM-L6-v2 from the package index, without a head.
        data: the labelled text.
        cache: where fetched samples are kept; None: the user's cache folder.
        batch_size: rows of a test batch.
    """
    task = load_task(data, cache=cache)
    source = str(sample_model(cache)) if model == BUNDLED_MODEL else model
    classifier = load_classifier(source, task)
    if classifier.trained_head:
        task = align_labels(task, classifier.model)
    # encode knows the tokenizer's own limit, not the model's
    longest = min(data.max_length, getattr(classifier.model.config, "max_position_embeddings", data.max_length))
    return Workbench(task, source, classifier, longest, batch_size)
