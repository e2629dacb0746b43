"""ONNX files: written by torch's own exporter, quantised and run by onnxruntime, on the CPU."""

import importlib.util
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

PACKAGES = ("onnxruntime", "onnx", "onnxscript")


def missing_package() -> str | None:
    """The first of what ONNX needs that is not installed, and how to get it; None: everything is there."""
    for name in PACKAGES:
        if importlib.util.find_spec(name) is None:
            return f"{name} is missing: pip install 'sdprune[onnx]'"
    return None


class FirstOutput(nn.Module):
    """A transformers model as a function of tensors in a fixed order; its cache, an output too, is turned off."""

    def __init__(self, model: Any, names: tuple[str, ...]) -> None:
        super().__init__()
        model.config.use_cache = False
        self.model = model
        self.names = names
        self.eval()

    def forward(self, *values: Tensor) -> Tensor:
        """The first output: logits, or the last hidden state."""
        first: Tensor = self.model(**dict(zip(self.names, values, strict=True)))[0]
        return first


def write_onnx(function: FirstOutput, path: Path, inputs: Mapping[str, Tensor]) -> None:
    """Write a model of any batch and sequence; weights beyond ONNX's limit of 2 GB go into a file beside it.

    Args:
        function: float32, on the CPU.
        path: of the file.
        inputs: (batch, sequence) tensors by name, at least 2 x 3 tokens.

    Raises:
        ImportError: a package of the extra `onnx` is missing.
    """
    if problem := missing_package():
        raise ImportError(problem)
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
    with _quiet(), torch.no_grad():
        torch.onnx.export(
            function,
            tuple(inputs.values()),
            path,
            input_names=list(inputs),
            output_names=["logits"],
            dynamic_shapes=((sizes,) * len(inputs),),
            dynamo=True,
            verbose=False,
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep back that the exporter warns of torch's own deprecated parts, of shared sizes, and of absent packages."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def quantize_onnx(source: Path, target: Path) -> None:
    """Write a float32 model with int8 weights, whose inputs are quantised as it runs: `quantize_dynamic` as it is."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load(source)
    # The exporter leaves sizes behind of weights that it has transposed since; the quantiser finds the right ones.
    model.graph.ClearField("value_info")
    onnx.helper.set_model_props(
        model, {"onnx.quant.pre_process": "onnxruntime.quant"}
    )  # or it logs that it infers them
    quantize_dynamic(model, target, weight_type=QuantType.QInt8)


class OnnxModel:
    """A file in onnxruntime on the CPU, with as many threads as torch has when it is made; called as torch models are.

    Args:
        path: of the file, which is needed no longer than this takes.

    Attributes:
        nbytes: of the file, and of what lies beside it under its name.
    """

    def __init__(self, path: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        # Threads that wait actively for the next call would slow whatever runs between two of them.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.nbytes = sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))

    def __call__(self, **inputs: Tensor) -> tuple[Tensor, ...]:
        """The outputs."""
        found = self.session.run(None, {name: value.numpy() for name, value in inputs.items()})
        return tuple(map(torch.from_numpy, found))
