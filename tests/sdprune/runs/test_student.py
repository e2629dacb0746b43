"""The student that a pruned teacher asks for, for several architectures, without name tables."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from sdprune.config import SDPruneConfig
from sdprune.masking.select import select_linears
from sdprune.runs.student import anatomy, make_student, student_config

COMMON = {"vocab_size": 100, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_labels": 3}
BERT = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
KINDS = {
    "bert": BERT,
    "roberta": BERT,
    "modernbert": BERT | {"cls_token_id": 1, "sep_token_id": 2},
    "deberta-v2": BERT,
    "distilbert": {"dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 4},
    "eurobert": BERT | {"head_dim": 16, "num_key_value_heads": 4, "mask_token_id": 3},
}


def make(kind, **changes):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **(COMMON | KINDS[kind] | changes))
    return AutoModelForSequenceClassification.from_config(config).eval()


@torch.no_grad()
def thin_out(model, names, density):
    """Keep the given share of the weights of every layer, at random."""
    for name in names:
        weight = model.get_parameter(f"{name}.weight")
        weight.mul_(torch.rand_like(weight) < density)


@pytest.mark.parametrize("kind", KINDS)
def test_widths_follow_densities(kind):
    teacher = make(kind)
    parts = anatomy(teacher, select_linears(teacher, SDPruneConfig()))
    assert parts.width_name == ("hidden_dim" if kind == "distilbert" else "intermediate_size")
    assert parts.width == 128
    assert len(parts.feed_forward) == (6 if kind == "eurobert" else 4)
    assert len(parts.attention) == (4 if kind == "modernbert" else 8)
    thin_out(teacher, parts.feed_forward, 0.6)
    thin_out(teacher, parts.attention, 0.5)
    config = student_config(teacher, parts, width_multiple=16)
    assert getattr(config, parts.width_name) == 80
    assert config.num_attention_heads == 2
    for initialization in ("random", "largest"):
        student = make_student(teacher, parts, config, initialization=initialization).eval()
        assert type(student) is type(teacher)
        assert student(input_ids=torch.tensor([[1, 5, 6, 2]])).logits.shape == (1, 3)
    smaller = [sum(p.numel() for p in model.parameters()) for model in (student, teacher)]
    assert smaller[0] < smaller[1]
    assert (getattr(config, "head_dim", None) == 16) == (kind == "eurobert")  # kept where there is one


@torch.no_grad()
@pytest.mark.parametrize("kind", ["bert", "modernbert", "eurobert"])
def test_the_largest_units_compute_what_they_computed(kind):
    """Where the units left out were zero, the student started from the largest ones is the teacher."""
    teacher = make(kind)
    parts = anatomy(teacher, select_linears(teacher, SDPruneConfig()))
    dead = torch.randperm(128)[:64]
    for name in parts.feed_forward:
        layer = teacher.get_submodule(name)
        if layer.in_features == 128:
            layer.weight[:, dead] = 0.0
        else:
            rows = torch.cat([dead, dead + 128]) if layer.out_features == 256 else dead
            layer.weight[rows] = 0.0
            if layer.bias is not None:
                layer.bias[rows] = 0.0
    for name in parts.attention if kind == "eurobert" else ():
        layer = teacher.get_submodule(name)
        (layer.weight[:, 16:48] if name.endswith("o_proj") else layer.weight[16:48]).zero_()
    config = student_config(teacher, parts, width_multiple=64)
    assert config.intermediate_size == 64
    config.num_attention_heads = 2 if kind == "eurobert" else 4
    student = make_student(teacher, parts, config, initialization="largest").eval()
    ids = torch.tensor([[1, 5, 6, 7, 2]])
    torch.testing.assert_close(student(input_ids=ids).logits, teacher(input_ids=ids).logits)


@pytest.mark.parametrize(
    ("density", "heads"), [(1.0, 12), (0.7, 8), (0.55, 6), (0.3, 4), (0.01, 1)], ids=lambda value: str(value)
)
def test_heads_divide_the_hidden_size(density, heads):
    teacher = make("bert", hidden_size=192, num_attention_heads=12)
    parts = anatomy(teacher, select_linears(teacher, SDPruneConfig()))
    thin_out(teacher, parts.attention, density)
    assert student_config(teacher, parts).num_attention_heads == heads


def test_heads_that_share_keys_stay_in_whole_groups():
    teacher = make("eurobert", num_key_value_heads=2)
    parts = anatomy(teacher, select_linears(teacher, SDPruneConfig()))
    thin_out(teacher, parts.attention, 0.4)
    config = student_config(teacher, parts)
    assert (config.num_attention_heads, config.num_key_value_heads) == (2, 2)
    make_student(teacher, parts, config)
    with pytest.raises(ValueError, match="heads that share keys and values"):
        make_student(teacher, parts, config, initialization="largest")


def test_no_single_width_is_refused():
    teacher = make("bert")
    with pytest.raises(ValueError, match=r"no student of BertForSequenceClassification can be derived.*found none"):
        anatomy(teacher, ["bert.encoder.layer.0.attention.self.query"])


def test_unknown_initialization():
    teacher = make("bert")
    parts = anatomy(teacher, select_linears(teacher, SDPruneConfig()))
    with pytest.raises(ValueError, match="initialization must be one of 'random', 'largest', got 'best'"):
        make_student(teacher, parts, teacher.config, initialization="best")
