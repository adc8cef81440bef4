"""Integer and logic instructions on NumPy arrays (or scalars) of raw bits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from .faults import Unsupported
from .parse import RAW, width

Values = Any
"""``uint16``, ``uint32``, ``uint64`` or ``bool``: an array over lanes, or a scalar for all."""
Function = Callable[..., Values]

SIGNED: dict[int, Any] = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}


def numpy_type(type_name: str) -> Any:
    """The NumPy type of an integer type such as ``s32``, ``u16`` or ``b64``."""
    return (SIGNED if type_name[0] == "s" else RAW)[width(type_name)]


def typed(dtype: Any, function: Function, out: Any = None) -> Function:
    """A function of values of `dtype` as one of raw bits; `out` is what it gives back."""
    raw = RAW[np.dtype(out or dtype).itemsize]

    def call(*values: Values) -> Values:
        return function(*[v.view(dtype) for v in values]).view(raw)

    return call


def truncated_divide(a: Values, b: Values) -> Values:
    """Rounded toward zero, as in C."""
    quotient = a // b
    return quotient + ((quotient * b != a) & ((a < 0) != (b < 0))).astype(quotient.dtype)


def truncated_remainder(a: Values, b: Values) -> Values:
    return a - truncated_divide(a, b) * b


def multiply_high(type_name: str) -> Function:
    """The upper half of a product."""
    size, signed = width(type_name), type_name[0] == "s"
    if size < 8:
        wide, bits = (SIGNED if signed else RAW)[2 * size], 8 * size
        dtype, raw = numpy_type(type_name), RAW[size]
        return lambda a, b: (
            a.view(dtype).astype(wide) * b.view(dtype).astype(wide) >> wide(bits)
        ).astype(raw)

    def high(a: Values, b: Values) -> Values:
        low32, half = np.uint64(0xFFFFFFFF), np.uint64(32)
        a0, a1, b0, b1 = a & low32, a >> half, b & low32, b >> half
        middle = a1 * b0 + (a0 * b0 >> half)
        middle2 = a0 * b1 + (middle & low32)
        out = a1 * b1 + (middle >> half) + (middle2 >> half)
        if signed:
            zero = np.uint64(0)
            out = out - np.where(a.view(np.int64) < 0, b, zero)
            out = out - np.where(b.view(np.int64) < 0, a, zero)
        return out

    return high


def multiply_wide(type_name: str) -> Function:
    """The whole product, of twice the width."""
    dtype, size = numpy_type(type_name), width(type_name)
    wide, raw = (SIGNED if type_name[0] == "s" else RAW)[2 * size], RAW[2 * size]
    return lambda a, b: (a.view(dtype).astype(wide) * b.view(dtype).astype(wide)).view(raw)


def shift_left(type_name: str) -> Function:
    raw, bits = RAW[width(type_name)], 8 * width(type_name)

    def shift(a: Values, n: Values) -> Values:
        return np.where(n < bits, a << np.minimum(n, bits - 1).astype(raw), raw(0))

    return shift


def shift_right(type_name: str) -> Function:
    dtype, raw, bits = numpy_type(type_name), RAW[width(type_name)], 8 * width(type_name)

    def arithmetic(a: Values, n: Values) -> Values:
        return (a.view(dtype) >> np.minimum(n, bits - 1).astype(dtype)).view(raw)

    def logical(a: Values, n: Values) -> Values:
        return np.where(n < bits, a >> np.minimum(n, bits - 1).astype(raw), raw(0))

    return arithmetic if type_name[0] == "s" else logical


def funnel(left: bool, clamp: bool) -> Function:
    """32 bits of ``b:a`` shifted: the upper ones to the left, the lower ones to the right."""

    def shift(a: Values, b: Values, n: Values) -> Values:
        n = (np.minimum(n, 32) if clamp else n & np.uint32(31)).astype(np.uint64)
        both = b.astype(np.uint64) << np.uint64(32) | a.astype(np.uint64)
        if left:
            return ((both << n) >> np.uint64(32)).astype(np.uint32)
        return (both >> n).astype(np.uint32)

    return shift


TWO_INPUTS: dict[int, Function | int] = {
    0b0000: 0,
    0b1000: lambda b, c: b & c,
    0b0100: lambda b, c: b & ~c,
    0b1100: lambda b, c: b,
    0b0010: lambda b, c: ~b & c,
    0b1010: lambda b, c: c,
    0b0110: lambda b, c: b ^ c,
    0b1110: lambda b, c: b | c,
    0b0001: lambda b, c: ~(b | c),
    0b1001: lambda b, c: ~(b ^ c),
    0b0101: lambda b, c: ~c,
    0b1101: lambda b, c: b | ~c,
    0b0011: lambda b, c: ~b,
    0b1011: lambda b, c: ~b | c,
    0b0111: lambda b, c: ~(b & c),
    0b1111: 1,
}
"""Functions of two bits by their truth table, of which bit 2b + c is the value; 0, 1 constant."""


def lop3(table: int) -> Function:
    """A function of three bits; bit 4a + 2b + c of `table` is its value."""
    if_one, if_zero = TWO_INPUTS[table >> 4], TWO_INPUTS[table & 15]
    if (table >> 4) ^ (table & 15) == 15 and callable(if_zero):
        return lambda a, b, c: a ^ if_zero(b, c)

    def choose(a: Values, b: Values, c: Values) -> Values:
        ones = (a & if_one(b, c)) if callable(if_one) else (a if if_one else None)
        zeros = (~a & if_zero(b, c)) if callable(if_zero) else (~a if if_zero else None)
        if ones is None and zeros is None:
            return np.uint32(0)
        return zeros if ones is None else ones if zeros is None else ones | zeros

    return choose


def prmt(a: Values, b: Values, selector: Values) -> Values:
    """Four of the eight bytes of ``b:a``, or their sign bits."""
    both = b.astype(np.uint64) << np.uint64(32) | a.astype(np.uint64)
    out: Values = np.uint32(0)
    for i in range(4):
        pick = selector >> np.uint32(4 * i) & np.uint32(15)
        byte = (both >> ((pick & np.uint32(7)) << np.uint32(3)).astype(np.uint64)).astype(np.uint32)
        byte = byte & np.uint32(0xFF)
        sign = np.where(byte >> np.uint32(7), np.uint32(0xFF), np.uint32(0))
        out = out | np.where(pick & np.uint32(8), sign, byte) << np.uint32(8 * i)
    return out


def prmt_constant(selector: int) -> Function:
    """`prmt` where the selector is known and takes no sign bits."""
    picks = [selector >> 4 * i & 7 for i in range(4)]

    def permute(a: Values, b: Values) -> Values:
        out: Values = None
        for i, pick in enumerate(picks):
            source, distance = (a, b)[pick >> 2], 8 * (i - (pick & 3))
            byte = source & np.uint32(0xFF << 8 * (pick & 3))
            if distance:
                byte = byte << np.uint32(distance) if distance > 0 else byte >> np.uint32(-distance)
            out = byte if out is None else out | byte
        return out

    return permute


def extract(type_name: str) -> Function:
    """bfe: `length` bits from `start` on, extended."""
    raw, bits, signed = RAW[width(type_name)], 8 * width(type_name), type_name[0] == "s"

    def field(a: Values, start: Values, length: Values) -> Values:
        start, length = start & np.uint32(0xFF), length & np.uint32(0xFF)
        value = shift_right("u" + type_name[1:])(a, start)
        value = value & _low_bits(length, raw, bits)
        if signed:
            top = np.minimum(start + length - np.uint32(1), bits - 1).astype(raw)
            negative = (length > 0) & ((a >> top & raw(1)) != 0)
            value = np.where(
                negative, value | ~_low_bits(_left(start, length, bits), raw, bits), value
            )
        return value

    return field


def _left(start: Values, length: Values, bits: int) -> Values:
    """Bits of a field that lie inside the register."""
    inside = np.maximum(bits - start.astype(np.int64), 0)
    return np.minimum(length.astype(np.int64), inside)


def _low_bits(count: Values, raw: Any, bits: int) -> Values:
    """A mask of so many ones."""
    ones = (raw(1) << np.minimum(count, bits - 1).astype(raw)) - raw(1)
    return np.where(count >= bits, ~raw(0), ones)


def insert(type_name: str) -> Function:
    """bfi: the low bits of a into b, from `start` on."""
    raw, bits = RAW[width(type_name)], 8 * width(type_name)

    def field(a: Values, b: Values, start: Values, length: Values) -> Values:
        start, length = start & np.uint32(0xFF), length & np.uint32(0xFF)
        shift = shift_left(type_name)
        mask = shift(_low_bits(length, raw, bits), start)
        return (b & ~mask) | (shift(a, start) & mask)

    return field


def find_top(a: Values) -> Values:
    """The position of the highest one, ``int64``; -1 without any."""
    value, top = a.astype(np.uint64), np.where(a != 0, np.int64(0), np.int64(-1))
    for step in (32, 16, 8, 4, 2, 1):
        upper = value >> np.uint64(step)
        top = np.where(upper != 0, top + step, top)
        value = np.where(upper != 0, upper, value)
    return top


def leading_zeros(bits: int) -> Function:
    return lambda a: (bits - 1 - find_top(a)).astype(np.uint32)


def bfind(type_name: str, amount: bool) -> Function:
    """The highest bit that differs from the sign; as a shift amount with `amount`."""
    dtype, bits = numpy_type(type_name), 8 * width(type_name)

    def find(a: Values) -> Values:
        if type_name[0] == "s":
            a = np.where(a.view(dtype) < 0, ~a, a)
        top = find_top(a)
        if amount:
            top = np.where(top < 0, top, bits - 1 - top)
        return top.astype(np.int32).view(np.uint32)

    return find


def reverse(a: Values) -> Values:
    """brev"""
    size, out = a.dtype.itemsize, a
    raw = RAW[size]
    for step in (1, 2, 4, 8, 16, 32)[: {4: 5, 8: 6}[size]]:
        ones = ~raw(0) // raw((1 << step) + 1)
        out = (out >> raw(step) & ones) | (out & ones) << raw(step)
    return out


def dot4(a_type: str, b_type: str) -> Function:
    """dp4a: c plus the products of four bytes."""

    def dot(a: Values, b: Values, c: Values) -> Values:
        out = c.astype(np.int64)
        for i in range(4):
            shift = np.uint32(8 * i)
            x = (a >> shift).astype(np.uint8).view(numpy_type(a_type[0] + "8")).astype(np.int64)
            y = (b >> shift).astype(np.uint8).view(numpy_type(b_type[0] + "8")).astype(np.int64)
            out = out + x * y
        return out.astype(np.uint32)

    return dot


COMPARE: dict[str, Function] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal,
    "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip


def compare(relation: str, type_name: str) -> Function:
    if type_name == "pred" or relation not in COMPARE:
        raise Unsupported(f"comparison {relation}.{type_name}")
    signed = "u" if relation in ("lo", "ls", "hi", "hs") else type_name[0]
    dtype, function = numpy_type(signed + type_name[1:]), COMPARE[relation]
    return lambda a, b: function(a.view(dtype), b.view(dtype))


LOGIC: dict[str, Function] = {
    "and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor, "not": np.logical_not,
}  # fmt: skip
"""Of predicates."""


def operation(name: str, mods: tuple[str, ...], type_name: str) -> Function | None:
    """The function of an instruction whose operands are of one integer type."""
    if type_name == "pred":
        return LOGIC.get(name)
    dtype = numpy_type(type_name)
    if "sat" in mods:
        return _saturated(name)
    simple: dict[str, Function] = {
        "mov": lambda a: a, "add": np.add, "sub": np.subtract,
        "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert,
        "neg": np.negative, "min": typed(dtype, np.minimum), "max": typed(dtype, np.maximum),
        "abs": typed(dtype, np.abs), "brev": reverse,
        "cnot": lambda a: (a == 0).astype(a.dtype),
        "popc": lambda a: np.bitwise_count(a).astype(np.uint32),
        "clz": leading_zeros(8 * width(type_name)),
    }  # fmt: skip
    if name in simple:
        return simple[name]
    divide = type_name[0] == "s"
    made: dict[str, Callable[[], Function]] = {
        "div": lambda: typed(dtype, truncated_divide if divide else np.floor_divide),
        "rem": lambda: typed(dtype, truncated_remainder if divide else np.remainder),
        "shl": partial(shift_left, type_name), "shr": partial(shift_right, type_name),
        "bfe": partial(extract, type_name), "bfi": partial(insert, type_name),
        "bfind": partial(bfind, type_name, "shiftamt" in mods),
        "sad": lambda: lambda a, b, c: c + np.where(
            a.view(dtype) < b.view(dtype), b - a, a - b),
    }  # fmt: skip
    if name in made:
        return made[name]()
    if name in ("mul", "mad"):
        return _product(name, mods, type_name)
    return None


def _saturated(name: str) -> Function:
    """add.sat.s32 and sub.sat.s32"""
    function = {"add": np.add, "sub": np.subtract}[name]

    def call(a: Values, b: Values) -> Values:
        wide = function(a.view(np.int32).astype(np.int64), b.view(np.int32).astype(np.int64))
        return np.clip(wide, -(2**31), 2**31 - 1).astype(np.int32).view(np.uint32)

    return call


def _product(name: str, mods: tuple[str, ...], type_name: str) -> Function:
    product = (
        multiply_wide(type_name) if "wide" in mods
        else multiply_high(type_name) if "hi" in mods
        else np.multiply
    )  # fmt: skip
    return product if name == "mul" else lambda a, b, c: product(a, b) + c
