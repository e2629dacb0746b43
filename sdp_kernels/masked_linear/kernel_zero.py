"""Pruned weights set to zero on a GPU: a list of them in one launch, or into a copy.

A table on the device holds the address, mask and shape of every weight, and a map tells each program which is its
own. Both are kept for the next call: while a model stays where it is, nothing is moved from the host. What a CUDA graph
reads is kept for good, and must have been made before, because nothing can be moved from the host inside of a capture.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sdp_kernels.dispatch import is_captured, on_its_device
from sdp_kernels.spec import KernelConfig

BLOCK_ROWS, BLOCK_COLUMNS = 4, 512
INTEGERS = {2: torch.int16, 4: torch.int32}
TYPES = {2: tl.int16, 4: tl.int32}

# The columns of the table.
WEIGHT = tl.constexpr(0)  # address
MASK = tl.constexpr(1)
PACKED = tl.constexpr(2)
STRIDE = tl.constexpr(3)  # entries from one row to the next
MASK_STRIDE = tl.constexpr(4)
ROWS = tl.constexpr(5)
COLUMNS = tl.constexpr(6)
FIRST_PROGRAM = tl.constexpr(7)
FIELDS = tl.constexpr(8)

Places = tuple[tuple[int, ...], ...]  # a row of the table for each weight, but for its first program
MOST_TABLES = 8
_tables: dict[tuple[Places, torch.device], tuple[Tensor, Tensor]] = {}
_read_by_graphs: list[tuple[Tensor, Tensor]] = []


@on_its_device
def masked_copy(weight: Tensor, mask: Tensor, out: Tensor | None = None) -> Tensor:
    """A copy of the weight with +0.0 where pruned, made in one pass; `mask` is bool, or the words of a `BitMask`.

    `out`, contiguous, is where to write it; it may be the weight itself.
    """
    result = torch.empty_like(weight, memory_format=torch.contiguous_format) if out is None else out
    integer = INTEGERS[weight.itemsize]
    rows, columns = weight.shape
    grid = (triton.cdiv(rows, BLOCK_ROWS), triton.cdiv(columns, BLOCK_COLUMNS))
    if weight.numel():
        _copy_kernel[grid](
            weight.contiguous().view(integer),
            mask.contiguous(),
            result.view(integer),
            rows,
            columns,
            PACKED_MASK=mask.dtype == torch.int32,
            BLOCK_ROWS=BLOCK_ROWS,
            BLOCK_COLUMNS=BLOCK_COLUMNS,
        )
    return result


def zero_in_place(weights: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    """Write +0.0 where pruned, with one launch for all weights of one device and size of float."""
    groups: dict[tuple[torch.device, int], tuple[list[Tensor], list[Tensor]]] = {}
    for weight, mask in zip(weights, masks, strict=True):
        if weight.is_cuda and triton.knobs.runtime.interpret:
            raise NotImplementedError("Triton's interpreter cannot follow the addresses of CUDA tensors")
        if not weight.numel():
            continue
        if weight.stride(1) != 1:
            weight.copy_(masked_copy(weight, mask))
            continue
        group = groups.setdefault((weight.device, weight.itemsize), ([], []))
        group[0].append(weight)
        group[1].append(mask.contiguous())
    for group in groups.values():
        _zero_together(*group)


@on_its_device
def _zero_together(weights: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    places = tuple(
        (
            weight.data_ptr(),
            mask.data_ptr(),
            int(mask.dtype == torch.int32),
            weight.stride(0),
            mask.stride(0),
            *weight.shape,
        )
        for weight, mask in zip(weights, masks, strict=True)
    )
    table, weight_of = _table(places, weights[0])
    _zero_kernel[(weight_of.numel(),)](
        table, weight_of, TYPE=TYPES[weights[0].itemsize], BLOCK_ROWS=BLOCK_ROWS, BLOCK_COLUMNS=BLOCK_COLUMNS
    )


def _table(places: Places, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The table of these places and the weight of each program; inside of a capture, those made before."""
    key = places, weight.device
    found = _tables.pop(key, None)
    if is_captured(weight):
        if found is None:
            raise RuntimeError(
                "zero_ goes into a CUDA graph only with weights and masks that it was called with before: it has "
                "a table of their addresses, which cannot be moved to the device inside of a capture"
            )
        _read_by_graphs.append(found)
    elif found is None:
        found = _make_table(places, weight.device)
        if len(_tables) == MOST_TABLES:
            del _tables[next(iter(_tables))]  # the one that was not used for the longest time
    _tables[key] = found
    return found


def _make_table(places: Places, device: torch.device) -> tuple[Tensor, Tensor]:
    """They depend on the places alone, so they stay true when memory is freed and used again."""
    table = []
    first_program = 0
    for place in places:
        table.append((*place, first_program))
        first_program += triton.cdiv(place[ROWS.value], BLOCK_ROWS)
    programs = torch.tensor([triton.cdiv(place[ROWS.value], BLOCK_ROWS) for place in places])
    weight_of = torch.arange(len(places), dtype=torch.int32).repeat_interleave(programs)
    return torch.tensor(table, dtype=torch.int64).to(device), weight_of.to(device)


@triton.jit
def _zero_kernel(
    table,  # (weights, FIELDS) int64
    weight_of,  # (programs,) int32
    TYPE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    program = tl.program_id(0)
    entry = table + tl.load(weight_of + program) * FIELDS
    row = (program - tl.load(entry + FIRST_PROGRAM)) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.load(entry + COLUMNS).to(tl.int32)
    packed = tl.load(entry + PACKED) != 0
    words = tl.load(entry + MASK).to(tl.pointer_type(tl.int32)) + (row * tl.load(entry + MASK_STRIDE))[:, None]
    flags = tl.load(entry + MASK).to(tl.pointer_type(tl.int8)) + (row * tl.load(entry + MASK_STRIDE))[:, None]
    weight = tl.load(entry + WEIGHT).to(tl.pointer_type(TYPE)) + (row * tl.load(entry + STRIDE))[:, None]
    here = (row < tl.load(entry + ROWS))[:, None]
    zero = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), TYPE)
    for start in range(0, columns, BLOCK_COLUMNS):
        column = start + tl.arange(0, BLOCK_COLUMNS)
        inside = here & (column < columns)[None, :]
        word = tl.load(words + (column // 32)[None, :], mask=inside & packed, other=0)
        flag = tl.load(flags + column[None, :], mask=inside & (packed == 0), other=0)
        keep = (((word >> (column % 32)[None, :]) & 1) != 0) | (flag != 0)
        tl.store(weight + column[None, :], zero, mask=inside & (keep == 0))  # kept weights are not even read


@triton.jit(do_not_specialize=["rows"])
def _copy_kernel(
    weight,  # (rows, columns) integers of the size of the floats
    mask,  # (rows, words of a row) int32 if PACKED_MASK, otherwise (rows, columns) bool
    output,  # (rows, columns)
    rows,
    columns,
    PACKED_MASK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    offset = row.to(tl.int64)[:, None] * columns + column[None, :]
    if PACKED_MASK:
        place = mask + row.to(tl.int64)[:, None] * tl.cdiv(columns, 32) + (column // 32)[None, :]
        keep = ((tl.load(place, mask=inside, other=0) >> (column % 32)[None, :]) & 1) != 0
    else:
        keep = tl.load(mask + offset, mask=inside, other=0) != 0
    bits = tl.load(weight + offset, mask=inside, other=0)
    tl.store(output + offset, tl.where(keep, bits, 0), mask=inside)


def configurations() -> Iterator[KernelConfig]:
    """Both kernels for each size of float and kind of mask."""
    tile = {"BLOCK_ROWS": BLOCK_ROWS, "BLOCK_COLUMNS": BLOCK_COLUMNS}
    for itemsize, name in ((2, "i16"), (4, "i32")):
        yield KernelConfig(_zero_kernel, {"table": "*i64", "weight_of": "*i32"}, {"TYPE": TYPES[itemsize], **tile})
        types = {"weight": f"*{name}", "output": f"*{name}", "rows": "i32", "columns": "i32"}
        for packed in (True, False):
            typed = types | {"mask": "*i32" if packed else "*i1"}
            yield KernelConfig(_copy_kernel, typed, {"PACKED_MASK": packed, **tile})
