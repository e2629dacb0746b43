"""`StoredLinear`: a linear layer as a checkpoint stores it."""

from collections.abc import Mapping

from torch import Tensor, nn

from sdprune.formats.pack import Tensors


class StoredLinear(nn.Module):
    """A linear layer as a checkpoint stores it: to be loaded and saved, not to be called.

    Args:
        tensors: what `pack` returns; may be on the meta device.
        bias: (out,) or None.
    """

    def __init__(self, tensors: Mapping[str, Tensor], bias: nn.Parameter | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(tensors["weight"])
        self.bias = bias
        self.index_names = tuple(name for name in tensors if name != "weight")
        for name in self.index_names:
            self.register_buffer(name, tensors[name])

    def tensors(self) -> Tensors:
        """Return the stored tensors."""
        return {"weight": self.weight.detach()} | {name: self.get_buffer(name) for name in self.index_names}
