"""`block_sparse_linear` in the layout of the Hub's `kernels` package (https://huggingface.co/docs/kernels): a folder to
upload, or to load from where it lies.

    README.md
    build/torch-universal/metadata.json
    build/torch-universal/sdp_block_sparse/       pure Python and Triton, for every device
"""

import ast
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import sdp_kernels
from sdprune.files import new_directory

NAME = "sdp-block-sparse"
MODULE = "sdp_block_sparse"
VERSION = 1
VARIANT = "torch-universal"
PUBLIC = {
    "sdp_kernels.block_sparse_linear": ("BlockSparseMatrix", "block_sparse_linear"),
    "sdp_kernels.dispatch": ("use_backend",),
}
OURS = "sdp_kernels"

_README = f"""---
library_name: kernels
tags:
- kernels
- block-sparse
---

# {NAME}

Linear layers that do no work for pruned blocks: forward and backward, on CUDA GPUs (Triton) and CPUs.

```python
from kernels import get_kernel

kernel = get_kernel("ORGANISATION/{NAME}", version={VERSION})
weight = kernel.BlockSparseMatrix.from_dense(dense_weight, (32, 32))
output = kernel.block_sparse_linear(input, weight, bias, activation="gelu")
```
"""


def write_kernel_repository(directory: str | Path) -> Path:
    """Write a repository with `block_sparse_linear` and all it needs of `sdp_kernels`, into a new folder.

    `kernels.get_local_kernel(directory)` loads it, without `sdp_kernels` or beside it: the operators get a namespace
    of their own, named after a digest of the code.

    Args:
        directory: the folder to make; it is whole or absent.

    Returns:
        The folder.

    Raises:
        ValueError: the folder exists and is not empty.
    """
    sources = {name: _file_of(name).read_text(encoding="utf-8") for name in sorted(_needed())}
    digest = hashlib.sha256("".join(f"{name}\0{text}\0" for name, text in sources.items()).encode()).hexdigest()[:12]
    unique = f"_{MODULE}_{digest}"
    files = {
        _target(name): _relative(name, text).replace(f'"{OURS}::', f'"{unique}::') for name, text in sources.items()
    }
    for path in list(files):  # the folders whose own __init__.py nothing needs
        for folder in path.parents:
            files.setdefault(folder / "__init__.py", "")
    files[Path("__init__.py")] = _public_module()
    metadata = {
        "id": unique,
        "name": NAME,
        "version": VERSION,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": "cpu"},  # the least that is needed: a universal build has no word of its own here
    }
    with new_directory(Path(directory)) as folder:
        (folder / "README.md").write_text(_README, encoding="utf-8")
        build = folder / "build" / VARIANT
        for path, text in files.items():
            target = build / MODULE / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8")
        (build / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
    return Path(directory)


def _needed() -> set[str]:
    """The modules that the public names import, at once or later, directly or through others."""
    found: set[str] = set()
    waiting = list(PUBLIC)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += _imports(name)
    return found


def _imports(name: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(_file_of(name).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == OURS:
            module = str(node.module)
            parts = [f"{module}.{alias.name}" for alias in node.names]
            submodules = [part for part in parts if _file_of(part).is_file()]
            yield from submodules
            if len(submodules) < len(parts):
                yield module
        elif isinstance(node, ast.Import) and any(alias.name.split(".")[0] == OURS for alias in node.names):
            raise ValueError(f"{name} must import from {OURS} by name: from {OURS}... import ...")


def _file_of(name: str) -> Path:
    path = Path(sdp_kernels.__file__).parent.joinpath(*name.split(".")[1:])
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _target(name: str) -> Path:
    return _file_of(name).relative_to(Path(sdp_kernels.__file__).parent)


def _relative(name: str, text: str) -> str:
    """Rewrite `from sdp_kernels.a import b` as seen from a module: the copy has another name wherever it is loaded."""
    dots = "." * len(_target(name).parts)
    return re.sub(rf"^(\s*)from {OURS}\b\.?", rf"\1from {dots}", text, flags=re.MULTILINE)


def _public_module() -> str:
    lines = [f'"""{NAME}: linear layers that do no work for pruned blocks."""', ""]
    lines += [f"from .{module.partition('.')[2]} import {', '.join(names)}" for module, names in PUBLIC.items()]
    names = sorted(name for names in PUBLIC.values() for name in names)
    return "\n".join([*lines, "", f"__all__ = {names!r}", ""])
