"""Tables, pictures and pages: what is aligned, what is escaped, and that nothing half-written stays."""

import ast
import re
from pathlib import Path

import pytest

from sdprune import text
from sdprune.text import PALETTE, aligned, html_table, markdown_table, new_figure, picture, save_png, write_page

ROWS = [("layer", "zeros", "ms"), ("a.long.name", "9.0%", ""), ("b", "100.0%", "1.25")]


def test_columns_are_aligned():
    assert aligned(ROWS).splitlines() == [
        "layer         zeros    ms",
        "a.long.name    9.0%",
        "b            100.0%  1.25",
    ]
    assert aligned(ROWS[:1]) == "layer  zeros  ms"
    with pytest.raises(ValueError, match="argument 2 is"):
        aligned([("a", "b"), ("c",)])


def test_markdown():
    assert markdown_table([("name", "a|b"), ("x", "1")]).splitlines() == [
        r"| name | a\|b |",
        "|---|---|",
        "| x | 1 |",
    ]
    assert markdown_table([("name",)]) == "| name |\n|---|"


def test_a_page_escapes_what_is_no_html(tmp_path):
    path = write_page(tmp_path / "new" / "a.html", "<b> TITLE {0}", html_table([("a", "<i>"), ("&", "1")]), "<p>x</p>")
    page = path.read_text(encoding="utf-8")
    assert "<title>&lt;b&gt; TITLE {0}</title>" in page
    assert "<h1>&lt;b&gt; TITLE {0}</h1>" in page
    assert "<tr><th>a</th><th>&lt;i&gt;</th></tr>" in page
    assert "<tr><th>&amp;</th><td>1</td></tr>" in page
    assert page.endswith("<p>x</p>")


def test_a_picture_is_in_the_page_and_beside_it(tmp_path):
    figure, panels = new_figure(2.0, 3)
    assert len(panels) == 3
    png = save_png(figure, tmp_path / "new" / "a.png", dpi=50)
    assert png == (tmp_path / "new" / "a.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    assert 'alt="a &lt; b" src="data:image/png;base64,iVBOR' in picture(png, "a < b", "<i>caption</i>")
    assert "<figcaption><i>caption</i></figcaption>" in picture(png, "", "<i>caption</i>")


def test_a_picture_is_whole_or_absent(tmp_path, monkeypatch):
    figure, _ = new_figure(1.0)
    save_png(figure, tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()

    def fail(*paths):
        raise OSError("disk is gone")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk is gone"):
        save_png(figure, tmp_path / "a.png", dpi=50)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a.png", before)]


def test_colours_are_colours():
    assert len(set(PALETTE)) == len(PALETTE)
    assert all(re.fullmatch("#[0-9A-F]{6}", color) for color in PALETTE)


def test_matplotlib_is_imported_lazily():
    body = ast.parse(Path(text.__file__).read_text(encoding="utf-8")).body
    assert not any("matplotlib" in ast.unparse(node) for node in body if isinstance(node, ast.Import | ast.ImportFrom))
