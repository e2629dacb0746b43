"""`sdprune inspect`."""

import argparse
import json
from pathlib import Path
from typing import Any

from sdprune.text import aligned

HELP = "show the zeros of a model folder, layer by layer"


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options of `sdprune inspect`."""
    parser.add_argument("directory", type=Path, help="a model folder with safetensors, pruned by whomever")
    parser.add_argument("--variant", help='"compact": the small form of the weights that export wrote')
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--heat-map", type=Path, metavar="PNG", help="draw the density of blocks of every layer")


def run(options: argparse.Namespace) -> int:
    """Print the zeros as a table or as JSON, and draw them if asked."""
    from sdprune.exports.inspect import inspect_folder

    found = inspect_folder(options.directory, options.variant)
    if options.heat_map is not None:
        from sdprune.analysis.heat_map import draw_heat_map

        draw_heat_map({layer.name: layer.grid for layer in found.layers}, options.heat_map, title=found.directory)
    if options.json:
        print(json.dumps(found.to_dict(), indent=1))
        return 0
    _print_table(found)
    if options.heat_map is not None:
        print(f"\nThe densities are drawn in {options.heat_map}")
    return 0


def _print_table(found: Any) -> None:
    rows = [("layer", "out x in", "structure", "form", "density", "bytes", "dead rows", "dead columns", "dead heads")]
    for layer in found.layers:
        forms = (f"{layer.shape[0]} x {layer.shape[1]}", layer.structure, layer.form)
        size = (*forms, f"{layer.density:.1%}", f"{layer.bytes:,}")
        heads = "" if layer.heads is None else f"{layer.dead_heads} of {layer.heads}"
        rows.append((layer.name, *size, str(layer.dead_rows), str(layer.dead_columns), heads))
    total = found.to_dict()["total"]
    dead = (str(total["dead_rows"]), str(total["dead_columns"]), str(total["dead_heads"]))
    rows.append(("total", f"{total['weights']:,}", "", "", f"{total['density']:.1%}", f"{total['bytes']:,}", *dead))
    print(aligned(rows))
    print(f"\nAll other tensors take {found.other_bytes:,} bytes.")
    if found.architecture is None:
        print("The architecture is not part of transformers: every matrix is listed, and heads are not known.")
