"""A tiny pruning run in a process of its own, that can kill itself; prints a digest of the weights at the end."""

import argparse
import hashlib
import os
import signal

import torch
from transformers import BertConfig, BertForSequenceClassification, TrainerCallback, TrainingArguments

from sdprune import SDPruneConfig, prune


class KillAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("output")
    parser.add_argument("--kill-at", type=int, default=-1)
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    model = BertForSequenceClassification(BertConfig(vocab_size=50, max_position_embeddings=16, **sizes))
    rows = [{"input_ids": torch.randint(50, (8,)), "labels": index % 2} for index in range(40)]
    args = TrainingArguments(
        output_dir=options.output,
        max_steps=12,
        save_steps=3,
        save_total_limit=2,
        seed=1,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        resume_from_checkpoint="latest" if options.resume else None,
    )
    config = SDPruneConfig(target_sparsity=0.75, pruning_steps=4)
    result = prune(model, config, rows, args=args, callbacks=[KillAt(options.kill_at)])
    digest = hashlib.sha256()
    for value in result.model.state_dict().values():
        digest.update(value.numpy().tobytes())
    print(digest.hexdigest())  # noqa: T201


if __name__ == "__main__":
    main()
