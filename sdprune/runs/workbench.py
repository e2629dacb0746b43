"""A classifier and the encoded splits of its task: what a run is trained and measured on."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import DataCollatorForTokenClassification

from sdprune.data.examples import IGNORED_LABEL, EncodedExamples, Examples, encode
from sdprune.data.metrics import compute
from sdprune.data.tasks import MULTILINGUAL_REVIEWS, Task, load_task
from sdprune.recipe import DataConfig
from sdprune.runs.classifier import Classifier, align_labels, load_classifier, model_target
from sdprune.runs.predict import Batches, collate, padded, predict
from sdprune.samples.english import sample_model
from sdprune.samples.multilingual import multilingual_model

BUNDLED_MODEL = "bundled-minilm"
BUNDLED_MULTILINGUAL = "bundled-multilingual"
PROBE_ROWS = 32
TRAINED = ""  # the language that is trained on, among those that are tested


@dataclass(frozen=True)
class Workbench:
    """What a run is trained and measured on.

    Args:
        task: the labelled text.
        source: folder or hub id of the model.
        classifier: the model and its tokenizer.
        max_length: longest input in tokens.
        batch_size: rows of a test batch.
        trust_remote_code: whether code that the model brings along may run.
    """

    task: Task
    source: str
    classifier: Classifier
    max_length: int
    batch_size: int = 64
    trust_remote_code: bool = False

    @cached_property
    def train(self) -> EncodedExamples:
        """Encoded training rows."""
        return self._encoded(self.task.train)

    @cached_property
    def validation(self) -> EncodedExamples:
        """Encoded validation rows."""
        return self._encoded(self.task.validation)

    @cached_property
    def tested(self) -> dict[str, EncodedExamples]:
        """Encoded test rows, under `TRAINED`, and those of the languages that are not trained on."""
        parts = {TRAINED: self.task.test, **self.task.zero_shot}
        return {name: self._encoded(part) for name, part in parts.items()}

    @cached_property
    def batches(self) -> dict[str, Batches]:
        """The test rows in batches, by the same names."""
        tokenizer = self.classifier.tokenizer
        return {name: Batches.of(rows, tokenizer, self.batch_size) for name, rows in self.tested.items()}

    def renewed(self) -> Self:
        """Return a workbench with the model as it was loaded, untouched by any training."""
        trusted = self.trust_remote_code
        return replace(self, classifier=load_classifier(self.source, self.task, trust_remote_code=trusted))

    def predict(
        self, model: nn.Module, description: str, *, bf16: bool = False, languages: bool = True
    ) -> dict[str, NDArray[np.float32]]:
        """Return the logits of a model on the test rows, by the names of `tested`, with a progress bar."""
        return {
            name: predict(model, batches, bf16=bf16, description=f"{description} {name}".strip())
            for name, batches in self.batches.items()
            if languages or name == TRAINED
        }

    def gathered(self, outputs: Iterable[Tensor]) -> dict[str, NDArray[np.float32]]:
        """Return the logits of all `batches`, one after the other, as `predict` does."""
        following = iter(outputs)
        return {name: part.in_order(islice(following, len(part.rows))) for name, part in self.batches.items()}

    def _encoded(self, part: Examples) -> EncodedExamples:
        return encode(part, self.classifier.tokenizer, self.max_length, num_labels=self.task.num_labels)

    @property
    def collator(self) -> Any:
        """What makes a training batch of rows; None: the Trainer's own choice for the tokenizer."""
        return DataCollatorForTokenClassification(self.classifier.tokenizer) if self.task.tagged else None

    @property
    def probe(self) -> dict[str, Tensor]:
        """One batch of test rows, to time models and to compare their logits to the bit."""
        rows = [self.tested[TRAINED][index] for index in range(min(PROBE_ROWS, len(self.tested[TRAINED])))]
        return collate(self.classifier.tokenizer, rows)

    def score(self, logits: Mapping[str, NDArray[np.float32]]) -> dict[str, float]:
        """Return the task's metrics of test logits."""
        return self._score(logits[TRAINED], self.tested[TRAINED], self.task.test)

    def score_languages(self, logits: Mapping[str, NDArray[np.float32]]) -> dict[str, dict[str, float]]:
        """Return the metrics of every language that is not trained on; empty where the task has none."""
        rows = self.task.zero_shot
        return {name: self._score(logits[name], self.tested[name], part) for name, part in rows.items()}

    def _score(self, logits: NDArray[np.float32], rows: EncodedExamples, part: Examples) -> dict[str, float]:
        labels: Any = padded(cast(Any, rows.labels), IGNORED_LABEL) if part.tagged else rows.labels
        return compute(self.task.metrics, logits, labels, part.queries, self.task.label_names)

    def compute_metrics(self, prediction: Any) -> dict[str, float]:
        """Return the task's metrics of what the Trainer predicted."""
        queries = self.task.validation.queries  # evaluation keeps the order of the rows
        return compute(self.task.metrics, prediction.predictions, prediction.label_ids, queries, self.task.label_names)


def load_workbench(
    model: str,
    data: DataConfig,
    cache: Path | None = None,
    batch_size: int = 64,
    *,
    trust_remote_code: bool = False,
    scored: bool = False,
) -> Workbench:
    """Load a model and its data.

    Args:
        model: folder, hub id, "bundled-minilm": all-MiniLM-L6-v2 from the package index, without a head, or
            "bundled-multilingual": multilingual-e5-small, dequantised from 4 bit, its vocabulary cut down to the
            multilingual reviews.
        data: the labelled text.
        cache: where fetched samples are kept; None: the user's cache folder.
        batch_size: rows of a test batch.
        trust_remote_code: whether code that the model brings along may run.
        scored: whether rows are only scored, and the model does not train on them.
    """
    source = _bundled(model, cache) or model
    target = model_target(source, data.label_type, trust_remote_code=trust_remote_code)
    task = load_task(data, cache=cache, target=replace(target, scored=scored))
    classifier = load_classifier(source, task, trust_remote_code=trust_remote_code, scored=scored)
    if classifier.trained_head:
        task = align_labels(task, classifier.model)
    # encode knows the tokenizer's own limit, not the model's
    longest = min(data.max_length, getattr(classifier.model.config, "max_position_embeddings", data.max_length))
    return Workbench(task, source, classifier, longest, batch_size, trust_remote_code)


def _bundled(model: str, cache: Path | None) -> str | None:
    if model == BUNDLED_MODEL:
        return str(sample_model(cache))
    if model != BUNDLED_MULTILINGUAL:
        return None
    # the vocabulary must not depend on how much of the data a run takes
    whole = load_task(DataConfig(data=MULTILINGUAL_REVIEWS), cache=cache)
    parts = (whole.train, whole.validation, whole.test, *whole.zero_shot.values())
    return str(multilingual_model((text for part in parts for texts in part.texts for text in texts), cache))
