"""Programmatic dependent launches: what they must not touch before griddepcontrol.wait."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .faults import DependencyHazard, Unsupported

if TYPE_CHECKING:
    from .machine import Machine, Step
    from .memory import Access
    from .parse import Instruction
    from .translate import Translator

READ, WROTE = 1, 2


class Touched:
    """Which global bytes this launch has read and written, and those before it that may still run.

    A dependent launch may start before the one before it has ended. That one has waited for those
    before it; but if it let dependents start first, these may still run as well.
    """

    def __init__(self) -> None:
        self._now = self._before = np.zeros(0, np.uint8)
        self.waited, self.let_start_early = True, False

    def launch(self, size: int, dependent: bool) -> None:
        """A launch starts, with global memory of so many bytes."""
        before = _resized(self._now, size) if dependent else np.zeros(size, np.uint8)
        if dependent and self.let_start_early:
            before |= _resized(self._before, size)
        self._before, self._now = before, np.zeros(size, np.uint8)
        self.waited, self.let_start_early = not dependent, False

    def end(self, name: str) -> None:
        """The launch ends: raise if no thread has waited."""
        if not self.waited:
            raise DependencyHazard(
                f"{name}: no thread of a dependent launch executed griddepcontrol.wait: "
                "what comes after it is not ordered after what came before it"
            )

    def note(
        self,
        access: Access,
        rows: np.ndarray,
        size: int,
        kind: int,
        where: Callable[[int], str],
    ) -> None:
        """Accesses of `size` bytes at ``rows * size``: raise if they come too early.

        kind: READ or WROTE; where: says in words where the bytes of a lane are.
        """
        if access.early is not None and access.early.any():
            before = np.bitwise_or.reduce(self._before.reshape(-1, size)[rows], axis=1)
            conflict = before & (WROTE if kind == READ else READ | WROTE)
            access.require(
                ~access.early | (conflict == 0),
                DependencyHazard,
                lambda i: (
                    f"{'reads' if kind == READ else 'writes'} {where(i)} before "
                    "griddepcontrol.wait; a launch before "
                    f"{'wrote' if conflict[i] & WROTE else 'read'} it"
                ),
            )
        self._now.reshape(-1, size)[rows] |= kind


def _resized(touched: np.ndarray, size: int) -> np.ndarray:
    """A copy with nothing touched in what is new."""
    out = np.zeros(size, np.uint8)
    out[: len(touched)] = touched
    return out


def _griddepcontrol(t: Translator, instruction: Instruction) -> Step:
    if instruction.op == ("griddepcontrol", "wait"):
        return _wait
    if instruction.op == ("griddepcontrol", "launch_dependents"):
        return _launch_dependents
    raise Unsupported("griddepcontrol")


def _wait(m: Machine) -> None:
    if m.early is not None:
        m.early[m.index] = False
        m.memory.touched.waited = True


def _launch_dependents(m: Machine) -> None:
    if m.early is not None and m.early[m.index].any():
        m.memory.touched.let_start_early = True


STEPS: dict[str, Callable[[Translator, Instruction], Step]] = {"griddepcontrol": _griddepcontrol}
