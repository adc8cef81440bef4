"""Every operation and layer under every transform of JAX, and layers under those of Flax."""

from __future__ import annotations

import concurrent.futures
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from operations import (
    DIFFERENTIABLE,
    GROUP,
    LINEAR,
    OPERATIONS,
    M,
    N,
    Operation,
    at,
    close,
    stack,
)

import jax_anyprec as ap

every_operation = pytest.mark.parametrize("name", OPERATIONS)
every_differentiable = pytest.mark.parametrize("name", DIFFERENTIABLE)


def rows(op: Operation, count: int) -> np.ndarray:
    """`count` different inputs of an operation, along a new first axis."""
    return np.stack([np.roll(op.x, i, 0) for i in range(count)])


def loss(op: Operation) -> Any:
    return lambda x, weights: jnp.sin(op.run(x, weights)).sum()


# --- jit, shapes, ahead of time, donation ---


@every_operation
def test_jit(name: str) -> None:
    op = OPERATIONS[name]
    close(jax.jit(op.run)(op.x, op.weights), op())


@every_operation
def test_eval_shape(name: str) -> None:
    op = OPERATIONS[name]
    abstract = jax.eval_shape(lambda: (jnp.asarray(op.x), op.weights))
    found = jax.eval_shape(op.run, *abstract)
    expected = op()
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    shapes = lambda tree: [(v.shape, v.dtype) for v in jax.tree.leaves(tree)]  # noqa: E731
    assert shapes(found) == shapes(expected)


@every_operation
def test_ahead_of_time(name: str) -> None:
    op = OPERATIONS[name]
    abstract = jax.eval_shape(lambda: (jnp.asarray(op.x), op.weights))
    compiled = jax.jit(op.run).lower(*abstract).compile()
    close(compiled(op.x, op.weights), op())


@every_operation
def test_donation(name: str) -> None:
    """The results come from the old buffers, which then hold other values."""
    op = OPERATIONS[name]
    expected = op()
    change = lambda tree: jax.tree.map(lambda v: v + 1, tree)  # noqa: E731
    run = jax.jit(
        lambda x, weights: (op.run(x, weights), change(x), change(weights)), donate_argnums=(0, 1)
    )
    donated = jax.tree.map(jnp.array, (op.x, op.weights))
    found, x, weights = run(*donated)
    close((found, x, weights), (expected, change(jnp.asarray(op.x)), change(op.weights)))
    assert all(v.is_deleted() for v in jax.tree.leaves(donated))


# --- vmap and control flow ---


@every_operation
def test_vmap(name: str) -> None:
    """Over x, over weights, over both, and nested, against loops."""
    op = OPERATIONS[name]
    xs, weights = rows(op, 2), stack(op.weights, 2)
    run = jax.jit(op.run)
    grid = [[run(x, at(weights, i)) for i in range(2)] for x in xs]  # [x][weights]
    stacked = lambda results: jax.tree.map(lambda *v: np.stack(v), *results)  # noqa: E731

    over_x, both = jax.vmap(op.run, (0, None)), jax.vmap(op.run)
    first = at(weights, 0)
    mapped = {
        "x": (over_x, xs, first),
        "both": (both, xs, weights),
        "x, x": (jax.vmap(over_x, (1, None)), np.stack([xs, xs[::-1]], 1), first),
        "x, both": (jax.vmap(both, (1, None)), np.stack([xs, xs[::-1]], 1), weights),
    }
    column = [grid[0][0], grid[1][0]]
    expected = {
        "x": stacked(column),
        "both": stacked([grid[0][0], grid[1][1]]),
        "x, x": stacked([stacked(column), stacked(column[::-1])]),
        "x, both": stacked([stacked([grid[0][0], grid[1][1]]), stacked([grid[1][0], grid[0][1]])]),
    }
    if op.weights != ():
        over_weights = jax.vmap(op.run, (None, 0))
        mapped["weights"] = (over_weights, xs[0], weights)
        expected["weights"] = stacked(grid[0])
        mapped["x, weights"] = (jax.vmap(over_weights, (0, None)), xs, weights)
        expected["x, weights"] = stacked([stacked(row) for row in grid])
        mapped["weights, x"] = (jax.vmap(over_x, (None, 0)), xs, weights)
        expected["weights, x"] = stacked([stacked(column) for column in zip(*grid, strict=True)])
    found = jax.jit(lambda each: {key: f(*each[key]) for key, (f, *_) in mapped.items()})(
        {key: args for key, (_, *args) in mapped.items()}
    )
    close(found, expected)


@every_operation
def test_scan(name: str) -> None:
    op = OPERATIONS[name]
    xs, weights = rows(op, 3), stack(op.weights, 3)
    step = lambda count, each: (count + 1, op.run(*each))  # noqa: E731
    count, found = jax.jit(lambda *each: jax.lax.scan(step, 0, each))(xs, weights)
    assert count == 3
    for i in range(3):
        close(at(found, i), op.run(xs[i], at(weights, i)))


@every_operation
def test_while_loop(name: str) -> None:
    op = OPERATIONS[name]
    xs = rows(op, 3)
    results = [op.run(x, op.weights) for x in xs]
    add = lambda a, b: jax.tree.map(lambda a, b: a + b, a, b)  # noqa: E731

    @jax.jit
    def run(xs: Any, weights: Any) -> Any:
        def step(state: Any) -> Any:
            i, total = state
            return i + 1, add(total, op.run(xs[i], weights))

        start = jax.tree.map(lambda v: np.zeros(v.shape, v.dtype), results[0])
        return jax.lax.while_loop(lambda state: state[0] < 3, step, (0, start))[1]

    close(run(xs, op.weights), add(add(results[0], results[1]), results[2]))


@every_operation
def test_checkpoint(name: str) -> None:
    op = OPERATIONS[name]
    close(jax.jit(jax.checkpoint(op.run))(op.x, op.weights), op())


@every_differentiable
def test_gradient_of_checkpoint(name: str) -> None:
    op = OPERATIONS[name]
    found = jax.jit(jax.grad(jax.checkpoint(loss(op))))(op.x, op.weights)
    close(found, jax.jit(jax.grad(loss(op)))(op.x, op.weights))


# --- derivatives of layers; those of the operations are in test_transforms.py ---


def floats(tree: Any) -> tuple[Any, Any]:
    """The float leaves of a tree, and a function that puts others in their place."""
    leaves, structure = jax.tree.flatten(tree)
    chosen = [jnp.issubdtype(v.dtype, jnp.floating) for v in leaves]

    def replace(values: Any) -> Any:
        rest = iter(values)
        return jax.tree.unflatten(
            structure, [next(rest) if c else v for c, v in zip(chosen, leaves, strict=True)]
        )

    return [v for c, v in zip(chosen, leaves, strict=True) if c], replace


@pytest.mark.parametrize("name", ["QuantLinear", "QuantDense", "QuantEmbed"])
def test_derivatives_of_layers(name: str) -> None:
    """With respect to scales, offsets and bias: outputs are linear in all of them together."""
    op = OPERATIONS[name]
    values, replace = floats(op.weights)
    run = lambda values: jax.tree.leaves(op.run(op.x, replace(values)))[0]  # noqa: E731
    y, y_dot = jax.jit(lambda v: jax.jvp(run, [v], [v]))(values)
    close(y_dot, y)

    cotangent = np.random.default_rng(1).normal(size=y.shape).astype(np.float32)
    (gradient,) = jax.jit(lambda v: jax.vjp(run, v)[1](cotangent))(values)
    inner = sum(float(jnp.vdot(g, v)) for g, v in zip(gradient, values, strict=True))
    np.testing.assert_allclose(inner, np.vdot(cotangent, y), rtol=1e-4)

    half_square = lambda v: (run(v) ** 2).sum() / 2  # noqa: E731
    gradient, along = jax.jit(lambda v: jax.jvp(jax.grad(half_square), [v], [v]))(values)
    close(along, gradient)  # the second derivative of a quadratic form, along its own argument


@pytest.mark.parametrize("name", ["QuantLinear", "QuantDense", "QuantEmbed"])
def test_gradients_of_mapped_layers(name: str) -> None:
    """Gradient and hvp in the floats of stacked layers: mapped over x and layers, and scanned."""
    op = OPERATIONS[name]
    xs, stacked = rows(op, 2), stack(op.weights, 2)
    values, replace = floats(stacked)
    over_x = jax.vmap(op.run, (0, None))

    def mapped(weights: Any) -> Any:
        return jax.vmap(over_x, (None, 0))(xs, weights)

    def scanned(weights: Any) -> Any:
        return jax.lax.scan(lambda _, each: (None, over_x(xs, each)), None, weights)[1]

    def looped(weights: Any) -> Any:
        each = [op.run(x, jax.tree.map(lambda v, i=i: v[i], weights)) for i in range(2) for x in xs]
        return jax.tree.map(lambda *v: jnp.stack(v).reshape(2, 2, *v[0].shape), *each)

    def derive(f: Any) -> Any:
        total = lambda v: sum(jnp.sin(y).sum() for y in jax.tree.leaves(f(replace(v))))  # noqa: E731
        return jax.jit(lambda v: jax.jvp(jax.grad(total), [v], [v]))(values)

    expected = derive(looped)
    close(derive(mapped), expected)
    close(derive(scanned), expected)

    def of_each(weights: Any) -> Any:
        values, replace = floats(weights)
        outputs = lambda v: jax.tree.leaves(over_x(xs, replace(v)))  # noqa: E731
        return jax.grad(lambda v: sum(jnp.sin(y).sum() for y in outputs(v)))(values)

    close(jax.jit(jax.vmap(of_each))(stacked), expected[0])


@pytest.mark.parametrize("name", LINEAR)
def test_derivatives_in_x(name: str) -> None:
    """The derivative in x is the product with the weights as floats, whatever its rounding."""
    op = OPERATIONS[name]
    float_op = OPERATIONS["matmul-float"]
    w = next(
        t
        for t in jax.tree.leaves(op.weights, is_leaf=lambda t: isinstance(t, ap.QuantizedTensor))
        if isinstance(t, ap.QuantizedTensor)
    )
    direction, cotangent = np.roll(op.x, 1, 1), np.ones((M, N), np.float32)
    y_dot = jax.jit(lambda x, t: jax.jvp(lambda x: op.run(x, op.weights), [x], [t])[1])
    close(y_dot(op.x, direction), float_op.run(direction, w))
    (x_bar,) = jax.jit(lambda x: jax.vjp(lambda x: op.run(x, op.weights), x)[1](cotangent))(op.x)
    close(x_bar, jnp.asarray(np.tile(np.asarray(w.dequantize()).sum(1), (M, 1))))


@pytest.mark.parametrize("name", ["int_matmul", "QuantEmbed"])
def test_integer_inputs_have_no_tangent(name: str) -> None:
    op = OPERATIONS[name]
    total = lambda x: sum(y.sum() for y in jax.tree.leaves(op.run(x, op.weights))) * 1.0  # noqa: E731
    gradient = jax.jit(jax.grad(total, allow_int=True))(op.x)
    assert gradient.dtype == jax.dtypes.float0


# --- modes ---


@every_operation
def test_wide_floats(name: str) -> None:
    """With 64-bit types enabled, everything stays as wide as it was."""
    op = OPERATIONS[name]
    weights = stack(op.weights, 2)
    run = lambda x, weights: jax.lax.map(lambda each: op.run(x, each[1]), (jnp.arange(2), weights))  # noqa: E731
    expected = jax.jit(run)(op.x, weights)
    gradient = name in DIFFERENTIABLE and jax.jit(jax.grad(loss(op)))(op.x, op.weights)
    with jax.enable_x64(True):
        close(jax.jit(run)(op.x, weights), expected)
        if name in DIFFERENTIABLE:
            close(jax.jit(jax.grad(loss(op)))(op.x, op.weights), gradient)


@every_operation
def test_debug_nans(name: str) -> None:
    op = OPERATIONS[name]
    weights = stack(op.weights, 2)
    with jax.debug_nans(True):
        op()
        jax.jit(jax.vmap(op.run))(rows(op, 2), weights)
        if name in DIFFERENTIABLE:
            jax.jit(jax.grad(loss(op)))(op.x, op.weights)


@every_differentiable
def test_debug_nans_finds_one(name: str) -> None:
    op = OPERATIONS[name]
    bad = op.x.copy()
    bad[1, 2] = np.nan
    with jax.debug_nans(True), pytest.raises(FloatingPointError, match="nan"):
        jax.jit(op.run)(bad, op.weights)


@every_operation
def test_threads(name: str) -> None:
    op = OPERATIONS[name]
    run, xs = jax.jit(op.run), rows(op, 8)
    expected = [run(x, op.weights) for x in xs]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for _ in range(10):
            for found, wanted in zip(
                pool.map(lambda x: run(x, op.weights), xs), expected, strict=True
            ):
                jax.tree.map(np.testing.assert_array_equal, found, wanted)


# --- Flax: transforms of modules ---

LAYERS, WIDTH = 3, 64


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(2).normal(size=shape).astype(np.float32)


@functools.cache
def tensors() -> ap.QuantizedTensor:
    """One packed matrix for each of LAYERS, prepared."""
    w = ap.quantize(normal(LAYERS, WIDTH, WIDTH) / 8, 4, group_size=GROUP, scales="absmax")
    return w.prepare()


def linears() -> tuple[ap.nnx.QuantLinear, list[ap.nnx.QuantLinear]]:
    """LAYERS layers as one module with stacked variables, and one by one."""

    @nnx.vmap
    def make(w: ap.QuantizedTensor, bias: Any) -> ap.nnx.QuantLinear:
        return ap.nnx.QuantLinear.from_tensor(w, bias=bias, activations=8)

    w, biases = tensors(), normal(LAYERS, WIDTH)
    one = lambda i: ap.nnx.QuantLinear.from_tensor(  # noqa: E731
        at(w, i), bias=jnp.asarray(biases[i]), activations=8
    )
    return make(w, biases), [one(i) for i in range(LAYERS)]


def test_nnx_scan_and_remat() -> None:
    """Values, and gradients of the biases and of x; packed variables have none."""
    stacked, each = linears()
    x = normal(M, WIDTH)

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    @nnx.remat
    def run(layer: ap.nnx.QuantLinear, x: jax.Array) -> jax.Array:
        return jnp.tanh(layer(x))

    def unrolled(layers: Any, x: jax.Array) -> jax.Array:
        for layer in layers:
            x = jnp.tanh(layer(x))
        return x

    derive = lambda f: nnx.jit(  # noqa: E731
        nnx.value_and_grad(lambda layers, x: (f(layers, x) ** 2).sum(), argnums=(0, 1))
    )
    y, (grads, dx) = derive(run)(stacked, x)
    expected_y, (expected, expected_dx) = derive(unrolled)(nnx.List(each), x)
    close((y, dx), (expected_y, expected_dx))
    assert set(grads) == {"bias"}
    close(grads["bias"][...], jnp.stack([expected[i]["bias"][...] for i in range(LAYERS)]))


def test_nnx_vmap() -> None:
    stacked, each = linears()
    x, xs = normal(M, WIDTH), normal(LAYERS, M, WIDTH)
    call = lambda layer, x: layer(x)  # noqa: E731
    close(nnx.vmap(call, in_axes=(0, None))(stacked, x), jnp.stack([f(x) for f in each]))
    close(nnx.vmap(call)(stacked, xs), jnp.stack([f(x) for f, x in zip(each, xs, strict=True)]))
    close(nnx.vmap(call, in_axes=(None, 0))(each[0], xs), each[0](xs))


def test_nnx_loops_and_branches() -> None:
    _, (first, second, _) = linears()
    x = normal(M, WIDTH)
    expected = x
    for _ in range(3):
        expected = jnp.tanh(first(expected))

    @nnx.jit
    def loop(layer: ap.nnx.QuantLinear, x: Any) -> jax.Array:
        step = lambda i, state: (state[0], jnp.tanh(state[0](state[1])))  # noqa: E731
        return nnx.fori_loop(0, 3, step, (layer, x))[1]

    close(loop(first, x), expected)

    @nnx.jit
    def repeat(layer: ap.nnx.QuantLinear, x: Any) -> jax.Array:
        step = lambda state: (state[0], jnp.tanh(state[0](state[1])), state[2] + 1)  # noqa: E731
        return nnx.while_loop(lambda state: state[2] < 3, step, (layer, x, 0))[1]

    close(repeat(first, x), expected)
    branch = nnx.jit(
        lambda choose, a, b, x: nnx.cond(
            choose, lambda a, b, x: a(x), lambda a, b, x: b(x), a, b, x
        )
    )
    close(branch(True, first, second, x), first(x))
    close(branch(False, first, second, x), second(x))


class Tied(nnx.Module):
    """Looks up, projects, and scores against the same packed table."""

    def __init__(self) -> None:
        self.embed = ap.nnx.QuantEmbed.from_tensor(at(tensors(), 0), activations=8)
        self.linear = linears()[1][1]

    def __call__(self, ids: jax.Array) -> jax.Array:
        return self.embed.attend(self.linear(self.embed(ids)))


def test_nnx_grad_passes_through_a_packed_table() -> None:
    model, ids = Tied(), np.arange(6).reshape(2, 3)
    scores = nnx.jit(lambda model, ids: model(ids))(model, ids)
    close(nnx.vmap(lambda model, i: model(i), in_axes=(None, 0))(model, ids), scores)
    remat = nnx.remat(lambda model, ids: model(ids))
    grads = nnx.jit(nnx.grad(lambda model, ids: remat(model, ids).sum()))(model, ids)
    assert [path for path, _ in nnx.to_flat_state(grads)] == [("linear", "bias")]
    table = np.asarray(model.embed.embedding.get_value().dequantize())
    close(grads["linear"]["bias"][...], jnp.asarray(ids.size * table.sum(1)))


def tables() -> list[ap.nnx.QuantEmbed]:
    return [ap.nnx.QuantEmbed.from_tensor(at(tensors(), i), activations=8) for i in range(LAYERS)]


def test_nnx_maps_of_tables() -> None:
    stacked = nnx.vmap(lambda w: ap.nnx.QuantEmbed.from_tensor(w, activations=8))(tensors())
    ids = np.arange(6).reshape(2, 3)
    call = lambda layer, ids: (layer(ids), layer.attend(layer(ids)))  # noqa: E731
    each = [call(layer, ids) for layer in tables()]
    expected = jax.tree.map(lambda *v: jnp.stack(v), *each)
    close(nnx.jit(nnx.vmap(call, in_axes=(0, None)))(stacked, ids), expected)
    close(nnx.jit(nnx.scan(call, in_axes=(0, None), out_axes=0))(stacked, ids), expected)


def test_nnx_eval_shape_of_tables() -> None:
    table, ids = tables()[0], np.arange(3)
    abstract = nnx.eval_shape(lambda: ap.nnx.QuantEmbed.from_tensor(at(tensors(), 0)))
    assert isinstance(jax.tree.leaves(abstract.embedding.get_value())[0], jax.ShapeDtypeStruct)
    nnx.update(abstract, nnx.state(table))
    close(abstract(ids), table(ids))


def test_nnx_loops_and_branches_of_tables() -> None:
    first, second, _ = tables()
    x = normal(M, WIDTH)
    expected = jnp.tanh(first.attend(jnp.tanh(first.attend(x))))

    @nnx.jit
    def run(first: ap.nnx.QuantEmbed, second: ap.nnx.QuantEmbed, x: Any) -> Any:
        step = lambda state: (state[0], jnp.tanh(state[0].attend(state[1])), state[2] + 1)  # noqa: E731
        return (
            nnx.fori_loop(0, 2, lambda _, state: step(state), (first, x, 0))[1],
            nnx.while_loop(lambda state: state[2] < 2, step, (first, x, 0))[1],
            nnx.cond(x[0, 0] > x[0, 0] + 1, lambda a, b, x: a.attend(x),
                     lambda a, b, x: b.attend(x), first, second, x),
        )  # fmt: skip

    close(run(first, second, x), (expected, expected, second.attend(x)))


class Dense(nn.Module):
    """A step of a scan over `QuantDense`."""

    @nn.compact
    def __call__(self, x: jax.Array, _: Any) -> tuple[jax.Array, None]:
        layer = ap.linen.QuantDense(WIDTH, activations=8, group_size=GROUP, name="dense")
        return jnp.tanh(layer(x)), None


def test_linen_scan_and_remat() -> None:
    x = normal(M, WIDTH)
    model = nn.scan(
        nn.remat(Dense), variable_axes={"params": 0, "packed": 0}, split_rngs={"params": True},
        length=LAYERS,
    )()  # fmt: skip
    variables = jax.jit(model.init)(jax.random.key(0), x, None)
    params, packed = {"dense": {"bias": normal(LAYERS, WIDTH)}}, variables["packed"]
    assert jax.tree.map(np.shape, variables["params"]) == jax.tree.map(np.shape, params)

    def scanned(params: Any, x: Any) -> jax.Array:
        return (model.apply({"params": params, "packed": packed}, x, None)[0] ** 2).sum()

    def unrolled(params: Any, x: Any) -> jax.Array:
        for i in range(LAYERS):
            each = jax.tree.map(lambda v: v[i], {"params": params, "packed": packed})  # noqa: B023
            x, _ = Dense().apply(each, x, None)
        return (x**2).sum()

    close(*(jax.jit(jax.value_and_grad(f, (0, 1)))(params, x) for f in (scanned, unrolled)))


def test_linen_vmap_jit_and_while() -> None:
    x, xs = normal(M, WIDTH), normal(LAYERS, M, WIDTH)
    layer = ap.linen.QuantDense(WIDTH, activations=8, group_size=GROUP)
    many = nn.vmap(
        ap.linen.QuantDense, variable_axes={"params": 0, "packed": 0}, split_rngs={"params": True}
    )(WIDTH, activations=8, group_size=GROUP)
    variables = jax.jit(many.init)(jax.random.key(0), xs)
    each = [layer.apply(at(variables, i), xs[i]) for i in range(LAYERS)]
    close(many.apply(variables, xs), jnp.stack(each))

    class Loop(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            dense = nn.jit(ap.linen.QuantDense)(
                WIDTH, activations=8, group_size=GROUP, name="dense"
            )
            if self.is_initializing():
                return dense(x)
            step = lambda dense, state: (state[0] + 1, jnp.tanh(dense(state[1])))  # noqa: E731
            return nn.while_loop(lambda _, state: state[0] < 3, step, dense, (0, x))[1]

    variables = at(variables, 0)
    nested = {collection: {"dense": v} for collection, v in variables.items()}
    expected = x
    for _ in range(3):
        expected = jnp.tanh(layer.apply(variables, expected))
    close(jax.jit(Loop().apply)(nested, x), expected)
