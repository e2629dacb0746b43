"""The grids that ship: their baselines compute what the op does."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from bench.grid import Grid
from bench.grids import GRIDS
from bench.grids.cross_correlation import load_lightly
from bench.runner import BASELINE_LIMIT, Step, reference_results, relative_errors, require_gradients

LIGHTLY = """
import torch
class BarlowTwinsLoss(torch.nn.Module):
    def __init__(self, lambda_param):
        super().__init__()
        self.weight = lambda_param
    def forward(self, a, b):
        return self.weight * (a - b).sum()
"""


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_contenders_agree_with_the_reference(grid: Grid) -> None:
    shape = min(grid.shapes, key=lambda shape: torch.Size(shape).numel())
    inputs = grid.inputs(shape, torch.float32, torch.device("cpu"))
    truth = reference_results(grid, inputs, torch.float64)
    leaves = require_gradients(grid, inputs)
    contenders = grid.contenders()
    assert {"ours", "eager", "compile"} <= contenders.keys()
    for name, contender in contenders.items():
        if name != "compile" and "cpu" in contender.devices:  # compiled is the function of "eager"
            errors = relative_errors(Step(contender(inputs), leaves)(), truth)
            assert len(errors) == 1 + len(leaves), name
            assert max(errors) < {"lightly": 1e-4, "dense_bf16": 2e-2, "ort_int8": 5e-2, "ours_int8": 5e-2}.get(
                name, 1e-5
            ), name


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_each_case_comes_once_and_telling_ones_first(grid: Grid) -> None:
    for device_type in ("cpu", "cuda"):
        cases = list(grid.cases(device_type))
        telling = len(grid.shapes) if grid.telling is None else grid.telling
        expected = len(grid.shapes) + telling * (len(grid.dtypes[device_type]) - 1)
        assert len({(case.shape, case.dtype) for case in cases}) == len(cases) == expected
        assert min(cases, key=lambda case: case.priority).shape == grid.shapes[0]
    for shape in grid.shapes:
        assert min(grid.bound(shape, 4)[:2]) > 0
        assert grid.heaviest(shape).flops >= grid.bound(shape, 4).flops


def test_the_layout_of_two_of_four_gets_a_weight_that_it_can_hold() -> None:
    grid = GRIDS["block_sparse"]
    contender = grid.contenders()["torch_2_4"]
    assert contender.own is not None
    inputs = grid.inputs((3, 64, 32, 16, 16, 50), torch.float32, torch.device("cpu"))
    own = contender.own(inputs)
    weight = own["pattern"].to_dense()
    assert (weight.view(-1, 4).count_nonzero(1) == 2).all()
    expected = F.linear(own["input"].double(), weight.double(), own["bias"].double())
    (result,) = reference_results(grid, own, torch.float64)
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_outlines_are_inputs_without_values(grid: Grid) -> None:
    if grid.outlines is None:
        return
    for shape in grid.shapes[:3]:
        outline = grid.outlines(shape, torch.float32)
        for name, value in grid.inputs(shape, torch.float32, torch.device("cpu")).items():
            for tensor, without in zip(tree_leaves(value), tree_leaves(outline[name]), strict=True):
                if not isinstance(tensor, torch.Tensor):
                    assert tensor == without
                    continue
                assert without.is_meta
                assert (tensor.shape, tensor.dtype, tensor.stride()) == (without.shape, without.dtype, without.stride())


def test_lightly_is_used_without_what_its_package_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "lightly" / "loss"
    folder.mkdir(parents=True)
    (tmp_path / "lightly" / "__init__.py").write_text("")
    (folder / "__init__.py").write_text("import a_package_that_is_not_installed")
    (folder / "barlow_twins_loss.py").write_text(LIGHTLY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "lightly", raising=False)
    loss = load_lightly()
    assert loss is not None
    assert float(loss(torch.ones(2, 3), torch.zeros(2, 3))) == pytest.approx(6 * 5e-3)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert load_lightly() is None


@pytest.mark.skipif(importlib.util.find_spec("onnxruntime") is None, reason="needs the extra onnx")
def test_onnxruntime_computes_the_dense_layer() -> None:
    grid = GRIDS["block_sparse"]
    inputs = grid.inputs((3, 64, 96, 32, 32, 50), torch.float32, torch.device("cpu"))
    expected = grid.reference(**inputs)
    errors = []
    for name in ("ort_fp32", "ort_int8"):
        contender = grid.contenders()[name]
        assert contender.devices == ("cpu",)
        errors.append(float((contender(inputs)() - expected).abs().max() / expected.abs().max()))
    assert errors[0] < 1e-5 < errors[1] < BASELINE_LIMIT
