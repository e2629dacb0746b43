"""What a folder with a pruned model holds, layer by layer, read from its files one tensor at a time."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sdprune.formats.files import VARIANT, WeightFiles
from sdprune.formats.form import DENSE, Form
from sdprune.formats.model_config import read_config
from sdprune.formats.pack import unpack, verify
from sdprune.formats.record import LayerRecord
from sdprune.formats.tag import METHOD, SDPruneQuantizationConfig
from sdprune.formats.zeros import INT8_SLACK, SLACK, structure_of
from sdprune.masking.linears import is_conv1d, is_linear

GRID = 32  # cells of a density map along each side, at most


@dataclass(frozen=True)
class LayerReport:
    """The zeros of one weight matrix.

    Args:
        name: dotted name of the layer.
        shape: (out, in) of its dense weight.
        structure: "dense", "unstructured", a block shape such as "32x32", "n:m" such as "2:4", or "rows", "columns"
            or "rows and columns" where those that are left are full.
        form: what it is loaded as: "dense", "narrow", a block shape or "unstructured" (stored under a bit mask), with
            "-int8" behind it in int8.
        precision: "int8", or None where the values have the dtype of the model.
        density: fraction of weights that are not zero.
        bytes: of the weight as it is stored, indices and scales included.
        dead_rows: outputs whose weights are all zero.
        dead_columns: inputs whose weights are all zero.
        heads: attention heads along the side of the matrix that has them; None outside of attention.
        dead_heads: heads whose weights are all zero.
        grid: density of at most 32 x 32 equal cells, row by row.
    """

    name: str
    shape: tuple[int, int]
    structure: str
    form: str
    precision: str | None
    density: float
    bytes: int
    dead_rows: int
    dead_columns: int
    heads: int | None
    dead_heads: int
    grid: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Inspection:
    """What `inspect_folder` found.

    Args:
        directory: the folder.
        variant: None for the plain weights, "compact" for the small ones.
        format: "plain", "portable" or "compact", as `export` wrote it; None for a folder of another origin.
        layers: the linear layers, in the model's order.
        other_bytes: of all other tensors: embeddings, biases, norms.
        architecture: class of the model; None if it is not known here: every matrix is listed then, and no heads.
        own_code: such as "AutoModelForSequenceClassification", which loads a model whose code is in the folder.
    """

    directory: str
    variant: str | None
    format: str | None
    layers: tuple[LayerReport, ...]
    other_bytes: int
    architecture: str | None
    own_code: str | None = None

    @property
    def density(self) -> float:
        """Of all layers together."""
        total = sum(layer.shape[0] * layer.shape[1] for layer in self.layers)
        kept = sum(layer.density * layer.shape[0] * layer.shape[1] for layer in self.layers)
        return kept / max(total, 1)

    @property
    def layer_bytes(self) -> int:
        """Of the weights of all layers, as they are stored."""
        return sum(layer.bytes for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, the density maps left out."""
        values = asdict(self)
        for layer in values["layers"]:
            del layer["grid"]
        total = {
            "weights": sum(layer.shape[0] * layer.shape[1] for layer in self.layers),
            "density": self.density,
            "bytes": self.layer_bytes,
            "dead_rows": sum(layer.dead_rows for layer in self.layers),
            "dead_columns": sum(layer.dead_columns for layer in self.layers),
            "dead_heads": sum(layer.dead_heads for layer in self.layers),
        }
        return values | {"total": total}


def inspect_folder(directory: str | Path, variant: str | None = None) -> Inspection:
    """Describe the zeros of a model folder: one that `export` wrote, or any other with safetensors.

    Tensors are read one at a time, so that memory is bounded by the largest one.

    Args:
        directory: folder with config.json and weights.
        variant: "compact" for the small form of the weights; None: the plain weights where there are any.

    Raises:
        ValueError: no folder, or a damaged file; the message names the file and the field or tensor.
        FileNotFoundError: config.json or weights are missing.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise ValueError(f"{str(directory)!r} is not a folder")
    config = _read_config(folder)
    if variant is None and not any(folder.glob("model.safetensors*")) and any(folder.glob(f"*.{VARIANT}.*")):
        variant = VARIANT
    files = WeightFiles.of(folder, variant)
    records = _records(config, required=variant == VARIANT)
    model = _skeleton(folder, config)
    heads = _Heads(model)
    layers, seen = [], set()
    for name, transposed in _layers(model, files):
        record = records.get(name)
        weight, size, names = _read(files, name, record if variant == VARIANT else None)
        seen.update(names)
        layers.append(_report(name, weight.T if transposed else weight, size, record, heads))
    rest = sum(files.read(name).nbytes for name in files.names() if name not in seen)
    return Inspection(
        directory=str(directory),
        variant=variant,
        format=(config.get("sdprune") or {}).get("format"),
        layers=tuple(layers),
        other_bytes=rest,
        architecture=None if model is None else type(model).__name__,
        own_code=next((name for name in config.get("auto_map") or {} if name.startswith("AutoModel")), None),
    )


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; name a folder that save_pretrained wrote")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error})") from None
    if not isinstance(values, dict) or not isinstance(values.get("sdprune") or {}, dict):
        raise ValueError(f"{path} must hold an object, and its field sdprune too")
    return values


def _records(config: dict[str, Any], *, required: bool) -> dict[str, LayerRecord]:
    tag = config.get("quantization_config")
    if not required and not (isinstance(tag, dict) and tag.get("quant_method") == METHOD):
        return {}
    if not isinstance(tag, dict):
        raise ValueError("config.json: quantization_config is missing, which tells how the compact weights are stored")
    return SDPruneQuantizationConfig(**tag).records


def _skeleton(folder: Path, config: dict[str, Any]) -> nn.Module | None:
    """Return the model without memory for its weights, or None if its class is not part of transformers."""
    import transformers

    names = config.get("architectures")
    kind = getattr(transformers, str(names[0]), None) if names and isinstance(names, list) else None
    if kind is None or "auto_map" in config:
        return None
    settings = read_config(folder)
    with torch.device("meta"):
        model: nn.Module = kind(settings)
    return model


def _layers(model: nn.Module | None, files: WeightFiles) -> Iterator[tuple[str, bool]]:
    """Yield the names of the linear layers that the files hold, and whether they are stored as (in, out)."""
    known = [] if model is None else [(name, module) for name, module in model.named_modules() if is_linear(module)]
    found = [(name, is_conv1d(module)) for name, module in known if f"{name}.weight" in files]
    if not found:
        matrices = (name for name in files.names() if name.endswith(".weight"))
        found = [(name.removesuffix(".weight"), False) for name in matrices if files.read(name).dim() == 2]
    yield from found


def _read(files: WeightFiles, name: str, record: LayerRecord | None) -> tuple[Tensor, int, list[str]]:
    """Return the dense weight as the model has it, the bytes it takes in the file and the names of its tensors."""
    if record is None:
        names = [f"{name}.weight"]
        weight = files.read(names[0])
        if weight.dim() != 2:
            raise ValueError(f"{files.file_of(names[0])}: {names[0]} must have 2 dimensions, got {tuple(weight.shape)}")
        return weight, weight.nbytes, names
    tensors = {part: files.read(f"{name}.{part}") for part in record.shapes}
    verify(tensors, record, name, files.file_of(f"{name}.weight"))
    weight = unpack(tensors, record)
    size = sum(tensor.nbytes for tensor in tensors.values())
    return weight.T if record.transposed else weight, size, [f"{name}.{part}" for part in tensors]


class _Heads:
    """Where the attention heads of a model are: in linear layers inside of modules of a class named ...Attention..."""

    def __init__(self, model: nn.Module | None) -> None:
        self.size: int | None = None
        self.within: tuple[str, ...] = ()
        if model is None:
            return
        full: Any = model.config
        config = full.get_text_config()
        count, width = getattr(config, "num_attention_heads", None), getattr(config, "hidden_size", None)
        sizes = [getattr(config, name, None) for name in ("head_dim", "d_kv")]
        sizes.append(width // count if isinstance(count, int) and isinstance(width, int) and count else None)
        self.size = next((size for size in sizes if isinstance(size, int) and size > 0), None)
        attention = [name for name, module in model.named_modules() if "Attention" in type(module).__name__]
        self.within = tuple(f"{name}." for name in attention)

    def count(self, name: str, kept: Tensor) -> tuple[int | None, int]:
        """Return how many heads a layer has, and how many of them are dead, along the side with more dead ones."""
        if self.size is None or not f"{name}.".startswith(self.within):
            return None, 0
        sides = []
        for alive in (kept.any(1), kept.any(0)):
            if alive.numel() % self.size == 0:
                units = alive.view(-1, self.size).any(1)
                sides.append((int((~units).sum()), units.numel()))
        if not sides:
            return None, 0
        dead, heads = max(sides, key=lambda side: side[0])
        return heads, dead


def _report(name: str, weight: Tensor, size: int, record: LayerRecord | None, heads: _Heads) -> LayerReport:
    kept = weight != 0
    form = Form(DENSE) if record is None else record.form
    total, dead = heads.count(name, kept)
    cells = (min(GRID, kept.shape[0]), min(GRID, kept.shape[1]))
    grid = functional.adaptive_avg_pool2d(kept.float()[None], cells)[0]
    return LayerReport(
        name=name,
        shape=(kept.shape[0], kept.shape[1]),
        structure=structure_of(kept, SLACK if form.precision is None else INT8_SLACK),
        form=str(form),
        precision=form.precision,
        density=int(kept.sum()) / max(kept.numel(), 1),
        bytes=size,
        dead_rows=int((~kept.any(1)).sum()),
        dead_columns=int((~kept.any(0)).sum()),
        heads=total,
        dead_heads=dead,
        grid=tuple(tuple(row) for row in grid.tolist()),
    )
