"""What is read from a model's outputs, whatever its architecture and head."""

from types import SimpleNamespace

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertForTokenClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from sdprune.distillation.features import gather, logit_mask, predicts_next_token, reduce_tokens, token_mask
from sdprune.distillation.teacher import Teacher

RIGHT = torch.tensor(
    [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
)
LEFT = RIGHT.flip(1)
SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "pad_token_id": 0,
}
MODELS = {
    "masked LM": lambda: BertForMaskedLM(BertConfig(**SIZES)),
    "GPT-2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=16, bos_token_id=1, eos_token_id=2)
    ),
    "Llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "T5": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0)
    ),
    "ViT": lambda: ViTForImageClassification(
        ViTConfig(**{k: v for k, v in SIZES.items() if k[0] not in "vp"}, image_size=16, patch_size=8)
    ),
    "ModernBERT tokens": lambda: ModernBertForTokenClassification(
        ModernBertConfig(**SIZES, num_labels=3, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2)
    ),
}


@pytest.mark.parametrize("mask", [RIGHT, LEFT, None], ids=["right", "left", "none"])
def test_representations_leave_padding_out(mask):
    hidden = torch.randn(6, 5, 8)
    rows = [hidden[i][mask[i].bool()] if mask is not None else hidden[i] for i in range(6)]
    torch.testing.assert_close(reduce_tokens(hidden, mask, "first"), torch.stack([row[0] for row in rows]))
    torch.testing.assert_close(reduce_tokens(hidden, mask, "mean"), torch.stack([row.mean(0) for row in rows]))
    assert reduce_tokens(hidden, mask, "tokens") is hidden


def test_means_neither_overflow_nor_see_padding():
    hidden = torch.full((2, 600, 4), 150.0, dtype=torch.float16)  # their sum, 90000, is more than fp16 holds
    mask = torch.ones(2, 600, dtype=torch.bool)
    mask[1, 5:] = False
    hidden[1, 5:] = torch.nan
    hidden.requires_grad_()
    for mean in (reduce_tokens(hidden, mask, "mean"), reduce_tokens(hidden[:1], None, "mean")):
        assert mean.dtype == torch.float16
        assert (mean == 150.0).all()
    reduce_tokens(hidden, mask, "mean").sum().backward()
    assert (hidden.grad[1, :5] == torch.tensor(0.2).half()).all()
    assert (hidden.grad[1, 5:] == 0).all()


def test_pooled_needs_a_pooler_and_masks_need_their_length():
    class Body(SimpleNamespace):
        def __getitem__(self, index):
            return self.hidden

    body = Body(hidden=torch.randn(6, 5, 8), pooler_output=None)
    with pytest.raises(ValueError, match="the model has no pooler; choose first, mean or tokens"):
        gather(["pooled"], torch.zeros(6, 2), [body], RIGHT.bool())
    with pytest.raises(ValueError, match=r"attention mask has shape \(6, 4\), the hidden state \(6, 5, 8\)"):
        gather(["tokens"], torch.zeros(6, 2), [body], RIGHT[:, :4].bool())
    with pytest.raises(ValueError, match="hidden_layers: Body, the output of the model's body, holds no hidden"):
        gather(["mean@1"], torch.zeros(6, 2), [body], None)
    with pytest.raises(ValueError, match="the body of the model ran 2 times in one forward pass"):
        gather(["mean"], torch.zeros(6, 2), [body, body], None)


@pytest.mark.parametrize("kind", MODELS)
def test_features_of_every_kind_of_model(kind):
    """They are read from the body's hidden states, of the decoder where there are two stacks."""
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    length = 7
    if kind == "ViT":
        inputs = {"pixel_values": torch.randn(3, 3, 16, 16)}
    else:
        inputs = {"input_ids": torch.randint(3, 40, (3, length)), "attention_mask": torch.ones(3, length).long()}
        inputs["attention_mask"][1, 4:] = 0
    if kind == "T5":
        length = 5
        inputs["labels"] = torch.randint(3, 40, (3, length))
        inputs["labels"][1, 3:] = -100
    found = Teacher(model, copy_model=True)(inputs, ["logits", "first", "mean", "tokens", "mean@1", "tokens@-1"])
    states = model(**inputs, output_hidden_states=True)
    hidden = states.decoder_hidden_states if kind == "T5" else states.hidden_states
    torch.testing.assert_close(found["logits"], states.logits)
    torch.testing.assert_close(found["tokens@-1"], hidden[-1])
    mask = token_mask(inputs, model)
    torch.testing.assert_close(found["mean@1"], reduce_tokens(hidden[1], mask, "mean"))
    if kind != "ViT":  # whose last norm follows the last of the hidden states
        torch.testing.assert_close(found["tokens"], hidden[-1])
        assert mask.sum(1).tolist() == ([5, 3, 5] if kind == "T5" else [7, 4, 7])
    torch.testing.assert_close(found["first"], found["tokens"][:, 0])


def test_next_token_models_are_found():
    assert [kind for kind, make in MODELS.items() if predicts_next_token(make())] == ["GPT-2", "Llama"]


@pytest.mark.parametrize("left", [False, True])
def test_positions_of_a_causal_model_are_those_of_its_loss(left):
    """The mean over the positions that count is the model's own loss."""
    torch.manual_seed(1)
    model = MODELS["Llama"]().eval()
    mask = LEFT if left else RIGHT
    ids = torch.randint(3, 40, mask.shape)
    labels = ids.masked_fill(mask == 0, -100)
    labels[1, :3] = -100  # a prompt
    # the first token of a row follows padding or nothing; no loss of it can be learnt
    labels[torch.arange(6), mask.argmax(1)] = -100
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    outputs = model(**inputs)
    counted = logit_mask(outputs.logits, inputs, token_mask(inputs, model), model)
    following = ids.roll(-1, 1)
    loss = torch.nn.functional.cross_entropy(outputs.logits[counted], following[counted])
    torch.testing.assert_close(loss, outputs.loss)
    assert counted.sum() == (labels != -100).sum()


def test_positions_of_token_classification_are_those_of_its_loss():
    torch.manual_seed(1)
    model = MODELS["ModernBERT tokens"]().eval()
    labels = torch.randint(3, RIGHT.shape).masked_fill(RIGHT == 0, -100)
    labels[:, 0] = -100
    inputs = {"input_ids": torch.randint(3, 40, RIGHT.shape), "attention_mask": RIGHT, "labels": labels}
    logits = model(**inputs).logits
    counted = logit_mask(logits, inputs, token_mask(inputs, model), model)
    assert torch.equal(counted, labels != -100)
    del inputs["labels"]
    assert torch.equal(logit_mask(logits, inputs, token_mask(inputs, model), model), RIGHT.bool())
    assert logit_mask(logits[:, 0], inputs, RIGHT.bool(), model) is None
