"""The command line: `sdprune demo | prune | evaluate | export | inspect | benchmark`."""

import argparse
import errno
import importlib.metadata
import logging
import platform
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from sdprune.commands import benchmark, demo, evaluate, export, inspect, prune

COMMANDS = (demo, prune, evaluate, export, inspect, benchmark)  # modules with HELP, add(parser) and run(options)
WRONG_INPUT, FAILED, INTERRUPTED = 2, 1, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 2 for wrong input, 1 for a failure, 130 for Ctrl-C."""
    options = _parser().parse_args(arguments)
    from safetensors import SafetensorError

    _quiet_libraries()
    with _told():
        if options.traceback:
            return int(options.command(options))
        return _carried_out(options, SafetensorError)


def _carried_out(options: argparse.Namespace, damaged: type[Exception]) -> int:
    try:
        return int(options.command(options))
    except KeyboardInterrupt as error:
        run = _run_of(getattr(error, "checkpoint", None))
        _complain("interrupted" if run is None else f"{error}\nGo on with: sdprune prune --resume {run}")
        return INTERRUPTED
    except (ValueError, TypeError) as error:
        _complain(f"error: {_one_line(error)}{_advice(error)}")
        return WRONG_INPUT
    except (OSError, RuntimeError, ArithmeticError, ImportError, damaged) as error:
        _complain(f"error: {_one_line(error)}{_advice(error)}")
        return FAILED


def _run_of(checkpoint: Path | None) -> Path | None:
    if checkpoint is None:
        return None
    from sdprune.training.folder import run_of

    return run_of(checkpoint)


def _complain(text: str) -> None:
    print(f"sdprune: {text}", file=sys.stderr)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _advice(error: BaseException) -> str:
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if full or re.search(r"no space left|os error 28|file too large|PytorchStreamWriter", str(error), re.IGNORECASE):
        return ". Free some space; a run goes on from its last whole checkpoint with: sdprune prune --resume OUTPUT"
    if sys.flags.optimize > 1 and "docstring" in str(error):
        return " transformers reads docstrings, which python -OO drops; use python -O."
    return ""


def _quiet_libraries() -> None:
    """Silence what transformers says while it loads: what matters of it is checked and said by us."""
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]


@contextmanager
def _told() -> Iterator[None]:
    """Show the log of this package: what was decided, and what to beware of."""
    log, handler = logging.getLogger("sdprune"), logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    level, passed_on = log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        log.propagate = passed_on


class _Versions(argparse.Action):
    """Print what a report of a fault should tell, and end."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print("\n".join(f"{name} {value}" for name, value in _versions().items()))
        parser.exit()


def _versions() -> dict[str, str]:
    """What decides how a run goes: versions, as they are installed, and the device."""
    import torch

    found = {"sdprune": importlib.metadata.version("sdprune"), "Python": platform.python_version()}
    found["torch"] = torch.__version__  # its metadata do not name the CUDA it was built for
    for name in ("triton", "transformers"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "is not installed"
    device = torch.accelerator.current_accelerator(check_available=True)
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else str(device or "cpu")
    return {**found, "platform": platform.platform(), "device": name}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sdprune",
        description="Prune a fine-tuned Transformer while a frozen copy of it teaches it.",
    )
    parser.add_argument("--version", action=_Versions, nargs=0, help="print what a report of a fault should tell")
    parser.add_argument("--traceback", action="store_true", help="show where an error comes from")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in COMMANDS:
        name, text = module.__name__.rpartition(".")[2], module.HELP
        command = commands.add_parser(name, help=text, description=f"{text.capitalize()}.")
        command.set_defaults(command=module.run)
        module.add(command)
    return parser


if __name__ == "__main__":
    sys.exit(main())
