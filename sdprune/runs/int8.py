"""Int8 in training: weights and inputs of pruned layers are rounded as torchao will round them; zeros stay zeros."""

import copy
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sdprune.masking.layers import MaskedLinear
from sdprune.masking.swap import masked_layers
from sdprune.runs.predict import best_device


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
        import torch
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
