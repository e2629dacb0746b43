"""`sdprune prune`."""

from __future__ import annotations

import argparse
import shutil
import textwrap
from pathlib import Path
from typing import Any

from sdprune.commands.options import ABSENT, PARTS, add_fields, option_names
from sdprune.commands.table import print_table
from sdprune.recipe import Recipe, recipe_names


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "prune",
        help="prune a model by a recipe",
        usage="sdprune prune [--recipe NAME|FILE] --model MODEL [--data DATA] --output OUTPUT [--OPTION VALUE ...]\n"
        "       sdprune prune --resume OUTPUT",
        description=_wrapped(
            "Prune a model. A recipe file holds `key: value` lines with the names of the options below (underscores "
            f"for hyphens); options override it. Recipes of the package: {', '.join(recipe_names())}."
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,  # the other one breaks names at their hyphens
    )
    parser.add_argument("--recipe", metavar="NAME|FILE", help="a recipe of the package, or a YAML or JSON file")
    parser.add_argument("--resume", type=Path, metavar="OUTPUT", help="go on with the interrupted run in this folder")
    parser.add_argument("--output", type=Path, help="a new folder for everything that comes of the run")
    parser.add_argument(
        "--model",
        help="folder or hub id of a fine-tuned classifier of texts or tokens; "
        "bundled-minilm, bundled-multilingual: small encoders",
    )
    for title, kind in PARTS.items():
        add_fields(parser.add_argument_group(title), kind)
    parser.set_defaults(command=run)


def _wrapped(text: str) -> str:
    return textwrap.fill(text, width=min(shutil.get_terminal_size().columns, 100) - 2, break_on_hyphens=False)


def run(options: argparse.Namespace) -> int:
    from sdprune.runs.run import run as run_recipe
    from sdprune.training.folder import recipe_of

    given = {name: value for name, value in vars(options).items() if name in option_names() and value is not ABSENT}
    if options.model is not None:
        given["model"] = options.model
    if options.resume is not None:
        if options.recipe or options.output or given:
            raise ValueError("--resume goes alone: the recipe of the run is in its folder")
        values, output = Recipe.read_values(recipe_of(options.resume)), options.resume
    else:
        if options.output is None:
            raise ValueError("--output is missing: name a new folder for the run")
        values, output = (
            (Recipe.read_values(Recipe.find(options.recipe)) if options.recipe else {}) | given,
            options.output,
        )
        if "model" not in values:
            raise ValueError("--model is missing: name a folder or a hub id")
    metrics = run_recipe(Recipe.from_dict(values), output, resume=options.resume is not None)
    if not metrics:
        return 0  # another process prints
    print_table(metrics)
    print(f"\nThe model is in {output / 'model'}; look at {output / 'report.html'}")
    return 0
