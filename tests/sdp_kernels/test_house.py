"""How the package is laid out: shared parts below, ops above them, and no two of anything that need each other."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import sdp_kernels

PACKAGE = "sdp_kernels"
ROOT = Path(sdp_kernels.__file__).parent
FILES = {".".join((PACKAGE, *path.relative_to(ROOT).with_suffix("").parts)): path for path in ROOT.rglob("*.py")}
FILES = {name.removesuffix(".__init__"): path for name, path in FILES.items()}
SHARED = ("masks", "cpu_engine", "tiles")
OPS = sorted(path.parent.name for path in ROOT.glob("*/op.py"))


def imports(name: str) -> Iterator[str]:
    """The modules of the package that one names, at its top, inside of functions and for type checkers."""
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == PACKAGE)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name} imports relatively"
            if node.module and node.module.split(".")[0] == PACKAGE:
                whole = [f"{node.module}.{alias.name}" for alias in node.names]
                yield from (module for module in whole if module in FILES)
                if any(module not in FILES for module in whole):
                    yield node.module


GRAPH = {name: set(imports(name)) - {name} for name in FILES}


def folder(module: str) -> str:
    """The folder of a module; of those beside the folders, the module itself."""
    return ".".join(module.split(".")[:2])


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Some names that need each other, empty if there are none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_imports_are_seen_wherever_they_stand() -> None:
    assert set(OPS) | set(SHARED) == {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert f"{PACKAGE}.masked_linear.kernel" in GRAPH[f"{PACKAGE}.masked_linear.products"], "inside of a function"
    assert f"{PACKAGE}.masked_linear.kernel_zero" in GRAPH[f"{PACKAGE}.masked_linear.kernel"], "a module by its folder"
    assert f"{PACKAGE}.masks" in GRAPH[f"{PACKAGE}.mask_selection.op"], "names of a folder"
    assert all(module in FILES for found in GRAPH.values() for module in found)
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}})


def test_no_files_import_each_other_in_a_circle() -> None:
    assert not circle(GRAPH)


def test_no_folders_import_each_other_in_a_circle() -> None:
    folders: dict[str, set[str]] = {}
    for name, found in GRAPH.items():
        folders.setdefault(folder(name), set()).update(set(map(folder, found)) - {folder(name)})
    assert not circle(folders)


@pytest.mark.parametrize("own", OPS)
def test_an_op_uses_others_by_what_their_folders_export(own: str) -> None:
    insides = {
        (name, module)
        for name, found in GRAPH.items()
        for module in found
        if folder(name) == f"{PACKAGE}.{own}" != folder(module)
        if folder(module).removeprefix(f"{PACKAGE}.") in OPS and module != folder(module)
    }
    assert not insides


@pytest.mark.parametrize("own", SHARED)
def test_what_is_shared_knows_no_op(own: str) -> None:
    used = {folder(module) for name, found in GRAPH.items() if folder(name) == f"{PACKAGE}.{own}" for module in found}
    assert not used & {f"{PACKAGE}.{op}" for op in OPS}
