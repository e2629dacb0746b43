"""Runs without their fresh process."""

import pytest
import torch
import transformers

from sdprune.runs import results


@pytest.fixture(autouse=True)
def without_opponents(unopposed):
    """All runs here are unopposed."""


@pytest.fixture
def in_process(monkeypatch):
    """Load exported folders in this process: a fresh one for each model would take most of the time."""

    @torch.inference_mode()
    def logits(folder, probe, batches=(), **options):
        architecture = transformers.AutoConfig.from_pretrained(folder).architectures[0]
        model = getattr(transformers, architecture).from_pretrained(folder, dtype=torch.float32).eval()
        return model(**probe).logits, [model(**inputs).logits for inputs in batches]

    monkeypatch.setattr(results, "fresh_logits", logits)
