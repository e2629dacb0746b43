"""Command line: `python -m bench NAME | all | plot NAME | recipes | resources`."""

import argparse
import math
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.grids import GRIDS
from bench.machine import measure_machine
from bench.results import RESULTS, table
from bench.runner import Job, Settings, run


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 1 if something measured is wrong or a kernel breaks a limit."""
    options = _parser().parse_args(arguments)
    status: int = options.run(options)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Benchmarks of sdp_kernels.")
    commands = parser.add_subparsers(required=True, metavar="NAME")
    for name in (*GRIDS, "all"):
        about = "every grid, the most telling rows first" if name == "all" else f"the grid of {name}"
        command = commands.add_parser(name, help=about, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        command.add_argument("--minutes", type=float, default=600.0, help="stop inside this time")
        command.add_argument("--device", choices=("cpu", "cuda"), default=_default_device(), help="where to run")
        command.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
        command.add_argument("--quick", action="store_true", help="a smoke test: few small shapes, nothing kept")
        command.add_argument("--again", action="store_true", help="also measure what is already in the results")
        command.add_argument("--longest-call", type=float, default=60.0, help="seconds; skip cases with longer ones")
        command.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
        command.set_defaults(run=_run, grids=list(GRIDS) if name == "all" else [name])
    plot = commands.add_parser("plot", help="PNG of the speed-up over each baseline")
    plot.add_argument("grid", choices=GRIDS)
    plot.add_argument("--device", help="folder under the results; needed if several have this grid")
    plot.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    plot.set_defaults(run=_plot)
    recipes = commands.add_parser("recipes", help="every recipe of sdprune once, at the length of its demo")
    recipes.add_argument("--recipe", nargs="+", metavar="NAME", help="only these rows")
    recipes.add_argument("--output", type=Path, default=Path("runs/recipes"), help="folder of the runs")
    recipes.add_argument("--quick", action="store_true", help="a smoke test: few rows and steps, nothing kept")
    recipes.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    recipes.set_defaults(run=_recipes)
    resources = commands.add_parser("resources", help="compile every kernel for every GPU and check what it uses")
    resources.add_argument("--arch", type=int, nargs="+", help="compute capabilities, such as 90")
    resources.add_argument("--op", nargs="+", help="names of ops")
    resources.set_defaults(run=_resources)
    return parser


def _default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _run(options: argparse.Namespace) -> int:
    deadline = time.monotonic() + 60 * options.minutes
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or the profiler that counts memory prints into the progress bar
    torch.set_num_threads(options.threads)
    grids = [GRIDS[name] for name in options.grids]
    jobs = [Job(grid, case) for grid in grids for case in grid.cases(options.device)]
    jobs.sort(key=lambda job: job.case.priority)
    settings = Settings(options.results, longest_call=options.longest_call, again=options.again)
    with tempfile.TemporaryDirectory() as thrown_away:
        if options.quick:
            jobs = [min((job for job in jobs if job.grid is grid), key=_elements) for grid in grids]
            settings = Settings(Path(thrown_away), seconds=0.05)
        print(f"{torch.device(options.device)}: measuring its copy and matmul rates", flush=True)
        machine = measure_machine(torch.device(options.device))
        rates = ", ".join(f"{name} {rate / 1e12:.3g}" for name, rate in machine.matmul_rates.items())
        print(f"{machine.name}: copy {machine.copy_rate / 1e9:.3g} GB/s; matmul TFLOP/s: {rates}", flush=True)
        rows = run(jobs, machine, settings, deadline)
    print(table(rows))
    wrong = [row for row in rows if row.get("correct") is False]
    if wrong:
        print(f"{len(wrong)} rows are wrong and have no time", file=sys.stderr)
    return 1 if wrong else 0


def _elements(job: Job) -> int:
    return math.prod(job.case.shape)


def _plot(options: argparse.Namespace) -> int:
    from bench.plot import plot

    try:
        print(plot(options.results, options.grid, options.device))
    except ValueError as error:
        return _refuse(error)
    return 0


def _recipes(options: argparse.Namespace) -> int:
    from bench.recipes import NAMES, markdown, run_recipes  # transformers takes seconds

    names = options.recipe or NAMES
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        raise SystemExit(f"--recipe: no {', '.join(unknown)}; choose of: {', '.join(NAMES)}")
    with tempfile.TemporaryDirectory() as thrown_away:
        output, results = (Path(thrown_away),) * 2 if options.quick else (options.output, options.results)
        print(markdown(run_recipes(names, output, results, quick=options.quick)))
    return 0


def _resources(options: argparse.Namespace) -> int:
    from bench.resources import CAPABILITIES, report

    try:
        return report(options.arch or CAPABILITIES, options.op)
    except (ValueError, RuntimeError) as error:
        return _refuse(error)


def _refuse(error: Exception) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
