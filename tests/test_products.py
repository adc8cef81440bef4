"""Products: integers exactly, floats within a derived bound, the activation quantizer to the bit.

test_isa.py runs most of them again with each instruction set of the machine.
"""

from __future__ import annotations

import itertools
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import quick
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import PAIRS as PAIRS_TIMED
from layers import SMOLLM2, Layer
from shapes import FEW, SHAPES, Shape

import jax_anyprec as ap

PAIRS = tuple(itertools.product(range(1, 9), range(1, 9)))
NATIVE = ("cpu_planes", "cpu_codes")
XLA = () if os.environ.get("JAX_ANYPREC_ISA") else ("xla",)
"""A forced instruction set changes nothing in plain XLA, whose compile time is what costs most. So
cases take turns in its layout too: it brings tiles back to planes, as `restore` does."""
DTYPES = ("float32", "bfloat16", "float16")


def pack(codes: np.ndarray, bits: int, group: int, seed: int = 0) -> ap.QuantizedTensor:
    """Codes ``[N, K]`` with scales that play no part in integer products."""
    n, k = codes.shape
    scales = np.ones((n, k // group if k else 1), np.float32)
    return ap.QuantizedTensor.from_codes(codes, scales, bits=bits)


# --- integers ---


def sweep(shape: Shape, implementations: tuple[str, ...], pairs: Any = PAIRS) -> None:
    """Every pair of bits, implementation and layout, in one compiled function for the shape."""
    m, n, k, group = shape
    rng = np.random.default_rng(abs(hash(shape)) % 2**32)
    x = {a: rng.integers(0, 2**a, (m, k), np.uint8) for a in range(1, 9)}
    u = {b: rng.integers(0, 2**b, (n, k), np.uint8) for b in range(1, 9)}
    for codes in (x, u):  # extremes of sums: some rows all ones
        for bits, value in codes.items():
            value[::3] = 2**bits - 1
    w = {b: pack(u[b], b, group) for b in range(1, 9)}
    prepared = {b: w[b].prepare() for b in w}

    @quick.jit
    def run(x: dict[int, Any], *layouts: dict[int, Any]) -> dict[Any, Any]:
        return {
            (a, b, w[b].prepared, i): ap.int_matmul(x[a], w[b], a, implementation=i)
            for a, b in pairs
            for w in layouts
            for i in implementations
            if i != "xla" or w[b].prepared == (a + b) % 2
        }

    for (a, b, *how), result in run(x, w, prepared).items():
        assert result.dtype == jnp.int32
        expected = oracle.int_product(x[a], a, u[b], b, group)
        np.testing.assert_array_equal(result, expected, f"{how} {a} x {b} bits")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_integers_are_exact(shape: Shape) -> None:
    sweep(shape, NATIVE)


@pytest.mark.parametrize("shape", FEW, ids=str)
def test_integers_of_xla_are_exact(shape: Shape) -> None:
    sweep(shape, ("xla",))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_integers_of_xla_are_exact_on_every_shape(shape: Shape) -> None:
    sweep(shape, ("xla",), pairs=((1, 1), (3, 4), (8, 8)))


def test_oracle_equals_python_integers() -> None:
    rng = np.random.default_rng(0)
    for (a, b), (m, n, k, group) in itertools.product(PAIRS, [(2, 3, 33, 33), (1, 2, 64, 32)]):
        x = rng.integers(0, 2**a, (m, k), np.uint8)
        w = rng.integers(0, 2**b, (n, k), np.uint8)
        slow = oracle.int_product_slowly(x, a, w, b, group)
        assert oracle.int_product(x, a, w, b, group).tolist() == slow


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_integers_of_random_shapes(data: st.DataObject) -> None:
    m, n = data.draw(st.integers(0, 20), "m"), data.draw(st.integers(0, 40), "n")
    group = data.draw(st.integers(1, 9).map(lambda i: 32 * i), "group")
    groups = data.draw(st.integers(1, 4), "groups")
    k = group * groups
    if groups == 1:
        group = k = data.draw(st.integers(1, 400), "k")
    (a, b), seed = data.draw(st.sampled_from(PAIRS)), data.draw(st.integers(0, 99), "seed")
    rng = np.random.default_rng(seed)
    x, u = rng.integers(0, 2**a, (m, k), np.uint8), rng.integers(0, 2**b, (n, k), np.uint8)
    w = pack(u, b, group)

    @quick.jit
    def run(x: Any, *layouts: Any) -> list[Any]:
        names = (*NATIVE, "cpu", "xla", None)
        return [ap.int_matmul(x, w, a, implementation=i) for w in layouts for i in names]

    for result in run(x, w, w.prepare()):
        np.testing.assert_array_equal(result, oracle.int_product(x, a, u, b, group))


def test_integers_keep_batch_axes() -> None:
    rng = np.random.default_rng(1)
    u = rng.integers(0, 8, (5, 96), np.uint8)
    w = pack(u, 3, 32)
    x = rng.integers(0, 4, (2, 0, 3, 96), np.uint8)
    assert ap.int_matmul(x, w, 2).shape == (2, 0, 3, 5, 3)
    x = rng.integers(0, 4, (96,), np.uint8)
    expected = oracle.int_product(x[None], 2, u, 3, 32)[0]
    np.testing.assert_array_equal(ap.int_matmul(x, w, 2), expected)


@pytest.mark.parametrize("implementation", [*NATIVE, "xla"])
def test_largest_sums_fit_int32_or_are_refused(implementation: str) -> None:
    """32,896 values of 8 x 8 bits are the most that int32 holds: -256 * 255 each."""
    longest = (2**31 - 1) // (256 * 255)
    x, u = np.full((1, longest), 0, np.uint8), np.full((2, longest), 255, np.uint8)
    u[1] = 0
    found = ap.int_matmul(x, pack(u, 8, longest), 8, implementation=implementation)
    assert found.tolist() == [[[-longest * 256 * 255], [longest * 256 * 255]]]
    too_long = longest + 1
    w = pack(np.zeros((1, too_long), np.uint8), 8, too_long)
    with pytest.raises(ValueError, match=f"group_size {too_long} is too long for int32 at 8 x 8"):
        ap.int_matmul(np.zeros((1, too_long), np.uint8), w, 8, implementation=implementation)


# --- floats ---


class Case:
    """A product with everything that its oracle needs."""

    def __init__(
        self,
        shape: Shape,
        bits: int,
        act_bits: int | None,
        *,
        dtype: str = "float32",
        out_dtype: str = "float32",
        scale_dtype: str = "float32",
        offsets: bool = False,
        bias: bool = False,
        token: bool = False,
        rotation: ap.Rotation | None = None,
        seed: int = 0,
    ):
        rng = np.random.default_rng(seed)
        m, n, k, group = shape
        groups = k // group if k else 1
        self.act_bits, self.out_dtype = act_bits, out_dtype
        self.group = k if token else group
        self.act_scales = "token" if token else "group"
        self.x = rng.standard_t(3, (m, k)).astype(np.float32).astype(jnp.dtype(dtype))
        self.codes = rng.integers(0, 2**bits, (n, k), np.uint8)
        draw = lambda low, high: rng.uniform(low, high, (n, groups)).astype(scale_dtype)  # noqa: E731
        self.scales = draw(1e-3, 2e-2)
        self.offsets = draw(-0.5, 0.5) if offsets else None
        self.bias = rng.normal(size=n).astype(jnp.dtype(dtype)) if bias else None
        self.rotation = rotation
        self.w = ap.QuantizedTensor.from_codes(
            self.codes, self.scales, self.offsets, bits=bits, rotation=rotation
        )

    def expected(self) -> oracle.Bounded:
        rotation = None if self.rotation is None else (self.rotation.block, self.rotation.seed)
        w = (self.codes, self.w.bits, self.scales, self.offsets)
        if self.act_bits is None:
            x = self.x.astype(np.float32)
            x = x if rotation is None else oracle.rotate(x, *rotation)
            return oracle.float_matmul(x, self.group, w, self.bias, self.out_dtype)
        codes, scales = oracle.quantize_activations(self.x, self.act_bits, self.group, rotation)
        return oracle.quantized_matmul((codes, self.act_bits, scales), w, self.bias, self.out_dtype)

    def implementations(self) -> tuple[str, ...]:
        return ("cpu", *XLA) if self.act_bits is None else (*NATIVE, *XLA)


def check(cases: list[Case]) -> None:
    """All cases in one compiled function."""

    @jax.jit
    def run(arrays: list[tuple[Any, ...]]) -> list[list[Any]]:
        return [
            [
                ap.matmul(
                    x, w, bias=bias, act_bits=case.act_bits, act_scales=case.act_scales,
                    out_dtype=case.out_dtype, implementation=i,
                )
                for i in case.implementations()
                for w in layouts
                if i != "xla" or w.prepared == turn % 2
            ]
            for turn, (case, (x, bias, *layouts)) in enumerate(zip(cases, arrays, strict=True))
        ]  # fmt: skip

    arrays = [(c.x, c.bias, c.w, c.w.prepare()) for c in cases]
    for case, results in zip(cases, run(arrays), strict=True):
        expected = case.expected()
        for result in results:
            assert result.dtype == case.out_dtype
            expected.check(result)


@pytest.mark.parametrize("act_bits", [*range(1, 9), None])
def test_floats_stay_in_their_bound(act_bits: int | None) -> None:
    """Each width of weights, with and without offsets, bias and whole-token scales."""
    shape = Shape(6, 19, 320, 32 if act_bits else 64)
    flags = [(False, False, False), (True, False, True), (True, True, False), (False, True, True)]
    check(
        [
            Case(shape, bits, act_bits, offsets=offsets, bias=bias, token=token, seed=bits)
            for bits in range(1, 9)
            for offsets, bias, token in (flags[bits % 4], flags[(bits + 1) % 4])
        ]
    )


@pytest.mark.parametrize("shape", [s for s in SHAPES if s.m * s.n * s.k < 2**22], ids=str)
def test_floats_of_every_shape(shape: Shape) -> None:
    cases = [(4, 8, True, False), (3, None, False, True), (2, 2, True, True)]
    check([Case(shape, w, a, offsets=offsets, bias=bias) for w, a, offsets, bias in cases])


@pytest.mark.parametrize("layer", SMOLLM2[1:4], ids=str)
def test_floats_of_benchmarked_layers(layer: Layer) -> None:
    shape = Shape(1, layer.n, layer.k, 64)
    check([Case(shape, pair.weights, pair.activations, token=True) for pair in PAIRS_TIMED])


@pytest.mark.parametrize("dtype", DTYPES)
def test_floats_of_every_dtype(dtype: str) -> None:
    shape = Shape(5, 33, 192, 64)
    check(
        [
            Case(
                shape, 4, a, dtype=dtype, out_dtype=out, scale_dtype=scale, offsets=True, bias=True
            )
            for a in (6, None)
            for out, scale in zip(DTYPES, ("float16", "float32", "bfloat16"), strict=True)
        ]
    )


@pytest.mark.parametrize("block", [64, 128])
def test_floats_of_rotated_tensors(block: int) -> None:
    shape, rotation = Shape(4, 17, 384, 128), ap.Rotation(block, 11)
    check(
        [
            Case(shape, 4, a, dtype=dtype, token=token, offsets=token, rotation=rotation)
            for a in (4, 8, None)
            for dtype in DTYPES
            for token in (False, True)
        ]
    )


@pytest.mark.parametrize("offsets", [False, True])
def test_group_beyond_int32_stays_in_its_bound(offsets: bool) -> None:
    shape = Shape(2, 3, 70_000, 70_000)
    case = Case(shape, 8, 8, offsets=offsets)
    case.codes[0], case.x[0] = 255, np.abs(case.x[0])  # a sum beyond 2**31
    case.x[1] = 1
    case.w = ap.QuantizedTensor.from_codes(case.codes, case.scales, case.offsets, bits=8)
    check([case])
    with pytest.raises(ValueError, match="too long for int32"):
        ap.int_matmul(np.zeros((2, 70_000), np.uint8), case.w, 8)


def test_default_implementation_is_one_of_the_named() -> None:
    for act_bits in (1, 8, None):
        case = Case(Shape(3, 17, 96, 32), 2, act_bits)
        found = ap.matmul(case.x, case.w, act_bits=act_bits)
        named = [
            ap.matmul(case.x, case.w, act_bits=act_bits, implementation=i)
            for i in case.implementations()
        ]
        assert any(np.array_equal(found, y) for y in named)


def test_scalar_batch_and_batch_axes() -> None:
    case = Case(Shape(6, 9, 64, 32), 4, 8)
    y = ap.matmul(case.x, case.w, act_bits=8)
    one = ap.matmul(case.x[0], case.w, act_bits=8)
    assert one.shape == (9,)
    np.testing.assert_array_equal(one, y[0])
    np.testing.assert_array_equal(
        ap.matmul(case.x.reshape(2, 1, 3, 64), case.w, act_bits=8), y.reshape(2, 1, 3, 9)
    )
    assert ap.matmul(case.x.reshape(2, 3, 1, 64)[:, :0], case.w, act_bits=8).shape == (2, 0, 1, 9)


@pytest.mark.parametrize("act_bits", [4, 8])
@pytest.mark.parametrize("token", [False, True])
def test_a_bad_token_shows_and_spares_the_others(act_bits: int, token: bool) -> None:
    """NaN or infinity anywhere in a token makes its outputs NaN, whatever the implementation."""
    case = Case(Shape(5, 6, 64, 32), 4, act_bits, token=token)
    good = case.x.copy()
    for row, bad in enumerate((np.nan, np.inf, -np.inf)):
        case.x[row, 40] = bad
    for implementation in case.implementations():
        y = ap.matmul(
            case.x, case.w, act_bits=act_bits, act_scales=case.act_scales,
            implementation=implementation,
        )  # fmt: skip
        clean = ap.matmul(
            good, case.w, act_bits=act_bits, act_scales=case.act_scales,
            implementation=implementation,
        )  # fmt: skip
        assert np.isnan(y[:3]).all(), implementation
        np.testing.assert_array_equal(y[3:], clean[3:])


def test_non_finite_float_activations_show() -> None:
    case = Case(Shape(4, 6, 64, 32), 4, None)
    case.x[0, 3], case.x[1, 40], case.x[2, 63] = np.nan, np.inf, -np.inf
    for implementation in case.implementations():
        y = np.asarray(ap.matmul(case.x, case.w, implementation=implementation))
        assert not np.isfinite(y[:3]).any(), implementation
        assert np.isfinite(y[3]).all()


# --- the activation quantizer ---


def edge_activations(dtype: str, k: int, group: int) -> np.ndarray:
    """Rows of zeros, tiny, subnormal, huge and non-finite values, alone and among ordinary ones."""
    rng = np.random.default_rng(5)
    special = [0.0, -0.0, 1e-45, 1e-40, 1e-38, 1e-31, 3e-31, 1e-20, 65504.0, 1e20, 1e30, 3e32]
    special += [1e38, 3.4e38, np.inf, -np.inf, np.nan]
    rows = [rng.normal(size=k), np.zeros(k), -np.zeros(k), np.full(k, 0.5), np.full(k, -1e-3)]
    for value in special:
        mixed = rng.normal(size=k)
        mixed[k // 2] = value
        rows += [np.full(k, value), mixed]
        same = rng.normal(size=k)
        same[:group] = value
        rows.append(same)
    rows.append(np.round(rng.normal(size=k) * 8) / 8)  # many ties
    with np.errstate(over="ignore"):
        return np.array(rows, np.float32).astype(jnp.dtype(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("k", "group", "block"), [(64, 32, 0), (96, 96, 0), (33, 33, 0), (192, 64, 64), (256, 256, 128)]
)
def test_activation_quantizer_agrees_bit_for_bit(
    dtype: str, k: int, group: int, block: int
) -> None:
    x = edge_activations(dtype, k, group)
    rotation = ap.Rotation(block, 9) if block else None

    @jax.jit
    def run(x: jax.Array) -> list[Any]:
        return [
            [
                ap.quantize_activations(
                    x, bits, group_size=group, rotation=rotation, implementation=i
                )
                for i in ("cpu", *XLA)
            ]
            for bits in range(1, 9)
        ]

    for bits, results in enumerate(run(x), 1):
        codes, scales = oracle.quantize_activations(x, bits, group, (block, 9) if block else None)
        for implementation, (found_codes, found_scales) in zip(("cpu", *XLA), results, strict=True):
            message = f"{implementation}, {bits} bits"
            np.testing.assert_array_equal(found_scales, scales, message)
            np.testing.assert_array_equal(found_codes, codes, message)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_activation_quantizer_on_any_floats(data: st.DataObject) -> None:
    values = data.draw(
        st.lists(st.floats(width=32), min_size=64, max_size=64)
        | st.lists(st.floats(-4, 4, width=16), min_size=64, max_size=64)
    )
    x = np.array(values, np.float32).reshape(1, 64)
    bits = data.draw(st.integers(1, 8))
    codes, scales = oracle.quantize_activations(x, bits, 32)
    for implementation in ("cpu", "xla"):
        found_codes, found_scales = ap.quantize_activations(
            x, bits, group_size=32, implementation=implementation
        )
        np.testing.assert_array_equal(found_scales, scales, implementation)
        np.testing.assert_array_equal(found_codes, codes, implementation)


@pytest.mark.parametrize("implementation", ["cpu", "xla"])
def test_activation_quantizer_of_empty_arrays(implementation: str) -> None:
    for shape, group, groups in (((0, 64), 32, 2), ((3, 0), None, 1), ((2, 0, 64), 64, 1)):
        codes, scales = ap.quantize_activations(
            np.zeros(shape, np.float32), 4, group_size=group, implementation=implementation
        )
        assert codes.shape == shape
        assert scales.shape == (*shape[:-1], groups)


def test_codes_times_scales_are_near_the_activations() -> None:
    x = np.random.default_rng(0).normal(size=(3, 2, 64)).astype(np.float32)
    for bits in range(1, 9):
        codes, scales = ap.quantize_activations(x, bits, group_size=32)
        values = oracle.act_ints(np.asarray(codes), bits) * np.repeat(scales, 32, axis=-1)
        largest = np.repeat(np.abs(x.reshape(3, 2, 2, 32)).max(-1), 32, axis=-1)
        assert (np.abs(values - x) <= 1.0001 * largest / (2**bits - 1 - (bits >= 4))).all()
