"""Linear layers of GPTQ, AWQ and compressed-tensors checkpoints, imported without loss.

All of them store ``W = d (u - z)`` with integers u and z below ``2**bits`` in 32-bit words and a
scale d of 16 bits for each group along K. That is ``2 (d / 2) u + (-d z)``, and both products are
exact in float32.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .affine import from_affine
from .gptq_config import Scheme
from .gptq_layouts import Parts
from .safetensors import CheckpointError, parse_json, read_small
from .shards import INDEX, read_tensors
from .tensor import QuantizedTensor

__all__ = [
    "LINEAR_PARTS",
    "CheckpointError",
    "Scheme",
    "has_scheme",
    "linear_names",
    "linear_shape",
    "open_folder",
    "read_linear",
    "read_permuted",
]

LINEAR_PARTS = (
    *("qweight", "qzeros", "scales", "g_idx"),
    *("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"),
)
"""Last parts of the names of a packed layer's tensors, which stand for its weight."""


def open_folder(path: str | os.PathLike[str]) -> tuple[Mapping[str, np.ndarray], Scheme]:
    """The tensors of a checkpoint folder, mapped to memory and not yet read, and their scheme.

    Args:
      path: of a folder with model.safetensors, or shards of it with their index, or one other
        .safetensors file; and the scheme in config.json, quantize_config.json or
        quant_config.json.

    Raises:
      FileNotFoundError: there is no such folder.
      CheckpointError: it lacks a file, or one is broken, or the scheme is not supported.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"there is no folder {str(path)!r}")
    scheme = _read_scheme(path)
    try:
        tensors, _ = read_tensors(_find_tensors(path))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.name} lacks a file: {error}") from None
    return tensors, scheme


def has_scheme(path: str | os.PathLike[str]) -> bool:
    """Whether a folder says in one of the files that `open_folder` reads how its layers are packed.

    Raises:
      CheckpointError: one of these files is not JSON.
    """
    return _find_scheme(Path(path)) is not None


def linear_names(tensors: Iterable[str]) -> list[str]:
    """Names of the packed linear layers among those of tensors, in their order.

    Raises:
      CheckpointError: one is packed in two ways.
    """
    endings = (".qweight", ".weight_packed")
    names = [n.removesuffix(e) for n in tensors for e in endings if n.endswith(e)]
    for name, count in Counter(names).items():
        if count > 1:
            raise CheckpointError(f"{name} is packed twice, as qweight and as weight_packed")
    return names


def linear_shape(tensors: Mapping[str, np.ndarray], name: str, scheme: Scheme) -> tuple[int, int]:
    """``(K, N)`` of a packed linear layer, which is not read.

    Raises:
      CheckpointError: a tensor is missing, or has another dtype or number of axes.
    """
    return Parts(tensors, name, scheme).shape()


def read_linear(tensors: Mapping[str, np.ndarray], name: str, scheme: Scheme) -> QuantizedTensor:
    """The weights of a packed linear layer, without loss.

    Args:
      tensors: by name, as safetensors files hold them; a bias is none of this function's business.
      name: of the layer: "model.layers.0.mlp.down_proj", say.
      scheme: of the checkpoint.

    Returns:
      A `QuantizedTensor` of shape ``(K, N)`` in NumPy arrays, with offsets.

    Raises:
      CheckpointError: a tensor is missing, has another dtype or shape than the scheme asks for, or
        values that can't be imported without loss; or the layer's groups are not stretches of K
        (``desc_act``), see `read_permuted`.
    """
    weights, order = read_permuted(tensors, name, scheme)
    if order is not None:
        raise CheckpointError(
            f"{name} has groups in the order of activations (desc_act), and its product needs the "
            "features of x in that order too: read_permuted returns it"
        )
    return weights


def read_permuted(
    tensors: Mapping[str, np.ndarray], name: str, scheme: Scheme
) -> tuple[QuantizedTensor, np.ndarray | None]:
    """As `read_linear`, with the order of features where groups are not stretches of K.

    Returns:
      The weights with their rows in an order in which groups are stretches, and that order
      ``int64[K]``: the layer's product is ``matmul(x[..., order], weights)``. None for an order
      that changes nothing.
    """
    layer = Parts(tensors, name, scheme).layer()
    step = _step(name, layer.scales, scheme.bits)
    with np.errstate(over="ignore", invalid="ignore"):
        minimum = -step * layer.zeros
    if not (np.isfinite(step).all() and np.isfinite(minimum).all()):
        raise CheckpointError(f"{name} has scales that are NaN, infinite or too large")
    order, groups = _order(name, layer.g_idx, layer.codes.shape[1], step.shape[1])
    codes = layer.codes if order is None else layer.codes[:, order]
    return from_affine(codes, step[:, groups], minimum[:, groups], bits=scheme.bits), order


def _step(name: str, scales: np.ndarray, bits: int) -> np.ndarray:
    """The scales in float32, in which a product with any code is exact."""
    step = np.ascontiguousarray(scales, np.float32)
    if scales.dtype.itemsize == 4 and (step.view(np.uint32) & (2**bits - 1)).any():
        raise CheckpointError(
            f"{name} has float32 scales whose products with {bits}-bit integers would be rounded; "
            "scales of float16 or bfloat16, or that fit them, come in without loss"
        )
    return step


def _order(
    name: str, g_idx: np.ndarray | None, k: int, groups: int
) -> tuple[np.ndarray | None, np.ndarray]:
    """The order of features in which groups are stretches (None: as they are), and the groups."""
    if g_idx is None:
        return None, np.arange(groups)
    if g_idx.min() < 0 or g_idx.max() >= groups:
        raise CheckpointError(f"{name} has a g_idx outside of its {groups} groups")
    if (np.bincount(g_idx, minlength=groups) != k // groups).any():
        raise CheckpointError(f"{name} has a g_idx with groups of other sizes than {k // groups}")
    stretches = g_idx.reshape(groups, -1)
    if (stretches == stretches[:, :1]).all():
        return None, stretches[:, 0]
    return np.argsort(g_idx, kind="stable"), np.arange(groups)


def _read_scheme(path: Path) -> Scheme:
    found = _find_scheme(path)
    if found is None:
        raise CheckpointError(
            f"{path.name} has no quantization_config in config.json, and neither "
            "quantize_config.json nor quant_config.json"
        )
    config, where = found
    return Scheme.parse(config, f"{path.name}/{where}")


def _find_scheme(path: Path) -> tuple[Any, str] | None:
    """The JSON that describes the scheme, not yet checked, and its place in the folder."""
    for name in ("config.json", "quantize_config.json", "quant_config.json"):
        file = path / name
        if not file.is_file():
            continue
        config = parse_json(read_small(file), str(file))
        where = name
        if name == "config.json":
            where = f"{name}: 'quantization_config'"
            config = config.get("quantization_config") if isinstance(config, dict) else None
            if config is None:
                continue
        return config, where
    return None


def _find_tensors(path: Path) -> Path:
    usual = path / "model.safetensors"
    files = sorted(path.glob("*.safetensors"))
    if usual.exists() or usual.with_name(usual.name + INDEX).exists():
        return usual
    if len(files) != 1:
        raise CheckpointError(
            f"{path.name} must have model.safetensors, its index, or one other .safetensors file, "
            f"got {len(files)}"
        )
    return files[0]
