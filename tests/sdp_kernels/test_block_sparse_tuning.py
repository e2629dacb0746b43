"""Tuned launches: found, kept on disk, loaded, used, and refused where they do not belong."""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from sdp_kernels import BlockSparseMatrix, block_sparse_linear, use_backend
from sdp_kernels.block_sparse_linear import tuning
from sdp_kernels.block_sparse_linear.launch import TUNED, ProductClass, TunedLaunch
from sdp_kernels.block_sparse_linear.tuning import Tuning, candidates, load, save, tune
from sdp_kernels.tiles.launch import Launch

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
ANOTHER = TunedLaunch(Launch(16, 4, 2), 4)  # not what five tokens get without a table


@pytest.fixture(autouse=True)
def _empty_table() -> Iterator[None]:
    TUNED.clear()
    yield
    TUNED.clear()


@pytest.fixture
def weight(device: torch.device) -> BlockSparseMatrix:
    return BlockSparseMatrix.from_dense(torch.randn(32, 512), (16, 32)).to(device)


def write(path: Path, weight: BlockSparseMatrix, **changes: Any) -> Path:
    """A table with one launch, of which some fields are changed."""
    key = ProductClass.of(5, weight.shape, weight.block_shape, torch.float32)
    save(path, [Tuning(key, ANOTHER, 1.0, 2.0)], weight.values.device)
    table = json.loads(path.read_text())
    for name, value in changes.items():
        (table if name in table else table["launches"][0])[name] = value
    path.write_text(json.dumps(table))
    return path


def test_tunes_saves_and_loads(
    tmp_path: Path, weight: BlockSparseMatrix, triton_backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = [ANOTHER, TunedLaunch(Launch(16, 4, 2), 1)]
    monkeypatch.setattr(tuning, "candidates", lambda *_: iter(tried))
    times = iter([3.0, 1.0, 2.0])  # without a table, then of the candidates
    used: list[TunedLaunch | None] = []

    def timed(call: Any, *_: Any) -> float:
        expected = F.linear(input_of(weight), weight.to_dense())
        used.append(TUNED.get(ProductClass.of(5, weight.shape, weight.block_shape, torch.float32)))
        assert call().shape == expected.shape
        return next(times)

    monkeypatch.setattr(tuning, "_milliseconds", timed)
    found = tune(weight, 5)
    assert used == [None, *tried]
    assert not TUNED
    key = ProductClass(8, (32, 512), (16, 32), torch.float32)
    assert found == Tuning(key, ANOTHER, 1.0, 3.0)
    save(tmp_path / "table.json", [found], weight.values.device)
    assert [file.name for file in tmp_path.iterdir()] == ["table.json"]
    assert load(tmp_path / "table.json", weight.values.device) == 1
    assert {key: ANOTHER} == TUNED


def input_of(weight: BlockSparseMatrix, tokens: int = 5) -> torch.Tensor:
    return torch.randn(tokens, weight.shape[1], device=weight.values.device)


def test_a_loaded_launch_is_used_and_right(
    tmp_path: Path, weight: BlockSparseMatrix, triton_backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sdp_kernels.block_sparse_linear import kernel

    asked: list[int] = []
    choose = kernel.choose_splits
    monkeypatch.setattr(kernel, "choose_splits", lambda *sizes: asked.append(1) or choose(*sizes))
    load(write(tmp_path / "table.json", weight), weight.values.device)
    for tokens, by_table in ((5, True), (8, True), (4, False), (9, False)):
        asked.clear()
        input = input_of(weight, tokens)
        with use_backend(triton_backend):
            output = block_sparse_linear(input, weight)
        torch.testing.assert_close(output, F.linear(input, weight.to_dense()), rtol=1e-4, atol=1e-4)
        assert asked == ([] if by_table else [1])


@pytest.mark.parametrize("tokens", [1, 5, 4096])
def test_every_candidate_is_one_that_a_table_may_hold(tmp_path: Path, weight: BlockSparseMatrix, tokens: int) -> None:
    found = list(candidates(tokens, 128, torch.bfloat16, 90))
    assert len(found) == len(set(found)) > 4
    key = ProductClass.of(tokens, weight.shape, weight.block_shape, torch.bfloat16)
    for launch in found:
        save(tmp_path / "table.json", [Tuning(key, launch, 1.0, 1.0)], weight.values.device)
        load(tmp_path / "table.json", weight.values.device)
        assert {key: launch} == TUNED


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "another GPU"}, "path must be a table for device .*, got one for 'another GPU'"),
        ({"triton": "3.0.0"}, "path must be a table for triton '.*', got one for '3.0.0'"),
        ({"num_warps": 3}, r"num_warps must be one of \[2, 4, 8\], got 3"),
        ({"block_tokens": 16.0}, r"block_tokens must be one of \[16, 32, 64, 128\], got 16.0"),
        ({"tokens": 5}, "tokens must be a power of two, got 5"),
        ({"shape": [32]}, "must be five whole numbers above 0"),
        ({"dtype": "int8"}, "path must be a table of launches, .*int8"),
        ({"launches": 7}, "path must be a table of launches, .*TypeError"),
    ],
)
def test_refuses_what_does_not_belong(
    tmp_path: Path, weight: BlockSparseMatrix, changes: dict[str, Any], message: str
) -> None:
    path = write(tmp_path / "table.json", weight, **changes)
    with pytest.raises(ValueError, match=message):
        load(path, weight.values.device)
    assert not TUNED


def test_refuses_what_is_no_table(tmp_path: Path, weight: BlockSparseMatrix) -> None:
    for text in ("", "[]", "{}", '{"device": "x", "triton": "y"}'):
        (tmp_path / "table.json").write_text(text)
        with pytest.raises(ValueError, match=r"path must be a table of launches, got '.*table.json'"):
            load(tmp_path / "table.json", weight.values.device)
    with pytest.raises(ValueError, match="tokens must be at least 1, got 0"):
        tune(weight, 0)
    with pytest.raises(ValueError, match=r"weight must have a dtype of .* got torch.float64"):
        tune(weight.to(torch.float64), 1)


def test_command_line(
    tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tuning, "candidates", lambda *_: iter([ANOTHER]))
    path = tmp_path / "table.json"
    options = "--shape 30x64 --block 16x32 --density 0.5 --tokens 1 3 --dtype float32 --repeats 1 --device"
    assert tuning.main([str(path), *options.split(), str(device)]) == 0
    assert "4 tokens: " in capsys.readouterr().out
    assert load(path, device) == 2
