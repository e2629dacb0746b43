"""A checkpoint that is damaged, mixed up or hostile is an error that names file and field, never a wrong model."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

import sdprune
from sdprune import SDPruneQuantizationConfig, export

PREFIX = "bert.encoder.layer.0"
BLOCK = f"{PREFIX}.attention.self.query"
NARROW = f"{PREFIX}.attention.self.key"
SCATTERED = f"{PREFIX}.attention.self.value"


def from_pretrained(folder: Path, variant: str | None = None):
    return AutoModelForSequenceClassification.from_pretrained(folder, variant=variant)


@pytest.fixture(params=[from_pretrained, sdprune.load], ids=["from_pretrained", "load"])
def load(request):
    return request.param


@pytest.fixture(params=[None, "compact"])
def variant(request):
    return request.param


@pytest.fixture(scope="module")
def exported(make_architecture, tmp_path_factory):
    _, model, structures = make_architecture("bert")
    assert [structures[name] for name in (BLOCK, NARROW, SCATTERED)] == ["block", "narrow", "unstructured"]
    return export(model, tmp_path_factory.mktemp("exported") / "model", "compact")


@pytest.fixture(scope="module")
def sharded(make_architecture, tmp_path_factory):
    _, model, _ = make_architecture("bert")
    folder = tmp_path_factory.mktemp("exported") / "sharded"
    return export(model, folder, "compact", max_shard_size="80KB")


@pytest.fixture
def folder(exported, tmp_path):
    return Path(shutil.copytree(exported, tmp_path / "model"))


def weights(variant: str | None) -> str:
    return "model.compact.safetensors" if variant else "model.safetensors"


def edit_config(folder: Path, edit) -> None:
    path = folder / "config.json"
    values = json.loads(path.read_text())
    edit(values["quantization_config"])
    path.write_text(json.dumps(values))


def edit_weights(path: Path, edit) -> None:
    tensors = load_file(path)
    edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})


def test_whole_is_fine(folder, load, variant):
    load(folder, variant)


def test_weights_of_another_run(folder, load, variant, make_architecture):
    """With the same zeros, too: only the values tell."""
    edit_weights(
        folder / weights(variant),
        lambda tensors: [tensor.mul_(2) for tensor in tensors.values() if tensor.is_floating_point()],
    )
    with pytest.raises(
        ValueError, match=rf"{weights(variant)}: .* is not what config.json describes .*another checkpoint"
    ):
        load(folder, variant)


def test_the_configuration_of_another_run(folder, load, variant):
    def edit(tag):
        tag["modules"][BLOCK]["sha256"] = tag["modules"][NARROW]["sha256"]

    edit_config(folder, edit)
    with pytest.raises(ValueError, match=rf"{weights(variant)}: {BLOCK} is not what config.json describes"):
        load(folder, variant)


@pytest.mark.parametrize("length", [4, 3000, -16])
def test_a_truncated_file(folder, load, variant, length):
    path = folder / weights(variant)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match=rf"{weights(variant)} is damaged or no safetensors file"):
        load(folder, variant)


@pytest.mark.parametrize(
    "name",
    [f"{BLOCK}.col_indices", f"{BLOCK}.crow_indices", f"{NARROW}.rows", f"{NARROW}.columns", f"{SCATTERED}.mask"],
)
@pytest.mark.parametrize("bit", [0, 3, 30])
def test_a_flipped_bit_in_the_indices(folder, load, name, bit):
    def flip(tensors):
        tensors[name].view(-1)[-1] ^= 1 << bit

    edit_weights(folder / weights("compact"), flip)
    with pytest.raises(ValueError, match=rf"{weights('compact')}: {name.rpartition('.')[0]}"):
        load(folder, "compact")


@pytest.mark.parametrize("name", [BLOCK, NARROW, SCATTERED])
def test_a_flipped_bit_in_the_values(folder, load, variant, name):
    def flip(tensors):
        values = tensors[f"{name}.weight"]
        values.view(torch.int32)[values != 0] ^= 1

    edit_weights(folder / weights(variant), flip)
    with pytest.raises(ValueError, match=rf"{weights(variant)}: {name} is not what config.json describes"):
        load(folder, variant)


def test_a_zero_that_is_none(folder, load):
    def fill(tensors):
        weight = tensors[f"{BLOCK}.weight"]
        weight[(weight == 0).nonzero(as_tuple=True)] = 1.0

    edit_weights(folder / weights(None), fill)
    with pytest.raises(ValueError, match=rf"{weights(None)}: {BLOCK}.weight must have shape .* as config.json tells"):
        load(folder)


@pytest.mark.parametrize("name", [f"{BLOCK}.weight", f"{BLOCK}.col_indices", f"{SCATTERED}.mask"])
def test_a_missing_tensor(folder, load, name):
    edit_weights(folder / weights("compact"), lambda tensors: tensors.pop(name))
    with pytest.raises(ValueError, match=rf"{weights('compact')}: tensor '{name}' is missing"):
        load(folder, "compact")


def test_a_flipped_bit_beside_the_stored_layers(folder, load, variant):
    def flip(tensors):
        tensors["bert.embeddings.LayerNorm.bias"].view(torch.int32)[0] ^= 1

    edit_weights(folder / weights(variant), flip)
    with pytest.raises(ValueError, match=rf"{weights(variant)}: .*rest_sha256 differs.*damaged"):
        load(folder, variant)


@pytest.mark.parametrize("digest", [True, False])
def test_a_tensor_under_another_name(folder, load, variant, digest):
    """transformers leaves a bias that no file holds as memory happens to be, or makes it anew."""

    def rename(tensors):
        tensors[f"{BLOCK}.bjas"] = tensors.pop(f"{BLOCK}.bias")

    edit_weights(folder / weights(variant), rename)
    if not digest:  # as `save_pretrained` leaves it
        edit_config(folder, lambda tag: tag.pop("rest_sha256"))
    with pytest.raises(ValueError, match=rf"{weights(variant)}: tensor '{BLOCK}.bias' is missing"):
        load(folder, variant)


@pytest.mark.parametrize("named", [["pipeline"], ["utils"], ["BertConfig"], "BertModel", [3], [], None, {"a": 1}])
def test_architectures_that_are_no_model(folder, named):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": named}))
    with pytest.raises(ValueError, match=r"config\.json: architectures must name a model class of transformers, got "):
        sdprune.load(folder)


def test_a_field_of_another_type(folder):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_size": "wide"}))
    with pytest.raises(ValueError, match=r"config\.json: Validation error for field 'hidden_size': .*'wide'"):
        sdprune.load(folder)


def test_indices_of_another_type(folder, load):
    def widen(tensors):
        tensors[f"{NARROW}.rows"] = tensors[f"{NARROW}.rows"].long()

    edit_weights(folder / weights("compact"), widen)
    with pytest.raises(ValueError, match=rf"{weights('compact')}: {NARROW}.rows must be int32, got torch.int64"):
        load(folder, "compact")


def test_a_missing_variant(folder, load):
    (folder / weights("compact")).unlink()
    with pytest.raises(OSError, match=r"model\.compact\.safetensors"):
        load(folder, "compact")


def test_only_the_variant(folder, load):
    (folder / weights(None)).unlink()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        load(folder)


@pytest.fixture(scope="module")
def rounded(make_architecture, tmp_path_factory):
    _, model, _ = make_architecture("bert")
    return export(model, tmp_path_factory.mktemp("exported") / "int8", "compact", precision="int8")


@pytest.fixture
def int8_folder(rounded, tmp_path):
    return Path(shutil.copytree(rounded, tmp_path / "model"))


SCALES = {
    r"must have shape \(64,\) as config.json tells, got \(63,\)": lambda scales: scales[:-1],
    r"must be float32, got torch\.float64": lambda scales: scales.double(),
    r"must be finite and above 0, got 0\.0 at 3": lambda scales: scales.index_fill(0, torch.tensor([3]), 0.0),
    r"must be finite and above 0, got -1\.0 at 3": lambda scales: scales.index_fill(0, torch.tensor([3]), -1.0),
    r"must be finite and above 0, got nan at 3": lambda scales: scales.index_fill(0, torch.tensor([3]), torch.nan),
    r"must be finite and above 0, got inf at 3": lambda scales: scales.index_fill(0, torch.tensor([3]), torch.inf),
}


@pytest.mark.parametrize("name", [BLOCK, SCATTERED])
@pytest.mark.parametrize("message", SCALES)
def test_scales_that_are_none(int8_folder, load, name, message):
    def change(tensors):
        tensors[f"{name}.scales"] = SCALES[message](tensors[f"{name}.scales"])

    edit_weights(int8_folder / weights("compact"), change)
    with pytest.raises(ValueError, match=rf"{weights('compact')}: {name}\.scales {message}"):
        load(int8_folder, "compact")


INT8_CHANGES = {
    "weight must be int8, got torch.int16": lambda part: {"weight": part["weight"].short()},
    "is not what config.json describes .*scales": lambda part: {"scales": part["scales"] * 2.0},
    "is not what config.json describes .*weight": lambda part: {"weight": part["weight"] ^ 1},
}


@pytest.mark.parametrize("name", [BLOCK, NARROW, SCATTERED])
@pytest.mark.parametrize("message", INT8_CHANGES)
def test_integers_of_another_run(int8_folder, load, name, message):
    def change(tensors):
        part = {key: tensors[f"{name}.{key}"] for key in ("weight", "scales")}
        tensors.update({f"{name}.{key}": value for key, value in INT8_CHANGES[message](part).items()})

    edit_weights(int8_folder / weights("compact"), change)
    with pytest.raises(ValueError, match=rf"{weights('compact')}: {name}.{message}"):
        load(int8_folder, "compact")


def test_no_scales(int8_folder, load):
    edit_weights(int8_folder / weights("compact"), lambda tensors: tensors.pop(f"{NARROW}.scales"))
    with pytest.raises(ValueError, match=rf"{weights('compact')}: tensor '{NARROW}.scales' is missing"):
        load(int8_folder, "compact")


@pytest.mark.parametrize("name", [BLOCK, NARROW, SCATTERED])
def test_dense_weights_that_are_not_of_these_integers(int8_folder, load, name):
    """One step of the last digit is enough, as it would give another scale; smaller ones round to the same integers."""
    edit_weights(int8_folder / weights(None), lambda tensors: tensors[f"{name}.weight"].mul_(1.0 + 2.0**-20))
    with pytest.raises(ValueError, match=rf"{weights(None)}: {name} is not what config.json describes"):
        load(int8_folder)


CHANGES = {
    "precision must be 'int8' where it is given, got 'int4'": lambda tag: tag["modules"][BLOCK].update(
        precision="int4"
    ),
    "version must be 1, got 2; a later version of sdprune may know it": lambda tag: tag.update(version=2),
    "version must be 1, got True": lambda tag: tag.update(version=True),
    "has an unknown field 'extra'": lambda tag: tag.update(extra=1),
    "modules must be an object, got 3": lambda tag: tag.update(modules=3),
    r"modules must be named as layers are .*, got '\.\./\.\./etc'": lambda tag: tag["modules"].update(
        {"../../etc": {}}
    ),
    f"modules\\['{BLOCK}'\\] must be an object, got 'x'": lambda tag: tag["modules"].update({BLOCK: "x"}),
    "structure must be one of block, narrow, unstructured, got 'pickle'": lambda tag: tag["modules"][BLOCK].update(
        structure="pickle"
    ),
    r"shape must be 2 whole numbers of at least 1, got \[64, -64\]": lambda tag: tag["modules"][BLOCK].update(
        shape=[64, -64]
    ),
    r"kept must be at most \[16\], got \[99\]": lambda tag: tag["modules"][BLOCK].update(kept=[99]),
    "density must be .* as its other parts have it, got 0.5": lambda tag: tag["modules"][BLOCK].update(density=0.5),
    "rest_sha256 must be 64 hexadecimal digits, got 7": lambda tag: tag.update(rest_sha256=7),
    r"\]\.sha256 must be 64 hexadecimal digits, got 'abc'": lambda tag: tag["modules"][BLOCK].update(sha256="abc"),
    r"block_shape must be 2 whole numbers of at least 1, got None": lambda tag: tag["modules"][BLOCK].pop(
        "block_shape"
    ),
    "transposed must be true or false, got 1": lambda tag: tag["modules"][BLOCK].update(transposed=1),
    "has an unknown part 'code'": lambda tag: tag["modules"][BLOCK].update(code="print()"),
    "removed must be 'rows' or 'columns' of a narrow layer": lambda tag: tag["modules"][BLOCK].update(removed="rows"),
    "consumer must name a layer if and only if rows are removed": lambda tag: tag["modules"][NARROW].update(
        removed="rows"
    ),
    "consumer must be a layer whose columns are removed": lambda tag: tag["modules"][NARROW].update(
        removed="rows", consumer=BLOCK
    ),
    "block_shape belongs to blocks only": lambda tag: tag["modules"][NARROW].update(block_shape=[16, 16]),
}


@pytest.mark.parametrize("message", CHANGES)
def test_a_malformed_configuration(folder, load, message):
    edit_config(folder, CHANGES[message])
    with pytest.raises(ValueError, match=r"config\.json: quantization_config.*" + message):
        load(folder)


def test_a_layer_of_another_model(folder, load, variant):
    edit_config(folder, lambda tag: tag["modules"].update({f"{PREFIX}.absent": tag["modules"][BLOCK]}))
    with pytest.raises(ValueError, match=rf"{weights(variant)}: tensor '{PREFIX}.absent.weight' is missing"):
        load(folder, variant)


def test_a_transposed_layer_that_is_not(folder, load):
    edit_config(folder, lambda tag: tag["modules"][BLOCK].update(transposed=True))
    with pytest.raises(ValueError, match=BLOCK):
        load(folder)


def test_shards_stay_in_their_folder(sharded, load, variant, tmp_path):
    folder = Path(shutil.copytree(sharded, tmp_path / "model"))
    index = folder / f"model.safetensors.index{'.compact' if variant else ''}.json"
    values = json.loads(index.read_text())
    load(folder, variant)
    name = f"{BLOCK}.weight"
    home = values["weight_map"][name]
    shutil.copy(folder / home, tmp_path / "elsewhere.safetensors")
    moved = {key: "../elsewhere.safetensors" if file == home else file for key, file in values["weight_map"].items()}
    index.write_text(json.dumps(values | {"weight_map": moved}))
    with pytest.raises(ValueError, match=r"must name files in .*, got '.*\.\./elsewhere.safetensors'"):
        load(folder, variant)


def test_a_missing_shard(sharded, load, variant, tmp_path):
    folder = Path(shutil.copytree(sharded, tmp_path / "model"))
    missing = min(folder.glob("model.compact-*" if variant else "model-*"))
    missing.unlink()
    with pytest.raises(OSError, match=missing.name):
        load(folder, variant)


def test_a_configuration_by_hand():
    for arguments, message in (
        ({"max_density": 1.5}, "max_density must lie between 0 and 1, got 1.5"),
        ({"block_shape": (0, 4)}, "block_shape must be two whole numbers of at least 1"),
        ({"quant_method": "gptq"}, "quant_method must be 'sdprune', got 'gptq'"),
    ):
        with pytest.raises(ValueError, match=message):
            SDPruneQuantizationConfig(**arguments)
    tag = SDPruneQuantizationConfig().to_dict()
    assert tag == {"quant_method": "sdprune", "version": 1, "modules": {}}
    assert SDPruneQuantizationConfig.from_dict(tag).to_dict() == tag


def test_a_dtype_that_is_none(folder):
    with pytest.raises(TypeError, match=r"dtype must be a torch.dtype such as torch.float16, or None, got 'float16'"):
        sdprune.load(folder, dtype="float16")
