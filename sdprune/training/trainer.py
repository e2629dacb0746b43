"""`SDPruneTrainer`: the transformers Trainer with the distillation terms added to its loss."""

import math
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed, nn
from torch.utils.data import DataLoader, Sampler, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainerState

from sdp_kernels import RowQueue
from sdprune.config import SDPruneConfig
from sdprune.data.sampler import LengthBucketSampler
from sdprune.distillation.cache import POSITIONS, TeacherCache
from sdprune.distillation.features import (
    Features,
    body_output,
    gather,
    logit_mask,
    need_hidden_states,
    token_mask,
)
from sdprune.distillation.steering import gradient_norm, steered_weight
from sdprune.distillation.teacher import Teacher
from sdprune.distillation.terms import BatchOutputs, distillation_terms, feature_names
from sdprune.masking.bare import check_bare, check_float
from sdprune.masking.pruner import masked_fraction
from sdprune.masking.schedule import lr_factor
from sdprune.training.checks import (
    check_classes,
    check_config,
    check_labels,
    check_objectives,
    check_teacher,
    has_rows,
    labels_of,
)

STATE_NAME = "sdprune_distillation_{}.safetensors"  # each rank has its queue


class _BeginAnew(TrainerCallback):
    """Has a trainer forget its last training where it begins one that does not go on from a checkpoint."""

    def __init__(self, trainer: "SDPruneTrainer") -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Forget it."""
        if state.global_step == 0:
            self.trainer.begin()


class SDPruneTrainer(Trainer):
    """A `transformers.Trainer` whose loss has the distillation terms of `config`; it does not prune.

    Add `SDPruneCallback(config)` to its callbacks to prune. Evaluation runs without the teacher, and `eval_loss`
    is the task loss. Every loss is the mean over a micro-batch, then over the accumulated ones. The row queue and the
    steered distillation weight are saved with every checkpoint, so that a resumed run goes on exactly. A teacher cache
    is filled before the first step, by the main process; machines that train together share its folder. With
    `train_sampling_strategy="group_by_length"` batches are made by `LengthBucketSampler`, whose order survives an
    interruption, and evaluation stays in the order of the data set. With `model_init` the frozen copy is one of the
    model that is trained, made anew with it.

    Args:
        *args: as of `transformers.Trainer`.
        config: what is distilled, and with which weights.
        teacher_model: the teacher; None: a frozen copy of the model as it is now.
        **kwargs: as of `transformers.Trainer`.

    Raises:
        ValueError: a model is wrapped or has int8 layers, no teacher is given and the model is pruned already, the
            teacher is the model itself or has another vocabulary, other classes or another width, an objective does not
            fit the model, the data have no labels for the task loss, or one process sees several GPUs.
        TypeError: `config` is no configuration.
        FloatingPointError: while training, when a part of the loss is not finite; the part is named.
    """

    def __init__(
        self, *args: Any, config: SDPruneConfig, teacher_model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        check_config(config)
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:
            raise ValueError(
                f"{self.args.n_gpu} GPUs in one process would be driven by torch.nn.DataParallel, which splits batches "
                "behind the teacher's back; start one process a GPU with torchrun, or set CUDA_VISIBLE_DEVICES=0"
            )
        # Models whose forward takes **kwargs would make the Trainer normalise the task loss over the accumulated
        # batch, which it cannot do for the distillation terms: both are means over the micro-batch instead.
        self.model_accepts_loss_kwargs = False
        if hasattr(Trainer, "loss_is_scaled_for_ga"):
            self.loss_is_scaled_for_ga = False
        self.sdprune_config = config
        check_bare(self.model)
        check_float(cast(nn.Module, self.model))
        check_objectives(cast(nn.Module, self.model), config)
        if config.gradient_ratio is not None and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError("gradient_ratio measures whole gradients, which FSDP and DeepSpeed split; leave it out")
        self._check_labels()
        self._features = feature_names(config)
        self._copies = teacher_model is None
        self._take_teacher(teacher_model)
        self.begin()
        self.add_callback(_BeginAnew(self))

    def _take_teacher(self, teacher_model: nn.Module | None) -> None:
        config = self.sdprune_config
        self.teacher = self._make_teacher(teacher_model) if config.distillation_weights else None
        self._cache = self._make_cache() if config.teacher_cache is not None else None

    def begin(self) -> None:
        """Forget what belongs to an earlier training: its losses, its queue and its steered weight."""
        self.distillation_weight = self.sdprune_config.distillation_weight
        self._queues: dict[str, RowQueue] = {}
        self._steered_at = -1
        self._parts: dict[str, Tensor] = {}
        self._part_count = 0

    def call_model_init(self, trial: Any = None) -> Any:
        """Make the model anew, and of it, where no other teacher was given, the teacher."""
        model = super().call_model_init(trial)
        if getattr(self, "_copies", False):  # the Trainer makes the first one while it is built
            self.model = model.to(self.args.device)
            self._take_teacher(None)
        return model

    def _check_labels(self) -> None:
        dataset: Any = self.train_dataset
        if not has_rows(dataset) or not len(dataset):
            return  # a stream cannot be looked into without losing what was seen
        row = dataset[0]
        name = next((name for name in (*self.label_names, "label") if name in row), None)
        if name is not None:
            rows = isinstance(dataset, list | tuple)  # at hand; rows of others may have to be made
            labels = [each[name] for each in dataset if name in each] if rows else labels_of(dataset, row, name)
            check_classes(cast(nn.Module, self.model), labels, f"train_dataset: column {name!r}")
        if name in self.label_names:
            return
        with torch.random.fork_rng(devices=[]):  # a collator may mask tokens at random
            collate = self._get_collator_with_removed_columns(self.data_collator)
            check_labels(collate([row]), self.label_names, self.sdprune_config)

    def _make_teacher(self, teacher_model: nn.Module | None) -> Teacher:
        config, model = self.sdprune_config, cast(nn.Module, self.model)
        dtype = None if config.teacher_dtype is None else getattr(torch, config.teacher_dtype)
        if teacher_model is None:
            return Teacher(model, copy_model=True, dtype=dtype)
        check_bare(teacher_model, "teacher_model")
        if teacher_model is model:
            raise ValueError("teacher_model is the model itself; leave it out to have a frozen copy made")
        check_objectives(teacher_model, config, "teacher_model", masked=False)
        check_teacher(model, teacher_model, config)
        return Teacher(teacher_model.to(self.args.device), copy_model=False, dtype=dtype)

    def _make_cache(self) -> TeacherCache:
        config, dataset = self.sdprune_config, cast(Any, self.train_dataset)
        folder = cast(str, config.teacher_cache)
        if self.teacher is None or not self._features:
            raise ValueError(
                f"teacher_cache={folder!r} has nothing to keep: distillation={config.distillation!r} compares no "
                "outputs of a teacher"
            )
        if not has_rows(dataset):
            raise ValueError(
                f"teacher_cache={folder!r} needs a train_dataset with a length and rows by number, got the stream "
                f"{type(dataset).__name__}"
            )
        if getattr(self.teacher.model.config, "is_encoder_decoder", False):
            raise ValueError(
                f"teacher_cache={folder!r} does not work for a model with an encoder and a decoder; leave it out"
            )
        return TeacherCache(
            Path(folder),
            self.teacher.model,
            self._features,
            dataset,
            self._get_collator_with_removed_columns(self.data_collator),
            lambda batch: self._teach(self._prepare_inputs(batch)),
            precision=f"{config.teacher_dtype or 'as loaded'}, autocast {self.accelerator.mixed_precision}",
            limit=config.teacher_cache_gigabytes * 1e9,
        )

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Return the scheduler of the arguments, or with `lr_restarts` the one that restarts with every pruning step.

        The restarts take the place of `lr_scheduler_type`; the warm-up of the arguments stays.
        """
        config = self.sdprune_config
        if not config.lr_restarts or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        warmup = self.args.get_warmup_steps(num_training_steps)

        def factor(step: int) -> float:
            return min(1.0, step / max(warmup, 1) if warmup else 1.0) * lr_factor(config, num_training_steps, step)

        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer or cast(torch.optim.Optimizer, self.optimizer), factor
        )
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return the training batches, which with a teacher cache say where their examples stand in it."""
        if self._cache is None:
            return super().get_train_dataloader()
        plain, self.data_collator = self.data_collator, self._cache.collate
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = plain

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the weighted task loss plus, while training, the weighted distillation terms."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        config = self.sdprune_config
        inputs = dict(inputs)
        positions = inputs.pop(POSITIONS, None)
        given = dict(inputs)  # the base class may take the labels out
        if need_hidden_states(self._features):
            inputs["output_hidden_states"] = True
        with body_output(self.accelerator.unwrap_model(model)) as bodies:
            if config.task_weight > 0.0:
                task, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            else:
                task, outputs = None, model(**inputs)
        parts = {} if task is None else {"task": task}
        losses = [] if task is None else [config.task_weight * task]
        if self.teacher is not None:
            terms = distillation_terms(self._compare(given, positions, outputs.logits, bodies))
            distillation = sum((weight * terms[name] for name, weight in config.distillation_weights.items()), 0.0)
            if config.gradient_ratio is not None:
                self._steer(losses[0], cast(Tensor, distillation))
            losses.append(self.distillation_weight * cast(Tensor, distillation))
            parts |= terms
        self._record(parts)
        loss = sum(losses[1:], losses[0])
        return (loss, outputs) if return_outputs else loss

    def _teach(self, inputs: dict[str, Any]) -> Features:
        with self.accelerator.autocast():
            return cast(Teacher, self.teacher)(inputs, self._features)

    def _remember(self, positions: list[int], student: Features) -> Features:
        cache = cast(TeacherCache, self._cache)
        if not cache.filled:
            with self.accelerator.main_process_first():
                cache.open_or_fill(self.args.train_batch_size)
        widths = [value.shape[1] for value in student.values() if value.dim() == 3]
        return cache(positions, max(widths, default=0), self.args.device)

    def _compare(
        self, inputs: dict[str, Any], positions: list[int] | None, logits: Tensor, bodies: list[Any]
    ) -> BatchOutputs:
        """Gather what the objectives compare; the teacher runs only where they need outputs that are not cached."""
        teacher, model = cast(Teacher, self.teacher), self.accelerator.unwrap_model(self.model)
        mask = token_mask(inputs, model)
        student: Features = {}
        taught: Features = {}
        if self._features:
            student = gather(self._features, logits, bodies, mask)
            taught = self._teach(inputs) if positions is None else self._remember(positions, student)
        return BatchOutputs(
            config=self.sdprune_config,
            student=student,
            teacher=taught,
            tokens=mask,
            positions=logit_mask(logits, inputs, mask, model),
            models=(model, teacher.model),
            queues=self._queues,
            group=distributed.group.WORLD if self.accelerator.num_processes > 1 else None,
        )

    def _steer(self, task: Tensor, distillation: Tensor) -> None:
        """Measure the gradients and set the distillation weight, in the first micro-batch of every n-th step."""
        config, step = self.sdprune_config, self.state.global_step
        if step % config.gradient_ratio_steps or step == self._steered_at:
            return
        self._steered_at = step
        parameters = [each for each in cast(nn.Module, self.model).parameters() if each.requires_grad]
        norms = torch.stack([gradient_norm(loss, parameters) for loss in (task, distillation)])
        # every rank measures its own rows; the weight must be one and the same
        task_norm, distillation_norm = self.accelerator.reduce(norms, "mean").tolist()
        if math.isfinite(task_norm) and math.isfinite(distillation_norm):
            self.distillation_weight = steered_weight(
                self.distillation_weight,
                task_norm,
                distillation_norm,
                ratio=cast(float, config.gradient_ratio),
                initial=config.distillation_weight,
            )

    def _record(self, parts: dict[str, Tensor]) -> None:
        for name, value in parts.items():
            # The Trainer waits for the loss each step anyway; its own filter would hide a NaN from the log.
            if not torch.isfinite(value):
                raise FloatingPointError(
                    f"the {name} loss is {value.item()} at step {self.state.global_step + 1}; "
                    "lower learning_rate or distillation_weight, or train without bf16"
                )
            # in fp32: a bfloat16 sum soon no longer grows
            self._parts[name] = self._parts.get(name, 0.0) + value.detach().float()
        self._part_count += 1

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the parts of the loss and the sparsity to the training rows; user callbacks run too late for that."""
        if "loss" in logs and self._part_count:
            totals = self.accelerator.reduce(torch.stack([*self._parts.values()]), "mean").tolist()
            logs |= {f"loss_{name}": total / self._part_count for name, total in zip(self._parts, totals, strict=True)}
            logs["sparsity"] = masked_fraction(self.accelerator.unwrap_model(self.model))
            if self.sdprune_config.gradient_ratio is not None:
                logs["distillation_weight"] = self.distillation_weight
            self._parts, self._part_count = {}, 0
        super().log(logs, *args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        lengths = getattr(dataset, "lengths", None) or [len(row["input_ids"]) for row in dataset]
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return LengthBucketSampler(lengths, self._train_batch_size, seed=seed)  # auto_find_batch_size lowers it

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler[int] | None:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_eval_sampler(eval_dataset)
        return SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # Some models are saved under the names that they once had, which a training that goes on does not undo.
        saved: Any = self.accelerator.unwrap_model(self.model)
        conversions = getattr(saved, "_weight_conversions", None)
        saved._weight_conversions = []
        try:
            super()._save_checkpoint(model, trial)
        finally:
            saved._weight_conversions = conversions

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.sdprune_config.queue_size or self.sdprune_config.gradient_ratio is not None:
            state = {"distillation_weight": torch.tensor(self.distillation_weight, dtype=torch.float64)}
            for name, queue in self._queues.items():
                state |= {f"{name}.{part}": rows for part, rows in queue.state_dict().items()}
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            save_file(state, self._state_path(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or not any(Path(checkpoint).glob(STATE_NAME.format("*"))):
            return
        if not self._state_path(checkpoint).exists():
            raise ValueError(
                f"checkpoint {checkpoint!r} has no {self._state_path(checkpoint).name}: it was saved by fewer "
                f"processes than the {self.args.world_size} of now; go on with as many as before"
            )
        loaded = load_file(self._state_path(checkpoint))  # not to the device: safetensors knows no "cpu:0", as gloo has
        state = {name: value.to(self.args.device) for name, value in loaded.items()}
        self.distillation_weight = state.pop("distillation_weight").item()
        for name in {key.rpartition(".")[0] for key in state}:
            rows = {part: state[f"{name}.{part}"] for part in ("student", "teacher")}
            self._queues[name] = RowQueue(self.sdprune_config.queue_size)
            self._queues[name].load_state_dict(rows)

    def _state_path(self, folder: str) -> Path:
        return Path(folder) / STATE_NAME.format(self.args.process_index)
