"""The report is drawn from made-up histories; what is checked is what a reader sees and what lies on disk."""

from __future__ import annotations

import ast
import copy
import itertools
import math
import re
import struct
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from sdprune.analysis import report
from sdprune.analysis.report import RunRecord, write_report

PNGS = ("score_against_sparsity.png", "score_over_steps.png", "density_per_layer.png")
MOMENTS = (0, 20, 40)
VOID = {"meta", "img"}
HOSTILE = """<script>alert("x")</script> & 'R$ 5 to $6' {0} {title}"""


class Page(HTMLParser):
    """Collects the texts of every element and checks that every element is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)
        assert self.open == ["html"]  # its end tag may be left out

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.texts.setdefault(tag, []).append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts[self.open[-1]][-1] += data


def history(fall: float) -> tuple[dict[str, Any], ...]:
    rows: list[dict[str, Any]] = []
    for step in range(10, 81, 10):
        pruned = sum(moment < step for moment in MOMENTS)
        rows.append({"step": step, "loss": 0.5, "loss_task": 0.3, "sparsity": 0.3 * pruned})
        rows.append({"step": step, "eval_accuracy": 0.9 - fall * pruned, "eval_loss": 0.4})
    return tuple(rows)


def record(name: str, fall: float = 0.01, layers: int = 2) -> RunRecord:
    parts = ("attention.query", "attention.key", "output")
    names = [f"bert.encoder.layer.{index}.{part}" for index in range(layers) for part in parts]
    return RunRecord(name, history(fall), MOMENTS, {layer: 0.1 + 0.01 * place for place, layer in enumerate(names)})


def row(method: str, sparsity: float, accuracy: float | None, **more: Any) -> dict[str, Any]:
    return {
        "method": method,
        "structure": "unstructured",
        "target_sparsity": sparsity,
        "sparsity": sparsity,
        "model_sparsity": 0.8 * sparsity,
        "accuracy": accuracy,
        "macro_f1": accuracy,
        "reload_max_difference": 0.0,
        "speedup": 1.01,
    } | more


METRICS: dict[str, Any] = {
    "dense": {"accuracy": 0.9, "macro_f1": 0.89},
    "dense_same_steps": {"accuracy": 0.905, "macro_f1": 0.895},
    "baselines": {"majority": {"accuracy": 0.5, "macro_f1": 0.33}, "tfidf": {"accuracy": 0.82, "macro_f1": 0.81}},
    "runs": [
        row(method, level, 0.9 - loss * level, standard_error=0.007, difference_to_magnitude=difference)
        for method, loss, difference in (("SDP-CC", 0.04, 0.0361), ("magnitude", 0.08, None))
        for level in (0.5, 0.75, 0.9)
    ],
}
RUNS = (record("SDP-CC"), record("magnitude", 0.03), RunRecord("dense, same steps", history(0.0), (), {}))


def size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def test_two_methods_at_three_sparsities(tmp_path: Path) -> None:
    path = write_report(tmp_path / "new" / "folder", METRICS, RUNS, title="Movie reviews", notes=["One.", "Two."])
    assert path == tmp_path / "new" / "folder" / "report.html"
    assert sorted(item.name for item in path.parent.iterdir()) == sorted([*PNGS, "report.html"])
    assert all(size(path.parent / name)[0] == 1200 for name in PNGS)
    page = Page(path.read_text(encoding="utf-8"))
    assert page.texts["h1"] == page.texts["title"] == ["Movie reviews"]
    assert page.texts["p"][0] == (
        "With 90.0 % of the weights of the linear layers at zero (72.0 % of the whole model), SDP-CC reaches 86.4 % "
        "and magnitude reaches 82.8 % accuracy; the dense model reaches 90.0 % (90.5 % after as many further steps)."
    )
    assert page.texts["li"] == ["One.", "Two."]
    assert len(page.texts["figcaption"]) == 3
    cells = page.texts["td"]
    assert ["unstructured", "86.4", "86.4", "90.0", "72.0", "0.7", "+3.6", "0", "1.01"] in [
        cells[start : start + 9] for start in range(0, len(cells), 9)
    ]
    for heading in ("zeros, % of the linear layers", "zeros, % of the whole model", "majority class", "SDP-CC"):
        assert heading in page.texts["th"]


def test_page_needs_nothing_beside_it(tmp_path: Path) -> None:
    text = write_report(tmp_path, METRICS, RUNS, title="t").read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>")
    page = Page(text)
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 3
    for attributes in images:
        assert attributes["alt"]
        assert (attributes["src"] or "").startswith("data:image/png;base64,")
    assert not {"script", "link", "iframe", "a"} & {tag for tag, _ in page.tags}
    assert not re.search(r"https?://|url\(|@import", text)


def test_metrics_are_left_as_they_were_and_writing_again_replaces(tmp_path: Path) -> None:
    before = copy.deepcopy(METRICS)
    write_report(tmp_path, METRICS, RUNS, title="first")
    path = write_report(tmp_path, METRICS, RUNS, title="second")
    assert before == METRICS
    assert "second" in path.read_text(encoding="utf-8")
    assert len(list(tmp_path.iterdir())) == 4


def test_single_run_without_anything_optional(tmp_path: Path) -> None:
    metrics = {"dense": {"matthews": 0.5}, "runs": [{"method": "SDP-CC", "matthews": 0.4, "sparsity": 0.5}]}
    path = write_report(tmp_path, metrics, [RunRecord("SDP-CC", (), (), {})], title="t")
    page = Page(path.read_text(encoding="utf-8"))
    assert "SDP-CC reaches 40.0 % matthews; the dense model reaches 50.0 %." in page.texts["p"][0]
    assert "(— of the whole model)" in page.texts["p"][0]
    assert page.texts["th"] == ["model", "structure", "matthews, %", "zeros, % of the linear layers", "dense", "SDP-CC"]
    assert "li" not in page.texts
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("empty", [{}, {"dense": None, "baselines": None, "runs": None}, {"dense": {}, "runs": []}])
def test_nothing_known(tmp_path: Path, empty: dict[str, Any]) -> None:
    page = Page(write_report(tmp_path, empty, [], title="t").read_text(encoding="utf-8"))
    assert page.texts["p"][0] == "No pruned model was scored; the dense model reaches — accuracy."


def test_values_that_are_no_numbers(tmp_path: Path) -> None:
    metrics = copy.deepcopy(METRICS)
    metrics["dense"]["macro_f1"] = None
    metrics["dense_same_steps"] = None
    metrics["runs"] = [
        row("SDP-CC", 0.5, None, speedup=None, structure=None, standard_error=None),
        row("SDP-CC", 0.9, 0.8, speedup=math.inf, model_sparsity=math.nan, structure=None),
        row("magnitude", 0.9, 0.7, reload_max_difference=None) | {"sparsity": None},
    ]
    rows = ({"step": 5}, {"step": 9, "sparsity": None, "eval_accuracy": None}, {"step": 9, "eval_accuracy": 0.8}, {})
    runs = [RunRecord("SDP-CC", rows, (4,), {"a": 0.5}), RunRecord("magnitude", (), (4, 8), {"b.c": 0.5})]
    page = Page(write_report(tmp_path, metrics, runs, title="t").read_text(encoding="utf-8"))
    assert "SDP-CC reaches 80.0 % and magnitude reaches 70.0 % accuracy" in page.texts["p"][0]
    assert "nan" not in "".join(page.texts["td"]) + page.texts["p"][0]
    assert "inf" not in "".join(page.texts["td"])
    assert "measured speed-up, times" in page.texts["th"]  # the third run has one


def test_structures_of_one_method_are_told_apart(tmp_path: Path) -> None:
    metrics = {
        "dense": {"accuracy": 0.9},
        "runs": [row("SDP-CC", 0.5, 0.8), row("SDP-CC", 0.5, 0.7, structure="block")],
    }
    page = Page(write_report(tmp_path, metrics, [], title="t").read_text(encoding="utf-8"))
    assert {"SDP-CC, unstructured", "SDP-CC, block"} <= set(page.texts["th"])


def test_odd_names_are_escaped(tmp_path: Path) -> None:
    metrics = {"dense": {"accuracy": 0.9}, "runs": [row(HOSTILE, 0.5, 0.8, structure=HOSTILE)]}
    runs = [RunRecord(HOSTILE, history(0.01), MOMENTS, {HOSTILE: 0.5, "_x$y": 0.2, "w" * 300: 0.1})]
    page = Page(write_report(tmp_path, metrics, runs, title=HOSTILE, notes=[HOSTILE]).read_text(encoding="utf-8"))
    assert "script" not in page.texts
    assert page.texts["h1"] == page.texts["title"] == page.texts["li"] == [HOSTILE]
    assert HOSTILE in page.texts["th"]
    assert HOSTILE in page.texts["td"]
    assert HOSTILE in page.texts["p"][0]


def test_height_follows_the_number_of_layers(tmp_path: Path) -> None:
    heights = []
    for layers in (12, 50):
        write_report(tmp_path, METRICS, [record("SDP-CC", layers=layers)], title="t")
        heights.append(size(tmp_path / "density_per_layer.png")[1])
    assert heights[0] > 36 * 0.15 * 150
    assert heights[1] - heights[0] == pytest.approx(114 * 0.17 * 150, abs=2)


def test_no_temporary_file_stays_when_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*paths: object) -> None:
        raise OSError("disk is gone")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk is gone"):
        write_report(tmp_path, METRICS, RUNS, title="t")
    assert list(tmp_path.iterdir()) == []


def test_sparsity_rises_at_the_pruning_steps() -> None:
    figure, (axes,) = report.new_figure(2.0)
    report._shade_sparsity(axes, record("SDP-CC"))
    stairs = figure.axes[1].collections[0].get_paths()[0].vertices
    for moment, before, after in ((20, 30, 60), (40, 60, 90)):
        assert {round(y) for x, y in stairs if x == moment and y} == {before, after}


def test_labels_of_close_references_do_not_overlap() -> None:
    models = report._models(METRICS, ["accuracy", "macro_f1"])
    figure = report._score_against_sparsity(models, "accuracy", {"SDP-CC": "k", "magnitude": "k"})
    figure.draw_without_rendering()
    boxes = sorted((text.get_window_extent().extents for text in figure.axes[0].texts), key=lambda box: box[1])
    assert len(boxes) == 4
    assert all(below[3] <= above[1] + 1 for below, above in itertools.pairwise(boxes))
    shown = [text.get_text() for text in figure.axes[0].texts]
    assert "majority class 50.0 ↓" in shown
    drawn = [line.get_ydata()[0] for line in figure.axes[0].get_lines() if line.get_color() == report.GREY]
    assert drawn == pytest.approx([90.0, 90.5, 82.0])  # the majority class would flatten the curves


def test_layer_names_lose_what_all_begin_with() -> None:
    figure = report._density_per_layer([record("SDP-CC")], {"SDP-CC": "k"})
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels[:3] == ["0.attention.query", "0.attention.key", "0.output"]


def test_matplotlib_is_imported_lazily_and_without_pyplot() -> None:
    tree = ast.parse(Path(report.__file__).read_text(encoding="utf-8"))
    plain = [item for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom) for item in node.names]
    assert not any("matplotlib" in ast.unparse(node) for node in tree.body if isinstance(node, ast.ImportFrom))
    assert "matplotlib" not in {item.name for item in plain}
    assert "pyplot" not in ast.unparse(tree)


def test_diagnostics_are_drawn_where_they_were_measured(tmp_path, monkeypatch):
    drawn = {}

    def keep(figure, path):
        drawn[path.stem] = figure
        return b""

    monkeypatch.setattr(report, "save_png", keep)
    write_report(tmp_path, METRICS, RUNS, title="none")
    assert "diagnostics_over_steps" not in drawn
    rows = ({"step": 4, "separability": 0.5, "signal_to_noise": 12.0}, {"step": 8, "separability": 0.25})
    measured = RunRecord("SDP-CC", (*history(0.01), *rows), MOMENTS, {})
    write_report(tmp_path, METRICS, (measured, *RUNS[1:]), title="some")
    separability, noise = drawn["diagnostics_over_steps"].axes
    assert separability.lines[0].get_xydata().tolist() == [[4, 0.5], [8, 0.25]]
    assert noise.lines[0].get_xydata().tolist() == [[4, 12.0]]
    assert (separability.get_ylabel(), noise.get_ylabel()) == ("class separability", "signal-to-noise, dB")
    assert "signal-to-noise compares" in (tmp_path / "report.html").read_text().lower()
