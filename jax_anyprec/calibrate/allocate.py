"""Bits for each layer under a budget for all: where a bit more lowers the loss most."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ..format import check_bits
from ..nnx.convert import Found, quantized_by
from ..plan import describe
from ..quantization import Quantization
from ..quantize import DISTORTION
from ..rules import Rules
from ..tensor import QuantizedTensor
from .blocks import call_plainly
from .moments import Moments
from .pack import has_coarse_activations
from .packed import PackedWeights, check_packed, held_as
from .sensitivity import Loss, Sensitivity, projected_loss, sensitivities
from .solve import Method, solve

REFERENCE_BITS = 3

WORTH = 0.8
"""Weights as they are packed are taken if so much of the loss, or less, is expected then.

They make up for nothing that layers before them lose, as weights that are calibrated do; what is
expected knows nothing of that. docs/accuracy.md has the measurements.
"""


@dataclasses.dataclass(frozen=True)
class Choice:
    """What one quantization of one layer costs.

    Attributes:
      quantization: how the layer would be held.
      nbytes: of its packed weight.
      loss: expected change of the model's loss, in nats a prediction for logits.
      packed: the weight, if it is packed already.
    """

    quantization: Quantization
    nbytes: int
    loss: float
    packed: QuantizedTensor | None = dataclasses.field(default=None, repr=False, compare=False)


@dataclasses.dataclass(frozen=True)
class Allocation:
    """What `allocate_bits` chose. Printed, it is a table.

    Attributes:
      rules: for `calibrate_model` or `quantize_model`; one for each layer.
      bits: a weight, with scales and offsets, over the layers that are quantized.
      loss: what all choices together are expected to add to the model's loss.
      frontier: (bits, loss) of the best allocations for all budgets.
      packed: weights that are taken as they are, for `calibrate_model`, by path.
    """

    rules: tuple[tuple[str, Quantization], ...]
    bits: float
    loss: float
    frontier: tuple[tuple[float, float], ...]
    packed: PackedWeights = dataclasses.field(default_factory=dict, repr=False)

    def __str__(self) -> str:
        width = max(len(path) for path, _ in self.rules)
        lines = [
            f"{path:{width}}  {describe(quantization)}{', as packed' * (path in self.packed)}"
            for path, quantization in self.rules
        ]
        total = f"{self.bits:.3f} bits a weight, expected loss {self.loss:.4f}"
        return "\n".join([*lines, total])


def choose(layers: Sequence[Sequence[Choice]], budget: float) -> list[Choice]:
    """One choice for each layer, of at most `budget` bytes together, with least loss or nearly so.

    Each layer starts with its smallest choice; then the step that saves most loss for each byte is
    taken, of those on the layer's convex hull, until no further one fits.

    Raises:
      ValueError: even the smallest choices need more than the budget.
    """
    allocations = iter(path_of(layers))
    taken = next(allocations)
    least = sum(c.nbytes for c in taken)
    if least > budget:
        raise ValueError(f"budget must be at least {least} bytes for these choices, got {budget}")
    for chosen in allocations:
        if sum(c.nbytes for c in chosen) > budget:
            break
        taken = chosen
    return taken


def path_of(layers: Sequence[Sequence[Choice]]) -> Iterable[list[Choice]]:
    """Allocations of growing size: those that lose least for theirs."""
    hulls = [_hull(choices) for choices in layers]
    at = [0] * len(hulls)
    steps = sorted(
        (
            ((a.loss - b.loss) / (b.nbytes - a.nbytes), layer, i)
            for layer, hull in enumerate(hulls)
            for i, (a, b) in enumerate(itertools.pairwise(hull))
        ),
        key=lambda step: (-step[0], step[2]),
    )
    yield [hull[0] for hull in hulls]
    for _, layer, i in steps:
        at[layer] = i + 1
        yield [hull[j] for hull, j in zip(hulls, at, strict=True)]


def _hull(choices: Sequence[Choice]) -> list[Choice]:
    """The choices, by size, from which each further byte saves less than the one before."""
    hull: list[Choice] = []
    for choice in sorted(choices, key=lambda c: (c.nbytes, c.loss)):
        if hull and choice.loss >= hull[-1].loss:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], choice):
            hull.pop()
        if hull and hull[-1].nbytes == choice.nbytes:
            hull.pop()
        hull.append(choice)
    return hull


def _slope(a: Choice, b: Choice) -> float:
    return (a.loss - b.loss) / (b.nbytes - a.nbytes)


@dataclasses.dataclass(frozen=True)
class Costs:
    """What each number of bits would cost each layer, see `measure_costs`.

    Attributes:
      paths: of the layers.
      choices: for each layer.
      weights: of all layers, how many.
    """

    paths: tuple[str, ...]
    choices: tuple[tuple[Choice, ...], ...]
    weights: int

    def allocate(self, budget: float) -> Allocation:
        """The bits of each layer for at most `budget` bits a weight, scales included, on average.

        Weights that are packed already are among them if that lowers the loss by a fifth.

        Raises:
          ValueError: the budget is less than the fewest bits need.
        """
        chosen = self._choose(budget)
        by_path = dict(zip(self.paths, chosen, strict=True))
        rules = tuple((path, choice.quantization) for path, choice in by_path.items())
        packed = {path: c.packed for path, c in by_path.items() if c.packed is not None}
        return Allocation(rules, *self._totals(chosen), self.frontier, packed)

    def _choose(self, budget: float) -> list[Choice]:
        least = sum(min(c.nbytes for c in choices) for choices in self.choices)
        _check_budget(budget, least, self.weights)
        nbytes = budget * self.weights / 8
        chosen = choose(self.choices, nbytes)
        anew = [[c for c in choices if c.packed is None] for choices in self.choices]
        if sum(min(c.nbytes for c in choices) for choices in anew) > nbytes:
            return chosen
        others = choose(anew, nbytes)
        worth = sum(c.loss for c in chosen) < WORTH * sum(c.loss for c in others)
        return chosen if worth else others

    @property
    def frontier(self) -> tuple[tuple[float, float], ...]:
        """(bits a weight, expected loss) of the best allocations, by size."""
        return tuple(map(self._totals, path_of(self.choices)))

    def _totals(self, chosen: Sequence[Choice]) -> tuple[float, float]:
        bits = 8 * sum(c.nbytes for c in chosen) / self.weights
        return bits, sum(c.loss for c in chosen)


def allocate_bits(
    model: nnx.Module, rules: Rules, batches: Iterable[Any], *, budget: float, **options: Any
) -> Allocation:
    """Choose the bits of each layer, so that all have at most `budget` bits a weight.

    Args:
      model, rules, batches, options: as for `measure_costs`, which is to be called once for
        several budgets.
      budget: bits a weight, scales included, on average over the layers.
    """
    return measure_costs(model, rules, batches, budget=budget, **options).allocate(budget)


def measure_costs(
    model: nnx.Module,
    rules: Rules,
    batches: Iterable[Any],
    *,
    bits: Iterable[int] = range(1, 9),
    group_sizes: Iterable[int | None] = (),
    packed: PackedWeights | None = None,
    budget: float | None = None,
    loss: Loss = projected_loss,
    call: Callable[[Any, Any], Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Costs:
    """Estimate what each number of bits would cost each layer.

    The error of a layer's outputs is that of its weight calibrated to REFERENCE_BITS alone, scaled
    by what more or fewer bits do to a Gaussian; what it costs the model is estimated by the
    derivatives of `loss` (see `jax_anyprec.calibrate.sensitivity`).

    Args:
      model: a `flax.nnx.Module`; it is not changed.
      rules: which layers take part, and how they are held but for the bits.
      batches: a few are enough.
      bits: to choose from.
      group_sizes: to choose from, besides the rule's; None is a scale for each output channel.
      packed: by layer, a weight that is packed already, as a file has it say, and may be taken as
        it is, with activation scales a group if it is not rotated. It is no choice for a layer
        whose activations have fewer than 8 bits: they need rotated weights.
      budget: bits a weight; refused before anything is measured if no choices are so small.
      loss: from the model's output and a key to a scalar: `sampled_loss` for logits, by default
        `projected_loss`, which measures the squared change of any output.
      call: ``call(model, batch)`` runs the model; None for ``model(batch)``.
      progress: called with the layers done so far and their number.

    Raises:
      ValueError: a rule, a group size or a packed weight does not fit, the budget is too small, or
        a layer is not called with these batches or has no inputs that are rows of one matrix.
    """
    widths = [check_bits(each, "bits") for each in bits]
    layers = quantized_by(model, rules)
    sizes = list(group_sizes)
    held = [_held(each, quantization, sizes) for each, quantization in layers]
    there = packed or {}
    check_packed(there, [f for f, _ in layers])
    found = [each for each, _ in layers]
    weights = sum(map(_count, found))
    if budget is not None:
        _check_budget(budget, _least(found, held, min(widths), there), weights)
    rows = [f for f, _ in layers if f.has_rows]
    run = call or call_plainly
    seen = sensitivities(model, rows, list(batches), loss=loss, call=run)
    table = []
    for i, ((each, quantization), ways) in enumerate(zip(layers, held, strict=True), 1):
        path = each.layer.path
        if path not in seen:
            raise ValueError(f"layer {path!r} shows no inputs in these batches: leave it out")
        choices = [c for q in ways for c in _choices(each, seen[path], q, widths)]
        if path in there and not has_coarse_activations(quantization):
            choices.append(_as_packed(each, seen[path], quantization, there[path]))
        table.append(tuple(choices))
        if progress is not None:
            progress(i, len(layers))
    return Costs(tuple(f.layer.path for f in found), tuple(table), weights)


def _check_budget(budget: float, nbytes: int, weights: int) -> None:
    """Raise ValueError if so many bits a weight are less than so many bytes."""
    least = 8 * nbytes / weights
    if budget < least:
        raise ValueError(
            f"budget must be at least {least:.4g} bits a weight for these choices, got {budget}"
        )


def _least(
    layers: Sequence[Found],
    held: Sequence[Sequence[Quantization]],
    bits: int,
    packed: PackedWeights,
) -> int:
    """The bytes of the smallest choices."""
    least = 0
    for found, ways in zip(layers, held, strict=True):
        fewest = [dataclasses.replace(each, weights=bits) for each in ways]
        sizes = [found.layer.packed_nbytes(each) for each in fewest]
        if found.layer.path in packed:
            sizes.append(packed[found.layer.path].restore().nbytes)
        least += min(sizes)
    return least


def _count(found: Found) -> int:
    assert found.layer.matrix is not None
    return math.prod(found.layer.matrix)


def _held(
    found: Found, quantization: Quantization, group_sizes: Sequence[int | None]
) -> list[Quantization]:
    """How a layer may be held but for the bits, each once; ValueError if it can't be."""
    sizes = dict.fromkeys((quantization.group_size, *group_sizes))
    held = [dataclasses.replace(quantization, group_size=size) for size in sizes]
    for each in held:
        found.layer.packed_nbytes(each)
    return held


def _choices(
    found: Found, sensitivity: Sensitivity, quantization: Quantization, bits: Sequence[int]
) -> list[Choice]:
    measured = dataclasses.replace(quantization, weights=REFERENCE_BITS)
    loss = _loss(found, sensitivity, measured) / DISTORTION[REFERENCE_BITS]
    return [
        Choice(each, found.layer.packed_nbytes(each), loss * DISTORTION[width])
        for width in bits
        for each in [dataclasses.replace(quantization, weights=width)]
    ]


def _as_packed(
    found: Found, sensitivity: Sensitivity, quantization: Quantization, tensor: QuantizedTensor
) -> Choice:
    held = held_as(tensor, quantization)
    if not held.rotate:
        held = dataclasses.replace(held, act_scales="group")
    difference = tensor.dequantize() - found.layer.matrices(found.layer.weight)
    loss = _weighted(difference, sensitivity.inputs, sensitivity.outputs)
    return Choice(held, tensor.restore().nbytes, float(loss), tensor)


def _loss(found: Found, sensitivity: Sensitivity, quantization: Quantization) -> float:
    """``sum_n outputs[n] (e_n' inputs e_n) / 2`` for the error e of the weight at these bits."""
    weights = found.layer.matrices(found.layer.weight)
    rotation, inputs = quantization.rotation(weights.shape[0]), sensitivity.inputs
    if rotation is not None:
        inputs = rotation.apply(rotation.apply(inputs).T)
    zeros = jnp.zeros(weights.shape[0])
    moments = Moments(inputs, inputs, zeros, zeros, jnp.float32(jnp.inf), inputs, inputs)
    solution = solve(weights, moments, quantization, Method(sweeps=1, cross=0.0))
    return float(_weighted(solution.difference, inputs, sensitivity.outputs))


@jax.jit
def _weighted(errors: jax.Array, inputs: jax.Array, outputs: jax.Array) -> jax.Array:
    return 0.5 * (outputs * (errors * (inputs @ errors)).sum(0)).sum()
