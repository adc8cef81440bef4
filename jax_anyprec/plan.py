"""`Plan`: what each layer of a model becomes, why, and what it costs; from shapes or weights."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from . import _native, local_cuda
from ._compat import Tracer
from .choose import cpu_method
from .einsum import over_stack, pack
from .quantization import Quantization
from .rules import Candidate, Decision, Rules, decide
from .tensor import QuantizedTensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer(Candidate):
    """A layer as it was found in a model: what rules see, and its weight.

    Args:
      shape, dtype: of the float weight.
      nbytes: of all parameters of the layer, such as its weight and bias.
      stacked: leading axes of the weight that stand for stacked layers.
      weight: an array, or a `jax.ShapeDtypeStruct` in a model of shapes; None if the layer has an
        obstacle.
      matrices: takes the weight of one layer of the stack to ``float[..., K, N]``.
    """

    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    stacked: int = 0
    weight: Any = dataclasses.field(default=None, repr=False)
    matrices: Callable[[Any], Any] = dataclasses.field(default=lambda w: w, repr=False)

    @property
    def abstract(self) -> bool:
        return isinstance(self.weight, jax.ShapeDtypeStruct)

    @property
    def is_single(self) -> bool:
        """Whether the weight is one matrix ``[K, N]``: no stack, no batch."""
        return self.matrix is not None and len(self.matrix) == 2 and not self.stacked

    def pack(self, quantization: Quantization) -> QuantizedTensor:
        """The packed weight ``(stack..., ..., K, N)``; a tensor of shapes if the weight is one."""

        def one(weight: Any) -> QuantizedTensor:
            return pack(self.matrices(weight), quantization)

        def all_of(weight: Any) -> QuantizedTensor:
            return over_stack(one, weight, self.stacked)

        with self._named(quantization):
            return jax.eval_shape(all_of, self.weight) if self.abstract else all_of(self.weight)

    def error(self, quantization: Quantization) -> float | None:
        """``|weight - packed| / |weight|`` (Frobenius); None for a weight of shapes."""
        if self.abstract or isinstance(self.weight, Tracer):
            return None
        lost = norm = 0.0
        with self._named(quantization):
            for weight in _elements(self.weight, self.stacked):
                matrices = self.matrices(weight)
                for matrix in _elements(matrices, matrices.ndim - 2):
                    squares = _squares(matrix, quantization.pack(matrix))
                    lost, norm = lost + float(squares[0]), norm + float(squares[1])
        return math.sqrt(lost / norm) if norm else 0.0

    def packed_nbytes(self, quantization: Quantization) -> int:
        """Bytes of the packed weight, from shapes alone."""
        assert self.matrix is not None
        *leading, k, n = self.matrix
        with self._named(quantization):
            return math.prod(leading) * _packed_nbytes(k, n, quantization)

    @contextlib.contextmanager
    def _named(self, quantization: Quantization) -> Iterator[None]:
        """Errors of a weight that can't be packed so say which layer it is in."""
        try:
            yield
        except ValueError as fault:
            raise ValueError(
                f"layer {self.path!r} of shape {self.shape} can't become {describe(quantization)}: "
                f"{fault}"
            ) from fault


def _elements(x: Any, axes: int) -> Iterator[Any]:
    """The elements of `x` along so many leading axes."""
    if axes == 0:
        yield x
    else:
        for part in x:
            yield from _elements(part, axes - 1)


@jax.jit
def _squares(matrix: jax.Array, packed: QuantizedTensor) -> tuple[jax.Array, jax.Array]:
    matrix = matrix.astype(jnp.float32)
    return ((matrix - packed.dequantize()) ** 2).sum(), (matrix**2).sum()


@functools.lru_cache
def _packed_nbytes(k: int, n: int, quantization: Quantization) -> int:
    """Bytes of a packed matrix; ValueError if K does not fit."""
    matrix = jax.ShapeDtypeStruct((k, n), jnp.float32)
    return jax.eval_shape(quantization.pack, matrix).nbytes


@dataclasses.dataclass(frozen=True)
class PlannedLayer:
    """One line of a plan.

    Attributes:
      path, kind: names on the way to the layer, joined with "/"; and its class.
      shape, dtype: of the float weight.
      quantization: what it becomes; None for float.
      reason: which rule or which default says so, or why it can't be quantized.
      bytes_before, bytes_after: of all parameters of the layer.
      error: ``|weight - packed| / |weight|`` (Frobenius); None if that was not measured.
      implementation, implementation_reason: which kernels will run on the default device, and why;
        None for float.
    """

    path: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    quantization: Quantization | None
    reason: str
    bytes_before: int
    bytes_after: int
    error: float | None
    implementation: str | None
    implementation_reason: str | None

    @property
    def becomes(self) -> str:
        """`quantization` in short, as "W4A8 g32 rotated"; or "float"."""
        return "float" if self.quantization is None else describe(self.quantization)

    def row(self) -> dict[str, Any]:
        """Everything, as values that JSON has."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del fields["quantization"]
        return {**fields, "shape": list(self.shape), "becomes": self.becomes}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What each layer of a model becomes. Printed, it is a table.

    `quantize_model` takes it in the place of rules, for the model that it was made for or one of
    the same layers.
    """

    layers: tuple[PlannedLayer, ...]

    @property
    def bytes_before(self) -> int:
        return sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        return sum(layer.bytes_after for layer in self.layers)

    def require_quantized(self) -> None:
        """ValueError, with reasons, if all layers stay in float."""
        if all(layer.quantization is None for layer in self.layers):
            reasons = [f"{layer.path or 'the model'}: {layer.reason}" for layer in self.layers[:5]]
            raise ValueError(f"no layer would be quantized: {'; '.join(reasons)}")

    def rows(self) -> list[dict[str, Any]]:
        """A dict for each layer, which ``pandas.DataFrame(plan.rows())`` takes."""
        return [layer.row() for layer in self.layers]

    def to_json(self) -> str:
        totals = {"bytes_before": self.bytes_before, "bytes_after": self.bytes_after}
        return json.dumps({**totals, "layers": self.rows()}, indent=2)

    def __str__(self) -> str:
        quantized = sum(layer.quantization is not None for layer in self.layers)
        return (
            f"{_table([_cells(layer) for layer in self.layers])}\n"
            f"{quantized} of {len(self.layers)} layers quantized, "
            f"{self.bytes_before:,} bytes become {self.bytes_after:,}"
        )


def make_plan(layers: Sequence[Layer], rules: Rules | Plan, *, errors: bool) -> Plan:
    """The plan for layers that were found in a model.

    Args:
      layers: all of a model's layers with parameters.
      rules: how to plan; or a plan, which is returned if it is one for these layers.
      errors: whether to quantize each weight to measure its error.

    Raises:
      ValueError: a rule does not fit the model or a layer, or the plan is for another model.
    """
    if isinstance(rules, Plan):
        _check_same(rules, layers)
        return rules
    decisions = decide(rules, layers)
    return Plan(tuple(_planned(*pair, errors) for pair in zip(layers, decisions, strict=True)))


def describe(quantization: Quantization) -> str:
    """A quantization in short: float activations count as 16 bits."""
    parts = [f"W{quantization.weights}A{quantization.activations or 16}"]
    if quantization.group_size is not None:
        parts.append(f"g{quantization.group_size}")
    if quantization.rotate:
        parts.append("rotated")
    if quantization.scales is not None:
        parts.append(quantization.scales)
    if quantization.activations and quantization.act_scales == "token":
        parts.append("token scales")
    if quantization.scale_dtype != "float32":
        parts.append(f"{quantization.scale_dtype} scales")
    if quantization.offsets:
        parts.append("offsets")
    return " ".join(parts)


def _planned(layer: Layer, decision: Decision, errors: bool) -> PlannedLayer:
    quantization = decision.quantization
    nbytes, error, implementation, reason = layer.nbytes, None, None, None
    if quantization is not None:
        packed = layer.packed_nbytes(quantization)
        error = layer.error(quantization) if errors else None
        nbytes += packed - math.prod(layer.shape) * jnp.dtype(layer.dtype).itemsize
        implementation, reason = _implementation(layer, quantization)
    return PlannedLayer(
        path=layer.path,
        kind=layer.kind,
        shape=layer.shape,
        dtype=layer.dtype,
        quantization=quantization,
        reason=decision.reason,
        bytes_before=layer.nbytes,
        bytes_after=nbytes,
        error=error,
        implementation=implementation,
        implementation_reason=reason,
    )


def _implementation(layer: Layer, quantization: Quantization) -> tuple[str, str]:
    """What multiplies on the default device, for any number of rows, and why."""
    platform = jax.default_backend()
    platform = "cuda" if platform == "gpu" else platform
    backend = _native.status().get(platform, {"reason": f"no kernels for {platform}"})
    if not backend.get("available"):
        return "xla", backend["reason"]
    try:
        method, reason = _method(platform, backend, layer, quantization)
    except _native.Unavailable as why:
        return "xla", str(why)
    return platform if method == "float" else f"{platform}_{method}", reason


def _method(
    platform: str, backend: dict[str, Any], layer: Layer, quantization: Quantization
) -> tuple[str, str]:
    """The kernel family, and why; `Unavailable` if there is none."""
    assert layer.matrix is not None
    assert quantization.weights is not None
    if platform == "cpu":
        return cpu_method(quantization.activations, quantization.weights, None, backend["isa"])
    *_, k, n = layer.matrix
    group_size = quantization.group_size or k
    chosen = local_cuda.plan(
        n, k, rows=None, weight_bits=quantization.weights, act_bits=quantization.activations,
        group_size=group_size,
        act_group_size=k if quantization.act_scales == "token" else group_size,
        x_dtype=jnp.float32, rotated=quantization.rotate,
    )  # fmt: skip
    return chosen["method"], chosen["reason"]


def _check_same(plan: Plan, layers: Sequence[Layer]) -> None:
    """ValueError unless `plan` was made for these layers."""
    planned = [(p.path, p.kind, p.shape, p.dtype) for p in plan.layers]
    found = [(f.path, f.kind, f.shape, f.dtype) for f in layers]
    if planned != found:
        missing = [p for p in planned if p not in found]
        extra = [f for f in found if f not in planned]
        raise ValueError(
            f"the plan is for another model: {missing[:1] or 'nothing'} of the plan is not in the "
            f"model, {extra[:1] or 'nothing'} of the model is not in the plan"
        )
    for planned_layer, layer in zip(plan.layers, layers, strict=True):
        if planned_layer.quantization is not None and layer.obstacle is not None:
            raise ValueError(
                f"the plan is for another model: it quantizes layer {layer.path!r}, but here: "
                f"{layer.obstacle}"
            )


HEADINGS = ("path", "kind", "shape", "from", "to", "bytes", "after", "error", "runs in", "why")
RIGHT = ("bytes", "after", "error")


def _cells(layer: PlannedLayer) -> tuple[str, ...]:
    why = [layer.reason, layer.implementation_reason]
    return (
        layer.path or "(model)",
        layer.kind,
        "x".join(map(str, layer.shape)),
        layer.dtype,
        layer.becomes,
        f"{layer.bytes_before:,}",
        f"{layer.bytes_after:,}",
        "" if layer.error is None else f"{layer.error:.4f}",
        layer.implementation or "",
        "; ".join(part for part in why if part),
    )


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows under the headings, in columns as wide as they need be."""
    lines = [HEADINGS, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]

    def line(cells: tuple[str, ...]) -> str:
        padded = (
            cell.rjust(width) if heading in RIGHT else cell.ljust(width)
            for heading, cell, width in zip(HEADINGS, cells, widths, strict=True)
        )
        return "  ".join(padded).rstrip()

    return "\n".join(map(line, lines))
