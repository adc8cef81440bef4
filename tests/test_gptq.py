"""GPTQ, AWQ and compressed-tensors layers: exact import against a packer and arithmetic apart."""

from __future__ import annotations

import copy
import json
import tracemalloc
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from synthetic_gptq import (
    GROUP,
    K,
    N,
    Weights,
    pack_awq,
    pack_awq_gemv,
    pack_compressed,
    pack_gptq,
    random_weights,
)

import jax_anyprec as ap
from jax_anyprec.gptq import (
    CheckpointError,
    Scheme,
    has_scheme,
    linear_names,
    linear_shape,
    open_folder,
    read_linear,
    read_permuted,
)


def check(tensor: ap.QuantizedTensor, w: Weights) -> None:
    assert isinstance(tensor.planes, np.ndarray)
    assert (tensor.bits, tensor.shape) == (w.bits, w.integers.shape)
    assert tensor.group_size == len(w.group) // len(w.scales)
    np.testing.assert_array_equal(np.asarray(tensor.dequantize()), w.values())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [GROUP, None])
@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
def test_gptq(bits, group_size, layout):
    low = 1 if layout == "gptq" else 0
    w = random_weights(bits, group_size=group_size, zeros=(low, 2**bits))
    tensors = pack_gptq(w, minus_one=layout == "gptq")
    scheme = Scheme(layout, bits, group_size)
    check(read_linear(tensors, "layer", scheme), w)
    assert linear_shape(tensors, "layer", scheme) == (K, N)


@pytest.mark.parametrize("group_size", [GROUP, None])
def test_awq(group_size):
    w = random_weights(group_size=group_size, zeros=(0, 16))
    check(read_linear(pack_awq(w), "layer", Scheme("awq_gemm", 4, group_size)), w)


@pytest.mark.parametrize(("k", "group_size"), [(96, 32), (128, 64), (128, None), (2304, 32)])
def test_awq_for_matrix_times_vector(k, group_size):
    w = random_weights(k=k, n=8, group_size=group_size, zeros=(0, 16))
    check(read_linear(pack_awq_gemv(w), "layer", Scheme("awq_gemv", 4, group_size)), w)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_compressed_tensors(bits, symmetric):
    centre = 1 << (bits - 1)
    w = random_weights(
        bits, n=13, zeros=(centre, centre + 1) if symmetric else (0, 2**bits), dtype="bfloat16"
    )
    tensors = pack_compressed(w, symmetric=symmetric)
    check(read_linear(tensors, "layer", Scheme("pack_quantized", bits, GROUP, symmetric)), w)


def test_compressed_tensors_with_one_group_of_an_odd_size():
    w = random_weights(k=37, n=5, group_size=None, zeros=(0, 16))
    check(read_linear(pack_compressed(w), "layer", Scheme("pack_quantized", 4, None)), w)


@pytest.mark.parametrize("dtype", [np.float16, "bfloat16", np.float32])
@pytest.mark.parametrize(("low", "high"), [(1e-3, 1e-2), (6e-8, 1e-6), (6e4, 6.5e4)])
def test_scales_of_every_size_and_dtype(dtype, low, high):
    w = random_weights(8)
    w.scales = np.random.default_rng(1).uniform(low, high, w.scales.shape)
    # What float16 holds is exact in float32 times 8 bits.
    w.scales = w.scales.astype(np.float16).astype(dtype)
    tensor = read_linear(pack_gptq(w), "layer", Scheme("gptq", 8, GROUP))
    check(tensor, w)
    assert (tensor.scales >= 0).all()


def test_dtypes_are_the_smallest_that_are_exact():
    def dtypes(w: Weights) -> tuple[np.dtype, np.dtype]:
        tensor = read_linear(pack_gptq(w), "layer", Scheme("gptq", 4, GROUP))
        return tensor.scales.dtype, tensor.offsets.dtype

    assert dtypes(random_weights()) == (np.float16, np.float32)  # 11 bits times 4
    assert dtypes(random_weights(zeros=(8, 9))) == (np.float16, np.float16)


def test_negative_scales_reverse_the_codes():
    w = random_weights()
    w.scales[::2] *= -1
    check(read_linear(pack_gptq(w), "layer", Scheme("gptq", 4, GROUP)), w)


def test_groups_in_another_order_are_no_permutation_of_features():
    w = random_weights()
    w.group = np.array([2, 0, 1])[w.group]
    tensor, order = read_permuted(pack_gptq(w), "layer", Scheme("gptq", 4, GROUP))
    assert order is None
    check(tensor, w)


def test_without_g_idx_groups_are_stretches():
    w = random_weights()
    tensors = pack_gptq(w)
    del tensors["layer.g_idx"]
    check(read_linear(tensors, "layer", Scheme("gptq", 4, GROUP)), w)


@pytest.mark.parametrize("layout", ["gptq", "pack_quantized"])
def test_groups_by_activation(layout):
    w = random_weights()
    w.group = np.random.default_rng(2).permutation(w.group)
    if layout == "gptq":
        tensors = pack_gptq(w)
    else:
        tensors = pack_compressed(w) | {"layer.weight_g_idx": w.group.astype(np.int32)}
    scheme = Scheme(layout, 4, GROUP)
    tensor, order = read_permuted(tensors, "layer", scheme)
    assert sorted(order) == list(range(K))
    np.testing.assert_array_equal(np.asarray(tensor.dequantize()), w.values()[order])
    x = np.random.default_rng(3).normal(0, 1, (2, K)).astype(np.float32)
    y = ap.matmul(x[:, order], tensor)
    np.testing.assert_allclose(y, x.astype(np.float64) @ w.values(), atol=1e-5)
    with pytest.raises(CheckpointError, match=r"layer has groups in the order of activations"):
        read_linear(tensors, "layer", scheme)


def test_a_g_idx_of_minus_one_says_that_nothing_was_reordered():
    w = random_weights()
    tensors = pack_compressed(w) | {"layer.weight_g_idx": np.full(K, -1, np.int32)}
    check(read_linear(tensors, "layer", Scheme("pack_quantized", 4, GROUP)), w)


# Configurations, as the libraries write them.

GPTQ = {
    "bits": 4,
    "group_size": 128,
    "damp_percent": 0.01,
    "desc_act": False,
    "sym": True,
    "true_sequential": True,
    "model_name_or_path": None,
    "quant_method": "gptq",
    "checkpoint_format": "gptq",
}
GPTQMODEL = {
    "bits": 8,
    "dynamic": None,
    "group_size": -1,
    "desc_act": True,
    "sym": False,
    "lm_head": False,
    "quant_method": "gptq",
    "checkpoint_format": "gptq_v2",
    "pack_dtype": "int32",
    "meta": {"quantizer": ["gptqmodel:4.2.0"], "mse": 0.0},
}
AWQ = {
    "bits": 4,
    "group_size": 128,
    "modules_to_not_convert": None,
    "quant_method": "awq",
    "version": "gemm",
    "zero_point": True,
}
COMPRESSED = {
    "config_groups": {
        "group_0": {
            "input_activations": None,
            "output_activations": None,
            "targets": ["Linear"],
            "weights": {
                "actorder": None,
                "block_structure": None,
                "dynamic": False,
                "group_size": 128,
                "num_bits": 4,
                "observer": "minmax",
                "observer_kwargs": {},
                "strategy": "group",
                "symmetric": True,
                "type": "int",
            },
        }
    },
    "format": "pack-quantized",
    "global_compression_ratio": None,
    "ignore": ["lm_head"],
    "kv_cache_scheme": None,
    "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
}


def changed(config: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    config = copy.deepcopy(config)
    *parents, last = path.split("/")
    node = config
    for key in parents:
        node = node[key]
    node[last] = value
    return config


WEIGHTS = "config_groups/group_0/weights"


@pytest.mark.parametrize(
    ("config", "scheme"),
    [
        (GPTQ, Scheme("gptq", 4, 128)),
        (GPTQMODEL, Scheme("gptq_v2", 8, None)),
        ({"bits": 3, "group_size": 64}, Scheme("gptq", 3, 64)),
        (changed(GPTQ, "format", "gptq"), Scheme("gptq", 4, 128)),
        (AWQ, Scheme("awq_gemm", 4, 128)),
        (changed(AWQ, "version", "GEMV"), Scheme("awq_gemv", 4, 128)),
        (
            {"w_bit": 4, "q_group_size": 64, "zero_point": True, "version": "GEMM"},
            Scheme("awq_gemm", 4, 64),
        ),
        (COMPRESSED, Scheme("pack_quantized", 4, 128, True)),
        (changed(COMPRESSED, f"{WEIGHTS}/symmetric", False), Scheme("pack_quantized", 4, 128)),
        (
            changed(
                changed(COMPRESSED, f"{WEIGHTS}/strategy", "channel"), f"{WEIGHTS}/group_size", None
            ),
            Scheme("pack_quantized", 4, None, True),
        ),
    ],
)
def test_configurations(config, scheme):
    assert Scheme.parse(config) == scheme


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ([], "config.json must be an object, got list"),
        (changed(GPTQ, "quant_method", "fp8"), "'quant_method' must be 'gptq' or 'awq' or .*'fp8'"),
        (changed(GPTQ, "quant_method", 4), "'quant_method' must be str, got int"),
        (changed(GPTQ, "bits", None), "config.json lacks 'bits'"),
        (changed(GPTQ, "bits", "4"), "'bits' must be int, got str"),
        (changed(GPTQ, "bits", True), "'bits' must be int, got bool"),
        (changed(GPTQ, "bits", 5), "config.json: bits must be one of 2, 3, 4, 8 for gptq, got 5"),
        (changed(GPTQ, "group_size", None), "lacks 'group_size'"),
        (changed(GPTQ, "group_size", 0), "group_size must be None or a positive int, got 0"),
        (changed(GPTQ, "group_size", -2), "group_size must be None or a positive int, got -2"),
        (changed(GPTQ, "checkpoint_format", "marlin"), "must be 'gptq' or 'gptq_v2', got 'marlin'"),
        (changed(GPTQ, "format", "gptq_v2"), "contradicts itself: {'checkpoint_format': 'gptq', "),
        (changed(GPTQ, "is_marlin_format", True), "'is_marlin_format' must be None or False"),
        (changed(GPTQ, "pack_dtype", "int16"), "'pack_dtype' must be None or 'int32', got 'int16'"),
        (changed(GPTQ, "dynamic", {"-:mlp": {}}), "'dynamic' must be None or {} or False, got"),
        (changed(GPTQ, "sym", 1), "'sym' must be bool, got int"),
        (changed(GPTQ, "desc_act", "no"), "'desc_act' must be bool, got str"),
        (changed(AWQ, "bits", 8), "bits must be one of 4 for awq_gemm, got 8"),
        (changed(AWQ, "version", "gemv_fast"), "'version' must be 'gemm' or 'gemv', got 'gemv_f"),
        (changed(AWQ, "zero_point", False), "'zero_point' must be None or True, got False"),
        (changed(COMPRESSED, "format", "naive-quantized"), "'format' must be 'pack-quantized'"),
        (changed(COMPRESSED, "sparsity_config", {"format": "sparse"}), "'sparsity_config' must be"),
        (changed(COMPRESSED, "transform_config", {"R1": 1}), "'transform_config' must be None or"),
        (changed(COMPRESSED, "config_groups", {}), "'config_groups' must have one group, got 0"),
        (changed(COMPRESSED, "config_groups", []), "'config_groups' must be dict, got list"),
        (
            changed(COMPRESSED, "config_groups/group_0/targets", ["re:.*proj"]),
            r"'group_0': 'targets' must be \['Linear'\], got \['re:.\*proj'\]",
        ),
        (
            changed(COMPRESSED, "config_groups/group_0/input_activations", {"num_bits": 8}),
            "'input_activations' must be None, got",
        ),
        (
            changed(COMPRESSED, "config_groups/group_0/output_activations", {"num_bits": 8}),
            "'output_activations' must be None, got",
        ),
        (
            changed(COMPRESSED, "config_groups/group_0/format", "nvfp4-pack-quantized"),
            "'format' must be None or 'pack-quantized', got 'nvfp4",
        ),
        (changed(COMPRESSED, f"{WEIGHTS}/type", "float"), "'type' must be None or 'int'"),
        (changed(COMPRESSED, f"{WEIGHTS}/dynamic", True), "'dynamic' must be None or False"),
        (changed(COMPRESSED, f"{WEIGHTS}/block_structure", [8, 8]), "'block_structure' must be"),
        (
            changed(COMPRESSED, f"{WEIGHTS}/strategy", "tensor"),
            "'weights': 'strategy' must be 'group' or 'channel', got 'tensor'",
        ),
        (
            changed(COMPRESSED, f"{WEIGHTS}/num_bits", 9),
            "bits must be one of 1, 2, 4, 8 for pack_quantized, got 9",
        ),
    ],
)
def test_configurations_that_are_refused(config, message):
    with pytest.raises(CheckpointError, match=message):
        Scheme.parse(config, "config.json")


def test_a_scheme_has_a_known_layout():
    with pytest.raises(ValueError, match=r"layout must be one of gptq, gptq_v2, .*got 'marlin'"):
        Scheme("marlin", 4, None)  # type: ignore[arg-type]


# Layers that are refused.


def with_part(part: str, change: Any, *, pack: Any = pack_gptq) -> dict[str, np.ndarray]:
    tensors = pack(random_weights())
    tensors[f"layer.{part}"] = change(tensors[f"layer.{part}"])
    return tensors


def without(part: str, pack: Any) -> dict[str, np.ndarray]:
    tensors = pack(random_weights())
    del tensors[f"layer.{part}"]
    return tensors


def put(at: Any, value: Any) -> Any:
    def change(x: np.ndarray) -> np.ndarray:
        x = x.copy()
        x[at] = value
        return x

    return change


GEMV = Scheme("awq_gemv", 4, GROUP)
GEMM = Scheme("awq_gemm", 4, GROUP)
PACKED = Scheme("pack_quantized", 4, GROUP)
V1 = Scheme("gptq", 4, GROUP)


@pytest.mark.parametrize(
    ("tensors", "scheme", "message"),
    [
        (without("qweight", pack_gptq), V1, "layer lacks qweight"),
        (without("scales", pack_gptq), V1, "layer lacks scales"),
        (without("qzeros", pack_awq), GEMM, "layer lacks qzeros"),
        (without("weight_shape", pack_compressed), PACKED, "layer lacks weight_shape"),
        (
            with_part("qweight", lambda x: x.astype(np.int64)),
            V1,
            "has qweight in int64, which must be int32",
        ),
        (
            with_part("scales", lambda x: x.astype(np.float64)),
            V1,
            "has scales in float64, which must be float16 or bfloat16 or float32",
        ),
        (
            with_part("qweight", lambda x: x[0]),
            V1,
            r"has qweight of shape \[64\], which must be \[any, any\]",
        ),
        (
            with_part("qweight", lambda x: x[:0]),
            V1,
            r"has qweight of shape \[0, 64\], which must be \[any, any\]",
        ),
        (
            with_part("scales", lambda x: x[:2]),
            V1,
            r"has scales of shape \[2, 64\], which must be \[3, 64\]",
        ),
        (
            with_part("qzeros", lambda x: x.T),
            V1,
            r"has qzeros of shape \[8, 3\], which must be \[3, 8\]",
        ),
        (
            with_part("qweight", lambda x: x[:, :63]),
            V1,
            r"has qweight of shape \[12, 63\], which 4-bit words don't fill",
        ),
        (
            with_part("qweight", lambda x: x[:11]),
            Scheme("gptq", 3, GROUP),
            r"has qweight of shape \[11, 64\], which 3-bit words don't fill",
        ),
        (pack_gptq(random_weights()), Scheme("gptq", 4, 16), "can't be held: group_size must be"),
        (pack_awq(random_weights()), Scheme("awq_gemm", 4, 64), "group_size must be a multiple"),
        (with_part("scales", put((0, 0), np.nan)), V1, "scales that are NaN, infinite or too"),
        (with_part("scales", put((0, 0), np.inf)), V1, "scales that are NaN, infinite or too"),
        (
            with_part("scales", lambda x: np.full_like(x, 3e38, dtype="bfloat16")),
            V1,
            "scales that are NaN, infinite or too large",
        ),
        (
            with_part("scales", lambda x: x.astype(np.float32) / 3),
            V1,
            "has float32 scales whose products with 4-bit integers would be rounded",
        ),
        (with_part("qzeros", put((0, 0), -1)), V1, "minus one as 15, which readers .*16 or for 0"),
        (with_part("g_idx", put(0, 3)), V1, "g_idx outside of its 3 groups"),
        (with_part("g_idx", put(0, -1)), V1, "g_idx outside of its 3 groups"),
        (with_part("g_idx", put(0, 1)), V1, "g_idx with groups of other sizes than 32"),
        (with_part("g_idx", lambda x: x[1:]), V1, r"g_idx of shape \[95\], which must be \[96\]"),
        (
            with_part("qzeros", lambda x: x[:, :0], pack=pack_awq_gemv),
            GEMV,
            r"has qzeros of shape \[64, 0\], which must be \[64, any\]",
        ),
        (
            pack_awq_gemv(random_weights(k=288)) | {"layer.qzeros": np.zeros((N, 1), np.int32)},
            GEMV,
            "has qzeros for 8 groups, fewer than 9",
        ),
        (
            with_part("weight_shape", put(0, -1), pack=pack_compressed),
            PACKED,
            r"has weight_shape \[-1, 96\], whose sizes must be positive",
        ),
        (
            with_part("weight_shape", put(1, 2**62), pack=pack_compressed),
            PACKED,
            r"has weight_packed of shape \[64, 12\], which must be \[64, 576460752303423488\]",
        ),
        (
            pack_compressed(random_weights()),
            Scheme("pack_quantized", 4, GROUP, True),
            "has weight_zero_point, but its scheme is symmetric",
        ),
    ],
)
def test_layers_that_are_refused(tensors, scheme, message):
    with pytest.raises(CheckpointError, match=message):
        read_linear(tensors, "layer", scheme)


# Folders.


def write_folder(path: Any, tensors: dict[str, np.ndarray], **files: Any) -> None:
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    for name, value in files.items():
        (path / f"{name}.json").write_text(json.dumps(value))


@pytest.mark.parametrize("dtype", [np.float16, "bfloat16"])
def test_folder(tmp_path, dtype):
    layers = {f"model.layers.{i}.mlp.up_proj": random_weights(seed=i, dtype=dtype) for i in (0, 1)}
    tensors = {"model.norm.weight": np.ones(3, np.float16)}
    for name, w in layers.items():
        tensors |= pack_gptq(w, name)
    config = {"model_type": "llama", "quantization_config": GPTQ | {"group_size": GROUP}}
    write_folder(tmp_path / "m", tensors, config=config)
    opened, scheme = open_folder(tmp_path / "m")
    assert scheme == V1
    assert linear_names(opened) == sorted(layers)
    for name, w in layers.items():
        check(read_linear(opened, name, scheme), w)


def test_names_of_packed_layers():
    names = ["a.qweight", "a.qzeros", "b.weight", "c.weight_packed", "c.weight_scale"]
    assert linear_names(names) == ["a", "c"]
    with pytest.raises(CheckpointError, match=r"^a is packed twice, as qweight and as weight_pac"):
        linear_names([*names, "a.weight_packed"])


@pytest.mark.parametrize("name", ["quantize_config", "quant_config"])
def test_folders_of_old_with_a_file_of_their_own_names(tmp_path, name):
    write_folder(
        tmp_path / "m",
        pack_gptq(random_weights()),
        config={"model_type": "llama"},
        **{name: {"bits": 4, "group_size": GROUP}},
    )
    (tmp_path / "m/model.safetensors").rename(tmp_path / "m/gptq_model-4bit-32g.safetensors")
    opened, scheme = open_folder(tmp_path / "m")
    check(read_linear(opened, "layer", scheme), random_weights())
    assert has_scheme(tmp_path / "m")


def test_folders_that_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no folder '.*none'"):
        open_folder(tmp_path / "none")
    write_folder(tmp_path / "a", pack_gptq(random_weights()), config={"model_type": "llama"})
    with pytest.raises(CheckpointError, match=r"a has no quantization_config in config.json"):
        open_folder(tmp_path / "a")
    assert not has_scheme(tmp_path / "a")
    (tmp_path / "a/config.json").write_text("[")
    with pytest.raises(CheckpointError, match=r"config.json is not JSON"):
        open_folder(tmp_path / "a")
    (tmp_path / "a/config.json").write_text(json.dumps({"quantization_config": {"bits": 4}}))
    with pytest.raises(CheckpointError, match=r"a/config.json: 'quantization_config' lacks 'group"):
        open_folder(tmp_path / "a")
    (tmp_path / "a/config.json").write_text(json.dumps({"quantization_config": GPTQ}))
    (tmp_path / "a/model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"a must have model.safetensors, .*, got 0"):
        open_folder(tmp_path / "a")
    index = json.dumps({"weight_map": {"layer.qweight": "missing.safetensors"}})
    (tmp_path / "a/model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=r"a lacks a file: .*missing.safetensors"):
        open_folder(tmp_path / "a")


# Damage. Whatever is in a file, an answer or a CheckpointError.

PACKERS = {
    V1: pack_gptq,
    Scheme("gptq_v2", 4, GROUP): pack_gptq,
    GEMM: pack_awq,
    GEMV: pack_awq_gemv,
    PACKED: pack_compressed,
}


def damage(array: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    match rng.integers(6):
        case 0:
            with np.errstate(all="ignore"):
                return array.astype(rng.choice(["int8", "int32", "float16", "float64", "?"]))
        case 1:
            return array[tuple(slice(rng.integers(3), size) for size in array.shape)]
        case 2:
            return array.reshape(rng.choice([1, array.size]), -1)
        case 3:
            return np.repeat(array, rng.integers(3), axis=rng.integers(array.ndim))
        case 4:
            return array.T
        case _:
            octets = np.frombuffer(array.tobytes(), np.uint8).copy()
            octets[rng.integers(octets.size, size=8)] = rng.choice([0, 1, 127, 128, 255], 8)
            return octets.view(array.dtype).reshape(array.shape)


def test_damaged_tensors_never_crash_nor_take_memory():
    rng = np.random.default_rng(0)
    outcomes = {True: 0, False: 0}
    originals = {s: pack(random_weights(k=64, n=32)) for s, pack in PACKERS.items()}
    tracemalloc.start()
    for _ in range(600):
        for scheme, tensors in originals.items():
            name = rng.choice(sorted(tensors))
            damaged = tensors | {name: damage(tensors[name], rng)}
            if rng.integers(10) == 0:
                del damaged[rng.choice(sorted(damaged))]
            try:
                read_permuted(damaged, "layer", scheme)
                outcomes[True] += 1
            except CheckpointError:
                outcomes[False] += 1
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert min(outcomes.values()) > 300
    assert peak < 2**21


def test_damaged_configurations_never_crash():
    rng = np.random.default_rng(0)
    values = [None, True, 0, -1, 7, 2**80, 0.5, "", "gemm", "group", [], ["Linear"], {}, {"a": 1}]
    refused = 0
    for _ in range(800):
        for config in (GPTQ, GPTQMODEL, AWQ, COMPRESSED):
            config = copy.deepcopy(config)
            for _ in range(rng.integers(1, 3)):
                node = config
                while True:
                    key = sorted(node)[rng.integers(len(node))]
                    if not isinstance(node[key], dict) or not node[key] or rng.integers(4) == 0:
                        break
                    node = node[key]
                node[key] = values[rng.integers(len(values))]
            try:
                assert isinstance(Scheme.parse(config), Scheme)
            except CheckpointError:
                refused += 1
    assert refused > 800
