"""Rows of every process, with gradients that data-parallel averaging turns into the single-process ones."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int], group: dist.ProcessGroup) -> Tensor:
        rank = dist.get_rank(group)
        ctx.start, ctx.count, ctx.world_size = sum(counts[:rank]), counts[rank], len(counts)
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: rows.shape[0]] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded, group=group)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        own = gradient[ctx.start : ctx.start + ctx.count]
        return own * ctx.world_size, None, None


def gather_rows(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Concatenate the rows of all ranks of `group`, which may bring different numbers of rows.

    Every rank then computes the same loss from the same rows, so its own slice of the gradient is exact
    without a second collective. It is multiplied by the number of ranks, because DDP and FSDP divide the
    gradients of the parameters by it.
    """
    count = torch.tensor([rows.shape[0]], device=rows.device)
    counts = [torch.empty_like(count) for _ in range(dist.get_world_size(group))]
    dist.all_gather(counts, count, group=group)
    gathered: Tensor = _GatherRows.apply(rows, [int(each) for each in counts], group)  # type: ignore[no-untyped-call]
    return gathered
