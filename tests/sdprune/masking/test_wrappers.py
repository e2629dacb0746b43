"""A walk over what users wrap around models and layers: right under masks, or one line that says what to do."""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import prune as torch_prune
from transformers import Trainer

from sdprune import SDPruneCallback, SDPruneConfig, SDPruneTrainer, export, freeze_sparsity, prune
from sdprune.layers.dense import dense_names
from sdprune.masking.pruner import mask_model, masked_fraction, measure_sparsity
from sdprune.masking.select import unreached
from sdprune.masking.swap import masked_layers, unswap
from sdprune.speed.plan import apply, plan

CONFIG = SDPruneConfig(target_sparsity=0.7, pruning_steps=2, distillation=None)
NAME = "bert.encoder.layer.0.intermediate.dense"
OTHER = "bert.encoder.layer.1.attention.self.query"


class Scaled(nn.Linear):
    def forward(self, input):
        return 9 * super().forward(input)


class Called(nn.Linear):
    def __call__(self, input):
        return -super().__call__(input)


class Gained(nn.Linear):
    """A parameter beside weight and bias, which something else may use."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.gain = nn.Parameter(torch.ones(()))


class Counting(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("calls", torch.zeros(()))


class Nested(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.inner = nn.Identity()


class Renamed(nn.Linear):
    """A subclass that computes what its base does."""


def put(kind, model):
    old = model.get_submodule(NAME)
    new = kind(old.in_features, old.out_features)
    new.load_state_dict(old.state_dict(), strict=False)
    model.set_submodule(NAME, new)


def parametrized(how, model):
    how(model.get_submodule(NAME))


def assigned(model):
    layer = model.get_submodule(NAME)
    plain = layer.forward
    layer.forward = lambda input: 2 * plain(input)


def in_half(model):
    layer = model.get_submodule(NAME)
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.int8), requires_grad=False)


def in_inference(model):
    with torch.inference_mode():
        model.get_submodule(NAME).weight = nn.Parameter(torch.randn(64, 32), requires_grad=False)


class Double(nn.Module):
    def forward(self, weight):
        return 2 * weight


MORE = {  # layers that are more than linear: how they come about, and what is said of them
    "own forward": (functools.partial(put, Scaled), r"Scaled\) .*its class has a forward of its own.*exclude_modules"),
    "own call": (functools.partial(put, Called), r"Called\) .*a forward of its own"),
    "parameter": (functools.partial(put, Gained), r"Gained\) .*it holds 'gain' beside its own weight and bias"),
    "buffer": (functools.partial(put, Counting), r"Counting\) .*it holds 'calls' beside"),
    "module": (functools.partial(put, Nested), r"Nested\) .*it holds 'inner' beside"),
    "assigned forward": (assigned, "a function was assigned to its forward.*remove_hook_from_submodules"),
    "torch prune": (
        functools.partial(parametrized, lambda layer: torch_prune.l1_unstructured(layer, "weight", amount=0.3)),
        r"its weight is under torch\.nn\.utils\.prune; call torch\.nn\.utils\.prune\.remove\(layer, 'weight'\) first",
    ),
    "torch prune of the bias": (
        functools.partial(parametrized, lambda layer: torch_prune.random_unstructured(layer, "bias", amount=0.3)),
        r"torch\.nn\.utils\.prune\.remove\(layer, 'bias'\)",
    ),
    "parametrize": (
        functools.partial(parametrized, lambda layer: parametrize.register_parametrization(layer, "weight", Double())),
        r"its weight is parametrized; call torch\.nn\.utils\.parametrize\.remove_parametrizations\(layer, 'weight'\)",
    ),
    "weight norm": (functools.partial(parametrized, parametrizations.weight_norm), "its weight is parametrized"),
    "spectral norm": (functools.partial(parametrized, parametrizations.spectral_norm), "its weight is parametrized"),
    "orthogonal": (functools.partial(parametrized, parametrizations.orthogonal), "its weight is parametrized"),
    "old spectral norm": (
        functools.partial(parametrized, nn.utils.spectral_norm),
        r"its weight is computed from 'weight_\w+' and others; call .*remove_spectral_norm",
    ),
    "integers": (in_half, "its weight is no dense matrix of floating-point numbers"),
    "inference mode": (in_inference, r"its weight was made under torch\.inference_mode"),
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*(weight_norm|spectral_norm).*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"),  # torch's own
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),  # asked for by PEFT
]


def inputs_of(batch):
    return {name: value for name, value in batch.items() if name != "labels"}


@pytest.fixture
def refused(model_factory, dataset_factory, tokenizer, arguments, tmp_path):
    """Return a check that something is refused in one line and nothing is written."""

    def check(act, message):
        with pytest.raises((ValueError, TypeError), match=message) as raised:
            act()
        assert "\n" not in str(raised.value)
        assert list(tmp_path.iterdir()) == []

    return check


@pytest.mark.parametrize("case", MORE)
def test_layers_that_are_more_than_linear(case, model, refused, dataset_factory, tokenizer, arguments):
    make, message = MORE[case]
    make(model)
    kinds = [type(module) for module in model.modules()]
    message = rf"layer '{NAME}' .*{message}"

    def run(config=CONFIG):
        return prune(model, config, dataset_factory(32), args=arguments(max_steps=4), processing_class=tokenizer)

    refused(run, message)
    with pytest.raises(ValueError, match=message):
        Trainer(model, arguments(), train_dataset=dataset_factory(8), callbacks=[SDPruneCallback(CONFIG)])
    assert [type(module) for module in model.modules()] == kinds
    if case in ("integers", "inference mode"):
        return  # with such weights nothing trains
    result = run(SDPruneConfig(target_sparsity=0.7, pruning_steps=2, distillation=None, exclude_modules=NAME))
    assert result.sparsity.linear == pytest.approx(0.7, abs=1e-3)
    assert type(result.model.get_submodule(NAME)) is kinds[[name for name, _ in model.named_modules()].index(NAME)]
    assert len(result.sparsity.layers) == 11


def test_the_advice_helps(model, batch, dataset_factory, tokenizer, arguments):
    torch_prune.l1_unstructured(model.get_submodule(NAME), "weight", amount=0.3)
    parametrize.register_parametrization(model.get_submodule(OTHER), "weight", Double())
    before = model(**inputs_of(batch)).logits
    torch_prune.remove(model.get_submodule(NAME), "weight")
    parametrize.remove_parametrizations(model.get_submodule(OTHER), "weight")
    mask_model(model, CONFIG)
    assert torch.equal(model(**inputs_of(batch)).logits, before)


@pytest.mark.parametrize("kind", [Renamed, nn.modules.linear.NonDynamicallyQuantizableLinear])
def test_subclasses_that_compute_what_their_base_does(kind, model, batch):
    put(kind, model)
    before = model(**inputs_of(batch)).logits
    mask_model(model, CONFIG)
    assert NAME in masked_layers(model)
    assert torch.equal(model(**inputs_of(batch)).logits, before)
    assert torch.equal(unswap(model)(**inputs_of(batch)).logits, before)


def add_hooks(layer, seen):
    """Hooks of every kind; those of the forward pass change what the layer computes."""
    return [
        layer.register_forward_pre_hook(lambda module, args: (seen.append("before"), (args[0] + 1,))[1]),
        layer.register_forward_pre_hook(
            lambda module, args, options: (seen.append("with options"), (args, options))[1], with_kwargs=True
        ),
        layer.register_forward_hook(lambda module, args, output: (seen.append("behind"), 2 * output)[1]),
        layer.register_forward_hook(lambda *_: seen.append("always"), always_call=True),
        layer.register_full_backward_hook(lambda *_: seen.append("backward")),
        layer.register_state_dict_pre_hook(lambda *_: seen.append("state")),
        layer.register_load_state_dict_post_hook(lambda *_: seen.append("loaded")),
        layer.register_full_backward_pre_hook(lambda *_: seen.append("before backward")),
        layer.register_state_dict_post_hook(lambda *_: seen.append("state made")),
        # torch binds this one to the very module
        layer.register_load_state_dict_pre_hook(lambda module, *_: seen.append(f"load {hasattr(module, 'mask')}")),
    ]


def used(model, batch, seen):
    """Return the logits and the names of all hooks that a pass, a state and loading it call."""
    seen.clear()
    model.zero_grad()
    outputs = model(**batch)
    outputs.loss.backward()
    model.load_state_dict(model.state_dict())
    return outputs.logits.detach(), sorted(seen)


def test_hooks_stay_with_their_layer(model, batch):
    """Under the mask, and behind it; the handles that the user holds remove them there."""
    plain = model(**inputs_of(batch)).logits
    seen = []
    handles = add_hooks(model.get_submodule(NAME), seen)
    logits, called = used(model, batch, seen)
    assert len(called) == 10
    assert "load False" in called
    masked = sorted({"load False": "load True"}.get(name, name) for name in called)
    assert not torch.equal(logits, plain)
    mask_model(model, CONFIG)
    for expected in (masked, called):
        found, again = used(model, batch, seen)
        assert torch.equal(found, logits)
        assert again == expected
        copied, again = used(copy.deepcopy(model), batch, seen)
        assert torch.equal(copied, logits)
        assert again == expected
        unswap(model)
    mask_model(model, CONFIG)
    for handle in handles:
        handle.remove()
    assert torch.equal(model(**inputs_of(batch)).logits, plain)
    assert used(model, batch, seen)[1] == []


def test_hooks_of_a_run_of_the_teacher_and_of_a_plan(model, batch, dataset_factory, tokenizer, arguments, tmp_path):
    seen = []
    layer = model.get_submodule(NAME)
    layer.register_forward_hook(lambda module, args, output: (seen.append("hook"), 2 * output)[1])
    config = SDPruneConfig(target_sparsity=0.8, pruning_steps=2, structure="block", block_shape=(8, 8))
    result = prune(model, config, dataset_factory(32), args=arguments(max_steps=4), processing_class=tokenizer)
    seen.clear()
    logits = result.model.eval()(**inputs_of(batch)).logits
    result.teacher(**inputs_of(batch))
    assert seen == ["hook", "hook"]
    found = plan(result.model, inputs_of(batch), block_shapes=((8, 8),), repeats=3)
    converted = apply(copy.deepcopy(result.model), found)
    seen.clear()
    torch.testing.assert_close(converted(**inputs_of(batch)).logits, logits)
    assert seen == ["hook"]
    export(result.model, tmp_path / "model")


def test_conv1d_is_known_by_its_home_and_has_hooks_as_well(build_gpt2):
    model, inputs = build_gpt2
    seen = []
    layer = model.get_submodule("transformer.h.0.mlp.c_fc")
    layer.register_forward_hook(lambda module, args, output: (seen.append("hook"), 2 * output)[1])
    before = model(**inputs).logits
    mask_model(model, CONFIG)
    assert torch.equal(model(**inputs).logits, before)
    assert len(seen) == 2

    class Conv1D(nn.Module):
        """Somebody's own layer of that name."""

        def __init__(self):
            super().__init__()
            self.nf, self.weight, self.bias = 32, nn.Parameter(torch.randn(32, 32)), nn.Parameter(torch.zeros(32))

    model = unswap(model)
    model.transformer.h[0].mlp.c_own = Conv1D()
    mask_model(model, CONFIG)
    assert not any("c_own" in name for name in masked_layers(model))


@pytest.fixture
def build_gpt2():
    from transformers import GPT2Config, GPT2ForSequenceClassification

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=2, n_positions=16, pad_token_id=0)
    return GPT2ForSequenceClassification(config).eval(), {"input_ids": torch.arange(1, 9)[None]}


class Parallel(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **options):
        return self.module(*args, **options)


class DistributedDataParallel(Parallel):
    """Stands for torch's, which needs a process group: known by its name."""


class FullyShardedDataParallel(Parallel):
    """Likewise."""


COMPILE = functools.partial(torch.compile, backend="eager")
WRAPPED = {
    "compiled": (
        torch.compile,
        r"is wrapped \(OptimizedModule\); pass the module itself, \w+\._orig_mod, .*torch_compile",
    ),
    "DataParallel": (nn.DataParallel, r"is wrapped \(DataParallel\); pass the module itself, \w+\.module"),
    "DDP": (DistributedDataParallel, r"is wrapped \(DistributedDataParallel\); pass the module itself, \w+\.module"),
    "FSDP": (FullyShardedDataParallel, r"is wrapped \(FullyShardedDataParallel\)"),
    "meta": (lambda model: copy.deepcopy(model).to("meta"), "is on the meta device: it was never loaded"),
    "no module": (lambda model: "bert-base-uncased", r"must be a torch\.nn\.Module, got str"),
}


@pytest.mark.parametrize("case", WRAPPED)
def test_wrapped_models(case, model, batch, refused, dataset_factory, tokenizer, arguments, tmp_path):
    wrap, message = WRAPPED[case]
    wrapped, rows = wrap(model), dataset_factory(16)
    options = {"args": arguments(), "processing_class": tokenizer}
    taught = SDPruneConfig(target_sparsity=0.7, pruning_steps=2)
    refused(lambda: prune(wrapped, CONFIG, rows, **options), f"^model.*{message}")
    refused(lambda: prune(model, taught, rows, teacher_model=wrapped, **options), f"^teacher_model.*{message}")
    refused(lambda: plan(wrapped, inputs_of(batch)), f"^model.*{message}")
    if case != "no module":
        refused(lambda: export(wrapped, tmp_path / "model"), f"^model.*{message}")
    if case not in ("no module", "meta"):  # transformers has its own words for these
        with pytest.raises(ValueError, match=message):
            SDPruneTrainer(wrapped, arguments(), config=taught, train_dataset=rows, processing_class=tokenizer)
    assert not masked_layers(model)


def test_a_layer_that_is_compiled_by_itself(model, refused, dataset_factory, tokenizer, arguments):
    model.bert.encoder.layer[0] = COMPILE(model.bert.encoder.layer[0])
    refused(
        lambda: prune(model, CONFIG, dataset_factory(16), args=arguments(), processing_class=tokenizer),
        r"model: its module 'bert\.encoder\.layer\.0' is wrapped \(OptimizedModule\); put the module itself there",
    )


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, of a function
def test_a_model_that_is_compiled_in_place(model, batch, dataset_factory, tokenizer, arguments):
    model.compile(backend="eager")
    before = model(**inputs_of(batch)).logits
    mask_model(model, CONFIG)
    torch.testing.assert_close(model(**inputs_of(batch)).logits, before)
    result = prune(unswap(model), CONFIG, dataset_factory(32), args=arguments(max_steps=4), processing_class=tokenizer)
    assert result.sparsity.linear == pytest.approx(0.7, abs=1e-3)


def test_adapters(model, batch, refused, dataset_factory, tokenizer, arguments, tmp_path):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["query"], r=2, init_lora_weights=False))
    before = adapted(**inputs_of(batch)).logits
    refused(
        lambda: prune(adapted, CONFIG, dataset_factory(16), args=arguments(), processing_class=tokenizer),
        r"has an adapter of PEFT; merge it first \(merge_and_unload\(\).*requires_grad_\(True\)\), .* freeze_sparsity",
    )
    refused(lambda: export(model, tmp_path / "model"), "model has adapters of PEFT")
    merged = adapted.merge_and_unload().requires_grad_(True)
    result = prune(merged, CONFIG, dataset_factory(32), args=arguments(max_steps=4), processing_class=tokenizer)
    assert result.sparsity.linear == pytest.approx(0.7, abs=1e-3)
    torch.testing.assert_close(before.shape, result.model(**inputs_of(batch)).logits.shape)


def test_plain_layers_are_all_that_is_stored_in_another_form(model):
    """A subclass may be looked into by others: it stays what it is in exports and plans."""
    put(Scaled, model)
    assert NAME not in dense_names(model)
    assert OTHER in dense_names(model)


def test_frozen_zeros_of_such_layers(model, batch):
    """`freeze_sparsity` changes no module, so a layer may be anything whose weight is a parameter."""
    put(Scaled, model)
    with torch.no_grad():
        model.get_submodule(NAME).weight[::2] = 0.0
    held = freeze_sparsity(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    model(**batch).loss.backward()
    optimizer.step()
    assert f"{NAME}.weight" in held.masks
    assert not bool(model.get_submodule(NAME).weight[::2].any())


def test_experts_are_told(dataset_factory, tokenizer, arguments, caplog):
    """Nine tenths of such a model are in tensors of three dimensions, of which no linear layer knows."""
    from transformers import MixtralConfig, MixtralForSequenceClassification

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=32,
        pad_token_id=0,
    )
    model = MixtralForSequenceClassification(config)
    expected = {name: value.numel() for name, value in model.named_parameters() if value.dim() == 3}
    assert len(expected) == 4
    found = unreached(model)
    assert expected.items() <= found.items()
    assert sum(expected.values()) > 0.9 * sum(found.values())
    result = prune(model, CONFIG, dataset_factory(32), args=arguments(max_steps=4), processing_class=tokenizer)
    assert result.sparsity.unreached == sum(found.values())
    assert 0.5 < result.sparsity.unreached_share < 1.0
    assert result.sparsity.linear == pytest.approx(0.7, abs=1e-3)
    (said,) = [record.message for record in caplog.records if "out of reach" in record.message]
    assert f"{100 * result.sparsity.unreached_share:.1f} %" in said
    assert "experts" in said


def test_nothing_is_out_of_reach_in_a_plain_model(model, caplog):
    mask_model(model, CONFIG)
    assert unreached(model) == {}
    assert measure_sparsity(model).unreached == 0
    assert masked_fraction(model) == 0.0
    assert "out of reach" not in caplog.text


def test_a_layer_that_would_be_loaded_as_another_is_not_exported(model, refused, tmp_path):
    put(Scaled, model)
    message = rf"model: layer '{NAME}' \(Scaled\) would be loaded as another: its class has a forward of its own"
    refused(lambda: export(model, tmp_path / "model"), message)


def test_zeros_that_no_mask_holds_are_told(model, dataset_factory, tokenizer, arguments, caplog):
    """A pruned model that is pruned again to less."""
    given = {"processing_class": tokenizer}
    pruned = prune(model, CONFIG, dataset_factory(32), args=arguments(max_steps=4), **given).model
    assert "zero already" not in caplog.text
    less = SDPruneConfig(target_sparsity=0.3, pruning_steps=2, distillation=None)
    prune(
        pruned,
        less,
        dataset_factory(32),
        args=arguments(max_steps=4, output_dir=f"{arguments().output_dir}-2"),
        **given,
    )
    assert "% of the weights to be pruned are zero already, more than target_sparsity=0.3" in caplog.text
