"""Every public operation and layer as a function of an array and of weights, for transforms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jax_anyprec as ap

M, N, K, GROUP = 5, 7, 64, 32


class Operation(NamedTuple):
    """``run(x, weights)``; `x` has rows along its first axis, `weights` is a pytree or empty."""

    run: Callable[[Any, Any], Any]
    x: np.ndarray
    weights: Any

    def __call__(self) -> Any:
        return self.run(self.x, self.weights)


def _of_module(layer: nnx.Module, x: np.ndarray, call: Callable[[Any, Any], Any]) -> Operation:
    graph, state = nnx.split(layer)
    return Operation(lambda x, state: call(nnx.merge(graph, state), x), x, state)


def _operations() -> dict[str, Operation]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(M, K)).astype(np.float32)
    bias = jnp.asarray(rng.normal(size=N), jnp.float32)
    codes, ids = rng.integers(0, 16, (M, K), np.uint8), rng.integers(0, N, (M, 2), np.int32)
    scales, offsets = rng.uniform(0.02, 0.1, (2, N, K // GROUP)).astype(np.float32)
    w = ap.QuantizedTensor.from_codes(
        rng.integers(0, 16, (N, K), np.uint8), scales, -offsets, bits=4
    )
    linear = ap.nnx.QuantLinear.from_tensor(w.prepare(), bias=bias, activations=8)
    embed = ap.nnx.QuantEmbed.from_tensor(w, activations=8)
    dense = ap.linen.QuantDense(N, activations=8, group_size=GROUP)
    return {
        "matmul": Operation(lambda x, w: ap.matmul(x, w, act_bits=8), x, w),
        "matmul-float": Operation(lambda x, w: ap.matmul(x, w), x, w.prepare()),
        "matmul-norm": Operation(
            lambda x, v: ap.matmul(
                x, v["w"], before=ap.RMSNorm(v["scale"], 1e-5), residual=x[:, :N], act_bits=8
            ),
            x,
            {"w": w, "scale": rng.uniform(0.5, 1.5, K).astype(np.float32)},
        ),
        "matmul-gate": Operation(
            lambda x, v: ap.matmul(
                x, v["w"], bias=v["bias"], before=ap.SwiGLU(), residual=x[:, :N], act_bits=8
            ),
            rng.normal(size=(M, 2 * K)).astype(np.float32),
            {"w": w.prepare(), "bias": bias},
        ),
        "int_matmul": Operation(lambda c, w: ap.int_matmul(c, w, 4), codes, w),
        "quantize_activations": Operation(
            lambda x, _: ap.quantize_activations(x, 4, group_size=GROUP), x, ()
        ),
        # A matrix of one column for each row of x, so that rows are along the first axis.
        "quantize": Operation(lambda x, _: ap.quantize(x[:, :, None], 4, group_size=GROUP), x, ()),
        "QuantLinear": _of_module(linear, x, lambda layer, x: layer(x)),
        "QuantEmbed": _of_module(embed, ids, lambda layer, i: (layer(i), layer.attend(layer(i)))),
        "QuantDense": Operation(
            lambda x, v: dense.apply(v, x), x, dense.init(jax.random.key(0), x)
        ),
    }


OPERATIONS = _operations()
LINEAR = ("matmul", "matmul-float", "QuantLinear", "QuantDense")
"""In x, or affine, if rounding is left aside."""
DIFFERENTIABLE = (*LINEAR, "matmul-norm", "matmul-gate")
"""In x. `QuantEmbed` is in its scales; the others are not differentiable."""


def stack(tree: Any, count: int) -> Any:
    """`count` trees along a new first axis, unlike in their floats; NumPy arrays."""

    def one(v: Any) -> np.ndarray:
        factors = range(1, count + 1) if jnp.issubdtype(v.dtype, jnp.floating) else [1] * count
        return np.stack([np.asarray(v) * v.dtype.type(f) for f in factors])

    return jax.tree.map(one, tree)


def at(tree: Any, i: int) -> Any:
    """Element `i` along the first axes of a tree; NumPy arrays."""
    return jax.tree.map(lambda v: np.asarray(v)[i], tree)


def close(found: Any, expected: Any) -> None:
    """Equal trees: integers exactly, floats to some roundings."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)

    def check(a: Any, b: Any) -> None:
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        a, b = np.asarray(a), np.asarray(b)
        if np.issubdtype(b.dtype, np.integer):
            np.testing.assert_array_equal(a, b)
        else:
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max(initial=1))

    jax.tree.map(check, found, expected)
