"""One pruning step over a model: scores, masks, zeros; and what the masks amount to."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, distributed, nn

from sdp_kernels import BitMask, zero_
from sdprune.config import SDPruneConfig
from sdprune.masking.bare import check_bare, check_float
from sdprune.masking.layers import MaskedConv1D, MaskedLinear
from sdprune.masking.linears import not_trainable
from sdprune.masking.partition import Partition
from sdprune.masking.select import select_linears, unreached
from sdprune.masking.swap import mask_layer, masked_layers, named_weights, swap, unswap
from sdprune.methods.criteria import CRITERIA, Layer

logger = logging.getLogger(__name__)


def mask_model(model: nn.Module, config: SDPruneConfig) -> Partition:
    """Swap the layers that `config` prunes for masked ones, in place; logits stay equal to the bit, hooks stay too.

    What lies in the layers and is out of reach (see `unreached`) is told in the log.

    Returns:
        What is pruned together.

    Raises:
        ValueError: as of `select_linears`; a layer cannot take the structure, the target leaves nothing of one, or the
            model is pruned already under masks of other blocks, or a layer is int8. The model stays as it is.
        TypeError: the model is no module.
    """
    check_bare(model)
    check_float(model)
    if masked_layers(model) and masked_fraction(model) == 0.0:
        unswap(model)  # masks that prune nothing, such as those of a run that was refused
    partition = Partition.of(model, select_linears(model, config), config)
    partition.check_target(config)
    for name in partition.layers:
        fault = not_trainable(model.get_submodule(name))
        if fault is not None:
            raise ValueError(f"layer {name!r} cannot be pruned: {fault}")
    criterion = CRITERIA[config.criterion]
    for name, layer in masked_layers(model).items():
        if name in partition.layers and layer.block_shape != partition.block_shapes.get(name):
            raise ValueError(
                f"layer {name!r} is pruned already, under a mask of blocks {layer.block_shape}, not of "
                f"{partition.block_shapes.get(name)}; begin with a dense model, or keep the structure"
            )
    for name in partition.layers:
        shape = partition.block_shapes.get(name)
        make = partial(mask_layer, keep_pruned_values=criterion.revives, block_shape=shape)
        swap(model, [name], make)
        if criterion.update is not None:
            layer = masked_layers(model.get_submodule(name))[""]
            layer.gather_scores(criterion.start, hard_concrete=criterion.gates)
    if config.scope == "global" and criterion.update is None:
        _check_ranking(model, config, partition)
    _tell_unreached(model)
    return partition


@torch.no_grad()
def _check_ranking(model: nn.Module, config: SDPruneConfig, partition: Partition) -> None:
    """Rank all units as they are now: what would leave nothing of a layer at the target is told before any training."""
    layers = masked_layers(model)
    try:
        with torch.random.fork_rng(devices=[]):
            scores = _scores(layers, partition, config)
        masks = {name: layer.bit_mask for name, layer in layers.items()}
        partition.select(scores, masks, config.target_sparsity, config)
    except ValueError:
        if masked_fraction(model) == 0.0:
            unswap(model)
        raise


def _tell_unreached(model: nn.Module) -> None:
    found = unreached(model)
    if found:
        share = sum(found.values()) / sum(parameter.numel() for parameter in model.parameters())
        logger.warning(
            "%.1f %% of the model's parameters are out of reach and stay dense: %s, %d such weights in the stack of "
            "layers belong to no linear layer",
            100 * share,
            max(found, key=found.__getitem__),
            len(found),
        )


@torch.no_grad()
def prune_step(model: nn.Module, config: SDPruneConfig, sparsity: float, partition: Partition | None = None) -> None:
    """Raise the sparsity of the masked layers to `sparsity`: exact counts, and what is pruned stays pruned.

    Args:
        model: a model that `mask_model` prepared for `config`.
        config: what is pruned, and by which criterion.
        sparsity: fraction of units to prune.
        partition: what `mask_model` returned; None: found again.

    Raises:
        ValueError: a layer would lose all its weights, its weights are NaN (the layer is named), or a criterion that
            needs gradients has seen none.
    """
    layers = masked_layers(model)
    if partition is None:
        partition = Partition.of(model, list(layers), config)
    scores = _scores(layers, partition, config)
    masks = partition.select(scores, {name: layer.bit_mask for name, layer in layers.items()}, sparsity, config)
    for name, mask in masks.items():
        layers[name].set_mask(mask)
    if CRITERIA[config.criterion].fresh:
        for layer in layers.values():
            if layer.score is not None and layer.score_steps is not None:
                layer.score.fill_(CRITERIA[config.criterion].start)
                layer.score_steps.zero_()


def _scores(layers: Mapping[str, MaskedLinear], partition: Partition, config: SDPruneConfig) -> dict[str, Tensor]:
    """One score for each weight, or for each block where the criterion gathers scores of blocks."""
    criterion, scores = CRITERIA[config.criterion], {}
    neighbours = _neighbours(layers, partition) if criterion.neighbours else {}
    for name, layer in layers.items():
        gathered = None if criterion.update is None else layer.score
        if criterion.update is not None and (gathered is None or layer.score_steps is None or not layer.score_steps):
            raise ValueError(
                f"criterion={config.criterion!r} ranks by gradients, but layer {name!r} has seen none since the "
                "last pruning step; train at least one step first (start_ratio > 0), with fp16 several: steps "
                "whose gradients overflow do not count"
            )
        # a sum of many half-precision scores would round
        seen = Layer(name, layer.matrix.detach().float(), config, gathered, neighbours.get(name))
        score = criterion.score(seen)
        shapes = {tuple(each.shape) for each in (seen.weight, gathered) if each is not None}
        if tuple(getattr(score, "shape", ())) not in shapes:
            raise ValueError(
                f"criterion={config.criterion!r} must score layer {name!r} by a tensor of shape "
                f"{' or '.join(map(str, shapes))}, got {getattr(score, 'shape', score)!r}"
            )
        scores[name] = score
    return scores


def _neighbours(layers: Mapping[str, MaskedLinear], partition: Partition) -> dict[str, tuple[Tensor, Tensor]]:
    """Norms of the weights in front of every input and behind every output, through the unit that they share."""
    weights = {name: layer.matrix.detach().float() for name, layer in layers.items()}
    before = {name: torch.ones(weight.shape[1], device=weight.device) for name, weight in weights.items()}
    after = {name: torch.ones(weight.shape[0], device=weight.device) for name, weight in weights.items()}
    for coupling in partition.couplings:
        columns = coupling.columns.to(weights[coupling.consumer].device)
        behind = weights[coupling.consumer].square().sum(0)[columns].sum(1)
        front = torch.zeros_like(behind)
        for name, rows in coupling.producers.items():
            rows = rows.to(behind.device)
            front += weights[name].square().sum(1)[rows].sum(1)
            after[name][rows] = behind.sqrt()[:, None]
        before[coupling.consumer][columns] = front.sqrt()[:, None]
    return {name: (before[name], after[name]) for name in weights}


@torch.no_grad()
def gather(model: nn.Module, config: SDPruneConfig, scale: float = 1.0) -> None:
    """Take the gradients of the optimizer step that just ran backward into the scores of a gradient criterion.

    In a distributed run the mean over the processes is taken, so that every rank has the same scores.

    Args:
        model: a model that `mask_model` prepared for `config`.
        config: the criterion.
        scale: by how much a loss scaler multiplied the loss.
    """
    update = CRITERIA[config.criterion].update
    if update is None:
        return
    parallel = distributed.is_available() and distributed.is_initialized()
    divisor = scale * (distributed.get_world_size() if parallel else 1)
    taken: list[tuple[MaskedLinear, Tensor]] = []
    for layer in masked_layers(model).values():
        if not layer.gathering or layer.score is None:
            continue
        sensitivity = layer.take_sensitivity()
        if sensitivity is None:
            if not parallel:
                continue
            # a layer that only the batches of other ranks went through takes part in the mean
            sensitivity = torch.zeros_like(layer.score)
        if parallel:
            distributed.all_reduce(sensitivity)
        taken.append((layer, sensitivity.div_(divisor)))
    if not taken:
        return
    # Not a step that overflowed anywhere: the loss scaler skips it whole, and layers that saw more steps than others
    # would score higher. Decided on the device, without waiting for it.
    finite = [sensitivity.isfinite().all() for _, sensitivity in taken]
    usable = torch.stack([each.to(finite[0].device) for each in finite]).all()
    for layer, sensitivity in taken:
        if layer.score is not None and layer.score_steps is not None:
            counts = usable.to(layer.score.device)
            layer.score.copy_(torch.where(counts, update(layer.score, sensitivity, config), layer.score))
            layer.score_steps += counts


@torch.no_grad()
def zero_pruned(model: nn.Module) -> None:
    """Set the pruned values of every layer that holds its zeros in place back to zero."""
    layers = [layer for layer in masked_layers(model).values() if not layer.keep_pruned_values]
    stored = [layer for layer in layers if not isinstance(layer, MaskedConv1D)]
    zero_([layer.weight for layer in stored], [layer.bit_mask for layer in stored])
    for layer in layers:
        if isinstance(layer, MaskedConv1D):
            layer.zero_()


@dataclass(frozen=True)
class Sparsity:
    """How many weights are zero.

    Args:
        layers: fraction of zeros of every pruned layer, by name.
        zeros: zeros in the pruned layers.
        prunable: weights of the pruned layers.
        parameters: parameters of the whole model, embeddings included.
        unreached: weights in the stack of layers that belong to no linear layer, such as those of experts.
    """

    layers: dict[str, float]
    zeros: int
    prunable: int
    parameters: int
    unreached: int = 0

    @property
    def linear(self) -> float:
        """Fraction of zeros in the pruned layers: what `target_sparsity` speaks of."""
        return self.zeros / max(self.prunable, 1)

    @property
    def model(self) -> float:
        """The same zeros as a fraction of all parameters."""
        return self.zeros / max(self.parameters, 1)

    @property
    def unreached_share(self) -> float:
        """The weights that were out of reach as a fraction of all parameters."""
        return self.unreached / max(self.parameters, 1)


def measure_sparsity(model: nn.Module, names: list[str] | None = None) -> Sparsity:
    """Count the zeros that stand in the weights themselves, not those that a mask promises.

    Args:
        model: a model with masked or dense layers.
        names: the layers to count; None: the masked ones.
    """
    weights = named_weights(model, list(masked_layers(model)) if names is None else names)
    zeros = {name: int(weight.numel() - weight.count_nonzero()) for name, weight in weights.items()}
    return Sparsity(
        layers={name: zeros[name] / weight.numel() for name, weight in weights.items()},
        zeros=sum(zeros.values()),
        prunable=sum(weight.numel() for weight in weights.values()),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        unreached=sum(unreached(model).values()),
    )


def masked_fraction(model: nn.Module) -> float:
    """Return the fraction of the masked layers' weights that their masks prune."""
    masks: list[BitMask] = [layer.bit_mask for layer in masked_layers(model).values()]
    total = sum(mask.shape[0] * mask.shape[1] for mask in masks)
    return sum(mask.sparsity * mask.shape[0] * mask.shape[1] for mask in masks) / max(total, 1)
