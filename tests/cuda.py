"""What the tests of several packages do with a CUDA device."""

import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


@contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever waits for the device raises RuntimeError."""
    _set_sync_debug_mode("error")
    try:
        yield
    finally:
        _set_sync_debug_mode("default")


def _set_sync_debug_mode(mode: str) -> None:
    with warnings.catch_warnings():  # torch calls it a prototype, once a process, and tests take warnings for errors
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype", UserWarning)
        torch.cuda.set_sync_debug_mode(mode)


class Captured:
    """The results of a call, which `replay` writes anew: by a CUDA graph, or without CUDA by the call itself.

    The call must be one that a graph can hold, because a capture that fails may harm the process, see
    https://github.com/pytorch/pytorch/pull/180395.
    """

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call = call
        self._graph = torch.cuda.CUDAGraph() if torch.cuda.is_available() else None
        if self._graph is None:
            self.results = call()
            return
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compiles, and fills what is kept for later calls
            call()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(self._graph):
            self.results = call()

    def replay(self) -> Any:
        if self._graph is None:
            self.results = self._call()
        else:
            self._graph.replay()
        return self.results


@contextmanager
def most_of_the_memory(needed: int) -> Iterator[bool]:
    """Whether as many bytes of the GPU are free, while no other process of these tests asks for as much."""
    import fcntl  # which Windows lacks

    with (Path(tempfile.gettempdir()) / "memory_of_the_gpu.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        torch.cuda.empty_cache()
        try:
            yield torch.cuda.mem_get_info()[0] >= needed
        finally:
            torch.cuda.empty_cache()
