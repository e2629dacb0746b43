"""From a dense model to its exported files, for models that write text and models that see: one run each."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    GPT2Config,
    LlamaConfig,
    TrainerCallback,
    ViTConfig,
)

from sdprune import BlockSparseLinear, SDPruneConfig, export, load, plan, prune
from sdprune.formats.form import DENSE, Form
from sdprune.layers.forms import in_form
from sdprune.layers.narrow import NarrowLinear
from sdprune.masking.swap import masked_layers

SPREAD = {"initializer_range": 0.4}  # tokens far enough apart that rounding chooses none
SPECIAL = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
LLAMA = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
DECODERS = {
    "llama": LlamaConfig(**LLAMA, intermediate_size=64, vocab_size=48, max_position_embeddings=32, **SPREAD, **SPECIAL),
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=48, n_positions=32, **SPREAD, **SPECIAL),
}
PRUNING = {"structure": "block", "block_shape": (8, 8), "target_sparsity": 0.5, "pruning_steps": 2}


class Watch(TrainerCallback):
    """Keeps what the masked model gives at the end of the training, and the rows of the log."""

    def __init__(self, ask):
        self.ask, self.answer, self.rows = ask, None, []

    def on_train_end(self, args, state, control, **kwargs):
        model = kwargs["model"]
        assert len(masked_layers(model)) > 0
        self.answer = self.ask(model.eval())

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.rows.append(dict(logs))


def in_blocks(model):
    """Convert every pruned layer."""
    for name in model.config.sdprune["layers"] if hasattr(model.config, "sdprune") else ():
        model.set_submodule(name, in_form(model.get_submodule(name), Form.named("8x8")))
    return model


@torch.no_grad()
def generated(model):
    """Continue two prompts of unlike lengths, padded on the left."""
    ids = torch.tensor([[0, 0, 1, 9, 17], [1, 30, 7, 12, 41]])
    tokens = model.generate(input_ids=ids, attention_mask=(ids != 0).long(), max_new_tokens=12, do_sample=False)
    return tokens[:, ids.shape[1] :]


def make_prompts(count, padding=0):
    """Return rows of equal length: a prompt whose labels are ignored, an answer, and padding on the right."""
    generator = torch.Generator().manual_seed(2)
    rows = []
    for index in range(count):
        length = 6 + index % 5
        ids = torch.randint(2, 48, (10,), generator=generator)
        labels = ids.clone()
        labels[:3] = labels[length:] = -100
        ids[length:] = padding
        rows.append({"input_ids": ids, "attention_mask": (torch.arange(10) < length).long(), "labels": labels})
    return rows


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_writes_the_same_text_in_every_form(name, arguments, tmp_path):
    config = SDPruneConfig(
        **PRUNING, distillation={"kl": 1.0, "cross_correlation": 0.01, "aligned_cosine": 0.1}, representation="tokens"
    )
    watches = []
    for padding in (0, 47):  # what stands in the padding must not matter
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(DECODERS[name])
        watches.append(Watch(generated))
        args = arguments(output_dir=str(tmp_path / f"run-{padding}"), logging_steps=1)
        result = prune(model, config, make_prompts(32, padding), args=args, callbacks=[watches[-1]])
    parts = ("loss", "loss_task", "loss_kl", "loss_cross_correlation", "loss_aligned_cosine")
    losses = [[{part: row[part] for part in parts} for row in watch.rows if "loss" in row] for watch in watches]
    assert losses[0] == [pytest.approx(row, rel=1e-3, abs=1e-6) for row in losses[1]]
    assert losses[0][-1]["loss_kl"] > 1e-3
    assert result.sparsity.linear == 0.5
    expected = watches[-1].answer
    assert len(set(expected.flatten().tolist())) > 4
    assert torch.equal(generated(result.model), expected)
    export(result.model, tmp_path / "plain", "plain", config=config)
    export(result.model, tmp_path / "compact", "compact", config=config)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert torch.equal(generated(plain), expected)
    for sparse in (
        AutoModelForCausalLM.from_pretrained(tmp_path / "compact"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "compact", variant="compact"),
        load(tmp_path / "compact"),
        in_blocks(plain),
    ):
        kinds = {type(sparse.get_submodule(layer)) for layer in result.sparsity.layers}
        assert BlockSparseLinear in kinds
        assert kinds <= {BlockSparseLinear, NarrowLinear}
        assert torch.equal(generated(sparse), expected)


def test_an_image_classifier(arguments, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForImageClassification.from_config(ViTConfig(**VIT, image_size=16, patch_size=8, **SPREAD))
    images = torch.randn(40, 3, 16, 16)
    rows = [{"pixel_values": image, "labels": int(image.mean() > 0)} for image in images]

    @torch.no_grad()
    def classified(model):
        return model(pixel_values=images[:8]).logits

    watch = Watch(classified)
    options = {"teacher_cache": str(tmp_path / "cache"), "diagnostics_steps": 4}
    config = SDPruneConfig(**PRUNING, distillation={"kl": 1.0, "cross_correlation": 0.01}, **options)
    args = arguments(output_dir=str(tmp_path / "run"), logging_steps=1, max_steps=10)
    result = prune(model, config, rows, rows[:16], args=args, callbacks=[watch])
    assert result.sparsity.linear == 0.5
    logged = {name for row in watch.rows for name in row}
    assert {"loss_kl", "loss_cross_correlation", "separability", "signal_to_noise"} <= logged
    assert result.metrics["eval_loss"] > 0
    torch.testing.assert_close(classified(result.model), watch.answer)
    export(result.model, tmp_path / "compact", "compact", config=config)
    for options in ({}, {"variant": "compact"}):
        sparse = AutoModelForImageClassification.from_pretrained(tmp_path / "compact", **options)
        assert any(isinstance(module, BlockSparseLinear) for module in sparse.modules())
        torch.testing.assert_close(classified(sparse), watch.answer, rtol=1e-4, atol=1e-5)
    sparse.save_pretrained(tmp_path / "again")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "again")
    torch.testing.assert_close(classified(again), watch.answer, rtol=1e-4, atol=1e-5)
    export(again, tmp_path / "plain", "plain")
    plain = AutoModelForImageClassification.from_pretrained(tmp_path / "plain")
    torch.testing.assert_close(classified(plain), watch.answer)
    found = plan(result.model, {"pixel_values": images[:2]}, block_shapes=((8, 8),), repeats=3)
    assert {layer.name for layer in found.layers} == set(result.sparsity.layers)
    assert all({DENSE, "8x8"} <= set(layer.candidates) for layer in found.layers)
    assert {layer.tokens for layer in found.layers} == {2 * 5}  # four patches and the class token of two images


class InterruptAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_a_model_that_is_saved_under_former_names_resumes(arguments, tmp_path):
    """transformers writes `vit.layers.0.attention.q_proj` as `vit.encoder.layer.0.attention.attention.query`."""
    config = SDPruneConfig(**PRUNING, start_ratio=0.2, end_ratio=0.7, distillation="kl")
    images = torch.randn(40, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    rows = [{"pixel_values": image, "labels": int(image.mean() > 0)} for image in images]

    def run(name, callbacks=(), resume=None):
        torch.manual_seed(0)
        model = AutoModelForImageClassification.from_config(ViTConfig(**VIT, image_size=16, patch_size=8))
        saving = {"save_strategy": "steps", "save_steps": 4, "resume_from_checkpoint": resume}
        args = arguments(output_dir=str(tmp_path / name), **saving)
        return prune(model, config, rows, args=args, callbacks=callbacks).model.state_dict()

    expected = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("parts", [InterruptAt(5)])
    found = run("parts", [Watch(lambda model: None)], resume="latest")
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
