"""Kernels with planted faults are found out, for GPUs that are not there."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.resources import SIZES, Outcome, Resources, compile_config, report, table

PLANTED = Path(__file__).with_name("planted_kernels.py")


@pytest.fixture(scope="module", params=[80, 90, 120])
def found(request: pytest.FixtureRequest) -> Any:
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(PLANTED.parents[2])
    command = [sys.executable, str(PLANTED), str(request.param)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_good_kernel_has_nothing_against_it(found: Any) -> None:
    good = found["good"]
    assert good["reasons"] == []
    assert good["registers"] > 0
    assert good["shared"] > 0
    assert good["matrix_instructions"] > 0
    assert good["async_copies"] > 0, "loads in a loop are pipelined only if their alignment is known"


@pytest.mark.parametrize("fault", ["no matrix instruction", "spills", "too much shared memory"])
def test_a_fault_is_named(found: Any, fault: str) -> None:
    expected = "bytes of shared memory, allowed" if fault == "too much shared memory" else fault
    assert any(expected in reason for reason in found[fault]["reasons"]), found[fault]


def test_the_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        report()
    config: Any = None
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        compile_config(config, 90)


def test_unknown_names_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"op must be among .*got \['nothing'\]"):
        report(ops=["nothing"])
    with pytest.raises(ValueError, match=r"arch must be among .*got \[75\]"):
        report(capabilities=[75])


def test_sizes_are_known_by_name() -> None:
    assert all(SIZES.fullmatch(name) for name in ("batch", "dim", "student_stride", "stride_k"))
    assert not any(SIZES.fullmatch(name) for name in ("chunks", "parts", "first_row", "strips"))


def test_table_shows_what_does_not_compile() -> None:
    used = Resources(registers=64, stack=0, local=0, shared=2048, matrix_instructions=4, async_copies=2)
    text = table([Outcome("a", 90, used, []), Outcome("b", 80, None, ["CompilationError: no"])])
    assert "2048" in text
    assert "does not compile" in text
