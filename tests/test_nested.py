"""Nested precisions: weights calibrated to serve at fewer bits too, against plain truncation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_calibrate import (
    Model,
    batches,
    inputs,
    moments_of,
    output_error,
    quantized,
    relative,
    values,
)

import jax_anyprec as ap
from jax_anyprec.calibrate import Method, Tuning, calibrate_model, load_calibrated
from jax_anyprec.calibrate.solve import solve
from jax_anyprec.nnx.packed import Packed
from jax_anyprec.nnx.references import references
from jax_anyprec.quantize import Grid

FOUR = ap.Quantization(weights=4, activations=None, group_size=32, scale_dtype="float16")


def error_at(solution, bits, dropped, grid, x, w):
    """Of the outputs with the first planes of a solution's codes, by NumPy."""
    lower = solution._replace(codes=solution.codes >> dropped, grid=grid)
    return output_error(x, w, x, values(lower, bits))


def truncated(grid, dropped):
    """The grid of first planes, each in the middle of what it was."""
    scales, offsets = (None if x is None else np.asarray(x, np.float32) for x in grid)
    lower = None if offsets is None else offsets + scales * (2**dropped - 1)
    return Grid(scales * 2**dropped, lower)


@pytest.mark.parametrize("offsets", [False, True])
@pytest.mark.parametrize(
    ("bits", "nested", "part"), [(4, (3, 2), 0.7), (3, (1,), 0.6), (8, (5,), 0.8)]
)
def test_first_planes_serve_too(bits, nested, part, offsets):
    """Codes that are chosen for it lose a part only of what first planes of others do."""
    rng = np.random.default_rng(0)
    x, w = inputs(rng, 2048, 128), rng.normal(size=(128, 48)).astype(np.float32)
    moments = moments_of(x, x)
    quantization = dataclasses.replace(quantized(bits, 64, 128), offsets=offsets)
    alone = solve(jnp.asarray(w), moments, quantization, Method())
    found = solve(jnp.asarray(w), moments, quantization, Method(nested=nested[::-1]))
    assert alone.nested == ()
    shapes = [None if x is None else x.shape for grid in found.nested for x in grid]
    assert shapes == [(48, 2), (48, 2) if offsets else None] * len(nested)
    for each, grid in zip(nested, found.nested, strict=True):
        dropped = bits - each
        lost = error_at(alone, each, dropped, truncated(alone.grid, dropped), x, w)
        assert error_at(found, each, dropped, grid, x, w) < part * lost
    at_all = output_error(x, w, x, values(found, bits))
    np.testing.assert_allclose(float(found.error), at_all, rtol=0.02)
    nearest = np.asarray(ap.quantize(w, bits, group_size=64).dequantize(), np.float64)
    assert at_all < output_error(x, w, x, nearest)


def test_codes_are_the_best_of_all_for_the_sum_of_errors():
    """No code of one row alone could be better, as sweeps have settled."""
    from jax_anyprec.quantize import DISTORTION

    rng = np.random.default_rng(1)
    x, w = inputs(rng, 512, 32), rng.normal(size=(32, 3)).astype(np.float32)
    method = Method(nested=(2,), sweeps=60, damping=0.0)
    found = solve(jnp.asarray(w), moments_of(x, x), quantized(3, 32, 32), method)
    codes = np.asarray(found.codes).astype(int)
    own = x.astype(np.float64).T @ x
    own = own / np.diag(own).mean() + np.eye(32) * 32 / 512

    def total(codes, n):
        scales = [(3, 0, found.grid.scales), (2, 1, found.nested[0].scales)]
        rests = [
            (bits, w[:, n] - (2 * (codes >> dropped) - (2**bits - 1)) * float(s[n, 0]))
            for bits, dropped, s in scales
        ]
        return sum(rest @ own @ rest / DISTORTION[bits] for bits, rest in rests)

    for n in range(3):
        best = total(codes[:, n], n)
        for row in range(32):
            for code in range(8):
                other = codes[:, n].copy()
                other[row] = code
                assert total(other, n) >= best * (1 - 1e-3)


def packed(model):
    return [each.node for each in references(model) if isinstance(each.node, Packed)]


def test_models_at_fewer_bits(tmp_path):
    data = batches()
    exact = Model()(data[-1])
    some = dataclasses.replace(FOUR, offsets=True)
    rules = [("blocks/0/up", dataclasses.replace(FOUR, weights=2)), ("**/down", some), ("**", FOUR)]
    tuning = Tuning(batches(2))
    steps = []

    def calibrate(folder, **options):
        return calibrate_model(
            Model(), rules, data[:-1], store=tmp_path / folder, method=Method(nested=(3, 2)),
            progress=lambda *step: steps.append(step), **options,
        )  # fmt: skip

    calibrate_model(Model(), rules, data[:-1], store=tmp_path / "alone")
    calibrate("nested")
    calibrate("tuned", tuning=tuning)
    assert steps[-1] == (10 + 3 * 2, 10 + 3 * 2)
    lost = {}
    for bits in (None, 3, 2):
        for folder in ("nested", "tuned"):
            model = load_calibrated(Model(), tmp_path / folder, bits=bits)
            lost[folder, bits] = relative(model(data[-1]), exact)
            assert {each.get_value().bits for each in packed(model)} == {2, bits or 4}
            jax.jit(lambda x, model=model: model(x))(data[0])
        assert lost["tuned", bits] < lost["nested", bits]
    model = load_calibrated(Model(), tmp_path / "alone")
    for each in packed(model):
        each.set_value(each.get_value().truncate(2))
    assert lost["nested", 2] < 0.95 * relative(model(data[-1]), exact)

    # Gone on with when all is done, nothing is done again.
    again = calibrate("tuned", tuning=tuning)
    at_all = load_calibrated(Model(), tmp_path / "tuned")
    for a, b in zip(*(jax.tree.leaves(nnx.state(m)) for m in (again.model, at_all)), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match=r"bits must be None or one .*\[3, 2\], got 1"):
        load_calibrated(Model(), tmp_path / "tuned", bits=1)
    with pytest.raises(ValueError, match=r"bits must be None or one .*\[\], got 3"):
        load_calibrated(Model(), tmp_path / "alone", bits=3)


def test_bad_input():
    with pytest.raises(ValueError, match=r"store must be given where Method\.nested is"):
        calibrate_model(Model(), FOUR, batches(1), method=Method(nested=(2,)))
    with pytest.raises(ValueError, match=r"Method\.nested must be .*, got 9"):
        Method(nested=(9,))
    with pytest.raises(ValueError, match=r"Method\.sweeps must be at least 1"):
        Method(nested=(2,), sweeps=0)
