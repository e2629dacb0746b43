"""`sdprune demo`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sdprune.commands.table import print_table


def add(commands: Any) -> None:
    text = "prune a small real model on real text, with and without its teacher, and compare"
    parser = commands.add_parser("demo", help=text, description=text.capitalize() + ".")
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="a new folder (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a smoke test of about two minutes")
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    from sdprune.runs.demo import demo

    metrics = demo(options.output, quick=options.quick)
    if options.quick:
        print("\nA smoke test on a small part of the data: it shows that everything runs, not how well.")
    print_table(metrics)
    print(f"\nLook at {options.output / 'report.html'}")
    return 0
