"""Triton kernels compiled before they are needed, by several processes at once.

Triton compiles a kernel when it is first launched with arguments of its kind, one after the other. Where many are to
come, as in tuning and benchmarks, they are written down first and compiled together; Triton's own cache on disk then
has them when they are launched:

    with recorded() as found:
        ...  # launches are written down instead of done, unless their kernel was compiled before
    compile_ahead(found.values())

No GPU is needed for either if `target_gpu` names one.
"""

# mypy: disable-error-code="import-untyped,no-untyped-call"

import functools
import importlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple


class Specialisation(NamedTuple):
    """A kernel, and the kind of arguments that it is compiled for."""

    module: str
    kernel: str
    capability: int  # 90 is 9.0
    description: str  # Triton's own, as JSON: types, constants, what is known of the other arguments, options


class Compilation(NamedTuple):
    """What came of a specialisation."""

    specialisation: Specialisation
    seconds: float
    error: str | None  # in one line; None if all is well


@contextmanager
def recorded() -> Iterator[dict[str, Specialisation]]:
    """Write down what launches would compile, instead of compiling and launching it; kernels compiled before do run.

    What such a launch would have written stays as it was, so results are not to be used. Under Triton's interpreter,
    which compiles nothing, launches are done and nothing is written down.

    Yields:
        The specialisations by name, filled while the block runs.
    """
    from triton import knobs
    from triton.runtime import driver

    found: dict[str, Specialisation] = {}

    def write_down(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        capability = driver.active.get_current_target().arch
        entry = Specialisation(fn.module, fn.jit_function.fn.__name__, capability, compile["specialization_data"])
        found[f"{fn.module}.{entry.kernel} {capability} {compile['key']}"] = entry
        return True  # do not compile

    with knobs.runtime.scope():
        knobs.runtime.jit_cache_hook = write_down
        yield found


class _TargetDriver:
    """Stands in for Triton's driver where kernels are compiled for a GPU but not launched."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> str:
        return f"sm_{self.target.arch}"  # kernels keep what is compiled by device: apart from that of real ones

    def get_current_stream(self, device: str) -> int:
        return 0


@contextmanager
def target_gpu(capability: int) -> Iterator[None]:
    """Let Triton compile for a compute capability (90 is 9.0), whatever devices there are. Nothing can be launched."""
    from triton.runtime import driver

    driver.set_active(_TargetDriver(capability))
    try:
        yield
    finally:
        driver.set_active(None)  # found again when needed


def compile_ahead(
    specialisations: Iterable[Specialisation],
    *,
    processes: int | None = None,
    seconds: float = 600.0,
    done: Callable[[Compilation], Any] = lambda _: None,
) -> list[Compilation]:
    """Compile in several processes; Triton's cache on disk keeps the results.

    Args:
        specialisations: what `recorded` found, the most urgent first.
        processes: how many; as many as this process may use cores if None.
        seconds: when to stop; what is not compiled by then is left to the launches.
        done: called with each result as it comes.

    Returns:
        The results that came, in the order in which they did.
    """
    wanted = list(specialisations)
    number = min(processes or _cores(), len(wanted))
    deadline = time.monotonic() + seconds
    results: SimpleQueue[Compilation | None] = SimpleQueue()
    waiting = iter(wanted)
    lock = threading.Lock()

    def next_one() -> Specialisation | None:
        with lock:
            return next(waiting, None)

    workers = [_Worker(next_one, results) for _ in range(number)]
    collected = []
    running = number
    try:
        while running and (left := deadline - time.monotonic()) > 0:
            try:
                result = results.get(timeout=left)
            except Empty:
                break
            if result is None:
                running -= 1
            else:
                collected.append(result)
                done(result)
    finally:
        for worker in workers:
            worker.stop()
    return collected


class _Worker:
    """A process that compiles what it is handed, line by line, and a thread that hands it over."""

    def __init__(self, next_one: Callable[[], Specialisation | None], results: "SimpleQueue[Compilation | None]"):
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        root = str(Path(__file__).resolve().parent.parent)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH", "")]))
        self.process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self.thread = threading.Thread(target=self._serve, args=(next_one, results), daemon=True)
        self.thread.start()

    def _serve(self, next_one: Callable[[], Specialisation | None], results: "SimpleQueue[Compilation | None]") -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            while (entry := next_one()) is not None:
                started = time.monotonic()
                try:
                    self.process.stdin.write(json.dumps(entry) + "\n")
                    self.process.stdin.flush()
                    answer = self.process.stdout.readline()
                except OSError:
                    answer = ""
                error = json.loads(answer) if answer else "the compiling process ended"
                results.put(Compilation(entry, time.monotonic() - started, error))
                if not answer:
                    return
        finally:
            results.put(None)

    def stop(self) -> None:
        """End the process, whatever it is doing."""
        self.process.kill()
        self.process.wait()
        self.thread.join()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except OSError:  # what was left to write has no reader any more
                    continue


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _compile(entry: Specialisation) -> str | None:
    """Compile one specialisation into Triton's cache; what went wrong, in one line."""
    from triton.runtime import driver

    driver.set_active(_driver_of(entry.capability))
    try:
        kernel = getattr(importlib.import_module(entry.module), entry.kernel)
        _build_launcher(kernel.preload(entry.description))
    except Exception as error:  # whatever the compiler raises is told, and the next one is taken
        lines = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {lines[-1][:300]}"
    return None


@functools.cache
def _driver_of(capability: int) -> _TargetDriver:
    return _TargetDriver(capability)


def _build_launcher(compiled: Any) -> None:
    """Before 3.7, Triton also compiles some C for each list of argument types; that needs the driver's library."""
    from triton.backends.nvidia import driver

    if hasattr(driver, "make_launcher") and _has_cuda_library():
        driver.CudaLauncher(compiled.src, compiled.metadata)


@functools.cache
def _has_cuda_library() -> bool:
    from triton.backends.nvidia import driver

    try:
        return bool(driver.libcuda_dirs())
    except (AssertionError, OSError, subprocess.CalledProcessError):  # Triton's ways to say that there is none
        return False


def main() -> int:
    """A worker: one specialisation a line comes in, one error or null a line goes out."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what compilers print is no answer
    for line in sys.stdin:
        answers.write(json.dumps(_compile(Specialisation(*json.loads(line)))) + "\n")
        answers.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
