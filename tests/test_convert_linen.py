"""Conversion of Linen models: what is found, what it becomes, and that nothing else changes."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from flax import struct
from flax.core import FrozenDict, freeze, meta
from flax.linen.dtypes import promote_dtype

import jax_anyprec as ap
from jax_anyprec.linen import find
from jax_anyprec.linen.convert import plan_linen, quantize_linen
from jax_anyprec.linen.quantized import Quantized

D = 32
RNG = np.random.default_rng(7)
KEY = jax.random.key(0)
W8 = ap.Quantization(weights=8, activations=None)
W4A8 = ap.Quantization(weights=4, activations=8)
NORMAL = nn.initializers.normal(0.5)


def normal(*shape: int) -> Any:
    return RNG.standard_normal(shape).astype(np.float32)


def error(found: Any, expected: Any) -> float:
    found, expected = np.asarray(found, np.float32), np.asarray(expected, np.float32)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def equal(found: Any, expected: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def shapes(tree: Any) -> Any:
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


def flat(tree: Any) -> dict[str, Any]:
    return {"/".join(path): leaf for path, leaf in find.flatten(tree)}


def init(module: nn.Module, *inputs: Any) -> Any:
    """The variables of a module, compiled as a whole."""
    return quick.jit(lambda: module.init(KEY, *inputs))()


def dequantize(w: ap.QuantizedTensor) -> np.ndarray:
    return np.asarray(quick.jit(ap.QuantizedTensor.dequantize)(w))


def reasons(module: nn.Module, variables: Any, *inputs: Any, **options: Any) -> dict[str, str]:
    plan = plan_linen(module, W8, variables, *inputs, errors=False, **options)
    return {layer.path: layer.reason for layer in plan.layers}


# --- layers of Flax ---

LAYERS: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...]]] = {
    "dense": (lambda **o: nn.Dense(9, bias_init=NORMAL, **o), (3, 2, D)),
    "dense without bias": (lambda **o: nn.Dense(9, use_bias=False, **o), (D,)),
    "heads": (lambda **o: nn.DenseGeneral((2, 5), bias_init=NORMAL, **o), (3, D)),
    "from heads": (
        lambda **o: nn.DenseGeneral(7, axis=(-2, -1), bias_init=NORMAL, **o),
        (3, 2, 16),
    ),
    "axes apart": (
        lambda **o: nn.DenseGeneral((4, 3), axis=(-1, 1), bias_init=NORMAL, **o),
        (2, 4, 3, 8),
    ),
    "batch": (
        lambda **o: nn.DenseGeneral((2, 3), axis=-1, batch_dims=(0,), bias_init=NORMAL, **o),
        (4, 5, D),
    ),
    "einsum": (
        lambda **o: nn.Einsum((D, 2, 3), "abc,cde->aebd", bias_init=NORMAL, **o),
        (2, 3, D),
    ),
    "experts": (
        lambda **o: nn.Einsum((4, D, 6), "e...d,edf->e...f", bias_init=NORMAL, **o),
        (4, 5, D),
    ),
}


@pytest.mark.parametrize(
    ("name", "dtypes"),
    [
        *((name, "float32") for name in LAYERS),
        *((name, dtypes) for name in ("dense", "batch", "einsum")
          for dtypes in ("bfloat16", "mixed", "computed in bfloat16")),
    ],
)  # fmt: skip
def test_eight_bits_are_close_to_float(name: str, dtypes: str) -> None:
    make, shape = LAYERS[name]
    layer = make(dtype=jnp.bfloat16 if "computed" in dtypes else None)
    x = jnp.asarray(normal(*shape), "bfloat16" if dtypes in ("bfloat16", "mixed") else "float32")
    variables = init(layer, x)
    if dtypes == "bfloat16":  # as users cast parameters, whatever the module's param_dtype says
        variables = jax.tree.map(lambda p: p.astype(jnp.bfloat16), variables)
    quantized, packed = quantize_linen(layer, W8, variables, x)
    assert set(flat(packed["packed"])) == {"kernel"}
    assert set(flat(packed["params"])) == set(flat(variables["params"])) - {"kernel"}
    found, expected = quantized.apply(packed, x), layer.apply(variables, x)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert error(found, expected) < 0.02


def test_activations_are_quantized_as_the_setting_says() -> None:
    layer, x = nn.Dense(9), normal(3, D)
    variables = init(layer, x)
    options = ap.Quantization(3, 4, group_size=32, scales="absmax", act_scales="token")
    quantized, packed = quantize_linen(layer, options, variables, x)
    w = ap.quantize(variables["params"]["kernel"], 3, group_size=32, scales="absmax")
    equal(packed["packed"]["kernel"], w)
    bias = variables["params"]["bias"]
    expected = ap.matmul(x, w, bias=bias, act_bits=4, act_scales="token")
    equal(quantized.apply(packed, x), expected)


def test_einsum_may_have_its_equation_and_output_dtype_from_the_call() -> None:
    layer = nn.Einsum((D, 5), use_bias=False, preferred_element_type=jnp.float32)
    x = jnp.asarray(normal(2, D), jnp.bfloat16)
    variables = jax.tree.map(lambda p: p.astype(x.dtype), init(layer, x, "bd,df->bf"))
    quantized, packed = quantize_linen(layer, W8, variables, x, "bd,df->bf")
    found, expected = (
        m.apply(v, x, "bd,df->bf") for m, v in ((quantized, packed), (layer, variables))
    )
    assert found.dtype == expected.dtype == jnp.float32
    assert error(found, expected) < 0.02


def test_a_bias_widens_what_einsum_is_asked_for() -> None:
    layer = nn.Einsum((D, 5), "bd,df->bf", preferred_element_type=jnp.bfloat16, bias_init=NORMAL)
    x = normal(2, D)
    variables = init(layer, x)
    quantized, packed = quantize_linen(layer, W8, variables, x)
    found, expected = quantized.apply(packed, x), layer.apply(variables, x)
    assert found.dtype == expected.dtype == jnp.float32
    assert error(found, expected) < 0.02


class Tied(nn.Module):
    rows: int = 40
    dtype: Any = None

    def setup(self) -> None:
        self.embed = nn.Embed(self.rows, 2 * D, dtype=self.dtype)

    def __call__(self, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = self.embed(ids)
        return x, self.embed.attend(x)


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
@pytest.mark.parametrize("rows", [1, 40])
def test_embeddings_and_tied_heads(rows: int, dtype: Any) -> None:
    model, ids = Tied(rows, dtype), np.array([[0, rows - 1, -1], [rows, 0, 0]])
    variables = init(model, ids)
    rules = {"embed": ap.Quantization(weights=8, activations=None, rotate=True)}
    quantized, packed = quantize_linen(model, rules, variables, ids)
    assert packed["packed"]["embed"]["embedding"].shape == (2 * D, rows)
    for found, expected in zip(
        quantized.apply(packed, ids), model.apply(variables, ids), strict=True
    ):
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
        equal(np.isnan(found), np.isnan(expected))
        known = ~np.isnan(expected)
        assert error(found[known], expected[known]) < 0.02
    with pytest.raises(ValueError, match="inputs must be integers, got float32"):
        quantized.apply(packed, np.ones(3, np.float32))


# --- a model under lifted transforms ---


class Block(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, _: Any = None) -> tuple[jax.Array, None]:
        h = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(2, dropout_rate=0.5, deterministic=False)(h)
        return x + nn.Dense(D, name="mlp")(x), None


class Model(nn.Module):
    """A transformer whose layers `nn.scan` stacks along `axis`."""

    axis: int = 0
    remat: bool = False
    width: int = D

    def setup(self) -> None:
        self.embed = nn.Embed(40, D)
        block = nn.remat(Block) if self.remat else Block
        self.layers = nn.scan(
            block,
            variable_axes={"params": self.axis},
            split_rngs={"params": True, "dropout": True},
            length=2,
        )()
        self.norm = nn.BatchNorm(use_running_average=False)
        self.head = nn.Dense(6)

    def encode(self, ids: jax.Array) -> jax.Array:
        return self.layers(self.embed(ids), None)[0]

    def __call__(self, ids: jax.Array) -> jax.Array:
        return self.head(self.norm(self.encode(ids)))

    @nn.nowrap
    def describe(self) -> str:
        return f"of width {self.width}"


IDS = np.arange(10).reshape(2, 5)
RNGS = {"dropout": jax.random.key(3)}
RULES = {"head": W8, "embed": None, "**": W8}


def as_floats(variables: Any, packed: Any, axis: int) -> Any:
    """Float variables of what packed kernels stand for: here only reshaping and the scan's axis."""

    def kernel(path: Any, original: Any) -> Any:
        names = [key.key for key in path]
        node = packed["packed"] if names[0] == "params" else {}
        for name in names[1:]:
            node = node.get(name, {}) if isinstance(node, dict) else {}
        if not isinstance(node, ap.QuantizedTensor):
            return original
        floats = dequantize(node)
        if floats.ndim == 2:
            return floats.reshape(original.shape)
        moved = np.moveaxis(original, axis, 0)
        return np.moveaxis(floats.reshape(moved.shape), 0, axis)

    return jax.tree_util.tree_map_with_path(kernel, variables)


@pytest.mark.parametrize(("axis", "remat"), [(0, False), (1, True), (-1, False)])
def test_scanned_layers(axis: int, remat: bool) -> None:
    model = Model(axis, remat)
    variables = quick.jit(model.init)({"params": KEY, **RNGS}, IDS)
    quantized, packed = quantize_linen(model, RULES, variables, IDS)
    kernels = flat(packed["packed"])
    assert {path.split("/", 1)[1] for path in kernels if path.startswith("layers")} == {
        "mlp/kernel",
        *(f"MultiHeadDotProductAttention_0/{n}/kernel" for n in ("query", "key", "value", "out")),
    }
    assert kernels["layers/mlp/kernel"].shape == (2, D, D)

    # The same dropout, so the same numbers as with the weights that are stood for.
    def step(apply: Any, variables: Any) -> Any:
        rest = {k: v for k, v in variables.items() if k != "params"}

        def loss(params: Any) -> Any:
            out, state = apply({"params": params, **rest}, IDS, rngs=RNGS, mutable=["batch_stats"])
            return (out**2).mean(), (out, state)

        return jax.grad(loss, has_aux=True)(variables["params"])

    floats = as_floats(variables, packed, axis)
    grads, (found, state) = quick.jit(lambda v: step(quantized.apply, v))(packed)
    expected_grads, (expected, expected_state) = quick.jit(lambda v: step(model.apply, v))(floats)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), state, expected_state
    )
    assert set(flat(grads)) == set(flat(packed["params"]))
    for path, grad in flat(grads).items():
        np.testing.assert_allclose(grad, flat(expected_grads)[path], rtol=2e-2, atol=1e-3)


@pytest.fixture(scope="module")
def converted() -> tuple[Model, Any, Quantized, Any]:
    model = Model()
    variables = quick.jit(model.init)({"params": KEY, **RNGS}, IDS)
    return model, variables, *quantize_linen(model, RULES, variables, IDS)


def test_all_ways_to_call(converted: Any) -> None:
    model, _, quantized, packed = converted
    expected = quantized.apply(packed, IDS, rngs=RNGS, method="encode")
    assert expected.shape == (2, 5, D)
    for method in (Model.encode, model.encode, quantized.encode, lambda m, ids: m.encode(ids)):
        equal(quantized.apply(packed, IDS, rngs=RNGS, method=method), expected)
    equal(quantized.bind(packed, rngs=RNGS).encode(IDS), expected)
    apply = jax.jit(quantized.apply, static_argnames="mutable")
    whole, _ = apply(packed, IDS, rngs=RNGS, mutable="batch_stats")
    bound = quantized.bind(packed, rngs=RNGS, mutable=["batch_stats"])
    np.testing.assert_allclose(bound(IDS), whole, rtol=1e-4, atol=1e-5)
    mapped, _ = jax.vmap(lambda ids: apply(packed, ids[None], rngs=RNGS, mutable="batch_stats"))(
        IDS
    )
    assert mapped.shape == (2, 1, 5, 6)


def test_attributes_and_init_are_the_module_s(converted: Any) -> None:
    model, variables, quantized, _ = converted
    assert (quantized.width, quantized.describe()) == (D, "of width 32")
    assert not hasattr(quantized, "absent")
    assert isinstance(hash(quantized), int)
    initial = jax.eval_shape(quantized.init, {"params": KEY, **RNGS}, IDS)
    assert shapes(initial) == shapes(variables)
    # Without packed kernels it is the float model.
    found, _ = quantized.apply(variables, IDS, rngs=RNGS, mutable=["batch_stats"])
    equal(found, model.apply(variables, IDS, rngs=RNGS, mutable=["batch_stats"])[0])


def test_intermediates_are_captured_at_the_same_places(converted: Any) -> None:
    model, variables, quantized, packed = converted
    found, expected = (
        jax.eval_shape(
            lambda v, m=m: m.apply(v, IDS, rngs=RNGS, capture_intermediates=True, mutable=True)[1],
            v,
        )["intermediates"]
        for m, v in ((quantized, packed), (model, variables))
    )
    assert shapes(found) == shapes(expected)


def test_a_converted_model_inside_another(converted: Any) -> None:
    model, variables, quantized, packed = converted

    class Outer(nn.Module):
        inner: nn.Module

        @nn.compact
        def __call__(self, ids: jax.Array) -> jax.Array:
            return self.inner.encode(ids)

    nested = {name: {"inner": tree} for name, tree in packed.items()}
    found = Outer(quantized).apply(nested, IDS, rngs=RNGS)
    expected = Outer(model).apply(
        {name: {"inner": t} for name, t in as_floats(variables, packed, 0).items()}, IDS, rngs=RNGS
    )
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_a_checkpoint_can_be_restored_into_shapes(converted: Any) -> None:
    model, variables, quantized, packed = converted
    abstract = jax.eval_shape(lambda: variables)
    ids = jax.ShapeDtypeStruct(IDS.shape, jnp.int32)
    other, expected = ap.quantize_model(model, RULES, abstract, ids)
    assert other == quantized
    assert jax.tree.structure(expected) == jax.tree.structure(packed)
    assert shapes(expected) == shapes(packed)


class Experts(nn.Module):
    """`nn.vmap` over experts inside of `nn.scan` over layers, each with its axis."""

    inner: int
    outer: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        experts = nn.vmap(nn.Dense, in_axes=None, variable_axes={"params": self.inner},
                          split_rngs={"params": True}, axis_size=3)  # fmt: skip

        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
                return experts(D, use_bias=False, name="experts")(x).sum(0), None

        layers = nn.scan(Layer, variable_axes={"params": self.outer},
                         split_rngs={"params": True}, length=2)  # fmt: skip
        return layers(name="layers")(x, None)[0]


@pytest.mark.parametrize(("inner", "outer"), [(0, 0), (1, 1), (0, 2), (-1, 1)])
def test_stacks_of_stacks(inner: int, outer: int) -> None:
    model, x = Experts(inner, outer), normal(4, D)
    variables = init(model, x)
    quantized, packed = quantize_linen(model, W8, variables, x)
    w = packed["packed"]["layers"]["experts"]["kernel"]
    assert w.shape == (2, 3, D, D)
    expected = x
    for layer in dequantize(w):
        expected = sum(expected @ expert for expert in layer)
    np.testing.assert_allclose(quantized.apply(packed, x), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "insertions", [(), (0,), (1,), (2,), (-1,), (0, 0), (1, 0), (0, 1), (2, -1)]
)
def test_positions_of_stacked_axes(insertions: tuple[int, ...]) -> None:
    x = np.empty((7, 8))
    for level, index in enumerate(insertions):
        x = np.stack([x] * (2 + level), axis=index)
    positions = find.stack_positions(insertions, x.ndim)
    assert [x.shape[axis] for axis in positions] == [3, 2][-len(insertions) :][: len(insertions)]


def test_decoding_with_a_cache() -> None:
    """The example call that makes the cache is longer than those that use it."""
    model, x = nn.MultiHeadDotProductAttention(2, decode=True), normal(1, 4, D)
    variables = init(model, x)
    quantized, packed = quantize_linen(model, W8, variables, x)
    cache = {"cache": variables["cache"]}
    for i in range(2):
        step = x[:, i : i + 1]
        expected, cache = model.apply({**variables, **cache}, step, mutable=["cache"])
        found, state = quantized.apply(packed, step, mutable=["cache"])
        packed = {**packed, **state}
        assert error(found, expected) < 0.02
    assert int(packed["cache"]["cache_index"]) == 2


# --- what is found ---


class Scaled(nn.Dense):
    """A subclass that calls what it overrides."""

    def __call__(self, inputs: jax.Array) -> jax.Array:
        return 2 * super().__call__(inputs)


class Own(nn.Dense):
    """A subclass that multiplies by itself."""

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        return inputs @ self.param("kernel", self.kernel_init, (D, self.features))


class OwnEmbed(nn.Embed):
    def __call__(self, inputs: jax.Array) -> jax.Array:
        return self.embedding[inputs]


class Twice(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        layer = nn.Einsum((D, D), use_bias=False, name="shared")
        return layer(layer(x, "ab,bc->ac"), "ab,cb->ac")


class Zoo(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = Scaled(D, name="scaled")(x) + Own(D, name="own")(x)
        x = x + OwnEmbed(3, D, name="own_embed")(np.array([1]))
        x = x + nn.Dense(D, dot_general=jax.lax.dot_general, name="replaced")(x)
        x = nn.LayerNorm(name="norm")(nn.Conv(D, (3,), name="conv")(x[None])[0])
        x = nn.Einsum((D, D), "ab,bc->a", use_bias=False, name="no_product")(x)[:, None] + x
        return Twice(name="twice")(x)


def test_reasons_for_float() -> None:
    model, x = Zoo(), normal(3, D)
    variables = init(model, x)
    variables["params"]["unused"] = {"kernel": normal(D, D)}
    assert reasons(model, variables, x) == {
        "scaled": 'rule "**"',
        "own": "what Own(Dense) multiplies is unknown; `calls` can describe it",
        "own_embed": "a subclass that looks up in its own way",
        "replaced": "has a dot_general of its own",
        "norm": "has no matrix",
        "conv": "convolutions stay in float",
        "no_product": "spec 'ab,bc->a' is no product of x and a weight: index 'c' is in the weight "
        "alone and would be summed out",
        "twice/shared": "is multiplied as 'ab,bc->ac' and as 'ab,cb->ac'",
        "unused": "the example inputs do not reach it",
    }
    quantized, packed = quantize_linen(model, W8, variables, x)
    assert set(flat(packed["packed"])) == {"scaled/kernel"}
    assert error(quantized.apply(packed, x), model.apply(variables, x)) < 0.02


class Vocab(nn.Embed):
    """A subclass whose name does not tell what it is."""


def test_subclasses_are_listed_with_their_base_and_treated_alike() -> None:
    model, ids = Vocab(40, D), np.array([1, 2])
    variables = init(model, ids)
    (layer,) = plan_linen(model, {"**": W8}, variables, ids).layers
    assert layer.kind == "Vocab(Embed)"
    assert layer.reason == "embedding: float unless a rule names it"


class Owning(nn.Dense):
    """A known layer with another matrix and a vector of its own."""

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        y = super().__call__(inputs) * self.param("gain", NORMAL, (D,), jnp.float32)
        return y @ self.param("table", NORMAL, (D, D), jnp.float32)


def test_matrices_beside_a_known_one_have_their_own_lines() -> None:
    model, x = Owning(D), normal(3, D)
    variables = init(model, x)
    plan = plan_linen(model, W8, variables, x, errors=False)
    assert {layer.path: layer.reason for layer in plan.layers} == {
        "": 'rule "**"',
        "table": "what Owning(Dense) multiplies is unknown; `calls` can describe it",
    }
    assert plan.bytes_before == sum(leaf.nbytes for leaf in jax.tree.leaves(variables))
    quantized, packed = quantize_linen(model, W8, variables, x)
    assert set(flat(packed["packed"])) == {"kernel"}
    assert error(quantized.apply(packed, x), model.apply(variables, x)) < 0.02


class Box(struct.PyTreeNode, meta.AxisMetadata[Any]):
    value: Any

    def unbox(self) -> Any:
        return self.value

    def replace_boxed(self, val: Any) -> Box:
        return self.replace(value=val)

    def add_axis(self, index: int, params: Any) -> Box:
        return self

    def remove_axis(self, index: int, params: Any) -> Box:
        return self


def test_weights_that_cannot_be_packed() -> None:
    layer, x = nn.Dense(D, use_bias=False), normal(2, D)
    kernel = init(layer, x)["params"]["kernel"]
    packable = "float32, float16, bfloat16 can be packed"
    for value, reason in (
        (Box(kernel), "its box, a Box, has no names of axes to keep"),
        (kernel.astype(jnp.int32), f"its weight is int32; {packable}"),
        (np.asarray(kernel, np.float64), f"its weight is float64; {packable}"),
        (kernel.astype(jnp.float8_e4m3fn), f"its weight is float8_e4m3fn; {packable}"),
    ):
        assert reasons(layer, {"params": {"kernel": value}}, x) == {"": reason}
    x = normal(3, 2, D)
    many = nn.vmap(nn.DenseGeneral, variable_axes={"params": 3}, split_rngs={"params": True})
    variables = init(many((2, 5), use_bias=False), x)
    assert reasons(many((2, 5), use_bias=False), variables, x) == {
        "": "is stacked along axis 3; packed weights go up to 2"
    }


def test_a_plan_is_what_conversion_does(converted: Any) -> None:
    model, variables, quantized, packed = converted
    plan = ap.plan(model, RULES, variables, IDS)
    lines = {layer.path: layer for layer in plan.layers}
    assert lines["embed"].becomes == "float"
    assert lines["layers/mlp"].shape == (2, D, D)
    assert lines["layers/mlp"].error == pytest.approx(
        error(dequantize(packed["packed"]["layers"]["mlp"]["kernel"]),
              variables["params"]["layers"]["mlp"]["kernel"]), rel=1e-3,
    )  # fmt: skip
    sizes = {k: sum(x.nbytes for x in jax.tree.leaves(v)) for k, v in packed.items()}
    assert plan.bytes_after == sizes["params"] + sizes["packed"]
    again, same = ap.quantize_model(model, plan, variables, IDS)
    assert again == quantized
    equal(same, packed)


def test_layers_whose_trace_flax_has_kept() -> None:
    model, x = nn.jit(nn.Dense)(D), normal(2, D)
    variables = init(model, x)
    model.apply(variables, x)
    quantized, packed = quantize_linen(model, W8, variables, x)
    assert error(quantized.apply(packed, x), model.apply(variables, x)) < 0.02


# --- layers of others ---


class OtherEinsum(nn.Module):
    """As many code bases have it."""

    shape: tuple[int, ...]
    weight: str = "w"

    @nn.compact
    def __call__(self, spec: str, x: jax.Array) -> jax.Array:
        return jnp.einsum(spec, x, self.param(self.weight, nn.initializers.normal(), self.shape))


class FeedForward(nn.Module):
    """Two layers that share the scope of this one, and a parameter of its own."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        up, down = OtherEinsum((2, D, 64), "up"), OtherEinsum((64, D), "down")
        nn.share_scope(self, up)
        nn.share_scope(self, down)
        gate = up("...d,ndh->...nh", x)
        scale = self.param("scale", nn.initializers.ones, D)
        return scale * down("...h,hd->...d", nn.relu(gate[..., 0, :]) * gate[..., 1, :])


def describe(module: OtherEinsum, spec: str, x: jax.Array) -> ap.linen.EinsumCall:
    return ap.linen.EinsumCall(spec, x, weight=module.weight)


def test_calls_describe_layers_of_others() -> None:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return FeedForward(name="mlp")(x)

    model, x = Net(), normal(3, D)
    variables = init(model, x)
    unknown = "what FeedForward multiplies is unknown; `calls` can describe it"
    assert reasons(model, variables, x) == {"mlp": unknown}
    calls = {OtherEinsum.__call__: describe}
    assert reasons(model, variables, x, calls=calls) == {
        "mlp/up": 'rule "**"',
        "mlp/down": 'rule "**"',
        "mlp": "has no matrix",
    }
    quantized, packed = ap.quantize_model(model, W4A8, variables, x, calls=calls)
    assert packed["packed"]["mlp"]["up"].shape == (D, 128)
    expected = ap.matmul(x, packed["packed"]["mlp"]["up"], act_bits=8).reshape(3, 2, 64)
    expected = nn.relu(expected[:, 0]) * expected[:, 1]
    expected = ap.matmul(expected, packed["packed"]["mlp"]["down"], act_bits=8)
    np.testing.assert_allclose(quantized.apply(packed, x), expected, rtol=1e-5, atol=1e-5)


def test_bad_descriptions() -> None:
    layer, x = OtherEinsum((D, D)), normal(3, D)
    variables = init(layer, "ab,bc->ac", x)

    def plan(calls: Any) -> None:
        plan_linen(layer, W8, variables, "ab,bc->ac", x, calls=calls)

    with pytest.raises(TypeError, match="calls must have methods of module classes as keys"):
        plan({OtherEinsum: describe})
    with pytest.raises(TypeError, match="calls must give an EinsumCall for each call, got 'ab,bc"):
        plan({OtherEinsum.__call__: lambda module, spec, x: spec})
    with pytest.raises(ValueError, match="with the weight 'v', but has no such parameter"):
        plan({OtherEinsum.__call__: lambda m, spec, x: ap.linen.EinsumCall(spec, x, weight="v")})


# --- what comes back ---


def test_names_of_axes_stay() -> None:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, None]:
            kernel = nn.with_logical_partitioning(NORMAL, ("embed", "heads", "kv"))
            x = nn.DenseGeneral((4, 8), kernel_init=kernel, use_bias=False, name="up")(x)
            kernel = nn.with_partitioning(NORMAL, ("data", None, "model"))
            bias = nn.with_partitioning(NORMAL, ("model",))
            down = nn.DenseGeneral(
                D, axis=(-2, -1), kernel_init=kernel, bias_init=bias, name="down"
            )
            return down(x), None

    model = nn.scan(
        Net, variable_axes={"params": 1}, split_rngs={"params": True}, length=2,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )()  # fmt: skip
    x = normal(3, D)
    variables = init(model, x, None)
    rules = ap.Quantization(weights=4, activations=None, group_size=32)
    quantized, packed = quantize_linen(model, rules, variables, x, None)
    assert packed["params"]["down"]["bias"] is variables["params"]["down"]["bias"]
    up, down = (packed["packed"][name]["kernel"] for name in ("up", "down"))
    assert isinstance(up.planes, nn.LogicallyPartitioned)
    assert up.planes.names == ("layers", None, "heads", "embed")
    assert up.scales.names == ("layers", "heads", None)
    assert (down.planes.names, down.scales.names) == (
        ("layers", None, "model", "data"),
        ("layers", "model", None),
    )
    assert down.offsets is None
    spec = nn.get_partition_spec(packed)["packed"]["down"]["kernel"].planes
    assert spec == jax.sharding.PartitionSpec("layers", None, "model", "data")
    found = jax.jit(quantized.apply)(packed, x, None)[0]
    bare = meta.unbox(packed)
    np.testing.assert_allclose(found, jax.jit(quantized.apply)(bare, x, None)[0], rtol=1e-5)
    w = jax.tree.map(np.asarray, bare["packed"])
    expected = x
    for i in range(2):
        layer = jax.tree.map(lambda leaf, i=i: leaf[i], w)
        bias = bare["params"]["down"]["bias"][:, i]
        expected = expected @ layer["up"]["kernel"].dequantize()
        expected = expected @ layer["down"]["kernel"].dequantize() + bias
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


def test_containers_and_other_variables_stay() -> None:
    layer, x = nn.Dense(5), normal(2, D)
    variables = freeze({**init(layer, x), "state": {"step": jnp.zeros(())}})
    _, packed = quantize_linen(layer, W8, variables, x)
    assert isinstance(packed, FrozenDict)
    assert packed["state"]["step"] is variables["state"]["step"]
    assert packed["params"]["bias"] is variables["params"]["bias"]
    assert isinstance(quantize_linen(layer, W8, variables.unfreeze(), x)[1], dict)


def test_donated_kernels_are_deleted_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            for _ in range(3):
                x = nn.Dense(D)(x)
            return x

    model, x = Net(), normal(2, D)
    variables = init(model, x)
    kernels = [layer["kernel"] for layer in variables["params"].values()]
    pack, alive = find.LinenLayer.pack, []

    def watched(layer: find.LinenLayer, quantization: ap.Quantization) -> ap.QuantizedTensor:
        if not layer.abstract:
            alive.append(sum(not kernel.is_deleted() for kernel in kernels))
        return pack(layer, quantization)

    monkeypatch.setattr(find.LinenLayer, "pack", watched)
    kept = quantize_linen(model, W8, variables, x)[1]
    assert alive == [3, 3, 3]
    alive.clear()
    packed = ap.quantize_model(model, W8, variables, x, donate=True)[1]
    assert alive == [3, 2, 1]
    assert all(kernel.is_deleted() for kernel in kernels)
    equal(packed, kept)


def test_an_array_at_two_paths_is_kept() -> None:
    model, x = nn.Sequential([nn.Dense(D), nn.Dense(D)]), normal(2, D)
    params = dict(init(model, x)["params"])
    params["layers_1"] = params["layers_0"]
    _, packed = quantize_linen(model, W8, {"params": params}, x, donate=True)
    assert not params["layers_0"]["kernel"].is_deleted()
    equal(packed["packed"]["layers_0"], packed["packed"]["layers_1"])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nothing_is_deleted_if_a_later_kernel_is_not_finite(bad: float) -> None:
    model, x = nn.Sequential([nn.Dense(D), nn.Dense(D)]), normal(2, D)
    variables = init(model, x)
    kernel = variables["params"]["layers_1"]["kernel"]
    variables["params"]["layers_1"]["kernel"] = kernel.at[3, 4].set(bad)
    with pytest.raises(ValueError, match="params/layers_1/kernel must be finite, but has NaN or"):
        quantize_linen(model, W8, variables, x, donate=True)
    assert not variables["params"]["layers_0"]["kernel"].is_deleted()


# --- errors ---


def test_bad_arguments() -> None:
    layer, x = nn.Dense(5), normal(2, D)
    variables = init(layer, x)
    with pytest.raises(TypeError, match=r"module must be a flax.linen.Module, got dict"):
        quantize_linen({}, W8, variables, x)
    with pytest.raises(TypeError, match=r"variables must be a mapping with 'params', got \['bias'"):
        quantize_linen(layer, W8, dict(sorted(variables["params"].items())), x)
    with pytest.raises(TypeError, match="variables must be a mapping with 'params', got ndarray"):
        quantize_linen(layer, W8, x)
    with pytest.raises(ValueError, match="variables must have params/kernel, which the model uses"):
        quantize_linen(layer, W8, {"params": {"bias": normal(5)}}, x)
    with pytest.raises(ValueError, match=r"params/kernel of shape \(32, 5\), got \(16, 5\)"):
        quantize_linen(layer, W8, {"params": {"kernel": normal(16, 5)}}, x)
    with pytest.raises(ValueError, match="no layer would be quantized:\npath"):
        quantize_linen(layer, {"**": None}, variables, x)
    quantized, packed = quantize_linen(layer, W8, variables, x)
    with pytest.raises(ValueError, match="variables must have packed/kernel, a packed kernel"):
        quantized.apply({**packed, "packed": {"other": packed["packed"]["kernel"]}}, x)


def test_kernels_that_are_used_in_another_way_are_refused_before_packing() -> None:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            layer = nn.Dense(D, name="layer")
            return layer(x) @ layer.variables["params"]["kernel"].T

    model, x = Net(), normal(2, D)
    variables = init(model, x)
    with pytest.raises(
        ValueError, match=r"in another way than by calling the layer: .*attribute 'T'"
    ):
        quantize_linen(model, W8, variables, x, donate=True)
    assert not variables["params"]["layer"]["kernel"].is_deleted()


def test_faults_of_the_model_itself_stay_as_they_are() -> None:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            if not self.is_initializing():
                raise TypeError("only for a start")
            return nn.Dense(D)(x)

    model, x = Net(), normal(2, D)
    with pytest.raises(TypeError, match="only for a start"):
        quantize_linen(model, W8, init(model, x), x)


def test_submodules_from_outside_are_refused(converted: Any) -> None:
    _, variables, quantized, packed = converted
    with pytest.raises(ValueError, match=r"Model.head is a submodule.* in a method of Model"):
        quantized.bind(packed).head(normal(2, D))
    with pytest.raises(ValueError, match=r"Model.head is a submodule"):
        quantized.apply(packed, normal(2, D), method=lambda m, x: m.head(x))
    assert quantized.bind(variables).head(normal(2, D)).shape == (2, 6)


def test_promotion_is_that_of_einsum_by_default() -> None:
    assert ap.linen.EinsumCall("a,ab->b", 0).promote is promote_dtype


def test_the_examples_of_the_docs_run() -> None:
    page = (Path(__file__).parents[1] / "docs" / "linen.md").read_text("utf-8")
    names: dict[str, Any] = {}
    for example in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(example, "docs/linen.md", "exec"), names)
    assert names["logits"].shape == (2, 6, 1000)
    assert {path.split("/")[0] for path in flat(names["gradients"])} == {"embed", "head", "layers"}
    expected = ap.matmul(names["x"], names["packed"]["packed"]["w"], act_bits=8)
    np.testing.assert_array_equal(names["y"], expected.reshape(2, 5, 4, 32))
    exact = names["encoder"].apply(names["floats"], names["batches"][0])
    assert error(names["outputs"], exact) < 0.2
