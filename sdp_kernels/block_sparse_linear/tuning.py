"""Launches timed on the device at hand, and the table on disk that keeps them.

    python -m sdp_kernels.block_sparse_linear.tuning FILE --shape 3072x768 --block 32x32 --density 0.1 --tokens 1 4096

writes a table; a program that wants it calls `load(FILE)` once. Nothing is read or written unless asked for, and
without a table the launches of launch.py hold. A table is for one kind of GPU and one version of Triton, and says so.
"""

import argparse
import importlib.metadata
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import product as combinations
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from sdp_kernels.block_sparse_linear.launch import SPLITS, TUNED, ProductClass, TunedLaunch
from sdp_kernels.block_sparse_linear.matrix import BlockSparseMatrix
from sdp_kernels.compile_ahead import Specialisation, compile_ahead, recorded
from sdp_kernels.dispatch import capability_of
from sdp_kernels.masks import Walk
from sdp_kernels.tiles.launch import DEVICES, KERNEL_SIDES, Launch, choose_launch, shared_memory

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
CALLS = 10  # in one time on a GPU
ALLOWED = {
    "block_tokens": (16, 32, 64, 128),
    "num_warps": (2, 4, 8),
    "num_stages": (1, 2, 3, 4, 5),
    "splits": tuple(2**power for power in range(SPLITS.bit_length())),
}


class Tuning(NamedTuple):
    """The fastest launch found for a class of products, and the times that say so."""

    product: ProductClass
    best: TunedLaunch
    milliseconds: float
    default_milliseconds: float  # of the launch that is taken without a table


def tune(weight: BlockSparseMatrix, tokens: int, *, repeats: int = 20) -> Tuning:
    """Time the launches that fit the device for products with this weight, and return the fastest.

    A table knows sizes and dtype only, so give a weight as dense as those that it will be used for. The product of
    the input's gradient is a class of its own, that of the transposed weight.

    Args:
        weight: on the device, in the dtype of the products.
        tokens: rows of the input; the result holds for all numbers with the same next power of two.
        repeats: of each timing; the median counts.

    Raises:
        ValueError: fewer than one token or repeat, or a weight that the kernels do not take.
    """
    from sdp_kernels.block_sparse_linear.kernel import OutOfResources, product

    for name, number in (("tokens", tokens), ("repeats", repeats)):
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number!r}")
    values, device = weight.values, weight.values.device
    if values.dtype not in DTYPES.values() or not set(weight.block_shape) <= set(KERNEL_SIDES):
        raise ValueError(
            f"weight must have a dtype of {list(DTYPES)} and block sides of 16, 32, 64 or 128, "
            f"got {values.dtype} and {weight.block_shape}"
        )
    input = torch.randn(tokens, weight.shape[1], device=device, dtype=values.dtype)
    walk = Walk(weight.crow_indices, weight.col_indices)
    key = ProductClass.of(tokens, weight.shape, weight.block_shape, values.dtype)
    before = TUNED.pop(key, None)

    def call() -> Tensor:
        return product(input, values.detach(), None, walk, weight.lists.row_order, weight.shape[0], None)

    tried = list(candidates(tokens, weight.block_shape[0], values.dtype, capability_of(device)))
    times: dict[TunedLaunch, float] = {}
    try:
        if device.type == "cuda":
            compile_ahead(recorded_launches(call, key, tried))
        default = _milliseconds(call, device, repeats)
        for candidate in tried:
            TUNED[key] = candidate
            try:
                times[candidate] = _milliseconds(call, device, repeats)
            except OutOfResources:  # the estimate of the shared memory was too low
                continue
    finally:
        TUNED.pop(key, None)
        if before is not None:
            TUNED[key] = before
    best = min(times, key=lambda candidate: times[candidate])
    return Tuning(key, best, times[best], default)


def recorded_launches(call: Callable[[], Any], key: ProductClass, tried: Sequence[TunedLaunch]) -> list[Specialisation]:
    """What the call would compile with each of the launches; compiling one after the other would take minutes."""
    with recorded() as found:
        for candidate in tried:
            TUNED[key] = candidate
            call()
        TUNED.pop(key, None)
        call()
    return list(found.values())


def candidates(tokens: int, height: int, dtype: torch.dtype, capability: int) -> Iterator[TunedLaunch]:
    """The launches to try: no tile much larger than the tokens, nothing beyond the shared memory."""
    largest = choose_launch(tokens, height, dtype, capability).block_tokens
    known = max((known for known in DEVICES if known <= capability), default=86)
    splits = [number for number in ALLOWED["splits"] if number == 1 or tokens <= 256]
    tiles = [side for side in ALLOWED["block_tokens"] if side <= largest]
    for block_tokens, num_warps, num_stages, number in combinations(tiles, (4, 8), (2, 3, 4, 5), splits):
        if num_stages == 2 or shared_memory(block_tokens, height, dtype, num_stages) <= DEVICES[known][0]:
            yield TunedLaunch(Launch(block_tokens, num_warps, num_stages), number)


def save(path: str | Path, tunings: Sequence[Tuning], device: torch.device) -> None:
    """Write a table, whole or not at all; one that is there is replaced.

    Args:
        path: the file.
        tunings: what `tune` found on `device`.
        device: where.
    """
    launches = [
        {
            "tokens": found.product.tokens,
            "shape": found.product.shape,
            "block_shape": found.product.block_shape,
            "dtype": str(found.product.dtype).removeprefix("torch."),
            **found.best.launch._asdict(),
            "splits": found.best.splits,
            "milliseconds": found.milliseconds,
            "default_milliseconds": found.default_milliseconds,
        }
        for found in tunings
    ]
    text = json.dumps({**_here(device), "launches": launches}, indent=1) + "\n"
    target = Path(path)
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def load(path: str | Path, device: torch.device | str = "cuda") -> int:
    """Take the launches of a table from now on, in this process; return how many.

    Entries for the same products replace those of earlier tables; `TUNED.clear()` forgets them all.

    Args:
        path: what `save` wrote.
        device: where the products will run.

    Raises:
        ValueError: the table is of another device or another version of Triton, or malformed. Nothing is taken then.
        FileNotFoundError: there is no such file.
    """
    try:
        table = json.loads(Path(path).read_text(encoding="utf-8"))
        made_for = {name: table[name] for name in ("device", "triton")}
        found = dict(_entry(row) for row in table["launches"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"path must be a table of launches, got {str(path)!r}: {error!r}") from None
    for name, here in _here(torch.device(device)).items():
        if made_for[name] != here:
            raise ValueError(f"path must be a table for {name} {here!r}, got one for {made_for[name]!r}: {str(path)!r}")
    TUNED.update(found)
    return len(found)


def _entry(row: dict[str, Any]) -> tuple[ProductClass, TunedLaunch]:
    for name, allowed in ALLOWED.items():
        if type(row[name]) is not int or row[name] not in allowed:
            raise ValueError(f"{name} must be one of {list(allowed)}, got {row[name]!r}")
    sizes = [row["tokens"], *row["shape"], *row["block_shape"]]
    if len(sizes) != 5 or not all(type(size) is int and size > 0 for size in sizes):
        raise ValueError(f"tokens, shape and block_shape must be five whole numbers above 0, got {sizes}")
    if sizes[0] & (sizes[0] - 1):
        raise ValueError(f"tokens must be a power of two, got {sizes[0]}")
    key = ProductClass(sizes[0], (sizes[1], sizes[2]), (sizes[3], sizes[4]), DTYPES[row["dtype"]])
    return key, TunedLaunch(Launch(row["block_tokens"], row["num_warps"], row["num_stages"]), row["splits"])


def _here(device: torch.device) -> dict[str, str]:
    """What a table is good for."""
    names = {"Triton's interpreter"}
    if device.type == "cuda":  # the launches hold for every GPU of the process
        names = {torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())}
    if len(names) > 1:
        raise ValueError(f"device must be the only kind of GPU in sight, got {sorted(names)}")
    return {"device": names.pop(), "triton": importlib.metadata.version("triton")}


def _milliseconds(call: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """The median of several times; the first call, which compiles, does not count."""
    call()
    if device.type != "cuda":
        return statistics.median(_wall_milliseconds(call) for _ in range(repeats))
    graph = torch.cuda.CUDAGraph()  # replayed, the kernels follow each other without waiting for Python
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    spans: list[float] = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        spans.append(start.elapsed_time(end) / CALLS)
    return statistics.median(spans)


def _wall_milliseconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def main(arguments: Sequence[str] | None = None) -> int:
    """Tune for one weight with random blocks and write the table."""
    parser = argparse.ArgumentParser(prog="python -m sdp_kernels.block_sparse_linear.tuning", description=tune.__doc__)
    parser.add_argument("path", type=Path, help="the table to write")
    parser.add_argument("--shape", type=_pair, required=True, metavar="OUTxIN", help="of the weight")
    parser.add_argument("--block", type=_pair, default=(32, 32), metavar="OUTxIN", help="of the blocks")
    parser.add_argument("--density", type=float, default=0.1, help="share of the blocks that is kept")
    parser.add_argument("--tokens", type=int, nargs="+", default=(1, 16, 128, 4096), help="rows of the inputs")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the products")
    parser.add_argument("--device", default="cuda", help="where to run")
    parser.add_argument("--repeats", type=int, default=20, help="of each timing")
    options = parser.parse_args(arguments)
    rows, columns = (-(-size // side) for size, side in zip(options.shape, options.block, strict=True))
    kept = torch.rand(rows, columns) < options.density
    mask = kept.repeat_interleave(options.block[0], 0).repeat_interleave(options.block[1], 1)
    weight = BlockSparseMatrix.from_dense(
        torch.randn(options.shape), options.block, mask[: options.shape[0], : options.shape[1]]
    ).to(options.device, DTYPES[options.dtype])
    found = [tune(weight, tokens, repeats=options.repeats) for tokens in tqdm(options.tokens, unit="size")]
    save(options.path, found, torch.device(options.device))
    for tuning in found:
        times = f"{tuning.milliseconds:.4g} ms, {tuning.default_milliseconds:.4g} without"
        sys.stdout.write(f"{tuning.product.tokens} tokens: {times}\n")
    return 0


def _pair(text: str) -> tuple[int, int]:
    first, second = text.split("x")
    return int(first), int(second)


if __name__ == "__main__":
    sys.exit(main())
