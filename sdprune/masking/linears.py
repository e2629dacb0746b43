"""What counts as a linear layer: `nn.Linear`, and the `Conv1D` of GPT-2, which stores its weight transposed."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn


def is_conv1d(module: nn.Module) -> bool:
    """Tell whether the module is a linear layer with a weight of shape (in, out), as transformers' `Conv1D`."""
    # Known by its form: this folder works without transformers.
    weight = getattr(module, "weight", None)
    return (
        type(module).__name__ in ("Conv1D", "MaskedConv1D")
        and isinstance(weight, Tensor)
        and weight.dim() == 2
        and getattr(module, "nf", None) == weight.shape[1]
    )


def is_linear(module: nn.Module) -> bool:
    """Tell whether the module maps the last dimension of its input by a weight matrix."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def matrix(module: nn.Module) -> Tensor:
    """Return the weight of a linear layer as (out, in), a view of what is stored."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.T if is_conv1d(module) else weight


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Have a model in evaluation mode inside the block, and every module in its own mode again behind it."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
