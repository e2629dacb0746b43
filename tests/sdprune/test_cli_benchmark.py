"""`sdprune benchmark`: what it prints and writes, and one line for what a person can get wrong."""

import json
import re

import pytest
from transformers import AutoModelForSequenceClassification

from sdprune.cli import main
from sdprune.speed.benchmark import prune_random_blocks

FAST = ["--batch", "1,2", "--sequence", "8", "--repeats", "3", "--no-compile", "--threads", "1", "--device", "cpu"]
FAST += ["--no-opponents", "--precision", ""]


@pytest.fixture
def pruned_folder(model_folder, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(model_folder)
    prune_random_blocks(model, 0.75, (8, 8))
    model.save_pretrained(tmp_path / "pruned")
    return tmp_path / "pruned"


def test_a_model_with_zeros(pruned_folder, tmp_path, capsys):
    output = tmp_path / "out"
    assert main(["benchmark", str(pruned_folder), *FAST, "--output", str(output)]) == 0
    assert {path.name for path in output.iterdir()} == {"rows.jsonl", "speedup.png", "report.html"}
    rows = [json.loads(line) for line in (output / "rows.jsonl").read_text().splitlines()]
    assert [(row["contender"], row["batch"]) for row in rows] == [
        ("dense eager", 1),
        ("sparse eager", 1),
        ("dense eager", 2),
        ("sparse eager", 2),
    ]
    printed, bar = capsys.readouterr()
    assert printed.count("sparse eager") == 2
    assert f"look at {output / 'report.html'}" in printed
    assert "float32 2x8: measuring memory" in bar
    assert "6/6" in bar

    assert main(["benchmark", str(pruned_folder), *FAST, "--output", str(output)]) == 2
    assert "--output must be a new or empty folder" in capsys.readouterr().err


def test_random_blocks_show_what_to_expect(model_folder, tmp_path, capsys):
    options = ["--sparsity", "0.5,0.75", "--block-shape", "16x8", "--output", str(tmp_path / "out")]
    assert main(["benchmark", "--config", str(model_folder), *FAST, *options]) == 0
    assert "75.0%" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch", "one"], "--batch must be whole numbers such as 1,8,32, got 'one'"),
        (["--sequence", "64"], "--sequence must be at most 32, the positions of this model, got 64"),
        (["--dtype", "int8"], "--dtype must be of float32, bfloat16, float16, got 'int8'"),
        (["--sparsity", "much"], "--sparsity must be numbers such as 0.5,0.9, got 'much'"),
        (["--block-shape", "32"], "--block-shape must be two whole numbers of at least 1, such as 32x32, got '32'"),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
        (["--config", "bert-base"], "give either MODEL_DIR or --config, and not both"),
        (["--repeats", "1"], "--repeats must be at least 3, got 1"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_wrong_options(pruned_folder, tmp_path, capsys, options, message):
    code = main(["benchmark", str(pruned_folder), *FAST, "--output", str(tmp_path / "out"), *options])
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert code == 2, line
    assert re.fullmatch(f"sdprune: error: {re.escape(message)}", line)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_a_model_without_zeros(model_folder, tmp_path, capsys):
    assert main(["benchmark", str(model_folder), *FAST, "--output", str(tmp_path / "out")]) == 2
    assert "--sparsity is missing: the linear layers of this model have no zeros to skip" in capsys.readouterr().err
    assert main(["benchmark", str(tmp_path / "absent"), *FAST, "--output", str(tmp_path / "out")]) == 2
    assert "MODEL_DIR must be a folder with config.json" in capsys.readouterr().err


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["benchmark", "--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    for name in ("config", "batch", "sequence", "dtype", "device", "threads", "sparsity", "block-shape", "no-compile"):
        assert f"--{name}" in text
