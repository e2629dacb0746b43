"""Times of several contenders, interleaved, and the memory each one needs."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from bench.machine import synchronize

Step = Callable[[], Any]

L2_FLUSH_BYTES = 2**28  # more than the cache of any GPU


@dataclass(frozen=True)
class Times:
    """Milliseconds of one contender."""

    median: float
    p20: float
    p80: float
    host: float | None  # until a call returns on an idle GPU; None on a CPU, where it is the time itself
    repeats: int
    how: str  # "wall", "graph": GPU time of a CUDA graph's replay, "events": GPU time of ordinary launches


def measure(steps: Mapping[str, Step], device: torch.device, seconds: float) -> dict[str, Times]:
    """Time every step, which has run before, in turns, for about `seconds` a step."""
    gc.collect()
    return (_measure_cuda if device.type == "cuda" else _measure_cpu)(steps, device, seconds)


def _measure_cpu(steps: Mapping[str, Step], device: torch.device, seconds: float) -> dict[str, Times]:
    repeats = _repeats(sum(_wall(step, device) for step in steps.values()), seconds * len(steps))
    walls: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            walls[name].append(1e3 * _wall(step, device))
    return {name: _times(wall, None, "wall") for name, wall in walls.items()}


def _measure_cuda(steps: Mapping[str, Step], device: torch.device, seconds: float) -> dict[str, Times]:
    """GPU time of graph replays from a cold L2 cache, and the host's time for an ordinary call."""
    replays = {name: _capture(step) for name, step in steps.items()}
    flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.uint8, device=device)
    once = sum(_wall(replay or steps[name], device) for name, replay in replays.items())
    repeats = _repeats(once, seconds * len(steps))
    marks: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, replay in replays.items():
            start, end = _event(), _event()
            flush.zero_()  # also keeps the GPU busy until the replay is queued, so no launch gap is timed
            start.record()
            (replay or steps[name])()
            end.record()
            marks[name].append((start, end))
    synchronize(device)
    times = {}
    for name, replay in replays.items():
        spans = [start.elapsed_time(end) for start, end in marks[name]]
        hosts = []
        for _ in range(min(repeats, 20)):
            synchronize(device)
            start_time = time.perf_counter()
            steps[name]()
            hosts.append(1e3 * (time.perf_counter() - start_time))
        times[name] = _times(spans, statistics.median(hosts), "graph" if replay else "events")
    return times


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _capture(step: Step) -> Step | None:
    """Replays the step as a CUDA graph; None if it cannot be captured, because it waits for the GPU."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            step()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph.replay


def _wall(step: Step, device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    step()
    synchronize(device)
    return time.perf_counter() - start


def _repeats(once: float, seconds: float) -> int:
    return max(5, min(200, int(seconds / once)))


def _times(spans: list[float], host: float | None, how: str) -> Times:
    p20, _, _, p80 = statistics.quantiles(spans, n=5, method="inclusive")
    return Times(statistics.median(spans), p20, p80, host, len(spans), how)


def peak_mib(step: Step, device: torch.device) -> float:
    """The most memory that one call holds beyond what is held before it, its results included."""
    gc.collect()
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    # The allocator's own reports: they include what compiled code and operators without sub-operators allocate.
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        step()
    events = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak / 2**20
