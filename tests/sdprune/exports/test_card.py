"""The model card: a header that the hub reads, and everything a reader must know, losses first of all."""

from dataclasses import replace

import pytest
from huggingface_hub import ModelCard as HubCard

from sdprune import export
from sdprune.exports.card import ModelCard, Speed, losing_cases, write_model_card

CARD = ModelCard(
    base_model="google-bert/bert-base-uncased",
    method="self-distilled pruning",
    data="sst2: 60000 training rows: of films",  # a colon must not break the header
    seed=7,
    metrics={"accuracy": 0.90, "f1": 0.95},
    dense_metrics={"accuracy": 0.92, "f1": 0.94},
    speeds=(
        Speed(0.98, "A CPU", "float32", 32, 64),
        Speed(1.7, "A GPU", "bfloat16", 8, 128, form="sparse layers"),
    ),
    recipe={"target_sparsity": 0.5, "exclude_modules": None, "block_shape": [32, 32]},
    dataset="nyu-mll/glue",
)


@pytest.fixture
def folder(model, tokenizer, tmp_path):
    for name, value in model.named_parameters():
        if name.endswith("query.weight"):
            value.data[:16] = 0.0
        if name.endswith("value.weight"):
            value.data[::2, ::3] = 0.0
    return export(model, tmp_path / "exported", "plain", processing_class=tokenizer)


def test_the_hub_reads_the_header(folder):
    card = HubCard.load(write_model_card(folder, CARD))
    assert card.data.base_model == "google-bert/bert-base-uncased"
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-classification"
    assert card.data.datasets == ["nyu-mll/glue"]
    assert "sdprune" in card.data.tags
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results == {"accuracy": 0.9, "f1": 0.95}
    assert card.data.eval_results[0].dataset_name == CARD.data


def test_what_it_tells(folder):
    text = write_model_card(folder, CARD).read_text()
    for part in (
        "Base model: google-bert/bert-base-uncased",
        "Seed: 7",
        "AutoModelForSequenceClassification.from_pretrained(",
        "| accuracy | 0.9200 | 0.9000 |",
        "| A GPU | bfloat16 | 8 | 128 | sparse layers | 1.70 |",
        "| rows | 2 | 50.0% |",
        "| unstructured | 2 |",
        "- accuracy is 0.0200 lower than before pruning.",
        "- On A CPU in float32, batch 32 x 64 tokens, as dense weights with zeros: 0.98 times",
        "target_sparsity: 0.5",
        "exclude_modules: null",
    ):
        assert part in text
    assert losing_cases(replace(CARD, metrics={"accuracy": 0.93}, speeds=CARD.speeds[1:])) == []
    assert "f1 is" not in text


def test_a_local_base_model_is_no_id_of_the_hub(folder, tmp_path):
    card = HubCard.load(write_model_card(folder, replace(CARD, base_model=str(tmp_path), dataset=None)))
    assert card.data.base_model is None
    assert card.data.datasets is None
    assert f"Base model: {tmp_path.name}\n" in card.text
    assert str(tmp_path.parent) not in card.text


def test_compact_weights_alone_come_with_a_warning(model, tmp_path):
    model.get_parameter("bert.encoder.layer.0.output.dense.weight").data[:, 1:] = 0.0
    folder = export(model, tmp_path / "compact", "compact")
    text = write_model_card(folder, CARD).read_text()
    assert "dense with exact zeros" in text
    assert "Never load that variant without the package." in text
    (folder / "model.safetensors").unlink()
    text = write_model_card(folder, CARD).read_text()
    assert "import sdprune  # without it the weights would be random" in text
    assert "**There are no dense weights here." in text


def test_without_measurements_it_says_so(folder):
    text = write_model_card(folder, replace(CARD, metrics={}, speeds=())).read_text()
    assert "None were measured." in text
    assert "Not measured. Zeros in dense weights alone never make a product faster." in text
    assert "model-index" not in text


def test_a_folder_ready_for_the_hub(folder):
    """Weights, configuration, tokenizer and card; nothing that runs code, nothing left over."""
    write_model_card(folder, CARD)
    found = {path.name for path in folder.iterdir()}
    assert found >= {"README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {path.rpartition(".")[2] for path in found} <= {"md", "json", "safetensors", "txt"}
