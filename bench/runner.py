"""One case of a grid: gate, times, memory; and how a run goes through many of them."""

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from bench.grid import DTYPES, MATMUL_PRECISIONS, Call, Case, Contender, Grid
from bench.machine import FITTING_SHARE, Machine, synchronize
from bench.results import Row, append_rows, identity, read_rows
from bench.timing import DeviceLost, Times, measure, peak_mib
from sdp_kernels.spec import Inputs

BASELINE_LIMIT = 0.1  # relative error up to which a baseline counts as computing the same
COMPILE_SECONDS = 10.0


@dataclass(frozen=True)
class Settings:
    """How a run is made."""

    results: Path
    seconds: float = 1.0  # of timing for each contender of a case
    longest_call: float = 60.0  # seconds; a case with a longer one is skipped
    without: tuple[str, ...] = ()  # contenders to leave out
    again: bool = False  # measure what is already there


class Job(NamedTuple):
    """A case and where it belongs."""

    grid: Grid
    case: Case


class Watch:
    """What a run tells while it goes on; here a progress bar."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.bar = tqdm(total=len(jobs), unit="case", dynamic_ncols=True)
        self.left = 0

    def started(self, job: Job, seconds: float) -> None:
        """A case begins and takes about so long."""
        self.bar.set_description(f"{job.grid.name} {'x'.join(map(str, job.case.shape))} {job.case.dtype}")

    def at(self, name: str) -> None:
        """A contender of the case has its turn; the empty name stands for all of them, in turns."""

    def ended(self, job: Job, rows: Sequence[Row]) -> None:
        """Its rows, which are on disk; of a case that is left out, none."""
        self.left += not rows
        self.bar.update()

    def close(self) -> None:
        """The run is over."""
        self.bar.close()
        if self.left:
            print(f"{self.left} of {self.bar.total} cases were left out: no time")


class Step:
    """Forward and backward, as a training step needs them: the result, and the gradients of the leaves."""

    def __init__(self, call: Call, leaves: Sequence[Tensor]) -> None:
        self.call = call
        self.leaves = leaves
        self.cotangent: Tensor | None = None

    def __call__(self) -> list[Tensor]:
        output = self.call()
        if not self.leaves:
            return [output]
        if self.cotangent is None:
            values = torch.linspace(0.5, 1.5, output.numel(), device=output.device, dtype=output.dtype)
            self.cotangent = values.view(output.shape)
        return [output.detach(), *torch.autograd.grad(output, self.leaves, self.cotangent)]


def run(
    jobs: Sequence[Job],
    machine: Machine,
    settings: Settings,
    deadline: float = math.inf,
    watch: Watch | None = None,
) -> list[Row]:
    """Measure the jobs in order and append their rows; returns the rows of all jobs, old ones included.

    Args:
        jobs: the most telling first.
        machine: where.
        settings: how.
        deadline: of `time.monotonic()`; a job that would probably end later is left for the next run.
        watch: is told of each job; a progress bar if None.

    Raises:
        DeviceLost: the GPU is of no more use to this process; a row says why.
    """
    rows: list[Row] = []
    stamp = machine.stamp()
    known = _known_rows(jobs, machine, settings)
    factor: float | None = None  # by which the last job took longer than expected; the first one loads everything
    watch = watch or Watch(jobs)
    for job in jobs:
        present = known.get(identity(stamp | job_row(job)), [])
        if present and not settings.again:
            rows += present
            watch.ended(job, present)
            continue
        expected = expected_seconds(job.grid, job.case, machine, settings)
        started = time.monotonic()
        if started + (factor or 1.0) * expected > deadline:
            watch.ended(job, [])
            continue
        watch.started(job, expected)
        lost: DeviceLost | None = None
        try:
            found = run_case(job.grid, job.case, machine, settings, watch.at)
        except DeviceLost as error:
            lost = error
            found = [row for row in error.rows if row["contender"] != error.name] + [_failed(error.name, error)]
        if machine.device.type == "cuda" and lost is None:
            torch.cuda.empty_cache()
        factor = 1.0 if factor is None else max(1.0, (time.monotonic() - started) / expected)
        found = stamped(job, machine, stamp, found)
        append_rows(results_path(job.grid, machine, settings), found)
        rows += found
        watch.ended(job, found)
        if lost is not None:
            raise lost
    watch.close()
    return rows


def job_row(job: Job) -> Row:
    """What the rows of a case have in common, wherever it runs."""
    return {"op": job.grid.name, "shape": list(job.case.shape), "dtype": job.case.dtype}


def stamped(job: Job, machine: Machine, stamp: Row, measured: Sequence[Row]) -> list[Row]:
    """Whole rows: of what, by whom, where and when."""
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return [job_row(job) | row | stamp | {"date": date} for row in measured]


def results_path(grid: Grid, machine: Machine, settings: Settings) -> Path:
    """The file of this grid on this device."""
    return settings.results / machine.slug / f"{grid.name}.jsonl"


def _known_rows(jobs: Sequence[Job], machine: Machine, settings: Settings) -> dict[str, list[Row]]:
    known: dict[str, dict[str, Row]] = {}
    for grid in {job.grid.name: job.grid for job in jobs}.values():
        for row in read_rows(results_path(grid, machine, settings)):
            known.setdefault(identity(row), {})[row["contender"]] = row
    return {key: list(rows.values()) for key, rows in known.items()}


def call_seconds(grid: Grid, case: Case, machine: Machine) -> float:
    """About how long the slowest call takes: the reference in float64."""
    work = grid.heaviest(case.shape)
    return work.bytes / machine.copy_rate + work.flops / machine.matmul_rates["fp64"]


def expected_seconds(grid: Grid, case: Case, machine: Machine, settings: Settings) -> float:
    """About how long a case takes: the gate's two references, one compilation and each contender's calls."""
    call = min(call_seconds(grid, case, machine), settings.longest_call)
    return 2 * call + COMPILE_SECONDS + 4 * max(settings.seconds, 5 * call / 2)


def run_case(
    grid: Grid, case: Case, machine: Machine, settings: Settings, at: Callable[[str], None] = lambda _: None
) -> list[Row]:
    """The rows of one case, one a contender; a contender has a time only if it is right.

    Before its first call, `at` gets its name; an empty one before all of them are timed.
    """
    memory = grid.heaviest(case.shape).memory
    if memory > FITTING_SHARE * machine.memory:
        return _skipped(f"needs {memory / 2**30:.0f} GiB, {machine.memory / 2**30:.0f} are there")
    seconds = call_seconds(grid, case, machine)
    if seconds > settings.longest_call:
        return _skipped(f"a call takes {seconds:.0f} s, allowed {settings.longest_call:.0f}")
    torch.compiler.reset()  # or torch.compile gives up on a function after a few shapes
    torch.set_float32_matmul_precision(MATMUL_PRECISIONS[case.dtype])
    try:
        return _gate_and_measure(grid, case, machine, settings, at)
    except torch.OutOfMemoryError as error:
        return _skipped(str(error).splitlines()[0])
    finally:
        torch.set_float32_matmul_precision("highest")
        gc.collect()


def _skipped(reason: str) -> list[Row]:
    return [{"contender": "ours", "skipped": reason}]


def _gate_and_measure(
    grid: Grid, case: Case, machine: Machine, settings: Settings, at: Callable[[str], None]
) -> list[Row]:
    torch.manual_seed(0)
    inputs = grid.inputs(case.shape, DTYPES[case.dtype], machine.device)
    truth = reference_results(grid, inputs, torch.float64)
    allowed = [
        2 * lost + grid.floors[case.dtype]
        for lost in relative_errors(reference_results(grid, inputs, DTYPES[case.dtype]), truth)
    ]
    leaves = require_gradients(grid, inputs)
    rows: dict[str, Row] = {}
    steps: dict[str, Step] = {}
    contenders = {
        name: contender
        for name, contender in grid.contenders().items()
        if machine.device.type in contender.devices and name not in settings.without
    }
    for name, contender in contenders.items():
        at(name)
        try:
            given, expected = inputs, truth
            if contender.own is not None:
                given = contender.own(inputs)
                expected = reference_results(grid, given, torch.float64)
            step = Step(contender(given), leaves)
            errors = relative_errors(step(), expected)
        except Exception as error:  # any library may be among the contenders: its row says what it raised
            rows[name] = _failed(name, error)
            _check_device(name, machine.device, rows)
            continue
        limits = allowed if name == "ours" else [BASELINE_LIMIT] * len(errors)
        correct = all(error <= limit for error, limit in zip(errors, limits, strict=True))
        rows[name] = {"contender": name, "correct": correct, "error": _finite(max(errors)), "allowed": max(limits)}
        if not correct:  # of the value and of each gradient
            rows[name] |= {"errors": [_finite(error) for error in errors], "limits": limits}
        else:
            steps[name] = step
    del truth
    if "ours" not in steps:
        return list(rows.values())  # no ratio is reported on a red gate
    itemsize = DTYPES[case.dtype].itemsize
    bound = 1e3 * machine.seconds(grid.bound(case.shape, itemsize), case.dtype)
    at("")
    for times in _timed_alike(contenders, steps, machine.device, settings, rows):
        for name, taken in times.items():
            if "median_ms" in rows[name]:
                continue
            rows[name] |= {
                "median_ms": taken.median,
                "p20_ms": taken.p20,
                "p80_ms": taken.p80,
                "host_ms": taken.host,
                "repeats": taken.repeats,
                "timing": taken.how,
                "ratio_to_ours": taken.median / times["ours"].median,
                "peak_mib": peak_mib(steps[name], machine.device),
                "bound_ms": bound,
            }
    return list(rows.values())


def _timed_alike(
    contenders: Mapping[str, Contender],
    steps: Mapping[str, Step],
    device: torch.device,
    settings: Settings,
    rows: Mapping[str, Row],
) -> Iterator[dict[str, Times]]:
    """Times of all steps, in groups that are each timed in one way; ours is in every group."""
    graph = device.type == "cuda" and contenders["ours"].captured
    alike = {name: step for name, step in steps.items() if not graph or contenders[name].captured}
    others = {name: step for name, step in steps.items() if name not in alike}
    try:
        yield measure(alike, device, settings.seconds, graph)
        if others:
            yield measure({"ours": steps["ours"]} | others, device, settings.seconds, graph=False)
    except DeviceLost as error:
        error.rows = list(rows.values())
        raise
    except RuntimeError:
        _check_device("ours", device, rows)
        raise


def _check_device(name: str, device: torch.device, rows: Mapping[str, Row]) -> None:
    """Raise `DeviceLost` if what a contender did has left the GPU without use."""
    try:
        synchronize(device)
    except RuntimeError as error:
        lost = DeviceLost(name, "the GPU is lost to the process", error)
        lost.rows = list(rows.values())
        raise lost from error


def _failed(name: str, error: Exception) -> Row:
    lines = str(error).strip().splitlines() or [""]
    row = {"contender": name, "failed": f"{type(error).__name__}: {lines[0][:200]}"}
    return row | {"correct": False} if name == "ours" else row


def _finite(value: float) -> float | None:
    """JSON knows no NaN."""
    return value if math.isfinite(value) else None


def relative_errors(results: Sequence[Tensor], truth: Sequence[Tensor]) -> list[float]:
    """Largest deviation of each tensor, relative to its largest true entry; NaN where there is one."""
    return [
        float((result.double() - true).abs().max() / true.abs().max().clamp_min(torch.finfo(torch.float64).tiny))
        for result, true in zip(results, truth, strict=True)
    ]


def reference_results(grid: Grid, inputs: Inputs, dtype: torch.dtype) -> list[Tensor]:
    """Result and gradients of the reference, on copies of the inputs in `dtype`."""
    copies = {name: _convert(value, dtype) for name, value in inputs.items()}
    leaves = require_gradients(grid, copies)
    return Step(lambda: grid.reference(**copies), leaves)()


def require_gradients(grid: Grid, inputs: Mapping[str, Any]) -> list[Tensor]:
    """Make leaves of the inputs that get a gradient."""
    values = [inputs[name] for name in grid.grad_args]
    flat = [tensor for value in values for tensor in ([value] if isinstance(value, Tensor) else value)]
    return [tensor.requires_grad_() for tensor in flat]


def _convert(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone().to(dtype) if value.is_floating_point() else value
    if isinstance(value, list):
        return [_convert(item, dtype) for item in value]
    return value
