"""Loading stored layers: through `AutoModel*.from_pretrained` once `sdprune` is imported, or by `load` without hooks.

Every stored layer is checked in its file, in the file's own dtype, before anything is built from it: shapes, indices,
content. What does not fit is an error, so that no model comes up with weights that are wrong or made anew.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer

from sdprune.exports.convert import Records, StoredLinear, convert_layers, find_records, renewed
from sdprune.formats.files import WeightFiles, digest_of_rest
from sdprune.formats.form import BLOCK_SHAPES, NARROW, UNSTRUCTURED, Form
from sdprune.formats.model_config import exported_class, read_config
from sdprune.formats.pack import Tensors, pack, verify
from sdprune.formats.record import LayerRecord
from sdprune.formats.tag import METHOD, SDPruneQuantizationConfig
from sdprune.layers.dense import dense_names, pruned_weight
from sdprune.layers.forms import dense_copy, make_layer
from sdprune.masking.linears import is_conv1d, put_layer


class SDPruneQuantizer(HfQuantizer):
    """Swaps stored layers in while transformers loads a model, and writes them back dense, with their zeros.

    Only the two hooks around loading, the one for saving and the flags of the base class are used.
    """

    requires_calibration = False
    is_trainable = is_qat_trainable = is_compileable = True  # the Trainer asks for the second one
    quantization_config: Any

    def __init__(self, quantization_config: SDPruneQuantizationConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._stored: dict[str, tuple[LayerRecord, Tensors | None]] = {}

    def is_serializable(self) -> bool:
        """Say that `save_pretrained` works: dense weights with the tag, right in every tool."""
        return True

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> Any:
        records = self.quantization_config.records
        if records:
            files = _open(model, checkpoint_files)
            self._stored = prepare(model, records, files, self.quantization_config.rest_sha256)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if not self.pre_quantized:
            self.quantization_config.take(convert_zeros(model, self.quantization_config))
            return model
        self.quantization_config.take(build(model, self._stored))
        self._stored = {}
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Any], dict[str, str]]:
        """Return the dense state, and renew the records, which `save_pretrained` writes next."""
        records = self.quantization_config.records
        dense = dense_copy(model)
        self.quantization_config.take(renewed(dense, records))
        model._weight_conversions = []  # the records name the layers of the model, so the file must too
        return dense.state_dict(), {}


def register() -> None:
    """Make transformers know the format; again does nothing."""
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(SDPruneQuantizationConfig)
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(METHOD)(SDPruneQuantizer)


def prepare(
    model: Any, records: Records, files: WeightFiles, rest_sha256: str | None = None
) -> dict[str, tuple[LayerRecord, Tensors | None]]:
    """Check every stored layer in its file, and shape the model to take the tensors as they are stored.

    Args:
        model: still without weights, usually on the meta device.
        records: from config.json, by the names of the tensors in the files.
        files: of the checkpoint.
        rest_sha256: digest of all other tensors, from config.json; None: they are not checked.

    Returns:
        By the names in the model, which may have one prefix more or less, the record of each layer, and its packed
        tensors where the file holds the dense weight. Layers that this class of model does not have are left out.

    Raises:
        ValueError: a tensor is missing or is not what the record tells; the message names file and field.
    """
    found: dict[str, tuple[LayerRecord, Tensors | None]] = {}
    names = {name: _name_in_model(model, name) for name in records}
    for name, record in records.items():
        compact = any(f"{name}.{index}" in files for index in record.index_shapes)
        compact = compact or files.read(f"{name}.weight").dim() != 2
        if compact:
            tensors = {key: files.read(f"{name}.{key}") for key in record.shapes}
        else:
            tensors = _read_dense(name, record, records, files)
        verify(tensors, record, name, files.file_of(f"{name}.weight"))
        own = names[name]
        if own is None:
            continue
        module = model.get_submodule(own)
        _check_module(module, record, name)
        if module.bias is not None and f"{name}.bias" not in files:
            raise ValueError(f"{files.file_of('')}: tensor '{name}.bias' is missing")
        if record.consumer is not None:
            record = replace(record, consumer=names[record.consumer])
        found[own] = (record, None if compact else tensors)
        if compact:
            empty = {
                key: torch.empty(value.shape, dtype=_dtype_of(key, value, module), device=module.weight.device)
                for key, value in tensors.items()
            }
            put_layer(model, own, StoredLinear(empty, module.bias))
    if rest_sha256 not in (None, digest_of_rest(files, records)):
        raise ValueError(
            f"{files.file_of('')}: the tensors that are not of a stored layer (biases, norms, embeddings) are not what "
            "config.json describes (quantization_config.rest_sha256 differs): the file is damaged, or belongs to "
            "another checkpoint"
        )
    return found


@torch.no_grad()
def build(model: Any, stored: Mapping[str, tuple[LayerRecord, Tensors | None]]) -> Records:
    """Replace what was loaded by the layers that compute with it, in place; return the records of all."""
    for name, (record, tensors) in stored.items():
        module = model.get_submodule(name)
        if tensors is None:
            tensors = module.tensors()
        elif record.form == Form(UNSTRUCTURED):
            continue
        else:  # gathered in the file's dtype: a value that underflows in the model's must not lose its place
            tensors = {
                key: value.to(module.weight.device, _dtype_of(key, value, module)) for key, value in tensors.items()
            }
        put_layer(model, name, make_layer(tensors, module.bias, record).train(module.training))
    return {name: record for name, (record, _) in stored.items()}


@torch.no_grad()
def convert_zeros(model: Any, config: SDPruneQuantizationConfig) -> Records:
    """Convert the layers of a dense model whose zeros allow it, in place; returns their records."""
    choices = None
    if config.block_shape is not None:
        choices = dict.fromkeys(dense_names(model), Form.blocks(config.block_shape))
    records = find_records(model, block_shapes=BLOCK_SHAPES, choices=choices)
    kept = {
        name: record
        for name, record in records.items()
        if record.structure != UNSTRUCTURED and record.density <= config.max_density
    }
    convert_layers(model, model, kept)
    return kept


def attach(model: Any, config: SDPruneQuantizationConfig) -> None:
    """Give a model what `save_pretrained` and the Trainer look at to handle its stored layers."""
    model.config.quantization_config = config
    model.hf_quantizer = SDPruneQuantizer(config)
    model.is_quantized, model.quantization_method = True, METHOD


def load(
    directory: str | Path,
    variant: str | None = None,
    dtype: torch.dtype | None = None,
    auto_class: Any = None,
    *,
    trust_remote_code: bool = False,
) -> Any:
    """Load an exported folder without the loading hooks of transformers: config, empty model, tensors, layers.

    Args:
        directory: a local folder that `sdprune.export` wrote, in any format.
        variant: "compact" for the compact files; None for the plain ones.
        dtype: of the floating-point weights, but for those that the class of model keeps in float32; None: as they
            are stored.
        auto_class: such as `transformers.AutoModelForSequenceClassification`; None: the class that was exported.
        trust_remote_code: run the Python files that the model brings along; read them first.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: a file is damaged or does not belong to this folder, tensors are missing or unknown, or the model
            needs code of its own that may not run; the message names file and field.
        FileNotFoundError: a file is missing.
        TypeError: `dtype` is no torch.dtype.
    """
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype such as torch.float16, or None, got {dtype!r}")
    folder = Path(directory)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder / 'config.json'} is missing")
    files = WeightFiles.of(folder, variant)
    config = read_config(folder, trust_remote_code=trust_remote_code)
    values = getattr(config, "quantization_config", None) or {"quant_method": METHOD}
    storage = SDPruneQuantizationConfig(**values)
    if auto_class is None:
        model = exported_class(folder, config, trust_remote_code=trust_remote_code)._from_config(config)
    else:
        model = auto_class.from_config(config, trust_remote_code=trust_remote_code)
    stored = prepare(model, storage.records, files, storage.rest_sha256)
    _fill(model, files)
    if dtype is not None:
        _convert(model, dtype)
    storage.take(build(model, stored))
    if stored:
        attach(model, storage)
    return model.eval()


def _fill(model: nn.Module, files: WeightFiles) -> None:
    """Put the tensors of the files in place of those of the model, in the dtype of the files."""
    names = files.names()
    tied = getattr(model, "all_tied_weights_keys", {})
    with torch.no_grad():
        own = model.state_dict(keep_vars=True)
        prefix = f"{getattr(model, 'base_model_prefix', '')}."
        renamed = {name: _key_in(own, name, prefix) for name in names}
        missing = own.keys() - set(renamed.values()) - set(tied)
        if missing:
            raise ValueError(f"{files.file_of('')}: tensor {min(missing)!r} is missing ({len(missing)} in all)")
        for name, key in renamed.items():
            if key is None:
                continue
            tensor, target = files.read(name), own[key]
            if tensor.shape != target.shape:
                raise ValueError(
                    f"{files.file_of(name)}: {name} must have shape {tuple(target.shape)}, got {tuple(tensor.shape)}"
                )
            target.data = tensor
    tie = getattr(model, "tie_weights", None)
    if tie is not None:
        tie()


def _convert(model: Any, dtype: torch.dtype) -> None:
    """To another dtype, what was loaded, as `from_pretrained` does: what a model computes (the angles of rotary
    embeddings) or wants in float32 (`_keep_in_fp32_modules`) would lose digits that it needs.
    """
    stored = [name for name, module in model.named_modules() if isinstance(module, StoredLinear)]
    loaded = model.state_dict().keys() - {f"{name}.scales" for name in stored}
    wide = set(getattr(model, "_keep_in_fp32_modules", None) or ()) if dtype == torch.float16 else set()
    if dtype in (torch.float16, torch.bfloat16):
        wide |= set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in loaded and tensor.is_floating_point():
            tensor.data = tensor.data.to(torch.float32 if any(f".{part}." in f".{name}." for part in wide) else dtype)


def _dtype_of(part: str, stored: torch.Tensor, module: nn.Module) -> torch.dtype:
    """The dtype that a stored tensor has in memory: floating-point values that of the layer, all others their own."""
    weight: Any = module.weight
    return weight.dtype if part == "weight" and stored.is_floating_point() else stored.dtype


def _key_in(own: Mapping[str, Any], name: str, prefix: str) -> str | None:
    return next((key for key in (name, name.removeprefix(prefix), prefix + name) if key in own), None)


def _open(model: Any, checkpoint_files: Iterable[str] | None) -> WeightFiles:
    if not checkpoint_files:
        raise ValueError("a model with stored layers must be loaded from files, got none (was a state_dict given?)")
    folder = Path(model.config.name_or_path)
    for file in map(Path, checkpoint_files):
        # A hub cache links to files elsewhere, and refuses such names itself.
        if folder.is_dir() and (not file.is_relative_to(folder) or ".." in file.relative_to(folder).parts):
            raise ValueError(
                f"{folder}: the index of the shards, or config.json, must name files in it, got {str(file)!r}"
            )
    return WeightFiles(checkpoint_files)


def _read_dense(name: str, record: LayerRecord, records: Records, files: WeightFiles) -> Tensors:
    def read(layer: str, known: LayerRecord) -> torch.Tensor:
        weight = files.read(f"{layer}.weight")
        shape = known.shape[::-1] if known.transposed else known.shape
        if tuple(weight.shape) != shape:
            file = files.file_of(f"{layer}.weight")
            text = f"{file}: {layer}.weight must have shape {shape} as config.json tells, got {tuple(weight.shape)}"
            raise ValueError(text)
        return weight.T if known.transposed else weight

    rows = None
    if record.consumer is not None:
        consumer = records[record.consumer]
        rows = pack(read(record.consumer, consumer), Form(NARROW), removed="columns")["columns"]
    weight = read(name, record)
    try:
        return pack(weight, record.form, removed=record.removed, rows=rows)
    except ValueError as error:
        raise ValueError(f"{files.file_of(f'{name}.weight')}: {name}.weight: {error}") from None


def _name_in_model(model: Any, name: str) -> str | None:
    prefix = f"{model.base_model_prefix}."
    for candidate in (name, name.removeprefix(prefix), prefix + name):
        try:
            model.get_submodule(candidate)
        except AttributeError:
            continue
        return candidate
    return None


def _check_module(module: Any, record: LayerRecord, name: str) -> None:
    kind, transposed = type(module), is_conv1d(module)
    shape = tuple(pruned_weight(module).shape) if transposed or isinstance(module, nn.Linear) else None
    if shape != record.shape or transposed != record.transposed:
        raise ValueError(
            f"config.json: quantization_config.modules[{name!r}] has shape {list(record.shape)}"
            f"{', transposed' if record.transposed else ''}, but the layer of the model is {kind.__name__}"
            f"{'' if shape is None else f' of {list(shape)}'}"
        )
