"""Exporting what a folder holds: a run, finished or not, a checkpoint of the Trainer, a model."""

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdp_kernels import BitMask
from sdprune.config import CONFIG_NAME, SDPruneConfig
from sdprune.exports.export import export
from sdprune.exports.onnx import export_onnx
from sdprune.formats.files import WeightFiles
from sdprune.formats.model_config import exported_class, read_config
from sdprune.masking.linears import matrix, put_layer
from sdprune.masking.swap import mask_layer
from sdprune.methods.criteria import CRITERIA
from sdprune.runs.classifier import check_model_folder
from sdprune.training.folder import config_of, model_of


def export_folder(
    source: Path,
    output: Path,
    format: str | None = None,
    *,
    precision: str | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """Export the model of a run, of a checkpoint or of a model folder.

    Of a finished run its model, of an unfinished one its newest whole checkpoint: with the zeros that its masks ask
    for, and gates such as those of l0 in the weights, as far as the run came.

    Args:
        source: the folder.
        output: the folder to make.
        format: as of `export`, or "onnx".
        precision: as of `export`; None for "onnx".
        trust_remote_code: whether code that the model brings along may run.

    Raises:
        ValueError: the folder holds no model, one of a class that transformers does not have, or masks of another; or
            a precision for "onnx".
        FileNotFoundError: scores of a checkpoint whose configuration is missing.
        ImportError: a package that ONNX needs is missing.
    """
    import transformers

    if format == "onnx" and precision is not None:
        raise ValueError(f"precision must be left out with the format 'onnx', which is float32, got {precision!r}")
    if not source.is_dir():
        raise ValueError(f"{str(source)!r} is not a folder")
    folder = model_of(source)
    check_model_folder(str(folder))
    settings = read_config(folder, trust_remote_code=trust_remote_code)
    kind = exported_class(folder, settings, trust_remote_code=trust_remote_code)
    model = kind.from_pretrained(folder, dtype=torch.float32 if format == "onnx" else "auto")
    config = config_of(source, folder.parent)
    _take_masks(model, folder, config)
    tokenizer = None
    if (folder / "tokenizer_config.json").exists():
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if format != "onnx":
        return export(model, output, format, config=config, processing_class=tokenizer, precision=precision)
    export_onnx(model.eval(), output, _example_inputs(model, tokenizer), processing_class=tokenizer)
    return output


def _take_masks(model: Any, folder: Path, config: SDPruneConfig | None) -> None:
    """Mask the layers of a model as its training checkpoint has them, in place; other folders have no masks."""
    if not any(folder.glob("model*.safetensors")):
        return
    files = WeightFiles.of(folder)
    for name in (key.removesuffix(".mask") for key in files.names() if key.endswith(".mask")):
        score = files.read(f"{name}.score") if f"{name}.score" in files else None
        if score is not None and config is None:
            raise FileNotFoundError(f"{folder.parent / CONFIG_NAME} is missing, which tells what the scores are")
        try:
            linear = model.get_submodule(name)
            shape = tuple(matrix(linear).shape)
            sides = (1, 1) if score is None else (shape[0] // score.shape[0], shape[1] // score.shape[1])
            layer = mask_layer(linear, block_shape=None if sides == (1, 1) else sides)
            layer.set_mask(BitMask(files.read(f"{name}.mask"), (shape[0], shape[1])))
        except (AttributeError, TypeError, ValueError) as error:
            file = files.file_of(f"{name}.mask")
            raise ValueError(f"{file}: {name}.mask does not fit the model of config.json: {error}") from None
        if config is not None and CRITERIA[config.criterion].gates:
            layer.gather_scores(hard_concrete=True)
            layer.score, layer.score_steps = score, files.read(f"{name}.score_steps")
        put_layer(model, name, layer)


def _example_inputs(model: Any, tokenizer: Any) -> dict[str, Tensor]:
    """Return tokens to trace a model with, under the names that its tokenizer returns."""
    if model.config.is_encoder_decoder:
        raise ValueError(f"format must not be 'onnx' for an encoder with a decoder, got {type(model).__name__}")
    ids = torch.arange(24).reshape(3, 8) % (model.config.vocab_size - 4) + 4
    values = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    named = ("input_ids", "attention_mask") if tokenizer is None else tokenizer.model_input_names
    taken = inspect.signature(model.forward).parameters
    return {name: values[name] for name in named if name in values and name in taken}
