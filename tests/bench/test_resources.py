"""Kernels with planted faults are found out, for GPUs that are not there."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.resources import SIZES, Outcome, Resources, Tiling, compile_config, reasons_against, report, table
from sdp_kernels.spec import KernelConfig

PLANTED = Path(__file__).with_name("planted_kernels.py")


CAPABILITIES = (80, 90, 120)


@pytest.fixture(scope="module")
def compiled() -> Any:
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(PLANTED.parents[2])
    command = [sys.executable, str(PLANTED), *map(str, CAPABILITIES)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(params=CAPABILITIES)
def found(request: pytest.FixtureRequest, compiled: Any) -> Any:
    return compiled[str(request.param)]


def test_a_good_kernel_has_nothing_against_it(found: Any) -> None:
    good = found["good"]
    assert good["reasons"] == []
    assert good["registers"] > 0
    assert good["shared"] > 0
    assert good["matrix_instructions"] > 0
    assert good["async_copies"] > 0, "loads in a loop are pipelined only if their alignment is known"


@pytest.mark.parametrize("fault", ["no matrix instruction", "spills", "too much shared memory", "approximate"])
def test_a_fault_is_named(found: Any, fault: str) -> None:
    expected = "bytes of shared memory, allowed" if fault == "too much shared memory" else fault
    assert any(expected in reason for reason in found[fault]["reasons"]), found[fault]


def test_products_that_could_use_warp_groups_must_on_hopper(found: Any, request: pytest.FixtureRequest) -> None:
    good = {name: value for name, value in found["good"].items() if name != "reasons"}
    used = Resources(**good)
    assert used.warp_group_products == 1
    assert (used.warp_group_instructions > 0) == (request.node.callspec.params["found"] == 90)
    config: Any = KernelConfig(None, {}, {}, tensor_cores=True)
    without = replace(used, warp_group_instructions=0)
    assert reasons_against(config, 90, without) == ["1 products could use wgmma and none does"]
    assert reasons_against(config, 80, without) == []


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
    used = Resources(64, 0, 0, 2048, 4, 2, warp_group_instructions=3, warp_group_products=1, approximations=0)
    tiling = Tiling("kernel", "*bf16", (("BLOCK", 64),), 4)
    outcomes = [Outcome("a", 90, tiling, 5, used, []), Outcome("b", 80, tiling, 2, None, ["CompilationError: no"])]
    heading, first, second = table(outcomes, {90: {tiling: (66, 1320)}}).splitlines()
    assert heading.split()[5:] == ["mma", "wgmma", "copy", "stages", "programs", "kernel"]
    assert first.split() == ["90", "64", "0", "0", "2048", "4", "3", "2", "5", "0.5..10", "a"]
    assert "does not compile" in second
    assert second.split()[-2:] == ["-", "b"]


def test_fewer_programs_than_multiprocessors_are_seen_at_the_grids_shapes() -> None:
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    code = (
        "from bench.resources import configurations, programs_at_grids, Tiling\n"
        "found = programs_at_grids(90, ['block_sparse'])\n"
        "module = 'sdp_kernels.block_sparse_linear.kernel'\n"
        "tilings = {Tiling.of(c.kernel, c.types, c.constants, c.num_warps) for c in configurations(module, 90)}\n"
        "known = [tiling for tiling in tilings if tiling in found and 'product' in tiling.kernel]\n"
        "assert len(known) >= 8, known\n"
        "assert all(0 < fewest <= most for fewest, most in found.values())\n"
        "print(min(found[tiling][0] for tiling in known))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=PLANTED.parents[2])
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0
