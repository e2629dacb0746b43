"""`sdprune evaluate`."""

import argparse

from sdprune.commands.options import add_fields, add_trust, given_fields
from sdprune.config import SDPruneConfig
from sdprune.recipe import DataConfig

HELP = "score a model on the test rows of a data set"


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options of `sdprune evaluate`."""
    parser.add_argument("model", help="folder or hub id")
    add_trust(parser)
    add_fields(parser, DataConfig)


def run(options: argparse.Namespace) -> int:
    """Print the scores of a model on the test rows, and its sparsity."""
    from sdprune.layers.forms import plain_copy
    from sdprune.masking.pruner import measure_sparsity
    from sdprune.masking.select import select_linears
    from sdprune.runs.workbench import load_workbench

    data = DataConfig(**given_fields(options, DataConfig))
    workbench = load_workbench(options.model, data, trust_remote_code=options.trust_remote_code, scored=True)
    model = workbench.classifier.model
    if not workbench.classifier.trained_head:
        raise ValueError(f"model {options.model!r} has no trained classification head to evaluate")
    logits = workbench.predict(model, "testing")
    for name, value in workbench.score(logits).items():
        print(f"{name:<16} {value:.4f}")
    for language, scores in workbench.score_languages(logits).items():
        print(f"{language:<16} " + ", ".join(f"{name} {value:.4f}" for name, value in scores.items()))
    dense = plain_copy(model)
    try:
        names = select_linears(dense, SDPruneConfig())
    except ValueError:  # which layers count, only a run of its own could tell
        return 0
    sparsity = measure_sparsity(dense, names)
    print(f"{'sparsity':<16} {sparsity.linear:.4f} of the linear layers, {sparsity.model:.4f} of the model")
    return 0
