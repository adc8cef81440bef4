"""Lets `jax.export` serialize functions that take or return a `QuantizedTensor`."""

from __future__ import annotations

import json
from typing import Any

from jax import export

from .tensor import QuantizedTensor


def _static_to_bytes(static: tuple[Any, ...]) -> bytes:
    from .static import to_json  # imports Flax

    return json.dumps(to_json(QuantizedTensor(None, None, None, *static))).encode()


def _static_from_bytes(data: bytes) -> tuple[Any, ...]:
    from .static import STATIC, from_json

    fields = from_json(json.loads(bytes(data)), "QuantizedTensor")
    return tuple(fields[name] for name in STATIC)


export.register_pytree_node_serialization(
    QuantizedTensor,
    serialized_name="jax_anyprec.QuantizedTensor",
    serialize_auxdata=_static_to_bytes,
    deserialize_auxdata=_static_from_bytes,
)
