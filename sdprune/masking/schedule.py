"""Schedules: pure functions of the step. Nothing here is remembered, so nothing can be lost on resuming.

A run prunes at `pruning_steps` moments. Moment i happens at the beginning of an optimizer step, after
`pruning_moments(...)[i]` steps were finished, and brings the sparsity to `sparsity_levels(...)[i]`.
"""

from bisect import bisect_left, bisect_right

from sdprune.config import SDPruneConfig
from sdprune.methods.criteria import CRITERIA


def sparsity_levels(config: SDPruneConfig) -> tuple[float, ...]:
    """Return the sparsity after each pruning step, the last one exactly the target.

    With progress t = (i + 1) / pruning_steps: "uniform" prunes target * t; "geometric" keeps
    (1 - target) ** t, an equal fraction of the remaining weights a step; "cubic" prunes
    target * (1 - (1 - t) ** 3) (Zhu and Gupta 2017, https://arxiv.org/abs/1710.01878).
    """
    levels = []
    for index in range(config.pruning_steps - 1):
        progress = (index + 1) / config.pruning_steps
        if config.schedule == "geometric":
            levels.append(1.0 - (1.0 - config.target_sparsity) ** progress)
        elif config.schedule == "cubic":
            levels.append(config.target_sparsity * (1.0 - (1.0 - progress) ** 3))
        else:
            levels.append(config.target_sparsity * progress)
    return (*levels, config.target_sparsity)


def pruning_moments(config: SDPruneConfig, max_steps: int) -> tuple[int, ...]:
    """Return after how many finished optimizer steps each pruning step happens, evenly spaced; () for target 0.

    Raises:
        ValueError: the training has fewer steps between start_ratio and end_ratio than there are pruning steps.
    """
    if config.target_sparsity == 0.0:
        return ()
    first = round(config.start_ratio * max_steps)
    last = min(round(config.end_ratio * max_steps), max_steps - 1)
    count = config.pruning_steps
    if last - first < count - 1:
        raise ValueError(
            f"pruning_steps={count} do not fit: the training has {max_steps} steps, of which "
            f"{max(last - first + 1, 0)} lie between start_ratio={config.start_ratio} and "
            f"end_ratio={config.end_ratio}; train longer or prune in fewer steps"
        )
    if count == 1:
        return (first,)
    return tuple(first + round(index * (last - first) / (count - 1)) for index in range(count))


def sparsity_before(config: SDPruneConfig, max_steps: int, step: int) -> float:
    """Return the sparsity that holds after `step` finished optimizer steps, before the next one begins."""
    done = bisect_left(pruning_moments(config, max_steps), step)
    return sparsity_levels(config)[done - 1] if done else 0.0


def lr_factor(config: SDPruneConfig, max_steps: int, step: int) -> float:
    """Return the factor of the learning rate after `step` finished optimizer steps when `lr_restarts` is set.

    It starts at 1 and falls linearly towards a tenth until the next pruning step, where it restarts (the cyclic
    schedule of GMP*, Kurtic and Alistarh 2022, https://arxiv.org/abs/2210.06384; prune-then-distill,
    https://arxiv.org/abs/2109.14960, restarts likewise). The last cycle lasts to the end of the training.
    """
    bounds = sorted({0, *pruning_moments(config, max_steps), max_steps})
    index = bisect_right(bounds, min(step, max_steps - 1)) - 1
    start, end = bounds[index], bounds[index + 1]
    return 1.0 - 0.9 * (min(step, end) - start) / (end - start)


def check_gradients_come_first(config: SDPruneConfig, max_steps: int) -> None:
    """Check that a criterion that needs gradients has them before the first pruning step.

    Raises:
        ValueError: the first pruning step comes before any training step.
    """
    moments = pruning_moments(config, max_steps)
    if CRITERIA[config.criterion].update is not None and moments and moments[0] == 0:
        raise ValueError(
            f"criterion={config.criterion!r} ranks by gradients, but the first pruning step comes before any training "
            f"step: set start_ratio to at least {1.0 / max_steps:.3g}, got {config.start_ratio}"
        )
