"""One layer's weight packed for its inputs: what calibrations of all frameworks have in common."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..plan import Layer
from ..quantization import Quantization
from ..tensor import QuantizedTensor
from .moments import Moments
from .solve import Method, solve
from .store import at_bits

LEAST_ROWS = 8
"""A weight of K rows is calibrated on at least K / LEAST_ROWS inputs; damping does the rest."""

PRECISE = 8
"""Bits of activations that leave inputs as precise as those of float ones, or nearly."""


class Packing(NamedTuple):
    """A weight as it was packed.

    Attributes:
      weight: in planes.
      shift: what the bias lacks, ``float32[N]``.
      error: of its outputs, relative.
      nested: scales and offsets ``[N, groups]`` for fewer bits, by `at_bits`.
    """

    weight: QuantizedTensor
    shift: jax.Array
    error: float
    nested: dict[str, jax.Array]


def has_coarse_activations(quantization: Quantization) -> bool:
    """Whether activations have fewer than `PRECISE` bits."""
    return quantization.activations is not None and quantization.activations < PRECISE


def check_inputs(layer: Layer, moments: Moments) -> str | None:
    """Why inputs of these moments can't calibrate a layer: too few. None if they can.

    Raises:
      ValueError: they are not finite, or their squares are not.
    """
    if not bool(jnp.isfinite(moments.own).all() & jnp.isfinite(moments.cross).all()):
        raise ValueError(f"inputs of layer {layer.path!r} are not finite, or their squares are not")
    assert layer.matrix is not None
    rows, k = int(moments.rows), layer.matrix[-2]
    if rows * LEAST_ROWS < k:
        return f"{rows} inputs are too few for {k} rows of weights"
    return None


def pack(layer: Layer, quantization: Quantization, moments: Moments, method: Method) -> Packing:
    """A layer's weight packed for inputs of these moments, which `check_inputs` lets pass."""
    assert quantization.weights is not None
    weights = layer.matrices(layer.weight)
    solution = solve(weights, moments, quantization, _suited(method, quantization))
    tensor = QuantizedTensor.from_codes(
        solution.codes.T,
        *solution.grid,
        bits=quantization.weights,
        rotation=quantization.rotation(weights.shape[0]),
    )
    nested = {
        at_bits(field, bits): value
        for bits, grid in zip(method.below(quantization.weights), solution.nested, strict=True)
        for field, value in grid._asdict().items()
        if value is not None
    }
    return Packing(tensor, solution.shift, float(solution.error), nested)


def _suited(method: Method, quantization: Quantization) -> Method:
    """Inputs that coarse activations made noisy would shrink weights that aim at others."""
    coarse = has_coarse_activations(quantization)
    return dataclasses.replace(method, cross=0.0) if coarse else method
