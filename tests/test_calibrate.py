"""Calibration: solutions against rounding and a search of all codes, models against float ones."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jax_anyprec as ap
from jax_anyprec.calibrate.allocate import Choice, choose, path_of
from jax_anyprec.calibrate.moments import Moments, add
from jax_anyprec.calibrate.solve import Method, _problem, solve

FLOAT = ap.Quantization(weights=3, activations=None, scale_dtype="float16")


def inputs(rng, rows, k, rank=None):
    """Correlated inputs, as those of a network are."""
    mix = rng.normal(size=(k if rank is None else rank, k)) / np.sqrt(k)
    return (rng.normal(size=(rows, len(mix))) @ mix).astype(np.float32)


def moments_of(x, f, quantization=FLOAT):
    return add(Moments.zeros(x.shape[-1]), x, f, rotate=quantization.rotate)


def quantized(bits, group_size, k):
    return ap.Quantization(
        weights=bits,
        activations=None,
        group_size=None if group_size == k else group_size,
        scales="mse",
        scale_dtype="float16",
    )


def values(solution, bits):
    """The matrix of a solution, by NumPy."""
    q = 2 * np.asarray(solution.codes, np.float64) - (2**bits - 1)
    scales, offsets = solution.grid
    scales = np.asarray(scales, np.float64)
    centres = 0 * scales if offsets is None else np.asarray(offsets, np.float64)
    centres = centres + (offsets is not None) * scales * (2**bits - 1)
    scales, centres = (np.repeat(x, len(q) // x.shape[1], axis=1).T for x in (scales, centres))
    return q * scales + centres


def output_error(f, w, x, q):
    y = f.astype(np.float64) @ w
    return ((y - x.astype(np.float64) @ q) ** 2).sum() / (y**2).sum()


@pytest.mark.parametrize(
    ("bits", "k", "group_size"),
    [(1, 64, 64), (2, 96, 32), (3, 50, 50), (4, 128, 64), (8, 64, 32)],
)
def test_solutions_beat_rounding(bits, k, group_size):
    rng = np.random.default_rng(k)
    x, w = inputs(rng, 512, k), rng.normal(size=(k, 24)).astype(np.float32)
    solution = solve(jnp.asarray(w), moments_of(x, x), quantized(bits, group_size, k), Method())
    nearest = ap.quantize(w, bits, group_size=None if group_size == k else group_size)
    ours = output_error(x, w, x, values(solution, bits))
    assert ours < 0.8 * output_error(x, w, x, np.asarray(nearest.dequantize(), np.float64))
    np.testing.assert_allclose(float(solution.error), ours, rtol=0.02, atol=1e-5)


def test_sweeps_reach_a_local_optimum():
    """No single code can be changed for the better, given the scales."""
    rng = np.random.default_rng(0)
    x, w = inputs(rng, 256, 32), rng.normal(size=(32, 3)).astype(np.float32)
    method = Method(sweeps=30)
    solution = solve(jnp.asarray(w), moments_of(x, x), quantized(2, 32, 32), method)
    best = values(solution, 2)
    damping = method.damping + 32 / 256
    h = x.T.astype(np.float64) @ x + damping * np.eye(32) * np.mean((x**2).sum(0))

    def cost(q):
        return np.einsum("kn,kl,ln->n", w - q, h, w - q)

    scales = np.asarray(solution.grid.scales, np.float64)[:, 0]
    for row, level in itertools.product(range(32), (-3, -1, 1, 3)):
        other = best.copy()
        other[row] = level * scales
        assert (cost(other) >= cost(best) * (1 - 1e-4)).all()


def test_inputs_of_the_packed_model_are_made_up_for():
    rng = np.random.default_rng(1)
    f, w = inputs(rng, 1024, 64), rng.normal(size=(64, 16)).astype(np.float32)
    x = (f @ (np.eye(64) + 0.1 * rng.normal(size=(64, 64)) / 8)).astype(np.float32) * 0.9
    moments = moments_of(x, f)

    def error(cross):
        method = Method(cross=cross)
        found = solve(jnp.asarray(w), moments, quantized(4, 64, 64), method)
        return output_error(f, w, x, values(found, 4))

    assert error(1.0) < 0.5 * error(0.0)


def test_chance_is_not_made_up_for():
    """Inputs that differ by noise alone call for no other weights, and few of them seem to."""
    rng = np.random.default_rng(4)
    x, w = inputs(rng, 4096, 64), rng.normal(size=(64, 16)).astype(np.float32)
    f = x + rng.normal(size=x.shape).astype(np.float32)
    seen = slice(0, 200)

    moments, method = moments_of(x[seen], f[seen]), Method(cross=1.0)
    found = solve(jnp.asarray(w), moments, quantized(8, 64, 64), method)
    problem = _problem(jnp.asarray(w), moments, Method())
    fitted = np.linalg.lstsq(x[seen], f[seen] @ w, rcond=None)[0]
    assert np.linalg.norm(problem[1] - w) < 0.2 * np.linalg.norm(fitted - w)
    assert output_error(x[200:], w, x[200:], values(found, 8)) < 0.05


def test_dead_and_constant_inputs():
    rng = np.random.default_rng(2)
    x, w = inputs(rng, 128, 64), rng.normal(size=(64, 8)).astype(np.float32)
    x[:, :5], x[:, 7] = 0, 1
    found = solve(jnp.asarray(w), moments_of(x, x), quantized(4, 64, 64), Method())
    assert np.isfinite(np.asarray(found.grid.scales, np.float32)).all()
    assert output_error(x, w, x, values(found, 4)) < 0.02


@pytest.mark.parametrize(
    ("bits", "k", "group_size"), [(1, 64, 32), (2, 96, 32), (3, 50, 50), (8, 64, 64)]
)
def test_offsets(bits, k, group_size):
    """Grids that are not centred on zero serve weights that are not; plain weights lose nothing."""
    rng = np.random.default_rng(k)
    x, w = inputs(rng, 512, k), rng.normal(size=(k, 24)).astype(np.float32)
    centred = quantized(bits, group_size, k)
    quantization = dataclasses.replace(centred, offsets=True)

    def errors(w):
        solutions = [solve(w, moments_of(x, x), q, Method()) for q in (quantization, centred)]
        ours, other = (output_error(x, w, x, values(found, bits)) for found in solutions)
        np.testing.assert_allclose(float(solutions[0].error), ours, rtol=0.02, atol=1e-5)
        rounded = np.asarray(quantization.pack(jnp.asarray(w)).dequantize(), np.float64)
        assert ours < 0.9 * output_error(x, w, x, rounded)
        return ours, other

    ours, other = errors(w)
    assert ours < 1.05 * other
    ours, other = errors(w + 2)
    assert ours < 0.5 * other


def test_offsets_of_weights_on_a_grid():
    """Weights that have values of such a grid are found again, but for float16's rounding."""
    rng = np.random.default_rng(5)
    x = inputs(rng, 512, 64)
    scales, offsets = rng.uniform(0.5, 1, (2, 1, 24)), rng.uniform(-7, 0, (2, 1, 24))
    codes = rng.integers(0, 16, (2, 32, 24))
    codes[:, :2] = [[0], [15]]
    w = (scales * codes + offsets).reshape(64, 24).astype(np.float32)
    quantization = dataclasses.replace(quantized(4, 32, 64), offsets=True)
    found = solve(w, moments_of(x, x), quantization, Method())
    assert output_error(x, w, x, values(found, 4)) < 1e-6
    np.testing.assert_array_equal(found.codes, codes.reshape(64, 24))


class Block(nnx.Module):
    def __init__(self, width, rngs):
        self.up = nnx.Linear(width, 2 * width, rngs=rngs)
        self.gate = nnx.Linear(width, 2 * width, rngs=rngs)
        self.down = nnx.Linear(2 * width, width, rngs=rngs)

    def __call__(self, x, *, scale=1.0):
        return x + scale * self.down(nnx.silu(self.gate(x)) * self.up(x)), x.sum()


class Model(nnx.Module):
    """A stem, blocks that give more than the next one takes, and a head."""

    def __init__(self, width=64, blocks=3):
        rngs = nnx.Rngs(0)
        self.stem = nnx.Linear(32, width, rngs=rngs)
        self.blocks = nnx.List([Block(width, rngs) for _ in range(blocks)])
        self.head = nnx.Linear(width, 32, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        total = 0.0
        for block in self.blocks:
            x, part = block(x, scale=0.5)
            total += part
        return self.head(x) + 0 * total


def batches(count=4, rows=512, width=32):
    rng = np.random.default_rng(3)
    return [jnp.asarray(inputs(rng, rows, width)) for _ in range(count)]


def relative(a, b):
    return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))


@pytest.mark.parametrize(
    "quantization",
    [
        ap.Quantization(weights=3, activations=None, group_size=32),
        ap.Quantization(weights=3, activations=None, rotate=True),
        ap.Quantization(weights=2, activations=4, group_size=32),
        ap.Quantization(weights=4, activations=8, act_scales="token", group_size=32),
    ],
    ids=str,
)
def test_models_keep_their_outputs(quantization):
    rules = [("stem", ap.Quantization(weights=8)), ("**/head", None), ("**", quantization)]
    data = batches()
    exact = Model()(data[-1])
    nearest = ap.quantize_model(Model(), rules)(data[-1])
    model = Model()
    progress = []
    report = ap.calibrate_model(
        model, rules, data[:-1], progress=lambda *step: progress.append(step)
    )
    assert relative(model(data[-1]), exact) < 0.9 * relative(nearest, exact)
    assert progress == [(i, 10) for i in range(1, 11)]
    assert [layer.path for layer in report.layers][:3] == [
        "blocks/0/gate", "blocks/0/up", "blocks/0/down",
    ]  # fmt: skip
    assert all(layer.fallback is None and layer.error < 0.2 for layer in report.layers)
    assert isinstance(model.head, nnx.Linear)
    assert isinstance(model.blocks[0].up, ap.nnx.QuantLinear)
    jax.jit(lambda x: model(x))(data[0])
    assert "blocks/2/down" in str(report)


def leaves(model):
    return jax.tree.leaves(nnx.state(model))


def test_interrupted_calibrations_go_on_and_load(tmp_path):
    """What is kept, gone on with and loaded is, bit for bit, what is made at once."""
    data = batches(2)
    at_once = ap.calibrate_model(Model(), FLOAT, data)

    def stop(done, total):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ap.calibrate_model(Model(), FLOAT, data, store=tmp_path, progress=stop)
    steps = []
    resumed = ap.calibrate_model(
        Model(), FLOAT, data, store=tmp_path, progress=lambda *step: steps.append(step)
    )
    assert resumed.layers == at_once.layers
    assert len(steps) == 10
    loaded = ap.calibrate.load_calibrated(Model(), tmp_path)
    for model in (resumed.model, loaded):
        for a, b in zip(leaves(model), leaves(at_once.model), strict=True):
            np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match="holds a calibration of another model"):
        ap.calibrate_model(Model(), FLOAT, batches(3), store=tmp_path)
    with pytest.raises(ap.CheckpointError, match="another model"):
        ap.calibrate.load_calibrated(Model(width=128), tmp_path)


class Odd(nnx.Module):
    """Layers that can't be calibrated, and one that is not called."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(100, 32, rngs=rngs)
        self.general = nnx.LinearGeneral((4, 8), (2, 16), axis=(-2, -1), rngs=rngs)
        self.einsum = nnx.Einsum("rb,bc->rc", (32, 32), (32,), rngs=rngs)
        self.experts = nnx.Einsum("erk,ekn->ern", (2, 32, 32), rngs=rngs)
        self.unused = nnx.Linear(32, 32, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        x = self.general(x.reshape(*x.shape[:-1], 4, 8)).reshape(-1, 32)
        x = self.einsum(x)
        return self.experts(jnp.stack([x, x]))


def test_what_cannot_be_calibrated_is_rounded_and_said():
    tokens = [jnp.asarray(np.random.default_rng(0).integers(0, 100, (8, 40)))]
    rules = {"embed": FLOAT, "**": FLOAT}
    report = ap.calibrate_model(Odd(), rules, tokens)
    fallbacks = {layer.path: layer.fallback for layer in report.layers}
    assert fallbacks["general"] is None
    assert fallbacks["einsum"] is None
    for path in ("embed", "experts", "unused"):
        assert "not called" in fallbacks[path]
        assert f"{path}" in str(report)
    few = ap.calibrate_model(Odd(), FLOAT, [tokens[0][:1, :2]])
    assert "2 inputs are too few" in {x.path: x.fallback for x in few.layers}["einsum"]


def test_bad_input():
    with pytest.raises(ValueError, match="must hold at least one"):
        ap.calibrate_model(Model(), FLOAT, [])
    with pytest.raises(TypeError, match=r"model must be a flax\.nnx\.Module, got int"):
        ap.calibrate_model(3, FLOAT, batches(1))
    bad = batches(2)
    bad[1] = bad[1].at[3, 4].set(jnp.nan)
    with pytest.raises(ValueError, match="inputs of layer 'blocks/0/gate' are not finite"):
        ap.calibrate_model(Model(), FLOAT, bad)
    with pytest.raises(ValueError, match="no layer would be quantized"):
        ap.calibrate_model(Model(), {"**": None}, batches(1))


def test_allocations_are_the_best_of_all():
    """Against all combinations: nothing of at most the chosen size loses less (on the hull)."""
    rng = np.random.default_rng(5)
    table = [
        [
            Choice(ap.Quantization(weights=b), int(size * b), float(cost * 4.0**-b))
            for b in (1, 2, 3, 4)
        ]
        for size, cost in zip(rng.integers(50, 200, 5), rng.uniform(0.1, 10, 5), strict=True)
    ]
    for each in path_of(table):
        size, lost = sum(c.nbytes for c in each), sum(c.loss for c in each)
        for other in itertools.product(*table):
            if sum(c.nbytes for c in other) <= size:
                assert sum(c.loss for c in other) >= lost * (1 - 1e-9)
    chosen = choose(table, 1200)
    assert sum(c.nbytes for c in chosen) <= 1200
    with pytest.raises(ValueError, match="budget must be at least"):
        choose(table, 10)


def test_bits_go_where_they_matter():
    """The layer whose outputs are multiplied by 10 gets more bits than its like."""

    class Two(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.loud, self.quiet = (nnx.Linear(64, 64, rngs=rngs) for _ in range(2))

        def __call__(self, x):
            return 10 * self.loud(x) + self.quiet(x)

    data = [jnp.asarray(inputs(np.random.default_rng(0), 256, 64))]
    found = ap.calibrate.allocate_bits(Two(), FLOAT, data, budget=4.6, bits=(2, 4, 6))
    bits = {path: quantization.weights for path, quantization in found.rules}
    assert bits == {"loud": 6, "quiet": 2}
    assert found.bits <= 4.6
    losses = [loss for _, loss in found.frontier]
    assert losses == sorted(losses, reverse=True)
    # What is expected is what happens: half the squared error of the output, for this loss.
    model = ap.quantize_model(Two(), found.rules)
    measured = 0.5 * float(((model(data[0]) - Two()(data[0])) ** 2).sum(-1).mean())
    assert 0.5 < found.loss / measured < 1.5
    assert "bits a weight" in str(found)


def test_budgets_that_are_too_small_are_refused_at_once():
    model = nnx.Sequential(nnx.Linear(64, 32, rngs=nnx.Rngs(0)))

    def call(model, batch):
        raise AssertionError("nothing is to be run")

    def fails(budget, bits, match):
        with pytest.raises(ValueError, match=match):
            ap.calibrate.allocate_bits(model, FLOAT, [0], budget=budget, bits=bits, call=call)

    # A scale in float16 for each of 64 weights.
    fails(1.2, range(1, 9), r"budget must be at least 1\.25 bits a weight .*, got 1\.2")
    fails(3.0, (3, 4), r"budget must be at least 3\.25 bits a weight .*, got 3\.0")
    data = [jnp.asarray(inputs(np.random.default_rng(0), 256, 64))]
    costs = ap.calibrate.measure_costs(model, FLOAT, data, bits=(2,))
    with pytest.raises(ValueError, match=r"at least 2\.25 bits"):
        costs.allocate(2.0)


def test_groups_are_chosen_too():
    """Each size is offered once with each number of bits; larger groups take less and lose more."""
    model = nnx.Sequential(nnx.Linear(64, 32, rngs=nnx.Rngs(0)))
    data = [jnp.asarray(inputs(np.random.default_rng(0), 256, 64))]
    rules = dataclasses.replace(FLOAT, group_size=32)

    def choices(sizes):
        costs = ap.calibrate.measure_costs(model, rules, data, bits=(2, 3), group_sizes=sizes)
        return {(c.quantization.group_size, c.quantization.weights): c for c in costs.choices[0]}

    found = choices((None, 32))
    assert sorted(found, key=str) == [(32, 2), (32, 3), (None, 2), (None, 3)]
    assert choices(()) == {key: each for key, each in found.items() if key[0] == 32}
    for bits in (2, 3):
        whole, groups = found[None, bits], found[32, bits]
        assert whole.nbytes == groups.nbytes - 32 * 2  # one scale in float16 less for each column
        assert whole.loss > groups.loss
    with pytest.raises(ValueError, match="group_size"):
        choices((48,))


def test_the_same_again():
    first, second = (ap.calibrate_model(Model(), FLOAT, batches(2)).model for _ in range(2))
    for a, b in zip(leaves(first), leaves(second), strict=True):
        np.testing.assert_array_equal(a, b)


class Gated(nnx.Module):
    """A norm, values of two heads that are each taken twice, and a gated unit."""

    def __init__(self, norm=nnx.RMSNorm):
        rngs = nnx.Rngs(0)
        self.norm = norm(32, rngs=rngs)
        self.values = nnx.Linear(32, 8 + 16, rngs=rngs)
        self.output = nnx.Linear(32, 32, rngs=rngs)
        self.up = nnx.Linear(32, 64, rngs=rngs)
        self.down = nnx.Linear(64, 32, use_bias=False, rngs=rngs)

    def __call__(self, x):
        values = self.values(self.norm(x))[:, 8:].reshape(-1, 2, 1, 8)
        x = self.output(jnp.broadcast_to(values, (len(x), 2, 2, 8)).reshape(-1, 32))
        return self.down(self.up(x))


LINKS = (
    ap.calibrate.Link("norm", ("values",)),
    ap.calibrate.Link("values", ("output",), first=8, head=8),
    ap.calibrate.Link("up", ("down",)),
)


@pytest.mark.parametrize("norm", [nnx.RMSNorm, nnx.LayerNorm])
def test_smoothing_changes_channels_and_no_outputs(norm):
    rng = np.random.default_rng(5)
    x = jnp.asarray(rng.normal(size=(256, 32)).astype(np.float32))
    scale = jnp.asarray(1.2 ** np.arange(32), jnp.float32)
    exact, model = Gated(norm), Gated(norm)
    exact.norm.scale.set_value(scale)
    model.norm.scale.set_value(scale)
    changed = ap.calibrate.smooth(model, LINKS, [x[:128], x[128:]], strength=1.0)
    assert relative(model(x), exact(x)) < 1e-5
    squares = jnp.square(model.norm(x)).mean(0)
    np.testing.assert_allclose(squares, squares[0], rtol=1e-4)
    assert set(changed) >= {"norm/scale", "values/kernel", "values/bias", "down/kernel"}
    assert ("norm/bias" in changed) == (norm is nnx.LayerNorm)
    same = Gated(norm)
    ap.calibrate.smooth(same, LINKS, [x], strength=0.0)
    for a, b in zip(leaves(same), leaves(Gated(norm)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_smoothed_calibrations_load(tmp_path):
    rng = np.random.default_rng(6)
    x = jnp.asarray(rng.normal(size=(512, 32)).astype(np.float32))
    low = ap.Quantization(weights=4, activations=4, group_size=32)
    report = ap.calibrate_model(Gated(), low, [x], store=tmp_path, links=LINKS)
    loaded = ap.calibrate.load_calibrated(Gated(), tmp_path)
    for a, b in zip(leaves(loaded), leaves(report.model), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(loaded.norm.scale[...], Gated().norm.scale[...])
    with pytest.raises(ValueError, match="another model"):
        ap.calibrate_model(Gated(), low, [x], store=tmp_path)
    with pytest.raises(ap.CheckpointError, match="another model"):
        ap.calibrate.load_calibrated(Model(), tmp_path)


@pytest.mark.parametrize(
    ("link", "message"),
    [
        (ap.calibrate.Link("nothing", ("values",)), "giver must be a norm"),
        (ap.calibrate.Link("norm", ("norm",)), "takers must be of nnx.Linear: 'norm'"),
        (
            ap.calibrate.Link("norm", ("down",)),
            "'down' takes 64 channels, of which 'norm' gives 32",
        ),
        (ap.calibrate.Link("values", ("output",), first=8), "takes 32 channels, .* gives 16"),
        (ap.calibrate.Link("values", ("output",), first=8, head=5), "takes 32 channels"),
    ],
)
def test_links_that_do_not_fit(link, message):
    with pytest.raises(ValueError, match=message):
        ap.calibrate.smooth(Gated(), [link], [jnp.ones((4, 32))])


def test_smoothing_is_of_a_strength_from_0_to_1():
    with pytest.raises(ValueError, match=r"strength must be in 0\.\.1, got 2"):
        ap.calibrate.smooth(Gated(), LINKS, [jnp.ones((4, 32))], strength=2)
