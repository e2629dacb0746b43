"""`freeze_sparsity`: zeros stay zeros, whoever trains, and nothing else about the model changes."""

import copy
import gc
import weakref

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import GPT2Config, GPT2LMHeadModel, Trainer

from sdprune import SDPruneConfig, freeze_sparsity
from sdprune.masking.pruner import mask_model, prune_step, zero_pruned
from sdprune.masking.swap import masked_layers, unswap
from sdprune.methods.structures import STRUCTURES
from tests.ranks import spawn

# peft 0.21 asks transformers 5.23 by an old name
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def prune_at_random(model, names, seed=1):
    """Set 60 % of the named weights to zero, as someone else's tool left them."""
    generator = torch.Generator().manual_seed(seed)
    zeros = {}
    with torch.no_grad():
        for name in names:
            weight = model.get_parameter(name)
            zeros[name] = torch.rand(weight.shape, generator=generator) < 0.6
            weight.masked_fill_(zeros[name], 0.0)
    return zeros


def zeros_of(model, zeros):
    return {name: model.get_parameter(name) == 0 for name in zeros}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())


@pytest.fixture
def pruned(model):
    names = [name for name, _ in model.named_parameters() if name.endswith("weight") and "dense" in name]
    return model, prune_at_random(model, names)


def make_small(bias=True):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 12, bias=bias), nn.Tanh(), nn.Linear(12, 4, bias=bias))
    return model, prune_at_random(model, ["0.weight", "2.weight"])


def train(model, optimizer, steps=3, max_norm=None):
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 40)).square().sum().backward()
        if max_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()


def test_under_the_trainer_with_weight_decay_and_clipping(pruned, dataset_factory, tokenizer, arguments):
    model, zeros = pruned
    before = {name: value.clone() for name, value in model.state_dict().items()}
    freeze_sparsity(model)
    args = arguments(weight_decay=0.1, max_grad_norm=0.1)
    Trainer(model, args, train_dataset=dataset_factory(64), processing_class=tokenizer).train()
    assert same(zeros_of(model, zeros), zeros)
    assert list(model.state_dict()) == list(before)
    moved = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert set(zeros) <= set(moved)


def test_a_model_that_is_not_frozen_fills_its_zeros():
    model, zeros = make_small()
    train(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    assert not any(bool(value.any()) for value in zeros_of(model, zeros).values())


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, amsgrad=True),
        lambda p: torch.optim.Adafactor(p, lr=0.1),
        lambda p: torch.optim.Muon([value for value in p if value.dim() == 2], lr=0.1),
    ],
    ids=["sgd", "adamw", "adafactor", "muon"],
)
def test_any_optimizer_with_a_momentum_from_before(make):
    model, zeros = make_small()
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = make(list(model.parameters()))
    train(model, optimizer)  # leaves momentum under what will be zeros
    model.load_state_dict(dense)
    frozen = freeze_sparsity(model)
    for _ in range(3):
        train(model, optimizer, steps=1)
        assert all(bool((model.get_parameter(name)[mask] == 0).all()) for name, mask in zeros.items())
        assert all(bool((model.get_parameter(name).grad[mask] == 0).all()) for name, mask in zeros.items())
    assert frozen.sparsity == pytest.approx(0.6, abs=0.05)
    frozen.remove()
    train(model, optimizer)
    assert not any(bool((model.get_parameter(name) == 0).any()) for name in zeros)


def test_gradients_are_those_of_the_model_but_for_the_zeros():
    model, zeros = make_small()
    rows = torch.randn(8, 40)
    model(rows).square().sum().backward()
    expected = {name: value.grad.masked_fill(zeros.get(name, torch.tensor(False)), 0.0) for name, value in named(model)}
    model.zero_grad()
    freeze_sparsity(model)
    model(rows).square().sum().backward()
    assert same({name: value.grad for name, value in named(model)}, expected)
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(rows).square().sum().backward()
    for name, value in named(model):
        torch.testing.assert_close(value.grad, expected[name])


def named(model):
    return list(model.named_parameters())


def test_averages_of_the_weights_keep_the_zeros():
    model, zeros = make_small()
    freeze_sparsity(model)
    averages = [AveragedModel(model), AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(3):
        train(model, optimizer, steps=1, max_norm=1.0)
        for average in averages:
            average.update_parameters(model)
    for average in averages:
        assert same(zeros_of(average.module, zeros), zeros)
        assert not torch.equal(average.module[0].weight, model[0].weight)


def prune_by(model, structure):
    """Prune half of the units; return the zeros of every pruned weight."""
    shape = {"block_shape": (8, 16), "n": 1, "m": 2}
    config = SDPruneConfig(structure=structure, **shape)
    found = mask_model(model, config)
    prune_step(model, config, 0.5, found)
    names = [f"{name}.weight" for name in found.layers]
    return zeros_of(unswap(model), names)


@pytest.mark.parametrize("structure", tuple(STRUCTURES))
def test_every_structure_outlives_decay_clipping_averages_and_lora(structure, model, batch):
    zeros = prune_by(model, structure)
    assert all(float(mask.float().mean()) == 0.5 for mask in zeros.values())
    freeze_sparsity(model)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        average.update_parameters(model)
        assert same(zeros_of(model, zeros), zeros)
        assert same(zeros_of(average.module, zeros), zeros)
    tuned = adapted(average.module)
    freeze_sparsity(tuned)
    expected = tuned(**batch).logits
    merged = tuned.merge_and_unload()
    assert same(zeros_of(merged, zeros), zeros)
    torch.testing.assert_close(merged(**batch).logits, expected)


@pytest.mark.parametrize("structure", tuple(STRUCTURES))
def test_an_average_of_a_masked_model_has_its_zeros(structure, model, batch):
    """Averaged from the last pruning step on, before the masks are taken off."""
    config = SDPruneConfig(structure=structure, block_shape=(8, 16), n=1, m=2)
    prune_step(model, config, 0.5, mask_model(model, config))
    layers = masked_layers(model)
    masks = {f"{name}.weight": ~layer.bit_mask.to_bool() for name, layer in layers.items()}
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        zero_pruned(model)
        average.update_parameters(model)
    for each in (model, average.module):
        assert same(zeros_of(unswap(each), masks), masks)
    assert not torch.equal(model.classifier.weight, average.module.classifier.weight)


@pytest.mark.parametrize("structure", tuple(STRUCTURES))
def test_embeddings_that_a_head_shares_are_free(structure):
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 50, "n_positions": 32}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)).eval()
    assert model.lm_head.weight is model.transformer.wte.weight
    zeros = prune_by(model, structure)
    with torch.no_grad():
        model.transformer.wte.weight[0] = 0.0  # as of a padding token
    assert set(freeze_sparsity(model).masks) == set(zeros)
    ids = torch.arange(12).view(2, 6)
    model(ids, labels=ids).loss.backward()
    torch.optim.AdamW(model.parameters(), lr=0.01).step()
    assert bool((model.lm_head.weight[0] != 0).any())
    assert model.lm_head.weight is model.transformer.wte.weight
    assert same(zeros_of(model, zeros), zeros)


def test_a_move_to_another_type_keeps_the_hold():
    model, zeros = make_small()
    frozen = freeze_sparsity(model)
    model.to(torch.float64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.randn(8, 40, dtype=torch.float64)).sum().backward()
    optimizer.step()
    assert same(zeros_of(model, zeros), zeros)
    with torch.no_grad():
        model[0].weight.add_(1.0)
    frozen.zero_()
    assert same(zeros_of(model, zeros), zeros)


def train_under_ddp(order):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    zeros = torch.rand(8, 6) < 0.7
    with torch.no_grad():
        model[0].weight.masked_fill_(zeros, 0.0)
    if order == "before":
        freeze_sparsity(model)
    wrapped = nn.parallel.DistributedDataParallel(model)
    if order == "after":
        freeze_sparsity(wrapped)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=0.1, weight_decay=0.1)
    torch.manual_seed(dist.get_rank())  # other rows on every rank
    for _ in range(3):
        optimizer.zero_grad()
        wrapped(torch.randn(5, 6)).square().sum().backward()
        assert bool((model[0].weight.grad[zeros] == 0).all())
        assert bool((model[0].weight.grad[~zeros] != 0).all())
        optimizer.step()
    assert torch.equal(model[0].weight == 0, zeros)


def train_on_a_rank():
    dist.init_process_group("gloo")
    for order in ("before", "after"):
        train_under_ddp(order)


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")
def test_ddp():
    spawn(train_on_a_rank, 2)


def adapted(model, **changes):
    peft = pytest.importorskip("peft", reason="LoRA needs peft: pip install peft")
    torch.manual_seed(2)
    values = {"r": 4, "lora_alpha": 8, "target_modules": ["query", "dense"], "init_lora_weights": False}
    return peft.get_peft_model(model, peft.LoraConfig(**(values | changes)))


def test_a_merged_lora_has_the_zeros_and_the_outputs_of_the_trained_model(pruned, batch):
    model, zeros = pruned
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    tuned = adapted(model, lora_dropout=0.0)
    frozen = freeze_sparsity(tuned)
    assert len(frozen.masks) == len(zeros)  # the adapters' own matrices are free
    tuned.train()
    optimizer = torch.optim.AdamW([value for value in tuned.parameters() if value.requires_grad], lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        tuned(**batch).loss.backward()
        optimizer.step()
    tuned.eval()
    expected = tuned(**inputs).logits
    merged = tuned.merge_and_unload()
    assert same(zeros_of(merged, zeros), zeros)
    torch.testing.assert_close(merged(**inputs).logits, expected)


def test_lora_may_be_merged_for_a_while_and_switched_off(pruned, batch):
    model, _ = pruned
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    plain = model(**inputs).logits.detach()
    tuned = adapted(model).eval()
    filled = tuned(**inputs).logits.detach()
    frozen = freeze_sparsity(tuned)
    masked = tuned(**inputs).logits.detach()
    assert not torch.allclose(masked, filled, atol=1e-3)
    tuned.base_model.merge_adapter()
    torch.testing.assert_close(tuned(**inputs).logits, masked)
    tuned.base_model.unmerge_adapter()
    with tuned.disable_adapter():
        torch.testing.assert_close(tuned(**inputs).logits, plain)
    torch.testing.assert_close(copy.deepcopy(tuned)(**inputs).logits, masked)
    frozen.remove()
    torch.testing.assert_close(tuned(**inputs).logits, filled)


def test_lora_on_conv1d(batch):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50, n_positions=32)).eval()
    zeros = prune_at_random(model, ["transformer.h.0.attn.c_attn.weight", "transformer.h.0.mlp.c_proj.weight"])
    tuned = adapted(model, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    freeze_sparsity(tuned)
    ids = torch.arange(12).view(2, 6)
    expected = tuned(ids).logits
    merged = tuned.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, expected)
    assert same(zeros_of(merged, zeros), zeros)


def test_adapters_that_it_cannot_hold_are_refused(pruned):
    model, _ = pruned
    with pytest.raises(ValueError, match=r"plain LoRA on linear layers, but the adapter of '.*dense' is peft"):
        freeze_sparsity(adapted(model, use_dora=True))


def test_what_is_held(model):
    with pytest.raises(ValueError, match="no weight matrix with exact zeros to keep; prune it first"):
        freeze_sparsity(model)
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[3] = 0.0
        model.classifier.bias.zero_()
        model.classifier.weight[0, 0] = 0.0
        model.bert.pooler.dense.weight[0, 0] = 0.0
    assert list(freeze_sparsity(model).masks) == ["bert.pooler.dense.weight", "classifier.weight"]
    assert list(freeze_sparsity(model, exclude_modules="classifier").masks) == ["bert.pooler.dense.weight"]
    with pytest.raises(ValueError, match="exclude_modules: 'head' matches no module"):
        freeze_sparsity(model, exclude_modules=["head"])


def test_a_replaced_parameter_is_an_error_and_not_a_lost_hold():
    model, _ = make_small()
    freeze_sparsity(model)
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())
    gc.collect()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(RuntimeError, match=r"parameter '0.weight' was replaced after freeze_sparsity"):
        train(model, optimizer, steps=1)


def test_a_model_that_is_gone_leaves_nothing_behind():
    model, _ = make_small()
    frozen = freeze_sparsity(model)
    gone = weakref.ref(model[0].weight)
    del model
    gc.collect()
    assert gone() is None
    other, _ = make_small()
    train(other, torch.optim.SGD(other.parameters(), lr=0.1), steps=1)
    assert frozen.masks == {}
