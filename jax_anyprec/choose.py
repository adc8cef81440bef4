"""Which implementation runs: a pure function of bits and hardware, with its reason."""

from __future__ import annotations

from typing import NamedTuple

IMPLEMENTATIONS = ("xla", "cpu", "cpu_planes", "cpu_codes", "cuda")

MAX_PLANE_PRODUCTS = 4
"""Products by planes cost act_bits * weight_bits; above this, 8-bit dot products are cheaper."""


class Choice(NamedTuple):
    """A way to the integer product ("planes", "codes" or "float"), and why."""

    method: str
    reason: str


def cpu_method(act_bits: int | None, weight_bits: int, isa: str, implementation: str) -> Choice:
    """The kernel family for a product on the CPU."""
    if act_bits is None:
        return Choice("float", "activations are floats")
    if implementation in ("cpu_planes", "cpu_codes"):
        return Choice(implementation.removeprefix("cpu_"), "asked for by name")
    if isa == "avx512" and act_bits * weight_bits <= MAX_PLANE_PRODUCTS:
        return Choice("planes", f"{act_bits} x {weight_bits} one-bit products, native popcount")
    return Choice("codes", f"{act_bits} x {weight_bits} one-bit products cost more than 8-bit ones")
