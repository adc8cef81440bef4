"""The operations of the CUDA backend without a GPU: the launches that the extension makes for them,
run on the kernels' PTX by the interpreter, which checks every access."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import ptx

import jax_anyprec as ap
from jax_anyprec import _native

SOURCES = Path(__file__).parents[1] / "csrc" / "cuda"
OPTIONS = ("--expt-relaxed-constexpr",)
H100 = {"arch": 90, "multiprocessors": 132, "clusters": True}
A100 = {"arch": 80, "multiprocessors": 108, "clusters": False}

Device = dict[str, Any]


@functools.cache
def text(source: str, arch: int = 90) -> str:
    """The PTX of one file of kernels."""
    name = "sm_90a" if arch == 90 else f"sm_{arch}"
    return ptx.compile(SOURCES / f"{source}.cu", arch=name, options=OPTIONS)


@functools.cache
def module(source: str, arch: int) -> ptx.Module:
    return ptx.load(text(source, arch))


def source_of(kernel: str) -> str:
    """The file that defines a kernel, without its suffix."""
    family, *rest = kernel.split("_")[1:]
    if family == "stream":
        return f"stream_{rest[0]}"
    return "prologue" if family == "reduce" else family


def run(launches: list[dict[str, Any]], memory: ptx.Memory, arch: int) -> None:
    """Launches as `csrc/cuda/run.cu` does: before 9.0 none begins early."""
    for launch in launches:
        kernel = launch["kernel"]
        module(source_of(kernel), arch).run(
            kernel,
            grid=(*launch["grid"], 1),
            block=(launch["threads"], 1, 1),
            params=launch["params"],
            shared=launch["shared"],
            memory=memory,
            cluster=(*launch["cluster"], 1),
            dependent=launch["dependent"] and arch >= 90,
        )


def _problem(
    x: np.ndarray, w: ap.QuantizedTensor, act_bits: int | None, act_scales: str, integers: bool
) -> dict[str, Any]:
    """What the extension asks about a product."""
    k, n = w.shape
    return {
        "rows": len(x), "n": n, "k": k, "act_bits": act_bits or 0, "weight_bits": w.bits,
        "group_size": w.group_size, "act_group_size": w.group_size if act_scales == "group" else k,
        "x_dtype": x.dtype.name, "rotated": w.rotation is not None, "integers": integers,
    }  # fmt: skip


def plan(
    x: np.ndarray, w: ap.QuantizedTensor, act_bits: int | None, device: Device = H100
) -> dict[str, Any]:
    problem = _problem(x, w, act_bits, "group", False)
    return _native.cuda().module.plan(**problem, **device)


def matmul(
    x: np.ndarray,
    w: ap.QuantizedTensor,
    act_bits: int | None,
    method: str,
    tile: str | None,
    *,
    splits: int = 1,
    clustered: bool = False,
    quantizes: bool | None = None,
    device: Device = H100,
    bias: np.ndarray | None = None,
    act_scales: str = "group",
    peaks: np.ndarray | None = None,
    before: ap.RMSNorm | ap.SwiGLU | None = None,
    residual: np.ndarray | None = None,
    out_dtype: str = "float32",
    integers: bool = False,
) -> np.ndarray:
    """``[M, N]``, or of given codes `x` and with `integers` ``int32[M, N, groups]``.

    Rows of `x` have 2 K values for `SwiGLU`.

    Without a `tile` it is the one that is planned for the device. With `quantizes` a single row is
    quantized by the product, else by a launch before; without, as planned.
    """
    m, (k, n) = len(x), w.shape
    w = w.prepare()
    memory = ptx.Memory()
    signs = None if w.rotation is None else w.rotation.sign_words(k)
    operands = {
        "x": x, "tiles": w.planes, "scales": w.scales, "offsets": w.offsets, "bias": bias,
        "signs": signs, "peaks": peaks, "residual": residual,
        "norm_scale": before.scale if isinstance(before, ap.RMSNorm) else None,
    }  # fmt: skip
    dtype = jnp.dtype(np.int32 if integers else out_dtype)
    shape = (m, n, w.groups) if integers else (m, n)
    problem = _problem(x, w, act_bits, act_scales, integers)
    extension = _native.cuda().module
    planned = extension.plan(**problem, **device, method=method)
    tile = tile or planned["tile"]
    if quantizes is None:
        quantizes = tile == planned["tile"] and planned["quantizes"]
    in_parts = splits > 1 and not clustered
    results = {
        "out": memory.reserve(int(np.prod(shape)) * dtype.itemsize),
        "workspace": memory.reserve(m * planned["workspace_row_bytes"]),
        "parts": memory.reserve(4 * splits * m * n) if in_parts else 0,
    }
    dtypes = {
        f"{name}_dtype": "float32" if value is None else value.dtype.name
        for name, value in (
            ("scale", w.scales), ("offset", w.offsets), ("bias", bias), ("residual", residual)
        )
    }  # fmt: skip
    launches = extension.launches(
        **problem, **dtypes, **results, method=method, tile=tile, splits=splits,
        clustered=clustered, quantizes=quantizes,
        arch=device["arch"], multiprocessors=device["multiprocessors"],
        block=w.rotation.block if w.rotation else 0,
        out_dtype="float32" if integers else out_dtype,
        before={ap.RMSNorm: "rms_norm", ap.SwiGLU: "swiglu"}.get(type(before), "none"),
        eps=before.eps if isinstance(before, ap.RMSNorm) else 0.0,
        **{name: _place(memory, value) for name, value in operands.items()},
    )  # fmt: skip
    run(launches, memory, device["arch"])
    return memory.read(results["out"], dtype, shape)


def quantize(
    x: np.ndarray, bits: int, group_size: int, rotation: ap.Rotation | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Codes ``uint8[M, K]`` and scales ``float32[M, groups]``."""
    m, k = x.shape
    memory = ptx.Memory()
    groups = k // group_size if k else 1
    codes, scales = memory.reserve(m * k), memory.reserve(4 * m * groups)
    signs = None if rotation is None else rotation.sign_words(k)
    launches = _native.cuda().module.quantize_launches(
        rows=m, k=k, act_bits=bits, act_group_size=group_size, x_dtype=x.dtype.name,
        block=rotation.block if rotation else 0, x=_place(memory, x), signs=_place(memory, signs),
        codes=codes, scales=scales,
    )  # fmt: skip
    run(launches, memory, H100["arch"])
    return (
        memory.read(codes, np.uint8, (m, k)),
        memory.read(scales, np.float32, (m, groups)),
    )


def tiles_of(method: str, w: ap.QuantizedTensor) -> tuple[str, ...]:
    """The tiles that there are for products of a tensor."""
    if method == "planes":
        return ("narrow", "whole")
    return ("narrow", "medium", "wide", *(("whole",) if w.groups == 1 else ()))


def _place(memory: ptx.Memory, value: Any) -> int:
    return 0 if value is None else memory.place(np.ascontiguousarray(np.asarray(value)))
