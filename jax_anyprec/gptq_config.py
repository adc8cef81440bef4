"""`Scheme`: what a checkpoint's quantization_config says of its packed linear layers, checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_args

from .safetensors import CheckpointError

Layout = Literal["gptq", "gptq_v2", "awq_gemm", "awq_gemv", "pack_quantized"]

METHODS = ("gptq", "awq", "compressed-tensors")
"""Values of ``quant_method`` that `Scheme.parse` takes."""

_MISSING: Any = object()


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How a checkpoint packs its linear layers.

    Args:
      layout: "gptq" (zero points are stored minus one), "gptq_v2" (as they are), "awq_gemm",
        "awq_gemv", or "pack_quantized" of compressed-tensors.
      bits: of a weight; 2, 3, 4 or 8 in GPTQ, 4 in AWQ, 1, 2, 4 or 8 in compressed-tensors.
      group_size: values along K that share a scale; None for one scale an output channel.
      symmetric: whether compressed-tensors leaves the zero points out; the others never do.
    """

    layout: Layout
    bits: int
    group_size: int | None
    symmetric: bool = False

    def __post_init__(self) -> None:
        if self.layout not in get_args(Layout):
            allowed = ", ".join(get_args(Layout))
            raise ValueError(f"layout must be one of {allowed}, got {self.layout!r}")
        bits = _BITS[self.layout]
        if type(self.bits) is not int or self.bits not in bits:
            raise ValueError(
                f"bits must be one of {', '.join(map(str, bits))} for {self.layout}, "
                f"got {self.bits!r}"
            )
        size = self.group_size
        if size is not None and (type(size) is not int or size < 1):
            raise ValueError(f"group_size must be None or a positive int, got {size!r}")

    @classmethod
    def parse(cls, config: Any, where: str = "quantization_config") -> Scheme:
        """From the JSON object that config.json has at "quantization_config".

        The objects in quantize_config.json (AutoGPTQ) and quant_config.json (AutoAWQ) do too.

        Args:
          config: the object. What bears on the values of weights is checked, the rest ignored.
          where: it comes from, for errors.

        Raises:
          CheckpointError: a field is missing, of another type, or has a value not supported here.
        """
        if not isinstance(config, Mapping):
            raise CheckpointError(f"{where} must be an object, got {type(config).__name__}")
        fields = _Fields(config, where)
        # AutoGPTQ and AutoAWQ leave the method out of their own files.
        method = fields.get("quant_method", str, "awq" if "w_bit" in config else "gptq").lower()
        if method not in METHODS:
            raise fields.error("quant_method", METHODS, method)
        try:
            return {"gptq": _gptq, "awq": _awq, "compressed-tensors": _compressed}[method](fields)
        except CheckpointError:
            raise
        except ValueError as error:
            raise CheckpointError(f"{where}: {error}") from None


_BITS: Mapping[Layout, tuple[int, ...]] = {
    "gptq": (2, 3, 4, 8),
    "gptq_v2": (2, 3, 4, 8),
    "awq_gemm": (4,),
    "awq_gemv": (4,),
    "pack_quantized": (1, 2, 4, 8),  # others: versions of the library pack them differently
}


@dataclasses.dataclass(frozen=True)
class _Fields:
    """A JSON object whose values are checked as they are read."""

    values: Mapping[str, Any]
    where: str

    def get(self, key: str, kind: type, default: Any = _MISSING) -> Any:
        """The value at `key`, a `kind`; `default` if it is missing or null."""
        value = self.values.get(key)
        if value is None:
            if default is _MISSING:
                raise CheckpointError(f"{self.where} lacks {key!r}")
            return default
        if type(value) is not kind:
            raise CheckpointError(
                f"{self.where}: {key!r} must be {kind.__name__}, got {type(value).__name__}"
            )
        return value

    def either(self, keys: tuple[str, ...], kind: type, default: Any = _MISSING) -> Any:
        """The value of a field that has had several names, which must not contradict each other."""
        found = {key: self.get(key, kind) for key in keys if self.values.get(key) is not None}
        if len(set(found.values())) > 1:
            raise CheckpointError(f"{self.where} contradicts itself: {found}")
        return next(iter(found.values())) if found else self.get(keys[0], kind, default)

    def section(self, key: str) -> _Fields:
        return _Fields(self.get(key, dict), f"{self.where}: {key!r}")

    def require(self, key: str, allowed: tuple[Any, ...]) -> None:
        """CheckpointError unless the value at `key`, null if it is missing, is in `allowed`."""
        value = self.values.get(key)
        if not any(type(value) is type(a) and value == a for a in allowed):
            raise self.error(key, allowed, value)

    def error(self, key: str, allowed: tuple[Any, ...], value: Any) -> CheckpointError:
        names = " or ".join(repr(a) for a in allowed)
        return CheckpointError(
            f"{self.where}: {key!r} must be {names}, got {value!r}, which is not supported"
        )

    def group_size(self, keys: tuple[str, ...] = ("group_size", "q_group_size")) -> int | None:
        """-1 stands for None."""
        size = self.either(keys, int)
        return None if size == -1 else size


def _gptq(fields: _Fields) -> Scheme:
    layout = fields.either(("checkpoint_format", "format"), str, "gptq").lower()
    if layout not in ("gptq", "gptq_v2"):
        raise fields.error("checkpoint_format", ("gptq", "gptq_v2"), layout)
    fields.require("is_marlin_format", (None, False))
    fields.require("pack_dtype", (None, "int32"))
    # Bits and groups of single layers, by patterns.
    fields.require("dynamic", (None, {}, False))
    # Zero points are stored in either case, and the order of groups is in g_idx.
    fields.get("sym", bool, True)
    fields.get("desc_act", bool, False)
    return Scheme(layout, fields.either(("bits", "w_bit"), int), fields.group_size())


def _awq(fields: _Fields) -> Scheme:
    version = fields.either(("version", "checkpoint_format", "format"), str, "gemm").lower()
    layouts: dict[str, Layout] = {"gemm": "awq_gemm", "gemv": "awq_gemv"}
    if version not in layouts:
        raise fields.error("version", tuple(layouts), version)
    fields.require("zero_point", (None, True))
    bits = fields.either(("bits", "w_bit"), int)
    return Scheme(layouts[version], bits, fields.group_size())


def _compressed(fields: _Fields) -> Scheme:
    fields.require("format", ("pack-quantized",))
    # Either would change what the packed weights stand for.
    fields.require("sparsity_config", (None, {}))
    fields.require("transform_config", (None, {}))
    groups = fields.section("config_groups")
    if len(groups.values) != 1:
        raise CheckpointError(f"{groups.where} must have one group, got {len(groups.values)}")
    group = groups.section(next(iter(groups.values)))
    group.require("targets", (["Linear"],))
    group.require("format", (None, "pack-quantized"))
    group.require("input_activations", (None,))
    group.require("output_activations", (None,))
    weights = group.section("weights")
    weights.require("type", (None, "int"))
    weights.require("dynamic", (None, False))
    weights.require("block_structure", (None,))
    strategy = weights.get("strategy", str)
    if strategy not in ("group", "channel"):
        raise weights.error("strategy", ("group", "channel"), strategy)
    size = weights.group_size(("group_size",)) if strategy == "group" else None
    bits, symmetric = weights.get("num_bits", int, 8), weights.get("symmetric", bool, True)
    return Scheme("pack_quantized", bits, size, symmetric)
