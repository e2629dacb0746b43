"""What an import costs, and which way the packages point."""

import ast
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sdp_kernels
import sdprune

ROOTS = [Path(package.__file__).parent for package in (sdp_kernels, sdprune)]
FILES = [path for root in ROOTS for path in sorted(root.rglob("*.py"))]

# each may use those before it
ORDER = (
    "files",
    "text",
    "config_base",
    "methods",
    "config",
    "recipe",
    "samples",
    "data",
    "masking",
    "distillation",
    "analysis",
    "training",
    "formats",
    "layers",
    "speed",
    "exports",
    "runs",
    "commands",
    "cli",
)
HEAVY = ("transformers.trainer", "datasets", "sklearn", "matplotlib", "pandas", "scipy")
BROUGHT = ("triton", "accelerate")  # transformers.quantizers brings these where some other packages are installed


def run(code: str) -> str:
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    return process.stdout.strip()


def test_importing_sdprune_is_cheap(tmp_path):
    """At most 0.2 s after `import torch, transformers.quantizers`, and no heavy package that these do not bring."""
    code = (  # time of this process alone: others may hold the cores; bytecode is kept, as pip does
        "import sys, time, torch, transformers.quantizers; "
        f"sys.dont_write_bytecode, sys.pycache_prefix = False, {str(tmp_path)!r}; "
        "before = set(sys.modules); start = time.process_time(); import sdprune; "
        f"print(time.process_time() - start, *[name for name in {HEAVY!r} if name in sys.modules], "
        f"*[name for name in {BROUGHT!r} if name in sys.modules and name not in before])"
    )
    took = math.inf
    for _ in range(8):  # beside other tests a cache miss may cost as much as an import: the least time counts
        found, *brought = run(code).split()
        assert brought == []
        took = min(took, float(found))
        if took < 0.2:
            break
    assert took < 0.2


def test_importing_sdprune_makes_the_format_known():
    code = (
        "import importlib, sdprune; importlib.reload(sdprune); "
        "from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as known; "
        "print(known['sdprune'] is sdprune.SDPruneQuantizationConfig)"
    )
    assert run(code) == "True"


def test_public_names():
    names = ["BlockSparseLinear", "CRITERIA", "Criterion", "MaskedLinear", "OBJECTIVES", "Objective"]
    names += ["PruneResult", "PruneThenDistillResult", "SDPruneCallback", "SDPruneConfig"]
    names += ["SDPruneQuantizationConfig", "SDPruneTrainer", "STRUCTURES", "Structure"]
    names += ["export", "freeze_sparsity", "load", "plan", "prune", "prune_then_distill", "speed_up"]
    assert sdprune.__all__ == dir(sdprune) == sorted(names)
    for name in names:
        assert getattr(sdprune, name).__doc__
    with pytest.raises(AttributeError, match="module 'sdprune' has no attribute 'prunes'"):
        _ = sdprune.prunes


def test_the_masked_layers_need_no_transformers():
    blocked = "import sys; sys.modules['transformers'] = None; sys.modules['triton'] = None; "
    assert run(blocked + "import sdprune, sdp_kernels; print(sdprune.MaskedLinear(8, 4).sparsity)") == "0.0"


@pytest.mark.parametrize("path", FILES, ids=lambda path: "/".join(path.parts[-3:]))
def test_house_rules(path):
    """Data flows one way, files stay readable, libraries do not print."""
    text = path.read_text()
    assert len(text.splitlines()) <= 450, "split the file"
    tree = ast.parse(text)
    imported = {
        name.name if isinstance(node, ast.Import) else node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in node.names
    }
    if "sdp_kernels" in path.parts:
        assert not any(name.split(".")[0] in ("sdprune", "transformers") for name in imported if name)
    if path.parts[-2] in ("methods", "masking", "distillation") or path.name in (
        "config_base.py",
        "config.py",
        "recipe.py",
        "files.py",
        "text.py",
    ):
        assert not any((name or "").split(".")[0] == "transformers" for name in imported)
    own = path.relative_to(ROOTS[1]).parts[0].removesuffix(".py") if path.is_relative_to(ROOTS[1]) else None
    if own in ORDER:
        later = set(ORDER[ORDER.index(own) + 1 :])
        used = {name.split(".")[1] for name in imported if name and name.startswith("sdprune.")}
        assert not used & later, f"{own} uses {used & later}, which come after it"
    assert not any((name or "").split(".")[0] in ("tests", "bench", "pickle") for name in imported)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    long = {node.name: node.end_lineno - node.lineno + 1 for node in functions}
    assert not {name: size for name, size in long.items() if size > 90}
    # no switches of our own: the cache folder follows the platform, the interpreter is Triton's
    assert set(re.findall(r'os\.environ(?:\.get)?[\[(]"(\w+)"', text)) <= {
        "XDG_CACHE_HOME",
        "LOCALAPPDATA",
        "TRITON_INTERPRET",
    }
