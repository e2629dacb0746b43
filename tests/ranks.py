"""Processes of a test that work together on the CPU, started as torchrun starts them."""

import faulthandler
import os
import socket
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

SECONDS = 120  # after which a process that waits for another in vain says where, on two cores that others use too


def spawn(function: Callable[..., None], world_size: int, *arguments: Any) -> None:
    """Run `function(*arguments)` in `world_size` processes; what one of them raises is raised here."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_work, (world_size, port, function, arguments), nprocs=world_size)


def _work(rank: int, world_size: int, port: int, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    function(*arguments)
    dist.barrier()  # no process closes its sockets while another still talks
    sys.stdout.flush()
    sys.stderr.flush()
    # Python does not take the process apart: gloo's threads now and then abort there, or wait for each other for ever
    os._exit(0)
