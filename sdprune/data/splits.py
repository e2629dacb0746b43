"""Which rows are held out: decided by labels or groups and the seed alone, not by any library's version."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple, TypeVar

Item = TypeVar("Item")


class Split(NamedTuple):
    """Row numbers of each part, ascending."""

    train: list[int]
    validation: list[int]
    test: list[int]


def shuffled(items: Iterable[Item], seed: int) -> list[Item]:
    """Return the items in an order that only their text and the seed decide."""
    return sorted(items, key=lambda item: hashlib.sha256(f"{seed} {item}".encode()).digest())


def stratified_order(labels: Sequence[Hashable], seed: int) -> list[int]:
    """Return all row numbers, shuffled so that every stretch has about the class balance of the whole."""
    rows_of: dict[Hashable, list[int]] = defaultdict(list)
    for row in shuffled(range(len(labels)), seed):
        rows_of[labels[row]].append(row)
    position = {row: (place + 0.5) / len(rows) for rows in rows_of.values() for place, row in enumerate(rows)}
    return sorted(position, key=position.__getitem__)


def split_stratified(labels: Sequence[Hashable], *, validation: float, test: float, seed: int) -> Split:
    """Hold out the fraction `test` of the rows, then the fraction `validation` of what remains."""
    order = stratified_order(labels, seed)
    tested = round(test * len(order))
    validated = tested + round(validation * (len(order) - tested))
    return Split(sorted(order[validated:]), sorted(order[tested:validated]), sorted(order[:tested]))


def split_grouped(groups: Sequence[str], *, validation: float, test: float, seed: int) -> Split:
    """Hold out whole groups.

    The test part gets at least the fraction `test` of the groups and of the rows, the validation part at least
    the fraction `validation` of the groups and rows that remain.
    """
    sizes = Counter(groups)
    remaining = shuffled(sizes, seed)
    part_of: dict[str, str] = {}
    for part, fraction in (("test", test), ("validation", validation)):
        groups_wanted = fraction * len(remaining)
        rows_wanted = fraction * sum(sizes[group] for group in remaining)
        while groups_wanted > 0 or rows_wanted > 0:
            group = remaining.pop()
            part_of[group] = part
            groups_wanted -= 1
            rows_wanted -= sizes[group]
    rows_of: dict[str, list[int]] = defaultdict(list)
    for row, group in enumerate(groups):
        rows_of[part_of.get(group, "train")].append(row)
    return Split(rows_of["train"], rows_of["validation"], rows_of["test"])
