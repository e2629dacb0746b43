"""`SDPruneQuantizationConfig`: how a checkpoint stores its layers, as config.json tells it."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Self

from transformers.utils.quantization_config import QuantizationConfigMixin

from sdprune.formats.form import Form
from sdprune.formats.record import LayerRecord

METHOD, VERSION = "sdprune", 1
FIELD = "config.json: quantization_config"

_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")


class SDPruneQuantizationConfig(QuantizationConfigMixin):
    """How the layers of a checkpoint are stored; not how it was trained (that is `SDPruneConfig`).

    Written by `sdprune.export`. Made by hand it converts any dense checkpoint with zeros while it is loaded:
    `AutoModel.from_pretrained(name, quantization_config=SDPruneQuantizationConfig(block_shape=(32, 32)))`.

    Args:
        modules: the stored layers by name, as `LayerRecord.to_dict` writes them.
        version: of the format: 1.
        block_shape: only while converting: (out, in) of the blocks to look for; None: whichever shape fits the zeros
            best, or narrower matrices where rows or columns are empty.
        max_density: only while converting: a layer stays dense if more of it than this would be kept.
        quant_method: "sdprune".
        rest_sha256: digest of the tensors that do not belong to `modules`, as they stand in the files; None: not known.

    Raises:
        ValueError: an unknown version or field, or a malformed value; the message names it.
    """

    def __init__(
        self,
        modules: Mapping[str, Any] | None = None,
        version: int = VERSION,
        *,
        block_shape: Sequence[int] | None = None,
        max_density: float = 0.5,
        quant_method: str = METHOD,
        rest_sha256: str | None = None,
        **unknown: Any,
    ) -> None:
        if type(version) is not int or version != VERSION:
            raise ValueError(
                f"{FIELD}.version must be {VERSION}, got {version!r}; a later version of sdprune may know it"
            )
        if quant_method != METHOD:
            raise ValueError(f"{FIELD}.quant_method must be {METHOD!r}, got {quant_method!r}")
        for name in unknown:
            raise ValueError(
                f"{FIELD} has an unknown field {name!r}; known are modules, version, quant_method, rest_sha256"
            )
        if modules is not None and not isinstance(modules, Mapping):
            raise ValueError(f"{FIELD}.modules must be an object, got {modules!r}")
        if rest_sha256 is not None and not (
            isinstance(rest_sha256, str) and re.fullmatch(r"[0-9a-f]{64}", rest_sha256)
        ):
            raise ValueError(f"{FIELD}.rest_sha256 must be 64 hexadecimal digits, got {rest_sha256!r}")
        if isinstance(max_density, bool) or not isinstance(max_density, int | float) or not 0.0 <= max_density <= 1.0:
            raise ValueError(f"max_density must lie between 0 and 1, got {max_density!r}")
        self.quant_method = METHOD  # type: ignore[assignment]  # its own enumeration knows only built-in methods
        self.version, self.rest_sha256 = version, rest_sha256
        self.modules = {name: dict(values) for name, values in (modules or {}).items() if _checked(name, values)}
        self.block_shape = None if block_shape is None else Form.blocks(block_shape).block_shape
        self.max_density = max_density
        _ = self.records

    @classmethod
    def of(cls, records: Mapping[str, LayerRecord]) -> Self:
        """Return the tag of these layers."""
        return cls({name: record.to_dict() for name, record in records.items()})

    @property
    def records(self) -> dict[str, LayerRecord]:
        """The stored layers, checked."""
        found = {name: LayerRecord.from_dict(values, _field(name)) for name, values in self.modules.items()}
        for name, record in found.items():
            if record.consumer is None:
                continue
            consumer = found.get(record.consumer)
            if consumer is None or consumer.removed != "columns" or consumer.kept[1] != record.kept[0]:
                text = "must be a layer whose columns are removed, as many as the rows of this one"
                raise ValueError(f"{_field(name)}.consumer {text}, got {record.consumer!r}")
        return found

    def take(self, records: Mapping[str, LayerRecord]) -> None:
        """Hold these layers from now on, no wish to convert others, and no digest: the tensors may change."""
        self.modules = {name: record.to_dict() for name, record in records.items()}
        self.block_shape = self.rest_sha256 = None

    def to_dict(self) -> dict[str, Any]:
        """Return what config.json holds."""
        values = {"quant_method": METHOD, "version": self.version, "modules": self.modules}
        return values if self.rest_sha256 is None else values | {"rest_sha256": self.rest_sha256}


def _field(name: str) -> str:
    return f"{FIELD}.modules[{name!r}]"


def _checked(name: Any, values: Any) -> bool:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"{FIELD}.modules must be named as layers are (letters, digits, _ and .), got {name!r}")
    if not isinstance(values, Mapping):
        raise ValueError(f"{_field(name)} must be an object, got {values!r}")
    return True
