"""Float matrices to `QuantizedTensor`: the choice of scales, and rounding."""

from __future__ import annotations

import functools
from typing import Any, Literal, NamedTuple

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


class Grid(NamedTuple):
    """The values that groups may have: ``2 scales u + offsets`` for codes u.

    Attributes:
      scales: ``float[...]``, half the distance between neighbours.
      offsets: like `scales`, the value of code 0; None centres the grid on zero.
    """

    scales: jax.Array
    offsets: jax.Array | None

    def centres(self, largest: Any) -> Any:
        """``float32[...]``, the middle of grids of codes from 0 to `largest`."""
        if self.offsets is None:
            return 0.0
        return self.offsets.astype(jnp.float32) + self.scales.astype(jnp.float32) * largest

    def kept(self, dtype: Any, largest: Any) -> Grid:
        """The grid as `dtype` holds it: its centre stays, as far as it can."""
        scales = self.scales.astype(dtype)
        if self.offsets is None:
            return Grid(scales, None)
        low = self.centres(largest) - scales.astype(jnp.float32) * largest
        return Grid(scales, low.astype(dtype))


def quantize(
    weights: Any,
    bits: int,
    *,
    group_size: int | None = None,
    scales: Literal["mse", "absmax"] | jax.Array = "mse",
    offsets: bool = False,
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
      offsets: whether each group has an offset too, so that its grid need not be centred on zero;
        chosen as `scales` says. Groups of few values gain by it, most where they are not rotated.
      rotation: a `Rotation` to apply along K first, or None.
      scale_dtype: dtype in which scales and offsets are kept; codes are chosen for the kept ones.

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
    elif offsets:
        raise ValueError('offsets need scales to be chosen with them: "mse" or "absmax"')
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
        weights, given, bits, group_size, method, bool(offsets), rotation, jnp.dtype(scale_dtype)
    )
    if not isinstance(fits, Tracer) and not bool(fits):
        raise ValueError(
            f"scale_dtype {jnp.dtype(scale_dtype)} can't hold the scales and offsets of these "
            "weights; use float32 or bfloat16"
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


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5, 6, 7))
def _quantize(
    weights: jax.Array,
    given: jax.Array | None,
    bits: int,
    group_size: int,
    method: str,
    offsets: bool,
    rotation: Rotation | None,
    scale_dtype: Any,
) -> tuple[QuantizedTensor, jax.Array]:
    """The tensor, and whether `scale_dtype` holds its scales and offsets: none infinite or lost."""
    rows = jnp.swapaxes(weights, -1, -2).astype(jnp.float32)
    if rotation is not None:
        rows = rotation.apply(rows)
    groups = group_count(rows.shape[-1], group_size)
    grouped = rows.reshape(*rows.shape[:-1], groups, group_size)
    largest = fmt.max_level(bits)
    chosen = choose_grid(grouped, bits, method, offsets) if given is None else Grid(given, None)
    kept = chosen.kept(scale_dtype, largest)
    rounded = kept.scales.astype(jnp.float32)
    fits = ((rounded > 0) & (rounded < jnp.inf) | (chosen.scales == 0)).all()
    if kept.offsets is not None:
        fits &= jnp.isfinite(kept.offsets).all()
        grouped = grouped - kept.centres(largest)[..., None]
    codes = fmt.encode(grouped, rounded[..., None], bits).reshape(rows.shape)
    return QuantizedTensor.from_codes(codes, *kept, bits=bits, rotation=rotation), fits


def choose_grid(grouped: jax.Array, bits: int, method: str, offsets: bool) -> Grid:
    """Grids ``float32[...]`` of groups ``float32[..., group]``, by "mse" or "absmax"."""
    largest, centre = fmt.max_level(bits), None
    if offsets:
        centre = (grouped.max(-1) + grouped.min(-1)) / 2
        grouped = grouped - centre[..., None]
    scales = absmax_scales(grouped, largest)
    if method == "mse":
        scales, shift = _least_error(grouped, scales, bits, offsets)
        centre = None if centre is None else centre + shift
    return Grid(scales, None if centre is None else centre - scales * largest)


def _least_error(
    grouped: jax.Array, absmax: jax.Array, bits: int, centred: bool
) -> tuple[jax.Array, jax.Array]:
    """Scales and, if `centred`, shifts of least error, by a search of clipping ratios.

    For each ratio the scale is refitted in closed form, ``s = <w, q> / <q, q>``. With the codes
    fixed the squared error is ``<w, w> - <w, q>**2 / <q, q>``, so the best ratio is the one with
    the largest gain ``<w, q>**2 / <q, q>``. With a shift, w and q are less their means. Groups are
    first divided by the power of two below their largest value, so that the squares of tiny or huge
    weights stay in range.
    """
    unit = fmt.bits_float(fmt.float_bits(absmax) & np.int32(0x7F800000))
    unit = jnp.where(unit > 0, unit, 1)
    grouped, absmax = grouped / unit[..., None], absmax / unit

    def refit(scales: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        codes = fmt.encode(grouped, scales[..., None], bits)
        q = fmt.codes_to_ints(codes, bits).astype(jnp.float32)
        mean = q.mean(-1, keepdims=True) if centred else 0.0
        wq = (grouped * (q - mean)).sum(-1)
        # At least 1 without a mean; with one, 0 where codes are all the same.
        qq = jnp.maximum((q * (q - mean)).sum(-1), 1e-3)
        scale = wq / qq
        shift = (grouped - scale[..., None] * q).mean(-1) if centred else jnp.zeros_like(scale)
        return scale, wq * scale, shift

    def step(best: tuple[jax.Array, ...], ratio: jax.Array) -> tuple[Any, None]:
        found = refit(absmax * ratio)
        better = found[1] > best[1]
        return tuple(jnp.where(better, *pair) for pair in zip(found, best, strict=True)), None

    # At 1 bit the code is a sign whatever the ratio; more bits clip less.
    ratios = jnp.linspace(0.2 if bits < 4 else 0.5, 1.0, CANDIDATES, dtype=jnp.float32)
    start = (absmax, jnp.zeros_like(absmax), jnp.zeros_like(absmax))
    (scales, _, shift), _ = jax.lax.scan(step, start, ratios)
    return scales * unit, shift * unit
