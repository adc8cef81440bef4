"""What is compiled for CUDA, read in the program and run by the CPU's kernels; no GPU is needed."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx
from jax import export
from shapes import Shape
from test_products import Case

import jax_anyprec as ap
from jax_anyprec import _native, choose, local_cuda

CHECKS = [export.DisabledSafetyCheck.custom_call(name) for name in ap.CUSTOM_CALLS]
A100 = {"name": "NVIDIA A100", "arch": 80, "multiprocessors": 108}
H100 = {"name": "NVIDIA H100", "arch": 90, "multiprocessors": 132}
B200 = {"name": "NVIDIA B200", "arch": 100, "multiprocessors": 148}
T4 = {"name": "Tesla T4", "arch": 75, "multiprocessors": 40}
COMPILED = ["80-real", "90a-real", "100-real", "100-virtual"]


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The extension, without GPUs. In CI it must be there if it could be built."""
    backend = _native.cuda()
    if backend.module is None:
        wanted = os.environ.get("JAX_ANYPREC_CUDA") != "OFF" and shutil.which("nvcc")
        if os.environ.get("CI") == "true" and wanted:
            pytest.fail(f"nvcc is on PATH, but: {backend.reason}")
        pytest.skip(str(backend.reason))
    monkeypatch.setattr(backend.module, "devices", lambda: [])
    monkeypatch.setattr(backend.module, "architectures", lambda: COMPILED)
    return backend.module


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch) -> str:
    """No extension; the reason."""
    reason = "it was not built"
    monkeypatch.setattr(_native, "cuda", lambda: _native.Backend(None, reason))
    return reason


# --- the program ---


class Call(NamedTuple):
    """A custom call in a program."""

    name: str
    attributes: dict[str, Any]
    operands: list[str]
    results: list[str]


def program_of(run: Callable[..., Any], *arguments: Any, platforms: Any = ("cuda",)) -> str:
    """What is compiled for a platform, as text."""
    traced = export.export(jax.jit(run), platforms=platforms, disabled_checks=CHECKS)
    return traced(*arguments).mlir_module()


def calls_of(text: str) -> list[Call]:
    """Our custom calls in a program."""

    def types_of(side: str) -> list[str]:
        return re.findall(r"tensor<([^>]*)>", side)

    def attributes_of(text: str) -> dict[str, Any]:
        pairs = re.findall(r'(\w+) = (?:"(\w*)"|(-?\d+) : i64|(true|false))', text)
        return {
            name: truth == "true" if truth else string or int(number or 0)
            for name, string, number, truth in pairs
        }

    return [
        Call(name, attributes_of(config), types_of(operands), types_of(results))
        for name, config, operands, results in re.findall(
            r"custom_call @jax_anyprec_(\w+)\(.*?mhlo\.backend_config = \{(.*?)\}.*? : "
            r"\((.*?)\) -> \(?(.*?)\)?$",
            text,
            re.MULTILINE,
        )
    ]


def call_of(run: Callable[..., Any], *arguments: Any) -> Call:
    """The only one of our custom calls in a program."""
    (call,) = calls_of(program_of(run, *arguments))
    return call


def packed(
    n: int, k: int, bits: int, *, group: int | None = None, offsets: bool = False, **fields: Any
) -> ap.QuantizedTensor:
    """A tensor of shapes, which takes no memory."""
    groups = 1 if group is None else k // group
    scales = np.ones((n, groups), np.float32)

    def make() -> ap.QuantizedTensor:
        codes = jnp.zeros((n, k), jnp.uint8)
        return ap.QuantizedTensor.from_codes(
            codes, scales, -scales if offsets else None, bits=bits, **fields
        )

    return jax.eval_shape(make)


def rows(m: int, k: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((m, k), dtype)


def planned(module: Any, **problem: Any) -> dict[str, Any]:
    """The plan for a default machine."""
    usual = {"x_dtype": "float32", "rotated": False, "integers": False, "clusters": True}
    return module.plan(**{**usual, **local_cuda.DEFAULT_DEVICE, **problem})


@pytest.mark.parametrize(("w_bits", "a_bits"), [(1, 1), (2, 2), (4, 8), (8, 8), (3, 5), (4, None)])
@pytest.mark.parametrize("prepared", [False, True])
def test_a_product_is_one_call_as_planned(
    cuda: Any, w_bits: int, a_bits: int | None, prepared: bool
) -> None:
    m, n, k = 7, 75, 1984
    w = packed(n, k, w_bits)
    w = jax.eval_shape(lambda w: w.prepare(), w) if prepared else w
    call = call_of(lambda x, w: ap.matmul(x, w, act_bits=a_bits), rows(m, k), w)
    plan = planned(
        cuda, rows=m, n=n, k=k, act_bits=a_bits or 0, weight_bits=w_bits, group_size=k,
        act_group_size=k,
    )  # fmt: skip
    assert call.name == "cuda_matmul"
    assert call.attributes == {
        "act_bits": a_bits or 0, "group_size": k, "act_group_size": k, "block": 0,
        **{name: plan[name] for name in ("method", "tile", "splits", "clustered", "quantizes")},
    }  # fmt: skip
    assert call.operands == [
        f"{m}x{k}xf32", f"3x62x{w_bits}x32xui32", "3x1x32xf32", "0xf32", "0xf32", "0xui32", "0xf32",
    ]  # fmt: skip
    parts = 0 if plan["clustered"] or plan["splits"] == 1 else plan["splits"]
    workspace = f"{m}x{plan['workspace_row_bytes']}xui8"
    assert call.results == [f"{m}x{n}xf32", workspace, f"{parts}x{m}x{n}xf32"]


def test_a_long_product_is_split(cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster of blocks adds the parts where there are clusters, in the chip and in its code."""
    for devices, compiled, clustered in (
        ([], COMPILED, True), ([H100], COMPILED, True), ([B200], COMPILED, True),
        ([A100], COMPILED, False), ([H100], ["80-real", "80-virtual"], False),
    ):  # fmt: skip
        monkeypatch.setattr(cuda, "devices", lambda devices=devices: devices)
        monkeypatch.setattr(cuda, "architectures", lambda compiled=compiled: compiled)
        run = lambda x, w: ap.matmul(x, w, act_bits=8)  # noqa: E731
        call = call_of(run, rows(1, 16384), packed(64, 16384, 4))
        assert call.attributes["splits"] > 1
        assert call.attributes["clustered"] == clustered
        parts = 0 if clustered else call.attributes["splits"]
        assert call.results[2] == f"{parts}x1x64xf32"


@pytest.mark.parametrize("quantizes", [False, True])
def test_who_quantizes_a_row_is_in_the_plan(
    cuda: Any, quantizes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a benchmark compares both by changing the plan."""
    plan = local_cuda.plan
    monkeypatch.setattr(
        local_cuda, "plan", lambda *a, **kw: {**plan(*a, **kw), "quantizes": quantizes}
    )
    call = call_of(lambda x, w: ap.matmul(x, w, act_bits=8), rows(1, 4096), packed(64, 4096, 4))
    assert call.attributes["quantizes"] == quantizes


@pytest.mark.parametrize("prepared", [False, True])
def test_groups_offsets_and_bias(cuda: Any, prepared: bool) -> None:
    w = packed(40, 256, 4, group=64, offsets=True)
    w = jax.eval_shape(lambda w: w.prepare(), w) if prepared else w
    bias = jax.ShapeDtypeStruct((40,), jnp.bfloat16)
    for act_scales, act_group_size in (("group", 64), ("token", 256)):
        call = call_of(
            lambda x, w, bias, act_scales=act_scales: ap.matmul(
                x, w, bias=bias, act_bits=6, act_scales=act_scales, out_dtype=jnp.float16
            ),
            rows(5, 256, jnp.bfloat16), w, bias,
        )  # fmt: skip
        assert call.operands == [
            "5x256xbf16", "2x8x4x32xui32", "2x4x32xf32", "2x4x32xf32", "40xbf16", "0xui32", "0xf32",
        ]  # fmt: skip
        assert call.results[0] == "5x40xf16"
        assert call.attributes["group_size"] == 64
        assert call.attributes["act_group_size"] == act_group_size
        assert call.attributes["method"] == "codes"


@pytest.mark.parametrize(("dtype", "parts"), [("float32", 3), ("float16", 2), ("bfloat16", 1)])
def test_float_activations_are_read_as_they_are(cuda: Any, dtype: str, parts: int) -> None:
    """Their bfloat16 parts are what a row of the workspace holds."""
    k = 512
    call = call_of(lambda x, w: ap.matmul(x, w), rows(3, k, dtype), packed(32, k, 4))
    assert call.operands[0] == f"3x{k}x{ {'float32': 'f32', 'float16': 'f16'}.get(dtype, 'bf16') }"
    assert (call.attributes["method"], call.attributes["act_bits"]) == ("float", 0)
    assert call.results[1] == f"3x{2 * k * parts + 4}xui8"  # and a sum


@pytest.mark.parametrize("act_bits", [4, None])
def test_small_rotations_are_the_kernels(cuda: Any, act_bits: int | None) -> None:
    w = packed(32, 2048, 4, rotation=ap.Rotation(1024, 3))
    call = call_of(lambda x, w: ap.matmul(x, w, act_bits=act_bits), rows(3, 2048, jnp.bfloat16), w)
    assert call.attributes["block"] == 1024
    assert call.operands[0] == "3x2048xbf16"
    assert call.operands[5] == "64xui32"


@pytest.mark.parametrize("act_bits", [4, None])
def test_large_rotations_are_xlas(cuda: Any, act_bits: int | None) -> None:
    w = packed(32, 4096, 4, rotation=ap.Rotation(2048, 3))
    call = call_of(lambda x, w: ap.matmul(x, w, act_bits=act_bits), rows(3, 4096, jnp.bfloat16), w)
    assert call.attributes["block"] == 0
    assert call.operands[0] == "3x4096xf32"
    assert call.operands[5] == "0xui32"


def test_symbolic_rows_are_not_split(cuda: Any) -> None:
    (b,) = export.symbolic_shape("b")
    x = jax.ShapeDtypeStruct((b, 16384), jnp.float32)
    call = call_of(lambda x, w: ap.matmul(x, w, act_bits=8), x, packed(64, 16384, 4))
    assert call.attributes["splits"] == 1
    assert call.operands[0] == "?x16384xf32"
    assert (call.results[0], call.results[2]) == ("?x64xf32", "0x?x64xf32")


def test_symbolic_rows_are_planned_as_many(cuda: Any) -> None:
    (b,) = export.symbolic_shape("b")
    run = lambda x, w: ap.matmul(x, w, act_bits=2)  # noqa: E731
    symbolic, many, few = (
        call_of(run, jax.ShapeDtypeStruct((m, 256), jnp.float32), packed(64, 256, 2)).attributes
        for m in (b, 1 << 16, 1)
    )
    assert symbolic == many
    assert (symbolic["method"], few["method"], few["tile"]) == ("planes", "codes", "stream")


@pytest.mark.parametrize("prepared", [False, True])
def test_integer_products(cuda: Any, prepared: bool) -> None:
    w = packed(33, 128, 3, group=32)
    w = jax.eval_shape(lambda w: w.prepare(), w) if prepared else w
    call = call_of(lambda x, w: ap.int_matmul(x, w, 5), rows(6, 128, jnp.uint8), w)
    plan = planned(
        cuda, rows=6, n=33, k=128, act_bits=5, weight_bits=3, group_size=32, act_group_size=32,
        x_dtype="uint8", integers=True,
    )  # fmt: skip
    assert call.name == "cuda_int_matmul"
    assert call.attributes == {
        "act_bits": 5, "group_size": 32, "method": "codes", "tile": plan["tile"]
    }  # fmt: skip
    assert call.operands == ["6x128xui8", "2x4x3x32xui32"]
    assert call.results == ["6x33x4xi32", f"6x{plan['workspace_row_bytes']}xui8"]


@pytest.mark.parametrize(("block", "in_call"), [(None, 0), (64, 64), (2048, 0)])
def test_quantizing_activations(cuda: Any, block: int | None, in_call: int) -> None:
    rotation = None if block is None else ap.Rotation(block, 1)
    call = call_of(
        lambda x: ap.quantize_activations(x, 4, group_size=64, rotation=rotation),
        rows(6, 2048, jnp.float16),
    )
    assert call.name == "cuda_quantize"
    assert call.attributes == {"act_bits": 4, "block": in_call}
    dtype = "f32" if block == 2048 else "f16"
    assert call.operands == [f"6x2048x{dtype}", "64xui32" if in_call else "0xui32"]
    assert call.results == ["6x2048xui8", "6x32xf32"]


def test_a_batch_is_more_rows(cuda: Any) -> None:
    x, w = jax.ShapeDtypeStruct((3, 5, 64), jnp.float32), packed(32, 64, 4)
    call = call_of(jax.vmap(lambda x, w: ap.matmul(x, w, act_bits=8), (0, None)), x, w)
    assert call.operands[0] == "15x64xf32"


def test_a_derivative_runs_the_kernel_forward(cuda: Any) -> None:
    def loss(x: Any, w: Any) -> Any:
        return ap.matmul(x, w, act_bits=8).sum()

    names = [
        call.name
        for call in calls_of(program_of(jax.value_and_grad(loss), rows(5, 64), packed(32, 64, 4)))
    ]
    assert names == ["cuda_matmul"]


@pytest.mark.parametrize("name", ["cuda_planes", "cuda_codes", None])
def test_a_tangent_is_a_product_of_floats(cuda: Any, name: str | None) -> None:
    def tangent(x: Any, w: Any) -> Any:
        run = lambda x: ap.matmul(x, w, act_bits=2, implementation=name)  # noqa: E731
        return jax.jvp(run, (x,), (x,))

    calls = calls_of(program_of(tangent, rows(64, 64), packed(32, 64, 2)))
    methods = {call.attributes["method"] for call in calls}
    assert methods == {(name or "cuda_planes").removeprefix("cuda_"), "float"}


def test_one_program_for_both_platforms(cuda: Any) -> None:
    text = program_of(
        lambda x, w: ap.matmul(x, w, act_bits=8), rows(5, 64), packed(32, 64, 4),
        platforms=("cpu", "cuda"),
    )  # fmt: skip
    assert sorted(call.name for call in calls_of(text)) == ["cpu_matmul", "cuda_matmul"]


# --- the operands: the CPU's kernels take the same ---


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls of CUDA kernels become calls of the CPU's, on the same operands."""
    original = jax.ffi.ffi_call

    def ffi_call(name: str, results: Any) -> Any:
        def run(*operands: Any, method: str, **attributes: Any) -> Any:
            for only_cuda in ("tile", "splits", "clustered", "quantizes"):
                attributes.pop(only_cuda, None)
            m, k = operands[0].shape
            groups = [
                attributes.get(key, attributes["group_size"])
                for key in ("group_size", "act_group_size")
            ]
            row = _native.cpu().module.workspace_row_bytes(
                k, *groups, attributes["act_bits"], method
            )
            scratch = jax.ShapeDtypeStruct((m, row), jnp.uint8)
            call = original(name.replace("cuda", "cpu"), (results[0], scratch))
            return call(*operands, method=method, **attributes)

        return original(name.replace("cuda", "cpu"), results) if "quantize" in name else run

    monkeypatch.setattr(local_cuda.jax.ffi, "ffi_call", ffi_call)


def params_of(case: Case, **changed: Any) -> dict[str, Any]:
    """The parameters that `local.matmul` has for a case."""
    return {
        "act_bits": case.act_bits,
        "act_group_size": case.group,
        "group_size": case.w.group_size,
        "columns": case.w.columns,
        "block": 0 if case.rotation is None else case.rotation.block,
        "out_dtype": np.dtype(case.out_dtype),
        "implementation": None,
        **changed,
    }


def run_case(case: Case, peaks: Any = None, **changed: Any) -> Any:
    """A case by the CUDA lowering."""
    w, empty = case.w, np.zeros(0, np.float32)
    signs = np.zeros(0, np.uint32)
    if case.rotation is not None:
        signs = case.rotation.sign_words(case.x.shape[1])
    given = [empty if v is None else v for v in (w.offsets, case.bias)]
    run = jax.jit(functools.partial(local_cuda.matmul, **params_of(case, **changed)))
    return run(case.x, w.planes, w.scales, *given, signs, empty if peaks is None else peaks)


@pytest.mark.parametrize("block", [0, 64, 2048])
@pytest.mark.parametrize("a_bits", [2, 8, None])
def test_operands_are_those_of_the_product(
    cuda: Any, stand_in: None, a_bits: int | None, block: int
) -> None:
    rotation = ap.Rotation(block, 5) if block else None
    shape = Shape(3, 41, 2048, 2048 if a_bits == 2 else 64)
    for offsets, bias in ((False, True), (True, False)):
        case = Case(
            shape, 3, a_bits, offsets=offsets, bias=bias, rotation=rotation, dtype="bfloat16"
        )
        case.expected().check(run_case(case))
        case.w = case.w.prepare()
        case.expected().check(run_case(case))


def test_peaks_reach_the_kernel(cuda: Any, stand_in: None) -> None:
    """Twice the largest magnitude scales a token's integers to half the range."""
    case = Case(Shape(4, 33, 128, 64), 4, 8, token=True)
    peaks = 2 * np.abs(case.x).max(-1)
    scales = (peaks * np.float32(1 / 254))[:, None]
    codes = np.array(
        [oracle.act_encode(row, scale, 8) for row, (scale,) in zip(case.x, scales, strict=True)],
        np.uint8,
    )
    w = (case.codes, 4, case.scales, None)
    expected = oracle.quantized_matmul((codes, 8, scales), w, None, "float32")
    expected.check(run_case(case, peaks))


def test_integer_operands(cuda: Any, stand_in: None) -> None:
    rng = np.random.default_rng(0)
    for a_bits, w_bits, group in ((1, 1, 96), (4, 3, 32), (8, 8, 96)):
        x = rng.integers(0, 2**a_bits, (5, 96), np.uint8)
        u = rng.integers(0, 2**w_bits, (35, 96), np.uint8)
        w = ap.QuantizedTensor.from_codes(u, np.ones((35, 96 // group), np.float32), bits=w_bits)
        for layout in (w, w.prepare()):
            found = jax.jit(
                functools.partial(
                    local_cuda.int_matmul, act_bits=a_bits, group_size=group,
                    columns=layout.columns, implementation=None,
                )
            )(x, layout.planes)  # fmt: skip
            np.testing.assert_array_equal(found, oracle.int_product(x, a_bits, u, w_bits, group))


@pytest.mark.parametrize("block", [0, 64, 2048])
def test_quantizing_operands(cuda: Any, stand_in: None, block: int) -> None:
    x = np.random.default_rng(1).normal(size=(3, 2048)).astype(np.float32)
    signs = ap.Rotation(block, 9).sign_words(2048) if block else np.zeros(0, np.uint32)
    run = functools.partial(
        local_cuda.quantize_activations, bits=5, group_size=64, block=block, implementation=None
    )
    found = jax.jit(run)(x, signs)
    for a, b in zip(
        found, oracle.quantize_activations(x, 5, 64, (block, 9) if block else None), strict=True
    ):
        np.testing.assert_array_equal(a, b)


# --- what has no kernel, and what is asked for by name ---


def test_families_by_name(cuda: Any) -> None:
    for name, method in (("cuda_planes", "planes"), ("cuda_codes", "codes"), ("cuda", "planes")):
        run = lambda x, w, name=name: ap.matmul(x, w, act_bits=2, implementation=name)  # noqa: E731
        assert call_of(run, rows(64, 96), packed(33, 96, 2)).attributes["method"] == method
    run = lambda x, w: ap.matmul(x, w, implementation="cuda")  # noqa: E731
    assert call_of(run, rows(64, 96), packed(33, 96, 2)).attributes["method"] == "float"


REFUSED = {
    "a row that is too long": (
        {"n": 32, "k": 400_000, "bits": 4}, {"act_bits": 4}, "rows are too long"
    ),
    "a group that is too long": (
        {"n": 32, "k": 70_016, "bits": 8}, {"act_bits": 8}, "may not fit int32"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_kernel_can_do_runs_in_xla(cuda: Any, name: str) -> None:
    shape, options, reason = REFUSED[name]
    x, w = rows(2, shape["k"]), packed(**shape)
    with pytest.warns(UserWarning, match=f"plain XLA, which is slow: no CUDA kernel: .*{reason}"):
        text = program_of(lambda x, w: ap.matmul(x, w, **options), x, w)
    assert not calls_of(text)
    match = f"implementation='cuda' is unavailable: no CUDA kernel: .*{reason}"
    with pytest.raises(ap.Unavailable, match=match):
        program_of(lambda x, w: ap.matmul(x, w, implementation="cuda", **options), x, w)
    program_of(lambda x, w: ap.matmul(x, w, implementation="xla", **options), x, w)  # no warning


def test_rows_that_are_too_long_to_quantize(cuda: Any) -> None:
    x = rows(2, 400_000)
    with pytest.warns(UserWarning, match="plain XLA, which is slow: no CUDA kernel: rows are too"):
        assert not calls_of(program_of(lambda x: ap.quantize_activations(x, 4), x))
    with pytest.raises(ap.Unavailable, match="no CUDA kernel: rows are too long"):
        program_of(lambda x: ap.quantize_activations(x, 4, implementation="cuda"), x)


def test_planes_that_no_kernel_can_multiply(cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = lambda x, w: ap.matmul(x, w, act_bits=2, implementation="cuda_planes")  # noqa: E731
    with pytest.raises(ap.Unavailable, match="1-bit products need one scale for all of K"):
        program_of(run, rows(4, 96), packed(33, 96, 2, group=32))
    monkeypatch.setattr(cuda, "devices", lambda: [B200])
    with pytest.raises(ap.Unavailable, match="the chip has no 1-bit tensor cores"):
        program_of(run, rows(4, 96), packed(33, 96, 2))


def test_programs_are_for_the_first_device(cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for devices, method in (([], "planes"), ([H100, B200], "planes"), ([B200, H100], "codes")):
        monkeypatch.setattr(cuda, "devices", lambda devices=devices: devices)
        run = lambda x, w: ap.matmul(x, w, act_bits=1)  # noqa: E731
        assert call_of(run, rows(64, 96), packed(33, 96, 1)).attributes["method"] == method


def test_devices_are_looked_for_once(cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    monkeypatch.setattr(cuda, "devices", lambda: found.append(H100) or [H100])
    for m in (1, 2):
        program_of(lambda x, w: ap.matmul(x, w, act_bits=1), rows(m, 96), packed(33, 96, 1))
    ap.status()["cuda"]["devices"].clear()
    assert ap.status()["cuda"]["devices"] == [H100]
    assert len(found) == 1


def test_a_device_without_code(cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "devices", lambda: [T4])
    reason = "Tesla T4 has compute capability 7.5, and the CUDA kernels are compiled for"
    with pytest.warns(UserWarning, match=f"plain XLA, which is slow: {reason}"):
        text = program_of(lambda x, w: ap.matmul(x, w, act_bits=4), rows(4, 96), packed(33, 96, 4))
    assert not calls_of(text)
    assert reason in ap.status()["cuda"]["reason"]
    monkeypatch.setattr(cuda, "devices", lambda: [T4, H100])
    assert ap.status()["cuda"]["available"]


def test_a_plan_of_a_model_names_the_kernels(cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(cuda, "devices", lambda: [H100])
    model = nnx.eval_shape(
        lambda: nnx.List([nnx.Linear(k, 64, rngs=nnx.Rngs(0)) for k in (96, 96, 96, 400_000)])
    )
    rules = {
        "0": ap.Quantization(weights=2, activations=2),
        "1": ap.Quantization(weights=4, activations=8, group_size=32),
        "2": ap.Quantization(weights=4, activations=None),
        "3": ap.Quantization(weights=4, activations=8),
    }
    found = [
        (layer.implementation, layer.implementation_reason)
        for layer in ap.plan(model, rules).layers
    ]
    for (name, reason), (wanted, why) in zip(
        found,
        (
            ("cuda_planes", "4 one-bit products cost less"),
            ("cuda_codes", "1-bit products need one scale for all of K; tiles of"),
            ("cuda", "float activations are multiplied as bfloat16; tiles of"),
            ("xla", "no CUDA kernel: rows are too long"),
        ),
        strict=True,
    ):
        assert name == wanted
        assert str(reason).startswith(why)


def test_names_of_other_platforms(cuda: Any) -> None:
    w = packed(33, 96, 4)
    run = lambda x, w, name: ap.matmul(x, w, act_bits=4, implementation=name)  # noqa: E731
    for name in ("cpu", "cpu_codes"):
        with pytest.raises(ap.Unavailable, match=f"{name!r} runs on CPU devices only"):
            program_of(functools.partial(run, name=name), rows(4, 96), w)
    for name, platform in (("cuda", "cpu"), ("cuda_codes", "cpu"), ("cuda", "tpu")):
        with pytest.raises(ap.Unavailable, match=f"{name!r} runs on CUDA devices only"):
            program_of(functools.partial(run, name=name), rows(4, 96), w, platforms=(platform,))


def test_without_the_extension(absent: str) -> None:
    x, w = rows(4, 96), packed(33, 96, 4)
    calls = (
        (lambda x, w, **o: ap.matmul(x, w, act_bits=4, **o), x),
        (lambda x, w, **o: ap.int_matmul(x, w, 4, **o), rows(4, 96, jnp.uint8)),
        (lambda x, w, **o: ap.quantize_activations(x, 4, **o), x),
    )
    for run, x in calls:
        with pytest.warns(UserWarning, match=f"plain XLA, which is slow: {absent}"):
            assert not calls_of(program_of(run, x, w))
        for name in ("cuda", "cuda_planes", "cuda_codes"):
            with pytest.raises(ap.Unavailable, match=f"{name!r} is unavailable: {absent}"):
                program_of(functools.partial(run, implementation=name), x, w)
    assert ap.status()["cuda"] == {"available": False, "reason": absent}


# --- the extension, its devices and its code ---


def in_process(code: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-P", "-W", "error", "-c", code],
        capture_output=True, text=True, timeout=120, check=False, env={**os.environ, **env},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def test_an_extension_that_was_not_built() -> None:
    code = """
import sys
sys.modules["jax_anyprec._cuda"] = None
import jax_anyprec as ap
print(ap.status()["cuda"])
ap.register_custom_calls()
"""
    assert "built without CUDA kernels; docs/gpu.md says how" in in_process(code)


def test_without_a_device(cuda: Any) -> None:
    """The extension loads, and says what it is compiled for and why it is of no use here."""
    code = "import json, jax_anyprec as ap; print(json.dumps(ap.status()['cuda']))"
    status = json.loads(in_process(code, CUDA_VISIBLE_DEVICES=""))
    assert not status["available"]
    assert "CUDA" in status["reason"]
    assert status["devices"] == []
    assert status["architectures"]


def test_status_with_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.SimpleNamespace(
        devices=lambda: [H100], architectures=lambda: ["80-real", "90a-real"]
    )
    monkeypatch.setattr(_native, "cuda", lambda: _native.Backend(module, None))
    assert ap.status()["cuda"] == {
        "available": True, "reason": None, "architectures": ["80-real", "90a-real"],
        "devices": [H100],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arch", "compiled", "wanted"),
    [
        (80, ["80-real"], True),
        (89, ["80-real"], True),
        (80, ["86-real"], False),
        (90, ["80-real"], False),
        (90, ["80-virtual"], True),
        (90, ["80-real", "90a-real"], True),
        (100, ["90a-real"], False),
        (103, ["100-real"], True),
        (120, ["100-real", "100-virtual"], True),
        (75, ["80-real", "80-virtual"], False),
        (90, [], False),
    ],
)
def test_which_gpus_have_code(arch: int, compiled: list[str], wanted: bool) -> None:
    assert choose.has_cuda_code(arch, compiled) == wanted
