"""The units of a model that a structure keeps or prunes together, and how many of them a sparsity leaves."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from sdp_kernels import BitMask, select_mask
from sdp_kernels.mask_selection import pruned_count
from sdprune.config import SDPruneConfig
from sdprune.masking.coupling import Coupling, find_couplings
from sdprune.masking.linears import matrix
from sdprune.methods.criteria import CRITERIA
from sdprune.methods.structures import STRUCTURES


@dataclass(frozen=True)
class Blocks:
    """The blocks of one layer, or with 1 x 1 blocks its weights.

    Args:
        name: the layer.
        shape: (out, in) of its weight.
        block_shape: (out, in) of a block.
        reduction: score of a block from those of its weights.
    """

    name: str
    shape: tuple[int, int]
    block_shape: tuple[int, int] = (1, 1)
    reduction: str = "sum"

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers whose weights the units are made of."""
        return (self.name,)

    @property
    def kind(self) -> str:
        """What a unit is called."""
        return "weight" if self.block_shape == (1, 1) else f"block of {self.block_shape[0]}x{self.block_shape[1]}"

    @property
    def grid(self) -> tuple[int, int]:
        """Number of units down and across."""
        return self.shape[0] // self.block_shape[0], self.shape[1] // self.block_shape[1]

    def units(self, scores: Mapping[str, Tensor]) -> Tensor:
        """Return the scores of the units, (grid), from those of the weights or those of the blocks themselves."""
        values = scores[self.name]
        if tuple(values.shape) == self.grid:
            return values
        (rows, columns), (height, width) = self.grid, self.block_shape
        parts = values.reshape(rows, height, columns, width)
        if self.reduction == "max":
            return parts.amax((1, 3))
        return parts.sum((1, 3)) if self.reduction == "sum" else parts.mean((1, 3))

    def kept(self, masks: Mapping[str, BitMask]) -> Tensor:
        """Return which units the masks keep, (grid) bool."""
        return masks[self.name].to_bool()[:: self.block_shape[0], :: self.block_shape[1]]

    def masks(self, kept: BitMask) -> dict[str, BitMask]:
        """Return the masks of the layers from the mask of the units."""
        if self.block_shape == (1, 1):
            return {self.name: kept}
        return {self.name: BitMask.from_blocks(kept.to_bool(), self.block_shape, self.shape)}


@dataclass(frozen=True, eq=False)
class Units:
    """The neurons or heads of one coupling.

    Args:
        coupling: which rows and columns make a unit.
        shapes: (out, in) of its layers, by name.
    """

    coupling: Coupling
    shapes: Mapping[str, tuple[int, int]]

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers whose weights the units are made of."""
        return (*self.coupling.producers, self.coupling.consumer)

    @property
    def kind(self) -> str:
        """What a unit is called."""
        return self.coupling.kind

    @property
    def grid(self) -> tuple[int, int]:
        """Number of units, as a column."""
        return self.coupling.units, 1

    def units(self, scores: Mapping[str, Tensor]) -> Tensor:
        """Return the mean score of the weights of every unit, (units, 1)."""
        values = scores[self.coupling.consumer]
        total = values.sum(0)[self.coupling.columns.to(values.device)].sum(1)
        weights = self.coupling.columns.shape[1] * values.shape[0]
        for name, rows in self.coupling.producers.items():
            total = total + scores[name].sum(1)[rows.to(values.device)].sum(1)
            weights += rows.shape[1] * scores[name].shape[1]
        return (total / weights)[:, None]

    def kept(self, masks: Mapping[str, BitMask]) -> Tensor:
        """Return which units the masks keep, (units, 1) bool."""
        columns = masks[self.coupling.consumer].to_bool().any(0)
        return columns[self.coupling.columns[:, :1].to(columns.device)]

    def masks(self, kept: BitMask) -> dict[str, BitMask]:
        """Return the masks of the layers from the mask of the units."""
        pruned = ~kept.to_bool().flatten()
        masks = {}
        for name, members in ((self.coupling.consumer, self.coupling.columns), *self.coupling.producers.items()):
            mask = torch.ones(self.shapes[name], dtype=torch.bool, device=pruned.device)
            lines = mask.T if name == self.coupling.consumer else mask
            lines[members.to(pruned.device)[pruned].flatten()] = False
            masks[name] = BitMask.from_bool(mask)
        return masks


@dataclass(frozen=True, eq=False)
class Partition:
    """What is pruned in a model: units ranked in parts (blocks; neurons or heads), each of which reaches the target.

    Args:
        parts: the parts, each of units of one kind; blocks of one shape.
        block_shapes: the block shape of every layer pruned in blocks, by name.
        couplings: the couplings of pruned layers alone, where the criterion or the structure asks for them.
    """

    parts: tuple[tuple[Blocks | Units, ...], ...]
    block_shapes: Mapping[str, tuple[int, int]]
    couplings: tuple[Coupling, ...] = ()

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers that are pruned."""
        return tuple(name for part in self.parts for each in part for name in each.layers)

    @classmethod
    def of(cls, model: nn.Module, names: list[str], config: SDPruneConfig) -> Self:
        """Find what `config` prunes among the named layers.

        Raises:
            ValueError: a layer cannot take the structure (which one and why), or no layer can.
        """
        structure = STRUCTURES[config.structure]
        shapes = {name: _shape(model.get_submodule(name)) for name in names}
        looked_for = structure.coupled is not None or CRITERIA[config.criterion].neighbours
        couplings = find_couplings(model, names) if looked_for else []
        units = tuple(Units(each, shapes) for each in couplings if each.kind == structure.coupled)
        if structure.coupled is not None and not units:
            raise ValueError(
                f"structure={config.structure!r} finds no {structure.coupled}s among the layers that target_modules "
                f"and exclude_modules choose: {', '.join(names[:12])}"
            )
        _check_once(units, config)
        taken = {name for each in units for name in each.layers}
        blocks: dict[tuple[int, int], tuple[Blocks, ...]] = {}
        for name in names:
            if structure.block_shape is not None and name not in taken:
                sides = structure.block_shape(shapes[name], config)
                _check_blocks(name, shapes[name], sides, config)
                blocks[sides] = (*blocks.get(sides, ()), Blocks(name, shapes[name], sides, config.block_reduction))
        parts: tuple[tuple[Blocks | Units, ...], ...] = (*blocks.values(), *([units] if units else []))
        pruned = {name for part in parts for each in part for name in each.layers}
        inside = tuple(each for each in couplings if {each.consumer, *each.producers} <= pruned)
        of_blocks = {each.name: sides for sides, part in blocks.items() for each in part if sides != (1, 1)}
        return cls(parts, of_blocks, inside)

    def check_target(self, config: SDPruneConfig) -> None:
        """Raise ValueError if the target leaves nothing of a layer, however its units are ranked."""
        target, structure = config.target_sparsity, STRUCTURES[config.structure]
        if target == 0.0 or structure.groups is not None:  # of a group n units stay, and n is at least 1
            return
        for part in self.parts:
            counts = [math.prod(each.grid) for each in part]
            if config.scope == "global":
                kept = sum(counts) - pruned_count(target, sum(counts))
                floor = sum(max(1, least) for least in least_kept(config.min_layer_density, counts, kept))
                if kept < floor:
                    raise ValueError(
                        f"target_sparsity={target} leaves {kept} of {sum(counts)} units ({part[0].kind}) in all, but "
                        f"{len(counts)} layers must keep {floor} together (min_layer_density="
                        f"{config.min_layer_density}); lower it to at most {_rounded(1.0 - floor / sum(counts))}"
                    )
                continue
            for each, count in zip(part, counts, strict=True):
                if pruned_count(target, count) == count:
                    smaller = ", take a smaller block_shape" if each.kind.startswith("block") else ""
                    raise ValueError(
                        f"target_sparsity={target} leaves nothing of layer {each.layers[-1]!r}, which has {count} "
                        f"unit{'s' * (count > 1)} ({each.kind}): lower it to at most {_rounded(1.0 - 1.0 / count)}"
                        f"{smaller}, or name the layer in exclude_modules"
                    )

    def select(
        self, scores: Mapping[str, Tensor], masks: Mapping[str, BitMask], sparsity: float, config: SDPruneConfig
    ) -> dict[str, BitMask]:
        """Return the masks that keep the units of the highest scores.

        Args:
            scores: a score for every weight or block, by layer.
            masks: the masks so far; what they prune stays pruned unless the criterion revives.
            sparsity: fraction of the units to prune, exact to one unit of every ranking.
            config: scope, floor, criterion.

        Raises:
            ValueError: a layer, which is named, would lose everything, or its scores are NaN.
        """
        criterion, groups = CRITERIA[config.criterion], STRUCTURES[config.structure].groups
        selected: dict[str, BitMask] = {}
        for part in self.parts:
            values = []
            for each, least in zip(part, _floors(part, sparsity, config), strict=True):
                unit = each.units(scores)
                if criterion.of_units is not None:
                    unit = criterion.of_units(unit)
                if not criterion.revives:
                    unit = _sunk(unit, each.kept(masks).to(unit.device))
                values.append(_protected(unit, least))
            names = [each.layers[-1] for each in part]
            if groups is not None:
                n, m = groups(config)
                kept = _selected(names, values, structure="n:m", n=groups_keep(sparsity, n, m), m=m)
            else:
                scope = "global" if config.scope == "global" else "tensor"
                kept = _selected(names, values, sparsity=sparsity, scope=scope)
            for each, mask in zip(part, kept, strict=True):
                selected |= each.masks(mask)
        return selected

    def tolerance(self, config: SDPruneConfig) -> float:
        """Return by how much the fraction of pruned weights may differ from the sparsity asked for, by rounding."""
        total = units = 0.0
        for part in self.parts:
            sizes = [sum(math.prod(_shape_in(each, name)) for name in each.layers) for each in part]
            largest = [size / math.prod(each.grid) for each, size in zip(part, sizes, strict=True)]
            total += sum(sizes)
            units += max(largest) if config.scope == "global" else sum(largest)
        return units / total


def least_kept(density: float, counts: Sequence[int], kept: int) -> list[int]:
    """Return how many units of each layer a floor keeps, whatever their scores.

    These are whole units, rounded up, or, where a ranking leaves fewer than all of them together, rounded down but at
    least one: of more than it leaves, position would decide and not the score.

    Args:
        density: fraction of its units that every layer keeps.
        counts: units of the layers that are ranked together.
        kept: units that the ranking leaves of them together.
    """
    if not density:
        return [0] * len(counts)
    up = [math.ceil(density * count - 1e-9) for count in counts]
    return up if sum(up) <= kept else [max(1, math.floor(density * count + 1e-9)) for count in counts]


def _floors(part: Sequence[Blocks | Units], sparsity: float, config: SDPruneConfig) -> list[int]:
    """The floors of layers that are ranked all together, or each by itself."""
    counts = [math.prod(each.grid) for each in part]
    together = [counts] if config.scope == "global" else [[count] for count in counts]
    kept = [sum(group) - pruned_count(sparsity, sum(group)) for group in together]
    rankings = zip(together, kept, strict=True)
    return [least for group, left in rankings for least in least_kept(config.min_layer_density, group, left)]


def groups_keep(sparsity: float, n: int, m: int) -> int:
    """Return how many of `m` neighbours are kept at this sparsity: as few as it allows, never fewer than `n`."""
    return max(n, math.ceil(m * (1.0 - sparsity) - 1e-9))


def reached_sparsity(sparsity: float, config: SDPruneConfig) -> float:
    """Return the sparsity that the structure reaches when asked for `sparsity`, but for rounding to a unit."""
    groups = STRUCTURES[config.structure].groups
    return sparsity if groups is None else 1.0 - groups_keep(sparsity, *groups(config)) / groups(config)[1]


def _rounded(sparsity: float) -> str:
    """A sparsity that can be reached, cut to four digits so that it still can."""
    return f"{math.floor(1e4 * sparsity) / 1e4:g}"


def _sunk(scores: Tensor, kept: Tensor) -> Tensor:
    """What is pruned is pruned first. NaN shows: it must not hide under the mask."""
    return torch.where(kept | scores.isnan(), scores, -torch.inf)


def _protected(scores: Tensor, count: int) -> Tensor:
    """The `count` highest scores of a layer are raised above all others."""
    if count == 0:
        return scores
    raised = scores.flatten().clone()
    best = raised.sort(descending=True, stable=True).indices[:count]
    raised[best] = torch.where(raised[best].isnan(), torch.nan, torch.inf)
    return raised.view_as(scores)


def _selected(names: list[str], scores: list[Tensor], **arguments: object) -> list[BitMask]:
    """`select_mask` with errors that name the layer."""
    try:
        return select_mask(scores, **arguments)  # type: ignore[call-overload, no-any-return]
    except ValueError as error:
        text = str(error).replace(
            "lower it or pass allow_empty=True",
            "lower target_sparsity, or set min_layer_density, the share of its units that every layer keeps",
        )
        for index, name in enumerate(names):
            text = text.replace(f"scores[{index}]", f"layer {name!r}")
        raise ValueError(text) from None


def _shape(layer: nn.Module) -> tuple[int, int]:
    weight = matrix(layer)
    return weight.shape[0], weight.shape[1]


def _shape_in(each: Blocks | Units, name: str) -> tuple[int, int]:
    return each.shapes[name] if isinstance(each, Units) else each.shape


def _check_once(units: tuple[Units, ...], config: SDPruneConfig) -> None:
    owner: dict[str, str] = {}
    for each in units:
        for name in each.layers:
            if name in owner:
                raise ValueError(
                    f"structure={config.structure!r} cannot prune layer {name!r}: it has a part in the units of both "
                    f"{owner[name]!r} and {each.coupling.consumer!r}; name one of them in exclude_modules"
                )
            owner[name] = each.coupling.consumer


def _check_blocks(name: str, shape: tuple[int, int], block: tuple[int, int], config: SDPruneConfig) -> None:
    if min(block) < 1 or shape[0] % block[0] or shape[1] % block[1]:
        raise ValueError(
            f"block_shape {block} (out, in) does not divide layer {name!r} of shape {shape}; choose another "
            "block_shape or name the layer in exclude_modules"
        )
    groups = STRUCTURES[config.structure].groups
    if groups is not None and (shape[1] // block[1]) % groups(config)[1]:
        raise ValueError(
            f"m={groups(config)[1]} does not divide the input size of layer {name!r} of shape {shape}"
            f"{'' if block == (1, 1) else f' in blocks of {block}'}; choose another m or name the layer in "
            "exclude_modules"
        )
