"""`sdprune inspect`: what it says of zeros that are known, on every form of a checkpoint."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from sdp_kernels import BitMask
from sdprune import SDPruneConfig, export
from sdprune.cli import main
from sdprune.exports.inspect import inspect_folder
from sdprune.formats.zeros import structure_of
from sdprune.masking.pruner import mask_model
from sdprune.masking.swap import masked_layers


def blocks(rows, columns, height, width, density=0.3):
    grid = torch.rand(rows // height, columns // width) < density
    return grid.repeat_interleave(height, 0).repeat_interleave(width, 1)


def with_blocks_inside(mask):
    """One weight less in a block that was kept: nothing but single weights describes that exactly."""
    mask = mask.clone()
    mask[tuple(mask.nonzero()[0])] = False
    return mask


def rows_and_columns():
    mask = torch.ones(24, 40, dtype=torch.bool)
    mask[3] = False
    return mask, mask.clone().index_fill_(1, torch.tensor([1, 7]), False)


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (torch.ones(6, 5, dtype=torch.bool), "dense"),
        (torch.zeros(6, 5, dtype=torch.bool), "empty"),
        (rows_and_columns()[0], "rows"),
        (rows_and_columns()[0].T, "columns"),
        (rows_and_columns()[1], "rows and columns"),
        (torch.eye(4, dtype=torch.bool).repeat_interleave(32, 0).repeat_interleave(32, 1), "32x32"),
        (torch.eye(8, dtype=torch.bool).repeat_interleave(16, 0).repeat_interleave(4, 1), "16x4"),
        (torch.rand(4, 100).argsort(0).lt(2).repeat_interleave(32, 0), "32x1"),
        (
            with_blocks_inside(torch.eye(2, dtype=torch.bool).repeat_interleave(8, 0).repeat_interleave(8, 1)),
            "unstructured",
        ),
        (torch.rand(64, 16, 4).argsort(2).lt(2).view(64, 64), "2:4"),
        (torch.rand(64, 8, 8).argsort(2).lt(3).view(64, 64), "3:8"),
        (torch.rand(63, 61) < 0.5, "unstructured"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_structures(mask, expected):
    assert structure_of(mask) == expected


@pytest.fixture
def pruned(model):
    """A model of which each layer has zeros of another structure."""
    prefix = "bert.encoder.layer.0."
    with torch.no_grad():
        model.get_parameter(prefix + "attention.self.query.weight")[:16] = 0.0  # the first of two heads
        model.get_parameter(prefix + "attention.output.dense.weight")[:, 20:] = 0.0  # a part of the second
        up = model.get_parameter(prefix + "intermediate.dense.weight")
        up.masked_fill_(~blocks(64, 32, 16, 16).index_fill_(0, torch.arange(16), True), 0.0)
        up[:16] = 0.0
        down = model.get_parameter(prefix + "output.dense.weight")
        down.masked_fill_(torch.rand(down.shape, generator=torch.Generator().manual_seed(0)) < 0.9, 0.0)
    return model


def layer_of(found, part):
    (layer,) = [layer for layer in found.layers if layer.name == f"bert.encoder.layer.0.{part}"]
    return layer


def check(found, model, compact):
    query = layer_of(found, "attention.self.query")
    assert (query.structure, query.dead_rows, query.heads, query.dead_heads) == ("rows", 16, 2, 1)
    output = layer_of(found, "attention.output.dense")
    assert (output.structure, output.dead_columns, output.dead_heads) == ("columns", 12, 0)
    up = layer_of(found, "intermediate.dense")
    assert up.dead_rows >= 16
    assert up.heads is None
    down = layer_of(found, "output.dense")
    assert (down.shape, down.structure) == ((32, 64), "unstructured")
    weight = model.get_parameter("bert.encoder.layer.0.output.dense.weight")
    assert down.density == pytest.approx(int(weight.count_nonzero()) / weight.numel())
    assert sum(map(sum, down.grid)) / 1024 == pytest.approx(down.density, abs=1e-6)
    assert layer_of(found, "attention.self.key").structure == "dense"
    assert not any("embeddings" in layer.name for layer in found.layers)
    size = 4 * int(weight.count_nonzero()) + 4 * 32 * 2 if compact else 4 * 32 * 64
    assert down.bytes == size
    total = sum(value.nbytes for value in model.state_dict().values())
    if not compact:
        assert found.layer_bytes + found.other_bytes == total
    else:
        assert found.layer_bytes + found.other_bytes < total


@pytest.mark.parametrize("format", ["plain", "portable", "compact"])
def test_the_three_formats(pruned, tmp_path, format):
    folder = export(pruned, tmp_path / "model", format)
    found = inspect_folder(folder)
    assert (found.format, found.variant, found.architecture) == (format, None, "BertForSequenceClassification")
    check(found, pruned, compact=False)
    if format == "compact":
        check(inspect_folder(folder, "compact"), pruned, compact=True)
        (folder / "model.safetensors").unlink()
        found = inspect_folder(folder)
        assert found.variant == "compact"
        check(found, pruned, compact=True)


def test_a_folder_of_others_in_shards(pruned, tmp_path):
    pruned.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    found = inspect_folder(tmp_path / "model")
    assert found.format is None
    check(found, pruned, compact=False)


def test_conv1d_and_shared_weights(tmp_path):
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50, n_positions=32))
    with torch.no_grad():
        model.transformer.h[0].attn.c_attn.weight[:, 8:16] = 0.0  # queries of the second head
    model.save_pretrained(tmp_path / "model")
    layers = {layer.name: layer for layer in inspect_folder(tmp_path / "model").layers}
    fused = layers["transformer.h.0.attn.c_attn"]
    assert (fused.shape, fused.structure, fused.heads, fused.dead_heads) == ((48, 16), "rows", 6, 1)
    assert "lm_head" not in layers


def test_an_unknown_architecture_lists_every_matrix(pruned, tmp_path):
    pruned.save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": ["MyBert"]}))
    found = inspect_folder(tmp_path / "model")
    assert found.architecture is None
    assert "bert.embeddings.word_embeddings" in [layer.name for layer in found.layers]
    assert layer_of(found, "attention.self.query").heads is None


def test_the_command(pruned, tmp_path, capsys):
    folder = export(pruned, tmp_path / "model")
    assert main(["inspect", str(folder), "--heat-map", str(tmp_path / "map.png")]) == 0
    table = capsys.readouterr().out
    assert "1 of 2" in table
    assert "rows" in table
    assert (tmp_path / "map.png").read_bytes()[:4] == b"\x89PNG"
    assert main(["inspect", str(folder), "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["total"]["dead_heads"] == 1
    assert values["total"]["density"] == pytest.approx(inspect_folder(folder).density)
    assert len(values["layers"]) == len(inspect_folder(folder).layers)


def test_the_density_of_masked_blocks(model, tmp_path):
    config = SDPruneConfig(structure="block", block_shape=(16, 16))
    mask_model(model, config)
    for layer in masked_layers(model).values():
        rows, columns = layer.out_features // 16, layer.in_features // 16
        grid = torch.arange(rows * columns).view(rows, columns) % 4 == 1
        layer.set_mask(BitMask.from_blocks(grid, (16, 16), (layer.out_features, layer.in_features)))
    found = inspect_folder(export(model, tmp_path / "model", config=config))
    chosen = [layer for layer in found.layers if layer.name in masked_layers(model)]
    assert {layer.density for layer in chosen} == {0.25}
    assert len(chosen) == 12


def damage(folder, how):
    file = folder / "model.safetensors"
    if how == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif how == "no weights":
        file.unlink()
    elif how == "no config":
        (folder / "config.json").unlink()
    elif how == "half a config":
        (folder / "config.json").write_text("{")
    elif how == "another rank":
        state = load_file(file)
        state["classifier.weight"] = state["classifier.weight"].flatten()
        save_file(state, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("how", "code", "message"),
    [
        ("truncated", 2, "model.safetensors is damaged or no safetensors file"),
        ("no weights", 1, "has neither model.safetensors nor model.safetensors.index.json"),
        ("no config", 1, "config.json is missing; name a folder that save_pretrained wrote"),
        ("half a config", 2, "config.json is damaged"),
        ("another rank", 2, "classifier.weight must have 2 dimensions, got (64,)"),
        ("absent", 2, "is not a folder"),
    ],
)
def test_damaged_folders(model, tmp_path, capsys, how, code, message):
    folder = tmp_path / "model"
    if how != "absent":
        model.save_pretrained(folder)
        damage(folder, how)
    assert main(["inspect", str(folder)]) == code
    assert message in capsys.readouterr().err
