"""An entry's instructions to steps: what a machine runs, one closure for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from . import access, assigned, convert, dependents, floats, flow, hints, integers, warps
from .faults import Trap, Unsupported
from .machine import DONE, Control, Machine, Program, Step
from .parse import (
    RAW,
    Address,
    Body,
    Instruction,
    Not,
    Number,
    Operand,
    Pair,
    Register,
    Special,
    Symbol,
    Vector,
    width,
)

FLOAT_TYPES = ("f16", "bf16", "f16x2", "bf16x2", "f32", "f64")
NOTHING = (
    "membar", "fence", "prefetch", "prefetchu", "discard", "applypriority", "nanosleep",
)  # fmt: skip
"""Hints, and orders that lockstep keeps anyway."""


def raw_type(type_name: str) -> Any:
    """The NumPy type of a register."""
    return np.bool_ if type_name == "pred" else RAW[width(type_name)]


class Translator:
    """Slots for registers, constants and special registers, and a step for each instruction."""

    def __init__(self, name: str, body: Body, symbols: dict[str, int]) -> None:
        self.name, self.body, self.symbols = name, body, symbols
        self.initial: list[Any] = [raw_type(t)(0) for t in body.registers]
        self.special: dict[str, int] = {}
        self.late: dict[
            int, tuple[str, int, Any]
        ] = {}  # module variables: slot, name, offset, type
        self._constants: dict[tuple[Any, int], int] = {}
        self._before: list[Step] = []
        self._watched: frozenset[int] = frozenset()

    # --- operands ---

    def slot(self, operand: Operand, type_name: str) -> int:
        """The slot that holds an operand of this type."""
        raw = raw_type(type_name)
        if isinstance(operand, Register):
            return operand.slot
        if isinstance(operand, Number):
            return self._constant(operand.value, raw)
        if isinstance(operand, Special):
            return self._special(operand.name)
        if isinstance(operand, Not):
            return self._negated(operand.register.slot)
        if isinstance(operand, Symbol):
            if operand.name in self.symbols:
                return self._constant(self.symbols[operand.name] + operand.offset, raw)
            slot = self._new(raw(0))
            self.late[slot] = operand.name, operand.offset, raw
            return slot
        raise Unsupported(f"operand {operand}")

    def address(self, operand: Operand) -> tuple[int, int]:
        """The slot of an address' base, and the distance from it."""
        if not isinstance(operand, Address):
            raise Unsupported(f"operand {operand} in place of an address")
        return self.slot(operand.base, "b64"), operand.offset

    def _constant(self, value: int, raw: Any) -> int:
        if raw is not np.bool_:
            value %= 1 << (8 * np.dtype(raw).itemsize)
        if (raw, value) not in self._constants:
            self._constants[raw, value] = self._new(raw(value))
        return self._constants[raw, value]

    def _special(self, name: str) -> int:
        if name not in self.special:
            self.special[name] = self._new(np.uint32(0))
        return self.special[name]

    def _negated(self, source: int) -> int:
        slot = self._new(np.False_)
        self._before.append(lambda m: m.put(slot, ~m.r[source]))
        return slot

    def _new(self, value: Any) -> int:
        self.initial.append(value)
        return len(self.initial) - 1

    # --- the program ---

    def program(self) -> Program:
        """All steps, blocks in the order of `flow`, labels resolved."""
        ranges, following = flow.blocks(self.body)
        sequence = flow.order(following)
        self._watched = assigned.watched(self.body, ranges, following)
        steps: list[Any] = []
        origin: list[Instruction | None] = []
        positions: dict[int, int] = {}
        jumps: list[tuple[int, Instruction | None, list[int]]] = []

        def emit(step: Any, instruction: Instruction | None) -> None:
            steps.append(step)
            origin.append(instruction)

        for i, block in enumerate(sequence):
            start, end = ranges[block]
            positions[start] = len(steps)
            for index in range(start, end):
                instruction = self.body.instructions[index]
                self._watch_guard(instruction)
                step = None if flow.is_branch(instruction) else self._step(instruction)
                for before in self._before:
                    emit(before, instruction)
                self._before.clear()
                if step is None:
                    jumps.append(
                        (len(steps), instruction, flow.destinations(self.body, instruction))
                    )
                emit(step, instruction)
            last = self.body.instructions[end - 1]
            follows = sequence[i + 1] if i + 1 < len(sequence) else None
            if flow.falls_through(last) and (follows is None or ranges[follows][0] != end):
                jumps.append((len(steps), None, [end]))
                emit(None, None)
        past = len(steps)
        emit(Halt(), None)
        for position, branch, targets in jumps:
            places = [positions.get(t, past) for t in targets]
            steps[position] = self._jump(branch, places)
        return Program(self.name, steps, origin, _control_after(steps))

    def _jump(self, instruction: Instruction | None, places: list[int]) -> Jump:
        if instruction is None or (instruction.op[0] == "bra" and not instruction.guard):
            return Jump(lambda m, at: places[0])
        if instruction.op[0] == "brx":
            if instruction.guard:
                raise Unsupported(f"{self.name}: {instruction.text}")
            table = np.array(places)
            index = self.slot(instruction.operands[0], "u32")
            return Jump(lambda m, at: m.scatter(table, m.active(index)))
        assert instruction.guard is not None
        (guard, negated), there = instruction.guard, places[0]
        slot = guard.slot

        def branch(m: Machine, at: int) -> int | None:
            taken = m.r[slot]
            return m.split(~taken if negated else taken, there, at + 1)

        return Jump(branch)

    def _step(self, instruction: Instruction) -> Step | Jump:
        """The step of anything but a branch."""
        try:
            return self._control(instruction) or self._guarded(instruction)
        except Unsupported as error:
            raise Unsupported(f"{self.name}: {instruction.text}: {error}") from error

    def _control(self, instruction: Instruction) -> Jump | None:
        name = instruction.op[0]
        if name in ("ret", "exit"):
            return self._exit(instruction)
        if name in ("bar", "barrier") and "warp" not in instruction.op:
            if instruction.guard:
                raise Unsupported("guarded barrier")
            return Jump(warps.barrier(self, instruction))
        return None

    def _guarded(self, instruction: Instruction) -> Step:
        step = assigned.watching(self._plain(instruction), instruction, self._watched)
        if instruction.guard is None:
            return step
        guard, negated = instruction.guard
        slot = guard.slot
        return lambda m: m.under(slot, negated, step)

    def _watch_guard(self, instruction: Instruction) -> None:
        if instruction.guard and instruction.guard[0].slot in self._watched:
            slot = instruction.guard[0].slot
            self._before.append(lambda m: assigned.require_written(m, instruction, slot))

    def _exit(self, instruction: Instruction) -> Jump:
        if instruction.guard is None:
            return Halt()
        guard, negated = instruction.guard
        slot = guard.slot

        def leave(m: Machine, at: int) -> int | None:
            gone = ~m.r[slot] if negated else m.r[slot]
            return m.leave(gone, at + 1)

        return Jump(leave)

    def _plain(self, instruction: Instruction) -> Step:
        name = instruction.op[0]
        if name in NOTHING or (name == "st" and instruction.op[1] == "param"):
            return lambda m: None
        for table in (access.STEPS, hints.STEPS, dependents.STEPS, warps.STEPS, STEPS):
            if name in table:
                return hints.hinted(self, instruction, table[name])
        return _general(self, instruction)


class Jump:
    """A control step: gives the position where all active lanes go on, or None."""

    __slots__ = ("run",)

    def __init__(self, run: Control) -> None:
        self.run = run

    def __call__(self, machine: Machine, at: int) -> int | None:
        return self.run(machine, at)


class Halt(Jump):
    """The active lanes exit."""

    def __init__(self) -> None:
        super().__init__(lambda m, at: DONE)


def _control_after(steps: list[Any]) -> list[int]:
    following, out = len(steps), []
    for position in range(len(steps) - 1, -1, -1):
        if isinstance(steps[position], Jump):
            following = position
        out.append(following)
    return out[::-1]


# --- instructions that compute ---


def compute(function: integers.Function, out: int, slots: Sequence[int]) -> Step:
    """Write a function of some slots to another."""
    where = np.where
    if len(slots) == 1:
        (a,) = slots

        def one(m: Machine) -> None:
            value = function(m.r[a])
            m.r[out] = value if not m.partial else where(m.mask, value, m.r[out])

        return one
    if len(slots) == 2:
        a, b = slots

        def two(m: Machine) -> None:
            value = function(m.r[a], m.r[b])
            m.r[out] = value if not m.partial else where(m.mask, value, m.r[out])

        return two
    if len(slots) == 3:
        a, b, c = slots

        def three(m: Machine) -> None:
            value = function(m.r[a], m.r[b], m.r[c])
            m.r[out] = value if not m.partial else where(m.mask, value, m.r[out])

        return three
    return lambda m: m.put(out, function(*[m.r[s] for s in slots]))


def destination(operand: Operand) -> Register:
    if not isinstance(operand, Register):
        raise Unsupported(f"result {operand}")
    return operand


U32_AFTER = {"shl": 1, "shr": 1, "bfe": 1, "bfi": 2}
"""From which source on the operands are u32 in place of the instruction's type."""


def _general(t: Translator, instruction: Instruction) -> Step:
    """Instructions whose sources and result have the type that ends the name."""
    name, *mods = instruction.op
    if not mods:
        raise Unsupported("unknown instruction")
    type_name = mods[-1]
    module = floats if type_name in FLOAT_TYPES else integers
    function = module.operation(name, tuple(mods), type_name)
    if function is None:
        raise Unsupported("unknown instruction")
    out, *sources = instruction.operands
    types = [type_name] * len(sources)
    if name in U32_AFTER:
        types[U32_AFTER[name] :] = ["u32"] * (len(sources) - U32_AFTER[name])
    if name == "mad" and "wide" in mods:
        types[2] = type_name[0] + str(16 * width(type_name))
    slots = [t.slot(s, k) for s, k in zip(sources, types, strict=True)]
    return compute(function, destination(out).slot, slots)


def _mov(t: Translator, instruction: Instruction) -> Step:
    out, source = instruction.operands
    type_name = instruction.op[-1]
    if isinstance(source, Vector):
        return _pack(t, destination(out), source, type_name)
    if isinstance(out, Vector):
        return _unpack(t, out, t.slot(source, type_name), type_name)
    return compute(lambda a: a, destination(out).slot, [t.slot(source, type_name)])


def _part_type(vector: Vector, type_name: str) -> tuple[str, Any, Any]:
    bits = 8 * width(type_name) // len(vector.items)
    return f"b{bits}", raw_type(type_name), np.arange(len(vector.items)) * bits


def _pack(t: Translator, out: Register, source: Vector, type_name: str) -> Step:
    part, raw, shifts = _part_type(source, type_name)
    slots = [t.slot(item, part) for item in source.items]

    def function(*parts: Any) -> Any:
        value = parts[0].astype(raw)
        for p, shift in zip(parts[1:], shifts[1:], strict=True):
            value = value | p.astype(raw) << raw(shift)
        return value

    return compute(function, out.slot, slots)


def _unpack(t: Translator, out: Vector, slot: int, type_name: str) -> Step:
    part, raw, shifts = _part_type(out, type_name)
    dtype = raw_type(part)
    parts = [
        (destination(item).slot, raw(shift))
        for item, shift in zip(out.items, shifts, strict=True)
        if item is not None
    ]

    def step(m: Machine) -> None:
        value = m.r[slot]
        for target, shift in parts:
            m.put(target, (value >> shift).astype(dtype))

    return step


def _cvt(t: Translator, instruction: Instruction) -> Step:
    mods = instruction.op[1:]
    out, *sources = instruction.operands
    register = destination(out)
    if mods[0] == "pack":
        types = ["s32", "s32", "b32"]
        slots = [t.slot(s, k) for s, k in zip(sources, types, strict=False)]
        return compute(convert.pack(mods), register.slot, slots)
    function, to, source = convert.conversion(mods)
    slots = [t.slot(s, source) for s in sources]
    raw = raw_type(register.type)
    if raw == raw_type(to):
        return compute(function, register.slot, slots)
    dtype = integers.numpy_type(to)
    return compute(lambda *v: function(*v).view(dtype).astype(raw), register.slot, slots)


def _cvta(t: Translator, instruction: Instruction) -> Step:
    space = access.space_of(instruction.op)
    if space not in access.WINDOWS:
        raise Unsupported("state space")
    base = np.uint64(access.WINDOWS[space])
    function = (lambda a: a - base) if "to" in instruction.op else (lambda a: a + base)
    out, source = instruction.operands
    return compute(function, destination(out).slot, [t.slot(source, "u64")])


def _comparison(mods: tuple[str, ...], type_name: str) -> integers.Function:
    if type_name in FLOAT_TYPES:
        return floats.compare(mods[0], type_name, "ftz" in mods)
    return integers.compare(mods[0], type_name)


COMBINE: dict[str, Callable[..., Any]] = {
    "and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor,
}  # fmt: skip


def _setp(t: Translator, instruction: Instruction) -> Step:
    mods, type_name = instruction.op[1:], instruction.op[-1]
    function = _comparison(mods, type_name)
    out, a, b, *rest = instruction.operands
    slots = [t.slot(a, type_name), t.slot(b, type_name)]
    combine = COMBINE[mods[1]] if rest else None
    if combine is None and isinstance(out, Register):
        return compute(function, out.slot, slots)
    first, second = (out.first, out.second) if isinstance(out, Pair) else (out, None)
    third = t.slot(rest[0], "pred") if rest else None

    def step(m: Machine) -> None:
        holds = function(*[m.r[s] for s in slots])
        other = ~holds
        if third is not None and combine is not None:
            holds, other = combine(holds, m.r[third]), combine(other, m.r[third])
        if first is not None:
            m.put(first.slot, holds)  # type: ignore[union-attr]
        if second is not None:
            m.put(second.slot, other)

    return step


def _set(t: Translator, instruction: Instruction) -> Step:
    mods, (to, type_name) = instruction.op[1:-2], instruction.op[-2:]
    function = _comparison(mods, type_name)
    true = np.uint32(0x3F800000 if to == "f32" else 0xFFFFFFFF)
    out, a, b = instruction.operands
    return compute(
        lambda x, y: np.where(function(x, y), true, np.uint32(0)),
        destination(out).slot,
        [t.slot(a, type_name), t.slot(b, type_name)],
    )


def _selp(t: Translator, instruction: Instruction) -> Step:
    type_name = instruction.op[-1]
    out, a, b, p = instruction.operands
    slots = [t.slot(p, "pred"), t.slot(a, type_name), t.slot(b, type_name)]
    return compute(np.where, destination(out).slot, slots)


def _shf(t: Translator, instruction: Instruction) -> Step:
    out, *sources = instruction.operands
    function = integers.funnel("l" in instruction.op, "clamp" in instruction.op)
    return compute(function, destination(out).slot, [t.slot(s, "u32") for s in sources])


def _lop3(t: Translator, instruction: Instruction) -> Step:
    out, *sources, table = instruction.operands
    if not isinstance(table, Number) or len(sources) != 3:
        raise Unsupported("lop3 without a constant table")
    function = integers.lop3(table.value)
    return compute(function, destination(out).slot, [t.slot(s, "b32") for s in sources])


def _prmt(t: Translator, instruction: Instruction) -> Step:
    if instruction.op != ("prmt", "b32"):
        raise Unsupported("prmt mode")
    out, a, b, selector = instruction.operands
    slots = [t.slot(a, "b32"), t.slot(b, "b32")]
    if isinstance(selector, Number) and selector.value & 0x8888 == 0:
        return compute(integers.prmt_constant(selector.value), destination(out).slot, slots)
    return compute(integers.prmt, destination(out).slot, [*slots, t.slot(selector, "b32")])


def _dp4a(t: Translator, instruction: Instruction) -> Step:
    _, a_type, b_type = instruction.op
    out, *sources = instruction.operands
    function = integers.dot4(a_type, b_type)
    return compute(function, destination(out).slot, [t.slot(s, "b32") for s in sources])


def _trap(t: Translator, instruction: Instruction) -> Step:
    if instruction.op[0] == "call" and "__assertfail" not in instruction.text:
        raise Unsupported("call")

    def step(m: Machine) -> None:
        raise m.fault(instruction, Trap, 0, "the kernel stopped itself")

    return step


STEPS: dict[str, Callable[[Translator, Instruction], Step]] = {
    "mov": _mov, "cvt": _cvt, "cvta": _cvta, "setp": _setp, "set": _set, "selp": _selp,
    "shf": _shf, "lop3": _lop3, "prmt": _prmt, "dp4a": _dp4a, "trap": _trap, "call": _trap,
}  # fmt: skip
