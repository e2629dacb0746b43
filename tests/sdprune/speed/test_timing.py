"""Times of calls in turns, and the memory that they need."""

import time

import pytest
import torch

from sdprune.speed import timing
from sdprune.speed.timing import device_name, measure, peak_mib

CPU = torch.device("cpu")


def test_calls_take_turns_after_warming_up():
    order = []
    calls = {"a": lambda: order.append("a"), "b": lambda: (order.append("b"), time.sleep(0.003))}
    times = measure(calls, CPU, 4)
    assert order == [*"aabb", *"abababab"]
    assert times["a"].repeats == times["b"].repeats == 4
    assert 3.0 <= times["b"].p20 <= times["b"].median <= times["b"].p80
    assert times["a"].median < times["b"].median


def test_the_number_of_threads_stays():
    before = torch.get_num_threads()
    changes = iter([before + 1])
    seen = []

    def call():
        torch.set_num_threads(next(changes, torch.get_num_threads()))
        seen.append(torch.get_num_threads())

    measure({"changes": call}, CPU, 3)
    assert seen == [before + 1, *[before] * 4]
    assert torch.get_num_threads() == before


def test_memory_is_the_most_that_is_held_at_once():
    def call():
        first = torch.empty(2**20)  # 4 MiB
        del first
        second, third = torch.empty(2**19), torch.empty(2**19)
        return second[0] + third[0]

    assert peak_mib(call, CPU) == pytest.approx(4.0, abs=0.01)


def test_a_device_has_a_name():
    assert device_name(CPU).startswith("CPU ")


def test_a_call_of_seconds_far_behind_is_timed_three_times(monkeypatch):
    monkeypatch.setattr(timing, "LONG", 2.0)
    calls = {"quick": lambda: None, "slow": lambda: time.sleep(0.003)}
    times = measure(calls, CPU, 5)
    assert (times["quick"].repeats, times["slow"].repeats) == (5, 3)
    monkeypatch.setattr(timing, "LONG", 1000.0)
    assert measure(calls, CPU, 5)["slow"].repeats == 5
