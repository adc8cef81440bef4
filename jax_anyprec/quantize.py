"""Float matrices to `QuantizedTensor`: the choice of scales, and rounding."""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from . import format as fmt
from ._compat import Tracer
from .rotation import Rotation, check_rotation
from .tensor import SCALE_DTYPES, QuantizedTensor, check_group_size, group_count

CANDIDATES = 40
"""Clipping ratios tried by the least-error search; finer grids change the error by under 1%."""

DISTORTION = {
    1: 0.363, 2: 0.1188, 3: 0.0374, 4: 0.01154, 5: 0.003495, 6: 1.04e-3, 7: 3.0e-4, 8: 8.7e-5,
}  # fmt: skip
"""Squared error of the best uniform quantizer of a Gaussian, by bits (Max, 1960)."""


def quantize(
    weights: Any,
    bits: int,
    *,
    group_size: int | None = None,
    scales: Literal["mse", "absmax"] | jax.Array = "mse",
    rotation: Rotation | None = None,
    scale_dtype: Any = jnp.float32,
) -> QuantizedTensor:
    """Quantize a float matrix to `bits` bits, rounding to nearest.

    Args:
      weights: ``float[..., K, N]``, contraction first as in `flax.nnx.Linear.kernel`; float32,
        bfloat16 or float16. Must be finite (checked outside of tracing).
      bits: 1 to 8.
      group_size: values along K that share a scale, a multiple of 32 that divides K; None for one
        scale per output channel.
      scales: "mse" minimises each group's squared error, "absmax" represents the largest value
        exactly, an array ``float[..., N, groups]`` is used as given. Outlier-heavy weights that are
        not rotated do better with "absmax"; rotated or Gaussian ones with "mse".
      rotation: a `Rotation` to apply along K first, or None.
      scale_dtype: dtype in which scales are kept; codes are chosen for the rounded scales.

    Returns:
      A `QuantizedTensor` of shape ``[..., K, N]``. A group of zeros gets scale 0.
    """
    bits = fmt.check_bits(bits)
    weights = check_floats(weights, "weights", min_ndim=2)
    k = weights.shape[-2]
    group_size = check_group_size(group_size, k)
    if jnp.dtype(scale_dtype).name not in SCALE_DTYPES:
        raise TypeError(f"scale_dtype must be one of {SCALE_DTYPES}, got {scale_dtype!r}")
    if not isinstance(weights, Tracer) and not bool(jnp.isfinite(weights).all()):
        raise ValueError("weights must be finite, got NaN or infinity")
    check_rotation(rotation, k)
    given, method = None, "given"
    if isinstance(scales, str):
        if scales not in ("mse", "absmax"):
            raise ValueError(f'scales must be "mse", "absmax" or an array, got {scales!r}')
        method = scales
    else:
        given = check_floats(scales, "scales")
        expected = (*weights.shape[:-2], weights.shape[-1], group_count(k, group_size))
        if given.shape != expected:
            raise ValueError(f"scales must have shape {expected}, got {given.shape}")
        if not isinstance(given, Tracer) and not bool(_usable(given).all()):
            raise ValueError(
                f"scales must be 0 or in {fmt.MIN_SCALE:g}..{fmt.MAX_SCALE:g}, got others"
            )
    tensor, fits = _quantize(
        weights, given, bits, group_size, method, rotation, jnp.dtype(scale_dtype)
    )
    if not isinstance(fits, Tracer) and not bool(fits):
        raise ValueError(
            f"scale_dtype {jnp.dtype(scale_dtype)} can't hold the scales of these weights; "
            "use float32 or bfloat16"
        )
    return tensor


def absmax_scales(x: Any, largest: int) -> Any:
    """Scales ``float32[...]`` that map the largest magnitude of the last axis to level `largest`.

    0 where that is below MIN_SCALE; NaN where it is above MAX_SCALE or any value is NaN or
    infinite, so that bad input shows in the output instead of being clipped.
    """
    xp = fmt.namespace(x)
    scales = _absmax(x) * np.float32(1 / largest)
    scales = xp.where(scales < np.float32(fmt.MIN_SCALE), np.float32(0), scales)
    return xp.where(scales <= np.float32(fmt.MAX_SCALE), scales, np.float32(np.nan))


def _absmax(x: Any) -> Any:
    """Largest magnitude of the last axis, ``float32[...]``; NaN or infinite if any value is."""
    return fmt.bits_float(fmt.largest_bits(x.astype(np.float32)))


def check_floats(x: Any, name: str, min_ndim: int = 0) -> jax.Array:
    """`x` as a JAX array of float32, bfloat16 or float16, or an error that names it."""
    if not hasattr(x, "dtype") or not hasattr(x, "ndim"):
        raise TypeError(f"{name} must be an array, got {type(x).__name__}")
    if np.dtype(x.dtype).name not in SCALE_DTYPES:
        raise TypeError(
            f"{name} must be float32, bfloat16 or float16, got {x.dtype}; cast it explicitly"
        )
    if x.ndim < min_ndim:
        raise ValueError(f"{name} must have at least {min_ndim} axes, got shape {x.shape}")
    return jnp.asarray(x)


def _usable(scales: jax.Array) -> jax.Array:
    return (scales == 0) | ((scales >= fmt.MIN_SCALE) & (scales <= fmt.MAX_SCALE))


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5, 6))
def _quantize(
    weights: jax.Array,
    given: jax.Array | None,
    bits: int,
    group_size: int,
    method: str,
    rotation: Rotation | None,
    scale_dtype: Any,
) -> tuple[QuantizedTensor, jax.Array]:
    """The tensor, and whether no scale became infinite or 0 in `scale_dtype`."""
    rows = jnp.swapaxes(weights, -1, -2).astype(jnp.float32)
    if rotation is not None:
        rows = rotation.apply(rows)
    groups = group_count(rows.shape[-1], group_size)
    grouped = rows.reshape(*rows.shape[:-1], groups, group_size)
    scales = choose_scales(grouped, bits, method) if given is None else given
    kept = scales.astype(scale_dtype)
    rounded = kept.astype(jnp.float32)
    fits = ((rounded > 0) & (rounded < jnp.inf) | (scales == 0)).all()
    codes = fmt.encode(grouped, rounded[..., None], bits).reshape(rows.shape)
    return QuantizedTensor.from_codes(codes, kept, bits=bits, rotation=rotation), fits


def choose_scales(grouped: jax.Array, bits: int, method: str) -> jax.Array:
    """Scales ``float32[...]`` of groups ``float32[..., group]``, by "mse" or "absmax"."""
    absmax = absmax_scales(grouped, fmt.max_level(bits))
    return _least_error_scales(grouped, absmax, bits) if method == "mse" else absmax


def _least_error_scales(grouped: jax.Array, absmax: jax.Array, bits: int) -> jax.Array:
    """Search clipping ratios; for each, refit the scale in closed form: ``s = <w,q> / <q,q>``.

    With the codes fixed the squared error is ``<w,w> - <w,q>**2 / <q,q>``, so the best ratio is
    the one with the largest gain ``<w,q>**2 / <q,q>``. Groups are first divided by the power of two
    below their largest value, so that the squares of tiny or huge weights stay in range.
    """
    unit = fmt.bits_float(fmt.float_bits(absmax) & np.int32(0x7F800000))
    unit = jnp.where(unit > 0, unit, 1)
    grouped, absmax = grouped / unit[..., None], absmax / unit

    def refit(scales: jax.Array) -> tuple[jax.Array, jax.Array]:
        codes = fmt.encode(grouped, scales[..., None], bits)
        q = fmt.codes_to_ints(codes, bits).astype(jnp.float32)
        wq = (grouped * q).sum(-1)
        qq = jnp.maximum((q * q).sum(-1), 1)
        return wq / qq, wq * wq / qq

    def step(best: tuple[jax.Array, jax.Array], ratio: jax.Array) -> tuple[Any, None]:
        scales, gain = refit(absmax * ratio)
        better = gain > best[1]
        return (jnp.where(better, scales, best[0]), jnp.where(better, gain, best[1])), None

    # At 1 bit the code is a sign whatever the ratio; more bits clip less.
    ratios = jnp.linspace(0.2 if bits < 4 else 0.5, 1.0, CANDIDATES, dtype=jnp.float32)
    start = (absmax, jnp.zeros_like(absmax))
    (scales, _), _ = jax.lax.scan(step, start, ratios)
    return scales * unit
