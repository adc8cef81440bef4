"""The least time that an operation needs on a chip: of its arithmetic, and of its bytes."""

from __future__ import annotations

from typing import NamedTuple

from .rates import Peaks


class Floor(NamedTuple):
    """Seconds, and what they are for: a unit such as "int8", or "memory"."""

    seconds: float
    limit: str


def ways(weight_bits: int, act_bits: int | None) -> dict[str, int]:
    """Units that can multiply these bits exactly, and how many products each takes for one.

    `act_bits` is None for bfloat16.
    """
    if act_bits is None:
        return {"bf16": 1}
    found = {"b1": weight_bits * act_bits, "int8": 1}
    if max(weight_bits, act_bits) <= 4:
        found["int4"] = 1
    return found


def floor(peaks: Peaks, operations: dict[str, int], moved: int) -> Floor:
    """The larger of the times that arithmetic and memory take.

    Args:
      peaks: measured ones.
      operations: how many it takes on each unit that could do it; the fastest that was measured
        counts.
      moved: bytes of operands and results, each once.
    """
    memory = Floor(moved / peaks.memory, "memory")
    times = [
        Floor(count / peaks.operations[unit], unit)
        for unit, count in operations.items()
        if unit in peaks.operations
    ]
    return max(memory, min(times)) if times else memory
