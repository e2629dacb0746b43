"""What masking and freezing cannot reach: weights in the stack that belong to no linear layer, and what is no model."""

import logging

import pytest
import torch
import torch.nn.utils.prune
import transformers
from torch import nn

from sdprune import SDPruneConfig, freeze_sparsity
from sdprune.masking.pruner import Sparsity, mask_model, measure_sparsity, prune_step
from sdprune.masking.select import unreached
from sdprune.masking.swap import unswap

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
QWEN = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
ROUTER = 4 * 32
# class -> options, weights of one layer out of reach
EXPERTS = {
    "Mixtral": ({"num_local_experts": 4}, 4 * 3 * 32 * 48 + ROUTER),
    "Qwen2Moe": (QWEN | {"shared_expert_intermediate_size": 24}, 4 * 3 * 32 * 24 + ROUTER),
    "Qwen3Moe": (QWEN, 4 * 3 * 32 * 24 + ROUTER),
    "Olmoe": ({"num_experts": 4, "num_experts_per_tok": 2}, 4 * 3 * 32 * 48 + ROUTER),
    "GptOss": (  # the biases of its experts are matrices too
        {"num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": ["full_attention"] * 2},
        4 * 3 * 32 * 48 + 4 * (2 * 48 + 32) + ROUTER,
    ),
}


def with_experts(kind):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**(SIZES | EXPERTS[kind][0]))
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


@pytest.mark.parametrize("kind", EXPERTS)
def test_experts_are_told(kind, caplog):
    model = with_experts(kind)
    count = 2 * EXPERTS[kind][1]
    total = sum(value.numel() for value in model.parameters())
    found = unreached(model)
    assert sum(found.values()) == count
    assert all(
        name.startswith("model.layers.") and value == model.get_parameter(name).numel() for name, value in found.items()
    )
    ids = torch.arange(3, 11)[None]
    before = model(input_ids=ids).logits
    config = SDPruneConfig(target_sparsity=0.7, pruning_steps=1)
    with caplog.at_level(logging.WARNING, logger="sdprune"):
        mask_model(model, config)
    (record,) = (each for each in caplog.records if each.name.startswith("sdprune"))
    for part in (f"{100 * count / total:.1f} %", f"{len(found)} ", "mlp."):
        assert part in record.getMessage()
    assert torch.equal(model(input_ids=ids).logits, before)
    prune_step(model, config, 0.7)
    sparsity = measure_sparsity(model)
    assert sparsity.unreached == count
    assert sparsity.unreached_share == count / total
    assert sparsity.zeros + sparsity.unreached <= total


@pytest.mark.parametrize("kind", ["Mixtral", "GptOss"])
def test_frozen_experts_keep_their_zeros(kind):
    model = with_experts(kind).train()
    names = [name for name, value in model.named_parameters() if ".experts." in name]
    with torch.no_grad():
        for name in names:
            value = model.get_parameter(name)
            value.masked_fill_(torch.rand(value.shape) < 0.5, 0.0)
    zeros = {name: model.get_parameter(name) == 0 for name in names}
    frozen = freeze_sparsity(model)
    assert set(frozen.masks) == set(names)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    ids = torch.arange(3, 11)[None]
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    for name, zero in zeros.items():
        assert torch.equal(model.get_parameter(name) == 0, zero)
    frozen.remove()


def test_nothing_of_a_bert_is_out_of_reach(model, caplog):
    with caplog.at_level(logging.WARNING, logger="sdprune"):
        mask_model(model, SDPruneConfig())
    assert not caplog.records
    assert unreached(model) == unreached(unswap(model)) == {}
    sparsity = measure_sparsity(model, ["bert.encoder.layer.0.output.dense"])
    assert (sparsity.unreached, sparsity.unreached_share) == (0, 0.0)
    assert Sparsity({}, 0, 0, 0).unreached_share == 0.0


def test_convolutions_in_the_stack_are_out_of_reach():
    config = transformers.ConvBertConfig(
        vocab_size=50,
        embedding_size=32,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
    )
    found = unreached(transformers.ConvBertModel(config))
    assert len(found) == 2 * 3  # its bias has two dimensions as well
    assert all(".key_conv_attn_layer." in name for name in found)


def test_what_counts_as_out_of_reach():
    """Not vectors, embeddings, normalisations, whole numbers, what is tied to them, nor what lies outside the stack."""
    stack = nn.ModuleList(
        [
            nn.Linear(4, 4),
            nn.Embedding(6, 4),
            nn.LayerNorm((2, 4)),
            nn.Conv1d(4, 4, 3),
            nn.Module(),
        ]
    )
    stack[4].register_parameter("free", nn.Parameter(torch.zeros(3, 4)))
    stack[4].register_parameter("tied", stack[1].weight)
    stack[4].register_parameter("vector", nn.Parameter(torch.zeros(4)))
    stack[4].register_parameter("whole", nn.Parameter(torch.zeros(3, 4, dtype=torch.int64), requires_grad=False))
    model = nn.ModuleDict({"layers": stack, "head": nn.Conv1d(4, 4, 1)})
    assert unreached(model) == {"layers.3.weight": 48, "layers.4.free": 12}
    nn.utils.parametrizations.weight_norm(stack[0])
    assert unreached(model) == {"layers.3.weight": 48, "layers.4.free": 12}
    assert unreached(nn.Sequential(nn.Conv1d(4, 4, 1))) == {}


@pytest.mark.parametrize("given", [None, 3, "bert", nn.functional.linear], ids=repr)
def test_what_is_no_module(given):
    for call in (freeze_sparsity, lambda each: mask_model(each, SDPruneConfig())):
        with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got "):
            call(given)


def test_what_freezing_says_of_models_without_values_and_of_zeros_that_torch_holds():
    with pytest.raises(ValueError, match="parameter 'weight' is on the meta device"):
        freeze_sparsity(nn.Linear(4, 4, device="meta"))
    layer = nn.Linear(4, 4)
    nn.utils.prune.l1_unstructured(layer, "weight", 0.5)
    with pytest.raises(ValueError, match=r"no weight matrix with exact zeros to keep.*prune\.remove"):
        freeze_sparsity(layer)
    nn.utils.prune.remove(layer, "weight")
    assert freeze_sparsity(layer).sparsity == 0.5


def test_a_traced_model_is_called_what_it_is():
    traced = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match=r"traced program \(GraphModule\).*the module that it was made from"):
        mask_model(traced, SDPruneConfig())
