"""`sdprune prune` started in two processes: they train together, and one of them tests and writes."""

import contextlib
import io
import json
import os

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from sdprune.cli import main
from tests.ranks import spawn

OPTIONS = ["--max-steps", "4", "--retraining-steps", "2", "--pruning-steps", "2", "--target-sparsity", "0.5"]
OPTIONS += ["--per-device-train-batch-size", "4", "--max-eval-samples", "16", "--student-width-multiple", "8"]
OPTIONS += ["--warmup-steps", "0", "--lr-cycles", "2", "--eval-steps", "4", "--save-steps", "2"]


def run_on_a_rank(arguments, folder):
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        code = main(arguments)
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps([code, printed.getvalue()]))


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
def test_two_processes_write_one_run(model_folder, csv_file, tmp_path):
    run = tmp_path / "run"
    start = ["prune", "--recipe", "prune-then-distill", "--model", str(model_folder), "--data", str(csv_file)]
    spawn(run_on_a_rank, 2, [*start, "--output", str(run), *OPTIONS], tmp_path)
    (first, table), (second, silence) = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert (first, second, silence) == (0, 0, "")
    assert "prune, then distil" in table
    metrics = json.loads((run / "metrics.json").read_text())
    assert [row["reload_max_difference"] for row in metrics["runs"]] == [0.0, 0.0]
    assert (run / "teacher" / "stage.json").exists()
    assert (run / "student" / "stage.json").exists()
    AutoModelForSequenceClassification.from_pretrained(run / "model")
