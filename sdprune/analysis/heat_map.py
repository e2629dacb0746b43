"""A picture of where a model's weights are left: the density of blocks, one panel a layer."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from sdprune.text import save_png

COLUMNS = 6
LONGEST = 34  # letters of a name
Grid = Sequence[Sequence[float]]


def draw_heat_map(grids: Mapping[str, Grid], path: str | Path, *, title: str = "") -> Path:
    """Draw the density of every layer's cells into a PNG file, all on the same scale from 0 to 1.

    Args:
        grids: density of the cells of a layer, row by row, by its name.
        path: the file.
        title: above the panels.

    Returns:
        The file.

    Raises:
        ValueError: there is no layer to draw.
    """
    if not grids:
        raise ValueError("grids is empty: there is no layer to draw")
    from matplotlib.figure import Figure

    columns = min(COLUMNS, len(grids))
    rows = math.ceil(len(grids) / columns)
    figure = Figure(figsize=(2.3 * columns + 0.8, 2.2 * rows + 0.6), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    for panel in panels.flat:
        panel.set_axis_off()
    for panel, (name, grid) in zip(panels.flat, grids.items(), strict=False):
        image = panel.imshow(grid, vmin=0.0, vmax=1.0, cmap="viridis", aspect="auto", interpolation="nearest")
        panel.set_title(name if len(name) <= LONGEST else "…" + name[1 - LONGEST :], fontsize=6)
    assert image is not None
    figure.colorbar(image, ax=panels, label="density", shrink=min(1.0, 2.0 / rows))
    figure.suptitle(title, fontsize=9)
    save_png(figure, Path(path), dpi=110)
    return Path(path)
