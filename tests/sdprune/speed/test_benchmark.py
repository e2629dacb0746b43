"""The benchmark of whole models: a gate before times, rows that say where and what, a picture with break-even."""

import functools
import json

import pytest
import torch
from transformers import AutoModel, RobertaConfig, RobertaModel

from sdprune.config import SDPruneConfig
from sdprune.layers.block_sparse import BlockSparseLinear
from sdprune.masking.pruner import measure_sparsity
from sdprune.masking.select import select_linears
from sdprune.speed import benchmark as benchmark_module
from sdprune.speed.benchmark import (
    BenchmarkConfig,
    benchmark,
    first_tensor,
    load_model,
    prune_random_blocks,
    threads,
)
from sdprune.speed.report import break_even, draw, outcome, table, write_report

SMALL = {"batch": (2,), "sequence": (8,), "repeats": 3, "compile": False, "opponents": False, "block_shape": (8, 8)}
SMALL |= {"precision": ()}


@pytest.fixture
def pruned(model_factory):
    model = model_factory()
    prune_random_blocks(model, 0.75, (8, 8))
    return model


@pytest.fixture(autouse=True)
def eager_compiler(monkeypatch):
    """Trace as torch.compile does, without the minutes of its C++ compiler."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))


def test_speed_up_is_a_contender_in_each_precision(pruned, tmp_path):
    rows = benchmark(pruned, BenchmarkConfig(**SMALL | {"precision": ("float32", "int8", "bfloat16")}), tmp_path)
    assert [row["contender"] for row in rows[2:]] == ["speed_up float32", "speed_up int8", "speed_up bfloat16"]
    for row in rows[2:]:
        assert row["role"] == "ours"
        assert row["correct"], row
        assert row["median_ms"] > 0
        assert sum(row["choices"].values()) >= 12
    assert "speed_up int8" in table(rows)


def test_a_model_without_zeros_is_where_the_lines_begin(model, tmp_path):
    rows = benchmark(model, BenchmarkConfig(**SMALL | {"sparsity": (0.0,), "precision": ("int8",)}), tmp_path)
    assert [(row["contender"], row["sparsity"]) for row in rows] == [
        ("dense eager", 0.0),
        ("sparse eager", 0.0),
        ("speed_up int8", 0.0),
    ]
    assert (rows[1]["density"], rows[1]["choices"]) == (1.0, {})


def test_a_model_that_cannot_be_sped_up_is_told(pruned, tmp_path, monkeypatch):
    def refuse(*args, precision):
        raise RuntimeError(f"the outputs of the converted model differ in {precision}\nmore")

    monkeypatch.setattr(benchmark_module, "speed_up", refuse)
    rows = benchmark(pruned, BenchmarkConfig(**SMALL | {"precision": ("int8",)}), tmp_path)
    assert outcome(rows[-1]) == "failed: the outputs of the converted model differ in int8"


def test_rows_say_what_was_measured(pruned, tmp_path):
    config = BenchmarkConfig(**SMALL | {"dtype": ("float32", "bfloat16"), "compile": True})
    state = {name: tensor.clone() for name, tensor in pruned.state_dict().items()}
    rows = benchmark(pruned, config, tmp_path)
    assert [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()] == rows
    assert all(torch.equal(tensor, state[name]) for name, tensor in pruned.state_dict().items())
    assert len(rows) == 2 * 4
    names = ["dense eager", "sparse eager", "dense compiled", "sparse compiled"]
    assert [row["contender"] for row in rows] == names * 2
    assert [row["dtype"] for row in rows] == ["float32"] * 4 + ["bfloat16"] * 4
    for row in rows:
        assert row["correct"], row
        assert row["error"] <= row["allowed"]
        assert (row["sequence"], row["sparsity"], row["repeats"], row["threads"]) == (8, 0.75, 3, 1)
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert row["sequences_per_s"] == pytest.approx(1e3 * row["batch"] / row["median_ms"])
        assert row["tokens_per_s"] == pytest.approx(8 * row["sequences_per_s"])
        assert row["peak_mib"] > 0
        assert row["torch"] == torch.__version__
        if row["contender"] == "dense eager":
            assert row["speedup_over_eager"] == 1.0
            assert row["weights_mib"] == pytest.approx(
                sum(tensor.nbytes for tensor in (*pruned.parameters(), *pruned.buffers()))
                / 2**20
                / (1 if row["dtype"] == "float32" else 2),
                rel=0.05,
            )
        if row["contender"].startswith("sparse"):
            assert sum(row["choices"].values()) == 12
            assert 0 < row["density"] <= 1
    text = table(rows)
    assert len(text.splitlines()) == 1 + len(rows)
    assert "sparse compiled" in text


def test_the_gate_comes_before_the_times(pruned, tmp_path, monkeypatch):
    def convert_wrongly(model, made):
        with torch.no_grad():
            model.bert.encoder.layer[0].output.dense = torch.nn.Linear(64, 32)
        return model

    monkeypatch.setattr(benchmark_module, "apply", convert_wrongly)
    dense, sparse = benchmark(pruned, BenchmarkConfig(**SMALL), tmp_path)
    assert dense["correct"]
    assert not sparse["correct"]
    assert "median_ms" not in sparse
    assert "WRONG: error" in outcome(sparse)
    assert "WRONG: error" in table([dense, sparse])
    assert outcome(dense) == ""


def test_what_cannot_be_compiled_is_said(pruned, tmp_path, monkeypatch):
    def fail(module, **options):
        def call(**inputs):
            raise RuntimeError("no C++ compiler\nat all")

        return call

    monkeypatch.setattr(torch, "compile", fail)
    rows = benchmark(pruned, BenchmarkConfig(**SMALL | {"compile": True}), tmp_path)
    assert [outcome(row) for row in rows] == ["", "", *["failed: no C++ compiler"] * 2]
    assert rows[1]["speedup_over_compiled"] is None


def test_random_blocks(model_factory):
    model = model_factory()
    prune_random_blocks(model, 0.5, (16, 16))
    names = select_linears(model, SDPruneConfig())
    assert set(measure_sparsity(model, names).layers.values()) == {0.5}
    for name in names:
        assert BlockSparseLinear.from_linear(model.get_submodule(name), (16, 16)).density == 0.5
    assert model.classifier.weight.count_nonzero() == model.classifier.weight.numel()


def test_a_report_over_sparsities(model, tmp_path):
    config = BenchmarkConfig(**SMALL | {"sparsity": (0.5, 0.75)})
    rows = benchmark(model, config, tmp_path)
    assert [row["sparsity"] for row in rows] == [0.5, 0.5, 0.75, 0.75]
    assert {tuple(row["block_shape"]) for row in rows} == {(8, 8)}
    for factor, row in zip((0, 0.5, 0, 2.0), rows, strict=True):
        if factor:
            row["forced_speedup"] = factor
    axes = draw(rows).axes[0]
    assert axes.get_xlabel() == "zeros in the pruned layers, %"
    texts = [text.get_text().strip() for text in axes.texts]
    assert texts == ["break-even", "58 %"]
    page = write_report(tmp_path, rows, "Speed of <mine>")
    text = page.read_text()
    assert "Speed of &lt;mine&gt;" in text
    assert "data:image/png;base64," in text
    assert text.count("<tr>") == 1 + len(rows)
    assert (tmp_path / "speedup.png").read_bytes().startswith(b"\x89PNG")


def test_a_report_over_sizes(pruned, tmp_path):
    rows = benchmark(pruned, BenchmarkConfig(**SMALL | {"batch": (1, 2)}), tmp_path)
    axes = draw(rows).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1 x 8", "2 x 8"]
    assert "75.0% zeros" in axes.get_xlabel()
    assert write_report(tmp_path, rows, "sizes").exists()


def test_break_even_is_where_a_line_crosses_one():
    assert break_even([(50, 0.5), (90, 1.5)]) == [70]
    assert break_even([(50, 0.5), (90, 0.9)]) == []
    assert break_even([(10, 2.0), (20, 0.5), (30, 1.0)]) == [30]
    assert break_even([]) == []


def test_models_are_loaded_as_what_they_are(pruned, model_factory, tmp_path):
    pruned.save_pretrained(tmp_path / "classifier")
    pruned.bert.save_pretrained(tmp_path / "body")
    assert type(load_model(str(tmp_path / "classifier"), None)).__name__ == "BertForSequenceClassification"
    loaded = load_model(str(tmp_path / "body"), None)
    assert type(loaded).__name__ == "BertModel"
    ids = torch.randint(1, 20, (2, 4))
    with torch.no_grad():
        assert torch.equal(first_tensor(loaded(ids)), AutoModel.from_pretrained(tmp_path / "body")(ids)[0])
    fresh = load_model(None, str(tmp_path / "body" / "config.json"))
    assert type(fresh).__name__ == "BertModel"
    for folder, config, message in (
        (None, None, "give either MODEL_DIR or --config, and not both"),
        ("a", "b", "give either MODEL_DIR or --config, and not both"),
        (str(tmp_path), None, r"MODEL_DIR must be a folder with config.json and \*.safetensors, got"),
        (None, "bert-tiny", "--config must be one of bert-base, bert-large, .* got 'bert-tiny'"),
    ):
        with pytest.raises(ValueError, match=message):
            load_model(folder, config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": (0,)}, r"--batch must be whole numbers of at least 1, got \(0,\)"),
        ({"sequence": ()}, r"--sequence must be whole numbers of at least 1, got \(\)"),
        ({"dtype": ("int8",)}, "--dtype must be of float32, bfloat16, float16, got 'int8'"),
        ({"dtype": ()}, "--dtype must be of float32, bfloat16, float16, got nothing"),
        ({"sparsity": (1.0,)}, "--sparsity must lie between 0 and 1, got 1.0"),
        ({"device": "tpu"}, "--device must be cpu or cuda, got 'tpu'"),
        ({"block_shape": (0, 8)}, r"--block-shape must be two whole numbers .*, got \(0, 8\)"),
        ({"repeats": 2}, "--repeats must be at least 3, got 2"),
        ({"precision": ("int4",)}, "--precision must be of float32, int8, bfloat16, got 'int4'"),
    ],
)
def test_options_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        BenchmarkConfig(**changes)


def test_models_are_checked(model, model_factory, tmp_path):
    with pytest.raises(ValueError, match="--sparsity is missing: the linear layers of this model have no zeros"):
        benchmark(model, BenchmarkConfig(**SMALL), tmp_path)
    with pytest.raises(ValueError, match="--sequence must be at most 32, the positions of this model, got 33"):
        benchmark(model, BenchmarkConfig(**SMALL | {"sequence": (8, 33)}), tmp_path)
    sizes = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    roberta = RobertaModel(RobertaConfig(**sizes, intermediate_size=64, max_position_embeddings=18)).eval()
    with pytest.raises(ValueError, match="--sequence must be at most 16, the positions of this model, got 17"):
        benchmark(roberta, BenchmarkConfig(**SMALL | {"sequence": (17,)}), tmp_path)
    rows = benchmark(roberta, BenchmarkConfig(**SMALL | {"sequence": (16,), "sparsity": (0.5,)}), tmp_path)
    assert all(row["correct"] for row in rows)
    with pytest.raises(ValueError, match="--batch must be 1: this model has no padding token, got 2"):
        benchmark(model_factory(pad_token_id=None), BenchmarkConfig(**SMALL), tmp_path)


def test_threads_are_put_back():
    before = torch.get_num_threads()
    with threads(2):
        assert torch.get_num_threads() == 2
    assert torch.get_num_threads() == before
    with threads(None):
        assert torch.get_num_threads() == before
    with pytest.raises(ValueError, match="--threads must be at least 1, got 0"), threads(0):
        pass
