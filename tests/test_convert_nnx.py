"""Conversion of NNX models: what is found, what it becomes, and that nothing else changes."""

from __future__ import annotations

import dataclasses
import gc
import inspect
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, struct
from jax import lax

import jax_anyprec as ap

D = 64
RNG = np.random.default_rng(5)
W8 = ap.Quantization(weights=8, activations=None)
W4 = ap.Quantization(weights=4, activations=8, group_size=32, rotate=True)
NORMAL = nnx.initializers.normal()


def normal(*shape: int) -> Any:
    return RNG.standard_normal(shape).astype(np.float32)


def error(found: Any, expected: Any) -> float:
    found, expected = np.asarray(found, np.float32), np.asarray(expected, np.float32)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def equal(found: Any, expected: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def linear(seed: int = 0, features: int = D, **options: Any) -> nnx.Linear:
    return nnx.Linear(D, features, bias_init=NORMAL, rngs=nnx.Rngs(seed), **options)


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norm = nnx.RMSNorm(D, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, D, decode=False, rngs=rngs)
        self.mlp = nnx.Sequential(nnx.Linear(D, D, rngs=rngs), nnx.relu, linear())

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.norm(x))
        return x + self.mlp(x)


class Pair(NamedTuple):
    layer: Any
    activation: Any


class Model(nnx.Module):
    """A transformer with layers in all containers, and two that are shared."""

    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(40, D, rngs=rngs)
        self.stem = nnx.Conv(D, D, (3,), rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(2)])
        self.more = nnx.Dict(first=linear(1))
        self.containers = nnx.data(
            {
                "list": [linear(2)],
                "tuple": (linear(3), nnx.relu),
                "named": Pair(linear(5), nnx.relu),
            }
        )
        self.again = self.more.first
        self.router = linear(4, 4)

    def __call__(self, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = self.stem(self.embed(ids))
        for block in self.blocks:
            x = block(x)
        for layer in (self.again, self.containers["list"][0], *self.containers["tuple"]):
            x = layer(x)
        return self.embed.attend(self.more.first(x)), self.router(x)


IDS = np.arange(10).reshape(2, 5)


def test_a_model_is_converted_in_place() -> None:
    model = Model()
    expected, kernel = model(IDS), model.containers["list"][0].kernel[...]
    conv, embed = model.stem, model.embed
    assert ap.quantize_model(model, W8) is model
    for found, value in zip(model(IDS), expected, strict=True):
        assert error(found, value) < 0.03
    for layer in (
        model.more.first, model.containers["list"][0], model.containers["tuple"][0],
        model.containers["named"].layer, model.blocks[1].mlp.layers[0],
    ):  # fmt: skip
        assert type(layer) is ap.nnx.QuantLinear
    assert type(model.blocks[0].attention.query) is ap.nnx.QuantLinearGeneral
    assert model.blocks[0].attention.query.kernel.shape == (D, 4, 16)
    assert model.again is model.more.first
    assert model.stem is conv
    assert model.embed is embed
    assert type(model.router) is nnx.Linear
    assert model.containers["tuple"][1] is nnx.relu
    equal(model.containers["list"][0].kernel.get_value(), W8.pack(kernel))


def test_embeddings_are_converted_when_they_are_named_and_tied_heads_with_them() -> None:
    model = Model()
    expected = model(IDS)[0]
    ap.quantize_model(model, {"embed": ap.Quantization(weights=8, activations=8)})
    assert type(model.embed) is ap.nnx.QuantEmbed
    assert model.embed.embedding.shape == (40, D)
    assert type(model.blocks[0].mlp.layers[0]) is nnx.Linear
    assert error(model(IDS)[0], expected) < 0.02


def test_jit_and_gradients_of_a_converted_model() -> None:
    model, x = nnx.Sequential(linear(), nnx.RMSNorm(D, rngs=nnx.Rngs(0)), linear()), normal(2, D)
    ap.quantize_model(model, {"layers/0": W8})
    expected = model(x)
    np.testing.assert_allclose(nnx.jit(lambda m, x: m(x))(model, x), expected, rtol=1e-5, atol=1e-5)
    grads = nnx.grad(lambda m: (m(x) ** 2).sum())(model)["layers"]
    assert "kernel" not in grads[0]
    for found in (grads[0]["bias"], grads[1]["scale"], grads[2]["kernel"]):
        assert np.abs(found[...]).max() > 0


def test_a_model_of_shapes_becomes_packed_shapes() -> None:
    plan = ap.plan(nnx.eval_shape(Model), W4)
    assert {layer.error for layer in plan.layers} == {None}
    abstract = ap.quantize_model(nnx.eval_shape(Model), plan)
    inside = nnx.eval_shape(lambda: ap.quantize_model(Model(), plan))
    model = ap.quantize_model(Model(), plan)
    shapes = [
        jax.tree.map(lambda x: (x.shape, x.dtype), nnx.state(m)) for m in (abstract, inside, model)
    ]
    assert shapes[0] == shapes[1] == shapes[2]
    nnx.update(abstract, nnx.state(model))
    equal(abstract(IDS), model(IDS))


def test_a_model_that_is_a_layer_is_replaced() -> None:
    layer, x = linear(), normal(2, D)
    found = ap.quantize_model(layer, W8)
    expected = ap.nnx.QuantLinear.from_linear(layer, weights=8, scales="absmax")
    equal(found(x), expected(x))
    assert type(layer) is nnx.Linear


# --- stacks and experts ---


class Stack(nnx.Module):
    """Layers that are scanned over, of each kind."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.up = nnx.Linear(D, D, rngs=rngs, bias_init=NORMAL)
        self.heads = nnx.LinearGeneral(D, (4, 16), rngs=rngs, bias_init=NORMAL)
        self.down = nnx.Einsum("bhk,hkd->bd", (4, 16, D), (D,), rngs=rngs, bias_init=NORMAL)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.down(self.heads(self.up(x)))


def test_stacked_layers_become_stacked_tensors() -> None:
    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def make(rngs: nnx.Rngs) -> Stack:
        return Stack(rngs)

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def run(layer: Stack, x: jax.Array) -> jax.Array:
        return layer(x)

    stack, x = make(nnx.Rngs(0)), normal(2, D)
    graph, state = nnx.split(stack)
    each = [nnx.merge(graph, jax.tree.map(lambda v: v[i], state)) for i in range(3)]  # noqa: B023
    plan = ap.plan(stack, W4)
    errors = [[p.error for p in ap.plan(layer, W4).layers] for layer in each]
    np.testing.assert_allclose([p.error for p in plan.layers], np.mean(errors, 0), rtol=0.01)
    assert {layer.path: layer.shape for layer in plan.layers} == {
        "up": (3, D, D), "heads": (3, D, 4, 16), "down": (3, 4, 16, D)
    }  # fmt: skip
    ap.quantize_model(stack, plan)
    assert stack.down.kernel.get_value().shape == (3, D, D)
    assert stack.down.kernel.shape == (3, 4, 16, D)
    expected = x
    for layer in each:
        expected = ap.quantize_model(layer, W4)(expected)
    np.testing.assert_allclose(run(stack, x), expected, rtol=1e-4, atol=1e-5)


def test_experts() -> None:
    class Experts(nnx.Module):
        def __init__(self) -> None:
            rngs = nnx.Rngs(0)
            self.up = nnx.Einsum("ecd,edf->ecf", (3, D, 2 * D), (3, 2 * D), rngs=rngs)
            self.down = nnx.LinearGeneral(
                2 * D, D, axis=-1, batch_axis={0: 3}, rngs=rngs, bias_init=NORMAL
            )

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.down(nnx.relu(self.up(x)))

    experts, x = Experts(), normal(3, 5, D)
    expected = experts(x)
    ap.quantize_model(experts, W8)
    assert experts.up.kernel.get_value().shape == (3, D, 2 * D)
    assert error(experts(x), expected) < 0.02


def test_a_stack_along_another_axis_stays_in_float() -> None:
    @nnx.split_rngs(splits=3)
    @nnx.vmap(out_axes=1)
    def make(rngs: nnx.Rngs) -> nnx.Linear:
        return nnx.Linear(D, 32, rngs=rngs)

    layer = make(nnx.Rngs(0))
    (planned,) = ap.plan(layer, {"**": None}).layers
    assert planned.shape == (D, 3, 32)
    assert planned.reason == "its kernel should have shape (64, 32) after any stacked axes"


# --- what must not change ---


def test_metadata_and_options_are_kept() -> None:
    def mark(*names: str | None) -> dict[str, Any]:
        return {"out_sharding": names, "eager_sharding": False, "note": "mine"}

    options: dict[str, Any] = {
        "dtype": jnp.bfloat16, "param_dtype": jnp.float16, "rngs": nnx.Rngs(0),
        "promote_dtype": lambda *args, **kwargs: nnx.nn.dtypes.promote_dtype(*args, **kwargs),
    }  # fmt: skip
    dense = {**options, "precision": lax.Precision.HIGH, "preferred_element_type": jnp.float32}
    bias = {"bias_metadata": mark("mlp")}
    model = nnx.Dict(
        linear=nnx.Linear(D, 32, kernel_metadata=mark("embed", "mlp"), **bias, **dense),
        general=nnx.LinearGeneral(
            D, (2, 16), kernel_metadata=mark("embed", "heads", None), **bias, **dense
        ),
        project=nnx.Einsum(
            "bhk,hkd->bd", (4, 16, D), kernel_metadata=mark("heads", "kv", "embed"), **dense
        ),
        embed=nnx.Embed(32, D, embedding_metadata=mark("vocab", "embed"), **options),
    )
    before = dict(model.items())
    ap.quantize_model(model, {"embed": W8, "*": W8})
    names = {
        "linear": ("embed", "mlp"), "general": ("embed", "heads"),
        "project": (("heads", "kv"), "embed"), "embed": ("embed", "vocab"),
    }  # fmt: skip
    for name, layer in model.items():
        kernel = layer.embedding if name == "embed" else layer.kernel
        assert kernel.get_metadata("out_sharding") == names[name]
        assert kernel.get_metadata("note") == "mine"
        if name in ("linear", "general"):
            assert layer.bias is before[name].bias
        for option in options if name == "embed" else dense:
            if option != "rngs":
                assert getattr(layer, option) == getattr(before[name], option)
        x = jnp.asarray(normal(2, 4, 16) if name == "project" else normal(2, D))
        if name != "embed":
            found, expected = layer(x), before[name](x)
            assert found.dtype == expected.dtype == jnp.float32
            assert error(found, expected) < 0.02
    assert model.embed(IDS).dtype == before["embed"](IDS).dtype == jnp.bfloat16


def test_metadata_of_partition_specs_and_stacks() -> None:
    spec = jax.P("layers", "heads", None, ("a", "b"))
    metadata = {"out_sharding": spec, "eager_sharding": False}
    layer = nnx.Einsum("bhk,hkd->bd", (4, 16, D), rngs=nnx.Rngs(0))
    layer.kernel = nnx.Param(normal(2, 4, 16, D), **metadata)
    packed = ap.quantize_model(layer, W8)
    assert packed.kernel.get_metadata("out_sharding") == jax.P("layers", "heads", ("a", "b"))
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("m",))
    layer = linear(kernel_metadata={
        "out_sharding": jax.NamedSharding(mesh, jax.P("m")), "eager_sharding": False,
    })  # fmt: skip
    embed = nnx.Embed(32, D, rngs=nnx.Rngs(0), embedding_metadata={
        "out_sharding": jax.NamedSharding(mesh, jax.P("m")), "eager_sharding": False,
    })  # fmt: skip
    model = ap.quantize_model(nnx.Dict(linear=layer, embed=embed), {"*": W8, "embed": W8})
    assert model.linear.kernel.get_metadata("out_sharding").spec == jax.P("m")
    assert model.embed.embedding.get_metadata("out_sharding").spec == jax.P(None, "m")


def test_layers_made_in_a_mesh_are_converted_outside_of_it() -> None:
    mesh = jax.make_mesh((1,), ("m",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        layer = linear(
            kernel_metadata={"out_sharding": (None, "m")}, bias_metadata={"out_sharding": ("m",)}
        )
    x = normal(2, D)
    expected = layer(x)
    packed = ap.nnx.QuantLinear.from_linear(layer, weights=8)
    assert packed.bias.get_metadata("out_sharding") == ("m",)
    assert error(packed(x), expected) < 0.01
    with jax.set_mesh(mesh):
        assert error(ap.quantize_model(layer, W8)(x), expected) < 0.01


def test_lora_keeps_its_adapter() -> None:
    base, x = linear(), normal(2, D)
    model = nnx.LoRA(D, 4, D, base_module=base, rngs=nnx.Rngs(1), b_initializer=NORMAL)
    expected = model(x)
    ap.quantize_model(model, W8)
    assert type(model.base_module) is ap.nnx.QuantLinear
    assert error(model(x), expected) < 0.01


class Doubled(nnx.Linear):
    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        return 2 * super().__call__(inputs, out_sharding)


class Scores(nnx.Embed):
    def attend(self, query: jax.Array, out_sharding: Any = None) -> jax.Array:
        return -super().attend(query, out_sharding)


class Renamed(nnx.Linear):
    """No other behaviour."""


class Table(nnx.Module):
    def __init__(self) -> None:
        self.table = nnx.Param(normal(D, D))


def test_what_stays_in_float_and_why() -> None:
    def half(*args: Any, **kwargs: Any) -> Any:
        return lax.dot_general(*args, **kwargs) / 2

    rngs = nnx.Rngs(0)
    tied = linear()
    tied.kernel = (first := linear()).kernel
    model = nnx.Dict(
        doubled=Doubled(D, D, rngs=rngs),
        scores=Scores(3, D, rngs=rngs),
        lora=nnx.LoRALinear(D, D, lora_rank=2, rngs=rngs),
        dot=linear(dot_general=half),
        general=nnx.LinearGeneral(D, D, dot_general_cls=lambda: half, rngs=rngs),
        einsum=nnx.Einsum("bd,df->bf", (D, D), einsum_op=lambda *a, **k: a[1], rngs=rngs),
        inner=nnx.Einsum("bd,df->b", (D, D), rngs=rngs),
        first=first,
        tied=tied,
        complex=linear(param_dtype=jnp.complex64),
        conv=nnx.ConvTranspose(3, 4, (3,), rngs=rngs),
        norm=nnx.LayerNorm(D, rngs=rngs),
        table=Table(),
        packed=ap.nnx.QuantLinear(D, D, rngs=rngs),
        renamed=Renamed(D, D, rngs=rngs),
    )
    plan = ap.plan(model, {"**": W8, "score*": W8})
    assert {p.path: p.reason for p in plan.layers} == {
        "doubled": "Doubled overrides __call__ of Linear",
        "scores": "Scores overrides attend of Embed",
        "lora": "LoRALinear overrides __call__ of Linear",
        "lora/lora": "LoRA has no packed form",
        "dot": "has a dot_general of its own",
        "general": "has a dot_general_cls of its own",
        "einsum": "has a einsum_op of its own",
        "inner": "spec 'bd,df->b' is no product of x and a weight: "
        "index 'f' is in the weight alone and would be summed out",
        "first": "its kernel is in other modules too: first/kernel, tied/kernel",
        "tied": "its kernel is in other modules too: first/kernel, tied/kernel",
        "complex": "weights of complex64 are not quantized",
        "conv": "convolution",
        "norm": "LayerNorm has no packed form",
        "table": "Table has no packed form",
        "packed": "packed already",
        "renamed": 'rule "**"',
    }
    kinds = {p.path: p.kind for p in plan.layers}
    assert (kinds["scores"], kinds["first"]) == ("Scores(Embed)", "Linear")
    before = dict(model.items())
    ap.quantize_model(model, plan)
    assert {name for name, layer in model.items() if layer is not before[name]} == {"renamed"}


class Holder(nnx.Pytree):
    """No module, but Flax knows what it holds."""

    def __init__(self) -> None:
        self.layer = linear()


@struct.dataclass
class Box:
    """A container of JAX alone."""

    layer: Any


class Unusual(nnx.Variable):
    def get_value(self, **options: Any) -> Any:
        return super().get_value(**options)


def test_what_lies_in_or_around_a_layer() -> None:
    rngs = nnx.Rngs(0)
    model = nnx.Dict(
        holder=Holder(),
        box=nnx.data(Box(linear())),
        spectral=nnx.SpectralNorm(linear(), rngs=rngs),
        weight=nnx.WeightNorm(nnx.Sequential(linear()), rngs=rngs),
        frozen=linear(),
        unusual=linear(),
    )
    model.frozen.kernel = nnx.Variable(model.frozen.kernel[...])
    model.unusual.kernel = Unusual(model.unusual.kernel[...])
    plan = ap.plan(model, W8, errors=False)
    assert {p.path: p.reason for p in plan.layers if p.kind == "Linear"} == {
        "holder/layer": 'rule "**"',
        "box/layer": "lies in a container that conversion can't change: neither of Flax nor of "
        "Python",
        "spectral/layer_instance": "its weights are rewritten by the SpectralNorm around it",
        "weight/layer_instance/layers/0": "its weights are rewritten by the WeightNorm around it",
        "frozen": 'rule "**"',
        "unusual": "its kernel is a Unusual, which overrides get_value",
    }
    frozen = next(p for p in plan.layers if p.path == "frozen")
    assert frozen.bytes_before == 4 * D * (D + 1)
    x = normal(2, D)
    expected = model.frozen(x)
    ap.quantize_model(model, plan)
    assert type(model.holder.layer) is type(model.frozen) is ap.nnx.QuantLinear
    assert type(model.box.layer) is nnx.Linear
    assert error(model.frozen(x), expected) < 0.01


@pytest.mark.filterwarnings("ignore:Variable hooks are deprecated")
def test_variables_with_hooks_stay_in_float() -> None:
    layer = linear()
    layer.bias = nnx.Param(layer.bias[...], on_get_value=lambda variable, value: 2 * value)
    (planned,) = ap.plan(layer, W8).layers
    assert planned.reason == "its bias has a hook on_get_value"


def test_a_kernel_promotes_with_its_own_dtype() -> None:
    model = nnx.Dict(
        linear=linear(),
        general=nnx.LinearGeneral(D, (4, 16), rngs=nnx.Rngs(0)),
    )
    for layer in model.values():  # as casting a model of float32 does
        layer.kernel.set_value(layer.kernel[...].astype(jnp.bfloat16))
        layer.bias.set_value(layer.bias[...].astype(jnp.bfloat16))
    x = jnp.asarray(normal(2, D), jnp.bfloat16)
    expected = {name: layer(x).dtype for name, layer in model.items()}
    ap.quantize_model(model, W8)
    assert {name: layer(x).dtype for name, layer in model.items()} == expected
    assert set(expected.values()) == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("preferred", [jnp.bfloat16, jnp.float32])
def test_a_wider_bias_widens_the_preferred_dtype(preferred: Any) -> None:
    for layer in (
        linear(preferred_element_type=preferred),
        nnx.LinearGeneral(D, 8, preferred_element_type=preferred, rngs=nnx.Rngs(0)),
    ):
        x = normal(2, D)
        assert ap.quantize_model(layer, W8)(x).dtype == layer(x).dtype == jnp.float32


# --- errors ---


def test_models_that_are_refused_are_not_changed() -> None:
    model = nnx.Dict(
        a=linear(1), b=nnx.Linear(40, D, rngs=nnx.Rngs(0)), norm=nnx.RMSNorm(D, rngs=nnx.Rngs(0))
    )
    layers = dict(model.items())
    refused = {
        r"layer 'b' of shape \(40, 64\) can't become W4A8 g32: group_size must be a multiple": (
            ap.Quantization(weights=4, group_size=32)
        ),
        r"layer 'b' .* W4A8 rotated: k must be a multiple of 64": (
            ap.Quantization(weights=4, rotate=True)
        ),
        "rule 'c' matches no layer": {"c": W8, "a": W8},
        'no layer would be quantized: a: rule "a"; b: no rule matches; norm: RMSNorm': {"a": None},
        r"the plan is for another model: \[\('', 'Linear', \(64, 64\), 'float32'\)\] of the plan": (
            ap.plan(linear(), W8)
        ),
    }
    for message, rules in refused.items():
        with pytest.raises(ValueError, match=message):
            ap.quantize_model(model, rules)
    assert dict(model.items()) == layers
    with pytest.raises(TypeError, match=r"model must be a flax\.nnx\.Module or a flax\.linen"):
        ap.quantize_model({}, W8)
    with pytest.raises(TypeError, match=r"a flax\.nnx\.Module needs no variables"):
        ap.plan(model, W8, {})


def test_weights_that_are_not_finite_are_named() -> None:
    model = nnx.Dict(a=linear(1), b=linear(2))
    model.b.kernel.set_value(model.b.kernel[...].at[0, 0].set(jnp.nan))
    for call in (ap.plan, ap.quantize_model):
        with pytest.raises(ValueError, match=r"layer 'b' of shape .*: weights must be finite"):
            call(model, W8)


# --- memory ---


@dataclasses.dataclass(frozen=True)
class Watched(ap.Quantization):
    """Notes how much is held whenever a weight has been packed."""

    seen: list[int] = dataclasses.field(default_factory=list, hash=False, compare=False)

    def pack(self, kernel: jax.Array) -> ap.QuantizedTensor:
        packed = super().pack(kernel)
        if not isinstance(kernel, jax.core.Tracer):
            self.seen.append(sum(x.nbytes for x in jax.live_arrays()))
        return packed


def test_no_more_is_held_than_the_model_and_one_layer() -> None:
    gc.collect()
    others = sum(x.nbytes for x in jax.live_arrays())
    model = nnx.List([linear(i, 512) for i in range(8)])
    layer = model[0].kernel[...].nbytes
    whole = sum(x.nbytes for x in jax.live_arrays()) - others
    watched = Watched(weights=8, activations=None)
    ap.quantize_model(model, watched)
    packed = model[0].kernel.get_value().nbytes
    assert len(watched.seen) == 8
    for i, held in enumerate(watched.seen):
        assert held - others <= whole - i * (layer - packed) + packed
    assert sum(x.nbytes for x in jax.live_arrays()) - others == whole - 8 * (layer - packed)


# --- QuantEinsum and QuantLinearGeneral ---


def test_signatures_follow_those_of_flax() -> None:
    pairs = {
        nnx.Einsum: (ap.nnx.QuantEinsum, {"einsum_op"}),
        nnx.Embed: (ap.nnx.QuantEmbed, {"num_embeddings", "features", "embedding_init", "rngs"}),
    }
    for theirs, (ours, missing) in pairs.items():
        expected = inspect.signature(theirs.__init__).parameters
        found = inspect.signature(ours.__init__).parameters
        assert set(expected) - set(found) == missing
        call = inspect.signature(theirs.__call__).parameters
        assert list(inspect.signature(ours.__call__).parameters) == list(call)
    attend = inspect.signature(nnx.Embed.attend).parameters
    assert list(inspect.signature(ap.nnx.QuantEmbed.attend).parameters) == list(attend)
    general = inspect.signature(ap.nnx.QuantLinearGeneral.__init__).parameters
    einsum = inspect.signature(ap.nnx.QuantEinsum.__init__).parameters
    expected = inspect.signature(nnx.LinearGeneral.__init__).parameters
    assert set(expected) - {*general, *einsum} == {"dot_general", "dot_general_cls"}


@pytest.mark.parametrize(
    ("shape", "arguments"),
    [
        ((2, 3, D), {"in_features": D, "out_features": (4, 16)}),
        ((2, 3, D), {"in_features": (3, D), "out_features": 8, "axis": (1, -1)}),
        ((2, 3, D), {"in_features": (3, D), "out_features": (4, 2), "axis": (-1, 1)}),
        ((2, 3, D), {"in_features": D, "out_features": 8, "batch_axis": {0: 2}}),
        ((2, 3, 5, D), {"in_features": D, "out_features": 8, "batch_axis": {0: 2, 1: 3}}),
        ((2, D, 3), {"in_features": D, "out_features": 8, "axis": 1, "use_bias": False}),
    ],
)
def test_general_layers_draw_and_compute_as_in_flax(
    shape: tuple[int, ...], arguments: dict[str, Any]
) -> None:
    x = normal(*shape)
    theirs = nnx.LinearGeneral(**arguments, bias_init=NORMAL, rngs=nnx.Rngs(2))
    ours = ap.nnx.QuantLinearGeneral(
        **arguments, bias_init=NORMAL, quantization=W8, rngs=nnx.Rngs(2)
    )
    expected = theirs(x)
    assert ours(x).shape == expected.shape
    assert error(ours(x), expected) < 0.02
    equal(ap.nnx.QuantLinearGeneral.from_linear_general(theirs, W8)(x), ours(x))


def test_einsum_draws_and_computes_as_in_flax() -> None:
    arguments = ("nta,hab->nthb", (8, D, 4), (8, 4))
    theirs = nnx.Einsum(*arguments, bias_init=NORMAL, rngs=nnx.Rngs(2))
    ours = ap.nnx.QuantEinsum(*arguments, bias_init=NORMAL, quantization=W8, rngs=nnx.Rngs(2))
    x = normal(2, 3, D)
    assert error(ours(x), theirs(x)) < 0.02
    equal(ap.nnx.QuantEinsum.from_einsum(theirs, W8)(x), ours(x))
    other = "nta,hab->hntb"
    assert error(ours(x, other), theirs(x, other)) < 0.02
    with pytest.raises(ValueError, match="einsum_str must use the kernel's axes as 'nta,"):
        ours(x, "nth,hab->ntab")
    flat = nnx.Einsum("nta,hab->nthb", (8, D, 4), (32,), bias_init=NORMAL, rngs=nnx.Rngs(2))
    assert error(ap.nnx.QuantEinsum.from_einsum(flat, W8)(x), flat(x)) < 0.02


def test_an_embedding_of_one_row_answers_to_any_id() -> None:
    embed = nnx.Embed(1, D, rngs=nnx.Rngs(0))
    packed = ap.nnx.QuantEmbed.from_embed(embed, W8)
    assert error(packed(IDS), embed(IDS)) < 0.01


def test_bad_arguments_of_the_layers() -> None:
    layers, rngs = ap.nnx, nnx.Rngs(0)
    w = W8.pack(normal(D, 8))
    with pytest.raises(ValueError, match=r"kernel must have shape \(64, 16\), got \(64, 8\)"):
        layers.QuantEinsum("bd,df->bf", (D, 16), kernel=w)
    with pytest.raises(ValueError, match=r"bias_shape must have 8 values for .*, got \(4,\)"):
        layers.QuantEinsum("bd,df->bf", (D, 8), (4,), kernel=w, rngs=rngs)
    with pytest.raises(TypeError, match=r"rngs must be an nnx\.Rngs"):
        layers.QuantEinsum("bd,df->bf", (D, 8))
    with pytest.raises(ValueError, match=r"one axis for each of in_features \(64,\), got \(0, 1\)"):
        layers.QuantLinearGeneral(D, 8, axis=(0, 1), kernel=w, use_bias=False)
    with pytest.raises(ValueError, match=r"leading axes 0, 1, ..., got \{1: 2\}"):
        layers.QuantLinearGeneral(D, 8, batch_axis={1: 2}, kernel=w, use_bias=False)
    with pytest.raises(ValueError, match=r"inputs must have the axes \(3,\), got shape \(2, 64\)"):
        layers.QuantLinearGeneral(D, 8, axis=3, kernel=w, use_bias=False)(normal(2, D))
    layer = linear()
    for convert, name in (
        (layers.QuantEinsum.from_einsum, "layer must be a flax.nnx.Einsum"),
        (layers.QuantLinearGeneral.from_linear_general, "layer must be a flax.nnx.LinearGeneral"),
        (layers.QuantEmbed.from_embed, "embed must be a flax.nnx.Embed"),
    ):
        with pytest.raises(TypeError, match=f"{name}, got Linear"):
            convert(layer, W8)
    with pytest.raises(ValueError, match="embed has no packed form: Scores overrides attend of"):
        layers.QuantEmbed.from_embed(Scores(3, D, rngs=rngs), W8)
    layer = nnx.Einsum("bd,df->bf", (D, D), einsum_op=lambda *a, **k: a[1], rngs=rngs)
    with pytest.raises(ValueError, match="layer has no packed form: has a einsum_op of its own"):
        layers.QuantEinsum.from_einsum(layer, W8)


def test_the_examples_of_the_documentation_run(capsys: pytest.CaptureFixture[str]) -> None:
    page = Path(__file__).parents[1] / "docs" / "conversion.md"
    text = page.read_text("utf-8")
    names: dict[str, Any] = {"__name__": "conversion"}
    for block in re.findall(r'^```python title="conversion"\n(.*?)^```', text, re.M | re.S):
        exec(compile(block, str(page), "exec"), names)
    assert 'rule "blocks/0/**"' in capsys.readouterr().out
    assert names["model"].blocks[1].up.kernel.get_value().prepared
