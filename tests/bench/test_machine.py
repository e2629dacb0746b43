"""What a row says about the sources and the device."""

import subprocess
from pathlib import Path

import torch

from bench.machine import code_hash, commit, device_name, slug_of


def sources(root: Path) -> Path:
    for package in ("bench", "sdp_kernels"):
        (root / package).mkdir()
        (root / package / "code.py").write_text("x = 1\n")
    return root


def test_commit_with_and_without_git(tmp_path: Path) -> None:
    root = sources(tmp_path)
    assert commit(root, "bench", "sdp_kernels") == "unknown"
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", "-C", str(root), *command], check=True)
    clean = commit(root, "bench", "sdp_kernels")
    assert len(clean) >= 7
    (root / "notes.md").write_text("does not matter")
    (root / "bench" / "results").mkdir()
    (root / "bench" / "results" / "loss.jsonl").write_text("{}\n")
    assert commit(root, "bench", "sdp_kernels") == clean
    (root / "sdp_kernels" / "new.py").write_text("")
    assert commit(root, "bench", "sdp_kernels") == f"{clean}-dirty"


def test_code_hash_follows_the_sources(tmp_path: Path) -> None:
    root = sources(tmp_path)
    before = code_hash(root)
    (root / "bench" / "results.jsonl").write_text("{}\n")
    assert code_hash(root) == before
    (root / "sdp_kernels" / "code.py").write_text("x = 2\n")
    assert code_hash(root) != before


def test_device_has_a_name_that_makes_a_folder() -> None:
    assert device_name(torch.device("cpu")).startswith("CPU ")
    assert slug_of("NVIDIA H200 (SXM)") == "nvidia-h200-sxm"
