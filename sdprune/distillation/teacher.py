"""The teacher: a frozen, unpruned model in eval mode, and what a model says of a batch."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sdprune.masking.pruner import masked_fraction
from sdprune.masking.swap import unswap


@dataclass
class Signals:
    """What a model says of a batch.

    Args:
        logits: (batch, classes).
        hidden: (batch, length, dim), the last hidden state.
        pooled: (batch, dim), the pooled output, where the model has one.
    """

    logits: Tensor
    hidden: Tensor
    pooled: Tensor | None


@contextmanager
def body_output(model: nn.Module) -> Iterator[list[Any]]:
    """Collect what the body of the model (without its head) returns while the block runs.

    A hook, because the outputs of a classification model hold no pooled output and all hidden states or none.
    """
    outputs: list[Any] = []
    body = getattr(model, getattr(model, "base_model_prefix", ""), model)
    handle = body.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    try:
        yield outputs
    finally:
        handle.remove()


def signals(logits: Tensor, bodies: list[Any]) -> Signals:
    """Gather the signals of one forward pass from its logits and the outputs of its body."""
    if len(bodies) != 1:
        raise ValueError(f"the body of the model ran {len(bodies)} times in one forward pass; 1 is needed")
    return Signals(logits, bodies[0][0], getattr(bodies[0], "pooler_output", None))


class Teacher:
    """A frozen model in eval mode. It is no submodule of the student: nothing saves, trains or switches it.

    Args:
        model: the model to copy from (a student before pruning) or to use (another model).
        copy_model: whether to copy it. A copy leaves its masks behind.

    Raises:
        ValueError: the model to copy is pruned already.
    """

    def __init__(self, model: nn.Module, *, copy_model: bool) -> None:
        if copy_model:
            if masked_fraction(model) > 0.0:
                raise ValueError(
                    f"teacher_model is None and the model is pruned already (sparsity {masked_fraction(model):.4f}), "
                    "so no unpruned copy of it can be made; pass teacher_model"
                )
            model = unswap(copy.deepcopy(model))
        self.model = model.requires_grad_(False).eval()

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Any]) -> Signals:
        """Run the teacher on a batch, without labels."""
        self.model.eval()
        with body_output(self.model) as bodies:
            outputs = self.model(**{key: value for key, value in inputs.items() if key != "labels"})
        return signals(outputs.logits, bodies)
