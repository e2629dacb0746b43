"""Batches of like lengths, the same ones whenever an epoch is begun again."""

import random
from collections.abc import Iterator, Sequence

from torch.utils.data import Sampler

MEGA_BATCH = 50  # batches that are sorted together: enough for little padding, few enough to stay random


class LengthBucketSampler(Sampler[int]):
    """Order rows so that every `batch_size` consecutive ones have similar lengths.

    Rows are shuffled, sorted by length within runs of `MEGA_BATCH` batches, and the batches are shuffled again;
    a short batch comes last. The order depends on the arguments and the epoch alone, so that a run resumed within
    an epoch sees the batches that it would have seen.

    Args:
        lengths: length of every row.
        batch_size: rows of a batch.
        seed: seed of all epochs.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, *, seed: int) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.lengths = tuple(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration gives."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = random.Random(f"{self.seed} {self.epoch}")
        rows = list(range(len(self.lengths)))
        generator.shuffle(rows)
        full: list[list[int]] = []
        short: list[list[int]] = []
        for run in _chunks(rows, MEGA_BATCH * self.batch_size):
            for batch in _chunks(sorted(run, key=self.lengths.__getitem__), self.batch_size):
                (full if len(batch) == self.batch_size else short).append(batch)
        generator.shuffle(full)
        return (row for batch in full + short for row in batch)


def _chunks(rows: list[int], size: int) -> Iterator[list[int]]:
    return (rows[start : start + size] for start in range(0, len(rows), size))
