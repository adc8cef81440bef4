"""Codes, odd integers, bit planes and rotations: against Python integers, NumPy against JAX."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import quick
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jax_anyprec import Rotation
from jax_anyprec import format as fmt

BITS = range(1, 9)
sometimes = settings(max_examples=60, deadline=None)


@st.composite
def code_matrices(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    bits = draw(st.integers(1, 8))
    shape = draw(st.tuples(st.integers(0, 4), st.integers(0, 100)))
    elements = st.integers(0, 2**bits - 1)
    return draw(hnp.arrays(np.uint8, shape, elements=elements)), bits


@sometimes
@given(code_matrices())
def test_planes_hold_the_bits_of_python_integers(case: tuple[np.ndarray, int]) -> None:
    codes, bits = case
    planes = fmt.pack_planes(codes, bits)
    assert planes.dtype == np.uint32
    assert planes.shape == (bits, codes.shape[0], -(-codes.shape[1] // 32))
    assert planes.tolist() == oracle.planes_of(codes.tolist(), bits)
    np.testing.assert_array_equal(fmt.unpack_planes(planes, codes.shape[1]), codes)


@pytest.mark.parametrize("k", [0, 1, 31, 32, 33, 257])
@pytest.mark.parametrize("lead", [(), (2,), (2, 0, 3)])
def test_jax_packs_as_numpy(k: int, lead: tuple[int, ...]) -> None:
    rng = np.random.default_rng(k)
    codes = {bits: rng.integers(0, 2**bits, (*lead, 3, k), np.uint8) for bits in BITS}
    planes = {bits: fmt.pack_planes(codes[bits], bits) for bits in BITS}

    @quick.jit
    def run(codes: dict[int, jax.Array], planes: dict[int, jax.Array]) -> tuple[dict, dict]:
        return (
            {bits: fmt.pack_planes(u, bits) for bits, u in codes.items()},
            {bits: fmt.unpack_planes(p, k) for bits, p in planes.items()},
        )

    packed, unpacked = run(codes, planes)
    for bits in BITS:
        assert packed[bits].dtype == jnp.uint32
        assert unpacked[bits].dtype == jnp.uint8
        np.testing.assert_array_equal(packed[bits], planes[bits])
        np.testing.assert_array_equal(unpacked[bits], codes[bits])


def test_padding_bits_are_zero() -> None:
    planes = fmt.pack_planes(np.full((2, 33), 255, np.uint8), 8)
    assert planes[..., 0].tolist() == [[0xFFFFFFFF] * 2] * 8
    assert planes[..., 1].tolist() == [[1] * 2] * 8


@pytest.mark.parametrize("bits", BITS)
def test_codes_stand_for_odd_integers(bits: int) -> None:
    codes = np.arange(2**bits, dtype=np.uint8)
    expected = [oracle.odd_integer(u, bits) for u in range(2**bits)]
    assert expected == list(range(-(2**bits) + 1, 2**bits, 2))
    for array in (codes, jnp.asarray(codes)):
        found = fmt.codes_to_ints(array, bits)
        assert found.dtype == np.int32
        assert found.tolist() == expected


def test_first_planes_are_the_tensor_at_fewer_bits() -> None:
    codes = np.arange(256, dtype=np.uint8).reshape(2, 128)
    planes = fmt.pack_planes(codes, 8)
    for bits in BITS:
        np.testing.assert_array_equal(fmt.unpack_planes(planes[:bits], 128), codes >> (8 - bits))


def test_layout_constants_equal_those_of_the_extension() -> None:
    cpu = pytest.importorskip("jax_anyprec._cpu")
    for name in (
        "WORD_BITS",
        "MAX_BITS",
        "MIN_SCALE",
        "MAX_SCALE",
        "ZERO_LEVEL",
        "ZERO_BITS",
        "TILE",
    ):
        assert getattr(cpu, name) == getattr(fmt, name), name
    assert (fmt.MIN_SCALE, fmt.MAX_SCALE) == (oracle.MIN_SCALE, oracle.MAX_SCALE)
    assert (fmt.ZERO_LEVEL, fmt.ZERO_BITS) == (oracle.ZERO_LEVEL, oracle.ZERO_BITS)


# --- encode ---

INFINITE = (np.inf, -np.inf, np.nan)
EDGES = np.array(
    [
        *(0.0, -0.0, 1e-45, -1e-45, 1e-39, -1e-39, 2.0**-126, 1e-30, -1e-30, 0.5, -0.5, 1, -1),
        *(2, -2, 3, -3, 255, -255, 254.99998, 1e6, -1e6, 1e38, -1e38, 3.4e38, -3.4e38, *INFINITE),
    ],
    np.float32,
)
SCALES = np.array(
    [1, 0.5, 0.3, 1e-3, 0, -1, 1e-45, 2.0**-101, 2.0**-100, 2.0**100, 2.0**101, 1e38, *INFINITE],
    np.float32,
)


@pytest.mark.parametrize("bits", BITS)
def test_encode_of_edge_values_and_scales(bits: int) -> None:
    x, scales = EDGES[None, :], SCALES[:, None]
    codes = fmt.encode(x, scales, bits)
    assert codes.dtype == np.uint8
    assert codes.tolist() == [[oracle.encode_one(v, s, bits) for v in EDGES] for s in SCALES]
    jitted = jax.jit(fmt.encode, static_argnums=2)(x, scales, bits)
    np.testing.assert_array_equal(jitted, codes)
    np.testing.assert_array_equal(fmt.encode(jnp.asarray(x), jnp.asarray(scales), bits), codes)


@pytest.mark.parametrize("bits", BITS)
def test_encode_sends_ties_up_and_zero_to_the_upper_half(bits: int) -> None:
    scale, one = np.float32(0.25), np.ones(1, np.float32)
    top = 2**bits - 1
    for code in range(1, 2**bits):
        # Midway between the integers of `code - 1` and `code` lies the even number below `code`'s.
        tie = scale * np.float32(oracle.odd_integer(code, bits) - 1)
        below = np.nextafter(tie, np.float32(-np.inf))
        if tie == 0:  # only a magnitude that is no subnormal level falls below zero
            below = np.float32(-1e-3)
        assert fmt.encode(tie * one, scale * one, bits) == [code]
        assert fmt.encode(below * one, scale * one, bits) == [code - 1]
    assert fmt.encode(np.float32([0, -0.0]), scale, bits).tolist() == [2 ** (bits - 1)] * 2
    assert fmt.encode(np.float32([np.inf, -np.inf, np.nan]), scale, bits).tolist() == [top, 0, 0]


@sometimes
@given(
    x=hnp.arrays(np.float32, 40, elements=st.floats(width=32)),
    scale=st.floats(2.0**-100, 2.0**100, width=32),
    bits=st.integers(1, 8),
)
def test_encode_of_any_float(x: np.ndarray, scale: float, bits: int) -> None:
    expected = [oracle.encode_one(v, np.float32(scale), bits) for v in x]
    assert fmt.encode(x, np.float32(scale), bits).tolist() == expected
    jitted = jax.jit(fmt.encode, static_argnums=2)(x, np.float32(scale), bits)
    assert jitted.tolist() == expected


def test_encode_rounds_to_the_nearest_level() -> None:
    x = np.random.default_rng(0).normal(size=5000).astype(np.float32)
    for bits in BITS:
        scale = np.float32(0.1)
        found = 0.1 * oracle.ints(fmt.encode(x, scale, bits), bits)
        levels = 0.1 * np.arange(-(2**bits) + 1, 2**bits, 2)
        nearest = np.abs(x[:, None] - levels).min(1)
        np.testing.assert_allclose(np.abs(x - found), nearest, atol=1e-6)


@pytest.mark.parametrize("bits", BITS)
def test_codes_of_activations_are_odd_integers_or_have_a_zero(bits: int) -> None:
    codes = np.arange(2**bits, dtype=np.uint8)
    found = fmt.act_codes_to_ints(codes, bits).tolist()
    assert found == [oracle.act_integer(u, bits) for u in range(2**bits)]
    assert (0 in found) == (bits >= 4)
    used = found if bits < 4 else found[1:]
    assert max(used) == -min(used) == fmt.act_max_level(bits)


@pytest.mark.parametrize("bits", BITS)
def test_act_encode_of_edge_values_and_scales(bits: int) -> None:
    x, scales = EDGES[None, :], SCALES[:, None]
    codes = fmt.act_encode(x, scales, bits)
    assert codes.tolist() == [oracle.act_encode(EDGES, s, bits) for s in SCALES]
    jitted = jax.jit(fmt.act_encode, static_argnums=2)(x, scales, bits)
    np.testing.assert_array_equal(jitted, codes)
    steps = np.float32(np.arange(-2 * 2**bits, 2 * 2**bits) / 2)  # ties among them
    codes = fmt.act_encode(steps, np.float32(0.5), bits)
    assert codes.tolist() == oracle.act_encode(steps, np.float32(0.5), bits)
    if bits >= 4:
        zeros = fmt.act_encode(EDGES[:9], np.float32(1), bits)
        assert not fmt.act_codes_to_ints(zeros, bits).any()


# --- rotation ---


@pytest.mark.parametrize(("block", "k"), [(64, 64), (64, 192), (128, 128), (256, 768)])
def test_rotation_is_orthonormal_and_inverts(block: int, k: int) -> None:
    rotation = Rotation(block, seed=7)
    matrix = rotation.apply(np.eye(k, dtype=np.float32))
    expected = np.zeros((k, k))
    for at in range(0, k, block):
        expected[at : at + block, at : at + block] = oracle.hadamard_matrix(block)
    np.testing.assert_allclose(matrix, oracle.signs(7, k)[:, None] * expected, atol=1e-7)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(k), atol=1e-6)
    x = np.random.default_rng(1).normal(size=(3, k)).astype(np.float32)
    np.testing.assert_allclose(rotation.invert(rotation.apply(x)), x, atol=1e-5)


@pytest.mark.parametrize(("block", "k"), [(64, 64), (64, 192), (512, 1536)])
def test_rotation_agrees_bit_for_bit(block: int, k: int) -> None:
    rotation = Rotation(block, seed=123)
    x = np.random.default_rng(2).standard_cauchy((5, k)).astype(np.float32)
    expected = oracle.rotate(x, block, 123)
    np.testing.assert_array_equal(rotation.apply(x), expected)
    np.testing.assert_array_equal(jax.jit(rotation.apply)(x), expected)
    np.testing.assert_array_equal(jax.jit(rotation.invert)(x), rotation.invert(x))


def test_signs_are_pinned() -> None:
    """Packed checkpoints depend on them: they may never change."""
    assert Rotation(64, 0).sign_words(128).tolist() == [0, 0x514E28B7, 0x30F4C306, 0x85F0B427]
    np.testing.assert_array_equal(Rotation(64, 2**32 - 1).signs(320), oracle.signs(2**32 - 1, 320))
    balance = Rotation(64, 3).signs(2**16).mean()
    assert abs(balance) < 0.02


def test_rotation_for_size_takes_the_largest_block() -> None:
    assert Rotation.for_size(576) == Rotation(64, 0)
    assert Rotation.for_size(1536, seed=5) == Rotation(512, 5)
    assert Rotation.for_size(8192).block == 1024
