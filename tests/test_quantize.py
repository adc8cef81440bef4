"""Float matrices to packed ones: scales, rounding, rotation, edge groups."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import jax_anyprec as ap

BITS = range(1, 9)
METHODS = ("mse", "absmax")

quantize = jax.jit(
    ap.quantize,
    static_argnames=("bits", "group_size", "scales", "offsets", "rotation", "scale_dtype"),
)
"""Compiled as a whole: eager JAX would compile each operation of it for each shape."""


def gaussian(k: int, n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(k, n)).astype(np.float32)


def codes_of(w: ap.QuantizedTensor) -> np.ndarray:
    """Codes ``[N, K]`` from the planes, by NumPy's own bit unpacking."""
    octets = np.ascontiguousarray(np.asarray(w.planes)).view(np.uint8)
    bits = np.unpackbits(octets, axis=-1, bitorder="little")[..., : w.k]
    return np.tensordot(2 ** np.arange(w.bits)[::-1], bits, 1).astype(np.uint8)


def values_of(w: ap.QuantizedTensor) -> np.ndarray:
    """The matrix ``float64[K, N]``, rotation not undone."""
    offsets = None if w.offsets is None else np.asarray(w.offsets)
    return oracle.rows_of(codes_of(w), w.bits, np.asarray(w.scales), offsets)[0].T


def group_errors(weights: np.ndarray, w: ap.QuantizedTensor) -> np.ndarray:
    """Squared error ``[groups, N]``."""
    error = (values_of(w) - weights.astype(np.float64)) ** 2
    return error.reshape(w.groups, w.group_size, -1).sum(1)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", [32, 64, None])
def test_absmax_represents_the_largest_value(bits: int, group: int | None) -> None:
    weights = gaussian(192, 7)
    w = quantize(weights, bits, group_size=group, scales="absmax")
    assert w.shape == (192, 7)
    assert w.bits == bits
    assert w.group_size == (group or 192)
    assert w.scales.shape == (7, w.groups)
    assert w.offsets is None
    grouped = weights.T.reshape(7, w.groups, -1)
    largest = np.abs(grouped).max(-1)
    np.testing.assert_allclose(w.scales, largest / (2**bits - 1), rtol=2e-7)
    step = 2 * np.repeat(np.asarray(w.scales, np.float64), w.group_size, axis=1).T
    assert (np.abs(values_of(w) - weights) <= step * 0.500001).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", [32, None])
def test_mse_is_never_worse_than_absmax(bits: int, group: int | None) -> None:
    rng = np.random.default_rng(bits)
    for weights in (gaussian(192, 7), rng.standard_t(2, (192, 7)).astype(np.float32)):
        errors = [
            group_errors(weights, quantize(weights, bits, group_size=group, scales=m))
            for m in METHODS
        ]
        assert (errors[0] <= errors[1] * (1 + 1e-6)).all()


@pytest.mark.parametrize("bits", [1, 3, 8])
@pytest.mark.parametrize("method", METHODS)
def test_quantizing_commutes_with_powers_of_two(bits: int, method: str) -> None:
    """A power of two is exact, so codes must not change, and scales by that power alone."""
    weights = gaussian(64, 5)
    w = quantize(weights, bits, group_size=32, scales=method)
    for exponent in (-85, -65, -30, -1, 1, 30, 65, 95):
        factor = np.float32(2.0**exponent)
        scaled = quantize(weights * factor, bits, group_size=32, scales=method)
        message = f"2**{exponent}"
        np.testing.assert_array_equal(scaled.scales, np.asarray(w.scales) * factor, message)
        np.testing.assert_array_equal(scaled.planes, w.planes, message)


@pytest.mark.parametrize(("bits", "expected"), [(1, 0.60), (2, 0.34), (3, 0.19), (4, 0.10)])
def test_relative_error_on_gaussian_weights(bits: int, expected: float) -> None:
    """Lloyd-Max bounds of a uniform quantizer on a Gaussian, measured before this code was."""
    weights = gaussian(1024, 64)
    w = quantize(weights, bits, scales="mse")
    error = np.linalg.norm(values_of(w) - weights) / np.linalg.norm(weights)
    assert error == pytest.approx(expected, abs=0.02)


def test_one_bit_is_sign_times_mean_magnitude() -> None:
    weights = gaussian(64, 5)
    w = quantize(weights, 1, group_size=32)
    grouped = np.abs(weights.T.reshape(5, 2, 32))
    np.testing.assert_allclose(w.scales, grouped.mean(-1), rtol=1e-5)
    np.testing.assert_array_equal(np.sign(values_of(w)), np.sign(weights))


@pytest.mark.parametrize("bits", BITS)
def test_given_scales_are_kept_and_codes_are_nearest(bits: int) -> None:
    weights = gaussian(96, 6)
    scales = np.random.default_rng(3).uniform(0.01, 0.5, (6, 3)).astype(np.float32)
    w = ap.quantize(weights, bits, group_size=32, scales=scales)
    np.testing.assert_array_equal(w.scales, scales)
    expected = [
        [oracle.encode_one(v, scales[n, k // 32], bits) for k, v in enumerate(row)]
        for n, row in enumerate(weights.T)
    ]
    np.testing.assert_array_equal(codes_of(w), expected)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale_dtype", [jnp.float16, "bfloat16", np.float32])
def test_codes_fit_the_rounded_scales(method: str, scale_dtype: object) -> None:
    weights = gaussian(64, 4)
    w = quantize(weights, 4, group_size=32, scales=method, scale_dtype=scale_dtype)
    assert w.scales.dtype == jnp.dtype(scale_dtype)
    scales = np.asarray(w.scales).astype(np.float32)
    expected = [
        [oracle.encode_one(v, scales[n, k // 32], 4) for k, v in enumerate(row)]
        for n, row in enumerate(weights.T)
    ]
    np.testing.assert_array_equal(codes_of(w), expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("method", METHODS)
def test_half_precision_weights_quantize_as_their_float32_values(dtype: str, method: str) -> None:
    weights = jnp.asarray(gaussian(64, 4), dtype)
    w = quantize(weights, 3, scales=method)
    same = quantize(weights.astype(jnp.float32), 3, scales=method)
    np.testing.assert_array_equal(w.planes, same.planes)
    np.testing.assert_array_equal(w.scales, same.scales)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bits", [1, 4, 8])
def test_groups_of_zeros_are_zero(method: str, bits: int) -> None:
    weights = gaussian(96, 3)
    weights[32:64, 1] = 0
    w = quantize(weights, bits, group_size=32, scales=method)
    assert w.scales[1, 1] == 0
    assert (np.asarray(w.scales) > 0).sum() == 8
    assert (values_of(w)[32:64, 1] == 0).all()
    zeros = quantize(np.zeros_like(weights), bits, group_size=32, scales=method)
    assert (values_of(zeros) == 0).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("block", [64, 128])
def test_rotation_rotates_the_rows_first(method: str, block: int) -> None:
    weights, rotation = gaussian(256, 5), ap.Rotation(block, 3)
    w = quantize(weights, 4, group_size=64, scales=method, rotation=rotation)
    assert w.rotation == rotation
    turned = oracle.rotate(np.ascontiguousarray(weights.T), block, 3).T
    plain = quantize(np.ascontiguousarray(turned), 4, group_size=64, scales=method)
    np.testing.assert_array_equal(w.planes, plain.planes)
    np.testing.assert_array_equal(w.scales, plain.scales)
    # Undoing the rotation keeps the error as it was.
    error = np.linalg.norm(np.asarray(w.dequantize(), np.float64) - weights)
    assert error == pytest.approx(np.linalg.norm(values_of(w) - turned), rel=1e-5)


def test_rotation_spreads_outliers() -> None:
    weights = gaussian(256, 8)
    weights[7] *= 50
    errors = [
        np.linalg.norm(np.asarray(quantize(weights, 4, rotation=r).dequantize()) - weights)
        for r in (None, ap.Rotation(256))
    ]
    assert errors[1] < 0.6 * errors[0]


def test_stacked_weights_quantize_one_by_one() -> None:
    weights = np.random.default_rng(0).normal(size=(2, 3, 64, 5)).astype(np.float32)
    w = ap.quantize(weights, 3, group_size=32)
    assert w.shape == (2, 3, 64, 5)
    assert w.planes.shape == (2, 3, 3, 5, 2)
    one = ap.quantize(weights[1, 2], 3, group_size=32)
    np.testing.assert_array_equal(w.planes[1, 2], one.planes)
    np.testing.assert_array_equal(w.scales[1, 2], one.scales)


@pytest.mark.parametrize("shape", [(0, 4), (64, 0), (0, 0), (0, 64, 4), (1, 1)])
def test_empty_and_tiny_weights(shape: tuple[int, ...]) -> None:
    for method in METHODS:
        w = quantize(np.ones(shape, np.float32), 3, scales=method)
        assert w.shape == shape
        assert w.dequantize().shape == shape
        np.testing.assert_allclose(w.dequantize(), 1, rtol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_jit_quantizes_as_eager(method: str) -> None:
    weights = gaussian(128, 9)
    w = quantize(weights, 4, group_size=32, scales=method)
    jitted = jax.jit(lambda x: ap.quantize(x, 4, group_size=32, scales=method))(weights)
    np.testing.assert_allclose(jitted.scales, w.scales, rtol=1e-5)
    assert (codes_of(jitted) != codes_of(w)).mean() < 0.01
    shape = jax.eval_shape(lambda x: ap.quantize(x, 4, group_size=32), weights)
    assert shape.shape == (128, 9)
    assert shape.planes.shape == w.planes.shape


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("method", METHODS)
def test_offsets_reach_both_ends_of_a_group(bits: int, method: str) -> None:
    weights = gaussian(192, 7) + 3
    w = quantize(weights, bits, group_size=32, scales=method, offsets=True)
    assert w.scales.shape == w.offsets.shape == (7, 6)
    grouped = weights.T.reshape(7, 6, 32)
    if method == "absmax":
        np.testing.assert_allclose(w.offsets, grouped.min(-1), atol=1e-6)
        spread = grouped.max(-1) - grouped.min(-1)
        np.testing.assert_allclose(w.scales, spread / 2 / (2**bits - 1), rtol=1e-5)
    else:
        ends = quantize(weights, bits, group_size=32, scales="absmax", offsets=True)
        assert group_errors(weights, w).sum() <= group_errors(weights, ends).sum() * 1.000001
    centred = quantize(weights, bits, group_size=32, scales=method)
    assert group_errors(weights, w).sum() < 0.5 * group_errors(weights, centred).sum()
    np.testing.assert_allclose(w.dequantize(), values_of(w), rtol=1e-6, atol=1e-6)


def test_offsets_of_constant_groups_and_of_grids() -> None:
    weights = np.full((64, 3), 0.7, np.float32)
    weights[32:] = 0
    for method in METHODS:
        w = quantize(weights, 2, group_size=32, scales=method, offsets=True)
        np.testing.assert_array_equal(w.dequantize(), weights)
    levels = np.random.default_rng(0).integers(0, 4, (32, 3))
    levels[:2] = [[0], [3]]
    weights = (levels * 0.5 - 0.25).astype(np.float32)
    w = quantize(weights, 2, group_size=32, offsets=True)
    np.testing.assert_allclose(w.dequantize(), weights, atol=1e-6)


def test_offsets_are_chosen_with_scales() -> None:
    with pytest.raises(ValueError, match=r"offsets need scales to be chosen with them"):
        ap.quantize(gaussian(32, 2), 4, scales=jnp.ones((2, 1)), offsets=True)
    with pytest.raises(ValueError, match=r"scale_dtype float16 can't hold .* offsets"):
        ap.quantize(gaussian(32, 2) + 1e6, 4, offsets=True, scale_dtype="float16")
