"""`sdprune export`."""

import argparse
from pathlib import Path

from sdprune.commands.options import add_trust

HELP = "write the model of a run, checkpoint or folder as files that plain transformers or other runtimes load"


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options of `sdprune export`."""
    parser.add_argument(
        "source", type=Path, help="a run's folder (its model, or its newest whole checkpoint), a checkpoint or a model"
    )
    add_trust(parser)
    parser.add_argument("--output", type=Path, required=True, help="a new folder")
    parser.add_argument(
        "--format",
        choices=("plain", "portable", "compact", "onnx"),
        help="plain: dense weights with exact zeros; portable: the same, and sparse layers once loaded with sdprune; "
        "compact: portable, and a small file beside it; onnx: model.onnx in float32, checked in onnxruntime "
        "(default: portable if a layer becomes sparse, otherwise plain)",
    )
    parser.add_argument(
        "--precision",
        choices=("int8",),
        help="int8: attention and feed-forward matrices become int8 layers once loaded with sdprune; elsewhere they "
        "are dense, with the same weights (default: as the model has them)",
    )


def run(options: argparse.Namespace) -> int:
    """Write the model and print its folder."""
    from sdprune.runs.export_folder import export_folder

    more = {"precision": options.precision, "trust_remote_code": options.trust_remote_code}
    print(export_folder(options.source, options.output, options.format, **more))
    return 0
