"""Attention on the compiled engine of a CPU, under transformers' own switch for how a model attends."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface, PreTrainedModel

from sdp_kernels import cpu_engine
from sdp_kernels.dispatch import is_watched, needs_gradient
from sdprune.layers.dense import Model, sharing_copy

NAME, TORCHS = "sdprune", "sdpa"  # as transformers' configurations call them
MOST_KEYS = 4096  # whose scores are held for some queries at a time


def with_blocked_attention(model: Model) -> Model | None:
    """Return a copy around the same tensors that attends on the compiled engine; None where that cannot be."""
    if not isinstance(model, PreTrainedModel) or model.config._attn_implementation != TORCHS:
        return None
    if model.device.type != "cpu" or not cpu_engine.is_compiled(torch.float32):
        return None
    made = sharing_copy(model)
    made.set_attn_implementation(NAME)
    return made if made.config._attn_implementation == NAME else None


def blocked_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What transformers calls instead of `sdpa_attention_forward`, with its arguments and results.

    That is called itself for what the engine does not do: gradients, dropout, causal attention without a mask, groups
    of heads with keys in common, and where somebody watches operators, such as `torch.compile`.
    """
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    plain = (
        dropout == 0.0
        and all(given is None or given is False for given in others.values())
        and not (causal and attention_mask is None and query.shape[2] > 1)
    )
    if not plain or not _takes(query, key, value, attention_mask, scale):
        rest = (attention_mask, dropout, scaling, is_causal)
        found: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, *rest, **others)
        return found
    output = cpu_engine.attention(query, key, value, attention_mask, scale)
    return output.transpose(1, 2), None


def _takes(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> bool:
    """Whether the engine computes this."""
    tensors = (query, key, value)
    return (
        not is_watched(*tensors)  # first of all: who traces this looks into the rest too
        and all(tensor.device.type == "cpu" and cpu_engine.is_compiled(tensor.dtype) for tensor in tensors)
        and query.shape[:2] == key.shape[:2] == value.shape[:2]
        and 0 < key.shape[2] <= MOST_KEYS
        and query.numel() > 0
        and scale > 0.0
        and (mask is None or (mask.dim() == 4 and not needs_gradient(mask)))
        and not needs_gradient(*tensors)
    )


AttentionInterface.register(NAME, blocked_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
