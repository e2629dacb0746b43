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
    from sdprune.deployment.export import export as export
    from sdprune.deployment.loader import load as load
    from sdprune.deployment.plan import plan as plan
    from sdprune.deployment.quantization_config import SDPruneQuantizationConfig as SDPruneQuantizationConfig
    from sdprune.deployment.sparse_linear import BlockSparseLinear as BlockSparseLinear
    from sdprune.masking.freeze import freeze_sparsity as freeze_sparsity
    from sdprune.masking.layers import MaskedLinear as MaskedLinear
    from sdprune.methods.criteria import CRITERIA as CRITERIA
    from sdprune.methods.criteria import Criterion as Criterion
    from sdprune.methods.objectives import OBJECTIVES as OBJECTIVES
    from sdprune.methods.objectives import Objective as Objective
    from sdprune.methods.structures import STRUCTURES as STRUCTURES
    from sdprune.methods.structures import Structure as Structure
    from sdprune.pipelines.prune_then_distill import PruneThenDistillResult as PruneThenDistillResult
    from sdprune.pipelines.prune_then_distill import prune_then_distill as prune_then_distill
    from sdprune.pipelines.self_distilled import PruneResult as PruneResult
    from sdprune.pipelines.self_distilled import prune as prune
    from sdprune.training.callback import SDPruneCallback as SDPruneCallback
    from sdprune.training.trainer import SDPruneTrainer as SDPruneTrainer

_HOMES = {
    "CRITERIA": "sdprune.methods.criteria",
    "OBJECTIVES": "sdprune.methods.objectives",
    "STRUCTURES": "sdprune.methods.structures",
    "BlockSparseLinear": "sdprune.deployment.sparse_linear",
    "Criterion": "sdprune.methods.criteria",
    "MaskedLinear": "sdprune.masking.layers",
    "Objective": "sdprune.methods.objectives",
    "PruneResult": "sdprune.pipelines.self_distilled",
    "PruneThenDistillResult": "sdprune.pipelines.prune_then_distill",
    "SDPruneCallback": "sdprune.training.callback",
    "SDPruneConfig": "sdprune.config",
    "SDPruneQuantizationConfig": "sdprune.deployment.quantization_config",
    "SDPruneTrainer": "sdprune.training.trainer",
    "Structure": "sdprune.methods.structures",
    "export": "sdprune.deployment.export",
    "freeze_sparsity": "sdprune.masking.freeze",
    "load": "sdprune.deployment.loader",
    "plan": "sdprune.deployment.plan",
    "prune": "sdprune.pipelines.self_distilled",
    "prune_then_distill": "sdprune.pipelines.prune_then_distill",
}

__all__ = [
    "CRITERIA",
    "OBJECTIVES",
    "STRUCTURES",
    "BlockSparseLinear",
    "Criterion",
    "MaskedLinear",
    "Objective",
    "PruneResult",
    "PruneThenDistillResult",
    "SDPruneCallback",
    "SDPruneConfig",
    "SDPruneQuantizationConfig",
    "SDPruneTrainer",
    "Structure",
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
    from sdprune.deployment.loader import register

    register()
