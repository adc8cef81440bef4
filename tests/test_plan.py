"""Plans: figures against what conversion makes of a model, the table, and what they refuse."""

from __future__ import annotations

import json
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jax_anyprec as ap
from jax_anyprec import _native
from jax_anyprec.plan import describe

W4 = ap.Quantization(weights=4, activations=8, group_size=32, rotate=True)
W2 = ap.Quantization(weights=2, activations=None)
RULES = {"**/query": W4, "up": W2}


class Model(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.attention = nnx.Dict(query=nnx.LinearGeneral(64, (4, 24), rngs=rngs))
        self.up = nnx.Linear(64, 96, use_bias=False, param_dtype=jnp.bfloat16, rngs=rngs)
        self.norm = nnx.LayerNorm(96, rngs=rngs)


def nbytes(model: Any) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(nnx.state(model)))


@pytest.fixture(scope="module")
def plan() -> ap.Plan:
    return ap.plan(Model(), RULES)


def test_figures_are_those_of_the_converted_model(plan: ap.Plan) -> None:
    model = Model()
    kernels = {"attention/query": model.attention.query.kernel[...].reshape(64, 96)}
    kernels["up"] = model.up.kernel[...].astype(jnp.float32)
    assert plan.bytes_before == nbytes(model)
    ap.quantize_model(model, plan)
    assert plan.bytes_after == nbytes(model)
    assert plan.bytes_after == sum(layer.bytes_after for layer in plan.layers)
    packed = {"attention/query": model.attention.query, "up": model.up}
    for layer in plan.layers:
        if layer.path == "norm":
            assert layer.error is None
            continue
        kernel = np.asarray(kernels[layer.path], np.float64)
        seen = np.asarray(packed[layer.path].kernel.get_value().dequantize(), np.float64)
        expected = np.linalg.norm(kernel - seen) / np.linalg.norm(kernel)
        np.testing.assert_allclose(layer.error, expected, rtol=1e-5)


def test_shapes_are_enough_but_for_errors(plan: ap.Plan) -> None:
    abstract = ap.plan(nnx.eval_shape(Model), RULES)
    measured = [{**row, "error": None} for row in plan.rows()]
    assert abstract.rows() == ap.plan(Model(), RULES, errors=False).rows() == measured


def test_rows_and_json(plan: ap.Plan) -> None:
    query, norm, up = plan.rows()
    assert json.loads(plan.to_json()) == {
        "bytes_before": plan.bytes_before,
        "bytes_after": plan.bytes_after,
        "layers": plan.rows(),
    }
    assert (up["path"], up["shape"], up["dtype"], up["becomes"]) == (
        "up", [64, 96], "bfloat16", "W2A16",
    )  # fmt: skip
    assert (norm["becomes"], norm["implementation"]) == ("float", None)
    assert (query["kind"], query["reason"]) == ("LinearGeneral", 'rule "**/query"')


def test_the_table(plan: ap.Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "status", lambda: {"cpu": {"available": True, "isa": "avx512"}})
    lines = str(ap.plan(nnx.eval_shape(Model), RULES)).splitlines()
    assert lines[-1] == "2 of 3 layers quantized, 38,016 bytes become 6,912"
    assert [re.split(" {2,}", line) for line in lines[:-1]] == [
        ["path", "kind", "shape", "from", "to", "bytes", "after", "error", "runs in", "why"],
        ["attention/query", "LinearGeneral", "64x4x24", "float32", "W4A8 g32 rotated", "24,960",
         "4,224", "cpu_codes",
         'rule "**/query"; 32 one-bit products cost more than an 8-bit one'],
        ["norm", "LayerNorm", "96", "float32", "float", "768", "768",
         "LayerNorm has no packed form"],
        ["up", "Linear", "64x96", "bfloat16", "W2A16", "12,288", "1,920", "cpu",
         'rule "up"; float activations are three 8-bit digits'],
    ]  # fmt: skip
    for heading in ("kind", "shape", "from", "to", "why"):  # columns begin below their headings
        start = lines[0].index(f" {heading}") + 1
        assert all(line[start - 1] == " " != line[start] for line in lines[:-1])
    assert f"{plan.layers[0].error:.4f}" in str(plan)


@pytest.mark.parametrize(
    ("platform", "status", "expected"),
    [
        ("cpu", {"cpu": {"available": False, "reason": "not built"}}, ("xla", "not built")),
        ("gpu", {"cuda": {"available": False, "reason": "no GPU"}}, ("xla", "no GPU")),
        ("tpu", {}, ("xla", "no kernels for tpu")),
    ],
)
def test_why_there_is_no_kernel(
    platform: str, status: Any, expected: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_native, "status", lambda: status)
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    layer = ap.plan(nnx.eval_shape(Model), RULES).layers[0]
    assert (layer.implementation, layer.implementation_reason) == expected


def test_quantizations_in_short() -> None:
    assert describe(ap.Quantization(weights=3)) == "W3A8"
    assert describe(ap.Quantization(weights=1, activations=None, act_scales="token")) == "W1A16"
    full = ap.Quantization(4, 8, group_size=64, rotate=True, scales="mse", act_scales="token")
    assert describe(full) == "W4A8 g64 rotated mse token scales"


def test_a_plan_is_for_its_own_model(plan: ap.Plan) -> None:
    other = Model()
    other.up = nnx.Linear(64, 32, rngs=nnx.Rngs(0))
    message = (
        r"another model: \[\('up', 'Linear', \(64, 96\), 'bfloat16'\)\] of the plan is not in the "
        r"model, \[\('up', 'Linear', \(64, 32\), 'float32'\)\] of the model is not in the plan"
    )
    with pytest.raises(ValueError, match=message):
        ap.quantize_model(other, plan)
    tied = Model()
    tied.again = nnx.Linear(64, 96, rngs=nnx.Rngs(0))
    tied.again.kernel = tied.up.kernel
    untied = Model()
    untied.again = nnx.Linear(64, 96, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="it quantizes layer 'again', but here: its kernel is in"):
        ap.quantize_model(tied, ap.plan(untied, {"again": W2}, errors=False))


def test_a_weight_of_zeros_has_no_error() -> None:
    model = nnx.Dict(zero=nnx.Linear(64, 8, kernel_init=nnx.initializers.zeros, rngs=nnx.Rngs(0)))
    assert ap.plan(model, W4).layers[0].error == 0
