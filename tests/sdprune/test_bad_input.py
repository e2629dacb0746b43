"""Wrong input is told before anything is trained, by its name, and leaves nothing behind: no file, no folder."""

import re
import shutil

import pytest
import torch

from sdprune import SDPruneCallback, SDPruneConfig, SDPruneTrainer, prune
from sdprune.cli import main
from sdprune.data.examples import EncodedExamples
from sdprune.recipe import DataConfig
from sdprune.runs.workbench import load_workbench
from sdprune.training.checks import check_classes, labels_of

FAST = {"max_steps": 8, "per_device_train_batch_size": 8}
PRUNING = {"target_sparsity": 0.5, "pruning_steps": 4}

# fields of the configuration -> what is said
WRONG_FIELDS = {
    "target pattern": (
        {"target_modules": "nothing"},
        r"target_modules: 'nothing' matches no linear.* model: bert\.enc",
    ),
    "exclude pattern": ({"exclude_modules": "nothing"}, r"exclude_modules: 'nothing' matches no linear.*: bert\.enc"),
    "no pattern": ({"target_modules": "("}, r"target_modules: '\(' is not a regular expression \(missing \)"),
    "block": (
        {"structure": "block", "block_shape": (24, 8)},
        r"block_shape \(24, 8\) \(out, in\) does not divide layer 'bert.*' of shape \(32, 32\)",
    ),
    "n:m": (
        {"structure": "n:m", "n": 12, "m": 24},
        r"m=24 does not divide the input size of layer 'bert.*' of shape \(32, 32\)",
    ),
    "head": (
        {"structure": "head", "target_modules": r".*(intermediate|\d\.output)\.dense"},
        r"structure='head' finds no heads among the layers that target_modules .* choose: bert",
    ),
    "neuron": (
        {"structure": "neuron", "target_modules": r".*self.*"},
        r"no layer's outputs feed a part of another layer's inputs: no neurons or heads to prune among bert",
    ),
    "no gradient": (
        {"criterion": "movement", "start_ratio": 0.0},
        r"criterion='movement' ranks by gradients.*set start_ratio to at least 0\.125, got 0\.0",
    ),
    "schedule": ({"pruning_steps": 9}, "pruning_steps=9 do not fit: the training has 8 steps"),
    "hidden layer": ({"hidden_layers": (3,)}, r"hidden_layers must lie in \[-3, 2\].*got \[3\]"),
    "nothing to cache": ({"distillation": None, "teacher_cache": "cache"}, "teacher_cache='.*' has nothing to keep"),
}
WRONG_TEACHERS = {
    "vocabulary": ({"vocab_size": 99}, {}, "teacher_model has a vocabulary of 99, the model has a vocabulary of "),
    "width": ({"hidden_size": 16}, {}, "teacher_model has hidden states of width 16, the model has .* width 32"),
    "classes": ({"num_labels": 3}, {"distillation": "kl"}, "teacher_model has 3 classes, the model has 2 classes"),
}


@pytest.fixture
def refused(tmp_path, model_factory, dataset_factory, tokenizer, arguments):
    """Return a check that `prune` refuses its input and writes nothing."""

    def check(message, *, teacher=None, dataset=None, **fields):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(ValueError, match=message):
            prune(
                model_factory(),
                SDPruneConfig(**(PRUNING | fields)),
                dataset_factory(40) if dataset is None else dataset,
                args=arguments(**FAST, output_dir=str(tmp_path / "runs" / "run")),
                processing_class=tokenizer,
                teacher_model=teacher,
            )
        assert sorted(tmp_path.rglob("*")) == before

    return check


@pytest.mark.parametrize("case", WRONG_FIELDS)
def test_fields(refused, tmp_path, case):
    fields, message = WRONG_FIELDS[case]
    if "teacher_cache" in fields:
        fields = fields | {"teacher_cache": str(tmp_path / "cache")}
    refused(message, **fields)


@pytest.mark.parametrize("case", WRONG_TEACHERS)
def test_teachers(refused, model_factory, case):
    changes, fields, message = WRONG_TEACHERS[case]
    refused(message, teacher=model_factory(1, **changes), **fields)


def test_data_without_labels(refused, dataset_factory):
    class Unlabelled(EncodedExamples):
        def __getitem__(self, row):
            return {name: column[row] for name, column in self.columns.items()}

    rows = dataset_factory(40)
    refused("the task loss needs labels, .* give only .*input_ids", dataset=Unlabelled(rows.columns, rows.labels))


@pytest.mark.parametrize("column", ["label", "labels"])
def test_classes_that_the_model_lacks(refused, dataset_factory, column):
    import datasets

    rows = dataset_factory(40)
    labels = [*rows.labels[:38], 2, -1]
    table = datasets.Dataset.from_dict({**rows.columns, column: labels})
    refused(
        rf"train_dataset: column '{column}' must lie in \[0, 1\] for the model with its 2 classes, got \[-1, 2\]",
        dataset=table,
    )


def test_classes_of_words_and_numbers_to_predict(model_factory):
    model = model_factory()
    check_classes(model, [[-100, 0, 1], [1]], "rows")  # -100: a word without a label
    check_classes(model, [0.5, 7.0], "rows")
    with pytest.raises(ValueError, match=r"rows must lie in \[0, 1\] for the model with its 2 classes, got \[3\]"):
        check_classes(model, [[-100, 0, 1], [3]], "rows")
    with pytest.raises(ValueError, match=r"got \[2\]"):
        check_classes(model, [torch.tensor([-100, 2]), torch.tensor(1)], "rows")
    model.config.problem_type = "regression"
    check_classes(model, [7, 8], "rows")


@pytest.mark.parametrize("format", [None, "torch", "numpy"])
def test_labels_of_a_table(format):
    import datasets

    table = datasets.Dataset.from_dict({"label": [0, 7, 1, 1], "labels": [[0, -100], [1], [], [2]]}).with_format(format)
    assert sorted(labels_of(table, table[0], "label")) == [0, 1, 7]
    assert sorted(labels_of(table, table[0], "labels")) == [-100, 0, 1, 2]
    some = table.select([0, 3])  # what was left out is not looked at
    assert sorted(labels_of(some, some[0], "label")) == [0, 1]
    assert list(labels_of([{"labels": 5}, {"labels": 6}], {"labels": 5}, "labels")) == [5]


def test_caches_of_others(refused, tmp_path, model_factory, dataset_factory, tokenizer, arguments):
    fields = {"distillation": "kl", "teacher_cache": str(tmp_path / "cache")}
    args = arguments(**FAST, output_dir=str(tmp_path / "first"))
    config = SDPruneConfig(**(PRUNING | fields))
    prune(model_factory(), config, dataset_factory(40), args=args, processing_class=tokenizer)
    refused("belongs to another teacher", teacher=model_factory(1), **fields)
    refused("belongs to another data set", dataset=dataset_factory(44), **fields)
    refused("holds logits, not tokens", **(fields | {"distillation": "mse"}))


@pytest.fixture
def refused_command(tmp_path, model_folder, csv_file, capsys):
    """Return a check that `sdprune prune` says what is wrong in one line, exits with 2 and writes nothing."""

    def check(message, **options):
        before = sorted(tmp_path.rglob("*"))
        given = {"model": model_folder, "data": csv_file, "output": tmp_path / "runs" / "run", "bf16": False}
        command = ["prune"]
        for name, value in (given | FAST | PRUNING | options).items():
            text = "x".join(map(str, value)) if name == "block_shape" else str(value)
            command += [f"--{name.replace('_', '-')}", text.lower() if value in (None, False) else text]
        capsys.readouterr()
        assert main(command) == 2
        output, error = capsys.readouterr()
        assert output == ""
        assert "Traceback" not in error
        (line,) = [line for line in error.splitlines() if line.startswith("sdprune:")]
        assert error.endswith(line + "\n")
        assert re.match(f"sdprune: error: .*{message}", line), line
        assert sorted(tmp_path.rglob("*")) == before

    return check


@pytest.mark.parametrize("case", WRONG_FIELDS)
def test_options(refused_command, tmp_path, case):
    fields, message = WRONG_FIELDS[case]
    if "hidden_layers" in fields:
        fields = {"hidden_layers": "[3]"}
    if "teacher_cache" in fields:
        fields = fields | {"teacher_cache": str(tmp_path / "cache")}
    refused_command(message, **fields)


@pytest.mark.parametrize("case", WRONG_TEACHERS)
def test_teachers_of_a_command(refused_command, model_factory, tokenizer, tmp_path, case):
    changes, fields, message = WRONG_TEACHERS[case]
    model_factory(1, **changes).save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    if case == "classes":  # told earlier, with the names of the classes
        message = "has 3 classes, but the labels of .* are bad, good: 2 expected"
    refused_command(message, teacher_model=tmp_path / "teacher", **fields)


def test_data_of_a_command(refused_command, csv_file, tmp_path):
    text = csv_file.read_text()
    unlabelled, richer = tmp_path / "unlabelled.csv", tmp_path / "richer.csv"
    unlabelled.write_text(re.sub(r",\w+$", "", text, flags=re.MULTILINE))
    richer.write_text(text + "a film,fine\n" * 20)
    refused_command("column.*'label'", data=unlabelled)
    refused_command("has 2 classes", data=richer)


def test_caches_of_a_command(refused_command, model_folder, csv_file, csv_writer, model_factory, arguments, tmp_path):
    fields = {"distillation": "kl", "teacher_cache": tmp_path / "cache"}
    bench = load_workbench(str(model_folder), DataConfig(data=str(csv_file)))
    config = SDPruneConfig(**PRUNING, distillation="kl", teacher_cache=str(tmp_path / "cache"))
    args = arguments(**FAST, output_dir=str(tmp_path / "first"))
    prune(bench.classifier.model, config, bench.train, args=args, processing_class=bench.classifier.tokenizer)
    shutil.copytree(model_folder, tmp_path / "other")
    model_factory(1).save_pretrained(tmp_path / "other")
    refused_command("belongs to another teacher", model=tmp_path / "other", **fields)
    refused_command("belongs to another data set", data=csv_writer(tmp_path / "more.csv", 200), **fields)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (lambda rows: None, "train_dataset must have at least one row, got None"),
        (lambda rows: [], r"train_dataset must have at least one row, got \[\]"),
        (
            lambda rows: (row for row in rows),
            "train_dataset must be read more than once, got generator; make it a list",
        ),
        (lambda rows: 5, "train_dataset must have rows by number, or be a stream of them, got 5"),
        (lambda rows: [*rows, rows[0] | {"labels": 3}], r"column 'labels' must lie in \[0, 1\] .* got \[3\]"),
    ],
)
def test_what_is_no_data_set(rows, message, model_factory, dataset_factory, tokenizer, arguments, tmp_path):
    table = dataset_factory(24)
    given = rows([table[row] for row in range(len(table))])
    with pytest.raises((ValueError, TypeError), match=message) as raised:
        prune(model_factory(), SDPruneConfig(**PRUNING), given, args=arguments(**FAST), processing_class=tokenizer)
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("config", [None, PRUNING, SDPruneConfig], ids=str)
def test_what_is_no_configuration(config, model_factory, dataset_factory, arguments, tmp_path):
    rows, args = dataset_factory(24), arguments(**FAST)
    uses = (
        lambda: prune(model_factory(), config, rows),  # without arguments, whose seed is the configuration's
        lambda: prune(model_factory(), config, rows, args=args),
        lambda: SDPruneCallback(config),
        lambda: SDPruneTrainer(model_factory(), args, config=config, train_dataset=rows),
    )
    for use in uses:
        with pytest.raises(TypeError, match="config must be an SDPruneConfig, got") as raised:
            use()
        assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("labels", [[1, 0, 1], [1.0, 0.0], 1])
def test_several_classes_are_told_by_numbers(labels, model_factory, dataset_factory, tokenizer, arguments):
    several = {"num_labels": 3, "problem_type": "multi_label_classification"}
    rows = [dataset_factory(24)[row] | {"labels": labels} for row in range(24)]
    given = {"args": arguments(**FAST), "processing_class": tokenizer}
    with pytest.raises(ValueError, match=r"column 'labels' must hold 3 floating-point numbers a row, .* got"):
        prune(model_factory(**several), SDPruneConfig(**PRUNING), rows, **given)
    right = [row | {"labels": [1.0, 0.0, 1.0]} for row in rows]
    assert prune(model_factory(**several), SDPruneConfig(**PRUNING), right, **given).sparsity.linear == 0.5
