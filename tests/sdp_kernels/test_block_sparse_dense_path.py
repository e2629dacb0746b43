"""The dense product in place of the sparse one: when, why, and with the same results and gradients."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sdp_kernels import BlockSparseMatrix, block_sparse_linear, use_backend
from sdp_kernels.block_sparse_linear import break_even, op
from sdp_kernels.block_sparse_linear.break_even import BREAK_EVEN, Edge, reasons_for_dense
from sdp_kernels.cpu_engine import availability

AT_ONCE = (Edge(4, {16: 0.5}),)  # from four tokens on, above half of the blocks


def matrix_of(density: float, block_shape: tuple[int, int] = (16, 16)) -> BlockSparseMatrix:
    """Ten by ten blocks, less a ragged edge, the first ones of each row of blocks kept."""
    shape = (10 * block_shape[0] - 3, 10 * block_shape[1] - 5)
    kept = (torch.arange(10) < round(10 * density)).expand(10, 10)
    mask = kept.repeat_interleave(block_shape[0], 0).repeat_interleave(block_shape[1], 1)[: shape[0], : shape[1]]
    return BlockSparseMatrix.from_dense(torch.randn(shape), block_shape, mask)


@pytest.fixture
def dense_products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each product that took the dense path; the table says AT_ONCE for each backend."""
    seen: list[int] = []
    reference = op.block_sparse_linear_reference

    def counted(input: Tensor, *others: Any, **options: Any) -> Tensor:
        seen.append(input.shape[0])
        return reference(input, *others, **options)

    monkeypatch.setattr(op, "block_sparse_linear_reference", counted)
    monkeypatch.setattr(break_even, "BREAK_EVEN", dict.fromkeys(BREAK_EVEN, AT_ONCE))
    return seen


def test_density_and_tokens_decide(dense_products: list[int]) -> None:
    for density, tokens, dense in ((0.5, 8, False), (0.6, 8, True), (0.6, 4, True), (0.6, 3, False), (1.0, 0, False)):
        matrix = matrix_of(density)
        input = torch.randn(tokens, matrix.shape[1])
        dense_products.clear()
        output = block_sparse_linear(input, matrix)
        assert dense_products == ([tokens] if dense else []), (density, tokens)
        torch.testing.assert_close(output, F.linear(input, matrix.to_dense()), rtol=1e-4, atol=1e-4)
        assert output.is_contiguous()


def test_path_overrules_the_estimate(dense_products: list[int]) -> None:
    matrix = matrix_of(0.9)
    input = torch.randn(8, matrix.shape[1])
    block_sparse_linear(input, matrix, path="sparse")
    assert dense_products == []
    block_sparse_linear(input[:1], matrix, path="dense")
    assert dense_products == [1]
    with pytest.raises(ValueError, match=r"path must be one of \['auto', 'sparse', 'dense'\], got 'blocks'"):
        block_sparse_linear(input, matrix, path="blocks")


@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_both_paths_give_the_same(
    backend: str, activation: Any, device: torch.device, request: pytest.FixtureRequest
) -> None:
    if backend == "triton":
        request.getfixturevalue("triton_backend")
    place = device if backend == "triton" else torch.device("cpu")
    matrix = matrix_of(0.8, (16, 32)).to(place)
    bias = torch.randn(matrix.shape[0], device=place, requires_grad=True)
    found = []
    for path in ("sparse", "dense"):
        torch.manual_seed(1)
        input = torch.randn(2, 3, matrix.shape[1], device=place, requires_grad=True)
        values = matrix.values.clone().requires_grad_()
        with use_backend(backend):
            output = block_sparse_linear(input, replace(matrix, values=values), bias, activation=activation, path=path)
        gradients = torch.autograd.grad((output * torch.randn_like(output)).sum(), (input, values, bias))
        found.append([output, *gradients])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-3)


def test_reasons_name_the_densities() -> None:
    matrix = matrix_of(0.7, (64, 16))
    assert reasons_for_dense(matrix, 4096, torch.bfloat16, "triton") == [
        "density 0.70 is above 0.45, the break-even of the triton product of blocks of 64 x 16 from 4096 tokens on"
    ]
    assert reasons_for_dense(matrix, 1023, torch.bfloat16, "triton") == []
    assert reasons_for_dense(matrix_of(0.4, (64, 16)), 4096, torch.bfloat16, "triton") == []
    assert reasons_for_dense(matrix, 2048, torch.bfloat16, "triton")[0].startswith("density 0.70 is above 0.60")


def test_each_cpu_product_has_its_edges(monkeypatch: pytest.MonkeyPatch) -> None:
    full = matrix_of(1.0, (32, 32))
    monkeypatch.setattr(availability, "_numba_installed", lambda: True)
    monkeypatch.setattr(availability, "multiplies_bfloat16", lambda: True)
    assert reasons_for_dense(full, 4096, torch.float32, "cpu") == []
    assert "compiled bfloat16" in reasons_for_dense(full, 128, torch.bfloat16, "cpu")[0]
    assert "gathered" in reasons_for_dense(full, 128, torch.float64, "cpu")[0]
    monkeypatch.setattr(availability, "multiplies_bfloat16", lambda: False)
    assert reasons_for_dense(full, 128, torch.bfloat16, "cpu") == []
    monkeypatch.setattr(availability, "_numba_installed", lambda: False)
    assert "gathered" in reasons_for_dense(full, 128, torch.float32, "cpu")[0]


def test_sides_between_the_entries_take_the_one_before() -> None:
    edge = Edge(1, {16: 0.1, 64: 0.4})
    assert [edge.density(height) for height in (8, 16, 48, 64, 256)] == [0.1, 0.1, 0.1, 0.4, 0.4]


def test_compiles_and_exports_without_a_graph_break(dense_products: list[int]) -> None:
    matrix = matrix_of(0.8)

    class Layer(torch.nn.Module):
        def forward(self, input: Tensor) -> Tensor:
            return block_sparse_linear(input, matrix)

    layer = Layer()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (2, 3, 6, 9):  # on both sides of the edge
        input = torch.randn(tokens, matrix.shape[1])
        torch.testing.assert_close(compiled(input), layer(input), rtol=1e-4, atol=1e-4)
    example = torch.randn(8, matrix.shape[1])
    shapes = {"input": {0: torch.export.Dim("tokens")}}
    exported = torch.export.export(layer, (example,), dynamic_shapes=shapes)  # any number of tokens, not a range
    torch.testing.assert_close(exported.module()(example[:2]), layer(example[:2]), rtol=1e-4, atol=1e-4)
