"""Registers that may be read before they are written.

Most are proved to be written first, block by block; only the others are watched while running.
A move hands on what is not written, since compilers move values that nobody uses.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

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


class _Use(NamedTuple):
    """What an instruction reads, guard included, and surely writes; registers as bits."""

    reads: int
    writes: int
    moves: bool


def _use(instruction: Instruction) -> _Use:
    reads = _bits(sources(instruction))
    if instruction.guard:
        return _Use(reads | 1 << instruction.guard[0].slot, 0, False)
    return _Use(reads, _bits(results(instruction)), _is_move(instruction))


def _bits(slots: Iterable[int]) -> int:
    bits = 0
    for slot in slots:
        bits |= 1 << slot
    return bits


def watched(
    body: Body, ranges: Sequence[tuple[int, int]], following: Sequence[Sequence[int]]
) -> frozenset[int]:
    """Slots of registers that some instruction might read unwritten."""
    uses = [_use(instruction) for instruction in body.instructions]
    everything = (1 << len(body.registers)) - 1
    before = [0] + [everything] * (len(ranges) - 1)
    waiting = set(range(len(ranges)))
    while waiting:
        block = min(waiting)
        waiting.remove(block)
        after, _ = _through(uses[slice(*ranges[block])], before[block])
        for successor in following[block]:
            if before[successor] & ~after:
                before[successor] &= after
                waiting.add(successor)
    doubtful = 0
    for (start, end), written in zip(ranges, before, strict=True):
        doubtful |= _through(uses[start:end], written)[1]
    return frozenset(i for i in range(len(body.registers)) if doubtful >> i & 1)


def _through(uses: Sequence[_Use], written: int) -> tuple[int, int]:
    """Registers surely written after a block, and those read in it without being so, as bits."""
    doubtful = 0
    for reads, writes, moves in uses:
        unwritten = reads & ~written
        doubtful |= unwritten
        if not (moves and unwritten):
            written |= writes
    return written, doubtful


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
