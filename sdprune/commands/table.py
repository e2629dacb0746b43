"""The table that a run prints at its end."""

from __future__ import annotations

from typing import Any


def print_table(metrics: dict[str, Any]) -> None:
    names = list(metrics["dense"])
    dense = "dense" if metrics.get("trained_head", True) else "dense, untrained head"
    references = {**metrics["baselines"], dense: metrics["dense"]}
    if "dense_same_steps" in metrics:
        references["dense, same steps"] = metrics["dense_same_steps"]
    width = max(22, *(len(label) + 2 for label in (*references, *(row["method"] for row in metrics["runs"]))))
    print(
        f"\n{'':<{width}}{'sparsity':>10}"
        + "".join(f"{name:>12}" for name in names)
        + f"{'reload diff':>13}{'speed-up':>10}"
    )
    for label, scores in references.items():
        print(f"{label:<{width}}{'':>10}" + "".join(f"{scores[name]:>12.1%}" for name in names))
    for row in metrics["runs"]:
        print(
            f"{row['method']:<{width}}{row['sparsity']:>10.1%}"
            + "".join(f"{row[name]:>12.1%}" for name in names)
            + f"{row['reload_max_difference']:>13.1g}{row['speedup']:>9.2f}x"
        )
        if "int8" in row:
            print(f"{'  as int8':<{width}}{'':>10}" + "".join(f"{row['int8'][name]:>12.1%}" for name in names))
    _print_languages(metrics)
    print(
        "\nSparsity is that of the pruned linear layers. Zeros alone do not speed up a dense product: "
        "a speed-up of 1 is what to expect here."
    )


def _print_languages(metrics: dict[str, Any]) -> None:
    """Print the scores in the languages that were not trained on, one column each."""
    dense = metrics.get("dense_languages")
    if not dense:
        return
    first = next(iter(metrics["dense"]))
    print(f"\n{first + ', zero-shot':<32}" + "".join(f"{language:>10}" for language in dense))
    for label, scores in [("dense", dense), *((row["method"], row["languages"]) for row in metrics["runs"])]:
        print(f"{label:<32}" + "".join(f"{scores[language][first]:>10.1%}" for language in dense))
