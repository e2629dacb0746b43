"""Convergence: how soon the score comes back after a pruning step, and what it is until the next one."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Recovery:
    """What followed one pruning step.

    Args:
        moment: optimizer steps that were finished when it happened.
        before: the last score before it.
        steps: optimizer steps until a score was at least the wanted fraction of `before`; None: not before the next
            pruning step, or the end.
        area: mean of the scores from then to the next pruning step or the end, by the trapezoidal rule over the
            steps; None with fewer than two scores.
    """

    moment: int
    before: float
    steps: int | None
    area: float | None


def recoveries(
    scores: Sequence[tuple[int, float]], moments: Sequence[int], *, fraction: float = 0.99
) -> list[Recovery]:
    """Return what followed every pruning step that was preceded by a score.

    The convergence diagnostic of self-distilled pruning (our reconstruction), https://arxiv.org/abs/2109.15014. It
    knows no more than the scores that were measured: recovery counts from the pruning step to the first of them that
    is high enough.

    Args:
        scores: (finished optimizer steps, score) in order; higher is better, scores are positive.
        moments: finished optimizer steps before every pruning step, in order.
        fraction: of the score before a pruning step that counts as recovered.
    """
    found = []
    for moment, following in zip(moments, [*moments[1:], float("inf")], strict=True):
        earlier = [score for step, score in scores if step <= moment]
        if not earlier:
            continue
        window = [(step, score) for step, score in scores if moment < step <= following]
        back = [step - moment for step, score in window if score >= fraction * earlier[-1]]
        found.append(Recovery(moment, earlier[-1], back[0] if back else None, _mean_height(window)))
    return found


def _mean_height(points: Sequence[tuple[int, float]]) -> float | None:
    if len(points) < 2:
        return None
    area = sum((right[0] - left[0]) * (left[1] + right[1]) / 2 for left, right in itertools.pairwise(points))
    return area / (points[-1][0] - points[0][0])
