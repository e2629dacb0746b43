"""The gate, the rows and the order of a run, on a small op made for it."""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bench.__main__
from bench.grid import Case, Contender, Grid, Work, direct
from bench.machine import Machine
from bench.results import read_rows, table
from bench.runner import Job, Settings, results_path, run, run_case
from bench.timing import DeviceLost, Times


def squares(x: Tensor) -> Tensor:
    return x.square().sum()


def wrong_value(x: Tensor) -> Tensor:
    return x.square().sum() * 1.01


def wrong_gradient(x: Tensor) -> Tensor:
    return squares(x) + 0.01 * (x - x.detach()).sum()


def not_a_number(x: Tensor) -> Tensor:
    return squares(x) * torch.nan


def raising(x: Tensor) -> Tensor:
    raise NotImplementedError("not on this device")


def grid_of(ours: Callable[..., Any], **baselines: Callable[..., Any]) -> Grid:
    functions = {"ours": ours, **baselines}
    return Grid(
        name="squares",
        shapes=((4, 3), (8, 3)),
        inputs=lambda shape, dtype, device: {"x": torch.randn(shape, dtype=dtype, device=device)},
        reference=squares,
        contenders=lambda: {name: direct(function) for name, function in functions.items()},
        bound=lambda shape, itemsize: Work(2 * math.prod(shape), itemsize * math.prod(shape), 0),
        heaviest=lambda shape: Work(4 * math.prod(shape), 8 * math.prod(shape), 16 * math.prod(shape)),
        grad_args=("x",),
    )


CASE = Case((4, 3), "fp32", 0)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(tmp_path, seconds=0.01)


def test_every_contender_is_timed_against_ours(machine: Machine, settings: Settings) -> None:
    ours, slow = run_case(grid_of(squares, slow=lambda x: (time.sleep(0.01), squares(x))[1]), CASE, machine, settings)
    assert (ours["contender"], ours["ratio_to_ours"], ours["correct"]) == ("ours", 1.0, True)
    assert slow["ratio_to_ours"] > 2
    assert slow["median_ms"] > 10
    assert ours["p20_ms"] <= ours["median_ms"] <= ours["p80_ms"]
    assert ours["bound_ms"] == pytest.approx(1e3 * 48 / 1e10)
    assert ours["timing"] == "wall"


@pytest.mark.parametrize("ours", [wrong_value, wrong_gradient, not_a_number])
def test_wrong_results_of_ours_are_never_timed(ours: Callable[..., Any], machine: Machine, settings: Settings) -> None:
    rows = run_case(grid_of(ours, eager=squares), CASE, machine, settings)
    assert [row["correct"] for row in rows] == [False, True]
    assert not any("median_ms" in row for row in rows)


def test_a_baseline_may_be_less_exact_but_must_compute_the_same(machine: Machine, settings: Settings) -> None:
    near, other = run_case(grid_of(squares, near=wrong_value, other=lambda x: 2 * squares(x)), CASE, machine, settings)[
        1:
    ]
    assert near["correct"]
    assert "median_ms" in near
    assert not other["correct"]
    assert "median_ms" not in other


def test_a_raising_contender_says_what_it_raised(machine: Machine, settings: Settings) -> None:
    ours, baseline = run_case(grid_of(squares, broken=raising), CASE, machine, settings)
    assert "median_ms" in ours
    assert baseline == {"contender": "broken", "failed": "NotImplementedError: not on this device"}
    (ours, _) = run_case(grid_of(raising, eager=squares), CASE, machine, settings)
    assert ours["correct"] is False


def test_cases_that_do_not_fit_are_skipped_with_a_reason(machine: Machine, settings: Settings) -> None:
    slow = replace(grid_of(squares), heaviest=lambda shape: Work(10**14, 0, 0))
    large = replace(grid_of(squares), heaviest=lambda shape: Work(0, 0, 2**31))
    assert run_case(slow, CASE, machine, settings) == [
        {"contender": "ours", "skipped": "a call takes 1000 s, allowed 60"}
    ]
    assert run_case(large, CASE, machine, settings) == [{"contender": "ours", "skipped": "needs 2 GiB, 1 are there"}]


def test_a_run_goes_on_where_it_stopped(machine: Machine, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.machine.code_hash", lambda root: "the same all the time")
    calls = []

    def counted(x: Tensor) -> Tensor:
        calls.append(tuple(x.shape))
        return squares(x)

    grid = grid_of(counted)
    jobs = [Job(grid, case) for case in grid.cases("cpu")]
    path = results_path(grid, machine, settings)
    assert path == settings.results / "cpu-of-the-tests" / "squares.jsonl"

    assert run(jobs, machine, settings, deadline=time.monotonic()) == []
    assert not path.exists()
    first = run(jobs[:1], machine, settings)
    assert read_rows(path) == first
    calls.clear()
    rows = run(jobs, machine, settings)
    assert set(calls) == {(8, 3)}, "the case that is there must not run again"
    assert read_rows(path) == rows
    calls.clear()
    run(jobs, machine, replace(settings, again=True))
    assert set(calls) == {(4, 3), (8, 3)}
    assert len(read_rows(path)) == 4
    monkeypatch.setattr("bench.machine.code_hash", lambda root: "other sources")
    run(jobs, machine, settings)
    assert len(read_rows(path)) == 6


def test_rows_say_where_they_come_from(machine: Machine, settings: Settings) -> None:
    grid = grid_of(squares)
    (row,) = run([Job(grid, CASE)], machine, settings)
    assert row["device"] == "CPU of the tests"
    assert row["torch"] == torch.__version__
    assert (row["op"], row["shape"], row["dtype"], row["threads"]) == ("squares", [4, 3], "fp32", 1)
    assert {"triton", "python", "commit", "code", "date"} <= row.keys()


@pytest.mark.parametrize("ours_captured", [True, False])
def test_both_sides_of_a_ratio_are_timed_in_the_same_way(
    ours_captured: bool, machine: Machine, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, whose clock is replaced: graphs take 1 ms of ours and 2 of others, launches 10 times as long."""
    measured = []

    def clock(steps: Any, device: Any, seconds: float, graph: bool) -> dict[str, Times]:
        measured.append((list(steps), graph))
        scale = 1.0 if graph else 10.0
        spans = {name: scale * (1 if name == "ours" else 2) for name in steps}
        how = "graph" if graph else "events"
        return {name: Times(span, span, span, span, 5, how) for name, span in spans.items()}

    monkeypatch.setattr("bench.runner.measure", clock)
    monkeypatch.setattr("bench.runner.peak_mib", lambda *_: 0.0)
    contenders = {
        "ours": direct(squares, captured=ours_captured),
        "eager": direct(squares),
        "waits": direct(squares, captured=False),
        "elsewhere": replace(direct(raising), devices=("cpu",)),
    }
    grid = replace(grid_of(squares), contenders=lambda: contenders, inputs=lambda shape, *_: {"x": torch.ones(shape)})
    on_gpu = replace(machine, device=torch.device("cuda"))
    monkeypatch.setattr("bench.runner.synchronize", lambda device: None)
    rows = {row["contender"]: row for row in run_case(grid, CASE, on_gpu, settings)}
    assert rows.keys() == {"ours", "eager", "waits"}
    if ours_captured:
        assert measured == [(["ours", "eager"], True), (["ours", "waits"], False)]
        assert [row["timing"] for row in rows.values()] == ["graph", "graph", "events"]
    else:
        assert measured == [(["ours", "eager", "waits"], False)]
    assert rows["eager"]["ratio_to_ours"] == rows["waits"]["ratio_to_ours"] == 2.0


def test_a_contender_may_compute_with_values_of_its_own(machine: Machine, settings: Settings) -> None:
    doubled = Contender(direct(squares).prepare, own=lambda inputs: {"x": 2 * inputs["x"]})
    wrong = Contender(direct(wrong_value).prepare, own=lambda inputs: {"x": torch.zeros_like(inputs["x"]) + 5})
    found = {"ours": direct(squares), "doubled": doubled, "wrong": wrong}
    grid = replace(grid_of(squares), contenders=lambda: found, grad_args=())
    rows = {row["contender"]: row for row in run_case(grid, CASE, machine, settings)}
    assert rows["doubled"]["correct"]
    assert rows["doubled"]["error"] < 1e-5
    assert rows["wrong"]["error"] == pytest.approx(0.01, rel=1e-3), "judged on its own values"


def test_a_lost_device_ends_the_run_after_its_row(
    machine: Machine, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose(*_: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    grid = grid_of(raising, eager=squares)
    jobs = [Job(grid, case) for case in grid.cases("cpu")]
    monkeypatch.setattr("bench.runner.synchronize", lose)
    with pytest.raises(DeviceLost, match="lost to the process: CUDA error: an illegal memory access"):
        run(jobs, machine, settings)
    (row,) = read_rows(results_path(grid, machine, settings))
    assert (row["contender"], row["correct"], row["shape"]) == ("ours", False, [4, 3])


def test_a_baseline_that_loses_the_device_leaves_what_was_known(
    machine: Machine, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose(*_: Any) -> None:
        raise DeviceLost("eager", "in the capture of a CUDA graph", RuntimeError("not permitted"))

    grid = grid_of(squares, eager=squares)
    monkeypatch.setattr("bench.runner.measure", lose)
    with pytest.raises(DeviceLost):
        run([Job(grid, CASE)], machine, settings)
    ours, eager = read_rows(results_path(grid, machine, settings))
    assert (ours["contender"], ours["correct"]) == ("ours", True)
    assert "not timed" in table([ours])
    assert eager["failed"] == "DeviceLost: in the capture of a CUDA graph: not permitted"
    monkeypatch.undo()
    rows = run_case(grid, CASE, machine, replace(settings, without=("eager",)))
    assert [row["contender"] for row in rows] == ["ours"]


@pytest.mark.parametrize(("ours", "status"), [(squares, 0), (wrong_value, 1)])
def test_command(
    ours: Callable[..., Any],
    status: int,
    machine: Machine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(bench.__main__, "GRIDS", {"squares": grid_of(ours)})
    monkeypatch.setattr(bench.__main__, "measure_machine", lambda device: machine)
    arguments = ["--device", "cpu", "--threads", "1", "--results", str(tmp_path)]
    assert bench.__main__.main(["all", "--quick", *arguments]) == status
    assert list(tmp_path.iterdir()) == [], "a smoke test keeps nothing"
    assert bench.__main__.main(["squares", *arguments]) == status
    assert len(read_rows(tmp_path / machine.slug / "squares.jsonl")) == 2
    assert "squares" in capsys.readouterr().out
