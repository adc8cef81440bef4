"""Float instructions on raw bits: IEEE, each result rounded once.

Approximations of the hardware (``ex2.approx`` and others) are computed exactly and rounded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .faults import Unsupported
from .integers import COMPARE, Function, Values

NAN = {"f16": 0x7FFF, "bf16": 0x7FFF, "f32": 0x7FFFFFFF}
"""The NaN that arithmetic gives."""


# --- formats ---


def from_bits(bits: Values, kind: str) -> Values:
    """Bits of a float as ``float64``, exactly."""
    if kind == "f64":
        return bits.view(np.float64)
    if kind == "f32":
        return bits.view(np.float32).astype(np.float64)
    if kind == "f16":
        return bits.view(np.float16).astype(np.float64)
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)


def to_bits(value: Values, kind: str, mode: str = "rn") -> Values:
    """``float64`` to the bits of a float, rounded once."""
    if kind == "f64":
        return value.view(np.uint64)
    if kind == "bf16":
        return _to_bfloat16(value, mode)
    dtype, raw = (np.float32, np.uint32) if kind == "f32" else (np.float16, np.uint16)
    out = value.astype(dtype)
    if mode != "rn":
        out = _directed(out, value, mode)
    return np.where(np.isnan(value), raw(NAN[kind]), out.view(raw))


def _directed(nearest: Values, value: Values, mode: str) -> Values:
    """The nearest float moved to the one that the mode asks for."""
    dtype = nearest.dtype.type
    above, below = nearest.astype(np.float64) > value, nearest.astype(np.float64) < value
    down = {"rz": above & (value > 0), "rm": above, "rp": np.False_}[mode]
    up = {"rz": below & (value < 0), "rp": below, "rm": np.False_}[mode]
    out = np.where(down, np.nextafter(nearest, dtype(-np.inf)), nearest)
    return np.where(up, np.nextafter(nearest, dtype(np.inf)), out)


def _to_bfloat16(value: Values, mode: str) -> Values:
    """By way of float32 rounded to odd, which keeps what the second rounding needs."""
    bits = _odd(value.astype(np.float32), value).view(np.uint32)
    upper, lower = bits >> np.uint32(16), bits & np.uint32(0xFFFF)
    if mode == "rn":
        half = np.uint32(0x8000)
        up = (lower > half) | ((lower == half) & (upper & np.uint32(1) == 1))
    elif mode == "rz":
        up = np.False_
    else:
        raise Unsupported(f"rounding .{mode} to bf16")
    out = upper + np.where(up, np.uint32(1), np.uint32(0))
    return np.where(np.isnan(value), np.uint32(NAN["bf16"]), out).astype(np.uint16)


def _odd(nearest: Values, exact: Values) -> Values:
    """`nearest` float32 of float64 `exact`, rounded to odd instead."""
    truncated = _directed(nearest, exact, "rz")
    bits = truncated.view(np.uint32)
    inexact = (truncated.astype(np.float64) != exact) & ~np.isnan(exact)
    return (bits | inexact.astype(np.uint32)).view(np.float32)


def add_to_odd(a: Values, b: Values) -> Values:
    """a + b in float64, rounded to odd: a further rounding to fewer bits is then correct."""
    total = a + b
    error = _sum_error(a, b, total)
    bits = total.view(np.int64)
    fix = np.isfinite(total) & (error != 0) & (bits & 1 == 0)
    toward = np.where((error > 0) == (total > 0), np.int64(1), np.int64(-1))
    return (bits + np.where(fix, toward, np.int64(0))).view(np.float64)


def _fma64(a: Values, b: Values, c: Values) -> Values:
    """a * b + c of float64 values, rounded once ("Emulation of a FMA and correctly rounded sums",
    Boldo and Melquiond); not where the product or its error leaves the range."""
    product = a * b
    low = _product_error(a, b, product)
    small = low + c
    total = product + small
    rest = add_to_odd(_sum_error(product, small, total), _sum_error(low, c, small))
    return np.where(np.isfinite(total), total + rest, product + c)


def _sum_error(a: Values, b: Values, total: Values) -> Values:
    back = total - a
    return (a - (total - back)) + (b - back)


def _product_error(a: Values, b: Values, product: Values) -> Values:
    split = 134217729.0
    a1 = a * split - (a * split - a)
    b1 = b * split - (b * split - b)
    a2, b2 = a - a1, b - b1
    return a2 * b2 - (((product - a1 * b1) - a2 * b1) - a1 * b2)


# --- arithmetic ---


def flush(bits: Values) -> Values:
    """Subnormal float32 values to zero of the same sign."""
    small = bits & np.uint32(0x7F800000) == 0
    return np.where(small, bits & np.uint32(0x80000000), bits)


def smaller(a: Values, b: Values) -> Values:
    """Minimum of float64; the number where one is NaN; -0 below +0."""
    return np.where((a == b) & np.signbit(a), a, np.fmin(a, b))


def larger(a: Values, b: Values) -> Values:
    return np.where((a == b) & ~np.signbit(a), a, np.fmax(a, b))


IN_SINGLE: dict[str, Callable[..., Values]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply,
    "div": np.divide, "sqrt": np.sqrt, "rcp": lambda a: np.float32(1) / a,
}  # fmt: skip
"""What NumPy's float32 rounds correctly, which is all that most kernels do."""
IN_DOUBLE: dict[str, Callable[..., Values]] = {
    "add": add_to_odd, "sub": lambda a, b: add_to_odd(a, -b), "mul": np.multiply,
    "fma": lambda a, b, c: add_to_odd(a * b, c), "mad": lambda a, b, c: add_to_odd(a * b, c),
    "div": np.divide, "rcp": lambda a: 1 / a, "sqrt": np.sqrt,
    "rsqrt": lambda a: 1 / np.sqrt(a), "ex2": np.exp2, "lg2": np.log2,
    "sin": np.sin, "cos": np.cos, "tanh": np.tanh, "min": smaller, "max": larger,
}  # fmt: skip
"""In float64, exact or rounded to odd, or near enough for what is approximate anyway."""
FULL: dict[str, Callable[..., Values]] = {
    **IN_DOUBLE, "add": np.add, "sub": np.subtract, "fma": _fma64, "mad": _fma64,
}  # fmt: skip


def sign_operation(name: str, kind: str) -> Function | None:
    """Instructions on the sign bit."""
    raw: Any = {"f16": np.uint16, "bf16": np.uint16, "f32": np.uint32, "f64": np.uint64}[kind]
    sign = raw(1 << (np.dtype(raw).itemsize * 8 - 1))
    table: dict[str, Function] = {
        "mov": lambda a: a,
        "neg": lambda a: a ^ sign,
        "abs": lambda a: a & ~sign,
        "copysign": lambda a, b: (b & ~sign) | (a & sign),
    }
    return table.get(name)


def scalar_operation(name: str, mods: tuple[str, ...], kind: str) -> Function | None:
    """The function of a float instruction on one value a lane."""
    mode = next((m for m in mods if m in ("rn", "rz", "rm", "rp")), "rn")
    function = sign_operation(name, kind)
    if function is None and kind == "f32" and mode == "rn" and name in IN_SINGLE:
        function = _single(IN_SINGLE[name])
    elif function is None and name in IN_DOUBLE:
        if mode != "rn" and (kind == "f64" or name not in ("add", "sub", "mul", "fma")):
            raise Unsupported(f"{name}.{mode}.{kind}")
        chosen = (FULL if kind == "f64" else IN_DOUBLE)[name]

        def function(*v: Values) -> Values:
            return to_bits(chosen(*[from_bits(x, kind) for x in v]), kind, mode)

    if function is None:
        return None
    if "NaN" in mods:
        function = _with_nan(function, kind)
    if "relu" in mods:
        function = _relu(function, kind)
    if "sat" in mods:
        function = _saturated(function, kind)
    if "ftz" in mods and kind == "f32":
        inner = function
        return lambda *v: flush(inner(*[flush(x) for x in v]))
    return function


def _single(function: Callable[..., Values]) -> Function:
    nan = np.uint32(NAN["f32"])

    def call(*values: Values) -> Values:
        out = function(*[v.view(np.float32) for v in values])
        bad = out != out
        return np.where(bad, nan, out.view(np.uint32)) if bad.any() else out.view(np.uint32)

    return call


def _with_nan(inner: Function, kind: str) -> Function:
    def call(*values: Values) -> Values:
        out = inner(*values)
        bad = np.logical_or.reduce([np.isnan(from_bits(v, kind)) for v in values])
        return np.where(bad, out.dtype.type(NAN[kind]), out)

    return call


def _relu(inner: Function, kind: str) -> Function:
    def call(*values: Values) -> Values:
        out = inner(*values)
        value = from_bits(out, kind)
        return np.where((value < 0) | (value == 0), out.dtype.type(0), out)

    return call


def _saturated(inner: Function, kind: str) -> Function:
    def call(*values: Values) -> Values:
        value = from_bits(inner(*values), kind)
        return to_bits(np.where(np.isnan(value), 0.0, np.clip(value, 0.0, 1.0)) + 0.0, kind)

    return call


def pair_operation(name: str, mods: tuple[str, ...], kind: str) -> Function | None:
    """The function of an instruction on two 16-bit floats in a word."""
    scalar = scalar_operation(name, mods, kind)
    if scalar is None:
        return None

    def call(*words: Values) -> Values:
        low = scalar(*[w.astype(np.uint16) for w in words])
        high = scalar(*[(w >> np.uint32(16)).astype(np.uint16) for w in words])
        return low.astype(np.uint32) | high.astype(np.uint32) << np.uint32(16)

    return call


def operation(name: str, mods: tuple[str, ...], kind: str) -> Function | None:
    """The function of a float instruction; `kind` is f16, bf16, f16x2, bf16x2, f32 or f64."""
    if kind.endswith("x2"):
        return pair_operation(name, mods, kind.removesuffix("x2"))
    return scalar_operation(name, mods, kind)


def compare(relation: str, kind: str, ftz: bool) -> Function:
    """Ordered relations are false with a NaN; those that end in u are true."""
    if relation in ("num", "nan"):
        numbers = relation == "num"

        def call(a: Values, b: Values) -> Values:
            nan = np.isnan(from_bits(a, kind)) | np.isnan(from_bits(b, kind))
            return ~nan if numbers else nan

        return call
    unordered = relation.endswith("u")
    base = relation.removesuffix("u") if unordered else relation
    if base not in COMPARE or kind.endswith("x2"):
        raise Unsupported(f"comparison {relation}.{kind}")

    def ordered(a: Values, b: Values) -> Values:
        if ftz:
            a, b = flush(a), flush(b)
        x, y = from_bits(a, kind), from_bits(b, kind)
        nan = np.isnan(x) | np.isnan(y)
        return COMPARE[base](x, y) | nan if unordered else COMPARE[base](x, y) & ~nan

    return ordered
