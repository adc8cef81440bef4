"""Products of low rank beside packed layers, which take off some of what rounding does to outputs.

Of a layer's weights W and its packed ones Q, factors A and B bring ``x (Q + A B)`` nearest to
``x W``. With the second moment ``x'x = E'E`` of inputs, ``E A B`` is the truncated singular value
decomposition of ``E (W - Q)`` (EoRA, arXiv 2410.21271: in the eigenspace of the inputs). Each
singular value squared is what its pair of factors saves of the squared error of outputs. Pairs of
all layers that save most for each byte, as a part of their layer's outputs, are taken up to a
budget.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ..nnx.convert import Found, find
from ..nnx.linear import QuantLinear
from ..nnx.lora import with_factors
from ..nnx.references import Reference, references
from .blocks import Call, call_plainly
from .moments import product
from .observe import observe

DTYPE = np.dtype(np.float16)
"""Of factors."""

DAMPING = 0.01
"""Added to the diagonal of second moments, as a part of its mean."""

MOST = 4
"""A layer gets at most min(K, N) / MOST pairs of factors."""


class Factors(NamedTuple):
    """Candidates for one layer, those that save most first.

    Attributes:
      a: ``float16[K, rank]``.
      b: ``float16[rank, N]``.
      saved: ``float[rank]``, parts of the squares of outputs that each takes off their error.
    """

    a: jax.Array
    b: jax.Array
    saved: np.ndarray

    def first(self, rank: int) -> tuple[jax.Array, jax.Array]:
        return self.a[:, :rank], self.b[:rank]

    @property
    def bits(self) -> int:
        """Of one pair."""
        return 8 * DTYPE.itemsize * (self.a.shape[0] + self.b.shape[1])


def compensate(
    model: nnx.Module,
    reference: nnx.Module,
    batches: Iterable[Any],
    bits: float,
    *,
    call: Call | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Put low-rank products beside packed layers, which become `flax.nnx.LoRA` modules around them.

    Args:
      model: with `QuantLinear` layers, changed in place.
      reference: the float model.
      batches: inputs.
      bits: what factors may take, for each weight of these layers on average: a rank r of a
        ``[K, N]`` takes ``16 r (K + N)``. Ranks follow from it, some may be 0.
      call: ``call(reference, batch)`` runs it; None for ``reference(batch)``.
      progress: called with the layers done so far and their number.

    Returns:
      The factors ``float16[K, rank], float16[rank, N]`` by the path of their layer.

    Raises:
      ValueError: `bits` is not positive, there are no batches, or no such layer is called.
    """
    if not bits > 0:
        raise ValueError(f"bits must be above 0, got {bits!r}")
    places = _places(model)
    layers = [f for f in find(reference) if f.layer.path in places and f.has_rows]
    runs = [functools.partial(call or call_plainly, reference, batch) for batch in batches]
    moments = _moments(layers, runs)
    if not moments:
        raise ValueError(
            "model must have QuantLinear layers that batches reach, got "
            f"{len(places)} such layers and {len(runs)} batches"
        )
    found: dict[str, Factors] = {}
    for layer in layers:
        if layer.layer.path in moments:
            packed = places[layer.layer.path][0].node
            found[layer.layer.path] = _factors(layer, packed, moments.pop(layer.layer.path))
            if progress is not None:
                progress(len(found), len(found) + len(moments))
    weights = sum(each.a.shape[0] * each.b.shape[1] for each in found.values())
    ranks = _ranks(found, bits * weights)
    chosen = {path: found[path].first(rank) for path, rank in ranks.items() if rank}
    put_factors(model, chosen)
    return chosen


def put_factors(model: nnx.Module, factors: Mapping[str, Sequence[Any]]) -> None:
    """Put factors beside the packed layers at their paths.

    Raises:
      ValueError: there is no such layer, or its shape is another.
    """
    places = _places(model)
    for path, (a, b) in factors.items():
        if path not in places:
            raise ValueError(f"model has no QuantLinear {path!r}")
        packed: Any = places[path][0].node
        layer = with_factors(packed, a, b)
        for place in places[path]:
            place.replace(layer)


def _places(model: nnx.Module) -> dict[str, list[Reference]]:
    """References to each packed layer, by the path of the first."""
    of: dict[int, list[Reference]] = {}
    for each in references(model):
        if isinstance(each.node, QuantLinear):
            of.setdefault(id(each.node), []).append(each)
    return {places[0].path: places for places in of.values()}


def _moments(layers: Sequence[Found], runs: Sequence[Callable[[], Any]]) -> dict[str, jax.Array]:
    """The second moment ``float32[K, K]`` of each layer's inputs; layers may share one."""
    moments: dict[str, jax.Array] = {}
    last: Any = None  # neighbours that share an input share its moment
    squares: Any = None

    def show(found: Found, x: Any) -> None:
        nonlocal last, squares
        path = found.layer.path
        if x is not last:
            rows = found.rows(x).astype(jnp.float32)
            last, squares = x, product(rows, rows)
        moments[path] = moments[path] + squares if path in moments else squares

    for run in runs:
        observe(layers, run, show)
    return moments


def _factors(found: Found, packed: Any, moment: jax.Array) -> Factors:
    weights = found.layer.matrices(found.layer.weight).astype(jnp.float32)
    return Factors(*_decompose(weights, packed.kernel.get_value().dequantize(), moment))


@jax.jit
def _decompose(
    weights: jax.Array, values: jax.Array, moment: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`Factors` of weights and what stands for them, both ``float32[K, N]``."""
    size = jnp.maximum(jnp.trace(moment) / len(moment), 1e-30)
    squares, directions = jnp.linalg.eigh(moment / size)
    roots = jnp.sqrt(jnp.maximum(squares, 0) + DAMPING)
    seen = roots[:, None] * directions.T  # E
    u, s, v = jnp.linalg.svd(seen @ (weights - values), full_matrices=False)
    rank = max(1, min(weights.shape) // MOST)
    u, s, v = u[:, :rank], s[:rank], v[:rank]
    a = directions @ (u / roots[:, None]) * jnp.sqrt(s)
    b = jnp.sqrt(s)[:, None] * v
    outputs = jnp.maximum(jnp.square(seen @ weights).sum(), 1e-30)
    return a.astype(DTYPE), b.astype(DTYPE), s**2 / outputs


def _ranks(found: Mapping[str, Factors], bits: float) -> dict[str, int]:
    """Ranks that save most with so many bits: pairs in the order of what they save for each."""
    pairs = sorted(
        (
            (saved / each.bits, path)
            for path, each in found.items()
            for saved in map(float, each.saved)
        ),
        reverse=True,
    )
    ranks = dict.fromkeys(found, 0)
    for _, path in pairs:
        cost = found[path].bits
        if cost <= bits:
            ranks[path] += 1
            bits -= cost
    return ranks
