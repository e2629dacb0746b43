"""What `sdprune benchmark` shows: a table, a picture of the speed-ups with break-even, and a page that holds both."""

from collections.abc import Sequence
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

from sdprune.text import ABSENT, PALETTE, Axes, Figure, aligned, html_table, new_figure, picture, save_png, write_page

Row = dict[str, Any]

_STYLES = {"eager": ("-", "o"), "compiled": ("--", "s")}

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
    "peak MiB": "{peak_mib:.1f}",
    "weights MiB": "{weights_mib:.0f}",
}
_CAPTION = """Time of the dense model over that of the sparse one, both eager (solid) or both under torch.compile
(dashed). Bars reach from the 20 % to the 80 % quantile of the sparse times. Each point has its own plan, which
leaves dense what would lose, so that these curves do not fall below 1. Thin lines are the model with every layer
converted, also where that loses, computed from the times of the layers; a dotted line marks where such a line crosses
1: the break-even."""


def table(rows: Sequence[Row]) -> str:
    """The rows as plain text."""
    name = "{contender}, {dtype}, {batch} x {sequence}, {sparsity:.0%}"
    notes = [f"{name.format(**row)}: {outcome(row)}" for row in rows if outcome(row)]
    return "\n".join([aligned(_table(rows)), *notes])


def outcome(row: Row) -> str:
    """Why a row has no time; empty if it has one."""
    if "failed" in row:
        return f"failed: {row['failed']}"
    if row.get("correct") is False:
        return f"WRONG: error {row['error']}, allowed {row['allowed']:.1e}; not timed"
    return ""


def write_report(directory: Path, rows: Sequence[Row], title: str) -> Path:
    """Write `speedup.png` and `report.html`, one page that needs no other file; return its path."""
    png = save_png(draw(rows), directory / "speedup.png")
    parts = [f"<p>{escape(_where(rows[0]))}</p>\n", picture(png, "Speed-up of the sparse model", _CAPTION)]
    return write_page(directory / "report.html", title, *parts, html_table(_table(rows)))


def break_even(points: Sequence[tuple[float, float]]) -> list[float]:
    """Where a line through (x, speed-up), ordered by x, rises above 1."""
    found = []
    for (x, y), (next_x, next_y) in pairwise(points):
        if y < 1 <= next_y:
            found.append(x + (1 - y) / (next_y - y) * (next_x - x))
    return found


def draw(rows: Sequence[Row]) -> Figure:
    """Speed-up against sparsity if there are several, otherwise against batch and length."""
    figure, (axes,) = new_figure(4.6)
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
        color = PALETTE[groups.index(group) % len(PALETTE)]
        _draw_series(axes, f"{group}, {mode}", points, mode, color, by_sparsity)
    if by_sparsity:
        axes.set_xlabel("zeros in the pruned layers, %")
    else:
        axes.set_xticks(range(len(sizes)), [f"{batch} x {sequence}" for batch, sequence in sizes])
        axes.set_xlabel(f"batch x sequence   ({sparsities[0]:.1%} zeros in the linear layers)")
    axes.set(ylim=(0, None), ylabel="times as fast as the dense model")
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
    return f"{row['device']}{count}; torch {row['torch']}, transformers {row['transformers']}; {row['date']}"
