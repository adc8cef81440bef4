"""Loads, stores, atomics and asynchronous copies, and addresses in other CTAs of a cluster."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from . import floats, integers
from .clusters import RANK
from .faults import Misaligned, OutOfBounds, Unsupported
from .machine import Machine, Step
from .memory import Access
from .parse import RAW, Address, Instruction, Number, Operand, Register, Symbol, Vector, width

if TYPE_CHECKING:
    from .translate import Translator

GENERIC = {"global": 0, "shared__cluster": 1 << 40, "local": 2 << 40, "param": 3 << 40}
"""Where generic addresses of each space begin; global memory's own begin far above."""
WINDOWS = {**GENERIC, "const": GENERIC["global"], "shared": GENERIC["shared__cluster"]}


def space_of(op: tuple[str, ...]) -> str:
    """The state space that an instruction names."""
    parts = [part.removesuffix("__cta") for part in op]
    return next((p for p in parts if p in WINDOWS), "generic")


def _load(
    m: Machine, access: Access, space: str, address: np.ndarray, unit: int, count: int
) -> np.ndarray:
    if space == "generic":
        return _in_windows(
            access,
            address,
            lambda who, name, where, _: _load(m, who, name, where, unit, count),
            np.empty((len(address), count), RAW[unit]),
        )
    if space == "shared":
        return m.shared.load(access, address, unit, count)
    if space == "shared__cluster":
        return m.shared.load(*m.peers.resolve(access, address), unit, count)
    if space == "local":
        return m.local.load(access, address, unit, count)
    if space == "param":
        return m.parameters.load(access, address, unit, count)
    return m.memory.load(access, address, unit, count)


def _store(
    m: Machine, access: Access, space: str, address: np.ndarray, unit: int, values: np.ndarray
) -> None:
    if space == "generic":

        def part(who: Access, name: str, where: np.ndarray, lanes: np.ndarray) -> None:
            _store(m, who, name, where, unit, values[lanes])

        _in_windows(access, address, part, None)
    elif space == "shared":
        m.shared.store(access, address, unit, values)
    elif space == "shared__cluster":
        m.shared.store(*m.peers.resolve(access, address), unit, values)
    elif space == "local":
        m.local.store(access, address, unit, values)
    elif space == "global":
        m.memory.store(access, address, unit, values)
    else:
        raise access.fail(OutOfBounds, 0, f"store to {space} memory")


def _in_windows(
    access: Access, address: np.ndarray, part: Callable[..., Any], out: np.ndarray | None
) -> Any:
    """Do `part` for the lanes whose generic addresses lie in each space."""
    window = address >> 40
    for name, base in GENERIC.items():
        in_space = (window > 3) | (window < 1) if base == 0 else window == base >> 40
        lanes = np.flatnonzero(in_space)
        if lanes.size:
            values = part(access.take(lanes), name, address[lanes] - base, lanes)
            if out is not None:
                out[lanes] = values
    return out


def _vector(operand: Operand) -> tuple[Operand, ...]:
    return operand.items if isinstance(operand, Vector) else (operand,)


def _addresses(m: Machine, slot: int, offset: int) -> np.ndarray:
    return m.active(slot).astype(np.int64) + offset


def _ld(t: Translator, instruction: Instruction) -> Step:
    space, type_name = space_of(instruction.op), instruction.op[-1]
    out, source = instruction.operands[:2]
    registers = _vector(out)
    unit, count = width(type_name), len(registers)
    converts = [_extend(r, type_name) for r in registers]
    if space == "param" and isinstance(source, Address) and isinstance(source.base, Symbol):
        return _ld_parameter(t, instruction, source, converts, unit)
    slot, offset = t.address(source)

    def step(m: Machine) -> None:
        address = _addresses(m, slot, offset)
        values = _load(m, m.access(instruction), space, address, unit, count)
        for j, (target, convert) in enumerate(converts):
            if target >= 0:
                m.put_active(target, convert(np.ascontiguousarray(values[:, j])))

    return step


def _ld_parameter(
    t: Translator,
    instruction: Instruction,
    source: Address,
    converts: list[tuple[int, integers.Function]],
    unit: int,
) -> Step:
    """The address is known, and all lanes get the same."""
    assert isinstance(source.base, Symbol)
    if source.base.name not in t.symbols:
        raise Unsupported(f"parameter {source.base.name}")
    start = t.symbols[source.base.name] + source.offset
    size = unit * len(converts)

    def step(m: Machine) -> None:
        parameters = m.parameters
        if not 0 <= start <= parameters.size - size:
            what = f"offset {start} of {parameters.size} bytes of parameters"
            raise m.fault(instruction, OutOfBounds, 0, what)
        if start % size:
            raise m.fault(instruction, Misaligned, 0, f"offset {start} is no multiple of {size}")
        values = parameters.data[start : start + size].view(RAW[unit])
        for value, (target, convert) in zip(values, converts, strict=True):
            m.put(target, convert(value))

    return step


def _extend(register: Operand, type_name: str) -> tuple[int, integers.Function]:
    """The slot that is loaded, and how a loaded value becomes one of the register's width."""
    if register is None:
        return -1, lambda v: v
    if not isinstance(register, Register):
        raise Unsupported(f"result {register}")
    raw = RAW[width(register.type)]
    if width(register.type) == width(type_name):
        return register.slot, lambda v: v
    dtype = integers.numpy_type(type_name if type_name[0] == "s" else "b" + type_name[1:])
    return register.slot, lambda v: v.view(dtype).astype(raw)


def _st(t: Translator, instruction: Instruction) -> Step:
    space, type_name = space_of(instruction.op), instruction.op[-1]
    target, source = instruction.operands[:2]
    slot, offset = t.address(target)
    unit = width(type_name)
    slots = [t.slot(item, type_name) for item in _vector(source)]
    raw = RAW[unit]

    def step(m: Machine) -> None:
        address = _addresses(m, slot, offset)
        values = np.stack([m.active(s).astype(raw) for s in slots], 1)
        _store(m, m.access(instruction), space, address, unit, values)

    return step


def _mapa(t: Translator, instruction: Instruction) -> Step:
    """The same place in the shared memory of another CTA of the cluster."""
    window = 0 if "shared__cluster" in instruction.op else WINDOWS["shared"]
    out, source, number = instruction.operands
    if not isinstance(out, Register):
        raise Unsupported(f"result {out}")
    target, raw = out.slot, RAW[width(instruction.op[-1])]
    slot, rank = t.slot(source, instruction.op[-1]), t.slot(number, "u32")

    def step(m: Machine) -> None:
        access = m.access(instruction)
        address, ranks = m.active(slot).astype(np.int64) - window, m.active(rank).astype(np.int64)
        size = m.launch.cluster_size
        access.require(
            ranks < size, OutOfBounds, lambda i: f"rank {ranks[i]} in a cluster of {size}"
        )
        access.require(
            (address >= 0) & (address >> RANK <= size),
            OutOfBounds,
            lambda i: f"{address[i] + window:#x} is no address of shared memory",
        )
        place = address & ((1 << RANK) - 1)
        m.put_active(target, (window + (ranks + 1 << RANK) + place).astype(raw))

    return step


# --- atomics ---


def _atomic_function(op: tuple[str, ...], type_name: str) -> Callable[..., Any]:
    """What becomes of old value and operands."""
    names = {"add", "min", "max", "exch", "cas", "and", "or", "xor", "inc", "dec"}
    name = next((m for m in op[1:] if m in names), "")
    if name == "exch":
        return lambda old, new: new
    if name == "cas":
        return lambda old, expected, new: np.where(old == expected, new, old)
    if name == "inc":
        return lambda old, top: np.where(old >= top, old.dtype.type(0), old + old.dtype.type(1))
    if name == "dec":
        return lambda old, top: np.where((old == 0) | (old > top), top, old - old.dtype.type(1))
    module = floats if "f" in type_name else integers
    function = module.operation(name, (), type_name)
    if function is None:
        raise Unsupported("atomic")
    return function


def _atom(t: Translator, instruction: Instruction) -> Step:
    """atom and red. Lanes with the same address take turns, in the order of lanes."""
    space, type_name = space_of(instruction.op), instruction.op[-1]
    returns = instruction.op[0] == "atom"
    out = instruction.operands[0] if returns else None
    target, *sources = instruction.operands[1:] if returns else instruction.operands
    function, unit = _atomic_function(instruction.op, type_name), width(type_name)
    slot, offset = t.address(target)
    slots = [t.slot(s, type_name) for s in sources]

    def step(m: Machine) -> None:
        address = _addresses(m, slot, offset)
        values = [m.active(s) for s in slots]
        access = m.access(instruction)
        where, base = _one_space(access, space, address)
        address = address - base
        if where == "shared__cluster":
            access, address = m.peers.resolve(access, address)
        old = _take_turns(m, access, where != "global", address, unit, function, values)
        if isinstance(out, Register):
            m.put_active(out.slot, old)

    return step


def _one_space(access: Access, space: str, address: np.ndarray) -> tuple[str, int]:
    if space != "generic":
        return space, 0
    shared = address >> 40 == WINDOWS["shared"] >> 40
    if shared.all():
        return "shared__cluster", WINDOWS["shared"]
    if shared.any():
        raise access.fail(OutOfBounds, 0, "lanes of an atomic in different memories")
    return "global", 0


def _take_turns(
    m: Machine,
    access: Access,
    shared: bool,
    address: np.ndarray,
    unit: int,
    function: Callable[..., Any],
    values: list[np.ndarray],
) -> np.ndarray:
    key = access.cta << 40 | address if shared else address
    _, place, count = np.unique(key, return_inverse=True, return_counts=True)
    first = np.argsort(place, kind="stable")
    turn = np.empty(len(key), np.int64)  # how many lanes come before at the same address
    turn[first] = np.arange(len(key)) - np.repeat(np.cumsum(count) - count, count)
    if shared:
        old = m.shared.load(access, address, unit, 1, atomic=True)[:, 0]
    else:
        old = m.memory.load(access, address, unit, 1)[:, 0]
    now = np.empty(len(count), RAW[unit])
    now[place] = old
    for i in range(int(count.max())):
        lanes = np.flatnonzero(turn == i)
        old[lanes] = now[place[lanes]]
        now[place[lanes]] = function(old[lanes], *[v[lanes] for v in values])
    memory = m.shared if shared else m.memory
    memory.store(access, address, unit, now[place][:, None], atomic=True)
    return old


# --- asynchronous copies ---


def _cp(t: Translator, instruction: Instruction) -> Step:
    kind = instruction.op[2] if len(instruction.op) > 2 else ""
    if instruction.op[:2] != ("cp", "async"):
        raise Unsupported("cp other than cp.async")
    if kind == "commit_group":
        return lambda m: m.copies.commit(m.index)
    if kind in ("wait_group", "wait_all"):
        return _wait(instruction, kind)
    if kind not in ("ca", "cg"):
        raise Unsupported(f"cp.async.{kind}")
    return _copy(t, instruction)


def _wait(instruction: Instruction, kind: str) -> Step:
    pending: int | None = None
    if kind == "wait_group":
        (number,) = instruction.operands
        if not isinstance(number, Number):
            raise Unsupported("wait_group of a register")
        pending = number.value

    def step(m: Machine) -> None:
        active = m.mask if m.mask is not None else np.ones(m.lanes, bool)
        for lanes, grains in m.copies.landed(active, pending):
            m.shared.land(m.clocks.own(m.warp[lanes]), grains)

    return step


def _copy(t: Translator, instruction: Instruction) -> Step:
    target, source, number, *rest = instruction.operands
    if not isinstance(number, Number) or number.value not in (4, 8, 16):
        raise Unsupported("cp.async of other than 4, 8 or 16 bytes")
    size = number.value
    (to, to_offset), (start, start_offset) = t.address(target), t.address(source)
    length, ignored = None, None
    for operand in rest:
        if isinstance(operand, Register) and operand.type == "pred":
            ignored = operand.slot
        else:
            length = t.slot(operand, "u32")

    def step(m: Machine) -> None:
        access = m.access(instruction)
        count = np.full(m.count, size) if length is None else m.active(length).astype(np.int64)
        if ignored is not None:
            count = np.where(m.active(ignored), 0, count)
        access.require(
            count <= size, OutOfBounds, lambda i: f"source of {count[i]} bytes, copy of {size}"
        )
        values = _read_part(m, access, _addresses(m, start, start_offset), size, count)
        grains = m.shared.copy(access, _addresses(m, to, to_offset), values)
        m.copies.add(m.index, grains)

    return step


def _read_part(
    m: Machine, access: Access, address: np.ndarray, size: int, count: np.ndarray
) -> np.ndarray:
    """The first `count` bytes at each address and zeros after them, ``uint32[n, size / 4]``."""
    access.require(
        address % size == 0, Misaligned, lambda i: f"address {address[i]:#x}, copy of {size}"
    )
    if (count == size).all():
        return m.memory.load(access, address, 4, size // 4)
    data = np.zeros((len(address), size), np.uint8)
    whole = np.flatnonzero(count == size)
    if whole.size:
        loaded = m.memory.load(access.take(whole), address[whole], 4, size // 4)
        data[whole] = loaded.view(np.uint8)
    for byte in range(size):
        part = np.flatnonzero((count > byte) & (count < size))
        if part.size:
            loaded = m.memory.load(access.take(part), address[part] + byte, 1, 1)
            data[part, byte] = loaded[:, 0]
    return data.view(np.uint32)


def smallest_shared(instructions: list[Instruction]) -> int:
    """Bytes of the smallest access to shared memory, at most 4: what hazards are tracked by."""
    sizes = [
        width(i.op[-1])
        for i in instructions
        if i.op[0] in ("ld", "st", "atom", "red")
        and space_of(i.op) in ("shared", "shared__cluster", "generic")
    ]
    return min([4, *sizes])


STEPS: dict[str, Callable[[Translator, Instruction], Step]] = {
    "ld": _ld, "ldu": _ld, "st": _st, "mapa": _mapa, "atom": _atom, "red": _atom,
    "cp": _cp,
}  # fmt: skip
