"""Flax transformers with dense layers of 1 to 8 bits, weights and activations, under jax.jit."""

import importlib
from typing import Any

from . import export as _export  # noqa: F401  (registers QuantizedTensor with jax.export)
from ._native import CUSTOM_CALLS, Unavailable, register_custom_calls, status
from .before import RMSNorm, SwiGLU
from .convert import plan, quantize_model
from .fake_quant import fake_quant, fake_quant_matmul
from .memory import Arena
from .ops import int_matmul, matmul, quantize_activations
from .plan import Plan
from .quantization import Quantization
from .quantize import quantize
from .rotation import Rotation
from .sharding import local_part, partition_specs, shard, tensor_sharding
from .tensor import QuantizedTensor, concatenate

__version__ = "0.1.0"

__all__ = [
    "CUSTOM_CALLS",
    "Arena",
    "CalibrationReport",
    "CheckpointError",
    "Plan",
    "Quantization",
    "QuantizedTensor",
    "RMSNorm",
    "Rotation",
    "SwiGLU",
    "Unavailable",
    "calibrate",
    "calibrate_model",
    "concatenate",
    "fake_quant",
    "fake_quant_matmul",
    "int_matmul",
    "linen",
    "load",
    "load_into",
    "local_part",
    "matmul",
    "nnx",
    "partition_specs",
    "plan",
    "quantize",
    "quantize_activations",
    "quantize_model",
    "register_custom_calls",
    "save",
    "save_dequantized",
    "shard",
    "static_fields",
    "status",
    "tensor_sharding",
    "with_static_fields",
]


def __getattr__(name: str) -> Any:
    # Layers and checkpoints import Flax, so they load on first use.
    if name in ("calibrate", "linen", "nnx"):
        return importlib.import_module(f".{name}", __name__)
    if name in ("CalibrationReport", "calibrate_model"):
        return getattr(importlib.import_module(".calibrate", __name__), name)
    if name in ("CheckpointError", "load", "load_into", "save"):
        return getattr(importlib.import_module(".checkpoint", __name__), name)
    if name == "save_dequantized":
        return importlib.import_module(".export_float", __name__).save_dequantized
    if name in ("static_fields", "with_static_fields"):
        return getattr(importlib.import_module(".static", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
