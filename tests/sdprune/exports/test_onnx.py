"""ONNX: the same outputs in onnxruntime, for every form that a pruned model can have."""

import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import sdprune
from sdp_kernels import BitMask
from sdprune import BlockSparseLinear, SDPruneConfig
from sdprune.exports.neurons import compact
from sdprune.exports.onnx import MODEL_NAME, export_onnx
from sdprune.layers.narrow import NarrowInt8Linear, RemovedInt8Linear
from sdprune.masking.pruner import mask_model
from sdprune.masking.swap import masked_layers

onnx = pytest.importorskip("onnx", reason="needs the extra onnx: pip install 'sdprune[onnx]'")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra onnx: pip install 'sdprune[onnx]'")
pytest.importorskip("onnxscript", reason="needs the extra onnx: pip install 'sdprune[onnx]'")


@pytest.fixture
def inputs(batch):
    return {name: batch[name][:3] for name in ("input_ids", "attention_mask")}


@pytest.fixture
def model(model_factory):
    return model_factory(num_hidden_layers=1)


def test_int8_layers(model, inputs, tmp_path):
    """ONNX gets the weights that the integers stand for; what is narrower stays so, on both sides."""
    layer = model.bert.encoder.layer[0]
    with torch.no_grad():
        layer.intermediate.dense.weight[::2] = layer.output.dense.weight[:, ::2] = 0.0
        layer.attention.self.query.weight[:16] = 0.0
    found = sdprune.load(sdprune.export(model, tmp_path / "model", "compact", precision="int8"), "compact")
    kinds = {type(module) for module in found.modules()}
    assert {BlockSparseLinear, NarrowInt8Linear, RemovedInt8Linear} <= kinds
    assert export_onnx(found, tmp_path / "onnx", inputs) < 1e-5
    shapes = [tuple(value.dims) for value in onnx.load(tmp_path / "onnx" / MODEL_NAME).graph.initializer]
    assert sum(math.prod(shape) for shape in shapes) < sum(value.numel() for value in model.parameters())
    assert {type(module) for module in found.modules()} == kinds  # the model stays as it is


def test_a_masked_model_with_a_sparse_layer(model, inputs, tmp_path):
    """Zeros stay in place and blocks are written dense, as ONNX has no block-sparse product."""
    mask_model(model, SDPruneConfig())
    for layer in masked_layers(model).values():
        layer.set_mask(BitMask.from_bool(torch.rand(layer.weight.shape) < 0.3))
    down = model.bert.encoder.layer[0].output
    with torch.no_grad():
        down.dense = down.dense.to_dense()
        down.dense.weight[:16, 16:] = 0.0
        zeros = int((down.dense.weight == 0).sum())
    down.dense = BlockSparseLinear.from_linear(down.dense, (16, 16))
    masked = masked_layers(model)
    assert export_onnx(model, tmp_path / "onnx", inputs) < 1e-5
    assert masked_layers(model) == masked  # the model stays as it is
    assert isinstance(down.dense, BlockSparseLinear)
    graph = onnx.load(tmp_path / "onnx" / MODEL_NAME).graph
    assert [value.name for value in graph.input] == ["input_ids", "attention_mask"]
    assert [value.name for value in graph.output] == ["logits"]
    arrays = [onnx.numpy_helper.to_array(value) for value in graph.initializer]
    expected = [int((layer.weight == 0).sum()) for layer in masked.values()] + [zeros]
    found = [int((array == 0).sum()) for array in arrays if array.ndim == 2 and array.size >= 1024 and 0 in array]
    assert sorted(found) == sorted(expected)


def test_a_compacted_decoder(tmp_path):
    """Empty neurons are gone from the file too."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50, n_positions=32)).eval()
    inputs = {"input_ids": torch.randint(50, (3, 7))}
    with torch.no_grad():
        model.transformer.h[0].mlp.c_proj.weight[:40] = 0.0
        expected = model(**inputs).logits
        compact(model)
        torch.testing.assert_close(model(**inputs).logits, expected)
    assert export_onnx(model, tmp_path / "onnx", inputs) < 1e-5
    assert model.config.use_cache is True
    sizes = [tuple(value.dims) for value in onnx.load(tmp_path / "onnx" / MODEL_NAME).graph.initializer]
    assert any(24 in size and len(size) == 2 for size in sizes)
    assert not any(64 in size for size in sizes)
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / MODEL_NAME)
    longer = torch.randint(50, (5, 11))
    (found,) = session.run(None, {"input_ids": longer.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(longer).logits.detach(), rtol=1e-4, atol=1e-5)


def test_a_difference_is_an_error_and_leaves_nothing(model, inputs, tmp_path, monkeypatch):
    real = torch.onnx.export

    def another(wrapped, *arguments, **options):
        """What a faulty exporter would write: the first output half a unit off."""
        wrapped.model.classifier.bias.data += 0.5
        real(wrapped, *arguments, **options)
        wrapped.model.classifier.bias.data -= 0.5

    monkeypatch.setattr(torch.onnx, "export", another)
    with pytest.raises(RuntimeError, match=r"onnxruntime differs from torch by 0\.5, more than 0\.0001"):
        export_onnx(model, tmp_path / "onnx", inputs)
    assert list(tmp_path.iterdir()) == []


def test_wrong_input(model, inputs, tmp_path):
    with pytest.raises(TypeError, match="model must be a transformers model, got Linear"):
        export_onnx(torch.nn.Linear(2, 2), tmp_path / "onnx", inputs)
    with pytest.raises(ValueError, match=r"inputs\['input_ids'\] must have shape \(batch, sequence\), at least"):
        export_onnx(model, tmp_path / "onnx", {"input_ids": inputs["input_ids"][:1]})
    with pytest.raises(ValueError, match=r"model must be float32 on the CPU, got \(torch.bfloat16, 'cpu'\)"):
        export_onnx(model.bfloat16(), tmp_path / "onnx", inputs)
