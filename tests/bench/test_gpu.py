"""The command for a short time on a GPU, rehearsed on a CPU: it loses no row that was measured, whatever happens."""

import importlib.util
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.__main__ import main
from bench.gpu import Plan, measure
from bench.grids import GRIDS
from bench.machine import Machine
from bench.results import Row, read_rows

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
MOST_SPECIALISATIONS = 151  # a third of what the grids once compiled
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture(autouse=True)
def _known_machine(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.gpu._machine", lambda device, threads: machine)
    monkeypatch.syspath_prepend(HERE)  # the processes inherit it


def shapes_of(rows: list[Row], **of: Any) -> list[list[int]]:
    return [row["shape"] for row in rows if all(row.get(name) == value for name, value in of.items())]


def run_planted(names: list[str], results: Path, minutes: float = 2.0, longest_case: float = 1.0) -> list[Row]:
    import planted_grids

    plan = Plan({name: planted_grids.GRIDS[name] for name in names}, "cpu", quick=False)
    return measure(plan, results, minutes, longest_case=longest_case, module="planted_grids")


def test_a_crash_and_a_hang_cost_one_case_each(
    machine: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = run_planted(["dying", "hanging", "fine"], tmp_path)
    folder = tmp_path / machine.slug
    for name, lost in (("dying", [8, 3]), ("hanging", [4, 3]), ("fine", None)):
        whole = [shape for shape in ([4, 3], [8, 3], [16, 3]) if shape != lost]
        assert shapes_of(rows, op=name, contender="ours", correct=True) == whole
        assert shapes_of(rows, op=name, contender="eager", correct=True) == whole
        assert shapes_of(rows, op=name, correct=False) == ([lost] if lost else [])
        assert read_rows(folder / f"{name}.jsonl") == [row for row in rows if row["op"] == name]
    reasons = {row["op"]: row["failed"] for row in rows if "failed" in row}
    assert reasons["dying"].startswith("the process ended by SIGSEGV")
    assert reasons["hanging"].startswith("hung: killed after")
    log = (folder / "all.log").read_text()
    assert "Segmentation fault" in log
    assert "in hanging" in log, "the log says where a process hung"
    assert "FAILED: hung" in (folder / "all.txt").read_text()

    # All rows are in one file, and can be brought from it into the files of their grids.
    source = folder / "all.jsonl"
    assert read_rows(source) == rows
    for row in rows:
        assert {"op", "shape", "dtype", "contender", "device", "torch", "commit"} <= row.keys()
    kept = tmp_path / "kept"
    capsys.readouterr()
    assert main(["collect", str(source), "--results", str(kept)]) == 0
    assert f"{machine.slug}/fine.jsonl: 6 rows" in capsys.readouterr().out
    assert read_rows(kept / machine.slug / "fine.jsonl") == read_rows(folder / "fine.jsonl")
    assert main(["collect", str(source), "--results", str(kept)]) == 0
    assert capsys.readouterr().out.strip() == "no new rows"


def test_a_baseline_that_kills_its_process_is_left_out(tmp_path: Path) -> None:
    rows = run_planted(["dying_baseline"], tmp_path)
    assert shapes_of(rows, contender="ours", correct=True) == [[4, 3], [16, 3]]
    assert shapes_of(rows, contender="eager", correct=True) == [[4, 3]]
    (lost,) = [row for row in rows if "failed" in row]
    assert (lost["contender"], lost["shape"]) == ("eager", [8, 3])
    assert "correct" not in lost, "nothing of ours is wrong"


def test_a_file_without_rows_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "broken.jsonl").write_text('{"shape": [1]}\n')
    for name in ("broken.jsonl", "missing.jsonl"):
        assert main(["collect", str(tmp_path / name), "--results", str(tmp_path / "kept")]) == 2
        assert "file must hold rows" in capsys.readouterr().err
    assert not (tmp_path / "kept").exists()


def test_a_run_goes_on_where_it_stopped(machine: Machine, tmp_path: Path) -> None:
    first = run_planted(["fine"], tmp_path)
    again = run_planted(["fine", "raising"], tmp_path)
    assert again[: len(first)] == first, "what was measured is not measured again"
    assert shapes_of(again, op="raising", contender="ours", correct=False) == [[4, 3], [8, 3], [16, 3]]
    assert read_rows(tmp_path / machine.slug / "all.jsonl") == again


def test_the_end_of_the_time_costs_the_case_at_hand_alone(tmp_path: Path) -> None:
    started = time.monotonic()
    assert run_planted(["hanging"], tmp_path, minutes=0.35, longest_case=300.0) == []
    assert time.monotonic() - started < 40


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--grid", "kl_divergence", "nothing"], "--grid must be among block_sparse, .*, got nothing"),
        (["--minutes", "0"], r"--minutes must be above 0, got 0\.0"),
        (["--longest-case", "nan"], "--longest-case must be above 0, got nan"),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
        (["--device", "cpu"], "--results is needed"),
        (["--device", "cpu", "--results", "/proc/none/such"], "--results: .*: '/proc/none/such'"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert main(["gpu", *arguments]) == 2
    written = capsys.readouterr()
    assert written.out == ""
    assert len(written.err.splitlines()) == 1
    assert re.search(message, written.err), written.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert main(["gpu", "--results", str(tmp_path / "new")]) == 2
    assert "--device cuda: no GPU is there" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.fixture(scope="module")
def dry_run() -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench", "gpu", "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_triton
def test_the_dry_run_prints_the_plan_and_how_much_it_compiles(dry_run: str) -> None:
    *lines, total = dry_run.strip().splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(GRIDS)
    assert int(total.split(";")[1].split()[0]) <= MOST_SPECIALISATIONS
    for line in lines[1:]:
        assert int(line.split()[3]) > 0, "every grid launches kernels"


def test_what_cannot_be_captured_is_declared() -> None:
    uncaptured = {
        name: [contender for contender, each in grid.contenders().items() if not each.captured]
        for name, grid in GRIDS.items()
    }
    assert uncaptured["select_mask"] == uncaptured["alignment"] == ["ours"]
    assert "torch_bsr" in uncaptured["block_sparse"]
    assert not any(
        found for name, found in uncaptured.items() if name not in ("select_mask", "alignment", "block_sparse")
    )
