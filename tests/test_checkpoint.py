"""Checkpoints: to the bit and back, the library's files, fewer bits, atomic writes, bad files."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path
from typing import Any

import flax.linen as nn
import fuzz_checkpoint
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import safetensors.flax
import safetensors.numpy
from flax import nnx
from safetensors import safe_open

import jax_anyprec as ap
from jax_anyprec import safetensors as layer
from jax_anyprec import shards

RNG = np.random.default_rng(0)
K, N, GROUP = 96, 40, 32


def packed(
    *lead: int, bits: int = 3, k: int = K, n: int = N, dtype: Any = np.float32, offsets: bool = True
) -> ap.QuantizedTensor:
    codes = RNG.integers(0, 2**bits, (*lead, n, k), np.uint8)
    groups = k // GROUP if k and k % GROUP == 0 else 1
    scales = RNG.uniform(0.1, 1, (*lead, n, groups)).astype(dtype)
    return ap.QuantizedTensor.from_codes(codes, scales, -scales if offsets else None, bits=bits)


def same(found: Any, expected: Any) -> None:
    """Equal in structure, static fields, dtypes, shapes and bytes."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert isinstance(a, jax.Array)
        if jax.dtypes.issubdtype(b.dtype, jax.dtypes.prng_key):
            assert a.dtype == b.dtype
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        a, b = np.asarray(a), np.asarray(b)
        assert (a.shape, a.dtype, a.tobytes()) == (b.shape, b.dtype, b.tobytes())


def everything() -> dict[str, Any]:
    w = packed()
    rotated = ap.quantize(jnp.asarray(RNG.normal(size=(128, 8))), 2, rotation=ap.Rotation(64, 9))
    nan = np.array([np.nan, -0.0, np.inf, 1e-45], np.float32)
    nan.view(np.uint32)[0] |= 12345  # a NaN with something in it
    plain = {
        name: RNG.integers(0, 2, (3, 5)).astype(name)
        for name in ("bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "float16")
    }
    return {
        "w": w,
        "half": packed(bits=8, dtype=ml_dtypes.bfloat16, offsets=False),
        "rotated": rotated,
        "experts": packed(2, 3, k=40, n=33, dtype=np.float16),
        "no columns": packed(n=0),
        "no rows": packed(k=0),
        "layers": [{"w": w, "bias": jnp.ones(5, jnp.bfloat16)}, {"w": packed(bits=1)}],
        "states": {0: {"x": jnp.zeros((0, 4))}, 3: (jnp.array(3), None, {}, []), -1: np.int8(5)},
        "plain": plain,
        "nan": nan,
        "eight": jnp.ones(3, jnp.float8_e4m3fn),
        "complex": jnp.array([1 + 2j]),
        "key": jax.random.key(3),
        "keys": jax.random.split(jax.random.key(3, impl="rbg"), (2, 3)),
    }


@pytest.fixture
def tree() -> dict[str, Any]:
    return everything()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("memory_map", [False, True])
@pytest.mark.parametrize("max_shard_bytes", [None, 3000])
def test_a_tree_comes_back_to_the_bit(path, tree, memory_map, max_shard_bytes) -> None:
    ap.save(path, tree, max_shard_bytes=max_shard_bytes)
    same(ap.load(path, memory_map=memory_map), tree)


@pytest.mark.parametrize("leaf", [packed(), np.arange(3), {}, [], None, ()])
def test_a_leaf_or_nothing_is_a_tree_too(path, leaf) -> None:
    leaf = leaf.astype(np.int32) if isinstance(leaf, np.ndarray) else leaf
    ap.save(path, leaf)
    same(ap.load(path), leaf)


def test_the_library_reads_what_is_written(path, tree) -> None:
    tree.pop("eight")  # the library's own functions know no such dtype in NumPy
    ap.save(path, tree)
    raw = read_header(path)
    tensors = safetensors.flax.load_file(path)
    assert raw.keys() - {"__metadata__"} == tensors.keys()
    np.testing.assert_array_equal(tensors["w.planes"], tree["w"].planes)
    np.testing.assert_array_equal(tensors["layers.0.w.scales"], tree["w"].scales)
    np.testing.assert_array_equal(tensors["plain.int16"], tree["plain"]["int16"])
    assert tensors["half.scales"].dtype == jnp.bfloat16
    with safe_open(path, "numpy") as file:
        manifest = json.loads(file.metadata()["jax_anyprec"])
    assert manifest["version"] == 1
    assert manifest["tree"]["rotated"] == {
        "$packed": {
            "k": 128,
            "group_size": 128,
            "rotation": {"block": 64, "seed": 9},
            "columns": None,
        }
    }


def test_what_the_library_writes_is_read(path) -> None:
    tensors = {
        "model.layers.0.q_proj.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
        "scalar": np.array(2, np.int32),
        "empty": np.zeros((0, 2), np.float16),
    }
    safetensors.numpy.save_file(tensors, path, {"format": "pt"})
    same(ap.load(path), tensors)
    safetensors.flax.save_file({"b": jnp.ones(3, jnp.bfloat16)}, path)
    same(ap.load(path), {"b": jnp.ones(3, jnp.bfloat16)})


def test_tensors_of_whole_cache_lines_lie_on_cache_lines(path, tree) -> None:
    ap.save(path, tree | {"prepared": tree["w"].prepare()}, keep_prepared=True)
    header = read_header(path)
    start = 8 + struct.unpack("<Q", path.read_bytes()[:8])[0]
    header.pop("__metadata__")
    for entry in header.values():
        begin, end = entry["data_offsets"]
        itemsize = layer.DTYPES[entry["dtype"]].itemsize
        assert (start + begin) % (64 if (end - begin) % 64 == 0 else itemsize) == 0
    assert sum(entry["data_offsets"][0] % 64 == 0 for entry in header.values()) > 10


def test_prepared_tensors_are_stored_as_planes(path) -> None:
    w = packed(2, n=33)
    ap.save(path, {"w": w.prepare()})
    same(ap.load(path), {"w": w})


def test_kept_prepared_they_are_used_where_they_lie_in_the_file(path) -> None:
    w = jax.tree.map(jnp.asarray, packed(2, n=33).prepare())
    ap.save(path, {"w": w}, keep_prepared=True)
    copied = ap.load(path)["w"]
    same(copied, w)
    mapped = ap.load(path, memory_map=True)["w"]
    same(mapped, w)
    assert all(in_file(path, x) for x in jax.tree.leaves(mapped))
    assert not any(in_file(path, x) for x in jax.tree.leaves(copied))


def test_donated_or_replaced_a_mapped_file_stays_as_it_was(path) -> None:
    x = jnp.arange(1024.0)
    ap.save(path, x)
    before = path.read_bytes()
    mapped = ap.load(path, memory_map=True)
    ap.save(path, -x)  # who has the old one mapped keeps it
    np.testing.assert_array_equal(jax.jit(lambda x: x + 1, donate_argnums=0)(mapped), x + 1)
    again = ap.load(path, memory_map=True)
    jax.block_until_ready(jax.jit(lambda x: x + 1, donate_argnums=0)(again))
    ap.save(path, x)
    assert path.read_bytes() == before


@pytest.mark.parametrize("bits", [1, 2, 3, 8])
def test_fewer_bits_read_only_their_planes(path, bits) -> None:
    tree = {"w": packed(2, bits=5), "low": packed(bits=2, offsets=False), "x": np.ones(3, "f4")}
    ap.save(path, tree)
    counts: dict[str, int] = {}
    expected = {"w": tree["w"].truncate(min(bits, 5)), "low": tree["low"].truncate(min(bits, 2))}
    # Planes that aren't to be read are noise.
    spoil_planes(path, "w", min(bits, 5))
    spoil_planes(path, "low", min(bits, 2))
    found = ap.load(path, bits=bits, on_read=counts.__setitem__)
    same({"w": found["w"], "low": found["low"]}, expected)
    plane = N * K // 8
    groups = N * (K // GROUP) * 4
    assert counts == {
        "w": 2 * (min(bits, 5) * plane + 2 * groups),
        "low": min(bits, 2) * plane + groups,
        "x": 12,
    }


def test_bits_are_checked(path) -> None:
    ap.save(path, {"a": {"w": packed().prepare()}}, keep_prepared=True)
    with pytest.raises(
        ap.CheckpointError, match=r"'a\.w' is stored prepared.*all 3 bits and trunc"
    ):
        ap.load(path, bits=2)
    assert ap.load(path, bits=3)["a"]["w"].bits == 3
    for bits, error in ((0, ValueError), (9, ValueError), ("2", TypeError), (True, TypeError)):
        with pytest.raises(error, match="bits must be"):
            ap.load(path, bits=bits)


def test_several_files_follow_hugging_faces_convention(path, tree) -> None:
    tree.pop("eight")
    ap.save(path, tree, max_shard_bytes=4000)
    index = json.loads(Path(f"{path}.index.json").read_text())
    names = sorted(p.name for p in path.parent.iterdir() if p.name != f"{path.name}.index.json")
    part = index["metadata"]["save_id"][:8]
    assert names == [
        f"model-{part}-{i + 1:05}-of-{len(names):05}.safetensors" for i in range(len(names))
    ]
    assert len(names) > 2
    assert set(index["weight_map"].values()) == set(names)
    total, largest = 0, 0
    for name in names:
        tensors = safetensors.flax.load_file(path.with_name(name))
        assert tensors.keys() == {t for t, file in index["weight_map"].items() if file == name}
        size = sum(x.nbytes for x in tensors.values())
        assert size <= 4000 or len(tensors) == 1
        total, largest = total + size, max(largest, size)
    assert index["metadata"]["total_size"] == total
    same(ap.load(f"{path}.index.json"), tree)
    # A save replaces the checkpoint of its name in either form.
    ap.save(path, {"x": np.ones(2, "f4")})
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert ap.load(path).keys() == {"x"}
    ap.save(path, tree, max_shard_bytes=4000)
    assert not path.exists()
    same(ap.load(path), tree)
    ap.save(path, tree, max_shard_bytes=10000)
    assert len(list(path.parent.iterdir())) < len(names)
    same(ap.load(path), tree)


def test_only_files_of_a_save_are_deleted_after_it(path) -> None:
    end = "00001-of-00002.safetensors"
    names = ("config.json", f"model-{end}", f"other-01234567-{end}", f"model-01234567-{end}")
    for name in names:
        path.with_name(name).touch()
    weight_map = dict(zip("abcd", names, strict=True))
    Path(f"{path}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    ap.save(path, np.ones(2, "f4"))
    assert {p.name for p in path.parent.iterdir()} == {path.name, *names[:3]}
    Path(f"{path}.index.json").write_text("broken")
    ap.save(path, [np.ones(2, "f4")] * 2, max_shard_bytes=8)
    assert len(ap.load(path)) == 2


def test_files_of_hugging_face_are_read(path) -> None:
    parts = {"a-1": {"x": np.ones(2, np.float32)}, "a-2": {"y.z": np.zeros(3, np.int32)}}
    for name, tensors in parts.items():
        safetensors.numpy.save_file(tensors, path.with_name(name))
    weight_map = {"x": "a-1", "y.z": "a-2"}
    index = Path(f"{path}.index.json")
    index.write_text(json.dumps({"metadata": {"total_size": 20}, "weight_map": weight_map}))
    same(ap.load(path), parts["a-1"] | parts["a-2"])
    index.write_text(json.dumps({"weight_map": weight_map}))
    same(ap.load(path), parts["a-1"] | parts["a-2"])


# Saving


@pytest.mark.parametrize("max_shard_bytes", [None, 100])
@pytest.mark.parametrize("where", ["read", "fsync", "replace"])
def test_an_interrupted_save_leaves_the_old_checkpoint(
    path, monkeypatch, max_shard_bytes, where
) -> None:
    old = {"a": np.ones(64, np.float32), "b": np.ones(64, np.float32)}
    ap.save(path, old, max_shard_bytes=max_shard_bytes)
    files = {p.name: p.read_bytes() for p in path.parent.iterdir()}
    new = {"a": jnp.zeros(64), "b": jnp.zeros(64)}

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    if where == "read":
        monkeypatch.setattr(layer, "_write_array", interrupt)
    else:
        monkeypatch.setattr(*((os, "fsync") if where == "fsync" else (Path, "replace")), interrupt)
    with pytest.raises(KeyboardInterrupt):
        ap.save(path, new, max_shard_bytes=max_shard_bytes)
    assert {p.name: p.read_bytes() for p in path.parent.iterdir()} == files


@pytest.mark.parametrize("fails_at", [0, 1, 2])
def test_several_files_are_replaced_in_one_step(path, monkeypatch, fails_at) -> None:
    old, new = ({"a": np.full(9, i, "f4"), "b": np.full(9, i, "f4")} for i in range(2))
    ap.save(path, old, max_shard_bytes=36)
    files = {p.name: p.read_bytes() for p in path.parent.iterdir()}
    calls, replace = [], Path.replace

    def failing(self: Path, target: Path) -> Path:
        same(ap.load(path), old)
        calls.append(target)
        if len(calls) > fails_at:
            raise OSError("no more")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", failing)
    with pytest.raises(OSError, match="no more"):
        ap.save(path, new, max_shard_bytes=36)
    assert {p.name: p.read_bytes() for p in path.parent.iterdir()} == files


def test_concurrent_saves_of_several_files_leave_one(path) -> None:
    trees = [{"a": np.full(9, i, "f4"), "b": np.full(9, i, "f4")} for i in range(2)]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for save in [
            pool.submit(ap.save, path, trees[i % 2], max_shard_bytes=36) for i in range(20)
        ]:
            save.result()
    values = ap.load(path)
    assert len({*np.asarray(values["a"]), *np.asarray(values["b"])}) == 1


def test_concurrent_saves_do_not_mix(path) -> None:
    trees = [{"a": np.full(3000, i, np.int32), "b": np.full(50, i, np.int32)} for i in range(2)]
    ap.save(path, trees[0])
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        saves = [pool.submit(ap.save, path, trees[i % 2]) for i in range(20)]
        while not all(save.done() for save in saves):
            values = ap.load(path)
            assert len({*np.asarray(values["a"]), *np.asarray(values["b"])}) == 1
        for save in saves:
            save.result()
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("keep_prepared", [False, True])
def test_a_save_holds_few_tensors_at_a_time(path, keep_prepared) -> None:
    w = packed(4, k=512, n=256, bits=8).prepare()
    tree = [w] * 16
    tracemalloc.start()
    ap.save(path, tree, keep_prepared=keep_prepared)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert path.stat().st_size > 16 * w.planes.nbytes
    assert peak < 5 * w.planes.nbytes


def test_files_of_two_saves_are_not_taken_for_one(path) -> None:
    first, second = ({"a": np.full(9, i, "f4"), "b": np.full(9, i, "f4")} for i in range(2))
    ap.save(path, first, max_shard_bytes=36)
    (shard,) = path.parent.glob("*-00002-of-00002.safetensors")
    old = shard.read_bytes()
    ap.save(path, second, max_shard_bytes=36)
    assert not shard.exists()
    (shard,) = path.parent.glob("*-00002-of-00002.safetensors")
    shard.write_bytes(old)
    with pytest.raises(
        ap.CheckpointError, match=r"00002\.safetensors belongs to another save than"
    ):
        ap.load(path)


def test_permissions_are_those_of_any_new_file(path) -> None:
    ap.save(path, {})
    other = path.with_name("other")
    other.touch()
    assert path.stat().st_mode == other.stat().st_mode


def deep(levels: int) -> Any:
    return [] if levels == 0 else [deep(levels - 1)]


@pytest.mark.parametrize(
    ("tree", "error", "message"),
    [
        ({"a": {"b": 1.5}}, TypeError, r"a\.b must be an array or a QuantizedTensor, got float"),
        ({"a": "text"}, TypeError, "a must be an array or a QuantizedTensor, got str"),
        (
            {"a.b": np.ones(2), "a": {"b": np.ones(2)}},
            ValueError,
            "two leaves would be stored as 'a.b'",
        ),
        ({"w": packed(), "w.planes": np.ones(2)}, ValueError, "stored as 'w.planes'"),
        ({"__metadata__": np.ones(2)}, ValueError, "no tensor can be stored as '__metadata__'"),
        ({"a" * 1001: np.ones(2)}, ValueError, "levels or longer than 1000 characters"),
        ({"a" * 1001: {}}, ValueError, "levels or longer than 1000 characters"),
        ({10**18: {}}, ValueError, "integers of at most 18 digits, got 1000000000000000000 in ten"),
        ({"a": np.ones((1,) * 17)}, ValueError, "'a' has 17 axes, at most 16 are allowed"),
        ({"a": np.ones((2**40, 0))}, ValueError, r"'a' is empty with shape \[1099511627776, 0\]"),
        ({"$x": np.ones(2)}, ValueError, r"keys must all be strings .* got '\$x' in tensor"),
        ({"a": {1.5: np.ones(2)}}, ValueError, "keys must all be strings .* got 1.5 in a"),
        ({"a": {1: np.ones(2), "b": np.ones(2)}}, ValueError, "sorting pytree dictionary keys"),
        ({"a": jnp.ones(2, jnp.int4)}, TypeError, "a has dtype int4, safetensors files hold bool"),
        ({"a": np.array([None])}, TypeError, "a has dtype object"),
        (deep(70), ValueError, "is deeper than 64 levels or longer"),
        ({"\ud800": np.ones(2)}, UnicodeEncodeError, "surrogates not allowed"),
        (
            {
                "w": ap.QuantizedTensor(
                    np.ones((3, 2, 1), "u4"), np.ones((2, 1), "f4"), None, 64, 64
                )
            },
            ValueError,
            "w.planes must have 2 words for k = 64, got 1",
        ),
    ],
)
def test_what_can_not_be_saved(path, tree, error, message) -> None:
    with pytest.raises(error, match=message):
        ap.save(path, tree)
    assert not any(path.parent.iterdir())


def test_arguments_of_save(path, monkeypatch) -> None:
    with pytest.raises(ValueError, match="max_shard_bytes must be positive or None, got 0"):
        ap.save(path, {}, max_shard_bytes=0)
    with pytest.raises(
        TypeError, match=r"a must be an array .* under tracing; save outside of jit"
    ):
        jax.jit(lambda x: ap.save(path, {"a": x}))(jnp.ones(2))
    monkeypatch.setattr(layer, "MAX_HEADER_BYTES", 1000)
    with pytest.raises(ValueError, match=r"list of tensors takes .* bytes, at most 1000 are"):
        ap.save(path, {"a" * 1000: np.ones(2, "f4")})
    monkeypatch.setattr(shards, "MAX_HEADER_BYTES", 200)
    with pytest.raises(ValueError, match=r"the index takes .* bytes, at most 200 are allowed"):
        ap.save(path, [np.ones(2, "f4")] * 2, max_shard_bytes=8)
    assert not any(path.parent.iterdir())


def test_paths_that_could_not_be_loaded_again(path) -> None:
    with pytest.raises(ValueError, match=r"path must be that of the file, without \.index\.json"):
        ap.save(f"{path}.index.json", {})
    tree = [np.ones(2, "f4")] * 2
    for name in ("a\nb.safetensors", "a\\b.safetensors", "ö" * 110 + ".safetensors"):
        with pytest.raises(ValueError, match="path must end with a printable name, short enough"):
            ap.save(path.with_name(name), tree, max_shard_bytes=8)
    assert not any(path.parent.iterdir())
    ap.save(path.with_name("a\nb.safetensors"), tree)
    same(ap.load(path.with_name("a\nb.safetensors")), tree)


KEYS = st.one_of(
    st.text(max_size=3),
    st.sampled_from(["$int", "a.b", "__metadata__", "a" * 600, "a" * 999]),
    st.integers(-(10**19), 10**19),
)
SHAPES = st.sampled_from([(), (2,), (0, 3), (0, 2**20), (0, 2**32), (1,) * 16, (1,) * 17])
TREES = st.recursive(
    st.one_of(st.none(), SHAPES.map(lambda shape: np.zeros(shape, "f4"))),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=3), inner, max_size=3),
        st.dictionaries(KEYS, inner, max_size=2),
    ),
    max_leaves=8,
)


@hypothesis.settings(deadline=None, max_examples=100, derandomize=True, database=None)
@hypothesis.given(tree=TREES, max_shard_bytes=st.sampled_from([None, 8]))
def test_what_can_be_saved_can_be_loaded(tree, max_shard_bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.safetensors"
        try:
            ap.save(path, tree, max_shard_bytes=max_shard_bytes)
        except ValueError:
            assert not any(path.parent.iterdir())
            return
        same(ap.load(path), tree)


def test_a_tensor_that_changes_while_it_is_saved(path) -> None:
    tensors = {"x": layer.Tensor((2,), np.dtype("f4"), lambda: np.ones(3, "f4"))}
    with pytest.raises(RuntimeError, match=r"x became float32\[3\] .* it was float32\[2\]"):
        shards.write_tensors(path, tensors, {}, None)


def test_big_endian_arrays_are_turned_round(path) -> None:
    ap.save(path, np.arange(5, dtype=">i4"))
    same(ap.load(path), np.arange(5, dtype=np.int32))


# Filling models


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, weights: int = 4, features: int = 64):
        self.linears = nnx.List(
            [
                ap.nnx.QuantLinear(features, 64, weights=weights, group_size=32, rngs=rngs)
                for _ in range(2)
            ]
        )
        self.norm = nnx.LayerNorm(64, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)


class Dense(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = ap.linen.QuantDense(32, weights=3, name="packed")(x)
        boxed = nn.with_partitioning(nn.initializers.ones_init(), ("in", "out"))
        return nn.Dense(4, kernel_init=boxed)(x)


def test_an_nnx_module_and_an_abstract_one(path) -> None:
    model = Model(nnx.Rngs(0))
    ap.save(path, model)
    other = Model(nnx.Rngs(1))
    assert ap.load_into(other, path) is other
    same(nnx.to_pure_dict(nnx.state(other)), nnx.to_pure_dict(nnx.state(model)))
    abstract = nnx.eval_shape(lambda: Model(nnx.Rngs(1)))
    ap.load_into(abstract, path)
    same(nnx.state(abstract), nnx.state(model))
    same(ap.load(path), nnx.to_pure_dict(nnx.state(model)))


def test_an_nnx_state(path) -> None:
    model, other = Model(nnx.Rngs(0)), Model(nnx.Rngs(1))
    ap.save(path, nnx.state(model, ap.nnx.Packed))
    target = nnx.state(other, ap.nnx.Packed)
    before = np.asarray(target["linears"][0]["kernel"].get_value().planes)
    filled = ap.load_into(target, path)
    same(filled, nnx.state(model, ap.nnx.Packed))
    assert isinstance(filled, nnx.State)
    kept = target["linears"][0]["kernel"].get_value().planes
    np.testing.assert_array_equal(kept, before)  # a new state, the target is as it was


def test_linen_variables_in_boxes(path) -> None:
    model, x = Dense(), jnp.ones((2, 64))
    variables = model.init(jax.random.key(0), x)
    ap.save(path, variables)
    abstract = jax.eval_shape(model.init, jax.random.key(1), x)
    filled = ap.load_into(abstract, path)
    assert isinstance(filled["params"]["Dense_0"]["kernel"], nn.Partitioned)
    same(filled, variables)
    loaded = ap.load(path)
    assert loaded["packed"]["packed"]["kernel"].bits == 3
    np.testing.assert_array_equal(model.apply(loaded, x), model.apply(variables, x))


def test_bits_and_layout_of_a_target(path) -> None:
    model = Model(nnx.Rngs(0))
    ap.save(path, model)
    kernel = model.linears[0].kernel.get_value()
    target = Model(nnx.Rngs(1), weights=8)
    target.linears[0].kernel.set_value(target.linears[0].kernel.get_value().prepare())
    counts: dict[str, int] = {}
    ap.load_into(target, path, bits=2, on_read=counts.__setitem__)
    same(target.linears[0].kernel.get_value(), kernel.truncate(2).prepare())
    same(target.linears[1].kernel.get_value(), model.linears[1].kernel.get_value().truncate(2))
    scales = 64 * 2 * 4
    assert counts["linears.0.kernel"] == counts["linears.1.kernel"] == 2 * 64 * 8 + scales
    ap.save(path, target, keep_prepared=True)
    ap.load_into(model, path)
    same(model.linears[0].kernel.get_value(), kernel.truncate(2))


def test_named_tuples_are_stored_by_their_fields(path) -> None:
    params = {"w": jnp.arange(3.0)}
    optimizer = optax.chain(optax.clip_by_global_norm(1), optax.adam(1e-3))
    state = optimizer.init(params)
    _, trained = optimizer.update(params, state, params)
    ap.save(path, trained)
    same(ap.load_into(state, path), trained)
    same(ap.load_into(jax.eval_shape(optimizer.init, params), path), trained)
    same(ap.load(path)[1][0], trained[1][0]._asdict())


def test_leaves_of_a_target_must_be_arrays(path) -> None:
    ap.save(path, {"a": np.ones((), "f4")})
    with pytest.raises(TypeError, match=r"'a' of the target must be an array, .* got float"):
        ap.load_into({"a": 1.0}, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("a"), "has leaves that the target lacks, 1 of them: a$"),
        (lambda t: t.update(more=np.ones(1)), "lacks leaves of the target, 1 of them: more$"),
        (lambda t: t.update(a=np.ones(3)), r"'a' is float32\[2\], the target has float64\[3\]"),
        (lambda t: t.update(a=packed()), r"'a' is float32\[2\], the target has a packed matrix \["),
        (lambda t: t.update(w=np.ones(2)), r"'w' is a packed matrix \[96, 40\], the target has fl"),
        (
            lambda t: t.update(w=packed(n=39)),
            r"'w' is a packed matrix \[96, 40\], the target has a packed matrix \[96, 39\]",
        ),
        (
            lambda t: t.update(key=jax.random.key(0, impl="rbg")),
            r"'key' is key<fry>\[\], the target has key<rbg>\[\]",
        ),
    ],
)
def test_targets_that_do_not_fit(path, change, message) -> None:
    tree = {"a": np.ones(2, np.float32), "w": packed(), "key": jax.random.key(0)}
    ap.save(path, tree)
    target = dict(tree)
    change(target)
    with pytest.raises(ap.CheckpointError, match=message):
        ap.load_into(target, path)


def test_a_file_of_another_program_fills_a_tree_by_its_names(path) -> None:
    safetensors.numpy.save_file({"a.0.b": np.arange(3, dtype=np.float32)}, path)
    same(
        ap.load_into({"a": [{"b": jnp.zeros(3)}]}, path), {"a": [{"b": np.arange(3.0, dtype="f4")}]}
    )


# Bad files


def test_paths_that_are_no_checkpoint(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint at '.*nothing'"):
        ap.load(tmp_path / "nothing")
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint at '.*link'"):
        ap.load(tmp_path / "link")
    with pytest.raises(ap.CheckpointError, match="is a directory; name the checkpoint's file in"):
        ap.load(tmp_path)
    (tmp_path / "empty").touch()
    with pytest.raises(ap.CheckpointError, match="empty is empty, not a checkpoint"):
        ap.load(tmp_path / "empty")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileNotFoundError):
        ap.load(tmp_path / "pipe")


def entry(dtype: str = "U8", shape: Any = (2,), offsets: Any = (0, 2)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


BAD_HEADERS: list[tuple[Any, bytes, str]] = [
    ("", b"", "not a sound safetensors file"),
    ("[" * 100000, b"", "not a sound safetensors file"),
    ('{"a":' * 100000, b"", "recursion limit"),
    ({"a": entry(offsets=(0, 3))}, b"abc", "not a sound safetensors file: .*"),
    ({"a": entry(offsets=(2, 0))}, b"ab", "invalid offset for tensor `a`"),
    ({"a": entry(offsets=(1, 3))}, b"abc", "invalid offset for tensor `a`"),
    ({"a": entry(), "b": entry()}, b"ab", "invalid offset for tensor `[ab]`"),
    ({"a": entry()}, b"abc", "not fully covered"),
    ({"a": entry()}, b"a", "not fully covered"),
    ({"a": entry(shape=(2**62, 4, 2))}, b"ab", "overflow"),
    ({"a": entry(shape=(-1,))}, b"ab", "invalid value"),
    ({"a": entry(shape=(2.0,))}, b"ab", "invalid type"),
    ({"a": entry(dtype="INT4")}, b"ab", "unknown variant"),
    ({"__metadata__": {"x": 1}}, b"", "invalid type"),
    ({"a": entry(dtype="F4", shape=(4,))}, b"ab", "tensor 'a' has dtype F4, which must be one of"),
    ({"a": entry(shape=(2, *(1,) * 20))}, b"ab", "'a' has 21 axes, at most 16 are allowed"),
    ({"a": entry(shape=(2**40, 0), offsets=(0, 0))}, b"", r"'a' is empty with shape \[1099511627"),
    (
        '{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},'
        '"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}',
        b"ab",
        "the header has the name 'a' twice",
    ),
    (
        '{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"__metadata__":{"x":"","x":""}}',
        b"ab",
        "the header has the name 'x' twice",
    ),
]


@pytest.mark.parametrize(("header", "data", "message"), BAD_HEADERS)
def test_bad_headers(path, header, data, message) -> None:
    write_raw(path, header, data)
    with pytest.raises(ap.CheckpointError, match=f"model.safetensors.*{message}"):
        ap.load(path)


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (b"1234567", "has 7 bytes, too few for a safetensors file"),
        (struct.pack("<Q", 3) + b"{}", "the header has 3 bytes, 2 are allowed"),
        (struct.pack("<Q", 2**64 - 1) + b"{}", "the header has 18446744073709551615 bytes, 2 are"),
    ],
)
def test_bad_lengths(path, start, message) -> None:
    path.write_bytes(start)
    with pytest.raises(ap.CheckpointError, match=message):
        ap.load(path)


def test_a_file_that_grows_while_it_is_opened(path, monkeypatch) -> None:
    ap.save(path, {})

    def grow(self: layer.SafetensorsFile) -> None:
        path.write_bytes(path.read_bytes() + b"x")

    monkeypatch.setattr(layer.SafetensorsFile, "_check_structure", grow)
    with pytest.raises(ap.CheckpointError, match="changed while it was opened"):
        ap.load(path)


def test_a_file_that_is_replaced_while_it_is_opened(path, monkeypatch) -> None:
    w = packed(k=128)
    trees = [dataclasses.replace(w, rotation=ap.Rotation(64, seed)) for seed in (1, 2)]
    ap.save(path, trees[0])
    size = path.stat().st_size
    saves = iter([trees[1]])
    check = layer.safe_open

    def check_after_save(*args: Any, **options: Any) -> Any:
        for tree in saves:
            ap.save(path, tree)
        return check(*args, **options)

    monkeypatch.setattr(layer, "safe_open", check_after_save)
    same(ap.load(path), trees[1])
    assert path.stat().st_size == size  # only what the header says differs

    def check_and_save(*args: Any, **options: Any) -> Any:
        ap.save(path, trees[0])
        return check(*args, **options)

    monkeypatch.setattr(layer, "safe_open", check_and_save)
    with pytest.raises(ap.CheckpointError, match="was replaced or changed while it was opened"):
        ap.load(path)


def test_a_long_list_of_names_with_one_twice_takes_no_time() -> None:
    names = [*map(str, range(50_000)), "49999"]
    text = "{" + ",".join(f'"{name}":0' for name in names) + "}"
    begin = time.process_time()
    with pytest.raises(ap.CheckpointError, match="x has the name '49999' twice"):
        layer.parse_json(text, "x")
    assert time.process_time() - begin < 5


def static(**change: Any) -> dict[str, Any]:
    return {"$packed": {"k": K, "group_size": GROUP, "rotation": None, "columns": None} | change}


BAD_TREES: list[tuple[Any, str]] = [
    ("plain", "'tensor' is described by plain, which has no meaning"),
    ({"w": {"$packed": []}}, "'w' is described by .*no meaning"),
    ({"w": {"$other": {}}}, "'w' is described by .*no meaning"),
    ({"w": static() | {"x": 1}}, "'w' is described by .*no meaning"),
    ({"w": 1}, "'w' is described by 1, which has no meaning"),
    ({"w": static(), "x": "array"}, "'x' is in the manifest and not in the file, or twice"),
    ({}, "tensor 'w.offsets' is not part of the manifest's tree"),
    ({"w": {"$packed": {"k": 1}}}, r"w must have k, group_size, rotation, columns, got \{'k': 1\}"),
    ({"w": static(k=-1)}, "w has k -1, it must be an int from 0"),
    ({"w": static(k=96.0)}, "w has k 96.0, it must be an int"),
    ({"w": static(group_size=None)}, "w has group_size None, it must be an int"),
    ({"w": static(group_size=True)}, "w has group_size True, it must be an int"),
    ({"w": static(columns="1")}, "w has columns 1, it must be an int"),
    ({"w": static(k=97)}, "group_size must be .* that divides k = 97"),
    ({"w": static(k=10**30, group_size=10**30)}, "w.planes must have .* words for k = 1000"),
    ({"w": static(k=128)}, "w.planes must have 4 words for k = 128, got 3"),
    ({"w": static(group_size=96)}, r"w.scales must have shape \(40, 1\), got \(40, 3\)"),
    ({"w": static(columns=40)}, r"w.planes must be uint32\[..., tiles, words, bits, 32\]"),
    ({"w": static(rotation={"block": 64, "seed": 0})}, "rotation block 64 must divide k, got k ="),
    ({"w": static(rotation={"block": 3, "seed": 0})}, "Rotation.block must be a power of two"),
    ({"w": static(rotation={"block": 64.0, "seed": 0})}, "Rotation.block must be an int"),
    ({"w": static(rotation={"size": 64})}, "unexpected keyword argument 'size'"),
    ({"w": static(rotation=[64, 0])}, r"w has rotation \[64, 0\], it must be an object or null"),
    ({"w": {"$key": "mine"}}, "'w' is a key of 'mine', allowed are"),
    ({"$int": {"x": static()}}, "has the key 'x', which must be an integer"),
    ({"$int": {"007": static()}}, "has the key '007', which must be an integer"),
]


@pytest.mark.parametrize(("tree", "message"), BAD_TREES)
def test_bad_manifests(path, tree, message) -> None:
    ap.save(path, {"w": packed()})
    change_manifest(path, json.dumps({"version": 1, "tree": tree}))
    with pytest.raises(ap.CheckpointError, match=f"model.safetensors: .*{message}"):
        ap.load(path)


def test_bad_manifests_as_text(path) -> None:
    ap.save(path, {"x": np.ones(2, "f4")})
    for text, message in (
        ("{", "the manifest is not JSON"),
        ("[" * 100000, "the manifest is not JSON"),
        ('{"version":' + "9" * 5000 + "}", "the manifest is not JSON"),
        ("[]", "the manifest must be an object with version and tree"),
        ('{"version":1,"tree":{},"more":1}', "must have version and tree, nothing else"),
        ('{"version":3,"tree":{},"more":1}', "has version 3 of the format"),
        ('{"tree":{}}', "has version None of the format"),
        ('{"version":1,"tree":{},"tree":{}}', "the manifest has the name 'tree' twice"),
        ('{"version":2,"tree":{}}', "has version 2 of the format, this library reads 1"),
        ('{"version":true,"tree":{}}', "has version True of the format"),
        (
            '{"version":1,"tree":' + "[" * 80 + "]" * 80 + "}",
            "is deeper than 64 levels or longer than 1000",
        ),
        ('{"version":1,"tree":{"' + "a" * 10**5 + '":[' + "[]," * 10**5 + "[]]}}", "than 1000"),
        (
            '{"version":1,"tree":' + '{"a":[' * 300 + "]}" * 300 + "}",
            "is deeper than 64 levels or longer than 1000",
        ),
    ):
        change_manifest(path, text)
        with pytest.raises(ap.CheckpointError, match=message):
            ap.load(path)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("w.planes", np.zeros((3, N, 3), np.int32), "w.planes must be uint32.*got int32"),
        ("w.planes", np.zeros((9, N, 3), np.uint32), "w.bits must be from 1 to 8, got 9"),
        ("w.planes", np.zeros((0, N, 3), np.uint32), "w.bits must be from 1 to 8, got 0"),
        ("w.planes", np.zeros((3, 0, 3), np.uint32), "w.scales must have shape"),
        ("w.planes", np.zeros((N, 3), np.uint32), "w.planes must be uint32"),
        ("w.scales", np.ones((N, 3), np.float64), "w.scales must be one of .* got float64"),
        ("w.offsets", np.ones((N, 1), np.float32), "w.offsets must have shape"),
        ("w.scales", -np.ones((N, 3), np.float32), "'w' has negative scales"),
    ],
)
def test_fields_that_do_not_fit(path, name, array, message) -> None:
    ap.save(path, {"w": packed()})
    tensors = safetensors.numpy.load_file(path) | {name: array}
    safetensors.numpy.save_file(tensors, path, read_header(path)["__metadata__"])
    with pytest.raises(ap.CheckpointError, match=message):
        ap.load(path)


@pytest.mark.parametrize("keep_prepared", [False, True])
def test_bits_past_the_end_must_be_zero(path, keep_prepared) -> None:
    w = packed(k=40)
    w.planes[1, 7, 1] |= 1 << 8
    ap.save(path, {"w": w.prepare() if keep_prepared else w}, keep_prepared=keep_prepared)
    with pytest.raises(ap.CheckpointError, match="'w' has bits set past k = 40"):
        ap.load(path)
    assert ap.load(path, memory_map=True)["w"].k == 40  # values are not looked at


def test_keys_must_have_the_size_of_their_generator(path) -> None:
    ap.save(path, {"w": np.zeros(3, np.uint32)})
    change_manifest(path, '{"version":1,"tree":{"w":{"$key":"threefry2x32"}}}')
    with pytest.raises(ap.CheckpointError, match=r"which is uint32\[..., 2\], and has uint32\[3\]"):
        ap.load(path)


def test_64_bits_need_x64(path) -> None:
    ap.save(path, {"step": np.array(2**40)})
    with pytest.raises(ap.CheckpointError, match="'step' is int64, which JAX holds only with"):
        ap.load(path)
    with jax.enable_x64(True):
        same(ap.load(path), {"step": np.array(2**40)})


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("[]", "must be an object with the objects metadata and weight_map"),
        ("{}", "must be an object with the objects metadata and weight_map"),
        ('{"weight_map":{},"metadata":1}', "must be an object with the objects"),
        ("{", "is not JSON"),
        ('{"weight_map":{"x":"a","x":"b"}}', "has the name 'x' twice"),
        (
            '{"weight_map":{"x":"../a"}}',
            "tensor 'x' must be in a file of the same folder, got '../",
        ),
        ('{"weight_map":{"x":"/etc/passwd"}}', "in a file of the same folder"),
        ('{"weight_map":{"x":".."}}', "in a file of the same folder"),
        ('{"weight_map":{"x":""}}', "in a file of the same folder"),
        ('{"weight_map":{"x":"a\\u0000"}}', "in a file of the same folder"),
        ('{"weight_map":{"x":"\\ud800"}}', "in a file of the same folder"),
        ('{"weight_map":{"x":"%s"}}' % ("ö" * 200), "in a file of the same folder"),
        ('{"weight_map":{"x":1}}', "in a file of the same folder, got 1"),
        ('{"weight_map":{"y":"a"}}', "must list the same tensors, 'x' is only in a$"),
        ('{"weight_map":{"x":"a","y":"a"}}', "must list the same tensors, 'y' is only in model.s"),
        ('{"weight_map":{"x":"a"},"metadata":{"save_id":"1"}}', "belongs to another save"),
        ('{"weight_map":{"x":"a"},"metadata":{"jax_anyprec":[]}}', "the manifest must be an obj"),
    ],
)
def test_bad_indexes(path, index, message) -> None:
    safetensors.numpy.save_file({"x": np.ones(2, np.float32)}, path.with_name("a"))
    Path(f"{path}.index.json").write_text(index)
    with pytest.raises(ap.CheckpointError, match=message):
        ap.load(path)


def test_an_index_or_header_that_is_too_long(path, monkeypatch) -> None:
    monkeypatch.setattr(layer, "MAX_HEADER_BYTES", 10)
    Path(f"{path}.index.json").write_text(" " * 11)
    with pytest.raises(ap.CheckpointError, match="has 11 bytes, at most 10 are allowed for an in"):
        ap.load(path)
    write_raw(path, " " * 11, b"")
    with pytest.raises(ap.CheckpointError, match="the header has 11 bytes, 10 are allowed"):
        ap.load(path)
    with pytest.raises(ap.CheckpointError, match="x has 11 bytes, at most 10 are allowed"):
        layer.parse_json(" " * 11, "x")


def test_mutated_files_are_refused_or_valid(tmp_path) -> None:
    report = fuzz_checkpoint.fuzz(400, 7, tmp_path)
    assert sum(report["outcomes"].values()) == 400
    assert report["outcomes"]["refused"] > 200
    assert report["outcomes"]["valid"] > 20
    assert report["peak_growth_bytes"] < fuzz_checkpoint.MEMORY


# Shardings


def test_shardings_are_checked(path) -> None:
    ap.save(path, {"a": np.ones(2, "f4"), "w": packed(), "key": jax.random.key(0)})
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    for sharding in (device, {"a": device, "w": device, "key": device}, lambda name, leaf: device):
        loaded = ap.load(path, sharding=sharding)
        assert all(x.committed for x in jax.tree.leaves(loaded))
    with pytest.raises(ValueError, match=r"sharding has no leaf for 'key', only for \['a', 'w'\]"):
        ap.load(path, sharding={"a": device, "w": device})
    with pytest.raises(TypeError, match=r"sharding of a must be a jax.sharding.Sharding or None"):
        ap.load(path, sharding=lambda name, leaf: jax.P())
    w = ap.QuantizedTensor(device, jax.P(), None, K, GROUP)
    with pytest.raises(TypeError, match=r"sharding of w.scales must be a jax.sharding.Sharding"):
        ap.load(path, sharding={"a": device, "w": w, "key": None})


SHARDED = """
import os, sys
import jax_anyprec as ap
assert "safetensors" not in sys.modules
import dataclasses
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec as P

path = sys.argv[1]
mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
at = lambda *spec: NamedSharding(mesh, P(*spec))
w = ap.quantize(jax.random.normal(jax.random.key(0), (256, 64)), 4, group_size=64)
tree = {"column": w, "row": w, "x": jnp.arange(64.0).reshape(8, 8), "key": jax.random.key(0)}
ap.save(path, tree)
column = dataclasses.replace(w, planes=at(None, ("x", "y"), None), scales=at(("x", "y"), None))
row = dataclasses.replace(w, planes=at(None, None, "y"), scales=at(None, "y"))
shardings = {"column": column, "row": row, "x": at("x"), "key": at()}
counts = {}
for sharding in (shardings, lambda name, leaf: shardings[name]):
    found = ap.load(path, sharding=sharding, on_read=counts.__setitem__)
    for name, expected in tree.items():
        wanted = jax.tree.leaves(shardings[name])
        pairs = zip(jax.tree.leaves(found[name]), jax.tree.leaves(expected), strict=True)
        for (a, b), s in zip(pairs, wanted, strict=True):
            assert a.sharding == s, (name, a.sharding, s)
            assert len(a.addressable_shards) == 4
            assert jnp.array_equal(a, b)
    assert found["column"].planes.addressable_shards[0].data.shape == (4, 16, 8)
    assert found["row"].planes.addressable_shards[0].data.shape == (4, 64, 4)
    # Each device reads its part: a column's once in all, a row's once for each of "x".
    assert counts == {"column": w.nbytes, "row": 2 * w.nbytes, "x": 2 * 64 * 4, "key": 8}, counts

# Fewer bits; and a target's own shardings, whose offsets lie like its scales.
counts.clear()
found = ap.load(path, sharding=shardings, bits=1, on_read=counts.__setitem__)
assert found["column"].planes.addressable_shards[0].data.shape == (1, 16, 8)
assert jnp.array_equal(found["row"].dequantize(), w.truncate(1).dequantize())
assert counts["column"] == w.planes.nbytes // 4 + w.scales.nbytes
struct = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
abstract = jax.tree.map(struct, tree, shardings)
found = ap.load_into(abstract, path)
assert [a.sharding for a in jax.tree.leaves(found)] == jax.tree.leaves(shardings)
again = ap.load_into(found, path, memory_map=True)
assert [a.sharding for a in jax.tree.leaves(again)] == jax.tree.leaves(shardings)
assert jnp.array_equal(again["x"], tree["x"])

# What is split over devices is saved as a whole.
ap.save(path, found)
assert jnp.array_equal(ap.load(path)["row"].planes, w.planes)
ap.save(path, dataclasses.replace(w, offsets=w.scales))
found = ap.load_into(abstract["row"], path)
assert found.offsets.sharding == row.scales
found = ap.load(path, sharding=at())
assert found.planes.sharding == at() and jnp.array_equal(found.offsets, w.scales)

# An abstract module knows the shape of its mesh; the devices are those of `set_mesh`.
init = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "x"))
make = lambda: nnx.Linear(8, 8, kernel_init=init, rngs=nnx.Rngs(0))
with jax.set_mesh(mesh):
    linear, abstract = make(), nnx.eval_shape(make)
    ap.save(path, linear)
try:
    ap.load_into(abstract, path)
    raise AssertionError("this mesh has no devices")
except ValueError as error:
    assert "is for a mesh without devices" in str(error) and "or pass sharding" in str(error)
with jax.set_mesh(mesh):
    ap.load_into(abstract, path)
assert abstract.kernel[...].sharding == at(None, "x")
assert jnp.array_equal(abstract.kernel[...], linear.kernel[...])
print("ok")
"""


def test_four_devices_each_read_their_part(path) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-W", "error", "-c", SHARDED, str(path)],
        env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.stdout.strip() == "ok", done.stderr


def test_the_examples_of_the_documentation_run(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[1] / "docs" / "checkpoints.md").read_text("utf-8")
    values: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        exec(compile(block, "checkpoints.md", "exec"), values)
    up = values["model"].up.kernel.get_value()
    same(values["small"].up.kernel.get_value(), up.truncate(2))
    same(ap.load("model.safetensors")["up"]["kernel"], up)
    assert in_file(tmp_path / "prepared.safetensors", values["fast"]["up"].planes)


# Files from outside of the library


def read_header(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    return json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])


def write_raw(path: Path, header: Any, data: bytes) -> None:
    text = header if isinstance(header, str) else json.dumps(header)
    path.write_bytes(struct.pack("<Q", len(text)) + text.encode() + data)


def change_manifest(path: Path, manifest: str) -> None:
    data = path.read_bytes()
    end = 8 + struct.unpack("<Q", data[:8])[0]
    write_raw(path, read_header(path) | {"__metadata__": {"jax_anyprec": manifest}}, data[end:])


def spoil_planes(path: Path, name: str, bits: int) -> None:
    """Overwrite all planes of a tensor but the first, by the offsets in the header."""
    described = read_header(path)[f"{name}.planes"]
    begin, end = described["data_offsets"]
    data = bytearray(path.read_bytes())
    begin, end = (8 + struct.unpack("<Q", data[:8])[0] + at for at in (begin, end))
    planes = np.frombuffer(data[begin:end], np.uint32).reshape(described["shape"]).copy()
    planes[..., bits:, :, :] ^= 0xABCDEF01
    data[begin:end] = planes.tobytes()
    path.write_bytes(data)


def in_file(path: Path, array: jax.Array) -> bool:
    """Whether an array lies in this process's mapping of a file."""
    at = array.unsafe_buffer_pointer()
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(x, 16) for x in line.split()[0].split("-"))
        if begin <= at < end:
            return line.endswith(str(path))
    return False
