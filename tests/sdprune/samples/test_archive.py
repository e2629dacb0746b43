"""Fetching with pip, from a folder of wheels that the tests make themselves."""

import dataclasses
import hashlib
import importlib.util
import multiprocessing
import os
import sys
import zipfile
from pathlib import Path

import pytest

from sdprune.samples import archive as sample
from sdprune.samples.archive import SampleUnavailable, cache_directory
from sdprune.samples.english import sample_model, sample_reviews

CONTENT = {"config.json": b"{}", "weights.bin": bytes(range(256)) * 100}


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all that pip knows of."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    for name, value in {"CONFIG_FILE": os.devnull, "NO_INDEX": "1", "FIND_LINKS": folder.as_uri()}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    return folder


@pytest.fixture
def wheel(index: Path) -> sample.Archive:
    path = index / "tiny_sample-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in CONTENT.items():
            archive.writestr(f"tiny_sample/model/{name}", content)
        archive.writestr("tiny_sample/__init__.py", "raise SystemExit('imported')")
        info = "tiny_sample-1.0.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-sample\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return sample.Archive(
        package="tiny-sample",
        version="1.0",
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        size=path.stat().st_size,
        folder="tiny_sample/model",
        members={name: hashlib.sha256(content).hexdigest() for name, content in CONTENT.items()},
    )


def read(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_named_members_alone_reach_the_cache(wheel, tmp_path):
    cache = tmp_path / "cache"
    folder = sample.fetched(wheel, cache)
    assert read(folder) == CONTENT
    assert list(cache.iterdir()) == [folder]


def test_second_use_needs_no_index_and_a_part_is_completed(wheel, index, tmp_path):
    folder = sample.fetched(wheel, tmp_path / "cache")
    (folder / "config.json").unlink()
    assert read(sample.fetched(wheel, tmp_path / "cache")) == CONTENT
    next(index.glob("*.whl")).unlink()
    assert sample.fetched(wheel, tmp_path / "cache") == folder


def test_processes_at_once_share_one_cache(wheel, tmp_path):
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        folders = pool.starmap(sample.fetched, [(wheel, tmp_path / "cache")] * 2)
    assert folders[0] == folders[1]
    assert read(folders[0]) == CONTENT
    assert list((tmp_path / "cache").iterdir()) == [folders[0]]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"version": "2.0"}, "No matching distribution|Could not find a version"),
        ({"sha256": "0" * 64}, "HASHES"),
        ({"members": {"config.json": "0" * 64}}, "config.json has the checksum"),
        ({"members": {"absent.json": "0" * 64}}, "absent.json"),
    ],
)
def test_failure_leaves_nothing_and_says_what_to_do(wheel, tmp_path, change, reason):
    with pytest.raises(SampleUnavailable, match=reason) as raised:
        sample.fetched(dataclasses.replace(wheel, **change), tmp_path / "cache")
    assert "--model FOLDER --data FILE" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not list((tmp_path / "cache").iterdir())


def test_folders_may_vanish_while_their_bytes_are_counted(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    (tmp_path / "kept").write_bytes(b"12345")
    scandir = os.scandir

    def racing(path):
        if str(path).endswith("gone"):
            raise FileNotFoundError(path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", racing)
    assert sample._bytes_below(tmp_path) == 5


def test_environment_without_pip(wheel, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SampleUnavailable, match=r"has no pip .*ensurepip"):
        sample.fetched(wheel, tmp_path / "cache")


def test_cache_that_cannot_be_written(wheel, tmp_path):
    (tmp_path / "cache").write_text("a file, not a folder")
    with pytest.raises(SampleUnavailable, match="could not be fetched"):
        sample.fetched(wheel, tmp_path / "cache")


@pytest.mark.parametrize(
    ("platform", "variable", "tail"),
    [
        ("linux", "XDG_CACHE_HOME", ".cache/sdprune"),
        ("darwin", "UNUSED", "Library/Caches/sdprune"),
        ("win32", "LOCALAPPDATA", "AppData/Local/sdprune"),
    ],
)
def test_cache_directory(platform, variable, tail, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.delenv(variable, raising=False)
    assert cache_directory() == tmp_path / tail
    if variable != "UNUSED":
        monkeypatch.setenv(variable, str(tmp_path / "elsewhere"))
        assert cache_directory() == tmp_path / "elsewhere" / "sdprune"


@pytest.mark.network
def test_bundled_reviews(reviews_file):
    assert reviews_file == sample_reviews()
    assert reviews_file.stat().st_size == 681_736


@pytest.mark.network
def test_bundled_model_loads(model_folder):
    from transformers import AutoConfig, AutoTokenizer

    assert model_folder == sample_model()
    config = AutoConfig.from_pretrained(model_folder)
    assert (config.model_type, config.num_hidden_layers, config.hidden_size) == ("bert", 6, 384)
    assert AutoTokenizer.from_pretrained(model_folder).tokenize("A film.") == ["a", "film", "."]
