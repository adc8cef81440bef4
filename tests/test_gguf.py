"""GGUF files: exact import against gguf's own reader and dequantizer, and hostile input."""

from __future__ import annotations

import dataclasses
import json
import struct
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
from synthetic_gguf import (
    BLOCKS,
    Packed,
    QuantType,
    random_blocks,
    weight_shapes,
    write_llama,
)

import jax_anyprec as ap
from jax_anyprec import format as fmt
from jax_anyprec.cli import becomes
from jax_anyprec.gguf import EXACT_TYPES, GGUFError, GGUFFile
from jax_anyprec.models import load_gguf

N, BLOCKS_IN_ROW = 6, 3


def write_tensor(path: Path, rows: np.ndarray, kind: QuantType) -> GGUFFile:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("w", rows, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GGUFFile(path)


def scales(low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    minimum = rng.normal(0, 1, (N, BLOCKS_IN_ROW)).astype(np.float16)
    return rng.uniform(low, high, (N, BLOCKS_IN_ROW)).astype(np.float16), minimum


@pytest.mark.parametrize("kind", EXACT_TYPES)
@pytest.mark.parametrize(
    ("low", "high", "dtype"),
    [
        (0.01, 2, np.float16),
        (0, 0, np.float16),
        (1e-7, 3e-7, np.float32),  # half of a subnormal scale is no float16
        (6e4, 6.5e4, None),  # the offset overflows float16 where it is a multiple of the scale
    ],
)
def test_packed_import_is_exact(tmp_path, kind, low, high, dtype):
    rows = random_blocks(kind, *scales(low, high))
    file = write_tensor(tmp_path / "w.gguf", rows, QuantType[kind])
    tensor = file.packed("w")
    assert tensor.shape == (BLOCKS_IN_ROW * BLOCKS[kind].values, N)
    assert tensor.group_size == 32
    assert tensor.bits == (8 if kind == "Q8_0" else int(kind[1]))
    if dtype is not None and not kind.endswith("_K"):
        assert tensor.scales.dtype == dtype
    expected = gguf.dequantize(rows, QuantType[kind])
    np.testing.assert_array_equal(np.asarray(tensor.dequantize()).T, expected)
    np.testing.assert_array_equal(file.floats("w"), expected)


def test_dtypes_are_the_smallest_that_are_exact(tmp_path):
    def dtypes(kind, low, high):
        rows = random_blocks(kind, *scales(low, high))
        tensor = write_tensor(tmp_path / "w.gguf", rows, QuantType[kind]).packed("w")
        return tensor.scales.dtype, tensor.offsets.dtype

    half, single = np.float16, np.float32
    assert dtypes("Q4_1", 0.01, 2) == (half, half)
    assert dtypes("Q4_1", 1e-7, 3e-7) == (single, half)
    assert dtypes("Q4_0", 6e4, 6.5e4) == (half, single)
    assert dtypes("Q4_K", 0.01, 2) == (single, single)  # 11 bits times 6
    assert dtypes("Q4_K", 0, 0)[0] == half


@pytest.mark.parametrize("kind", EXACT_TYPES)
def test_negative_scales_reverse_the_codes(tmp_path, kind):
    scale, minimum = scales(-2, 2)
    rows = random_blocks(kind, scale, minimum)
    tensor = write_tensor(tmp_path / "w.gguf", rows, QuantType[kind]).packed("w")
    assert (tensor.scales >= 0).all()
    # With a minimum of its own, minimum + scale * largest code is rounded once to float32.
    factor = 63 if kind.endswith("_K") else 1
    largest = factor * float(np.abs(minimum).max() + 2 * fmt.max_level(tensor.bits))
    error = 0 if kind in ("Q4_0", "Q5_0", "Q8_0") else 2 * largest * 2**-24
    expected = gguf.dequantize(rows, QuantType[kind])
    np.testing.assert_allclose(np.asarray(tensor.dequantize()).T, expected, rtol=0, atol=error)


# K-quants with 16 values in a group, one of uneven grids, and one of other blocks.
FLOAT_BLOCKS = ("Q2_K", "Q3_K", "Q6_K", "IQ4_NL", "MXFP4")


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "F64", "TQ2_0", *FLOAT_BLOCKS])
def test_other_types_are_dequantized(tmp_path, kind):
    rng = np.random.default_rng(2)
    values = rng.normal(0, 1, (3, 512)).astype(np.float32)
    if kind == "F64":
        rows, expected = values.astype(np.float64), values
    elif kind in FLOAT_BLOCKS:
        counts = 3, 512 // BLOCKS[kind].values
        rows = random_blocks(kind, *rng.uniform(0.1, 1, (2, *counts)).astype(np.float16))
        expected = gguf.dequantize(rows, QuantType[kind])
    else:
        rows = gguf.quantize(values, QuantType[kind])
        expected = gguf.dequantize(rows, QuantType[kind])
    file = write_tensor(tmp_path / "w.gguf", rows, QuantType[kind])
    assert file.info("w").shape == (3, 512)
    floats = file.floats("w")
    assert floats.dtype == np.float32
    np.testing.assert_array_equal(floats, expected)
    with pytest.raises(GGUFError, match=r"w must be a matrix of type Q4_0.*got " + kind):
        file.packed("w")


def test_inspect_says_what_each_type_becomes():
    assert [becomes(kind, (2, 256)) for kind in ("Q4_K", "Q5_K", "Q8_0", "Q6_K", "MXFP4")] == [
        "4 bits, groups of 32",
        "5 bits, groups of 32",
        "8 bits, groups of 32",
        "float",
        "float",
    ]


def test_why_groups_of_16_stay_float():
    """The halves of 32 neighbours in Q6_K lie on grids that no common scale and offset holds."""
    rows = random_blocks("Q6_K", *np.full((2, 1, 1), 1, np.float16))
    halves = gguf.dequantize(rows, QuantType.Q6_K).reshape(-1, 2, 16)
    steps = [[np.gcd.reduce(np.abs(half).astype(int)) for half in pair] for pair in halves]
    levels = [np.ptp(pair) / np.gcd(*step) for pair, step in zip(halves, steps, strict=True)]
    assert max(levels) > 255


def test_files_of_mixed_types_load_with_each_as_it_can(tmp_path):
    """As llama.cpp's Q4_K_M: most matrices in Q4_K, some in Q6_K, Q8_0 where 256 won't fit."""
    size = 256
    weights: dict[str, np.ndarray | Packed] = {}
    for seed, (name, shape) in enumerate(weight_shapes(hidden=size, inner=size).items()):
        if len(shape) == 1 or shape[1] % 256:
            weights[name] = np.ones(shape, np.float32)
        else:
            kind = "Q6_K" if "attn_v" in name or "ffn_down" in name else "Q4_K"
            scale = np.full((2, shape[0], 1), 1e-4, np.float16)
            weights[name] = Packed(QuantType[kind], random_blocks(kind, *scale, seed))
    sizes = {"embedding_length": size, "feed_forward_length": size, "attention.key_length": 16}
    path = write_llama(
        tmp_path / "m.gguf",
        linear=QuantType.Q8_0,
        metadata={f"llama.{key}": value for key, value in sizes.items()},
        weights=weights,
    )
    file = GGUFFile(path)
    model = load_gguf(path, dtype=np.float32).model

    def kernel(layer):
        value = layer.kernel.get_value()
        return np.asarray(value.dequantize() if isinstance(value, ap.QuantizedTensor) else value).T

    def expected(*names):
        return np.concatenate([file.floats(f"blk.1.{name}.weight") for name in names])

    attention, feed_forward = model.layers[1].attention, model.layers[1].feed_forward
    query_key, value = attention.qkv.layers
    np.testing.assert_array_equal(kernel(query_key), expected("attn_q", "attn_k"))
    np.testing.assert_array_equal(kernel(value), expected("attn_v"))
    np.testing.assert_array_equal(kernel(attention.output), expected("attn_output"))
    (gate_up,) = feed_forward.gate_up.layers
    np.testing.assert_array_equal(kernel(gate_up), expected("ffn_gate", "ffn_up"))
    np.testing.assert_array_equal(kernel(feed_forward.down), expected("ffn_down"))
    packed = [isinstance(x, ap.nnx.QuantLinear) for x in (query_key, value, gate_up)]
    assert packed == [True, False, True]
    assert isinstance(model.embed, ap.nnx.QuantEmbed)


def test_agrees_with_the_reader_of_gguf(tmp_path):
    path = write_llama(tmp_path / "tiny.gguf")
    file, oracle = GGUFFile(path), gguf.GGUFReader(path)
    fields = {k: v for k, v in oracle.fields.items() if not k.startswith("GGUF.")}
    assert list(file.metadata) == list(fields)
    for key, field in fields.items():
        value = file.metadata[key]
        assert (value.tolist() if isinstance(value, np.ndarray) else value) == field.contents()
    assert list(file.tensors) == [t.name for t in oracle.tensors]
    for tensor in oracle.tensors:
        info = file.info(tensor.name)
        assert info.shape == tuple(tensor.shape.tolist()[::-1])
        assert (info.type, info.nbytes) == (tensor.tensor_type.name, tensor.n_bytes)
        assert info.offset == tensor.data_offset


def test_summary_counts_every_tensor(tmp_path):
    path = write_llama(tmp_path / "tiny.gguf")
    summary = GGUFFile(path).summary()
    shapes = weight_shapes()
    assert {t.name: t.shape for t in summary.tensors} == shapes
    assert summary.tensors_by_type == {"Q8_0": 1, "Q4_1": 14, "F32": 5}
    weights = sum(np.prod(s) for n, s in shapes.items() if len(s) == 2 and n[:3] == "blk")
    assert summary.bytes_by_type["Q4_1"] == weights // 32 * 20
    assert summary.nbytes == sum(summary.bytes_by_type.values())
    assert summary.metadata["llama.block_count"] == 2
    assert summary.metadata["tokenizer.ggml.tokens"] == "[320 values]"
    assert json.loads(json.dumps(dataclasses.asdict(summary)))["version"] == 3


def test_typed_metadata(tmp_path):
    file = GGUFFile(write_llama(tmp_path / "tiny.gguf"))
    assert file.get("llama.block_count", int) == 2
    assert file.get("llama.block_count", float) == 2.0
    assert file.get("llama.nothing", int, 7) == 7
    assert file.get("llama.nothing", int, None) is None
    with pytest.raises(GGUFError, match=r"has no metadata key 'llama\.nothing'"):
        file.get("llama.nothing", int)
    with pytest.raises(GGUFError, match=r"'general\.name' must be int, got str"):
        file.get("general.name", int)
    with pytest.raises(GGUFError, match="has no tensor 'nope'"):
        file.packed("nope")


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_scales_must_be_finite(tmp_path, value):
    scale, minimum = scales(0, 1)
    scale[2, 1] = value
    file = write_tensor(tmp_path / "w.gguf", random_blocks("Q4_1", scale, minimum), QuantType.Q4_1)
    with pytest.raises(GGUFError, match="w has scales that are NaN or infinite"):
        file.packed("w")
    with pytest.raises(GGUFError, match="w has values that are NaN or infinite"):
        file.floats("w")


def test_integers_are_not_weights(tmp_path):
    file = write_tensor(tmp_path / "w.gguf", np.zeros((2, 32), np.int32), QuantType.I32)
    with pytest.raises(GGUFError, match=r"w holds integers \(I32\)"):
        file.floats("w")


# Hostile files, made by hand: gguf's writer refuses to write them.


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def tensor(name: str, dims: list[int], kind: int = 0, offset: int = 0) -> bytes:
    shape = struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
    return text(name) + shape + struct.pack("<IQ", kind, offset)


def entry(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def header(tensors: int, entries: int, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, entries)


def number(key: str, value: int) -> bytes:
    return entry(key, 4, struct.pack("<I", value))


DATA = bytes(4096)
HOSTILE = {
    "empty": (b"", "is empty, not a GGUF file"),
    "short magic": (b"GG", "not a GGUF file: it starts with b'GG'"),
    "foreign": (b"PK\x03\x04" + DATA, r"not a GGUF file: it starts with b'PK"),
    "magic only": (b"GGUF", "truncated or corrupt: the version needs 4 bytes at 4, 0 are left"),
    "old version": (header(0, 0, 1), "version 1 is not supported"),
    "big endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version 50331648 is not supported"),
    "tensor count": (header(2**63, 0) + DATA, "number of tensors is 9223372036854775808, too"),
    "entry count": (header(0, 2**40) + DATA, "number of metadata entries is 1099511627776, too"),
    "key length": (header(0, 1) + struct.pack("<Q", 2**50) + DATA, "length of a metadata key"),
    "text length": (
        header(0, 1) + entry("a", 8, struct.pack("<Q", 2**64 - 1)) + DATA,
        "the length of metadata 'a' is 18446744073709551615, too many",
    ),
    "array length": (
        header(0, 1) + entry("a", 9, struct.pack("<IQ", 4, 2**61)) + DATA,
        "the length of metadata 'a' is 2305843009213693952, too many",
    ),
    "array bytes": (
        header(0, 1) + entry("a", 9, struct.pack("<IQ", 12, 4000)) + DATA,
        "metadata 'a' needs 32000 bytes",
    ),
    "array of arrays": (
        header(0, 1) + entry("a", 9, struct.pack("<IQ", 9, 1)) + DATA,
        "metadata 'a' has type number 9",
    ),
    "value type": (header(0, 1) + entry("a", 77, DATA), "metadata 'a' has type number 77"),
    "no UTF-8": (header(0, 1) + struct.pack("<Q", 2) + b"\xff\xfe" + DATA, "key is not UTF-8"),
    "key twice": (header(0, 2) + 2 * number("a", 1) + DATA, "metadata key 'a' appears twice"),
    "alignment": (
        header(0, 1) + number("general.alignment", 24) + DATA,
        "general.alignment must be a power of two, got 24",
    ),
    "alignment type": (
        header(0, 1) + entry("general.alignment", 8, text("x")) + DATA,
        "general.alignment must be a power of two, got 'x'",
    ),
    "no dimensions": (header(1, 0) + tensor("t", []) + DATA, "'t' has 0 dimensions, 1 to 4"),
    "dimensions": (header(1, 0) + tensor("t", [1] * 9) + DATA, "'t' has 9 dimensions, 1 to 4"),
    "zero size": (header(1, 0) + tensor("t", [4, 0]) + DATA, r"'t' has shape \(0, 4\)"),
    "huge size": (
        header(1, 0) + tensor("t", [2**62, 2**62]) + DATA,
        "tensor 't' ends at byte 8507059173023461",
    ),
    "type": (header(1, 0) + tensor("t", [32], 4) + DATA, "'t' has type number 4"),
    "block": (header(1, 0) + tensor("t", [33], 3) + DATA, "the last a multiple of 32 for Q4_1"),
    "offset": (header(1, 0) + tensor("t", [4], 0, 2**63) + DATA, "tensor 't' ends at byte"),
    "tensor twice": (header(2, 0) + 2 * tensor("t", [4]) + DATA, "tensor 't' appears twice"),
    "overlap": (
        header(2, 0) + tensor("t", [64]) + tensor("v", [64], 0, 32) + DATA,
        "tensors 't' and 'v' overlap",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_broken_files_have_clear_errors(tmp_path, case):
    content, message = HOSTILE[case]
    path = tmp_path / "broken.gguf"
    path.write_bytes(content)
    with pytest.raises(GGUFError, match=message) as caught:
        GGUFFile(path)
    assert "broken.gguf" in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no GGUF file at '.*none.gguf'"):
        GGUFFile(tmp_path / "none.gguf")


def small_file(path: Path) -> bytes:
    """A file of every kind of value and a few tensors, about a kilobyte."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_array("names", ["a", "longer", "ü"])
    writer.add_array("numbers", [1, 2, 3])
    writer.add_bool("flag", True)
    writer.add_float32("eps", 1e-5)
    writer.add_uint64("large", 2**40)
    values = np.random.default_rng(0).normal(0, 1, (4, 32)).astype(np.float32)
    for kind in (QuantType.Q4_1, QuantType.Q8_0, QuantType.F32):
        writer.add_tensor(kind.name, gguf.quantize(values, kind), raw_dtype=kind)
    for kind in (QuantType.Q4_K, QuantType.Q5_K):
        rows = random_blocks(kind.name, *np.ones((2, 1, 1), np.float16))
        writer.add_tensor(kind.name, rows, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def read_all(path: Path) -> None:
    file = GGUFFile(path)
    for name, info in file.tensors.items():
        if info.type in EXACT_TYPES and len(info.shape) == 2:
            file.packed(name)
        file.floats(name)
    file.summary()


def test_truncation_at_every_byte(tmp_path):
    path = tmp_path / "small.gguf"
    whole = small_file(path)
    last = max(GGUFFile(path).tensors.values(), key=lambda info: info.offset)
    for size in range(last.offset + last.nbytes):
        path.write_bytes(whole[:size])
        with pytest.raises(GGUFError):
            GGUFFile(path)


def test_random_damage_never_crashes_nor_takes_memory(tmp_path):
    path = tmp_path / "small.gguf"
    whole = np.frombuffer(small_file(path), np.uint8)
    rng = np.random.default_rng(3)
    read_all(path)
    refused = 0
    tracemalloc.start()
    for _ in range(600):
        damaged = whole.copy()
        for place in rng.integers(0, whole.size, rng.integers(1, 5)):
            damaged[place] = rng.choice([0, 1, 0x7F, 0xFF, rng.integers(256)])
        path.write_bytes(damaged.tobytes()[: rng.integers(whole.size // 2, 2 * whole.size)])
        try:
            read_all(path)
        except GGUFError:
            refused += 1
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert refused > 100
    assert peak < 2**22


def test_real_checkpoint(smollm2_path):
    file = GGUFFile(smollm2_path)
    assert file.summary().tensors_by_type == {"Q8_0": 1, "F32": 61, "Q4_1": 210}
    assert file.packed("token_embd.weight").offsets.dtype == np.float16
    for name in ("blk.7.ffn_down.weight", "blk.29.attn_k.weight"):
        tensor = file.packed(name)
        assert tensor.scales.dtype == np.float16
        np.testing.assert_array_equal(np.asarray(tensor.dequantize()).T, file.floats(name))
