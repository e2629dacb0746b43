"""Self-distilled pruning for Hugging Face models.

Names are imported when they are first used. `import sdprune` itself only makes the checkpoint format known to
transformers, if that is installed, so that plain `AutoModel*.from_pretrained` loads what `export` wrote.
"""

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
    from sdprune.methods.criteria import CRITERIA as CRITERIA
    from sdprune.methods.criteria import Criterion as Criterion
    from sdprune.methods.objectives import OBJECTIVES as OBJECTIVES
    from sdprune.methods.objectives import Objective as Objective
    from sdprune.methods.structures import STRUCTURES as STRUCTURES
    from sdprune.methods.structures import Structure as Structure
    from sdprune.runs.prune import PruneResult as PruneResult
    from sdprune.runs.prune import prune as prune
    from sdprune.runs.prune_then_distill import PruneThenDistillResult as PruneThenDistillResult
    from sdprune.runs.prune_then_distill import prune_then_distill as prune_then_distill
    from sdprune.speed.plan import plan as plan
    from sdprune.speed.speed_up import speed_up as speed_up
    from sdprune.training.callback import SDPruneCallback as SDPruneCallback
    from sdprune.training.trainer import SDPruneTrainer as SDPruneTrainer

    __version__: str

_PUBLIC = {  # module -> names
    "config": ("SDPruneConfig",),
    "exports.export": ("export",),
    "exports.load": ("load",),
    "formats.tag": ("SDPruneQuantizationConfig",),
    "layers.block_sparse": ("BlockSparseLinear",),
    "masking.freeze": ("freeze_sparsity",),
    "masking.layers": ("MaskedLinear",),
    "methods.criteria": ("CRITERIA", "Criterion"),
    "methods.objectives": ("OBJECTIVES", "Objective"),
    "methods.structures": ("STRUCTURES", "Structure"),
    "runs.prune": ("PruneResult", "prune"),
    "runs.prune_then_distill": ("PruneThenDistillResult", "prune_then_distill"),
    "speed.plan": ("plan",),
    "speed.speed_up": ("speed_up",),
    "training.callback": ("SDPruneCallback",),
    "training.trainer": ("SDPruneTrainer",),
}
_HOMES = {name: f"sdprune.{module}" for module, names in _PUBLIC.items() for name in names}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("sdprune")
    if name not in _HOMES:
        raise AttributeError(f"module 'sdprune' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__


if importlib.util.find_spec("transformers") is not None:  # masked layers and losses work without it
    from sdprune.exports.load import register

    register()
