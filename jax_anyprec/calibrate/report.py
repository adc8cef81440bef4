"""What a calibration did with each layer."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from ..plan import describe
from ..quantization import Quantization


@dataclasses.dataclass(frozen=True)
class CalibratedLayer:
    """One layer.

    Attributes:
      path: names on the way to it, joined with "/".
      quantization: how it is held now.
      rows: inputs that were seen.
      error: what rounding its weights does to its outputs, squared, as a part of their squares;
        None if it was not calibrated.
      fallback: why its weight was rounded to nearest instead; None if it was calibrated, or taken
        as it was packed before.
    """

    path: str
    quantization: Quantization
    rows: int
    error: float | None
    fallback: str | None

    def row(self) -> dict[str, Any]:
        """Everything, as values that JSON has."""
        return {
            "path": self.path,
            "becomes": describe(self.quantization),
            "rows": self.rows,
            "error": self.error,
            "fallback": self.fallback,
        }


@dataclasses.dataclass(frozen=True)
class CalibrationReport:
    """What `calibrate_model` did. Printed, it is a table.

    Attributes:
      model: that was given, changed in place; a packed layer if it was a single layer. Of a Linen
        module, the `Quantized` one.
      layers: in the order in which they were calibrated.
    """

    model: Any
    layers: tuple[CalibratedLayer, ...]

    def rows(self) -> list[dict[str, Any]]:
        """A dict for each layer, which ``pandas.DataFrame(report.rows())`` takes."""
        return [layer.row() for layer in self.layers]

    def to_json(self) -> str:
        return json.dumps({"layers": self.rows()}, indent=2)

    def __str__(self) -> str:
        width = max(len(layer.path) for layer in self.layers)
        kinds = max(len(describe(layer.quantization)) for layer in self.layers)
        return "\n".join(
            f"{layer.path:{width}}  {describe(layer.quantization):{kinds}}  {_outcome(layer)}"
            for layer in self.layers
        )


def _outcome(layer: CalibratedLayer) -> str:
    if layer.fallback is not None:
        return f"rounded to nearest: {layer.fallback}"
    if layer.error is None:
        return "as it was packed"
    return f"error {layer.error:.5f} on {layer.rows:,} inputs"
