"""The table that a run prints at its end."""

from __future__ import annotations

from typing import Any


def print_table(metrics: dict[str, Any]) -> None:
    names = list(metrics["dense"])
    print(
        f"\n{'':<22}{'sparsity':>10}"
        + "".join(f"{name:>12}" for name in names)
        + f"{'reload diff':>13}{'speed-up':>10}"
    )
    references = {**metrics["baselines"], "dense": metrics["dense"]}
    if "dense_same_steps" in metrics:
        references["dense, same steps"] = metrics["dense_same_steps"]
    for label, scores in references.items():
        print(f"{label:<22}{'':>10}" + "".join(f"{scores[name]:>12.1%}" for name in names))
    for row in metrics["runs"]:
        print(
            f"{row['method']:<22}{row['sparsity']:>10.1%}"
            + "".join(f"{row[name]:>12.1%}" for name in names)
            + f"{row['reload_max_difference']:>13.1g}{row['speedup']:>9.2f}x"
        )
    print(
        "\nSparsity is that of the pruned linear layers. Zeros alone do not speed up a dense product: "
        "a speed-up of 1 is what to expect here."
    )
