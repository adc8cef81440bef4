"""Some columns of a packed matrix: output features, which stand side by side in it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

import jax_anyprec as ap


def take_columns(w: ap.QuantizedTensor, columns: Any) -> ap.QuantizedTensor:
    """Columns of ``w [..., K, N]`` in planes and NumPy arrays; `columns` is a slice or indices."""
    w = jax.tree.map(np.asarray, w).restore()
    return dataclasses.replace(
        w,
        planes=w.planes[..., columns, :],
        scales=w.scales[..., columns, :],
        offsets=None if w.offsets is None else w.offsets[..., columns, :],
    )
