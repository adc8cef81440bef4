"""Registers that may be read before they are written.

Most are proved to be written first, block by block; only the others are watched while running.
A move hands on what is not written, since compilers move values that nobody uses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce

import numpy as np

from .faults import Uninitialised
from .machine import Machine, Step
from .parse import Address, Body, Instruction, Not, Operand, Pair, Register, Vector

WITHOUT_RESULT = frozenset(
    ("st", "red", "cp", "bar", "barrier", "bra", "brx", "ret", "exit", "trap", "call", "membar",
     "fence", "prefetch", "prefetchu", "discard", "applypriority", "griddepcontrol", "nanosleep")
)  # fmt: skip


def _registers(operand: Operand) -> Iterator[int]:
    """Slots of all registers in an operand."""
    if isinstance(operand, Register):
        yield operand.slot
    elif isinstance(operand, Not):
        yield operand.register.slot
    elif isinstance(operand, Address):
        yield from _registers(operand.base)
    elif isinstance(operand, Vector):
        for item in operand.items:
            yield from _registers(item)
    elif isinstance(operand, Pair):
        yield from _registers(operand.first)
        yield from _registers(operand.second)


def results(instruction: Instruction) -> list[int]:
    """Slots of the registers that an instruction writes."""
    if instruction.op[0] in WITHOUT_RESULT or not instruction.operands:
        return []
    return list(_registers(instruction.operands[0]))


def sources(instruction: Instruction) -> list[int]:
    """Slots of the registers that an instruction reads, without its guard."""
    first = 0 if instruction.op[0] in WITHOUT_RESULT else 1
    return [slot for operand in instruction.operands[first:] for slot in _registers(operand)]


def _is_move(instruction: Instruction) -> bool:
    return instruction.op[0] == "mov" and isinstance(instruction.operands[1], Register)


def watched(
    body: Body, ranges: Sequence[tuple[int, int]], following: Sequence[Sequence[int]]
) -> frozenset[int]:
    """Slots of registers that some instruction might read unwritten."""
    everything = (1 << len(body.registers)) - 1
    before = [0] + [everything] * (len(ranges) - 1)
    waiting = set(range(len(ranges)))
    while waiting:
        block = waiting.pop()
        after, _ = _through(body, ranges[block], before[block])
        for successor in following[block]:
            if before[successor] & ~after:
                before[successor] &= after
                waiting.add(successor)
    doubtful = (_through(body, r, b)[1] for r, b in zip(ranges, before, strict=True))
    bits = reduce(int.__or__, doubtful, 0)
    return frozenset(i for i in range(len(body.registers)) if bits >> i & 1)


def _through(body: Body, block: tuple[int, int], written: int) -> tuple[int, int]:
    """Registers surely written after a block, and those read in it without being so, as bits."""
    doubtful = 0
    for instruction in body.instructions[slice(*block)]:
        read = _bits(sources(instruction))
        if instruction.guard:
            read |= 1 << instruction.guard[0].slot
        doubtful |= read & ~written
        moves_doubt = _is_move(instruction) and read & ~written
        if not instruction.guard and not moves_doubt:
            written |= _bits(results(instruction))
    return written, doubtful


def _bits(slots: Sequence[int]) -> int:
    return reduce(lambda bits, slot: bits | 1 << slot, slots, 0)


def watching(step: Step, instruction: Instruction, slots: frozenset[int]) -> Step:
    """The step, with a look at watched registers that it reads, and a note of those it writes."""
    read = [s for s in sources(instruction) if s in slots]
    written = [s for s in results(instruction) if s in slots]
    if not read and not written:
        return step
    move = _is_move(instruction)

    def watch(m: Machine) -> None:
        if not move:
            for slot in read:
                require_written(m, instruction, slot)
        step(m)
        active = np.True_ if m.mask is None else m.mask
        for slot in written:
            whole = m.written[read[0]] if move and read else np.True_
            m.written[slot] = np.where(active, whole, m.written[slot])

    return watch


def require_written(m: Machine, instruction: Instruction, slot: int) -> None:
    """Raise if an active lane has not written a register."""
    bad = ~m.written[slot]
    if m.mask is not None:
        bad = bad & m.mask
    if np.any(bad):
        lane = int(np.argmax(np.broadcast_to(bad, m.lanes)[m.index]))
        raise m.fault(instruction, Uninitialised, lane, "a register that was never written")
