"""The command line: `sdprune demo | prune | evaluate | export | benchmark`."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import inspect
import os
import re
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdprune.config import RECIPE_NAME, DataConfig, Recipe, SDPruneConfig, TrainingConfig

WRONG_INPUT, FAILED, INTERRUPTED = 2, 1, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 2 for wrong input, 1 for a failure, 130 for Ctrl-C."""
    options = _parser().parse_args(arguments)
    from safetensors import SafetensorError

    _quiet_libraries()
    if options.traceback:
        return int(options.command(options))
    try:
        return int(options.command(options))
    except KeyboardInterrupt as error:
        checkpoint = getattr(error, "checkpoint", None)
        if checkpoint is not None and (checkpoint.parent / RECIPE_NAME).exists():
            _complain(f"{error}\nGo on with: sdprune prune --resume {checkpoint.parent}")
        else:
            _complain("interrupted")
        return INTERRUPTED
    except (ValueError, TypeError) as error:
        _complain(f"error: {_one_line(error)}")
        return WRONG_INPUT
    except (OSError, RuntimeError, ArithmeticError, SafetensorError) as error:
        _complain(f"error: {_one_line(error)}{_advice(error)}")
        return FAILED


def _complain(text: str) -> None:
    print(f"sdprune: {text}", file=sys.stderr)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _advice(error: BaseException) -> str:
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if full or re.search(r"no space left|os error 28|file too large|PytorchStreamWriter", str(error), re.IGNORECASE):
        return ". Free some space; a run goes on from its last whole checkpoint with: sdprune prune --resume OUTPUT"
    return ""


def _quiet_libraries() -> None:
    """Silence what transformers says while it loads: what matters of it is checked and said by us."""
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sdprune",
        description="Prune a fine-tuned Transformer while a frozen copy of it teaches it.",
    )
    parser.add_argument("--traceback", action="store_true", help="show where an error comes from")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_prune(commands)
    _add_evaluate(commands)
    _add_export(commands)
    _add_benchmark(commands)
    return parser


def _add_demo(commands: Any) -> None:
    text = "prune a small real model on real text, with and without its teacher, and compare"
    parser = commands.add_parser("demo", help=text, description=text.capitalize() + ".")
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="a new folder (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a smoke test of about two minutes")
    parser.set_defaults(command=_demo)


def _demo(options: argparse.Namespace) -> int:
    from sdprune.pipelines.demo import demo

    metrics = demo(options.output, quick=options.quick)
    if options.quick:
        print("\nA smoke test on a small part of the data: it shows that everything runs, not how well.")
    _print_table(metrics)
    print(f"\nLook at {options.output / 'report.html'}")
    return 0


def _add_prune(commands: Any) -> None:
    parser = commands.add_parser(
        "prune",
        help="prune a model by a recipe",
        description="Prune a model. A recipe file holds `key: value` lines with the names of the options below "
        "(underscores for hyphens); options override it.",
    )
    parser.add_argument("--recipe", type=Path, help="YAML or JSON file")
    parser.add_argument("--resume", type=Path, metavar="OUTPUT", help="go on with the interrupted run in this folder")
    parser.add_argument("--output", type=Path, help="a new folder for everything that comes of the run")
    parser.add_argument("--model", help="folder or hub id of a fine-tuned classifier; bundled-minilm: a small encoder")
    for title, kind in (("data", DataConfig), ("training", TrainingConfig), ("pruning", SDPruneConfig)):
        _add_fields(parser.add_argument_group(title), kind)
    parser.set_defaults(command=_prune)


def _prune(options: argparse.Namespace) -> int:
    from sdprune.pipelines.run import run

    given = {name: value for name, value in vars(options).items() if name in _recipe_names() and value is not _ABSENT}
    if options.model is not None:
        given["model"] = options.model
    if options.resume is not None:
        if options.recipe or options.output or given:
            raise ValueError("--resume goes alone: the recipe of the run is in its folder")
        if not (options.resume / RECIPE_NAME).exists():
            raise ValueError(f"--resume: {str(options.resume)!r} holds no run ({RECIPE_NAME} is missing)")
        values, output = Recipe.read_values(options.resume / RECIPE_NAME), options.resume
    else:
        if options.output is None:
            raise ValueError("--output is missing: name a new folder for the run")
        values, output = (
            (Recipe.read_values(options.recipe) if options.recipe else {}) | given,
            options.output,
        )
        if "model" not in values:
            raise ValueError("--model is missing: name a folder or a hub id")
    metrics = run(Recipe.from_dict(values), output, resume=options.resume is not None)
    _print_table(metrics)
    print(f"\nThe model is in {output / 'model'}; look at {output / 'report.html'}")
    return 0


def _add_evaluate(commands: Any) -> None:
    text = "score a model on the test rows of a data set"
    parser = commands.add_parser("evaluate", help=text, description=text.capitalize() + ".")
    parser.add_argument("model", help="folder or hub id")
    _add_fields(parser, DataConfig)
    parser.set_defaults(command=_evaluate)


def _evaluate(options: argparse.Namespace) -> int:
    from sdprune.masking.pruner import measure_sparsity
    from sdprune.masking.select import select_linears
    from sdprune.pipelines.workbench import load_workbench

    names = DataConfig.field_names()
    data = DataConfig(
        **{name: value for name, value in vars(options).items() if name in names and value is not _ABSENT}
    )
    workbench = load_workbench(options.model, data)
    model = workbench.classifier.model
    if not workbench.classifier.trained_head:
        raise ValueError(f"model {options.model!r} has no trained classification head to evaluate")
    logits = workbench.predict_test(model, "testing")
    for name, value in workbench.score(logits).items():
        print(f"{name:<16} {value:.4f}")
    sparsity = measure_sparsity(model, select_linears(model, SDPruneConfig()))
    print(f"{'sparsity':<16} {sparsity.linear:.4f} of the linear layers, {sparsity.model:.4f} of the model")
    return 0


def _add_export(commands: Any) -> None:
    text = "write the model of a run, checkpoint or folder as files that plain transformers loads"
    parser = commands.add_parser("export", help=text, description=text.capitalize() + ".")
    parser.add_argument(
        "source", type=Path, help="a run's folder (its newest whole checkpoint), a checkpoint or a model"
    )
    parser.add_argument("--output", type=Path, required=True, help="a new folder")
    parser.add_argument("--format", default="plain", help='"plain": dense weights with exact zeros (default)')
    parser.set_defaults(command=_export)


def _export(options: argparse.Namespace) -> int:
    from sdprune.pipelines.models import export_folder

    print(export_folder(options.source, options.output, options.format))
    return 0


def _add_benchmark(commands: Any) -> None:
    text = "time a model with zeros, dense and sparse, eager and compiled, and show where it breaks even"
    parser = commands.add_parser("benchmark", help=text, description=text.capitalize() + ".")
    parser.add_argument("model", nargs="?", metavar="MODEL_DIR", help="folder of an encoder or sequence classifier")
    parser.add_argument("--config", help="instead of MODEL_DIR, random weights: bert-base, bert-large or a config.json")
    parser.add_argument("--batch", default="1,8,32", help="batch sizes (default: %(default)s)")
    parser.add_argument("--sequence", default="16,128", help="lengths in tokens (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", help="of float32, bfloat16, float16 (default: %(default)s)")
    parser.add_argument("--device", help="cpu or cuda (default: the GPU if there is one)")
    parser.add_argument("--threads", type=int, help="of the CPU (default: as torch chooses)")
    parser.add_argument("--sparsity", default="", help="prune this share of random blocks first, such as 0.5,0.7,0.9")
    parser.add_argument("--block-shape", help="out x in of the blocks, such as 32x32 (default: the fastest that fits)")
    parser.add_argument("--repeats", type=int, default=7, help="of each timing (default: %(default)s)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/benchmark"), help="a new folder (default: %(default)s)"
    )
    parser.set_defaults(command=_benchmark)


def _benchmark(options: argparse.Namespace) -> int:
    import torch

    from sdprune.deployment.benchmark import ROWS_NAME, BenchmarkConfig, benchmark, load_model, threads
    from sdprune.deployment.benchmark_report import outcome, table, write_report

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
        repeats=options.repeats,
    )
    output: Path = options.output
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"--output must be a new or empty folder, got {str(output)!r}")
    with threads(options.threads):
        model = load_model(options.model, options.config)
        output.mkdir(parents=True, exist_ok=True)
        rows = benchmark(model, config, output)
    report = write_report(output, rows, f"Speed of {options.model or options.config}")
    print(table(rows))
    print(f"\nThe rows are in {output / ROWS_NAME}; look at {report}")
    return FAILED if any(outcome(row) for row in rows) else 0


def _listed(option: str, text: str, kind: type) -> tuple[Any, ...]:
    """Return the values of an option that are separated by commas."""
    try:
        return tuple(kind(item.strip()) for item in text.split(",") if item.strip())
    except ValueError:
        example = {int: "whole numbers such as 1,8,32", float: "numbers such as 0.5,0.9"}[kind]
        raise ValueError(f"{option} must be {example}, got {text!r}") from None


def _block_shape(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    sides = re.fullmatch(r"(\d+)[x,](\d+)", text)
    if sides is None:
        raise ValueError(f"--block-shape must be two whole numbers of at least 1, such as 32x32, got {text!r}")
    return int(sides[1]), int(sides[2])


_ABSENT: Any = object()


def _recipe_names() -> tuple[str, ...]:
    return (*DataConfig.field_names(), *TrainingConfig.field_names(), *SDPruneConfig.field_names())


def _add_fields(parser: Any, kind: Any) -> None:
    """Add an option for every field; its help is the field's line in the docstring."""
    texts = _field_texts(kind)
    hints = typing.get_type_hints(kind)
    for item in dataclasses.fields(kind):
        parser.add_argument(
            f"--{item.name.replace('_', '-')}",
            type=lambda text, hint=hints[item.name]: _parsed(text, hint),
            default=_ABSENT,
            metavar="VALUE",
            help=f"{texts[item.name]} (default: {item.default})".replace("%", "%%"),
        )


def _field_texts(kind: type) -> dict[str, str]:
    section = (inspect.getdoc(kind) or "").split("Args:\n")[1].split("\n\n")[0]
    entries = re.split(r"\n(?=    \w+:)", section)
    pairs = (entry.strip().split(":", 1) for entry in entries)
    return {name: " ".join(text.split()).rstrip(".") for name, text in pairs}


def _parsed(text: str, hint: Any) -> Any:
    """Turn the text of an option into the type of its field; the dataclass checks the rest."""
    import yaml

    kinds = typing.get_args(hint) or (hint,)
    if type(None) in kinds and text.lower() in ("none", "null"):
        return None
    if pair := re.fullmatch(r"(\d+)[x,](\d+)", text):
        return int(pair[1]), int(pair[2])
    if str in kinds and not text.startswith(("[", "{")):
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise ValueError(f"{text!r} is not a value") from None


def _print_table(metrics: dict[str, Any]) -> None:
    names = list(metrics["dense"])
    print(
        f"\n{'':<22}{'sparsity':>10}"
        + "".join(f"{name:>12}" for name in names)
        + f"{'reload diff':>13}{'speed-up':>10}"
    )
    references = {**metrics["baselines"], "dense": metrics["dense"]}
    if "dense_same_steps" in metrics:
        references["dense, same steps"] = metrics["dense_same_steps"]
    for label, scores in references.items():
        print(f"{label:<22}{'':>10}" + "".join(f"{scores[name]:>12.1%}" for name in names))
    for row in metrics["runs"]:
        print(
            f"{row['method']:<22}{row['sparsity']:>10.1%}"
            + "".join(f"{row[name]:>12.1%}" for name in names)
            + f"{row['reload_max_difference']:>13.1g}{row['speedup']:>9.2f}x"
        )
    print(
        "\nSparsity is that of the pruned linear layers. Zeros alone do not speed up a dense product: "
        "a speed-up of 1 is what to expect here."
    )


if __name__ == "__main__":
    sys.exit(main())
