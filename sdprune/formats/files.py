"""The safetensors files of one checkpoint: one index over all of them, tensors read one at a time, errors by name."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from safetensors import SafetensorError, safe_open
from torch import Tensor

from sdprune.formats.pack import digest
from sdprune.formats.record import LayerRecord

VARIANT = "compact"  # of the files of the small form


class WeightFiles:
    """Reads tensors by name from the files that together hold a checkpoint.

    Args:
        files: safetensors files.

    Raises:
        ValueError: a file is damaged or no safetensors file.
        FileNotFoundError: a file is absent.
    """

    def __init__(self, files: Iterable[str | Path]) -> None:
        self._opened: dict[Path, Any] = {}
        self._homes: dict[str, Path] = {}
        for file in map(Path, files):
            if not file.is_file():
                raise FileNotFoundError(f"{file} is missing")
            try:
                self._opened[file] = safe_open(file, framework="pt")
            except SafetensorError as error:
                raise ValueError(f"{file} is damaged or no safetensors file: {error}") from None
            self._homes |= dict.fromkeys(self._opened[file].keys(), file)

    @classmethod
    def of(cls, directory: Path, variant: str | None = None) -> Self:
        """Find the files of a folder, as transformers names them: one file, or shards with an index.

        Raises:
            FileNotFoundError: the folder has none of this variant, or a shard is absent.
            ValueError: the index is malformed or names a file outside of the folder, or a file is damaged.
        """
        part = f".{variant}" if variant else ""
        single, index = directory / f"model{part}.safetensors", directory / f"model.safetensors.index{part}.json"
        if single.is_file():
            return cls([single])
        if not index.is_file():
            others = ", ".join(sorted(path.name for path in directory.glob("*.safetensors"))) or "none"
            raise FileNotFoundError(f"{directory} has neither {single.name} nor {index.name}; weights there: {others}")
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names = sorted(set(weight_map.values()))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{index}: weight_map must map tensors to files ({error!r})") from None
        for name in names:
            check_inside(directory, name, f"{index}: weight_map")
        files = cls(directory / name for name in names)
        for tensor, name in weight_map.items():
            if files._homes.get(tensor) != directory / name:
                raise ValueError(f"{index}: weight_map has {tensor!r} in {name}, which does not hold it")
        return files

    def __contains__(self, name: str) -> bool:
        return name in self._homes

    def names(self) -> list[str]:
        """Return the names of all tensors."""
        return list(self._homes)

    def file_of(self, name: str) -> str:
        """Return the file that holds a tensor, for messages; all files if none does."""
        return str(self._homes[name]) if name in self._homes else ", ".join(map(str, self._opened))

    def read(self, name: str) -> Tensor:
        """Read one tensor, on the CPU.

        Raises:
            ValueError: no file holds it.
        """
        if name not in self._homes:
            raise ValueError(f"{self.file_of(name)}: tensor {name!r} is missing")
        tensor: Tensor = self._opened[self._homes[name]].get_tensor(name)
        return tensor


def digest_of_rest(files: WeightFiles, records: Mapping[str, LayerRecord]) -> str:
    """Return the sha256 of all tensors that no record describes: biases, norms, embeddings, dense layers.

    The plain and the compact files of a checkpoint share them, so it is the same for both.
    """
    stored = {f"{name}.{part}" for name, record in records.items() for part in record.shapes}
    found = hashlib.sha256()
    for name in sorted(set(files.names()) - stored):
        found.update(digest({name: files.read(name)}).encode())
    return found.hexdigest()


def check_inside(directory: Path, name: Any, field: str) -> None:
    """Refuse file names that would leave a folder.

    Raises:
        ValueError: `name` is no bare file name.
    """
    if not isinstance(name, str) or name in ("", ".", "..") or any(sign in name for sign in ("/", "\\", "\0")):
        raise ValueError(f"{field} must name files in {directory}, got {name!r}")
