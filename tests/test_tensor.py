"""`QuantizedTensor`: what it stands for, truncation, import of codes, pytree behaviour."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from test_quantize import codes_of, gaussian

import jax_anyprec as ap

BITS = range(1, 9)


def random_tensor(
    bits: int, offsets: bool, dtype: str = "float32", k: int = 96, group: int = 32
) -> tuple[ap.QuantizedTensor, np.ndarray, np.ndarray, np.ndarray | None]:
    """A tensor with its codes, scales and offsets."""
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 2**bits, (5, k), np.uint8)
    scales = rng.uniform(0.01, 1, (5, k // group)).astype(jnp.dtype(dtype))
    z = rng.normal(size=scales.shape).astype(jnp.dtype(dtype)) if offsets else None
    return ap.QuantizedTensor.from_codes(codes, scales, z, bits=bits), codes, scales, z


@pytest.mark.parametrize("columns", [(32, 64), (5, 40, 1), (7,), (0, 33)])
@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("offsets", [False, True])
@pytest.mark.parametrize("leading", [(), (2,)])
def test_concatenate(columns: tuple, prepared: bool, offsets: bool, leading: tuple) -> None:
    rng = np.random.default_rng(0)

    def pack(codes: np.ndarray, scales: np.ndarray) -> ap.QuantizedTensor:
        w = ap.QuantizedTensor.from_codes(codes, scales, -scales if offsets else None, bits=3)
        return w.prepare() if prepared else w

    codes = [rng.integers(0, 8, (*leading, n, 64), np.uint8) for n in columns]
    scales = [rng.uniform(0.01, 1, (*leading, n, 2)).astype(np.float16) for n in columns]
    parts = [pack(c, s) for c, s in zip(codes, scales, strict=True)]
    expected = pack(np.concatenate(codes, axis=-2), np.concatenate(scales, axis=-2))
    joined = ap.concatenate(parts)
    assert joined.prepared == prepared
    assert joined.shape == (*leading, 64, sum(columns))
    jax.tree.map(np.testing.assert_array_equal, joined, expected)
    jax.tree.map(np.testing.assert_array_equal, jax.jit(ap.concatenate)(parts), expected)


def test_concatenate_says_what_differs() -> None:
    def tensor(bits: int = 2, k: int = 64, group: int = 32, dtype: str = "float32", **fields):
        w = ap.quantize(np.ones((k, 4), np.float32), bits, group_size=group, scale_dtype=dtype)
        return dataclasses.replace(w, **fields)

    first = tensor()
    for other, message in (
        (tensor(3), r"tensors\[1\] has bits 3 and tensors\[0\] 2"),
        (tensor(k=96), "K 96"),
        (tensor(group=64), "group_size 64"),
        (tensor(dtype="float16"), "scales of dtype float16"),
        (tensor(offsets=first.scales), "offsets of dtype float32"),
        (tensor(rotation=ap.Rotation(64)), "rotation Rotation"),
        (tensor().prepare(), "prepared True"),
    ):
        with pytest.raises(ValueError, match=message):
            ap.concatenate([first, other])
    with pytest.raises(ValueError, match="tensors must have at least one element"):
        ap.concatenate([])
    with pytest.raises(TypeError, match=r"tensors\[1\] must be a QuantizedTensor"):
        ap.concatenate([first, np.ones((64, 4))])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("offsets", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dequantize_against_float64(bits: int, offsets: bool, dtype: str) -> None:
    w, codes, scales, z = random_tensor(bits, offsets, dtype)
    rows, sizes = oracle.rows_of(codes, bits, scales, z)
    for dequantize in (w.dequantize, jax.jit(w.dequantize)):
        found = np.asarray(dequantize(), np.float64)
        # One product and, with offsets, one sum.
        assert (np.abs(found - rows.T) <= oracle.gamma(1 + offsets) * sizes.T).all()
    assert w.dequantize(jnp.bfloat16).dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        w.dequantize("float16"), np.asarray(w.dequantize()).astype(np.float16)
    )


def test_dequantize_undoes_the_rotation() -> None:
    weights = gaussian(192, 7)
    w = ap.quantize(weights, 8, group_size=32, rotation=ap.Rotation(64, 5))
    np.testing.assert_allclose(w.dequantize(), weights, atol=0.03)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("offsets", [False, True])
def test_truncate_drops_the_low_bits(bits: int, offsets: bool) -> None:
    w, codes, scales, z = random_tensor(bits, offsets)
    for fewer in range(1, bits + 1):
        t = w.truncate(fewer)
        assert t.bits == fewer
        assert t.shape == w.shape
        dropped = bits - fewer
        kept = codes_of(t)
        np.testing.assert_array_equal(kept, codes >> dropped)
        np.testing.assert_array_equal(t.scales, scales * np.float32(2**dropped))  # exact
        # Each value is the mean of the cell: of all codes with these high bits.
        cell = [(kept.astype(int) << dropped) + low for low in range(2**dropped)]
        rows = np.mean([oracle.rows_of(c, bits, scales, z)[0] for c in cell], axis=0)
        np.testing.assert_allclose(t.dequantize(), rows.T, rtol=1e-5, atol=1e-5)


def test_truncate_twice_is_truncate_once() -> None:
    w, *_ = random_tensor(8, offsets=False)
    once, twice = w.truncate(2), w.truncate(5).truncate(2)
    jax.tree.map(np.testing.assert_array_equal, once, twice)
    assert w.truncate(8) is w


def test_truncate_widens_scales_that_could_overflow() -> None:
    scales = np.full((1, 1), 60000, np.float16)
    w = ap.QuantizedTensor.from_codes(np.full((1, 32), 255, np.uint8), scales, bits=8)
    assert w.truncate(1).scales.tolist() == [[60000 * 128]]


def test_truncate_does_not_upset_a_rotation() -> None:
    weights = gaussian(64, 3)
    w = ap.quantize(weights, 8, rotation=ap.Rotation(64)).truncate(6)
    np.testing.assert_allclose(w.dequantize(), weights, atol=0.1)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("minimum", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_affine_integers_come_in_without_loss(dtype: str, minimum: bool, bits: int) -> None:
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 2**bits, (4, 64), np.uint8)
    step = rng.uniform(0.01, 1, (4, 2)).astype(jnp.dtype(dtype))
    low = rng.normal(size=(4, 2)).astype(jnp.dtype(dtype)) if minimum else None
    w = ap.QuantizedTensor.from_codes(codes, step * step.dtype.type(0.5), low, bits=bits)
    assert w.bits == bits
    assert w.group_size == 32
    wide = np.repeat(step.astype(np.float64), 32, axis=1)
    if low is None:
        values = wide * (codes - (2**bits - 1) / 2)
    else:
        values = wide * codes + np.repeat(low.astype(np.float64), 32, axis=1)
    exact = oracle.rows_of(
        codes_of(w), bits, np.asarray(w.scales), None if low is None else np.asarray(w.offsets)
    )[0]
    np.testing.assert_array_equal(exact, values)


def test_codes_beyond_the_bits_are_refused() -> None:
    codes = np.full((2, 32), 16, np.uint8)
    with pytest.raises(ValueError, match="codes"):
        ap.QuantizedTensor.from_codes(codes, np.ones((2, 1), np.float32), bits=4)


@pytest.mark.parametrize("dtype", [np.float32, np.int32, np.int8])
def test_codes_of_another_dtype_are_refused(dtype: type) -> None:
    codes = np.zeros((2, 32), dtype)
    with pytest.raises(TypeError, match="codes"):
        ap.QuantizedTensor.from_codes(codes, np.ones((2, 1), np.float32), bits=4)


def test_stacked_codes() -> None:
    codes = np.random.default_rng(0).integers(0, 8, (2, 3, 5, 64), np.uint8)
    w = ap.QuantizedTensor.from_codes(codes, np.ones((2, 3, 5, 2), np.float32), bits=3)
    assert w.shape == (2, 3, 64, 5)
    expected = np.swapaxes(oracle.ints(codes, 3), -1, -2)
    np.testing.assert_array_equal(w.dequantize(), expected)
    np.testing.assert_array_equal(w.truncate(3).dequantize(), expected)


def test_nbytes_counts_planes_scales_and_offsets() -> None:
    w, *_ = random_tensor(4, offsets=True, dtype="float16", k=128)
    assert w.nbytes == 5 * (4 * 128 // 8 + 4 * 2 + 4 * 2)
    assert w.groups == 4


def test_is_a_pytree_with_static_sizes() -> None:
    w, *_ = random_tensor(3, offsets=False)
    assert len(jax.tree.leaves(w)) == 2
    leaves, structure = jax.tree.flatten(w)
    same = jax.tree.unflatten(structure, leaves)
    assert (same.k, same.group_size, same.rotation) == (96, 32, None)
    passed = jax.jit(lambda t: t)(w)
    assert isinstance(passed, ap.QuantizedTensor)
    jax.tree.map(np.testing.assert_array_equal, passed, w)
    turned = ap.quantize(gaussian(64, 2), 2, rotation=ap.Rotation(64, 1))
    other = ap.quantize(gaussian(64, 2), 2, rotation=ap.Rotation(64, 2))
    assert jax.tree.structure(turned) != jax.tree.structure(other)


def test_copies_and_pickles() -> None:
    w = ap.quantize(gaussian(64, 2), 2, rotation=ap.Rotation(64, 1))
    for other in (copy.deepcopy(w), pickle.loads(pickle.dumps(w))):
        assert other.rotation == w.rotation
        jax.tree.map(np.testing.assert_array_equal, other, w)


def test_numpy_fields_work_like_jax_ones() -> None:
    w = jax.tree.map(np.asarray, ap.quantize(gaussian(96, 5), 5, group_size=32))
    x = gaussian(3, 96)
    jaxed = jax.tree.map(jnp.asarray, w)
    np.testing.assert_array_equal(w.dequantize(), jaxed.dequantize())
    np.testing.assert_array_equal(w.truncate(2).dequantize(), jaxed.truncate(2).dequantize())
    np.testing.assert_array_equal(ap.matmul(x, w, act_bits=4), ap.matmul(x, jaxed, act_bits=4))


# --- prepared tensors ---


@pytest.mark.parametrize("bits", BITS)
def test_prepared_words_hold_fields(bits: int) -> None:
    """By the definition: the bits of each part of a code, at its word and place."""
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 2**bits, (33, 70), np.uint8)
    w = ap.QuantizedTensor.from_codes(codes, np.ones((33, 1), np.float32), bits=bits).prepare()
    tiles = np.asarray(w.planes)
    assert tiles.shape == (2, 3, bits, 32)
    expected = np.zeros_like(tiles)
    for (n, k), code in np.ndenumerate(codes):
        byte, q, word = k % 32 // 8, k % 8, 0
        for size in (8, 4, 2, 1):
            if bits & size:
                field = (int(code) >> word) & (2**size - 1)
                place = 8 * byte + size * (q // size)
                expected[n // 32, k // 32, word + q % size, n % 32] |= np.uint32(field << place)
                word += size
    np.testing.assert_array_equal(tiles, expected)


@pytest.mark.parametrize("lead", [(), (2,), (2, 3)])
@pytest.mark.parametrize("n", [0, 1, 31, 32, 33, 96])
def test_prepared_tensors_are_restored(lead: tuple[int, ...], n: int) -> None:
    rng = np.random.default_rng(n)
    tensors = []
    for bits, offsets in ((1, False), (3, True), (4, True), (7, False)):
        codes = rng.integers(0, 2**bits, (*lead, n, 96), np.uint8)
        scales = rng.uniform(0.1, 1, (*lead, n, 3)).astype(np.float16)
        w = ap.QuantizedTensor.from_codes(codes, scales, scales if offsets else None, bits=bits)
        prepared = w.prepare()
        assert prepared.prepared
        assert not w.prepared
        assert (prepared.shape, prepared.bits, prepared.groups) == (w.shape, bits, 3)
        assert prepared.prepare() is prepared
        assert w.restore() is w
        assert prepared.restore().columns is None
        jax.tree.map(np.testing.assert_array_equal, prepared.restore(), w)
        fewer = prepared.truncate(1)
        assert fewer.prepared
        jax.tree.map(np.testing.assert_array_equal, fewer.restore(), w.truncate(1))
        if n % 32 == 0:
            assert prepared.nbytes == w.nbytes
        tensors.append((w, prepared))
    found = jax.jit(lambda pairs: [(p.restore(), w.prepare()) for w, p in pairs])(tensors)
    jax.tree.map(np.testing.assert_array_equal, found, tensors)


@pytest.mark.parametrize("offsets", [False, True])
def test_prepared_tensors_dequantize_as_others(offsets: bool) -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 8, (2, 33, 96), np.uint8)
    scales = rng.uniform(0.1, 1, (2, 33, 3)).astype(np.float16)
    w = ap.QuantizedTensor.from_codes(codes, scales, scales if offsets else None, bits=3)
    np.testing.assert_array_equal(w.prepare().dequantize(), w.dequantize())


def test_prepared_fields_that_do_not_fit_are_refused() -> None:
    w = ap.quantize(gaussian(96, 33), 3, group_size=32).prepare()
    x = gaussian(2, 96)
    for change, message in (
        ({"columns": 65}, "w.planes must have 3 tiles of 32 columns for N = 65"),
        ({"planes": w.planes[..., :16]}, "w.planes must have 2 tiles of 32 columns for N = 33"),
        ({"planes": w.planes[:, :2]}, "w.planes must have 3 words for k = 96, got 2"),
        ({"scales": w.scales[:1]}, "w.scales must have shape"),
    ):
        with pytest.raises(ValueError, match=message):
            ap.matmul(x, dataclasses.replace(w, **change))
    with pytest.raises(TypeError, match="tiles, words, bits, 32"):
        ap.matmul(x, dataclasses.replace(w, planes=w.planes[0]))
