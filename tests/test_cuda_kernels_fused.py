"""The CUDA kernels of fused products in the interpreter: a norm or a gate before, a residual after.

Inputs are such that the activations which go into a product are known to the bit, so that codes and
sums are; others have bounds.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import simulated_cuda as cuda
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import Shape
from test_cuda_kernels import weights
from test_fusion import gated, normalised, rounded

import jax_anyprec as ap
from jax_anyprec import _native

DTYPES = ("float32", "bfloat16", "float16")
BEFORE = ("none", "norm", "gate")
KINDS = [("codes", 8), ("codes", 4), ("float", None)]
F32 = np.float32


class Input(NamedTuple):
    """``x`` and what comes before the product, and the activations that this must give."""

    x: np.ndarray
    before: ap.RMSNorm | ap.SwiGLU | None
    activations: np.ndarray


# --- inputs whose activations are exact ---


def normal(rng: np.random.Generator, m: int, k: int, dtype: str) -> Input:
    return Input(x := rng.normal(size=(m, k)).astype(jnp.dtype(dtype)), None, x)


def exact_norm(rng: np.random.Generator, m: int, k: int, dtype: str) -> Input:
    """Rows whose mean of squares is a power of 4, and no eps: the root is a power of 2."""
    fives = np.array([[3, 3, 1, 1, 0], [4, 2, 0, 0, 0], [4, 1, 1, 1, 1], [2, 2, 2, 2, 2]], F32)
    parts = fives[rng.integers(0, len(fives), (m, k // 5))].reshape(m, -1)
    x = np.concatenate([parts, np.full((m, k % 5), 2, F32)], -1)
    x = rng.permuted(x, axis=-1) * rng.choice([-1, 1], (m, k)).astype(F32)
    sizes = F32(2) ** rng.integers(-3, 4, (m, 1))
    scale = rng.uniform(0.5, 2, k).astype(F32)
    h = (x * sizes) * (F32(0.5) / sizes * scale)
    dtype = jnp.dtype(dtype)
    return Input((x * sizes).astype(dtype), ap.RMSNorm(scale, 0.0), h.astype(dtype))


def exact_gate(rng: np.random.Generator, m: int, k: int, dtype: str) -> Input:
    """Gates so large that the sigmoid is 0 or 1; in 16 bits any whose result rounds to the same
    whatever is right in float32."""
    gate = np.where(rng.integers(0, 2, (m, k)) == 1, rng.uniform(20, 40, (m, k)), -200.0)
    gate[:, ::5] = 0
    if dtype != "float32":
        gate[:, 1::2] = rng.normal(size=gate[:, 1::2].shape)
    gate, up = (v.astype(jnp.dtype(dtype)) for v in (gate, rng.normal(size=(m, k))))

    def results() -> tuple[np.ndarray, np.ndarray]:
        x = np.concatenate([gate, up], -1)
        value, error = gated(x, "float32")
        return tuple((value + e).astype(F32).astype(gate.dtype) for e in (-error, error))

    low, high = results()
    saturated = np.abs(gate.astype(F32)) >= 20
    unclear = (low != high) & ~saturated & (gate != 0)
    gate = np.where(unclear, gate.dtype.type(0), gate)
    low, high = results()
    positive = gate.astype(F32) * up.astype(F32)
    h = np.where(saturated | (gate == 0), np.where(gate > 0, positive, 0), high)
    return Input(np.concatenate([gate, up], -1), ap.SwiGLU(), h.astype(gate.dtype))


EXACT = {"none": normal, "norm": exact_norm, "gate": exact_gate}


def check(
    shape: Shape,
    act_bits: int | None,
    method: str,
    how: str,
    *,
    bits: int = 4,
    x_dtype: str = "bfloat16",
    dtype: str = "float32",
    out_dtype: str = "float32",
    offsets: bool = False,
    bias: bool = False,
    residual: str | None = "float32",
    act_scales: str = "group",
    block: int = 0,
    **plan: Any,
) -> None:
    rng = np.random.default_rng(shape.k + shape.m)
    given = EXACT[how](rng, shape.m, shape.k, x_dtype)
    rotation = ap.Rotation(block, seed=7) if block else None
    w, codes = weights(shape, bits, offsets=offsets, dtype=dtype, rotation=rotation)
    b = rng.normal(size=shape.n).astype(jnp.dtype(dtype)) if bias else None
    r = None
    if residual is not None:
        r = rng.normal(size=(shape.m, shape.n)).astype(jnp.dtype(residual))
    found = cuda.matmul(
        given.x, w, act_bits, method, "stream", bias=b, before=given.before, residual=r,
        act_scales=act_scales, out_dtype=out_dtype, **plan,
    )  # fmt: skip
    seen, turn = given.activations.astype(F32), (block, 7) if block else None
    packed = (codes, bits, np.asarray(w.scales), None if not offsets else np.asarray(w.offsets))
    last = out_dtype if r is None else "float32"
    if act_bits is None:
        seen = seen if turn is None else oracle.rotate(seen, *turn)
        product = oracle.float_matmul(seen, shape.group, packed, b, last)
    else:
        group = shape.group if act_scales == "group" else shape.k
        act_codes, scales = oracle.quantize_activations(seen, act_bits, group, turn)
        product = oracle.quantized_matmul((act_codes, act_bits, scales), packed, b, last)
    added(product, r, out_dtype).check(found)


def added(product: oracle.Bounded, residual: np.ndarray | None, dtype: str) -> oracle.Bounded:
    """One float32 addition, then the cast."""
    if residual is None:
        return product
    y = product.value + residual.astype(np.float64)
    return rounded(y, product.error + oracle.gamma(1) * (np.abs(y) + product.error), dtype)


# --- values ---


@pytest.mark.parametrize("m", [1, 2, 9, 16])
@pytest.mark.parametrize(("method", "act_bits"), KINDS)
@pytest.mark.parametrize("how", BEFORE)
def test_values(how: str, method: str, act_bits: int | None, m: int) -> None:
    """Odd N and K; types in turn."""
    for i, k in enumerate((97, 37, 200)):
        check(
            Shape(m, 35, k, k), act_bits, method, how, bits=i + 3, x_dtype=DTYPES[i],
            dtype=DTYPES[(i + 1) % 3], residual=DTYPES[(i + m) % 3],
            out_dtype=DTYPES[(i + 2 * m) % 3], offsets=i == 1, bias=i != 2,
        )  # fmt: skip


@pytest.mark.parametrize("m", [1, 3, 16])
@pytest.mark.parametrize(("method", "act_bits"), KINDS)
@pytest.mark.parametrize("how", ["norm", "gate"])
def test_groups_and_rotations(how: str, method: str, act_bits: int | None, m: int) -> None:
    for block, scales, dtype in ((0, "group", "float32"), (64, "token", "bfloat16")):
        check(
            Shape(m, 69, 1600, 32), act_bits, method, how, x_dtype=dtype, offsets=True,
            act_scales=scales, block=block, residual=None,
        )  # fmt: skip


@pytest.mark.parametrize("device", [cuda.A100, cuda.H100], ids=["A100", "H100"])
@pytest.mark.parametrize(("method", "act_bits"), [("codes", 8), ("float", None)])
@pytest.mark.parametrize("how", BEFORE)
def test_a_row_is_quantized_in_the_block_or_by_a_launch_before(
    how: str, method: str, act_bits: int | None, device: cuda.Device
) -> None:
    for quantizes in (False, True):
        check(
            Shape(1, 33, 800, 800), act_bits, method, how, quantizes=quantizes, device=device
        )  # fmt: skip


@pytest.mark.parametrize(("method", "act_bits"), [("codes", 8), ("float", None)])
@pytest.mark.parametrize("how", ["norm", "gate"])
def test_rows_longer_than_registers_hold(how: str, method: str, act_bits: int | None) -> None:
    """A block's warps hold 8,192 values, those of a launch before 16,384."""
    for m, k in ((1, 9_000), (2, 17_000)):
        check(Shape(m, 5, k, k), act_bits, method, how)


@pytest.mark.parametrize("m", [1, 5, 16])
@pytest.mark.parametrize("clustered", [False, True])
@pytest.mark.parametrize(("method", "act_bits"), [("codes", 8), ("float", None)])
def test_bias_and_residual_are_added_once(
    method: str, act_bits: int | None, clustered: bool, m: int
) -> None:
    """With K in parts, which a launch or a cluster adds; of results that 4 divides or not."""
    for i, how in enumerate(BEFORE):
        for splits, n, dtype in ((2, 37, "float32"), (4, 64, "bfloat16")):
            check(
                Shape(m, n, 1056, 96), act_bits, method, how, splits=splits, clustered=clustered,
                bias=True, residual=DTYPES[i], out_dtype=dtype, offsets=splits == 4,
            )  # fmt: skip


@pytest.mark.parametrize("m", [1, 2])
@pytest.mark.parametrize("how", ["norm", "gate"])
def test_a_norm_or_gate_alone(how: str, m: int) -> None:
    check(Shape(m, 33, 320, 320), 8, "codes", how, residual=None, out_dtype="bfloat16")


def test_the_residual_is_rounded_once() -> None:
    """To the type of the result: of the product alone nothing would be left in bfloat16."""
    w, _ = weights(Shape(2, 33, 64, 64), 4)
    x = np.full((2, 64), 2.0**-14, F32)
    residual = np.ones((2, 33), F32)
    for splits, clustered in ((1, False), (2, False), (2, True)):
        y = cuda.matmul(
            x, w, None, "float", "stream", residual=residual, splits=splits, clustered=clustered
        )
        assert (y != 1).all()
        short = cuda.matmul(
            x, w, None, "float", "stream", residual=residual, splits=splits,
            clustered=clustered, out_dtype="bfloat16",
        )  # fmt: skip
        np.testing.assert_array_equal(short, y.astype(jnp.bfloat16))


# --- other values: within bounds, in rows of one weight each ---


def activations(x: np.ndarray, before: Any, m: int, k: int) -> np.ndarray:
    """What goes into a product, by a product with the identity in codes of 1 bit and offsets."""
    codes = np.eye(k, dtype=np.uint8)
    half, one = np.full((k, 1), 0.5, F32), np.zeros((k, 1), F32)
    w = ap.QuantizedTensor.from_codes(codes, half, one, bits=1)
    return cuda.matmul(x, w, None, "float", "stream", before=before)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.data())
def test_any_values(data: st.DataObject) -> None:
    """Offset + (2 code) s is 1 on the diagonal and 0 beside it, so results are activations but for
    what float32 adds: sums of 2 K terms."""
    draw: Any = lambda *options: data.draw(st.sampled_from(options))  # noqa: E731
    m, k, dtype, how = draw(1, 2, 9), draw(1, 33, 100), draw(*DTYPES), draw("norm", "gate")
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    size = 10.0 ** data.draw(st.integers(-4, 2))
    width = 2 * k if how == "gate" else k
    x = (size * rng.standard_t(3, (m, width))).clip(-200, 200).astype(jnp.dtype(dtype))
    scale = rng.uniform(-2, 2, k).astype(F32)
    eps = draw(0.0, 1e-5)
    if how == "gate":
        found, wanted = activations(x, ap.SwiGLU(), m, k), gated(x, dtype)
    else:
        x[x == 0] = x.dtype.type(1)
        found, wanted = (
            activations(x, ap.RMSNorm(scale, eps), m, k), normalised(x, scale, eps, dtype)
        )  # fmt: skip
    sums = oracle.gamma(2 * k + 8) * np.abs(wanted.value).sum(-1, keepdims=True) + 2.0**-120
    oracle.Bounded(wanted.value, wanted.error + sums).check(found)


# --- NaN, infinities and very negative gates ---


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("m", [1, 4])
@pytest.mark.parametrize(("method", "act_bits"), [("codes", 8), ("float", None)])
@pytest.mark.parametrize("how", ["norm", "gate"])
def test_a_token_that_is_not_finite_gives_nan(
    how: str, method: str, act_bits: int | None, m: int, bad: float
) -> None:
    w, _ = weights(Shape(m, 33, 96, 96), 4)
    given = EXACT[how](np.random.default_rng(0), m, 96, "float32")
    for at in (40, given.x.shape[1] - 3):
        x = given.x.copy()
        x[-1, at] = bad
        y = cuda.matmul(x, w, act_bits, method, "stream", before=given.before)
        assert np.isnan(y[-1]).all()
        assert np.isfinite(y[:-1]).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 2])
def test_a_very_negative_gate_is_zero(dtype: str, m: int) -> None:
    gates = np.array([-60.0, -88.0, -90.0, -1e4, -6e4, 0.0, 30.0], F32)
    x = np.tile(np.concatenate([gates, np.full(7, 2, F32)]), (m, 1)).astype(jnp.dtype(dtype))
    found = activations(x, ap.SwiGLU(), m, 7)
    assert np.abs(found[:, :6]).max() < 1e-20
    np.testing.assert_array_equal(found[:, 6], F32(60))


def test_zeros_are_not_a_number_without_eps() -> None:
    """0 / 0 in the row itself; past its end nothing is read or counted."""
    w, _ = weights(Shape(2, 33, 37, 37), 4)
    x = np.zeros((2, 37), F32)
    x[1] = 1
    norm = lambda eps: ap.RMSNorm(np.ones(37, F32), eps)  # noqa: E731
    y = cuda.matmul(x, w, 8, "codes", "stream", before=norm(0.0))
    assert np.isnan(y[0]).all()
    assert np.isfinite(y[1]).all()
    y = cuda.matmul(x, w, 8, "codes", "stream", before=norm(1e-5))
    assert (y[0] == 0).all()


# --- what launches refuse ---


@pytest.mark.parametrize("tile", ["narrow", "whole"])
def test_only_products_of_few_rows_are_fused(tile: str) -> None:
    shape = Shape(2, 33, 96, 96)
    w, _ = weights(shape, 4)
    x, residual = np.ones((2, 96), F32), np.ones((2, 33), F32)
    norm = ap.RMSNorm(np.ones(96, F32), 0.0)
    for method, act_bits in (("planes", 2), ("codes", 8), ("float", None)):
        for options in ({"before": norm}, {"residual": residual}):
            with pytest.raises(ValueError, match="only tile stream has products with a norm"):
                cuda.matmul(x, w, act_bits, method, tile, **options)


def test_an_unknown_name() -> None:
    with pytest.raises(ValueError, match="before must be none, rms_norm or swiglu, got layer_norm"):
        _native.cuda().module.launches(
            rows=1, n=32, k=32, act_bits=8, weight_bits=4, group_size=32, act_group_size=32,
            x_dtype="float32", rotated=False, integers=False, method="codes", tile="stream",
            splits=1, clustered=False, quantizes=False, arch=90, multiprocessors=132, block=0,
            **dict.fromkeys(("x", "tiles", "scales", "offsets", "bias", "signs", "peaks"), 0),
            **dict.fromkeys(("out", "workspace", "parts"), 0),
            **{f"{name}_dtype": "float32" for name in ("scale", "offset", "bias", "out")},
            before="layer_norm",
        )  # fmt: skip
