"""The cross-correlation loss, against Barlow Twins as it is published and as lightly ships it."""

import importlib.util
from collections.abc import Callable, Mapping
from itertools import product
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from bench.grid import Contender, Grid, Work, compiled, direct
from sdp_kernels.cross_correlation.spec import SPEC
from sdp_kernels.spec import Shape

# The paper's batch a GPU, sentence features, and both sides of the switch between the forms.
TELLING = ((128, 8192), (32, 768), (2048, 768), (512, 4096), (2048, 8192), (2048, 1024), (128, 1024))
BATCHES = (32, 128, 512, 2048, 8192)
DIMS = (384, 768, 1024, 4096, 8192)


def eager(student: Tensor, teacher: Tensor, *, off_diagonal_weight: float = 5e-3, eps: float = 1e-12) -> Tensor:
    """The loss after its publication, https://arxiv.org/abs/2103.03230, with our eps.

    Batch normalisation without parameters centres and scales the columns, in one operation; the off-diagonal entries
    are a view: without its first entry, C cut into rows of dim + 1 has its diagonal in the last column.
    """
    batch, dim = student.shape
    left = F.batch_norm(student, None, None, training=True, eps=eps)
    right = F.batch_norm(teacher, None, None, training=True, eps=eps)
    correlation = (left.T @ right).div_(batch)
    on_diagonal = (correlation.diagonal() - 1).square().sum()
    off_diagonal = correlation.flatten()[1:].view(dim - 1, dim + 1)[:, :-1].square().sum()
    return on_diagonal + off_diagonal_weight * off_diagonal


def contenders() -> Mapping[str, Contender]:
    """Ours, the published form, the same compiled, and lightly's where it is installed."""
    found = {"ours": direct(SPEC.op), "eager": direct(eager), "compile": compiled(eager)}
    lightly = load_lightly()
    if lightly is not None:
        found["lightly"] = Contender(lambda inputs: lambda: lightly(inputs["student"], inputs["teacher"]))
    return found


def load_lightly() -> Callable[[Tensor, Tensor], Tensor] | None:
    """lightly's loss, or None if it is not installed.

    `import lightly.loss` needs torchvision for its other losses; the file of this one needs torch alone.
    """
    package = importlib.util.find_spec("lightly")
    if package is None or not package.submodule_search_locations:
        return None
    path = Path(package.submodule_search_locations[0]) / "loss" / "barlow_twins_loss.py"
    spec = importlib.util.spec_from_file_location("lightly_barlow_twins_loss", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    loss: Callable[[Tensor, Tensor], Tensor] = module.BarlowTwinsLoss(lambda_param=5e-3)
    return loss


def _heaviest(shape: Shape) -> Work:
    """The reference in float64: about ten (dim, dim) matrices alive, each read or written a few times."""
    batch, dim = shape
    matrices = 10 * dim * dim * 8
    return Work(4 * batch * dim * dim, 3 * matrices, matrices + 12 * batch * dim * 8)


GRID = Grid(
    name="cross_correlation",
    shapes=TELLING + tuple(sorted(set(product(BATCHES, DIMS)) - set(TELLING), key=lambda shape: shape[0] * shape[1])),
    inputs=SPEC.inputs,
    reference=SPEC.reference,
    contenders=contenders,
    bound=lambda shape, itemsize: Work(SPEC.flops(shape), SPEC.bytes(shape, itemsize), 0),
    heaviest=_heaviest,
    grad_args=("student",),
    telling=len(TELLING),
)
