"""How the kernels are laid out: shared parts below, ops above them."""

import pytest

from tests.house import ROOT, House, folder

PACKAGE = "sdp_kernels"
HOUSE = House(PACKAGE)
SHARED = ("masks", "cpu_engine", "tiles")
OPS = sorted(path.parent.name for path in (ROOT / PACKAGE).glob("*/op.py"))


def test_imports_are_seen_wherever_they_stand() -> None:
    assert set(OPS) | set(SHARED) == {path.parent.name for path in (ROOT / PACKAGE).glob("*/__init__.py")}
    graph = HOUSE.graph
    assert f"{PACKAGE}.masked_linear.kernel" in graph[f"{PACKAGE}.masked_linear.products"], "inside of a function"
    assert f"{PACKAGE}.masked_linear.kernel_zero" in graph[f"{PACKAGE}.masked_linear.kernel"], "a module by its folder"
    assert f"{PACKAGE}.masks" in graph[f"{PACKAGE}.mask_selection.op"], "names of a folder"


@pytest.mark.parametrize("own", OPS)
def test_an_op_uses_others_by_what_their_folders_export(own: str) -> None:
    insides = {
        (name, module)
        for name, found in HOUSE.graph.items()
        for module in found
        if folder(name) == f"{PACKAGE}.{own}" != folder(module)
        if folder(module).removeprefix(f"{PACKAGE}.") in OPS and module != folder(module)
    }
    assert not insides


@pytest.mark.parametrize("own", SHARED)
def test_what_is_shared_knows_no_op(own: str) -> None:
    assert not HOUSE.folders[f"{PACKAGE}.{own}"] & {f"{PACKAGE}.{op}" for op in OPS}
