"""What trivial models reach on a task."""

import numpy as np

from sdprune.data.metrics import Array, compute
from sdprune.data.tasks import Task


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
    return compute(task.metrics, logits, task.test.labels, task.test.queries)
