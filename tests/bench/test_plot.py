"""The picture of a grid."""

from pathlib import Path

import pytest

from bench.plot import draw, plot
from bench.results import append_rows


def rows() -> list[dict[str, object]]:
    stamp = {"op": "loss", "device": "CPU", "torch": "2", "commit": "abc", "median_ms": 1.0}
    return [
        stamp | {"shape": list(shape), "dtype": dtype, "contender": contender, "ratio_to_ours": ratio}
        for shape in ((2, 3), (4, 5))
        for dtype in ("fp32", "bf16")
        for contender, ratio in (("ours", 1.0), ("eager", 2.0), ("compile", 0.5))
    ]


def test_one_panel_a_dtype_and_one_bar_a_baseline() -> None:
    panels = draw(rows()).axes
    assert len(panels) == 2
    assert [1 + patch.get_height() for patch in panels[0].patches] == [2.0, 2.0, 0.5, 0.5]


def test_plot_writes_a_picture_beside_the_rows(tmp_path: Path) -> None:
    path = tmp_path / "cpu" / "loss.jsonl"
    with pytest.raises(ValueError, match="device must name one folder"):
        plot(tmp_path, "loss")
    append_rows(path, [{**rows()[0], "skipped": "too large"}])
    append_rows(path, rows())
    target = plot(tmp_path, "loss")
    assert target == path.with_suffix(".png")
    assert target.read_bytes().startswith(b"\x89PNG")
    assert sorted(item.name for item in path.parent.iterdir()) == ["loss.jsonl", "loss.png"]
