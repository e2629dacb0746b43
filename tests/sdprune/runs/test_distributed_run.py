"""`sdprune prune` started in two processes: they train together, and one of them tests and writes."""

import contextlib
import faulthandler
import io
import json
import os
import socket

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from sdprune.cli import main

OPTIONS = ["--max-steps", "4", "--retraining-steps", "2", "--pruning-steps", "2", "--target-sparsity", "0.5"]
OPTIONS += ["--per-device-train-batch-size", "4", "--max-eval-samples", "16", "--student-width-multiple", "8"]
OPTIONS += ["--warmup-steps", "0", "--lr-cycles", "2", "--eval-steps", "4", "--save-steps", "2"]


def run_on_a_rank(rank, arguments, port, folder):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(100, exit=True)  # where one process waits for the other in vain
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        code = main(arguments)
    (folder / f"{rank}.json").write_text(json.dumps([code, printed.getvalue()]))
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
def test_two_processes_write_one_run(model_folder, csv_file, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run = tmp_path / "run"
    start = ["prune", "--recipe", "prune-then-distill", "--model", str(model_folder), "--data", str(csv_file)]
    torch.multiprocessing.spawn(run_on_a_rank, ([*start, "--output", str(run), *OPTIONS], port, tmp_path), nprocs=2)
    (first, table), (second, silence) = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert (first, second, silence) == (0, 0, "")
    assert "prune, then distil" in table
    metrics = json.loads((run / "metrics.json").read_text())
    assert [row["reload_max_difference"] for row in metrics["runs"]] == [0.0, 0.0]
    assert (run / "teacher" / "stage.json").exists()
    assert (run / "student" / "stage.json").exists()
    AutoModelForSequenceClassification.from_pretrained(run / "model")
