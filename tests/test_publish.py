"""What is published besides code: licence, versions, citation, the project page, and the files that run the checks."""

import hashlib
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
CI = ROOT / ".ci" / "run"
YAML = sorted([*ROOT.glob(".github/**/*.yml"), *ROOT.glob(".*.yaml"), *ROOT.glob("*.cff")])
PAGES = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "bench/README.md", "tests/README.md")]
RELATIVE = r"!?\[[^\]]*\]\((?!https?://|#)([^)]*)\)"


def load(path: Path) -> dict:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def pin(package: str) -> str:
    (found,) = re.findall(rf"^{package}==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    return found


def test_the_licence_is_apache_2_word_for_word():
    digest = hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest()
    assert digest == "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
    assert PROJECT["project"]["license"] == load(ROOT / "CITATION.cff")["license"] == "Apache-2.0"
    assert not [line for line in PROJECT["project"]["classifiers"] if line.startswith("License")]


def test_one_version_is_told():
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    citation = load(ROOT / "CITATION.cff")
    version, date = re.search(r"^## \[(\S+)\] - (\S+)$", changes, re.MULTILINE).groups()
    assert version == PROJECT["project"]["version"] == citation["version"]
    assert date == citation["date-released"]


def test_the_citation_is_whole():
    """What the schema of the Citation File Format 1.2.0 asks for, and the papers that the README names."""
    citation = load(ROOT / "CITATION.cff")
    assert citation["cff-version"] == "1.2.0"
    assert citation["message"]
    for work in (citation, *citation["references"]):
        assert work["type"]
        assert work["title"]
        assert all("name" in author or {"family-names", "given-names"} <= author.keys() for author in work["authors"])
    urls = {work["url"] for work in citation["references"]}
    assert set(re.findall(r"https://arxiv\.org/abs/[\d.]+", README)) <= urls
    assert len(urls) == 3


def test_the_project_page_stands_alone():
    """The package index shows the README without the files beside it; its code is left as it is."""
    page = README
    for rule in PROJECT["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]:
        page = re.sub(rule["pattern"], rule["replacement"], page)
    assert re.findall(RELATIVE, README)
    assert re.findall(RELATIVE, page) == re.findall(r"<img|src=", page) == []
    code, links = r"^```.*?^```", r"\[[^\]]+\]\(https://[^)]+\)"
    for kept in (code, links):
        assert re.findall(kept, page, re.MULTILINE | re.DOTALL) == re.findall(kept, README, re.MULTILINE | re.DOTALL)
    assert "CONTRIBUTING.md tells where a pruning step" in page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_files_lead_somewhere(page):
    for target in re.findall(RELATIVE, page.read_text(encoding="utf-8")):
        assert (page.parent / target.split("#")[0]).exists(), target


@pytest.mark.parametrize("path", YAML, ids=lambda path: str(path.relative_to(ROOT)))
def test_yaml_can_be_read(path):
    assert load(path)


def test_pre_commit_runs_the_ruff_of_the_constraints():
    (ruff,) = (repo for repo in load(ROOT / ".pre-commit-config.yaml")["repos"] if "ruff" in repo["repo"])
    assert ruff["rev"] == f"v{pin('ruff')}"


def test_the_workflow_runs_every_part():
    jobs = load(ROOT / ".github" / "workflows" / "ci.yml")["jobs"]
    matrix = jobs["parts"]["strategy"]["matrix"]
    named = ["tests", *matrix["part"], *(entry["part"] for entry in matrix["include"])]
    assert f".ci/run --python ${{{{ matrix.python }}}} {named[0]}" in str(jobs["tests"]["steps"])
    (parts,) = re.findall(r"^PARTS=\((.*)\)$", CI.read_text(), re.MULTILINE)
    assert sorted(named) == sorted(parts.split())
    (versions,) = re.findall(r"^PYTHONS=\((.*)\)$", CI.read_text(), re.MULTILINE)
    known = [line.rpartition(" ")[2] for line in PROJECT["project"]["classifiers"] if "Python :: 3." in line]
    assert versions.split() == jobs["tests"]["strategy"]["matrix"]["python"] == known
    assert {matrix["python"][0], *(entry["python"] for entry in matrix["include"])} <= set(known)


@pytest.mark.parametrize("arguments", [["lints"], [""], ["lint", "--python", "3.10"], ["--python"]])
def test_ci_refuses_what_it_does_not_know(arguments):
    process = subprocess.run([CI, *arguments], capture_output=True, text=True, check=False)
    assert process.returncode == 2
    (line,) = process.stderr.splitlines()
    assert re.fullmatch(r"\.ci/run: no (part|version) '.*'; parts are tests .* oldest, versions .* 3\.11 .*", line)
    assert process.stdout == ""
