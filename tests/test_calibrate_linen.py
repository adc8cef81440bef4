"""Calibration of Linen models: against rounding and the same model in NNX, and what is left."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import FrozenDict, freeze

import jax_anyprec as ap
from jax_anyprec.calibrate import Method, Tuning
from jax_anyprec.linen.tune import tune

LOW = ap.Quantization(weights=3, activations=None, group_size=32, scale_dtype="float16")
WIDTH = 64


def batches(count=4, rows=128, seed=0):
    """Correlated inputs, as those of a network are."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(WIDTH, WIDTH)) / 8 * np.geomspace(1, 0.1, WIDTH)
    return [
        jnp.asarray(rng.normal(size=(2, rows // 2, WIDTH)) @ mix, jnp.float32) for _ in range(count)
    ]


class Block(nn.Module):
    """Products of all kinds: heads, a general einsum, plain ones with an input in common."""

    @nn.compact
    def __call__(self, x, _=None):
        x = x + nn.MultiHeadDotProductAttention(4, name="attention")(nn.LayerNorm(name="norm")(x))
        up, gate = (nn.Dense(2 * WIDTH, name=name)(x) for name in ("up", "gate"))
        h = (nn.silu(gate) * up).reshape(*x.shape[:-1], 2, WIDTH)
        bias = nn.initializers.normal(0.1)
        down = nn.Einsum((2, WIDTH, 8, 8), "bsgd,gdhk->bskh", bias_init=bias, name="down")(h)
        return x + down.reshape(x.shape), None


class Model(nn.Module):
    @nn.compact
    def __call__(self, x, scale=1.0):
        for i in range(2):
            x, _ = Block(name=f"block{i}")(x)
        return nn.Dense(24, name="head")(scale * x)


def relative(found, expected):
    return float(((found - expected) ** 2).sum() / (expected**2).sum())


@pytest.fixture(scope="module")
def model():
    module, data = Model(), batches()
    variables = module.init(jax.random.key(0), data[0])
    return module, variables, data[:-1], data[-1]


def test_outputs_are_kept(model):
    module, variables, data, other = model
    steps = []
    quantized, packed, report = ap.linen.calibrate(
        module, LOW, variables, data, progress=lambda *step: steps.append(step)
    )
    assert steps == [(i, 14) for i in range(1, 15)]  # the head stays in float
    assert all(layer.fallback is None and layer.rows == 3 * 128 for layer in report.layers)
    assert [layer.path for layer in report.layers][:5] == [
        "block0/attention/query", "block0/attention/key", "block0/attention/value",
        "block0/attention/out", "block0/up",
    ]  # fmt: skip
    plain, rounded = ap.quantize_model(module, LOW, variables, other)
    assert plain == quantized == report.model
    assert jax.tree.map(jnp.shape, rounded) == jax.tree.map(jnp.shape, packed)
    exact = module.apply(variables, other)
    lost = relative(jax.jit(quantized.apply)(packed, other), exact)
    assert lost < 0.6 * relative(quantized.apply(rounded, other), exact)
    assert "error" in str(report)


def test_errors_of_layers_are_those_that_the_report_has(model):
    """Of the first layer, whose input is the model's: that of its outputs on what was seen."""
    module, variables, data, _ = model
    rules = [("block0/attention/query", LOW), ("**", None)]
    _, packed, report = ap.linen.calibrate(module, rules, variables, data)
    (layer,) = report.layers
    x = np.concatenate([np.asarray(each, np.float64).reshape(-1, WIDTH) for each in data])
    inputs = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-6)
    place = ("block0", "attention", "query", "kernel")
    kernel, found = variables["params"], packed["packed"]
    for name in place:
        kernel, found = kernel[name], found[name]
    kernel = np.asarray(kernel).reshape(WIDTH, WIDTH)
    expected = relative(inputs @ np.asarray(found.dequantize()), inputs @ kernel)
    assert layer.error == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("tuned", [False, True])
def test_the_same_as_in_nnx(tuned):
    """Dense layers one after another: packed weights and biases are those of an NNX model."""

    class Chain(nn.Module):
        @nn.compact
        def __call__(self, x):
            for i in range(3):
                x = nn.silu(nn.Dense(WIDTH, name=f"layer{i}")(x))
            return x

    class Same(nnx.Module):
        def __init__(self, params):
            for name, layer in params.items():
                linear = nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(0))
                linear.kernel.set_value(layer["kernel"])
                linear.bias.set_value(layer["bias"])
                setattr(self, name, linear)

        def __call__(self, x):
            for i in range(3):
                x = nnx.silu(getattr(self, f"layer{i}")(x))
            return x

    data = batches()
    variables = Chain().init(jax.random.key(1), data[0])
    tuning = Tuning(batches(6, seed=1)) if tuned else None
    steps = []
    _, packed, report = ap.linen.calibrate(
        Chain(), LOW, variables, data, tuning=tuning, progress=lambda *step: steps.append(step)
    )
    assert steps == [(i, 3 + 6 * tuned) for i in range(1, 4 + 6 * tuned)]
    same = Same(variables["params"])
    expected = ap.calibrate_model(same, LOW, data, tuning=tuning)
    for ours, theirs in zip(report.layers, expected.layers, strict=True):
        assert ours.error == pytest.approx(theirs.error, rel=1e-3)
        layer = getattr(same, ours.path)
        ours_packed = packed["packed"][ours.path]["kernel"]
        kernel = layer.kernel.get_value().restore()
        np.testing.assert_array_equal(ours_packed.planes, kernel.planes)
        np.testing.assert_allclose(ours_packed.scales, kernel.scales, rtol=2e-3)
        np.testing.assert_allclose(packed["params"][ours.path]["bias"], layer.bias[...], atol=1e-5)


def test_other_inputs_gain_by_tuning(model):
    module, variables, data, other = model
    coarse = dataclasses.replace(LOW, weights=2, offsets=True)
    quantized, packed = ap.quantize_model(module, coarse, variables, other)
    steps = []
    tuning = Tuning([(x,) for x in data * 6], rate=0.03)
    tuned = tune(
        quantized, packed, variables, tuning, {}, progress=lambda *step: steps.append(step)
    )
    assert steps == [(i, 18) for i in range(1, 19)]
    before, after = jax.tree.leaves_with_path(packed), jax.tree.leaves(tuned)
    for (path, a), b in zip(before, after, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        if "planes" in jax.tree_util.keystr(path):
            np.testing.assert_array_equal(a, b)
    assert (tuned["params"]["block0"]["norm"]["scale"] != 1).any()
    exact = module.apply(variables, other)
    lost, less = (relative(quantized.apply(each, other), exact) for each in (packed, tuned))
    assert less < 0.95 * lost


def test_biases_make_up_for_mean_errors(model):
    """Also those whose axes are in another order than the weight's columns."""
    module, variables, data, _ = model
    rules = [("block0/down", ap.Quantization(weights=1, activations=None)), ("**", None)]

    def mean_output(calibration):
        quantized, packed, _ = ap.linen.calibrate(
            module, rules, variables, data, calibration=calibration
        )
        return sum(self_output(quantized, packed, x) for x in data)

    def self_output(module, variables, x):
        _, seen = module.apply(
            variables, x, capture_intermediates=lambda m, _: m.name == "block0", mutable=True
        )
        (out, _) = seen["intermediates"]["block0"]["__call__"][0]
        return out.sum((0, 1))

    exact = sum(self_output(module, variables, x) for x in data)
    plain, corrected = (
        np.linalg.norm(mean_output(Method(correct_bias=each)) - exact) for each in (False, True)
    )
    assert corrected < 0.1 * plain


def test_rotations_and_activations_of_each_layer(model):
    """Layers of one input that are rotated or not, and coarse activations."""
    module, variables, data, other = model
    turned = ap.Quantization(weights=4, activations=4, group_size=32, rotate=True)
    rules = [("**/key", turned), ("**/gate", turned), ("**", LOW)]
    quantized, packed, report = ap.linen.calibrate(module, rules, variables, data)
    assert all(layer.fallback is None for layer in report.layers)
    _, rounded = ap.quantize_model(module, rules, variables, other)
    exact = module.apply(variables, other)
    lost = relative(quantized.apply(packed, other), exact)
    assert lost < 0.8 * relative(quantized.apply(rounded, other), exact)


def test_containers_boxes_and_arguments_stay(model):
    class Boxed(nn.Module):
        @nn.compact
        def __call__(self, x, scale=1.0):
            kernel = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
            bias = nn.with_partitioning(nn.initializers.zeros_init(), ("out",))
            return nn.Dense(24, kernel_init=kernel, bias_init=bias)(scale * x)

        def double(self, x):
            return self(x, 2.0)

    *data, other = batches()
    variables = freeze(Boxed().init(jax.random.key(0), other))
    quantized, packed, _ = ap.linen.calibrate(Boxed(), LOW, variables, [(x, 0.5) for x in data])
    assert isinstance(packed, FrozenDict)
    dense = packed["params"]["Dense_0"]
    assert dense["bias"].names == ("out",)
    assert packed["packed"]["Dense_0"]["kernel"].planes.names == (None, "out", "in")
    exact = Boxed().apply(variables, other, 0.5)
    assert relative(quantized.apply(packed, other, 0.5), exact) < 0.02
    tuning = Tuning([(x, 0.5) for x in data])
    _, tuned, _ = ap.linen.calibrate(Boxed(), LOW, variables, tuning.batches, tuning=tuning)
    assert jax.tree.structure(tuned) == jax.tree.structure(packed)
    scales = [each["packed"]["Dense_0"]["kernel"].scales.value for each in (tuned, packed)]
    assert (scales[0] != scales[1]).any()
    _, doubled, report = ap.linen.calibrate(Boxed(), LOW, variables, data, method="double")
    assert report.layers[0].fallback is None
    assert isinstance(doubled, FrozenDict)


def test_what_is_rounded_to_nearest():
    class Mixed(nn.Module):
        @nn.compact
        def __call__(self, ids):
            embed = nn.Embed(50, WIDTH, name="embed")
            blocks = nn.scan(
                Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2
            )
            x, _ = blocks(name="blocks")(embed(ids), None)
            x = x + nn.Einsum((2, WIDTH, WIDTH), "bsd,edf->bsef", name="wide")(x).sum(2)
            x = nn.remat(nn.Dense)(WIDTH, name="again")(x)
            return embed.attend(x)

    ids = jnp.arange(64).reshape(2, 32) % 50
    variables = Mixed().init(jax.random.key(0), ids)
    rules = {"embed": LOW, "**": LOW}
    quantized, packed, report = ap.linen.calibrate(Mixed(), rules, variables, [ids])
    fallback = {layer.path: layer.fallback for layer in report.layers}
    assert fallback["wide"] is None
    for path in ("embed", "again", "blocks/up", "blocks/attention/query"):
        assert "not called eagerly" in fallback[path]
    _, rounded = ap.quantize_model(Mixed(), rules, variables, ids)
    for name in ("embed", "again", "blocks"):
        jax.tree.map(np.testing.assert_array_equal, packed["packed"][name], rounded["packed"][name])
    assert np.isfinite(jax.jit(quantized.apply)(packed, ids)).all()
    few = ap.linen.calibrate(Mixed(), rules, variables, [ids[:1, :4]])[2]
    assert "4 inputs are too few for 64 rows" in str(few)


def test_bad_input(model):
    module, variables, data, _ = model
    with pytest.raises(ValueError, match="batches must hold at least one"):
        ap.linen.calibrate(module, LOW, variables, [])
    with pytest.raises(ValueError, match="nested precisions"):
        ap.linen.calibrate(module, LOW, variables, data, calibration=Method(nested=(2,)))
    with pytest.raises(
        ValueError, match=r"inputs of layer 'block0/attention/query' are not finite"
    ):
        ap.linen.calibrate(module, LOW, variables, [data[0].at[0, 0, 0].set(jnp.nan)])
    with pytest.raises(ValueError, match=r"Tuning\.call must be None for Linen models"):
        ap.linen.calibrate(module, LOW, variables, data, tuning=Tuning(call=lambda m, x: m(x)))
    tuning = Tuning(data, loss=lambda found, wanted: jnp.nan * found.sum())
    with pytest.raises(ValueError, match=r"Tuning\.loss must be finite, got nan for batch 0"):
        ap.linen.calibrate(module, {"block0/up": LOW, "**": None}, variables, data, tuning=tuning)
    with pytest.raises(TypeError, match=r"jax_anyprec\.linen\.calibrate is for Linen"):
        ap.calibrate_model(module, LOW, data)
