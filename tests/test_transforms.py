"""Products under JAX transformations: jit, vmap, derivatives, scan; threads; no extension."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import os
import subprocess
import sys
import types
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import quick

import jax_anyprec as ap
from jax_anyprec import _native
from jax_anyprec import format as fmt
from jax_anyprec._compat import Tracer

RNG = np.random.default_rng(0)
K, N, M, GROUP = 64, 7, 5, 32
TOLERANCE = 4 * oracle.gamma(2 * K)
"""Relative to a sum of magnitudes: two products of K terms, taken apart by code and scale."""


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def tensor(
    bits: int = 4, offsets: bool = False, rotation: ap.Rotation | None = None, lead: tuple = ()
) -> ap.QuantizedTensor:
    codes = RNG.integers(0, 2**bits, (*lead, N, K), np.uint8)
    scales = RNG.uniform(0.02, 0.1, (*lead, N, K // GROUP)).astype(np.float32)
    z = normal(*scales.shape) if offsets else None
    return ap.QuantizedTensor.from_codes(codes, scales, z, bits=bits, rotation=rotation)


def close(found: Any, expected: Any) -> None:
    """Equal to a few roundings of sums of about 2 K terms of order 1."""
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            a, b, rtol=1e-4, atol=100 * TOLERANCE * max(1, np.abs(np.asarray(b)).max(initial=0))
        ),
        found,
        expected,
    )


def at(tree: Any, i: int) -> Any:
    """Element `i` along the first axes."""
    return jax.tree.map(lambda leaf: leaf[i], tree)


def dense(x: Any, scales: Any, offsets: Any, bias: Any, w: ap.QuantizedTensor) -> jax.Array:
    """`matmul` by a dense matrix, differentiable in each argument."""
    q = jnp.asarray(oracle.ints(codes_of(w), w.bits), jnp.float32).reshape(N, -1, GROUP)
    if offsets is None:
        rows = scales[..., None] * q
    else:
        rows = scales[..., None] * (q + (2**w.bits - 1)) + offsets[..., None]
    if w.rotation is not None:
        signs = oracle.signs(w.rotation.seed, K)
        blocks = K // w.rotation.block
        turn = np.kron(np.eye(blocks), oracle.hadamard_matrix(w.rotation.block))
        x = (x * signs) @ jnp.asarray(turn, jnp.float32)
    y = jnp.matmul(x, rows.reshape(N, K).T, precision="highest")
    return y if bias is None else y + bias


def rounded(w: ap.QuantizedTensor, act_bits: int | None) -> Any:
    """`dense` of x rounded to `act_bits`, whose derivative in x counts as the identity."""

    def run(x: Any, *rest: Any) -> jax.Array:
        if act_bits is None:
            return dense(x, *rest, w)
        codes, scales = ap.quantize_activations(
            jax.lax.stop_gradient(x), act_bits, group_size=GROUP, rotation=w.rotation
        )
        q = 2.0 * codes - (2**act_bits - (act_bits < 4))
        seen = (scales[..., None] * q.reshape(*scales.shape, GROUP)).reshape(x.shape)
        if w.rotation is not None:  # `dense` will rotate it again
            seen = w.rotation.invert(seen)
        return dense(x + jax.lax.stop_gradient(seen - x), *rest, w)

    return run


def codes_of(w: ap.QuantizedTensor) -> np.ndarray:
    octets = np.ascontiguousarray(np.asarray(w.planes)).view(np.uint8)
    bits = np.unpackbits(octets, axis=-1, bitorder="little")[..., : w.k]
    return np.tensordot(2 ** np.arange(w.bits)[::-1], bits, 1).astype(np.uint8)


def quantized(
    w: ap.QuantizedTensor, act_bits: int | None = None, implementation: str | None = None
) -> Any:
    """`matmul` as a function of x, scales, offsets and bias."""

    def run(x: Any, scales: Any, offsets: Any, bias: Any) -> jax.Array:
        t = ap.QuantizedTensor(w.planes, scales, offsets, w.k, w.group_size, w.rotation)
        return ap.matmul(x, t, bias=bias, act_bits=act_bits, implementation=implementation)

    return run


KINDS = {
    "symmetric": {},
    "offsets": {"offsets": True},
    "rotated": {"rotation": ap.Rotation(64, 3)},
    "rotated with offsets": {"rotation": ap.Rotation(64, 3), "offsets": True},
}


def arguments(w: ap.QuantizedTensor) -> list[Any]:
    return [normal(M, K), w.scales, w.offsets, normal(N)]


def differentiable(args: list[Any]) -> tuple[int, ...]:
    return tuple(i for i, a in enumerate(args) if a is not None)


# --- jit and shapes ---


def test_disable_jit() -> None:
    w, x = tensor(), normal(M, K)
    expected = ap.matmul(x, w, act_bits=4)
    with jax.disable_jit():
        np.testing.assert_allclose(ap.matmul(x, w, act_bits=4), expected, rtol=1e-5)


def test_no_retrace_for_equal_arguments() -> None:
    traces = 0

    @jax.jit
    def run(x: Any, w: ap.QuantizedTensor) -> jax.Array:
        nonlocal traces
        traces += 1
        return ap.matmul(x, w, act_bits=4)

    for _ in range(3):
        run(normal(M, K), tensor())
    assert traces == 1
    run(normal(M, K), tensor().truncate(2))
    assert traces == 2


def test_eval_shape_runs_nothing() -> None:
    w = jax.eval_shape(lambda: tensor(lead=()))
    x = jax.ShapeDtypeStruct((2, 3, K), jnp.bfloat16)
    found = jax.eval_shape(lambda x, w: ap.matmul(x, w, act_bits=4), x, w)
    assert (found.shape, found.dtype) == ((2, 3, N), jnp.bfloat16)
    found = jax.eval_shape(lambda x, w: ap.matmul(x, w, out_dtype="float32"), x, w)
    assert found.dtype == jnp.float32
    codes = jax.ShapeDtypeStruct((2, 3, K), jnp.uint8)
    found = jax.eval_shape(lambda x, w: ap.int_matmul(x, w, 4), codes, w)
    assert (found.shape, found.dtype) == ((2, 3, N, K // GROUP), jnp.int32)
    codes, scales = jax.eval_shape(lambda x: ap.quantize_activations(x, 4, group_size=32), x)
    assert (codes.shape, codes.dtype) == ((2, 3, K), jnp.uint8)
    assert (scales.shape, scales.dtype) == ((2, 3, K // GROUP), jnp.float32)


def test_transposed_and_sliced_operands() -> None:
    w, x = tensor(), normal(K, 2 * M)
    run = jax.jit(lambda x, w: ap.matmul(x.T[::2], w, act_bits=8, implementation="cpu"))
    expected = ap.matmul(np.ascontiguousarray(x.T[::2]), w, act_bits=8, implementation="cpu")
    np.testing.assert_array_equal(run(x, w), expected)


@pytest.mark.parametrize("act_bits", [None, 4])
def test_wide_floats_enabled(act_bits: int | None) -> None:
    w, x = tensor(offsets=True, rotation=ap.Rotation(64)), normal(M, K)
    expected = ap.matmul(x, w, act_bits=act_bits)
    with jax.enable_x64(True):
        for implementation in ("cpu", "xla"):
            found = ap.matmul(x, w, act_bits=act_bits, implementation=implementation)
            assert found.dtype == jnp.float32
            close(found, expected)
        grad = jax.jit(jax.grad(lambda x: ap.matmul(x, w, act_bits=act_bits).sum()))(x)
        assert grad.dtype == jnp.float32
        q = ap.quantize(normal(K, N), 3, group_size=32, rotation=ap.Rotation(64))
        assert q.truncate(2).scales.dtype == jnp.float32
        assert q.dequantize().dtype == jnp.float32
        codes, scales = ap.quantize_activations(x, 4, implementation="xla")
        assert (codes.dtype, scales.dtype) == (jnp.uint8, jnp.float32)
        over_scales = jax.jit(jax.vmap(lambda s: quantized(w)(x, s, w.offsets, None)))
        mapped = over_scales(np.stack([w.scales] * 2))
        assert mapped.dtype == jnp.float32


# --- vmap ---


@pytest.mark.parametrize("act_bits", [None, 4])
@pytest.mark.parametrize("kind", ["symmetric", "rotated with offsets"])
def test_vmap(kind: str, act_bits: int | None) -> None:
    """Over activations, weights, both, and bias or scales alone, against a loop."""
    w = tensor(**KINDS[kind])
    stacked = tensor(**KINDS[kind], lead=(3,))
    x, xs, bias = normal(M, K), normal(3, M, K), normal(3, N)
    run = lambda x, w, b=None: ap.matmul(x, w, bias=b, act_bits=act_bits)  # noqa: E731
    loop = lambda f: np.stack([f(i) for i in range(3)])  # noqa: E731

    close(jax.vmap(run, (0, None))(xs, w), loop(lambda i: run(xs[i], w)))
    close(jax.vmap(run, (1, None), 2)(xs.swapaxes(0, 1), w), np.moveaxis(
        loop(lambda i: run(xs[i], w)), 0, 2))  # fmt: skip
    close(jax.vmap(run, (None, 0))(x, stacked), loop(lambda i: run(x, at(stacked, i))))
    close(jax.vmap(run)(xs, stacked), loop(lambda i: run(xs[i], at(stacked, i))))
    close(jax.vmap(run, (None, None, 0))(x, w, bias), loop(lambda i: run(x, w, bias[i])))
    close(jax.vmap(run, (0, None, 0))(xs, w, bias), loop(lambda i: run(xs[i], w, bias[i])))
    scale = lambda s: quantized(w, act_bits)(x, s, w.offsets, None)  # noqa: E731
    scales = np.stack([w.scales, 2 * w.scales, 3 * w.scales])
    close(jax.vmap(scale)(scales), loop(lambda i: scale(scales[i])))


def test_vmap_of_vmap() -> None:
    stacked, xs = tensor(lead=(2,)), normal(3, 2, M, K)
    both = jax.vmap(jax.vmap(lambda x, w: ap.matmul(x, w, act_bits=4)), (0, None))
    inner = jax.vmap(jax.vmap(lambda x, w: ap.matmul(x, w, act_bits=4), (0, None)), (1, 0), 1)
    expected = np.array(
        [[ap.matmul(xs[i, j], at(stacked, j), act_bits=4) for j in (0, 1)] for i in range(3)]
    )
    close(both(xs, stacked), expected)
    close(inner(xs, stacked), expected)


def test_vmap_of_the_integer_operations() -> None:
    stacked = tensor(lead=(2,))
    codes = RNG.integers(0, 16, (2, M, K), np.uint8)
    found = jax.vmap(lambda c, w: ap.int_matmul(c, w, 4))(codes, stacked)
    for i in range(2):
        w = at(stacked, i)
        np.testing.assert_array_equal(found[i], oracle.int_product(codes[i], 4, codes_of(w), 4, 32))
    x = normal(2, 3, K)
    mapped = jax.vmap(lambda x: ap.quantize_activations(x, 4, group_size=32), 1)(x)
    for a, b in zip(mapped, ap.quantize_activations(x, 4, group_size=32), strict=True):
        np.testing.assert_array_equal(a, np.swapaxes(b, 0, 1))
    axis_of_one = jax.vmap(lambda x: ap.quantize_activations(x, 4))(x[0])
    assert axis_of_one[0].shape == (3, K)


@pytest.mark.parametrize("sizes", [(0, M, K), (2, 0, K), (2, M, 0), (0, 0, 0)])
def test_vmap_of_zero_sizes(sizes: tuple[int, int, int]) -> None:
    x = np.zeros(sizes, np.float32)
    w = ap.quantize(np.ones((sizes[-1], N), np.float32), 2)
    stacked = jax.tree.map(lambda v: jnp.stack([v] * sizes[0]) if sizes[0] else v[None][:0], w)
    for act_bits in (None, 4):
        run = lambda x, w, a=act_bits: ap.matmul(x, w, act_bits=a)  # noqa: E731
        assert jax.vmap(run, (0, None))(x, w).shape == (*sizes[:2], N)
        assert jax.vmap(run)(x, stacked).shape == (*sizes[:2], N)
    codes, scales = jax.vmap(lambda x: ap.quantize_activations(x, 4))(x)
    assert codes.shape == sizes
    assert scales.shape == (*sizes[:2], 1)
    assert jax.vmap(lambda c: ap.int_matmul(c, w, 4))(codes).shape == (*sizes[:2], N, 1)


# --- derivatives ---


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("act_bits", [4, None])
def test_prepared_tensors_transform_as_others(kind: str, act_bits: int | None) -> None:
    w, stacked, bias = tensor(**KINDS[kind]), tensor(**KINDS[kind], lead=(3,)), normal(N)
    x, xs = normal(M, K), normal(3, M, K)

    def run(x: Any, w: ap.QuantizedTensor) -> jax.Array:
        return ap.matmul(x, w, bias=bias, act_bits=act_bits)

    def loss(x: Any, floats: Any, w: ap.QuantizedTensor) -> jax.Array:
        return (run(x, dataclasses.replace(w, **floats)) ** 2).sum()

    def gradients(w: ap.QuantizedTensor) -> Any:
        floats = {"scales": w.scales}
        if w.offsets is not None:
            floats["offsets"] = w.offsets
        return quick.jit(jax.grad(loss, (0, 1)))(x, floats, w)

    @quick.jit
    def maps(w: ap.QuantizedTensor, stacked: ap.QuantizedTensor) -> Any:
        return jax.vmap(run)(xs, stacked), jax.vmap(run, (0, None))(xs, w)

    close(maps(w.prepare(), stacked.prepare()), maps(w, stacked))
    (dx, dfloats), (expected_dx, expected_dfloats) = gradients(w.prepare()), gradients(w)
    close(dx, expected_dx)
    for name, expected in expected_dfloats.items():
        close(fmt.untile_groups(dfloats[name], N), expected)


def derivatives(args: list[Any]) -> Any:
    """Value, jvp in each argument alone and in all, vjp and gradient of a function, compiled."""
    wrt = differentiable(args)
    tangents = [None if a is None else normal(*a.shape) for a in args]
    cotangent = normal(M, N)

    def of(f: Any) -> Any:
        def alone(i: int, args: Any, tangents: Any) -> Any:
            only = lambda a: f(*args[:i], a, *args[i + 1 :])  # noqa: E731
            return jax.jvp(only, [args[i]], [tangents[i]])[1]

        @quick.jit
        def run(args: Any, tangents: Any) -> Any:
            return {
                "jvp": jax.jvp(f, args, tangents),
                "alone": [alone(i, args, tangents) for i in wrt],
                "vjp": jax.vjp(f, *args)[1](cotangent),
                "grad": jax.grad(lambda *a: jnp.sin(f(*a)).sum(), wrt)(*args),
            }

        return run(args, tangents)

    return of


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("act_bits", [None, 2, 8])
def test_derivatives(kind: str, act_bits: int | None) -> None:
    """Exact for float activations, else straight through the rounding of x."""
    w = tensor(**KINDS[kind])
    derive = derivatives(arguments(w))
    expected = derive(rounded(w, act_bits))
    close(derive(quantized(w, act_bits)), expected)
    if act_bits is None:
        close(derive(quantized(w, act_bits, "xla")), expected)


@pytest.mark.parametrize("kind", ["symmetric", "rotated with offsets"])
@pytest.mark.parametrize("act_bits", [None, 4])
def test_second_derivatives(kind: str, act_bits: int | None) -> None:
    """The product is bilinear: mixed derivatives of x and scales are not zero."""
    w = tensor(**KINDS[kind])
    args = arguments(w)
    wrt = differentiable(args)
    f, g = quantized(w, act_bits), rounded(w, act_bits)
    loss = lambda h: lambda *a: (h(*a) ** 2).sum()  # noqa: E731
    direction = tuple(normal(*args[i].shape) for i in wrt)

    def product(h: Any) -> Any:
        def along(*some: Any) -> Any:
            full = list(args)
            for i, a in zip(wrt, some, strict=True):
                full[i] = a
            return jax.grad(loss(h), wrt)(*full)

        return quick.jit(lambda *a: jax.jvp(along, a, direction)[1])(*(args[i] for i in wrt))

    close(product(f), product(g))
    reverse = [
        quick.jit(jax.grad(lambda x, h=h: jax.grad(loss(h))(x, *args[1:]).sum()))(args[0])
        for h in (f, g)
    ]
    close(*reverse)


@pytest.mark.parametrize("prepared", [False, True])
def test_linear_transpose_in_x(prepared: bool) -> None:
    """Of the product, and of it mapped over x, over weights and over both."""
    kind = KINDS["rotated with offsets"]
    ws, xs = tensor(**kind, lead=(2,)), normal(2, M, K)
    run = lambda x, w: ap.matmul(x, w.prepare() if prepared else w)  # noqa: E731
    both, over_weights, over_x = jax.vmap(run), jax.vmap(run, (None, 0)), jax.vmap(run, (0, None))
    matrices = np.asarray(ws.dequantize())
    ct = normal(2, M, N)

    @quick.jit
    def transposed(ct: Any, ws: ap.QuantizedTensor) -> Any:
        of = lambda f, x, w, ct: jax.linear_transpose(lambda x: f(x, w), x)(ct)[0]  # noqa: E731
        w = at(ws, 0)
        return (
            of(run, xs[0], w, ct[0]),
            of(over_x, xs, w, ct),
            of(over_weights, xs[0], ws, ct),
            of(both, xs, ws, ct),
        )

    close(
        transposed(ct, ws),
        (
            ct[0] @ matrices[0].T,
            np.einsum("bmn,kn->bmk", ct, matrices[0]),
            np.einsum("bmn,bkn->mk", ct, matrices),
            np.einsum("bmn,bkn->bmk", ct, matrices),
        ),
    )


def test_what_is_not_linear_is_not_transposed() -> None:
    w, x, ct = tensor(), normal(M, K), np.ones((M, N), np.float32)
    in_scales = lambda s: quantized(w)(x, s, None, None)  # noqa: E731
    for f, primal in (
        (lambda x: ap.matmul(x, w, act_bits=4), x),
        (lambda x: ap.matmul(x, w, bias=np.ones(N, np.float32)), x),
        (in_scales, w.scales),
    ):
        with pytest.raises(
            NotImplementedError, match="with respect to x alone, with act_bits=None"
        ):
            jax.linear_transpose(f, primal)(ct)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("act_bits", [None, 8])
def test_gradients_keep_their_dtypes(dtype: str, act_bits: int | None) -> None:
    w = tensor(offsets=True)
    w = ap.QuantizedTensor(
        w.planes, w.scales.astype("bfloat16"), w.offsets.astype("float16"), K, GROUP
    )
    x, bias = jnp.asarray(normal(M, K), dtype), jnp.asarray(normal(N), "float16")
    args = (x, w.scales, w.offsets, bias)
    loss = lambda *a: quantized(w, act_bits)(*a).sum().astype("float32")  # noqa: E731
    grads = quick.jit(jax.grad(loss, (0, 1, 2, 3)))(*args)
    for value, grad in zip(args, grads, strict=True):
        assert grad.dtype == value.dtype
        assert grad.shape == value.shape
        assert np.isfinite(np.asarray(grad, np.float32)).all()


def test_vmap_of_grad_and_grad_of_vmap() -> None:
    stacked, xs = tensor(lead=(3,)), normal(3, M, K)
    loss = jax.jit(lambda x, w: jnp.sin(ap.matmul(x, w, act_bits=8)).sum())
    loop = [jax.grad(loss)(xs[i], at(stacked, i)) for i in range(3)]
    close(jax.vmap(jax.grad(loss))(xs, stacked), np.stack(loop))
    close(jax.grad(lambda xs: jax.vmap(loss)(xs, stacked).sum())(xs), np.stack(loop))
    w = tensor()
    per_example = jax.vmap(jax.grad(loss), (0, None))(xs, w)
    close(per_example, np.stack([jax.grad(loss)(x, w) for x in xs]))


@pytest.mark.parametrize("act_bits", [None, 8])
def test_derivatives_of_nested_maps(act_bits: int | None) -> None:
    """Gradient, jvp and hvp of a product mapped over x, and over planes, scales, offsets, bias.

    With 64-bit types and with the search for NaN too, which the loop over products must survive.
    """
    ws = tensor(offsets=True, lead=(2,))
    args = (normal(2, M, K), ws.scales, ws.offsets, normal(2, N))
    directions = tuple(normal(*a.shape) for a in args)

    def one(planes: Any, x: Any, scales: Any, offsets: Any, bias: Any) -> jax.Array:
        w = ap.QuantizedTensor(planes, scales, offsets, K, GROUP)
        return ap.matmul(x, w, bias=bias, act_bits=act_bits)

    over_weights = jax.vmap(one, (0, None, 0, 0, 0))
    mapped = jax.vmap(over_weights, (None, 0, None, None, None))

    def looped(xs: Any, *rest: Any) -> jax.Array:
        product = [rounded(at(ws, i), act_bits) for i in range(2)]
        each = [[product[i](x, *(a[i] for a in rest)) for i in range(2)] for x in xs]
        return jnp.stack([jnp.stack(row) for row in each])

    def derive(f: Any) -> Any:
        def run(args: Any, directions: Any) -> Any:
            gradient = jax.grad(lambda *a: jnp.sin(f(*a)).sum(), (0, 1, 2, 3))
            return jax.jvp(f, args, directions), jax.jvp(gradient, args, directions)

        return quick.jit(run)(args, directions)

    expected = derive(looped)
    for mode in (contextlib.nullcontext(), jax.enable_x64(True), jax.debug_nans(True)):
        with mode:
            found = derive(lambda *a: mapped(ws.planes, *a))
        assert {leaf.dtype.name for leaf in jax.tree.leaves(found)} == {"float32"}
        close(found, expected)


def test_vmap_of_gradients_of_scales() -> None:
    """A gradient for each token: what per-example methods take."""
    w = tensor(offsets=True)
    xs, args = normal(3, M, K), (w.scales, w.offsets, normal(N))
    gradient = lambda f: jax.grad(lambda *a: jnp.sin(f(*a)).sum(), (1, 2, 3))  # noqa: E731
    found = quick.jit(jax.vmap(gradient(quantized(w, 8)), (0, None, None, None)))(xs, *args)
    expected = quick.jit(jax.vmap(gradient(rounded(w, 8)), (0, None, None, None)))(xs, *args)
    close(found, expected)


def test_quantize_is_differentiable_in_given_scales() -> None:
    """With the codes as they are: what a scale multiplies."""
    matrix, scales = normal(K, N), np.full((N, K // GROUP), 0.3, np.float32)
    run = lambda s: ap.quantize(matrix, 3, group_size=GROUP, scales=s).dequantize()  # noqa: E731
    found = jax.jit(jax.grad(lambda s: run(s).sum()))(scales)
    w = ap.quantize(matrix, 3, group_size=GROUP, scales=scales)
    close(found, oracle.ints(codes_of(w), 3).reshape(N, -1, GROUP).sum(-1))


def test_quantize_activations_says_that_it_has_no_derivative() -> None:
    total = lambda x: ap.quantize_activations(x, 4)[1].sum()  # noqa: E731
    with pytest.raises(NotImplementedError, match="matmul has one, straight through the rounding"):
        jax.grad(total)(normal(M, K))
    constant = jax.grad(lambda x: x.sum() + total(jax.lax.stop_gradient(x)))(normal(M, K))
    np.testing.assert_array_equal(constant, np.ones((M, K)))


def test_scales_play_no_part_in_integers() -> None:
    w, codes = tensor(offsets=True), RNG.integers(0, 16, (M, K), np.uint8)
    total = lambda s: 1.0 * ap.int_matmul(codes, dataclasses.replace(w, scales=s), 4).sum()  # noqa: E731
    np.testing.assert_array_equal(jax.jit(jax.grad(total))(w.scales), np.zeros_like(w.scales))


def test_gradients_pass_by_the_planes() -> None:
    w, x = tensor(), normal(M, K)
    grads = jax.grad(lambda w: ap.matmul(x, w).sum(), allow_int=True)(w)
    assert grads.planes.dtype == jax.dtypes.float0
    assert grads.scales.shape == w.scales.shape


def test_remat() -> None:
    w, x = tensor(), normal(M, K)
    f = lambda x: jnp.sin(ap.matmul(x, w, act_bits=8)).sum()  # noqa: E731
    close(jax.jit(jax.grad(jax.checkpoint(f)))(x), jax.grad(f)(x))


# --- control flow ---


@pytest.mark.parametrize("prepared", [False, True])
def test_scan_over_stacked_layers(prepared: bool) -> None:
    """Values and gradients, of the stacked scales too, with each layer computed anew."""
    codes = RNG.integers(0, 8, (4, K, K), np.uint8)
    scales = RNG.uniform(0.01, 0.03, (4, K, 2)).astype(np.float32)
    layers = ap.QuantizedTensor.from_codes(codes, scales, bits=3)
    layers = layers.prepare() if prepared else layers

    @jax.checkpoint
    def step(x: jax.Array, w: ap.QuantizedTensor) -> tuple[jax.Array, None]:
        return jnp.tanh(ap.matmul(x, w, act_bits=8)), None

    def scanned(x: Any, scales: Any) -> jax.Array:
        return jax.lax.scan(step, x, dataclasses.replace(layers, scales=scales))[0]

    def unrolled(x: Any, scales: Any) -> jax.Array:
        stacked = dataclasses.replace(layers, scales=scales)
        for i in range(4):
            x, _ = step(x, at(stacked, i))
        return x

    derive = lambda f: quick.jit(jax.value_and_grad(lambda *a: (f(*a) ** 2).sum(), (0, 1)))  # noqa: E731
    x = normal(M, K)
    found, expected = (derive(f)(x, layers.scales) for f in (scanned, unrolled))
    close(found, expected)
    assert all((np.abs(gradient) > 0).any() for gradient in found[1])


def test_cond_and_while() -> None:
    w, x = tensor(), normal(M, K)
    y = jax.jit(
        lambda p, x: jax.lax.cond(
            p, lambda: ap.matmul(x, w, act_bits=4), lambda: ap.matmul(x, w, act_bits=8)
        )
    )(True, x)
    close(y, ap.matmul(x, w, act_bits=4))
    z = jax.jit(lambda x: jax.lax.fori_loop(0, 3, lambda _, a: a + ap.matmul(x, w), y))(x)
    close(z, y + 3 * ap.matmul(x, w))


# --- zero sizes ---


@pytest.mark.parametrize("sizes", [(0, N, K), (M, 0, K), (M, N, 0), (0, 0, 0)])
@pytest.mark.parametrize("implementation", ["cpu", "xla"])
def test_zero_sizes_and_their_gradients(sizes: tuple[int, int, int], implementation: str) -> None:
    m, n, k = sizes
    w = ap.quantize(np.ones((k, n), np.float32), 4)
    x, bias = np.ones((m, k), np.float32), np.full(n, 2, np.float32)
    for act_bits in (None, 4):
        f = lambda x, b, a=act_bits: ap.matmul(  # noqa: E731
            x, w, bias=b, act_bits=a, implementation=implementation
        )
        y = f(x, bias)
        assert y.shape == (m, n)
        np.testing.assert_allclose(y, 2 + k, rtol=1e-5)
        dx, db = quick.jit(jax.grad(lambda x, b: f(x, b).sum(), (0, 1)))(x, bias)  # noqa: B023
        np.testing.assert_allclose(dx, np.full((m, k), n), rtol=1e-5)
        np.testing.assert_allclose(db, np.full(n, m))


# --- threads, and life without the extension ---


def test_threads_share_a_compiled_function() -> None:
    w = tensor()
    run = jax.jit(lambda x, w: ap.matmul(x, w, act_bits=4))
    xs = [normal(300, K) for _ in range(8)]
    expected = [np.asarray(run(x, w)) for x in xs]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for _ in range(20):
            for found, wanted in zip(pool.map(lambda x: run(x, w), xs), expected, strict=True):
                np.testing.assert_array_equal(found, wanted)


def in_subprocess(code: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-P", "-W", "error", "-c", code],
        capture_output=True, text=True, timeout=120, env={**os.environ, **env}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def test_first_use_from_many_threads() -> None:
    out = in_subprocess("""
import threading, numpy as np, jax_anyprec as ap
w = ap.QuantizedTensor.from_codes(np.ones((3, 64), np.uint8), np.ones((3, 1), np.float32), bits=2)
barrier, found = threading.Barrier(8), []
def work():
    barrier.wait()
    found.append(ap.matmul(np.ones((2, 64), np.float32), w, act_bits=2).tolist())
threads = [threading.Thread(target=work) for _ in range(8)]
for t in threads: t.start()
for t in threads: t.join()
assert len(found) == 8 and all(y == found[0] for y in found), found
print(found[0][0][0])
""")
    assert out == "-64.0"


def test_loading_the_extension_brings_no_lock_back() -> None:
    """In free-threaded Python a module that doesn't declare its code safe would turn the GIL on."""
    out = in_subprocess("""
import sys, sysconfig
import jax_anyprec as ap
ap.register_custom_calls()
locked = getattr(sys, "_is_gil_enabled", lambda: True)()
print(locked == (not sysconfig.get_config_var("Py_GIL_DISABLED")))
""")
    assert out == "True"


WITHOUT_EXTENSION = """
import sys, warnings
sys.modules["jax_anyprec._cpu"] = None  # importing it raises ImportError
import numpy as np, jax_anyprec as ap
status = ap.status()["cpu"]
assert not status["available"] and "jax_anyprec._cpu" in status["reason"], status
rng = np.random.default_rng(0)
codes, x = rng.integers(0, 16, (3, 64), np.uint8), rng.integers(0, 16, (2, 64), np.uint8)
w = ap.QuantizedTensor.from_codes(codes, np.ones((3, 1), np.float32), bits=4)
for call in (lambda **o: ap.int_matmul(x, w, 4, **o),
             lambda **o: ap.matmul(x.astype(np.float32), w, **o)):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        y = call()
    message = str(caught[0].message)
    assert "plain XLA" in message and status["reason"] in message, message
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (call(implementation="xla") == y).all()
    for name in ("cpu", "cpu_codes") if call(implementation="xla").ndim == 3 else ("cpu",):
        try: call(implementation=name)
        except ap.Unavailable as error: assert status["reason"] in str(error)
        else: raise AssertionError(name)
qx, qw = 2 * x.astype(int) - 16, 2 * codes.astype(int) - 15
assert (np.asarray(ap.int_matmul(x, w, 4, implementation="xla"))[..., 0] == qx @ qw.T).all()
print("ok")
"""


def test_without_the_extension() -> None:
    assert in_subprocess(WITHOUT_EXTENSION) == "ok"


@pytest.mark.parametrize(
    ("built", "wanted"),
    [
        ((0, 999), "built for XLA FFI 0.999"),
        ((999, 0), "built for XLA FFI 999.0"),
    ],
)
def test_a_newer_ffi_version_is_never_registered(
    built: tuple[int, int], wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = types.ModuleType("jax_anyprec._fake")

    def registrations() -> dict[str, Any]:
        raise AssertionError("registered")

    fake.registrations = registrations  # type: ignore[attr-defined]
    fake.ffi_api_version = lambda: built  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "jax_anyprec._fake", fake)
    backend = _native._load("jax_anyprec._fake", "cpu")
    assert backend.module is None
    assert backend.reason is not None
    assert wanted in backend.reason
    with pytest.raises(ap.Unavailable, match=wanted):
        backend.require("cpu")


def test_an_unreadable_ffi_version_is_never_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = types.ModuleType("jax_anyprec._fake")
    fake.ffi_api_version = lambda: (0, 1)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "jax_anyprec._fake", fake)
    monkeypatch.setattr(_native, "_running_api_version", lambda: None)
    backend = _native._load("jax_anyprec._fake", "cpu")
    assert backend.module is None
    assert "can't be read" in str(backend.reason)


def test_the_running_version_accepts_the_built_one() -> None:
    running = _native._running_api_version()
    assert running is not None
    module = _native.cpu().module
    assert module is not None
    built = module.ffi_api_version()
    assert built[0] == running[0]
    assert built <= running


def test_no_warning_with_the_extension() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        w = ap.quantize(normal(33, 3), 2)
        ap.matmul(normal(2, 33), w, act_bits=2)
    assert not isinstance(w.planes, Tracer)
