"""Times of calls that take turns, and the memory one of them needs."""

import gc
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Call = Callable[[], Any]
LEAST_REPEATS = 3  # of a call that is hopeless
LONG, FAR_BEHIND = 1000.0, 4  # milliseconds, and times the fastest


@dataclass(frozen=True)
class Times:
    """Milliseconds of one call: the median, and the quantiles that 20 % and 80 % of the repeats stay below."""

    median: float
    p20: float
    p80: float
    repeats: int


def measure(calls: Mapping[str, Call], device: torch.device, repeats: int) -> dict[str, Times]:
    """Time every call `repeats` times after two for warming up; they take turns, so that a drift hits all alike.

    Wall time on a CPU, where a call of seconds that takes several times as long as the fastest is timed three times
    only, lest a comparison wait for it most of its time; the time between two events of the queue on a GPU.
    """
    threads = torch.get_num_threads()
    for call in calls.values():
        call()
        if torch.get_num_threads() != threads:  # a library that starts its own threads may change how many torch has
            torch.set_num_threads(threads)
        call()
    spans = (_event_spans if device.type == "cuda" else _wall_spans)(calls, device, repeats)
    return {name: _times(values) for name, values in spans.items()}


def _wall_spans(calls: Mapping[str, Call], device: torch.device, repeats: int) -> dict[str, list[float]]:
    spans: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats):
        for name, call in calls.items():
            if repeat >= LEAST_REPEATS and spans[name][0] > max(LONG, FAR_BEHIND * min(map(min, spans.values()))):
                continue
            start = time.perf_counter()
            call()
            spans[name].append(1e3 * (time.perf_counter() - start))
    return spans


def _event_spans(calls: Mapping[str, Call], device: torch.device, repeats: int) -> dict[str, list[float]]:
    marks: dict[str, list[tuple[Any, Any]]] = {name: [] for name in calls}
    with torch.cuda.device(device):
        for _ in range(repeats):
            for name, call in calls.items():
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
                start.record()
                call()
                end.record()
                marks[name].append((start, end))
        torch.cuda.synchronize(device)
    return {name: [start.elapsed_time(end) for start, end in pairs] for name, pairs in marks.items()}


def _times(spans: list[float]) -> Times:
    p20, _, _, p80 = statistics.quantiles(spans, n=5, method="inclusive")
    return Times(statistics.median(spans), p20, p80, len(spans))


def peak_mib(call: Call, device: torch.device) -> float:
    """The most memory in MiB that one call holds beyond what is held before it, its results included."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    # The allocator's own reports: they include what compiled code allocates.
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        call()
    live = peak = 0
    events = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak / 2**20


def device_name(device: torch.device) -> str:
    """What the device calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    information = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.*)", information.read_text()) if information.exists() else []
    return f"CPU {models[0] if models else platform.machine()}, {os.cpu_count()} cores"
