"""Which layers are pruned."""

import pytest
import torch
from torch import nn
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    RobertaConfig,
    RobertaForTokenClassification,
)

from sdprune import SDPruneConfig
from sdprune.masking.select import select_linears


def test_default_is_the_layer_stack_without_embeddings_pooler_and_head(model):
    names = select_linears(model, SDPruneConfig())
    assert len(names) == 2 * 6
    assert all(name.startswith("bert.encoder.layer.") for name in names)


@pytest.mark.parametrize(
    "other",
    [
        lambda: DistilBertForSequenceClassification(
            DistilBertConfig(dim=16, n_layers=2, n_heads=2, hidden_dim=32, vocab_size=50)
        ),
        lambda: RobertaForTokenClassification(
            RobertaConfig(
                hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=50
            )
        ),
    ],
    ids=["distilbert", "roberta"],
)
def test_no_name_table_an_architecture(other):
    names = select_linears(other(), SDPruneConfig())
    assert len(names) == 12
    assert not any("classifier" in name for name in names)


def test_the_body_alone_is_selected_like_the_whole(model):
    assert len(select_linears(model.bert, SDPruneConfig())) == 12


def test_patterns_match_whole_names(model):
    names = select_linears(model, SDPruneConfig(target_modules=r".*\.(query|key)"))
    assert len(names) == 4
    names = select_linears(
        model, SDPruneConfig(target_modules=(r".*query", r".*key"), exclude_modules=r".*layer\.0\..*")
    )
    assert len(names) == 2
    assert all("layer.1" in name for name in names)
    assert select_linears(model, SDPruneConfig(target_modules="classifier")) == ["classifier"]


@pytest.mark.parametrize("option", ["target_modules", "exclude_modules"])
def test_a_pattern_that_matches_nothing_lists_the_candidates(model, option):
    with pytest.raises(ValueError, match=rf"{option}: 'query' matches no linear layer.*attention\.self\.query.*in all"):
        select_linears(model, SDPruneConfig(**{option: "query"}))


def test_a_bad_pattern_is_named(model):
    with pytest.raises(ValueError, match=r"target_modules: '\(' is not a regular expression"):
        select_linears(model, SDPruneConfig(target_modules="("))


def test_nothing_left_is_an_error(model):
    with pytest.raises(ValueError, match="exclude_modules leaves no layer"):
        select_linears(model, SDPruneConfig(exclude_modules=".*"))


def test_a_model_without_a_stack_asks_for_names():
    with pytest.raises(ValueError, match=r"no stack of layers.*Linear layers of this model: 0, 1"):
        select_linears(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), SDPruneConfig())


def test_a_shared_weight_is_refused():
    model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match=r"'1', whose weight is shared by 0\.weight, 1\.weight"):
        select_linears(model, SDPruneConfig(target_modules="1"))
    torch.testing.assert_close(model[0].weight, model[1].weight)
