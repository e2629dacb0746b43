"""Running a model over examples, in their order."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm.auto import tqdm

from sdprune.data.examples import EncodedExamples


def best_device() -> torch.device:
    """Return the accelerator, or the CPU where there is none: torch may be built for one that is not there."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def collate(tokenizer: Any, rows: list[dict[str, Any]], device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Pad rows of token ids into one batch without labels."""
    inputs = [{key: value for key, value in row.items() if key != "labels"} for row in rows]
    return {key: value.to(device) for key, value in tokenizer.pad(inputs, return_tensors="pt").items()}


@torch.inference_mode()
def predict(
    model: nn.Module,
    examples: EncodedExamples,
    tokenizer: Any,
    *,
    batch_size: int = 64,
    bf16: bool = False,
    description: str | None = None,
) -> NDArray[np.float32]:
    """Return the logits in the order of the examples. Batches are made by length, which is cheaper.

    Args:
        model: a classifier of texts or of tokens; moved to the accelerator where there is one, left in the mode it
            was in.
        examples: encoded rows.
        tokenizer: pads the batches.
        batch_size: rows of a batch.
        bf16: bfloat16 autocast.
        description: text of a progress bar; None: no bar.

    Returns:
        (rows, classes), or of a token classifier (rows, longest row, classes) with 0 behind shorter rows.
    """
    device = best_device()
    was_training = model.training
    if next(model.parameters()).device != device:  # int8 weights cannot be moved, not even to where they are
        model.to(device)
    model.eval()
    order = [index for _, index in sorted(zip(examples.lengths, range(len(examples)), strict=True))]
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    logits: dict[int, NDArray[np.float32]] = {}
    for batch in tqdm(batches, desc=description, disable=description is None, unit="batch", leave=False):
        inputs = collate(tokenizer, [examples[index] for index in batch], device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            rows = model(**inputs).logits.float().cpu().numpy()
        if rows.ndim == 3:
            rows = [row[mask] for row, mask in zip(rows, inputs["attention_mask"].bool().cpu().numpy(), strict=True)]
        logits |= dict(zip(batch, rows, strict=True))
    model.train(was_training)
    return padded([logits[index] for index in range(len(examples))], 0.0)


def padded(rows: Sequence[npt.ArrayLike], value: float) -> NDArray[Any]:
    """Stack arrays whose first sizes differ, with `value` behind the shorter ones."""
    arrays = [np.asarray(row) for row in rows]
    if len({array.shape for array in arrays}) == 1:
        return np.stack(arrays)
    stacked = np.full((len(arrays), max(map(len, arrays)), *arrays[0].shape[1:]), value, arrays[0].dtype)
    for row, array in zip(stacked, arrays, strict=True):
        row[: len(array)] = array
    return stacked


@torch.inference_mode()
def speedup(dense: nn.Module, pruned: nn.Module, inputs: dict[str, Tensor], *, repeats: int = 7) -> float:
    """Return the time of the dense model over that of the pruned one: medians of alternating runs on one batch.

    Both run in fp32 on the accelerator where there is one.
    """
    device = best_device()
    inputs = {key: value.to(device) for key, value in inputs.items()}
    times: dict[nn.Module, list[float]] = {dense.to(device).eval(): [], pruned.to(device).eval(): []}
    for turn in range(repeats + 1):
        for model, record in times.items():
            start = time.perf_counter()
            model(**inputs).logits.cpu()
            if turn:  # the first turn warms up
                record.append(time.perf_counter() - start)
    return statistics.median(times[dense]) / statistics.median(times[pruned])
