"""Flax layers: signatures and promotion of the float ones, packed kernels, training, transforms."""

from __future__ import annotations

import inspect
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jax_anyprec as ap

RNG = np.random.default_rng(0)
K, N = 64, 9


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def linear(**options: Any) -> nnx.Linear:
    layer = nnx.Linear(K, N, rngs=nnx.Rngs(0), **options)
    if layer.bias is not None:
        layer.bias.set_value(jnp.asarray(normal(N), layer.param_dtype))
    return layer


def error(a: Any, b: Any) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


# --- QuantLinear ---


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("activations", [None, 8])
def test_eight_bits_are_close_to_float(use_bias: bool, activations: int | None) -> None:
    float_layer = linear(use_bias=use_bias)
    layer = ap.nnx.QuantLinear.from_linear(float_layer, weights=8, activations=activations)
    x = normal(3, 5, K)
    assert error(layer(x), float_layer(x)) < 0.02
    assert layer(x).shape == (3, 5, N)
    assert layer(x[0, 0]).shape == (N,)


def test_from_linear_computes_what_matmul_does() -> None:
    float_layer = linear()
    layer = ap.nnx.QuantLinear.from_linear(
        float_layer, weights=3, activations=4, group_size=32, scales="absmax",
        rotation=ap.Rotation(64, 1), act_scales="token", implementation="xla",
    )  # fmt: skip
    w = ap.quantize(
        float_layer.kernel[...], 3, group_size=32, scales="absmax", rotation=ap.Rotation(64, 1)
    )
    x = normal(3, K)
    expected = ap.matmul(
        x, w, bias=float_layer.bias[...], act_bits=4, act_scales="token", implementation="xla"
    )
    np.testing.assert_array_equal(layer(x), expected)


@pytest.mark.parametrize("x_dtype", ["float32", "bfloat16", "float16", "int32"])
@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("use_bias", [True, False])
def test_dtypes_promote_as_in_linear(
    x_dtype: str, dtype: str | None, param_dtype: str, use_bias: bool
) -> None:
    float_layer = nnx.Linear(
        K, N, dtype=dtype and jnp.dtype(dtype), param_dtype=jnp.dtype(param_dtype),
        use_bias=use_bias, rngs=nnx.Rngs(0),
    )  # fmt: skip
    x = jnp.asarray(4 * normal(2, K), x_dtype)
    layer = ap.nnx.QuantLinear.from_linear(float_layer, weights=8)
    expected = float_layer(x)
    assert layer(x).dtype == expected.dtype
    assert error(layer(x), expected) < 0.05
    if use_bias:
        assert layer.bias[...].dtype == float_layer.bias[...].dtype


@pytest.mark.parametrize("preferred", [None, jnp.float32, jnp.bfloat16])
def test_preferred_element_type(preferred: Any) -> None:
    float_layer = linear(dtype=jnp.bfloat16, use_bias=False, preferred_element_type=preferred)
    layer = ap.nnx.QuantLinear.from_linear(float_layer, weights=4)
    x = normal(2, K)
    assert layer(x).dtype == float_layer(x).dtype


def test_signatures_follow_linear() -> None:
    ours = inspect.signature(ap.nnx.QuantLinear.__init__).parameters
    theirs = inspect.signature(nnx.Linear.__init__).parameters
    assert set(theirs) - set(ours) == {"dot_general"}
    for name in set(theirs) & set(ours) - {"rngs", "kernel_metadata", "bias_metadata"}:
        assert ours[name].default == theirs[name].default, name
    ours = inspect.signature(ap.nnx.QuantLinear.__call__).parameters
    theirs = inspect.signature(nnx.Linear.__call__).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    assert {name: ours[name].default for name in list(ours)[len(theirs) :]} == {
        "before": None, "residual": None
    }  # fmt: skip


def test_a_new_layer_draws_as_linear_does() -> None:
    float_layer = nnx.Linear(K, N, rngs=nnx.Rngs(3))
    layer = ap.nnx.QuantLinear(K, N, weights=8, rngs=nnx.Rngs(3))
    assert error(layer.kernel.get_value().dequantize(), float_layer.kernel[...]) < 0.02
    np.testing.assert_array_equal(layer.bias[...], float_layer.bias[...])
    with pytest.raises(TypeError, match=r"rngs must be an nnx.Rngs"):
        ap.nnx.QuantLinear(K, N)


def test_from_tensor() -> None:
    w, bias, x = ap.quantize(normal(K, N), 4), jnp.asarray(normal(N)), normal(2, K)
    layer = ap.nnx.QuantLinear.from_tensor(w, bias=bias, activations=8)
    jax.tree.map(np.testing.assert_array_equal, layer.kernel.get_value(), w)
    assert (layer.in_features, layer.out_features) == (K, N)
    np.testing.assert_array_equal(layer(x), ap.matmul(x, w, bias=bias, act_bits=8))
    bare = ap.nnx.QuantLinear.from_tensor(w)
    assert bare.bias is None
    np.testing.assert_array_equal(bare(x), ap.matmul(x, w))


def test_bad_arguments_of_quant_linear() -> None:
    w = ap.quantize(normal(K, N), 4)
    with pytest.raises(TypeError, match=r"linear must be a flax.nnx.Linear, got Embed"):
        ap.nnx.QuantLinear.from_linear(nnx.Embed(3, 4, rngs=nnx.Rngs(0)), weights=4)
    with pytest.raises(ValueError, match="linear has no packed form: LoRALinear overrides __call"):
        ap.nnx.QuantLinear.from_linear(
            nnx.LoRALinear(K, N, lora_rank=2, rngs=nnx.Rngs(0)), weights=4
        )
    with pytest.raises(ValueError, match=r"kernel must have shape \(9, 64\), got \(64, 9\)"):
        ap.nnx.QuantLinear(N, K, kernel=w, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="kernel must be a QuantizedTensor"):
        ap.nnx.QuantLinear.from_tensor(normal(K, N))
    with pytest.raises(ValueError, match="must be from 1 to 8, got 9"):
        ap.nnx.QuantLinear(K, N, weights=9, rngs=nnx.Rngs(0))
    layer = ap.nnx.QuantLinear.from_tensor(w)
    with pytest.raises(ValueError, match="64 values in its last axis"):
        layer(normal(2, 32))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activations": 9}, "must be from 1 to 8, got 9"),
        ({"act_scales": "tokens"}, "act_scales must be"),
        ({"implementation": "gpu"}, "implementation must be"),
        ({"bias": np.zeros(4, np.float32)}, "bias must have shape"),
    ],
)
def test_bad_options_show_at_the_latest_in_the_call(options: dict[str, Any], message: str) -> None:
    w = ap.quantize(normal(K, N), 4)
    with pytest.raises(ValueError, match=message):
        ap.nnx.QuantLinear.from_tensor(w, **options)(normal(2, K))


# --- packed kernels in NNX ---


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, **options: Any):
        self.first = ap.nnx.QuantLinear(K, 32, weights=4, rngs=rngs, **options)
        self.second = ap.nnx.QuantLinear(32, N, weights=2, rngs=rngs, **options)
        self.scale = nnx.Param(jnp.ones(()))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.scale[...] * self.second(nnx.relu(self.first(x)))


def test_packed_kernels_are_no_parameters() -> None:
    model = Model(nnx.Rngs(0))
    params = nnx.to_flat_state(nnx.state(model, nnx.Param))
    assert sorted(".".join(path) for path, _ in params) == ["first.bias", "scale", "second.bias"]
    packed = nnx.state(model, ap.nnx.Packed)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(packed)} == {"uint32", "float32"}
    assert not issubclass(ap.nnx.Packed, nnx.Param)


def test_training_moves_parameters_alone() -> None:
    optax = pytest.importorskip("optax")
    model, x, y = Model(nnx.Rngs(0), activations=8), normal(16, K), normal(16, N)
    optimizer = nnx.Optimizer(model, optax.adam(0.05), wrt=nnx.Param)
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, ap.nnx.Packed)))

    @nnx.jit
    def step(model: Model, optimizer: nnx.Optimizer, x: Any, y: Any) -> jax.Array:
        loss, grads = nnx.value_and_grad(lambda m: ((m(x) - y) ** 2).mean())(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer, x, y)) for _ in range(20)]
    assert losses[-1] < losses[0]
    after = nnx.to_pure_dict(nnx.state(model, ap.nnx.Packed))
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_jit_eval_shape_split_and_merge() -> None:
    x = normal(3, K)
    model = Model(nnx.Rngs(0))
    expected = model(x)
    np.testing.assert_allclose(nnx.jit(lambda m, x: m(x))(model, x), expected, rtol=1e-5, atol=1e-6)
    graph, params, packed = nnx.split(model, nnx.Param, ap.nnx.Packed)
    np.testing.assert_array_equal(nnx.merge(graph, params, packed)(x), expected)
    abstract = nnx.eval_shape(lambda: Model(nnx.Rngs(0)))
    w = abstract.first.kernel.get_value()
    assert isinstance(w, ap.QuantizedTensor)
    assert (w.shape, w.bits) == ((K, 32), 4)
    assert isinstance(jax.tree.leaves(w)[0], jax.ShapeDtypeStruct)
    nnx.update(abstract, nnx.state(model))
    np.testing.assert_array_equal(abstract(x), expected)


def test_vmap_and_scan_over_layers() -> None:
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=(0,), out_axes=0)
    def make(rngs: nnx.Rngs) -> ap.nnx.QuantLinear:
        return ap.nnx.QuantLinear(K, K, weights=4, group_size=32, rngs=rngs)

    layers, x = make(nnx.Rngs(0)), normal(2, K)
    assert layers.kernel.get_value().shape == (3, K, K)
    each = [
        ap.nnx.QuantLinear.from_tensor(
            jax.tree.map(lambda v: v[i], layers.kernel.get_value()),  # noqa: B023
            bias=layers.bias[...][i],
        )
        for i in range(3)
    ]
    mapped = nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))(layers, x)
    np.testing.assert_allclose(mapped, np.stack([f(x) for f in each]), rtol=1e-5, atol=1e-6)

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def run(layer: ap.nnx.QuantLinear, x: jax.Array) -> jax.Array:
        return layer(x)

    expected = x
    for layer in each:
        expected = layer(expected)
    np.testing.assert_allclose(run(layers, x), expected, rtol=1e-4, atol=1e-5)


def test_surgery_with_recursive_map() -> None:
    class Net(nnx.Module):
        def __init__(self) -> None:
            self.layers = nnx.List([nnx.Linear(K, K, rngs=nnx.Rngs(i)) for i in range(2)])

        def __call__(self, x: jax.Array) -> jax.Array:
            for layer in self.layers:
                x = layer(x)
            return x

    def replace(path: Any, node: Any) -> Any:
        if isinstance(node, nnx.Linear):
            return ap.nnx.QuantLinear.from_linear(node, weights=8)
        return node

    net, x = Net(), normal(2, K)
    quantized = nnx.recursive_map(replace, net)
    assert all(isinstance(layer, ap.nnx.QuantLinear) for layer in quantized.layers)
    assert error(quantized(x), net(x)) < 0.03


# --- QuantEmbed ---


@pytest.mark.parametrize("rotation", [None, ap.Rotation(64, 2)])
@pytest.mark.parametrize("offsets", [False, True])
@pytest.mark.parametrize("prepared", [False, True])
def test_embedding_looks_up_and_attends(
    rotation: ap.Rotation | None, offsets: bool, prepared: bool
) -> None:
    codes = RNG.integers(0, 16, (40, K), np.uint8)
    scales = RNG.uniform(0.1, 1, (40, 2)).astype(np.float16)
    w = ap.QuantizedTensor.from_codes(
        codes, scales, normal(40, 2) if offsets else None, bits=4, rotation=rotation
    )
    w = w.prepare() if prepared else w
    embed = ap.nnx.QuantEmbed.from_tensor(w, activations=8)
    assert (embed.num_embeddings, embed.features) == (40, K)
    table = np.asarray(w.dequantize()).T
    ids = np.array([[0, 39, 5], [7, 7, 1]])
    for found in (embed(ids), nnx.jit(lambda e, i: e(i))(embed, ids)):
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, table[ids], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(embed(np.int32(3)), table[3], rtol=1e-6, atol=1e-6)
    assert embed(np.zeros((2, 0), np.int32)).shape == (2, 0, K)
    x = normal(3, K)
    np.testing.assert_array_equal(embed.attend(x), ap.matmul(x, w, act_bits=8))
    for unknown in (40, 63, 64, -41):
        assert np.isnan(embed(np.array([unknown]))).all()
    np.testing.assert_array_equal(embed(np.array([-1])), embed(np.array([39])))
    half = ap.nnx.QuantEmbed.from_tensor(w, dtype=jnp.bfloat16)
    assert half(ids).dtype == jnp.bfloat16


def test_embedding_refuses_floats_and_matrices() -> None:
    embed = ap.nnx.QuantEmbed.from_tensor(ap.quantize(normal(K, 5), 4))
    with pytest.raises(ValueError, match="inputs must be integers, got float32"):
        embed(np.ones(3, np.float32))
    with pytest.raises(TypeError, match="embedding must be a QuantizedTensor"):
        ap.nnx.QuantEmbed.from_tensor(normal(K, 5))


def test_attend_promotes_as_embed_does() -> None:
    float_embed = nnx.Embed(5, K, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    w = ap.quantize(float_embed.embedding[...].T, 8)
    embed = ap.nnx.QuantEmbed.from_tensor(w, dtype=jnp.bfloat16)
    x = normal(2, K)
    assert embed.attend(x).dtype == float_embed.attend(x).dtype
    assert embed(np.array([1])).dtype == float_embed(np.array([1])).dtype


# --- QuantDense ---


@pytest.mark.parametrize("use_bias", [True, False])
def test_dense_keeps_its_kernel_in_a_collection_of_its_own(use_bias: bool) -> None:
    layer, x = ap.linen.QuantDense(N, weights=8, use_bias=use_bias), normal(2, K)
    variables = jax.jit(layer.init)(jax.random.key(0), x)
    assert set(variables) == ({"params", "packed"} if use_bias else {"packed"})
    if use_bias:
        assert set(variables["params"]) == {"bias"}
    assert isinstance(variables["packed"]["kernel"], ap.QuantizedTensor)
    float_layer = nn.Dense(N, use_bias=use_bias)
    float_variables = float_layer.init(jax.random.key(0), x)
    expected = float_layer.apply(float_variables, x)
    assert error(jax.jit(layer.apply)(variables, x), expected) < 0.02
    assert layer.apply(variables, x[0]).shape == (N,)


def test_dense_with_a_trained_kernel() -> None:
    layer, x = ap.linen.QuantDense(N, weights=3, activations=8, group_size=32), normal(2, K)
    kernel, bias = normal(K, N), normal(N)
    packed = layer.quantize_kernel(kernel)
    variables = {"params": {"bias": bias}, "packed": {"kernel": packed}}
    expected = ap.matmul(x, ap.quantize(kernel, 3, group_size=32), bias=bias, act_bits=8)
    np.testing.assert_array_equal(layer.apply(variables, x), expected)


def test_gradients_of_dense_reach_bias_and_inputs() -> None:
    layer, x = ap.linen.QuantDense(N, weights=4, activations=8), normal(3, K)
    variables = layer.init(jax.random.key(0), x)

    def loss(params: Any, x: Any) -> jax.Array:
        return layer.apply({"params": params, "packed": variables["packed"]}, x).sum()

    grads, dx = jax.jit(jax.grad(loss, (0, 1)))(variables["params"], x)
    np.testing.assert_array_equal(grads["bias"], np.full(N, 3.0))
    w = variables["packed"]["kernel"].dequantize()
    np.testing.assert_allclose(dx, np.tile(np.asarray(w).sum(1), (3, 1)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("x_dtype", ["float32", "bfloat16", "int32"])
@pytest.mark.parametrize("dtype", [None, jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
def test_dtypes_promote_as_in_dense(x_dtype: str, dtype: Any, param_dtype: Any) -> None:
    x = jnp.asarray(4 * normal(2, K), x_dtype)
    options = {"dtype": dtype, "param_dtype": param_dtype}
    found, expected = (
        layer.init_with_output(jax.random.key(0), x)[0]
        for layer in (ap.linen.QuantDense(N, weights=8, **options), nn.Dense(N, **options))
    )
    assert found.dtype == expected.dtype
    assert error(found, expected) < 0.05


def test_linen_vmap_and_scan() -> None:
    x = normal(3, 2, K)
    many = nn.vmap(
        ap.linen.QuantDense, variable_axes={"params": 0, "packed": 0}, split_rngs={"params": True}
    )(N)
    variables = many.init(jax.random.key(0), x)
    assert variables["packed"]["kernel"].shape == (3, K, N)
    assert many.apply(variables, x).shape == (3, 2, N)

    class Step(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array, _: Any) -> tuple[jax.Array, None]:
            return ap.linen.QuantDense(K, activations=8)(x), None

    stack = nn.scan(
        Step, variable_axes={"params": 0, "packed": 0}, split_rngs={"params": True}, length=4
    )()
    variables = stack.init(jax.random.key(0), x[0], None)
    assert stack.apply(variables, x[0], None)[0].shape == (2, K)


def test_dense_signature_follows_dense() -> None:
    fields = ap.linen.QuantDense.__dataclass_fields__
    missing = set(nn.Dense.__dataclass_fields__) - set(fields)
    assert missing == {"dot_general", "dot_general_cls"}
