"""Rows of labelled text, before and after the tokenizer."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self, cast

from torch.utils.data import Dataset

IGNORED_LABEL = -100
_TOKENIZER_BATCH = 1000


@dataclass(frozen=True)
class Examples:
    """Labelled text, or words that each have a label.

    What a row's label is, its type tells: an index of a class, a number, a set of classes, or a tuple with the class of
    every word.

    Args:
        texts: one or two texts a row, equally many in every row; or the words of every row.
        labels: index of the class, or a number to be predicted, of every row; or the set of its classes; or the classes
            of a row's words.

    Raises:
        ValueError: there are not as many labels as rows or words, or neither one text in every row nor two.
    """

    texts: tuple[tuple[str, ...], ...]
    labels: tuple[int, ...] | tuple[float, ...] | tuple[tuple[int, ...], ...] | tuple[frozenset[int], ...]

    def __post_init__(self) -> None:
        if len(self.texts) != len(self.labels):
            raise ValueError(f"{len(self.texts)} rows of text have {len(self.labels)} labels")
        if self.tagged:
            for row, (words, tags) in enumerate(zip(self.texts, self.labels, strict=True)):
                if not isinstance(tags, tuple) or len(words) != len(tags):
                    raise ValueError(f"texts[{row}] holds {len(words)} words, but its labels are {tags!r}")
        elif {len(row) for row in self.texts} not in (set(), {1}, {2}):
            raise ValueError("texts must hold one text in every row or two in every row")

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def tagged(self) -> bool:
        """Whether every word has a label, and not every row."""
        return bool(self.labels) and isinstance(self.labels[0], tuple)

    @property
    def listed(self) -> bool:
        """Whether a row has any number of classes, and not one."""
        return bool(self.labels) and isinstance(self.labels[0], frozenset)

    @property
    def queries(self) -> tuple[str, ...]:
        """The first text of every row: what is asked, where answers are ranked."""
        return tuple(texts[0] for texts in self.texts)

    def select(self, rows: Sequence[int]) -> Self:
        """Return the given rows, in the given order."""
        labels: Any = tuple(self.labels[row] for row in rows)
        return replace(self, texts=tuple(self.texts[row] for row in rows), labels=labels)

    def renumbered(self, order: Sequence[int]) -> Self:
        """Return the rows with class `order[index]` for every class `index`."""

        def renumber(label: Any) -> Any:
            return type(label)(map(renumber, label)) if isinstance(label, tuple | frozenset) else order[int(label)]

        return replace(self, labels=renumber(self.labels))


class EncodedExamples(Dataset[dict[str, Any]]):
    """Tokenised rows without padding: what the data collators of transformers expect.

    Args:
        columns: what the tokenizer made, such as input_ids and attention_mask: a list of integers a row.
        labels: label of every row; of rows with several, 1.0 or 0.0 for every class; or of every token, -100 where it
            has none.
    """

    def __init__(
        self,
        columns: dict[str, list[list[int]]],
        labels: Sequence[int] | Sequence[float] | Sequence[Sequence[int]] | Sequence[Sequence[float]],
    ) -> None:
        self.columns = columns
        self.labels = labels

    @property
    def lengths(self) -> tuple[int, ...]:
        """Number of tokens of every row."""
        return tuple(map(len, self.columns.get("input_ids", ())))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {name: column[row] for name, column in self.columns.items()} | {"labels": self.labels[row]}


def encode(examples: Examples, tokenizer: Any, max_length: int, *, num_labels: int = 0) -> EncodedExamples:
    """Tokenise all rows once. The first piece of a word has its label, the others -100.

    Words that are cut off, or of which the tokenizer leaves nothing, have no label and count in no score.

    Args:
        examples: the rows.
        tokenizer: a transformers tokenizer.
        max_length: longest row in tokens; longer ones are cut. The tokenizer's own limit holds where it is
            smaller.
        num_labels: number of classes, where a row may have several.

    Raises:
        ValueError: the words have labels, but the tokenizer cannot tell which word a piece belongs to.
    """
    if examples.tagged and not tokenizer.is_fast:
        raise ValueError(
            "labels of words need a fast tokenizer, which knows the word of a piece, "
            f"got the slow {type(tokenizer).__name__}"
        )
    limit = min(max_length, tokenizer.model_max_length)
    columns: dict[str, list[list[int]]] = {}
    tags: list[list[int]] = []
    for start in range(0, len(examples), _TOKENIZER_BATCH):
        batch = examples.select(range(start, min(start + _TOKENIZER_BATCH, len(examples))))
        texts: list[Any] = (
            [list(map(list, batch.texts))]
            if examples.tagged
            else [list(column) for column in zip(*batch.texts, strict=True)]
        )
        encoded = tokenizer(
            *texts, truncation=True, max_length=limit, padding=False, is_split_into_words=examples.tagged
        )
        for name, rows in encoded.items():
            columns.setdefault(name, []).extend(rows)
        if examples.tagged:
            tags += [_first_pieces(encoded.word_ids(row), labels) for row, labels in enumerate(batch.labels)]
    if examples.listed:
        sets = cast(tuple[frozenset[int], ...], examples.labels)
        return EncodedExamples(columns, [[float(place in row) for place in range(num_labels)] for row in sets])
    return EncodedExamples(columns, tags if examples.tagged else cast(Any, examples.labels))


def _first_pieces(words: Sequence[int | None], labels: Any) -> list[int]:
    """Return the label of every token, from the word that each belongs to."""
    before = [None, *words[:-1]]
    return [
        IGNORED_LABEL if word is None or word == last else labels[word]
        for word, last in zip(words, before, strict=True)
    ]
