"""Sped-up copies: right on every architecture and precision, their parts joined where that is safe, and told apart."""

import logging
import math
import pickle

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

from sdprune import BlockSparseLinear, SDPruneConfig, export, speed_up
from sdprune.layers.dense import sharing_copy
from sdprune.layers.stacked import StackedPart
from sdprune.masking.pruner import mask_model, prune_step
from sdprune.masking.swap import unswap
from sdprune.speed.fuse import activation_of
from sdprune.speed.plan_record import Plan
from sdprune.speed.timing import Times


def prune_blocks(model, sparsity=0.5, block_shape=(16, 16)):
    """Zero blocks of every linear layer of the stack."""
    config = SDPruneConfig(target_sparsity=sparsity, structure="block", block_shape=block_shape)
    mask_model(model, config)
    prune_step(model, config, sparsity)
    return unswap(model)


@pytest.fixture
def fast(monkeypatch):
    """Times as they would be if only the named forms were fast, and every step made the model faster."""

    def use(*forms, slow=()):
        def measure(calls, device, repeats):
            for call in calls.values():
                call()
            quick = {"fused": 1.0, "converted": 2.0} | dict.fromkeys(forms, 1.0) | dict.fromkeys(slow, 8.0)
            return {name: Times(*[quick.get(name, 4.0)] * 3, repeats) for name in calls}

        monkeypatch.setattr("sdprune.speed.plan.measure", measure)
        monkeypatch.setattr("sdprune.speed.speed_up.measure", measure)

    return use


@pytest.fixture
def pruned(model_factory):
    return prune_blocks(model_factory())


def inputs_of(name):
    ids = torch.randint(3, 40, (2, 7))
    sample = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return sample | ({"decoder_input_ids": ids} if name == "t5" else {})


def logits(model, sample):
    with torch.inference_mode():
        return model(**sample).logits


def sparse(model):
    return [name for name, module in model.named_modules() if isinstance(module, BlockSparseLinear)]


JOINED = {  # activations joined, and how many layers share each product
    "bert": (2, [3, 3]),
    "distilbert": (2, [3, 3]),
    "roberta": (2, [3, 3]),
    "xlm-roberta": (2, [3, 3]),
    "gpt2": (2, []),
    "llama": (2, [3, 3]),
    "t5": (4, [3, 3, 3, 2, 3, 2]),
}


@pytest.mark.parametrize("name", [name for name in JOINED if name != "xlm-roberta"])
def test_logits_stay_on_every_architecture(name, make_dense, fast):
    model, sample = prune_blocks(make_dense(name)[1]), inputs_of(name)
    fast("16x16")
    expected = logits(model, sample)
    quick = speed_up(model, sample)
    torch.testing.assert_close(logits(quick, sample), expected)
    joined, stacks = JOINED[name]
    fusions = quick.sped_up.fusions
    assert sum(len(found.layers) for found in fusions.activations) == joined
    assert [len(layers) for layers in fusions.stacks] == stacks
    for layers in fusions.stacks:
        assert all(isinstance(quick.get_submodule(layer), StackedPart) for layer in layers)
    other = inputs_of(name)
    torch.testing.assert_close(logits(quick, other), logits(model, other))


def test_images(fast):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    model = prune_blocks(ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=16)).eval())
    sample = {"pixel_values": torch.randn(2, 3, 32, 32)}
    fast("16x16")
    quick = speed_up(model, sample)
    torch.testing.assert_close(logits(quick, sample), logits(model, sample))
    assert (len(quick.sped_up.fusions.activations), len(quick.sped_up.fusions.stacks)) == (1, 1)
    half = speed_up(model, sample, precision="bfloat16")  # its inputs are float32 all the same
    assert logits(half, sample).dtype == torch.bfloat16


def test_int8_of_a_model_without_zeros(model, batch, fast, caplog):
    fast("dense-int8")
    with caplog.at_level(logging.INFO, "sdprune"):
        quick = speed_up(model, batch, precision="int8")
    layers = [quick.get_submodule(name) for name in sparse(quick)]
    assert all(layer.values.dtype == torch.int8 for layer in layers)
    record = quick.sped_up
    assert len(record.plan.choices) == 14  # two layers, pooler and classifier
    assert [len(layers) for layers in record.fusions.stacks] == [3, 3]
    moved = (logits(quick, batch) - logits(model, batch)).abs().max()
    assert 0 < moved < 0.1 * logits(model, batch).abs().max()
    assert f"int8: logits moved by at most {moved:.2g} (" in str(record)
    assert "of 16 rows" in str(record)
    assert record.speedup == 4.0
    assert str(record) in caplog.text


def test_bfloat16_and_what_is_kept(pruned, batch, fast):
    fast("16x16")
    quick = speed_up(pruned, batch, precision="bfloat16", keep=["classifier", r".*\.layer\.0\.output\.dense"])
    kept = quick.bert.encoder.layer[0].output.dense
    assert type(kept) is nn.Linear
    assert torch.equal(kept.weight, pruned.bert.encoder.layer[0].output.dense.weight)
    assert quick.classifier.weight.dtype == torch.float32
    assert quick.bert.encoder.layer[1].output.dense.values.dtype == torch.bfloat16
    assert len(quick.sped_up.plan.choices) == 11
    error = (logits(quick, batch).float() - logits(pruned, batch)).abs().max()
    assert error < 0.05 * logits(pruned, batch).abs().max()


def test_layers_that_are_sparse_already_are_planned_anew(pruned, batch, fast, tmp_path):
    fast("16x16")
    small = export(pruned, tmp_path / "small", "compact")
    loaded = AutoModelForSequenceClassification.from_pretrained(small, variant="compact")
    before = sparse(loaded)
    assert len(before) == 6  # others are narrow, or dense under a bit mask
    quick = speed_up(loaded, batch)
    torch.testing.assert_close(logits(quick, batch), logits(pruned, batch))
    assert len(quick.sped_up.plan.choices) == 12
    fast("16x16-int8")
    eight = speed_up(loaded, batch, precision="int8")
    assert all(eight.get_submodule(name).values.dtype == torch.int8 for name in sparse(eight))
    assert sparse(loaded) == before
    with pytest.raises(ValueError, match=r"layer 'bert.*' is computed in one step with others.*pass the model that it"):
        export(quick, tmp_path / "again")
    with pytest.raises(ValueError, match="is computed in one step with others"):
        speed_up(quick, batch)


def test_layers_in_int8_stay(pruned, batch, fast):
    first = pruned.bert.encoder.layer[0].attention.self
    for name in ("query", "key", "value"):
        first.set_submodule(name, BlockSparseLinear.from_linear(first.get_submodule(name), (32, 32)).quantize())
    fast("16x16")
    quick = speed_up(pruned, batch)
    torch.testing.assert_close(logits(quick, batch), logits(pruned, batch))
    assert quick.bert.encoder.layer[0].attention.self.query.stack.product.scales is not None
    assert len(quick.sped_up.plan.choices) == 9


def test_masked_layers_and_decoders(fast):
    sizes = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "pad_token_id": 0}
    config = LlamaConfig(**sizes, num_key_value_heads=1, intermediate_size=64, max_position_embeddings=16)
    llama = LlamaForSequenceClassification(config).eval()
    pruning = SDPruneConfig(structure="block", block_shape=(16, 16))
    mask_model(llama, pruning)
    prune_step(llama, pruning, 0.5)
    fast("16x16")
    sample = inputs_of("llama")
    quick = speed_up(llama.train(), sample)
    assert llama.training
    assert not quick.training
    torch.testing.assert_close(logits(quick, sample), logits(llama.eval(), sample))
    assert quick.sped_up.fusions.activations[0].function == "silu"


def test_the_copy_shares_nothing_and_the_model_stays(pruned, batch, fast):
    fast("16x16")
    state = {name: value.clone() for name, value in pruned.state_dict().items()}
    modules = dict(pruned.named_modules())
    quick = speed_up(pruned, batch)
    assert dict(pruned.named_modules()) == modules
    assert all(parameter.requires_grad for parameter in pruned.parameters())
    assert not any(parameter.requires_grad for parameter in quick.parameters())
    with torch.no_grad():
        for tensor in (*quick.parameters(), *quick.buffers()):
            tensor.zero_()
    assert all(torch.equal(value, state[name]) for name, value in pruned.state_dict().items())


def test_copies_of_the_copy(model_factory, batch, fast):
    fast("16x16")
    quick = speed_up(prune_blocks(model_factory(num_hidden_layers=1)), batch)
    expected = logits(quick, batch)
    again = pickle.loads(pickle.dumps(quick))
    assert torch.equal(logits(again, batch), expected)
    assert again.sped_up == quick.sped_up
    torch.compiler.reset()
    compiled = torch.compile(again, fullgraph=True, backend="eager")
    torch.testing.assert_close(logits(compiled, batch), expected)
    for tensor in again.parameters():
        tensor.zero_()
    again.load_state_dict(quick.state_dict())
    assert torch.equal(logits(again, batch), expected)


def test_a_copy_of_the_model_where_nothing_is_faster(pruned, batch, fast, caplog):
    fast("16x16", slow=("converted", "fused"))
    quick = speed_up(pruned, batch)
    assert "nothing is faster than the model given in float32" in caplog.text
    assert quick is not pruned
    assert sparse(quick) == []
    assert quick.sped_up.plan.choices == {}
    assert quick.sped_up.speedup == 1.0
    assert torch.equal(logits(quick, batch), logits(pruned, batch))


class Chain(nn.Module):
    """Layers with activations behind them; what lies between the first two may be read a second time."""

    def __init__(self, *activations, read=False):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in activations)
        self.activations = nn.ModuleList(activations)
        self.read = read
        with torch.no_grad():
            for layer in self.layers:
                layer.weight[:16, :16] = 0

    def forward(self, rows):
        for layer, activation in zip(self.layers, self.activations, strict=True):
            between = layer(rows)
            rows = activation(between)
            if self.read:
                rows = rows + between
        return {"rows": rows, "twice": (rows, [2 * rows])}


ROWS = {"rows": torch.randn(5, 32)}


def test_an_activation_whose_input_is_read_elsewhere_stays_apart(fast, caplog):
    fast("16x16")

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.plain, self.read = Chain(nn.GELU()), Chain(nn.ReLU(), read=True)

        def forward(self, rows):
            return self.read(self.plain(rows)["rows"])

    both = Both().eval()
    with caplog.at_level(logging.INFO, "sdprune"):
        quick = speed_up(both, ROWS)
    assert [found.layers for found in quick.sped_up.fusions.activations] == [("plain.layers.0",)]
    assert "its input is read elsewhere too" in caplog.text
    torch.testing.assert_close(quick(**ROWS), both(**ROWS))


def test_activations_are_known_by_what_they_do(fast):
    shared = nn.SiLU()
    kinds = (nn.ReLU(inplace=True), nn.GELU(), nn.GELU(approximate="tanh"), shared, shared, nn.Tanh(), nn.PReLU())
    model = Chain(*kinds).eval()
    fast("16x16")
    quick = speed_up(model, ROWS)
    assert [layer.activation for layer in quick.layers] == ["relu", "gelu", "gelu_tanh", "silu", "silu", None, None]
    assert [type(kind) for kind in quick.activations] == [nn.Identity] * 5 + [nn.Tanh, nn.PReLU]
    torch.testing.assert_close(quick(**ROWS), model(**ROWS))
    assert activation_of(nn.Identity(), ROWS["rows"]) is None
    assert activation_of(nn.LeakyReLU(1e-3), ROWS["rows"]) is None


def test_a_shared_activation_that_is_called_elsewhere_stays(fast):
    class Elsewhere(Chain):
        def forward(self, rows):
            return super().forward(self.activations[0](rows))

    fast("16x16")
    model = Elsewhere(nn.ReLU()).eval()
    quick = speed_up(model, ROWS)
    assert quick.sped_up.fusions.activations == ()
    torch.testing.assert_close(quick(**ROWS), model(**ROWS))


def test_layers_with_hooks_stay_apart(pruned, batch, fast):
    fast("16x16")
    first, second = pruned.bert.encoder.layer
    first.intermediate.intermediate_act_fn.register_forward_hook(lambda module, arguments, output: output)
    second.attention.self.key.register_forward_pre_hook(lambda module, arguments: None)
    quick = speed_up(pruned, batch)
    fusions = quick.sped_up.fusions
    assert [found.layers for found in fusions.activations] == [("bert.encoder.layer.1.intermediate.dense",)]
    assert [layers[0] for layers in fusions.stacks] == ["bert.encoder.layer.0.attention.self.query"]
    torch.testing.assert_close(logits(quick, batch), logits(pruned, batch))


def test_rows_of_a_shared_product_that_do_not_fit_are_no_shared_product(fast):
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = Chain(nn.ReLU()).layers[0], Chain(nn.ReLU()).layers[0]

        def forward(self, rows):
            return self.left(rows).view(-1) + self.right(rows).view(-1)

    fast("16x16")
    model = Flat().eval()
    quick = speed_up(model, ROWS)
    assert quick.sped_up.fusions.stacks == ()
    assert sparse(quick) == ["left", "right"]
    torch.testing.assert_close(quick(**ROWS), model(**ROWS))


def test_an_input_that_changes_between_its_layers_makes_no_shared_product(fast):
    class Changing(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = Chain(nn.ReLU()).layers[0], Chain(nn.ReLU()).layers[0]

        def forward(self, rows):
            rows = rows + 1
            left = self.left(rows)
            return left + self.right(rows.mul_(2))

    fast("16x16")
    model = Changing().eval()
    quick = speed_up(model, ROWS)
    assert quick.sped_up.fusions.stacks == ()
    with torch.inference_mode():  # where nobody counts changes
        torch.testing.assert_close(quick(**ROWS), model(**ROWS))


def test_layers_of_one_input_agree_on_a_form(pruned, batch, monkeypatch):
    def measure(calls, device, repeats):
        times = {name: 4.0 for name in calls}
        if "16x16" in times:  # which of these is the fastest changes from layer to layer
            measure.turn = not getattr(measure, "turn", False)
            times |= {"16x16": 1.0 if measure.turn else 1.05, "16x4": 1.05 if measure.turn else 1.0}
        times |= {name: value for name, value in {"fused": 1.0, "converted": 2.0}.items() if name in calls}
        return {name: Times(value, value, value, repeats) for name, value in times.items()}

    monkeypatch.setattr("sdprune.speed.plan.measure", measure)
    monkeypatch.setattr("sdprune.speed.speed_up.measure", measure)
    with torch.no_grad():
        for layer in pruned.bert.encoder.layer:
            for count, name in enumerate(("query", "key", "value")):  # of other shares, so that each is timed
                layer.attention.self.get_submodule(name).weight[:, : 16 * count] = 0
    quick = speed_up(pruned, batch)
    assert [len(layers) for layers in quick.sped_up.fusions.stacks] == [3, 3]


def unchanged(model, state, modules):
    same = all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    return same and [type(module) for module in model.modules()] == modules


def test_bad_input_changes_nothing(pruned, batch, fast):
    fast("16x16")
    pruned.train()
    state = {name: value.clone() for name, value in pruned.state_dict().items()}
    modules = [type(module) for module in pruned.modules()]
    for sample, options, error, message in [
        (batch, {"precision": "int4"}, ValueError, "precision must be one of float32, int8, bfloat16, got 'int4'"),
        (batch, {"precision": None}, ValueError, "precision must be one of float32, int8, bfloat16, got None"),
        (batch["input_ids"], {}, TypeError, "sample_input must be a mapping of model inputs, got Tensor"),
        ({}, {}, ValueError, "sample_input does not fit the model BertForSequenceClassification: ValueError: You"),
        ({"input_ids": 3}, {}, ValueError, "sample_input does not fit the model Bert.*: AttributeError: 'int' object"),
        (batch, {"keep": "nothing"}, ValueError, "keep: 'nothing' matches no linear layer"),
        (batch, {"keep": ["["]}, ValueError, r"keep: '\[' is not a regular expression"),
    ]:
        with pytest.raises(error, match=message):
            speed_up(pruned, sample, **options)
        assert unchanged(pruned, state, modules)
    assert pruned.training
    with pytest.raises(ValueError, match=r"model is wrapped \(DataParallel\); pass the module itself"):
        speed_up(nn.DataParallel(pruned), batch)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got int"):
        speed_up(3, batch)
    with pytest.raises(ValueError, match="model ReLU has no linear layer to speed up"):
        speed_up(nn.ReLU(), {"input": torch.randn(2)})


def test_models_that_differ_are_not_returned(pruned, batch, fast, monkeypatch):
    fast("16x16")
    state = {name: value.clone() for name, value in pruned.state_dict().items()}
    modules = [type(module) for module in pruned.modules()]
    wrong = sharing_copy(pruned)
    wrong.bert.pooler.dense = nn.Linear(32, 32)
    monkeypatch.setattr("sdprune.speed.speed_up.apply", lambda model, plan: wrong)
    with pytest.raises(RuntimeError, match=r"differ by .* of their largest magnitude, float32 allows 0\.0001: name"):
        speed_up(pruned, batch)
    with pytest.raises(RuntimeError, match=r"differ by .* of their largest magnitude, int8 allows 0\.1: name"):
        speed_up(pruned, batch, precision="int8")
    assert unchanged(pruned, state, modules)
    with torch.no_grad():
        pruned.classifier.bias[0] = math.nan
    with pytest.raises(ValueError, match="the model BertForSequenceClassification returns NaN in logits on sample_inp"):
        speed_up(pruned, batch)


def test_a_wrong_joint_product_is_dropped(pruned, batch, fast, monkeypatch, caplog):
    fast("16x16")
    monkeypatch.setattr("sdprune.layers.stacked._stack_biases", lambda layers: None)
    with torch.no_grad():
        for name, parameter in pruned.named_parameters():
            if name.endswith("value.bias"):
                parameter.fill_(1.0)
    quick = speed_up(pruned, batch)
    assert quick.sped_up.fusions.stacks == ()
    assert len(quick.sped_up.fusions.activations) == 2
    assert "not computed in one step" in caplog.text
    torch.testing.assert_close(logits(quick, batch), logits(pruned, batch))


def test_int8_without_a_compiled_engine_is_said(pruned, batch, fast, monkeypatch, caplog):
    fast("dense")
    monkeypatch.setattr("sdp_kernels.cpu_engine.availability.is_compiled", lambda dtype: False)
    speed_up(pruned, batch, precision="int8")
    assert caplog.text.count("int8 products are plain torch without numba") == 1


def test_the_plan_for_int8_is_json_too(model, batch, fast, tmp_path):
    fast("dense-int8")
    found = speed_up(model, batch, precision="int8").sped_up.plan
    found.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == found
    assert "14 of 14 layers are converted" in str(found)
