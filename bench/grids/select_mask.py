"""Mask selection over a list of tensors, against a threshold from their concatenation."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bench.grid import Contender, Grid, Work, compiled, direct
from sdp_kernels import BitMask, select_mask
from sdp_kernels.spec import Inputs, Shape

SPARSITY = 0.7


@dataclass(frozen=True)
class Kept:
    """Masks as they were made; turned into zeros and ones only where results are compared, which is not timed."""

    masks: Sequence[Tensor] | Sequence[BitMask]

    def double(self) -> Tensor:
        """All masks in one vector."""
        return torch.cat([each.to_bool() if isinstance(each, BitMask) else each for each in self.masks]).double()

    def isfinite(self) -> Tensor:
        """As of a tensor."""
        return self.double().isfinite()


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Shape is (tensors, rows, columns); scores over many powers of two, no two of them equal.

    Equal ones are cut exactly by ours alone: with a threshold that several scores have, the others keep too few.
    """
    tensors, rows, columns = shape
    number = tensors * rows * columns
    order = torch.randperm(number, dtype=torch.int32, device=device)
    scores = (order * (2**30 // number) + 2**28).view(torch.float32).to(dtype)
    return {"scores": list(scores.view(shape).unbind())}


def ours(scores: Sequence[Tensor]) -> Kept:
    """One threshold for all."""
    return Kept(select_mask(list(scores), SPARSITY, scope="global"))


def by_kthvalue(scores: Sequence[Tensor]) -> Kept:
    """The threshold is the k-th smallest of the concatenation."""
    joined = torch.cat([each.flatten() for each in scores])
    threshold = joined.kthvalue(round(SPARSITY * joined.numel())).values
    return Kept([each > threshold for each in scores])


def by_topk(scores: Sequence[Tensor]) -> Kept:
    """The threshold is the least of those to keep."""
    joined = torch.cat([each.flatten() for each in scores])
    kept = joined.numel() - round(SPARSITY * joined.numel())
    threshold = joined.topk(kept, sorted=False).values.amin()
    return Kept([each >= threshold for each in scores])


def reference(scores: Sequence[Tensor]) -> Tensor:
    """The masks as zeros and ones."""
    return by_kthvalue(scores).double()


def contenders() -> Mapping[str, Contender]:
    """Ours, and the two ways to find a threshold."""
    calls: Mapping[str, Callable[[Sequence[Tensor]], Kept]] = {"ours": ours, "eager": by_kthvalue, "topk": by_topk}
    # Ours waits for the device, to refuse NaN and empty masks.
    found = {name: direct(call, captured=name != "ours") for name, call in calls.items()}
    return found | {"compile": Contender(_compiled)}


def _compiled(inputs: Inputs) -> Callable[[], Kept]:
    def masks(scores: Sequence[Tensor]) -> Sequence[Tensor]:
        kept: Sequence[Tensor] = by_kthvalue(scores).masks  # type: ignore[assignment]
        return kept

    call = compiled(masks)(inputs)
    return partial(lambda: Kept(call()))


def _bound(shape: Shape, itemsize: int) -> Work:
    """Every score is read once and compared once."""
    number = shape[0] * shape[1] * shape[2]
    return Work(number, itemsize * number, 0)


def _heaviest(shape: Shape) -> Work:
    """The reference in float64: scores, their concatenation, its copy in kthvalue and indices."""
    tensors, rows, columns = shape
    memory = 40 * tensors * rows * columns
    return Work(20 * tensors * rows * columns, 5 * memory, memory)


GRID = Grid(
    name="select_mask",
    shapes=((12, 3072, 768), (6, 4096, 4096), (10, 2500, 1000), (72, 768, 768), (4, 256, 256)),
    inputs=inputs,
    reference=reference,
    contenders=contenders,
    bound=_bound,
    heaviest=_heaviest,
    dtypes={"cpu": ("fp32",), "cuda": ("fp32",)},
)
