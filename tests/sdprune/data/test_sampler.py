"""Batches of like lengths: complete, repeatable and with little padding."""

import random

import pytest
from torch.utils.data import DataLoader

from sdprune.data.sampler import LengthBucketSampler


@pytest.fixture
def lengths() -> list[int]:
    chooser = random.Random(0)
    return [chooser.randint(4, 64) for _ in range(5003)]


def batches(rows: list[int], size: int) -> list[list[int]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def padded_tokens(rows: list[int], lengths: list[int], size: int) -> int:
    return sum(max(lengths[row] for row in batch) * len(batch) for batch in batches(rows, size))


@pytest.mark.parametrize("count", [0, 1, 31, 32, 33, 1600, 1601, 5003])
def test_every_row_once_and_the_short_batch_last(lengths, count):
    sampler = LengthBucketSampler(lengths[:count], 32, seed=1)
    assert len(sampler) == count
    assert sorted(sampler) == list(range(count))


def test_batches_have_like_lengths_even_after_a_short_one(lengths):
    rows = list(LengthBucketSampler(lengths, 32, seed=1))
    spread = [max(lengths[row] for row in batch) - min(lengths[row] for row in batch) for batch in batches(rows, 32)]
    assert max(spread) < 20  # all rows: 60


def test_less_padding_than_random_batches(lengths):
    shuffled = random.Random(1).sample(range(len(lengths)), len(lengths))
    bucketed = list(LengthBucketSampler(lengths, 32, seed=1))
    tokens = sum(lengths)
    assert padded_tokens(bucketed, lengths, 32) < 1.05 * tokens
    assert padded_tokens(shuffled, lengths, 32) > 1.7 * tokens


def test_batches_do_not_come_sorted(lengths):
    rows = list(LengthBucketSampler(lengths, 32, seed=1))
    firsts = [lengths[batch[0]] for batch in batches(rows, 32)[:20]]
    assert firsts not in (sorted(firsts), sorted(firsts, reverse=True))


def test_order_is_a_function_of_seed_and_epoch(lengths):
    def order(seed: int, epoch: int) -> list[int]:
        sampler = LengthBucketSampler(lengths, 32, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    used = LengthBucketSampler(lengths, 32, seed=3)
    first = list(used)
    assert first == list(used) == order(3, 0)
    used.set_epoch(1)
    assert list(used) == order(3, 1)
    assert len({tuple(order(seed, epoch)) for seed in (3, 4) for epoch in (0, 1)}) == 4


def test_order_is_the_same_in_every_version():
    assert list(LengthBucketSampler([5, 1, 4, 2, 3, 9, 7], 2, seed=0)) == [4, 2, 1, 3, 0, 6, 5]


def test_resuming_within_an_epoch_repeats_the_batches(lengths):
    def loader() -> DataLoader:
        sampler = LengthBucketSampler(lengths, 32, seed=5)
        sampler.set_epoch(2)
        return DataLoader(range(len(lengths)), batch_size=32, sampler=sampler, collate_fn=list)

    whole = list(loader())
    resumed = iter(loader())
    for _ in range(40):
        next(resumed)
    assert list(resumed) == whole[40:]
    assert len(whole[-1]) == len(lengths) % 32


def test_batch_size_must_be_positive():
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        LengthBucketSampler([1], 0, seed=0)
