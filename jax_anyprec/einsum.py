"""Einsum of an array with a packed weight: which index is what, and the way to `matmul` and back.

The weight is kept as ``(batch..., K, N)``: its batch indices, its contracted indices flattened and
its feature indices flattened, each in the order in which the weight has them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from . import ops
from .quantization import Quantization
from .tensor import QuantizedTensor, check_tensor

ELLIPSIS = "..."


@dataclasses.dataclass(frozen=True)
class Product:
    """An einsum of x and a weight, whose indices are sorted by the part they play.

    Attributes:
      spec: as it was given, for messages.
      x, weight, out: the indices of each; those of x and out may hold an ellipsis.
    """

    spec: str
    x: str
    weight: str
    out: str

    @property
    def batch(self) -> str:
        """In all three, as experts are."""
        return "".join(i for i in self.weight if i in self.x and i in self.out)

    @property
    def contracted(self) -> str:
        """In x and the weight, summed over."""
        return "".join(i for i in self.weight if i not in self.out)

    @property
    def features(self) -> str:
        """In the weight and the output."""
        return "".join(i for i in self.weight if i not in self.x)

    @property
    def rows(self) -> str:
        """In x and the output."""
        return "".join(i for i in self.x if i not in self.weight)

    @property
    def packed(self) -> str:
        """The weight's indices in the order in which it is packed."""
        return self.batch + self.contracted + self.features

    @property
    def biased(self) -> str:
        """The indices of a bias: the weight's that the output keeps, in the output's order."""
        return "".join(i for i in self.out if i in self.weight)

    def sizes(self, weight_shape: Sequence[int]) -> dict[str, int]:
        """The size of each index of the weight."""
        if len(weight_shape) != len(self.weight):
            raise ValueError(
                f"the weight of {self.spec!r} must have {len(self.weight)} axes, {self.weight!r}, "
                f"got shape {tuple(weight_shape)}"
            )
        return dict(zip(self.weight, weight_shape, strict=True))

    def packed_shape(self, weight_shape: Sequence[int]) -> tuple[int, ...]:
        """``(batch..., K, N)`` of a weight of that shape."""
        sizes = self.sizes(weight_shape)
        k, n = (math.prod(_shape(part, sizes)) for part in (self.contracted, self.features))
        return (*_shape(self.batch, sizes), k, n)

    def matrices(self, weight: Any) -> jax.Array:
        """The weight as ``[batch..., K, N]``."""
        shape = self.packed_shape(weight.shape)
        return _permute(weight, self.weight, self.packed).reshape(shape)

    def as_bias(self, columns: jax.Array, weight_shape: Sequence[int]) -> jax.Array:
        """Values ``[N]``, one for each column of `matrices`, as a bias; without batch indices."""
        values = columns.reshape(_shape(self.features, self.sizes(weight_shape)))
        return _permute(values, self.features, self.biased)

    def expand(self, ndim: int) -> Product:
        """The same product with letters in the place of an ellipsis, for an x of `ndim` axes."""
        named = self.x.replace(ELLIPSIS, "")
        missing = ndim - len(named)
        free = [i for i in string.ascii_letters if i not in self.x + self.weight]
        most = len(free) if ELLIPSIS in self.x else 0
        if not 0 <= missing <= most:
            axes = f"{len(named)} to {len(named) + most}" if most else str(len(named))
            raise ValueError(f"x must have {axes} axes for {self.spec!r}, got {ndim}")
        letters = "".join(free[:missing])
        return dataclasses.replace(
            self, x=self.x.replace(ELLIPSIS, letters), out=self.out.replace(ELLIPSIS, letters)
        )


@functools.lru_cache
def parse(spec: str, weight_operand: int = 1) -> Product:
    """The product that an einsum of x and a weight is, or an error that says why it is none.

    Args:
      spec: two operands and the output, as ``"btd,dhk->bthk"``. Each index is in x and the output
        (rows), in x and the weight (contracted), in the weight and the output (features) or in all
        three (batch). x and the output may have an ellipsis.
      weight_operand: which operand is the weight, 0 or 1.
    """
    if not isinstance(spec, str):
        raise TypeError(f"spec must be a string, got {type(spec).__name__}")
    if weight_operand not in (0, 1):
        raise ValueError(f"weight_operand must be 0 or 1, got {weight_operand!r}")
    operands, arrow, out = spec.replace(" ", "").partition("->")
    names = operands.split(",")
    if not arrow or len(names) != 2:
        raise ValueError(f"spec must have two operands and an output, as 'x,w->y', got {spec!r}")
    product = Product(spec, names[1 - weight_operand], names[weight_operand], out)
    fault = next(_faults(product), None)
    if fault is not None:
        raise ValueError(f"spec {spec!r} is no product of x and a weight: {fault}")
    return product


def _faults(product: Product) -> Iterator[str]:
    """What keeps a spec from being a product."""
    x, weight, out = (s.replace(ELLIPSIS, "", 1) for s in (product.x, product.weight, product.out))
    for name, indices in (("x", x), ("the weight", weight), ("the output", out)):
        for i in indices:
            if i not in string.ascii_letters:
                yield f"{i!r} in {name} is no letter"
            if indices.count(i) > 1:
                yield f"index {i!r} is repeated in {name}"
    if ELLIPSIS in product.weight:
        yield "the weight must name its indices, without an ellipsis"
    if (ELLIPSIS in product.x) != (ELLIPSIS in product.out):
        yield "x and the output must both have an ellipsis, or neither"
    for i in out:
        if i not in x + weight:
            yield f"index {i!r} of the output is in no operand"
    for i in x:
        if i not in weight + out:
            yield f"index {i!r} is in x alone and would be summed out"
    for i in weight:
        if i not in x + out:
            yield f"index {i!r} is in the weight alone and would be summed out"
    if not product.contracted:
        yield "x and the weight share no index that is summed over"


def einsum(
    spec: str,
    x: Any,
    w: QuantizedTensor,
    *,
    weight_shape: Sequence[int],
    bias: Any = None,
    act_bits: int | None = None,
    act_scales: Literal["group", "token"] = "group",
    out_dtype: Any = None,
    implementation: str | None = None,
    weight_operand: Literal[0, 1] = 1,
) -> jax.Array:
    """``jnp.einsum(spec, x, weight) + bias`` with a packed weight.

    Args:
      spec: a product as `parse` takes it, say ``"...D,DNH->...NH"`` or, with experts,
        ``"ECD,EDF->ECF"``.
      x: ``float[...]``; float32, bfloat16 or float16.
      w: what `pack_einsum` gives, ``(batch..., K, N)``.
      weight_shape: the shape of the float weight, which says how K and N are split.
      bias: one value for each batch and feature index, with its axes in the output's order.
      act_bits, act_scales, out_dtype, implementation: as for `matmul`.
      weight_operand: which operand of `spec` is the weight; x comes before w in the call anyway.

    Returns:
      The output of `spec`, in `out_dtype`.
    """
    check_tensor(w, "w")
    x = jnp.asarray(x)
    product = parse(spec, weight_operand).expand(x.ndim)
    sizes, expected = product.sizes(weight_shape), product.packed_shape(weight_shape)
    if w.shape != expected:
        raise ValueError(
            f"w must have shape {expected} for {spec!r} with a weight of shape "
            f"{tuple(weight_shape)}, got {w.shape}"
        )
    for i, size in zip(product.x, x.shape, strict=True):
        if sizes.setdefault(i, size) != size:
            raise ValueError(
                f"x must have {sizes[i]} values along {i!r} of {spec!r}, got shape {x.shape}"
            )
    if bias is not None:
        expected = _shape(product.biased, sizes)
        if jnp.shape(bias) != expected:
            raise ValueError(f"bias must have shape {expected} for {spec!r}, got {jnp.shape(bias)}")
        flat = (*_shape(product.batch, sizes), -1)
        bias = _permute(bias, product.biased, product.batch + product.features).reshape(flat)

    def multiply(x: jax.Array, w: QuantizedTensor, bias: jax.Array | None) -> jax.Array:
        return ops.matmul(
            x,
            w,
            bias=bias,
            act_bits=act_bits,
            act_scales=act_scales,
            out_dtype=out_dtype,
            implementation=implementation,
        )

    mapped: Callable[..., jax.Array] = multiply
    for _ in product.batch:
        mapped = jax.vmap(mapped)
    kept = product.batch + product.rows
    x = _permute(x, product.x, kept + product.contracted).reshape(*_shape(kept, sizes), w.k)
    y = mapped(x, w, bias).reshape(_shape(kept + product.features, sizes))
    return _permute(y, kept + product.features, product.out)


def einsum_rows(spec: str, x: jax.Array) -> jax.Array:
    """The x of an einsum without batch indices as ``[rows, K]``, which a packed weight takes."""
    product = parse(spec).expand(x.ndim)
    sizes = dict(zip(product.x, x.shape, strict=True))
    k = math.prod(_shape(product.contracted, sizes))
    return _permute(x, product.x, product.rows + product.contracted).reshape(-1, k)


def pack_einsum(
    spec: str,
    weight: Any,
    quantization: Quantization,
    *,
    stacked: int = 0,
    weight_operand: Literal[0, 1] = 1,
) -> QuantizedTensor:
    """Quantize the weight of an einsum: ``(stack..., batch..., K, N)``.

    Args:
      spec, weight_operand: as for `einsum`.
      weight: ``float[...]`` with the indices that `spec` gives it, after `stacked` leading axes.
      quantization: how; its `weights` must be set.
      stacked: leading axes of stacked layers, which are mapped or scanned over.
    """
    product = parse(spec, weight_operand)

    def one(weight: Any) -> QuantizedTensor:
        return pack(product.matrices(weight), quantization)

    return over_stack(one, weight, stacked)


def pack(matrices: Any, quantization: Quantization) -> QuantizedTensor:
    """Quantize ``float[..., K, N]`` matrix by matrix, with the working memory of one."""
    return over_stack(quantization.pack, matrices, matrices.ndim - 2)


def over_stack(
    function: Callable[[Any], QuantizedTensor], weight: Any, stacked: int
) -> QuantizedTensor:
    """`function` of each element along `stacked` leading axes, one after another, stacked again."""
    if stacked == 0:
        return function(weight)
    parts = [over_stack(function, part, stacked - 1) for part in weight]
    if not parts:
        raise ValueError("a stack of weights must have at least one layer, got none")
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)


def unpack_einsum(
    spec: str,
    w: QuantizedTensor,
    weight_shape: Sequence[int],
    *,
    dtype: Any = jnp.float32,
    weight_operand: Literal[0, 1] = 1,
) -> jax.Array:
    """The float weight of shape `weight_shape` that a packed one stands for."""
    product = parse(spec, weight_operand)
    matrices = w.dequantize(dtype).reshape(_shape(product.packed, product.sizes(weight_shape)))
    return _permute(matrices, product.packed, product.weight)


def _shape(indices: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(sizes[i] for i in indices)


def _permute(x: Any, indices: str, order: str) -> jax.Array:
    """`x`, whose axes are `indices`, with its axes in another order of the same indices."""
    return jnp.transpose(x, [indices.index(i) for i in order])
