"""cvt: every width of integers and floats."""

from __future__ import annotations

import numpy as np

from .faults import Unsupported
from .floats import flush, from_bits, to_bits
from .integers import Function, Values, numpy_type
from .parse import RAW, width

FLOATS = ("f16", "bf16", "f32", "f64")
ROUND = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def conversion(mods: tuple[str, ...]) -> tuple[Function, str, str]:
    """The function of a cvt, the type that it gives, and the one that it takes."""
    to, source = mods[-2:]
    options = mods[:-2]
    if to.endswith("x2"):
        return _pair(options, to), to, source
    if source not in FLOATS and to not in FLOATS:
        function = _integer_to_integer(to, source, "sat" in options)
    elif source in FLOATS and to in FLOATS:
        function = _float_to_float(to, source, options)
    elif to in FLOATS:
        function = _integer_to_float(to, source, options)
    else:
        function = _float_to_integer(to, source, options)
    return function, to, source


def _narrow(value: Values, type_name: str) -> Values:
    """A register's low bits as the type that an instruction reads."""
    raw = RAW[width(type_name)]
    return value if value.dtype == raw else value.astype(raw)


def _integer_to_integer(to: str, source: str, saturate: bool) -> Function:
    source_type, to_type = numpy_type(source), numpy_type(to)

    def call(a: Values) -> Values:
        value = _narrow(a, source).view(source_type)
        if saturate:
            value = _clip(value, to)
        return value.astype(to_type).view(RAW[width(to)])

    return call


def _clip(value: Values, to: str) -> Values:
    """Integers held to what the type can say, in their own type."""
    mine, other = np.iinfo(value.dtype), np.iinfo(numpy_type(to))
    return np.clip(
        value,
        value.dtype.type(max(mine.min, other.min)),
        value.dtype.type(min(mine.max, other.max)),
    )


def _mode(options: tuple[str, ...]) -> str:
    return next((m for m in options if m in ("rn", "rz", "rm", "rp")), "rn")


def _integer_to_float(to: str, source: str, options: tuple[str, ...]) -> Function:
    source_type, mode = numpy_type(source), _mode(options)
    if mode != "rn" and width(source) == 8:
        raise Unsupported(f"cvt.{mode}.{to}.{source}")
    if to in ("f32", "f64") and mode == "rn":
        dtype, raw = (np.float32, np.uint32) if to == "f32" else (np.float64, np.uint64)
        return lambda a: _narrow(a, source).view(source_type).astype(dtype).view(raw)
    if width(source) == 8:
        raise Unsupported(f"cvt.{to}.{source}")
    return lambda a: to_bits(_narrow(a, source).view(source_type).astype(np.float64), to, mode)


def _float_to_integer(to: str, source: str, options: tuple[str, ...]) -> Function:
    """Held to the range of the type; NaN gives 0."""
    rounding = next((ROUND[m] for m in options if m in ROUND), None)
    if rounding is None:
        raise Unsupported(f"cvt.{to}.{source} without rounding")
    dtype, raw = numpy_type(to), RAW[width(to)]
    info = np.iinfo(dtype)
    ftz = "ftz" in options

    def call(a: Values) -> Values:
        value = rounding(from_bits(flush(a) if ftz else a, source))
        inside = (value >= float(info.min)) & (value < float(info.max) + (info.bits < 64))
        limit = np.where(value > 0, dtype(info.max), dtype(info.min))
        limit = np.where(np.isnan(value), dtype(0), limit)
        return np.where(inside, np.where(inside, value, 0.0).astype(dtype), limit).view(raw)

    return call


def _float_to_float(to: str, source: str, options: tuple[str, ...]) -> Function:
    rounding = next((ROUND[m] for m in options if m in ROUND), None)
    mode, ftz, saturate, relu = (
        _mode(options), "ftz" in options, "sat" in options, "relu" in options
    )  # fmt: skip

    def call(a: Values) -> Values:
        value = from_bits(flush(a) if ftz and source == "f32" else a, source)
        if rounding is not None:
            value = rounding(value)
        if saturate:
            value = np.where(np.isnan(value), 0.0, np.clip(value, 0.0, 1.0))
        if relu:
            value = np.where(value > 0, value, np.where(np.isnan(value), value, 0.0))
        out = to_bits(value, to, mode)
        return flush(out) if ftz and to == "f32" else out

    return call


def _pair(options: tuple[str, ...], to: str) -> Function:
    """Two float32 to two 16-bit floats; the first goes to the upper half."""
    one = _float_to_float(to.removesuffix("x2"), "f32", options)

    def call(a: Values, b: Values) -> Values:
        return one(a).astype(np.uint32) << np.uint32(16) | one(b).astype(np.uint32)

    return call


def pack(mods: tuple[str, ...]) -> Function:
    """cvt.pack.sat: a and b, saturated, below what the low bits of c become."""
    to, source = mods[2], mods[3]
    if width(to) not in (1, 2) or source != "s32":
        raise Unsupported(f"cvt.{'.'.join(mods)}")
    one, bits = _integer_to_integer(to, source, True), np.uint32(8 * width(to))

    def call(a: Values, b: Values, *c: Values) -> Values:
        low = one(a).astype(np.uint32) << bits | one(b).astype(np.uint32)
        return c[0] << np.uint32(16) | low if c else low

    return call
