"""A walk over `TrainingArguments`: with every option a pruned model comes out right, or it is refused in one line."""

import dataclasses
import math
import shutil

import pytest
import torch
from transformers import DataCollatorWithPadding, TrainingArguments

from sdprune import SDPruneConfig, prune
from sdprune.training.checkpoint import checkpoints

CONFIG = SDPruneConfig(target_sparsity=0.7, pruning_steps=3, distillation="cross_correlation")
NAMES = {field.name for field in dataclasses.fields(TrainingArguments)}
CHECKPOINTING = "activation_checkpointing" if "activation_checkpointing" in NAMES else "gradient_checkpointing"
SAVING = {"save_strategy": "steps", "save_steps": 4}

RIGHT = {  # options whose run must end with the target
    "auto_find_batch_size": {"auto_find_batch_size": True},
    "average_tokens_across_devices": {"average_tokens_across_devices": False, "gradient_accumulation_steps": 2},
    "batch_eval_metrics": {"batch_eval_metrics": True, "eval_strategy": "steps", "eval_steps": 4},
    "data_seed": {"data_seed": 5},
    "dataloader_drop_last": {"dataloader_drop_last": True, "per_device_train_batch_size": 12},
    "dataloader_num_workers": {"dataloader_num_workers": 1, "dataloader_persistent_workers": True},
    "enable_jit_checkpoint": {"enable_jit_checkpoint": True, **SAVING},
    "eval_delay": {"eval_delay": 3, "eval_strategy": "steps", "eval_steps": 2},
    "eval_do_concat_batches": {"eval_do_concat_batches": False, "eval_strategy": "epoch"},
    "eval_on_start": {"eval_on_start": True, "eval_strategy": "steps", "eval_steps": 4},
    "full_determinism": {"full_determinism": True},
    "gradient_accumulation_steps": {"gradient_accumulation_steps": 3},
    "checkpointing": {CHECKPOINTING: True},
    "include_for_metrics": {"include_for_metrics": ["inputs", "loss"]},
    "include_num_input_tokens_seen": {"include_num_input_tokens_seen": True},
    "label_smoothing_factor": {"label_smoothing_factor": 0.1},
    "logging_first_step": {"logging_first_step": True},
    "logging_strategy": {"logging_strategy": "no"},
    "lr_scheduler_type": {"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": 2}},
    "max_grad_norm": {"max_grad_norm": 0.0},
    "neftune_noise_alpha": {"neftune_noise_alpha": 5.0},
    "num_train_epochs": {"max_steps": -1, "num_train_epochs": 0.9},
    "optim adafactor": {"optim": "adafactor"},
    "optim sgd": {"optim": "sgd", "weight_decay": 0.1, "optim_args": "momentum=0.9"},
    "prediction_loss_only": {"prediction_loss_only": True, "eval_strategy": "epoch"},
    "reduce_lr_on_plateau": {
        "lr_scheduler_type": "reduce_lr_on_plateau",
        "eval_strategy": "steps",
        "eval_steps": 2,
        "metric_for_best_model": "loss",
    },
    "remove_unused_columns": {"remove_unused_columns": False},
    "restore_callback_states_from_checkpoint": {"restore_callback_states_from_checkpoint": True},
    "save_only_model": {"save_only_model": True, **SAVING},
    "save_strategy epoch": {"save_strategy": "epoch"},
    "save_total_limit": {"save_total_limit": 1, "save_strategy": "steps", "save_steps": 2},
    "torch_empty_cache_steps": {"torch_empty_cache_steps": 1},
    "train_sampling_strategy": {"train_sampling_strategy": "group_by_length"},
    "warmup_steps": {"warmup_steps": 3, "lr_scheduler_type": "linear"},
    "bf16": {"bf16": True},
}
REFUSED = {  # options that cannot be right, and what is said
    "bf16_full_eval": (
        {"bf16_full_eval": True},
        "bf16_full_eval=True would leave the pruned weights in half precision",
    ),
    "fp16_full_eval": ({"fp16_full_eval": True}, "fp16_full_eval=True would leave the pruned weights in half"),
    "load_best_model_at_end": (
        {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 4, **SAVING},
        "would keep a model from before the target sparsity; set load_best_model_at_end=False",
    ),
    "save_strategy best": (
        {"save_strategy": "best", "eval_strategy": "steps", "metric_for_best_model": "loss"},
        "would keep a model from before the target sparsity",
    ),
    "debug": ({"debug": "underflow_overflow"}, "debug='underflow_overflow' would leave its hooks in the pruned model"),
    "resume_from_checkpoint": ({"resume_from_checkpoint": True}, "holds no run to resume"),
}
# Options that decide neither who calls `train`, nor what is saved, nor what a step computes: where and how fast the
# same is computed, what is shown or uploaded, and the sizes that every other test sets.
ELSEWHERE = (
    {"output_dir", "max_steps", "per_device_train_batch_size", "per_device_eval_batch_size", "learning_rate", "seed"},
    {"adam_beta1", "adam_beta2", "adam_epsilon", "optim", "optim_args", "weight_decay", "lr_scheduler_kwargs"},
    {"save_strategy", "save_steps", "eval_strategy", "eval_steps", "logging_steps", "disable_tqdm", "report_to"},
    {"do_train", "do_eval", "do_predict", "log_level", "log_level_replica", "log_on_each_node", "run_name", "project"},
    {"metric_for_best_model", "greater_is_better", "skip_memory_metrics", "logging_nan_inf_filter"},
    {name for name in NAMES if name.startswith(("hub_", "trackio_", "dataloader_", "ddp_"))} | {"push_to_hub"},
    # more than one process, or hardware that is not here; DDP has tests of its own
    {"accelerator_config", "deepspeed", "fsdp", "fsdp_config", "parallelism_config", "local_rank", "save_on_each_node"},
    {"eval_use_gather_object", "eval_accumulation_steps", "fp16", "tf32", "use_cpu", "use_cache"},
    {"use_liger_kernel", "liger_kernel_config", "gradient_checkpointing", "activation_checkpointing_kwargs"},
    # tests of their own: resuming below and in test_resume.py, compiled models in tests/sdprune/masking
    {"ignore_data_skip", "torch_compile", "torch_compile_backend", "torch_compile_mode"},
    {"gradient_checkpointing_kwargs", "length_column_name", "label_names", "optim_target_modules"},
)


@pytest.fixture
def run(model_factory, dataset_factory, tokenizer, arguments):
    """Return what prunes a small model, the same one each time, under the options given."""

    def make(**options):
        return prune(
            model_factory(),
            CONFIG,
            dataset_factory(64),
            dataset_factory(16, seed=3),
            args=arguments(**options),
            processing_class=tokenizer,
            data_collator=DataCollatorWithPadding(tokenizer),
        )

    return make


def test_every_option_is_walked_or_known():
    """But for those of releases that did not exist when this was written."""
    walked = {name for options in RIGHT.values() for name in options}
    walked |= {name for options, _ in REFUSED.values() for name in options}
    known = walked.union(*ELSEWHERE)
    assert {name for name in walked if name not in NAMES} == set()
    if unknown := NAMES - known:
        pytest.skip(f"new options of transformers: {', '.join(sorted(unknown))}")


@pytest.mark.parametrize("case", RIGHT)
def test_right(case, run, batch):
    result = run(**RIGHT[case])
    assert result.sparsity.linear == pytest.approx(0.7, abs=1e-3)
    assert all(value.dtype == torch.float32 for value in result.model.parameters())
    assert math.isfinite(result.metrics["eval_loss"])
    for layer in result.model.modules():
        if isinstance(layer, torch.nn.Linear):
            assert type(layer) is torch.nn.Linear
    assert bool(result.model.eval()(**batch).logits.isfinite().all())


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_written(case, run, tmp_path):
    options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message) as raised:
        run(**options)
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_a_run_goes_on_from_whole_checkpoints_only(run, tmp_path):
    run(save_only_model=True, **SAVING)
    folder = tmp_path / "run"
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-4", "checkpoint-8"]
    for resume in (True, str(folder / "checkpoint-4")):
        with pytest.raises(ValueError, match=r"holds no state of the optimizer \(save_only_model=True\)") as raised:
            run(resume_from_checkpoint=resume)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("options", [{}, {"restore_callback_states_from_checkpoint": True}, {"save_total_limit": 1}])
def test_resuming_under_other_options_of_saving(options, run, tmp_path):
    expected = run(**SAVING).model.state_dict()
    shutil.rmtree(tmp_path / "run" / "checkpoint-8")
    found = run(resume_from_checkpoint=True, **SAVING, **options).model.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_rows_that_are_not_skipped(run, tmp_path):
    """`ignore_data_skip` asks for other rows after resuming: another model, with the same target."""
    run(**SAVING)
    shutil.rmtree(tmp_path / "run" / "checkpoint-8")
    result = run(resume_from_checkpoint=True, ignore_data_skip=True, **SAVING)
    assert result.sparsity.linear == pytest.approx(0.7, abs=1e-3)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, of a function
def test_compiled_by_the_trainer(run, batch):
    result = run(torch_compile=True, torch_compile_backend="eager", max_steps=4)
    assert result.sparsity.linear == pytest.approx(0.7, abs=1e-3)
    assert type(result.model).__name__ == "BertForSequenceClassification"
    assert not any(name.startswith("_orig_mod") for name in result.model.state_dict())
