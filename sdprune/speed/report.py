"""What `sdprune benchmark` shows: a table, a picture of the speed-ups with break-even, and a page that holds both."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdprune.files import write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = dict[str, Any]

# Okabe and Ito's colours, which colour-blind readers tell apart; without their yellow, too pale on white
_PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_STYLES = {"eager": ("-", "o"), "compiled": ("--", "s")}
_ABSENT = "—"

_PAGE = """<!DOCTYPE html><html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ margin: auto; max-width: 70rem; padding: 1rem; color: #1a1a1a; background: #fff; font: 1rem/1.5 sans-serif; }}
h1 {{ font-size: 1.6rem; overflow-wrap: anywhere; }}
div, figure {{ margin: 2rem 0 .5rem; overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: .9rem; }}
th, td {{ padding: .3rem .5rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }}
th:first-child, td:first-child {{ text-align: left; }}
img {{ width: 100%; }}
</style>
<h1>{title}</h1>
<p>{where}</p>
<figure><img alt="Speed-up of the sparse model" src="data:image/png;base64,{image}">
<figcaption>Time of the dense model over that of the sparse one, both eager (solid) or both under torch.compile
(dashed). Bars reach from the 20 % to the 80 % quantile of the sparse times. Each point has its own plan, which
leaves dense what would lose, so that these curves do not fall below 1. Thin lines are the model with every layer
converted, also where that loses, computed from the times of the layers; a dotted line marks where such a line crosses
1: the break-even.</figcaption></figure>
<div><table><thead><tr>{head}</tr></thead>
<tbody>{body}</tbody></table></div>
"""


def table(rows: Sequence[Row]) -> str:
    """The rows as plain text."""
    cells = [list(_HEADINGS), *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(_HEADINGS))]
    lines = [
        "  ".join(
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in cells
    ]
    notes = [f"{_name(row)}: {outcome(row)}" for row in rows if outcome(row)]
    return "\n".join([*lines, *notes])


def outcome(row: Row) -> str:
    """Why a row has no time; empty if it has one."""
    if "failed" in row:
        return f"failed: {row['failed']}"
    if row.get("correct") is False:
        return f"WRONG: error {row['error']}, allowed {row['allowed']:.1e}; not timed"
    return ""


def write_report(directory: Path, rows: Sequence[Row], title: str) -> Path:
    """Write `speedup.png` and `report.html`, one page that needs no other file; return its path."""
    buffer = io.BytesIO()
    draw(rows).savefig(buffer, format="png", dpi=150)
    temporary = directory / ".speedup.png"
    temporary.write_bytes(buffer.getvalue())
    os.replace(temporary, directory / "speedup.png")
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in _cells(row)) + "</tr>\n" for row in rows)
    page = _PAGE.format(
        title=escape(title),
        where=escape(_where(rows[0])),
        image=base64.b64encode(buffer.getvalue()).decode("ascii"),
        head="".join(f"<th>{escape(heading)}</th>" for heading in _HEADINGS),
        body=body,
    )
    write_text(directory / "report.html", page)
    return directory / "report.html"


def break_even(points: Sequence[tuple[float, float]]) -> list[float]:
    """Where a line through (x, speed-up), ordered by x, rises above 1."""
    found = []
    for (x, y), (next_x, next_y) in pairwise(points):
        if y < 1 <= next_y:
            found.append(x + (1 - y) / (next_y - y) * (next_x - x))
    return found


def draw(rows: Sequence[Row]) -> Figure:
    """Speed-up against sparsity if there are several, otherwise against batch and length."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 4.6), layout="constrained", facecolor="white")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e5e5e5", linewidth=0.8)
    axes.axhline(1, color="black", linewidth=1)
    axes.text(1.0, 1.0, "break-even", transform=axes.get_yaxis_transform(), ha="right", va="bottom", fontsize=9)
    sparsities = sorted({row["sparsity"] for row in rows})
    sizes = list(dict.fromkeys((row["batch"], row["sequence"]) for row in rows))
    by_sparsity = len(sparsities) > 1
    series: dict[tuple[str, str], list[tuple[float, Row]]] = {}
    for row in rows:
        kind, mode = row["contender"].split()
        if kind != "sparse" or row.get(f"speedup_over_{mode}") is None:
            continue
        size = (row["batch"], row["sequence"])
        group = f"{row['dtype']}, {size[0]} x {size[1]}" if by_sparsity else row["dtype"]
        series.setdefault((group, mode), []).append((100 * row["sparsity"] if by_sparsity else sizes.index(size), row))
    groups = list(dict.fromkeys(group for group, _ in series))
    for (group, mode), points in series.items():
        color = _PALETTE[groups.index(group) % len(_PALETTE)]
        _draw_series(axes, f"{group}, {mode}", points, mode, color, by_sparsity)
    if by_sparsity:
        axes.set_xlabel("zeros in the pruned layers, %")
    else:
        axes.set_xticks(range(len(sizes)), [f"{batch} x {sequence}" for batch, sequence in sizes])
        axes.set_xlabel(f"batch x sequence   ({sparsities[0]:.1%} zeros in the linear layers)")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("times as fast as the dense model")
    if series:
        figure.legend(loc="outside upper left", ncols=3, frameon=False, fontsize=9)
    return figure


def _draw_series(
    axes: Axes, label: str, points: list[tuple[float, Row]], mode: str, color: str, by_sparsity: bool
) -> None:
    points = sorted(points, key=lambda point: point[0])
    x = [place for place, _ in points]
    y = [float(row[f"speedup_over_{mode}"]) for _, row in points]
    below = [value * (1 - row["median_ms"] / row["p80_ms"]) for value, (_, row) in zip(y, points, strict=True)]
    above = [value * (row["median_ms"] / row["p20_ms"] - 1) for value, (_, row) in zip(y, points, strict=True)]
    dashes, marker = _STYLES[mode]
    axes.errorbar(
        x, y, yerr=(below, above), label=label, color=color, linestyle=dashes, marker=marker, capsize=3, elinewidth=1
    )
    if by_sparsity and mode == "eager":
        forced = [float(row["forced_speedup"]) for _, row in points]
        axes.plot(x, forced, color=color, linewidth=0.8)
        for place in break_even(list(zip(x, forced, strict=True))):
            axes.axvline(place, color=color, linestyle=":", linewidth=1)
            axes.text(place, 0.02, f" {place:.0f} %", transform=axes.get_xaxis_transform(), color=color, fontsize=9)


_HEADINGS = (
    "model",
    "dtype",
    "batch",
    "seq",
    "zeros",
    "density",
    "layers",
    "median ms",
    "p20..p80",
    "seq/s",
    "x dense eager",
    "x dense compiled",
    "peak MiB",
    "weights MiB",
)


def _cells(row: Row) -> list[str]:
    def shown(key: str, form: str) -> str:
        return _ABSENT if row.get(key) is None else form.format(row[key])

    choices = " ".join(f"{count} {choice}" for choice, count in row.get("choices", {}).items())
    return [
        row["contender"],
        row["dtype"],
        str(row["batch"]),
        str(row["sequence"]),
        f"{row['sparsity']:.1%}",
        shown("density", "{:.1%}"),
        choices or _ABSENT,
        shown("median_ms", "{:.2f}"),
        f"{row['p20_ms']:.2f}..{row['p80_ms']:.2f}" if "p20_ms" in row else _ABSENT,
        shown("sequences_per_s", "{:.1f}"),
        shown("speedup_over_eager", "{:.2f}"),
        shown("speedup_over_compiled", "{:.2f}"),
        shown("peak_mib", "{:.1f}"),
        shown("weights_mib", "{:.0f}"),
    ]


def _name(row: Row) -> str:
    return f"{row['contender']}, {row['dtype']}, {row['batch']} x {row['sequence']}, {row['sparsity']:.0%}"


def _where(row: Row) -> str:
    count = f", {row['threads']} threads" if row["threads"] else ""
    return f"{row['device']}{count}; torch {row['torch']}, transformers {row['transformers']}; {row['date']}"
