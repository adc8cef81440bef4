"""The only place for JAX names that are private or that change between versions."""

from typing import Any

import jax
from jax._src.dispatch import prim_requires_devices_during_lowering
from jax.core import ShapedArray, Tracer
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

__all__ = [
    "Primitive",
    "ShapedArray",
    "Tracer",
    "ad",
    "batching",
    "mlir",
    "needs_devices",
    "single_device",
    "varying_axes",
]


def needs_devices(primitive: Primitive) -> None:
    """The lowering of `primitive` asks which devices it is for, as custom_partitioning does."""
    prim_requires_devices_during_lowering.add(primitive)


def single_device(lowering: Any) -> bool:
    """Whether a primitive is lowered for a program of one device, given the rule's context."""
    return getattr(lowering.module_context.axis_context, "num_devices", None) == 1


def varying_axes(x: Any) -> frozenset[str]:
    """Mesh axes of the enclosing shard_map over which `x` differs."""
    return jax.typeof(x).mat.varying
