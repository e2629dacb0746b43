"""`sdprune prune`."""

import argparse
import shutil
import textwrap
from pathlib import Path

from sdprune.commands.options import add_fields, given_fields
from sdprune.commands.table import print_table
from sdprune.recipe import PARTS, Recipe, recipe_names

HELP = "prune a model by a recipe"


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options of `sdprune prune`: those of the run itself, then a group for each part of a recipe."""
    parser.usage = (
        "sdprune prune [--recipe NAME|FILE] --model MODEL [--data DATA] --output OUTPUT [--OPTION VALUE ...]\n"
        "       sdprune prune --resume OUTPUT"
    )
    description = (
        "Prune a model. A recipe file holds `key: value` lines with the names of the options below (underscores for "
        f"hyphens); options override it. Recipes of the package: {', '.join(recipe_names())}."
    )
    width = min(shutil.get_terminal_size().columns, 100) - 2
    parser.description = textwrap.fill(description, width=width, break_on_hyphens=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter  # the other one breaks names at their hyphens
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


def run(options: argparse.Namespace) -> int:
    """Carry out or resume a run and print its table."""
    from sdprune.runs.run import run as run_recipe
    from sdprune.training.folder import recipe_of

    given = given_fields(options, *PARTS.values()) | ({"model": options.model} if options.model is not None else {})
    if options.resume is not None:
        if options.recipe or options.output or given:
            raise ValueError("--resume goes alone: the recipe of the run is in its folder")
        values, output = Recipe.read_values(recipe_of(options.resume)), options.resume
    else:
        if options.output is None:
            raise ValueError("--output is missing: name a new folder for the run")
        values = (Recipe.read_values(Recipe.find(options.recipe)) if options.recipe else {}) | given
        output = options.output
        if "model" not in values:
            raise ValueError("--model is missing: name a folder or a hub id")
    metrics = run_recipe(Recipe.from_dict(values), output, resume=options.resume is not None)
    if not metrics:
        return 0  # another process prints
    print_table(metrics)
    print(f"\nThe model is in {output / 'model'}; look at {output / 'report.html'}")
    return 0
