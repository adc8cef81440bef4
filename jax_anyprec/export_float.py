"""Export of dequantized weights to a safetensors file that other libraries read."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .safetensors import Tensor, file_writer, replace_files
from .tensor import QuantizedTensor

DTYPES = ("float32", "float16", "bfloat16")


def save_dequantized(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Any] | Iterable[tuple[str, Any]],
    *,
    dtype: Any = jnp.float32,
) -> None:
    """Write float tensors by name, each dequantized when its turn comes.

    Takes the memory of one tensor. The file replaces an older one when it is complete.

    Args:
      path: of the file.
      tensors: by name, or pairs with the name first. A `QuantizedTensor` ``[..., K, N]`` is
        written as ``[..., N, K]``, output features first, as PyTorch's layers have it. A float
        array is written in the shape that it has; so is a `jax_anyprec.safetensors.Tensor`,
        which is read when its turn comes.
      dtype: of all tensors in the file: float32, float16 or bfloat16.

    Raises:
      TypeError: `dtype` is another, a name is no string, or a tensor is not one of floats.
      ValueError: a name comes twice or is the format's own, or a tensor has finite values that
        `dtype` can't hold.
    """
    replace_files({Path(path): dequantized_writer(tensors, dtype=dtype)})


def dequantized_writer(
    tensors: Mapping[str, Any] | Iterable[tuple[str, Any]], *, dtype: Any
) -> Callable[[Any], None]:
    """What writes the file of `save_dequantized`, for `safetensors.replace_files`."""
    dtype = np.dtype(dtype)
    if dtype.name not in DTYPES:
        raise TypeError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype.name}")
    entries: dict[str, Tensor] = {}
    for name, value in tensors.items() if isinstance(tensors, Mapping) else tensors:
        if name in entries:
            raise ValueError(f"tensors must have each name once, got {name!r} twice")
        source = _source(name, value)
        read = functools.partial(_read, name, source, dtype)
        entries[name] = Tensor(source.shape, dtype, read)
    # Transformers takes a file only if it says which library's conventions it follows.
    return file_writer(entries, {"format": "pt"})


def _source(name: str, value: Any) -> Tensor:
    """Where the values of a tensor come from."""
    if isinstance(value, QuantizedTensor):
        shape = (*value.shape[:-2], value.shape[-1], value.shape[-2])
        return Tensor(shape, np.dtype(np.float32), lambda: jnp.swapaxes(value.dequantize(), -1, -2))
    if not isinstance(value, Tensor):
        value = value if isinstance(value, jax.Array) else np.asarray(value)
        value = Tensor(value.shape, np.dtype(value.dtype), functools.partial(np.asarray, value))
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(f"tensors[{name!r}] must be of floats or packed, got {value.dtype}")
    return value


def _read(name: str, source: Tensor, dtype: np.dtype) -> np.ndarray:
    values = np.asarray(source.read())
    with np.errstate(over="ignore"):
        cast = values.astype(dtype)
    if not np.isfinite(cast[np.isfinite(values)]).all():
        raise ValueError(f"{name} has values that {dtype.name} can't hold; use float32 or bfloat16")
    return cast
