"""`SDPruneCallback`: the pruning half of a run, for any `transformers.Trainer`."""

import json
import logging
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sdprune.config import SDPruneConfig
from sdprune.masking.partition import Partition, reached_sparsity
from sdprune.masking.pruner import gather, mask_model, masked_fraction, prune_step, zero_pruned
from sdprune.masking.schedule import (
    check_gradients_come_first,
    pruning_moments,
    sparsity_before,
    sparsity_levels,
)
from sdprune.masking.swap import masked_layers
from sdprune.methods.criteria import CRITERIA
from sdprune.training.origin import differences

STATE_NAME = "SDPruneConfig"  # in trainer_state.json

logger = logging.getLogger(__name__)


class SDPruneCallback(TrainerCallback):
    """Masks the layers of the model and prunes them along the schedule of `config`.

    Pass it to the Trainer when that is built: the layers must be masked before a checkpoint is loaded. The masks
    live in the model and are saved with it; the schedule is a function of the step; so a resumed run prunes
    exactly as an uninterrupted one. Every checkpoint holds the configuration as `sdprune_config.json`. The target is
    reached even where the training ends early.

    Args:
        config: what is pruned, how far, when.

    Raises:
        ValueError: when the Trainer is built or starts: nothing to prune, a block that does not divide a layer,
            more pruning steps than the training has room for, `load_best_model_at_end` (it would pick a model
            from before the target), or a checkpoint of another configuration or with other masks.
    """

    def __init__(self, config: SDPruneConfig) -> None:
        self.config = config
        self._partition: Partition | None = None

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Mask the model."""
        if args.load_best_model_at_end or args.save_strategy == "best":
            raise ValueError(
                f"load_best_model_at_end={args.load_best_model_at_end} with save_strategy={str(args.save_strategy)!r} "
                "would keep a model from before the target sparsity; set load_best_model_at_end=False and "
                "save_strategy='steps' or 'epoch'"
            )
        self._partition = mask_model(kwargs["model"], self.config)

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Check that the schedule fits the training and the masks fit the step."""
        model: nn.Module = kwargs["model"]
        if not masked_layers(model) or self._partition is None:
            raise ValueError("the model has no masked layers; pass SDPruneCallback in callbacks=[...] of the Trainer")
        self._check_config(state)
        if state.global_step:
            _check_loaded(model)
        check_gradients_come_first(self.config, state.max_steps)
        self._check_sparsity(model, sparsity_before(self.config, state.max_steps, state.global_step), self._partition)

    def _check_config(self, state: TrainerState) -> None:
        """Compare with the configuration of the checkpoint, if the training goes on from one, and have it saved."""
        # What a callback leaves in the state, the Trainer saves and loads; it tells nobody where the checkpoint lies.
        kept: Any = state.stateful_callbacks
        own = json.loads(json.dumps(self.config.to_dict()))  # as a file gives it: lists for tuples
        changed = differences(kept.setdefault(STATE_NAME, own), own)
        if changed:
            raise ValueError(f"the checkpoint has another configuration ({'; '.join(changed)})")

    def _check_sparsity(self, model: nn.Module, asked: float, partition: Partition) -> None:
        expected = reached_sparsity(asked, self.config)
        found = masked_fraction(model)
        if abs(found - expected) > partition.tolerance(self.config):
            raise ValueError(
                f"the masks have sparsity {found:.4f} where this configuration has {expected:.4f} at this step: "
                "the checkpoint belongs to another configuration, or its masks were not loaded"
            )

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Prune if this is a pruning moment."""
        moments = pruning_moments(self.config, state.max_steps)
        model: nn.Module = kwargs["model"]
        if state.global_step in moments:
            level = sparsity_levels(self.config)[moments.index(state.global_step)]
            prune_step(model, self.config, level, self._partition)
        if not moments or state.global_step >= moments[-1]:
            for layer in masked_layers(model).values():
                layer.settle()

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Take in the gradients, which for the criteria are measured before the clipping that comes ahead of this."""
        model: nn.Module = kwargs["model"]
        scaler = getattr(kwargs.get("optimizer"), "scaler", None)
        gather(model, self.config, scale=1.0 if scaler is None else float(scaler.get_scale()))
        untouched = CRITERIA[self.config.criterion].before_training
        if untouched and any(layer.gathering for layer in masked_layers(model).values()):
            for parameter in model.parameters():  # without a gradient the optimizer leaves the weights untouched
                parameter.grad = None

    def on_optimizer_step(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Put back the zeros that momentum or weight decay moved."""
        zero_pruned(kwargs["model"])

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Leave the configuration in the checkpoint, for those who export it."""
        if state.is_world_process_zero:
            self.config.save_pretrained(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}")

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Reach the target where the training ended before the last pruning step."""
        moments = pruning_moments(self.config, state.max_steps)
        if moments and state.global_step <= moments[-1]:
            logger.warning(
                "training ended at step %d of %d, before the last pruning step: pruning to %.4f without recovery",
                state.global_step,
                state.max_steps,
                self.config.target_sparsity,
            )
            prune_step(kwargs["model"], self.config, self.config.target_sparsity, self._partition)
            for layer in masked_layers(kwargs["model"]).values():
                layer.settle()


def _check_loaded(model: nn.Module) -> None:
    # The Trainer only warns of what it does not find, and goes on with weights that are none of the checkpoint's.
    missing = [name for name, layer in masked_layers(model).items() if layer.mask_missing]
    if missing:
        raise ValueError(
            f"the checkpoint has no mask of layer {missing[0]!r} ({len(missing)} such layers), and perhaps no weight: "
            "it belongs to another model, or transformers saves this one under other names, which it does not undo "
            "when a training goes on (https://github.com/huggingface/transformers/issues/48805); train without resuming"
        )
