"""Layers in training: outputs of the packed layer to the bit, learning, and the example."""

from __future__ import annotations

import dataclasses
import importlib
import re
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jax_anyprec as ap
from jax_anyprec.linen import FakeQuantDense, QuantDense
from jax_anyprec.nnx import FakeQuantLinear, QuantLinear

RNG = np.random.default_rng(0)
K, N = 128, 9


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


X = normal(3, K)


def linear(**options: Any) -> nnx.Linear:
    layer = nnx.Linear(K, N, rngs=nnx.Rngs(0), **options)
    if layer.bias is not None:
        layer.bias.set_value(jnp.asarray(normal(N), layer.param_dtype))
    return layer


QUANTIZATIONS = {
    "W2A4 in groups": ap.Quantization(weights=2, activations=4, group_size=32),
    "W1A1": ap.Quantization(weights=1, activations=1),
    "W4A8 rotated": ap.Quantization(weights=4, rotate=True, act_scales="token"),
    "W3 rotated in groups": ap.Quantization(3, activations=None, group_size=64, rotate=True),
}

# --- Flax NNX ---


@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_training_gives_the_packed_outputs_bit_for_bit(name: str) -> None:
    """Also with scales of either sign, as an optimizer may leave them, and differentiated."""
    use_bias = name != "W1A1"
    layer = FakeQuantLinear.from_linear(linear(use_bias=use_bias), QUANTIZATIONS[name])
    shape = layer.kernel_scales[...].shape
    factors = np.exp(0.3 * normal(*shape)) * RNG.choice([-1, 1], shape)
    layer.kernel_scales.set_value(layer.kernel_scales[...] * factors)
    packed = layer.pack()
    assert isinstance(packed, QuantLinear)
    expected = packed(X)

    @nnx.jit
    def outputs(layer: FakeQuantLinear, x: jax.Array) -> jax.Array:
        run = lambda layer: (lambda y: (y.sum(), y))(layer(x))  # noqa: E731
        (_, y), _ = nnx.value_and_grad(run, has_aux=True)(layer)
        return y

    np.testing.assert_array_equal(layer(X), expected)
    np.testing.assert_array_equal(outputs(layer, X), expected)
    np.testing.assert_array_equal(nnx.jit(lambda m, x: m(x))(packed, X), expected)
    w = packed.kernel.get_value()
    fake = ap.fake_quant(layer.kernel[...], w.scales, w.bits, rotation=w.rotation)
    np.testing.assert_array_equal(fake, w.dequantize())


@pytest.mark.parametrize(
    ("dtype", "param_dtype", "preferred"),
    [
        (None, jnp.bfloat16, None),
        (jnp.bfloat16, jnp.float32, None),
        (jnp.bfloat16, jnp.bfloat16, jnp.float32),
        (jnp.float16, jnp.float32, None),
        (None, jnp.float32, jnp.bfloat16),
    ],
)
def test_dtypes_are_those_of_linear(dtype: Any, param_dtype: Any, preferred: Any) -> None:
    float_layer = linear(dtype=dtype, param_dtype=param_dtype, preferred_element_type=preferred)
    layer = FakeQuantLinear.from_linear(float_layer, QUANTIZATIONS["W2A4 in groups"])
    for x in (X, jnp.asarray(X, jnp.bfloat16)):
        y = layer(x)
        assert y.dtype == float_layer(x).dtype
        np.testing.assert_array_equal(y, layer.pack()(x))
    assert layer.kernel[...].dtype == param_dtype
    assert layer.kernel_scales[...].dtype == jnp.float32


def test_it_begins_as_its_quantization_says() -> None:
    float_layer = linear()
    layer = FakeQuantLinear.from_linear(float_layer, QUANTIZATIONS["W2A4 in groups"])
    packed = QuantLinear.from_linear(float_layer, weights=2, activations=4, group_size=32)
    np.testing.assert_array_equal(layer(X), packed(X))
    # Whole columns of more than 3 bits have scales by the largest weight, as in conversion.
    layer = FakeQuantLinear.from_linear(float_layer, ap.Quantization(weights=4))
    packed = ap.Quantization(weights=4, scales="absmax").pack(float_layer.kernel[...])
    np.testing.assert_array_equal(layer.kernel_scales[...], packed.scales)
    absmax = ap.Quantization(weights=2, activations=4, group_size=32, scales="absmax")
    layer = FakeQuantLinear.from_linear(float_layer, absmax, implementation="xla")
    packed = QuantLinear.from_linear(
        float_layer, weights=2, activations=4, group_size=32, scales="absmax", implementation="xla"
    )
    np.testing.assert_array_equal(layer(X), packed(X))
    assert layer.pack().implementation == "xla"


def test_the_float_layer_is_copied() -> None:
    float_layer = linear(kernel_metadata={"origin": "teacher"})
    layer = FakeQuantLinear.from_linear(float_layer, QUANTIZATIONS["W1A1"])
    before = np.asarray(float_layer.kernel[...])
    layer.kernel.set_value(layer.kernel[...] * 2)
    np.testing.assert_array_equal(float_layer.kernel[...], before)
    assert layer.kernel.get_metadata()["origin"] == "teacher"


def test_metadata_goes_through_packing_and_back() -> None:
    notes = {"kernel_metadata": {"note": "k"}, "bias_metadata": {"note": "b"}}
    packed = FakeQuantLinear.from_linear(linear(**notes), QUANTIZATIONS["W1A1"]).pack()
    layer = FakeQuantLinear.from_packed(packed)
    assert layer.kernel.get_metadata("note") == "k"
    assert layer.bias.get_metadata("note") == "b"


@pytest.mark.parametrize(("name", "prepared"), [("W2A4 in groups", True), ("W4A8 rotated", False)])
def test_a_packed_layer_goes_back_into_training(name: str, prepared: bool) -> None:
    packed = FakeQuantLinear.from_linear(linear(), QUANTIZATIONS[name]).pack()
    if prepared:
        packed.kernel.set_value(packed.kernel.get_value().prepare())
    layer = FakeQuantLinear.from_packed(packed)
    again = layer.pack()
    jax.tree.map(
        np.testing.assert_array_equal,
        again.kernel.get_value(),
        packed.kernel.get_value().restore(),
    )
    np.testing.assert_array_equal(layer(X), again(X))
    assert FakeQuantLinear.from_packed(QuantLinear.from_tensor(ap.quantize(X, 2))).bias is None


def test_errors() -> None:
    quantization = QUANTIZATIONS["W1A1"]
    with pytest.raises(TypeError, match=r"linear must be a flax.nnx.Linear, got Embed"):
        FakeQuantLinear.from_linear(nnx.Embed(3, 4, rngs=nnx.Rngs(0)), quantization)
    with pytest.raises(TypeError, match=r"linear must be a flax.nnx.Linear, got int"):
        FakeQuantLinear(3, jnp.ones((N, 1)), bits=2)
    special = nnx.LoRALinear(K, N, lora_rank=2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="linear has no packed form: LoRALinear overrides"):
        FakeQuantLinear.from_linear(special, quantization)
    with pytest.raises(ValueError, match=r"Quantization.weights must be set"):
        FakeQuantLinear.from_linear(linear(), ap.Quantization())
    with pytest.raises(ValueError, match="bits must be from 1 to 8, got 9"):
        FakeQuantLinear(linear(), jnp.ones((N, 1)), bits=9)
    with pytest.raises(ValueError, match=r"scales must have shape \(9,\) and an axis of groups"):
        FakeQuantLinear(linear(), jnp.ones((N + 1, 1)), bits=2)(X)
    with pytest.raises(TypeError, match="layer must be a QuantLinear, got Linear"):
        FakeQuantLinear.from_packed(linear())
    codes = RNG.integers(0, 16, (N, K), np.uint8)
    scales = np.ones((N, 4), np.float32)
    affine = ap.QuantizedTensor.from_codes(codes, scales, -scales, bits=4)
    with pytest.raises(ValueError, match="layer has offsets"):
        FakeQuantLinear.from_packed(QuantLinear.from_tensor(affine))
    with pytest.raises(ValueError, match="quantization has offsets"):
        FakeQuantLinear.from_linear(linear(), ap.Quantization(weights=4, offsets=True))


class Pair(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Linear(K, 64, rngs=rngs)
        self.second = nnx.Linear(64, N, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.second(nnx.relu(self.first(x)))


def test_training_a_model_recovers_what_rounding_lost() -> None:
    quantization = ap.Quantization(weights=2, activations=4, group_size=32)

    def convert(kind: type, how: Any, model: Any) -> Any:
        change = lambda _, node: how(node) if isinstance(node, kind) else node  # noqa: E731
        return nnx.recursive_map(change, model)

    def to_fake(layer: nnx.Linear) -> FakeQuantLinear:
        return FakeQuantLinear.from_linear(layer, quantization)

    x, teacher = normal(64, K), Pair(nnx.Rngs(0))
    targets = teacher(x)
    model = convert(nnx.Linear, to_fake, teacher)
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)

    def loss(model: Any) -> jax.Array:
        return ((model(x) - targets) ** 2).mean()

    @nnx.jit
    def step(model: Any, optimizer: nnx.Optimizer) -> jax.Array:
        value, gradient = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradient)
        return value

    scales = np.asarray(model.first.kernel_scales[...])
    losses = [float(step(model, optimizer)) for _ in range(60)]
    assert losses[-1] < losses[0] / 3
    assert (np.asarray(model.first.kernel_scales[...]) != scales).any()
    packed = convert(FakeQuantLinear, lambda layer: layer.pack(), model)
    np.testing.assert_array_equal(packed(x), model(x))
    assert {path[-1] for path, _ in nnx.to_flat_state(nnx.state(packed, nnx.Param))} == {"bias"}


# --- Flax Linen ---


@pytest.mark.parametrize(("rotation", "use_bias"), [(None, False), (ap.Rotation(64, 3), True)])
def test_linen(rotation: ap.Rotation | None, use_bias: bool) -> None:
    layer = FakeQuantDense(
        N, weights=2, activations=4, group_size=32, rotation=rotation, use_bias=use_bias
    )
    params = layer.init(jax.random.key(0), X)["params"]
    float_params = nn.Dense(N, use_bias=use_bias).init(jax.random.key(0), X)["params"]
    np.testing.assert_array_equal(params["kernel"], float_params["kernel"])
    jax.tree.map(np.testing.assert_array_equal, layer.params_from_dense(float_params), params)
    np.testing.assert_array_equal(
        params["kernel_scales"], layer.quantize_kernel(params["kernel"]).scales
    )
    params["kernel_scales"] *= -1.5

    def loss(params: Any) -> Any:
        y = layer.apply({"params": params}, X)
        return (y**2).sum(), y

    (_, y), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    assert all((g != 0).any() for g in jax.tree.leaves(gradient))
    packed = layer.pack(params)
    assert set(packed["params"]) == ({"bias"} if use_bias else set())
    expected = layer.packed_layer.apply(packed, X)
    np.testing.assert_array_equal(layer.apply({"params": params}, X), expected)
    np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_linen_dtypes(dtype: Any) -> None:
    layer = FakeQuantDense(N, weights=2, dtype=dtype, param_dtype=jnp.bfloat16)
    params = layer.init(jax.random.key(0), X)["params"]
    assert {name: p.dtype.name for name, p in params.items()} == {
        "kernel": "bfloat16", "kernel_scales": "float32", "bias": "bfloat16"
    }  # fmt: skip
    y = layer.apply({"params": params}, X)
    assert y.dtype == nn.Dense(N, dtype=dtype, param_dtype=jnp.bfloat16).apply(
        {"params": {"kernel": params["kernel"], "bias": params["bias"]}}, X
    ).dtype  # fmt: skip
    np.testing.assert_array_equal(y, layer.packed_layer.apply(layer.pack(params), X))


def test_linen_promotes_with_the_dtype_that_the_kernel_has() -> None:
    x = jnp.asarray(X, jnp.bfloat16)
    layer = FakeQuantDense(N, weights=2)
    params = jax.tree.map(lambda p: p.astype(x.dtype), layer.init(jax.random.key(0), x)["params"])
    assert layer.apply({"params": params}, x).dtype == jnp.bfloat16


def test_linen_boxes() -> None:
    init = nn.with_partitioning(nn.initializers.normal(), ("in", "out"))
    options: dict[str, Any] = {"weights": 2, "group_size": 32, "kernel_init": init}
    layer = FakeQuantDense(N, **options)
    boxed = layer.init(jax.random.key(0), X)["params"]
    assert boxed["kernel_scales"].names == ("out", "in")
    bare = nn.unbox(boxed)
    float_params = {name: boxed[name] for name in ("kernel", "bias")}
    assert jax.tree.structure(layer.params_from_dense(float_params)) == jax.tree.structure(boxed)
    y = layer.apply({"params": bare}, X)
    np.testing.assert_array_equal(layer.apply({"params": boxed}, X), y)
    packed = layer.pack(boxed)
    assert packed["packed"]["kernel"].planes.names == (None, "out", "in")
    np.testing.assert_array_equal(layer.packed_layer.apply(packed, X), y)
    drawn = QuantDense(N, **options).init(jax.random.key(0), X)
    assert jax.tree.structure(drawn) == jax.tree.structure(packed)
    assert QuantDense(N, **options).apply(drawn, X).shape == y.shape


# --- the example ---


def test_the_example_packs_a_model_with_the_loss_that_training_gave(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(__file__).parents[1] / "examples" / "train_w2a4.py"
    monkeypatch.syspath_prepend(path.parent)
    example = importlib.import_module(path.stem)

    text = np.frombuffer(path.read_bytes(), np.uint8)  # any text: the program's own
    config = dataclasses.replace(
        example.Config(), width=64, layers=1, heads=2, context=32, batch=8, first_steps=30,
        more_steps=20, evaluation_windows=8,
    )  # fmt: skip
    losses = example.run(text, text[-2000:], config)
    assert losses["packed"] == losses["trained"]
    assert losses["float"] < losses["trained"] < losses["rounded"]
    assert "MB packed" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="bytes are too few to train on"):
        example.read_text(str(path))


# --- docs/training.md ---


def test_the_programs_of_the_documentation_run() -> None:
    page = (Path(__file__).parents[1] / "docs" / "training.md").read_text("utf-8")
    values: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        exec(compile(block, "docs/training.md", "exec"), values)
        assert values["losses"][-1] < values["losses"][0]
    assert isinstance(values["merged"], QuantLinear)
