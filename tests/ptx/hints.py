"""Cache hints: policies made by createpolicy, and whether those that accesses take are such."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from .faults import BadPolicy, Unsupported
from .machine import Machine, Step
from .parse import Decimal, Instruction, Number, Operand, Register

if TYPE_CHECKING:
    from .translate import Translator

FIRST = ("L2__evict_last", "L2__evict_normal", "L2__evict_first", "L2__evict_unchanged")
SECOND = ("L2__evict_first", "L2__evict_unchanged")
POLICY = np.uint64(0x9017C000_00000000)
"""What registers with a policy hold; its bits mean nothing."""


def _createpolicy(t: Translator, instruction: Instruction) -> Step:
    """createpolicy.fractional, for all addresses or a share of them."""
    kind, first, *second, type_name = instruction.op[1:]
    if (kind, type_name) != ("fractional", "b64") or first not in FIRST:
        raise Unsupported("policy")
    if second and (len(second) > 1 or second[0] not in SECOND):
        raise Unsupported("secondary priority")
    out, *share = instruction.operands
    if not isinstance(out, Register):
        raise Unsupported(f"result {out}")
    target, source = out.slot, t.slot(_float(share[0] if share else Decimal(1.0)), "f32")

    def step(m: Machine) -> None:
        part = m.active(source).view(np.float32)
        m.access(instruction).require(
            (part > 0) & (part <= 1), BadPolicy, lambda i: f"for {part[i]} of the addresses"
        )
        m.put(target, POLICY)

    return step


def _float(operand: Operand) -> Operand:
    """A decimal as the bits of a float."""
    if isinstance(operand, Decimal):
        return Number(int(np.float32(operand.value).view(np.uint32)))
    return operand


def hinted(
    t: Translator,
    instruction: Instruction,
    translate: Callable[[Translator, Instruction], Step],
) -> Step:
    """The step of an access whose last operand is a policy, if its name says so."""
    if "L2__cache_hint" not in instruction.op:
        return translate(t, instruction)
    *operands, policy = instruction.operands
    step, slot = translate(t, replace(instruction, operands=tuple(operands))), t.slot(policy, "b64")

    def checked(m: Machine) -> None:
        values = m.active(slot)
        m.access(instruction).require(
            values == POLICY, BadPolicy, lambda i: f"{values[i]:#x} is no policy"
        )
        step(m)

    return checked


STEPS: dict[str, Callable[[Translator, Instruction], Step]] = {"createpolicy": _createpolicy}
