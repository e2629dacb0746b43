"""The teacher: a frozen, unpruned model in eval mode."""

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sdprune.distillation.features import Features, body_output, gather, need_hidden_states, token_mask
from sdprune.masking.pruner import masked_fraction
from sdprune.masking.swap import unswap


class Teacher:
    """A frozen model in eval mode. It is no submodule of the student: nothing saves, trains or switches it.

    Args:
        model: the model to copy from (a student before pruning) or to use (another model).
        copy_model: whether to copy it. A copy leaves its masks behind.
        dtype: float type of its weights; None: as they are.

    Raises:
        ValueError: the model to copy is pruned already, or cannot be copied.
    """

    def __init__(self, model: nn.Module, *, copy_model: bool, dtype: torch.dtype | None = None) -> None:
        if copy_model:
            if masked_fraction(model) > 0.0:
                raise ValueError(
                    f"teacher_model is None and the model is pruned already (sparsity {masked_fraction(model):.4f}), "
                    "so no unpruned copy of it can be made; pass teacher_model"
                )
            model = unswap(_copied(model))
        self.dtype = dtype
        self.model = model.requires_grad_(False).to(dtype).eval()

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Any], names: Iterable[str]) -> Features:
        """Run the teacher on a batch, without labels, and return the named features of `sdprune.distillation.features`.

        A model with an encoder and a decoder gets the decoder's input tokens from the labels, as the student does.
        """
        self.model.eval()
        names = tuple(names)
        arguments = {key: self._converted(value) for key, value in inputs.items() if key != "labels"}
        if need_hidden_states(names):
            arguments["output_hidden_states"] = True
        labels = inputs.get("labels")
        shift = getattr(self.model, "prepare_decoder_input_ids_from_labels", None)
        if shift is not None and labels is not None and "decoder_input_ids" not in inputs:
            arguments["decoder_input_ids"] = shift(labels)
        with body_output(self.model) as bodies:
            outputs = self.model(**arguments)
        return gather(names, outputs.logits, bodies, token_mask(inputs, self.model))

    def _converted(self, value: Any) -> Any:
        if self.dtype is not None and isinstance(value, Tensor) and value.is_floating_point():
            return value.to(self.dtype)
        return value


def _copied(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except (RuntimeError, TypeError) as error:  # torch.nn.utils.prune leaves such tensors; hooks may hold an open file
        reason = str(error).split("\n", 1)[0]
        raise ValueError(
            f"teacher_model is None, and the model cannot be copied ({reason}); pass teacher_model"
        ) from error
