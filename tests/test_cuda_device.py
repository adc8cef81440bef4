"""The CUDA kernels on a GPU: bit for bit, within bounds, and under transforms.

Each test runs on a target, which is a device and the names of its kernels: here the first GPU.
test_cuda_device_on_cpu.py runs them on a CPU, where little is left of the sweeps, so that the tests
are tested where there is no GPU. Those with "small" in their name are for compute-sanitizer.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shapes import FEW, GROUPED, PER_CHANNEL, Shape
from test_products import DTYPES, PAIRS, Case, edge_activations, pack

import jax_anyprec as ap
from jax_anyprec import local_cuda


class Target(NamedTuple):
    """A device, and "cuda" or "cpu"."""

    device: jax.Device
    platform: str
    arch: int

    def families(self, per_channel: bool) -> tuple[str, ...]:
        """Implementations of integer products that have kernels for the target."""
        planes = self.platform == "cpu" or (per_channel and self.arch < 100)
        names = ("planes", "codes") if planes else ("codes",)
        return (self.platform, *(f"{self.platform}_{name}" for name in names))

    def some(self, everything: Any, every: int) -> list[Any]:
        """All on a GPU, one in `every` on a CPU."""
        return list(everything)[:: 1 if self.platform == "cuda" else every]


def on(target: Target) -> Iterator[Target]:
    """What the fixture of a target does: it is the default device in the test."""
    with jax.default_device(target.device):
        yield target


@pytest.fixture
def target() -> Iterator[Target]:
    """The first GPU; where there is none the test is skipped."""
    status = ap.status()["cuda"]
    if not status["available"]:
        pytest.skip(status["reason"])
    try:
        device = jax.devices("cuda")[0]
    except RuntimeError as error:
        pytest.skip(f"JAX has no CUDA device: {error}")
    yield from on(Target(device, "cuda", status["devices"][0]["arch"]))


# --- integers ---


def codes_of(rng: np.random.Generator, shape: tuple[int, int], bits: int) -> np.ndarray:
    """Codes with extremes: every third row is all ones."""
    codes = rng.integers(0, 2**bits, shape, np.uint8)
    codes[::3] = 2**bits - 1
    return codes


def check_integers(target: Target, shape: Shape, pairs: list[Any]) -> None:
    """Pairs of bits by every kernel family, in one program, prepared and not."""
    m, n, k, group = shape
    rng = np.random.default_rng(m + n + k)
    x = {a: codes_of(rng, (m, k), a) for a in range(1, 9)}
    u = {b: codes_of(rng, (n, k), b) for b in range(1, 9)}
    w = {b: pack(u[b], b, group) for b in range(1, 9)}
    families = target.families(group == k)

    @jax.jit
    def run(x: Any, *layouts: Any) -> dict[Any, Any]:
        return {
            (a, b, w[b].prepared, i): ap.int_matmul(x[a], w[b], a, implementation=i)
            for a, b in pairs
            for w in layouts
            for i in families
        }

    for (a, b, *how), found in run(x, w, {b: w[b].prepare() for b in w}).items():
        expected = oracle.int_product(x[a], a, u[b], b, group)
        np.testing.assert_array_equal(found, expected, f"{how} {a} x {b} bits")


@pytest.mark.parametrize("shape", FEW, ids=str)
def test_integers_of_small_products_are_exact(target: Target, shape: Shape) -> None:
    check_integers(target, shape, target.some(PAIRS, 9))


EDGES = [s for s in PER_CHANNEL + GROUPED if s not in FEW]


@pytest.mark.parametrize("shape", EDGES, ids=str)
def test_integers_of_every_shape_are_exact(target: Target, shape: Shape) -> None:
    check_integers(target, shape, target.some(PAIRS[::7], 10))


@settings(
    max_examples=15, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(data=st.data())
def test_integers_of_random_shapes(target: Target, data: st.DataObject) -> None:
    m, n = data.draw(st.integers(0, 300), "m"), data.draw(st.integers(0, 300), "n")
    group = data.draw(st.integers(1, 9).map(lambda i: 32 * i), "group")
    groups = data.draw(st.integers(1, 4), "groups")
    k = group * groups if groups > 1 else data.draw(st.integers(1, 2000), "k")
    pair = data.draw(st.sampled_from(PAIRS))
    check_integers(target, Shape(m, n, k, group if groups > 1 else k), [pair])


METHOD_TILES = [
    ("planes", "narrow"), ("planes", "whole"), ("codes", "narrow"), ("codes", "medium"),
    ("codes", "wide"), ("codes", "whole"), ("float", "narrow"), ("float", "medium"),
    ("float", "wide"), ("float", "whole"),
]  # fmt: skip


def force(monkeypatch: pytest.MonkeyPatch, **choice: Any) -> None:
    """Have CUDA's plans choose so."""
    plan = local_cuda.plan
    monkeypatch.setattr(local_cuda, "plan", lambda *a, **k: {**plan(*a, **k), **choice})


@pytest.mark.parametrize(("method", "tile"), METHOD_TILES)
@pytest.mark.parametrize("splits", [1, 2, 3])
def test_every_small_tile_and_split(
    target: Target, method: str, tile: str, splits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles that `plan` would not choose for such a shape; they compute it all the same."""
    a = None if method == "float" else 3
    implementation = target.platform if a is None else f"{target.platform}_{method}"
    if implementation not in target.families(True):
        pytest.skip(f"compute capability {target.arch / 10} has no 1-bit tensor cores")
    force(monkeypatch, tile=tile, splits=splits)
    # 7 blocks of K by planes, else 50 or 100; in three parts some begin within a group.
    group = 3200 if method == "planes" or tile == "whole" else 320
    shape, options = Shape(67, 75, 3200, group), {"offsets": True, "bias": True}
    cases = [Case(shape, b, a, dtype="bfloat16", **options) for b in target.some(range(1, 9), 7)]
    check(target, cases, (implementation,))


def test_every_tile_is_exact(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    for method, tile in METHOD_TILES:
        name = f"{target.platform}_{method}"
        if name not in target.families(True):
            continue
        force(monkeypatch, tile=tile)
        shape = Shape(130, 260, 576, 576 if method == "planes" or tile == "whole" else 64)
        for bits in target.some(range(1, 9), 7):
            rng = np.random.default_rng(bits)
            x, u = codes_of(rng, (shape.m, shape.k), 5), codes_of(rng, (shape.n, shape.k), bits)
            # So that scales of all groups are 1: with the largest level, and none beyond it.
            x[:, :: shape.group] = 31
            x = np.maximum(x, 1)
            expected, w = oracle.int_product(x, 5, u, bits, shape.group), pack(u, bits, shape.group)
            if tile in ("narrow", "whole"):  # the others have no sums of groups
                product = functools.partial(ap.int_matmul, act_bits=5, implementation=name)
                np.testing.assert_array_equal(jax.jit(product)(x, w.prepare()), expected)
            product = functools.partial(ap.matmul, act_bits=5, implementation=name)
            values = oracle.act_ints(x, 5).astype(np.float32)
            found = jax.jit(product)(values, w.prepare())
            np.testing.assert_array_equal(found, expected.sum(axis=-1))


# --- the activation quantizer ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("k", "group", "block"),
    [(64, 32, 0), (33, 33, 0), (192, 64, 64), (256, 256, 128), (1024, 32, 1024), (4096, 128, 2048)],
)
def test_small_activations_are_quantized_to_the_bit(
    target: Target, dtype: str, k: int, group: int, block: int
) -> None:
    x = edge_activations(dtype, k, group)
    rotation = ap.Rotation(block, 9) if block else None
    widths = target.some(range(1, 9), 4)

    @jax.jit
    def run(x: jax.Array) -> list[Any]:
        return [
            ap.quantize_activations(
                x, bits, group_size=group, rotation=rotation, implementation=target.platform
            )
            for bits in widths
        ]

    for bits, (codes, scales) in zip(widths, run(x), strict=True):
        expected = oracle.quantize_activations(x, bits, group, (block, 9) if block else None)
        np.testing.assert_array_equal(scales, expected[1], f"{bits} bits")
        np.testing.assert_array_equal(codes, expected[0], f"{bits} bits")


@settings(
    max_examples=15, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(data=st.data())
def test_any_activations_are_quantized_to_the_bit(target: Target, data: st.DataObject) -> None:
    values = data.draw(
        st.lists(st.floats(width=32), min_size=64, max_size=64)
        | st.lists(st.floats(-4, 4, width=16), min_size=64, max_size=64)
    )
    x, bits = np.array(values, np.float32).reshape(1, 64), data.draw(st.integers(1, 8))
    found = ap.quantize_activations(x, bits, group_size=32, implementation=target.platform)
    for a, b in zip(found, oracle.quantize_activations(x, bits, 32), strict=True):
        np.testing.assert_array_equal(a, b)


# --- floats ---


def check(target: Target, cases: list[Case], names: tuple[str, ...] | None = None) -> None:
    """Products within their bounds, by each implementation, prepared and not, in one program."""

    def names_of(case: Case) -> tuple[str, ...]:
        if case.act_bits is None:
            return (target.platform,)
        return target.families(case.group == case.w.group_size == case.w.k)

    @jax.jit
    def run(arrays: list[Any]) -> list[list[Any]]:
        return [
            [
                ap.matmul(
                    x, w, bias=bias, act_bits=case.act_bits, act_scales=case.act_scales,
                    out_dtype=case.out_dtype, implementation=name,
                )
                for w in layouts
                for name in names or names_of(case)
            ]
            for case, (x, bias, layouts) in zip(cases, arrays, strict=True)
        ]  # fmt: skip

    arrays = [(case.x, case.bias, (case.w, case.w.prepare())) for case in cases]
    for case, results in zip(cases, run(arrays), strict=True):
        expected = case.expected()
        for found in results:
            assert found.dtype == case.out_dtype
            assert found.devices() == {target.device}
            expected.check(found)


@pytest.mark.parametrize("a_bits", [*range(1, 9), None])
def test_floats_stay_in_their_bound(target: Target, a_bits: int | None) -> None:
    """Each width of weights, with and without groups, offsets, bias and whole-token scales."""
    flags = lambda b: {"offsets": b % 2 == 0, "bias": b % 3 == 0, "token": b % 4 == 0}  # noqa: E731
    check(
        target,
        [
            Case(Shape(6, 19, 320, group), bits, a_bits, seed=bits, **flags(bits))
            for bits in target.some(range(1, 9), 5)
            for group in (64, 320)
        ],
    )


@pytest.mark.parametrize("shape", [*FEW, *(s for s in EDGES if s.m * s.n * s.k < 2**22)], ids=str)
def test_floats_of_every_shape(target: Target, shape: Shape) -> None:
    cases = [
        (4, 8, True, False),
        (3, None, False, True),
        (2, 2, True, True),
        (8, None, True, False),
    ]
    check(
        target,
        [
            Case(shape, bits, a_bits, offsets=offsets, bias=bias)
            for bits, a_bits, offsets, bias in target.some(cases, 4)
        ],
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("a_bits", [2, 6, None])
def test_floats_of_every_dtype(target: Target, dtype: str, a_bits: int | None) -> None:
    shape = Shape(5, 33, 192, 192 if a_bits == 2 else 64)
    check(
        target,
        [
            Case(
                shape, 4, a_bits, dtype=dtype, out_dtype=out, scale_dtype=scale, offsets=True,
                bias=True,
            )
            for out, scale in zip(DTYPES, ("float16", "float32", "bfloat16"), strict=True)
        ],
    )  # fmt: skip


@pytest.mark.parametrize("block", [64, 128, 256, 512, 1024, 2048])
@pytest.mark.parametrize("a_bits", [1, 8, None])
def test_floats_of_rotated_tensors(target: Target, block: int, a_bits: int | None) -> None:
    shape = Shape(4, 17, 2048, 2048 if a_bits == 1 else 128)
    check(
        target,
        [
            Case(
                shape, 4, a_bits, dtype=dtype, token=token, offsets=token,
                rotation=ap.Rotation(block, 11),
            )
            for dtype, token in target.some(itertools.product(DTYPES, (False, True)), 6)
        ],
    )  # fmt: skip


def test_long_sums_are_split(target: Target) -> None:
    """One row and few columns: `plan` splits K to fill the chip."""
    k, pairs = 32768, target.some([(4, 8), (1, 1), (4, None)], 3)
    for bits, a_bits in pairs if target.platform == "cuda" else ():
        plan = local_cuda.plan(
            33, k, rows=1, weight_bits=bits, act_bits=a_bits, group_size=k, act_group_size=k,
            x_dtype="float32",
        )  # fmt: skip
        assert plan["splits"] > 1
    check(target, [Case(Shape(1, 33, k, k), *pair, offsets=True, bias=True) for pair in pairs])


@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 15, 16, 17])
def test_small_numbers_of_rows(target: Target, rows: int) -> None:
    """Decoding: as `plan` chooses for few rows, with a scale for all of K and with groups."""
    check(
        target,
        [
            Case(
                Shape(rows, 257, 1984, group), bits, a, dtype="bfloat16", offsets=a == 8, bias=True
            )
            for group in (1984, 64)
            for bits in target.some(range(1, 9), 7)
            for a in (1, 8, None)
        ],
    )
    shapes = (Shape(rows, 257, 1984, 1984), Shape(rows, 257, 1984, 64))
    for shape in shapes:
        check_integers(target, shape, target.some([(2, 1), (8, 4), (5, 3)], 3))


@pytest.mark.parametrize("a_bits", [2, 4, 8, None])
@pytest.mark.parametrize("token", [False, True])
def test_a_bad_token_shows_and_spares_the_others(
    target: Target, a_bits: int | None, token: bool
) -> None:
    case = Case(Shape(5, 6, 64, 32), 4, a_bits, token=token)
    options = {"act_bits": a_bits, "act_scales": case.act_scales}
    good = np.asarray(ap.matmul(case.x, case.w, implementation=target.platform, **options))
    for row, bad in enumerate((np.nan, np.inf, -np.inf)):
        case.x[row, 40] = bad
    y = np.asarray(ap.matmul(case.x, case.w, implementation=target.platform, **options))
    assert not np.isfinite(y[:3]).any()
    if a_bits is not None:
        assert np.isnan(y[:3]).all()
    np.testing.assert_array_equal(y[3:], good[3:])


def test_small_zero_sizes(target: Target) -> None:
    sizes = itertools.product((0, 3), (0, 5), (0, 64), (1, 8, None))
    check(target, [Case(Shape(m, n, k, k), 2, a_bits, bias=True) for m, n, k, a_bits in sizes])


# --- as part of a program ---


@pytest.fixture
def operations() -> Any:
    """The public operations, whose module makes arrays and so initialises devices."""
    import operations

    return operations


def test_operations_equal_those_of_the_cpu(target: Target, operations: Any) -> None:
    for op in operations.OPERATIONS.values():
        with jax.default_device(jax.devices("cpu")[0]):
            expected = jax.tree.map(np.asarray, op())
        operations.close(op(), expected)


def test_derivatives_equal_those_of_the_cpu(target: Target, operations: Any) -> None:
    for name in operations.DIFFERENTIABLE:
        op = operations.OPERATIONS[name]

        def loss(x: Any, op: Any = op) -> Any:
            return (op.run(x, op.weights) ** 2).sum()

        with jax.default_device(jax.devices("cpu")[0]):
            expected = np.asarray(jax.grad(loss)(op.x))
        operations.close(jax.grad(loss)(op.x), expected)


def test_tangents_of_every_family(target: Target) -> None:
    """They are products of floats, whatever family the product is by."""
    case = Case(Shape(6, 33, 256, 256), 3, None)
    for name in target.families(True):
        run = functools.partial(ap.matmul, w=case.w, act_bits=2, implementation=name)
        _, tangent = jax.jvp(run, (jnp.ones_like(case.x),), (jnp.asarray(case.x),))
        case.expected().check(tangent)


def test_vmap_and_scan(target: Target) -> None:
    case = Case(Shape(6, 64, 64, 32), 4, 8)
    run = functools.partial(ap.matmul, act_bits=8, implementation=target.platform)
    y = run(case.x, case.w)
    mapped = jax.jit(jax.vmap(run, (0, None)))(case.x.reshape(2, 3, 64), case.w)
    np.testing.assert_array_equal(mapped.reshape(6, 64), y)

    def step(x: Any, _: Any) -> tuple[Any, Any]:
        x = run(x, case.w)
        return x / 8, x

    _, ys = jax.jit(lambda x: jax.lax.scan(step, x, length=3))(case.x)
    x = case.x
    for found in ys:
        np.testing.assert_array_equal(found, run(x, case.w))
        x, _ = step(x, None)


def test_many_calls_in_one_program(target: Target) -> None:
    """Chains of products, which XLA puts into command buffers, run again and again."""
    case = Case(Shape(4, 96, 96, 96), 2, 2)
    run = functools.partial(ap.matmul, act_bits=2, implementation=target.platform)

    @jax.jit
    def chain(x: Any) -> Any:
        for _ in range(24):
            x = run(x, case.w) * 0.125
        return x

    for scale in (1, 2, 3, 1):
        x = jnp.asarray(scale * case.x)
        found = chain(x)
        for _ in range(24):
            x = run(x, case.w) * 0.125
        np.testing.assert_array_equal(found, x)


def test_donated_activations(target: Target) -> None:
    case = Case(Shape(8, 128, 128, 32), 4, 8)
    run = functools.partial(ap.matmul, w=case.w, act_bits=8, implementation=target.platform)
    expected, x = np.asarray(run(case.x)), jnp.asarray(case.x)
    found = jax.jit(run, donate_argnums=0)(x)
    assert x.is_deleted()
    np.testing.assert_array_equal(found, expected)


def test_eight_threads(target: Target) -> None:
    case = Case(Shape(33, 65, 256, 64), 4, 8, offsets=True)
    run = jax.jit(
        functools.partial(ap.matmul, w=case.w, act_bits=8, implementation=target.platform)
    )
    xs = [jax.device_put(case.x * (i + 1), target.device) for i in range(8)]
    expected = [np.asarray(run(x)) for x in xs]

    def repeat(i: int) -> bool:
        return all(np.array_equal(run(xs[i]), expected[i]) for _ in range(20))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(repeat, range(8)))


def test_a_layer_equals_that_of_the_cpu(target: Target, operations: Any) -> None:
    case = Case(Shape(9, 80, 256, 64), 4, 8, bias=True)
    with jax.default_device(jax.devices("cpu")[0]):
        layer = ap.nnx.QuantLinear.from_tensor(case.w.prepare(), bias=case.bias, activations=8)
        expected = np.asarray(layer(case.x))
    layer = ap.nnx.QuantLinear.from_tensor(case.w.prepare(), bias=case.bias, activations=8)
    found = layer(case.x)
    assert found.devices() == {target.device}
    operations.close(found, expected)
