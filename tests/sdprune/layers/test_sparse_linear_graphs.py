"""A block-sparse layer waits for nothing on the host: it works on fake tensors, reads nothing back, and fits graphs."""

import importlib.util
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from sdp_kernels import use_backend
from sdprune import BlockSparseLinear
from tests.cuda import Captured, no_waiting

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
READS = ("item", "tolist", "nonzero", "__bool__", "__int__", "__float__", "__index__")


def layer_of(density, block_shape=(16, 32), device=DEVICE, dtype=torch.float32):
    """Return a layer of four by four blocks, the first ones of each row of blocks kept, and its dense weight."""
    height, width = block_shape
    linear = nn.Linear(4 * width, 4 * height)
    kept = (torch.arange(4) < round(4 * density)).repeat_interleave(width)
    with torch.no_grad():
        linear.weight.mul_(kept)
    return BlockSparseLinear.from_linear(linear, block_shape).to(device, dtype), linear.to(device, dtype)


@pytest.mark.parametrize("tokens", [5, 2048])
@pytest.mark.parametrize("density", [0.25, 1.0])
@pytest.mark.parametrize("backend", ["cpu", pytest.param("triton", marks=needs_triton)])
def test_runs_on_fake_tensors(backend, density, tokens):
    if backend == "cpu" and DEVICE != "cpu":
        pytest.skip("tensors are on a GPU")
    layer, _ = layer_of(density)
    mode = FakeTensorMode()
    fakes = {
        name: mode.from_tensor(tensor.detach()) for name, tensor in (*layer.named_parameters(), *layer.named_buffers())
    }
    for name, fake in fakes.items():
        setattr(layer, name, nn.Parameter(fake) if name in ("values", "bias") else fake)
    with mode, use_backend(backend):
        rows = torch.empty(2, tokens, layer.in_features, device=DEVICE, requires_grad=True)
        output = layer(rows)
        assert output.shape == (2, tokens, layer.out_features)
        (gradient,) = torch.autograd.grad(output.sum(), rows)
        assert gradient.shape == rows.shape


@needs_triton
@pytest.mark.parametrize("tokens", [3, 1024])
@pytest.mark.parametrize("density", [0.25, 1.0])
def test_reads_no_number_back(density, tokens, monkeypatch):
    layer, linear = layer_of(density, (16, 16))
    rows = torch.randn(tokens, layer.in_features, device=DEVICE)
    expected = linear(rows)
    for name in READS:

        def refuse(*_, name=name):
            raise AssertionError(f"{name} would wait for the device")

        monkeypatch.setattr(torch.Tensor, name, refuse)
    with use_backend("triton"), torch.inference_mode():
        output = layer(rows)
    monkeypatch.undo()  # or the comparison could not read either
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("tokens", [1, 100, 4096])
@pytest.mark.parametrize("density", [0.25, 1.0])
def test_is_captured_in_a_cuda_graph_and_replayed(density, tokens, compiled):
    layer, linear = layer_of(density, (64, 32), "cuda", torch.bfloat16)
    call = torch.compile(layer, fullgraph=True) if compiled else layer
    rows = torch.randn(tokens, layer.in_features, device="cuda", dtype=torch.bfloat16)
    with torch.inference_mode():
        captured = Captured(lambda: call(rows))
        with no_waiting():
            call(rows)
        for _ in range(3):
            rows.normal_()
            expected = functional.linear(rows, linear.weight, linear.bias)
            torch.testing.assert_close(captured.replay(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("backend", ["default", "reference"])
def test_one_graph_serves_many_numbers_of_tokens(backend):
    layer, linear = layer_of(0.25)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.inference_mode(), nullcontext() if backend == "default" else use_backend(backend):
        compiled(torch.randn(5, layer.in_features, device=DEVICE))
        with torch.compiler.set_stance("fail_on_recompile"):
            for tokens in (2, 64, 2000):
                rows = torch.randn(tokens, layer.in_features, device=DEVICE)
                torch.testing.assert_close(compiled(rows), linear(rows), rtol=1e-4, atol=1e-4)
