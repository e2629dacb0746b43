"""What comes of a run: every model is exported once, loaded once in a fresh process and scored there.

Of this are made its row in `metrics.json`, its card, and the report.
"""

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from sdprune.analysis.report import RunRecord, write_report
from sdprune.config import SDPruneConfig, split_term
from sdprune.exports.card import ModelCard, Speed, write_model_card
from sdprune.exports.export import export
from sdprune.files import public_name, write_text
from sdprune.formats.model_config import read_config
from sdprune.layers.forms import plain_copy
from sdprune.layers.pruned import PrunedLinear
from sdprune.masking.pruner import Sparsity, measure_sparsity
from sdprune.masking.schedule import pruning_moments
from sdprune.masking.select import select_linears
from sdprune.methods.objectives import OBJECTIVES
from sdprune.recipe import Recipe
from sdprune.runs.fresh import fresh_logits
from sdprune.runs.predict import best_device, speedup
from sdprune.runs.workbench import BUNDLED_MODEL, TRAINED, Workbench
from sdprune.speed.opponents import opponent_speedups
from sdprune.speed.timing import device_name
from sdprune.training.folder import METRICS_NAME, SCORES_NAME

GLUE = "nyu-mll/glue"
GLUE_TASKS = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli")
BUNDLED_ID = "sentence-transformers/all-MiniLM-L6-v2"


def method_name(config: SDPruneConfig) -> str:
    """Name a configuration as the literature does: "SDP-CC", "SDP-CC + SDP-KLD", "movement + SDP-KLD", or "magnitude"
    alone. What prunes nothing is "fine-tuned", or "distilled" by its objectives. A representation that an objective
    names itself follows it: "SDP-CC + MSE (logits)".
    """
    objectives = " + ".join(_term_name(term) for term in config.distillation_weights)
    if config.target_sparsity == 0.0:
        return f"distilled, {objectives}" if objectives else "fine-tuned"
    if objectives and config.criterion == SDPruneConfig.criterion:
        return objectives
    return f"{config.criterion} + {objectives}" if objectives else config.criterion


def _term_name(term: str) -> str:
    objective, feature = split_term(term)
    return (OBJECTIVES[objective].label or objective) + (f" ({feature.replace('@', ' of layer ')})" if feature else "")


@dataclass(frozen=True)
class Assessment:
    """What a model is worth.

    Args:
        row: its row of `runs` in `metrics.json`.
        logits: on the test rows, of `predict`.
        sparsity: zeros counted in the weights.
    """

    row: dict[str, Any]
    logits: NDArray[np.float32]
    sparsity: Sparsity


class Results:
    """Gathers what the models of a run are worth, and writes it.

    Args:
        workbench: the data.
        dense: the model before pruning, to be timed beside every other one.
        scores: of the dense model on the test rows.
        bf16: whether models are scored in bfloat16 autocast.
        base_model: what cards call the model before pruning; None: as the recipe names it.

    Attributes:
        metrics: what `metrics.json` will hold.
        records: the trainings that the report shows.
    """

    def __init__(
        self,
        workbench: Workbench,
        dense: nn.Module,
        scores: dict[str, float],
        *,
        bf16: bool = False,
        base_model: str | None = None,
    ) -> None:
        self.workbench, self.dense, self.bf16, self.base_model = workbench, dense, bf16, base_model
        self.metrics: dict[str, Any] = {"dense": scores, "baselines": {}, "runs": []}
        self.records: list[RunRecord] = []

    @cached_property
    def opponents(self) -> dict[str, float]:
        """What `opponent_speedups` finds of the dense model on the probe, measured once for all models of a run."""
        return opponent_speedups(self.dense, self.workbench.probe)

    @torch.inference_mode()
    def add(self, model: Any, config: SDPruneConfig, recipe: Recipe, folder: Path, *, name: str = "") -> Assessment:
        """Export a model, have a fresh process load and score it, and write its card; its row is the last of `runs`.

        Args:
            model: masked or dense, perhaps in the middle of its training; it stays as it is.
            config: how it is pruned, with the sparsity it has reached as its target.
            recipe: what was carried out, for the card.
            folder: for the exported files; one that exists is taken for that model's export.
            name: of the method; "": as the configuration says.
        """
        workbench, probe = self.workbench, self.workbench.probe
        trusted = workbench.trust_remote_code
        if not folder.exists():
            wanted = recipe.files.export_dtype
            dtype = workbench.classifier.dtype if wanted is None else getattr(torch, wanted)
            source = model if model.dtype == dtype else copy.deepcopy(plain_copy(model)).to(dtype)
            export(source, folder, config=config, processing_class=workbench.classifier.tokenizer)
        settings = read_config(folder, trust_remote_code=trusted)
        # A model under training may run in autocast; its dense copy runs in fp32, as a user would load it.
        memory = type(model)(copy.deepcopy(model.config))
        memory.load_state_dict(plain_copy(model).state_dict())
        memory = memory.to(settings.dtype).float().eval()  # rounded as the file is
        batches = [inputs for part in workbench.batches.values() for inputs in part.inputs]
        text = f"testing {folder.name}"
        found, outputs = fresh_logits(
            folder, probe, batches, bf16=self.bf16, trust_remote_code=trusted, description=text
        )
        logits = workbench.gathered(outputs)
        sparsity = measure_sparsity(memory, select_linears(memory, config))
        timed = memory
        # a tagged export becomes other layers for those who have this package
        if hasattr(settings, "quantization_config"):
            with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
                timed = type(memory).from_pretrained(folder, dtype=torch.float32)
        sparse = any(isinstance(module, PrunedLinear) for module in timed.modules())
        row = {
            "method": name or method_name(config),
            "structure": config.structure,
            "target_sparsity": config.target_sparsity,
            "sparsity": sparsity.linear,
            "model_sparsity": sparsity.model,
            "unreached": sparsity.unreached_share,
            **workbench.score(logits),
            "reload_max_difference": float((found - memory(**probe).logits).abs().max()),
            "speedup": speedup(self.dense, timed, probe),
            "form": "sparse layers" if sparse else Speed.form,
            "device": best_device().type,
            "opponents": self.opponents,
        }
        if workbench.task.zero_shot:
            row["languages"] = workbench.score_languages(logits)
        self.metrics["runs"].append(row)
        card = card_of(recipe, workbench, row, self.metrics["dense"], base_model=self.base_model)
        write_model_card(folder, card)
        return Assessment(row, logits[TRAINED], sparsity)

    def record(self, name: str, folder: Path, config: SDPruneConfig, sparsity: Sparsity | None) -> None:
        """Gather what the report shows of a training, and of the zeros that it left, from its folder."""
        lines = (folder / METRICS_NAME).read_text(encoding="utf-8").splitlines()
        history = tuple(json.loads(line) for line in lines)
        moments = pruning_moments(config, max((row["step"] for row in history), default=0))
        zeros = sparsity.layers if sparsity is not None and config.target_sparsity > 0.0 else {}
        densities = {layer: 1.0 - value for layer, value in zeros.items()}
        self.records.append(RunRecord(name, history, moments, densities))

    def write(self, output: Path, *, title: str, notes: Sequence[str] = ()) -> dict[str, Any]:
        """Write `metrics.json` and the report into a folder, and return what the first one holds."""
        write_text(output / SCORES_NAME, json.dumps(self.metrics, indent=2) + "\n")
        write_report(output, self.metrics, self.records, title=title, notes=notes)
        return self.metrics


def card_of(
    recipe: Recipe,
    workbench: Workbench,
    row: Mapping[str, Any],
    dense: Mapping[str, float],
    *,
    base_model: str | None = None,
) -> ModelCard:
    """Gather a card.

    Args:
        recipe: what was carried out.
        workbench: the model and its data.
        row: of `runs` in `metrics.json`.
        dense: scores of the model before pruning.
        base_model: what to call that model; None: as the recipe names it.
    """
    task = workbench.task
    base_model = base_model or (BUNDLED_ID if recipe.model == BUNDLED_MODEL else recipe.model)
    rows, tokens = next(iter(workbench.probe.values())).shape[:2]
    splits = f"{len(task.train)} training, {len(task.validation)} validation and {len(task.test)} test rows"
    device, form = device_name(best_device()), row.get("form", Speed.form)
    speed = Speed(row["speedup"], device, "float32", int(rows), int(tokens), form)
    return ModelCard(
        base_model=base_model,
        method=_card_method(recipe, row),
        data=f"{public_name(task.name)}: {splits}",
        seed=recipe.pruning.seed,
        metrics={name: row[name] for name in task.metrics},
        dense_metrics={name: dense[name] for name in task.metrics},
        speeds=(speed,),
        opponents=tuple(_opponent(speed, name, value) for name, value in row.get("opponents", {}).items()),
        recipe={name: public_name(value) for name, value in (recipe.to_dict() | {"model": base_model}).items()},
        task="token-classification" if task.tagged else "text-classification",
        unreached=row.get("unreached", 0.0),
        dataset=GLUE if recipe.data.data in GLUE_TASKS else None,
    )


def _opponent(speed: Speed, name: str, value: float) -> Speed:
    """The same place for the dense model in a runtime and a precision, "ONNX Runtime int8"."""
    runtime, _, dtype = name.rpartition(" ")
    return replace(speed, speedup=value, dtype=dtype, form=f"dense model in {runtime}")


def _structure_name(config: SDPruneConfig) -> str:
    blocks = f"blocks of {config.block_shape[0]}x{config.block_shape[1]}"
    named = {"block": blocks, "hybrid": f"neurons, {blocks}", "n:m": f"{config.n}:{config.m}"}
    return named.get(config.structure, config.structure)


def _card_method(recipe: Recipe, row: Mapping[str, Any]) -> str:
    if not row["target_sparsity"]:
        return f"{row['method']}, not pruned"
    structure = _structure_name(recipe.pruning)
    if recipe.stages.pipeline == "prune" and recipe.pruning.distillation_weights:
        return (
            f"self-distilled pruning ({row['method']}, {structure}), "
            "https://arxiv.org/abs/2109.15014, as reconstructed in sdprune"
        )
    return f"pruning ({row['method']}, {structure})"
