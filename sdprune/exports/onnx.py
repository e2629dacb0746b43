"""ONNX: a pruned model for other runtimes, through torch's own exporter, checked in onnxruntime."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdprune.files import new_directory
from sdprune.formats.onnx import FirstOutput, OnnxModel, write_onnx
from sdprune.layers.forms import dense_copy, int8_names, plain_copy
from sdprune.layers.narrow import NarrowLinear, RemovedLinear

MODEL_NAME = "model.onnx"
TOLERANCE = 1e-4


def export_onnx(
    model: Any,
    directory: str | Path,
    inputs: Mapping[str, Tensor],
    *,
    processing_class: Any = None,
    tolerance: float = TOLERANCE,
) -> float:
    """Write `model.onnx` into a new folder and run it in onnxruntime on the CPU, on `inputs` and on a smaller batch.

    Beside it lies config.json. Batch and sequence are of any size. Narrower layers stay narrower. ONNX has no
    block-sparse product, so such layers are written dense, with their zeros, and those in int8 in float32. Weights
    beyond ONNX's limit of 2 GB go into a file beside the model.

    Args:
        model: a transformers model on the CPU in float32; masked, with zeros, narrower or sparse; it stays as it is.
        directory: the folder to make; it is whole or absent.
        inputs: (batch, sequence) tensors by name, at least 2 x 3 tokens, as the model is called with.
        processing_class: tokenizer to save beside the model.
        tolerance: the largest absolute difference of the first output that is allowed.

    Returns:
        The largest absolute difference between torch and onnxruntime.

    Raises:
        ImportError: a package of the extra `onnx` is missing.
        ValueError: a folder that is not empty, a model that is not float32 on the CPU, or inputs of another form.
        RuntimeError: the outputs differ by more than the tolerance; nothing is written.
    """
    _check(model, inputs)
    copy = dense_copy(model, keep=(NarrowLinear, RemovedLinear))  # without our own operators
    wrapped = FirstOutput(copy, tuple(inputs))
    with new_directory(Path(directory)) as folder, torch.no_grad():
        path = folder / MODEL_NAME
        write_onnx(wrapped, path, inputs)
        written = OnnxModel(path)
        difference = 0.0
        for part in (inputs, {name: value[:-1, :-1] for name, value in inputs.items()}):
            expected = wrapped(*part.values())
            (found,) = written(**part)
            difference = max(difference, float((found - expected).abs().max()))
        if not difference <= tolerance:
            raise RuntimeError(f"onnxruntime differs from torch by {difference:.3g}, more than {tolerance:.3g}")
        plain_copy(model).config.save_pretrained(folder)  # names of the labels, which runtimes look for here
        if processing_class is not None:
            processing_class.save_pretrained(folder)
    return difference


def _check(model: Any, inputs: Mapping[str, Tensor]) -> None:
    if not hasattr(model, "config"):
        raise TypeError(f"model must be a transformers model, got {type(model).__name__}")
    integers = {id(model.get_submodule(name).weight) for name in int8_names(model)}
    kinds = {(value.dtype, value.device.type) for value in model.parameters() if id(value) not in integers}
    if kinds != {(torch.float32, "cpu")}:
        raise ValueError(f"model must be float32 on the CPU, got {', '.join(map(str, sorted(kinds, key=str)))}")
    for name, value in inputs.items():
        if value.dim() != 2 or value.shape[0] < 2 or value.shape[1] < 3:
            raise ValueError(f"inputs[{name!r}] must have shape (batch, sequence), at least (2, 3), got {value.shape}")
