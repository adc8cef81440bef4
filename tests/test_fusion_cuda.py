"""What is compiled for CUDA of a product and what surrounds it: one call, or the composition.

The extension is a stand-in that plans as a test wants, so none is needed, and no GPU.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from test_cuda_lowering import Call, calls_of, packed, program_of, rows
from test_sharding import make_mesh

import jax_anyprec as ap
from jax_anyprec import _native, fusion, local_cuda_fused
from jax_anyprec.models import Cache, Llama, LlamaConfig, merge_projections

TARGET = local_cuda_fused.TARGET
M, N, K = 5, 40, 256
NORM = ap.RMSNorm(np.linspace(0.5, 1.5, K, dtype=np.float32), 1e-5)


class Extension(types.SimpleNamespace):
    """The parts of the extension that lowering asks."""

    def __init__(self, **plan: Any):
        usual = {
            "method": "codes", "tile": "stream", "splits": 3, "clustered": False,
            "quantizes": False, "workspace_row_bytes": 100,
        }  # fmt: skip
        super().__init__(
            devices=list, architectures=lambda: ["90a-real"], asked=[], targets=[TARGET]
        )
        self.planned = usual | plan

    def plan(self, **problem: Any) -> dict[str, Any]:
        self.asked.append(problem)
        return self.planned

    def registrations(self) -> dict[str, Any]:
        return dict.fromkeys(self.targets)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Extension:
    extension = Extension()
    monkeypatch.setattr(_native, "cuda", lambda: _native.Backend(extension, None))
    return extension


def run(
    x: Any, w: Any, residual: Any = None, *, before: Any = NORM, act_bits: int | None = 8, **o: Any
) -> Any:
    return ap.matmul(x, w, before=before, residual=residual, act_bits=act_bits, **o)


def calls(f: Callable[..., Any], *arguments: Any, **options: Any) -> list[Call]:
    # A function of its own, because JAX keeps programs of those that it has seen.
    return calls_of(program_of(lambda *a: f(*a), *arguments, **options))


def names(f: Callable[..., Any], *arguments: Any, **options: Any) -> list[str]:
    return [call.name for call in calls(f, *arguments, **options)]


# --- one call ---


@pytest.mark.parametrize("prepared", [False, True])
def test_everything_is_in_one_call(cuda: Extension, prepared: bool) -> None:
    w = packed(N, K, 4, group=64, offsets=True, rotation=ap.Rotation(64, 3))
    w = jax.eval_shape(lambda w: w.prepare(), w) if prepared else w
    bias = jax.ShapeDtypeStruct((N,), jnp.float16)
    residual = jax.ShapeDtypeStruct((M, N), jnp.float32)
    (call,) = calls(
        lambda x, w, bias, residual: run(x, w, residual, bias=bias, act_scales="token"),
        rows(M, K, jnp.bfloat16), w, bias, residual,
    )  # fmt: skip
    assert call.name == "cuda_fused_matmul"
    assert call.operands == [
        "5x256xbf16", "2x8x4x32xui32", "2x4x32xf32", "2x4x32xf32", "40xf16", "8xui32", "256xf32",
        "5x40xf32",
    ]  # fmt: skip
    assert call.results == ["5x40xbf16", "5x100xui8", "3x5x40xf32"]
    attributes = {
        "act_bits": 8, "group_size": 64, "act_group_size": 256, "block": 64, "method": "codes",
        "tile": "stream", "splits": 3, "before": "rms_norm",
    }  # fmt: skip
    assert attributes.items() <= call.attributes.items()
    (problem,) = cuda.asked
    wanted = {
        "rows": M, "n": N, "k": K, "act_bits": 8, "weight_bits": 4, "group_size": 64,
        "act_group_size": 256, "x_dtype": "bfloat16", "rotated": True, "integers": False,
    }  # fmt: skip
    assert {name: problem[name] for name in wanted} == wanted


def test_eps_and_how_it_launches(cuda: Extension) -> None:
    cuda.planned |= {"clustered": True, "quantizes": True}
    text = program_of(run, rows(1, K), packed(N, K, 4))
    for attribute in ("eps = 9.99999974E-6 : f32", "clustered = true", "quantizes = true"):
        assert attribute in text
    (call,) = calls_of(text)
    assert call.results[2] == "0x1x40xf32"  # parts are added in the kernel


@pytest.mark.parametrize("act_bits", [8, None])
def test_gate_and_residual_alone(cuda: Extension, act_bits: int | None) -> None:
    w = packed(N, K, 4)
    (call,) = calls(
        functools.partial(run, before=ap.SwiGLU(), act_bits=act_bits), rows(M, 2 * K), w
    )
    assert call.operands == [
        "5x512xf32", "2x8x4x32xui32", "2x1x32xf32", "0xf32", "0xf32", "0xui32", "0xf32", "0xf32"
    ]  # fmt: skip
    assert (call.attributes["before"], call.attributes["act_bits"]) == ("swiglu", act_bits or 0)
    assert cuda.asked[-1]["k"] == call.attributes["group_size"] == K
    (call,) = calls(functools.partial(run, before=None), rows(M, K), w, rows(M, N))
    assert call.attributes["before"] == "none"
    assert call.operands[6:] == ["0xf32", "5x40xf32"]


def test_a_scale_of_another_dtype(cuda: Extension) -> None:
    norm = ap.RMSNorm(NORM.scale.astype(jnp.bfloat16), 0)
    (call,) = calls(functools.partial(run, before=norm), rows(M, K), packed(N, K, 4))
    assert call.operands[6] == "256xf32"


def test_leading_axes_are_rows(cuda: Extension) -> None:
    x, residual = (jax.ShapeDtypeStruct((2, 3, size), jnp.float32) for size in (K, N))
    (call,) = calls(run, x, packed(N, K, 4), residual)
    assert (call.operands[0], call.operands[7]) == ("6x256xf32", "6x40xf32")


@pytest.mark.parametrize("name", ["cuda", "cuda_codes"])
def test_asked_for_by_name(cuda: Extension, name: str) -> None:
    wanted = functools.partial(run, implementation=name)
    assert names(wanted, rows(M, K), packed(N, K, 4)) == ["cuda_fused_matmul"]
    assert cuda.asked[-1]["method"] == name.removeprefix("cuda").removeprefix("_")


def test_one_program_for_both_platforms(cuda: Extension) -> None:
    found = names(run, rows(M, K), packed(N, K, 4), platforms=("cpu", "cuda"))
    assert sorted(found) == ["cpu_matmul", "cuda_fused_matmul"]


def test_a_layer_of_llama_is_four_products(cuda: Extension) -> None:
    """With both norms, the gate and both residuals in them."""
    config = LlamaConfig(
        vocab_size=32, num_layers=2, hidden_size=64, intermediate_size=96, num_heads=4,
        num_kv_heads=2, head_dim=16, context_length=8,
    )  # fmt: skip
    model = Llama(config, quantization=ap.Quantization(weights=4), rngs=nnx.Rngs(0))
    merge_projections(model)
    graph, state = nnx.split(model)

    def step(state: Any, tokens: Any, cache: Cache) -> Any:
        return nnx.merge(graph, state).hidden(tokens, cache)

    cache = Cache.zeros(config, 1, 8, jnp.float32)
    found = calls(step, state, np.zeros((1, 1), np.int32), cache)
    assert {call.name for call in found} == {"cuda_fused_matmul"}
    kinds = [(call.attributes["before"], call.operands[7] != "0xf32") for call in found]
    layer = [("rms_norm", False), ("none", True), ("rms_norm", False), ("swiglu", True)]
    assert kinds == 2 * layer


def test_the_extension_has_it() -> None:
    backend = _native.cuda()
    if backend.module is None:
        pytest.skip(str(backend.reason))
    assert names(run, rows(M, K), packed(N, K, 4), rows(M, N)) == ["cuda_fused_matmul"]


# --- the composition ---


def composes(f: Callable[..., Any], *arguments: Any) -> None:
    assert set(names(f, *arguments)) == {"cuda_matmul"}


def test_what_no_fused_kernel_does(cuda: Extension) -> None:
    w = packed(N, K, 4)
    composes(run, rows(17, K), w)
    (b,) = export.symbolic_shape("b")
    composes(run, jax.ShapeDtypeStruct((b, K), jnp.float32), w)
    norm = ap.RMSNorm(np.ones(2048, np.float32), 0)
    large = packed(N, 2048, 4, rotation=ap.Rotation(2048, 3))
    composes(functools.partial(run, before=norm), rows(M, 2048), large)
    cuda.planned["tile"] = "wide"
    composes(run, rows(M, K), w)


def test_an_extension_without_fused_kernels(cuda: Extension) -> None:
    cuda.targets.clear()
    composes(run, rows(M, K), packed(N, K, 4))


def test_no_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    """A warning, as for any product; and plain XLA where that was asked for."""
    monkeypatch.setattr(_native, "cuda", lambda: _native.Backend(None, "it was not built"))
    with pytest.warns(UserWarning, match="plain XLA, which is slow: it was not built"):
        assert names(run, rows(M, K), packed(N, K, 4)) == []
    with pytest.raises(ap.Unavailable, match="'cuda' is unavailable: it was not built"):
        run(np.ones((M, K), np.float32), packed(N, K, 4), implementation="cuda")


def test_other_implementations(cuda: Extension) -> None:
    x, w = rows(M, K), packed(N, K, 4)
    assert names(functools.partial(run, implementation="xla"), x, w) == []
    with pytest.raises(ap.Unavailable, match="'cpu' runs on CPU devices only"):
        names(functools.partial(run, implementation="cpu"), x, w)


def test_transformed_products(cuda: Extension) -> None:
    w, x, residual = packed(N, K, 4), rows(M, K), rows(M, N)
    composes(jax.value_and_grad(lambda x, w, r: run(x, w, r).sum()), x, w, residual)
    x, residual = (jax.ShapeDtypeStruct((2, *v.shape), v.dtype) for v in (x, residual))
    composes(jax.vmap(run, (0, None, 0)), x, w, residual)


@pytest.mark.parametrize("shared", [False, True])
def test_several_devices(cuda: Extension, shared: bool) -> None:
    sharding = NamedSharding(make_mesh(), P(None, "model")) if shared else None
    residual = jax.ShapeDtypeStruct((M, N), jnp.float32, sharding=sharding)
    traced = jax.jit(lambda *a: run(*a)).trace(rows(M, K), packed(N, K, 4), residual)
    assert (TARGET in traced.lower(lowering_platforms=("cuda",)).as_text()) != shared


# --- the operands: by their meaning in the call, results are those of the composition ---


@pytest.fixture
def stand_in(cuda: Extension, monkeypatch: pytest.MonkeyPatch) -> None:
    """The call computes what its operands and attributes say."""

    def ffi_call(name: str, results: Any) -> Any:
        assert name == TARGET
        return lambda *operands, **attributes: (meaning(results[0], *operands, **attributes),)

    monkeypatch.setattr(local_cuda_fused.jax.ffi, "ffi_call", ffi_call)


def meaning(
    result: Any, x: Any, tiles: Any, scales: Any, offsets: Any, bias: Any, signs: Any, norm: Any,
    residual: Any, *, before: str, eps: Any, act_bits: int, act_group_size: int, group_size: int,
    block: int, **_: Any,
) -> jax.Array:  # fmt: skip
    """Written anew, with the products of `local`."""
    x_dtype, x = x.dtype, x.astype(jnp.float32)
    if before == "rms_norm":
        x = x * (jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + eps) * norm)
    if before == "swiglu":
        k = x.shape[1] // 2
        x = x[:, :k] * jax.nn.sigmoid(x[:, :k]) * x[:, k:]
    y = ap.local.matmul(
        x.astype(x_dtype), tiles, scales, offsets, bias, signs, jnp.zeros(0),
        act_bits=act_bits or None, act_group_size=act_group_size, group_size=group_size,
        block=block, columns=result.shape[1], out_dtype=np.dtype(np.float32), implementation="xla",
    )  # fmt: skip
    return (y + residual if residual.size else y).astype(result.dtype)


@pytest.mark.parametrize("act_bits", [4, None])
@pytest.mark.parametrize("before", [None, NORM, ap.SwiGLU()])
@pytest.mark.parametrize("prepared", [False, True])
def test_operands(stand_in: None, prepared: bool, before: Any, act_bits: int | None) -> None:
    rng = np.random.default_rng(0)
    w = ap.QuantizedTensor.from_codes(
        rng.integers(0, 16, (N, K), np.uint8), rng.uniform(0.01, 0.02, (N, 4)).astype(np.float32),
        rng.normal(size=(N, 4)).astype(np.float32), bits=4, rotation=ap.Rotation(64, 3),
    )  # fmt: skip
    w = w.prepare() if prepared else w
    width = 2 * K if isinstance(before, ap.SwiGLU) else K
    # Small integers: sums of squares are exact, whatever their order.
    x = rng.integers(-8, 9, (2, 3, width)).astype(jnp.bfloat16)
    bias = rng.normal(size=N).astype(np.float32)
    residual = rng.normal(size=(2, 3, N)).astype(np.float32)
    operands = (x, w.planes, w.scales, w.offsets, bias, before, residual)
    params = {
        "act_bits": act_bits, "act_group_size": 64, "group_size": 64, "columns": w.columns,
        "rotation": w.rotation, "out_dtype": np.dtype(jnp.float16),
    }  # fmt: skip
    found = jax.jit(functools.partial(local_cuda_fused.matmul, implementation=None, **params))
    wanted = jax.jit(functools.partial(fusion.composed, implementation="xla", **params))
    found, expected = found(*operands), wanted(*operands)
    assert found.shape == (2, 3, N)
    assert found.dtype == expected.dtype == jnp.float16
    np.testing.assert_allclose(
        np.asarray(found, np.float32), np.asarray(expected, np.float32), rtol=2.0**-9, atol=1e-2
    )
