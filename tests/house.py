"""How a package is laid out, read from its files: who imports whom, how long things are, what stands twice."""

import ast
from collections import Counter
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
RUN = 6  # lines in a row that count as repeated


class House:
    """The modules of a package by dotted name, and which of them each one names.

    Args:
        package: a folder of the repository.
    """

    def __init__(self, package: str) -> None:
        root = ROOT / package
        files = {
            ".".join((package, *path.relative_to(root).with_suffix("").parts)): path for path in root.rglob("*.py")
        }
        self.package = package
        self.files = {name.removesuffix(".__init__"): path for name, path in sorted(files.items())}
        self.trees = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in self.files.items()}
        self.graph = {name: set(self._imports(name)) - {name} for name in self.files}

    def _imports(self, name: str) -> Iterator[str]:
        """The modules of the package that one names, at its top, inside of functions and for type checkers."""
        for node in ast.walk(self.trees[name]):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names if alias.name.split(".")[0] == self.package)
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{name} imports relatively"
                if node.module and node.module.split(".")[0] == self.package:
                    whole = [f"{node.module}.{alias.name}" for alias in node.names]
                    yield from (module for module in whole if module in self.files)
                    if any(module not in self.files for module in whole):
                        yield node.module

    @property
    def folders(self) -> dict[str, set[str]]:
        """Which folders each folder names; files beside the folders stand for themselves."""
        found: dict[str, set[str]] = {}
        for name, modules in self.graph.items():
            found.setdefault(folder(name), set()).update(set(map(folder, modules)) - {folder(name)})
        return found

    @property
    def functions(self) -> list[ast.FunctionDef]:
        """Every function and method."""
        return [node for tree in self.trees.values() for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]

    @property
    def undocumented(self) -> Iterator[tuple[str, bool]]:
        """Yield every public class, function and method, and whether it has no docstring."""
        for module, tree in self.trees.items():
            waiting: list[tuple[str, ast.AST]] = [(module, tree)]
            for where, node in waiting:
                for child in ast.iter_child_nodes(node):
                    if isinstance(child, ast.FunctionDef | ast.ClassDef) and not child.name.startswith("_"):
                        yield f"{where}.{child.name}", ast.get_docstring(child) is None
                        if isinstance(child, ast.ClassDef):
                            waiting.append((f"{where}.{child.name}", child))

    @property
    def lines(self) -> dict[str, list[str]]:
        """The lines of every module that say something: no blank ones, comments, imports or lone brackets."""
        texts = {name: path.read_text(encoding="utf-8").splitlines() for name, path in self.files.items()}
        return {name: [line.strip() for line in text if _says(line.strip())] for name, text in texts.items()}


def _says(line: str) -> bool:
    return len(line) > 3 and not line.startswith(("#", "import ", "from ", '"""'))


def folder(module: str) -> str:
    """The folder of a module; of those beside the folders, the module itself."""
    return ".".join(module.split(".")[:2])


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """Some names that need each other, empty if there are none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def repeated(lines: Mapping[str, list[str]]) -> float:
    """The share of lines that stand, in a run of at least `RUN`, in more than one place."""
    runs = {name: [tuple(text[at : at + RUN]) for at in range(len(text) - RUN + 1)] for name, text in lines.items()}
    count = Counter(run for found in runs.values() for run in found)
    again = 0
    for name, found in runs.items():
        twice = {at + offset for at, run in enumerate(found) if count[run] > 1 for offset in range(RUN)}
        again += len(twice & set(range(len(lines[name]))))
    return again / sum(map(len, lines.values()))
