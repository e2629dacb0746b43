"""Criteria: what a weight is worth. Tensors in, scores out; a higher score is kept longer.

Most rank by the weights as they are. Those that need gradients rank by the sensitivity: the gradient of the loss
for a factor of 1 on a weight (or on a whole block), which is gradient * weight (summed over the block). They gather
it step by step into one number for each weight or block, with no copy of the model and, for blocks, no dense gradient.
"""

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from sdprune.methods.table import Options, Table, check

OPEN = 2.2  # log alpha at the beginning: gates are open with probability 0.99 and 0.98 in the mean
# Louizos et al. (https://arxiv.org/abs/1712.01312), section 4
TEMPERATURE, LOW, HIGH = 2.0 / 3.0, -0.1, 1.1


@dataclass(frozen=True)
class Layer:
    """What a criterion sees of a layer, and must not change.

    Args:
        name: dotted name in the model.
        weight: (out, in) float32; what is pruned is 0 unless the criterion revives.
        options: the configuration.
        gathered: with `update` what was gathered, float32, for every weight (out, in) or every block (blocks down,
            blocks across); None otherwise.
        neighbours: with `neighbours` the norms of the weights in front of every input (in,) and behind every output
            (out,), through neurons and heads that are pruned, 1 where there are none; None otherwise.
    """

    name: str
    weight: Tensor
    options: Options
    gathered: Tensor | None = None
    neighbours: tuple[Tensor, Tensor] | None = None

    @property
    def generator(self) -> torch.Generator:
        """Random numbers that depend on the seed and the name: the same on every rank and at every pruning step."""
        return torch.Generator().manual_seed(zlib.crc32(f"{self.options.seed} {self.name}".encode()))


def random(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Score every weight at random: the control of every study."""
    return torch.rand(weight.shape, generator=generator).to(weight.device)


def magnitude(weight: Tensor, norm: int = 1) -> Tensor:
    """Score every weight by its absolute value to the power `norm` (Han et al. 2015, https://arxiv.org/abs/1506.02626).

    The power matters for units of several weights: 1 ranks them by their L1 norm, 2 by their L2 norm.
    """
    return weight.abs() if norm == 1 else weight.square()


def lookahead(weight: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """Score a weight by its size and that of the paths through it (Park et al. 2020, https://arxiv.org/abs/2002.04809).

    |w| times the norm of the weights that feed its input, times the norm of those that its output feeds.

    Args:
        weight: (out, in).
        before: (in,) norm of the weights in front of every input; 1 where there are none.
        after: (out,) norm of the weights behind every output; 1 where there are none.
    """
    return weight.abs() * before * after[:, None]


def lamp(squares: Tensor) -> Tensor:
    """Score a unit by its square over the sum of all squares of the layer not smaller than it, itself included.

    Layer-adaptive magnitude pruning (Lee et al. 2021, https://arxiv.org/abs/2010.07611): scores of different layers
    can be compared, so it goes with scope="global". The largest unit of every layer scores 1: no layer dies.

    Args:
        squares: squared norms of the weights or units of one layer, any shape.
    """
    values, order = squares.flatten().double().sort(descending=True, stable=True)
    scores = torch.empty_like(values)
    scores[order] = values / values.cumsum(0).clamp(min=torch.finfo(torch.float64).tiny)
    return scores.view_as(squares).to(squares.dtype)


def gradient(total: Tensor) -> Tensor:
    """Score by the size of the summed sensitivity, |sum of gradient * weight|.

    The first-order estimate of how much the loss changes (Mozer and Smolensky 1988, skeletonization,
    https://papers.nips.cc/paper/1988/hash/07e1cd7dca89a1678042477183b7ac3f-Abstract.html).
    """
    return total.abs()


def taylor(squares: Tensor) -> Tensor:
    """Score by the sum of squared sensitivities (Molchanov et al. 2019, https://arxiv.org/abs/1906.10771)."""
    return squares


def movement(total: Tensor) -> Tensor:
    """Score by how far training moves a weight away from zero (Sanh et al. 2020, https://arxiv.org/abs/2005.07683).

    Minus the sum of the sensitivities. Pruned weights go on being scored and may come back.
    """
    return total


def soft_movement(score: Tensor) -> Tensor:
    """Score by the sigmoid of trained scores (soft movement, Sanh et al. 2020, https://arxiv.org/abs/2005.07683).

    The published method prunes below a fixed threshold; here the schedule sets it, so that the sparsity is exact.
    """
    return score.sigmoid()


def hard_concrete(score: Tensor) -> Tensor:
    """Score by the probability that the gate is open (Louizos et al. 2018, https://arxiv.org/abs/1712.01312)."""
    return (score - TEMPERATURE * math.log(-LOW / HIGH)).sigmoid()


def sampled_gate(log_alpha: Tensor) -> Tensor:
    """Draw hard concrete gates in [0, 1] from torch's random state."""
    noise = torch.empty_like(log_alpha).uniform_(1e-6, 1 - 1e-6)
    soft = ((noise.log() - (1 - noise).log() + log_alpha) / TEMPERATURE).sigmoid()
    return (soft * (HIGH - LOW) + LOW).clamp(0, 1)


def expected_gate(log_alpha: Tensor) -> Tensor:
    """Return the gates that stand for the random ones in evaluation."""
    return (log_alpha.sigmoid() * (HIGH - LOW) + LOW).clamp(0, 1)


def descend_soft(score: Tensor, sensitivity: Tensor, options: Options) -> Tensor:
    """Descend along the sensitivity and the gradient of `sparsity_penalty * sum(sigmoid(score))`."""
    return _descend(score, sensitivity, score.sigmoid(), options)


def descend_hard_concrete(score: Tensor, sensitivity: Tensor, options: Options) -> Tensor:
    """Descend along the gradient for log alpha and that of `sparsity_penalty` * the expected number of open gates."""
    return _descend(score, sensitivity, hard_concrete(score), options)


def _descend(score: Tensor, sensitivity: Tensor, open: Tensor, options: Options) -> Tensor:
    # The gradient of a single weight is tiny and its scale arbitrary. Its root mean square over the layer stands in
    # for the second moment by which Adam, the optimizer of the published scores, divides.
    # Relative to the largest one, or the squares of tiny ones would be 0 and the quotient enormous.
    tiny = torch.finfo(sensitivity.dtype).tiny
    relative = sensitivity / sensitivity.abs().amax().clamp(min=tiny)
    scale = relative.square().mean().sqrt().clamp(min=tiny)
    penalty: Tensor = options.sparsity_penalty * open * (1 - open)
    rate: float = options.score_learning_rate
    return score - rate * (relative / scale + penalty)


@dataclass(frozen=True)
class Criterion:
    """How weights are ranked.

    Args:
        score: layer -> a score for every weight (out, in), or for every block as they were gathered; higher is kept.
        update: (gathered, sensitivity, options) -> gathered, after every optimizer step; None: needs no gradient.
        revives: whether pruned weights are scored and may come back, so that their values are kept.
        fresh: whether gathering begins anew after each pruning step.
        start: what gathering begins with.
        of_units: scores of the units of a layer, any shape, from those that are the sums or means of their weights'
            scores, after which units are ranked; None: as they are.
        neighbours: whether the score reads the norms of neighbouring weights.
        gates: whether what is gathered is the log alpha of hard concrete gates, which multiply the weights.
        before_training: whether sensitivities are those of the untouched weights, which wait for a "one_shot" pruning.

    Raises:
        ValueError: a field with a value that is not allowed, or one that goes with `update` without it.
    """

    score: Callable[[Layer], Tensor]
    update: Callable[[Tensor, Tensor, Options], Tensor] | None = None
    revives: bool = False
    fresh: bool = False
    start: float = 0.0
    of_units: Callable[[Tensor], Tensor] | None = None
    neighbours: bool = False
    gates: bool = False
    before_training: bool = False

    def __post_init__(self) -> None:
        check(self, "score", callable(self.score), "a function of a layer")
        for field in ("update", "of_units"):
            check(self, field, getattr(self, field) is None or callable(getattr(self, field)), "a function or None")
        check(self, "start", isinstance(self.start, int | float) and math.isfinite(self.start), "a finite number")
        for field in ("revives", "fresh", "neighbours", "gates", "before_training"):
            check(self, field, isinstance(getattr(self, field), bool), "True or False")
        for field in ("fresh", "start", "gates", "before_training"):
            check(self, field, not getattr(self, field) or self.update is not None, "left out without update")


def _of_gathered(score: Callable[[Tensor], Tensor]) -> Callable[[Layer], Tensor]:
    return lambda layer: score(cast(Tensor, layer.gathered))


CRITERIA = Table(
    "CRITERIA",
    Criterion,
    {
        "random": Criterion(lambda layer: random(layer.weight, layer.generator)),
        "magnitude": Criterion(lambda layer: magnitude(layer.weight, layer.options.magnitude_norm)),
        "gradient": Criterion(_of_gathered(gradient), lambda total, each, options: total + each, fresh=True),
        "taylor": Criterion(_of_gathered(taylor), lambda squares, each, options: squares + each.square(), fresh=True),
        "lookahead": Criterion(
            lambda layer: lookahead(layer.weight, *cast(tuple[Tensor, Tensor], layer.neighbours)), neighbours=True
        ),
        "lamp": Criterion(lambda layer: magnitude(layer.weight, 2), of_units=lamp),
        "movement": Criterion(_of_gathered(movement), lambda total, each, options: total - each, revives=True),
        "soft_movement": Criterion(_of_gathered(soft_movement), descend_soft, revives=True),
        "l0": Criterion(_of_gathered(hard_concrete), descend_hard_concrete, start=OPEN, gates=True),
        # EPSD (https://arxiv.org/abs/2402.00084): the sensitivity of the self-distillation loss of the untouched model.
        "epsd": Criterion(_of_gathered(gradient), lambda total, each, options: total + each, before_training=True),
    },
)
