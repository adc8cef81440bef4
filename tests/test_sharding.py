"""Products over eight devices: what each holds, what they say to each other, and equal results."""

from __future__ import annotations

import collections
import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_anyprec as ap
from jax_anyprec import partition

K, N, M = 512, 256, 8
RNG = np.random.default_rng(0)

# Specs of x [2, M, K] and of the matrix (K, N) on a mesh of 2 x 4; whether K is cut.
SPLITS = {
    "data": (P("data"), P(None, None)),
    "column": (P(), P(None, "model")),
    "row": (P(None, None, "model"), P("model", None)),
    "row, x whole": (P(), P("model", None)),
    "data and column": (P("data"), P(None, "model")),
    "data and row": (P("data", None, "model"), P("model", None)),
    "row and column": (P(None, None, "model"), P("model", "data")),
    "both axes on N": (P(), P(None, ("data", "model"))),
    "both axes on K": (P(None, None, ("data", "model")), P(("data", "model"), None)),
}
# Options of quantize and of matmul.
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "groups": ({"group_size": 32}, {"act_bits": 8}),
    "one scale a token": ({"group_size": 32}, {"act_bits": 8, "act_scales": "token"}),
    "rotated": ({"rotation": ap.Rotation(64, 3), "group_size": 32}, {"act_bits": 4}),
    "one scale": ({"rotation": ap.Rotation(64, 3)}, {"act_bits": 2}),
    "float activations": ({}, {}),
    "offsets": ({"group_size": 64}, {"act_bits": 8}),
}


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def make_mesh(kind: AxisType = AxisType.Auto) -> jax.sharding.Mesh:
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind, kind))


def collectives(compiled: Any) -> dict[str, int]:
    """How often each collective operation stands in a compiled program."""
    names = "all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all"
    found = re.findall(rf"= \S+ ({names})(?:-start)?\(", compiled.as_text())
    return dict(collections.Counter(found))


def operands(kind: str, prepared: bool) -> tuple[np.ndarray, ap.QuantizedTensor, np.ndarray]:
    w = ap.quantize(normal(K, N), 4, **KINDS[kind][0])
    if kind == "offsets":
        w = dataclasses.replace(w, offsets=normal(*w.scales.shape))
    return normal(2, M, K), w.prepare() if prepared else w, normal(N)


def place(
    mesh: jax.sharding.Mesh, split: str, x: Any, w: ap.QuantizedTensor, bias: Any
) -> tuple[jax.Array, ap.QuantizedTensor, jax.Array]:
    x_spec, w_spec = SPLITS[split]
    put = lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec))  # noqa: E731
    return put(x, x_spec), ap.shard(w, mesh, w_spec), put(bias, P(w_spec[1]))


def cuts_k(split: str) -> bool:
    return SPLITS[split][1][0] is not None


def result_spec(split: str) -> P:
    x_spec, w_spec = SPLITS[split]
    return P(x_spec[0] if len(x_spec) else None, None, w_spec[1])


def expected_collectives(split: str, kind: str) -> dict[str, int]:
    """One sum where K is cut; before it the largest magnitude, where K has one activation scale."""
    if not cuts_k(split):
        return {}
    w_options, options = KINDS[kind]
    one_scale = "group_size" not in w_options or options.get("act_scales") == "token"
    return {"all-reduce": 1 + (one_scale and "act_bits" in options)}


def check(found: Any, expected: Any, split: str) -> None:
    """Bit for bit where K is whole; the integers are the same where it is cut, sums are not."""
    if cuts_k(split):
        largest = np.abs(expected).max()
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * largest)
    else:
        np.testing.assert_array_equal(found, expected)


def check_derivative(found: Any, expected: Any) -> None:
    """Equal up to the roundings of products' sums, in sums whose terms cancel."""
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


# Each way to split in each layout, each kind split in each way, and each kind in each layout.
IN_TURN = [
    pytest.param(kind, (i + j) % 2 == 1, split, id=f"{kind}, {split}")
    for i, kind in enumerate(KINDS)
    for j, split in enumerate(SPLITS)
]


@pytest.mark.parametrize(("kind", "prepared", "split"), IN_TURN)
def test_automatic_sharding(kind: str, prepared: bool, split: str) -> None:
    mesh = make_mesh()
    x, w, bias = operands(kind, prepared)
    options = KINDS[kind][1]
    run = jax.jit(lambda x, w, bias: ap.matmul(x, w, bias=bias, **options))
    placed = place(mesh, split, x, w, bias)
    compiled = run.lower(*placed).compile()
    assert collectives(compiled) == expected_collectives(split, kind)
    found = compiled(*placed)
    assert found.sharding.is_equivalent_to(NamedSharding(mesh, result_spec(split)), 3)
    check(found, ap.matmul(x, w, bias=bias, **options), split)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kind", ["groups", "one scale"])
def test_explicit_axes(kind: str, split: str) -> None:
    mesh = make_mesh(AxisType.Explicit)
    x, w, bias = operands(kind, kind == "groups")
    options = KINDS[kind][1]
    expected = ap.matmul(x, w, bias=bias, **options)
    with jax.set_mesh(mesh):
        placed = place(mesh, split, x, w, bias)
        run = jax.jit(lambda x, w, bias: ap.matmul(x, w, bias=bias, **options))
        compiled = run.lower(*placed).compile()
        assert collectives(compiled) == expected_collectives(split, kind)
        assert jax.typeof(run(*placed)).sharding.spec == result_spec(split)
        check(compiled(*placed), expected, split)


@pytest.mark.parametrize("prepared", [False, True], ids=["planes", "prepared"])
@pytest.mark.parametrize("split", ["data", "column", "row"])
def test_shard_map(split: str, prepared: bool) -> None:
    """With varying axes checked; derivatives of what is whole are summed over the devices."""
    mesh = make_mesh()
    x, w, bias = operands("groups", prepared)
    x_spec, w_spec = SPLITS[split]

    def part(x: jax.Array, w: ap.QuantizedTensor, bias: jax.Array) -> jax.Array:
        y = ap.matmul(x, ap.local_part(w), act_bits=8)
        return (jax.lax.psum(y, "model") if cuts_k(split) else y) + bias

    specs = (x_spec, ap.partition_specs(w, w_spec), P(w_spec[1]))
    shared = jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=result_spec(split))
    whole = lambda x, w, bias: ap.matmul(x, w, act_bits=8) + bias  # noqa: E731
    check(jax.jit(shared)(x, w, bias), whole(x, w, bias), split)

    def gradients(run: Any) -> Any:
        def loss(x: Any, scales: Any, bias: Any) -> jax.Array:
            return jnp.sin(run(x, dataclasses.replace(w, scales=scales), bias)).sum()

        return jax.jit(jax.grad(loss, (0, 1, 2)))(x, w.scales, bias)

    for found, expected in zip(gradients(shared), gradients(whole), strict=True):
        check_derivative(found, expected)


def test_partly_manual_shard_map() -> None:
    mesh = make_mesh()
    x, w, _ = operands("groups", False)
    w_spec = P(None, "model")
    placed = ap.shard(w, mesh, w_spec)
    run = jax.shard_map(
        lambda x, w: ap.matmul(x, w, act_bits=8),
        mesh=mesh,
        in_specs=(P("data"), jax.tree.map(lambda _: P(), w)),
        out_specs=P("data"),
        axis_names={"data"},
    )
    # JAX does not tell the partitioner of a custom call how its operands lie here: it gathers them.
    np.testing.assert_array_equal(jax.jit(run)(x, placed), ap.matmul(x, w, act_bits=8))


@pytest.mark.parametrize("axes", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("split", ["column", "row", "data and row"])
def test_derivatives(split: str, axes: AxisType) -> None:
    mesh = make_mesh(axes)
    # A rotated x can't be split in blocks along an explicit axis, by JAX's rules for reshape.
    x, w, bias = operands("rotated" if axes == AxisType.Auto else "groups", True)

    def loss(x: Any, scales: Any, bias: Any, w: ap.QuantizedTensor) -> jax.Array:
        y = ap.matmul(x, dataclasses.replace(w, scales=scales), bias=bias, act_bits=8)
        return jnp.sin(y).sum()

    gradient = jax.jit(jax.grad(loss, (0, 1, 2)))
    with jax.set_mesh(mesh):
        placed_x, placed_w, placed_bias = place(mesh, split, x, w, bias)
        found = gradient(placed_x, placed_w.scales, placed_bias, placed_w)
    for a, b in zip(found, gradient(x, w.scales, bias, w), strict=True):
        check_derivative(a, b)


@pytest.mark.parametrize("split", ["data", "column", "row", "row and column"])
@pytest.mark.parametrize("kind", ["groups", "one scale"])
def test_integer_products_are_exact(kind: str, split: str) -> None:
    mesh = make_mesh()
    _, w, _ = operands(kind, True)
    codes = RNG.integers(0, 16, (2, M, K), np.uint8)
    placed, placed_w, _ = place(mesh, split, codes, w, normal(N))
    compiled = jax.jit(lambda c, w: ap.int_matmul(c, w, 4)).lower(placed, placed_w).compile()
    summed = cuts_k(split) and kind == "one scale"
    assert collectives(compiled) == ({"all-reduce": 1} if summed else {})
    np.testing.assert_array_equal(compiled(placed, placed_w), ap.int_matmul(codes, w, 4))


@pytest.mark.parametrize("spec", [P("data"), P(None, None, "model"), P("data", None, "model")])
def test_quantized_activations_stay_where_they_are(spec: P) -> None:
    mesh, x = make_mesh(), normal(2, M, K)
    placed = jax.device_put(x, NamedSharding(mesh, spec))
    options = {"group_size": 32, "rotation": ap.Rotation(64, 3)}
    run = jax.jit(lambda x: ap.quantize_activations(x, 4, **options))
    compiled = run.lower(placed).compile()
    assert collectives(compiled) == {}
    for a, b in zip(compiled(placed), ap.quantize_activations(x, 4, **options), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("implementation", ["cpu", "xla"])
@pytest.mark.parametrize("k", [80, 144])
def test_k_that_is_no_multiple_of_words_is_not_cut(k: int, implementation: str) -> None:
    """Even if the activations are: a part would end within a word."""
    mesh = make_mesh()
    x, w = normal(4, k), ap.quantize(normal(k, N), 3)
    codes = RNG.integers(0, 16, (4, k), np.uint8)
    put = lambda a: jax.device_put(a, NamedSharding(mesh, P(None, "data")))  # noqa: E731

    def run(x: Any, codes: Any) -> Any:
        options = {"implementation": implementation}
        products = ap.matmul(x, w, act_bits=8, **options), ap.int_matmul(codes, w, 4, **options)
        return *products, ap.quantize_activations(x, 4, **options)

    found, expected = jax.jit(run)(put(x), put(codes)), run(x, codes)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("x_spec", "w_spec"),
    [(P(None, None, "model"), P(None, "model")), (P("data"), P("data", None))],
)
def test_weights_stay_where_they_are_if_activations_lie_otherwise(x_spec: P, w_spec: P) -> None:
    mesh = make_mesh()
    x, w, _ = operands("groups", True)
    placed = jax.device_put(x, NamedSharding(mesh, x_spec)), ap.shard(w, mesh, w_spec)
    compiled = jax.jit(lambda x, w: ap.matmul(x, w, act_bits=8)).lower(*placed).compile()
    kinds = r"(all-gather|all-to-all|collective-permute)(-start)?\("
    moved = [line for line in compiled.as_text().splitlines() if re.search(kinds, line)]
    assert moved
    assert not [line for line in moved if "u32[" in line]
    np.testing.assert_allclose(compiled(*placed), ap.matmul(x, w, act_bits=8), atol=1e-3)


@pytest.mark.parametrize("implementation", ["cpu", "xla"])
def test_a_token_that_is_not_finite_on_one_device_is_so_on_all(implementation: str) -> None:
    mesh = make_mesh()
    x, w, _ = operands("one scale", True)
    x[0, 1, 3], x[1, 2, K - 1] = np.inf, np.nan
    run = jax.jit(lambda x, w: ap.matmul(x, w, act_bits=8, implementation=implementation))
    found = run(jax.device_put(x, NamedSharding(mesh, P(None, None, "model"))),
                ap.shard(w, mesh, P("model")))  # fmt: skip
    expected = ap.matmul(x, w, act_bits=8, implementation=implementation)
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
    assert np.isnan(expected[0, 1]).all()


def test_a_mapped_axis_stays_on_its_devices() -> None:
    mesh = make_mesh()
    x, w, _ = operands("groups", True)
    placed = jax.device_put(x, NamedSharding(mesh, P("data")))
    run = jax.jit(jax.vmap(lambda x, w: ap.matmul(x, w, act_bits=8), (0, None)))
    placed_w = ap.shard(w, mesh, P(None, "model"))
    compiled = run.lower(placed, placed_w).compile()
    assert collectives(compiled) == {}
    np.testing.assert_array_equal(compiled(placed, placed_w), ap.matmul(x, w, act_bits=8))


def test_embedding_is_cut_over_its_vocabulary() -> None:
    mesh = make_mesh()
    table = ap.quantize(normal(64, N), 8, group_size=32).prepare()
    ids = np.array([[0, 1, N - 1], [31, 32, 64]])

    def run(ids: jax.Array, table: ap.QuantizedTensor) -> tuple[jax.Array, jax.Array]:
        embed = ap.nnx.QuantEmbed(table)
        x = embed(ids)
        return x, embed.attend(x)

    placed = ap.shard(table, mesh, P(None, "model"))
    compiled = jax.jit(run).lower(ids, placed).compile()
    assert "all-gather" not in collectives(compiled)
    for found, expected in zip(compiled(ids, placed), run(ids, table), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spec", [P(None, "model"), P("model", None)])
@pytest.mark.parametrize("axes", [AxisType.Auto, AxisType.Explicit])
def test_quantize_of_a_cut_matrix(axes: AxisType, spec: P) -> None:
    mesh, weights = make_mesh(axes), normal(K, N)
    with jax.set_mesh(mesh):
        found = ap.quantize(jax.device_put(weights, NamedSharding(mesh, spec)), 4, group_size=32)
    expected = ap.quantize(weights, 4, group_size=32)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kind", ["QuantLinear", "QuantDense"])
@pytest.mark.parametrize("axes", [AxisType.Auto, AxisType.Explicit])
def test_layers_are_cut_as_products_are(kind: str, axes: AxisType) -> None:
    mesh = make_mesh(axes)
    x, w, bias = operands("groups", True)

    def run(x: jax.Array, w: ap.QuantizedTensor, bias: jax.Array) -> jax.Array:
        if kind == "QuantLinear":
            return ap.nnx.QuantLinear.from_tensor(w, bias=bias, activations=8)(x)
        variables = {"params": {"bias": bias}, ap.linen.COLLECTION: {"kernel": w}}
        return ap.linen.QuantDense(N, activations=8).apply(variables, x)

    with jax.set_mesh(mesh):
        placed = place(mesh, "data and column", x, w, bias)
        compiled = jax.jit(run).lower(*placed).compile()
        assert collectives(compiled) == {}
        found = np.asarray(compiled(*placed))
    np.testing.assert_array_equal(found, run(x, w, bias))


def test_integer_operations_under_explicit_axes_and_shard_map() -> None:
    mesh = make_mesh(AxisType.Explicit)
    x, w, _ = operands("groups", True)
    codes = RNG.integers(0, 16, (2, M, K), np.uint8)
    spec = P(None, "model")
    products = lambda c, w: ap.int_matmul(c, w, 4)  # noqa: E731
    rounded = lambda x: ap.quantize_activations(x, 4, group_size=32)  # noqa: E731
    with jax.set_mesh(mesh):
        put = lambda a: jax.device_put(a, NamedSharding(mesh, P("data")))  # noqa: E731
        y = jax.jit(products)(put(codes), ap.shard(w, mesh, spec))
        assert jax.typeof(y).sharding.spec == P("data", None, "model", None)
        np.testing.assert_array_equal(y, ap.int_matmul(codes, w, 4))
        found = jax.jit(rounded)(put(x))
        assert jax.typeof(found[0]).sharding.spec == P("data", None, None)
    mesh = make_mesh()
    by_hand = jax.shard_map(
        lambda c, w: products(c, ap.local_part(w)),
        mesh=mesh,
        in_specs=(P("data"), ap.partition_specs(w, spec)),
        out_specs=P("data", None, "model"),
    )
    np.testing.assert_array_equal(jax.jit(by_hand)(codes, w), ap.int_matmul(codes, w, 4))
    by_hand = jax.shard_map(
        rounded, mesh=mesh, in_specs=P(None, None, "model"), out_specs=(P(None, None, "model"),) * 2
    )
    for part, a, b in zip(jax.jit(by_hand)(x), found, rounded(x), strict=True):
        np.testing.assert_array_equal(part, b)
        np.testing.assert_array_equal(a, b)


# --- shardings of a tensor ---


def test_partition_specs() -> None:
    w = ap.quantize(normal(2, K, N), 3, group_size=64)
    specs = ap.partition_specs(w, P("expert", "k", "n"))
    assert specs.planes == P("expert", None, "n", "k")
    assert specs.scales == P("expert", "n", "k")
    assert specs.offsets is None
    specs = ap.partition_specs(w.prepare(), P(None, "k", "n"))
    assert specs.planes == P(None, "n", "k", None, None)
    assert specs.scales == P(None, "n", "k", None)
    one_scale = ap.partition_specs(ap.quantize(normal(K, N), 3), P("k"))
    assert (one_scale.planes, one_scale.scales) == (P(None, None, "k"), P(None, None))
    with pytest.raises(ValueError, match="spec must have at most 2 axes"):
        ap.partition_specs(ap.quantize(normal(K, N), 3), P(None, None, "k"))


@pytest.mark.parametrize(
    ("k", "n", "options", "prepared", "spec", "message"),
    [
        (256, 130, {}, False, P(None, "model"), "N = 130 can't be cut in 4 parts.*pad N to 132"),
        (256, 96, {}, True, P(None, "model"), "multiple of 32 .*whole tiles.*pad N to 128"),
        (96, 64, {}, False, P("model"), "K = 96 .*multiple of 32 .*whole words.*pad K to 128"),
        (192, 64, {"group_size": 96}, False, P("model"), "multiple of 96 .*pad K to 384"),
        (192, 64, {"rotation": ap.Rotation(64)}, False, P("model"), "multiple of 64 .*to 256"),
        (192, 64, {}, False, P(("data", "model")), "in 8 parts.*pad K to 256"),
        (192, 64, {}, False, P("expert"), "spec must name axes of the mesh .*got .'expert'"),
    ],
)
def test_uneven_sizes_say_what_to_pad(
    k: int, n: int, options: dict[str, Any], prepared: bool, spec: P, message: str
) -> None:
    w = ap.quantize(normal(k, n), 2, **options)
    with pytest.raises(ValueError, match=message):
        ap.shard(w.prepare() if prepared else w, make_mesh(), spec)


def test_rotated_parts_of_k_are_refused_in_shard_map() -> None:
    _, w, _ = operands("rotated", False)
    mesh = make_mesh()
    specs = ap.partition_specs(w, P("model"))
    run = jax.shard_map(
        lambda w: ap.local_part(w).planes, mesh=mesh, in_specs=(specs,), out_specs=specs.planes
    )
    with pytest.raises(ValueError, match="w must not be rotated where shard_map cuts K"):
        run(w)


def test_padded_tiles_are_refused_in_shard_map() -> None:
    w = ap.quantize(normal(64, 40), 3).prepare()
    mesh = jax.make_mesh((2,), ("n",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    specs = ap.partition_specs(w, P(None, "n"))
    run = jax.shard_map(
        lambda w: ap.local_part(w).planes, mesh=mesh, in_specs=(specs,), out_specs=specs.planes
    )
    with pytest.raises(ValueError, match=r"w must have whole tiles of 32 columns .* N = 40"):
        run(w)


def test_rule_of_a_prepared_product() -> None:
    w = ap.quantize(normal(256, 128), 4, group_size=64).prepare()
    params = {"group_size": 64, "act_group_size": 64, "block": 0, "columns": 128}
    x = jax.ShapeDtypeStruct((3, 256), jnp.float32)
    rule = partition.matmul_rule(x, w.planes, w.scales, {}, params)
    text, options = partition.shardy_rule(rule)
    assert text == "m0 (u r), t (u w) b l, t u l -> m0 (t l)"
    assert options["reduction_factors"] == ("u",)
    assert options["need_replication_factors"] == ("r", "w", "b", "l")
    chosen = partition.assign(rule, [P("a", "b"), P(), P()], {"a": 2, "b": 8}.__getitem__)
    assert chosen == {}  # 3 rows in 2 parts, 4 groups in 8
