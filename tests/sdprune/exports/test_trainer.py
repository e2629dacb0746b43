"""A loaded sparse model under the plain Trainer: it trains, its checkpoints are right, and a run resumes exactly."""

from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, Trainer

from sdprune import BlockSparseLinear, export
from sdprune.layers.forms import dense_copy
from sdprune.layers.narrow import NarrowLinear, RemovedLinear
from sdprune.layers.pruned import PrunedLinear
from sdprune.masking.coupling import find_couplings
from sdprune.masking.linears import matrix


def test_training_and_resuming(make_dense, arguments, dataset_factory, tokenizer, tmp_path):
    _, model = make_dense("bert")
    with torch.no_grad():
        for layer in model.bert.encoder.layer:
            layer.attention.self.query.weight[:16, 16:] = layer.attention.self.query.weight[32:, :32] = 0
            layer.attention.self.key.weight[:16] = layer.attention.output.dense.weight[:, ::2] = 0
        for coupling in find_couplings(model):
            if coupling.kind == "neuron":
                matrix(model.get_submodule(coupling.consumer))[:, coupling.columns[::2].flatten()] = 0
                for name, rows in coupling.producers.items():
                    matrix(model.get_submodule(name))[rows[::2].flatten()] = 0
    folder = export(model, tmp_path / "model", "portable")

    def trainer(steps: int, output: Path) -> Trainer:
        return Trainer(
            AutoModelForSequenceClassification.from_pretrained(folder),
            arguments(
                output_dir=str(output),
                max_steps=steps,
                save_strategy="steps",
                save_steps=2,
                lr_scheduler_type="constant",
            ),
            train_dataset=dataset_factory(32),
            data_collator=DataCollatorWithPadding(tokenizer),
        )

    whole = trainer(4, tmp_path / "whole")
    kinds = {name: type(layer) for name, layer in whole.model.named_modules() if isinstance(layer, PrunedLinear)}
    assert set(kinds.values()) == {BlockSparseLinear, NarrowLinear, RemovedLinear}
    start = dense_copy(whole.model).state_dict()
    start = {name: value.clone() for name, value in start.items()}
    whole.train()
    expected = dense_copy(whole.model).state_dict()
    assert any(not torch.equal(start[name], value) for name, value in expected.items())
    for name in kinds:  # what was empty stays empty
        assert torch.equal(expected[f"{name}.weight"] == 0, start[f"{name}.weight"] == 0)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole" / "checkpoint-4")
    found = dense_copy(again).state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())

    trainer(2, tmp_path / "part").train()
    resumed = trainer(4, tmp_path / "part")
    resumed.train(resume_from_checkpoint=True)
    assert {name: type(resumed.model.get_submodule(name)) for name in kinds} == kinds
    found = dense_copy(resumed.model).state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
