"""What a run is called, in its table and on its model's card."""

from dataclasses import replace

import pytest
import torch

from sdprune.commands.table import print_table
from sdprune.config import SDPruneConfig
from sdprune.layers.pruned import PrunedLinear
from sdprune.recipe import DataConfig, Recipe, StagesConfig
from sdprune.runs import results
from sdprune.runs.results import card_of, method_name
from sdprune.runs.workbench import load_workbench

BOTH = {"kl": 1.0, "cross_correlation": 0.5}


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"distillation": "cross_correlation"}, "SDP-CC"),
        ({"distillation": BOTH}, "SDP-KLD + SDP-CC"),
        ({"distillation": {"cross_correlation": 1.0, "mse@logits": 1.0}}, "SDP-CC + MSE (logits)"),
        ({"distillation": {"cosine@first": 1.0, "cosine@mean@2": 1.0}}, "SDP-Cos (first) + SDP-Cos (mean of layer 2)"),
        ({"distillation": None}, "magnitude"),
        ({"distillation": None, "criterion": "lamp"}, "lamp"),
        ({"distillation": "kl", "criterion": "movement", "scope": "global"}, "movement + SDP-KLD"),
        ({"distillation": None, "target_sparsity": 0.0}, "fine-tuned"),
        ({"distillation": BOTH, "target_sparsity": 0.0}, "distilled, SDP-KLD + SDP-CC"),
    ],
)
def test_names(fields, name):
    assert method_name(SDPruneConfig(**fields)) == name


def test_cards_claim_no_more_than_was_done(model_folder, csv_file):
    workbench = load_workbench(str(model_folder), DataConfig(data=str(csv_file)))
    scores = {"accuracy": 0.5, "macro_f1": 0.5}
    row = {"method": "M", "structure": "unstructured", "target_sparsity": 0.5, "speedup": 1.0, **scores}
    taught = Recipe(str(model_folder), pruning=SDPruneConfig(distillation="kl"))
    alone = replace(taught, pruning=SDPruneConfig(distillation=None))
    stages = replace(taught, stages=StagesConfig(pipeline="pqk"))
    card = card_of(taught, workbench, row, scores)
    assert card.method.startswith("self-distilled pruning (M, unstructured), https://")
    assert card.task == "text-classification"
    for recipe in (alone, stages):
        assert card_of(recipe, workbench, row, scores).method == "pruning (M, unstructured)"
    assert card_of(taught, workbench, row | {"target_sparsity": 0.0}, scores).method == "M, not pruned"


def test_the_table_fits_its_names(capsys):
    scores = {"accuracy": 0.5}
    row = {"sparsity": 0.7, "reload_max_difference": 0.0, "speedup": 1.0, "int8": {"accuracy": 0.25}, **scores}
    long = "movement + SDP-KLD + SDP-CC"
    print_table({"dense": scores, "trained_head": False, "baselines": {}, "runs": [row | {"method": long}]})
    header, dense, pruned, int8 = capsys.readouterr().out.splitlines()[1:5]
    assert dense.startswith("dense, untrained head ")
    assert pruned.startswith(f"{long}  ")
    ends = {line.index(cell) + len(cell) for line, cell in ((header, "accuracy"), (dense, "50.0%"), (int8, "25.0%"))}
    assert ends == {pruned.index("50.0%") + len("50.0%")}


def test_what_is_timed_has_the_layers_that_the_export_becomes(model, model_folder, csv_file, tmp_path, monkeypatch):
    """Neurons that are gone leave the matrices of the model that is timed, and the card says so."""
    dead = torch.arange(56)
    for layer in model.bert.encoder.layer:
        layer.intermediate.dense.weight.data[dead] = 0.0
        layer.output.dense.weight.data[:, dead] = 0.0
    timed = []
    monkeypatch.setattr(results, "speedup", lambda dense, pruned, inputs: timed.append(pruned) or 2.0)
    workbench = load_workbench(str(model_folder), DataConfig(data=str(csv_file)))
    gathered = results.Results(workbench, workbench.classifier.model, {"accuracy": 0.5, "macro_f1": 0.5})
    config = SDPruneConfig(target_sparsity=0.5)
    found = gathered.add(model, config, Recipe(str(model_folder)), tmp_path / "model")
    assert sum(isinstance(module, PrunedLinear) for module in timed[0].modules()) == 4
    assert found.row["reload_max_difference"] == 0.0
    assert "sparse layers | 2.00" in (tmp_path / "model" / "README.md").read_text()


def test_the_card_tells_what_the_dense_model_reaches_in_onnxruntime(
    model, model_folder, csv_file, tmp_path, monkeypatch, in_process, capsys
):
    measured = []
    found = {"ONNX Runtime float32": 1.5, "ONNX Runtime int8": 2.5}
    monkeypatch.setattr(results, "opponent_speedups", lambda dense, inputs: measured.append(dense) or found)
    monkeypatch.setattr(results, "speedup", lambda dense, pruned, inputs: 2.0)
    workbench = load_workbench(str(model_folder), DataConfig(data=str(csv_file)))
    gathered = results.Results(workbench, workbench.classifier.model, {"accuracy": 0.5, "macro_f1": 0.5})
    for name in ("a", "b"):
        gathered.add(model, SDPruneConfig(), Recipe(str(model_folder)), tmp_path / name)
        card = (tmp_path / name / "README.md").read_text()
        assert "| dense model in ONNX Runtime | 1.50 |" in card
        assert "| int8 | 32 |" in card
        assert "the dense model in ONNX Runtime has 2.50 times its speed in torch: faster than this model." in card
        assert "has 1.50 times its speed" not in card, "ours is faster"
    assert measured == [workbench.classifier.model], "once for all models of a run"
    print_table(gathered.metrics)
    assert "The dense model itself reached 1.50x in ONNX Runtime float32, 2.50x in ONNX Runtime int8." in (
        capsys.readouterr().out
    )


def test_a_difference_after_reloading_is_reported(model, model_folder, csv_file, tmp_path, monkeypatch):
    workbench = load_workbench(str(model_folder), DataConfig(data=str(csv_file)))
    with torch.inference_mode():
        logits = model(**workbench.probe).logits
        outputs = [model(**inputs).logits for inputs in workbench.batches[""].inputs]
    monkeypatch.setattr(results, "fresh_logits", lambda *arguments, **options: (logits + 1.0, outputs))
    gathered = results.Results(workbench, workbench.classifier.model, {"accuracy": 0.5, "macro_f1": 0.5})
    found = gathered.add(model, SDPruneConfig(), Recipe(str(model_folder)), tmp_path / "model")
    assert found.row["reload_max_difference"] == pytest.approx(1.0, rel=1e-3)
    assert found.row["form"] == "dense weights with zeros"
