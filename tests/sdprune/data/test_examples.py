"""Rows before and after the tokenizer."""

import dataclasses

import pytest
from transformers import DataCollatorWithPadding

from sdprune.data.examples import Examples, encode


def test_rows_are_checked():
    with pytest.raises(ValueError, match="1 rows of text have 2 labels"):
        Examples((("a",),), (0, 1))
    with pytest.raises(ValueError, match="one text in every row or two"):
        Examples((("a",), ("a", "b")), (0, 1))
    with pytest.raises(dataclasses.FrozenInstanceError):
        Examples((("a",),), (0,)).labels = (1,)


def test_select_keeps_the_order_asked_for():
    rows = Examples((("a",), ("b",), ("c",)), (0, 1, 2))
    assert rows.select([2, 0]) == Examples((("c",), ("a",)), (2, 0))


def test_items_are_unpadded_lists(tokenizer):
    encoded = encode(Examples((("great film",), ("the plot was dull",)), (1, 0)), tokenizer, 32)
    assert len(encoded) == 2
    assert encoded.lengths == (4, 6)
    assert set(encoded[0]) == {"input_ids", "attention_mask", "token_type_ids", "labels"}
    assert encoded[0]["labels"] == 1
    assert encoded[1]["attention_mask"] == [1] * 6
    assert tokenizer.decode(encoded[0]["input_ids"]) == "[CLS] great film [SEP]"


def test_pairs_are_told_apart_and_cut(tokenizer):
    encoded = encode(Examples((("great film", "the plot was dull " * 9),), (0.5,)), tokenizer, 12)
    assert encoded.lengths == (12,)
    assert encoded[0]["token_type_ids"] == [0] * 4 + [1] * 8
    assert encoded[0]["labels"] == 0.5


def test_the_tokenizer_limit_holds(tokenizer):
    assert tokenizer.model_max_length == 32
    assert encode(Examples((("great " * 99,),), (0,)), tokenizer, 128).lengths == (32,)


def test_many_rows_keep_their_order_and_collate(tokenizer):
    rows = Examples(tuple(("great " * (1 + row % 7),) for row in range(2500)), tuple(range(2500)))
    encoded = encode(rows, tokenizer, 32)
    assert encoded.lengths == tuple(3 + row % 7 for row in range(2500))
    batch = DataCollatorWithPadding(tokenizer)([encoded[row] for row in (0, 2499)])
    assert batch["input_ids"].shape == (2, 3)
    assert batch["labels"].tolist() == [0, 2499]


def test_no_rows(tokenizer):
    encoded = encode(Examples((), ()), tokenizer, 32)
    assert (len(encoded), encoded.lengths) == (0, ())
