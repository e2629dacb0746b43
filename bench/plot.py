"""Picture of a grid's newest rows: how many times faster ours is than each baseline."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bench.results import Row, newest_rows, read_rows

BAR = 0.8  # width of all bars of one shape together


def plot(results: Path, name: str, device: str | None = None) -> Path:
    """Draw `<results>/<device>/<name>.jsonl` into a PNG beside it.

    Raises:
        ValueError: no device, or several and none is named, has timed rows of this grid.
    """
    found = sorted(path for path in results.glob(f"{device or '*'}/{name}.jsonl"))
    if len(found) != 1:
        raise ValueError(f"device must name one folder of {results} with {name}.jsonl, found {[str(p) for p in found]}")
    rows = [row for row in newest_rows(read_rows(found[0])) if "median_ms" in row]
    if not rows:
        raise ValueError(f"{found[0]} holds no timed rows")
    target = found[0].with_suffix(".png")
    temporary = target.with_name(f".{target.name}")
    draw(rows).savefig(temporary, format="png", dpi=120, bbox_inches="tight")
    temporary.replace(target)
    return target


def draw(rows: Sequence[Row]) -> Figure:
    """One panel a dtype, one group of bars a shape, one bar a baseline; above 1 ours is faster."""
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    shapes = sorted({tuple(row["shape"]) for row in rows})
    baselines = [name for name in dict.fromkeys(row["contender"] for row in rows) if name != "ours"]
    figure = Figure(figsize=(max(6.0, 0.6 * len(shapes) + 2), 4.0 * len(dtypes)))
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(dtypes), 1, squeeze=False)[:, 0]
    for panel, dtype in zip(panels, dtypes, strict=True):
        for index, baseline in enumerate(baselines):
            chosen = [row for row in rows if row["dtype"] == dtype and row["contender"] == baseline]
            width = BAR / len(baselines)
            places = [shapes.index(tuple(row["shape"])) - BAR / 2 + (index + 0.5) * width for row in chosen]
            heights = [row["ratio_to_ours"] - 1 for row in chosen]
            panel.bar(places, heights, width, bottom=1, label=baseline)
        panel.axhline(1, color="black", linewidth=0.8)
        panel.set_yscale("log")
        panel.set_ylabel(f"times as long as ours, {dtype}")
        panel.set_xticks(range(len(shapes)), ["x".join(map(str, shape)) for shape in shapes], rotation=45, ha="right")
    panels[0].legend(ncols=5, loc="lower right", bbox_to_anchor=(1, 1), frameon=False)  # above: bars may be anywhere
    last = rows[-1]
    panels[0].set_title(
        f"{last['op']}, {last['device']}, torch {last['torch']}, {last['commit']}",
        fontsize="medium",
        loc="left",
        pad=26,
    )
    figure.tight_layout()
    return figure
