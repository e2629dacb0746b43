"""Proof that an exported folder is the model that was pruned: a fresh process, plain transformers, equal logits."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

# Runs without this package: it must not be importable by accident, hence a script and not a function.
_SCRIPT = """
import sys
import torch
from safetensors.torch import load_file, save_file
import transformers
from transformers.utils import logging
logging.set_verbosity_error()
logging.disable_progress_bar()
torch.set_num_threads(int(sys.argv[3]))
inputs = load_file(sys.argv[1])
logits = {}
for index, folder in enumerate(sys.argv[4:]):
    architecture = transformers.AutoConfig.from_pretrained(folder).architectures[0]
    model = getattr(transformers, architecture).from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits[str(index)] = model(**inputs).logits.clone()
if any(name.split(".")[0] in ("sdprune", "sdp_kernels") for name in sys.modules):
    raise SystemExit("this package was imported")
save_file(logits, sys.argv[2])
"""


def reload_differences(
    folders: Mapping[str, Path], inputs: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> dict[str, float]:
    """Load every folder in one fresh process that never imports this package and compare fp32 logits.

    Args:
        folders: exported models by name.
        inputs: one batch on the CPU.
        expected: fp32 logits of the models in memory, by name.

    Returns:
        The largest absolute difference of each; 0.0 means equal to the bit.

    Raises:
        RuntimeError: the process failed; the last line it wrote is in the message.
    """
    with tempfile.TemporaryDirectory() as temporary:
        source, target = Path(temporary, "inputs.safetensors"), Path(temporary, "logits.safetensors")
        save_file({key: value.contiguous() for key, value in inputs.items()}, source)
        threads = str(torch.get_num_threads())
        command = [
            sys.executable,
            "-c",
            _SCRIPT,
            str(source),
            str(target),
            threads,
            *map(str, folders.values()),
        ]
        process = subprocess.run(command, capture_output=True, text=True, check=False)
        if process.returncode:
            last = (process.stderr.strip().splitlines() or ["no output"])[-1]
            raise RuntimeError(f"a fresh process could not load {', '.join(map(str, folders.values()))}: {last}")
        found = load_file(target)
    return {name: float((found[str(index)] - expected[name]).abs().max()) for index, name in enumerate(folders)}
