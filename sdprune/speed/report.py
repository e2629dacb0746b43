"""What `sdprune benchmark` shows: a table, a picture of every contender's speed, and a page that holds both."""

from collections.abc import Sequence
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

from sdprune.speed.opponents import INT8, OPPONENT, OURS
from sdprune.text import (
    ABSENT,
    GREY,
    PALETTE,
    Axes,
    Figure,
    aligned,
    html_table,
    new_figure,
    picture,
    save_png,
    write_page,
)

Row = dict[str, Any]

_MARKERS = "os^Dv"
_OTHERS: dict[str, dict[str, Any]] = {  # how the lines to cross are drawn
    INT8: {"color": "black", "linewidth": 1.8},
    "ONNX Runtime float32": {"color": GREY, "linewidth": 1, "linestyle": "--"},
    "dense bfloat16": {"color": GREY, "linewidth": 1, "linestyle": ":"},
    "dense compiled": {"color": GREY, "linewidth": 1, "linestyle": "-."},
}

_COLUMNS = {  # heading -> how a row fills it
    "model": "{contender}",
    "dtype": "{dtype}",
    "batch": "{batch}",
    "seq": "{sequence}",
    "zeros": "{sparsity:.1%}",
    "density": "{density:.1%}",
    "layers": "{layers}",
    "median ms": "{median_ms:.2f}",
    "p20..p80": "{p20_ms:.2f}..{p80_ms:.2f}",
    "seq/s": "{sequences_per_s:.1f}",
    "x dense eager": "{speedup_over_eager:.2f}",
    "x dense compiled": "{speedup_over_compiled:.2f}",
    "x ORT int8": "{speedup_over_int8:.2f}",
    "error": "{error:.0e}",
    "peak MiB": "{peak_mib:.1f}",
    "weights MiB": "{weights_mib:.0f}",
}
_CAPTION = """Time of the dense model, eager, over that of each contender, which took turns with it. Lines with
markers are ours; bars reach from the 20 % to the 80 % quantile of their times. Lines without are the dense model as
others run it: zeros pay where ours lies above them all. Each point has its own plan, which leaves dense what would
lose, so that "sparse eager" does not fall below 1. The thin line of its colour is the model with every layer converted,
also where that loses, computed from the times of the layers; a dotted line marks where it crosses 1: the
break-even."""


def table(rows: Sequence[Row]) -> str:
    """The rows as plain text."""
    name = "{contender}, {dtype}, {batch} x {sequence}, {sparsity:.0%}"
    notes = [f"{name.format(**row)}: {outcome(row)}" for row in rows if outcome(row)]
    return "\n".join([aligned(_table(rows)), *notes])


def outcome(row: Row) -> str:
    """Why a row has no time, or an opponent's less than it seems; empty if all is well."""
    if "failed" in row:
        return f"failed: {row['failed']}"
    if row.get("correct") is False:
        timed = "timed all the same" if row["role"] == OPPONENT else "not timed"
        return f"WRONG: error {row['error']}, allowed {row['allowed']:.1e}; {timed}"
    return ""


def breaks(row: Row) -> bool:
    """Whether what a row tells is a fault of this package: opponents may be missing, and may err."""
    return row["role"] != OPPONENT and bool(outcome(row))


def write_report(directory: Path, rows: Sequence[Row], title: str) -> Path:
    """Write `speedup.png` and `report.html`, one page that needs no other file; return its path."""
    png = save_png(draw(rows), directory / "speedup.png")
    parts = [f"<p>{escape(_where(rows[0]))}</p>\n", picture(png, "Speed of every contender", _CAPTION)]
    return write_page(directory / "report.html", title, *parts, html_table(_table(rows)))


def break_even(points: Sequence[tuple[float, float]]) -> list[float]:
    """Where a line through (x, speed-up), ordered by x, rises above 1."""
    found = []
    for (x, y), (next_x, next_y) in pairwise(points):
        if y < 1 <= next_y:
            found.append(x + (1 - y) / (next_y - y) * (next_x - x))
    return found


def draw(rows: Sequence[Row]) -> Figure:
    """Speed against sparsity, a panel a dtype and size, if there are several sparsities, otherwise against size."""
    sparsities = sorted({row["sparsity"] for row in rows})
    sizes = list(dict.fromkeys((row["batch"], row["sequence"]) for row in rows))
    by_sparsity = len(sparsities) > 1
    panels: dict[str, dict[str, list[tuple[float, Row]]]] = {}  # title -> contender -> points
    for row in rows:
        if row.get("speedup_over_eager") is None:
            continue
        size = (row["batch"], row["sequence"])
        title, x = (f"{row['dtype']}, {size[0]} x {size[1]}", 100 * row["sparsity"])
        if not by_sparsity:
            title, x = row["dtype"], sizes.index(size)
        panels.setdefault(title, {}).setdefault(row["contender"], []).append((x, row))
    figure, axes = new_figure(1.8 + 2.8 * max(len(panels), 1), max(len(panels), 1))
    for panel, (title, lines) in zip(axes, panels.items(), strict=False):
        _draw_panel(panel, title, lines)
    axes[0].set_ylim(0, None)  # of all panels, so after the last one
    if by_sparsity:
        axes[-1].set_xlabel("zeros in the pruned layers, %")
    else:
        axes[-1].set_xticks(range(len(sizes)), [f"{batch} x {sequence}" for batch, sequence in sizes])
        axes[-1].set_xlabel(f"batch x sequence   ({sparsities[0]:.1%} zeros in the linear layers)")
    named = {label: line for panel in axes for line, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    if named:
        figure.legend(named.values(), named, loc="outside upper left", ncols=3, frameon=False, fontsize=9)
    return figure


def _draw_panel(axes: Axes, title: str, lines: dict[str, list[tuple[float, Row]]]) -> None:
    axes.set_title(title, loc="left", fontsize=10)
    axes.grid(axis="y", color="#e5e5e5", linewidth=0.8)
    axes.axhline(1, color="black", linewidth=1)
    axes.text(1.0, 1.0, "break-even", transform=axes.get_yaxis_transform(), ha="right", va="bottom", fontsize=9)
    ours = [name for name, points in lines.items() if points[0][1]["role"] == OURS]
    for name, points in lines.items():
        points.sort(key=lambda point: point[0])
        if name in ours:
            _draw_ours(axes, name, points, ours.index(name))
        elif name in _OTHERS:
            y = [row["speedup_over_eager"] for _, row in points]
            axes.plot([place for place, _ in points], y, label=name, **_OTHERS[name])
    axes.set_ylabel("times as fast as dense")


def _draw_ours(axes: Axes, name: str, points: Sequence[tuple[float, Row]], index: int) -> None:
    x = [place for place, _ in points]
    y = [float(row["speedup_over_eager"]) for _, row in points]
    below = [value * (1 - row["median_ms"] / row["p80_ms"]) for value, (_, row) in zip(y, points, strict=True)]
    above = [value * (row["median_ms"] / row["p20_ms"] - 1) for value, (_, row) in zip(y, points, strict=True)]
    color, marker = PALETTE[index % len(PALETTE)], _MARKERS[index % len(_MARKERS)]
    axes.errorbar(x, y, yerr=(below, above), label=name, color=color, marker=marker, capsize=3, elinewidth=1)
    if len({row["sparsity"] for _, row in points}) > 1 and name == "sparse eager":
        forced = [float(row["forced_speedup"]) for _, row in points]
        axes.plot(x, forced, color=color, linewidth=0.8)
        for place in break_even(list(zip(x, forced, strict=True))):
            axes.axvline(place, color=color, linestyle=":", linewidth=1)
            axes.text(place, 0.02, f" {place:.0f} %", transform=axes.get_xaxis_transform(), color=color, fontsize=9)


def _table(rows: Sequence[Row]) -> list[list[str]]:
    return [list(_COLUMNS), *([_cell(row, form) for form in _COLUMNS.values()] for row in rows)]


def _cell(row: Row, form: str) -> str:
    """Fill `form` by the row; what was not measured, and only that, is None or absent."""
    known = {key: value for key, value in row.items() if value is not None}
    if choices := row.get("choices"):
        known["layers"] = " ".join(f"{count} {choice}" for choice, count in choices.items())
    try:
        return form.format_map(known)
    except KeyError as missing:
        if missing.args[0] in ("contender", "dtype", "batch", "sequence", "sparsity"):
            raise
        return ABSENT


def _where(row: Row) -> str:
    count = f", {row['threads']} threads" if row["threads"] else ""
    names = ("torch", "transformers", "onnxruntime")
    versions = ", ".join(f"{name} {row[name]}" for name in names if row[name])
    return f"{row['device']}{count}; {versions}; {row['date']}"
