"""The block-sparse linear map in inference, against the dense product of the same weight and torch's BSR layout."""

import importlib.util
import tempfile
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.grid import Call, Contender, Grid, Work, direct
from sdp_kernels.block_sparse_linear.matrix import BlockLists, BlockSparseMatrix
from sdp_kernels.block_sparse_linear.op import block_sparse_linear
from sdp_kernels.block_sparse_linear.spec import SPEC
from sdp_kernels.spec import Inputs, Shape

# A shape is (tokens, in, out, block rows, block columns, density in percent).
TOKENS = (1, 16, 128, 1024, 4096)
SMALL = ((768, 3072), (3072, 768))  # BERT-base
LARGE = ((4096, 4096), (4096, 14336), (14336, 4096))  # Llama-3-8B
BLOCKS = ((16, 16), (32, 32), (64, 64), (128, 128), (64, 32), (128, 32))
DENSITIES = (5, 10, 20, 35, 50)
TELLING = tuple((tokens, *weight, 32, 32, 10) for tokens in (128, 4096) for weight in SMALL)
LARGE_TELLING = tuple((4096, *LARGE[0], *block, 10) for block in ((64, 64), (128, 128), (128, 32)))


def shapes() -> tuple[Shape, ...]:
    """The telling ones, one factor at a time around them, then everything on BERT's weights; the large ones at 10 %."""
    found = dict.fromkeys((*TELLING, *LARGE_TELLING))
    found |= dict.fromkeys((128, *weight, 32, 32, density) for weight in SMALL for density in DENSITIES)
    found |= dict.fromkeys((tokens, *weight, 32, 32, 10) for tokens in TOKENS for weight in SMALL)
    found |= dict.fromkeys((128, *weight, *block, 10) for weight in SMALL for block in BLOCKS)
    small = product(TOKENS, SMALL, BLOCKS, DENSITIES)
    found |= dict.fromkeys((tokens, *weight, *block, density) for tokens, weight, block, density in small)
    large = product(TOKENS, LARGE, BLOCKS)
    return tuple(found | dict.fromkeys((tokens, *weight, *block, 10) for tokens, weight, block in large))


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Exactly the share of the blocks, at random places."""
    tokens, columns, outputs, height, width, density = shape
    grid = outputs // height, columns // width
    keep = torch.zeros(grid[0] * grid[1], dtype=torch.bool)
    keep[torch.randperm(keep.numel())[: max(1, round(density / 100 * keep.numel()))]] = True
    mask = keep.view(grid).repeat_interleave(height, 0).repeat_interleave(width, 1)
    weight = torch.randn(outputs, columns, device=device)
    pattern = BlockSparseMatrix.from_dense(weight, (height, width), mask.to(device)).to(device, dtype)
    return {
        "input": torch.randn(tokens, columns, device=device).to(dtype),
        "values": pattern.values,
        "pattern": pattern,
        "bias": torch.randn(outputs, device=device).to(dtype),
    }


def outlines(shape: Shape, dtype: torch.dtype) -> Inputs:
    """The sizes and dtypes of `inputs`, without values."""
    tokens, columns, outputs, height, width, density = shape
    rows, across = outputs // height, columns // width
    blocks = max(1, round(density / 100 * rows * across))
    indices = partial(torch.empty, dtype=torch.int32, device="meta")
    features = partial(torch.empty, dtype=dtype, device="meta")
    sizes = blocks, rows, across + 1, blocks, blocks, across
    pattern = BlockSparseMatrix(
        features(blocks, height, width),
        indices(rows + 1),
        indices(blocks),
        (outputs, columns),
        (height, width),
        BlockLists(*map(indices, sizes)),
    )
    return {"input": features(tokens, columns), "values": pattern.values, "pattern": pattern, "bias": features(outputs)}


def dense(dtype: torch.dtype | None = None, compile: bool = False) -> Contender:
    """F.linear with the zeros in place, in another dtype if one is given: what a user has without sparse products."""

    def prepare(inputs: Inputs) -> Call:
        tensors: tuple[Tensor, ...] = (inputs["input"], inputs["pattern"].to_dense(), inputs["bias"])
        if dtype is not None:
            tensors = tuple(tensor.to(dtype) for tensor in tensors)
        function: Callable[..., Tensor] = F.linear
        if compile:
            function = torch.compile(_linear, fullgraph=True, dynamic=False)
        return partial(function, *tensors)

    return Contender(prepare)


def _linear(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(input, weight, bias)


def torch_bsr(inputs: Inputs) -> Call:
    """F.linear with torch's own blocked layout."""
    return partial(F.linear, inputs["input"], _bsr(inputs), inputs["bias"])


def _bsr(inputs: Inputs) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse BSR tensor support is in beta")
        weight: Tensor = inputs["pattern"].to_torch_bsr()
    return weight


def two_of_four(inputs: Inputs) -> Inputs:
    """Inputs whose weight keeps two of four neighbours in every block: all that the 2:4 layout can hold."""
    pattern = inputs["pattern"]
    groups = torch.randn(pattern.shape, device=pattern.values.device).to(pattern.values.dtype).view(-1, 4)
    weakest = groups.abs().topk(2, largest=False).indices
    weight = groups.scatter(1, weakest, 0).view(pattern.shape)
    whole = BlockSparseMatrix.from_dense(weight, pattern.block_shape)
    return inputs | {"values": whole.values, "pattern": whole}


def torch_semi_structured(inputs: Inputs) -> Call:
    """F.linear with torch's 2:4 layout, whose products cost half of dense ones at best."""
    weight = torch.sparse.to_sparse_semi_structured(inputs["pattern"].to_dense())
    return partial(F.linear, inputs["input"], weight, inputs["bias"])


def nvmath_ust(inputs: Inputs) -> Call:
    """F.linear with the same blocks as NVIDIA's universal sparse tensor, https://docs.nvidia.com/cuda/nvmath-python."""
    from nvmath.sparse.ust.interfaces.torch_interface import TorchUST  # type: ignore[import-not-found,unused-ignore]

    weight = TorchUST.from_torch(_bsr(inputs))
    return lambda: F.linear(inputs["input"], weight) + inputs["bias"]


def ours_int8(inputs: Inputs) -> Call:
    """The same blocks as integers, as a loaded int8 layer holds them."""
    weight = inputs["pattern"].quantize().packed()
    return partial(block_sparse_linear, inputs["input"], weight, inputs["bias"])


def onnxruntime_linear(int8: bool = False) -> Contender:
    """A dense layer in ONNX Runtime with as many threads as torch: float32, or what `quantize_dynamic` makes of it."""

    def prepare(inputs: Inputs) -> Call:
        from sdprune.formats.onnx import OnnxModel, quantize_onnx  # which takes transformers along

        with tempfile.TemporaryDirectory() as folder:
            path, quantized = Path(folder) / "float32.onnx", Path(folder) / "int8.onnx"
            _write_linear(path, inputs["pattern"].to_dense(), inputs["bias"])
            if int8:
                quantize_onnx(path, quantized)
            model = OnnxModel(quantized if int8 else path)
        return lambda: model(input=inputs["input"])[0]

    return Contender(prepare, devices=("cpu",))


def _write_linear(path: Path, weight: Tensor, bias: Tensor) -> None:
    """The product and the sum that exported layers of a Transformer consist of; a Gemm would not be quantised."""
    import onnx
    from onnx import helper, numpy_helper

    nodes = [
        helper.make_node("MatMul", ["input", "weight"], ["product"]),
        helper.make_node("Add", ["product", "bias"], ["output"]),
    ]
    outputs, columns = weight.shape
    taken, given = (
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["tokens", size])
        for name, size in (("input", columns), ("output", outputs))
    )
    constants = {"weight": weight.T.contiguous(), "bias": bias}
    held = [numpy_helper.from_array(value.numpy(), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "linear", [taken], [given], held)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


def contenders() -> Mapping[str, Contender]:
    """Ours, also in int8; the dense product, in the same dtype, compiled, in bfloat16, in ONNX Runtime; others.

    Whether a CUDA graph can hold these is not promised anywhere.
    """
    found = {
        "ours": direct(SPEC.op),
        "ours_int8": Contender(ours_int8, devices=("cpu",)),
        "eager": dense(),
        "compile": dense(compile=True),
        "dense_bf16": dense(torch.bfloat16),
        "torch_bsr": Contender(torch_bsr, captured=False),
        "torch_2_4": Contender(torch_semi_structured, captured=False, devices=("cuda",), own=two_of_four),
    }
    if all(importlib.util.find_spec(name) is not None for name in ("onnx", "onnxruntime")):
        found |= {"ort_fp32": onnxruntime_linear(), "ort_int8": onnxruntime_linear(int8=True)}
    if importlib.util.find_spec("nvmath") is not None:
        found["nvmath_ust"] = Contender(nvmath_ust, captured=False, devices=("cuda",))
    return found


def _bound(shape: Shape, itemsize: int) -> Work:
    tokens, columns, outputs, _, _, density = shape
    kept = density / 100 * columns * outputs
    return Work(int(2 * tokens * kept), int(itemsize * (kept + tokens * (columns + outputs))), 0)


def _heaviest(shape: Shape) -> Work:
    tokens, columns, outputs = shape[:3]
    memory = 8 * (3 * columns * outputs + 2 * tokens * (columns + outputs))
    return Work(2 * tokens * columns * outputs, 2 * memory, memory)


GRID = Grid(
    name="block_sparse",
    shapes=shapes(),
    inputs=inputs,
    reference=SPEC.reference,
    contenders=contenders,
    bound=_bound,
    heaviest=_heaviest,
    telling=len(TELLING),
    outlines=outlines,
    dtypes={"cpu": ("fp32",), "cuda": ("bf16", "fp32")},
)
