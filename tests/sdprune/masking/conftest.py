"""Tiny random models of ten architectures, built from configurations, without any download."""

from collections.abc import Callable

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
)

USUAL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 50,
    "max_position_embeddings": 32,
}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
T5 = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "vocab_size": 50,
    "decoder_start_token_id": 0,
}
DEBERTA = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8, "share_att_key": True}
DISTIL = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "vocab_size": 50, "max_position_embeddings": 32}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 50, "n_positions": 32}
VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}

MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "bert": lambda: BertForSequenceClassification(BertConfig(**USUAL)),
    "roberta": lambda: RobertaForSequenceClassification(RobertaConfig(**USUAL)),
    "xlm-r": lambda: XLMRobertaForSequenceClassification(XLMRobertaConfig(**USUAL)),
    "distilbert": lambda: DistilBertForSequenceClassification(DistilBertConfig(**DISTIL)),
    "deberta-v2": lambda: DebertaV2ForSequenceClassification(DebertaV2Config(**USUAL, **DEBERTA)),
    "modernbert": lambda: ModernBertForSequenceClassification(
        ModernBertConfig(**USUAL, **SPECIAL, cls_token_id=1, sep_token_id=2)
    ),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2, bos_token_id=1, eos_token_id=2)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**USUAL, num_key_value_heads=2)),
    "t5": lambda: T5ForConditionalGeneration(T5Config(**T5)),
    "t5-gated": lambda: T5ForConditionalGeneration(T5Config(**T5, feed_forward_proj="gated-gelu")),
    "vit": lambda: ViTForImageClassification(ViTConfig(**VIT, image_size=16, patch_size=8)),
}


def make_architecture(name: str, seed: int = 0) -> PreTrainedModel:
    """Return a random model whose layers have weights large enough for every unit to matter."""
    torch.manual_seed(seed)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def make_inputs(model: PreTrainedModel, rows: int = 3) -> dict[str, torch.Tensor]:
    """Return a small batch with labels for `model`."""
    generator = torch.Generator().manual_seed(1)
    if model.main_input_name == "pixel_values":
        return {
            "pixel_values": torch.randn(rows, 3, 16, 16, generator=generator),
            "labels": torch.tensor([0, 1, 0])[:rows],
        }
    ids = torch.randint(3, 50, (rows, 6), generator=generator)
    generative = type(model).__name__.endswith(("LMHeadModel", "ForCausalLM", "ForConditionalGeneration"))
    return {"input_ids": ids, "labels": ids if generative else torch.tensor([0, 1, 0])[:rows]}


@pytest.fixture(params=list(MODELS))
def architecture(request: pytest.FixtureRequest) -> str:
    """Name each of the architectures in turn."""
    return request.param


@pytest.fixture(scope="session")
def build() -> Callable[..., PreTrainedModel]:
    return make_architecture


@pytest.fixture(scope="session")
def inputs_for() -> Callable[..., dict[str, torch.Tensor]]:
    return make_inputs
