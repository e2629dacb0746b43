"""Other heads than that of a text classifier: tags and numbers by the command line, the next token from Python."""

import json
import random

import pytest
import torch
from transformers import (
    AutoModelForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from sdprune import SDPruneConfig, prune
from sdprune.cli import main
from sdprune.masking.select import select_linears

FAST = ["--max-steps", "8", "--per-device-train-batch-size", "8", "--eval-steps", "8", "--save-steps", "8"]
FAST += ["--bf16", "false", "--warmup-steps", "0", "--logging-steps", "2", "--seed", "1"]
TAGS = {"great": "B-GOOD", "fresh": "I-GOOD", "dull": "B-BAD"}


@pytest.fixture
def body(model_factory, tokenizer, tmp_path):
    """Return a folder with an encoder without a head."""
    model_factory().bert.save_pretrained(tmp_path / "body")
    tokenizer.save_pretrained(tmp_path / "body")
    return tmp_path / "body"


@pytest.fixture
def tagged_file(tmp_path):
    chooser, rows = random.Random(0), []
    for _ in range(120):
        words = [chooser.choice(["the", "film", "plot", "dull"]) for _ in range(chooser.randint(1, 6))]
        words += ["great", "fresh"] if chooser.random() < 0.5 else ["great-film"]
        rows.append({"tokens": words, "tags": [TAGS.get(word.partition("-")[0], "O") for word in words]})
    (tmp_path / "tags.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return tmp_path / "tags.jsonl"


def test_tags_by_the_command_line(body, tagged_file, tmp_path, in_process, monkeypatch, capsys):
    """Fine-tuned, pruned with a teacher that is compared on every token, loaded by plain transformers, evaluated."""
    columns = ["--data", str(tagged_file), "--text-column", "tokens", "--label-column", "tags"]
    dense = ["--target-sparsity", "0", "--distillation", "none", "--max-steps", "40", "--learning-rate", "5e-3"]
    options = [*columns, *FAST]
    assert main(["prune", "--model", str(body), *options, "--output", str(tmp_path / "no")]) == 2
    assert "no trained classification head" in capsys.readouterr().err
    assert main(["prune", "--model", str(body), *options, *dense, "--output", str(tmp_path / "dense")]) == 0
    output = capsys.readouterr().out
    assert "fine-tuned" in output
    assert "magnitude" not in output
    assert "dense, untrained head" in output
    tuned = json.loads((tmp_path / "dense" / "metrics.json").read_text())["runs"][0]
    assert tuned["span_f1"] > 0.9  # every tag follows from its word
    assert tuned["accuracy"] > 0.9

    model = ["--model", str(tmp_path / "dense" / "model"), "--pruning-steps", "2", "--target-sparsity", "0.5"]
    monkeypatch.undo()
    objectives = ["--distillation", "{kl: 1.0, cross_correlation: 0.1}", "--representation", "tokens"]
    assert main(["prune", *model, *options, *objectives, "--output", str(tmp_path / "run")]) == 0
    (row,) = json.loads((tmp_path / "run" / "metrics.json").read_text())["runs"]
    assert row["method"] == "SDP-KLD + SDP-CC"
    assert row["sparsity"] == 0.5
    assert row["reload_max_difference"] == 0.0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {"eval_span_f1", "eval_accuracy"} <= set().union(*lines)
    assert all(line["loss_kl"] >= 0 and line["loss_cross_correlation"] > 0 for line in lines if "loss_kl" in line)
    loaded = AutoModelForTokenClassification.from_pretrained(tmp_path / "run" / "model")
    assert list(loaded.config.id2label.values()) == ["B-BAD", "B-GOOD", "I-GOOD", "O"]
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "token-classification" in card
    assert "AutoModelForTokenClassification" in card

    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "run" / "model"), *columns]) == 0
    assert f"span_f1          {row['span_f1']:.4f}" in capsys.readouterr().out


def test_numbers_by_the_command_line(body, tmp_path, in_process, capsys):
    """Pairs of sentences with a number, as in STS-B."""
    chooser, rows = random.Random(0), ["sentence1,sentence2,score"]
    for _ in range(80):
        count = chooser.randint(0, 5)
        rows.append(f"the film was {'great ' * count},the plot,{count + 0.5}")
    (tmp_path / "pairs.csv").write_text("\n".join(rows) + "\n")
    columns = ["--data", str(tmp_path / "pairs.csv"), "--text-column", "sentence1", "--text-pair-column", "sentence2"]
    columns += ["--label-column", "score"]
    dense = ["--target-sparsity", "0", "--distillation", "none", "--max-steps", "60", "--learning-rate", "5e-3"]
    assert main(["prune", "--model", str(body), *columns, *FAST, *dense, "--output", str(tmp_path / "dense")]) == 0
    tuned = json.loads((tmp_path / "dense" / "metrics.json").read_text())["runs"][0]
    assert tuned["pearson"] > 0.7
    options = [*columns, *FAST, "--pruning-steps", "2", "--target-sparsity", "0.5", "--output", str(tmp_path / "run")]
    options += ["--model", str(tmp_path / "dense" / "model")]
    assert main(["prune", *options, "--distillation", "kl"]) == 2
    assert "predicts one number" in capsys.readouterr().err
    assert main(["prune", *options, "--distillation", "mse", "--representation", "logits"]) == 0
    (row,) = json.loads((tmp_path / "run" / "metrics.json").read_text())["runs"]
    assert {"pearson", "spearman"} <= set(row)
    assert main(["evaluate", str(tmp_path / "run" / "model"), *columns]) == 0
    assert f"pearson          {row['pearson']:.4f}" in capsys.readouterr().out


SIZES = {"vocab_size": 32, "bos_token_id": 0, "eos_token_id": 0}
DECODERS = {
    "GPT-2": lambda: GPT2LMHeadModel(GPT2Config(**SIZES, n_embd=32, n_layer=2, n_head=2, n_positions=32)),
    "Llama": lambda: LlamaForCausalLM(
        LlamaConfig(
            **SIZES,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=32,
        )
    ),
}


@pytest.mark.parametrize("name", DECODERS)
def test_language_models_from_python(name, arguments, tmp_path):
    """Rows of unequal length, labelled with their own tokens; padding has no label."""
    torch.manual_seed(0)
    model = DECODERS[name]()
    before = model.get_input_embeddings().weight.detach().clone()
    rows = []
    for row in range(48):
        ids = [(row + 3 * place) % 31 + 1 for place in range(4 + row % 5)]
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids})

    def collate(batch):
        width = max(len(row["input_ids"]) for row in batch)
        fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
        return {key: torch.tensor([row[key] + [fill[key]] * (width - len(row[key])) for row in batch]) for key in fill}

    config = SDPruneConfig(
        target_sparsity=0.5, pruning_steps=2, distillation={"kl": 1.0, "cross_correlation": 0.1}, end_ratio=0.5
    )
    result = prune(model, config, rows, rows[:16], args=arguments(max_steps=40), data_collator=collate)
    assert set(result.sparsity.layers.values()) == {0.5}
    names = select_linears(result.model, config)
    assert len(names) == {"GPT-2": 8, "Llama": 14}[name]
    lines = [json.loads(line) for line in (result.output_dir / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss_task"] for line in lines if "loss_task" in line]
    assert losses[-1] < 0.8 * losses[0]  # the next token follows from the one before
    assert all(line["loss_kl"] > 0 for line in lines if line.get("step", 0) >= 20 and "loss_kl" in line)
    assert not torch.equal(before, result.model.get_input_embeddings().weight)
    assert torch.equal(before, result.teacher.get_input_embeddings().weight)
