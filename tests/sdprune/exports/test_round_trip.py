"""What is exported comes back to the bit, through every way of loading, in every architecture and dtype."""

import json

import pytest
import torch
from transformers import AutoModel

import sdprune
from sdprune import BlockSparseLinear, SDPruneQuantizationConfig, export
from sdprune.layers.forms import dense_copy
from sdprune.layers.narrow import NarrowLinear
from sdprune.layers.pruned import PrunedLinear

VARIANTS = [None, "compact"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = {"block": BlockSparseLinear, "narrow": NarrowLinear}


def dense_state(model):
    """Return the state of a model, its sparse layers made dense again as saving does."""
    return dense_copy(model).state_dict()


def assert_equal_states(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


def logits(model):
    ids = torch.arange(3, 35).reshape(2, 16)
    extra = {"decoder_input_ids": ids[:, :5]} if model.config.is_encoder_decoder else {}
    with torch.inference_mode():
        return model(ids, **extra).logits


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_every_architecture(make_architecture, architecture, dtype, tmp_path):
    auto_class, model, structures = make_architecture(architecture, dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    shards = {"max_shard_size": "40KB"} if dtype is torch.float16 else {}
    folder = export(model, tmp_path / "model", "compact", **shards)
    assert_equal_states(model.state_dict(), before)
    if shards:
        assert len(list(folder.glob("model.compact-*.safetensors"))) > 1
    tag = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert {name: module["structure"] for name, module in tag["modules"].items()} == structures
    for variant in VARIANTS:
        found = auto_class.from_pretrained(folder, variant=variant, dtype="auto")
        keep = {"wo"} if architecture == "t5" and dtype is torch.float16 else set()  # transformers keeps it in float32
        expected = {name: value.float() if keep & set(name.split(".")) else value for name, value in before.items()}
        assert_equal_states(dense_state(found), expected)
        for name, structure in structures.items():
            layer = found.get_submodule(name)
            assert isinstance(layer, KINDS.get(structure, type(model.get_submodule(name)))), name
        torch.testing.assert_close(
            logits(found).float(), logits(model).float(), rtol=2e-2, atol=1e-5 if dtype is torch.float32 else 2e-2
        )
        found.save_pretrained(tmp_path / f"again-{variant}")
        again = auto_class.from_pretrained(tmp_path / f"again-{variant}", dtype="auto")
        assert_equal_states(dense_state(again), dense_state(found))
        loaded = sdprune.load(folder, variant)
        assert type(loaded) is type(found)
        assert_equal_states(dense_state(loaded), before)


@pytest.mark.parametrize("variant", VARIANTS)
def test_another_dtype(make_architecture, tmp_path, variant):
    auto_class, model, _ = make_architecture("bert")
    with torch.no_grad():
        model.bert.encoder.layer[0].attention.self.query.weight[0, 0] = 1e-12  # nothing in float16, but its block stays
    folder = export(model, tmp_path / "model", "compact")
    for dtype in (torch.float16, torch.bfloat16):
        found = auto_class.from_pretrained(folder, variant=variant, dtype=dtype)
        expected = {name: value.to(dtype) if value.is_floating_point() else value for name, value in before(model)}
        assert_equal_states(dense_state(found), expected)
        loaded = sdprune.load(folder, variant, dtype)
        assert_equal_states(dense_state(loaded), expected)


def before(model):
    return model.state_dict().items()


@pytest.mark.parametrize("name", ["bert", "gpt2"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_body_without_its_head(make_architecture, tmp_path, name, variant):
    """Names gain or lose the prefix of the body, as transformers has it."""
    auto_class, model, _ = make_architecture(name)
    folder = export(model, tmp_path / "model", "compact")
    body = AutoModel.from_pretrained(folder, variant=variant)
    expected = {key: value for key, value in model.base_model.state_dict().items() if "pooler" not in key}
    found = dense_state(body)
    assert_equal_states({key: found[key] for key in expected}, expected)
    assert sum(isinstance(module, PrunedLinear) for module in body.modules()) > 0
    body.save_pretrained(tmp_path / "body")
    again = auto_class.from_pretrained(tmp_path / "body")
    found = dense_state(again)
    assert all(
        torch.equal(found[key], value) for key, value in before(model) if key.startswith(model.base_model_prefix)
    )


def test_what_was_loaded_is_exported_again(make_architecture, tmp_path):
    auto_class, model, _ = make_architecture("gpt2")
    export(model, tmp_path / "a", "compact")
    loaded = auto_class.from_pretrained(tmp_path / "a", variant="compact")
    for format in ("plain", "portable", "compact"):
        folder = export(loaded, tmp_path / format, format)
        found = auto_class.from_pretrained(folder)
        state = found.state_dict() if format == "plain" else dense_state(found)
        assert_equal_states(state, model.state_dict())
        assert sorted(path.name for path in folder.glob("*.safetensors")) == (
            ["model.compact.safetensors", "model.safetensors"] if format == "compact" else ["model.safetensors"]
        )
    assert any(isinstance(module, PrunedLinear) for module in loaded.modules())  # it stays as it was


def test_converting_a_checkpoint_of_others(make_architecture, tmp_path):
    """A folder that another tool wrote has zeros and no tag."""
    auto_class, model, structures = make_architecture("bert")
    model.save_pretrained(tmp_path / "theirs")
    wish = SDPruneQuantizationConfig(block_shape=(16, 16), max_density=0.9)
    found = auto_class.from_pretrained(tmp_path / "theirs", quantization_config=wish)
    sparse = {name for name, module in found.named_modules() if isinstance(module, BlockSparseLinear)}
    assert sparse == {name for name, structure in structures.items() if structure == "block"}
    assert_equal_states(dense_state(found), model.state_dict())
    found.save_pretrained(tmp_path / "ours")
    assert_equal_states(dense_state(auto_class.from_pretrained(tmp_path / "ours")), model.state_dict())
    chosen = auto_class.from_pretrained(
        tmp_path / "theirs", quantization_config=SDPruneQuantizationConfig(max_density=0.9)
    )
    assert {type(chosen.get_submodule(name)) for name in structures} == {
        BlockSparseLinear,
        NarrowLinear,
        torch.nn.Linear,
    }
    wish = SDPruneQuantizationConfig(block_shape=(16, 16), max_density=0.0)
    dense = auto_class.from_pretrained(tmp_path / "theirs", quantization_config=wish)
    assert not any(isinstance(module, PrunedLinear) for module in dense.modules())


def test_a_loaded_model_takes_dense_weights_back(make_architecture, tmp_path):
    """As the Trainer does when it resumes or loads the best checkpoint: `save_pretrained` wrote dense weights."""
    auto_class, model, structures = make_architecture("gpt2")
    folder = export(model, tmp_path / "model", "portable")
    found = auto_class.from_pretrained(folder)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.mul_(2.0)
    found.load_state_dict(model.state_dict(), strict=True)
    assert_equal_states(dense_state(found), model.state_dict())
    name = next(name for name, structure in structures.items() if structure == "block")
    with torch.no_grad():
        model.get_submodule(name).weight.add_(1.0)
    with pytest.raises(RuntimeError, match=f"{name}.weight has other empty blocks than this layer"):
        found.load_state_dict(model.state_dict(), strict=False)


def test_a_loaded_model_trains(make_architecture, tmp_path):
    auto_class, model, _ = make_architecture("bert")
    found = auto_class.from_pretrained(export(model, tmp_path / "model", "compact"), variant="compact").train()
    assert found.hf_quantizer.is_trainable
    assert found.hf_quantizer.is_qat_trainable
    found(torch.arange(3, 19)[None], labels=torch.tensor([1])).loss.backward()
    with torch.no_grad():
        for parameter in found.parameters():
            if parameter.grad is not None:
                parameter.sub_(0.1 * parameter.grad)
    found.save_pretrained(tmp_path / "trained")
    again = auto_class.from_pretrained(tmp_path / "trained")
    assert_equal_states(dense_state(again), dense_state(found))


@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_load_converts_as_transformers_does(make_architecture, name, dtype, tmp_path):
    """The angles of rotary embeddings stay float32, and so do T5's last products in float16."""
    auto_class, model, _ = make_architecture(name)
    folder = export(model, tmp_path / "model", "compact")
    for variant in VARIANTS:
        found = sdprune.load(folder, variant, dtype)
        expected = auto_class.from_pretrained(folder, variant=variant, dtype=dtype)
        for mine, theirs in (
            (found.named_parameters(), expected.named_parameters()),
            (found.named_buffers(), expected.named_buffers()),
        ):
            assert_equal_states(dict(mine), dict(theirs))
        assert torch.equal(logits(found), logits(expected))
