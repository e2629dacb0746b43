"""Plans: what may win is timed, what wins is converted, and the logits stay."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from sdp_kernels import BitMask
from sdprune import BlockSparseLinear, MaskedLinear, SDPruneConfig, export, plan
from sdprune.layers.dense import sharing_copy
from sdprune.layers.narrow import NarrowLinear
from sdprune.masking.pruner import mask_model, prune_step
from sdprune.masking.swap import unswap
from sdprune.speed.plan import apply
from sdprune.speed.plan_record import Candidate, LayerPlan, Plan
from sdprune.speed.timing import Times


def prune_blocks(model, sparsity=0.75, block_shape=(8, 8)):
    """Zero random blocks of every linear layer of the stack."""
    config = SDPruneConfig(target_sparsity=sparsity, structure="block", block_shape=block_shape)
    mask_model(model, config)
    prune_step(model, config, sparsity)
    return unswap(model)


@pytest.fixture
def pruned(model_factory):
    return prune_blocks(model_factory())


@pytest.fixture
def always(monkeypatch):
    """Times as they would be if only the named form were fast; the last of several calls is the whole model's."""

    def use(fast):
        def measure(calls, device, repeats):
            for call in calls.values():
                call()
            return {name: Times(*([1.0] * 3 if name in (fast, "converted") else [4.0] * 3), repeats) for name in calls}

        monkeypatch.setattr("sdprune.speed.plan.measure", measure)

    return use


def logits(model, batch):
    with torch.inference_mode():
        return model(**batch).logits


def test_times_are_real_and_the_model_is_untouched(pruned, batch):
    pruned.train()
    pruned.bert.pooler.eval()
    state = {name: tensor.clone() for name, tensor in pruned.state_dict().items()}
    modules = dict(pruned.named_modules())
    found = plan(pruned, batch, block_shapes=((8, 8), (16, 8)), repeats=3)
    assert dict(pruned.named_modules()) == modules
    assert all(not module._forward_pre_hooks for module in modules.values())
    assert pruned.training
    assert not pruned.bert.pooler.training
    assert all(torch.equal(tensor, state[name]) for name, tensor in pruned.state_dict().items())
    assert len(found.layers) == 12
    tokens = batch["input_ids"].numel()
    for layer in found.layers:
        assert (layer.calls, layer.tokens, layer.sparsity) == (1, tokens, 0.75)
        assert layer.shape == tuple(modules[layer.name].weight.shape)
        assert {"dense", "8x8"} <= set(layer.candidates)
        assert layer.candidates["dense"].density == 1.0
        assert layer.candidates["8x8"].density == 0.25
        assert all(form.density < 1.0 for name, form in layer.candidates.items() if name != "dense")
        for form in layer.candidates.values():
            assert 0 < form.times.p20 <= form.times.median <= form.times.p80
            assert form.times.repeats == 3
    assert found.dense.median > 0
    assert found.threads == torch.get_num_threads()
    assert found.dtype == "float32"


def test_what_wins_is_converted_and_logits_stay(pruned, batch, always):
    always("8x8")
    expected = logits(pruned, batch)
    found = plan(pruned, batch, block_shapes=((8, 8),))
    assert set(found.choices.values()) == {"8x8"}
    assert len(found.choices) == 12
    assert found.expected_speedup == pytest.approx(4.0 / 1e-9)  # twelve layers save 3 ms each of a model of 4 ms
    assert found.measured_speedup == 4.0
    embeddings, pooler = pruned.bert.embeddings, pruned.bert.pooler.dense
    assert apply(pruned, found) is pruned
    assert sum(isinstance(module, BlockSparseLinear) for module in pruned.modules()) == 12
    assert pruned.bert.embeddings is embeddings
    assert pruned.bert.pooler.dense is pooler
    torch.testing.assert_close(logits(pruned, batch), expected)
    with pytest.raises(ValueError, match=r"layer 'bert.*' must be a linear layer .* got BlockSparseLinear"):
        apply(pruned, found)


def test_nothing_is_converted_that_loses(pruned, batch, always):
    always("dense")
    before = dict(pruned.named_modules())
    found = plan(pruned, batch, block_shapes=((8, 8),))
    assert found.choices == {}
    assert found.forced_speedup == 1.0 / (1.0 + 12 * 3.0)  # the other form of each of twelve layers takes 3 ms more
    assert found.converted is None
    assert found.expected_speedup == found.measured_speedup == 1.0
    assert {layer.density for layer in found.layers} == {1.0}
    assert dict(apply(pruned, found).named_modules()) == before


def test_nothing_is_converted_if_the_model_gets_slower(pruned, batch, monkeypatch):
    def measure(calls, device, repeats):
        whole = "converted" in calls
        fast = "dense" if whole else "8x8"
        return {name: Times(*[1.0 if name == fast else 2.0] * 3, repeats) for name in calls}

    monkeypatch.setattr("sdprune.speed.plan.measure", measure)
    found = plan(pruned, batch, block_shapes=((8, 8),))
    assert found.choices == {}
    assert found.measured_speedup == found.expected_speedup == 1.0


@pytest.mark.parametrize(("dense", "sparse", "wins"), [(2.0, 1.9, False), (2.0, 1.0, True)])
def test_a_win_must_exceed_the_noise(pruned, batch, monkeypatch, dense, sparse, wins):
    def measure(calls, device, repeats):
        return {
            name: Times(value := dense if name == "dense" else sparse, 0.8 * value, 1.2 * value, repeats)
            for name in calls
        }

    monkeypatch.setattr("sdprune.speed.plan.measure", measure)
    assert bool(plan(pruned, batch, block_shapes=((8, 8),)).choices) == wins


def test_empty_rows_and_columns_become_narrow_layers(model, batch, always):
    feed_forward = model.bert.encoder.layer[0].intermediate.dense, model.bert.encoder.layer[0].output.dense
    with torch.no_grad():
        feed_forward[0].weight[:40] = 0
        feed_forward[1].weight[:, :40] = 0
    expected = logits(model, batch)
    always("narrow")
    found = plan(model, batch, block_shapes=((64, 32),))
    assert list(found.choices.values()) == ["narrow", "narrow"]
    assert all(layer.density == layer.candidates["narrow"].density == 0.375 for layer in found.layers)
    apply(model, found)
    assert isinstance(model.bert.encoder.layer[0].output.dense, NarrowLinear)
    torch.testing.assert_close(logits(model, batch), expected)


def test_zeros_that_leave_no_block_empty_are_not_timed(model, batch):
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight[::2, ::2] = 0
    (layer,) = plan(model, batch, repeats=3).layers
    assert (layer.sparsity, layer.choice, layer.speedup, dict(layer.candidates)) == (0.25, "dense", 1.0, {})
    assert plan(model, batch, exclude_modules=".*output.dense", repeats=3).layers == ()


def test_decoders_and_masked_layers(always):
    always("8x8")
    ids = {"input_ids": torch.randint(2, 40, (2, 6)), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    sizes = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "pad_token_id": 0}
    config = LlamaConfig(**sizes, num_key_value_heads=1, intermediate_size=64, max_position_embeddings=16)
    llama = LlamaForSequenceClassification(config).eval()
    pruning = SDPruneConfig(structure="block", block_shape=(8, 8))
    mask_model(llama, pruning)
    prune_step(llama, pruning, 0.5)
    expected = logits(llama, ids)
    found = plan(llama, ids, block_shapes=((8, 8),))
    assert len(found.choices) == 14
    apply(llama, found)
    assert not any(isinstance(module, MaskedLinear) for module in llama.modules())
    torch.testing.assert_close(logits(llama, ids), expected)


@pytest.mark.parametrize("form", ["8x16", "narrow"])
def test_layers_that_store_their_weight_transposed(always, tmp_path, form):
    ids = {"input_ids": torch.randint(2, 40, (2, 6)), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    config = GPT2Config(vocab_size=40, n_embd=32, n_layer=1, n_head=2, n_positions=16, pad_token_id=0, num_labels=8)
    gpt2 = prune_blocks(GPT2ForSequenceClassification(config).eval(), 0.5, (8, 16))
    with torch.no_grad():
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
            gpt2.get_submodule(f"transformer.h.0.{name}").weight[:16] = 0  # the first 16 inputs
        gpt2.score.weight[:, :16] = 0
    expected = logits(gpt2, ids)
    state = {name: value.clone() for name, value in gpt2.state_dict().items()}
    always(form)
    found = plan(gpt2, ids, block_shapes=((8, 16),))
    assert {layer.name: layer.shape for layer in found.layers}["transformer.h.0.attn.c_attn"] == (96, 32)
    assert list(found.choices.values()) == [form] * 5
    apply(gpt2, found)
    torch.testing.assert_close(logits(gpt2, ids), expected)
    export(gpt2, tmp_path / "plain", "plain")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "plain")
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())
    export(again, tmp_path / "compact", "compact", plan=found)
    small = AutoModelForSequenceClassification.from_pretrained(tmp_path / "compact", variant="compact")
    kind = NarrowLinear if form == "narrow" else BlockSparseLinear
    assert sum(isinstance(module, kind) for module in small.modules()) >= 3
    torch.testing.assert_close(logits(small, ids), expected)
    state_again = load_file(export(small, tmp_path / "again", "plain") / "model.safetensors")
    assert all(torch.equal(value, state[name]) for name, value in state_again.items())


class Twice(nn.Module):
    """Calls one layer twice, and another one never."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.never = nn.Linear(16, 16)
        self.tied = nn.Embedding(16, 16)
        self.head = nn.Linear(16, 16, bias=False)
        self.head.weight = self.tied.weight
        with torch.no_grad():
            for layer in (self.first, self.never, self.head):
                layer.weight[:8] = 0

    def forward(self, rows):
        return self.head(self.first(self.first(rows)))


def test_shared_layers_count_each_call_and_shared_weights_stay(always):
    always("8x16")
    model = Twice()
    sample = {"rows": torch.randn(3, 16)}
    with torch.no_grad():
        expected = model(**sample)
    found = plan(model, sample, block_shapes=((8, 16),))
    assert [(layer.name, layer.calls, layer.choice) for layer in found.layers] == [
        ("first", 2, "8x16"),
        ("never", 0, "dense"),
    ]
    head = model.head
    apply(model, found)
    assert isinstance(model.first, BlockSparseLinear)
    assert model.head is head
    with torch.no_grad():
        torch.testing.assert_close(model(**sample), expected)
    with pytest.raises(ValueError, match=r"target_modules chose 'head', whose weight is shared by tied\.weight, head"):
        plan(model, sample, target_modules="head")


def test_plans_are_json(pruned, batch, tmp_path, always):
    always("8x8")
    found = plan(pruned, batch, block_shapes=((8, 8),))
    found.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again == found
    apply(pruned, again)
    table = str(found).splitlines()
    assert len(table) == 14
    assert "bert.encoder.layer.0.attention.self.query" in table[1]
    assert table[1].split()[-5:] == ["8x8", "25.0%", "4.000", "1.000", "4.00"]
    assert "12 of 12 pruned layers are converted" in table[-1]
    assert "measured 4.00" in table[-1]
    for text, message in {
        "{": "is not JSON",
        "[]": "holds no plan",
        "{}": "what Plan.to_dict gives: 'layers'",
        json.dumps(found.to_dict() | {"more": 1}): "what Plan.to_dict gives: .*more",
    }.items():
        (tmp_path / "wrong.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            Plan.load(tmp_path / "wrong.json")


def test_plans_of_other_models_are_refused(pruned, batch, model_factory, always):
    always("8x8")
    found = plan(pruned, batch, block_shapes=((8, 8),))
    other = model_factory()
    before = dict(other.named_modules())
    with pytest.raises(ValueError, match=r"keeps 100.0% of its weight as 8x8, but 25.0% when the plan was made"):
        apply(other, found)
    message = r"must be a linear layer with an \(out, in\) weight of \(64, 32\), got \(48, 32\)"
    with pytest.raises(ValueError, match=message):
        apply(prune_blocks(model_factory(intermediate_size=48)), found)
    assert dict(other.named_modules()) == before
    with pytest.raises(ValueError, match=r"the model has no layer 'bert\.encoder"):
        apply(nn.Sequential(nn.Linear(2, 2)), found)
    times = Times(1.0, 1.0, 1.0, 3)
    wrong = LayerPlan("0", (2, 2), 0.5, 1, 1, "odd", {"dense": Candidate(1.0, times), "odd": Candidate(0.5, times)})
    message = "choice must be 'dense', 'narrow' or a block shape such as '32x32', got 'odd'"
    with pytest.raises(ValueError, match=message):
        apply(nn.Sequential(nn.Linear(2, 2)), Plan((wrong,), "", "", None, "", times, None))


def test_arguments_are_checked(pruned, batch):
    with pytest.raises(TypeError, match="sample_input must be a mapping of model inputs, got Tensor"):
        plan(pruned, batch["input_ids"])
    with pytest.raises(ValueError, match="repeats must be at least 3, got 2"):
        plan(pruned, batch, repeats=2)
    for wrong in ((8,), (8, 0), "8x8", (8.0, 8)):
        with pytest.raises(ValueError, match="each of block_shapes must be two whole numbers of at least 1, got"):
            plan(pruned, batch, block_shapes=(wrong,))
    with pytest.raises(ValueError, match=r"target_modules: 'nothing' matches no linear layer \("):
        plan(pruned, batch, target_modules="nothing")
    with pytest.raises(ValueError, match=r"model ReLU has no linear layer to plan for"):
        plan(nn.ReLU(), {})


def test_a_sharing_copy_has_the_same_tensors(pruned):
    twin = sharing_copy(pruned)
    assert all(a is b for a, b in zip(twin.parameters(), pruned.parameters(), strict=True))
    assert all(a is not b for a, b in zip(twin.modules(), pruned.modules(), strict=True))
    model = copy.deepcopy(pruned)
    layer = MaskedLinear.from_dense(model.bert.encoder.layer[0].output.dense)
    layer.set_mask(BitMask.from_bool(layer.weight != 0))
    assert sharing_copy(layer).mask is layer.mask
