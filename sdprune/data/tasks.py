"""What a run trains and tests on: reviews out of packages, a GLUE or XGLUE task, or the user's own files."""

import bz2
import csv
import difflib
import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Self

from sdprune.data.examples import EncodedExamples, Examples, encode
from sdprune.data.formats import FORMATS
from sdprune.data.labels import CLASSES, NUMBER, Target
from sdprune.data.metrics import is_span_scheme
from sdprune.data.splits import split_grouped, split_stratified, stratified_order
from sdprune.data.tables import Table, read_table
from sdprune.data.xglue import XGLUE, load_parts, load_xglue
from sdprune.recipe import DataConfig
from sdprune.samples.english import sample_reviews
from sdprune.samples.multilingual import foreign_reviews

__all__ = ["TASKS", "EncodedExamples", "Examples", "Task", "encode", "load_task"]

TEST_FRACTION = 0.25
VALIDATION_FRACTION = 0.1
MIN_ROWS = 8
MOVIE_REVIEWS = "movie-reviews"
MULTILINGUAL_REVIEWS = "multilingual-reviews"
CLASSIFICATION_METRICS = ("accuracy", "macro_f1")
REGRESSION_METRICS = ("pearson", "spearman")
SPAN_METRICS = ("span_f1", "accuracy")
LISTED_METRICS = ("micro_f1", "macro_f1")

logger = logging.getLogger(__name__)


class _GlueTask(NamedTuple):
    """Columns, names of the labels in the data set's own order, metrics and the labelled rows to test on."""

    text_columns: tuple[str, ...]
    label_names: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    test: str = "validation"  # the labels of GLUE's own test rows are hidden


_SENTENCES = ("sentence1", "sentence2")
_GLUE = {
    "cola": _GlueTask(("sentence",), ("unacceptable", "acceptable"), ("matthews", "accuracy")),
    "sst2": _GlueTask(("sentence",), ("negative", "positive")),
    "mrpc": _GlueTask(_SENTENCES, ("not_equivalent", "equivalent"), ("accuracy", "f1")),
    "qqp": _GlueTask(("question1", "question2"), ("not_duplicate", "duplicate"), ("accuracy", "f1")),
    "stsb": _GlueTask(_SENTENCES, (), REGRESSION_METRICS),
    "mnli": _GlueTask(("premise", "hypothesis"), ("entailment", "neutral", "contradiction"), test="validation_matched"),
    "qnli": _GlueTask(("question", "sentence"), ("entailment", "not_entailment")),
    "rte": _GlueTask(_SENTENCES, ("entailment", "not_entailment")),
    "wnli": _GlueTask(_SENTENCES, ("not_entailment", "entailment")),
}
_OF_FILES = ("validation_data", "test_data", "text_pair_column", "group_column", "label_type", "label_separator")
TASKS = (MOVIE_REVIEWS, MULTILINGUAL_REVIEWS, *_GLUE, *XGLUE)


@dataclass(frozen=True)
class Task:
    """Labelled text in three parts. Where words have the labels (`tagged`), the classes are those of words; where a row
    may have several (`listed`), each is told by itself.

    Args:
        name: name of the task, or the file of its training rows.
        label_names: name of every class, in the order of the indices; empty where numbers are predicted.
        train: rows to train on.
        validation: rows to choose settings with.
        test: rows to report.
        metrics: names of what is reported (`sdprune.data.metrics.compute`), the most important one first.
        zero_shot: rows to report in languages that are not trained on, by language.
    """

    name: str
    label_names: tuple[str, ...]
    train: Examples
    validation: Examples
    test: Examples
    metrics: tuple[str, ...]
    zero_shot: Mapping[str, Examples] = field(default_factory=dict)

    def map(self, change: Callable[[Examples], Examples]) -> Self:
        """Return the task with all of its parts changed."""
        return replace(
            self,
            train=change(self.train),
            validation=change(self.validation),
            test=change(self.test),
            zero_shot={language: change(examples) for language, examples in self.zero_shot.items()},
        )

    @property
    def tagged(self) -> bool:
        """Whether every word has a label, and not every row."""
        return self.train.tagged

    @property
    def listed(self) -> bool:
        """Whether a row has any number of classes, and not one."""
        return self.train.listed

    @property
    def num_labels(self) -> int:
        """Outputs that a model of the task has."""
        return len(self.label_names) or 1


def load_task(config: DataConfig, *, cache: Path | None = None, target: Target | None = None) -> Task:
    """Load the data that `config` names. The same configuration always gives the same rows.

    Movie reviews: a quarter of the movies is held out for the test, a tenth of the others for validation. The
    multilingual reviews are the same, and test rows in French, Dutch, German and Chinese.
    GLUE: tested on its validation rows, as the labels of its test rows are hidden; validation is a tenth of
    the training rows.
    XGLUE: trained, validated and tested on English; the test rows of the other languages are reported apart.
    Files: parts without a file of their own are held out of the training rows: whole groups if there are
    groups, with equal class balance otherwise. What labels are, `target` says, or they themselves: lists are several
    classes a row, numbers that are not all whole are predicted as numbers; the log tells which, and why. Where the
    text column holds lists of words, every word has a label: tags such as "B-PER" and "O" are scored by the spans they
    mark.

    Args:
        config: the names of the data and its columns.
        cache: folder that keeps the movie reviews; None: the user's cache.
        target: what the labels of files are taken for; None: `config.label_type`, or as they suggest themselves.

    Raises:
        ValueError: the configuration or the rows are unusable; the message is one line that says which.
        OSError: the reviews or a GLUE or XGLUE task could not be fetched.
    """
    if config.data in TASKS:
        for name in _OF_FILES:
            if getattr(config, name) is not None:
                raise ValueError(f"{name} belongs to data in files, but data is the task {config.data!r}")
        if config.data == MOVIE_REVIEWS:
            return _limited(_movie_reviews(config.split_seed, sample_reviews(cache)), config)
        if config.data == MULTILINGUAL_REVIEWS:
            english = _movie_reviews(config.split_seed, sample_reviews(cache))
            reviews = replace(english, name=MULTILINGUAL_REVIEWS, label_names=("negative", "positive"))
            foreign = {language: _examples(found) for language, found in foreign_reviews(cache).items()}
            return _limited(replace(reviews, zero_shot=foreign), config)
        load = _load_xglue if config.data in XGLUE else _load_glue
        return _limited(load(config.data, config.split_seed), config)
    path = Path(config.data)
    if not path.is_file() and path.suffix.lower() not in FORMATS:
        near = difflib.get_close_matches(config.data.lower(), TASKS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(
            f"data {config.data!r} is neither a task nor a file{hint} "
            f"Tasks: {', '.join(TASKS)}; files: {', '.join(FORMATS)}"
        )
    target = target or Target(config.label_type, f"label_type={config.label_type!r}")
    return _limited(_load_files(config, target), config)


def _movie_reviews(seed: int, path: Path) -> Task:
    reviews: dict[str, tuple[str, int]] = {}
    with bz2.open(path, "rt", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["category"] != "plot":
                text = " ".join(row["text"].split())
                reviews.setdefault(text, (row["movie_name"], int(row["category"] == "fresh")))
    movies = [movie for movie, _ in reviews.values()]
    examples = _examples({text: label for text, (_, label) in reviews.items()})
    split = split_grouped(movies, validation=VALIDATION_FRACTION, test=TEST_FRACTION, seed=seed)
    train, validation, test = map(examples.select, split)
    return Task(MOVIE_REVIEWS, ("rotten", "fresh"), train, validation, test, CLASSIFICATION_METRICS)


def _examples(labels: Mapping[str, int]) -> Examples:
    return Examples(tuple((text,) for text in labels), tuple(labels.values()))


def _load_glue(name: str, seed: int, repository: str = "nyu-mll/glue") -> Task:
    task = _GLUE[name]
    parts = load_parts("GLUE", name, repository, ["train", task.test])
    train, test = (
        Examples(tuple(zip(*(part[column] for column in task.text_columns), strict=True)), tuple(part["label"]))
        for part in parts
    )
    split = split_stratified(_strata(train), validation=VALIDATION_FRACTION, test=0.0, seed=seed)
    return Task(name, task.label_names, train.select(split.train), train.select(split.validation), test, task.metrics)


def _load_xglue(name: str, seed: int) -> Task:
    task, parts = XGLUE[name], load_xglue(name)
    return Task(name, task.label_names, parts.train, parts.validation, parts.test, task.metrics, parts.zero_shot)


def _load_files(config: DataConfig, target: Target) -> Task:
    table = read_table(Path(config.data), config, grouped=True)
    if len(table.texts) < MIN_ROWS:
        raise ValueError(f"{table.path} has {len(table.texts)} rows; at least {MIN_ROWS} are needed")
    files = {"validation": config.validation_data, "test": config.test_data}
    others = {part: _read_part(Path(file), config, table) for part, file in files.items() if file}
    target = table.decided(target)
    label_type = str(target.label_type)
    known = {name for other in others.values() for name in other.names if target.trained}
    names = table.class_names(label_type, known, scored=target.scored)
    _tell(table, label_type, names, target)
    rows = table.examples(label_type, names, target.reason)
    parts = _split(rows, table.groups, {part: part not in others for part in files}, config.split_seed)
    parts |= {part: other.examples(label_type, names, target.reason) for part, other in others.items()}
    for part, examples in parts.items():
        if len(examples) == 0:
            raise ValueError(f"{table.path} has too few rows or groups: none is left for the {part} part")
        unseen = _classes(examples) - _classes(parts["train"])
        if unseen and names and not table.tagged:  # a rare tag may well be in no training row
            text = f"label {names[min(unseen)]!r} occurs in the {part} part, but in no training row"
            if not target.trained:
                raise ValueError(text)
            logger.info("%s", text)
    return Task(config.data, names, parts["train"], parts["validation"], parts["test"], _metrics(rows, names))


def _split(
    rows: Examples, groups: Sequence[str] | None, held_out: Mapping[str, bool], seed: int
) -> dict[str, Examples]:
    """Return the parts that the rows of one file make; those that are not held out stay empty."""
    validation = VALIDATION_FRACTION if held_out["validation"] else 0.0
    test = TEST_FRACTION if held_out["test"] else 0.0
    if groups is not None:
        split = split_grouped(groups, validation=validation, test=test, seed=seed)
    else:
        split = split_stratified(_strata(rows), validation=validation, test=test, seed=seed)
    return dict(zip(split._fields, map(rows.select, split), strict=True))


def _read_part(path: Path, config: DataConfig, trained: Table) -> Table:
    table = read_table(path, config, grouped=False)
    if table.tagged != trained.tagged:
        kinds = {True: "lists of words", False: "text"}
        raise ValueError(
            f"{path} holds {kinds[table.tagged]} in column {config.text_column!r}, "
            f"but {trained.path} holds {kinds[trained.tagged]}"
        )
    return table


def _tell(table: Table, label_type: str, names: Sequence[str], target: Target) -> None:
    """Say in the log what the labels were taken for, and why."""
    text = "numbers to predict"
    if label_type != NUMBER:
        each = "any number a row" if label_type == CLASSES else f"one a {'word' if table.tagged else 'row'}"
        shown = ", ".join(map(repr, names[:10])) + (", ..." if len(names) > 10 else "")
        text = f"{len(names)} class{'es' * (len(names) > 1)}, {each} ({shown})"
    logger.info("%s: the labels are taken for %s, because %s", table.path, text, target.reason)


def _classes(examples: Examples) -> set[int]:
    """Return the classes that occur."""
    labels: Sequence[Any] = examples.labels
    return set().union(*labels) if examples.listed else set(labels)


def _metrics(rows: Examples, label_names: Sequence[str]) -> tuple[str, ...]:
    if rows.listed:
        return LISTED_METRICS
    if rows.tagged and is_span_scheme(label_names):
        return SPAN_METRICS
    return CLASSIFICATION_METRICS if label_names else REGRESSION_METRICS


def _strata(examples: Examples) -> Sequence[Hashable]:
    """Return what every part has its share of: the classes, where a row has one."""
    one_class = all(isinstance(label, int) for label in examples.labels)
    return examples.labels if one_class else [None] * len(examples)


def _limited(task: Task, config: DataConfig) -> Task:
    """Return the task with at most as many rows as the configuration allows, class balance kept."""

    def limited(examples: Examples, limit: int | None) -> Examples:
        if limit is None or limit >= len(examples):
            return examples
        order = stratified_order(_strata(examples), config.split_seed)
        return examples.select(sorted(order[:limit]))

    return replace(
        task,
        train=limited(task.train, config.max_train_samples),
        validation=limited(task.validation, config.max_eval_samples),
        test=limited(task.test, config.max_eval_samples),
        zero_shot={name: limited(rows, config.max_eval_samples) for name, rows in task.zero_shot.items()},
    )
