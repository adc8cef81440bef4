"""The public operations: they check their arguments and bind a primitive."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp

from . import _native, fusion, primitive, reference
from . import format as fmt
from .before import Before, check_before
from .choose import IMPLEMENTATIONS, platform_of
from .quantize import check_floats
from .rotation import Rotation, check_rotation
from .tensor import SCALE_DTYPES, QuantizedTensor, check_group_size, check_tensor


def matmul(
    x: Any,
    w: QuantizedTensor,
    *,
    bias: Any = None,
    before: Before = None,
    residual: Any = None,
    act_bits: int | None = None,
    act_scales: Literal["group", "token"] = "group",
    out_dtype: Any = None,
    implementation: str | None = None,
) -> jax.Array:
    """``x @ w + bias`` with packed weights, and activations quantized on line or left in float.

    With `before` and `residual` it is ``residual + (before(x) @ w + bias)``, what surrounds a
    product in a transformer: a kernel that does it all saves writing and reading what is between.

    Differentiable with respect to x (straight-through over the activations' rounding), the scales
    and offsets of `w`, bias, the scale of `RMSNorm`, and residual.

    Args:
      x: ``float[..., K]``, or ``[..., 2 K]`` with `SwiGLU`; float32, bfloat16 or float16. A token
        with a NaN or an infinity gives NaN (in the groups that hold it, with act_scales="group").
      w: `QuantizedTensor` of shape ``(K, N)``; for stacked tensors use `jax.vmap`.
      bias: ``float[N]`` or None.
      before: `RMSNorm` or `SwiGLU`, which x goes through first; its result has the dtype of x.
      residual: ``float[..., N]``, added in float32 before results are rounded to `out_dtype`; or
        None.
      act_bits: 1 to 8; up to 3 bits activations are rounded to the odd integers of the format, from
        4 bits on to even ones, so that zeros stay zeros. None for float activations, so that sums
        have the accuracy of float32: the CPU kernels take 24 bits below the largest magnitude of a
        token or group, the CUDA kernels all 24 bits of each value, as bfloat16 parts (of float16
        two, of bfloat16 the value itself) that tensor cores multiply and sum in float32.
      act_scales: "group" gives each token one activation scale for each weight group, "token" one
        for all of K (faster; accurate only for rotated or well-behaved activations).
      out_dtype: float32, bfloat16 or float16; that of `x` by default. Sums are kept in float32.
      implementation: None for the best available on the device; "xla", "cpu", "cuda", or a kernel
        family of one of them, "cpu_planes", "cpu_codes", "cuda_planes" or "cuda_codes". All give
        the same integers. With None, what has no kernel runs in plain XLA, with a warning.

    Returns:
      ``[..., N]`` in `out_dtype`.

    Raises:
      TypeError, ValueError: an argument of a wrong type, dtype or shape.
      Unavailable: the named implementation can't run here; the message says why.
    """
    check_tensor(w, "w")
    _check_two_axes(w)
    x = check_floats(x, "x", min_ndim=1)
    k, n = w.shape
    before = check_before(before, x.shape, k)
    if act_bits is not None:
        act_bits = fmt.check_bits(act_bits, "act_bits")
    if act_scales not in ("group", "token"):
        raise ValueError(f'act_scales must be "group" or "token", got {act_scales!r}')
    if bias is not None:
        bias = check_floats(bias, "bias")
        if bias.shape != (n,):
            raise ValueError(f"bias must have shape ({n},), got {bias.shape}")
    if residual is not None:
        residual = check_floats(residual, "residual")
        if residual.shape != (*x.shape[:-1], n):
            raise ValueError(f"residual must have shape {(*x.shape[:-1], n)}, got {residual.shape}")
    out_dtype = jnp.dtype(x.dtype if out_dtype is None else out_dtype)
    if out_dtype.name not in SCALE_DTYPES:
        raise TypeError(f"out_dtype must be one of {SCALE_DTYPES}, got {out_dtype}")
    return fusion.matmul(
        x,
        w.planes,
        w.scales,
        w.offsets,
        bias,
        before,
        residual,
        act_bits=act_bits,
        act_group_size=w.group_size if act_scales == "group" else k,
        group_size=w.group_size,
        rotation=w.rotation,
        columns=w.columns,
        out_dtype=out_dtype,
        implementation=check_implementation(implementation, act_bits),
    )


def quantize_activations(
    x: Any,
    bits: int,
    *,
    group_size: int | None = None,
    rotation: Rotation | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """What `matmul` does to its activations: rotate, take absmax scales, round to codes.

    Not differentiable; `matmul` is, straight through the rounding.

    Args:
      x: ``float[..., K]``; float32, bfloat16 or float16.
      bits: 1 to 8.
      group_size: values along K that share a scale, or None for one scale for each token.
      rotation: applied first, or None.
      implementation: None, "xla", "cpu" or "cuda".

    Returns:
      codes ``uint8[..., K]`` and scales ``float32[..., groups]``, the largest magnitude over the
      largest level: ``x ~ scales * (2 codes - (2**bits - 1))`` up to 3 bits,
      ``x ~ scales * (2 codes - 2**bits)`` from 4 bits on.
    """
    bits = fmt.check_bits(bits)
    x = check_floats(x, "x", min_ndim=1)
    k = x.shape[-1]
    group_size = check_group_size(group_size, k)
    check_rotation(rotation, k)
    return primitive.quantize_activations(
        x,
        bits=bits,
        group_size=group_size,
        rotation=rotation,
        implementation=check_implementation(implementation, bits),
    )


def int_matmul(
    codes: Any, w: QuantizedTensor, act_bits: int, *, implementation: str | None = None
) -> jax.Array:
    """The integer core of `matmul`: ``sum_k q_x q_w`` over each group of `w`.

    Args:
      codes: ``uint8[..., K]``, each below ``2**act_bits``; higher bits are undefined. They stand
        for the integers that `quantize_activations` says.
      w: `QuantizedTensor` of shape ``(K, N)``; its scales and offsets play no part.
      act_bits: 1 to 8.
      implementation: as for `matmul`.

    Returns:
      ``int32[..., N, groups]``, exact.

    Raises:
      ValueError: also where a group is so long that the sum may not fit int32.
    """
    check_tensor(w, "w")
    _check_two_axes(w)
    act_bits = fmt.check_bits(act_bits, "act_bits")
    if not hasattr(codes, "dtype") or codes.dtype != jnp.uint8 or codes.ndim < 1:
        raise TypeError(f"codes must be a uint8 array, got {getattr(codes, 'dtype', type(codes))}")
    if codes.shape[-1] != w.k:
        raise ValueError(
            f"codes must have {w.k} values in its last axis as w has, got {codes.shape}"
        )
    if not reference.fits_int32(w.group_size, act_bits, w.bits):
        raise ValueError(
            f"group_size {w.group_size} is too long for int32 at {act_bits} x {w.bits} bits"
        )
    return primitive.int_matmul(
        jnp.asarray(codes),
        w.planes,
        act_bits=act_bits,
        group_size=w.group_size,
        columns=w.columns,
        implementation=check_implementation(implementation, act_bits),
    )


def check_implementation(implementation: Any, act_bits: int | None) -> str | None:
    """`implementation` if it exists and can run, else ValueError or `Unavailable`."""
    if implementation is None or implementation == "xla":
        return implementation
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation must be None or one of {IMPLEMENTATIONS}, got {implementation!r}"
        )
    platform = platform_of(implementation)
    if implementation != platform and act_bits is None:
        raise ValueError(
            f"implementation={implementation!r} needs act_bits; use {platform!r} for floats"
        )
    (_native.cuda() if platform == "cuda" else _native.cpu()).require(implementation)
    return implementation


def _check_two_axes(w: QuantizedTensor) -> None:
    if len(w.shape) != 2:
        raise ValueError(f"w must have shape (K, N), got {w.shape}; use jax.vmap for stacked ones")
