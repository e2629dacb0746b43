"""Whom a pruned model has to beat: the dense model itself, as others run it faster in a few lines."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from sdprune.formats.onnx import FirstOutput, OnnxModel, missing_package, quantize_onnx, write_onnx
from sdprune.layers.forms import dense_copy
from sdprune.masking.linears import evaluating
from sdprune.speed.timing import measure

DENSE, OURS, OPPONENT = "dense", "ours", "opponent"
INT8 = "ONNX Runtime int8"
MOST_PARAMETERS = 50_000_000  # of a model whose opponents are timed unasked
# How far the output may be from that of the dense float32 model, relative to the largest value of that. Dynamic int8
# loses 0.01 on random weights and up to 0.19 on all-MiniLM-L6-v2, whose few large inputs leave small ones few steps.
LIMITS = {"float32": 1e-4, "bfloat16": 5e-2, "int8": 2.5e-1}


@dataclass(frozen=True)
class Contender:
    """One way to run a model.

    Args:
        name: in rows and figures.
        role: "dense", what ours is made from; "ours", timed only if right; "opponent", timed also if it errs.
        precision: of its products, such as "int8".
        model: called with the model's inputs by name; None where it could not be made.
        facts: further fields of its row.
        failed: why there is no model, in one line.
    """

    name: str
    role: str
    precision: str
    model: Any
    facts: Mapping[str, Any] = field(default_factory=dict)
    failed: str = ""

    @property
    def weights_mib(self) -> float | None:
        """What its weights take; None where there is no telling."""
        if isinstance(self.model, OnnxModel):
            return self.model.nbytes / 2**20
        if isinstance(self.model, nn.Module):
            return sum(tensor.nbytes for tensor in (*self.model.parameters(), *self.model.buffers())) / 2**20
        return None


def in_bfloat16(model: Any) -> Contender:
    """The dense model in bfloat16, eager."""
    return _opponent("dense bfloat16", "bfloat16", lambda: copy.deepcopy(model).to(torch.bfloat16))


def in_onnxruntime(model: Any, inputs: Mapping[str, Tensor]) -> tuple[Contender, Contender]:
    """The dense model in ONNX Runtime, in float32 and in dynamic int8.

    A package that is missing, and an export that fails, are told by the contenders.

    Args:
        model: a transformers model in float32 on the CPU, for any batch and length; it stays as it is.
        inputs: as of `sdprune.formats.onnx.write_onnx`; each is called once with them.
    """
    with TemporaryDirectory() as folder:
        plain, small = Path(folder) / "float32.onnx", Path(folder) / "int8.onnx"

        def float32() -> OnnxModel:
            write_onnx(FirstOutput(dense_copy(model), tuple(inputs)), plain, inputs)
            return _tried(OnnxModel(plain), inputs)

        def int8() -> OnnxModel:
            quantize_onnx(plain, small)
            return _tried(OnnxModel(small), inputs)

        first = _opponent("ONNX Runtime float32", "float32", float32)
        if first.failed:
            return first, replace(first, name=INT8, precision="int8")
        return first, _opponent(INT8, "int8", int8)


def opponent_speedups(model: Any, inputs: Mapping[str, Tensor], *, repeats: int = 7) -> dict[str, float]:
    """How many times as fast as eager the dense model is in ONNX Runtime, float32 and int8, on one batch.

    Measured only where it costs a run little: the packages of the extra `onnx` are there, the model is on the CPU and
    has at most 50 million parameters. The export of all-MiniLM-L6-v2 took 10 s of one core.

    Args:
        model: a transformers model in float32; it stays as it is.
        inputs: as of `sdprune.formats.onnx.write_onnx`.
        repeats: of each timing.

    Returns:
        By the names of the contenders; empty where nothing was measured.
    """
    small = sum(parameter.numel() for parameter in model.parameters()) <= MOST_PARAMETERS
    if missing_package() is not None or model.device.type != "cpu" or not small:
        return {}
    # Outside of it: tensors of inference mode cannot be exported. The caller's random numbers stay what they are.
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
        inputs = {name: value.clone() for name, value in inputs.items()}
        found = in_onnxruntime(model, inputs)
    models = {DENSE: model} | {one.name: one.model for one in found if not one.failed}
    with evaluating(model), torch.inference_mode():
        times = measure({name: partial(one, **inputs) for name, one in models.items()}, model.device, repeats)
    return {name: times[DENSE].median / taken.median for name, taken in times.items() if name != DENSE}


def _tried(model: OnnxModel, inputs: Mapping[str, Tensor]) -> OnnxModel:
    model(**inputs)
    return model


def _opponent(name: str, precision: str, make: Callable[[], Any]) -> Contender:
    try:
        return Contender(name, OPPONENT, precision, make())
    except Exception as problem:  # any library may be among the opponents: the row says what it raised
        return Contender(name, OPPONENT, precision, None, {}, one_line(problem))


def one_line(problem: Exception) -> str:
    """The first line of what was raised, or its kind where that is empty."""
    return (str(problem).strip().splitlines() or [type(problem).__name__])[0][:300]
