"""Numbers, several classes at once, classes that a file lacks, padding: by the command line, from data to scores."""

import json
import random

import pytest
from transformers import BertConfig, BertTokenizerFast, GPT2Config, GPT2ForSequenceClassification

from sdprune.cli import main
from sdprune.data.tasks import load_task
from sdprune.recipe import DataConfig
from sdprune.runs.classifier import load_classifier
from sdprune.runs.workbench import load_workbench

FAST = ["--max-steps", "8", "--per-device-train-batch-size", "8", "--eval-steps", "8", "--bf16", "false"]
FAST += ["--warmup-steps", "0", "--pruning-steps", "2", "--diagnostics-steps", "4", "--seed", "1"]
WORDS = {"great": "praise", "dull": "blame", "film": "film"}


def named(*names):
    return {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: place for place, name in enumerate(names)},
    }


@pytest.fixture
def folder_of(model_factory, tokenizer, tmp_path):
    """Return a maker of folders with a classifier."""

    def make(**changes):
        model_factory(**changes).save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        return str(tmp_path / "model")

    return make


@pytest.fixture
def file_of(tmp_path):
    """Return a maker of files: a text a row, with the label that a function finds in its words."""

    def make(label, suffix=".jsonl", count=160):
        chooser, rows = random.Random(0), []
        for row in range(count):
            words = ["the", *chooser.sample(["great", "dull", "film", "plot", "witty"], 2)]
            rows.append({"text": " ".join(words), "label": label(row, words)})
        path = tmp_path / f"data{suffix}"
        if suffix == ".jsonl":
            path.write_text("\n".join(map(json.dumps, rows)))
        else:
            path.write_text("\n".join(["text,label", *(f"{row['text']},{row['label']}" for row in rows)]))
        return str(path)

    return make


def test_names_that_are_numbers_go_to_the_classes_of_those_names(folder_of, file_of):
    """In the order of the letters, as the model has them, the tenth class comes before the second."""
    folder = folder_of(**named("1", "10", "2"))
    data = file_of(lambda row, words: ("1", "2", "10")[row % 3], ".csv")
    bench = load_workbench(folder, DataConfig(data=data))
    plain = load_task(DataConfig(data=data))
    assert plain.label_names == ("1", "2", "10")
    assert bench.task.label_names == ("1", "10", "2")
    for ours, theirs in zip(plain.test.labels, bench.task.test.labels, strict=True):
        assert plain.label_names[ours] == bench.task.label_names[theirs]


def test_whole_scores_are_predicted_as_numbers(folder_of, file_of, tmp_path, in_process, capsys):
    folder = folder_of(num_labels=1, problem_type="regression")
    data = file_of(lambda row, words: 1 + row % 5, ".csv")
    assert main(["evaluate", folder, "--data", data]) == 0
    shown = capsys.readouterr()
    assert "pearson" in shown.out
    assert "spearman" in shown.out
    assert "taken for numbers to predict, because the model has one output" in shown.err
    command = ["prune", "--model", folder, "--data", data, *FAST, "--output", str(tmp_path / "run")]
    assert main([*command, "--distillation", "kl"]) == 2
    assert "the model predicts one number; take 'mse'" in capsys.readouterr().err
    assert main([*command, "--distillation", "mse", "--representation", "logits"]) == 0
    row = json.loads((tmp_path / "run" / "metrics.json").read_text())["runs"][0]
    assert row["sparsity"] == 0.5
    assert {"pearson", "spearman"} <= set(row)


def test_several_classes_at_once(model_factory, tokenizer, file_of, tmp_path, in_process, capsys):
    """A head is made and learns which words occur; the pruned model is scored by micro and macro F1."""
    model_factory().bert.save_pretrained(tmp_path / "body")
    tokenizer.save_pretrained(tmp_path / "body")
    data = ["--data", file_of(lambda row, words: [WORDS[word] for word in words if word in WORDS])]
    dense = ["--target-sparsity", "0", "--distillation", "none", "--learning-rate", "2e-3", "--max-steps", "600"]
    output = ["--output", str(tmp_path / "dense")]
    assert main(["prune", "--model", str(tmp_path / "body"), *data, *FAST, *dense, *output]) == 0
    assert "3 classes, any number a row ('blame', 'film', 'praise')" in capsys.readouterr().err
    (row,) = json.loads((tmp_path / "dense" / "metrics.json").read_text())["runs"]
    assert row["micro_f1"] > 0.9
    assert row["macro_f1"] > 0.9
    tuned = str(tmp_path / "dense" / "model")
    assert BertConfig.from_pretrained(tuned).problem_type == "multi_label_classification"
    assert main(["evaluate", tuned, *data]) == 0
    assert f"micro_f1         {row['micro_f1']:.4f}" in capsys.readouterr().out
    command = ["prune", "--model", tuned, *data, *FAST, "--output", str(tmp_path / "pruned")]
    assert main([*command, "--distillation", "kl"]) == 2
    assert "the model predicts several labels at once" in capsys.readouterr().err
    assert main(command) == 0
    (row,) = json.loads((tmp_path / "pruned" / "metrics.json").read_text())["runs"]
    assert row["sparsity"] == 0.5
    assert row["reload_max_difference"] == 0.0


def test_several_classes_in_cells(folder_of, file_of, capsys):
    folder = folder_of(**named("x", "y"), problem_type="multi_label_classification")
    data = file_of(lambda row, words: ("x|y", "x", "y")[row % 3], ".csv")
    assert main(["evaluate", folder, "--data", data, "--label-separator", "|"]) == 0
    assert "micro_f1" in capsys.readouterr().out
    assert main(["evaluate", folder, "--data", data]) == 2
    assert "has 2 classes, but the labels of" in capsys.readouterr().err
    folder = folder_of(**named("x", "y", "z"), problem_type="multi_label_classification")
    assert main(["evaluate", folder, "--data", data]) == 2
    assert "are x, x|y, y, those of the model are x, y, z; rename" in (said := capsys.readouterr().err)
    assert "or name label_separator" in said


def test_a_model_of_one_class_a_row_refuses_several(folder_of, file_of, capsys):
    folder = folder_of(**named("x", "y"), problem_type="single_label_classification")
    assert main(["evaluate", folder, "--data", file_of(lambda row, words: ["x", "y"][: row % 3])]) == 2
    assert "row 1 has 0 labels, but every row must have one (the model has 2 classes)" in capsys.readouterr().err


@pytest.mark.parametrize("labels", [("bad", "good"), ("good",), (0, 1), ("LABEL_0", "LABEL_2")])
def test_a_file_may_lack_classes(labels, folder_of, file_of, capsys):
    names = {True: ("bad", "good", "so-so"), False: ("LABEL_0", "LABEL_1", "LABEL_2")}["good" in labels]
    assert (
        main(["evaluate", folder_of(**named(*names)), "--data", file_of(lambda row, _: labels[row % len(labels)])]) == 0
    )
    shown = capsys.readouterr()
    assert "accuracy" in shown.out
    assert "no row has the label" in shown.err


def make_gpt2(folder, tokenizer, **changes):
    config = GPT2Config(
        **{"vocab_size": len(tokenizer), "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32, **changes},
        **named("bad", "good"),
        bos_token_id=1,
        eos_token_id=1,
    )
    GPT2ForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_the_tokenizer_says_how_to_pad(tokenizer, csv_file, tmp_path, in_process):
    folder = make_gpt2(tmp_path / "gpt2", tokenizer)
    assert main(["evaluate", folder, "--data", str(csv_file)]) == 0
    command = ["prune", "--model", folder, "--data", str(csv_file), *FAST, "--output", str(tmp_path / "run")]
    assert main(command) == 0
    assert json.loads((tmp_path / "run" / "model" / "config.json").read_text())["pad_token_id"] == 0


def test_who_says_how_to_pad(tokenizer, csv_file, tmp_path):
    """The tokenizer, the model, the end of the text; or nobody, or a token that the model does not have."""
    task = load_task(DataConfig(data=str(csv_file)))

    def mute(**tokens):
        (tmp_path / "vocab.txt").write_text("\n".join(tokenizer.convert_ids_to_tokens(range(len(tokenizer)))) + "\n")
        made = BertTokenizerFast(vocab=str(tmp_path / "vocab.txt"), model_max_length=32)
        made.pad_token = None
        for name, token in tokens.items():
            setattr(made, name, token)
        return made

    found = load_classifier(make_gpt2(tmp_path / "a", mute(), pad_token_id=4), task)
    assert (found.tokenizer.pad_token, found.model.config.pad_token_id) == ("[MASK]", 4)
    found = load_classifier(make_gpt2(tmp_path / "b", mute(eos_token="[SEP]")), task)
    assert (found.tokenizer.pad_token, found.model.config.pad_token_id) == ("[SEP]", 3)
    with pytest.raises(ValueError, match="has no padding token, neither its tokenizer nor config"):
        load_classifier(make_gpt2(tmp_path / "c", mute()), task)
    more = mute()
    more.add_special_tokens({"pad_token": "[MORE]"})
    with pytest.raises(ValueError, match=r"pads with token \d+, but the model has \d+ embeddings; call .*resize"):
        load_classifier(make_gpt2(tmp_path / "d", more, vocab_size=len(tokenizer)), task)
