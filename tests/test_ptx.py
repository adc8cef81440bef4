"""The PTX interpreter: instructions against Python's integers and fractions; planted mistakes."""

from __future__ import annotations

import math
import os
import re
import struct
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import ptx
import pytest

KERNELS = Path(ptx.__file__).parent / "kernels"
HOPPER = ("clusters", "cluster_faults", "dependents")
"""Files of kernels for sm_90a; the others are for sm_80."""
LANES = 256


def require_nvcc() -> None:
    """Skip without nvcc; in CI fail."""
    if ptx.find_nvcc() is None:
        if os.environ.get("CI") == "true":
            pytest.fail("no nvcc")
        pytest.skip("no nvcc")


# --- numbers, independent of NumPy's ---

FORMATS = {"f16": (11, -14, 15), "bf16": (8, -126, 127), "f32": (24, -126, 127),
           "f64": (53, -1022, 1023)}  # fmt: skip
"""Bits of precision, least and greatest exponent of normal numbers."""
DTYPES: dict[str, Any] = {
    "u16": np.uint16, "s16": np.int16, "u32": np.uint32, "s32": np.int32, "u64": np.uint64,
    "s64": np.int64, "f16": np.uint16, "bf16": np.uint16, "f32": np.uint32, "f64": np.uint64,
    "f16x2": np.uint32, "bf16x2": np.uint32,
}  # fmt: skip


def number(bits: int, kind: str) -> Fraction | float:
    """The value of a float's bits: a fraction, or an infinity or NaN."""
    if kind == "f64":
        value = struct.unpack("<d", struct.pack("<Q", bits))[0]
        return Fraction(value) if math.isfinite(value) else value
    precision, low, high = FORMATS[kind]
    size = precision - 1
    sign = -1 if bits >> (size + (high + 1).bit_length()) else 1
    exponent, fraction = bits >> size & (2 * high + 1), bits & ((1 << size) - 1)
    if exponent == 2 * high + 1:
        return math.nan if fraction else sign * math.inf
    if exponent == 0:
        return sign * Fraction(fraction) * Fraction(2) ** (low - size)
    return sign * Fraction(fraction + (1 << size)) * Fraction(2) ** (exponent - high - size)


def rounded(value: Fraction, kind: str) -> int:
    """The bits of the nearest float, ties to even; zero is positive."""
    precision, low, high = FORMATS[kind]
    size, sign, value = precision - 1, value < 0, abs(value)
    exponent = low
    while value >= Fraction(2) ** (exponent + 1):
        exponent += 1
    mantissa = round(value / Fraction(2) ** (exponent - size))  # Python rounds ties to even
    bits = mantissa + ((exponent - low) << size) if mantissa else 0
    bits = min(bits, (2 * high + 1) << size)
    return bits | sign << (size + (high + 1).bit_length())


def signed(value: int, bits: int) -> int:
    value %= 1 << bits
    return value - (1 << bits) if value >> (bits - 1) else value


# --- instructions on one value a lane ---


class Case(NamedTuple):
    """PTX, the types of its result and operands, and the result in Python.

    Integers come and go as Python integers, results taken modulo their width. Floats come as
    fractions; a result is a fraction, to be rounded, or bits.
    """

    asm: str
    types: str
    expected: Callable[..., Any]


def clz(a: int, bits: int = 32) -> int:
    return bits - a.bit_length()


def quotient(a: int, b: int) -> int:
    return abs(a) // abs(b) * (-1 if (a < 0) != (b < 0) else 1)


def field(a: int, start: int, length: int, sign: bool) -> int:
    """bfe of 32 bits, bit by bit as the ISA says."""
    start, length = start & 255, length & 255
    top = min(start + length - 1, 31)
    filler = sign and length > 0 and a >> top & 1
    return sum(
        (a >> (start + i) & 1 if i < length and start + i <= 31 else bool(filler)) << i
        for i in range(32)
    )


def permuted(a: int, b: int, selector: int) -> int:
    pool, out = (b << 32 | a).to_bytes(8, "little"), []
    for i in range(4):
        pick = selector >> (4 * i) & 15
        byte = pool[pick & 7]
        out.append((255 if byte >> 7 else 0) if pick & 8 else byte)
    return int.from_bytes(bytes(out), "little")


def table(value: int, *bits: int) -> int:
    return sum(
        (value >> ((bits[0] >> i & 1) * 4 + (bits[1] >> i & 1) * 2 + (bits[2] >> i & 1)) & 1) << i
        for i in range(32)
    )


def clamped(value: Fraction | float, low: int, high: int) -> int:
    if isinstance(value, float) and math.isnan(value):
        return 0
    return low if value <= low else high if value >= high else int(value)


def dot4(a: int, b: int, a_signed: bool) -> int:
    def byte(x: int, i: int, sign: bool) -> int:
        return signed(x >> 8 * i, 8) if sign else x >> 8 * i & 255

    return sum(byte(a, i, a_signed) * byte(b, i, True) for i in range(4))


INTEGERS = [
    *(
        Case(f"{op}.{t} %0, %1, %2;", f"{t} {t} {t}", f)
        for t in ("u16", "s16", "u32", "s32", "u64", "s64")
        for op, f in (("add", int.__add__), ("sub", int.__sub__), ("mul.lo", int.__mul__),
                      ("min", min), ("max", max))
    ),
    *(
        Case(f"mul.hi.{t} %0, %1, %2;", f"{t} {t} {t}", lambda a, b, n=int(t[1:]): a * b >> n)
        for t in ("u16", "s16", "u32", "s32", "u64", "s64")
    ),
    *(
        Case(f"mul.wide.{s}{n} %0, %1, %2;", f"{s}{2 * n} {s}{n} {s}{n}", int.__mul__)
        for s in "us" for n in (16, 32)
    ),
    Case("mad.lo.s32 %0, %1, %2, %3;", "s32 s32 s32 s32", lambda a, b, c: a * b + c),
    Case("mad.hi.u32 %0, %1, %2, %3;", "u32 u32 u32 u32", lambda a, b, c: (a * b >> 32) + c),
    Case("mad.wide.s32 %0, %1, %2, %3;", "s64 s32 s32 s64", lambda a, b, c: a * b + c),
    *(
        Case(f"{{ .reg .{t} q; or.b{t[1:]} q, %2, 1; {op}.{t} %0, %1, q; }}", f"{t} {t} {t}",
             lambda a, b, f=f: f(a, b | 1))
        for t in ("u32", "s32", "u64", "s64")
        for op, f in (("div", quotient), ("rem", lambda a, b: a - quotient(a, b) * b))
    ),
    Case("abs.s32 %0, %1;", "s32 s32", abs),
    Case("neg.s64 %0, %1;", "s64 s64", int.__neg__),
    Case("not.b32 %0, %1;", "u32 u32", int.__invert__),
    Case("xor.b64 %0, %1, %2;", "u64 u64 u64", int.__xor__),
    Case("and.b16 %0, %1, %2;", "u16 u16 u16", int.__and__),
    Case("or.b32 %0, %1, 0x80000001;", "u32 u32", lambda a: a | 0x80000001),
    *(
        Case(f"{op}{n} %0, %1, %2;", f"{t}{n} {t}{n} u32", f)
        for n in (16, 32, 64)
        for op, t, f in (("shl.b", "u", lambda a, s: a << min(s, 99)),
                         ("shr.u", "u", lambda a, s: a >> min(s, 99)),
                         ("shr.s", "s", lambda a, s: a >> min(s, 99)))
    ),
    *(
        Case(f"shf.{way}.{mode}.b32 %0, %1, %2, %3;", "u32 u32 u32 u32",
             lambda a, b, s, way=way, mode=mode: (
                 ((b << 32 | a) << (min(s, 32) if mode == "clamp" else s % 32)) >> 32
                 if way == "l" else (b << 32 | a) >> (min(s, 32) if mode == "clamp" else s % 32)))
        for way in "lr" for mode in ("wrap", "clamp")
    ),
    *(
        Case(f"lop3.b32 %0, %1, %2, %3, {lut:#x};", "u32 u32 u32 u32",
             lambda a, b, c, lut=lut: table(lut, a, b, c))
        for lut in range(0, 256, 5)
    ),
    Case("prmt.b32 %0, %1, %2, %3;", "u32 u32 u32 u32", permuted),
    Case("prmt.b32 %0, %1, %2, 0x5410;", "u32 u32 u32", lambda a, b: permuted(a, b, 0x5410)),
    Case("prmt.b32 %0, %1, %2, 0x2763;", "u32 u32 u32", lambda a, b: permuted(a, b, 0x2763)),
    Case("prmt.b32 %0, %1, %2, 0xBA98;", "u32 u32 u32", lambda a, b: permuted(a, b, 0xBA98)),
    Case("bfe.u32 %0, %1, %2, %3;", "u32 u32 u32 u32", lambda a, s, n: field(a, s, n, False)),
    Case("bfe.s32 %0, %1, %2, %3;", "u32 u32 u32 u32", lambda a, s, n: field(a, s, n, True)),
    Case("bfe.u32 %0, %1, 5, 9;", "u32 u32", lambda a: a >> 5 & 511),
    Case("bfi.b32 %0, %1, %2, %3, %4;", "u32 u32 u32 u32 u32",
         lambda a, b, s, n: sum(
             ((a >> (i - (s & 255)) if 0 <= i - (s & 255) < (n & 255) else b >> i) & 1) << i
             for i in range(32))),
    Case("popc.b32 %0, %1;", "u32 u32", int.bit_count),
    Case("popc.b64 %0, %1;", "u32 u64", int.bit_count),
    Case("clz.b32 %0, %1;", "u32 u32", clz),
    Case("clz.b64 %0, %1;", "u32 u64", lambda a: clz(a, 64)),
    Case("brev.b32 %0, %1;", "u32 u32", lambda a: int(f"{a:032b}"[::-1], 2)),
    Case("brev.b64 %0, %1;", "u64 u64", lambda a: int(f"{a:064b}"[::-1], 2)),
    Case("bfind.u32 %0, %1;", "u32 u32", lambda a: a.bit_length() - 1),
    Case("bfind.s32 %0, %1;", "u32 s32", lambda a: (~a if a < 0 else a).bit_length() - 1),
    Case("bfind.shiftamt.u32 %0, %1;", "u32 u32", lambda a: clz(a) if a else -1),
    Case("sad.u32 %0, %1, %2, %3;", "u32 u32 u32 u32", lambda a, b, c: abs(a - b) + c),
    Case("dp4a.u32.s32 %0, %1, %2, %3;", "s32 u32 u32 s32",
         lambda a, b, c: dot4(a, b, False) + c),
    Case("dp4a.s32.s32 %0, %1, %2, %3;", "s32 u32 u32 s32", lambda a, b, c: dot4(a, b, True) + c),
    Case("add.sat.s32 %0, %1, %2;", "s32 s32 s32",
         lambda a, b: max(-(2**31), min(2**31 - 1, a + b))),
    *(
        Case(f"{{ .reg .pred p; setp.{r}.{t} p, %1, %2; selp.u32 %0, 7, 9, p; }}", f"u32 {t} {t}",
             lambda a, b, f=f: 7 if f(a, b) else 9)
        for t in ("u16", "s16", "u32", "s32", "u64", "s64")
        for r, f in (("eq", int.__eq__), ("ne", int.__ne__), ("lt", int.__lt__),
                     ("le", int.__le__), ("gt", int.__gt__), ("ge", int.__ge__))
    ),
    Case("{ .reg .pred p, q, r; setp.lt.u32 p|q, %1, %2; setp.gt.and.u32 r, %1, %3, !p;\n"
         " selp.u32 %0, 1, 2, r; @q add.u32 %0, %0, 8; }", "u32 u32 u32 u32",
         lambda a, b, c: (1 if a > c and not a < b else 2) + (0 if a < b else 8)),
    Case("set.lt.u32.s32 %0, %1, %2;", "u32 s32 s32", lambda a, b: -1 if a < b else 0),
    Case("{ .reg .b16 l, h; mov.b32 {l, h}, %1; mov.b32 %0, {h, l}; }", "u32 u32",
         lambda a: a >> 16 | a << 16),
    Case("{ .reg .b32 h; mov.b64 {_, h}, %1; mov.b64 %0, {h, h}; }", "u64 u64",
         lambda a: (a >> 32) | (a >> 32) << 32),
    *(
        Case(f"cvt.{t}.{f} %0, %1;", f"{t} {f}", lambda a: a)
        for t in ("u16", "s16", "u32", "s32", "u64", "s64")
        for f in ("u16", "s16", "u32", "s32", "u64", "s64") if t != f
    ),
    Case("cvt.s32.s8 %0, %1;", "s32 s32", lambda a: signed(a, 8)),
    Case("cvt.u32.u8 %0, %1;", "u32 u32", lambda a: a & 255),
    Case("cvt.sat.s8.s32 %0, %1;", "s32 s32", lambda a: max(-128, min(127, a))),
    Case("cvt.sat.u8.s32 %0, %1;", "u32 s32", lambda a: max(0, min(255, a))),
    Case("cvt.pack.sat.s8.s32.b32 %0, %1, %2, %3;", "u32 s32 s32 u32",
         lambda a, b, c: (max(-128, min(127, a)) & 255) << 8
         | max(-128, min(127, b)) & 255 | c << 16),
]  # fmt: skip


def exact(a: Fraction) -> Fraction:
    return a


FLOATS = [
    *(
        Case(f"{op}.rn.{t} %0, %1, %2;", f"{t} {t} {t}", f)
        for t in ("f32", "f16")
        for op, f in (("add", Fraction.__add__), ("sub", Fraction.__sub__),
                      ("mul", Fraction.__mul__))
    ),
    *(
        Case(f"fma.rn.{t} %0, %1, %2, %3;", f"{t} {t} {t} {t}", lambda a, b, c: a * b + c)
        for t in ("f32", "f16", "bf16", "f16x2", "bf16x2")
    ),
    *(
        Case(f"{op}.rn.f64 %0, %1, %2;", "f64 f64 f64", f)
        for op, f in (("add", Fraction.__add__), ("sub", Fraction.__sub__),
                      ("mul", Fraction.__mul__), ("div", lambda a, b: a / b))
    ),
    Case("fma.rn.f64 %0, %1, %2, %3;", "f64 f64 f64 f64", lambda a, b, c: a * b + c),
    Case("mul.f16x2 %0, %1, %2;", "f16x2 f16x2 f16x2", Fraction.__mul__),
    Case("add.f16x2 %0, %1, %2;", "f16x2 f16x2 f16x2", Fraction.__add__),
    Case("sub.f16x2 %0, %1, %2;", "f16x2 f16x2 f16x2", Fraction.__sub__),
    Case("neg.bf16x2 %0, %1;", "bf16x2 bf16x2", Fraction.__neg__),
    Case("abs.f16x2 %0, %1;", "f16x2 f16x2", abs),
    Case("div.rn.f32 %0, %1, %2;", "f32 f32 f32", lambda a, b: a / b if b else None),
    Case("rcp.rn.f32 %0, %1;", "f32 f32", lambda a: 1 / a if a else None),
    Case("abs.f32 %0, %1;", "f32 f32", abs),
    Case("neg.f32 %0, %1;", "f32 f32", Fraction.__neg__),
    Case("min.f32 %0, %1, %2;", "f32 f32 f32", min),
    Case("max.f32 %0, %1, %2;", "f32 f32 f32", max),
    Case("max.bf16x2 %0, %1, %2;", "bf16x2 bf16x2 bf16x2", max),
    Case("copysign.f32 %0, %1, %2;", "f32 f32 f32",
         lambda a, b: abs(b) if a > 0 else -abs(b) if a else None),
    Case("cvt.f32.f16 %0, %1;", "f32 f16", exact),
    Case("cvt.f32.bf16 %0, %1;", "f32 bf16", exact),
    Case("cvt.rn.f16.f32 %0, %1;", "f16 f32", exact),
    Case("cvt.rn.bf16.f32 %0, %1;", "bf16 f32", exact),
    Case("cvt.rn.f32.f64 %0, %1;", "f32 f64", exact),
    Case("cvt.rn.bf16x2.f32 %0, %1, %2;", "u32 f32 f32",
         lambda a, b: rounded(a, "bf16") << 16 | rounded(b, "bf16")),
    Case("cvt.rn.f16x2.f32 %0, %1, %2;", "u32 f32 f32",
         lambda a, b: rounded(a, "f16") << 16 | rounded(b, "f16")),
    *(
        Case(f"cvt.rn.f32.{t} %0, %1;", f"f32 {t}", Fraction)
        for t in ("u16", "s16", "u32", "s32", "u64", "s64")
    ),
    *(
        Case(f"cvt.{mode}.{t}.f32 %0, %1;", f"{t} f32", lambda a, f=f, t=t: clamped(
            f(a), -(t[0] == "s") << (int(t[1:]) - 1), (1 << (int(t[1:]) - (t[0] == "s"))) - 1))
        for t in ("u16", "s32", "u32", "s64", "u64")
        for mode, f in (("rni", round), ("rzi", math.trunc), ("rmi", math.floor),
                        ("rpi", math.ceil))
    ),
    Case("cvt.rni.f32.f32 %0, %1;", "f32 f32", lambda a: Fraction(round(a))),
    Case("cvt.rmi.f32.f32 %0, %1;", "f32 f32", lambda a: Fraction(math.floor(a))),
    Case("{ .reg .f64 d; cvt.f64.f32 d, %1; mul.f64 d, d, d; cvt.rn.f32.f64 %0, d; }", "f32 f32",
         lambda a: a * a),
    Case("add.sat.f32 %0, %1, %2;", "f32 f32 f32",
         lambda a, b: max(Fraction(0), min(Fraction(1), Fraction(a + b)))),
    *(
        Case(f"{{ .reg .pred p; setp.{r}.{t} p, %1, %2; selp.u32 %0, 7, 9, p; }}", f"u32 {t} {t}",
             lambda a, b, f=f: 7 if f(a, b) else 9)
        for t in ("f32", "f16")
        for r, f in (("eq", Fraction.__eq__), ("neu", Fraction.__ne__), ("lt", Fraction.__lt__),
                     ("leu", Fraction.__le__), ("gtu", Fraction.__gt__), ("ge", Fraction.__ge__))
    ),
]  # fmt: skip
CASES = INTEGERS + FLOATS


class Special(NamedTuple):
    """PTX on bits, and rows of operands and the result."""

    asm: str
    rows: list[tuple[int, ...]]


ONE, NAN, INF, MINUS, TINY, NAN16 = 0x3F800000, 0x7FC01234, 0x7F800000, 1 << 31, 3, 0x7FFF
CANONICAL = 0x7FFFFFFF
SPECIALS = [
    Special("add.f32 %0, %1, %2;", [
        (NAN, ONE, CANONICAL), (INF, INF | MINUS, CANONICAL), (INF, ONE, INF), (MINUS, 0, 0),
        (MINUS, MINUS, MINUS), (TINY, TINY, 6), (0x7F7FFFFF, 0x7F7FFFFF, INF)]),
    Special("add.ftz.f32 %0, %1, %2;", [(TINY, TINY, 0), (ONE, TINY, ONE),
                                        (0x00800000, 0x80800001, 0x80000000)]),
    Special("add.rz.f32 %0, %1, %2;", [
        (ONE, 0x33FFFFFF, ONE), (ONE | MINUS, 0xB3FFFFFF, ONE | MINUS),
        (ONE, 0xB3000000, 0x3F7FFFFF)]),
    Special("mul.f32 %0, %1, %2;", [(0, INF, CANONICAL), (TINY, 0x3F000000, 2),
                                    (MINUS, ONE, MINUS)]),
    Special("fma.rn.f32 %0, %1, %1, %2;", [  # what float64 alone would take for a tie
        (0x3F800800, 0, 0x3F801000), (0x3F800800, 0x17800000, 0x3F801001),
        (0x3F801800, 0x97800000, 0x3F803004), (0x3F801800, 0x17800000, 0x3F803005)]),
    Special("fma.rn.bf16x2 %0, %1, 0x3FC03FC0, %2;", [(0x3F813F81, 0x9C801C80, 0x3FC13FC2)]),
    Special("fma.rn.f32 %0, %1, %2, %2;", [(NAN, ONE, CANONICAL), (INF, ONE, INF)]),
    Special("div.rn.f32 %0, %1, %2;", [(ONE, 0, INF), (ONE, MINUS, INF | MINUS),
                                       (0, 0, CANONICAL)]),
    Special("sqrt.rn.f32 %0, %1;", [(0x40000000, 0x3FB504F3), (ONE | MINUS, CANONICAL),
                                    (MINUS, MINUS), (INF, INF), (0x40800000, 0x40000000)]),
    Special("min.f32 %0, %1, %2;", [(NAN, ONE, ONE), (ONE, NAN, ONE), (NAN, NAN, CANONICAL),
                                    (0, MINUS, MINUS), (MINUS, 0, MINUS)]),
    Special("max.f32 %0, %1, %2;", [(NAN, ONE, ONE), (NAN, NAN, CANONICAL), (0, MINUS, 0),
                                    (MINUS, 0, 0)]),
    Special("min.NaN.f32 %0, %1, %2;", [(NAN, ONE, CANONICAL), (ONE, NAN, CANONICAL)]),
    Special("cvt.rni.s32.f32 %0, %1;", [
        (NAN, 0), (INF, 0x7FFFFFFF), (INF | MINUS, 1 << 31), (0x3F000000, 0), (0x3FC00000, 2),
        (0xBF000001, 0xFFFFFFFF)]),
    Special("cvt.rzi.u32.f32 %0, %1;", [(NAN, 0), (ONE | MINUS, 0), (INF, 0xFFFFFFFF)]),
    Special("cvt.sat.f32.f32 %0, %1;", [(NAN, 0), (ONE | MINUS, 0), (INF, ONE)]),
    Special("{ .reg .b16 h; cvt.rn.bf16.f32 h, %1; mov.b32 %0, {h, h}; }", [
        (NAN, NAN16 * 0x10001), (INF, 0x7F807F80), (0x7F7FFFFF, 0x7F807F80),
        (0x3F808000, 0x3F803F80), (0x3F818000, 0x3F823F82)]),
    Special("{ .reg .b16 h; cvt.rn.f16.f32 h, %1; mov.b32 %0, {h, h}; }", [
        (NAN, NAN16 * 0x10001), (INF, 0x7C007C00), (0x477FF000, 0x7C007C00), (0x33000000, 0)]),
    Special("fma.rn.relu.bf16x2 %0, %1, %2, %2;", [(0xBF803F80, 0x40004000, 0x00004080)]),
    Special("fma.rn.bf16x2 %0, %1, %1, %2;", [(0x7FC03F80, 0x40007F80, 0x7FFF7F80)]),
    Special("ex2.approx.ftz.f32 %0, %1;", [(0x40400000, 0x41000000), (INF | MINUS, 0)]),
    *(
        Special(f"{{ .reg .pred p; setp.{r}.f32 p, %1, %2; selp.u32 %0, 1, 0, p; }}",
                [(NAN, ONE, nan), (ONE, NAN, nan), (MINUS, 0, equal), (INF, INF, equal)])
        for r, nan, equal in (("lt", 0, 0), ("ltu", 1, 0), ("ne", 0, 0), ("neu", 1, 0),
                              ("eq", 0, 1), ("equ", 1, 1), ("ge", 0, 1), ("geu", 1, 1),
                              ("num", 0, 1), ("nan", 1, 0))
    ),
]  # fmt: skip
CONSTRAINTS = {2: "h", 4: "r", 8: "l"}


def constraint(kind: str) -> str:
    return {"f32": "f", "f64": "d"}.get(kind) or CONSTRAINTS[np.dtype(DTYPES[kind]).itemsize]


def c_type(kind: str) -> str:
    known = {"f32": "float", "f64": "double"}
    return known.get(kind) or f"uint{8 * np.dtype(DTYPES[kind]).itemsize}_t"


def case_kernel(index: int, case: Case) -> str:
    """A kernel that runs a case's PTX on an element for each thread."""
    out, *operands = case.types.split()
    pointers = "".join(f", const {c_type(k)}* x{i}" for i, k in enumerate(operands))
    values = ", ".join(f'"{constraint(k)}"(x{i}[t])' for i, k in enumerate(operands))
    asm = case.asm.replace("\n", " ")
    return (
        f'extern "C" __global__ void case_{index}({c_type(out)}* y{pointers}) {{\n'
        f"  int t = blockIdx.x * blockDim.x + threadIdx.x;\n  {c_type(out)} r;\n"
        f'  asm volatile("{asm}" : "={constraint(out)}"(r) : {values});\n  y[t] = r;\n}}\n'
    )


def special_case(special: Special) -> Case:
    return Case(special.asm, " ".join(["u32"] * len(special.rows[0])), lambda *_: None)


@pytest.fixture(scope="session")
def instructions(tmp_path_factory: pytest.TempPathFactory) -> ptx.Module:
    """Every case and every shape of mma, compiled at once."""
    require_nvcc()
    source = tmp_path_factory.mktemp("ptx") / "cases.cu"
    kernels = [case_kernel(i, case) for i, case in enumerate(CASES)]
    kernels += [
        case_kernel(len(CASES) + i, special_case(special)) for i, special in enumerate(SPECIALS)
    ]
    kernels += [mma_kernel(name, shape) for name, shape in SHAPES.items()]
    source.write_text("#include <cstdint>\n" + "\n".join(kernels))
    return ptx.load(ptx.compile(source))


@pytest.fixture(scope="session")
def kernels() -> dict[str, ptx.Module]:
    """The modules of the CUDA files beside the interpreter."""
    require_nvcc()
    arch = {True: "sm_90a", False: "sm_80"}
    files = sorted(KERNELS.glob("*.cu"))
    return {f.stem: ptx.load(ptx.compile(f, arch=arch[f.stem in HOPPER])) for f in files}


def operand_bits(kind: str, position: int, rng: np.random.Generator) -> np.ndarray:
    """Random bits, edge values among them; floats are finite and of all magnitudes."""
    dtype = DTYPES[kind]
    bits = 8 * np.dtype(dtype).itemsize
    x = rng.integers(0, 2**bits, LANES, dtype=np.dtype(f"u{bits // 8}"), endpoint=False)
    if "f" not in kind:
        x[: LANES // 2] >>= rng.integers(0, bits, LANES // 2).astype(x.dtype)
        edges = [0, 1, 2, 7, 31, 32, 33, 63, 64, 2 ** (bits - 1) - 1, 2 ** (bits - 1), 2**bits - 1]
        x[: 4 * len(edges)] = np.roll(np.tile(np.array(edges, x.dtype), 4), 5 * position)
        return x.view(dtype)
    if kind == "f64":
        y = (rng.normal(size=LANES) * 2.0 ** rng.integers(-150, 120, LANES)).view(np.uint64)
        y[: LANES // 4] = rng.normal(size=LANES // 4).astype(np.float32).astype(np.float64).view(
            np.uint64
        ) + np.uint64(2**28)  # ties of float32
        return y
    return finite(x, kind, position)


def finite(x: np.ndarray, kind: str, position: int) -> np.ndarray:
    """Bits of floats, NaN and infinities replaced; some near one, some ties, some zero."""
    base = kind.removesuffix("x2")
    if kind.endswith("x2"):
        return finite(x.view(np.uint16), base, position).view(np.uint32)
    precision, _, high = FORMATS[base]
    exponent = x.dtype.type((2 * high + 1) << (precision - 1))
    one = x.dtype.type(high << (precision - 1))
    x = np.where(x & exponent == exponent, x ^ (exponent & ~(exponent >> 1)), x)
    near = x & x.dtype.type((1 << (precision + 1)) - 1)
    x[::2] = near[::2] + one - x.dtype.type(1 << precision)
    x[: LANES // 4 : 3] &= ~x.dtype.type((1 << (precision // 2 + 1)) - 1)  # short: ties
    x[position::37] = 0
    return x


def python_value(bits: Any, kind: str) -> Any:
    return number(int(bits), kind) if kind[0] in "fb" else int(bits)


def result_bits(value: Any, kind: str) -> int:
    if isinstance(value, Fraction):
        return rounded(value, kind)
    return int(value) % 2 ** (8 * np.dtype(DTYPES[kind]).itemsize)


def expected_bits(case: Case, operands: list[np.ndarray]) -> list[int | None]:
    out, *kinds = case.types.split()
    if out.endswith("x2"):
        halves = [x.view(np.uint16) for x in operands]
        single = case._replace(types=case.types.replace("x2", ""))
        low_high = np.array(expected_bits(single, halves), np.uint16)
        return low_high.view(np.uint32).tolist()
    results = []
    for row in zip(*operands, strict=True):
        value = case.expected(*[python_value(b, k) for b, k in zip(row, kinds, strict=True)])
        results.append(None if value is None else result_bits(value, out))
    return results


@pytest.mark.parametrize("index", range(len(CASES)), ids=lambda i: CASES[i].asm.replace("\n", ""))
def test_instruction(instructions: ptx.Module, index: int) -> None:
    case = CASES[index]
    out, *kinds = case.types.split()
    rng = np.random.default_rng(index)
    operands = [operand_bits(k, i, rng) for i, k in enumerate(kinds)]
    memory = ptx.Memory()
    y = memory.reserve(LANES * np.dtype(DTYPES[out]).itemsize)
    params = struct.pack(f"<{1 + len(kinds)}Q", y, *[memory.place(x) for x in operands])
    instructions.run(
        f"case_{index}", grid=(2, 1, 1), block=(LANES // 2, 1, 1), params=params, memory=memory
    )
    dtype = np.dtype(DTYPES[out])
    got = memory.read(y, f"u{dtype.itemsize}", LANES).tolist()
    sign = 1 << (8 * dtype.itemsize - 1)
    for lane, (mine, wanted) in enumerate(zip(got, expected_bits(case, operands), strict=True)):
        same = mine == wanted or wanted is None
        zeros = wanted == 0 and out[0] in "fb" and mine in (0, sign)  # fractions have one zero
        halves = out.endswith("x2") and zeros_equal(mine, wanted)
        assert same or zeros or halves, (lane, [x[lane] for x in operands], hex(mine), wanted)


@pytest.mark.parametrize("index", range(len(SPECIALS)), ids=lambda i: SPECIALS[i].asm)
def test_special_floats(instructions: ptx.Module, index: int) -> None:
    rows = np.array(SPECIALS[index].rows, np.uint32)
    *operands, wanted = rows.T
    memory = ptx.Memory()
    y = memory.reserve(4 * len(rows))
    params = struct.pack(f"<{rows.shape[1]}Q", y, *[memory.place(x) for x in operands])
    instructions.run(
        f"case_{len(CASES) + index}", grid=(1, 1, 1), block=(len(rows), 1, 1), params=params,
        memory=memory,
    )  # fmt: skip
    got = memory.read(y, np.uint32, len(rows))
    assert [hex(v) for v in got] == [hex(v) for v in wanted]


def zeros_equal(mine: int, wanted: int | None) -> bool:
    """Two 16-bit floats each, equal but for the signs of zeros."""
    assert wanted is not None
    return all(
        (mine >> s) & 0xFFFF == (wanted >> s) & 0xFFFF
        or ((wanted >> s) & 0x7FFF == 0 and (mine >> s) & 0x7FFF == 0)
        for s in (0, 16)
    )


# --- mma ---


class Shape(NamedTuple):
    """An mma: its PTX name, bits of an element, K, element types, registers of A and of B."""

    op: str
    bits: int
    k: int
    a: str
    b: str
    a_registers: int
    b_registers: int


SHAPES = {
    **{
        f"b1_{k}_{op}": Shape(f"m16n8k{k}.row.col.s32.b1.b1.s32.{op}.popc", 1, k, "b1", "b1",
                              k // 64, k // 128)
        for k in (128, 256) for op in ("and", "xor")
    },
    **{
        f"{a}_{b}_{k}": Shape(f"m16n8k{k}.row.col.s32.{a}.{b}.s32", 8, k, a, b, k // 8, k // 16)
        for k in (16, 32) for a in ("s8", "u8") for b in ("s8", "u8")
    },
    **{
        f"{t}_{k}": Shape(f"m16n8k{k}.row.col.f32.{t}.{t}.f32", 16, k, t, t, k // 4, k // 8)
        for k in (8, 16) for t in ("f16", "bf16")
    },
}  # fmt: skip


def mma_kernel(name: str, shape: Shape) -> str:
    """Two warps; each lane's registers of A, B and C lie side by side."""
    na, nb = shape.a_registers, shape.b_registers
    outs = ", ".join(f"%{i}" for i in range(4))
    a = ", ".join(f"%{4 + i}" for i in range(na))
    b = ", ".join(f"%{4 + na + i}" for i in range(nb))
    reads = ", ".join(
        [f'"r"(a[t * {na} + {i}])' for i in range(na)]
        + [f'"r"(b[t * {nb} + {i}])' for i in range(nb)]
    )
    cs = ", ".join(f"%{4 + na + nb + i}" for i in range(4))
    kind = "f" if "f32" in shape.op else "r"
    value = "float" if kind == "f" else "uint32_t"
    writes = ", ".join(f'"={kind}"(d[{i}])' for i in range(4))
    cread = ", ".join(f'"{kind}"(c[t * 4 + {i}])' for i in range(4))
    return (
        f'extern "C" __global__ void mma_{name}({value}* y, const uint32_t* a, const uint32_t* b,'
        f" const {value}* c) {{\n  int t = threadIdx.x;\n  {value} d[4];\n"
        f'  asm volatile("mma.sync.aligned.{shape.op} {{{outs}}}, {{{a}}}, {{{b}}}, {{{cs}}};"\n'
        f"    : {writes} : {reads}, {cread});\n"
        "  for (int i = 0; i < 4; i++) y[t * 4 + i] = d[i];\n}\n"
    )


def place_of(lane: int, register: int, bits: int) -> tuple[int, int]:
    """Row and first column of a register of A: groupID and threadID_in_group of the PTX ISA."""
    group, thread = lane >> 2, lane % 4
    per = 32 // bits
    return group + 8 * (register % 2), thread * per + 4 * per * (register // 2)


def column_of(lane: int, register: int, bits: int) -> tuple[int, int]:
    """Column of B and first row of a register."""
    per = 32 // bits
    return lane >> 2, (lane % 4) * per + 4 * per * register


def gathered(
    matrix: np.ndarray, registers: int, bits: int, place: Callable[..., tuple[int, int]]
) -> np.ndarray:
    """Raw elements ``[row, k]`` to ``uint32[32, registers]``, an element at a time."""
    out = np.zeros((32, registers), np.uint64)
    for lane in range(32):
        for register in range(registers):
            row, start = place(lane, register, bits)
            for i in range(32 // bits):
                out[lane, register] |= np.uint64(int(matrix[row, start + i]) << (bits * i))
    return out.astype(np.uint32)


def element_values(raw: np.ndarray, kind: str) -> np.ndarray:
    if kind == "s8":
        return raw.astype(np.uint8).view(np.int8).astype(object)
    if kind in ("b1", "u8"):
        return raw.astype(object)
    return np.vectorize(lambda bits: number(int(bits), kind), otypes=[object])(raw)


def random_elements(rng: np.random.Generator, kind: str, shape: tuple[int, int]) -> np.ndarray:
    if kind in ("f16", "bf16"):  # small multiples of 1/4: sums are exact
        values = rng.integers(-32, 33, shape)
        return np.vectorize(lambda v: rounded(Fraction(int(v), 4), kind))(values)
    return rng.integers(0, 2 if kind == "b1" else 256, shape)


@pytest.mark.parametrize("name", SHAPES)
def test_mma(instructions: ptx.Module, name: str) -> None:
    shape, rng = SHAPES[name], np.random.default_rng(len(name))
    a_all, b_all, c_all, wanted = [], [], [], []
    for warp in range(2):
        a = random_elements(rng, shape.a, (16, shape.k))
        b = random_elements(rng, shape.b, (8, shape.k))
        if warp and "f" not in shape.a:
            a[:], b[:] = (1, 1) if shape.bits == 1 else (128, 255)
        c = (
            rng.integers(-(2**31), 2**31, (16, 8))
            if shape.bits < 16
            else rng.integers(-9, 9, (16, 8))
        )
        product = element_values(a, shape.a) @ element_values(b, shape.b).T
        if "xor" in shape.op:
            product = (a[:, None] != b[None]).sum(2)
        wanted.append((product + c).astype(np.float64 if shape.bits == 16 else np.int64))
        a_all.append(gathered(a, shape.a_registers, shape.bits, place_of))
        b_all.append(gathered(b, shape.b_registers, shape.bits, column_of))
        lanes, i = np.arange(32)[:, None], np.arange(4)
        rows, columns = lanes // 4 + 8 * (i // 2), lanes % 4 * 2 + i % 2
        c_all.append(c[rows, columns])
        wanted[-1] = wanted[-1][rows, columns]
    dtype = np.float32 if shape.bits == 16 else np.int32
    memory = ptx.Memory()
    y = memory.reserve(64 * 16)
    inputs = [np.stack(a_all), np.stack(b_all), np.stack(c_all).astype(dtype)]
    params = struct.pack("<4Q", y, *[memory.place(v) for v in inputs])
    instructions.run(f"mma_{name}", grid=(1, 1, 1), block=(64, 1, 1), params=params, memory=memory)
    got = memory.read(y, dtype, (2, 32, 4))
    np.testing.assert_array_equal(got, np.stack(wanted).astype(dtype))


# --- whole kernels ---


def run_gemm(module: ptx.Module, m: int, n: int, k: int, split: int) -> None:
    rng = np.random.default_rng(m + n + k)
    a = rng.integers(-128, 128, (m, k), dtype=np.int8)
    b = rng.integers(-128, 128, (n, k), dtype=np.int8)
    memory = ptx.Memory()
    c = memory.place(np.zeros((m, n), np.int32))
    params = struct.pack("<3Q3i4x", memory.place(a), memory.place(b), c, m, n, k)
    module.run(
        "gemm", grid=(-(-n // 64), -(-m // 64), split), block=(128, 1, 1), params=params,
        shared=3 * 8192, memory=memory,
    )  # fmt: skip
    wanted = a.astype(np.int32) @ b.astype(np.int32).T
    np.testing.assert_array_equal(memory.read(c, np.int32, (m, n)), wanted)


@pytest.mark.parametrize(
    ("m", "n", "k", "split"),
    [(64, 64, 64, 1), (128, 64, 512, 1), (1, 1, 16, 1), (70, 50, 208, 3), (200, 130, 1040, 2)],
)
def test_gemm(kernels: dict[str, ptx.Module], m: int, n: int, k: int, split: int) -> None:
    run_gemm(kernels["gemm"], m, n, k, split)


def test_speed(kernels: dict[str, ptx.Module]) -> None:
    run_gemm(kernels["gemm"], 64, 64, 64, 1)
    start = time.process_time()
    run_gemm(kernels["gemm"], 128, 64, 512, 1)
    assert time.process_time() - start < 1


BUGS = {
    "read_after_write": ptx.SharedHazard,
    "write_after_read": ptx.SharedHazard,
    "write_after_write": ptx.SharedHazard,
    "same_instruction": ptx.SharedHazard,
    "within_a_warp": ptx.SharedHazard,
    "overwrite_within_a_warp": ptx.SharedHazard,
    "atomic_and_plain": ptx.SharedHazard,
    "shuffle_is_no_barrier": ptx.SharedHazard,
    "warp_barrier_between_warps": ptx.SharedHazard,
    "named_barriers": ptx.SharedHazard,
    "neighbour_bytes": ptx.SharedHazard,
    "matrix_load": ptx.SharedHazard,
    "copy_without_wait": ptx.AsyncHazard,
    "copy_waits_for_too_little": ptx.AsyncHazard,
    "copy_without_commit": ptx.AsyncHazard,
    "copy_without_barrier": ptx.SharedHazard,
    "stage_overwritten": ptx.SharedHazard,
    "read_out_of_bounds": ptx.OutOfBounds,
    "write_out_of_bounds": ptx.OutOfBounds,
    "shared_out_of_bounds": ptx.OutOfBounds,
    "misaligned": ptx.Misaligned,
    "copy_misaligned": ptx.Misaligned,
    "uninitialised_global": ptx.Uninitialised,
    "uninitialised_shared": ptx.Uninitialised,
    "uninitialised_local": ptx.Uninitialised,
    "uninitialised_register": ptx.Uninitialised,
    "uninitialised_policy": ptx.Uninitialised,
    "no_policy": ptx.BadPolicy,
    "no_policy_of_a_copy": ptx.BadPolicy,
    "policy_for_no_address": ptx.BadPolicy,
    "divergent_mma": ptx.Divergence,
    "divergent_shuffle": ptx.Divergence,
    "divergent_barrier": ptx.Divergence,
    "barrier_after_exit": ptx.Deadlock,
    "different_barriers": ptx.Deadlock,
    "endless": ptx.StepLimit,
    "trap": ptx.Trap,
    "two_ctas": ptx.GlobalRace,
    "two_threads": ptx.GlobalRace,
    "rewritten": ptx.GlobalRace,
}


CLUSTER_BUGS = {
    "remote_read_after_write": (
        ptx.SharedHazard,
        r"written by thread \d+ of CTA \d of the cluster",
    ),
    "read_after_remote_write": (
        ptx.SharedHazard,
        r"written by thread \d+ of CTA \d of the cluster",
    ),
    "overwritten_while_read": (ptx.SharedHazard, r"read by a thread of warp 0 of CTA \d of the"),
    "remotely_overwritten_while_read": (ptx.SharedHazard, r"read by a thread of warp 0 of CTA \d"),
    "both_write": (ptx.SharedHazard, "written by thread 0 of CTA 1 of the cluster"),
    "remote_atomic_and_plain": (ptx.SharedHazard, "written by thread"),
    "remote_copy_in_flight": (ptx.AsyncHazard, "a copy to it is in flight"),
    "rewritten_by_a_peer": (ptx.GlobalRace, "nothing orders the two"),
    "not_started": (ptx.ClusterHazard, "CTA 1 of the cluster may not have started"),
    "exit_while_read": (ptx.ClusterHazard, "exits while warp 0 of CTA 1 of the cluster may"),
    "exit_while_written": (ptx.ClusterHazard, "exits while warp 0 of CTA 1 of the cluster may"),
    "exit_without_waiting": (ptx.ClusterHazard, "exits while warp 0 of CTA 1 of the cluster may"),
    "exited": (ptx.ClusterHazard, "CTA 0 of the cluster has exited"),
    "relaxed_orders_no_memory": (ptx.SharedHazard, "with no barrier between"),
    "written_after_arriving": (ptx.SharedHazard, "with no barrier between"),
    "read_before_waiting": (ptx.SharedHazard, "with no barrier between"),
    "barrier_not_reached": (ptx.Deadlock, "256 of the 512 threads of the cluster never come"),
    "barrier_not_reached_by_a_warp": (ptx.Deadlock, "32 of the 512 threads of the cluster never"),
    "barrier_of_the_cta_instead": (ptx.Deadlock, "256 of the 512 threads of the cluster never"),
    "part_of_a_warp": (ptx.Divergence, "31 of 32 threads of the warp came to the barrier"),
    "waiting_without_having_come": (ptx.Deadlock, "waits without having come itself"),
    "coming_twice": (ptx.Deadlock, "comes again without having waited"),
    "rank_out_of_range": (ptx.OutOfBounds, "rank 2 in a cluster of 2"),
    "remote_out_of_bounds": (ptx.OutOfBounds, "4 bytes at shared address 0x400; the CTA has 1024"),
    "remote_below_shared_memory": (ptx.OutOfBounds, "4 bytes at shared address 0xfffffc"),
    "remote_misaligned": (ptx.Misaligned, "address 0x2 is no multiple of 4"),
    "remote_address_in_a_local_load": (ptx.OutOfBounds, "4 bytes at shared address 0x2000000"),
    "no_shared_address": (ptx.OutOfBounds, "0x[0-9a-f]+ is no address of shared memory"),
}


def run_bug(
    module: ptx.Module, entry: str, ctas: int = 1, cluster: tuple[int, int, int] = (1, 1, 1)
) -> None:
    memory = ptx.Memory()
    x, y = memory.place(np.arange(256, dtype=np.uint32)), memory.reserve(1024)
    module.run(
        entry, grid=(ctas, 1, 1), block=(256, 1, 1), params=struct.pack("<QQi4x", x, y, 256),
        shared=1024, cluster=cluster, memory=memory, step_limit=20000,
    )  # fmt: skip


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_mistake_is_found(kernels: dict[str, ptx.Module], name: str) -> None:
    ctas = 2 if name == "two_ctas" else 1
    run_bug(kernels["faults"], f"{name}_good", ctas)
    with pytest.raises(
        BUGS[name], match=rf"{name}_bad: .*: CTA \(\d, 0, 0\), thread \d+"
    ) as caught:
        run_bug(kernels["faults"], f"{name}_bad", ctas)
    assert type(caught.value) is BUGS[name]


@pytest.mark.parametrize("name", CLUSTER_BUGS)
def test_a_planted_mistake_of_a_cluster_is_found(kernels: dict[str, ptx.Module], name: str) -> None:
    fault, what = CLUSTER_BUGS[name]
    run_bug(kernels["cluster_faults"], f"{name}_good", 2, (2, 1, 1))
    with pytest.raises(fault, match=rf"{name}_bad: .*: CTA \(\d, 0, 0\), .*{what}") as caught:
        run_bug(kernels["cluster_faults"], f"{name}_bad", 2, (2, 1, 1))
    assert type(caught.value) is fault


@pytest.mark.parametrize(("file", "bugs"), [("faults", BUGS), ("cluster_faults", CLUSTER_BUGS)])
def test_every_planted_mistake_is_listed(
    kernels: dict[str, ptx.Module], file: str, bugs: dict[str, Any]
) -> None:
    names = {re.sub(r"_(good|bad)$", "", e) for e in kernels[file].entries}
    assert names == set(bugs)


def test_ctas_of_different_batches_race(kernels: dict[str, ptx.Module]) -> None:
    with pytest.raises(ptx.GlobalRace, match=r"CTA \(\d+, 0, 0\)"):
        run_bug(kernels["faults"], "two_ctas_bad", 20)


# --- what threads do together ---


def behave(
    kernels: dict[str, ptx.Module],
    entry: str,
    x: np.ndarray,
    y: int | np.ndarray,
    grid: tuple[int, int, int] = (1, 1, 1),
    block: tuple[int, int, int] = (64, 1, 1),
    n: int = 0,
) -> np.ndarray:
    """Run an entry of behaviour.cu; y as it is afterwards. An integer: so many words, not set."""
    memory = ptx.Memory()
    size = y if isinstance(y, int) else y.size
    out = memory.reserve(4 * y) if isinstance(y, int) else memory.place(y)
    params = struct.pack("<QQi4x", memory.place(x), out, n)
    kernels["behaviour"].run(entry, grid=grid, block=block, params=params, memory=memory)
    return memory.read(out, np.uint32, size)


def random_words(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**32, count, dtype=np.uint32)


def test_threads_of_a_warp_meet_after_loops(kernels: dict[str, ptx.Module]) -> None:
    x = random_words(4 * 96)
    sums = []
    for t, v in enumerate(x.tolist()):
        total = 0
        for i in range(v % 16):
            if (i ^ t) % 7 == 3:
                total = total * 3 + 1
                if total > 100000:
                    break
            total += i
        sums.append(total)
    got = behave(kernels, "loops", x, 2 * x.size, (4, 1, 1), (96, 1, 1)).reshape(-1, 2)
    assert got[:, 0].tolist() == sums
    odd = [sum((s & 1) << i for i, s in enumerate(sums[w : w + 32])) for w in range(0, len(x), 32)]
    assert got[:, 1].tolist() == [odd[t // 32] for t in range(len(x))]


def test_switch(kernels: dict[str, ptx.Module]) -> None:
    x = random_words(64)
    functions: list[Callable[[int], int]] = [
        lambda v: v + 1, lambda v: v * 7, lambda v: v ^ 0x55, lambda v: v >> 3,
        lambda v: int(x[v % 32]), lambda v: ~v, int.bit_count, lambda v: 0, lambda v: 0,
    ]  # fmt: skip
    r = [functions[v % 9](v) for v in x.tolist()]
    wanted = [(v + r[t // 32 * 32 + 5]) % 2**32 for t, v in enumerate(r)]
    assert behave(kernels, "cases", x, 64).tolist() == wanted


def test_blocks_of_three_dimensions(kernels: dict[str, ptx.Module]) -> None:
    count = 2 * 3 * 2 * 60
    got = behave(kernels, "indices", random_words(1), count - 25, (2, 3, 2), (5, 4, 3), count - 25)
    wanted = [
        cta << 16 | z << 12 | y << 8 | x << 4 | 1
        for cta in range(12) for z in range(3) for y in range(4) for x in range(5)
    ]  # fmt: skip
    assert got.tolist() == wanted[: count - 25]


def test_shuffles(kernels: dict[str, ptx.Module]) -> None:
    x = random_words(64)
    got = behave(kernels, "shuffles", x, 8 * 64).reshape(64, 8)
    for t in range(64):
        lane, warp = t % 32, t // 32 * 32
        eight = warp + lane // 8 * 8
        sources = [
            warp + t * 7 % 32,
            t - 3 if lane >= 3 else t,
            t + 5 if lane + 5 < 32 else t,
            warp + (lane ^ 9),
            eight + t * 3 % 8,
            t - 3 if lane % 8 >= 3 else t,
            t + 5 if lane % 8 + 5 < 8 else t,
        ]
        assert got[t].tolist() == [*x[sources].tolist(), int(lane + 5 < 32)], t


def test_votes(kernels: dict[str, ptx.Module]) -> None:
    x = random_words(64)
    x[40] = 5
    got = behave(kernels, "votes", x, 8 * 64).reshape(64, 8)
    for t in range(64):
        warp = x[t // 32 * 32 :][:32].tolist()
        odd = sum((v & 1) << i for i, v in enumerate(warp))
        fives = [v % 64 == 5 for v in warp]
        parity = 0
        for v in warp:
            parity ^= v
        first = t % 4 < 2
        wanted = [
            odd, any(fives), not any(fives), sum(warp) % 2**32,
            max(warp, key=lambda v: signed(v, 32)), parity,
            0x33333333 if first else odd & 0xCCCCCCCC,
            min(v for i, v in enumerate(warp) if i % 4 < 2) if first else 0,
        ]  # fmt: skip
        assert got[t].tolist() == wanted, t


def test_atomics(kernels: dict[str, ptx.Module]) -> None:
    x = random_words(6 * 64)
    start = np.zeros(8 + x.size, np.uint32)
    start[1], start[5] = 2**32 - 1, 1
    y = behave(kernels, "atomics", x, start, (6, 1, 1), (64, 1, 1))
    swapped = 1
    for _ in x:
        swapped = (swapped * 3 + 1) % 2**32
    assert y[0] == x.sum(dtype=np.uint32)
    assert y[1] == x.min()
    assert y[2] == max(0, *x.view(np.int32))
    assert y[3] == np.bitwise_xor.reduce(x)
    assert y[4:5].view(np.float32) == (x % 16).sum()
    assert y[5] == swapped
    assert y[6] == x.size
    assert sorted(y[8:].tolist()) == list(range(x.size))


def test_variables_of_a_module_keep_their_values(kernels: dict[str, ptx.Module]) -> None:
    memory, module = ptx.Memory(), kernels["behaviour"]
    x, y = random_words(64), memory.reserve(4 * (8 + 64))
    for expected in (5, 5 + 64):
        params = struct.pack("<QQi4x", memory.place(x), y, 0)
        module.run("variables", grid=(1, 1, 1), block=(64, 1, 1), params=params, memory=memory)
        got = memory.read(y, np.uint32, 64)
        assert got.tolist() == [10 ** (v % 8) + expected for v in x.tolist()]
        params = struct.pack("<QQi4x", memory.place(x), memory.place(np.zeros(72, np.uint32)), 0)
        module.run("atomics", grid=(1, 1, 1), block=(64, 1, 1), params=params, memory=memory)


def test_memories_and_narrow_accesses(kernels: dict[str, ptx.Module]) -> None:
    x = random_words(64)
    got = behave(kernels, "memories", x, np.zeros(192, np.uint32))
    signed_bytes, halves = x.view(np.int8).astype(int), x.view(np.uint16).astype(int)
    local = signed_bytes[:8] * np.arange(8)
    lanes = np.arange(64)
    assert (got[:64].view(np.int32) == signed_bytes[lanes ^ 3] + local[x % 8]).all()
    fours = x.reshape(16, 4).sum(1, dtype=np.uint32)[lanes % 16]
    assert (
        got[64:128] == np.where(lanes % 2, halves[lanes ^ 1], 77).astype(np.uint32) + fours
    ).all()


@pytest.mark.parametrize("count", [0, 3, 16, 65, 510, 512])
def test_copies_fill_with_zeros_and_read_no_further(
    kernels: dict[str, ptx.Module], count: int
) -> None:
    data = random_words(128).view(np.uint8)[:count]
    got = behave(kernels, "fill", data, 128, block=(32, 1, 1), n=count).view(np.uint8)
    assert (got[:count] == data).all()
    assert not got[count:].any()


def test_cache_hints_change_no_values(kernels: dict[str, ptx.Module]) -> None:
    x = random_words(4 * 64)
    got = behave(kernels, "hints", x, 4 * 64, n=32)
    whole = x.view(np.uint8).reshape(64, 16)
    part = np.where(np.arange(16) < np.arange(64)[:, None] % 17, whole, 0).astype(np.uint8)
    wanted = 3 * x.reshape(64, 4) + part.view(np.uint32)
    wanted[:, 3] += 1
    np.testing.assert_array_equal(got.reshape(64, 4), wanted)


def test_ldmatrix(kernels: dict[str, ptx.Module]) -> None:
    x = random_words(128)
    plain, transposed = behave(kernels, "matrices", x, 256, block=(32, 1, 1)).reshape(2, 32, 4)
    matrices = x.view(np.uint16).reshape(4, 8, 8).astype(np.uint32)
    for lane in range(32):
        for j in range(4):
            row, column = lane // 4, lane % 4 * 2
            low, high = matrices[j, row, column : column + 2]
            assert plain[lane, j] == low | high << 16
            low, high = matrices[j, column : column + 2, row]
            assert transposed[lane, j] == low | high << 16


def test_ctas_that_wait_for_others(kernels: dict[str, ptx.Module]) -> None:
    y = behave(kernels, "turns", random_words(1), np.zeros(2, np.uint32), (12, 1, 1), (32, 1, 1))
    total = Fraction(0)
    for cta in range(12):
        total = total * Fraction(3, 2) + cta
    assert y[0] == 12
    assert y[1] == rounded(total, "f32")


# --- clusters ---


def run_clusters(
    kernels: dict[str, ptx.Module],
    entry: str,
    x: np.ndarray,
    words: int,
    grid: tuple[int, int, int],
    cluster: tuple[int, int, int],
    n: int = 0,
) -> np.ndarray:
    """Run an entry of clusters.cu with 64 threads a CTA."""
    memory = ptx.Memory()
    y = memory.reserve(4 * words)
    params = struct.pack("<QQi4x", memory.place(x), y, n)
    kernels["clusters"].run(
        entry, grid=grid, block=(64, 1, 1), cluster=cluster, params=params, memory=memory
    )
    return memory.read(y, np.uint32, words)


@pytest.mark.parametrize("cluster", [(1, 1, 1), (2, 1, 1), (1, 3, 1), (4, 1, 2), (2, 3, 2)])
def test_ctas_know_their_place_in_a_cluster(
    kernels: dict[str, ptx.Module], cluster: tuple[int, int, int]
) -> None:
    grid = (8, 6, 4)
    got = run_clusters(kernels, "identities", random_words(1), 16 * 8 * 6 * 4, grid, cluster)
    wanted = []
    for z in range(4):
        for y in range(6):
            for x in range(8):
                within = x % cluster[0], y % cluster[1], z % cluster[2]
                rank = within[0] + cluster[0] * (within[1] + cluster[1] * within[2])
                of = x // cluster[0], y // cluster[1], z // cluster[2]
                count = 8 // cluster[0], 6 // cluster[1], 4 // cluster[2]
                size = cluster[0] * cluster[1] * cluster[2]
                wanted.append([rank, size, *within, *cluster, *of, *count, 8, x])
    assert got.reshape(-1, 16).tolist() == wanted


@pytest.mark.parametrize("size", [1, 2, 5, 8, 16])
def test_ctas_read_and_write_shared_memory_of_others(
    kernels: dict[str, ptx.Module], size: int
) -> None:
    ctas = 80  # more than run at once
    x = random_words(256 * ctas)
    got = run_clusters(kernels, "exchange", x, x.size, (ctas, 1, 1), (size, 1, 1))
    data = x.reshape(-1, size, 64, 4)
    ranks = np.arange(1, size + 1, dtype=np.uint32)[:, None]
    sums = (data * ranks[..., None]).sum(1, dtype=np.uint32)
    for word, more in enumerate((data[..., 2], data[..., 3], data[..., 1])):
        sums[..., word] += more.sum(1, dtype=np.uint32)
    sums[..., 3] += (data[..., 3] >> 8 & 255).sum(1, dtype=np.uint32)
    wanted = np.broadcast_to(sums[:, None], data.shape)
    np.testing.assert_array_equal(got.reshape(data.shape), wanted)


@pytest.mark.parametrize("size", [1, 3, 8])
def test_atomics_on_shared_memory_of_others(kernels: dict[str, ptx.Module], size: int) -> None:
    x = random_words(64 * 24)
    words = 24 // size * (2 + 64 * size)
    got = run_clusters(kernels, "reduce", x, words, (24, 1, 1), (size, 1, 1))
    for mine, of in zip(got.reshape(24 // size, -1), x.reshape(24 // size, -1), strict=True):
        assert mine[0] == of[::2].sum(dtype=np.uint32)
        assert mine[1] == of[1::2].sum(dtype=np.uint32)
        assert sorted(mine[2:].tolist()) == sorted(of.tolist())


@pytest.mark.parametrize(("size", "rounds"), [(1, 3), (2, 7), (4, 5), (8, 1)])
def test_rounds_of_a_cluster(kernels: dict[str, ptx.Module], size: int, rounds: int) -> None:
    x = random_words(64 * 16)
    got = run_clusters(kernels, "ring", x, x.size, (16, 1, 1), (size, 1, 1), rounds)
    value = x.reshape(-1, size, 64).copy()
    own = np.zeros_like(value)
    for _ in range(rounds):
        for rank in range(size):
            for _ in range(rank * 3 % 5):
                own[:, rank] = own[:, rank] * 3 + value[:, rank]
        value = np.roll(value, 1, 1)[..., np.arange(64) ^ 33] + np.uint32(1)
    np.testing.assert_array_equal(got.reshape(value.shape), value + own)


@pytest.mark.parametrize(
    ("entry", "grid", "cluster", "what"),
    [("ring", (6, 1, 1), (4, 1, 1), r"grid \(6, 1, 1\) is no multiple of the cluster \(4, 1, 1\)"),
     ("ring", (4, 3, 1), (1, 2, 1), "is no multiple"),
     ("ring", (0, 1, 1), (0, 1, 1), r"cluster \(0, 1, 1\): 1 to 16 CTAs"),
     ("ring", (32, 1, 1), (32, 1, 1), r"cluster \(32, 1, 1\): 1 to 16 CTAs"),
     ("fixed", (4, 1, 1), (1, 1, 1), r"fixed is for clusters of \(2, 1, 1\) CTAs, got \(1")],
)  # fmt: skip
def test_clusters_that_can_not_be_launched(
    kernels: dict[str, ptx.Module],
    entry: str,
    grid: tuple[int, int, int],
    cluster: tuple[int, int, int],
    what: str,
) -> None:
    with pytest.raises(ValueError, match=what):
        run_clusters(kernels, entry, random_words(1), 1, grid, cluster)


def test_an_entry_may_ask_for_its_clusters(kernels: dict[str, ptx.Module]) -> None:
    got = run_clusters(kernels, "fixed", random_words(1), 4, (4, 1, 1), (2, 1, 1))
    assert got.tolist() == [0, 1, 0, 1]


# --- dependent launches ---

TRIGGER_FIRST, WAIT_FIRST, WAIT_LAST, TRIGGER_LAST, ONE_WARP_WAITS = 1, 2, 4, 8, 16


class Step(NamedTuple):
    """A launch of dependents.cu: of which buffers x and y, what it does, and whether it depends."""

    x: str
    y: str
    does: int = 0
    dependent: bool = True
    entry: str = "plain"


FIRST = Step("a", "b", TRIGGER_FIRST, dependent=False)
EARLY = TRIGGER_FIRST | WAIT_FIRST
"""Starts dependents before what comes before it has ended."""
LATE = WAIT_FIRST | TRIGGER_LAST
READS = r"reads global address 0x\w+, byte \d+ of a buffer of 512, before griddepcontrol.wait; a "
WRITES = READS.replace("reads", "writes")
DEPENDENCE_BUGS = {
    "read what was written": ([FIRST, Step("b", "c", WAIT_LAST)], READS + "launch before wrote"),
    "copy of what was written": (
        [FIRST, Step("b", "c", WAIT_LAST, entry="copied")], READS + "launch before wrote"),
    "write what was read": ([FIRST, Step("c", "a", WAIT_LAST)], WRITES + "launch before read"),
    "write what was read by copies": (
        [FIRST._replace(entry="copied"), Step("c", "a", WAIT_LAST)],
        WRITES + "launch before read"),
    "write what was written": ([FIRST, Step("a", "b", WAIT_LAST)], WRITES + "launch before wrote"),
    "add to what was written": (
        [FIRST, Step("a", "b", WAIT_LAST, entry="added")], READS + "launch before wrote"),
    "read what was added to": (
        [FIRST._replace(entry="added"), Step("b", "c", WAIT_LAST)], READS + "launch before wrote"),
    "without a trigger": (
        [FIRST._replace(does=0), Step("b", "c", WAIT_LAST)], READS + "launch before wrote"),
    "others wait": ([FIRST, Step("b", "c", ONE_WARP_WAITS)], READS + "launch before wrote"),
    "nobody waits": ([FIRST, Step("c", "d")], "no thread of a dependent launch executed griddepc"),
    "one before the last": (
        [FIRST, Step("c", "d", EARLY), Step("b", "e", WAIT_LAST)], READS + "launch before wrote"),
    "long before": (
        [FIRST, *[Step("c", "d", EARLY)] * 3, Step("c", "a", WAIT_LAST)],
        WRITES + "launch before read"),
    "buffers made in between": (
        [FIRST, Step("c", "d", EARLY), Step("c", "new", EARLY), Step("b", "newer", WAIT_LAST)],
        READS + "launch before wrote"),
}  # fmt: skip
INDEPENDENT = {
    "others are not touched": [FIRST, Step("c", "d", WAIT_LAST)],
    "other bytes of the same buffer": [FIRST, Step("c", "b+256", WAIT_LAST)],
    "both read": [FIRST, Step("a", "c", WAIT_LAST)],
    "not dependent": [FIRST, Step("b", "c", WAIT_LAST, dependent=False)],
    "the first launch": [Step("a", "b", WAIT_LAST)],
    "one before the last that has ended": [
        FIRST, Step("b", "d", LATE), Step("b", "e", WAIT_LAST)],
    "one before the last without a trigger": [
        FIRST, Step("b", "d", WAIT_FIRST), Step("b", "e", WAIT_LAST)],
    "a launch in between that is not dependent": [
        FIRST, Step("c", "d", EARLY, dependent=False), Step("b", "e", WAIT_LAST)],
    "nobody waits where none need": [FIRST, Step("b", "c", dependent=False)],
}  # fmt: skip


def run_steps(module: ptx.Module, steps: list[Step]) -> None:
    """Launch one after another, each on 64 words; compare all buffers afterwards."""
    memory, places = ptx.Memory(), {}
    words: dict[str, np.ndarray] = {}

    def place(name: str) -> None:
        words[name] = random_words(128, len(name) + ord(name[0]))
        places[name] = memory.place(words[name])

    for name in "abcde":
        place(name)
    for step in steps:
        for name in {step.x, step.y} - set(places) - {"b+256"}:
            memory.reserve(10**6)
            place(name)
        buffer, _, offset = step.y.partition("+")
        params = struct.pack("<QQi4x", places[step.x], places[buffer] + int(offset or 0), step.does)
        module.run(
            step.entry, grid=(1, 1, 1), block=(64, 1, 1), params=params, memory=memory,
            dependent=step.dependent,
        )  # fmt: skip
        to = words[buffer][int(offset or 0) // 4 :][:64]
        to[:] = words[step.x][:64] + np.uint32(1) + (to if step.entry == "added" else 0)
    for name, wanted in words.items():
        np.testing.assert_array_equal(memory.read(places[name], np.uint32, 128), wanted)


@pytest.mark.parametrize("name", DEPENDENCE_BUGS)
def test_a_launch_that_does_not_wait_is_found(kernels: dict[str, ptx.Module], name: str) -> None:
    steps, what = DEPENDENCE_BUGS[name]
    *before, last = steps
    run_steps(kernels["dependents"], [*before, last._replace(does=WAIT_FIRST)])
    with pytest.raises(ptx.DependencyHazard, match=rf"{last.entry}: .*{what}"):
        run_steps(kernels["dependents"], steps)


@pytest.mark.parametrize("name", INDEPENDENT)
def test_a_launch_need_not_wait(kernels: dict[str, ptx.Module], name: str) -> None:
    run_steps(kernels["dependents"], INDEPENDENT[name])


# --- PTX by hand, and errors ---


def by_hand(lines: str, parameters: str = ".param .u64 out") -> ptx.Module:
    """An entry f whose lines may use registers %r, %rd, %p and the parameter's address in %rd0."""
    return ptx.load(
        f".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry f({parameters}) {{\n"
        ".reg .b32 %r<9>; .reg .b64 %rd<9>; .reg .pred %p<9>;\n"
        f"ld.param.u64 %rd0, [out];\n{lines}\nret;\n}}\n"
    )


def run_by_hand(module: ptx.Module, threads: int = 32) -> np.ndarray:
    memory = ptx.Memory()
    out = memory.place(np.zeros(threads, np.uint32))
    module.run(
        "f", grid=(1, 1, 1), block=(threads, 1, 1), params=struct.pack("<Q", out), memory=memory
    )
    return memory.read(out, np.uint32, threads)


STORE = "mul.wide.u32 %rd1, %r0, 4; add.u64 %rd1, %rd0, %rd1; st.global.u32 [%rd1], %r1;"


def test_indexed_branch() -> None:
    module = by_hand(
        "mov.u32 %r0, %tid.x; and.b32 %r2, %r0, 3;\n"
        "ts: .branchtargets A, B, C, D;\n"
        "brx.idx %r2, ts;\n"
        "D: mov.u32 %r1, 40; bra E;\n"
        "A: mov.u32 %r1, 10; bra E;\n"
        "B: mov.u32 %r1, 20; bra E;\n"
        "C: mov.u32 %r1, 30;\n"
        f"E: bar.warp.sync -1; {STORE}"
    )
    assert run_by_hand(module).tolist() == [10, 20, 30, 40] * 8


def test_threads_meet_again_where_the_text_is_out_of_order() -> None:
    module = by_hand(
        "mov.u32 %r0, %tid.x; mov.u32 %r1, 0; setp.lt.u32 %p0, %r0, 9; bra START;\n"
        f"JOIN: bar.warp.sync -1; {STORE} ret;\n"
        "RARE: add.u32 %r1, %r1, 5; bra JOIN;\n"
        "START: @%p0 bra RARE; add.u32 %r1, %r1, 7; bra JOIN;"
    )
    assert run_by_hand(module).tolist() == [5] * 9 + [7] * 23


def test_an_inner_scope_hides_names() -> None:
    module = by_hand(
        "mov.u32 %r0, %tid.x; mov.u32 %r1, 1;\n"
        "{ .reg .b32 %r1, t; mov.u32 %r1, 5; { .reg .b32 t; mov.u32 t, 6; } mov.u32 t, %r1; }\n"
        f"{STORE}"
    )
    assert run_by_hand(module).tolist() == [1] * 32


def test_parameters_have_bounds() -> None:
    with pytest.raises(ptx.OutOfBounds, match="offset 8 of 8 bytes of parameters"):
        run_by_hand(by_hand("ld.param.u32 %r1, [out+8];"))


@pytest.mark.parametrize(
    "line",
    ["frobnicate.u32 %r1, %r2;", "mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%r1}, {%r2};",
     "createpolicy.range.L2::evict_last.b64 %rd1, [%rd0], 4, 8;",
     "createpolicy.fractional.L2::keep.b64 %rd1;",
     "createpolicy.fractional.L2::evict_last.L2::evict_normal.b64 %rd1;",
     "call other;", "tex.2d.v4.f32.s32 %r1, [%rd0];", "mov.u32 %r1, %clock;"],
)  # fmt: skip
def test_unknown_instructions_are_named(line: str) -> None:
    with pytest.raises(ptx.Unsupported, match=re.escape(line.split()[0].rstrip(";"))):
        run_by_hand(by_hand(line))


def test_errors_of_use() -> None:
    module = by_hand("")
    with pytest.raises(KeyError, match="no entry g; there are f"):
        module.entry("g")
    with pytest.raises(ValueError, match="f takes 8 bytes of parameters, got 4"):
        module.run("f", grid=(1, 1, 1), block=(1, 1, 1), params=bytes(4), memory=ptx.Memory())


def test_reads_by_the_host_are_checked() -> None:
    memory = ptx.Memory()
    address = memory.reserve(100)
    assert address % 256 == 0
    with pytest.raises(ptx.Uninitialised, match="byte 0 of 100"):
        memory.read(address, np.uint8, 100)
    with pytest.raises(ptx.OutOfBounds):
        memory.read(address, np.uint8, 101)
    with pytest.raises(ptx.OutOfBounds):
        memory.read(8, np.uint8, 1)


def test_compiling_again_follows_the_included_files(tmp_path: Path) -> None:
    require_nvcc()
    source, header = tmp_path / "a.cu", tmp_path / "a.h"
    source.write_text('#include "a.h"\n__global__ void f(int* x) { *x = N; }')
    for number in ("1234", "5678"):
        header.write_text(f"#define N {number}")
        assert number in ptx.compile(source)
        assert number in ptx.compile(source)
    source.write_text("nonsense")
    with pytest.raises(RuntimeError, match="nonsense"):
        ptx.compile(source)
