"""Products with a norm or gate before and a residual after: values, derivatives, devices, errors.

tests/operations.py has them too, so that every other transform is tested with those of `matmul`.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from shapes import Shape
from test_products import Case
from test_sharding import collectives, make_mesh

import jax_anyprec as ap

DTYPES = ("float32", "bfloat16", "float16")
EPS = 1e-5
BEFORE = ("none", "norm", "gate")


# --- what comes before, in float64 ---

APPLY = jax.jit(lambda before, x: before(x))  # once for each eps and shape


def normalised(x: np.ndarray, scale: np.ndarray, eps: float, dtype: str) -> oracle.Bounded:
    """Float32 roundings: squares and their sum [K, halved by the root], mean, eps, root [2], the
    three products with it and the scale.
    """
    x, scale = x.astype(np.float64), scale.astype(np.float64)
    y = x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * scale
    return rounded(y, oracle.gamma(x.shape[-1] // 2 + 8) * np.abs(y), dtype)


def gated(x: np.ndarray, dtype: str) -> oracle.Bounded:
    """Float32 roundings: the exponential [4], its sum, quotient and two products.

    Sigmoids below 2^-126, the smallest normal number, may become 0. Gates for which that changes
    anything are below 2^7 in magnitude, so 2^-119 up is lost at most.
    """
    gate, up = np.split(x.astype(np.float64), 2, -1)
    with np.errstate(over="ignore"):
        y = gate / (1 + np.exp(-gate)) * up
    return rounded(y, oracle.gamma(10) * np.abs(y) + 2.0**-119 * np.abs(up), dtype)


def rounded(y: np.ndarray, error: np.ndarray, dtype: str) -> oracle.Bounded:
    """`y` cast to a dtype."""
    cast = oracle.OUT_ROUNDOFF[dtype] * (np.abs(y) + error) + oracle.OUT_TINY[dtype]
    return oracle.Bounded(y, error + cast)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=25, deadline=None)
@given(
    k=st.sampled_from([1, 33, 1000]),
    size=st.floats(-6, 4),
    eps=st.sampled_from([0.0, 1e-5]),
    seed=st.integers(0, 99),
)
def test_norm_and_gate(dtype: str, k: int, size: float, eps: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = (rng.standard_t(3, (3, 2 * k)) * 10.0**size).clip(-6e4, 6e4).astype(jnp.dtype(dtype))
    x = np.where(x == 0, x.dtype.type(1), x)  # 0 / 0 where eps is 0
    scale = rng.uniform(-2, 2, 2 * k).astype(np.float32)
    norm, gate = (APPLY(before, x) for before in (ap.RMSNorm(scale, eps), ap.SwiGLU()))
    assert norm.dtype == gate.dtype == dtype
    # The bound of a cast to float16 holds up to its largest number; larger products are infinite.
    largest = float(jnp.finfo(dtype).max)
    for found, expected in (
        (norm, normalised(x, scale, eps, dtype)), (gate, gated(x, dtype)),
    ):  # fmt: skip
        fits = np.abs(expected.value) < 0.99 * largest
        oracle.Bounded(expected.value[fits], expected.error[fits]).check(np.asarray(found)[fits])
        assert np.isinf(np.asarray(found)[np.abs(expected.value) > 1.01 * largest]).all()


# --- products ---


def case_of(shape: Shape, bits: int, act_bits: int | None, **options: Any) -> Case:
    """A product whose activations are small integers, so that sums of squares are exact in any
    order, and activations round alike wherever they are normalised."""
    case = Case(shape, bits, act_bits, **options)
    rng = np.random.default_rng(1)
    case.x = rng.integers(-8, 9, (shape.m, shape.k)).astype(case.x.dtype)
    return case


def check_case(case: Case, before: str, residual_dtype: str | None) -> None:
    """All layouts and implementations of a product."""
    rng = np.random.default_rng(2)
    m, k = case.x.shape
    n = len(case.codes)
    how: Any = None
    if before == "norm":
        how = ap.RMSNorm(rng.uniform(0.5, 2, k).astype(np.float32), EPS)
    if before == "gate":
        how = ap.SwiGLU()
        case.x = np.concatenate([case.x, case.x[::-1]], -1)
    residual = None
    if residual_dtype is not None:
        residual = rng.normal(size=(m, n)).astype(jnp.dtype(residual_dtype))

    @jax.jit
    def run(x: Any, w: Any, bias: Any, how: Any, residual: Any) -> Any:
        return [
            ap.matmul(
                x, layout, bias=bias, before=how, residual=residual, act_bits=case.act_bits,
                act_scales=case.act_scales, out_dtype=case.out_dtype, implementation=i,
            )
            for layout in (w, w.prepare())
            for i in ("cpu", "xla")
        ]  # fmt: skip

    results = run(case.x, case.w, case.bias, how, residual)
    if how is not None:
        x, case.x = case.x, np.asarray(APPLY(how, case.x))
        dtype = case.x.dtype.name
        wanted = gated(x, dtype) if before == "gate" else normalised(x, how.scale, EPS, dtype)
        wanted.check(case.x)
    expected = expected_of(case, residual)
    for result in results:
        assert result.dtype == case.out_dtype
        expected.check(result)


def expected_of(case: Case, residual: np.ndarray | None) -> oracle.Bounded:
    if residual is None:
        return case.expected()
    out_dtype, case.out_dtype = case.out_dtype, "float32"
    product, case.out_dtype = case.expected(), out_dtype
    y = product.value + residual.astype(np.float64)
    return rounded(y, product.error + oracle.gamma(1) * (np.abs(y) + product.error), out_dtype)


@pytest.mark.parametrize("act_bits", [2, 8, None])
@pytest.mark.parametrize("residual", [None, "float32"])
@pytest.mark.parametrize("before", BEFORE)
def test_values(before: str, residual: str | None, act_bits: int | None) -> None:
    for shape in (Shape(3, 7, 64, 32), Shape(1, 33, 257, 257), Shape(17, 2, 128, 64)):
        case = case_of(shape, 4, act_bits, offsets=True, bias=shape.m == 3, token=shape.m == 17)
        check_case(case, before, residual)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out_dtype", DTYPES)
def test_dtypes(dtype: str, out_dtype: str) -> None:
    """A residual of another dtype than x and the result, all of which round once."""
    other = DTYPES[DTYPES.index(dtype) - 1]
    for before in BEFORE:
        case = case_of(Shape(3, 7, 64, 32), 4, 8, dtype=dtype, out_dtype=out_dtype, bias=True)
        check_case(case, before, other)


@pytest.mark.parametrize("before", BEFORE)
def test_rotated(before: str) -> None:
    case = case_of(Shape(2, 5, 128, 32), 3, 4, rotation=ap.Rotation(64, 3))
    check_case(case, before, "float32")


@pytest.mark.parametrize("shape", [(0, 7, 64), (3, 0, 64), (3, 7, 0), (1, 1, 1)])
@pytest.mark.parametrize("before", BEFORE)
def test_empty_and_single(shape: tuple[int, int, int], before: str) -> None:
    m, n, k = shape
    if before == "norm" and k == 0:
        return  # there is no mean of nothing
    check_case(case_of(Shape(m, n, k, k), 4, 8), before, "float32")


def test_the_residual_is_rounded_once() -> None:
    """1 and a product just above 2**-8, half of the step to the next bfloat16."""
    w = ap.QuantizedTensor.from_codes(
        np.ones((1, 32), np.uint8), np.full((1, 1), 2.0**-8, np.float32), bits=1
    )
    x = np.zeros((1, 32), jnp.bfloat16)
    x[0, :2] = 1, 2.0**-9
    residual = np.ones((1, 1), jnp.bfloat16)
    y = ap.matmul(x, w, residual=residual)
    assert y.dtype == jnp.bfloat16
    assert float(y[0, 0]) == 1 + 2.0**-7
    assert float((residual + ap.matmul(x, w))[0, 0]) == 1  # rounded twice


@pytest.mark.parametrize("lead", [(), (2, 3), (2, 0)])
def test_leading_axes(lead: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    w = ap.quantize(rng.normal(size=(64, 7)).astype(np.float32), 4)
    x = rng.normal(size=(*lead, 128)).astype(np.float32)
    residual = rng.normal(size=(*lead, 7)).astype(np.float32)
    found = ap.matmul(x, w, before=ap.SwiGLU(), residual=residual)
    assert found.shape == (*lead, 7)
    rows = ap.matmul(
        x.reshape(-1, 128), w, before=ap.SwiGLU(), residual=residual.reshape(-1, 7)
    )  # fmt: skip
    np.testing.assert_array_equal(found, rows.reshape(*lead, 7))


def test_it_is_one_operation_in_a_program() -> None:
    case = problem("norm")
    text = str(jax.make_jaxpr(fused(case))(*case.floats))
    assert text.count("jax_anyprec_") == text.count("jax_anyprec_fused_matmul") == 1
    plain = str(jax.make_jaxpr(lambda x: ap.matmul(x, case.w))(case.floats[0]))
    assert "jax_anyprec_fused_matmul" not in plain


def test_a_compiled_program_is_that_of_the_composition() -> None:
    """On a CPU: as many instructions of each kind, and as many bytes read and written."""
    for before in ("norm", "gate"):
        case = problem(before)
        found, expected = (
            jax.jit(run(case)).lower(*case.floats).compile() for run in (fused, composed)
        )
        kinds = lambda program: sorted(re.findall(r"= \S+ ([\w-]+)\(", program.as_text()))  # noqa: E731
        assert kinds(found) == kinds(expected)
        cost = lambda program: program.cost_analysis()["bytes accessed"]  # noqa: E731
        assert cost(found) == cost(expected)


# --- derivatives ---

N, K = 7, 64


@dataclasses.dataclass
class Problem:
    """A product as a function of its floats: x, scales, offsets, bias, norm's scale, residual."""

    before: str
    w: ap.QuantizedTensor
    floats: tuple[Any, ...]
    act_bits: int | None = None

    def at(self, *floats: Any) -> tuple[Any, ap.QuantizedTensor, Any, Any, Any]:
        """x, weights, bias, what comes before, residual."""
        x, scales, offsets, bias, norm, residual = floats
        w = dataclasses.replace(self.w, scales=scales, offsets=offsets)
        return x, w, bias, ap.RMSNorm(norm, EPS) if self.before == "norm" else ap.SwiGLU(), residual


def problem(before: str, act_bits: int | None = None, lead: tuple[int, ...] = ()) -> Problem:
    rng = np.random.default_rng(4)
    normal = lambda *shape: rng.normal(size=(*lead, *shape)).astype(np.float32)  # noqa: E731
    positive = lambda *shape: np.exp(0.2 * normal(*shape))  # noqa: E731
    scales, offsets = 0.05 * positive(N, 2), normal(N, 2)
    w = ap.QuantizedTensor.from_codes(
        rng.integers(0, 16, (N, K), np.uint8),
        0.05 * np.ones((N, 2), np.float32), np.zeros((N, 2), np.float32), bits=4,
    )  # fmt: skip
    x = normal(3, K if before == "norm" else 2 * K)
    return Problem(before, w, (x, scales, offsets, normal(N), positive(K), normal(3, N)), act_bits)


def fused(case: Problem) -> Any:
    def run(*floats: Any) -> jax.Array:
        x, w, bias, before, residual = case.at(*floats)
        options = {"bias": bias, "act_bits": case.act_bits}
        return ap.matmul(x, w, before=before, residual=residual, **options)

    return run


def composed(case: Problem) -> Any:
    def run(*floats: Any) -> jax.Array:
        x, w, bias, before, residual = case.at(*floats)
        return residual + ap.matmul(before(x), w, bias=bias, act_bits=case.act_bits)

    return run


def dense(case: Problem) -> Any:
    """By a dense matrix, and by norm and gate written anew."""

    def run(*floats: Any) -> jax.Array:
        x, w, bias, _, residual = case.at(*floats)
        if case.before == "norm":
            h = x / jnp.sqrt((x * x).mean(-1, keepdims=True) + EPS) * floats[4]
        else:
            h = x[..., :K] / (1 + jnp.exp(-x[..., :K])) * x[..., K:]
        u = np.stack([np.asarray(codes_of(case.w))]).reshape(N, 2, K // 2)
        rows = (w.scales[..., None] * (2.0 * u) + w.offsets[..., None]).reshape(N, K)
        return residual + jnp.matmul(h, rows.T, precision="highest") + bias

    return run


def codes_of(w: ap.QuantizedTensor) -> np.ndarray:
    octets = np.ascontiguousarray(np.asarray(w.planes)).view(np.uint8)
    bits = np.unpackbits(octets, axis=-1, bitorder="little")[..., : w.k]
    return np.tensordot(2 ** np.arange(w.bits)[::-1], bits, 1)


def close(found: Any, expected: Any) -> None:
    """Equal to the roundings of a few sums of K terms."""
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            a, b, rtol=1e-4, atol=1e-4 * max(1, np.abs(np.asarray(b)).max(initial=0))
        ),
        found,
        expected,
    )


ALL = tuple(range(6))
both = pytest.mark.parametrize("before", ["norm", "gate"])


@both
def test_derivatives(before: str) -> None:
    """Values, jvp in all floats, vjp in each and all, against a dense matrix."""
    case = problem(before)
    f, g = fused(case), dense(case)
    close(jax.jit(f)(*case.floats), g(*case.floats))
    directions = tuple(np.roll(v, 1, 0) for v in case.floats)
    push = lambda run: jax.jit(lambda *v: jax.jvp(run, v, directions))(*case.floats)  # noqa: E731
    close(push(f), push(g))
    loss = lambda run: lambda *v: jnp.sin(run(*v)).sum()  # noqa: E731
    gradients = jax.jit(jax.grad(loss(f), ALL))(*case.floats)
    close(gradients, jax.grad(loss(g), ALL)(*case.floats))
    for i in ALL:
        close(jax.jit(jax.grad(loss(f), i))(*case.floats), gradients[i])


@both
def test_second_derivatives(before: str) -> None:
    case = problem(before)

    def hvp(run: Any) -> Any:
        loss = lambda *v: jnp.sin(run(*v)).sum()  # noqa: E731
        grad = jax.grad(loss, ALL)
        forward = jax.jvp(grad, case.floats, case.floats)[1]
        inner = lambda *v: sum(jnp.vdot(a, b) for a, b in zip(grad(*v), case.floats, strict=True))  # noqa: E731
        return forward, jax.grad(inner, ALL)(*case.floats)

    forward, backward = jax.jit(lambda: hvp(fused(case)))()
    close(forward, hvp(dense(case))[0])
    close(backward, forward)


@both
@pytest.mark.parametrize("act_bits", [2, 8])
def test_derivatives_pass_straight_through_the_rounding(before: str, act_bits: int) -> None:
    case = problem(before, act_bits)
    grad = lambda run: jax.jit(jax.grad(lambda *v: jnp.sin(run(*v)).sum(), ALL))(*case.floats)  # noqa: E731
    close(grad(fused(case)), grad(composed(case)))


@both
def test_maps(before: str) -> None:
    """Over all floats, over x and residual alone, nested, and with gradients inside and outside."""
    case = problem(before, lead=(2,))
    f, g = fused(case), dense(case)
    looped = np.stack([g(*(v[i] for v in case.floats)) for i in range(2)])
    close(jax.jit(jax.vmap(f))(*case.floats), looped)

    x, *middle, residual = case.floats
    first = [v[0] for v in middle]
    rows = (0, *[None] * 4, 0)
    close(
        jax.jit(jax.vmap(f, rows))(x, *first, residual),
        np.stack([g(x[i], *first, residual[i]) for i in range(2)]),
    )
    twice = jax.vmap(jax.vmap(f, rows), (None, *[0] * 4, None))
    expected = np.stack(
        [[g(x[i], *(v[j] for v in middle), residual[i]) for i in range(2)] for j in range(2)]
    )
    close(jax.jit(twice)(x, *middle, residual), expected)

    of_grad = lambda run: jax.vmap(jax.grad(lambda *v: jnp.sin(run(*v)).sum(), ALL))  # noqa: E731
    grad_of = lambda run: jax.grad(lambda *v: jnp.sin(jax.vmap(run)(*v)).sum(), ALL)  # noqa: E731
    expected_gradients = of_grad(g)(*case.floats)
    close(jax.jit(of_grad(f))(*case.floats), expected_gradients)
    close(jax.jit(grad_of(f))(*case.floats), expected_gradients)


@both
def test_derivatives_of_nested_maps(before: str) -> None:
    """jvp, gradient and hvp, over layers and over rows of x and residual."""
    case = problem(before, lead=(2,))
    rows = (0, *[None] * 4, 0)

    def derive(run: Any) -> Any:
        loss = lambda *v: jnp.sin(run(*v)).sum()  # noqa: E731
        grad = jax.grad(loss, ALL)
        return jax.jvp(lambda *v: (run(*v), grad(*v)), case.floats, case.floats)

    def looped(x: Any, *rest: Any) -> Any:
        *layers, residual = rest
        each = [
            dense(case)(x[i], *(v[j] for v in layers), residual[i])
            for j in range(2)
            for i in range(2)
        ]
        return jnp.stack(each).reshape(2, 2, *each[0].shape)

    nested = jax.vmap(jax.vmap(fused(case), rows), (None, *[0] * 4, None))
    close(jax.jit(lambda: derive(nested))(), jax.jit(lambda: derive(looped))())


@both
def test_scan_of_gradients(before: str) -> None:
    """A residual stream through stacked layers, and its gradient in all of them."""
    case = problem(before, lead=(3,))
    x, *layers, stream = case.floats

    def through(run: Any) -> Any:
        def step(y: Any, each: Any) -> Any:
            x, *layer = each
            return run(x, *layer, y), None

        def loss(stream: Any, layers: Any) -> Any:
            return jnp.sin(jax.lax.scan(step, stream, (x, *layers))[0]).sum()

        return jax.jit(jax.value_and_grad(loss, (0, 1)))(stream[0], layers)

    close(through(fused(case)), through(dense(case)))


# --- devices ---

PLACES = {
    "columns": (P(), P(None, "model"), P(None, None, "model")),
    "rows": (P(None, None, "model"), P("model", None), P()),
    "data": (P("data"), P(None, None), P("data")),
}
"""Specs of x [2, 8, K], the matrix (K, N) and the residual [2, 8, N]."""


def on_mesh(before: str, place: str, mesh: jax.sharding.Mesh) -> tuple[Any, Any]:
    """Operands, whole and on the mesh."""
    rng = np.random.default_rng(6)
    k, n = 512, 256
    w = ap.quantize(rng.normal(size=(k, n)).astype(np.float32), 4, group_size=32).prepare()
    x = rng.normal(size=(2, 8, k if before == "norm" else 2 * k)).astype(np.float32)
    scale, residual = np.ones(k, np.float32), rng.normal(size=(2, 8, n)).astype(np.float32)
    x_spec, w_spec, residual_spec = PLACES[place]
    put = lambda v, spec: jax.device_put(v, NamedSharding(mesh, spec))  # noqa: E731
    placed = (
        put(x, x_spec), ap.shard(w, mesh, w_spec), put(scale, P()), put(residual, residual_spec),
    )  # fmt: skip
    return (x, w, scale, residual), placed


def on_devices(before: str, *, whole: bool = False) -> Any:
    def run(x: Any, w: Any, scale: Any, residual: Any) -> jax.Array:
        how = ap.RMSNorm(scale, EPS) if before == "norm" else ap.SwiGLU()
        if whole:
            return residual + ap.matmul(how(x), w, act_bits=8)
        return ap.matmul(x, w, before=how, residual=residual, act_bits=8)

    return jax.jit(run)


def agrees(found: Any, expected: Any) -> None:
    """To rounding: parts of rows are summed in another order, and a code may round otherwise."""
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-3 * np.abs(expected).max())


@both
@pytest.mark.parametrize("place", PLACES)
def test_automatic_sharding(before: str, place: str) -> None:
    """With the communication of the composition, and the same results."""
    operands, placed = on_mesh(before, place, make_mesh())
    programs = [on_devices(before, whole=whole).lower(*placed).compile() for whole in (False, True)]
    found, expected = (collectives(program) for program in programs)
    assert found == expected
    np.testing.assert_array_equal(programs[0](*placed), programs[1](*placed))
    agrees(programs[0](*placed), on_devices(before)(*operands))


@both
@pytest.mark.parametrize("place", ["columns", "data"])
def test_explicit_axes(before: str, place: str) -> None:
    mesh = make_mesh(AxisType.Explicit)
    operands, placed = on_mesh(before, place, mesh)
    expected = on_devices(before)(*operands)
    for run in (on_devices(before), jax.vmap(on_devices(before), (0, None, None, 0))):
        with jax.set_mesh(mesh):
            found = run(*placed)
        spec = PLACES[place][2]
        assert tuple(jax.typeof(found).sharding.spec) == (*spec, *[None] * (3 - len(spec)))
        agrees(found, expected)
    agrees(on_devices(before)(*placed), expected)  # where arrays alone say which mesh it is


@both
def test_shard_map(before: str) -> None:
    """Columns on each device; the derivative of the whole x is summed over them."""
    mesh = make_mesh()
    operands, _ = on_mesh(before, "columns", mesh)
    x_spec, w_spec, residual_spec = PLACES["columns"]

    def part(x: Any, w: Any, scale: Any, residual: Any) -> jax.Array:
        return on_devices(before)(x, ap.local_part(w), scale, residual)

    shared = jax.shard_map(
        part, mesh=mesh, out_specs=residual_spec,
        in_specs=(x_spec, ap.partition_specs(operands[1], w_spec), P(), residual_spec),
    )  # fmt: skip
    agrees(jax.jit(shared)(*operands), on_devices(before)(*operands))
    floats = (0, 2, 3)
    grad = lambda run: jax.jit(jax.grad(lambda *v: jnp.sin(run(*v)).sum(), floats))(*operands)  # noqa: E731
    close(grad(shared), grad(on_devices(before)))


# --- errors ---

X = np.ones((2, 64), np.float32)
SCALE = np.ones(64, np.float32)
W = ap.QuantizedTensor.from_codes(np.zeros((3, 64), np.uint8), np.ones((3, 1), np.float32), bits=4)
NORM = ap.RMSNorm(SCALE, EPS)


@pytest.mark.parametrize(
    ("x", "options", "error", "message"),
    [
        (X, {"before": ap.SwiGLU()}, ValueError,
         "x must have 128 values in its last axis, gate and up for the 64 that w has, got (2, 64)"),
        (X[:, :32], {"before": NORM}, ValueError,
         "x must have 64 values in its last axis as w has, got (2, 32)"),
        (X, {"before": "swiglu"}, TypeError,
         "before must be None, an RMSNorm or a SwiGLU, got 'swiglu'"),
        (X, {"before": ap.SwiGLU}, TypeError, "before must be None, an RMSNorm or a SwiGLU, got <"),
        (X, {"before": ap.RMSNorm(SCALE[:32], EPS)}, ValueError,
         "scale of RMSNorm must have shape (64,), got (32,)"),
        (X, {"before": ap.RMSNorm(SCALE.astype(int), EPS)}, TypeError,
         "scale of RMSNorm must be float32, bfloat16 or float16, got int64"),
        (X, {"before": ap.RMSNorm(1.0, EPS)}, TypeError,
         "scale of RMSNorm must be an array, got float"),
        (X, {"residual": np.ones((2, 4), np.float32)}, ValueError,
         "residual must have shape (2, 3), got (2, 4)"),
        (X, {"residual": np.ones(3, np.float32)}, ValueError,
         "residual must have shape (2, 3), got (3,)"),
        (X, {"residual": np.ones((2, 3), np.int32)}, TypeError,
         "residual must be float32, bfloat16 or float16, got int32"),
        (X, {"residual": 1.0}, TypeError, "residual must be an array, got float"),
        (X.astype(np.float64), {"before": NORM}, TypeError,
         "x must be float32, bfloat16 or float16, got float64"),
    ],
)  # fmt: skip
def test_errors(x: Any, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        ap.matmul(x, W, **options)


@pytest.mark.parametrize(
    ("eps", "error", "message"),
    [
        (-1e-6, ValueError, "eps must be finite and at least 0, got -1e-06"),
        (float("nan"), ValueError, "eps must be finite and at least 0, got nan"),
        (float("inf"), ValueError, "eps must be finite and at least 0, got inf"),
        ("1e-5", TypeError, "eps must be a number known at trace time, got '1e-5'"),
        (True, TypeError, "eps must be a number known at trace time, got True"),
        (None, TypeError, "eps must be a number known at trace time, got None"),
        (np.ones(1), TypeError, "eps must be a number known at trace time, got array"),
    ],
)
def test_bad_eps(eps: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        ap.RMSNorm(SCALE, eps)


def test_a_traced_eps() -> None:
    with pytest.raises(TypeError, match="eps must be a number known at trace time, got "):
        jax.jit(lambda eps: ap.matmul(X, W, before=ap.RMSNorm(SCALE, eps)))(EPS)


def test_numpy_numbers_are_an_eps() -> None:
    expected = ap.matmul(X, W, before=NORM)
    found = ap.matmul(X, W, before=ap.RMSNorm(SCALE, np.float64(EPS)))
    np.testing.assert_array_equal(found, expected)


def test_an_implementation_by_name() -> None:
    """Asked for by name it is refused where it can't run, as without norm and residual."""
    with pytest.raises(ap.Unavailable):
        ap.matmul(X, W, before=NORM, implementation="cuda")
    with pytest.raises(ValueError, match="implementation must be None or one of"):
        ap.matmul(X, W, before=NORM, implementation="tpu")
