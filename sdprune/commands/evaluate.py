"""`sdprune evaluate`."""

from __future__ import annotations

import argparse
from typing import Any

from sdprune.commands.options import ABSENT, add_fields
from sdprune.config import SDPruneConfig
from sdprune.recipe import DataConfig


def add(commands: Any) -> None:
    text = "score a model on the test rows of a data set"
    parser = commands.add_parser("evaluate", help=text, description=text.capitalize() + ".")
    parser.add_argument("model", help="folder or hub id")
    add_fields(parser, DataConfig)
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    from sdprune.masking.pruner import measure_sparsity
    from sdprune.masking.select import select_linears
    from sdprune.runs.workbench import load_workbench

    names = DataConfig.field_names()
    data = DataConfig(**{name: value for name, value in vars(options).items() if name in names and value is not ABSENT})
    workbench = load_workbench(options.model, data)
    model = workbench.classifier.model
    if not workbench.classifier.trained_head:
        raise ValueError(f"model {options.model!r} has no trained classification head to evaluate")
    logits = workbench.predict(model, "testing")
    for name, value in workbench.score(logits).items():
        print(f"{name:<16} {value:.4f}")
    for language, scores in workbench.score_languages(logits).items():
        print(f"{language:<16} " + ", ".join(f"{name} {value:.4f}" for name, value in scores.items()))
    sparsity = measure_sparsity(model, select_linears(model, SDPruneConfig()))
    print(f"{'sparsity':<16} {sparsity.linear:.4f} of the linear layers, {sparsity.model:.4f} of the model")
    return 0
