"""Every recipe of the package once: the same model, data, steps and sparsity. `python -m bench recipes`.

The model is all-MiniLM-L6-v2 fine-tuned on movie reviews, as in `sdprune demo`. All that a recipe decides stays its own
but the length and the target, so the table compares short runs: methods that need thousands of steps look worse here.
"""

import importlib.metadata
import json
import math
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from bench.machine import ROOT, commit, device_name, slug_of
from bench.results import Row, append_rows, read_rows
from sdprune.analysis.measures import class_separability, signal_to_noise
from sdprune.config import SDPruneConfig
from sdprune.distillation.features import body_output, gather, token_mask
from sdprune.files import write_text
from sdprune.masking.select import select_linears
from sdprune.recipe import RECIPE_NAME, Recipe, recipe_names
from sdprune.runs.demo import FULL, QUICK, DemoSize, fine_tuned
from sdprune.runs.predict import best_device, collate
from sdprune.runs.run import run
from sdprune.runs.workbench import TRAINED, Workbench, load_workbench
from sdprune.training.arguments import settled
from sdprune.training.folder import METRICS_NAME, SCORES_NAME

SPARSITY = 0.7
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {  # row -> recipe, and what differs from it
    "dense, same steps": ("sdp-cc", {"target_sparsity": 0.0, "distillation": None}),
    "no teacher": ("sdp-cc", {"distillation": None}),
    "sdp-cc, teacher target": ("sdp-cc", {"correlation_target": "teacher", "distillation_weight": 5.0}),  # as the demo
    "prune-then-distill, from largest": ("prune-then-distill", {"student_initialization": "largest"}),
}
NAMES = (*VARIANTS, *recipe_names())
COLUMNS = {  # heading -> key, format
    "recipe": ("recipe", "{}"),
    "sparsity": ("sparsity", "{:.1%}"),
    "linear weights left": ("kept", "{:.1%}"),
    "accuracy": ("accuracy", "{:.1%}"),
    "macro-F1": ("macro_f1", "{:.1%}"),
    "int8 accuracy": ("int8_accuracy", "{:.1%}"),
    "separability": ("separability", "{:.3f}"),
    "signal-to-noise, dB": ("signal_to_noise", "{:.1f}"),
    "training, min": ("minutes", "{:.1f}"),
}


def run_recipes(names: Sequence[str], output: Path, results: Path, *, quick: bool = False) -> list[Row]:
    """Run the recipes that `output` does not hold yet and append their rows; table and picture stand beside the rows.

    Args:
        names: of `NAMES`.
        output: a folder for the runs; an interrupted one goes on where it was.
        results: folder of the results; the rows go to its sub-folder of this device.
        quick: few rows and steps: a smoke test.

    Returns:
        The newest row of each recipe.
    """
    size = QUICK if quick else FULL
    bf16 = bool(settled(size.training).bf16)
    dense_folder = str(fine_tuned(size, bf16))
    workbench = load_workbench(dense_folder, size.data)
    dense: Any = workbench.classifier.model
    features = _mean_tokens(workbench, dense)
    path = results / slug_of(device_name(best_device())) / "recipes.jsonl"
    if not any(row["recipe"] == "dense" for row in read_rows(path)):
        scores = workbench.score(workbench.predict(dense, "testing dense"))
        row = {"recipe": "dense", "sparsity": 0.0, "kept": 1.0, **scores}
        append_rows(path, [row | _representation(workbench, features, features) | _stamp(workbench)])
    for name in tqdm(names, unit="recipe"):
        folder = output / name.replace(", ", "-").replace(" ", "-")
        finished = (folder / SCORES_NAME).exists()
        if finished and any(row["recipe"] == name for row in read_rows(path)):
            continue
        if finished:  # and interrupted before its row was written
            metrics = json.loads((folder / SCORES_NAME).read_text(encoding="utf-8"))
        else:
            recipe = recipe_of(name, dense_folder, size, bf16)
            metrics = run(recipe, folder, resume=(folder / RECIPE_NAME).exists())
        append_rows(path, [_row(name, folder, metrics, workbench, features) | _stamp(workbench)])
    return publish(path)


def publish(path: Path) -> list[Row]:
    """Write table and picture beside the rows, and return the newest row of each recipe."""
    newest = {row["recipe"]: row for row in read_rows(path)}
    rows = [newest[name] for name in ("dense", *NAMES) if name in newest]
    write_text(
        path.with_suffix(".md"), f"{_heading(rows)}\n{markdown(rows)}\n![Accuracy of every recipe](recipes.png)\n"
    )
    temporary = path.with_name(".recipes.png")
    draw(rows).savefig(temporary, format="png", dpi=120, bbox_inches="tight")
    temporary.replace(path.with_suffix(".png"))
    return rows


def _heading(rows: Sequence[Row]) -> str:
    last = rows[-1]
    error = (0.25 / last["test_rows"]) ** 0.5
    return f"""# Every recipe once, at {SPARSITY:.0%} sparsity and the length of the demo

`python -m bench recipes`: all-MiniLM-L6-v2 on movie reviews, {last["test_rows"]} test snippets (standard error at most
{error:.1%}), one seed. {last["device"]}, torch {last["torch"]}, transformers {last["transformers"]}.

- Every recipe has the same few optimizer steps (`{FULL.training.max_steps}`, a stage; recipes of several stages train
  that long in each) and keeps its own learning rate, criterion, scope and schedule. It was made for ten times as many:
  this table shows that each recipe runs and what a short run gives, not which method is best.
- Movement and soft movement rank by how training moves each weight. The model is already trained here: the scores of so
  few steps are mostly noise. Published runs have tens of thousands of steps.
- "linear weights left" counts the layers that are pruned, against those of the dense model: a student of
  prune-then-distill is dense and narrower.
- Separability is trace(S_between) / trace(S_within), signal-to-noise the teacher's power over that of the difference,
  both of the mean token of the last layer on the test rows; training is wall time, evaluation on the way included.
"""


def recipe_of(name: str, model: str, size: DemoSize, bf16: bool) -> Recipe:
    """Return the recipe of a row at the length of the demo."""
    base, changes = VARIANTS.get(name, (name, {}))
    values = Recipe.read_values(Recipe.find(base))
    steps = size.training.max_steps
    first = 1 / steps  # a recipe that trains before it prunes does so however short it is
    for key in {"start_ratio", "end_ratio"} & values.keys():
        values[key] = max(values[key], first)
    length = size.data.to_dict() | {
        "model": model,
        "max_steps": steps,
        "warmup_steps": min(steps // 10, values.get("warmup_steps", steps)),
        "freeze_embeddings": True,
        "eval_steps": max(1, steps // 4),
        "bf16": bf16,
        "target_sparsity": SPARSITY,
        "pruning_steps": min(values["pruning_steps"], max(1, steps // 4)),
    }
    return Recipe.from_dict(values | length | changes)


def _row(name: str, folder: Path, metrics: dict[str, Any], workbench: Workbench, features: Tensor) -> Row:
    found = metrics["runs"][-1]
    dense: Any = workbench.classifier.model
    model = type(dense).from_pretrained(folder / "model", dtype=torch.float32)
    return {
        "recipe": name,
        "method": found["method"],
        "sparsity": found["sparsity"],
        "kept": _linear_weights(model) / _linear_weights(dense),
        **{key: found[key] for key in workbench.task.metrics},
        **({"int8_accuracy": found["int8"]["accuracy"]} if "int8" in found else {}),
        **_representation(workbench, _mean_tokens(workbench, model), features),
        "minutes": _training_seconds(folder) / 60,
        "speedup": found["speedup"],
        "reload_max_difference": found["reload_max_difference"],
    }


def _linear_weights(model: nn.Module) -> int:
    """Weights that are not zero in the layers that are pruned."""
    weights = (model.get_parameter(f"{name}.weight") for name in select_linears(model, SDPruneConfig()))
    return sum(int(weight.count_nonzero()) for weight in weights)


@torch.inference_mode()
def _mean_tokens(workbench: Workbench, model: nn.Module) -> Tensor:
    """The mean over the unpadded tokens of the last hidden state, of every test row."""
    device, rows, size = best_device(), workbench.tested[TRAINED], workbench.batch_size
    model.to(device).eval()
    found = []
    for start in range(0, len(rows), size):
        chosen = [rows[index] for index in range(start, min(start + size, len(rows)))]
        inputs = collate(workbench.classifier.tokenizer, chosen, device)
        with body_output(model) as bodies:
            logits = model(**inputs).logits
        found.append(gather(["mean"], logits, bodies, token_mask(inputs, model))["mean"].cpu())
    return torch.cat(found)


def _representation(workbench: Workbench, features: Tensor, dense: Tensor) -> Row:
    """How well the classes stand apart in the features, and how much of the dense model's features is left in them."""
    labels = torch.as_tensor(workbench.task.test.labels)
    row: Row = {"separability": class_separability(features, labels)}
    noise = signal_to_noise(features, dense)
    return row | ({"signal_to_noise": noise} if math.isfinite(noise) else {})


def _training_seconds(folder: Path) -> float:
    """Wall time of all trainings of a run, their evaluations included."""
    logs = [json.loads(line) for path in folder.rglob(METRICS_NAME) for line in path.read_text().splitlines()]
    return float(sum(row.get("train_runtime", 0.0) for row in logs))


def _stamp(workbench: Workbench) -> Row:
    device = best_device()
    return {
        "test_rows": len(workbench.tested[TRAINED]),
        "device": device_name(device),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
        "commit": commit(ROOT, "sdp_kernels", "sdprune", "bench"),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a table."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---|" + "---:|" * (len(COLUMNS) - 1)]
    for row in rows:
        cells = (form.format(row[key]) if key in row else "" for key, form in COLUMNS.values())
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(rows: Sequence[Row]) -> Figure:
    """The accuracy of every recipe with its standard error, and a line where the dense model stands."""
    dense, *shown = rows
    shown.sort(key=lambda row: float(row["accuracy"]))
    scores = [float(row["accuracy"]) for row in shown]
    errors = [(row["accuracy"] * (1 - row["accuracy"]) / row["test_rows"]) ** 0.5 for row in shown]
    figure = Figure(figsize=(7.0, 0.3 * len(shown) + 1.2))
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.errorbar(scores, [row["recipe"] for row in shown], xerr=errors, fmt="o", color="#0072B2", ecolor="#666666")
    axes.axvline(dense["accuracy"], color="black", linewidth=0.8, label=f"dense, {dense['accuracy']:.1%}")
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_xlabel(f"accuracy on {dense['test_rows']} test rows, with its standard error; {SPARSITY:.0%} sparsity")
    axes.legend(frameon=False, loc="upper left")
    return figure
