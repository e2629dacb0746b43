"""Which format is written, what is in it, how small it is, and what happens where the package is absent."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

from sdprune import BlockSparseLinear, SDPruneConfig, export
from sdprune.data.examples import Examples
from sdprune.data.tasks import Task
from sdprune.formats.form import DENSE
from sdprune.layers.narrow import NarrowLinear
from sdprune.masking.pruner import mask_model, prune_step
from sdprune.runs.classifier import load_classifier
from sdprune.runs.export_folder import export_folder
from sdprune.speed.plan_record import Candidate, LayerPlan, Plan
from sdprune.speed.timing import Times


@pytest.fixture
def sparse(make_architecture):
    _, model, structures = make_architecture("bert")
    return model, structures


def tag(folder):
    return json.loads((folder / "config.json").read_text()).get("quantization_config")


def make_bert(sparsity: float, **config: object) -> BertForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 320, "intermediate_size": 640, "num_attention_heads": 4, "num_hidden_layers": 1}
    model = BertForSequenceClassification(BertConfig(vocab_size=20, max_position_embeddings=16, **sizes)).eval()
    config = SDPruneConfig(target_sparsity=sparsity, **config)
    mask_model(model, config)
    prune_step(model, config, sparsity)
    return model


def test_the_default_is_plain_unless_a_layer_becomes_sparse(sparse, tmp_path):
    model, structures = sparse
    assert tag(export(make_bert(0.8), tmp_path / "scattered")) is None
    folder = export(model, tmp_path / "blocks")
    assert tag(folder)["modules"].keys() == structures.keys()
    section = json.loads((folder / "config.json").read_text())["sdprune"]
    assert section["format"] == "portable"
    assert [path.name for path in folder.glob("*.safetensors")] == ["model.safetensors"]
    with pytest.raises(ValueError, match="format must be 'plain': no layer of the model has enough zeros"):
        export(make_bert(0.01), tmp_path / "none", "compact")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("structure", "most"), [("unstructured", 0.25), ("block", 0.15)])
def test_sizes_on_disk(structure, most, dtype, tmp_path):
    """Of the linear layers, everything that is stored for them, at 90 %."""
    model = make_bert(0.9, structure=structure).to(dtype)
    folder = export(model, tmp_path / "model", "compact")
    sizes = {}
    for name in ("model.safetensors", "model.compact.safetensors"):
        tensors = load_file(folder / name)
        layers = tuple(f"{layer}." for layer in tag(folder)["modules"])
        sizes[name] = sum(value.nbytes for key, value in tensors.items() if key.startswith(layers))
        others = sum(value.nbytes for key, value in tensors.items() if not key.startswith(layers))
        assert (folder / name).stat().st_size < sizes[name] + others + 16384  # the header
    assert len(layers) == 6
    assert sizes["model.compact.safetensors"] <= most * sizes["model.safetensors"]


def test_weights_that_are_nan(sparse, tmp_path):
    model, structures = sparse
    name = next(iter(structures))
    with torch.no_grad():
        weight = model.get_parameter(f"{name}.weight")
        weight[tuple(weight.nonzero()[0])] = torch.nan
    with pytest.raises(ValueError, match=f"layer '{name}' has NaN among its weights"):
        export(model, tmp_path / "model", format="compact")
    assert not list(tmp_path.iterdir())


def test_names_and_types_in_the_compact_file(sparse, tmp_path):
    model, structures = sparse
    folder = export(model, tmp_path / "model", "compact")
    expected = {
        "block": {"weight", "crow_indices", "col_indices", "bias"},
        "narrow": {"weight", "rows", "columns", "bias"},
        "unstructured": {"weight", "mask", "bias"},
    }
    with safe_open(folder / "model.compact.safetensors", framework="pt") as file:
        for name, structure in structures.items():
            keys = {key for key in file.keys() if key.rpartition(".")[0] == name}  # noqa: SIM118
            assert keys == {f"{name}.{part}" for part in expected[structure]}
            indices = {key for key in keys if not key.endswith((".weight", ".bias"))}
            assert all(file.get_tensor(key).dtype is torch.int32 for key in indices)
            assert file.get_tensor(f"{name}.weight").shape != model.get_submodule(name).weight.shape


_STRANGER = """
import sys, torch
sys.modules["sdprune"] = sys.modules["sdp_kernels"] = None
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification as Auto
portable, rounded, alone = sys.argv[1:]
for folder in (portable, rounded):
    model = Auto.from_pretrained(folder, dtype="auto")
    expected = load_file(folder + "/model.safetensors")
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert all(type(module) is torch.nn.Linear for module in model.modules() if hasattr(module, "in_features"))
for folder, variant in ((alone, None), (portable, "compact"), (rounded, "compact")):
    try:
        Auto.from_pretrained(folder, variant=variant)
    except RuntimeError as error:
        assert "mismatch" in str(error), error
    else:
        raise SystemExit("loaded weights that are not there")
try:
    Auto.from_pretrained(alone, variant="none")
except OSError:
    print("as it should be")
"""


def test_without_the_package(sparse, tmp_path):
    """The portable form is the right dense model; stored layers on their own are an error, not a random model."""
    model, _ = sparse
    folder = export(model, tmp_path / "model", "compact")
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(folder / "config.json", alone)
    shutil.copy(folder / "model.compact.safetensors", alone / "model.safetensors")
    rounded = export(model, tmp_path / "int8", "compact", precision="int8")
    command = [sys.executable, "-c", _STRANGER, str(folder), str(rounded), str(alone)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.stdout.strip() == "as it should be", process.stderr


def make_plan(model, choices):
    times = Times(1.0, 1.0, 1.0, 3)
    layers = tuple(
        LayerPlan(
            name, tuple(model.get_submodule(name).weight.shape), 0.5, 8, 1, choice, {choice: Candidate(0.5, times)}
        )
        for name, choice in choices.items()
    )
    return Plan(layers, "CPU", "float32", 1, torch.__version__, times, times)


def test_a_plan_decides(sparse, tmp_path):
    model, structures = sparse
    blocks = [name for name, structure in structures.items() if structure == "block"]
    scattered = [name for name, structure in structures.items() if structure == "unstructured"]
    narrow = [name for name, structure in structures.items() if structure == "narrow"]
    plan = make_plan(model, {blocks[0]: "32x32", blocks[1]: DENSE, narrow[0]: "narrow", narrow[1]: DENSE})
    folder = export(model, tmp_path / "model", "compact", plan=plan)
    modules = tag(folder)["modules"]
    assert modules[blocks[0]]["block_shape"] == [32, 32]
    assert modules[blocks[1]]["structure"] == modules[narrow[1]]["structure"] == "unstructured"
    assert all(modules[name]["structure"] == "unstructured" for name in scattered)
    found = AutoModelForSequenceClassification.from_pretrained(folder, variant="compact")
    assert found.get_submodule(blocks[0]).block_shape == (32, 32)
    assert type(found.get_submodule(blocks[1])) is torch.nn.Linear
    assert isinstance(found.get_submodule(narrow[0]), NarrowLinear)
    wrong = replace(plan, layers=(replace(plan.layers[0], shape=(3, 3)),))
    with pytest.raises(ValueError, match=rf"plan must be of this model: its layer '{blocks[0]}' has shape \(3, 3\)"):
        export(model, tmp_path / "wrong", "compact", plan=wrong)


def test_the_shape_of_the_recipe_is_looked_for(tmp_path):
    model = make_bert(0.9, structure="block", block_shape=(8, 40))
    config = SDPruneConfig(structure="block", block_shape=(8, 40))
    folder = export(model, tmp_path / "model", config=config)
    assert all(module["block_shape"] == [8, 40] for module in tag(folder)["modules"].values())


def test_commands_take_sparse_folders(tokenizer, tmp_path, make_architecture):
    """Training and scoring want dense layers with zeros; exporting again keeps what they are."""
    _, model, structures = make_architecture("bert")
    folder = export(model, tmp_path / "model", "compact", processing_class=tokenizer)
    again = export_folder(folder, tmp_path / "again")
    assert tag(again) == tag(folder)
    examples = Examples((("a film",),), (0,))
    task = Task("own", ("a", "b"), examples, examples, examples, ("accuracy",))
    classifier = load_classifier(str(folder), task)
    for name in structures:
        assert type(classifier.model.get_submodule(name)) is torch.nn.Linear
    assert not any(isinstance(module, BlockSparseLinear) for module in classifier.model.modules())
