"""`sdprune export`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add(commands: Any) -> None:
    text = "write the model of a run, checkpoint or folder as files that plain transformers or other runtimes load"
    parser = commands.add_parser("export", help=text, description=text.capitalize() + ".")
    parser.add_argument(
        "source", type=Path, help="a run's folder (its model, or its newest whole checkpoint), a checkpoint or a model"
    )
    parser.add_argument("--output", type=Path, required=True, help="a new folder")
    parser.add_argument(
        "--format",
        choices=("plain", "portable", "compact", "onnx"),
        help="plain: dense weights with exact zeros; portable: the same, and sparse layers once loaded with sdprune; "
        "compact: portable, and a small file beside it; onnx: model.onnx in float32, checked in onnxruntime "
        "(default: portable if a layer becomes sparse, otherwise plain)",
    )
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    from sdprune.runs.export_folder import export_folder

    print(export_folder(options.source, options.output, options.format))
    return 0
