"""Instructions of a whole warp, CTA or cluster: barriers, shuffles, votes, ldmatrix and mma."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from . import mma
from .faults import Divergence, Unsupported
from .machine import Control, Machine, Step
from .parse import Instruction, Number, Operand, Pair, Register, Vector

if TYPE_CHECKING:
    from .translate import Translator


def barrier(t: Translator, instruction: Instruction) -> Control:
    """barrier.cluster; bar.sync and barrier.sync, with a number and perhaps a count of threads."""
    if instruction.op[1] == "cluster":
        return _cluster_barrier(instruction)
    if "sync" not in instruction.op:
        raise Unsupported("barrier")
    number, *threads = instruction.operands
    slot = t.slot(number, "u32")
    count = t.slot(threads[0] if threads else Number(0), "u32")

    def control(m: Machine, at: int) -> int | None:
        numbers, counts = m.active(slot).astype(np.int64), m.active(count).astype(np.int64)
        return m.wait(instruction, numbers, counts, at + 1)

    return control


def _cluster_barrier(instruction: Instruction) -> Control:
    action, *how = instruction.op[2:]
    if action == "arrive" and set(how) <= {"release", "relaxed", "aligned"}:
        release = "relaxed" not in how
        return lambda m, at: m.meeting.arrive(m, instruction, release, at + 1)
    if action == "wait" and set(how) <= {"acquire", "aligned"}:
        return lambda m, at: m.meeting.wait(m, instruction, at + 1)
    raise Unsupported("barrier")


def _bar_warp(t: Translator, instruction: Instruction) -> Step:
    if instruction.op != ("bar", "warp", "sync"):
        raise Unsupported("barrier")
    members = t.slot(instruction.operands[0], "b32")

    def step(m: Machine) -> None:
        m.require_warps(instruction, m.whole(members))
        count = np.bincount(m.warp[m.index], minlength=m.ctas * m.warps)
        m.clocks.step(np.flatnonzero(count == m.warp_threads))

    return step


# --- values of other lanes ---


def _source_lane(mode: str, lane: np.ndarray, b: np.ndarray, c: np.ndarray) -> tuple[Any, Any]:
    """The lane that a shuffle reads, and whether it is in range."""
    segment, clamp, b = c >> 8 & 31, c & 31, b & 31
    last = (lane & segment) | (clamp & ~segment)
    if mode == "up":
        source = lane - b
        return source, source >= last
    if mode == "down":
        source = lane + b
    elif mode == "bfly":
        source = lane ^ b
    else:
        source = (lane & segment) | (b & ~segment)
    return source, source <= last


def _shfl(t: Translator, instruction: Instruction) -> Step:
    if instruction.op[1] != "sync":
        raise Unsupported("shuffle")
    mode = instruction.op[2]
    out, *sources = instruction.operands
    value, by, clamp, members = [t.slot(s, "b32") for s in sources]
    first, second = (out.first, out.second) if isinstance(out, Pair) else (out, None)

    def step(m: Machine) -> None:
        m.require_warps(instruction, m.whole(members))
        lane = m.thread & 31
        b, c = m.whole(by).astype(np.int64), m.whole(clamp).astype(np.int64)
        source, inside = _source_lane(mode, lane, b, c)
        place = m.all - lane + np.where(inside, source, lane)
        if m.mask is not None:
            bad = ~m.mask[place[m.index]]
            if bad.any():
                raise m.fault(instruction, Divergence, int(np.argmax(bad)), "reads a lane apart")
        if isinstance(first, Register):
            m.put(first.slot, m.whole(value)[place])
        if second is not None:
            m.put(second.slot, inside)

    return step


def _ballot(m: Machine, holds: np.ndarray) -> np.ndarray:
    """For each lane the lanes of its warp where a predicate holds, ``uint32``."""
    return np.packbits(holds, bitorder="little").view("<u4")[m.warp]


def _vote(t: Translator, instruction: Instruction) -> Step:
    if instruction.op[1] != "sync":
        raise Unsupported("vote")
    mode = instruction.op[2]
    out, source, mask = instruction.operands
    predicate, members = t.slot(source, "pred"), t.slot(mask, "b32")
    assert isinstance(out, Register)
    target = out.slot

    def step(m: Machine) -> None:
        needed = m.whole(members)
        m.require_warps(instruction, needed)
        holds = m.whole(predicate)
        bits = _ballot(m, holds if m.mask is None else holds & m.mask) & needed
        m.put(target, results[mode](bits, needed))

    results: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
        "ballot": lambda bits, needed: bits,
        "any": lambda bits, needed: bits != 0,
        "all": lambda bits, needed: bits == needed,
        "uni": lambda bits, needed: (bits == 0) | (bits == needed),
    }
    if mode not in results:
        raise Unsupported("vote")
    return step


REDUCE = {
    "add": np.add, "min": np.minimum, "max": np.maximum,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
}  # fmt: skip


def _redux(t: Translator, instruction: Instruction) -> Step:
    _, sync, name, type_name = instruction.op
    if sync != "sync" or name not in REDUCE or type_name not in ("u32", "s32", "b32"):
        raise Unsupported("redux")
    function = REDUCE[name]
    dtype: Any = np.int32 if type_name == "s32" else np.uint32
    out, source, mask = instruction.operands
    slot, members = t.slot(source, "b32"), t.slot(mask, "b32")
    assert isinstance(out, Register)
    target = out.slot

    def step(m: Machine) -> None:
        needed = m.whole(members)
        m.require_warps(instruction, needed)
        values = m.whole(slot).view(dtype)
        result = np.zeros(m.lanes, dtype)
        lane = (m.thread & 31).astype(np.uint32)
        for group in np.unique(needed[m.index]):
            inside = (group >> lane & np.uint32(1)).astype(bool).reshape(-1, 32)
            total = _reduce(function, values.reshape(-1, 32), inside)
            result = np.where(needed == group, total[m.warp], result)
        m.put(target, result.view(np.uint32))

    return step


def _reduce(function: np.ufunc, values: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Over the lanes inside, the same ones in each warp."""
    return function.reduce(values[:, inside[0]], axis=1, dtype=values.dtype)


def _activemask(t: Translator, instruction: Instruction) -> Step:
    (out,) = instruction.operands
    assert isinstance(out, Register)
    target = out.slot

    def step(m: Machine) -> None:
        active = np.ones(m.lanes, bool) if m.mask is None else m.mask
        m.put(target, _ballot(m, active))

    return step


# --- matrices ---


def _registers(operand: Operand) -> list[int]:
    items = operand.items if isinstance(operand, Vector) else (operand,)
    if not all(isinstance(item, Register) for item in items):
        raise Unsupported(f"operand {operand}")
    return [item.slot for item in items if isinstance(item, Register)]


def _ldmatrix(t: Translator, instruction: Instruction) -> Step:
    op = instruction.op
    count = next((int(m[1]) for m in op if m in ("x1", "x2", "x4")), 0)
    if "m8n8" not in op or not count or op[-1] != "b16":
        raise Unsupported("ldmatrix")
    out, source = instruction.operands
    targets = _registers(out)
    slot, offset = t.address(source)
    transposed = "trans" in op

    def step(m: Machine) -> None:
        m.require_warps(instruction)
        pointing = np.flatnonzero((m.thread[m.index] & 31) < 8 * count)
        address = m.active(slot)[pointing].astype(np.int64) + offset
        access = m.access(instruction).take(pointing)
        rows = m.shared.load(access, address, 4, 4, collective=True)
        matrices = rows.reshape(-1, count, 8, 4)
        if transposed:
            halves = matrices.view(np.uint16).swapaxes(2, 3)
            matrices = np.ascontiguousarray(halves).view(np.uint32)
        for j, target in enumerate(targets):
            m.put_active(target, matrices[:, j].reshape(-1))

    return step


def _mma(t: Translator, instruction: Instruction) -> Step:
    if "sync" not in instruction.op:
        raise Unsupported("mma")
    function, a_count, b_count = mma.function(instruction.op)
    out, a, b = (_registers(o) for o in instruction.operands[:3])
    constants = instruction.operands[3]
    items = constants.items if isinstance(constants, Vector) else (constants,)
    c = [t.slot(item, "b32") for item in items]
    if (len(out), len(a), len(b), len(c)) != (4, a_count, b_count, 4):
        raise Unsupported("number of registers")

    def step(m: Machine) -> None:
        m.require_warps(instruction)
        result = function(*[[m.whole(s) for s in slots] for slots in (a, b, c)])
        for target, value in zip(out, result, strict=True):
            m.put(target, value)

    return step


STEPS: dict[str, Callable[[Translator, Instruction], Step]] = {
    "bar": _bar_warp, "shfl": _shfl, "vote": _vote, "redux": _redux, "activemask": _activemask,
    "ldmatrix": _ldmatrix, "mma": _mma,
}  # fmt: skip
