"""Every command and every piece of Python in the README works as printed."""

import re
import shlex
import shutil
from pathlib import Path

import pytest

from sdprune.cli import main

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
SHELL = [line for language, text in BLOCKS if language == "bash" for line in text.splitlines() if line.strip()]
TRIED_HERE = ("sdprune prune", "sdprune evaluate", "sdprune inspect", "sdprune export", "sdprune benchmark")


@pytest.fixture
def workplace(tmp_path, monkeypatch, model_folder, csv_writer, unopposed):
    """Return a folder with what the README calls my-model and reviews.csv."""
    csv_writer(tmp_path / "reviews.csv", 960)
    shutil.copytree(model_folder, tmp_path / "my-model")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_it_is_short():
    assert len(README.splitlines()) < 200


def test_commands_run(workplace):
    tried = [line for line in SHELL if line.startswith(TRIED_HERE)]
    assert len(tried) >= 3
    for line in tried:
        assert main(shlex.split(line, comments=True)[1:]) == 0, line


def test_other_commands_are_run_by_ci_or_marked():
    ci = (ROOT / ".ci" / "run").read_text()
    for line in SHELL:
        if line.startswith(TRIED_HERE) or "# needs" in line:
            continue
        for command in re.split(r" && ", line.split("#")[0].strip()):
            generic = command.replace("python3 -m venv .venv", "-m venv").replace(
                "source .venv/bin/activate", "bin/activate"
            )
            assert generic in ci, f"{command!r} is neither tested nor marked"


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")  # the Trainer's default, without a GPU
def test_python_runs(workplace):
    blocks = [text for language, text in BLOCKS if language == "python"]
    assert len(blocks) >= 2
    for text in blocks:
        exec(compile(text, "README.md", "exec"), {"__name__": "readme"})
