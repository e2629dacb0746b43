"""`write_report`: one page that shows what was pruned, what it cost, and how the training went."""

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd

from sdprune.text import ABSENT, GREY, PALETTE, Axes, Figure, html_table, new_figure, picture, save_png, write_page

_MARKERS, _DASHES = "osD^vPX", ("-", "--", "-.", ":")

_COLUMNS = {  # key in the metrics -> heading, format, factor
    "sparsity": ("zeros, % of the linear layers", "{:.1f}", 100),
    "model_sparsity": ("zeros, % of the whole model", "{:.1f}", 100),
    "standard_error": ("standard error, points", "{:.1f}", 100),
    "difference_to_magnitude": ("difference to magnitude, points", "{:+.1f}", 100),
    "reload_max_difference": ("reload difference", "{:.1g}", 1),
    "speedup": ("measured speed-up, times", "{:.2f}", 1),
}

_CAPTIONS = {
    "score_against_sparsity": """Score of every pruned model on the test rows: further right, fewer weights are
left. Bars, where drawn, are one standard error. Grey lines are models without pruning, an arrow one below the
range. The vertical axis does not begin at 0: compare the numbers, not the heights.""",
    "score_over_steps": """Score on the validation rows, one panel a run, the others in pale grey. A thin vertical
line is a pruning step; the shaded stairs (right axis) are the zeros in the pruned layers. A dip after a line that
closes again is damage that the training repaired.""",
    "density_per_layer": """Share of its weights that each layer kept, from the first layer (top) to the last. A
longer bar is a layer that was spared; equal bars mean that every layer was pruned alike.""",
    "diagnostics_over_steps": """Two measures of the representation on a held-out part. Class separability is the
scatter between the classes over that within them: higher is easier to tell apart. Signal-to-noise compares the pruned
model's representation with its teacher's: each 10 dB less is ten times the squared difference. Thin vertical lines are
the pruning steps of the first run.""",
}

_DIAGNOSTICS = {  # key in the log -> axis
    "separability": "class separability",
    "signal_to_noise": "signal-to-noise, dB",
}
_SPEED_NOTE = """<p class="small">Speed-up is the time of the dense model over that of the pruned one on the machine
of this run. Zeros alone do not make a dense product faster; only kernels that skip them do.</p>
"""


@dataclass(frozen=True)
class RunRecord:
    """One run as the report shows it."""

    name: str  # "SDP-CC", "magnitude", "dense, same steps"
    history: tuple[dict[str, Any], ...]  # rows of metrics.jsonl; validation rows have `eval_` keys
    moments: tuple[int, ...]  # steps at which it pruned; () for none
    densities: dict[str, float]  # layer name -> fraction of weights kept at the end, in model order; {} for none


def write_report(
    directory: Path, metrics: dict[str, Any], runs: Sequence[RunRecord], *, title: str, notes: Sequence[str] = ()
) -> Path:
    """Write `report.html`, one page that needs no other file, and its figures as PNG files; return its path.

    Args:
        directory: where to write; made if absent.
        metrics: what `metrics.json` holds; the first score of `metrics["dense"]` is the one that is drawn.
        runs: the trainings behind the numbers.
        title: heading of the page.
        notes: sentences to end with.
    """
    scores = list(metrics.get("dense") or ["accuracy"])
    models = _models(metrics, scores)
    names = dict.fromkeys([*models.label[models.pruned], *(run.name for run in runs)])
    colors = {name: PALETTE[index % len(PALETTE)] for index, name in enumerate(names)}
    figures = {
        "score_against_sparsity": _score_against_sparsity(models, scores[0], colors),
        "score_over_steps": _score_over_steps(runs, scores[0], colors),
        "density_per_layer": _density_per_layer(runs, colors),
        "diagnostics_over_steps": _diagnostics_over_steps(runs, colors),
    }
    parts = [f"<p>{escape(_summary(models, scores[0]))}</p>\n", html_table(_table(models, scores)), _SPEED_NOTE]
    for name, figure in figures.items():
        if figure is not None:
            png = save_png(figure, directory / f"{name}.png")
            parts.append(picture(png, f"Figure: {name.replace('_', ' ')}", _CAPTIONS[name]))
    if notes:
        parts.append("<h2>Notes</h2>\n<ul>\n" + "".join(f"<li>{escape(note)}</li>\n" for note in notes) + "</ul>\n")
    return write_page(directory / "report.html", title, *parts)


def _models(metrics: Mapping[str, Any], scores: Sequence[str]) -> pd.DataFrame:
    """Return a row a model, those without pruning first; what is absent or no finite number is NaN."""
    baselines = metrics.get("baselines") or {}
    references = {
        "dense": metrics.get("dense"),
        "dense, same steps": metrics.get("dense_same_steps"),
        "TF-IDF": baselines.get("tfidf"),
        "majority class": baselines.get("majority"),
    }
    rows = [{"label": label, "pruned": False} | row for label, row in references.items() if row]
    for run in metrics.get("runs") or ():
        rows.append(run | {"label": str(run.get("method") or "pruned"), "pruned": True})
    numbers = [*_COLUMNS, "target_sparsity", *scores]
    models = pd.DataFrame(rows, columns=["label", "pruned", "structure", *numbers]).astype({"pruned": bool})
    models[numbers] = models[numbers].apply(pd.to_numeric, errors="coerce").replace([math.inf, -math.inf], math.nan)
    models["sparsity"] = models.sparsity.fillna(models.target_sparsity)
    models["target_sparsity"] = models.target_sparsity.fillna(models.sparsity)
    models["structure"] = models.structure.astype(object).fillna(ABSENT).astype(str)
    several = models.groupby("label").structure.transform("nunique") > 1
    models.loc[several, "label"] += ", " + models.structure[several]
    return models


def _text(name: str) -> str:
    """Keep matplotlib from reading `name` as a formula, or from leaving it out of a legend."""
    return name.replace("$", r"\$").lstrip("_")


def _message(text: str) -> Figure:
    """Return the figure that stands where there is nothing to draw."""
    figure, (axes,) = new_figure(1.2)
    axes.text(0.5, 0.5, text, ha="center", va="center", color=GREY)
    axes.set_axis_off()
    return figure


def _score_against_sparsity(models: pd.DataFrame, score: str, colors: Mapping[str, str]) -> Figure:
    """Draw a line a method over the sparsity of its layers, and the models without pruning across."""
    pruned = models[models.pruned].dropna(subset=["sparsity", score])
    if pruned.empty:
        return _message("no pruned model was scored")
    figure, (axes,) = new_figure(4.6)
    axes.grid(axis="y", color="#e5e5e5", linewidth=0.8)
    for (label, group), marker in zip(pruned.groupby("label", sort=False), _MARKERS * 9, strict=False):
        x, y, error = (100 * group.sort_values("sparsity")[["sparsity", score, "standard_error"]].to_numpy()).T
        style: dict[str, Any] = {"color": colors[str(label)], "marker": marker, "linewidth": 1.8, "zorder": 3}
        axes.errorbar(x, y, yerr=error, capsize=3, elinewidth=1, label=_text(str(label)), **style)
    _draw_references(axes, 100 * models[~models.pruned].set_index("label")[score].dropna())
    axes.margins(x=0.06)
    axes.set(xlabel="zeros in the pruned layers, %", ylabel=f"{score}, %   (axis begins at {axes.get_ylim()[0]:.1f})")
    figure.legend(loc="outside upper left", ncols=4, frameon=False)
    return figure


def _draw_references(axes: Axes, references: "pd.Series[float]") -> None:
    """Draw a line and a label for each reference; no line where it would flatten the curves from far below."""
    for (label, value), dashes in zip(references.items(), _DASHES, strict=False):
        low, high = axes.get_ylim()
        if str(label).startswith("dense") or value > low - (high - low):
            axes.axhline(value, color=GREY, linestyle=dashes, linewidth=1.2, zorder=1)
    low, high = axes.get_ylim()
    place: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "va": "center", "color": GREY, "fontsize": 9}
    position = -math.inf
    for label, value in references.sort_values().items():
        position = max(value, low, position + (high - low) * 0.05)  # labels above each other, not on each other
        axes.text(1.01, position, f"{label} {value:.1f}" + (" ↓" if value < low else ""), **place)


def _score_over_steps(runs: Sequence[RunRecord], score: str, colors: Mapping[str, str]) -> Figure:
    """Draw a panel a run: its validation scores, its pruning steps, its sparsity, the other runs in grey."""
    shown = [(run, values) for run in runs if len(values := 100 * _by_step(run, f"eval_{score}"))]
    if not shown:
        return _message("no validation scores were recorded")
    figure, panels = new_figure(0.9 + 1.8 * len(shown), len(shown))
    for axes, (run, values) in zip(panels, shown, strict=True):
        _shade_sparsity(axes, run)
        axes.vlines(run.moments, 0, 1, transform=axes.get_xaxis_transform(), color="#999999", linewidth=0.6)
        for _, other in shown:
            axes.plot(other.index, other, color="#bbbbbb", linewidth=1)
        axes.plot(values.index, values, color=colors[run.name], linewidth=1.8, marker="o", markersize=3.5)
        axes.set_title(_text(run.name), loc="left", fontsize=10, fontweight="bold", color=colors[run.name])
    panels[-1].set_xlabel("optimizer steps")
    # two lines, or the figure of a single run cuts them off
    figure.supylabel(f"{score}, %\n(axis does not begin at 0)", fontsize=10, multialignment="center")
    return figure


def _diagnostics_over_steps(runs: Sequence[RunRecord], colors: Mapping[str, str]) -> Figure | None:
    """Draw a panel a diagnostic, a line a run, over the optimizer steps; None where no run measured any."""
    found = {
        key: lines
        for key in _DIAGNOSTICS
        if (lines := [(run, values) for run in runs if len(values := _by_step(run, key))])
    }
    if not found:
        return None
    figure, panels = new_figure(0.9 + 2.2 * len(found), len(found), sharey=False)
    for axes, (key, lines) in zip(panels, found.items(), strict=True):
        axes.vlines(lines[0][0].moments, 0, 1, transform=axes.get_xaxis_transform(), color="#999999", linewidth=0.6)
        for (run, values), marker in zip(lines, _MARKERS * 9, strict=False):
            style: dict[str, Any] = {"color": colors[run.name], "marker": marker, "markersize": 3.5, "linewidth": 1.8}
            axes.plot(values.index, values, label=_text(run.name), **style)
        axes.set_ylabel(_DIAGNOSTICS[key], fontsize=10)
        axes.legend(frameon=False, fontsize=9)
    panels[-1].set_xlabel("optimizer steps")
    return figure


def _by_step(run: RunRecord, key: str) -> "pd.Series[float]":
    """Return what the history holds under `key` by step; of equal steps the last."""
    rows = pd.DataFrame(list(run.history), columns=["step", key]).apply(pd.to_numeric, errors="coerce").dropna()
    values: pd.Series[float] = rows.drop_duplicates("step", keep="last").set_index("step")[key]
    return values.sort_index()


def _shade_sparsity(axes: Axes, run: RunRecord) -> None:
    """Shade the sparsity behind the scores: it rises at a pruning step, to what the next row of the log says."""
    levels = 100 * _by_step(run, "sparsity")
    if levels.empty or not run.moments:
        return
    stairs = levels.reindex([moment + 1 for moment in run.moments], method="bfill").fillna(levels.iloc[-1])
    right = axes.twinx()
    x, y = [0, *run.moments, levels.index[-1]], [0, *stairs, levels.iloc[-1]]
    right.fill_between(x, y, step="post", color="#ececec", linewidth=0)
    right.set_ylim(0, 100)
    right.set_ylabel("zeros, %", fontsize=9, color=GREY)
    right.tick_params(labelsize=9, labelcolor=GREY, length=0)
    right.spines[:].set_visible(False)
    axes.set_zorder(right.get_zorder() + 1)
    axes.patch.set_visible(False)


def _density_per_layer(runs: Sequence[RunRecord], colors: Mapping[str, str]) -> Figure:
    """Draw a group of bars a layer, a bar a run, from the first layer down."""
    runs = [run for run in runs if run.densities]
    layers = list(dict.fromkeys(layer for run in runs for layer in run.densities))
    if not layers:
        return _message("no run recorded its layers")
    figure, (axes,) = new_figure(1.3 + max(0.17, 0.07 + 0.05 * len(runs)) * len(layers))
    thickness = 0.8 / len(runs)
    for index, run in enumerate(runs):
        kept = 100 * pd.to_numeric(pd.Series(run.densities).reindex(layers)).fillna(0.0)
        places = [place - 0.4 + thickness * (index + 0.5) for place in range(len(layers))]
        axes.barh(places, kept, height=thickness, color=colors[run.name], label=_text(run.name))
    for place, layer in enumerate(layers):
        if int((re.findall(r"\d+", layer) or "0")[0]) % 2:  # bands tell one Transformer block from the next
            axes.axhspan(place - 0.5, place + 0.5, color="#f2f2f2", linewidth=0, zorder=0)
    prefix = os.path.commonprefix([layer[: layer.rfind(".") + 1] for layer in layers])  # noqa: RUF071
    names = [_text(layer[prefix.rfind(".") + 1 :][-48:]) for layer in layers]
    axes.set_yticks(range(len(layers)), names, fontsize=7)
    axes.set(ylim=(len(layers) - 0.5, -0.5), xlabel="weights kept, %")
    axes.tick_params(axis="x", top=True, labeltop=True)
    figure.legend(loc="outside upper left", ncols=4, frameon=False)
    return figure


def _percent(value: float) -> str:
    return ABSENT if pd.isna(value) else f"{100 * value:.1f} %"


def _summary(models: pd.DataFrame, score: str) -> str:
    """Say in one sentence what the highest sparsity costs."""
    references = models[~models.pruned].set_index("label")[score].map(_percent)
    dense = f"the dense model reaches {references.get('dense', ABSENT)}"
    if "dense, same steps" in references:
        dense += f" ({references['dense, same steps']} after as many further steps)"
    pruned = models[models.pruned].dropna(subset=["sparsity", score])
    if pruned.empty:
        return f"No pruned model was scored; {dense} {score}."
    top = pruned[pruned.target_sparsity == pruned.target_sparsity.max()]
    reached = " and ".join(f"{row.label} reaches {_percent(row[score])}" for _, row in top.iterrows())
    return (
        f"With {_percent(top.sparsity.min())} of the weights of the linear layers at zero "
        f"({_percent(top.model_sparsity.min())} of the whole model), {reached} {score}; {dense}."
    )


def _table(models: pd.DataFrame, scores: Sequence[str]) -> list[list[str]]:
    """Return the models as rows of cells below a head; a column without any value is left out."""
    columns = [["model", *models.label], ["structure", *models.structure]]
    numbers = {score: (f"{score.replace('_', ' ')}, %", "{:.1f}", 100) for score in scores} | _COLUMNS
    for key, (heading, form, factor) in numbers.items():
        if models[key].notna().any():
            cells = (ABSENT if pd.isna(cell) else form.format(factor * cell) for cell in models[key])
            columns.append([heading, *cells])
    return [list(row) for row in zip(*columns, strict=True)]
