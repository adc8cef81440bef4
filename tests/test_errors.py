"""Bad input: each case with the message that names the argument, what came and what is allowed."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_anyprec as ap
from jax_anyprec import _native

X = np.ones((2, 64), np.float32)
WEIGHTS = np.ones((64, 3), np.float32)
CODES = np.zeros((3, 64), np.uint8)
SCALES = np.ones((3, 2), np.float32)
W = ap.QuantizedTensor.from_codes(CODES, SCALES, bits=4)

BAD_BITS = [
    (0, ValueError, "must be from 1 to 8, got 0"),
    (9, ValueError, "must be from 1 to 8, got 9"),
    (-1, ValueError, "must be from 1 to 8, got -1"),
    (2**70, ValueError, "must be from 1 to 8, got 1180591620717411303424"),
    (2.5, TypeError, "must be an int from 1 to 8, got 2.5"),
    (4.0, TypeError, "must be an int from 1 to 8, got 4.0"),
    ("4", TypeError, "must be an int from 1 to 8, got '4'"),
    (True, TypeError, "must be an int from 1 to 8, got True"),
    (np.True_, TypeError, "must be an int from 1 to 8, got np.True_"),
    ([4], TypeError, "must be an int from 1 to 8, got [4]"),
]

TAKES_BITS: dict[str, Callable[[Any], Any]] = {
    "bits of quantize": lambda b: ap.quantize(WEIGHTS, b),
    "bits of truncate": lambda b: W.truncate(b),
    "bits of from_codes": lambda b: ap.QuantizedTensor.from_codes(CODES, SCALES, bits=b),
    "bits of quantize_activations": lambda b: ap.quantize_activations(X, b),
    "act_bits of matmul": lambda b: ap.matmul(X, W, act_bits=b),
    "act_bits of int_matmul": lambda b: ap.int_matmul(X.astype(np.uint8), W, b),
}


@pytest.mark.parametrize("where", TAKES_BITS)
@pytest.mark.parametrize(
    ("bits", "error", "message"), BAD_BITS, ids=[repr(b) for b, *_ in BAD_BITS]
)
def test_bits(where: str, bits: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(f"{where.split()[0]} {message}")):
        TAKES_BITS[where](bits)


@pytest.mark.parametrize("where", TAKES_BITS)
def test_traced_bits(where: str) -> None:
    with pytest.raises(TypeError, match=r"known at trace time.*static_argnames"):
        jax.jit(TAKES_BITS[where])(2)


@pytest.mark.parametrize("where", TAKES_BITS)
@pytest.mark.parametrize("integer", [np.int64, np.uint8, jnp.int32])
def test_any_integer_type_is_taken_as_bits(where: str, integer: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, TAKES_BITS[where](integer(2)), TAKES_BITS[where](2))


def test_integer_types_share_one_compiled_program() -> None:
    traces = 0

    @jax.jit
    def run(x: jax.Array) -> jax.Array:
        nonlocal traces
        traces += 1
        return ap.matmul(x, W, act_bits=np.int64(2)) + ap.matmul(x, W, act_bits=2)

    calls = [e for e in run.trace(X).jaxpr.eqns if "anyprec" in str(e.primitive)]
    assert calls[0].params == calls[1].params
    assert type(calls[0].params["act_bits"]) is int


# --- products ---


@pytest.mark.parametrize("dtype", [np.int32, np.int8, np.bool_, np.uint8, np.complex64])
@pytest.mark.parametrize("act_bits", [None, 4])
def test_dtype_of_x(dtype: type, act_bits: int | None) -> None:
    name = np.dtype(dtype).name
    with pytest.raises(TypeError, match=f"x must be float32, bfloat16 or float16, got {name}"):
        ap.matmul(X.astype(dtype), W, act_bits=act_bits)
    with pytest.raises(TypeError, match=f"x must be float32, bfloat16 or float16, got {name}"):
        ap.quantize_activations(X.astype(dtype), 4)


def test_float64_x_is_refused_with_and_without_x64() -> None:
    message = "x must be float32, bfloat16 or float16, got float64; cast it explicitly"
    with pytest.raises(TypeError, match=message):
        ap.matmul(X.astype(np.float64), W)
    with jax.enable_x64(True), pytest.raises(TypeError, match=message):
        ap.matmul(jnp.asarray(X, jnp.float64), W)


@pytest.mark.parametrize("x", [1.0, [1.0, 2.0], None, "x"])
def test_x_must_be_an_array(x: Any) -> None:
    with pytest.raises(TypeError, match=f"x must be an array, got {type(x).__name__}"):
        ap.matmul(x, W)


def test_x_without_axes() -> None:
    with pytest.raises(ValueError, match="x must have at least 1 axes, got shape"):
        ap.matmul(np.float32(1), W)


def test_k_mismatch() -> None:
    message = r"must have 64 values in its last axis as w has, got \(2, 32\)"
    with pytest.raises(ValueError, match=f"x {message}"):
        ap.matmul(X[:, :32], W)
    with pytest.raises(ValueError, match=f"codes {message}"):
        ap.int_matmul(np.zeros((2, 32), np.uint8), W, 4)


@pytest.mark.parametrize("dtype", [np.int32, np.float32, np.int8])
def test_dtype_of_codes(dtype: type) -> None:
    with pytest.raises(TypeError, match=f"codes must be a uint8 array, got {np.dtype(dtype)}"):
        ap.int_matmul(np.zeros((2, 64), dtype), W, 4)
    with pytest.raises(TypeError, match="codes must be a uint8 array, got <class 'list'>"):
        ap.int_matmul([1], W, 4)


def test_w_must_be_a_quantized_tensor() -> None:
    with pytest.raises(TypeError, match=r"w must be a QuantizedTensor \(see quantize\), got ndarr"):
        ap.matmul(X, WEIGHTS)


def test_stacked_w_needs_vmap() -> None:
    stacked = jax.tree.map(lambda leaf: np.stack([leaf, leaf]), W)
    message = r"w must have shape \(K, N\), got \(2, 64, 3\); use jax.vmap for stacked ones"
    with pytest.raises(ValueError, match=message):
        ap.matmul(X, stacked)
    with pytest.raises(ValueError, match=message):
        ap.int_matmul(CODES, stacked, 4)


def test_bias() -> None:
    for shape in ((2,), (3, 1), (1, 3), ()):
        message = re.escape(f"bias must have shape (3,), got {shape}")
        with pytest.raises(ValueError, match=message):
            ap.matmul(X, W, bias=np.ones(shape, np.float32))
    with pytest.raises(TypeError, match="bias must be float32, bfloat16 or float16, got int32"):
        ap.matmul(X, W, bias=np.ones(3, np.int32))
    with pytest.raises(TypeError, match="bias must be an array, got float"):
        ap.matmul(X, W, bias=1.0)


def test_act_scales() -> None:
    with pytest.raises(ValueError, match='act_scales must be "group" or "token", got \'tokens\''):
        ap.matmul(X, W, act_bits=4, act_scales="tokens")


@pytest.mark.parametrize("dtype", ["int32", "float64", "complex64"])
def test_out_dtype(dtype: str) -> None:
    with pytest.raises(TypeError, match=f"out_dtype must be one of .*, got {dtype}"):
        ap.matmul(X, W, out_dtype=dtype)


@pytest.mark.parametrize("name", ["CPU", "cpu_float", "gpu", "", 3])
def test_unknown_implementation(name: Any) -> None:
    message = re.escape("implementation must be None or one of ('xla', 'cpu', ") + ".*"
    for call in (
        lambda: ap.matmul(X, W, implementation=name),
        lambda: ap.int_matmul(CODES, W, 4, implementation=name),
        lambda: ap.quantize_activations(X, 4, implementation=name),
    ):
        with pytest.raises(ValueError, match=message + re.escape(f"got {name!r}")):
            call()


def test_cuda_on_a_cpu_is_unavailable_with_a_reason() -> None:
    """No kernels, or kernels that are for other devices."""
    built = _native.cuda().module is not None
    reason = "runs on CUDA devices only" if built else str(_native.cuda().reason)
    with jax.default_device(jax.devices("cpu")[0]):
        for name in ("cuda", "cuda_planes", "cuda_codes"):
            with pytest.raises(ap.Unavailable, match=f"implementation='{name}' .*{reason}"):
                ap.matmul(X, W, act_bits=4, implementation=name)


@pytest.mark.parametrize("name", ["cpu_planes", "cpu_codes", "cuda_planes", "cuda_codes"])
def test_integer_kernels_need_integer_activations(name: str) -> None:
    with pytest.raises(ValueError, match=f"implementation='{name}' needs act_bits"):
        ap.matmul(X, W, implementation=name)


# --- quantize ---


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite(bad: float) -> None:
    weights = WEIGHTS.copy()
    weights[5, 1] = bad
    with pytest.raises(ValueError, match="weights must be finite, got NaN or infinity"):
        ap.quantize(weights, 4)


def test_weights_of_a_wrong_type() -> None:
    with pytest.raises(TypeError, match="weights must be float32, bfloat16 or float16, got int32"):
        ap.quantize(WEIGHTS.astype(np.int32), 4)
    with pytest.raises(
        TypeError, match="weights must be float32, bfloat16 or float16, got float64"
    ):
        ap.quantize(WEIGHTS.astype(np.float64), 4)
    with pytest.raises(TypeError, match="weights must be an array, got list"):
        ap.quantize([[1.0]], 4)
    with pytest.raises(ValueError, match=r"weights must have at least 2 axes, got shape \(64,\)"):
        ap.quantize(WEIGHTS[:, 0], 4)


@pytest.mark.parametrize("group_size", [33, 48, 96, 128, 0, -32, np.int64(20)])
def test_group_size_that_does_not_fit(group_size: Any) -> None:
    message = (
        "group_size must be a multiple of 32 that divides k = 64, "
        f"or None for one group; got {group_size}; these fit: [32, 64]"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        ap.quantize(WEIGHTS, 4, group_size=group_size)
    with pytest.raises(ValueError, match=re.escape(message)):
        ap.quantize_activations(X, 4, group_size=group_size)


@pytest.mark.parametrize("group_size", [32.0, "32", True])
def test_group_size_of_a_wrong_type(group_size: Any) -> None:
    with pytest.raises(TypeError, match=f"group_size must be an int or None, got {group_size!r}"):
        ap.quantize(WEIGHTS, 4, group_size=group_size)


def test_group_size_where_none_fits() -> None:
    with pytest.raises(ValueError, match=r"divides k = 33, .* these fit: none"):
        ap.quantize(np.ones((33, 2), np.float32), 4, group_size=32)


def test_a_group_size_equal_to_k_needs_no_multiple() -> None:
    for k in (33, np.int64(33)):
        assert ap.quantize(np.ones((33, 2), np.float32), 4, group_size=k).group_size == 33


def test_group_size_of_empty_k() -> None:
    """Any group divides an empty K; one rule must hold everywhere."""
    w = ap.quantize(np.ones((0, 2), np.float32), 4, group_size=32)
    assert ap.matmul(np.ones((3, 0), np.float32), w, act_bits=4).tolist() == [[0, 0]] * 3
    for implementation in ("cpu", "xla"):
        codes, scales = ap.quantize_activations(
            np.ones((3, 0), np.float32), 4, group_size=32, implementation=implementation
        )
        assert codes.shape == (3, 0)
        assert scales.shape == (3, w.groups)


def test_given_scales() -> None:
    with pytest.raises(ValueError, match=r"scales must have shape \(3, 2\), got \(2, 3\)"):
        ap.quantize(WEIGHTS, 4, group_size=32, scales=SCALES.T)
    with pytest.raises(TypeError, match="scales must be float32, bfloat16 or float16, got float64"):
        ap.quantize(WEIGHTS, 4, group_size=32, scales=SCALES.astype(np.float64))
    with pytest.raises(TypeError, match="scales must be an array, got list"):
        ap.quantize(WEIGHTS, 4, group_size=32, scales=SCALES.tolist())
    with pytest.raises(ValueError, match='scales must be "mse", "absmax" or an array, got \'max\''):
        ap.quantize(WEIGHTS, 4, scales="max")


@pytest.mark.parametrize("bad", [-1.0, np.nan, np.inf])
def test_given_scales_must_be_usable(bad: float) -> None:
    """Weights under such a scale would turn to garbage without a word."""
    scales = SCALES.copy()
    scales[1, 1] = bad
    with pytest.raises(ValueError, match="scales must be"):
        ap.quantize(WEIGHTS, 4, group_size=32, scales=scales)


@pytest.mark.parametrize("dtype", ["int8", "float64", jnp.float8_e4m3fn])
def test_scale_dtype(dtype: Any) -> None:
    with pytest.raises(TypeError, match="scale_dtype must be one of"):
        ap.quantize(WEIGHTS, 4, scale_dtype=dtype)


def test_scales_beyond_their_dtype() -> None:
    """float16 ends at 65504: scales must not turn into infinity unnoticed."""
    with pytest.raises(ValueError, match="scale_dtype"):
        ap.quantize(WEIGHTS * np.float32(1e7), 4, scale_dtype=jnp.float16)


# --- rotations ---


@pytest.mark.parametrize("block", [0, 1, 32, 63, 65, 96, -64])
def test_rotation_block(block: int) -> None:
    message = f"Rotation.block must be a power of two, 64 or more, got {block}"
    with pytest.raises(ValueError, match=message):
        ap.Rotation(block)


@pytest.mark.parametrize("block", [64.0, "64", True, None])
def test_rotation_block_of_a_wrong_type(block: Any) -> None:
    with pytest.raises(TypeError, match=f"Rotation.block must be an int, got {block!r}"):
        ap.Rotation(block)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_rotation_seed(seed: int) -> None:
    with pytest.raises(ValueError, match=rf"Rotation.seed must be in 0..2\*\*32 - 1, got {seed}"):
        ap.Rotation(64, seed)
    with pytest.raises(TypeError, match=r"Rotation.seed must be an int, got 1.5"):
        ap.Rotation(64, 1.5)


def test_rotation_that_does_not_divide_k() -> None:
    message = "rotation block 128 must divide k, got k = 64"
    with pytest.raises(ValueError, match=message):
        ap.quantize(WEIGHTS, 4, rotation=ap.Rotation(128))
    with pytest.raises(ValueError, match=message):
        ap.quantize_activations(X, 4, rotation=ap.Rotation(128))
    with pytest.raises(ValueError, match=message):
        ap.QuantizedTensor.from_codes(CODES, SCALES, bits=4, rotation=ap.Rotation(128))
    for k in (96, 0, 33):
        with pytest.raises(ValueError, match=f"k must be a multiple of 64 to be rotated, got {k}"):
            ap.Rotation.for_size(k)


@pytest.mark.parametrize("rotation", ["hadamard", 64, True])
def test_rotation_of_a_wrong_type(rotation: Any) -> None:
    with pytest.raises(TypeError, match="rotation must be a Rotation or None, got"):
        ap.quantize(WEIGHTS, 4, rotation=rotation)
    with pytest.raises(TypeError, match="rotation must be a Rotation or None, got"):
        ap.quantize_activations(X, 4, rotation=rotation)


# --- tensors put together by hand ---


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"planes": W.planes.astype(np.int32)}, TypeError, "w.planes must be uint32"),
        ({"planes": W.planes[0]}, TypeError, "w.planes must be uint32[..., bits, N, words]"),
        ({"planes": W.planes[:0]}, ValueError, "w.bits must be from 1 to 8, got 0"),
        ({"planes": np.concatenate([W.planes] * 3)}, ValueError, "w.bits must be from 1 to 8, got"),
        ({"planes": W.planes[..., :1]}, ValueError, "w.planes must have 2 words for k = 64, got 1"),
        ({"scales": SCALES[:2]}, ValueError, "w.scales must have shape (3, 2), got (2, 2)"),
        ({"scales": SCALES.T}, ValueError, "w.scales must have shape (3, 2), got (2, 3)"),
        ({"scales": SCALES.astype(int)}, TypeError, "w.scales must be one of"),
        ({"scales": SCALES.astype(float)}, TypeError, "got float64"),
        ({"offsets": SCALES[:, :1]}, ValueError, "w.offsets must have shape (3, 2), got (3, 1)"),
        ({"offsets": SCALES.astype(float)}, TypeError, "w.offsets must be one of"),
        ({"group_size": 48}, ValueError, "group_size must be a multiple of 32 that divides k = 64"),
        ({"group_size": 64}, ValueError, "w.scales must have shape (3, 1), got (3, 2)"),
        ({"k": 128}, ValueError, "w.planes must have 4 words for k = 128, got 2"),
        ({"rotation": ap.Rotation(128)}, ValueError, "rotation block 128 must divide k"),
    ],
)
def test_tensor_whose_fields_do_not_fit(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    broken = dataclasses.replace(W, **change)
    with pytest.raises(error, match=re.escape(message)):
        ap.matmul(X, broken)


def test_groups_of_codes() -> None:
    for groups in (0, 3):
        scales = np.ones((3, groups), np.float32)
        message = f"scales have {groups} groups, which do not divide k = 64"
        with pytest.raises(ValueError, match=message):
            ap.QuantizedTensor.from_codes(CODES, scales, bits=4)
    with pytest.raises(ValueError, match="group_size must be a multiple of 32"):
        ap.QuantizedTensor.from_codes(CODES, np.ones((3, 4), np.float32), bits=4)
    with pytest.raises(ValueError, match=re.escape("scales must have shape (3, 2), got (1, 2)")):
        ap.QuantizedTensor.from_codes(CODES, SCALES[:1], bits=4)


def test_truncate_to_more_bits() -> None:
    with pytest.raises(ValueError, match="bits must be at most the tensor's 4, got 5"):
        W.truncate(5)
