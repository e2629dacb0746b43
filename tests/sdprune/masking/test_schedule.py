"""Schedules are pure functions that end exactly at the target."""

from itertools import pairwise

import pytest

from sdprune import SDPruneConfig
from sdprune.masking.schedule import (
    check_gradients_come_first,
    lr_factor,
    pruning_moments,
    sparsity_before,
    sparsity_levels,
)


@pytest.mark.parametrize("schedule", ["uniform", "geometric", "cubic"])
@pytest.mark.parametrize("steps", [1, 2, 7, 32])
def test_levels_rise_to_exactly_the_target(schedule, steps):
    levels = sparsity_levels(SDPruneConfig(target_sparsity=0.9, schedule=schedule, pruning_steps=steps))
    assert len(levels) == steps
    assert levels[-1] == 0.9
    assert all(a < b for a, b in zip((0.0, *levels), levels, strict=False))


def test_formulas():
    def levels(schedule):
        return sparsity_levels(SDPruneConfig(target_sparsity=0.8, schedule=schedule, pruning_steps=4))

    assert levels("uniform") == pytest.approx((0.2, 0.4, 0.6, 0.8))
    assert levels("cubic") == pytest.approx((0.4625, 0.7, 0.7875, 0.8))
    geometric = levels("geometric")
    kept = [1.0, *(1.0 - level for level in geometric)]
    assert [b / a for a, b in pairwise(kept)] == pytest.approx([0.2**0.25] * 4)


def test_one_shot_takes_one_step():
    assert sparsity_levels(SDPruneConfig(schedule="one_shot", pruning_steps=1, target_sparsity=0.3)) == (0.3,)
    with pytest.raises(ValueError, match="pruning_steps must be 1 with schedule='one_shot', got 16"):
        SDPruneConfig(schedule="one_shot")


def test_moments_are_evenly_spaced_between_the_ratios():
    config = SDPruneConfig(pruning_steps=5, start_ratio=0.1, end_ratio=0.5)
    assert pruning_moments(config, 100) == (10, 20, 30, 40, 50)
    assert pruning_moments(SDPruneConfig(pruning_steps=4, end_ratio=1.0), 10) == (0, 3, 6, 9)


@pytest.mark.parametrize("max_steps", [16, 17, 31, 97])
def test_moments_never_coincide(max_steps):
    moments = pruning_moments(SDPruneConfig(pruning_steps=16, end_ratio=1.0), max_steps)
    assert len(set(moments)) == 16
    assert moments[-1] < max_steps


def test_a_schedule_longer_than_the_training_is_refused():
    message = "pruning_steps=16 do not fit: the training has 20 steps, of which 13 lie between"
    with pytest.raises(ValueError, match=message):
        pruning_moments(SDPruneConfig(pruning_steps=16, end_ratio=0.6), 20)


def test_nothing_to_prune_needs_no_room():
    config = SDPruneConfig(target_sparsity=0.0, pruning_steps=16)
    assert pruning_moments(config, 3) == ()
    assert sparsity_before(config, 3, 2) == 0.0


def test_sparsity_before_counts_finished_moments():
    config = SDPruneConfig(target_sparsity=0.8, schedule="uniform", pruning_steps=4, end_ratio=0.75)
    assert [sparsity_before(config, 16, step) for step in (0, 1, 4, 5, 12, 13, 16)] == pytest.approx(
        [0.0, 0.2, 0.2, 0.4, 0.6, 0.8, 0.8]
    )


def test_the_learning_rate_restarts_after_each_pruning_step():
    config = SDPruneConfig(pruning_steps=3, start_ratio=0.2, end_ratio=0.6)
    assert pruning_moments(config, 50) == (10, 20, 30)
    factors = [lr_factor(config, 50, step) for step in range(51)]
    assert all(factors[step] == 1.0 for step in (0, 10, 20, 30))
    assert factors[5] == pytest.approx(0.55)
    assert factors[19] == pytest.approx(1 - 0.9 * 0.9)
    assert factors[40] == pytest.approx(0.55)  # the last cycle lasts to the end
    assert factors[50] == pytest.approx(0.1)
    falling = [after < before for before, after in pairwise(factors)]
    assert [step + 1 for step, falls in enumerate(falling) if not falls] == [10, 20, 30]


def test_gradients_come_before_the_first_pruning_step():
    config = SDPruneConfig(criterion="movement")
    with pytest.raises(ValueError, match=r"criterion='movement' ranks by gradients.*start_ratio to at least 0\.01"):
        check_gradients_come_first(config, 100)
    check_gradients_come_first(SDPruneConfig(criterion="movement", start_ratio=0.01), 100)
    check_gradients_come_first(SDPruneConfig(), 100)
