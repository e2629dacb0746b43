"""`SDPruneCallback`: the pruning half of a run, for any `transformers.Trainer`."""

import json
import logging
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sdprune.config import SDPruneConfig
from sdprune.masking.partition import Partition, reached_sparsity
from sdprune.masking.pruner import gather, mask_model, masked_fraction, measure_sparsity, prune_step, zero_pruned
from sdprune.masking.schedule import (
    check_gradients_come_first,
    pruning_moments,
    sparsity_before,
    sparsity_levels,
)
from sdprune.masking.swap import masked_layers
from sdprune.methods.criteria import CRITERIA
from sdprune.training.checks import check_config, check_trainable
from sdprune.training.origin import differences

STATE_NAME, BEGUN_NAME = "SDPruneConfig", "SDPruneBegunAt"  # in trainer_state.json

logger = logging.getLogger(__name__)


class SDPruneCallback(TrainerCallback):
    """Masks the layers of the model and prunes them along the schedule of `config`.

    Pass it to the Trainer when that is built: the layers must be masked before a checkpoint is loaded. The masks
    live in the model and are saved with it; the schedule is a function of the step; so a resumed run prunes
    exactly as an uninterrupted one. Every checkpoint holds the configuration as `sdprune_config.json`. The target is
    reached even where the training ends early.

    A training that begins anew on a pruned model (`train()` a second time, or again with the smaller batch of
    `auto_find_batch_size`) never lowers its sparsity: pruning steps that would are passed over. A model that
    `model_init` makes anew is masked when its training begins.

    Args:
        config: what is pruned, how far, when.

    Raises:
        ValueError: when the Trainer is built or starts: two of these callbacks, nothing to prune or nothing that
            trains, a block that does not divide a layer, a target that would leave nothing of a layer, more pruning
            steps than the training has room for, `load_best_model_at_end` (it would pick a model from before the
            target), a model whose masks prune further than the target already, or a checkpoint of another configuration
            or with other masks.
        TypeError: `config` is no configuration.
    """

    def __init__(self, config: SDPruneConfig) -> None:
        check_config(config)
        self.config = config
        self._partition: Partition | None = None
        self._model: Callable[[], nn.Module | None] = lambda: None  # whose partition it is
        self._begun_at = 0.0  # sparsity of the model when its training began

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Mask the model."""
        if args.load_best_model_at_end or args.save_strategy == "best":
            raise ValueError(
                f"load_best_model_at_end={args.load_best_model_at_end} with save_strategy={str(args.save_strategy)!r} "
                "would keep a model from before the target sparsity; set load_best_model_at_end=False and "
                "save_strategy='steps' or 'epoch'"
            )
        begun: Any = state.stateful_callbacks  # the callbacks of a Trainer share its state, each training has a new one
        if STATE_NAME in begun:
            raise ValueError("callbacks holds two SDPruneCallbacks, and each would prune; leave one out")
        begun[STATE_NAME] = self.config.to_dict()
        model: nn.Module = kwargs["model"]
        check_trainable(model)
        self._partition, self._model = mask_model(model, self.config), weakref.ref(model)
        check_trainable(model, self.config)
        zeros = measure_sparsity(model).linear
        if masked_fraction(model) == 0.0 and zeros > self.config.target_sparsity > 0.0:
            logger.warning(
                "%.1f %% of the weights to be pruned are zero already, more than target_sparsity=%s: those that no "
                "mask holds will train; to keep them all, freeze_sparsity",
                100 * zeros,
                self.config.target_sparsity,
            )

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Check that the schedule fits the training and the masks fit the step."""
        model: nn.Module = kwargs["model"]
        partition = self._partition = self._partition_of(model, state)
        self._check_config(state)
        if state.global_step:
            _check_loaded(model)
        check_gradients_come_first(self.config, state.max_steps)
        kept: Any = state.stateful_callbacks
        self._begun_at = kept.setdefault(BEGUN_NAME, 0.0 if state.global_step else masked_fraction(model))
        if state.global_step:
            asked = sparsity_before(self.config, state.max_steps, state.global_step)
            self._check_sparsity(model, asked, partition)
            self._gather_again(model, state)
        elif self._begun_at > reached_sparsity(self.config.target_sparsity, self.config) + partition.tolerance(
            self.config
        ):
            raise ValueError(
                f"the model is pruned to {self._begun_at:.4f} already, further than target_sparsity="
                f"{self.config.target_sparsity}; begin with a dense model, or raise the target"
            )

    def _partition_of(self, model: nn.Module, state: TrainerState) -> Partition:
        """Return the partition of the model at hand, which may be another than the Trainer was built with."""
        if self._partition is None:
            raise ValueError("the model has no masked layers; pass SDPruneCallback in callbacks=[...] of the Trainer")
        if self._model() is model:
            return self._partition
        self._model, names = weakref.ref(model), list(masked_layers(model))
        if names:
            return Partition.of(model, names, self.config)
        if state.global_step:
            raise ValueError(
                "the layers were not masked when the checkpoint was loaded: Trainer(model_init=...) made the model "
                "anew after SDPruneCallback had masked the first one; to go on from a checkpoint give model=... instead"
            )
        return mask_model(model, self.config)

    def _gather_again(self, model: nn.Module, state: TrainerState) -> None:
        """Have layers gather scores that an earlier training of the same model had settled, from before it had."""
        moments = pruning_moments(self.config, state.max_steps)
        if CRITERIA[self.config.criterion].update is not None and state.global_step < max(moments, default=0):
            for layer in masked_layers(model).values():
                layer.gathering = True

    def _check_config(self, state: TrainerState) -> None:
        """Compare with the configuration of the checkpoint, if the training goes on from one, and have it saved."""
        # What a callback leaves in the state, the Trainer saves and loads; it tells nobody where the checkpoint lies.
        kept: Any = state.stateful_callbacks
        own = json.loads(json.dumps(self.config.to_dict()))  # as a file gives it: lists for tuples
        changed = differences(kept.setdefault(STATE_NAME, own), own)
        if changed:
            other = "the checkpoint" if state.global_step else "another SDPruneCallback of the Trainer"
            raise ValueError(f"{other} has another configuration ({'; '.join(changed)})")

    def _check_sparsity(self, model: nn.Module, asked: float, partition: Partition) -> None:
        expected = max(reached_sparsity(asked, self.config), self._begun_at)
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
            self._prune_to(model, level)
        if not moments or state.global_step >= moments[-1]:
            for layer in masked_layers(model).values():
                layer.settle()

    def _prune_to(self, model: nn.Module, level: float) -> None:
        # what an earlier training has pruned stays pruned
        if self._begun_at == 0.0 or reached_sparsity(level, self.config) > self._begun_at:
            prune_step(model, self.config, level, self._partition)

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
            self._prune_to(kwargs["model"], self.config.target_sparsity)
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
