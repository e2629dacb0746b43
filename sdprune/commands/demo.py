"""`sdprune demo`."""

import argparse
from pathlib import Path

from sdprune.commands.table import print_table

HELP = "prune a small real model on real text, with and without its teacher, and compare"


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options of `sdprune demo`."""
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="a new folder (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a smoke test of about two minutes")


def run(options: argparse.Namespace) -> int:
    """Run the demo and print its table."""
    from sdprune.runs.demo import demo

    metrics = demo(options.output, quick=options.quick)
    if options.quick:
        print("\nA smoke test on a small part of the data: it shows that everything runs, not how well.")
    print_table(metrics)
    print(f"\nLook at {options.output / 'report.html'}")
    return 0
