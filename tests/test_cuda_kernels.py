"""The CUDA kernels' own PTX, launch by launch as the extension makes them, against the oracle.

The interpreter (tests/ptx) checks every access: bounds, alignment, barriers, copies under way.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import oracle
import ptx
import pytest
import simulated_cuda as cuda
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import FEW, Shape

import jax_anyprec as ap
from jax_anyprec import _native

if ptx.find_nvcc() is None:
    pytest.skip("the kernels' PTX is made by nvcc, which is not here", allow_module_level=True)
if _native.cuda().module is None:
    reason = f"the extension is not here: {_native.cuda().reason}"
    if os.environ.get("CI") == "true" and os.environ.get("JAX_ANYPREC_CUDA") != "OFF":
        pytest.fail(reason)
    pytest.skip(reason, allow_module_level=True)

BITS = range(1, 9)
TILES = ("narrow", "medium", "wide", "whole")
ONE_GROUP = tuple(s for s in FEW if s.group == s.k)


def weights(
    shape: Shape,
    bits: int,
    *,
    offsets: bool = False,
    dtype: str = "float32",
    rotation: ap.Rotation | None = None,
    seed: int = 0,
) -> tuple[ap.QuantizedTensor, np.ndarray]:
    """A tensor with random codes, some rows all ones, and these codes ``[N, K]``."""
    rng = np.random.default_rng(seed)
    _, n, k, group = shape
    codes = rng.integers(0, 2**bits, (n, k), np.uint8)
    codes[::3] = 2**bits - 1
    groups = (n, k // group if k else 1)
    scales = rng.uniform(0.02, 0.1, groups).astype(jnp.dtype(dtype))
    given = rng.normal(size=groups).astype(jnp.dtype(dtype)) if offsets else None
    tensor = ap.QuantizedTensor.from_codes(codes, scales, given, bits=bits, rotation=rotation)
    return tensor, codes


def check_integers(shape: Shape, act_bits: int, bits: int, method: str, tile: str) -> None:
    """Sums of groups, or where a tile does not give them their sum, which is exact in float32."""
    rng = np.random.default_rng(act_bits)
    x = rng.integers(0, 2**act_bits, (shape.m, shape.k), np.uint8)
    x[::3] = 2**act_bits - 1
    w, codes = weights(shape, bits)
    if tile in ("narrow", "whole"):
        found = cuda.matmul(x, w, act_bits, method, tile, integers=True)
        expected = oracle.int_product(x, act_bits, codes, bits, shape.group)
    else:
        # So that scales of all groups are 1: with the largest level, and none beyond it.
        x[:, :: max(1, shape.group)] = 2**act_bits - 1
        x = np.maximum(x, act_bits >= oracle.ZERO_BITS)
        w = dataclasses.replace(w, scales=jnp.ones_like(w.scales))
        values = oracle.act_ints(x, act_bits).astype(np.float32)
        found = cuda.matmul(values, w, act_bits, method, tile)
        expected = oracle.int_product(x, act_bits, codes, bits, shape.group).sum(axis=-1)
    np.testing.assert_array_equal(found, expected, f"{shape} {act_bits} x {bits} {method} {tile}")


def check_floats(
    shape: Shape,
    act_bits: int | None,
    bits: int,
    method: str,
    tile: str | None,
    *,
    x_dtype: str = "float32",
    dtype: str = "float32",
    out_dtype: str = "float32",
    offsets: bool = False,
    bias: bool = False,
    act_scales: str = "group",
    block: int = 0,
    splits: int = 1,
    **plan: Any,
) -> None:
    rng = np.random.default_rng(bits)
    rotation = ap.Rotation(block, seed=7) if block else None
    w, codes = weights(shape, bits, offsets=offsets, dtype=dtype, rotation=rotation)
    x = (3 * rng.normal(size=(shape.m, shape.k))).astype(jnp.dtype(x_dtype))
    b = rng.normal(size=shape.n).astype(jnp.dtype(dtype)) if bias else None
    found = cuda.matmul(
        x, w, act_bits, method, tile,
        splits=splits, bias=b, act_scales=act_scales, out_dtype=out_dtype, **plan,
    )  # fmt: skip
    seen, turn = x.astype(np.float32), (block, 7) if block else None
    group = shape.group if act_scales == "group" else shape.k
    packed = (codes, bits, np.asarray(w.scales), None if not offsets else np.asarray(w.offsets))
    if act_bits is None:
        seen = seen if turn is None else oracle.rotate(seen, *turn)
        expected = oracle.float_matmul(seen, group, packed, b, out_dtype)
    else:
        act_codes, scales = oracle.quantize_activations(seen, act_bits, group, turn)
        expected = oracle.quantized_matmul((act_codes, act_bits, scales), packed, b, out_dtype)
    expected.check(found)


# --- integers ---


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("method", ["planes", "codes"])
def test_every_pair_of_bits_is_exact(method: str, bits: int) -> None:
    for act_bits in BITS:
        check_integers(Shape(5, 35, 70, 70), act_bits, bits, method, "narrow")


@pytest.mark.parametrize("shape", ONE_GROUP, ids=str)
def test_planes_are_exact(shape: Shape) -> None:
    for bits in BITS:
        for tile in ("narrow", "whole"):
            check_integers(shape, (3 * bits) % 8 + 1, bits, "planes", tile)


@pytest.mark.parametrize("shape", FEW, ids=str)
@pytest.mark.parametrize("tile", TILES)
def test_codes_are_exact(tile: str, shape: Shape) -> None:
    if tile == "whole" and shape.group != shape.k:
        pytest.skip("whole tiles are for a single group")
    for bits in BITS:
        check_integers(shape, (5 * bits) % 8 + 1, bits, "codes", tile)


@pytest.mark.parametrize("method", ["planes", "codes"])
def test_more_than_one_tile_in_each_direction(method: str) -> None:
    # Rows and columns of several tiles, and more blocks of K than stages of shared memory.
    for tile in ("narrow", "whole"):
        check_integers(Shape(150, 300, 1100, 1100), 2, 2, method, tile)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.data())
def test_random_products_are_exact(data: st.DataObject) -> None:
    draw: Any = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    method = data.draw(st.sampled_from(["planes", "codes"]))
    group = draw(1, 600)
    k = group
    if method == "codes" and draw(0, 1):
        group = 32 * draw(1, 5)
        k = group * draw(1, 6)
    shape = Shape(draw(1, 40), draw(1, 140), k, group)
    w, _ = weights(shape, draw(1, 8))
    tile = data.draw(st.sampled_from(cuda.tiles_of(method, w)))
    check_integers(shape, draw(1, 8), w.bits, method, tile)


# --- floats ---


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("method", "act_bits"), [("planes", 3), ("codes", 5), ("float", None)])
def test_products_of_one_group(method: str, act_bits: int | None, bits: int) -> None:
    shape = Shape(21, 43, 320, 320)
    w, _ = weights(shape, bits)
    for i, tile in enumerate(cuda.tiles_of(method, w)):
        check_floats(
            shape, act_bits, bits, method, tile,
            x_dtype=("float32", "bfloat16", "float16")[(bits + i) % 3],
            out_dtype=("float32", "bfloat16", "float16")[i % 3],
            dtype=("float16", "float32", "bfloat16")[bits % 3],
            offsets=i % 2 == 0, bias=bits % 2 == 0, block=64 * (bits % 2),
        )  # fmt: skip


@pytest.mark.parametrize("tile", TILES[:3])
@pytest.mark.parametrize(("method", "act_bits"), [("codes", 8), ("codes", 3), ("float", None)])
def test_products_in_groups(method: str, act_bits: int | None, tile: str) -> None:
    for bits, group in ((1, 96), (3, 32), (4, 64), (7, 32), (8, 192)):
        check_floats(
            Shape(19, 45, 384, group), act_bits, bits, method, tile,
            offsets=bits in (3, 8), bias=True, x_dtype="bfloat16" if bits == 4 else "float32",
            act_scales="token" if bits in (4, 7) else "group", block=128 * (bits == 7),
        )  # fmt: skip


@pytest.mark.parametrize(("method", "act_bits"), [("planes", 2), ("codes", 8), ("float", None)])
def test_split_products_add_up(method: str, act_bits: int | None) -> None:
    for splits, group in ((2, 2112), (3, 2112), (5, 96)):
        if method == "planes" and group != 2112:
            continue
        for offsets in (False, True):
            check_floats(
                Shape(6, 37, 2112, group), act_bits, 4, method, "narrow",
                splits=splits, offsets=offsets, bias=True, out_dtype="bfloat16",
            )  # fmt: skip


@pytest.mark.parametrize("shape", [Shape(0, 5, 64, 64), Shape(3, 0, 64, 64), Shape(3, 5, 0, 0)])
@pytest.mark.parametrize(("method", "act_bits"), [("planes", 2), ("codes", 8), ("float", None)])
def test_empty_products(method: str, act_bits: int | None, shape: Shape) -> None:
    w, _ = weights(shape, 4)
    for tile in (*cuda.tiles_of(method, w), *(("stream",) if method != "planes" else ())):
        check_floats(shape, act_bits, 4, method, tile, bias=True)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("method", "act_bits"), [("planes", 2), ("codes", 8), ("float", None)])
def test_a_token_that_is_not_finite_gives_nan(
    method: str, act_bits: int | None, bad: float
) -> None:
    w, _ = weights(Shape(4, 33, 96, 96), 4)
    for dtype in ("float32", "bfloat16"):
        x = np.random.default_rng(0).normal(size=(4, 96)).astype(jnp.dtype(dtype))
        x[2, 40] = bad
        for tile in ("narrow", *(("stream",) if method != "planes" else ())):
            found = cuda.matmul(x, w, act_bits, method, tile)
            assert np.isnan(found[2]).all()
            assert np.isfinite(found[[0, 1, 3]]).all()


def test_given_peaks_choose_the_scale() -> None:
    shape = Shape(3, 33, 96, 96)
    w, codes = weights(shape, 4)
    x = np.random.default_rng(0).normal(size=(3, 96)).astype(np.float32)
    peaks = np.abs(x).max(-1) * np.float32([1, 2, 4])
    scales = (peaks * np.float32(1 / 254))[:, None]
    act_codes = np.array(
        [oracle.act_encode(row, s, 8) for row, (s,) in zip(x, scales, strict=True)], np.uint8
    )
    packed = (codes, 4, np.asarray(w.scales), None)
    expected = oracle.quantized_matmul((act_codes, 8, scales), packed, None, "float32")
    for tile in cuda.tiles_of("codes", w):
        expected.check(cuda.matmul(x, w, 8, "codes", tile, peaks=peaks))


# --- few rows: weights are streamed where the plan says so ---


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_few_rows_are_planned_to_be_streamed(dtype: str) -> None:
    for m in range(1, 17):
        for k in (97, 4096):
            w, _ = weights(Shape(m, 64, k, k), 4)
            for act_bits in (1, 8, None):
                planned = cuda.plan(np.zeros((m, k), jnp.dtype(dtype)), w, act_bits)
                assert planned["tile"] == "stream"
                assert planned["quantizes"] == (m == 1 and k % 8 == 0)


@pytest.mark.parametrize("bits", BITS)
def test_every_pair_of_bits_of_few_rows(bits: int) -> None:
    # Each number of activation bits, and floats, with two other numbers of rows.
    for act_bits in (*BITS, None):
        method = "float" if act_bits is None else "codes"
        for m in (1, 1 + (3 * bits + 5 * (act_bits or 9)) % 16, 9 + (bits + (act_bits or 0)) % 8):
            check_floats(
                Shape(m, 35, 97, 97), act_bits, bits, method, None, bias=True, x_dtype="bfloat16"
            )


@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 8, 9, 16])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_floats_of_several_parts(dtype: str, m: int) -> None:
    # Blocks of 32 or of 64 columns, the last of which has one tile.
    for bits in range(1 + m % 2, 9, 2):
        k = 192 if bits == 5 else 161
        check_floats(
            Shape(m, 69, k, k), None, bits, "float", None,
            x_dtype=dtype, offsets=bits == 3, block=64 * (bits == 5),
        )  # fmt: skip


@pytest.mark.parametrize("m", [1, 2, 8, 9, 16])
@pytest.mark.parametrize(("method", "act_bits"), [("codes", 8), ("codes", 3), ("float", None)])
def test_few_rows_in_groups(method: str, act_bits: int | None, m: int) -> None:
    for bits, k, group in (
        (1, 1056, 96),
        (2, 1600, 32),
        (4, 2048, 64),
        (5, 640, 320),
        (8, 576, 32),
    ):
        check_floats(
            Shape(m, 45, k, group), act_bits, bits, method, None,
            offsets=bits in (2, 8), bias=bits == 4, x_dtype="float32" if bits == 1 else "bfloat16",
            dtype="float16" if bits == 2 else "float32", block=64 * (bits == 4),
            act_scales="token" if bits == 5 else "group",
            out_dtype="float32" if bits == 2 else "bfloat16",
        )  # fmt: skip


@pytest.mark.parametrize("m", [1, 5, 16])
@pytest.mark.parametrize(("method", "act_bits"), [("codes", 8), ("float", None)])
@pytest.mark.parametrize("device", [cuda.A100, cuda.H100], ids=["A100", "H100"])
def test_few_rows_with_k_in_parts(
    device: cuda.Device, method: str, act_bits: int | None, m: int
) -> None:
    for splits, k, group in ((2, 2100, 2100), (3, 2112, 96), (4, 512, 64)):
        check_floats(
            Shape(m, 37, k, group), act_bits, 4, method, None, splits=splits, device=device,
            offsets=splits == 3, bias=True, out_dtype="bfloat16", x_dtype="bfloat16",
        )  # fmt: skip


@pytest.mark.parametrize("m", [1, 3, 16])
@pytest.mark.parametrize("splits", [2, 4, 8])
@pytest.mark.parametrize(("method", "act_bits"), [("codes", 8), ("float", None)])
def test_clusters_add_up(method: str, act_bits: int | None, splits: int, m: int) -> None:
    # The last case has more warps than stages: some blocks of the cluster add nothing.
    for bits, k, group in ((2, 2100, 2100), (3, 1056, 96), (8, 64, 64)):
        check_floats(
            Shape(m, 69, k, group), act_bits, bits, method, None, splits=splits, clustered=True,
            offsets=bits == 3, bias=True, out_dtype="bfloat16", x_dtype="bfloat16",
        )  # fmt: skip


@pytest.mark.parametrize(("method", "act_bits"), [("codes", 8), ("float", None)])
@pytest.mark.parametrize("device", [cuda.A100, cuda.H100], ids=["A100", "H100"])
def test_a_row_may_be_quantized_by_a_launch_before(
    device: cuda.Device, method: str, act_bits: int | None
) -> None:
    for quantizes in (False, True):
        check_floats(
            Shape(1, 35, 800, 800), act_bits, 3, method, None, quantizes=quantizes, device=device
        )


def test_a_row_too_long_to_be_quantized_beside_the_weights() -> None:
    for k in (20_000, 40_000):
        check_floats(Shape(1, 5, k, k), 8, 8, "codes", None)


# --- the quantizer ---


@pytest.mark.parametrize("bits", BITS)
def test_codes_and_scales_are_those_of_the_definition(bits: int) -> None:
    rng = np.random.default_rng(bits)
    cases = (
        (3, 65, 65, 0, "float32"), (2, 1056, 352, 0, "float16"), (2, 2048, 32, 512, "bfloat16"),
        (1, 3072, 3072, 1024, "float32"), (2, 384, 64, 128, "float32"),
        (1, 640, 320, 64, "bfloat16"),
    )  # fmt: skip
    for m, k, group, block, dtype in cases:
        x = (rng.normal(size=(m, k)) * 10.0 ** rng.integers(-3, 3, (m, 1))).astype(jnp.dtype(dtype))
        x[0, :5] = 0
        x[-1, 1] = np.nan if bits == 4 else x[-1, 1]
        rotation = ap.Rotation(block, seed=3) if block else None
        turn = (block, 3) if block else None
        found = cuda.quantize(x, bits, group, rotation)
        expected = oracle.quantize_activations(x.astype(np.float32), bits, group, turn)
        np.testing.assert_array_equal(found[1], expected[1])
        usable = np.repeat(np.isfinite(expected[1]), group, axis=-1)
        np.testing.assert_array_equal(found[0][usable], expected[0][usable])


def test_rows_longer_than_registers_hold() -> None:
    # 16 warps have 16,384 values: the rest is read again.
    x = np.random.default_rng(0).normal(size=(1, 20_000)).astype(np.float32)
    found = cuda.quantize(x, 8, 20_000)
    expected = oracle.quantize_activations(x, 8, 20_000)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)


# --- what the interpreter would find ---


@pytest.mark.parametrize("method", ["planes", "codes", "float"])
@pytest.mark.parametrize(
    ("wrong", "right", "fault"),
    [
        ("", r"bar\.sync\s+0;", ptx.SharedHazard),
        ("cp.async.wait_group 3;", r"cp\.async\.wait_group 2;", ptx.AsyncHazard),
    ],
)
def test_a_missing_wait_would_be_found(
    method: str, wrong: str, right: str, fault: type[ptx.Fault], monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_text(monkeypatch, method, lambda text: re.sub(right, wrong, text))
    with pytest.raises(fault):
        check_floats(
            Shape(6, 37, 1500, 1500), None if method == "float" else 2, 2, method, "narrow"
        )


@pytest.mark.parametrize(
    ("source", "tile", "splits"),
    [("codes", "narrow", 1), ("stream_codes", "stream", 1), ("prologue", "narrow", 2)],
)
def test_a_launch_that_does_not_wait_would_be_found(
    source: str, tile: str, splits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of "prologue" it is the launch that adds parts.
    replace_text(monkeypatch, source, lambda text: text.replace("griddepcontrol.wait;", ""))
    with pytest.raises(ptx.DependencyHazard):
        check_floats(Shape(6, 37, 1500, 1500), 8, 2, "codes", tile, splits=splits)


@pytest.mark.parametrize("barrier", [0, 1])
def test_a_missing_barrier_of_a_cluster_would_be_found(
    barrier: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one before blocks read each other's sums, and the one before they end."""

    def without(text: str) -> str:
        start = text.index(".entry anyprec_stream_codes_w2_n32")
        for word in ("arrive.release", "wait.acquire"):
            places = re.compile(rf"barrier\.cluster\.{re.escape(word)}\.aligned;")
            first, last = list(places.finditer(text, start))[:2]
            found = (first, last)[barrier]
            text = text[: found.start()] + text[found.end() :]
        return text

    replace_text(monkeypatch, "stream_codes", without)
    with pytest.raises((ptx.ClusterHazard, ptx.SharedHazard)):
        check_floats(Shape(3, 37, 2048, 2048), 8, 2, "codes", "stream", splits=2, clustered=True)


def replace_text(
    monkeypatch: pytest.MonkeyPatch, source: str, change: Callable[[str], str]
) -> None:
    """Other text for one file of kernels."""
    broken = change(cuda.text(source))
    assert broken != cuda.text(source)
    changed, original = ptx.load(broken), cuda.module
    monkeypatch.setattr(
        cuda, "module", lambda name, arch: changed if name == source else original(name, arch)
    )
