"""The classification, matching and tagging tasks of XGLUE: trained on English, tested on every language.

XGLUE (Liang et al. 2020, https://arxiv.org/abs/2004.01401; https://huggingface.co/datasets/microsoft/xglue). The hub's
data set is a script, which `datasets` no longer runs; what is read is the Parquet copy that the hub makes of it.
The mapping is tested on local files of the same columns and splits; none of these downloads was ever run.
"""

from typing import Any, NamedTuple

from sdprune.data.examples import Examples
from sdprune.data.formats import first_line

REPOSITORY = "microsoft/xglue"
REVISION = "refs/convert/parquet"
TRAINED = "en"


class XglueTask(NamedTuple):
    """How one task is stored.

    Args:
        text_columns: the columns of the first text and of the second one; several are joined by a space. Or the one
            column of the words, where these are tagged.
        label_column: column of the label, or of the tags.
        label_names: names of the classes in the data set's own order.
        languages: languages with test rows, besides English.
        metrics: the one that XGLUE reports first.
        tagged: whether every word has a label.
    """

    text_columns: tuple[tuple[str, ...], ...]
    label_column: str
    label_names: tuple[str, ...]
    languages: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy", "macro_f1")
    tagged: bool = False


_ENTITIES = ("O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC", "B-MISC", "I-MISC")
_PARTS_OF_SPEECH = (
    "ADJ",
    "ADP",
    "ADV",
    "AUX",
    "CCONJ",
    "DET",
    "INTJ",
    "NOUN",
    "NUM",
    "PART",
    "PRON",
    "PROPN",
    "PUNCT",
    "SCONJ",
    "SYM",
    "VERB",
    "X",
)
_RELEVANCE = ("Bad", "Fair", "Good", "Excellent", "Perfect")
_NEWS = (
    "foodanddrink",
    "sports",
    "travel",
    "finance",
    "lifestyle",
    "news",
    "entertainment",
    "health",
    "video",
    "autos",
)
XGLUE = {
    "xnli": XglueTask(
        (("premise",), ("hypothesis",)),
        "label",
        ("entailment", "neutral", "contradiction"),
        ("ar", "bg", "de", "el", "es", "fr", "hi", "ru", "sw", "th", "tr", "ur", "vi", "zh"),
    ),
    "paws-x": XglueTask((("sentence1",), ("sentence2",)), "label", ("different", "same"), ("de", "es", "fr")),
    "qam": XglueTask((("question",), ("answer",)), "label", ("False", "True"), ("de", "fr")),
    "qadsm": XglueTask((("query",), ("ad_title", "ad_description")), "relevance_label", ("Bad", "Good"), ("de", "fr")),
    "wpr": XglueTask(
        (("query",), ("web_page_title", "web_page_snippet")),
        "relavance_label",  # spelt so in the data set
        _RELEVANCE,
        ("de", "es", "fr", "it", "pt", "zh"),
        ("ndcg", "accuracy"),
    ),
    "nc": XglueTask((("news_title",), ("news_body",)), "news_category", _NEWS, ("de", "es", "fr", "ru")),
    "ner": XglueTask((("words",),), "ner", _ENTITIES, ("de", "es", "nl"), ("span_f1", "accuracy"), tagged=True),
    "pos": XglueTask(
        (("words",),),
        "pos",
        _PARTS_OF_SPEECH,
        ("de", "es", "nl", "bg", "el", "fr", "pl", "tr", "vi", "zh", "ur", "hi", "it", "ar", "ru", "th"),
        tagged=True,
    ),
}


class XglueParts(NamedTuple):
    """English rows to train, validate and test on, and test rows of the other languages."""

    train: Examples
    validation: Examples
    test: Examples
    zero_shot: dict[str, Examples]


def load_parts(kind: str, name: str, repository: str, splits: list[str], **options: Any) -> Any:
    """Return splits of a data set of the hub, or of a folder; raises OSError that says what to do."""
    try:
        import datasets

        return datasets.load_dataset(repository, name, split=splits, **options)
    except Exception as error:  # many kinds, some of packages that datasets alone knows
        raise OSError(
            f"{kind} task {name!r} could not be loaded from {repository}: {first_line(error)}; "
            "see to that, or name a file with --data FILE"
        ) from error


def load_xglue(name: str, repository: str = REPOSITORY, revision: str | None = REVISION) -> XglueParts:
    """Load a task from the hub, or from a folder of the same configurations, splits and columns.

    Args:
        name: key of `XGLUE`.
        repository: on the hub, or a folder.
        revision: of the repository; None for a folder.

    Raises:
        OSError: it could not be loaded.
        ValueError: a label is no class, or a row has not as many tags as words.
    """
    task = XGLUE[name]
    splits = ["train", f"validation.{TRAINED}", *(f"test.{language}" for language in (TRAINED, *task.languages))]
    parts = load_parts("XGLUE", name, repository, splits, revision=revision)
    train, validation, test, *others = (_examples(part, task, split) for part, split in zip(parts, splits, strict=True))
    return XglueParts(train, validation, test, dict(zip(task.languages, others, strict=True)))


def _examples(part: Any, task: XglueTask, split: str) -> Examples:
    number = {name: index for index, name in enumerate(task.label_names)}

    def class_of(label: Any, row: int) -> int:
        index = label if isinstance(label, int) else number.get(label, -1)
        if not 0 <= index < len(task.label_names):
            raise ValueError(
                f"{split} row {row}: {task.label_column} is {label!r}, none of {', '.join(task.label_names)}"
            )
        return index

    rows = enumerate(part[task.label_column], start=1)
    if task.tagged:
        ((words,),) = task.text_columns
        tags = tuple(tuple(class_of(tag, row) for tag in labels) for row, labels in rows)
        return Examples(tuple(map(tuple, part[words])), tags)
    texts = [
        [" ".join(pieces) for pieces in zip(*(part[column] for column in columns), strict=True)]
        for columns in task.text_columns
    ]
    return Examples(tuple(zip(*texts, strict=True)), tuple(class_of(label, row) for row, label in rows))
