"""`Projections`: merged layers give what single ones give, and only those alike are merged."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jax_anyprec as ap
from jax_anyprec.models import Projections, Quantization, merge_projections

WIDTHS = (64, 32, 40)
X = np.random.default_rng(0).normal(size=(2, 3, 128)).astype(np.float32)


def projections(quantization: Quantization | None, dtype: Any = jnp.float32) -> Projections:
    return Projections(128, WIDTHS, quantization=quantization, dtype=dtype, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    "quantization",
    [
        None,
        Quantization(weights=4, group_size=32),
        Quantization(weights=2, activations=None),
        Quantization(weights=3, activations=3, rotate=True, act_scales="token"),
    ],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_merged_and_single_agree(quantization: Quantization | None, dtype: Any) -> None:
    single, merged = projections(quantization, dtype), projections(quantization, dtype)
    merge_projections(nnx.List([merged]))
    assert [len(p.layers) for p in (single, merged)] == [3, 1]
    expected, found = single(jnp.asarray(X)), jax.jit(merged)(X)
    for n, a, b in zip(WIDTHS, expected, found, strict=True):
        assert a.shape == b.shape == (2, 3, n)
        assert a.dtype == b.dtype == dtype
        if quantization is None:  # a float product may sum in another order
            error = 128 * float(jnp.finfo(dtype).eps)
            np.testing.assert_allclose(*(np.asarray(y, np.float32) for y in (a, b)), atol=error)
        else:
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    merged.merge()
    assert len(merged.layers) == 1


def test_only_neighbours_alike_are_merged() -> None:
    p = projections(Quantization(weights=4, group_size=32))
    other = projections(Quantization(weights=5, group_size=32))
    p.layers[0] = other.layers[0]
    expected = p(jnp.asarray(X))
    p.merge()
    assert [layer.kernel.get_value().bits for layer in p.layers] == [5, 4]
    assert p.widths == ((64,), (32, 40))
    for a, b in zip(expected, p(jnp.asarray(X)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_float_and_packed_stay_apart() -> None:
    p = projections(Quantization(weights=4, group_size=32))
    p.layers[1] = projections(None).layers[1]
    p.merge()
    assert [type(layer) for layer in p.layers] == [
        ap.nnx.QuantLinear,
        nnx.Linear,
        ap.nnx.QuantLinear,
    ]
