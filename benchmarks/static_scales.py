"""Layers whose activations have one scale, found beforehand: what dynamic ones are compared to.

The package has none: what they lose is in docs/accuracy.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_anyprec.calibrate.observe import Run, observe
from jax_anyprec.nnx.convert import Found
from jax_anyprec.rotation import Rotation


class StaticScale(nnx.Module):
    """A layer that sees its input rotated and rounded to `bits`, values over `largest` clipped."""

    def __init__(self, layer: Any, bits: int, largest: float):
        self.layer, self.bits, self.largest = layer, bits, largest

    def __call__(self, x: jax.Array) -> jax.Array:
        rotation = Rotation.for_size(x.shape[-1])
        levels = 2 ** (self.bits - 1) - 1
        step = self.largest / levels
        codes = jnp.clip(jnp.rint(rotation.apply(x) / step), -levels, levels)
        return self.layer(rotation.invert(codes * step))


def put_static_scales(
    layers: Sequence[Found], runs: Sequence[Run], bits: int, percentile: float
) -> None:
    """Clip and round what goes into layers, for a percentile of the magnitudes that runs show."""
    seen: dict[str, list[float]] = {found.layer.path: [] for found in layers}

    def show(found: Found, x: jax.Array) -> None:
        values = jnp.abs(Rotation.for_size(x.shape[-1]).apply(x))
        seen[found.layer.path].append(float(np.percentile(np.asarray(values), percentile)))

    for run in runs:
        observe(layers, run, show)
    for found in layers:
        largest = float(np.mean(seen[found.layer.path]))
        for reference in found.references:
            reference.replace(StaticScale(found.module, bits, largest))
