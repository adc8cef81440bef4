"""Fake quantization: values of the packed tensor to the bit, derivatives of LSQ (arXiv 1902.08153).

The derivatives' oracle is NumPy in float64, written from the paper's formulas for each weight.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import jax_anyprec as ap
from jax_anyprec.fake_quant import magnitude

RNG = np.random.default_rng(0)
M, K, N = 3, 128, 5
ROTATION = ap.Rotation(64, 3)
KINDS = {
    "one scale a channel": (None, None),
    "groups": (32, None),
    "rotated": (None, ROTATION),
    "rotated groups": (64, ROTATION),
}


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


W, X, BIAS = normal(K, N), normal(M, K), normal(N)


@functools.cache
def scales_of(bits: int, group_size: int | None) -> jax.Array:
    """Positive scales that clip some weights and not others, different for each group."""
    groups = 1 if group_size is None else K // group_size
    return jnp.asarray(RNG.uniform(1, 2, (N, groups)).astype(np.float32) / (2**bits - 1))


def tensor(bits: int, kind: str) -> ap.QuantizedTensor:
    group_size, rotation = KINDS[kind]
    scales = scales_of(bits, group_size)
    return ap.quantize(W, bits, group_size=group_size, scales=scales, rotation=rotation)


# --- the oracle ---


def turn(rotation: ap.Rotation | None) -> np.ndarray:
    """The orthogonal matrix R ``float64[K, K]`` of rows x -> x R."""
    if rotation is None:
        return np.eye(K)
    blocks = np.kron(np.eye(K // rotation.block), oracle.hadamard_matrix(rotation.block))
    return oracle.signs(rotation.seed, K)[:, None].astype(np.float64) * blocks


def lsq(rows: np.ndarray, scales: np.ndarray, bits: int) -> tuple[np.ndarray, ...]:
    """Values, d/dw and d/ds ``float64[N, K]`` of rows, from the definition.

    The value is the nearest of all levels; r = w / s is clipped outside of the largest.
    """
    largest = 2**bits - 1
    s = np.repeat(scales.astype(np.float64), rows.shape[-1] // scales.shape[-1], -1)
    grid = np.arange(-largest, largest + 1, 2)
    r = rows.astype(np.float64) / s
    q = grid[np.abs(r[..., None] - grid).argmin(-1)]
    inside = np.abs(r) <= largest
    normalisation = 1 / np.sqrt(rows.shape[-1] // scales.shape[-1] * largest)
    slope = np.where(inside, q - r, np.where(r > 0, largest, -largest)) * normalisation
    return s * q, inside.astype(np.float64), slope


def by_group(x: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Sums of ``[N, K]`` over each group, ``[N, groups]``."""
    return x.reshape(*scales.shape, -1).sum(-1)


def close(found: Any, expected: Any, terms: int = 2 * K) -> None:
    """Equal up to the float32 roundings of sums of so many terms of the largest size found."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected)
    assert found.shape == expected.shape
    size = max(1.0, np.abs(expected).max(initial=0))
    np.testing.assert_allclose(found, expected, rtol=0, atol=oracle.gamma(terms) * size * 4)


# --- values ---


@pytest.mark.parametrize(
    ("bits", "kind"),
    [(1, "groups"), (2, "rotated groups"), (3, "one scale a channel"), (8, "rotated")],
)
def test_values_are_those_of_the_packed_tensor_bit_for_bit(bits: int, kind: str) -> None:
    group_size, rotation = KINDS[kind]
    scales = scales_of(bits, group_size)
    found = ap.fake_quant(W, scales, bits, rotation=rotation)
    np.testing.assert_array_equal(found, tensor(bits, kind).dequantize())


def test_values_are_the_nearest_levels_and_jit_changes_none() -> None:
    scales = scales_of(2, 32)
    values, _, _ = lsq(W.T, np.asarray(scales), 2)
    fake = jax.jit(lambda w, s: ap.fake_quant(w, s, 2))(W, scales)
    np.testing.assert_array_equal(fake, values.T.astype(np.float32))
    np.testing.assert_array_equal(fake, ap.fake_quant(W, scales, 2))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype: str) -> None:
    w, scales = jnp.asarray(W, dtype), scales_of(2, 32).astype(dtype)
    found = ap.fake_quant(w, scales, 2)
    assert found.dtype == dtype
    packed = ap.quantize(w, 2, group_size=32, scales=scales)
    np.testing.assert_array_equal(found, packed.dequantize(dtype))
    gradients = jax.jit(jax.grad(lambda *a: ap.fake_quant(*a, 2).sum(), (0, 1)))(w, scales)
    assert [g.dtype.name for g in gradients] == [dtype, dtype]


def test_stacked_weights_and_vmap() -> None:
    w, scales = normal(2, K, N), jnp.stack([scales_of(2, 32), 2 * scales_of(2, 32)])
    fake = functools.partial(ap.fake_quant, bits=2, rotation=ROTATION)
    each = jnp.stack([fake(w[i], scales[i]) for i in range(2)])
    np.testing.assert_array_equal(fake(w, scales), each)
    np.testing.assert_array_equal(jax.vmap(fake)(w, scales), each)


@pytest.mark.parametrize("shape", [(0, N), (K, 0)])
def test_empty_weights(shape: tuple[int, int]) -> None:
    w, scales = jnp.zeros(shape), jnp.ones((shape[1], 1))
    assert ap.fake_quant(w, scales, 2).shape == shape
    gradients = jax.jit(jax.grad(lambda *a: ap.fake_quant(*a, 2).sum(), (0, 1)))(w, scales)
    assert [g.shape for g in gradients] == [shape, scales.shape]
    x = jnp.ones((M, shape[0]))
    assert ap.fake_quant_matmul(x, w, scales, 2, act_bits=4).shape == (M, shape[1])


# --- derivatives of the rounding ---


@pytest.mark.parametrize(
    ("bits", "kind"),
    [
        (1, "one scale a channel"),
        (1, "rotated groups"),
        (2, "groups"),
        (2, "rotated"),
        (8, "groups"),
    ],
)
def test_derivatives_are_those_of_lsq(bits: int, kind: str) -> None:
    group_size, rotation = KINDS[kind]
    scales, cotangent = scales_of(bits, group_size), normal(K, N)
    _, inside, slope = lsq(W.T @ turn(rotation), np.asarray(scales), bits)
    assert 0 < inside.mean() < 1
    fake = lambda w, s: ap.fake_quant(w, s, bits, rotation=rotation)  # noqa: E731
    dw, ds = jax.jit(lambda *a: jax.vjp(fake, *a)[1](cotangent))(W, scales)
    rows = cotangent.T @ turn(rotation)
    close(dw, ((inside * rows) @ turn(rotation).T).T)
    close(ds, by_group(slope * rows, scales))

    w_dot, s_dot = normal(K, N), normal(*scales.shape)
    _, tangent = jax.jit(lambda a, t: jax.jvp(fake, a, t))((W, scales), (w_dot, s_dot))
    rows_dot = inside * (w_dot.T @ turn(rotation))
    rows_dot += slope * np.repeat(s_dot, K // scales.shape[-1], -1)
    close(tangent, (rows_dot @ turn(rotation).T).T)


def test_only_what_lies_beyond_the_largest_level_is_clipped() -> None:
    w = jnp.array([[-3.001], [-3.0], [-0.1], [0.0], [3.0], [3.001]])
    gradient = jax.jit(jax.grad(lambda *a: ap.fake_quant(*a, 2).sum(), (0, 1)))
    dw, ds = gradient(w, jnp.ones((1, 1)))
    np.testing.assert_array_equal(dw[:, 0], [0, 1, 1, 1, 1, 0])
    # q - r inside: 0, -1 + 0.1, 1, 0; and -3 and 3 where clipped.
    close(ds, [[0.1 / np.sqrt(6 * 3)]])


def test_a_scale_of_zero_and_nan() -> None:
    zeros, scales = jnp.zeros((K, 1)), jnp.zeros((1, 1))
    gradient = jax.jit(jax.grad(lambda *a: ap.fake_quant(*a, 2).sum(), (0, 1)))
    assert (ap.fake_quant(zeros, scales, 2) == 0).all()
    dw, ds = gradient(zeros, scales)
    assert (dw == 1).all()
    close(ds, [[K / np.sqrt(K * 3)]])  # every q is 1
    dw, ds = gradient(jnp.full((K, 1), -1.0), scales)
    assert (dw == 0).all()
    close(ds, [[-3 * K / np.sqrt(K * 3)]])  # clipped: towards the largest level
    # Codes can't hold a NaN; the gradient of the scale does, so training shows it.
    assert np.isnan(gradient(zeros.at[3].set(jnp.nan), scales + 1)[1]).all()


def test_magnitude() -> None:
    s = jnp.array([-2.0, 0.0, 3.0])
    np.testing.assert_array_equal(magnitude(s), [2, 0, 3])
    np.testing.assert_array_equal(jax.grad(lambda s: magnitude(s).sum())(s), [-1, 1, 1])


def test_second_derivatives_take_the_rounding_for_linear() -> None:
    """Of ``sum(v**3) / 3`` with v = fake_quant(w, s): ``J.T @ (2 v * (J @ tangent))``."""
    scales = scales_of(2, 32)
    values, inside, slope = lsq(W.T, np.asarray(scales), 2)
    w_dot, s_dot = normal(K, N), normal(*scales.shape)

    def loss(w: Any, s: Any) -> jax.Array:
        return (ap.fake_quant(w, s, 2) ** 3).sum() / 3

    def reverse_over_reverse(w: Any, s: Any) -> Any:
        gradient, pull = jax.vjp(jax.grad(loss, (0, 1)), w, s)
        del gradient
        return pull((w_dot, s_dot))

    forward = jax.jit(lambda *a: jax.jvp(jax.grad(loss, (0, 1)), a, (w_dot, s_dot))[1])
    rows_dot = inside * w_dot.T + slope * np.repeat(s_dot, 32, -1)
    back = 2 * values * rows_dot
    for dw, ds in (forward(W, scales), jax.jit(reverse_over_reverse)(W, scales)):
        close(dw, (inside * back).T)
        close(ds, by_group(slope * back, scales))


# --- the product ---


def seen(act_bits: int | None, act_group: int, rotation: ap.Rotation | None) -> np.ndarray:
    """Activations as the product sees them, ``float64[M, K]``."""
    if act_bits is None:
        return X @ turn(rotation)
    turned = None if rotation is None else (rotation.block, rotation.seed)
    codes, scales = oracle.quantize_activations(X, act_bits, act_group, turned)
    return np.repeat(scales.astype(np.float64), act_group, -1) * oracle.act_ints(codes, act_bits)


@pytest.mark.parametrize(
    ("bits", "act_bits", "kind", "act_scales"),
    [
        (2, 4, "groups", "group"),
        (1, 8, "rotated groups", "token"),
        (3, None, "one scale a channel", "group"),
    ],
)
def test_product(bits: int, act_bits: int | None, kind: str, act_scales: Any) -> None:
    """Its value is the packed product's to the bit, its gradient that of the float expression."""
    group_size, rotation = KINDS[kind]
    scales, cotangent = scales_of(bits, group_size), normal(M, N)
    options = {"act_bits": act_bits, "act_scales": act_scales}

    def fake(x: Any, w: Any, s: Any, bias: Any) -> jax.Array:
        return ap.fake_quant_matmul(x, w, s, bits, rotation=rotation, bias=bias, **options)

    y, (dx, dw, ds, db) = jax.jit(
        lambda *a: (lambda y, pull: (y, pull(cotangent)))(*jax.vjp(fake, *a))
    )(X, W, scales, BIAS)
    w = tensor(bits, kind)
    packed = lambda x: ap.matmul(x, w, bias=BIAS, **options)  # noqa: E731
    np.testing.assert_array_equal(y, packed(X))
    np.testing.assert_array_equal(fake(X, W, scales, BIAS), y)

    act_group = K if act_scales == "token" or group_size is None else group_size
    x_seen = seen(act_bits, act_group, rotation)
    values, inside, slope = lsq(W.T @ turn(rotation), np.asarray(scales), bits)
    rows = cotangent.T @ x_seen
    close(dx, cotangent @ values @ turn(rotation).T)
    close(dx, jax.vjp(packed, X)[1](cotangent)[0])
    close(dw, ((inside * rows) @ turn(rotation).T).T)
    close(ds, by_group(slope * rows, scales))
    close(db, cotangent.sum(0))

    x_dot, w_dot, s_dot, b_dot = (normal(*a.shape) for a in (X, W, scales, BIAS))
    tangents = (x_dot, w_dot, s_dot, b_dot)
    y, tangent = jax.jit(lambda a, t: jax.jvp(fake, a, t))((X, W, scales, BIAS), tangents)
    np.testing.assert_array_equal(y, packed(X))
    by_pairing = sum((a * b).sum() for a, b in zip((dx, dw, ds, db), tangents, strict=True))
    close((tangent * cotangent).sum(), by_pairing, 64 * K)


def test_product_agrees_with_the_float_one_within_the_roundings_of_its_sums() -> None:
    """Float sums depend on their order, so with float activations there is a bound, derived."""
    scales = scales_of(3, 32)
    packed = tensor(3, "groups")
    codes = ((np.asarray(packed.dequantize()).T.reshape(N, -1, 32) / scales[..., None]) + 7) / 2
    codes = np.rint(codes).astype(np.uint8).reshape(N, K)
    w = (codes, 3, np.asarray(scales), None)
    bound = oracle.float_matmul(X, 32, w, BIAS, "float32")
    dense = jnp.matmul(X, ap.fake_quant(W, scales, 3), precision="highest") + BIAS
    bound.check(dense)
    bound.check(ap.fake_quant_matmul(X, W, scales, 3, bias=BIAS))


def test_second_derivatives_of_the_product_are_symmetric() -> None:
    """An hvp with respect to activations and weights, whose mixed term is not 0."""
    scales = scales_of(2, 32)

    def loss(args: Any) -> jax.Array:
        x, w, s = args
        return (ap.fake_quant_matmul(x, w, s, 2, act_bits=4) ** 2).sum()

    args = (X, W, scales)
    a, b = (tuple(normal(*v.shape) for v in args) for _ in range(2))
    hvp = jax.jit(lambda t: jax.jvp(jax.grad(loss), (args,), (t,))[1])
    pair = lambda u, v: sum(float((p * q).sum()) for p, q in zip(u, v, strict=True))  # noqa: E731
    forward, backward = pair(a, hvp(b)), pair(b, hvp(a))
    assert abs(forward - backward) <= 1e-4 * abs(forward)
    # Only w moves, and only x is asked for: 2 (dy W' + y dW').
    values, inside, _ = lsq(W.T, np.asarray(scales), 2)
    x_seen, rows_dot = seen(4, 32, None), inside * b[1].T
    y, y_dot = x_seen @ values.T, x_seen @ rows_dot.T
    only_w = (np.zeros_like(X), b[1], jnp.zeros_like(scales))
    close(hvp(only_w)[0], 2 * (y_dot @ values + y @ rows_dot), 8 * K)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_dtypes_and_leading_axes_of_the_product(dtype: str) -> None:
    x, scales = jnp.asarray(normal(2, M, K), dtype), scales_of(2, 32)
    fake = lambda x, w: ap.fake_quant_matmul(x, w, scales, 2, act_bits=4)  # noqa: E731
    y = fake(x, W)
    assert (y.shape, y.dtype) == ((2, M, N), dtype)
    np.testing.assert_array_equal(y, ap.matmul(x, tensor(2, "groups"), act_bits=4))
    dx, dw = jax.jit(jax.grad(lambda *a: fake(*a).astype(jnp.float32).sum(), (0, 1)))(x, W)
    assert (dx.dtype, dw.dtype) == (dtype, "float32")
    wide = ap.fake_quant_matmul(x, W, scales, 2, act_bits=4, out_dtype=jnp.float32)
    np.testing.assert_array_equal(
        wide, ap.matmul(x, tensor(2, "groups"), act_bits=4, out_dtype=jnp.float32)
    )


def test_vmap_of_the_product_and_its_gradient() -> None:
    xs, ws = normal(2, M, K), normal(2, K, N)
    scales = jnp.stack([scales_of(2, 32), 2 * scales_of(2, 32)])

    def loss(x: Any, w: Any, s: Any) -> jax.Array:
        return (ap.fake_quant_matmul(x, w, s, 2, act_bits=4) ** 2).sum()

    gradient = jax.jit(jax.grad(loss, (0, 1, 2)))
    mapped = jax.jit(jax.vmap(gradient))(xs, ws, scales)
    for i in range(2):
        for found, expected in zip(mapped, gradient(xs[i], ws[i], scales[i]), strict=True):
            close(found[i], expected)


# --- errors ---


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weights": [1.0]}, TypeError, "weights must be an array, got list"),
        ({"weights": np.ones((K, N))}, TypeError, "weights must be float32, .* got float64"),
        ({"weights": W[0]}, ValueError, "weights must have at least 2 axes"),
        ({"scales": 1.0}, TypeError, "scales must be an array, got float"),
        ({"scales": jnp.ones((K, 1))}, ValueError, r"scales must have shape \(5,\) and an axis"),
        ({"scales": jnp.ones((N, 3))}, ValueError, r"divides k = 128, got \(5, 3\)"),
        ({"scales": jnp.ones((N, 0))}, ValueError, r"divides k = 128, got \(5, 0\)"),
        ({"scales": jnp.ones((N, 8))}, ValueError, "group_size must be a multiple of 32"),
        ({"bits": 9}, ValueError, "bits must be from 1 to 8, got 9"),
        ({"rotation": 64}, TypeError, "rotation must be a Rotation or None, got 64"),
        ({"rotation": ap.Rotation(256)}, ValueError, "rotation block 256 must divide k"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"weights": W, "scales": scales_of(2, None), "bits": 2, **change}
    with pytest.raises(error, match=message):
        ap.fake_quant(**arguments)
    with pytest.raises(error, match=message):
        ap.fake_quant_matmul(X, **arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": 1.0}, TypeError, "x must be an array, got float"),
        ({"x": X[:, :3]}, ValueError, "x must have 128 values in its last axis"),
        ({"bias": BIAS[:2]}, ValueError, r"bias must have shape \(5,\), got \(2,\)"),
        ({"act_bits": 9}, ValueError, "act_bits must be from 1 to 8, got 9"),
        ({"act_scales": "channel"}, ValueError, "act_scales must be"),
        ({"implementation": "gpu"}, ValueError, "implementation must be"),
        ({"scales": -jnp.ones((N, 1))}, ValueError, "scales must be 0 or in"),
        ({"weights": jnp.full((K, N), jnp.nan)}, ValueError, "weights must be finite"),
    ],
)
def test_bad_arguments_of_the_product(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = {"x": X, "weights": W, "scales": scales_of(2, None), "bits": 2, **change}
    with pytest.raises(error, match=message):
        ap.fake_quant_matmul(**arguments)
