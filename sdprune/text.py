"""What people read: tables in plain text, Markdown and HTML, pictures, and pages that hold both."""

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdprune.files import write_bytes, write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes as Axes
    from matplotlib.figure import Figure as Figure
else:
    Axes = Figure = Any  # matplotlib is imported where something is drawn

Rows = Sequence[Sequence[str]]  # of a table, its head first

# Okabe and Ito's colours, which colour-blind readers tell apart; without their yellow, too pale on white
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
GREY, ABSENT = "#666666", "—"

_HEAD = """<!DOCTYPE html><html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>TITLE</title>
<style>
body { margin: auto; max-width: 70rem; padding: 1rem; color: #1a1a1a; background: #fff; font: 1rem/1.5 sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; overflow-wrap: anywhere; }
div, figure { margin: 2rem 0 .5rem; overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; line-height: 1.3; }
th, td { padding: .4rem .5rem; text-align: right; vertical-align: bottom; border-bottom: 1px solid #ddd; }
th:first-child, th:nth-child(2), td:nth-child(2) { text-align: left; }
tbody th, td { font-weight: normal; white-space: nowrap; }
img { width: 100%; min-width: 36rem; }
figcaption, .small { font-size: .9rem; color: #444; }
</style>
<h1>TITLE</h1>
"""


def aligned(rows: Rows) -> str:
    """Return a table as lines of plain text: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ([first.ljust(widths[0]), *map(str.rjust, others, widths[1:])] for first, *others in rows)
    return "\n".join("  ".join(line).rstrip() for line in lines)


def markdown_table(rows: Rows) -> str:
    """Return a table in Markdown."""
    head, *body = ["| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in rows]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


def html_table(rows: Rows) -> str:
    """Return a table in HTML; the first column and the first two heads are set to the left by `write_page`."""
    head, *body = [[escape(cell) for cell in row] for row in rows]
    heads = "".join(f"<th>{cell}</th>" for cell in head)
    lines = "".join(f"<tr><th>{name}</th><td>{'</td><td>'.join(cells)}</td></tr>\n" for name, *cells in body)
    return f"<div><table><thead><tr>{heads}</tr></thead>\n<tbody>{lines}</tbody></table></div>\n"


def new_figure(height: float, count: int = 1, *, sharey: bool = True) -> tuple[Figure, list[Axes]]:
    """Return a figure of panels below each other, with no more frame than carries numbers."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, height), layout="constrained", facecolor="white")
    axes = list(figure.subplots(count, 1, sharex=True, sharey=sharey, squeeze=False)[:, 0])
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=9)
    return figure, axes


def save_png(figure: Figure, path: Path, dpi: int = 150) -> bytes:
    """Write `figure` to `path`, where a reader sees the old file or the new one, never a part; return its bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    write_bytes(path, buffer.getvalue())
    return buffer.getvalue()


def picture(png: bytes, alt: str, caption: str) -> str:
    """Return HTML that holds a PNG; `caption` is HTML itself."""
    data = base64.b64encode(png).decode("ascii")
    image = f'<img alt="{escape(alt)}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}\n<figcaption>{caption}</figcaption></figure>\n"


def write_page(path: Path, title: str, *parts: str) -> Path:
    """Write a page that needs no other file: `title` in plain text above `parts` in HTML; return its path."""
    write_text(path, _HEAD.replace("TITLE", escape(title)) + "".join(parts))
    return path
