"""The queue of earlier rows: order, size, gradients, independence of the tensors it was given."""

import pytest
import torch

from sdp_kernels import RowQueue, cross_correlation_loss


def test_newest_rows_first_oldest_dropped() -> None:
    queue = RowQueue(5)
    rows = torch.arange(9.0)[:, None]
    seen = []
    for batch in rows.split(3):
        student, teacher = queue.extend(batch, -batch)
        assert torch.equal(student, -teacher)
        seen.append(student[:, 0].tolist())
    assert seen == [[0, 1, 2], [3, 4, 5, 0, 1, 2], [6, 7, 8, 3, 4, 5, 0, 1]]
    assert len(queue) == 5
    queue.clear()
    assert len(queue) == 0
    assert torch.equal(queue.extend(rows, rows)[0], rows)
    assert len(queue) == 5


def test_only_the_current_batch_gets_gradients() -> None:
    queue = RowQueue(8)
    old = torch.randn(4, 6, requires_grad=True)
    queue.extend(old, torch.randn(4, 6))
    new = torch.randn(4, 6, requires_grad=True)
    student, teacher = queue.extend(new, torch.randn(4, 6))
    cross_correlation_loss(student, teacher).backward()
    assert old.grad is None
    assert new.grad is not None
    assert (new.grad != 0).any()


def test_the_loss_is_that_of_the_joined_batch() -> None:
    queue = RowQueue(8)
    students, teachers = torch.randn(2, 2, 4, 6)
    queue.extend(students[0], teachers[0])
    loss = cross_correlation_loss(*queue.extend(students[1], teachers[1]))
    expected = cross_correlation_loss(students.flatten(0, 1), teachers.flatten(0, 1))
    torch.testing.assert_close(loss, expected)


def test_held_rows_do_not_change_with_their_source() -> None:
    queue = RowQueue(4)
    batch = torch.ones(2, 3)
    queue.extend(batch, batch)
    batch.zero_()
    student, _ = queue.extend(torch.zeros(1, 3, dtype=torch.float16), torch.zeros(1, 3))
    assert student.dtype == torch.float16
    assert student.tolist() == [[0.0] * 3, [1.0] * 3, [1.0] * 3]


def test_a_state_holds_the_rows_in_their_order() -> None:
    queue, other = RowQueue(3), RowQueue(3)
    assert queue.state_dict() == {}
    for batch in torch.arange(24.0).view(3, 2, 4):
        queue.extend(batch, -batch)
    other.extend(torch.ones(2, 7), torch.ones(2, 7))
    other.load_state_dict(queue.state_dict())
    for mine, theirs in zip(queue.extend(*torch.ones(2, 1, 4)), other.extend(*torch.ones(2, 1, 4)), strict=True):
        assert torch.equal(mine, theirs)
    other.load_state_dict({})
    assert len(other) == 0


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        RowQueue(0)
    queue = RowQueue(4)
    queue.extend(torch.ones(2, 3), torch.ones(2, 3))
    with pytest.raises(ValueError, match="student must have 3 columns, got 5"):
        queue.extend(torch.ones(2, 5), torch.ones(2, 5))
    with pytest.raises(ValueError, match=r"teacher must have shape \(2, 3\), got \(3, 3\)"):
        queue.extend(torch.ones(2, 3), torch.ones(3, 3))
