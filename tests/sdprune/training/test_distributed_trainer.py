"""Two processes that train one model together: what one process alone does, in the same folder."""

import json
import os
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, TrainerCallback, TrainingArguments

from sdprune import SDPruneCallback, SDPruneConfig, SDPruneTrainer, prune
from sdprune.masking.swap import masked_layers
from sdprune.training.checkpoint import checkpoints
from sdprune.training.progress import TrainingInterrupted
from tests.ranks import spawn

QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
SCHEDULE = {"target_sparsity": 0.5, "pruning_steps": 2, "start_ratio": 0.3, "end_ratio": 0.7}
BLOCKS = {"structure": "block", "block_shape": (4, 4)}
RUNS = {
    "magnitude": {"distillation": {"cross_correlation": 0.05, "kl": 1.0}, "teacher_cache": "cache"},
    "taylor": {"criterion": "taylor", "distillation": {"cross_correlation": 0.05, "aligned_cosine": 1.0}, **BLOCKS},
}
CHANGES = {"magnitude": {}, "taylor": {"gradient_accumulation_steps": 2}}
STEERED = RUNS["magnitude"] | {"gradient_ratio": 0.5, "gradient_ratio_steps": 1, "queue_size": 16}
STEERED |= {"criterion": "movement", "diagnostics_steps": 4}


def make_model():
    torch.manual_seed(0)
    config = BertConfig(vocab_size=40, max_position_embeddings=16, initializer_range=0.3, **SIZES, **QUIET)
    return BertForSequenceClassification(config)


def make_rows(count=40):
    generator = torch.Generator().manual_seed(1)
    rows = []
    for index in range(count):
        length = int(torch.randint(4, 12, (), generator=generator))
        rows.append({"input_ids": torch.randint(2, 40, (length,), generator=generator), "labels": index % 2})
    return rows


def collate(rows):
    ids = torch.nn.utils.rnn.pad_sequence([row["input_ids"] for row in rows], batch_first=True)
    return {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }


def make_args(folder, **changes):
    values = {
        "output_dir": str(folder),
        "max_steps": 8,
        "per_device_train_batch_size": 4 if "WORLD_SIZE" in os.environ else 8,
        "learning_rate": 0.05,
        "optim": "sgd",  # Adam makes steps of full length out of gradients that are rounding alone
        "logging_steps": 1,
        "save_steps": 4,
        "report_to": "none",
        "seed": 3,
        "use_cpu": True,
        "ddp_backend": "gloo" if "WORLD_SIZE" in os.environ else None,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
    }
    return TrainingArguments(**(values | changes))


class KeepMasks(TrainerCallback):
    """Keeps a copy of the masks after every step."""

    def __init__(self):
        self.masks = []

    def on_step_end(self, args, state, control, **kwargs):
        self.masks.append({name: layer.mask.clone() for name, layer in masked_layers(kwargs["model"]).items()})


class InterruptAt(TrainerCallback):
    """Does what Ctrl-C does, in one process alone."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step and args.process_index == 0:
            os.kill(os.getpid(), 2)


def run(folder, fields, callbacks=(), **changes):
    """Prune the model; return its weights and the masks after every step."""
    fields = dict(fields)
    if "teacher_cache" in fields:
        fields["teacher_cache"] = str(folder.parent / fields["teacher_cache"])
    keep = KeepMasks()
    result = prune(
        make_model(),
        SDPruneConfig(**(SCHEDULE | fields)),
        make_rows(),
        make_rows(8),
        args=make_args(folder, **changes),
        data_collator=collate,
        callbacks=[keep, *callbacks],
    )
    metrics = {name: value for name, value in result.metrics.items() if name == "eval_loss"}
    return {"weights": result.model.state_dict(), "masks": keep.masks, "metrics": metrics}


def train_on_a_rank(folder):
    found = {name: run(folder / name, fields, **CHANGES[name]) for name, fields in RUNS.items()}
    by_length = {"train_sampling_strategy": "group_by_length"}
    found["steered"] = run(folder / "steered", STEERED, **by_length)
    with pytest.raises(TrainingInterrupted, match="checkpoint-5"):
        run(folder / "resumed", STEERED, [InterruptAt(4)], **by_length)
    (folder / "resumed" / "checkpoint-7").mkdir(exist_ok=True)  # as a kill leaves it
    found["resumed"] = run(folder / "resumed", STEERED, resume_from_checkpoint="latest", **by_length)
    torch.save(found, folder / f"{os.environ['RANK']}.pt")


def log(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder):
    return [{name: value for name, value in row.items() if name.startswith("loss")} for row in log(folder)]


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
def test_two_processes_train_as_one(tmp_path):
    together = tmp_path / "together"
    spawn(train_on_a_rank, 2, together)
    first, second = (torch.load(together / f"{rank}.pt") for rank in (0, 1))
    assert list(first) == [*RUNS, "steered", "resumed"]
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    for name, fields in RUNS.items():
        alone = run(tmp_path / name, fields, **CHANGES[name])
        assert masks_per_run(alone) == 3  # none pruned, then two pruning steps
        torch.testing.assert_close(first[name]["masks"], alone["masks"], rtol=0, atol=0)
        torch.testing.assert_close(first[name]["weights"], alone["weights"], rtol=1e-3, atol=1e-5)
        for row, other in zip(losses(together / name), losses(tmp_path / name), strict=True):
            # the first loss_kl, of a model with itself, is 1e-8 of rounding
            assert row == pytest.approx(other, rel=1e-3, abs=1e-7)
    # steered, with a queue on each rank and a warm cache; interrupted in one process alone, and resumed
    torch.testing.assert_close(first["resumed"]["weights"], first["steered"]["weights"], rtol=0, atol=0)
    weights = [row["distillation_weight"] for row in log(together / "steered") if "distillation_weight" in row]
    assert len(weights) == 8
    assert len(set(weights)) > 4
    assert [row.get("distillation_weight") for row in log(together / "resumed") if "loss" in row] == weights
    # what one process alone would leave, and the state of each rank
    for name in RUNS:
        ours, theirs = (
            {path.relative_to(base / name) for path in (base / name).rglob("*") if path.is_file()}
            for base in (together, tmp_path)
        )
        assert ours - theirs == {Path(f"checkpoint-{step}/rng_state_{rank}.pth") for step in (4, 8) for rank in (0, 1)}
    assert sorted(path.name for path in together.iterdir() if path.is_dir()) == [
        "cache",
        *sorted([*RUNS, "resumed", "steered"]),
    ]
    assert len(checkpoints(together / "resumed")) == len(list((together / "resumed").glob("checkpoint-*")))


def masks_per_run(found):
    states = [tuple(mask.flatten().tolist() for mask in masks.values()) for masks in found["masks"]]
    return len({str(state) for state in states})


def test_a_checkpoint_of_fewer_processes_is_refused(tmp_path):
    def make_trainer():
        config = SDPruneConfig(**(SCHEDULE | {"distillation": "cross_correlation", "queue_size": 8}))
        args = make_args(tmp_path / "run", max_steps=6)
        callbacks = [SDPruneCallback(config)]
        return SDPruneTrainer(
            make_model(),
            args,
            config=config,
            train_dataset=make_rows(),
            data_collator=collate,
            callbacks=callbacks,
            teacher_model=make_model(),
        )

    make_trainer().train()
    checkpoint = tmp_path / "run" / "checkpoint-4"
    (checkpoint / "sdprune_distillation_0.safetensors").rename(checkpoint / "sdprune_distillation_3.safetensors")
    with pytest.raises(ValueError, match=r"has no sdprune_distillation_0.safetensors: it was saved by fewer processes"):
        make_trainer().train(resume_from_checkpoint=str(checkpoint))
