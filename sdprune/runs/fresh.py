"""A fresh process with plain transformers: what an exported folder computes for those who do not have this package."""

import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

# Runs without this package: it must not be importable by accident, hence a script and not a function.
_SCRIPT = """
import sys
import torch
from safetensors.torch import load_file, save_file
import transformers
from transformers.utils import logging
logging.set_verbosity_error()
logging.disable_progress_bar()
source, target, threads, bf16, trusted, folder = sys.argv[1:]
torch.set_num_threads(int(threads))
batches = {}
for key, value in load_file(source).items():
    index, name = key.split(".", 1)
    batches.setdefault(int(index), {})[name] = value
options = {"trust_remote_code": trusted == "True"}
config = transformers.AutoConfig.from_pretrained(folder, **options)
name = config.architectures[0]
if not hasattr(transformers, name):
    name = next(auto for auto, place in config.auto_map.items() if str(place).endswith("." + name))
model = getattr(transformers, name).from_pretrained(folder, dtype=torch.float32, **options).eval()
logits = {}
with torch.inference_mode():
    logits["0"] = model(**batches.pop(0)).logits.clone()
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    model.to(device)
    for index, inputs in sorted(batches.items()):
        inputs = {name: value.to(device) for name, value in inputs.items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16 == "True"):
            logits[str(index)] = model(**inputs).logits.float().cpu().clone()
        print(index, flush=True)
if any(name.split(".")[0] in ("sdprune", "sdp_kernels") for name in sys.modules):
    raise SystemExit("this package was imported")
save_file(logits, target)
"""


def fresh_logits(
    folder: Path,
    probe: Mapping[str, Tensor],
    batches: Sequence[Mapping[str, Tensor]] = (),
    *,
    bf16: bool = False,
    trust_remote_code: bool = False,
    description: str | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Load an exported folder once, in a fresh process that never imports this package, and run it.

    Args:
        folder: what `export` wrote.
        probe: one batch on the CPU, computed there in float32: to be compared with the model in memory to the bit.
        batches: more of them, computed on the accelerator where there is one.
        bf16: bfloat16 autocast for `batches`.
        trust_remote_code: whether code that the model brings along may run.
        description: text of a progress bar; None: no bar.

    Returns:
        The logits of the probe and of every batch, float32 on the CPU.

    Raises:
        RuntimeError: the process failed; the last line it wrote is in the message.
    """
    with tempfile.TemporaryDirectory() as temporary:
        source, target, log = (Path(temporary, name) for name in ("inputs", "logits", "log"))
        tensors = {
            f"{index}.{name}": value.clone(memory_format=torch.contiguous_format)
            for index, inputs in enumerate((probe, *batches))
            for name, value in inputs.items()
        }
        save_file(tensors, source)
        # in a session of its own: Ctrl-C is for the training
        command = [sys.executable, "-c", _SCRIPT]
        command += [str(source), str(target), str(torch.get_num_threads())]
        command += [str(bf16), str(trust_remote_code), str(folder)]
        with (
            log.open("w") as errors,
            tqdm(total=len(batches), desc=description, disable=description is None, unit="batch", leave=False) as bar,
            subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
            ) as process,
        ):
            try:
                for _ in process.stdout or ():
                    bar.update()
            except BaseException:
                process.kill()
                raise
        if process.returncode:
            last = (log.read_text(errors="replace").strip().splitlines() or ["no output"])[-1]
            raise RuntimeError(f"a fresh process could not load {folder}: {last}")
        found = load_file(target)
    return found["0"], [found[str(index + 1)] for index in range(len(batches))]
