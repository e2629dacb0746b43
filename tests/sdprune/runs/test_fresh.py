"""What a process without this package makes of an exported folder."""

import pytest
import torch

from sdprune import SDPruneConfig, export
from sdprune.masking.pruner import mask_model, prune_step
from sdprune.runs.fresh import fresh_logits
from sdprune.runs.predict import Batches, predict


@pytest.fixture
def pruned(model):
    config = SDPruneConfig(target_sparsity=0.7)
    prune_step(model, config, 0.7, mask_model(model, config))
    return model.eval()


def test_a_fresh_process_gets_the_same_bits(pruned, batch, tmp_path):
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    with torch.inference_mode():
        expected = pruned(**inputs).logits
    found, others = fresh_logits(export(pruned, tmp_path / "model"), inputs)
    assert float((found - expected).abs().max()) == 0.0
    assert others == []


def test_it_scores_what_this_process_would(pruned, dataset_factory, tokenizer, tmp_path):
    """The same rows in the same batches, in float32 and in bfloat16 autocast."""
    batches = Batches.of(dataset_factory(37), tokenizer, 8)
    folder = export(pruned, tmp_path / "model")
    for bf16 in (False, True):
        _, logits = fresh_logits(folder, batches.inputs[0], batches.inputs, bf16=bf16)
        torch.testing.assert_close(batches.in_order(logits), predict(pruned, batches, bf16=bf16), rtol=0, atol=1e-6)


def test_a_folder_that_does_not_load_is_an_error(tmp_path):
    with pytest.raises(RuntimeError, match=r"a fresh process could not load .*: \w+"):
        fresh_logits(tmp_path, {"input_ids": torch.ones(1, 2, dtype=torch.long)})
