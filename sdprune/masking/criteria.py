"""Criteria: what a weight is worth. Tensors in, scores out; a higher score is kept longer.

Most rank by the weights as they are. Those that need gradients rank by the sensitivity: the gradient of the loss
for a factor of 1 on a weight (or on a whole block), which is gradient * weight (summed over the block). They gather
it step by step into one number for each weight or block, with no copy of the model and, for blocks, no dense gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sdprune.config import SDPruneConfig

OPEN = 2.2  # log alpha at the beginning: gates are open with probability 0.99 and 0.98 in the mean
# Louizos et al. (https://arxiv.org/abs/1712.01312), section 4
TEMPERATURE, LOW, HIGH = 2.0 / 3.0, -0.1, 1.1


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


def add(score: Tensor, sensitivity: Tensor, config: SDPruneConfig) -> Tensor:
    """Sum the sensitivities."""
    return score + sensitivity


def add_squares(score: Tensor, sensitivity: Tensor, config: SDPruneConfig) -> Tensor:
    """Sum the squared sensitivities."""
    return score + sensitivity.square()


def subtract(score: Tensor, sensitivity: Tensor, config: SDPruneConfig) -> Tensor:
    """Subtract the sensitivity: gradient descent on the scores."""
    return score - sensitivity


def descend_soft(score: Tensor, sensitivity: Tensor, config: SDPruneConfig) -> Tensor:
    """Descend along the sensitivity and the gradient of `sparsity_penalty * sum(sigmoid(score))`."""
    return _descend(score, sensitivity, score.sigmoid(), config)


def descend_hard_concrete(score: Tensor, sensitivity: Tensor, config: SDPruneConfig) -> Tensor:
    """Descend along the gradient for log alpha and that of `sparsity_penalty` * the expected number of open gates."""
    return _descend(score, sensitivity, hard_concrete(score), config)


def _descend(score: Tensor, sensitivity: Tensor, open: Tensor, config: SDPruneConfig) -> Tensor:
    # The gradient of a single weight is tiny and its scale arbitrary. Its root mean square over the layer stands in
    # for the second moment by which Adam, the optimizer of the published scores, divides.
    # Relative to the largest one, or the squares of tiny ones would be 0 and the quotient enormous.
    tiny = torch.finfo(sensitivity.dtype).tiny
    relative = sensitivity / sensitivity.abs().amax().clamp(min=tiny)
    scale = relative.square().mean().sqrt().clamp(min=tiny)
    penalty = config.sparsity_penalty * open * (1 - open)
    return score - config.score_learning_rate * (relative / scale + penalty)


@dataclass(frozen=True)
class Criterion:
    """How weights are ranked.

    Args:
        score: the function of the table's name. Called with the weight (and what else it takes), or with what was
            gathered.
        update: (gathered, sensitivity, config) -> gathered, after every optimizer step; None: needs no gradient.
        revives: whether pruned weights are scored and may come back, so that their values are kept.
        fresh: whether what was gathered is forgotten after each pruning step.
        start: what gathering begins with.
    """

    score: Callable[..., Tensor]
    update: Callable[[Tensor, Tensor, SDPruneConfig], Tensor] | None = None
    revives: bool = False
    fresh: bool = False
    start: float = 0.0


CRITERIA: dict[str, Criterion] = {
    "random": Criterion(random),
    "magnitude": Criterion(magnitude),
    "lookahead": Criterion(lookahead),
    "lamp": Criterion(lamp),
    "gradient": Criterion(gradient, add, fresh=True),
    "taylor": Criterion(taylor, add_squares, fresh=True),
    "movement": Criterion(movement, subtract, revives=True),
    "soft_movement": Criterion(soft_movement, descend_soft, revives=True),
    "l0": Criterion(hard_concrete, descend_hard_concrete, start=OPEN),
    # EPSD (https://arxiv.org/abs/2402.00084): the sensitivity of the self-distillation loss of the untouched network.
    "epsd": Criterion(gradient, add),
}
