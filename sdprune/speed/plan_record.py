"""The record of a plan: what was measured of every layer, and the form that was chosen."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from sdprune.files import write_text
from sdprune.formats.form import DENSE
from sdprune.speed.timing import Times
from sdprune.text import aligned


@dataclass(frozen=True)
class Candidate:
    """One form of a layer.

    Args:
        density: the fraction of the multiplications that are left.
        times: milliseconds of one call, on the input that the layer gets in the model.
    """

    density: float
    times: Times


@dataclass(frozen=True)
class LayerPlan:
    """What was measured of one layer, and what it becomes.

    Args:
        name: dotted name of the layer.
        shape: (out, in) of its weight.
        sparsity: fraction of exact zeros.
        tokens: rows of its input; 0 if the model did not call it.
        calls: how often the model calls it in one forward pass.
        choice: "dense", "narrow" (empty rows and columns dropped), a block shape such as "32x32", or one of these with
            "-int8" behind it.
        candidates: what was timed, by the same names; empty where the zeros allow no other form than "dense".
    """

    name: str
    shape: tuple[int, int]
    sparsity: float
    tokens: int
    calls: int
    choice: str
    candidates: Mapping[str, Candidate]

    @property
    def density(self) -> float:
        """Of the chosen form."""
        return self.candidates[self.choice].density if self.candidates else 1.0

    @property
    def speedup(self) -> float:
        """Time of the dense layer over that of the chosen form."""
        if not self.candidates:
            return 1.0
        return self.candidates[DENSE].times.median / self.candidates[self.choice].times.median

    @property
    def saved_ms(self) -> float:
        """What the choice saves in one forward pass of the model."""
        if not self.candidates:
            return 0.0
        return self.calls * (self.candidates[DENSE].times.median - self.candidates[self.choice].times.median)


@dataclass(frozen=True)
class Plan:
    """The form of every planned layer of a model on one device; `print(plan)` shows it as a table.

    Args:
        layers: the layers with exact zeros, and of a plan for int8 all, in the model's order.
        device: name of the device that was measured.
        dtype: of the weights, such as "float32".
        threads: of the CPU; None on a GPU.
        torch: version.
        dense: milliseconds of a forward pass of the whole model as it was.
        converted: the same with the choices applied; None if nothing is converted.
    """

    layers: tuple[LayerPlan, ...]
    device: str
    dtype: str
    threads: int | None
    torch: str
    dense: Times
    converted: Times | None

    @property
    def choices(self) -> dict[str, str]:
        """The layers that are converted, and into what."""
        return {layer.name: layer.choice for layer in self.layers if layer.choice != DENSE}

    @property
    def expected_speedup(self) -> float:
        """Of the whole model, if each layer saves what was measured alone."""
        saved = sum(layer.saved_ms for layer in self.layers)
        return self.dense.median / max(self.dense.median - saved, 1e-9)

    @property
    def forced_speedup(self) -> float:
        """Of the whole model, if each layer took its fastest other form, also where that loses: 1 is break-even."""
        saved = 0.0
        for layer in self.layers:
            others = [form.times.median for name, form in layer.candidates.items() if name != DENSE]
            if others:
                saved += layer.calls * (layer.candidates[DENSE].times.median - min(others))
        return self.dense.median / max(self.dense.median - saved, 1e-9)

    @property
    def measured_speedup(self) -> float:
        """Of the whole model, as measured; 1.0 if nothing is converted."""
        return 1.0 if self.converted is None else self.dense.median / self.converted.median

    def unconverted(self) -> Self:
        """Return the same plan with every layer left as it is."""
        return replace(self, layers=tuple(replace(layer, choice=DENSE) for layer in self.layers), converted=None)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return the plan that `to_dict` gave.

        Raises:
            ValueError: keys that are missing or unknown.
        """
        try:
            layers = [
                LayerPlan(
                    **dict(layer)
                    | {
                        "shape": tuple(layer["shape"]),
                        "candidates": {
                            name: Candidate(found["density"], Times(**found["times"]))
                            for name, found in layer["candidates"].items()
                        },
                    }
                )
                for layer in values["layers"]
            ]
            times = {name: values[name] and Times(**values[name]) for name in ("dense", "converted")}
            return cls(**dict(values) | times | {"layers": tuple(layers)})
        except (KeyError, TypeError) as error:
            raise ValueError(f"values must be what Plan.to_dict gives: {error}") from None

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        write_text(Path(path), json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            ValueError: the file holds no plan.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{str(path)!r} is not JSON ({error})") from None
        if not isinstance(values, dict):
            raise ValueError(f"{str(path)!r} holds no plan")
        return cls.from_dict(values)

    def __str__(self) -> str:
        rows = [["layer", "out x in", "tokens", "zeros", "choice", "density", "dense ms", "choice ms", "speed-up"]]
        for layer in self.layers:
            forms = [layer.candidates.get(name) for name in (DENSE, layer.choice)]
            times = [f"{form.times.median:.3f}" if form else "" for form in forms]
            numbers = [str(layer.tokens), f"{layer.sparsity:.1%}", layer.choice, f"{layer.density:.1%}", *times]
            rows.append([layer.name, f"{layer.shape[0]} x {layer.shape[1]}", *numbers, f"{layer.speedup:.2f}"])
        where = f"{self.device}, {self.dtype}" + (f", {self.threads} threads" if self.threads else "")
        kind = "pruned layers" if all(layer.sparsity for layer in self.layers) else "layers"
        return (
            f"{aligned(rows)}\n{len(self.choices)} of {len(self.layers)} {kind} are converted on {where}: "
            f"expected {self.expected_speedup:.2f} times as fast, measured {self.measured_speedup:.2f}"
        )
