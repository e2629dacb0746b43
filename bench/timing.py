"""Times of several contenders, interleaved, and the memory each one needs."""

import gc
import math
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


class DeviceLost(RuntimeError):
    """Something went wrong after which nothing more is to be done on the GPU in this process.

    Attributes:
        name: of the contender at work.
        rows: what was known by then of the case at hand.
    """

    def __init__(self, name: str, what: str, error: Exception) -> None:
        super().__init__(f"{what}: {error}")
        self.name = name
        self.rows: list[dict[str, Any]] = []


def measure(steps: Mapping[str, Step], device: torch.device, seconds: float, graph: bool = True) -> dict[str, Times]:
    """Time every step, which has run before, in turns, for about `seconds` a step.

    Args:
        steps: what to time, in the same way each.
        device: where.
        seconds: for each.
        graph: on a GPU, replay CUDA graphs of the steps; otherwise launch them.

    Raises:
        DeviceLost: the capture of one of the steps failed.
    """
    gc.collect()
    return _measure_cuda(steps, device, seconds, graph) if device.type == "cuda" else _measure_cpu(steps, seconds)


def _measure_cpu(steps: Mapping[str, Step], seconds: float) -> dict[str, Times]:
    device = torch.device("cpu")
    repeats = _repeats(sum(_wall(step, device) for step in steps.values()), seconds * len(steps))
    walls: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            walls[name].append(1e3 * _wall(step, device))
    return {name: _times(wall, None, "wall") for name, wall in walls.items()}


def _measure_cuda(steps: Mapping[str, Step], device: torch.device, seconds: float, graph: bool) -> dict[str, Times]:
    """GPU time from a cold L2 cache, and the host's time for an ordinary call."""
    timed = {name: _capture(name, step) for name, step in steps.items()} if graph else dict(steps)
    hosts = {name: _host_milliseconds(step, device) for name, step in steps.items()}
    flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.uint8, device=device)
    # The GPU is kept busy until the host has launched everything, so that no gap between launches is timed.
    flushes = _times_to_fill(0.1 if graph else 1.5 * max(hosts.values()), lambda: _wall(flush.zero_, device))
    repeats = _repeats(sum(_wall(step, device) for step in timed.values()), seconds * len(steps))
    marks: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in timed.items():
            start, end = _event(), _event()
            for _ in range(flushes):
                flush.zero_()
            start.record()
            step()
            end.record()
            marks[name].append((start, end))
    synchronize(device)
    return {
        name: _times(
            [start.elapsed_time(end) for start, end in marks[name]], hosts[name], "graph" if graph else "events"
        )
        for name in timed
    }


def _times_to_fill(milliseconds: float, wall: Callable[[], float]) -> int:
    """How often something must be done to take so long; the first time may take longer, as its code is loaded."""
    return 1 + math.ceil(1e-3 * milliseconds / min(wall() for _ in range(3)))


def _host_milliseconds(step: Step, device: torch.device) -> float:
    """Until an ordinary call returns on an idle GPU."""
    spans = []
    for _ in range(10):
        synchronize(device)
        start = time.perf_counter()
        step()
        spans.append(1e3 * (time.perf_counter() - start))
    synchronize(device)
    return statistics.median(spans)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _capture(name: str, step: Step) -> Step:
    """Replays the step as a CUDA graph."""
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
    except RuntimeError as error:
        raise DeviceLost(name, "in the capture of a CUDA graph, which it may have to be kept from", error) from error
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
