"""Where a row was measured: device, versions, sources, and the two ceilings of the device."""

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.grid import DTYPES, MATMUL_PRECISIONS, Work
from sdp_kernels.dispatch import capability_of

ROOT = Path(__file__).resolve().parent.parent
FITTING_SHARE = 0.8  # of the memory, for one case


@dataclass(frozen=True)
class Machine:
    """A device with its measured ceilings."""

    device: torch.device
    name: str
    copy_rate: float  # bytes read and written a second
    matmul_rates: dict[str, float]  # operations a second, by dtype; "fp64" too
    memory: int  # bytes
    capability: int | None = None  # of a GPU: 90 is 9.0

    @property
    def slug(self) -> str:
        """The device's folder under bench/results."""
        return slug_of(self.name)

    def seconds(self, work: Work, dtype: str) -> float:
        """The least time for this work."""
        return max(work.bytes / self.copy_rate, work.flops / self.matmul_rates[dtype])

    def stamp(self) -> dict[str, Any]:
        """What every row carries."""
        return {
            "device": self.name,
            "threads": torch.get_num_threads() if self.device.type == "cpu" else None,
            "torch": torch.__version__,
            "triton": importlib.metadata.version("triton") if importlib.util.find_spec("triton") else None,
            "python": platform.python_version(),
            "commit": commit(ROOT, "sdp_kernels", "bench"),
            "code": code_hash(ROOT),
        }


def slug_of(name: str) -> str:
    """The name in lower case, its words joined by hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def device_name(device: torch.device) -> str:
    """What the device calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    information = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.*)", information.read_text()) if information.exists() else []
    return f"CPU {models[0] if models else platform.machine()}, {os.cpu_count()} cores"


def measure_machine(device: torch.device) -> Machine:
    """Measure both ceilings: a copy too large for any cache, and a square product in each dtype."""
    dtypes = (*(DTYPES if device.type == "cuda" else ("fp32",)), "fp64")
    rates = {dtype: _matmul_rate(dtype, device) for dtype in dtypes}
    copy_rate = _copy_rate(device)
    capability = capability_of(device) if device.type == "cuda" else None
    return Machine(device, device_name(device), copy_rate, rates, _free_memory(device), capability)


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _copy_rate(device: torch.device) -> float:
    source = torch.ones(2**28 if device.type == "cuda" else 2**26, device=device)
    target = torch.empty_like(source)
    seconds = _median_seconds(lambda: target.copy_(source), device)
    return 2 * source.numel() * source.element_size() / seconds


def _matmul_rate(dtype: str, device: torch.device) -> float:
    size = 8192 if device.type == "cuda" else 2048
    matrix = torch.randn(size, size, device=device, dtype=DTYPES.get(dtype, torch.float64))
    torch.set_float32_matmul_precision(MATMUL_PRECISIONS.get(dtype, "highest"))
    seconds = _median_seconds(lambda: matrix @ matrix, device)
    torch.set_float32_matmul_precision("highest")
    return 2 * size**3 / seconds


def _median_seconds(call: Callable[[], Any], device: torch.device) -> float:
    call()
    seconds = []
    for _ in range(5):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def synchronize(device: torch.device) -> None:
    """Wait for the device; a CPU is never ahead."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def commit(root: Path, *packages: str) -> str:
    """The short commit, with "-dirty" if these packages differ from it; "unknown" in a copy without git."""
    git = shutil.which("git")
    if git is None or not (root / ".git").exists():
        return "unknown"

    def ask(*arguments: str) -> str:
        done = subprocess.run([git, "-C", str(root), *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    head = ask("rev-parse", "--short", "HEAD")  # empty where git refuses, as in a folder of another user
    changed = ask("status", "--porcelain", "--", *packages, ":!bench/results")
    return head + ("-dirty" if changed else "") if head else "unknown"


def code_hash(root: Path) -> str:
    """Hash of the Python sources that are measured and that measure: it tells dirty trees apart too."""
    digest = hashlib.sha256()
    for package in ("bench", "sdp_kernels"):
        for path in sorted((root / package).rglob("*.py")):
            digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]
