"""Every grid in one command, for the half hour in which a GPU is there.

    python -m bench gpu --minutes 9 --results DIR

The kernels that the grids launch are compiled first, on all cores. Then each grid runs in a process of its own, the
most telling one first, with an equal share of the time that is left; what is left over goes round again. A process that
dies, or that stays at one case too long and is killed, costs that case, whose row says so, and a new process takes the
rest.
"""

# mypy: disable-error-code="no-untyped-call"

import faulthandler
import importlib
import importlib.metadata
import importlib.util
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bench.grid import Case, Grid
from bench.machine import Machine, measure_machine
from bench.results import Row, append_rows, outcome, read_rows, summary
from bench.runner import COMPILE_SECONDS, Job, Settings, Watch, job_row, results_path, run, stamped
from bench.timing import DeviceLost
from sdp_kernels.compile_ahead import Specialisation, compile_ahead

GRIDS = "bench.grids"  # the module whose GRIDS are measured
HOPPER = 90  # what kernels are compiled for where there is no GPU
COMPILE_SHARE = 1 / 3  # of the time, at most
START_SECONDS = 180.0  # until a process has imported everything and begins with its first case
BETWEEN_SECONDS = 30.0  # from one case to the next, and to the end of the process
LEAST_SHARE = 40.0  # seconds: a process that has less spends it on its start
MOST_LOSSES = 4  # processes that one grid may lose


@dataclass(frozen=True)
class Plan:
    """What is to be measured, the most telling first."""

    grids: Mapping[str, Grid]
    device: str  # "cuda" or "cpu"
    quick: bool  # the smallest case of each grid

    def cases(self, name: str, device: str | None = None) -> list[Case]:
        """The cases of a grid, on the plan's device unless another is named."""
        grid, device = self.grids[name], device or self.device
        return [grid.smallest(device)] if self.quick else list(grid.cases(device))

    def jobs(self, device: str) -> list[Job]:
        """The cases of all grids by their priority."""
        jobs = [Job(self.grids[name], case) for name in self.grids for case in self.cases(name, device)]
        return sorted(jobs, key=lambda job: job.case.priority)


@dataclass
class Kernels:
    """What the grids would compile and launch."""

    wanted: dict[str, Specialisation] = field(default_factory=dict)  # by name, the most urgent first
    of_grid: dict[str, set[str]] = field(default_factory=dict)  # their names
    launches: dict[str, int] = field(default_factory=dict)


def kernels_of(plan: Plan, capability: int) -> Kernels:
    """The kernels that the cases of the plan launch on a GPU of this compute capability, without one."""
    from bench.launches import launches_of

    found = Kernels()
    jobs = plan.jobs("cuda")
    for grid, case in tqdm(jobs, desc="what is launched", unit="case", dynamic_ncols=True, leave=False):
        for launch in launches_of(grid, case, capability):
            found.wanted.setdefault(launch.name, launch.specialisation)
            found.of_grid.setdefault(grid.name, set()).add(launch.name)
            found.launches[grid.name] = found.launches.get(grid.name, 0) + 1
    return found


def describe(plan: Plan, capability: int) -> str:
    """The plan as plain text, with the number of kernels that it compiles."""
    kernels = kernels_of(plan, capability)
    lines = [f"{'grid':18}{'cases':>6}{'launches':>10}{'kernels':>9}  contenders (* timed without a CUDA graph)"]
    for name, grid in plan.grids.items():
        contenders = [
            f"{contender}{'' if each.captured and grid.contenders()['ours'].captured else '*'}"
            for contender, each in grid.contenders().items()
            if plan.device in each.devices
        ]
        lines.append(
            f"{name:18}{len(plan.cases(name)):6}{kernels.launches.get(name, 0):10}"
            f"{len(kernels.of_grid.get(name, ())):9}  {' '.join(contenders)}"
        )
    lines.append(
        f"{len(plan.jobs(plan.device))} cases; {len(kernels.wanted)} kernel specialisations for sm_{capability}"
    )
    return "\n".join(lines)


def measure(
    plan: Plan, results: Path, minutes: float, *, longest_case: float = 90.0, module: str = GRIDS, threads: int = 1
) -> list[Row]:
    """Run the plan and return its rows; those that are on disk already are not measured again.

    Args:
        plan: what.
        results: folder; under the name of the device come a file for each grid, `all.jsonl` with all rows, `all.txt`
            with the last table and `all.log` with what the processes printed.
        minutes: for everything.
        longest_case: seconds, beyond three times its expected calls, after which a case is given up.
        module: where the processes find the grids.
        threads: of the CPU.
    """
    deadline = time.monotonic() + 60 * minutes
    torch.set_num_threads(threads)
    settings = Settings(results, seconds=0.05 if plan.quick else 0.4)
    with _terminated_gently():
        machine = _machine(torch.device(plan.device), threads)
        session = _Session(plan, machine, settings, deadline, longest_case, module, threads)
        _say(f"{machine.name}: copy {machine.copy_rate / 1e9:.3g} GB/s, {versions()}")
        try:
            _compile_kernels(plan, machine, COMPILE_SHARE * (deadline - time.monotonic()))
        except Exception as error:  # without it everything takes longer and is right all the same
            _say(f"kernels are compiled as they come: {type(error).__name__}: {error}")
        try:
            session.go()
        finally:
            text = summary(session.rows)
            session.path("all.txt").parent.mkdir(parents=True, exist_ok=True)
            session.path("all.txt").write_text(text + "\n", encoding="utf-8")
    _say(text)
    left = sum(map(len, session.left.values()))
    _say(f"{len(session.rows)} rows in {session.path('all.jsonl')}" + (f"; {left} cases are left" if left else ""))
    return session.rows


def versions() -> str:
    """What the rows were measured with."""
    names = ("torch", "triton", "numpy", "transformers", "nvmath-python")
    found = {name: _version(name) for name in names}
    listed = ", ".join(f"{name} {version}" for name, version in found.items() if version)
    return f"Python {sys.version.split()[0]}, {listed}"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _machine(device: torch.device, threads: int) -> Machine:
    """Measured in a process of its own, so that this one keeps nothing on the GPU."""
    with _Process(_measure_machine, (device, threads), None) as process:
        kind, machine, _ = process.message(START_SECONDS)
    if kind != "machine":
        raise RuntimeError(f"{device} could not be measured: {kind}")
    found: Machine = machine
    return found


def _compile_kernels(plan: Plan, machine: Machine, seconds: float) -> None:
    """Compile what the grids launch, on all cores, so that no time on the GPU is spent on it."""
    if importlib.util.find_spec("triton") is None:
        _say("triton is not installed: there is nothing to compile")
        return
    started = time.monotonic()
    kernels = kernels_of(plan, machine.capability or HOPPER)
    wanted = list(kernels.wanted.values())
    with tqdm(total=len(wanted), desc="compiling", unit="kernel", dynamic_ncols=True) as bar:
        compiled = compile_ahead(wanted, seconds=seconds - (time.monotonic() - started), done=lambda _: bar.update())
    wrong = [each for each in compiled if each.error]
    _say(
        f"{len(compiled)} of {len(wanted)} kernels compiled in {time.monotonic() - started:.0f} s, {len(wrong)} failed"
    )
    for each in wrong:
        _say(f"  {each.specialisation.module}.{each.specialisation.kernel}: {each.error}")


class _Session:
    """The processes of one run, one after the other."""

    def __init__(
        self,
        plan: Plan,
        machine: Machine,
        settings: Settings,
        deadline: float,
        longest_case: float,
        module: str,
        threads: int,
    ) -> None:
        self.plan, self.machine, self.settings, self.deadline = plan, machine, settings, deadline
        self.longest_case, self.module, self.threads = longest_case, module, threads
        self.left = {name: plan.cases(name) for name in plan.grids}
        self.losses = dict.fromkeys(plan.grids, 0)
        self.without: dict[str, tuple[str, ...]] = dict.fromkeys(plan.grids, ())
        self.rows: list[Row] = []
        self.stamp = machine.stamp()
        self.kept = {json.dumps(row) for row in read_rows(self.path("all.jsonl"))}

    def path(self, name: str) -> Path:
        """A file in the device's folder."""
        return self.settings.results / self.machine.slug / name

    def go(self) -> None:
        """Round after round, while there is time and something is measured."""
        total = sum(map(len, self.left.values()))
        with tqdm(total=total, unit="case", dynamic_ncols=True) as bar:
            progress = True
            while progress:
                progress = False
                waiting = [name for name, cases in self.left.items() if cases and self.losses[name] < MOST_LOSSES]
                for index, name in enumerate(waiting):
                    share = (self.deadline - time.monotonic()) / (len(waiting) - index)
                    end = time.monotonic() + max(share, LEAST_SHARE)
                    whole = False
                    while not whole and self.left[name] and self.losses[name] < MOST_LOSSES:
                        seconds = min(end, self.deadline) - time.monotonic()
                        if seconds <= 0:
                            break
                        before = len(self.left[name])
                        whole = self._attend(name, seconds, bar)
                        self.losses[name] += not whole
                        if len(self.left[name]) == before:
                            break
                        progress = True

    def _attend(self, name: str, seconds: float, bar: "tqdm[Any]") -> bool:
        """Run a process for what is left of a grid; whether it ended by itself. One case goes with one that did not."""
        grid = self.plan.grids[name]
        settings = replace(self.settings, without=self.without[name])
        arguments = (self.module, name, self.left[name], self.machine, settings, seconds, self.threads)
        at_hand: Case | None = None
        contender = ""
        allowed = START_SECONDS
        with _Process(_measure_grid, arguments, self.path("all.log")) as process:
            while True:
                kind, case, value = process.message(min(allowed, max(0.0, self.deadline - time.monotonic())))
                if kind == "started":
                    at_hand, allowed = case, self.longest_case + 3 * (value - COMPILE_SECONDS)
                    bar.set_description(f"{name} {'x'.join(map(str, case.shape))} {case.dtype}")
                elif kind == "at":
                    contender = value
                elif kind == "ended":
                    at_hand, allowed = None, BETWEEN_SECONDS
                    if value:
                        self._done(grid, case, value, bar)
                elif kind == "lost":  # by this contender, whose row has come
                    contender = value
                else:
                    break
        whole = kind == "the process ended"
        if not whole and at_hand is None:
            tqdm.write(f"{name}: {kind} (see all.log)")
        if not whole and contender not in ("", "ours"):
            self.without[name] += (contender,)  # or it would take case after case with it
        if at_hand is not None and time.monotonic() < self.deadline:
            job = Job(grid, at_hand)
            row: Row = {"contender": contender or "unknown", "failed": f"{kind} (see all.log)"}
            if contender == "ours":
                row["correct"] = False
            rows = stamped(job, self.machine, self.stamp, [row])
            append_rows(results_path(grid, self.machine, self.settings), rows)
            self._done(grid, at_hand, rows, bar)
        return whole

    def _done(self, grid: Grid, case: Case, rows: Sequence[Row], bar: "tqdm[Any]") -> None:
        """Keep the rows of a case, which are in the file of its grid, in that of all as well."""
        self.left[grid.name].remove(case)
        new = [row for row in rows if json.dumps(row) not in self.kept]
        append_rows(self.path("all.jsonl"), new)
        self.rows += rows
        for row in rows:
            if row.get("failed") and row["contender"] in ("ours", "unknown"):
                tqdm.write(f"{job_row(Job(grid, case))}: {outcome(row)}")
        bar.update()


class _Process:
    """A spawned process that sends messages; whatever happens, it is gone in the end."""

    def __init__(self, target: Callable[..., None], arguments: tuple[Any, ...], log: Path | None) -> None:
        context = get_context("spawn")
        self.receiver, sender = context.Pipe(duplex=False)
        self.process = context.Process(target=target, args=(sender, log, *arguments), daemon=True)
        self.process.start()
        sender.close()

    def __enter__(self) -> "_Process":
        return self

    def message(self, seconds: float) -> tuple[str, Any, Any]:
        """The next message, or how the process ended; if neither comes in time, it is killed and that is told."""
        if not self.receiver.poll(seconds):
            self._ask_where()
            return f"hung: killed after {seconds:.0f} s", None, None
        try:
            found: tuple[str, Any, Any] = self.receiver.recv()
        except EOFError:
            self.process.join(10.0)
            code = self.process.exitcode or 0
            how = f" by {signal.Signals(-code).name}" if code < 0 else f" with status {code}" if code else ""
            return f"the process ended{how}", None, None
        return found

    def _ask_where(self) -> None:
        """Let it write down in its log where it is."""
        if self.process.pid is not None and self.process.is_alive() and hasattr(signal, "SIGUSR1"):
            os.kill(self.process.pid, signal.SIGUSR1)
            self.process.join(1.0)

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.join(10.0)  # the driver may hold a process for longer than anybody wants to wait
        self.receiver.close()


class _Messages(Watch):
    """Tells the parent what a run does."""

    def __init__(self, sender: "Connection[Any, Any]") -> None:
        self.sender = sender

    def started(self, job: Job, seconds: float) -> None:
        self.sender.send(("started", job.case, seconds))

    def at(self, name: str) -> None:
        self.sender.send(("at", None, name))

    def ended(self, job: Job, rows: Sequence[Row]) -> None:
        self.sender.send(("ended", job.case, list(rows)))

    def close(self) -> None:
        pass


def _measure_machine(sender: "Connection[Any, Any]", log: Path | None, device: torch.device, threads: int) -> None:
    torch.set_num_threads(threads)
    sender.send(("machine", measure_machine(device), None))


def _measure_grid(
    sender: "Connection[Any, Any]",
    log: Path,
    module: str,
    name: str,
    cases: Sequence[Case],
    machine: Machine,
    settings: Settings,
    seconds: float,
    threads: int,
) -> None:
    deadline = time.monotonic() + seconds
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    faulthandler.enable()
    if hasattr(signal, "SIGUSR1"):
        faulthandler.register(signal.SIGUSR1)
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or the profiler that counts memory prints
    torch.set_num_threads(threads)
    grid: Grid = importlib.import_module(module).GRIDS[name]
    try:
        run([Job(grid, case) for case in cases], machine, settings, deadline, _Messages(sender))
    except DeviceLost as error:
        sender.send(("lost", None, error.name))
        raise


@contextmanager
def _terminated_gently() -> Iterator[None]:
    """Let SIGTERM raise, so that the processes are ended and the table is written."""

    def leave(*_: object) -> None:
        raise SystemExit(143)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _say(text: str) -> None:
    print(text, flush=True)
