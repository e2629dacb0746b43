"""`PrunedLinear`: what layers share that keep a part of a weight and stand for the dense layer with zeros elsewhere."""

from typing import Any

from torch import Tensor, nn

from sdprune.layers.dense import dense_layer


class PrunedLinear(nn.Module):
    """A layer in the place of a dense one; its state dict holds the part of the weight that it keeps.

    `load_state_dict` takes the dense weight too, as `save_pretrained` writes it, so that a Trainer resumes with it.

    Attributes:
        weight: what is kept.
        bias: (out,) or None.
        shape: (out, in) of the dense weight.
        transposed: whether it stands for a layer that stores its weight as (in, out), as the `Conv1D` of transformers.
    """

    weight: Any
    bias: Any
    shape: tuple[int, int]
    transposed: bool
    units = "rows or columns"

    def dense_weight(self) -> Tensor:
        """Return the weight (out, in) with its zeros, detached."""
        raise NotImplementedError

    def dense_bias(self) -> nn.Parameter | None:
        """Return the bias of all outputs, shared."""
        bias: nn.Parameter | None = self.bias
        return bias

    def part_of(self, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor] | None:
        """Return what the state of this layer holds of a dense weight (out, in); None if it has other zeros."""
        raise NotImplementedError

    @property
    def density(self) -> float:
        """The fraction of the weight that is kept."""
        kept: int = self.weight.numel()
        return kept / (self.shape[0] * self.shape[1])

    def to_linear(self) -> nn.Module:
        """Return an `nn.Linear` of full size with the zeros filled in again; the bias is shared."""
        return self._dense(transposed=False)

    def to_dense(self) -> nn.Module:
        """Return the dense layer that this one stands for: `to_linear`, or a `Conv1D` where it was one."""
        return self._dense(transposed=self.transposed)

    def _dense(self, *, transposed: bool) -> nn.Module:
        trained = self.weight.requires_grad or not self.weight.is_floating_point()
        return dense_layer(self.dense_weight(), self.dense_bias(), transposed, trained).train(self.training)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        error_msgs: list[str] = args[-1]
        weight = state_dict.get(f"{prefix}weight")
        stored = self.shape[::-1] if self.transposed else self.shape
        own = self.transposed and weight is not None and weight.shape == self.weight.shape  # square, nothing left out
        if weight is not None and tuple(weight.shape) == stored and not own:
            part = self.part_of(weight.T if self.transposed else weight, state_dict.get(f"{prefix}bias"))
            if part is None:
                error_msgs.append(f"{prefix}weight has other empty {self.units} than this layer")
                return
            del state_dict[f"{prefix}weight"]
            state_dict |= {f"{prefix}{name}": value for name, value in part.items()}
        super()._load_from_state_dict(state_dict, prefix, *args)
