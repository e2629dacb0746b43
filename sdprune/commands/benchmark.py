"""`sdprune benchmark`."""

import argparse
import os
from pathlib import Path
from typing import Any

from sdprune.commands.options import add_trust, parse_pair

HELP = "time a model with zeros, dense, sparse and as others run it, and show where it breaks even"


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options of `sdprune benchmark`."""
    parser.add_argument("model", nargs="?", metavar="MODEL_DIR", help="folder of an encoder or sequence classifier")
    parser.add_argument("--config", help="instead of MODEL_DIR, random weights: bert-base, bert-large or a config.json")
    add_trust(parser)
    parser.add_argument("--batch", default="1,8,32", help="batch sizes (default: %(default)s)")
    parser.add_argument("--sequence", default="16,128", help="lengths in tokens (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", help="of float32, bfloat16, float16 (default: %(default)s)")
    parser.add_argument("--device", help="cpu or cuda (default: the GPU if there is one)")
    parser.add_argument("--threads", type=int, help="of the CPU (default: as torch chooses)")
    parser.add_argument("--sparsity", default="", help="prune this share of random blocks first, such as 0.5,0.7,0.9")
    parser.add_argument("--block-shape", help="out x in of the blocks, such as 32x32 (default: the fastest that fits)")
    parser.add_argument("--repeats", type=int, default=7, help="of each timing (default: %(default)s)")
    parser.add_argument(
        "--precision",
        default="float32,int8",
        help="of sdprune.speed_up: float32, int8, bfloat16 (default: %(default)s)",
    )
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument(
        "--no-opponents", action="store_true", help="leave out the dense model in ONNX Runtime and in bfloat16"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("runs/benchmark"), help="a new folder (default: %(default)s)"
    )


def run(options: argparse.Namespace) -> int:
    """Time the model, write its rows and its report, and print the table.

    Returns:
        1 if the model, dense or sparse, has no time at a point; opponents may lack theirs.
    """
    import torch

    from sdprune.speed.benchmark import ROWS_NAME, BenchmarkConfig, benchmark, load_model, threads
    from sdprune.speed.report import breaks, table, write_report

    # The profiler that counts memory would print into the progress bar.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    config = BenchmarkConfig(
        batch=_listed("--batch", options.batch, int),
        sequence=_listed("--sequence", options.sequence, int),
        dtype=_listed("--dtype", options.dtype, str),
        device=options.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        sparsity=_listed("--sparsity", options.sparsity, float),
        block_shape=_block_shape(options.block_shape),
        compile=not options.no_compile,
        precision=_listed("--precision", options.precision, str),
        opponents=not options.no_opponents,
        repeats=options.repeats,
    )
    output: Path = options.output
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"--output must be a new or empty folder, got {str(output)!r}")
    with threads(options.threads):
        model = load_model(options.model, options.config, trust_remote_code=options.trust_remote_code)
        output.mkdir(parents=True, exist_ok=True)
        rows = benchmark(model, config, output)
    report = write_report(output, rows, f"Speed of {options.model or options.config}")
    print(table(rows))
    print(f"\nThe rows are in {output / ROWS_NAME}; look at {report}")
    return 1 if any(breaks(row) for row in rows) else 0


def _block_shape(text: str | None) -> tuple[int, int] | None:
    shape = None if text is None else parse_pair(text)
    if text is not None and shape is None:
        raise ValueError(f"--block-shape must be two whole numbers of at least 1, such as 32x32, got {text!r}")
    return shape


def _listed(option: str, text: str, kind: type) -> tuple[Any, ...]:
    """Return the values of an option that are separated by commas."""
    try:
        return tuple(kind(item.strip()) for item in text.split(",") if item.strip())
    except ValueError:
        example = {int: "whole numbers such as 1,8,32", float: "numbers such as 0.5,0.9"}[kind]
        raise ValueError(f"{option} must be {example}, got {text!r}") from None
