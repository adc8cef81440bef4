"""Adapters on packed layers: where they begin, what trains, what merging them costs."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import jax_anyprec as ap
from jax_anyprec.linen import LoRADense, QuantDense
from jax_anyprec.nnx import QuantLinear, lora, merge_lora, pissa

RNG = np.random.default_rng(0)
K, N, RANK = 128, 96, 8
W2 = ap.Quantization(weights=2, activations=None, group_size=32, scales="mse")
W4A8_ROTATED = ap.Quantization(weights=4, activations=8, rotate=True, act_scales="token")
QUANTIZATIONS = {"W2 in groups": W2, "W4A8 rotated": W4A8_ROTATED}


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def orthogonal(rows: int, columns: int) -> np.ndarray:
    return np.linalg.qr(RNG.normal(size=(rows, columns)))[0]


S = 0.9 ** np.arange(N)
KERNEL = ((orthogonal(K, N) * S) @ orthogonal(N, N).T).astype(np.float32)
"""Singular values that decay, as those of trained layers do."""
X = normal(5, K)


def linear(kernel: np.ndarray = KERNEL, **options: Any) -> nnx.Linear:
    layer = nnx.Linear(*kernel.shape, rngs=nnx.Rngs(0), **options)
    layer.kernel.set_value(jnp.asarray(kernel, layer.param_dtype))
    if layer.bias is not None:
        layer.bias.set_value(jnp.asarray(normal(kernel.shape[1]), layer.param_dtype))
    return layer


def matrix_of(layer: nnx.LoRA) -> np.ndarray:
    """The matrix that a packed layer and its adapter stand for, ``float64[K, N]``."""
    a, b = (np.asarray(p[...], np.float64) for p in (layer.lora_a, layer.lora_b))
    return np.asarray(layer.base_module.kernel.get_value().dequantize(), np.float64) + a @ b


def packed(layer: nnx.Linear, quantization: ap.Quantization) -> QuantLinear:
    bias = None if layer.bias is None else layer.bias[...]
    kernel = quantization.pack(layer.kernel[...])
    options = {"dtype": layer.dtype, "param_dtype": layer.param_dtype}
    return QuantLinear.from_tensor(kernel, bias=bias, **options, **quantization.layer_options)


# --- where adapters begin ---


@pytest.mark.parametrize(("name", "use_bias"), [("W2 in groups", True), ("W4A8 rotated", False)])
def test_lora_begins_as_the_packed_layer(name: str, use_bias: bool) -> None:
    float_layer, quantization = linear(use_bias=use_bias), QUANTIZATIONS[name]
    layer = lora(float_layer, RANK, quantization, rngs=nnx.Rngs(1))
    assert isinstance(layer, nnx.LoRA)
    assert (layer.lora_a.shape, layer.lora_b.shape) == ((K, RANK), (RANK, N))
    assert np.std(layer.lora_a[...]) > 0
    base = packed(float_layer, quantization)
    np.testing.assert_array_equal(layer(X), base(X))
    np.testing.assert_array_equal(lora(base, RANK, rngs=nnx.Rngs(1))(X), base(X))


@pytest.mark.parametrize(
    ("x_dtype", "dtype", "param_dtype"),
    [
        ("float32", None, jnp.bfloat16),
        ("bfloat16", None, jnp.bfloat16),
        ("bfloat16", None, jnp.float32),
        ("float32", jnp.bfloat16, jnp.float32),
    ],
)
def test_dtypes_are_those_of_the_float_layer(x_dtype: str, dtype: Any, param_dtype: Any) -> None:
    float_layer, x = linear(dtype=dtype, param_dtype=param_dtype), jnp.asarray(X, x_dtype)
    for layer in (lora(float_layer, RANK, W2, rngs=nnx.Rngs(1)), pissa(float_layer, RANK, W2)):
        assert layer.lora_a[...].dtype == layer.lora_b[...].dtype == param_dtype
        assert layer(x).dtype == float_layer(x).dtype
    layer = lora(float_layer, RANK, W2, rngs=nnx.Rngs(1))
    np.testing.assert_array_equal(layer(x), packed(float_layer, W2)(x))


@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_pissa_is_the_principal_part_on_the_quantized_rest(name: str) -> None:
    quantization = QUANTIZATIONS[name]
    float_layer = linear()
    layer = pissa(float_layer, RANK, quantization)
    u, s, v = np.linalg.svd(KERNEL.astype(np.float64), full_matrices=False)
    principal = (u[:, :RANK] * s[:RANK]) @ v[:RANK]
    a, b = (np.asarray(p[...], np.float64) for p in (layer.lora_a, layer.lora_b))
    np.testing.assert_allclose(a @ b, principal, atol=1e-5)
    # The root of each singular value is on both sides.
    np.testing.assert_allclose(np.linalg.norm(a, axis=0), np.sqrt(s[:RANK]), rtol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(b, axis=1), np.sqrt(s[:RANK]), rtol=1e-4)
    rest = quantization.pack(float_layer.kernel[...] - (a @ b).astype(np.float32))
    error = np.linalg.norm(layer.base_module.kernel.get_value().dequantize() - rest.dequantize())
    assert error < 0.02 * np.linalg.norm(rest.dequantize())  # codes at a cell's edge may differ
    np.testing.assert_array_equal(layer.base_module.bias[...], float_layer.bias[...])


@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_pissa_loses_less_than_quantizing_the_kernel(name: str) -> None:
    quantization = QUANTIZATIONS[name]
    plain = np.asarray(quantization.pack(jnp.asarray(KERNEL)).dequantize()) - KERNEL
    errors = [
        np.linalg.norm(matrix_of(pissa(linear(), rank, quantization)) - KERNEL)
        for rank in (1, RANK, 4 * RANK, N)
    ]
    errors = [np.linalg.norm(plain), *errors]
    assert all(more < less for less, more in itertools.pairwise(errors))
    assert errors[2] < 0.6 * errors[0]
    assert errors[-1] < 1e-4  # of full rank nothing is left to quantize


# --- training ---


class Model(nnx.Module):
    """Two packed layers with adapters, and a float parameter that stays."""

    def __init__(self) -> None:
        self.first = lora(linear(), RANK, W4A8_ROTATED, rngs=nnx.Rngs(1))
        self.second = pissa(linear(normal(N, 16), use_bias=False), 2, W2)
        self.scale = nnx.Param(jnp.ones(()))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.scale[...] * self.second(nnx.relu(self.first(x)))


def test_only_adapters_train() -> None:
    model, x, y = Model(), normal(32, K), normal(32, 16)
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.LoRAParam)

    @nnx.jit
    def step(model: Model, optimizer: nnx.Optimizer) -> tuple[jax.Array, Any]:
        loss = lambda model: ((model(x) - y) ** 2).mean()  # noqa: E731
        wrt = nnx.DiffState(0, nnx.LoRAParam)
        value, gradient = nnx.value_and_grad(loss, argnums=wrt)(model)
        optimizer.update(model, gradient)
        return value, gradient

    before = dict(nnx.to_flat_state(nnx.state(nnx.clone(model))))
    value, gradient = step(model, optimizer)
    names = {".".join(path) for path, _ in nnx.to_flat_state(gradient)}
    assert names == {f"{at}.lora_{ab}" for at in ("first", "second") for ab in "ab"}
    # A of the first layer has no gradient while its B is 0; B has one, through the second layer.
    assert (gradient["first"]["lora_b"][...] != 0).any()
    losses = [float(value)] + [float(step(model, optimizer)[0]) for _ in range(30)]
    assert losses[-1] < 0.7 * losses[0]
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        same = [
            bool((a == b).all())
            for a, b in zip(jax.tree.leaves(variable), jax.tree.leaves(before[path]), strict=True)
        ]
        assert all(same) != isinstance(variable, nnx.LoRAParam), path


def test_gradients_are_those_of_the_dense_layer() -> None:
    layer = pissa(linear(), RANK, W2)  # float activations: the product is x @ dequantized kernel
    base = np.asarray(layer.base_module.kernel.get_value().dequantize())
    bias = layer.base_module.bias[...]

    def dense(a: Any, b: Any, x: Any) -> jax.Array:
        return jnp.tanh(jnp.matmul(x, base, precision="highest") + x @ a @ b + bias).sum()

    ours = lambda layer, x: jnp.tanh(layer(x)).sum()  # noqa: E731
    wrt = (nnx.DiffState(0, nnx.LoRAParam), 1)
    of_adapters, of_x = nnx.jit(nnx.grad(ours, argnums=wrt))(layer, jnp.asarray(X))
    found = of_adapters["lora_a"][...], of_adapters["lora_b"][...], of_x
    arguments = (layer.lora_a[...], layer.lora_b[...], jnp.asarray(X))
    expected = jax.jit(jax.grad(dense, (0, 1, 2)))(*arguments)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


# --- merging ---


@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_merging_rounds_the_sum_once(name: str) -> None:
    quantization = QUANTIZATIONS[name]
    layer = pissa(linear(), RANK, quantization)
    layer.lora_b.set_value(layer.lora_b[...] * 1.5)  # as if it had been trained
    merged = merge_lora(layer, quantization)
    assert isinstance(merged, QuantLinear)
    total = matrix_of(layer)
    w = merged.kernel.get_value()
    # In the frame of the rounding each error is at most s inside of the range, else what is
    # clipped; a few roundings of float32 come on top.
    turned = total.T if w.rotation is None else w.rotation.apply(total.T.astype(np.float32))
    scales = np.repeat(np.asarray(w.scales), K // w.groups, -1)
    largest = 2**w.bits - 1
    bound = np.maximum(scales, np.abs(turned) - largest * scales) + 1e-5
    found = np.asarray(w.dequantize()).T
    found = found if w.rotation is None else w.rotation.apply(found)
    assert (np.abs(found - turned) <= bound).all()
    np.testing.assert_array_equal(merged.bias[...], layer.base_module.bias[...])
    assert merged.activations == quantization.activations


def test_merging_at_eight_bits_gives_the_outputs_of_the_adapted_layer() -> None:
    layer = pissa(linear(), RANK, W2)
    merged = merge_lora(layer, ap.Quantization(weights=8, activations=None, group_size=32))
    assert np.linalg.norm(merged(X) - layer(X)) < 0.01 * np.linalg.norm(layer(X))


# --- errors ---


def test_errors() -> None:
    float_layer, rngs = linear(), nnx.Rngs(0)
    with pytest.raises(TypeError, match=r"linear must be a flax.nnx.Linear, got Embed"):
        lora(nnx.Embed(3, 4, rngs=rngs), 2, W2, rngs=rngs)
    with pytest.raises(TypeError, match=r"linear must be a flax.nnx.Linear, got QuantLinear"):
        pissa(packed(float_layer, W2), 2, W2)
    special = linear(dot_general=lambda *args, **options: jax.lax.dot_general(*args, **options))
    for make in (lambda: lora(special, 2, W2, rngs=rngs), lambda: pissa(special, 2, W2)):
        with pytest.raises(ValueError, match="linear has no packed form: has a dot_general of"):
            make()
    stack = nnx.vmap(lambda rngs: nnx.Linear(K, N, rngs=rngs))(nnx.Rngs(0).split(2))
    base = ap.quantize_model(stack, W2)
    for make in (
        lambda: lora(stack, 2, W2, rngs=rngs),
        lambda: lora(base, 2, rngs=rngs),
        lambda: pissa(stack, 2, W2),
    ):
        with pytest.raises(ValueError, match=r"not a stack: its kernel has shape \(2, 128, 96\)"):
            make()
    with pytest.raises(ValueError, match="quantization must be a Quantization for a float layer"):
        lora(float_layer, 2, rngs=rngs)
    with pytest.raises(ValueError, match="quantization must be None for a QuantLinear"):
        lora(packed(float_layer, W2), 2, W2, rngs=rngs)
    for rank in (0, N + 1, 2.0, True):
        with pytest.raises(ValueError, match=f"rank must be an int from 1 to 96 .* got {rank}"):
            pissa(float_layer, rank, W2)
        with pytest.raises(ValueError, match="rank must be an int from 1 to 96"):
            LoRADense(QuantDense(N), rank).pissa(KERNEL)
    with pytest.raises(TypeError, match=r"layer must be an nnx.LoRA .* got Linear with NoneType"):
        merge_lora(float_layer, W2)
    alone = nnx.LoRA(K, 2, N, base_module=float_layer, rngs=rngs)
    with pytest.raises(TypeError, match="got LoRA with Linear"):
        merge_lora(alone, W2)


# --- Flax Linen ---

DENSE = LoRADense(QuantDense(N, weights=2, group_size=32, rotation=ap.Rotation(64, 1)), RANK)


def test_linen_begins_as_the_packed_layer() -> None:
    variables = DENSE.init(jax.random.key(0), X)
    assert jax.tree.map(jnp.shape, variables["lora"]) == {"a": (K, RANK), "b": (RANK, N)}
    assert set(variables) == {"lora", "packed", "params"}
    of_base = {name: variables[name]["base"] for name in ("packed", "params")}
    np.testing.assert_array_equal(DENSE.apply(variables, X), DENSE.base.apply(of_base, X))

    given = DENSE.lora(KERNEL, jax.random.key(1))
    assert np.std(given["lora"]["a"]) > 0
    of_base["packed"] = {"kernel": DENSE.base.quantize_kernel(KERNEL)}
    found = DENSE.apply({**variables, **given}, X)
    np.testing.assert_array_equal(found, DENSE.base.apply(of_base, X))
    half = LoRADense(QuantDense(N, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16), RANK)
    y, variables = half.init_with_output(jax.random.key(0), X)
    assert y.dtype == variables["lora"]["a"].dtype == jnp.bfloat16


def test_linen_pissa_and_merging() -> None:
    """As in NNX, whose tests compare with NumPy."""
    given = DENSE.pissa(KERNEL)
    a, b = given["lora"]["a"], given["lora"]["b"]
    kernel = given["packed"]["base"]["kernel"]
    total = np.asarray(kernel.dequantize(), np.float64) + np.float64(a) @ np.float64(b)
    plain = DENSE.base.quantize_kernel(KERNEL).dequantize()
    assert np.linalg.norm(total - KERNEL) < 0.6 * np.linalg.norm(plain - KERNEL)
    bias = normal(N)
    y = DENSE.apply({**given, "params": {"base": {"bias": bias}}}, X)
    np.testing.assert_allclose(y, X @ total + bias, atol=1e-4)

    fine = LoRADense(QuantDense(N, weights=8), RANK)
    given = fine.pissa(KERNEL)
    merged = fine.merge(given)
    assert isinstance(merged, ap.QuantizedTensor)
    assert np.linalg.norm(merged.dequantize() - KERNEL) < 0.02 * np.linalg.norm(KERNEL)


def test_linen_trains_adapters_alone() -> None:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            x = nn.relu(LoRADense(QuantDense(N, weights=4, activations=8), RANK)(x))
            return LoRADense(QuantDense(16, weights=4), RANK)(x)

    net, x, y = Net(), normal(32, K), normal(32, 16)
    variables = net.init(jax.random.key(0), x)
    rest, adapters = {k: variables[k] for k in ("params", "packed")}, variables["lora"]
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(adapters: Any, state: Any) -> Any:
        loss = lambda adapters: ((net.apply({**rest, "lora": adapters}, x) - y) ** 2).mean()  # noqa: E731
        value, gradient = jax.value_and_grad(loss)(adapters)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(adapters, updates), state, value

    state, losses = optimizer.init(adapters), []
    for _ in range(30):
        adapters, state, value = step(adapters, state)
        losses.append(float(value))
    assert losses[-1] < 0.7 * losses[0]
