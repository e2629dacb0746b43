"""What the Triton kernels use on each GPU, found by compiling them without one."""

import importlib
import inspect
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from sdp_kernels.spec import KernelConfig

SHARED_LIMITS = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB a program may use, by compute capability
# Of A100, RTX 3090, L40S, H100, B200 and RTX 5090: fewer programs than these leave a part of the device idle.
MULTIPROCESSORS = {80: 108, 86: 82, 89: 142, 90: 132, 100: 148, 120: 170}
CAPABILITIES = tuple(SHARED_LIMITS)
MATRIX_INSTRUCTION = re.compile(r"\b(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)\b")
WARP_GROUP_INSTRUCTION = re.compile(r"\bwgmma\.mma_async\b")
APPROXIMATION = re.compile(r"\b(?:div\.full|div\.approx|sqrt\.approx|rsqrt\.approx|rcp\.approx)\b")
HALF_PRODUCT = re.compile(r"tt\.dot .*: tensor<(\d+)x(\d+)x(?:bf16|f16)> \* tensor<\d+x(\d+)x(?:bf16|f16)>")
ASYNC_COPY = re.compile(r"\bcp\.async\.(?!wait|commit|bulk\.wait|bulk\.commit)")
# Integer arguments that are multiples of 16 in the launches that matter, which Triton then knows.
SIZES = re.compile(r"batch|dim|rows|cols|columns|classes|features|tokens|elements|(.*_)?stride(_.*)?")
STACK_LIMIT = 32  # bytes a thread: ptxas parks a few values there to reach the next step of occupancy
WORKERS = 2


@dataclass(frozen=True)
class Resources:
    """What one program of a compiled kernel uses."""

    registers: int  # a thread
    stack: int  # bytes a thread: spilled registers
    local: int  # bytes a thread
    shared: int  # bytes
    matrix_instructions: int  # in the text of the kernel, as are the others
    async_copies: int
    warp_group_instructions: int  # among the matrix instructions: those of four warps at once
    warp_group_products: int  # products of half precision whose tile such an instruction takes: 64 rows, 8 columns
    approximations: int  # quotients and roots that are not rounded as IEEE 754 says


class Tiling(NamedTuple):
    """What launches of a kernel have in common whatever their flags: types, tiles, warps."""

    kernel: str
    pointer: str  # type of the first one
    sizes: tuple[tuple[str, int], ...]
    num_warps: int

    @classmethod
    def of(cls, kernel: Any, types: Mapping[str, str], constants: Mapping[str, Any], num_warps: int) -> "Tiling":
        """From the types of the arguments and the constants, both by name."""
        pointer = next((types[name] for name in kernel.arg_names if types.get(name, "").startswith("*")), "")
        sizes = tuple(sorted((name, value) for name, value in constants.items() if type(value) is int))
        return cls(f"{kernel.fn.__module__}.{kernel.fn.__name__}", pointer, sizes, num_warps)


class Outcome(NamedTuple):
    """A configuration on one GPU."""

    label: str
    capability: int
    tiling: Tiling
    stages: int
    resources: Resources | None  # None: it does not compile
    reasons: list[str]  # against it


def compile_config(config: KernelConfig, capability: int) -> Resources:
    """Compile a kernel for a compute capability (90 is 9.0) as it would be for a real launch.

    Raises:
        RuntimeError: TRITON_INTERPRET is set, under which kernels are not compiled.
    """
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise RuntimeError("TRITON_INTERPRET=1 keeps kernels from being compiled; unset it and start Python again")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = config.kernel.arg_names
    signature = {name: "constexpr" if name in config.constants else config.types[name] for name in names}
    source = ASTSource(
        fn=config.kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in config.constants.items()},
        attrs={
            (index,): [["tt.divisibility", 16]]
            for index, name in enumerate(names)
            if signature[name].startswith("*")
            or (
                signature[name].startswith("i")
                and SIZES.fullmatch(name)
                and not config.kernel.params[index].do_not_specialize
            )
        },
    )
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = compiled.asm["ptx"]
    tiles = [tuple(map(int, sizes)) for sizes in HALF_PRODUCT.findall(str(compiled.asm["ttir"]))]
    usage = _resource_usage(Path(triton.__file__).parent, compiled.asm["cubin"])
    return Resources(
        registers=usage["REG"],
        stack=usage["STACK"],
        local=usage["LOCAL"],
        shared=compiled.metadata.shared,
        matrix_instructions=len(MATRIX_INSTRUCTION.findall(ptx)),
        async_copies=len(ASYNC_COPY.findall(ptx)),
        warp_group_instructions=len(WARP_GROUP_INSTRUCTION.findall(ptx)),
        warp_group_products=sum(
            rows >= 64 and inner >= 16 and columns >= 8 for rows, inner, columns in tiles if config.num_warps % 4 == 0
        ),
        approximations=len(APPROXIMATION.findall(ptx)),
    )


def _resource_usage(triton_folder: Path, cubin: bytes) -> dict[str, int]:
    """What the cuobjdump that comes with Triton says of a kernel: REG, STACK, SHARED, LOCAL."""
    tool = triton_folder / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [str(tool), "--dump-resource-usage", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", done.stdout)}


def reasons_against(config: KernelConfig, capability: int, resources: Resources) -> list[str]:
    """Why this configuration must not be shipped for this GPU; empty if it may be."""
    reasons = []
    if resources.stack + resources.local > STACK_LIMIT:
        reasons.append(f"spills: {resources.stack} bytes of stack, {resources.local} local, allowed {STACK_LIMIT}")
    limit = SHARED_LIMITS[capability] * 1024
    if resources.shared > limit:
        reasons.append(f"{resources.shared} bytes of shared memory, allowed {limit}")
    if config.tensor_cores and resources.matrix_instructions == 0:
        reasons.append("no matrix instruction")
    if capability == 90 and resources.warp_group_products and resources.warp_group_instructions == 0:
        reasons.append(f"{resources.warp_group_products} products could use wgmma and none does")
    if config.exact and resources.approximations:
        reasons.append(f"{resources.approximations} approximate quotients or roots")
    return reasons


def label(config: KernelConfig) -> str:
    """The kernel, the types of its pointers, its constants and warps, in short."""
    function = config.kernel.fn
    kernel = f"{function.__module__.removeprefix('sdp_kernels.')}.{function.__name__}"
    names = config.kernel.arg_names
    kinds = dict.fromkeys(config.types[name] for name in names if config.types.get(name, "").startswith("*"))
    constants = " ".join(f"{name}={value}" for name, value in config.constants.items())
    return f"{kernel} {','.join(kinds)} {constants} warps={config.num_warps}"


@cache
def configurations(module: str, capability: int) -> list[KernelConfig]:
    """The distinct configurations that a kernel module lists, for a capability where they depend on it."""
    listed = importlib.import_module(module).configurations
    depends = "capability" in inspect.signature(listed).parameters
    found: dict[tuple[str, ...], KernelConfig] = {}
    for config in listed(capability) if depends else listed():
        types = {name: config.types.get(name) for name in config.kernel.arg_names}
        key = (label(config), *map(repr, (types, config.num_stages)))
        found.setdefault(key, config)
    return list(found.values())


def judge(module: str, index: int, capability: int) -> Outcome:
    """Compile one configuration of a module; a process of the pool cannot be handed a kernel itself."""
    config = configurations(module, capability)[index]
    tiling = Tiling.of(config.kernel, config.types, config.constants, config.num_warps)
    known = label(config), capability, tiling, config.num_stages
    try:
        resources = compile_config(config, capability)
    except Exception as error:  # whatever the compiler raises is a reason like others
        lines = str(error).strip().splitlines() or [""]
        return Outcome(*known, None, [f"{type(error).__name__}: {lines[-1][:200]}"])
    return Outcome(*known, resources, reasons_against(config, capability, resources))


def programs_at_grids(capability: int, grids: Sequence[str] | None = None) -> dict[Tiling, tuple[int, int]]:
    """The fewest and the most programs of each tiling at the shapes of the benchmarks' grids, all unless named."""
    from bench.grids import GRIDS
    from bench.launches import launches_of

    found: dict[Tiling, tuple[int, int]] = {}
    for name in grids or GRIDS:
        grid = GRIDS[name]
        for case in grid.cases("cuda"):
            for launch in launches_of(grid, case, capability):
                kernel = getattr(importlib.import_module(launch.specialisation.module), launch.specialisation.kernel)
                known = json.loads(launch.specialisation.description)
                names = (kernel.arg_names[index] for (index,) in known["constant_keys"])
                constants = dict(zip(names, known["constant_vals"], strict=True))
                tiling = Tiling.of(kernel, known["signature"], constants, known["options"]["num_warps"])
                fewest, most = found.get(tiling, (launch.programs, launch.programs))
                found[tiling] = min(fewest, launch.programs), max(most, launch.programs)
    return found


def report(capabilities: Sequence[int] = CAPABILITIES, ops: Sequence[str] | None = None) -> int:
    """Compile everything, print what it uses and what is wrong with it; 1 if anything is.

    Raises:
        ValueError: an op or a capability is unknown.
    """
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise RuntimeError("TRITON_INTERPRET=1 keeps kernels from being compiled; unset it and start Python again")
    from sdp_kernels.registry import SPECS

    _check_known("op", ops or (), tuple(SPECS))
    _check_known("arch", capabilities, CAPABILITIES)
    modules = {spec.kernel_module for name, spec in SPECS.items() if spec.kernel_module and (not ops or name in ops)}
    jobs = [
        (module, index, capability)
        for module in sorted(modules)
        for capability in capabilities
        for index in range(len(configurations(module, capability)))
    ]
    with ProcessPoolExecutor(WORKERS, mp_context=get_context("spawn")) as pool:
        results = pool.map(judge, *zip(*jobs, strict=True)) if jobs else iter(())
        programs = {capability: programs_at_grids(capability) for capability in capabilities}  # while others compile
        outcomes = list(tqdm(results, total=len(jobs), unit="kernel", dynamic_ncols=True))
    print(table(outcomes, programs))
    reasons = [f"sm_{found.capability} {found.label}: {reason}" for found in outcomes for reason in found.reasons]
    print("\n".join([f"{len(outcomes)} compiled, {len(reasons)} reasons against them", *reasons]))
    return 1 if reasons else 0


def table(outcomes: Sequence[Outcome], programs: Mapping[int, Mapping[Tiling, tuple[int, int]]]) -> str:
    """What each configuration uses, as plain text.

    "wgmma" counts the matrix instructions of four warps among all. "programs" are the fewest and the most for each
    multiprocessor at the shapes of the benchmarks' grids: below 1, a part of the device idles.
    """
    lines = ["   sm  regs stack local  shared   mma wgmma  copy stages      programs  kernel"]
    for found in sorted(outcomes, key=lambda found: (found.label, found.capability)):
        used: Any = found.resources
        numbers = (
            "does not compile".ljust(42)
            if used is None
            else f"{used.registers:5} {used.stack:5} {used.local:5} {used.shared:7}"
            f" {used.matrix_instructions:5} {used.warp_group_instructions:5} {used.async_copies:5}"
        )
        launched = programs.get(found.capability, {}).get(found.tiling)
        share = "-"
        if launched is not None:
            share = "..".join(f"{number / MULTIPROCESSORS[found.capability]:.3g}" for number in launched)
        lines.append(f"{found.capability:5} {numbers} {found.stages:6} {share:>13}  {found.label}")
    return "\n".join(lines)


def _check_known(name: str, values: Sequence[object], known: Sequence[object]) -> None:
    unknown = [value for value in values if value not in known]
    if unknown:
        raise ValueError(f"{name} must be among {list(known)}, got {unknown}")
