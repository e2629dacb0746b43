"""Folders that version 0.1.0 wrote, on 21 November 2026, load as they did then.

`exported/bert` holds one model in each format, with blocks, a narrower matrix, neurons that are gone and scattered
zeros; `exported/gpt2` the same of transposed layers. `expected.safetensors` holds inputs and the logits of that time.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

import sdprune
from sdprune.exports.inspect import inspect_folder

EXPORTED = Path(__file__).parent / "exported"
FOLDERS = [
    ("bert", "plain", None, []),
    ("bert", "portable", None, ["BlockSparse"] * 2 + ["Narrow"] + ["Removed"] * 2),
    ("bert", "compact", None, ["BlockSparse"] * 2 + ["Narrow"] + ["Removed"] * 2),
    ("bert", "compact", "compact", ["BlockSparse"] * 2 + ["Narrow"] + ["Removed"] * 2),
    ("gpt2", "compact", None, ["BlockSparse"] + ["Removed"] * 2),
    ("gpt2", "compact", "compact", ["BlockSparse"] + ["Removed"] * 2),
]


def from_pretrained(folder, variant):
    return AutoModelForSequenceClassification.from_pretrained(folder, variant=variant).eval()


@pytest.mark.parametrize("load", [from_pretrained, sdprune.load])
@pytest.mark.parametrize(("model", "format", "variant", "kinds"), FOLDERS)
def test_an_earlier_export_loads_to_the_same_logits(model, format, variant, kinds, load):
    expected = load_file(EXPORTED / model / "expected.safetensors")
    loaded = load(EXPORTED / model / format, variant)
    names = [type(module).__name__ for module in loaded.modules()]
    assert [name.removesuffix("Linear") for name in names if name in {f"{kind}Linear" for kind in kinds}] == kinds
    with torch.inference_mode():
        logits = loaded(input_ids=expected["input_ids"], attention_mask=expected["attention_mask"]).logits
    torch.testing.assert_close(logits, expected[f"{format}.{variant or 'dense'}"], rtol=0, atol=1e-6)
    torch.testing.assert_close(logits, expected["logits"], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("model", "format", "variant", "kinds"), FOLDERS)
def test_an_earlier_export_is_inspected(model, format, variant, kinds):
    found = inspect_folder(EXPORTED / model / format, variant)
    assert found.format == format
    assert found.density == pytest.approx({"bert": 0.7008928571, "gpt2": 0.6974321705}[model])
    sizes = {"bert": (69888, 50360), "gpt2": (33024, 23864)}[model]  # of the dense and of the compact layers
    assert (found.layer_bytes, found.other_bytes) == (sizes[variant is not None], {"bert": 9352, "gpt2": 7552}[model])


def test_what_is_exported_today_has_the_same_records(tmp_path):
    """The format has not changed: the same model gives the same tag, digests included."""
    for model, kind in (("bert", "compact"), ("gpt2", "compact")):
        before = AutoModelForSequenceClassification.from_pretrained(EXPORTED / model / kind)
        folder = sdprune.export(before, tmp_path / model, "compact")
        ours, theirs = (load_file(place / "model.compact.safetensors") for place in (folder, EXPORTED / model / kind))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
