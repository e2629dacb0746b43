"""`TeacherCache`: what a deterministic teacher says of every training example, computed once and memory-mapped.

A folder holds `index.json`, `keys.npy`, `lengths.npy` and one array a feature. It is written whole, before the first
training step, and never changed: a cache belongs to one teacher (its weights and configuration), one precision and one
set of examples (what the teacher reads of them), all known by their hashes.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm.auto import tqdm

from sdprune.distillation.features import Features
from sdprune.files import new_directory

INDEX_NAME = "index.json"
FORMAT = 1
POSITIONS = "teacher_cache_positions"  # the batch's examples in the cache, beside the inputs of the model
_KEY_BYTES = 16
_SURVEY_ROWS = 256

Collate = Callable[[list[Any]], Any]


def model_hash(model: nn.Module) -> str:
    """Return a hash of the weights, the buffers and the configuration of a model, wherever it was loaded from."""
    digest = hashlib.sha256()
    config: Any = getattr(model, "config", None)
    values = config.to_dict() if hasattr(config, "to_dict") else {}
    values = {key: value for key, value in values.items() if key not in ("_name_or_path", "transformers_version")}
    digest.update(json.dumps(values, sort_keys=True, default=str).encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def example_keys(batch: Mapping[str, Any]) -> list[bytes]:
    """Return a hash of what the teacher reads of every row of a collated batch: neither padding nor labels.

    Raises:
        ValueError: a row is padded elsewhere than at its end, where what a model sees, and where it sees it, may depend
            on the padding.
    """
    arrays = {name: value.numpy() for name, value in batch.items() if isinstance(value, Tensor) and name != "labels"}
    mask = arrays.get("attention_mask")
    if mask is not None and not (mask.ndim == 2 and mask[:, 0].all() and (mask[:, 1:] <= mask[:, :-1]).all()):
        raise ValueError(
            "teacher_cache needs padding on the right: set padding_side='right' in the tokenizer, and leave no tokens "
            f"inside a row out of attention_mask, here of shape {mask.shape}"
        )
    keys = []
    for row in range(len(next(iter(arrays.values())))):
        digest = hashlib.blake2b(digest_size=_KEY_BYTES)
        for name in sorted(arrays):
            value = arrays[name][row]
            if mask is not None and arrays[name].shape[:2] == mask.shape:
                value = value[mask[row] != 0]
            digest.update(f"{name} {value.dtype} {value.shape}".encode())
            digest.update(value.tobytes())
        keys.append(digest.digest())
    return keys


class TeacherCache:
    """The teacher's features of every example of a data set.

    Building one reads the data set once and checks what the folder holds; nothing is written before `open_or_fill`.

    Args:
        folder: where the cache is or will be.
        model: the teacher.
        names: the features to keep.
        dataset: the training examples, with a length.
        collate: makes a batch of a list of examples; the same example must always give the same inputs.
        run: returns the teacher's features of a batch.
        precision: names the arithmetic of `run`; another one gives other outputs.
        limit: most bytes that the features may take.

    Raises:
        ValueError: the folder holds something else, a damaged cache, or one of another teacher, precision, data set or
            fewer features; the features would take more than `limit`.
    """

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        names: Sequence[str],
        dataset: Any,
        collate: Collate,
        run: Callable[[Any], Features],
        *,
        precision: str,
        limit: float,
    ) -> None:
        self.folder, self.names, self.dataset = folder, tuple(names), dataset
        self._plain_collate, self._run = collate, run
        self._identity = {"format": FORMAT, "teacher": model_hash(model), "precision": precision}
        self._survey()
        self._data: dict[str, tuple[NDArray[Any], torch.dtype]] = {}
        if (folder / INDEX_NAME).exists():
            self._open()
        elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise self._refusal(f"holds no cache ({INDEX_NAME} is missing), but other files")
        else:
            self._check_size(limit)

    @property
    def filled(self) -> bool:
        """Whether the features are there."""
        return bool(self._data)

    def collate(self, rows: list[Any]) -> Any:
        """Make a batch that says where its examples stand in the cache; that entry is not for the model.

        Raises:
            ValueError: an example gives other inputs than when the data set was read.
        """
        batch = self._plain_collate(rows)
        try:
            batch[POSITIONS] = [self._positions[key] for key in example_keys(batch)]
        except KeyError:
            raise ValueError(
                "teacher_cache: an example gives other inputs now than when the data set was read, so its outputs "
                "cannot be kept; leave teacher_cache out, or take a data set and a collator without randomness"
            ) from None
        return batch

    def __call__(self, positions: Sequence[int], width: int, device: torch.device) -> Features:
        """Return the features of the examples at `positions`; those of tokens are padded with 0 to `width`."""
        found = {}
        for name in self.names:
            data, dtype = self._data[name]
            if not self._per_token[name]:
                rows = data[list(positions)]
            else:
                rows = np.zeros((len(positions), width, data.shape[1]), dtype=data.dtype)
                for row, position in enumerate(positions):
                    start, end = self._offsets[position : position + 2]
                    rows[row, : end - start] = data[start:end]
            found[name] = torch.from_numpy(rows).view(dtype).to(device)
        return found

    def open_or_fill(self, batch_size: int) -> None:
        """Map the folder if another process has written it meanwhile; otherwise write it, whole, and map it.

        The teacher runs over all examples in batches of like lengths.
        """
        if (self.folder / INDEX_NAME).exists():
            self._open()
        else:
            self._fill(batch_size)

    def _fill(self, batch_size: int) -> None:
        order = np.argsort(self._lengths, kind="stable")[::-1]
        with new_directory(self.folder) as temporary:
            arrays: dict[str, np.memmap[Any, Any]] = {}
            dtypes: dict[str, str] = {}
            for start in tqdm(range(0, len(order), batch_size), desc="teacher cache", unit="batch"):
                places = order[start : start + batch_size]
                batch = self._plain_collate([self.dataset[int(self._rows[place])] for place in places])
                for name, value in self._run(batch).items():
                    if name not in arrays:
                        dtypes[name] = str(value.dtype).removeprefix("torch.")
                        count = self._offsets[-1] if self._per_token[name] else len(order)
                        shape = (int(count), value.shape[-1])
                        arrays[name] = np.lib.format.open_memmap(
                            temporary / f"{name}.npy", mode="w+", dtype=_numpy(value).dtype, shape=shape
                        )
                    self._store(arrays[name], name, places, _numpy(value))
            for array in arrays.values():
                array.flush()
            np.save(temporary / "keys.npy", self._keys)
            np.save(temporary / "lengths.npy", self._lengths)
            index = self._identity | {"features": dtypes, "per_token": self._per_token}
            index["files"] = {path.name: _file_hash(path) for path in sorted(temporary.glob("*.npy"))}
            (temporary / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        self._open()

    def _store(self, array: NDArray[Any], name: str, places: NDArray[Any], values: NDArray[Any]) -> None:
        if not self._per_token[name]:
            array[places] = values
            return
        for place, value in zip(places, values, strict=True):
            array[self._offsets[place] : self._offsets[place + 1]] = value[: self._lengths[place]]

    def _survey(self) -> None:
        """Read every example once: its key, its length, and the first row of the data set that holds it."""
        keys: dict[bytes, int] = {}
        lengths: list[int] = []
        self._rows: list[int] = []
        for start in range(0, len(self.dataset), _SURVEY_ROWS):
            rows = range(start, min(start + _SURVEY_ROWS, len(self.dataset)))
            batch = self._plain_collate([self.dataset[row] for row in rows])
            mask = batch.get("attention_mask")
            counts = [0] * len(rows) if mask is None else mask.sum(1).tolist()
            for row, key, count in zip(rows, example_keys(batch), counts, strict=True):
                if key not in keys:
                    keys[key] = len(keys)
                    self._rows.append(row)
                    lengths.append(count)
        first = self._run(self._plain_collate([self.dataset[0]]))
        self._per_token = {name: value.dim() == 3 for name, value in first.items()}
        if not any(lengths):  # no mask: every example has as many positions as the first
            lengths = [max([1, *(value.shape[1] for value in first.values() if value.dim() == 3)])] * len(keys)
        self._first = first
        self._keys = np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, _KEY_BYTES)
        self._lengths = np.array(lengths, dtype=np.int64)
        self._place(keys)

    def _place(self, keys: Iterable[bytes]) -> None:
        self._positions = {key: position for position, key in enumerate(keys)}
        self._offsets = np.concatenate(([0], np.cumsum(self._lengths)))

    def _check_size(self, limit: float) -> None:
        counts = {name: self._offsets[-1] if self._per_token[name] else len(self._keys) for name in self.names}
        size = sum(int(counts[name]) * self._first[name].shape[-1] * self._first[name].itemsize for name in self.names)
        if size > limit:
            raise ValueError(
                f"teacher_cache would take {size / 1e9:.3g} GB ({', '.join(self.names)} of {len(self._keys)} "
                f"examples), more than teacher_cache_gigabytes={limit / 1e9:.3g}; raise it, leave teacher_cache out, "
                "or compare less, such as representation='first' or 'mean'"
            )

    def _open(self) -> None:
        """Check what the folder holds and map it."""
        try:
            index = json.loads((self.folder / INDEX_NAME).read_text(encoding="utf-8"))
            files, features = dict(index["files"]), dict(index["features"])
        except (ValueError, KeyError, TypeError):
            raise self._refusal(f"is damaged: {INDEX_NAME} cannot be read") from None
        what = {"format": "is of another format", "teacher": "belongs to another teacher"}
        for name, mine in self._identity.items():
            if index.get(name) != mine:
                words = what.get(name, "was made in another precision")
                raise self._refusal(f"{words} ({index.get(name)!s:.16} instead of {mine!s:.16})")
        missing = [name for name in self.names if name not in features]
        if missing:
            raise self._refusal(f"holds {', '.join(features)}, not {', '.join(missing)}")
        for name, expected in files.items():
            if not (self.folder / name).is_file() or _file_hash(self.folder / name) != expected:
                raise self._refusal(f"is damaged: {name} is missing or not what was written")
        keys = np.load(self.folder / "keys.npy")
        theirs = [key.tobytes() for key in keys]
        shared = len(self._positions.keys() & set(theirs))
        if not shared == len(theirs) == len(self._positions):
            raise self._refusal(
                f"belongs to another data set: of its {len(theirs)} examples {shared} are among the "
                f"{len(self._positions)} of this one"
            )
        self._keys, self._lengths = keys, np.load(self.folder / "lengths.npy")
        self._place(theirs)  # the same examples may come in another order
        self._data = {
            name: (np.load(self.folder / f"{name}.npy", mmap_mode="r"), getattr(torch, features[name]))
            for name in self.names
        }

    def _refusal(self, reason: str) -> ValueError:
        return ValueError(f"teacher_cache {str(self.folder)!r} {reason}; name another folder, or remove it")


def _numpy(value: Tensor) -> NDArray[Any]:
    """Return the numbers of a tensor; bfloat16, which numpy lacks, as the int16 of the same bits."""
    value = value.detach().cpu()
    return (value.view(torch.int16) if value.dtype == torch.bfloat16 else value).numpy()


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
