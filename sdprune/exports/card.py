"""The model card (README.md) of an exported folder: where the model comes from, what it scores, where it loses."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from sdprune.exports.inspect import Inspection, LayerReport, inspect_folder
from sdprune.files import public_name, write_text
from sdprune.formats.files import VARIANT
from sdprune.formats.form import DENSE, INT8
from sdprune.text import markdown_table

CARD_NAME = "README.md"
TAGS = ("sdprune", "pruning", "sparse")
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


@dataclass(frozen=True)
class Speed:
    """One measurement: time of the dense base model over that of this one.

    Args:
        speedup: above 1 this model is faster.
        device: name of the device.
        dtype: of the weights, such as "float32".
        batch: rows of a batch.
        sequence: tokens of a row, padding included.
        form: what ran: "dense weights with zeros", or "sparse layers", in words.
    """

    speedup: float
    device: str
    dtype: str
    batch: int
    sequence: int
    form: str = "dense weights with zeros"


@dataclass(frozen=True)
class ModelCard:
    """What a card tells beside what the files themselves say.

    Args:
        base_model: hub id, or in words, of the model that was pruned; of a path the last part is told.
        method: in words or as the literature names it.
        data: the training and test data in words.
        seed: of the run.
        metrics: scores of this model on the test rows, fractions.
        dense_metrics: those of the model before pruning.
        speeds: what was measured.
        opponents: the same of the dense model as others run it: what this one has to beat.
        recipe: every setting, plain values.
        task: pipeline tag of the hub, such as "text-classification".
        dataset: hub id of the data, or None.
        unreached: fraction of the parameters that could not be pruned, such as experts that are stored as one tensor.
    """

    base_model: str
    method: str
    data: str
    seed: int
    metrics: Mapping[str, float]
    dense_metrics: Mapping[str, float]
    speeds: tuple[Speed, ...] = ()
    opponents: tuple[Speed, ...] = ()
    recipe: Mapping[str, Any] = field(default_factory=dict)
    task: str = "text-classification"
    dataset: str | None = None
    unreached: float = 0.0


def write_model_card(directory: str | Path, card: ModelCard) -> Path:
    """Write README.md into an exported folder; the table of layers comes from its files.

    With it the folder is a complete repository of the hub: `model.push_to_hub`, or
    `huggingface_hub.upload_folder(folder_path=directory, repo_id=...)`.

    Args:
        directory: what `export` wrote.
        card: what the files do not say.

    Returns:
        The file.

    Raises:
        ValueError: no model folder, or a damaged file.
        FileNotFoundError: config.json or weights are missing.
    """
    found = inspect_folder(directory)
    base = public_name(card.base_model)
    title = f"# {Path(base).name}, {1.0 - found.density:.0%} of its {_weights(found)} pruned"
    origin = (
        f"- Base model: {base}\n- Method: {card.method}\n- Data: {card.data}\n- Seed: {card.seed}\n"
        "- Made with sdprune; the whole recipe is at the end"
    )
    parts = [origin, _loading(found), _scores(card), _sparsity(card, found), _speed(card), _losses(card, found)]
    if any(layer.form != DENSE for layer in found.layers):
        small = inspect_folder(directory, VARIANT) if found.format == "compact" else found
        parts.insert(4, _forms(small))
    recipe = yaml.safe_dump(dict(card.recipe), sort_keys=False, allow_unicode=True)
    body = "\n\n".join((title, *parts, f"## Recipe\n\n```yaml\n{recipe}```"))
    path = Path(directory) / CARD_NAME
    write_text(path, f"---\n{_header(card, found)}\n---\n\n{body}\n")
    return path


def losing_cases(card: ModelCard) -> list[str]:
    """Say, one sentence each, which scores fell and where the model is not faster."""
    cases = [
        f"{name} is {card.dense_metrics[name] - value:.4f} lower than before pruning."
        for name, value in card.metrics.items()
        if name in card.dense_metrics and value < card.dense_metrics[name]
    ]
    cases += [
        f"{_where(speed)}, as {speed.form}: {speed.speedup:.2f} times the speed of the dense model, no gain."
        for speed in card.speeds
        if speed.speedup <= 1.0
    ]
    cases += [
        f"{_where(other)}, the {other.form} has {other.speedup:.2f} times its speed in torch: faster than this model."
        for other in card.opponents
        if any(other.speedup > speed.speedup for speed in card.speeds if _place(speed) == _place(other))
    ]
    return cases


def _header(card: ModelCard, found: Inspection) -> str:
    """The YAML header of the hub; a local folder is no base model there."""
    on_hub = _HUB_ID.fullmatch(card.base_model) is not None and not Path(card.base_model).exists()
    name = Path(found.directory).name if Path(found.directory).name != "model" else Path(card.base_model).name
    data: dict[str, Any] = {"task_type": card.task, "dataset_name": card.data, "dataset_type": card.dataset or "other"}
    results = [
        EvalResult(metric_type=metric, metric_name=metric, metric_value=round(float(value), 6), **data)
        for metric, value in sorted(card.metrics.items())
    ]
    return ModelCardData(
        library_name="transformers",
        pipeline_tag=card.task,
        base_model=card.base_model if on_hub else None,
        datasets=[card.dataset] if card.dataset else None,
        tags=list(TAGS),
        metrics=sorted(card.metrics) or None,
        model_name=name if results else None,
        eval_results=results or None,
    ).to_yaml()


def _loading(found: Inspection) -> str:
    _, marker, head = (found.architecture or "").rpartition("For")
    kind = found.own_code or (f"AutoModelFor{head}" if marker else "AutoModel")
    before, variant = "", ""
    text = "The weights are dense with exact zeros: no other package is needed for the right outputs."
    if found.variant is not None:
        before, variant = "import sdprune  # without it the weights would be random\n", f', variant="{found.variant}"'
        text = (
            "**There are no dense weights here. Without the package transformers merely warns and loads random ones.**"
        )
    elif found.format in ("portable", "compact"):
        text += " After `import sdprune` the pruned layers are loaded as sparse or narrower ones."
    if found.variant is None and found.format == "compact":
        text += (
            ' The same model in fewer bytes: `variant="compact"`, after `import sdprune`. Never load that variant '
            "without the package."
        )
    if found.own_code is not None:
        variant += ", trust_remote_code=True"
        text += " The code of the model is in this repository: read it before you trust it."
    code = f"{before}from transformers import {kind}\n\nmodel = {kind}.from_pretrained(FOLDER_OR_ID{variant})"
    return f"## Use\n\n```python\n{code}\n```\n\n{text}"


def _scores(card: ModelCard) -> str:
    if not card.metrics:
        return "## Scores\n\nNone were measured."
    dense = {name: f"{value:.4f}" for name, value in card.dense_metrics.items()}
    rows = [(name, dense.get(name, ""), f"{value:.4f}") for name, value in card.metrics.items()]
    return "## Scores\n\n" + markdown_table([("metric", "dense", "pruned"), *rows])


def _sparsity(card: ModelCard, found: Inspection) -> str:
    groups: dict[str, list[LayerReport]] = {}
    for layer in found.layers:
        groups.setdefault(layer.structure, []).append(layer)
    rows = [("structure of the zeros", "layers", "weights left")]
    for structure, layers in groups.items():
        total = sum(layer.shape[0] * layer.shape[1] for layer in layers)
        left = sum(layer.density * layer.shape[0] * layer.shape[1] for layer in layers)
        rows.append((structure, str(len(layers)), f"{left / total:.1%}"))
    heads = sum(layer.dead_heads for layer in found.layers)
    unreached = (
        f"\n\n{card.unreached:.1%} of the model's parameters were out of reach: weights in its layers that belong to "
        "no linear layer, such as experts that are stored as one tensor. They are dense."
    )
    return (
        f"## Sparsity\n\n{1.0 - found.density:.2%} of {_all_weights(found)} are exactly zero.\n\n"
        f"{markdown_table(rows)}\n\n"
        f"Empty rows: {sum(layer.dead_rows for layer in found.layers)}; empty attention heads: {heads}."
        f"{unreached if card.unreached else ''}"
    )


def _forms(found: Inspection) -> str:
    """What the layers are loaded as, with their bytes where the files hold that form."""
    groups: dict[str, list[LayerReport]] = {}
    for layer in found.layers:
        groups.setdefault(layer.form, []).append(layer)
    rows = [("loaded after `import sdprune` as", "layers", "bytes" if found.variant else "bytes, stored dense")]
    rows += [(form, str(len(layers)), f"{sum(layer.bytes for layer in layers):,}") for form, layers in groups.items()]
    text = ""
    if any(layer.precision == INT8 for layer in found.layers):
        text = (
            "\n\nLayers in int8 have one scale for each output, and round what comes into them to 8 bits, token by "
            "token. The dense weights are the integers times these scales."
        )
    return f"## Forms\n\n{markdown_table(rows)}{text}"


def _weights(found: Inspection) -> str:
    return "linear weights" if found.architecture else "matrices"  # which are linear, only known classes tell


def _all_weights(found: Inspection) -> str:
    return "the weights of all linear layers" if found.architecture else "all weights in matrices, embeddings included,"


def _where(speed: Speed) -> str:
    return f"On {speed.device} in {speed.dtype}, batch {speed.batch} x {speed.sequence} tokens"


def _place(speed: Speed) -> tuple[str, int, int]:
    return speed.device, speed.batch, speed.sequence


def _speed(card: ModelCard) -> str:
    if not card.speeds:
        return "## Speed\n\nNot measured. Zeros in dense weights alone never make a product faster."
    rows = [("device", "dtype", "batch", "sequence", "what ran", "times as fast")]
    for speed in (*card.speeds, *card.opponents):
        size = (str(speed.batch), str(speed.sequence))
        rows.append((speed.device, speed.dtype, *size, speed.form, f"{speed.speedup:.2f}"))
    return f"## Speed\n\n{markdown_table(rows)}\n\nAgainst the dense base model on the same device, medians."


def _losses(card: ModelCard, found: Inspection) -> str:
    cases = losing_cases(card)
    if all(layer.structure in ("unstructured", "dense") for layer in found.layers):
        cases.append("Its zeros have no structure that a product could skip: dense products take as long as before.")
    cases.append("It was tested only on the data named above; pruning can cost more on other data than these scores.")
    return "\n".join(["## Where it loses", "", *(f"- {case}" for case in cases)])
