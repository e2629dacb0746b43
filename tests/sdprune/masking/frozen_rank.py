"""One rank of test_freeze.py: python frozen_rank.py RANK WORLD_SIZE STORE_FILE BEFORE_OR_AFTER."""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sdprune.masking.freeze import freeze_sparsity


def main():
    rank, world_size, store, order = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    zeros = torch.rand(8, 6) < 0.7
    with torch.no_grad():
        model[0].weight.masked_fill_(zeros, 0.0)
    if order == "before":
        freeze_sparsity(model)
    wrapped = DistributedDataParallel(model)
    if order == "after":
        freeze_sparsity(wrapped)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=0.1, weight_decay=0.1)
    torch.manual_seed(rank)  # other rows on every rank
    for _ in range(3):
        optimizer.zero_grad()
        wrapped(torch.randn(5, 6)).square().sum().backward()
        assert bool((model[0].weight.grad[zeros] == 0).all())
        assert bool((model[0].weight.grad[~zeros] != 0).all())
        optimizer.step()
    assert torch.equal(model[0].weight == 0, zeros)
    sys.stdout.write("passed")
    sys.stdout.flush()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
