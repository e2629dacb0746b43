"""Pruning, int8 quantization and distillation, one after the other: PQK, and prune-quantize-distill.

In both the first stage prunes by the task loss alone, later ones keep the zeros, and the last one distils. Weights are
trained and exported unrounded; in the stages with int8 they are rounded as torchao will round them.
"""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sdprune.config import SDPruneConfig
from sdprune.masking.layers import MaskedLinear
from sdprune.masking.select import select_linears
from sdprune.masking.swap import masked_layers
from sdprune.runs.predict import best_device
from sdprune.runs.stages import StageResult, Stages, without_pruning, without_teacher


@dataclass(frozen=True)
class QuantizedResult:
    """What `run_quantized` returns.

    Args:
        model: the pruned model with unrounded weights, which are exported.
        int8: the same model with int8 layers.
        directory: folder of the last stage.
    """

    model: nn.Module
    int8: nn.Module
    directory: Path


Run = Callable[..., StageResult]


def pqk(run: Run, model: Any, config: SDPruneConfig) -> StageResult:
    """Prune with quantization-aware training, then let the full network teach the pruned one.

    PQK (Kim, Chang and Kwak 2021, https://arxiv.org/abs/2106.14681), a reconstruction from its abstract: the teacher
    is the network with the pruned weights put back and trained on the task, so that no other model is needed.
    """
    names, original = select_linears(model, config), copy.deepcopy(model)
    pruned = run("pruned", model, without_teacher(config), int8=True)
    full = _put_back(pruned.model, original, names)
    teacher = run("teacher", full, without_pruning(without_teacher(config)))
    return run("student", pruned.model, _zeros_kept(config), int8=True, teacher_model=teacher.model)


def prune_quantize_distill(run: Run, model: Any, config: SDPruneConfig) -> StageResult:
    """Prune, then train with int8 quantization, then distil from the dense model, in that order.

    After Prune-Quantize-Distill (https://arxiv.org/abs/2604.04988), a reconstruction from its abstract.
    """
    select_linears(model, config)  # refused before it is copied
    original, kept = copy.deepcopy(model), _zeros_kept(config)
    pruned = run("pruned", model, without_teacher(config))
    rounded = run("quantized", pruned.model, without_teacher(kept), int8=True)
    return run("distilled", rounded.model, kept, int8=True, teacher_model=original)


def run_quantized(
    pipeline: Callable[[Run, Any, SDPruneConfig], StageResult],
    model: Any,
    config: SDPruneConfig,
    *,
    args: TrainingArguments,
    retraining_args: TrainingArguments,
    callbacks: Any = (),
    **inputs: Any,
) -> QuantizedResult:
    """Carry out `pqk` or `prune_quantize_distill`.

    Args:
        pipeline: one of the two; it gets what runs a stage.
        model: a fine-tuned transformers model; changed in place.
        config: what is pruned; the distillation fields are those of the last stage.
        args: of the first stage; as of `prune`.
        retraining_args: of the later stages.
        callbacks: more callbacks.
        **inputs: the other arguments of `prune`.

    Raises:
        ImportError: torchao is absent.
        ValueError: as of `prune`; nothing is distilled, or nothing is pruned.
    """
    check_torchao()
    if not config.distillation_weights:
        raise ValueError("distillation is None, but the last stage learns by it; choose 'kl' or another objective")
    if config.target_sparsity == 0.0:
        raise ValueError("target_sparsity is 0, but the first stage prunes; choose one above 0")
    stages = Stages(Path(str(args.output_dir)), config.to_dict(), resume=bool(args.resume_from_checkpoint))

    def run(name: str, model: Any, config: SDPruneConfig, *, int8: bool = False, **more: Any) -> StageResult:
        own = [*([QuantizationCallback()] if int8 else []), *callbacks]
        settings = args if name == "pruned" else retraining_args
        return stages.run(name, model, config, args=settings, callbacks=own, **inputs, **more)

    last = pipeline(run, model, config)
    return QuantizedResult(last.model, quantize(last.model, select_linears(last.model, config)), last.directory)


def _zeros_kept(config: SDPruneConfig) -> SDPruneConfig:
    """Return a configuration that finds the zeros of a pruned model at its first step, and keeps them.

    The weights of least magnitude are the zeros, and there are as many of them as the target asks for.
    """
    return replace(
        config,
        criterion="magnitude",
        schedule="one_shot",
        pruning_steps=1,
        start_ratio=0.0,
        end_ratio=0.0,
        lr_restarts=False,
    )


@torch.no_grad()
def _put_back(pruned: Any, original: Any, names: list[str]) -> Any:
    """Return a copy of the pruned model with the original values where it has zeros."""
    full = copy.deepcopy(pruned)
    for name in names:
        weight = full.get_parameter(f"{name}.weight")
        weight.copy_(torch.where(weight == 0, original.get_parameter(f"{name}.weight").to(weight), weight))
    return full


def check_torchao() -> None:
    """Raise ImportError that says what to install, if torchao is absent."""
    try:
        import torchao.quantization.qat  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"int8 quantization needs torchao ({error}); install it with: pip install 'sdprune[quantize]'"
        ) from None


class QuantizedMaskedLinear(MaskedLinear):
    """A masked linear layer that computes with weights and inputs rounded to int8, as it will be deployed.

    Weights: symmetric, one scale a row, so that 0 is rounded to 0. Inputs: asymmetric, one scale a token. Gradients
    pass through the rounding unchanged (straight-through, https://arxiv.org/abs/1308.3432). The weights that are
    trained and saved stay unrounded; `quantize` rounds them to the very numbers that were trained with.
    """

    @classmethod
    def convert(cls, layer: MaskedLinear) -> None:
        """Make `layer` one that rounds, in place: everything that it holds stays.

        Raises:
            ValueError: a layer whose pruned weights or gates take part in the training.
        """
        from torchao.quantization.qat import IntxFakeQuantizeConfig, IntxFakeQuantizer

        if type(layer) is not MaskedLinear or layer.keep_pruned_values or layer.gathering:
            raise ValueError(
                f"int8 training rounds masked nn.Linear layers whose zeros are in place, got {layer}; choose the "
                "criterion 'magnitude' or another that needs no gradients"
            )
        layer.__class__ = cls
        # plain attributes: as submodules they would be listed among the model's layers
        rounded = {
            "round_weight": IntxFakeQuantizer(IntxFakeQuantizeConfig(torch.int8, "per_channel", is_symmetric=True)),
            "round_input": IntxFakeQuantizer(IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)),
        }
        layer.__dict__.update(rounded)

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer to rows in the last dimension of `input`."""
        weight = self.__dict__["round_weight"](self.weight * self.bit_mask.to_bool())
        return functional.linear(self.__dict__["round_input"](input), weight, self.bias)


class QuantizationCallback(TrainerCallback):
    """Quantization-aware training of the masked layers. Must come after `SDPruneCallback`, which makes them.

    Raises:
        ImportError: torchao is absent.
    """

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Make the masked layers round."""
        check_torchao()
        model: nn.Module = kwargs["model"]
        for layer in masked_layers(model).values():
            QuantizedMaskedLinear.convert(layer)


def quantize(model: nn.Module, names: Iterable[str]) -> nn.Module:
    """Return a copy of a dense model whose named linear layers hold int8 weights and round their inputs (torchao).

    It computes what `QuantizedMaskedLinear` computed in training. An exported model is quantized the same way by
    plain transformers: `TorchAoConfig(Int8DynamicActivationInt8WeightConfig(act_mapping_type=ASYMMETRIC))`.

    Args:
        model: a model with dense layers, zeros in place; the copy goes to the accelerator where there is one.
        names: the layers.

    Raises:
        ImportError: torchao is absent.
    """
    check_torchao()
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    from torchao.quantization.quant_primitives import MappingType

    names = set(names)
    model = copy.deepcopy(model).to(best_device()).float().eval()
    config = Int8DynamicActivationInt8WeightConfig(act_mapping_type=MappingType.ASYMMETRIC, version=2)
    quantize_(model, config, filter_fn=lambda module, name: name in names)
    return model
