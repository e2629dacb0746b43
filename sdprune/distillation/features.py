"""What a model says of a batch, reduced to what the objectives compare.

A feature has a name: "logits", "pooled", or what is read from a hidden state: "first", "mean" or "tokens", with the
layer behind an "@" where it is not the final output of the body ("mean@3").
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from sdprune.config import HIDDEN_REPRESENTATIONS, SDPruneConfig, split_term

Features = dict[str, Tensor]
IGNORED_LABEL = -100


def row_names(config: SDPruneConfig, term: str = "") -> tuple[str, ...]:
    """Return the names of the features whose rows a term of `config.distillation` compares.

    They are those that the term names itself, otherwise (and by default) those of `representation`.
    """
    feature = split_term(term)[1] or config.representation
    if config.hidden_layers is None or feature not in HIDDEN_REPRESENTATIONS:
        return (feature,)
    return tuple(f"{feature}@{layer}" for layer in config.hidden_layers)


def need_hidden_states(names: Iterable[str]) -> bool:
    """Tell whether a feature needs more hidden states than the final output."""
    return any("@" in name for name in names)


def body_of(model: nn.Module) -> nn.Module:
    """Return the part of a model that makes the hidden states, without the head."""
    body = getattr(model, getattr(model, "base_model_prefix", ""), None)
    if body is None and getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        body = cast(Any, model).get_decoder()  # T5 names no part that holds its two stacks
    return model if body is None else body


@contextmanager
def body_output(model: nn.Module) -> Iterator[list[Any]]:
    """Collect what the body of the model returns while the block runs.

    A hook, because the outputs of a classification model hold no pooled output and all hidden states or none.
    """
    outputs: list[Any] = []
    handle = body_of(model).register_forward_hook(lambda module, inputs, output: outputs.append(output))
    try:
        yield outputs
    finally:
        handle.remove()


def gather(names: Iterable[str], logits: Tensor, bodies: list[Any], mask: Tensor | None) -> Features:
    """Return the named features of one forward pass.

    Args:
        names: names of features.
        logits: (batch, classes) or (batch, length, classes), of the model.
        bodies: what `body_output` collected.
        mask: (batch, length) bool of `token_mask`.

    Returns:
        "logits" as they are, "tokens" (batch, length, dim), the others (batch, dim).

    Raises:
        ValueError: the body ran not once, "pooled" with a model that has no pooler, or a mask of another length than
            the hidden state.
    """
    if len(bodies) != 1:
        raise ValueError(f"the body of the model ran {len(bodies)} times in one forward pass; 1 is needed")
    (body,) = bodies
    return {name: logits if name == "logits" else _read(name, body, mask) for name in names}


def _read(name: str, body: Any, mask: Tensor | None) -> Tensor:
    kind, _, layer = name.partition("@")
    if kind == "pooled":
        pooled: Tensor | None = getattr(body, "pooler_output", None)
        if pooled is None:
            raise ValueError("representation='pooled', but the model has no pooler; choose first, mean or tokens")
        return pooled
    hidden = _hidden_states(body)[int(layer)] if layer else body[0]
    if mask is not None and mask.shape != hidden.shape[:2]:
        raise ValueError(
            f"representation={kind!r} needs one hidden state a token: the attention mask has shape "
            f"{tuple(mask.shape)}, the hidden state {tuple(hidden.shape)}"
        )
    return reduce_tokens(hidden, mask, kind)


def _hidden_states(body: Any) -> tuple[Tensor, ...]:
    for attribute in ("hidden_states", "decoder_hidden_states"):
        found: tuple[Tensor, ...] | None = getattr(body, attribute, None)
        if found is not None:
            return found
    raise ValueError(f"hidden_layers: {type(body).__name__}, the output of the model's body, holds no hidden states")


def reduce_tokens(hidden: Tensor, mask: Tensor | None, kind: str) -> Tensor:
    """Return the "first" unpadded token, the "mean" over unpadded tokens (batch, dim), or all "tokens" as they are.

    Args:
        hidden: (batch, length, dim).
        mask: (batch, length), 0 = padding; None: no padding.
        kind: "first", "mean" or "tokens".
    """
    if kind == "tokens":
        return hidden
    if kind == "first":
        if mask is None:
            return hidden[:, 0]
        first = mask.to(torch.int32).argmax(1)  # not position 0 where the padding stands on the left
        return hidden[torch.arange(len(hidden), device=hidden.device), first]
    dtype = torch.promote_types(hidden.dtype, torch.float32)  # a sum over many tokens may pass what fp16 holds
    if mask is None:
        return hidden.mean(1, dtype=dtype).to(hidden.dtype)
    kept = hidden.masked_fill((mask == 0).unsqueeze(-1), 0.0)  # no product: padding may hold NaN
    return (kept.sum(1, dtype=dtype) / mask.sum(1, keepdim=True).clamp(min=1)).to(hidden.dtype)


def token_mask(inputs: Mapping[str, Any], model: nn.Module) -> Tensor | None:
    """Return which positions of the hidden states are no padding, (batch, length) bool, or None for all of them.

    With an encoder and a decoder these are the decoder's: those with a label where it has no mask of its own.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        labels = inputs.get("labels")
        if "decoder_attention_mask" in inputs:
            return _bool(inputs["decoder_attention_mask"])
        if labels is not None and labels.dim() == 2:
            return _bool(labels != IGNORED_LABEL)
    mask = inputs.get("attention_mask")
    return None if mask is None else _bool(mask)


def _bool(mask: Tensor) -> Tensor:
    return mask.to(torch.bool)


def predicts_next_token(model: nn.Module) -> bool:
    """Tell whether logits at one position speak of the label at the next one: a decoder alone that generates."""
    config = getattr(model, "config", None)
    generates = getattr(model, "can_generate", None)
    return bool(generates is not None and generates() and not getattr(config, "is_encoder_decoder", False))


def logit_mask(logits: Tensor, inputs: Mapping[str, Any], mask: Tensor | None, model: nn.Module) -> Tensor | None:
    """Return which positions' logits count, (batch, length) bool; None: all, or there is one prediction an example.

    Left out are padding and positions whose label is ignored (-100). Where the logits speak of the next token, that
    token's label and padding decide, and the last position, which has none, is left out.

    Args:
        logits: (batch, classes) or (batch, length, classes).
        inputs: the batch, with labels if there are any.
        mask: of `token_mask`.
        model: whose logits they are.
    """
    if logits.dim() == 2:
        return None
    counted = None if mask is None or mask.shape != logits.shape[:2] else mask
    labels = inputs.get("labels")
    if labels is not None and labels.shape == logits.shape[:2]:
        labelled = labels != IGNORED_LABEL
        counted = labelled if counted is None else counted & labelled
    if not predicts_next_token(model):
        return counted
    if counted is None:
        counted = torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device)
    following = torch.cat((counted[:, 1:], torch.zeros_like(counted[:, :1])), dim=1)
    return following if mask is None else following & mask
