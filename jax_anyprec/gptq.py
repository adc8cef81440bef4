"""Linear layers of GPTQ, AWQ and compressed-tensors checkpoints, imported without loss.

All of them store ``W = d (u - z)`` with integers u and z below ``2**bits`` in 32-bit words and a
scale d of 16 bits for each group along K. That is ``2 (d / 2) u + (-d z)``, and both products are
exact in float32. Ground truth of the layouts: AutoGPTQ's ``QuantLinear.pack``, AutoAWQ's
``WQLinear_GEMM`` and ``WQLinear_GEMV``, and compressed-tensors' ``pack_to_int32``.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from .affine import from_affine
from .gptq_config import Scheme
from .safetensors import CheckpointError, parse_json, read_small
from .shards import INDEX, read_tensors
from .tensor import QuantizedTensor, check_group_size

__all__ = [
    "CheckpointError",
    "Scheme",
    "linear_names",
    "open_folder",
    "read_linear",
    "read_permuted",
]

INTEGERS = (np.dtype(np.int32), np.dtype(np.int64))
FLOATS = tuple(np.dtype(t) for t in (np.float16, ml_dtypes.bfloat16, np.float32))

WORD = 32
AWQ_COLUMNS = (0, 4, 1, 5, 2, 6, 3, 7)
"""Which nibble of its word holds each of eight columns in AWQ's "gemm" layout."""


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
    tensors, _ = read_tensors(_find_tensors(path))
    return tensors, scheme


def linear_names(tensors: Iterable[str]) -> list[str]:
    """Names of the packed linear layers among those of tensors, in their order."""
    endings = (".qweight", ".weight_packed")
    return [n.removesuffix(e) for n in tensors for e in endings if n.endswith(e)]


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
    layer = _LAYOUTS[scheme.layout](_Tensors(tensors, name), scheme)
    step = layer.step(scheme.bits)
    with np.errstate(over="ignore", invalid="ignore"):
        minimum = -step * layer.zeros
    if not (np.isfinite(step).all() and np.isfinite(minimum).all()):
        raise CheckpointError(f"{name} has scales that are NaN, infinite or too large")
    order, groups = _order(name, layer.g_idx, layer.codes.shape[1], step.shape[1])
    codes = layer.codes if order is None else layer.codes[:, order]
    return from_affine(codes, step[:, groups], minimum[:, groups], bits=scheme.bits), order


@dataclasses.dataclass(frozen=True)
class _Layer:
    """A layer ``scales (codes - zeros)``.

    Args:
      name: for errors.
      codes: ``uint8[N, K]``.
      scales: ``float[N, groups]``.
      zeros: ``uint8[N, groups]``.
      g_idx: the group of each of K features, ``int[K]``; None for stretches in order.
    """

    name: str
    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray
    g_idx: np.ndarray | None

    def step(self, bits: int) -> np.ndarray:
        """The scales in float32, in which a product with any code is exact."""
        step = np.ascontiguousarray(self.scales, np.float32)
        if self.scales.dtype.itemsize == 4 and (step.view(np.uint32) & (2**bits - 1)).any():
            raise CheckpointError(
                f"{self.name} has float32 scales whose products with {bits}-bit integers would be "
                "rounded; scales of float16 or bfloat16, or that fit them, come in without loss"
            )
        return step


@dataclasses.dataclass(frozen=True)
class _Tensors:
    """The tensors of one layer, checked as they are taken."""

    tensors: Mapping[str, np.ndarray]
    name: str

    def has(self, part: str) -> bool:
        return f"{self.name}.{part}" in self.tensors

    def take(
        self, part: str, dtypes: tuple[np.dtype, ...], shape: tuple[int | None, ...]
    ) -> np.ndarray:
        """A tensor of one of `dtypes` and of `shape`, in which None stands for any size but 0."""
        if not self.has(part):
            raise self.error(f"lacks {part}")
        array = self.tensors[f"{self.name}.{part}"]
        names = " or ".join(dtype.name for dtype in dtypes)
        if array.dtype not in dtypes:
            raise self.error(f"has {part} in {array.dtype.name}, which must be {names}")
        fits = array.ndim == len(shape) and all(
            got == want or (want is None and got > 0)
            for got, want in zip(array.shape, shape, strict=False)
        )
        if not fits:
            want = ", ".join("any" if size is None else str(size) for size in shape)
            raise self.error(f"has {part} of shape {list(array.shape)}, which must be [{want}]")
        return array

    def words(self, part: str, shape: tuple[int | None, int | None]) -> np.ndarray:
        return self.take(part, INTEGERS[:1], shape)

    def groups(self, k: int, group_size: int | None) -> int:
        """The number of groups along K."""
        try:
            return k // check_group_size(group_size, k)
        except ValueError as error:
            raise self.error(f"can't be held: {error}") from None

    def error(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.name} {problem}")


def _gptq(tensors: _Tensors, scheme: Scheme) -> _Layer:
    """Words along K for weights and along N for zero points; fields may cross words."""
    bits = scheme.bits
    qweight = tensors.words("qweight", (None, None))
    rows, n = qweight.shape
    if rows * WORD % bits or n * bits % WORD:
        raise tensors.error(
            f"has qweight of shape {list(qweight.shape)}, which {bits}-bit words don't fill"
        )
    k = rows * WORD // bits
    groups = tensors.groups(k, scheme.group_size)
    scales = tensors.take("scales", FLOATS, (groups, n))
    zeros = _fields(tensors.words("qzeros", (groups, n * bits // WORD)), bits)
    if scheme.layout == "gptq":
        # A zero point of 0 was stored as -1, which AutoGPTQ reads as 2**bits and others as 0.
        if (zeros == 2**bits - 1).any():
            raise tensors.error(
                f"stores zero points minus one as {2**bits - 1}, which readers of this format "
                f"take for {2**bits} or for 0; save it as gptq_v2"
            )
        zeros = zeros + np.uint8(1)
    g_idx = tensors.take("g_idx", INTEGERS, (k,)) if tensors.has("g_idx") else None
    return _Layer(tensors.name, _fields(qweight.T, bits), scales.T, zeros.T, g_idx)


def _awq_gemm(tensors: _Tensors, scheme: Scheme) -> _Layer:
    """Words along N, the columns of each in the order that its kernel unpacks."""
    qweight = tensors.words("qweight", (None, None))
    k, n = qweight.shape[0], qweight.shape[1] * 8
    groups = tensors.groups(k, scheme.group_size)
    scales = tensors.take("scales", FLOATS, (groups, n))
    qzeros = tensors.words("qzeros", (groups, n // 8))

    def columns(words: np.ndarray) -> np.ndarray:
        fields = _fields(words, 4).reshape(len(words), -1, 8)
        return fields[..., AWQ_COLUMNS].reshape(len(words), n).T

    return _Layer(tensors.name, columns(qweight), scales.T, columns(qzeros), None)


def _awq_gemv(tensors: _Tensors, scheme: Scheme) -> _Layer:
    """Words along K; scales and zero points are padded to whole words."""
    qweight = tensors.words("qweight", (None, None))
    n, k = qweight.shape[0], qweight.shape[1] * 8
    groups = tensors.groups(k, scheme.group_size)
    qzeros = tensors.words("qzeros", (n, None))
    width = qzeros.shape[1] * 8
    if width < groups:
        raise tensors.error(f"has qzeros for {width} groups, fewer than {groups}")
    scales = tensors.take("scales", FLOATS, (n, width))[:, :groups]
    return _Layer(tensors.name, _fields(qweight, 4), scales, _fields(qzeros, 4)[:, :groups], None)


def _pack_quantized(tensors: _Tensors, scheme: Scheme) -> _Layer:
    """Words along K for weights and along N for zero points, the last of each padded.

    Signed integers, stored plus ``2**(bits - 1)``.
    """
    bits, per_word = scheme.bits, WORD // scheme.bits
    n, k = (int(size) for size in tensors.take("weight_shape", INTEGERS, (2,)))
    if n <= 0 or k <= 0:
        raise tensors.error(f"has weight_shape {[n, k]}, whose sizes must be positive")
    packed = tensors.words("weight_packed", (n, math.ceil(k / per_word)))
    groups = tensors.groups(k, scheme.group_size)
    scales = tensors.take("weight_scale", FLOATS, (n, groups))
    if not scheme.symmetric:
        words = tensors.words("weight_zero_point", (math.ceil(n / per_word), groups))
        zeros = _fields(words.T, bits)[:, :n].T
    elif tensors.has("weight_zero_point"):
        raise tensors.error("has weight_zero_point, but its scheme is symmetric")
    else:
        zeros = np.full((n, groups), 1 << (bits - 1), np.uint8)
    g_idx = tensors.take("weight_g_idx", INTEGERS, (k,)) if tensors.has("weight_g_idx") else None
    if g_idx is not None and (g_idx == -1).all():  # so it is where nothing was reordered
        g_idx = None
    return _Layer(tensors.name, _fields(packed, bits)[:, :k], scales, zeros, g_idx)


_LAYOUTS: Mapping[str, Callable[[_Tensors, Scheme], _Layer]] = {
    "gptq": _gptq,
    "gptq_v2": _gptq,
    "awq_gemm": _awq_gemm,
    "awq_gemv": _awq_gemv,
    "pack_quantized": _pack_quantized,
}


def _fields(words: np.ndarray, bits: int) -> np.ndarray:
    """``int32[rows, words]`` to ``uint8[rows, 32 words / bits]``, the lowest bits first.

    Fields of 3 bits may lie in two words: after three words they begin one again.
    """
    stretch = math.lcm(WORD, bits)
    words = np.ascontiguousarray(words, "<i4").view(np.uint32)
    words = words.reshape(len(words), -1, stretch // WORD)
    fields = np.empty((*words.shape[:2], stretch // bits), np.uint8)
    for i in range(stretch // bits):
        word, shift = divmod(i * bits, WORD)
        field = words[..., word] >> np.uint32(shift)
        if shift + bits > WORD:
            field |= words[..., word + 1] << np.uint32(WORD - shift)
        fields[..., i] = field & np.uint32(2**bits - 1)
    return fields.reshape(len(words), -1)


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
    """From the first file that has one."""
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
        return Scheme.parse(config, f"{path.name}/{where}")
    raise CheckpointError(
        f"{path.name} has no quantization_config in config.json, and neither quantize_config.json "
        "nor quant_config.json"
    )


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
