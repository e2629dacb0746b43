"""Self-distilled pruning for Hugging Face models.

Names are imported when they are first used. `import sdprune` itself only makes the checkpoint format known to
transformers, if that is installed, so that plain `AutoModel*.from_pretrained` loads what `export` wrote.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdprune.config import SDPruneConfig as SDPruneConfig
    from sdprune.exports.export import export as export
    from sdprune.exports.load import load as load
    from sdprune.formats.tag import SDPruneQuantizationConfig as SDPruneQuantizationConfig
    from sdprune.layers.block_sparse import BlockSparseLinear as BlockSparseLinear
    from sdprune.masking.freeze import freeze_sparsity as freeze_sparsity
    from sdprune.masking.layers import MaskedLinear as MaskedLinear
    from sdprune.runs.prune import PruneResult as PruneResult
    from sdprune.runs.prune import prune as prune
    from sdprune.runs.prune_then_distill import PruneThenDistillResult as PruneThenDistillResult
    from sdprune.runs.prune_then_distill import prune_then_distill as prune_then_distill
    from sdprune.speed.plan import plan as plan
    from sdprune.training.callback import SDPruneCallback as SDPruneCallback
    from sdprune.training.trainer import SDPruneTrainer as SDPruneTrainer

_HOMES = {
    "BlockSparseLinear": "sdprune.layers.block_sparse",
    "MaskedLinear": "sdprune.masking.layers",
    "PruneResult": "sdprune.runs.prune",
    "PruneThenDistillResult": "sdprune.runs.prune_then_distill",
    "SDPruneCallback": "sdprune.training.callback",
    "SDPruneConfig": "sdprune.config",
    "SDPruneQuantizationConfig": "sdprune.formats.tag",
    "SDPruneTrainer": "sdprune.training.trainer",
    "export": "sdprune.exports.export",
    "freeze_sparsity": "sdprune.masking.freeze",
    "load": "sdprune.exports.load",
    "plan": "sdprune.speed.plan",
    "prune": "sdprune.runs.prune",
    "prune_then_distill": "sdprune.runs.prune_then_distill",
}

__all__ = [
    "BlockSparseLinear",
    "MaskedLinear",
    "PruneResult",
    "PruneThenDistillResult",
    "SDPruneCallback",
    "SDPruneConfig",
    "SDPruneQuantizationConfig",
    "SDPruneTrainer",
    "export",
    "freeze_sparsity",
    "load",
    "plan",
    "prune",
    "prune_then_distill",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sdprune' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__


if importlib.util.find_spec("transformers") is not None:  # masked layers and losses work without it
    from sdprune.exports.load import register

    register()
