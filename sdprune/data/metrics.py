"""Scores of predictions, how sure a difference of two is, and what trivial models reach."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from sdprune.data.examples import IGNORED_LABEL

Array = npt.NDArray[Any]
SPAN_PREFIXES = ("B", "I", "E", "S")


def compute(
    task_metrics: Sequence[str],
    logits: npt.ArrayLike,
    labels: npt.ArrayLike,
    queries: Sequence[str] | None = None,
    label_names: Sequence[str] = (),
) -> dict[str, float]:
    """Score the outputs of a model.

    Args:
        task_metrics: names among "accuracy", "macro_f1", "micro_f1", "f1" (of class 1), "matthews", "pearson",
            "spearman", "ndcg" and "span_f1".
        logits: (rows, classes); (rows,) or (rows, 1) where numbers are predicted; (rows, length, classes) where every
            token has a label.
        labels: (rows,); (rows, classes) of 0 and 1 where a row may have several classes, each predicted by a logit
            above 0; or (rows, length), where tokens with the label -100 do not count.
        queries: what every row answers, for "ndcg": rows of equal queries are ranked against each other.
        label_names: names of the classes, for "span_f1": tags such as "B-PER" and "O" (`spans`).

    Raises:
        ValueError: an unknown name, shapes that do not fit, nothing to score, no queries, or outputs that are not
            finite.
    """
    logits, labels = np.asarray(logits), np.asarray(labels)
    if labels.ndim not in (1, 2) or len(labels) == 0 or logits.shape[: labels.ndim] != labels.shape:
        raise ValueError(f"logits {logits.shape} and labels {labels.shape} must have the same rows, at least one")
    if not np.isfinite(logits).all():
        raise ValueError("the model's outputs hold NaN or infinity: it has diverged")
    for name in task_metrics:
        if name not in (*_METRICS, "ndcg", "span_f1"):
            raise ValueError(f"unknown metric {name!r}; known are {', '.join((*_METRICS, 'ndcg', 'span_f1'))}")
    listed = labels.ndim == 2 == logits.ndim
    counted = labels != IGNORED_LABEL if labels.ndim == 2 and not listed else ...
    flat_logits, flat_labels = logits[counted], labels[counted]
    if not len(flat_labels):
        raise ValueError("no token has a label")
    scores = {}
    for name in task_metrics:
        if name == "span_f1":
            if labels.ndim != 2 or not is_span_scheme(label_names):
                raise ValueError(
                    "the metric 'span_f1' needs labels (rows, length) and label_names such as 'B-PER', 'I-PER' and "
                    f"'O', got {labels.shape} and {', '.join(label_names) or 'none'}"
                )
            scores[name] = _span_f1(labels, logits, label_names)
        elif name == "ndcg":
            if queries is None or len(queries) != len(flat_labels):
                raise ValueError("the metric 'ndcg' ranks rows of equal queries, and needs one query a row")
            scores[name] = _ndcg(flat_labels, flat_logits, queries)
        elif listed:
            scores[name] = _f1_of_several(flat_labels, flat_logits, name)
        else:
            scores[name] = float(_METRICS[name](flat_labels, flat_logits))
    return scores


def paired_bootstrap_standard_error(
    correct_a: npt.ArrayLike, correct_b: npt.ArrayLike, *, samples: int = 2000, seed: int = 0
) -> float:
    """Return the bootstrap standard error of the accuracy of a minus that of b.

    Rows are resampled with replacement, for both models alike. Only three differences occur in a row (-1, 0,
    1), so their counts in a resample are drawn at once, from the multinomial distribution that they have.

    Args:
        correct_a: (rows,) whether the first model is right.
        correct_b: (rows,) whether the second is, in the same rows.
        samples: number of resamples.
        seed: seed of the resamples.

    Raises:
        ValueError: the shapes differ, there are no rows, or samples < 2.
    """
    right_a, right_b = np.asarray(correct_a, dtype=bool), np.asarray(correct_b, dtype=bool)
    if right_a.shape != right_b.shape or right_a.ndim != 1 or right_a.size == 0:
        raise ValueError(f"expected the same rows, at least 1, got shapes {right_a.shape} and {right_b.shape}")
    if samples < 2:
        raise ValueError(f"samples must be at least 2, got {samples}")
    rows = right_a.size
    only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    shares = np.array([only_a, only_b, rows - only_a - only_b]) / rows
    counts = np.random.default_rng(seed).multinomial(rows, shares, size=samples)
    return float(((counts[:, 0] - counts[:, 1]) / rows).std(ddof=1))


def _of_classes(name: str, **options: Any) -> Callable[[Array, Array], float]:
    """A metric of scikit-learn, which takes a second to import."""

    def metric(labels: Array, logits: Array) -> float:
        import sklearn.metrics

        return float(getattr(sklearn.metrics, name)(labels, logits.argmax(-1), **options))

    return metric


def _f1_of_several(labels: Array, logits: Array, name: str) -> float:
    """F1 where a row may have several classes; those that neither occur nor are predicted are left out, as with one."""
    from sklearn.metrics import f1_score

    if name not in ("micro_f1", "macro_f1"):
        raise ValueError(f"the metric {name!r} needs one class a row; rows with several have micro_f1 and macro_f1")
    found, told = labels > 0.5, logits > 0.0
    there = found.any(0) | told.any(0)
    average = name.removesuffix("_f1")
    return float(f1_score(found[:, there], told[:, there], average=average, zero_division=0.0)) if there.any() else 0.0


def _correlation(name: str) -> Callable[[Array, Array], float]:
    """A correlation of scipy; 0 where either side is constant, as nothing is predicted then."""

    def metric(labels: Array, outputs: Array) -> float:
        import scipy.stats

        outputs = outputs.reshape(len(labels))
        varies = np.ptp(labels) and np.ptp(outputs)
        return float(getattr(scipy.stats, name)(labels, outputs).statistic) if varies else 0.0

    return metric


def _ndcg(labels: Array, logits: Array, queries: Sequence[str]) -> float:
    """Return the mean over queries of the normalised discounted cumulative gain, with gains 2**label - 1.

    Rows are ranked by their expected label. Queries with a single row, or with no gain, are left out; 0 if all are.
    """
    from scipy.special import softmax
    from sklearn.metrics import ndcg_score

    expected = softmax(logits, axis=-1) @ np.arange(logits.shape[-1])
    names, group = np.unique(np.asarray(queries), return_inverse=True)
    values = []
    for index in range(len(names)):
        rows = group == index
        if rows.sum() > 1 and labels[rows].any():
            values.append(ndcg_score(2.0 ** labels[rows][None] - 1.0, expected[rows][None]))
    return float(np.mean(values)) if values else 0.0


def is_span_scheme(label_names: Sequence[str]) -> bool:
    """Tell whether tags mark spans: every one is "O", or B, I, E or S, a hyphen and a kind, and there is a kind."""
    marks = [name for name in label_names if name != "O"]
    return bool(marks) and all(name.partition("-")[0] in SPAN_PREFIXES and name[2:] for name in marks)


def spans(tags: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    """Yield the kind, the first place and the place behind the last of every span that a row of tags marks.

    As the script conlleval of the CoNLL shared tasks reads them, which takes tags that fit no scheme as well: a span
    begins at B or S, and at I or E where none of its kind is open; it ends before B, S or another kind, and after E
    or S (https://www.clips.uantwerpen.be/conll2003/ner/).
    """
    kind, start = "", 0
    for place, tag in enumerate([*tags, "O"]):
        prefix, _, own = tag.partition("-")
        if kind and (prefix in ("O", "B", "S") or own != kind):
            yield kind, start, place
            kind = ""
        if prefix == "O":
            continue
        if not kind:
            kind, start = own, place
        if prefix in ("E", "S"):
            yield kind, start, place + 1
            kind = ""


def _span_f1(labels: Array, logits: Array, label_names: Sequence[str]) -> float:
    """Return F1 over all spans, right where kind and both ends are; 0 where neither side has any."""
    found: Counter[str] = Counter()
    for row, outputs in zip(labels, logits, strict=True):
        counted = row != IGNORED_LABEL
        ours, theirs = (
            set(spans([label_names[index] for index in indices]))
            for indices in (outputs[counted].argmax(-1), row[counted])
        )
        found.update(right=len(ours & theirs), all=len(ours) + len(theirs))
    return 2.0 * found["right"] / found["all"] if found["all"] else 0.0


_METRICS: dict[str, Callable[[Array, Array], float]] = {
    "accuracy": lambda labels, logits: float((logits.argmax(-1) == labels).mean()),
    "macro_f1": _of_classes("f1_score", average="macro", zero_division=0.0),
    "micro_f1": _of_classes("f1_score", average="micro", zero_division=0.0),
    "f1": _of_classes("f1_score", zero_division=0.0),
    "matthews": _of_classes("matthews_corrcoef"),
    "pearson": _correlation("pearsonr"),
    "spearman": _correlation("spearmanr"),
}
