"""Attention under transformers' switch: right with every mask, and torch's own wherever the engine does not attend."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2Model, LlamaConfig, LlamaModel

from sdp_kernels import cpu_engine
from sdprune.speed import attention
from sdprune.speed.attention import NAME, blocked_attention, with_blocked_attention

pytest.importorskip("numba", exc_type=ImportError)
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}


@pytest.fixture
def bert():
    return BertForSequenceClassification(BertConfig(**SIZES, vocab_size=50)).eval()


@pytest.fixture
def calls(monkeypatch):
    """How often the engine attends, and torch."""
    counts = {"engine": 0, "torch": 0}

    def counted(name, function):
        def call(*arguments, **named):
            counts[name] += 1
            return function(*arguments, **named)

        return call

    monkeypatch.setattr(cpu_engine, "attention", counted("engine", cpu_engine.attention))
    monkeypatch.setattr(attention, "sdpa_attention_forward", counted("torch", attention.sdpa_attention_forward))
    return counts


def batch(padded):
    ids = torch.randint(1, 50, (3, 11))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, 4:], mask[2, 9:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("padded", [False, True])
def test_logits_are_those_of_torch(bert, padded, calls):
    made, inputs = with_blocked_attention(bert), batch(padded)
    assert made.config._attn_implementation == NAME
    assert bert.config._attn_implementation == "sdpa"
    with torch.no_grad():
        torch.testing.assert_close(made(**inputs).logits, bert(**inputs).logits)
    assert calls == {"engine": 2, "torch": 0}
    assert made.bert.embeddings.word_embeddings.weight is bert.bert.embeddings.word_embeddings.weight


def test_torch_attends_where_the_engine_does_not(bert, calls):
    made, inputs = with_blocked_attention(bert), batch(True)
    made(**inputs).logits.sum().backward()  # gradients
    with torch.no_grad():
        made.train()(**inputs)  # dropout
        made.eval()(**inputs, output_attentions=True)
    assert calls == {"engine": 0, "torch": 6}


@pytest.mark.parametrize(
    "model",
    [
        GPT2Model(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50)),
        LlamaModel(LlamaConfig(**SIZES | {"num_hidden_layers": 1}, num_key_value_heads=2, vocab_size=50)),
    ],
    ids=["causal", "keys in common"],
)
def test_decoders(model, calls):
    made, inputs = with_blocked_attention(model.eval()), batch(False)
    with torch.no_grad():
        torch.testing.assert_close(made(**inputs)[0], model(**inputs)[0])
    assert calls == {"engine": 0, "torch": 1}


def test_compiled_models_get_torchs_attention(bert):
    made, inputs = with_blocked_attention(bert), batch(True)
    with torch.no_grad():
        expected = bert(**inputs).logits
        torch.testing.assert_close(torch.compile(made, backend="eager")(**inputs).logits, expected)


def test_models_that_attend_otherwise_are_left_alone(bert):
    bert.set_attn_implementation("eager")
    assert with_blocked_attention(bert) is None
    assert with_blocked_attention(nn.Linear(2, 2)) is None


def test_no_engine(bert, monkeypatch, calls):
    made, inputs = with_blocked_attention(bert), batch(True)
    monkeypatch.setattr("sdp_kernels.cpu_engine.availability._numba_installed", lambda: False)
    assert with_blocked_attention(bert) is None
    with torch.no_grad():
        torch.testing.assert_close(made(**inputs).logits, bert(**inputs).logits)
    assert calls == {"engine": 0, "torch": 4 - 2}


def test_negative_scales_are_torchs(calls):
    tensors = [torch.randn(1, 2, 3, 4) for _ in range(3)]
    module = nn.Module()
    module.is_causal = False
    blocked_attention(module, *tensors, None, scaling=-1.0)
    blocked_attention(module, *tensors, None)
    assert calls == {"engine": 1, "torch": 1}


LOADS = """
import pickle, sys, torch
model, inputs, expected = pickle.load(open(sys.argv[1], "rb"))
with torch.no_grad():
    torch.testing.assert_close(model(**inputs).logits, expected)
assert model.config._attn_implementation == "sdprune"
"""


def test_sped_up_models_attend_in_another_process(bert, monkeypatch, tmp_path):
    import sdprune
    from sdprune.speed.timing import Times

    def measure(calls, device, repeats):
        ranks = {"attending": 1.0, "fused": 2.0, "dense-int8": 2.0}
        return {name: Times(*[ranks.get(name, 4.0)] * 3, repeats) for name in calls}

    monkeypatch.setattr("sdprune.speed.plan.measure", measure)
    monkeypatch.setattr("sdprune.speed.speed_up.measure", measure)
    inputs = batch(True)
    quick = sdprune.speed_up(bert, inputs, precision="int8")
    assert quick.sped_up.fusions.attention
    assert "attention in blocks" in str(quick.sped_up)
    assert bert.config._attn_implementation == "sdpa"
    with torch.no_grad():
        expected = copy.deepcopy(quick)(**inputs).logits
    (tmp_path / "model").write_bytes(pickle.dumps((quick, inputs, expected)))
    subprocess.run([sys.executable, "-c", LOADS, str(tmp_path / "model")], check=True)
