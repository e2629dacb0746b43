"""Whole or absent."""

import pytest

from sdprune.files import new_directory, write_text


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="No space left"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_block_leaves_no_folder(tmp_path):
    def write_half():
        with new_directory(tmp_path / "model") as folder:
            (folder / "half").write_text("x")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_half()
    assert not list(tmp_path.iterdir())


def test_an_occupied_folder_is_refused(tmp_path):
    (tmp_path / "model").mkdir()
    with new_directory(tmp_path / "model") as folder:  # empty ones are taken over
        (folder / "weights").write_text("x")
    with pytest.raises(ValueError, match="already exists; name a new folder"), new_directory(tmp_path / "model"):
        pass
    assert (tmp_path / "model" / "weights").read_text() == "x"
