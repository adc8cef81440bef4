"""`Quantization`: how a dense layer is held and multiplied; rules, models and commands take it."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import numpy as np

from .format import check_bits
from .quantize import quantize
from .rotation import Rotation
from .tensor import SCALE_DTYPES, QuantizedTensor


@dataclasses.dataclass(frozen=True)
class Quantization:
    """How dense layers are held and multiplied. None in its place means float layers.

    Args:
      weights: bits of the weights, 1 to 8; or None to take them as a checkpoint stores them,
        without loss (only for loading).
      activations: bits of the activations, 1 to 8, or None to leave them in float.
      group_size: values along K that share a weight scale, a multiple of 32 that divides each
        layer's K; None for one scale per output channel. Must be None where `weights` is.
      rotate: rotate weights and activations by the largest Hadamard block that fits each K.
      scales: how weight scales are chosen, "mse" or "absmax"; None picks what measures better,
        see `scale_method`.
      act_scales: one activation scale per "token", or per token and "group".
      scale_dtype: of the weight scales: "float32", "float16" or "bfloat16".
      offsets: whether weights have an offset for each scale, so that their grid need not be centred
        on zero. Stored in `scale_dtype`, it costs as much as smaller groups do.
    """

    weights: int | None = None
    activations: int | None = 8
    group_size: int | None = None
    rotate: bool = False
    scales: Literal["mse", "absmax"] | None = None
    act_scales: Literal["group", "token"] = "group"
    scale_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    offsets: bool = False

    def __post_init__(self) -> None:
        for field in ("weights", "activations"):
            if (bits := getattr(self, field)) is not None:
                check_bits(bits, f"Quantization.{field}")
        group_size: Any = self.group_size
        if group_size is not None and (not _is_int(group_size) or group_size < 1):
            raise ValueError(
                f"Quantization.group_size must be a positive int or None, got {group_size!r}"
            )
        for field, allowed in (
            ("scales", ("mse", "absmax", None)), ("act_scales", ("group", "token")),
            ("scale_dtype", SCALE_DTYPES),
        ):  # fmt: skip
            if (value := getattr(self, field)) not in allowed:
                raise ValueError(f"Quantization.{field} must be one of {allowed}, got {value!r}")
        if self.weights is None and (
            self.group_size is not None or self.rotate or self.scales or self.offsets
        ):
            raise ValueError(
                "group_size, rotate and scales need Quantization.weights (1 to 8), and so do "
                "offsets; weights=None takes the checkpoint's own"
            )

    @property
    def scale_method(self) -> Literal["mse", "absmax"]:
        """`scales`, or what takes its place where it is None.

        That is "mse" for weights that are rotated, in groups, or of at most 3 bits. In whole
        columns of more bits, not rotated, outliers must not be clipped: "absmax". docs/encoders.md
        has the measurements.
        """
        if self.scales is not None:
            return self.scales
        few = self.weights is not None and self.weights <= 3
        return "mse" if self.rotate or self.group_size is not None or few else "absmax"

    def pack(self, kernel: jax.Array) -> QuantizedTensor:
        """Quantize a float matrix ``float[K, N]`` to `weights` bits."""
        if self.weights is None:
            raise ValueError("Quantization.weights must be set (1 to 8) to quantize float weights")
        return quantize(
            kernel,
            self.weights,
            group_size=self.group_size,
            scales=self.scale_method,
            offsets=self.offsets,
            rotation=self.rotation(kernel.shape[-2]),
            scale_dtype=self.scale_dtype,
        )

    def rotation(self, k: int) -> Rotation | None:
        """The rotation of weights and activations of K values, if there is one."""
        return Rotation.for_size(k) if self.rotate else None

    @property
    def layer_options(self) -> dict[str, Any]:
        """Arguments that every packed layer takes: how it multiplies."""
        return {"activations": self.activations, "act_scales": self.act_scales}


def _is_int(x: Any) -> bool:
    return isinstance(x, int | np.integer) and not isinstance(x, bool)
