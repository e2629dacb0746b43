"""Models in int8: one set of integers and scales through every file and loader, in bytes that are counted."""

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, BertConfig, BertForSequenceClassification

import sdprune
from sdprune import SDPruneConfig, SDPruneTrainer, export, prune
from sdprune.cli import main
from sdprune.exports.card import write_model_card
from sdprune.exports.inspect import inspect_folder
from sdprune.exports.neurons import compact
from sdprune.formats.form import Form
from sdprune.formats.pack import quantize_rows
from sdprune.formats.record import LayerRecord
from sdprune.layers.forms import dense_copy, in_form, int8_names, plain_copy
from sdprune.layers.narrow import NarrowInt8Linear, RemovedInt8Linear
from sdprune.masking.coupling import find_couplings
from sdprune.masking.linears import is_conv1d, matrix
from sdprune.masking.pruner import mask_model
from sdprune.speed.plan_record import Candidate, LayerPlan, Plan
from sdprune.speed.timing import Times
from tests.sdprune.architectures import body_layers
from tests.sdprune.exports.test_card import CARD
from tests.sdprune.exports.test_neurons import empty_units
from tests.sdprune.exports.test_round_trip import DTYPES, VARIANTS, assert_equal_states, dense_state, logits

WEIGHTS = ("model.safetensors", "model.compact.safetensors")


def loaded(folder, auto_class):
    """Every way to the model of a folder with compact files."""
    for variant in VARIANTS:
        yield sdprune.load(folder, variant)
        yield auto_class.from_pretrained(folder, variant=variant, dtype="auto")


def records(folder):
    modules = json.loads((folder / "config.json").read_text())["quantization_config"]["modules"]
    return {name: LayerRecord.from_dict(values, name) for name, values in modules.items()}


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_every_architecture(make_architecture, architecture, dtype, tmp_path):
    auto_class, model, _ = make_architecture(architecture, dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    shards = {"max_shard_size": "40KB"} if dtype is torch.bfloat16 else {}
    folder = export(model, tmp_path / "model", "compact", precision="int8", **shards)
    assert_equal_states(model.state_dict(), before)
    expected = dict(before)
    for name in records(folder):
        layer = model.get_submodule(name)
        integers, scales = quantize_rows(matrix(layer).detach())
        weight = integers * scales[:, None]  # float32 in every model
        expected[f"{name}.weight"] = weight.T if is_conv1d(layer) else weight
    assert sorted(records(folder)) == sorted(body_layers(model))
    found = list(loaded(folder, auto_class))
    for each in found:
        assert sorted(int8_names(each)) == sorted(records(folder))
        assert_equal_states(dense_state(each), expected)
        assert torch.equal(logits(each), logits(found[0]))
    torch.testing.assert_close(logits(found[0]), logits(model), rtol=2e-2, atol=2e-2)
    again = export(found[0], tmp_path / "again", "compact", **shards)
    for file in sorted(path.name for path in folder.glob("*.safetensors")):
        assert (again / file).read_bytes() == (folder / file).read_bytes()
    found[1].save_pretrained(tmp_path / "saved")
    assert_equal_states(dense_state(auto_class.from_pretrained(tmp_path / "saved", dtype="auto")), expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_another_dtype(make_architecture, variant, tmp_path):
    """Integers and scales are those of the file, whatever the rest of the model is converted to."""
    auto_class, model, _ = make_architecture("bert")
    folder = export(model, tmp_path / "model", "compact", precision="int8")
    expected = sdprune.load(folder)
    for dtype in DTYPES[1:]:
        for found in (
            auto_class.from_pretrained(folder, variant=variant, dtype=dtype),
            sdprune.load(folder, variant, dtype),
            copy.deepcopy(expected).to(dtype),
        ):
            assert logits(found).dtype == dtype
            for name in int8_names(expected):
                mine, theirs = found.get_submodule(name), expected.get_submodule(name)
                assert torch.equal(mine.dense_weight(), theirs.dense_weight())
                assert mine.bias.dtype == dtype
            body = AutoModel.from_pretrained(folder, variant=variant, dtype=dtype)
            assert len(int8_names(body)) == len(int8_names(expected))


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "llama"])
def test_removed_neurons(make_dense, architecture, tmp_path):
    auto_class, model = make_dense(architecture)
    empty_units(model)
    folder = export(model, tmp_path / "model", "compact", precision="int8")
    found = list(loaded(folder, auto_class))
    neurons = [coupling for coupling in find_couplings(model) if coupling.kind == "neuron"]
    for each in found:
        removed = {name for name, layer in each.named_modules() if isinstance(layer, RemovedInt8Linear)}
        assert removed == {name for coupling in neurons for name in (coupling.consumer, *coupling.producers)}
        assert any(isinstance(layer, NarrowInt8Linear) for layer in each.modules())  # the heads
        assert torch.equal(logits(each), logits(found[0]))
    torch.testing.assert_close(logits(found[0]), logits(model), rtol=2e-2, atol=2e-2)
    dense = plain_copy(found[0])
    torch.testing.assert_close(logits(dense), logits(model), rtol=2e-2, atol=2e-2)
    found[0].load_state_dict(dense.state_dict())  # as a Trainer's checkpoint has it
    assert torch.equal(logits(found[0]), logits(found[1]))


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_layers_without_any_weight(make_dense, architecture, tmp_path):
    auto_class, model = make_dense(architecture)
    first = next(coupling for coupling in find_couplings(model) if coupling.kind == "neuron")
    with torch.no_grad():
        for name in (first.consumer, *first.producers):
            model.get_submodule(name).weight.zero_()
    folder = export(model, tmp_path / "model", "compact", precision="int8")
    found = list(loaded(folder, auto_class))
    assert all(torch.equal(logits(each), logits(found[0])) for each in found)
    torch.testing.assert_close(logits(found[0]), logits(model), rtol=2e-2, atol=2e-2)


def bert_in_blocks(kept: float) -> BertForSequenceClassification:
    """Return a model of which so many 32 x 4 blocks are kept in each layer."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 384, "intermediate_size": 768, "num_attention_heads": 4, "num_hidden_layers": 1}
    model = BertForSequenceClassification(BertConfig(vocab_size=20, max_position_embeddings=16, **sizes)).eval()
    with torch.no_grad():
        for name, module in model.bert.encoder.named_modules():
            if isinstance(module, torch.nn.Linear):
                rows, columns = module.weight.shape[0] // 32, module.weight.shape[1] // 4
                places = torch.rand(rows, columns).argsort(1).argsort(1) < round(kept * columns)
                module.weight *= places.repeat_interleave(32, 0).repeat_interleave(4, 1)
                assert name
    return model


@pytest.mark.parametrize(("kept", "most"), [(0.5, 0.16), (1.0, 0.28)])
def test_bytes_in_memory_and_on_disk(kept, most, tmp_path):
    """Of the dense float32 bytes of these layers, everything that they hold: indices, scales and biases too."""
    model = bert_in_blocks(kept)
    folder = export(model, tmp_path / "model", "compact", precision="int8")
    found = sdprune.load(folder, "compact")
    names = int8_names(found)
    assert len(names) == 6
    layers = [found.get_submodule(name) for name in names]
    assert {layer.density for layer in layers} == {kept}
    dense = sum(value.nbytes for name in names for value in model.get_submodule(name).parameters())
    held = sum(value.nbytes for layer in layers for value in (*layer.parameters(), *layer.buffers()))
    assert held <= most * dense
    tensors = load_file(folder / WEIGHTS[1])
    stored = sum(
        value.nbytes for name, value in tensors.items() if name.startswith(tuple(f"{name}." for name in names))
    )
    assert stored <= most * dense


def test_what_the_files_hold(make_architecture, tmp_path):
    _, model, structures = make_architecture("bert")
    folder = export(model, tmp_path / "model", "compact", precision="int8")
    plain, small = (load_file(folder / name) for name in WEIGHTS)
    forms = {name: str(record.form) for name, record in records(folder).items()}
    wanted = {"narrow": {"narrow-int8"}, "unstructured": {"unstructured-int8"}, "dense": {"32x4-int8"}}
    for name, form in forms.items():
        assert form in wanted.get(structures.get(name, "dense"), {"16x16-int8", "16x4-int8"})
        assert plain[f"{name}.weight"].dtype == torch.float32
        assert small[f"{name}.weight"].dtype == torch.int8
        assert small[f"{name}.scales"].dtype == torch.float32
    assert not any(name.endswith("scales") for name in plain)
    assert "classifier.scales" not in small
    assert json.loads((folder / "config.json").read_text())["sdprune"]["precision"] == "int8"


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_plain_files_have_only_the_rounded_weights(make_architecture, dtype, tmp_path):
    auto_class, model, _ = make_architecture("bert", dtype)
    folder = export(model, tmp_path / "model", "plain", precision="int8")
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    found = sdprune.load(folder)
    assert {value.dtype for value in found.parameters()} == {dtype}
    dense = auto_class.from_pretrained(export(model, tmp_path / "portable", precision="int8"), dtype="auto")
    expected = {name: value.to(dtype) for name, value in dense_copy(dense).state_dict().items()}
    assert_equal_states(found.state_dict(), expected)
    assert not torch.equal(logits(found), logits(model))


def test_larger_blocks_are_split_in_memory_only(tmp_path):
    model = bert_in_blocks(1.0)
    with torch.no_grad():
        weight = model.bert.encoder.layer[0].output.dense.weight
        weight *= (torch.rand(12, 24) < 0.5).repeat_interleave(32, 0).repeat_interleave(32, 1)
    folder = export(model, tmp_path / "model", "compact", precision="int8")
    name = "bert.encoder.layer.0.output.dense"
    assert str(records(folder)[name].form) == "32x32-int8"
    for found in loaded(folder, BertForSequenceClassification):
        layer = found.get_submodule(name)
        assert layer.block_shape == (32, 4)
        found.save_pretrained(tmp_path / "saved")
        assert records(tmp_path / "saved")[name] == records(folder)[name]
        found.load_state_dict(plain_copy(found).state_dict())


def test_a_plan_says_which_layers_are_int8(make_architecture, tmp_path):
    _, model, structures = make_architecture("bert")
    names = list(structures)[:4]
    choices = dict(zip(names, ("16x4-int8", "narrow-int8", "dense-int8", "dense"), strict=True))
    times = Times(1.0, 1.0, 1.0, 3)
    layers = tuple(
        LayerPlan(
            name, tuple(model.get_submodule(name).weight.shape), 0.5, 1, 1, choice, {choice: Candidate(1.0, times)}
        )
        for name, choice in choices.items()
    )
    plan = Plan(layers, "CPU", "float32", 1, "2", times, None)
    folder = export(model, tmp_path / "model", "compact", plan=plan)
    found = {name: str(record.form) for name, record in records(folder).items() if record.precision}
    assert found == {names[0]: "16x4-int8", names[1]: "narrow-int8", names[2]: "32x4-int8"}
    assert int8_names(sdprune.load(folder, "compact")) == names[:3]
    for name, choice in choices.items():  # the same as what `apply` makes of it in memory
        if choice != "dense":
            made = in_form(model.get_submodule(name), Form.named(choice))
            loaded_layer = sdprune.load(folder, "compact").get_submodule(name)
            assert torch.equal(made.dense_weight(), loaded_layer.dense_weight())


def test_copies_of_a_loaded_model(make_architecture, tmp_path):
    auto_class, model, _ = make_architecture("bert")
    found = auto_class.from_pretrained(export(model, tmp_path / "model", "portable", precision="int8"))
    expected = logits(found)
    torch.save(found.state_dict(), tmp_path / "state.pt")
    other = auto_class.from_pretrained(tmp_path / "model")
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for twin in (copy.deepcopy(found), pickle.loads(pickle.dumps(found)), other):
        assert torch.equal(logits(twin), expected)
    assert found.to("meta").get_parameter(f"{int8_names(found)[0]}.values").is_meta


def test_int8_layers_do_not_train(make_architecture, dataset_factory, arguments, tmp_path):
    auto_class, model, _ = make_architecture("bert")
    found = auto_class.from_pretrained(export(model, tmp_path / "model", "portable", precision="int8"))
    message = r"layer 'bert\.encoder\.layer\.0\.attention\.self\.query' is int8, which cannot be trained; .*plain_copy"
    with pytest.raises(ValueError, match=message):
        mask_model(found, SDPruneConfig())
    with pytest.raises(ValueError, match=message):
        prune(found, SDPruneConfig(), dataset_factory(8), args=arguments())
    with pytest.raises(ValueError, match=message):
        SDPruneTrainer(found, arguments(), config=SDPruneConfig())
    with pytest.raises(ValueError, match=r"model must be in floating point, got .* in int8"):
        compact(found)
    dense = plain_copy(found)
    mask_model(dense, SDPruneConfig())
    assert all(parameter.requires_grad for parameter in dense.parameters())


def test_wrong_input(make_architecture, tmp_path):
    _, model, structures = make_architecture("bert")
    with pytest.raises(ValueError, match="precision must be 'int8' or None, got 'int4'"):
        export(model, tmp_path / "model", precision="int4")
    name = next(iter(structures))
    with torch.no_grad():
        model.get_parameter(f"{name}.weight")[0, 0] = torch.inf
    with pytest.raises(ValueError, match=f"layer '{name}' cannot be stored in int8: values must be finite"):
        export(model, tmp_path / "model", precision="int8")
    assert not list(tmp_path.iterdir())


def test_commands_cards_and_scores(model_folder, csv_file, tmp_path, capsys):
    folder = tmp_path / "small"
    options = ["--format", "compact", "--precision", "int8", "--output", str(folder)]
    assert main(["export", str(model_folder), *options]) == 0
    found = inspect_folder(folder, "compact")
    assert {layer.form for layer in found.layers} == {"32x4-int8", "dense"}
    assert {layer.precision for layer in found.layers} == {"int8", None}
    assert {layer.structure for layer in found.layers} == {"dense"}
    sizes = [layer.bytes for layer in found.layers if layer.precision]
    plain = inspect_folder(folder)
    assert [layer.form for layer in plain.layers] == [layer.form for layer in found.layers]
    assert sum(sizes) < 0.3 * sum(layer.bytes for layer in plain.layers if layer.precision)
    text = write_model_card(folder, CARD).read_text()
    assert f"| 32x4-int8 | {len(sizes)} | {sum(sizes):,} |" in text
    assert "Layers in int8 have one scale for each output" in text
    capsys.readouterr()
    assert main(["inspect", str(folder)]) == 0
    assert "32x4-int8" in capsys.readouterr().out
    assert main(["evaluate", str(folder), "--data", str(csv_file)]) == 0
    assert "accuracy" in capsys.readouterr().out
    onnx = ["export", str(model_folder), "--format", "onnx", "--precision", "int8", "--output", str(tmp_path / "onnx")]
    assert main(onnx) == 2
    assert "precision must be left out with the format 'onnx'" in capsys.readouterr().err
    assert not Path(tmp_path / "onnx").exists()
