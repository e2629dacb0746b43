"""Command line: `python -m bench NAME | all | gpu | collect | plot NAME | recipes | resources | kernels-layout DIR`."""

import argparse
import importlib.util
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
from bench.results import RESULTS, collect, read_rows, table
from bench.runner import Job, Settings, run
from bench.timing import DeviceLost


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
    gpu = commands.add_parser(
        "gpu",
        help="every grid inside a given time, each in a process of its own, kernels compiled before",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    gpu.add_argument("--minutes", type=float, default=9.0, help="for everything")
    gpu.add_argument("--results", type=Path, help="folder of the rows, the table and the log")
    gpu.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="where to run; cpu rehearses")
    gpu.add_argument("--grid", nargs="+", metavar="NAME", help="only these, in this order")
    gpu.add_argument("--quick", action="store_true", help="the smallest case of each grid")
    gpu.add_argument("--dry-run", action="store_true", help="print what would be done, and no more")
    gpu.add_argument("--arch", type=int, default=90, help="compute capability that --dry-run plans for, such as 90")
    gpu.add_argument("--longest-case", type=float, default=90.0, help="seconds; a case that takes longer is given up")
    gpu.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    gpu.set_defaults(run=_gpu)
    collect = commands.add_parser("collect", help="append the rows of a file to those of their devices and grids")
    collect.add_argument("file", type=Path, help="what `gpu` wrote as all.jsonl")
    collect.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    collect.set_defaults(run=_collect)
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
    layout = commands.add_parser(
        "kernels-layout", help="block_sparse_linear in the layout of the Hub's kernels package"
    )
    layout.add_argument("directory", type=Path, help="the folder to make")
    layout.set_defaults(run=_kernels_layout)
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
            jobs = [Job(grid, grid.smallest(options.device)) for grid in grids]
            settings = Settings(Path(thrown_away), seconds=0.05)
        print(f"{torch.device(options.device)}: measuring its copy and matmul rates", flush=True)
        machine = measure_machine(torch.device(options.device))
        rates = ", ".join(f"{name} {rate / 1e12:.3g}" for name, rate in machine.matmul_rates.items())
        print(f"{machine.name}: copy {machine.copy_rate / 1e9:.3g} GB/s; matmul TFLOP/s: {rates}", flush=True)
        try:
            rows = run(jobs, machine, settings, deadline)
        except DeviceLost as error:
            return _refuse(error)
    print(table(rows))
    wrong = [row for row in rows if row.get("correct") is False]
    if wrong:
        print(f"{len(wrong)} rows are wrong and have no time", file=sys.stderr)
    return 1 if wrong else 0


def _gpu(options: argparse.Namespace) -> int:
    from bench.gpu import Plan, describe, measure

    try:
        _check_gpu(options)
    except ValueError as error:
        return _refuse(error)
    plan = Plan({name: GRIDS[name] for name in options.grid or GRIDS}, options.device, options.quick)
    if options.dry_run:
        print(describe(plan, options.arch))
        return 0
    limits = {"longest_case": options.longest_case, "threads": options.threads}
    try:
        rows = measure(plan, options.results, options.minutes, **limits)
    except RuntimeError as error:
        return _refuse(error)
    return 1 if any(row.get("correct") is False for row in rows) else 0


def _check_gpu(options: argparse.Namespace) -> None:
    """Raise a ValueError in one line for what cannot be, before anything runs."""
    unknown = [name for name in options.grid or () if name not in GRIDS]
    if unknown:
        raise ValueError(f"--grid must be among {', '.join(GRIDS)}, got {', '.join(unknown)}")
    for name in ("minutes", "longest_case"):
        if not 0 < getattr(options, name) < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} must be above 0, got {getattr(options, name)}")
    if options.threads < 1:
        raise ValueError(f"--threads must be at least 1, got {options.threads}")
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise ValueError("TRITON_INTERPRET=1 keeps kernels from being compiled; unset it")
    if options.dry_run:
        if importlib.util.find_spec("triton") is None:
            raise ValueError("--dry-run looks at what Triton would compile, and triton is not installed")
        return
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: no GPU is there; --device cpu rehearses, --dry-run prints the plan")
    if options.results is None:
        raise ValueError("--results is needed: the folder of the rows, the table and the log")
    try:
        options.results.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=options.results):
            pass
    except OSError as error:
        raise ValueError(f"--results: {error.strerror or error}: {str(options.results)!r}") from None


def _collect(options: argparse.Namespace) -> int:
    try:
        rows = read_rows(options.file.resolve(strict=True))
        kept = {name: len(found) for name, found in collect(rows, options.results).items()}
    except (ValueError, KeyError, OSError) as error:
        return _refuse(ValueError(f"file must hold rows, one JSON object a line, got {str(options.file)!r}: {error!r}"))
    print("\n".join(f"{name}: {number} rows" for name, number in kept.items()) or "no new rows")
    return 0


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


def _kernels_layout(options: argparse.Namespace) -> int:
    from bench.kernels_layout import write_kernel_repository

    try:
        print(write_kernel_repository(options.directory))
    except (ValueError, OSError) as error:
        return _refuse(error)
    return 0


def _refuse(error: Exception) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
