"""Kill a tiny pruning run at random moments, start it again, and compare the weights with those of a whole run.

    python tests/sdprune/training/killed_run.py FOLDER --kills 20 --seed 0

One process imports everything once and forks a run whenever it needs one. Every other kill strikes at a random file
operation in the run's folder (so in the middle of saves and removals too), the others after a random time. Prints one
JSON line a kill: where it struck, what it left, and whether the resumed run ended with the same bits.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

from sdprune import SDPruneConfig, prune
from sdprune.config import CONFIG_NAME
from sdprune.training.checkpoint import checkpoints

FILE_EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir")


def run_once(output):
    """Begin the run in a folder, or go on with it, and return a digest of all weights and masks."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    model = BertForSequenceClassification(BertConfig(vocab_size=50, max_position_embeddings=16, **sizes))
    rows = [{"input_ids": torch.randint(50, (8,)), "labels": index % 2} for index in range(40)]
    args = TrainingArguments(
        output_dir=str(output),
        max_steps=12,
        save_steps=2,
        save_total_limit=2,
        seed=1,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        resume_from_checkpoint="latest" if (output / CONFIG_NAME).exists() else None,
    )
    result = prune(model, SDPruneConfig(target_sparsity=0.75, pruning_steps=4), rows, args=args)
    digest = hashlib.sha256()
    for name, value in result.model.state_dict().items():
        digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()


class Events:
    """Counts the file operations inside a folder, and kills the process before one of them."""

    def __init__(self, folder, kill_at=None):
        self.folder, self.kill_at, self.count = str(folder), kill_at, 0
        sys.addaudithook(self)

    def __call__(self, event, arguments):
        if event in FILE_EVENTS and str(arguments[0]).startswith(self.folder):
            if self.count == self.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            self.count += 1


def fork(output, kill_at=None, kill_after=None):
    """Run in a child. Returns its digest and its number of file operations, or None if it was killed."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        with contextlib.suppress(BaseException), open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            events = Events(output, kill_at)
            os.write(writing, json.dumps([run_once(output), events.count]).encode())
            os._exit(0)
        os._exit(1)
    os.close(writing)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return None
    if os.WEXITSTATUS(status):
        raise RuntimeError("the run failed")
    return json.loads(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    expected, operations = fork(options.folder / "whole")
    start = time.perf_counter()  # the first run also warmed up what all later ones use
    if fork(options.folder / "again") != [expected, operations]:
        raise RuntimeError("two whole runs differ")
    duration = time.perf_counter() - start
    chooser = random.Random(options.seed)
    different = 0
    for number in range(options.kills):
        output = options.folder / f"killed-{number}"
        moment = (
            {"kill_after": chooser.uniform(0.0, 0.95 * duration)}
            if number % 2
            else {"kill_at": chooser.randrange(operations)}
        )
        while fork(output, **moment) is not None:  # it was over before the kill
            shutil.rmtree(output)
            moment["kill_after"] *= 0.7
        left = sorted(path.name for path in output.glob("checkpoint-*"))
        whole = [path.name for path in checkpoints(output)]
        found, _ = fork(output)
        row = {"moment": moment, "left": left, "whole": whole, "same": found == expected}
        print(json.dumps(row), flush=True)  # noqa: T201
        different += found != expected
    return min(different, 1)


if __name__ == "__main__":
    sys.exit(main())
