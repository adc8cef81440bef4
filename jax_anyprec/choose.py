"""Which implementation runs: a pure function of bits and hardware, with its reason.

That of the CUDA kernels, which needs their tiles, is in `csrc/cuda/plan.h`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

IMPLEMENTATIONS = (
    "xla", "cpu", "cpu_planes", "cpu_codes", "cuda", "cuda_planes", "cuda_codes"
)  # fmt: skip

MAX_PLANE_PRODUCTS = {"avx512": 4, "avxvnni": 1, "avx2": 3, "neon": 1, "portable": 15}
"""Products by planes cost act_bits * weight_bits; above these, 8-bit products are cheaper.

Measured on 4096 x 4096 with 1, 16 and 512 rows, but for neon, where instructions were counted;
docs/cpu.md has the table."""

MANY_ROWS = 8
"""From so many rows on it pays to make planes of the fields of wider weights."""


def platform_of(implementation: str) -> str:
    """The platform, as JAX names it, that an implementation is for; "xla" is for all."""
    return implementation.partition("_")[0]


def has_cuda_code(arch: int, compiled: Iterable[str]) -> bool:
    """Whether a GPU of compute capability arch / 10 runs code that was compiled for these names.

    They are CMake's: "86-real" is code for its major version, from that minor version on,
    "90a-real" is code for 9.0 alone, and "120-virtual" is PTX, which every newer GPU compiles.
    """

    def fits(name: str) -> bool:
        target, _, kind = name.partition("-")
        if target.endswith("a"):
            return arch == int(target[:-1])
        oldest = int(target)
        return arch >= oldest and (kind == "virtual" or arch // 10 == oldest // 10)

    return any(map(fits, compiled))


class Choice(NamedTuple):
    """A way to the integer product ("planes", "codes" or "float"), and why."""

    method: str
    reason: str


def cpu_method(
    act_bits: int | None, weight_bits: int, rows: int | None, isa: str, implementation: str = ""
) -> Choice:
    """The kernel family for a product on the CPU; `rows` is None where it is known at run time."""
    if act_bits is None:
        return Choice("float", "float activations are three 8-bit digits")
    if implementation in ("cpu_planes", "cpu_codes"):
        return Choice(implementation.removeprefix("cpu_"), "asked for by name")
    products = act_bits * weight_bits
    if products > MAX_PLANE_PRODUCTS[isa]:
        return Choice("codes", f"{products} one-bit products cost more than an 8-bit one")
    if rows is not None and rows < MANY_ROWS and (weight_bits > 1 or act_bits > 3):
        return Choice("codes", f"{rows} rows do not pay for making planes of fields")
    return Choice("planes", f"{products} one-bit products cost less than an 8-bit one")
