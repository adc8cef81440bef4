"""Einsum with a packed weight against jnp.einsum with the weight it stands for."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_anyprec as ap
from jax_anyprec.einsum import einsum, pack, pack_einsum, parse, unpack_einsum

RNG = np.random.default_rng(4)
SIZES = {"b": 2, "t": 3, "d": 32, "h": 2, "k": 16, "f": 5, "e": 3, "g": 2, "D": 64}
W8 = ap.Quantization(weights=8, activations=None)


def normal(*shape: int) -> Any:
    return RNG.standard_normal(shape).astype(np.float32)


def shape(indices: str) -> tuple[int, ...]:
    return tuple(SIZES[i] for i in indices)


PRODUCTS = [
    "btd,df->btf",
    "btd,dhk->bthk",  # query projection
    "bthk,hkd->btd",  # attention output: two contracted indices
    "bthk,khf->bft",  # in another order than the weight's, output too
    "td,hdk->htk",  # features on both sides of the contracted index
    "etd,edf->etf",  # experts
    "tegd,gedf->gfte",  # two batch indices, in orders of their own
    "d,df->f",
    "btd,d->bt",  # a vector is one column
]


@pytest.mark.parametrize("spec", PRODUCTS)
@pytest.mark.parametrize("use_bias", [False, True])
def test_products_are_those_of_jnp(spec: str, use_bias: bool) -> None:
    operands, out = spec.split("->")
    xs, ws = operands.split(",")
    x, weight = normal(*shape(xs)), normal(*shape(ws))
    bias = normal(*(SIZES[i] for i in out if i in ws)) if use_bias else None
    w = pack_einsum(spec, weight, W8)
    seen = unpack_einsum(spec, w, weight.shape)
    assert seen.shape == weight.shape
    np.testing.assert_allclose(seen, weight, atol=0.05)
    expected = np.einsum(spec, x, np.asarray(seen))
    if bias is not None:
        expected += bias.reshape([SIZES[i] if i in ws else 1 for i in out])
    found = einsum(spec, x, w, weight_shape=weight.shape, bias=bias)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    swapped = f"{ws},{xs}->{out}"
    again = einsum(
        swapped, x, pack_einsum(swapped, weight, W8, weight_operand=0),
        weight_shape=weight.shape, bias=bias, weight_operand=0,
    )  # fmt: skip
    np.testing.assert_array_equal(again, found)


def test_ellipsis_stands_for_any_number_of_rows() -> None:
    spec, weight = "...d,dhk->...hk", normal(*shape("dhk"))
    w = pack_einsum(spec, weight, W8)
    seen = np.asarray(unpack_einsum(spec, w, weight.shape))
    for rows in ((), (3,), (2, 1, 3), (0, 2)):
        x = normal(*rows, 32)
        found = einsum(spec, x, w, weight_shape=weight.shape)
        np.testing.assert_allclose(found, np.einsum(spec, x, seen), rtol=1e-4, atol=1e-4)


def test_options_reach_the_product() -> None:
    weight, x = normal(*shape("Df")), normal(4, 64)
    quantization = ap.Quantization(weights=4, group_size=32, rotate=True)
    w = pack_einsum("bD,Df->bf", weight, quantization)
    jax.tree.map(np.testing.assert_array_equal, w, quantization.pack(weight))
    options = {"act_bits": 5, "act_scales": "token", "out_dtype": jnp.bfloat16}
    found = einsum(
        " bD, Df -> bf ", x, w, weight_shape=weight.shape, implementation="xla", **options
    )
    expected = ap.matmul(x, w, implementation="xla", **options)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, expected)


def test_stacks_are_packed_one_by_one_and_mapped_over() -> None:
    quantization = ap.Quantization(weights=4, group_size=32, rotate=True)
    weights, x = normal(2, 3, *shape("Dhk")), normal(2, 64)
    w = pack_einsum("tD,Dhk->thk", weights, quantization, stacked=2)
    assert w.shape == (2, 3, 64, 32)
    one = pack_einsum("tD,Dhk->thk", weights[1, 2], quantization)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda v: v[1, 2], w), one)
    run = functools.partial(einsum, "tD,Dhk->thk", weight_shape=shape("Dhk"))
    found = jax.vmap(jax.vmap(run, (None, 0)), (None, 0))(x, w)
    np.testing.assert_allclose(found[1, 2], run(x, one), rtol=1e-5, atol=1e-5)
    jax.tree.map(
        np.testing.assert_array_equal,
        pack(weights.reshape(2, 3, 64, 32), quantization), w,
    )  # fmt: skip


def test_gradients_and_jit() -> None:
    spec, weight, x = "etd,edf->etf", normal(*shape("edf")), normal(*shape("etd"))
    w = pack_einsum(spec, weight, W8)
    seen = unpack_einsum(spec, w, weight.shape)
    run = functools.partial(einsum, spec, weight_shape=weight.shape)
    dx, dw = jax.jit(jax.grad(lambda x, w: (run(x, w) ** 2).sum(), (0, 1), allow_int=True))(x, w)
    expected = jax.grad(lambda x: (jnp.einsum(spec, x, seen) ** 2).sum())(x)
    np.testing.assert_allclose(dx, expected, rtol=1e-3, atol=1e-2)
    assert np.isfinite(dw.scales).all()


def test_packing_is_abstract_under_eval_shape() -> None:
    abstract = jax.eval_shape(
        lambda w: pack_einsum("etd,edf->etf", w, W8), jax.ShapeDtypeStruct((3, 32, 5), jnp.float32)
    )
    assert abstract.shape == (3, 32, 5)


@pytest.mark.parametrize(
    ("spec", "fault"),
    [
        ("bd,df", "two operands and an output"),
        ("bd->b", "two operands and an output"),
        ("bd,df,fg->bg", "two operands and an output"),
        ("bdd,df->bf", "index 'd' is repeated in x"),
        ("bd,dff->bf", "index 'f' is repeated in the weight"),
        ("bd,df->bff", "index 'f' is repeated in the output"),
        ("b1,1f->bf", "'1' in x is no letter"),
        ("bd,df->b...f", "x and the output must both have an ellipsis"),
        ("...d,df->f", "x and the output must both have an ellipsis"),
        ("...d,...df->...f", "without an ellipsis"),
        ("bd,df->bfz", "index 'z' of the output is in no operand"),
        ("btd,df->bf", "index 't' is in x alone"),
        ("bd,dfg->bf", "index 'g' is in the weight alone"),
        ("b,f->bf", "share no index that is summed over"),
        ("bd,bd->bd", "share no index that is summed over"),
    ],
)
def test_specs_that_are_no_product(spec: str, fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        parse(spec)


def test_bad_arguments() -> None:
    w, x = pack_einsum("bd,dhk->bhk", normal(32, 2, 16), W8), normal(3, 32)
    run = functools.partial(einsum, "bd,dhk->bhk", weight_shape=(32, 2, 16))
    with pytest.raises(TypeError, match="spec must be a string, got int"):
        parse(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="weight_operand must be 0 or 1, got 2"):
        parse("bd,df->bf", 2)
    with pytest.raises(TypeError, match="w must be a QuantizedTensor"):
        run(x, normal(32, 32))
    with pytest.raises(ValueError, match=r"must have 3 axes, 'dhk', got shape \(32, 32\)"):
        einsum("bd,dhk->bhk", x, w, weight_shape=(32, 32))
    with pytest.raises(ValueError, match=r"w must have shape \(32, 64\) .* got \(32, 32\)"):
        einsum("bd,dhk->bhk", x, w, weight_shape=(32, 4, 16))
    with pytest.raises(ValueError, match="x must have 2 axes for 'bd,dhk->bhk', got 3"):
        run(normal(1, 3, 32), w)
    with pytest.raises(ValueError, match="x must have 1 to 50 axes"):
        einsum("...d,dhk->...hk", np.float32(1), w, weight_shape=(32, 2, 16))
    with pytest.raises(ValueError, match=r"32 values along 'd' .* got shape \(3, 16\)"):
        run(normal(3, 16), w)
    with pytest.raises(ValueError, match=r"bias must have shape \(2, 16\) .* got \(32,\)"):
        run(x, w, bias=normal(32))
    with pytest.raises(ValueError, match="at least one layer, got none"):
        pack_einsum("bd,dhk->bhk", normal(0, 32, 2, 16), W8, stacked=1)
