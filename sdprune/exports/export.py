"""Export: a pruned model as files that plain transformers loads."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdprune.config import SDPruneConfig
from sdprune.exports.convert import Records, find_records, store
from sdprune.exports.neurons import remove_neurons
from sdprune.files import new_directory, public_name
from sdprune.formats.files import VARIANT, WeightFiles, digest_of_rest
from sdprune.formats.form import BLOCK_SHAPES, INT8, NARROW, UNSTRUCTURED, Form
from sdprune.formats.pack import quantize_rows
from sdprune.formats.tag import SDPruneQuantizationConfig
from sdprune.layers.dense import dense_names, pruned_weight
from sdprune.layers.forms import int8_names, plain_copy
from sdprune.masking.bare import adapted, check_bare
from sdprune.masking.coupling import find_couplings
from sdprune.masking.linears import is_conv1d, is_linear, more_than_linear
from sdprune.masking.pruner import measure_sparsity
from sdprune.masking.select import in_layer_stack
from sdprune.speed.plan_record import Plan

FORMATS = ("plain", "portable", "compact")


def export(
    model: Any,
    directory: str | Path,
    format: str | None = None,
    *,
    config: SDPruneConfig | None = None,
    processing_class: Any = None,
    plan: Plan | None = None,
    max_shard_size: int | str = "50GB",
    precision: str | None = None,
) -> Path:
    """Write a pruned model into a new folder; the folder is whole or absent, and the model stays as it is.

    Every format has dense safetensors with exact zeros and a `sdprune` section in config.json that tells the sparsity
    of every layer, and `AutoModel*.from_pretrained(directory)` loads it, with or without this package, to the same
    model. Dense zeros take as much space and time as other numbers.

    - "plain": no more than that: right in every tool.
    - "portable": config.json also tells, as `quantization_config`, which layers are sparse or narrower, so that they
      become so when they are loaded after `import sdprune`. Without the package they load dense, after a warning.
      Engines that look at `quant_method` themselves may refuse the folder.
    - "compact": portable, and beside the dense weights their small form, `model.compact.safetensors`, which
      `from_pretrained(directory, variant="compact")` loads after `import sdprune`.

    What a layer becomes, `plan` tells: blocks, or a matrix without its empty rows and columns; layers that it leaves
    dense are stored under a bit mask in the compact file. Without a plan the zeros decide by what takes the fewest
    bytes: blocks of one of the usual shapes (and of the shape in `config`), a narrower matrix, a bit mask. Layers
    under a bit mask are dense again once loaded. Neurons without any weight leave both of their matrices, see
    `sdprune.exports.neurons`, which also finds what only feeds them.

    With `precision="int8"` every linear layer inside the stack of repeated layers, also one without zeros, is int8 with
    a float32 scale for each output: attention and feed-forward matrices, and neither embeddings, poolers nor heads.
    Forms are chosen by their bytes in int8; matrices without many zeros are stored in blocks of 32 x 4. The dense
    weights are the integers times their scales, so that every tool computes with the same weights; they are float32 in
    a model of another dtype too, which could not hold them, but for "plain", which rounds them to it. Loaded after
    `import sdprune`, "portable" and "compact" become the same int8 layers, which also round their inputs.

    Args:
        model: a transformers model, with masked layers, with zeros in dense ones, or loaded with sparse layers.
        directory: the folder to make.
        format: "plain", "portable" or "compact"; None: portable if a layer becomes sparse or narrower, otherwise
            plain.
        config: how the model was pruned, for the record; None: not recorded.
        processing_class: tokenizer to save beside the model.
        plan: what `sdprune.plan` chose for the model; None: the zeros decide.
        max_shard_size: of one file, as in `save_pretrained`.
        precision: "int8"; None: layers that are int8, in the model or by the plan, stay so, and no others are.

    Returns:
        The folder.

    Raises:
        ValueError: an unknown format or precision, nothing to compact, a plan of another model, a model that is wrapped
            or would be saved under other names than its own, weights that are not finite, or a folder that exists and
            is not empty.
        TypeError: `model` is no transformers model.
    """
    if format not in (None, *FORMATS):
        raise ValueError(f"format must be one of {', '.join(map(repr, FORMATS))}, got {format!r}")
    if precision not in (None, INT8):
        raise ValueError(f"precision must be {INT8!r} or None, got {precision!r}")
    _check_model(model)
    with torch.no_grad():
        dense = plain_copy(model)
        int8 = _int8_layers(model, dense, plan, precision)
        _round(dense, int8, dense.dtype if format == "plain" else torch.float32)
        records = {} if format == "plain" else _records(dense, config, plan, int8)
        if format is None:
            sparse = any(record.form != Form(UNSTRUCTURED) for record in records.values())
            format = "portable" if sparse else "plain"
        if format == "compact" and not records:
            raise ValueError("format must be 'plain': no layer of the model has enough zeros to be stored smaller")
        dense.config.sdprune = _section(dense, format, config, INT8 if int8 else None)
        if format != "plain":
            dense.config.quantization_config = SDPruneQuantizationConfig.of(records).to_dict()
        with new_directory(Path(directory)) as folder:
            # some architectures were once saved under other names: older tools know those, but the tag names the layers
            # of the model
            names: Any = {"save_original_format": format == "plain"}
            dense.save_pretrained(folder, max_shard_size=max_shard_size, **names)
            if format != "plain":
                rest = digest_of_rest(WeightFiles.of(folder), records)
                dense.config.quantization_config |= {"rest_sha256": rest}
                dense.config.save_pretrained(folder)
            if format == "compact":
                store(dense, records)
                dense.save_pretrained(folder, variant=VARIANT, max_shard_size=max_shard_size, **names)
            if processing_class is not None:
                processing_class.save_pretrained(folder)
    return Path(directory)


def _check_model(model: Any) -> None:
    """Refuse what would be saved as another model, or under names that its class does not have."""
    if isinstance(model, nn.Module):
        check_bare(model)
    if not (hasattr(model, "save_pretrained") and hasattr(model, "config")):
        raise TypeError(f"model must be a transformers model, got {type(model).__name__}")
    if adapted(model):
        raise ValueError(
            "model has adapters of PEFT, of which alone save_pretrained would write the weights; merge them first "
            "(merge_and_unload() of the PeftModel)"
        )
    known = ("torch", "transformers", "sdprune") if type(model).__module__.startswith("transformers.") else ()
    for name, module in model.named_modules():
        if known and is_linear(module) and type(module).__module__.partition(".")[0] not in known:
            fault = more_than_linear(module)
            if fault is not None:
                raise ValueError(f"model: layer {name!r} ({type(module).__name__}) would be loaded as another: {fault}")
        if is_linear(module) and isinstance(module.weight, Tensor) and "weight" not in dict(module.named_parameters()):
            raise ValueError(f"model: layer {name!r} cannot be saved under its own names: {more_than_linear(module)}")


def _section(dense: Any, format: str, config: SDPruneConfig | None, precision: str | None) -> dict[str, Any]:
    """What config.json tells of the pruning, in its field `sdprune`."""
    zeros = {name: share for name, share in measure_sparsity(dense, dense_names(dense)).layers.items() if share}
    section: dict[str, Any] = {"version": 1, "format": format, "layers": zeros}
    if precision is not None:
        section["precision"] = precision
    if config is not None:
        section["pruning"] = {name: public_name(value) for name, value in config.to_dict().items()}
    return section


def _int8_layers(model: Any, dense: Any, plan: Plan | None, precision: str | None) -> set[str]:
    """The layers that are stored in int8: all that may be, or those that are by now or by the plan."""
    found = set(int8_names(model))
    if plan is not None:
        _check_plan(dense, plan)
        found |= {name for name, choice in plan.choices.items() if Form.named(choice).precision == INT8}
    if precision == INT8:
        found |= set(in_layer_stack(dense, dense_names(dense)))
        if not found:
            raise ValueError(
                f"precision={precision!r} needs a stack of layers with linear layers, which the model lacks"
            )
    return found


def _round(dense: Any, names: set[str], dtype: torch.dtype) -> None:
    """Give layers the weights that int8 leaves of theirs; exchanged, as the tensors are those of another model."""
    for name in sorted(names):
        layer: Any = dense.get_submodule(name)
        try:
            integers, scales = quantize_rows(pruned_weight(layer))
        except ValueError as error:
            raise ValueError(f"layer {name!r} cannot be stored in int8: {error}") from None
        weight = (integers * scales[:, None]).to(dtype)
        stored = weight.T.contiguous() if is_conv1d(layer) else weight
        layer.weight = nn.Parameter(stored, requires_grad=layer.weight.requires_grad)


def _records(dense: Any, config: SDPruneConfig | None, plan: Plan | None, int8: set[str]) -> Records:
    own = () if config is None or config.block_shape is None else (config.block_shape,)
    shapes = () if plan is not None else tuple(dict.fromkeys((*own, *BLOCK_SHAPES)))
    choices = None
    if plan is not None:
        choices = {name: Form.named(choice) for name, choice in plan.choices.items()}
    neurons = _without_neurons(dense, shapes, int8)
    if choices is not None:  # neurons leave only where the plan narrows all layers concerned
        groups = {name: record.consumer or name for name, record in neurons.items()}
        narrowed = {name for name, form in choices.items() if form.structure == NARROW}
        kept = {group for name, group in groups.items() if name not in narrowed}
        neurons = {name: record for name, record in neurons.items() if groups[name] not in kept}
    return find_records(dense, block_shapes=shapes, choices=choices, int8=int8) | neurons


def _without_neurons(dense: Any, block_shapes: tuple[tuple[int, int], ...], int8: set[str]) -> Records:
    weights = (pruned_weight(dense.get_submodule(name)) for name in dense_names(dense))
    if all(bool((weight != 0).any(0).all()) for weight in weights):
        return {}  # no column is empty
    try:
        couplings = find_couplings(dense)
    except ValueError:  # a model of another make: its empty rows and columns leave one by one
        return {}
    return remove_neurons(dense, couplings, block_shapes=block_shapes, int8=int8)


def _check_plan(dense: Any, plan: Plan) -> None:
    names = set(dense_names(dense))
    for layer in plan.layers:
        shape = tuple(pruned_weight(dense.get_submodule(layer.name)).shape) if layer.name in names else None
        if shape != tuple(layer.shape):
            raise ValueError(
                f"plan must be of this model: its layer {layer.name!r} has shape {tuple(layer.shape)}, got {shape}"
            )
