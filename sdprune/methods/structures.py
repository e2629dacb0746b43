"""Structures: which weights are kept or pruned together."""

from collections.abc import Callable
from dataclasses import dataclass

from sdprune.methods.table import Options, Table, check

Shape = tuple[int, int]
COUPLED = ("neuron", "head")
BLOCK_SHAPES = "a function of a layer's shape and the options, or None beside coupled='neuron' or 'head'"
GROUPS = "None, or a function of the options beside coupled=None"


@dataclass(frozen=True)
class Structure:
    """What is kept or pruned as a whole, the units: blocks of one layer, or what several layers share.

    Args:
        block_shape: (shape (out, in) of a layer, options) -> (out, in) of its blocks, which must divide it; (1, 1) are
            single weights. None: layers that have no part in coupled units are left alone.
        coupled: the units of several layers that are pruned where a model has them, "neuron" (feed-forward) or "head"
            (attention); None: none.
        groups: options -> (n, m): of every m neighbouring blocks along the input n are kept; None: any.

    Raises:
        ValueError: a field with a value that is not allowed, or fields that prune nothing.
    """

    block_shape: Callable[[Shape, Options], Shape] | None = None
    coupled: str | None = None
    groups: Callable[[Options], tuple[int, int]] | None = None

    def __post_init__(self) -> None:
        blocks, groups = self.block_shape, self.groups
        check(self, "coupled", self.coupled in (None, *COUPLED), "None, 'neuron' or 'head'")
        check(self, "block_shape", callable(blocks) or (blocks is None and self.coupled is not None), BLOCK_SHAPES)
        check(self, "groups", groups is None or (callable(groups) and self.coupled is None), GROUPS)


STRUCTURES = Table(
    "STRUCTURES",
    Structure,
    {
        "unstructured": Structure(lambda shape, options: (1, 1)),
        "block": Structure(lambda shape, options: options.block_shape),
        "n:m": Structure(lambda shape, options: (1, 1), groups=lambda options: (options.n, options.m)),
        "neuron": Structure(coupled="neuron"),
        "head": Structure(coupled="head"),
        "hybrid": Structure(lambda shape, options: options.block_shape, coupled="neuron"),
    },
)
