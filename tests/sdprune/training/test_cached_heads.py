"""The teacher's cache under heads other than classification of whole texts: the losses are those without it."""

import pytest
import torch
from transformers import BertConfig, BertForTokenClassification, DataCollatorForTokenClassification, TrainerCallback

from sdprune import SDPruneCallback, SDPruneConfig, SDPruneTrainer
from sdprune.data.examples import IGNORED_LABEL, EncodedExamples

# rows of a model with larger weights differ by more than their rounding
LARGE = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.3}


class Losses(TrainerCallback):
    """Keeps the parts of the loss at every step."""

    def __init__(self):
        self.rows = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.rows.append({name: value for name, value in logs.items() if name.startswith("loss")})


def tagged(rows):
    """Three tags; special tokens and every fourth word have none."""
    labels = [
        [
            IGNORED_LABEL if place in (0, len(ids) - 1) or place % 4 == 3 else token % 3
            for place, token in enumerate(ids)
        ]
        for ids in rows.columns["input_ids"]
    ]
    return EncodedExamples(rows.columns, labels)


def tagger(model_factory, seed):
    config = BertConfig(**(model_factory().config.to_dict() | LARGE | {"num_labels": 3}))
    torch.manual_seed(seed)
    return BertForTokenClassification(config)


HEADS = {
    "tags": (tagged, tagger, DataCollatorForTokenClassification, {"kl": 1.0, "mse": 0.1, "cross_correlation": 0.1}),
    "number": (
        lambda rows: EncodedExamples(rows.columns, [0.1 * len(ids) for ids in rows.columns["input_ids"]]),
        lambda factory, seed: factory(seed, **LARGE, num_labels=1, problem_type="regression"),
        lambda tokenizer: None,
        {"mse": 1.0},
    ),
}


@pytest.mark.parametrize("representation", ["logits", "tokens"])
@pytest.mark.parametrize("head", HEADS)
def test_the_cache_changes_no_loss(
    head, representation, model_factory, dataset_factory, tokenizer, arguments, tmp_path
):
    label, build, collator, distillation = HEADS[head]
    rows = label(dataset_factory(40))
    logged = []
    for cache in (None, "cache", "cache"):  # filled, then found again
        config = SDPruneConfig(
            target_sparsity=0.5,
            pruning_steps=2,
            distillation=distillation,
            representation=representation,
            teacher_cache=None if cache is None else str(tmp_path / cache),
        )
        losses = Losses()
        trainer = SDPruneTrainer(
            build(model_factory, 0),
            # Adam makes steps of full length out of gradients that are rounding alone
            arguments(max_steps=6, logging_steps=1, optim="sgd", gradient_accumulation_steps=2),
            config=config,
            train_dataset=rows,
            processing_class=tokenizer,
            data_collator=collator(tokenizer),
            teacher_model=build(model_factory, 1),
            callbacks=[SDPruneCallback(config), losses],
        )
        trainer.train()
        logged.append(losses.rows)
    assert len(logged[0]) == 6
    assert all(row["loss_mse"] > 1e-3 for row in logged[0])
    for found in logged[1:]:
        for row, expected in zip(found, logged[0], strict=True):
            assert row == pytest.approx(expected, rel=1e-6, abs=1e-6)
