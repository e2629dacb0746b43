"""Rows of labelled text, before and after the tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch.utils.data import Dataset

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TOKENIZER_BATCH = 1000


@dataclass(frozen=True)
class Examples:
    """Labelled text.

    Args:
        texts: one or two texts a row, equally many in every row.
        labels: index of the class, or a number to be predicted, of every row.
    """

    texts: tuple[tuple[str, ...], ...]
    labels: tuple[int, ...] | tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.texts) != len(self.labels):
            raise ValueError(f"{len(self.texts)} rows of text have {len(self.labels)} labels")
        if {len(row) for row in self.texts} not in (set(), {1}, {2}):
            raise ValueError("texts must hold one text in every row or two in every row")

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def queries(self) -> tuple[str, ...]:
        """The first text of every row: what is asked, where answers are ranked."""
        return tuple(texts[0] for texts in self.texts)

    def select(self, rows: Sequence[int]) -> Examples:
        """Return the given rows, in the given order."""
        return Examples(tuple(self.texts[row] for row in rows), tuple(self.labels[row] for row in rows))


class EncodedExamples(Dataset[dict[str, Any]]):
    """Tokenised rows without padding: what `transformers.DataCollatorWithPadding` expects.

    Args:
        columns: what the tokenizer made, such as input_ids and attention_mask: a list of integers a row.
        labels: label of every row.
    """

    def __init__(self, columns: dict[str, list[list[int]]], labels: Sequence[int] | Sequence[float]) -> None:
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


def encode(examples: Examples, tokenizer: PreTrainedTokenizerBase, max_length: int) -> EncodedExamples:
    """Tokenise all rows once.

    Args:
        examples: the rows.
        tokenizer: a transformers tokenizer.
        max_length: longest row in tokens; longer ones are cut. The tokenizer's own limit holds where it is
            smaller.
    """
    limit = min(max_length, tokenizer.model_max_length)
    columns: dict[str, list[list[int]]] = {}
    for start in range(0, len(examples), _TOKENIZER_BATCH):
        texts = [list(column) for column in zip(*examples.texts[start : start + _TOKENIZER_BATCH], strict=True)]
        encoded = tokenizer(*texts, truncation=True, max_length=limit, padding=False)
        for name, rows in encoded.items():
            columns.setdefault(name, []).extend(rows)
    return EncodedExamples(columns, examples.labels)
