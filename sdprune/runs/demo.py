"""`sdprune demo`: a real model on real text, pruned with and without its unpruned copy as a teacher.

It fine-tunes all-MiniLM-L6-v2 on movie reviews (kept in the cache for the next time), then trains three times
with the same steps, learning rate and seed: SDP-CC, magnitude alone, and the dense model. The two pruned runs
are exported and tested at 50, 70 and 80 %, each after an equal number of recovery steps.
"""

import hashlib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed

from sdprune.config import SDPruneConfig
from sdprune.data.metrics import Array, compute, paired_bootstrap_standard_error
from sdprune.data.tasks import Task
from sdprune.exports.export import export
from sdprune.masking.schedule import pruning_moments, sparsity_levels
from sdprune.recipe import DataConfig, Recipe, TrainingConfig
from sdprune.runs.pipelines import carry_out
from sdprune.runs.results import BUNDLED_ID, Assessment, Results
from sdprune.runs.workbench import BUNDLED_MODEL, load_workbench
from sdprune.samples.archive import cache_directory
from sdprune.training.arguments import settled
from sdprune.training.folder import check_free

SNAPSHOTS = (0.5, 0.7, 0.8)
LEVELS = 8  # 10 %, 20 %, ... 80 %


@dataclass(frozen=True)
class DemoSize:
    """How much of everything the demo takes.

    Args:
        data: the rows.
        fine_tuning: training of the dense model.
        recovery_steps: optimizer steps after each of the pruning steps.
    """

    data: DataConfig
    fine_tuning: TrainingConfig
    recovery_steps: int

    @property
    def training(self) -> TrainingConfig:
        """The training that all compared runs share; the learning rate restarts with every pruning step."""
        return TrainingConfig(
            max_steps=LEVELS * self.recovery_steps,
            learning_rate=1e-4,
            lr_scheduler_type="cosine_with_restarts",
            lr_cycles=LEVELS,
            warmup_steps=0,
            freeze_embeddings=True,
            logging_steps=5,
            eval_steps=self.recovery_steps,
        )


FULL = DemoSize(
    data=DataConfig(max_length=64),
    fine_tuning=TrainingConfig(num_train_epochs=1.0, learning_rate=8e-5, eval_steps=90, warmup_steps=20),
    recovery_steps=26,
)
QUICK = DemoSize(
    data=DataConfig(max_length=32, max_train_samples=1000, max_eval_samples=400),
    fine_tuning=TrainingConfig(num_train_epochs=1.0, learning_rate=1e-4, eval_steps=25, warmup_steps=5),
    recovery_steps=3,
)

SDP_CC = SDPruneConfig(
    target_sparsity=SNAPSHOTS[-1],
    schedule="uniform",
    pruning_steps=LEVELS,
    end_ratio=1.0 - 1.0 / LEVELS,
    distillation="cross_correlation",
    distillation_weight=5.0,
    correlation_target="teacher",
)


class _TakeSnapshots(TrainerCallback):
    """Has the model assessed at the wanted sparsities, at the end of the recovery that follows each."""

    def __init__(self, recipe: Recipe, folder: Path, results: Results) -> None:
        self.recipe, self.folder, self.results = recipe, folder, results
        self.taken: list[Assessment] = []

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        config = self.recipe.pruning
        ends = (*pruning_moments(config, state.max_steps)[1:], state.max_steps)
        if state.global_step not in ends:
            return
        level = sparsity_levels(config)[ends.index(state.global_step)]
        for wanted in SNAPSHOTS:
            if abs(level - wanted) < 1e-9:
                reached = replace(config, target_sparsity=wanted)
                folder = self.folder / f"sparsity-{round(100 * wanted)}"
                self.taken.append(self.results.add(kwargs["model"], reached, self.recipe, folder))


def demo(output: Path, *, quick: bool = False, cache: Path | None = None) -> dict[str, Any]:
    """Run the demo and return what `metrics.json` holds.

    Args:
        output: a new folder for `metrics.json`, `report.html`, the pruned models and the logs.
        quick: a smoke test on a small part of the data; its scores mean little.
        cache: where the samples and the fine-tuned model are kept; None: the user's cache folder.

    Raises:
        ValueError: `output` holds something.
        SampleUnavailable: the model or the text cannot be fetched.
    """
    check_free(output, output=True)
    size = QUICK if quick else FULL
    training = settled(size.training)
    bf16 = bool(training.bf16)
    dense_folder = fine_tuned(size, bf16, cache)
    workbench = load_workbench(str(dense_folder), size.data, cache)
    task, dense = workbench.task, workbench.classifier.model
    scores = workbench.score(workbench.predict(dense, "testing dense", bf16=bf16))
    base_model = f"{BUNDLED_ID}, fine-tuned on {size.data.data}"
    results = Results(workbench, dense, scores, bf16=bf16, base_model=base_model)
    magnitude = replace(SDP_CC, distillation=None)
    assessments = {}
    for name, config in (
        ("SDP-CC", SDP_CC),
        ("magnitude", magnitude),
        ("dense, same steps", replace(magnitude, target_sparsity=0.0)),
    ):
        folder = output / name.replace(", ", "-").replace(" ", "-").lower()
        recipe = Recipe(str(dense_folder), size.data, training, config)
        snapshots = _TakeSnapshots(recipe, folder, results)
        (outcome,) = carry_out(workbench.renewed(), recipe, folder, [snapshots], save_strategy="no")
        if config.target_sparsity:
            assessments[name] = snapshots.taken
        else:
            logits = workbench.predict(outcome.model, "testing dense", bf16=bf16)
            results.metrics["dense_same_steps"] = workbench.score(logits)
        results.record(name, folder, config, snapshots.taken[-1].sparsity if snapshots.taken else None)
    results.metrics["baselines"] = {"majority": majority_baseline(task), "tfidf": tfidf_baseline(task)}
    _compare(assessments, np.asarray(task.test.labels))
    return results.write(output, title="MiniLM pruned on movie reviews", notes=_notes(size, quick, results.metrics))


def fine_tuned(size: DemoSize, bf16: bool, cache: Path | None = None) -> Path:
    """Return the folder of the fine-tuned dense model, made the first time and kept in the cache."""
    unpruned = SDPruneConfig(target_sparsity=0.0, distillation=None, pruning_steps=1)
    recipe = Recipe(BUNDLED_MODEL, size.data, replace(size.fine_tuning, bf16=bf16), unpruned)
    key = hashlib.sha256(json.dumps(recipe.to_dict(), sort_keys=True).encode()).hexdigest()[:16]
    folder = (cache or cache_directory()) / f"demo-{key}"
    if not folder.exists():
        set_seed(unpruned.seed)  # the head is made at random
        workbench = load_workbench(BUNDLED_MODEL, size.data, cache)
        with tempfile.TemporaryDirectory() as temporary:
            (outcome,) = carry_out(workbench, recipe, Path(temporary, "run"), save_strategy="no")
            export(outcome.model, folder, processing_class=workbench.classifier.tokenizer)
    return folder


def _compare(assessments: dict[str, list[Assessment]], labels: NDArray[Any]) -> None:
    """Put standard errors into the rows, and the difference to magnitude alone on the same test rows."""
    for name, found in assessments.items():
        for own, other in zip(found, assessments["magnitude"], strict=True):
            correct, plain = (item.logits.argmax(1) == labels for item in (own, other))
            own.row["standard_error"] = float(correct.std() / len(correct) ** 0.5)
            if name != "magnitude":
                own.row["difference_to_magnitude"] = float(correct.mean() - plain.mean())
                own.row["paired_standard_error"] = paired_bootstrap_standard_error(correct, plain)


def _notes(size: DemoSize, quick: bool, metrics: Mapping[str, Any]) -> list[str]:
    speedups = sorted(row["speedup"] for row in metrics["runs"])
    smoke = ["This was a smoke test on a small part of the data: it shows that everything runs, not how well."]
    return (smoke if quick else []) + [
        f"Model: all-MiniLM-L6-v2; text: movie-review snippets, split by movie. {size.recovery_steps} optimizer steps "
        "follow each pruning step in both pruned runs, and the dense model was trained for as many steps in all.",
        "One seed. The standard error of a test accuracy is about 0.7 points on the full test split; the paired "
        "one in metrics.json tells whether two runs differ on the same rows.",
        "Zeros alone do not speed up a dense product: as dense weights the pruned models take as long as before; "
        f"speed-ups from {speedups[0]:.2f} to {speedups[-1]:.2f} were measured.",
    ]


def majority_baseline(task: Task) -> dict[str, float]:
    """Return the scores on the test rows of always giving the commonest training label, or the mean."""
    labels = np.asarray(task.train.labels)
    guess = np.bincount(labels).argmax() if task.label_names else labels.mean()
    return _score(task, np.full(len(task.test), guess))


def tfidf_baseline(task: Task) -> dict[str, float]:
    """Return the scores on the test rows of a linear model of TF-IDF features of words and pairs of words.

    It is a logistic regression, or a ridge regression where numbers are predicted. Two texts of a row are
    joined. C=10 is better than the default on the validation rows of the movie reviews, a fairer rival.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.pipeline import make_pipeline

    classifier = LogisticRegression(C=10.0, max_iter=1000) if task.label_names else Ridge()
    model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2)), classifier)
    model.fit([" ".join(texts) for texts in task.train.texts], task.train.labels)
    return _score(task, model.predict([" ".join(texts) for texts in task.test.texts]))


def _score(task: Task, predictions: Array) -> dict[str, float]:
    logits = np.eye(len(task.label_names))[predictions] if task.label_names else predictions
    return compute(task.metrics, logits, np.asarray(task.test.labels), task.test.queries)
