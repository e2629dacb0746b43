"""Running a model over examples, in their order."""

import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

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


@dataclass(frozen=True)
class Batches:
    """Examples in padded batches; those of like lengths stand together, which is cheaper.

    Args:
        rows: the places of the examples in every batch.
        inputs: what the model is called with, without labels, on the CPU.
    """

    rows: tuple[tuple[int, ...], ...]
    inputs: tuple[dict[str, Tensor], ...]

    @classmethod
    def of(cls, examples: EncodedExamples, tokenizer: Any, batch_size: int) -> Self:
        """Return the batches of examples."""
        order = [index for _, index in sorted(zip(examples.lengths, range(len(examples)), strict=True))]
        rows = tuple(tuple(order[start : start + batch_size]) for start in range(0, len(order), batch_size))
        return cls(rows, tuple(collate(tokenizer, [examples[index] for index in batch]) for batch in rows))

    def in_order(self, logits: Iterable[Tensor]) -> NDArray[np.float32]:
        """Return the logits of the batches in the order of the examples.

        (rows, classes), or of a token classifier (rows, longest row, classes) with 0 behind shorter rows.
        """
        found: dict[int, NDArray[np.float32]] = {}
        for batch, inputs, outputs in zip(self.rows, self.inputs, logits, strict=True):
            values: Any = outputs.float().cpu().numpy()
            if values.ndim == 3:
                values = [row[mask] for row, mask in zip(values, inputs["attention_mask"].bool().numpy(), strict=True)]
            found |= dict(zip(batch, values, strict=True))
        return padded([found[index] for index in range(len(found))], 0.0)


@torch.inference_mode()
def predict(
    model: nn.Module, batches: Batches, *, bf16: bool = False, description: str | None = None
) -> NDArray[np.float32]:
    """Return the logits of a model in the order of the examples, as `Batches.in_order` has them.

    Args:
        model: a classifier of texts or of tokens; moved to the accelerator where there is one, left in the mode it
            was in.
        batches: encoded rows.
        bf16: bfloat16 autocast.
        description: text of a progress bar; None: no bar.
    """
    device = best_device()
    was_training = model.training
    if next(model.parameters()).device != device:  # int8 weights cannot be moved, not even to where they are
        model.to(device)
    model.eval()
    logits = []
    for inputs in tqdm(batches.inputs, desc=description, disable=description is None, unit="batch", leave=False):
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            outputs = model(**{name: value.to(device) for name, value in inputs.items()})
        logits.append(outputs.logits.float().cpu())
    model.train(was_training)
    return batches.in_order(logits)


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
