"""Rows of earlier batches, to raise the effective batch of a loss over features."""

from collections.abc import Mapping

import torch
from torch import Tensor

from sdp_kernels.checks import check_at_least, check_dims, check_pair


class RowQueue:
    """The last `size` rows of student and teacher features, without their gradients.

    The off-diagonal sum of the cross-correlation loss falls like dim^2 / batch, so small batches mostly fit
    noise. Adding rows of earlier batches costs memory for them and nothing else.

    Only the rows of the current batch receive gradients; the older ones come from weights that have since
    moved a little. It holds every row it is given, so select the rows that count first. It is no
    module: a checkpoint must take its `state_dict` in, or training that resumes starts with an empty queue.

    Args:
        size: most rows to hold, at least 1.

    Raises:
        ValueError: a size below 1.

    Example:
        >>> queue = RowQueue(6)
        >>> for _ in range(3):
        ...     student, teacher = queue.extend(torch.randn(4, 2), torch.randn(4, 2))
        >>> student.shape, len(queue)
        (torch.Size([10, 2]), 6)
    """

    def __init__(self, size: int) -> None:
        check_at_least("size", size, 1)
        self.size = size
        self._rows: tuple[Tensor, Tensor] | None = None

    def __len__(self) -> int:
        """How many rows are held now."""
        return 0 if self._rows is None else self._rows[0].shape[0]

    def extend(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """This batch followed by the rows held, as a pair; afterwards the batch is held too, the oldest dropped.

        Args:
            student: (batch, dim), any float dtype.
            teacher: (batch, dim), any float dtype.

        Returns:
            Student and teacher, (batch + held, dim) each, in the dtypes of this batch.

        Raises:
            ValueError: shapes differ, or dim is not that of the rows held.
            TypeError: an input is not a floating-point tensor.
        """
        check_pair(student, teacher, "student", "teacher")
        check_dims("student", student, 2)
        if self._rows is not None:
            held_student, held_teacher = self._rows
            if held_student.shape[1] != student.shape[1]:
                raise ValueError(f"student must have {held_student.shape[1]} columns, got {student.shape[1]}")
            student = torch.cat((student, held_student.to(student)))
            teacher = torch.cat((teacher, held_teacher.to(teacher)))
        self._rows = student[: self.size].detach().clone(), teacher[: self.size].detach().clone()
        return student, teacher

    def state_dict(self) -> dict[str, Tensor]:
        """The rows held, "student" and "teacher", (rows, dim) each; {} while there are none."""
        return {} if self._rows is None else dict(zip(("student", "teacher"), self._rows, strict=True))

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Hold the rows of a `state_dict` instead of those held now.

        Raises:
            ValueError: shapes differ.
            TypeError: they are not floating-point tensors.
        """
        self.clear()
        if state:
            self.extend(state["student"], state["teacher"])

    def clear(self) -> None:
        """Forget all rows."""
        self._rows = None
