"""Held-out rows: disjoint, complete, of the promised sizes and always the same."""

from collections import Counter

import pytest

from sdprune.data.splits import split_grouped, split_stratified, stratified_order


def assert_partition(split, count: int) -> None:
    assert sorted([*split.train, *split.validation, *split.test]) == list(range(count))
    for rows in split:
        assert rows == sorted(rows)


def test_stratified_split_keeps_the_balance():
    labels = [int(row % 10 < 3) for row in range(1000)]
    split = split_stratified(labels, validation=0.1, test=0.25, seed=0)
    assert_partition(split, 1000)
    assert list(map(len, split)) == [675, 75, 250]
    for rows in split:
        assert sum(labels[row] for row in rows) / len(rows) == pytest.approx(0.3, abs=0.01)


def test_a_class_of_one_row_is_trained_on():
    split = split_stratified(["rare", *["common"] * 50], validation=0.1, test=0.25, seed=0)
    assert 0 in split.train


def test_every_prefix_of_the_stratified_order_is_balanced():
    labels = ["a"] * 300 + ["b"] * 100
    order = stratified_order(labels, seed=0)
    assert sorted(order) == list(range(400))
    for count in (8, 40, 200):
        assert Counter(labels[row] for row in order[:count])["b"] == pytest.approx(count / 4, abs=1)


def test_grouped_split_keeps_groups_together():
    groups = [f"group {row * row % 97}" for row in range(2000)]
    split = split_grouped(groups, validation=0.1, test=0.25, seed=0)
    assert_partition(split, 2000)
    held = [{groups[row] for row in rows} for rows in split]
    assert sum(map(len, held)) == len(set(groups))
    assert len(held[2]) >= len(set(groups)) / 4
    assert 500 <= len(split.test) < 600
    assert 140 <= len(split.validation) < 230


def test_seeds_differ_and_repeat():
    groups = [str(row % 50) for row in range(200)]

    def grouped(seed: int) -> list[int]:
        return split_grouped(groups, validation=0.1, test=0.25, seed=seed).test

    def stratified(seed: int) -> list[int]:
        return split_stratified([0] * 200, validation=0.1, test=0.25, seed=seed).test

    assert grouped(0) == grouped(0) != grouped(1)
    assert stratified(0) == stratified(0) != stratified(1)


def test_order_is_the_same_in_every_version():
    assert stratified_order(["a", "b", "a", "b", "a", "a"], seed=0) == [4, 1, 2, 5, 3, 0]
