"""The table that a run prints at its end."""

from collections.abc import Mapping, Sequence
from typing import Any

from sdprune.text import aligned


def print_table(metrics: Mapping[str, Any]) -> None:
    """Print the scores of every model on the test rows, those without pruning first, and what pruning brought."""
    dense = "dense" if metrics.get("trained_head", True) else "dense, untrained head"
    references = {**metrics["baselines"], dense: metrics["dense"]}
    if "dense_same_steps" in metrics:
        references["dense, same steps"] = metrics["dense_same_steps"]

    def row(
        label: str, scores: Mapping[str, float], sparsity: str = "", difference: str = "", speedup: str = ""
    ) -> Any:
        return label, sparsity, *(f"{scores[name]:.1%}" for name in metrics["dense"]), difference, speedup

    rows = [("", "sparsity", *metrics["dense"], "reload diff", "speed-up")]
    rows += [row(label, scores) for label, scores in references.items()]
    for run in metrics["runs"]:
        numbers = (f"{run['sparsity']:.1%}", f"{run['reload_max_difference']:.1g}", f"{run['speedup']:.2f}x")
        rows.append(row(run["method"], run, *numbers))
        if "int8" in run:
            rows.append(row("  as int8", run["int8"]))
    print(f"\n{aligned(rows)}")
    if languages := metrics.get("dense_languages"):  # those that were not trained on, one column each
        first = next(iter(metrics["dense"]))
        rows = [(f"{first}, zero-shot", *languages)]
        for label, found in [("dense", languages), *((run["method"], run["languages"]) for run in metrics["runs"])]:
            rows.append((label, *(f"{found[language][first]:.1%}" for language in languages)))
        print(f"\n{aligned(rows)}")
    print(f"\nSparsity is that of the pruned linear layers. {speed_note(metrics['runs'])}")
    if opponents := next((run["opponents"] for run in metrics["runs"] if run.get("opponents")), None):
        times = ", ".join(f"{value:.2f}x in {name}" for name, value in opponents.items())
        print(f"The dense model itself reached {times}.")
    unreached = max((run.get("unreached", 0.0) for run in metrics["runs"]), default=0.0)
    if unreached:
        print(f"{unreached:.1%} of the model's parameters were out of reach: its layers hold more than linear ones.")


def speed_note(runs: Sequence[Mapping[str, Any]]) -> str:
    """Say what the speed-ups in the rows of a run are of."""
    forms = {run.get("form") for run in runs}
    if not forms - {"dense weights with zeros"}:
        return "Zeros alone do not speed up a dense product: with dense weights, what differs from 1 was noise."
    layers = "with sparse or narrower layers, as `import sdprune` loads the exported model"
    return f"The speed-up was measured on this machine {layers}{' where any are' if len(forms) > 1 else ''}."
