"""Tiny random models of several architectures, with zeros of every structure in them: fixtures of conftest.py."""

import copy

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertConfig,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    RobertaConfig,
    T5Config,
    XLMRobertaConfig,
)

from sdprune.masking.linears import is_linear, matrix

_SIZES = {
    "vocab_size": 40,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
}
_SIZES |= {"max_position_embeddings": 40}
ARCHITECTURES = {
    "bert": (AutoModelForSequenceClassification, BertConfig(**_SIZES)),
    "distilbert": (
        AutoModelForSequenceClassification,
        DistilBertConfig(vocab_size=40, dim=64, hidden_dim=96, n_layers=2, n_heads=4, max_position_embeddings=40),
    ),
    "roberta": (AutoModelForSequenceClassification, RobertaConfig(**_SIZES)),
    "xlm-roberta": (AutoModelForSequenceClassification, XLMRobertaConfig(**_SIZES)),
    "gpt2": (
        AutoModelForCausalLM,
        GPT2Config(vocab_size=40, n_embd=64, n_layer=2, n_head=4, n_inner=96, n_positions=40, eos_token_id=2),
    ),
    "llama": (AutoModelForCausalLM, LlamaConfig(**_SIZES, num_key_value_heads=2)),
    "t5": (
        AutoModelForSeq2SeqLM,
        T5Config(
            vocab_size=40,
            d_model=64,
            d_kv=16,
            d_ff=96,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
            pad_token_id=0,
        ),
    ),
}


def body_layers(model: torch.nn.Module) -> list[str]:
    """Return the names of the linear layers in the stacks, in order."""
    return [
        name for name, module in model.named_modules() if is_linear(module) and any(map(str.isdigit, name.split(".")))
    ]


@torch.no_grad()
def zero_in_turn(model: torch.nn.Module, seed: int = 0) -> dict[str, str]:
    """Give each linear layer zeros of another structure, in turn; return the structure of each."""
    generator = torch.Generator().manual_seed(seed)
    structures = {}
    for index, name in enumerate(body_layers(model)):
        weight = matrix(model.get_submodule(name))
        structure = ("block", "narrow", "unstructured", "dense")[index % 4]
        if structure == "block":
            kept = torch.rand(-(-weight.shape[0] // 16), -(-weight.shape[1] // 16), generator=generator) < 0.3
            diagonal = torch.arange(max(kept.shape))  # no row or column of blocks is empty: that would be narrower
            kept[diagonal % kept.shape[0], diagonal % kept.shape[1]] = True
            kept = kept.repeat_interleave(16, 0).repeat_interleave(16, 1)[: weight.shape[0], : weight.shape[1]]
        elif structure == "narrow":
            sides = [torch.rand(size, 1, generator=generator) < 0.6 for size in weight.shape]
            kept = sides[0] & sides[1].T
        else:
            kept = torch.rand(weight.shape, generator=generator) < (0.2 if structure == "unstructured" else 1.0)
        weight.mul_(kept.to(weight.dtype))
        structures[name] = structure
    return {name: structure for name, structure in structures.items() if structure != "dense"}


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    """Return the name of each architecture in turn."""
    return request.param


@pytest.fixture(scope="session")
def make_architecture():
    """Return a maker of a random model with zeros: its auto class, the model, the structure of each layer."""

    def make(name: str, dtype: torch.dtype = torch.float32):
        auto_class, config = ARCHITECTURES[name]
        torch.manual_seed(0)
        model = auto_class.from_config(copy.deepcopy(config)).to(dtype).eval()
        return auto_class, model, zero_in_turn(model)

    return make


@pytest.fixture(scope="session")
def make_dense():
    """Return a maker of a random model without zeros: its auto class and the model."""

    def make(name: str):
        auto_class, config = ARCHITECTURES[name]
        torch.manual_seed(0)
        return auto_class, auto_class.from_config(copy.deepcopy(config)).eval()

    return make
