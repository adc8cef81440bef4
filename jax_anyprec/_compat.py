"""The only place for JAX names that are private or that change between versions."""

from jax.core import ShapedArray, Tracer
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

__all__ = ["Primitive", "ShapedArray", "Tracer", "ad", "batching", "mlir"]
