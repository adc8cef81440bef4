"""Weights that are packed already, as a file has them: whether they fit layers, and how."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from ..nnx.convert import Found
from ..quantization import Quantization
from ..tensor import QuantizedTensor

PackedWeights = Mapping[str, QuantizedTensor]
"""By the paths of layers."""


def check_packed(packed: PackedWeights, layers: Sequence[Found]) -> None:
    """Raise ValueError unless each packed weight is of one of the layers, and of its shape."""
    by_path = {found.layer.path: found for found in layers}
    for path, tensor in packed.items():
        if path not in by_path:
            raise ValueError(f"packed has {path!r}, which is no layer that the rules quantize")
        layer = by_path[path].layer
        if not layer.is_single or tensor.shape != layer.matrix:
            wanted = layer.matrix if layer.is_single else "a single matrix"
            raise ValueError(
                f"packed[{path!r}] must be {wanted}, as its layer is, got {tensor.shape}"
            )


def held_as(tensor: QuantizedTensor, quantization: Quantization) -> Quantization:
    """How a layer holds a packed weight; what is no matter of weights is as in `quantization`."""
    return dataclasses.replace(
        quantization,
        weights=tensor.bits,
        group_size=None if tensor.groups == 1 else tensor.group_size,
        rotate=tensor.rotation is not None,
        scale_dtype=tensor.scales.dtype.name,
        offsets=tensor.offsets is not None,
    )
