"""`SavedRowQueue`: a row queue that a checkpoint can hold, so that resumed training sees the same rows."""

from collections.abc import Mapping
from typing import Self

from torch import Tensor

from sdp_kernels import RowQueue


class SavedRowQueue(RowQueue):
    """A `sdp_kernels.RowQueue` whose rows can be taken out and put back."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return the rows held, "student" and "teacher", (rows, dim) each; {} while there are none."""
        return {} if self._rows is None else dict(zip(("student", "teacher"), self._rows, strict=True))

    @classmethod
    def from_state_dict(cls, size: int, state: Mapping[str, Tensor]) -> Self:
        """Return a queue of `size` that holds the rows of `state_dict`."""
        queue = cls(size)
        if state:
            queue.extend(state["student"], state["teacher"])
        return queue
