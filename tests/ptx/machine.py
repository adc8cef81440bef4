"""A batch of CTAs in lockstep: registers, which lanes run, barriers.

A lane is a thread of one of the CTAs; each CTA has a whole number of warps, the lanes past its
last thread never run. A register holds an array over all lanes, or a scalar where all lanes
agree. These values are never changed in place. Of the lanes that can run, those at the lowest
position run together (`flow` says why).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from . import clusters
from .faults import Deadlock, Divergence, Fault, StepLimit
from .memory import Access, Clocks, Local, Memory, Parameters, Shared
from .parse import Instruction

DONE, WAITING = 2**31 - 1, 2**31 - 2
"""Positions of lanes that have exited, and of those at a barrier."""
PATIENCE = 64
"""Jumps after which other warps have a turn, so that none spins forever for one that can't run."""

Step = Callable[["Machine"], None]
Control = Callable[["Machine", int], "int | None"]


@dataclass(slots=True)
class Program:
    """Steps by position. At a control position the step decides where lanes go on."""

    name: str
    steps: list[Any]
    instructions: list[Instruction | None]
    control_after: list[int]  # the first control position from each position on


@dataclass(frozen=True, slots=True)
class Launch:
    """What all batches of a launch share."""

    program: Program
    memory: Memory
    parameters: Parameters
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    cluster: tuple[int, int, int]
    dependent: bool
    shared_size: int
    local_size: int
    grain: int
    step_limit: int

    @property
    def cluster_size(self) -> int:
        return int(np.prod(self.cluster))

    @property
    def clusters(self) -> tuple[int, ...]:
        """The grid, counted in clusters."""
        return tuple(g // c for g, c in zip(self.grid, self.cluster, strict=True))

    def ctaid(self, cta: Any) -> list[Any]:
        """Where in the grid a CTA is, by its number: those of a cluster come one after another."""
        size = self.cluster_size
        outer, inner = _split(cta // size, self.clusters), _split(cta % size, self.cluster)
        return [o * c + i for o, i, c in zip(outer, inner, self.cluster, strict=True)]


def _split(index: Any, sizes: Sequence[int]) -> tuple[Any, Any, Any]:
    """Coordinates x, y and z of an index, x the fastest."""
    x, y, _ = sizes
    return index % x, index // x % y, index // (x * y)


class Machine:
    """The CTAs ``first ... first + count - 1`` of a launch: whole clusters."""

    def __init__(self, launch: Launch, first: int, count: int, registers: list[Any]) -> None:
        self.launch, self.first, self.ctas = launch, first, count
        self.threads = int(np.prod(launch.block))
        self.warps = -(-self.threads // 32)
        self.lanes = count * self.warps * 32
        self.r = registers
        self.written: defaultdict[int, np.ndarray | np.bool_] = defaultdict(np.bool_)
        size = launch.cluster_size
        self.clocks = Clocks(count, self.warps, size)
        self.shared = Shared(count, self.warps, size, launch.shared_size, launch.grain)
        self.peers = clusters.Peers(count, self.clocks)
        self.local = Local(self.lanes, launch.local_size)
        self.memory, self.parameters = launch.memory, launch.parameters
        self._identify()
        self.copies = Copies(self.lanes)
        self.meeting = clusters.Barrier(self.thread < self.threads, 32 * self.warps * size)
        # Lanes that haven't waited for the launch before theirs; None if they need not.
        self.early = np.ones(self.lanes, bool) if launch.dependent else None
        self.position = np.where(self.thread < self.threads, 0, DONE)
        self.barrier = np.full(self.lanes, -1)
        self.resume = np.zeros(self.lanes, np.int64)
        self.expected = np.zeros(self.lanes, np.int64)
        self.mask: Any = None  # bool[lanes]; None where all lanes are active
        self.count, self.partial = self.lanes, False
        self._index: np.ndarray | None = None
        self._steps, self._rotation, self._impatient = 0, 0, False

    def _identify(self) -> None:
        lane = np.arange(self.lanes)
        self.all = lane
        self.warp = lane // 32
        self.cta = lane // (32 * self.warps)
        self.thread = lane % (32 * self.warps)
        self.member = lane % (32 * self.warps * self.launch.cluster_size)
        self.identity = lane + self.first * 32 * self.warps + 1
        exists = self.thread < self.threads
        self.warp_threads = np.bincount(self.warp[exists], minlength=self.ctas * self.warps)

    def special(self, name: str) -> Any:
        """The value of a special register such as ``%tid.x``."""
        stem, _, axis = name.removeprefix("%").partition(".")
        launch, cta = self.launch, self.first + self.cta
        rank = cta % launch.cluster_size
        if axis:
            triples = {
                "tid": _split(self.thread, launch.block),
                "ntid": launch.block,
                "ctaid": launch.ctaid(cta),
                "nctaid": launch.grid,
                "clusterid": _split(cta // launch.cluster_size, launch.clusters),
                "nclusterid": launch.clusters,
                "cluster_ctaid": _split(rank, launch.cluster),
                "cluster_nctaid": launch.cluster,
            }
            return np.uint32(triples[stem]["xyz".index(axis)])
        lane = (self.thread & 31).astype(np.uint32)
        below = (np.uint32(1) << lane) - np.uint32(1)
        values = {
            "laneid": lane,
            "warpid": (self.thread // 32).astype(np.uint32),
            "nwarpid": np.uint32(self.warps),
            "cluster_ctarank": rank.astype(np.uint32),
            "cluster_nctarank": np.uint32(launch.cluster_size),
            "lanemask_eq": below + np.uint32(1),
            "lanemask_lt": below,
            "lanemask_le": below * np.uint32(2) + np.uint32(1),
            "lanemask_gt": ~(below * np.uint32(2) + np.uint32(1)),
            "lanemask_ge": ~below,
        }
        return values[stem]

    # --- values ---

    def whole(self, slot: int) -> np.ndarray:
        """A register as an array over all lanes."""
        value = self.r[slot]
        return value if np.ndim(value) else np.full(self.lanes, value)

    def active(self, slot: int) -> np.ndarray:
        """A register's values in the active lanes."""
        value = self.whole(slot)
        return value if self.mask is None else value[self.index]

    def put(self, slot: int, value: Any) -> None:
        """Write a register: values for all lanes, of which those of active lanes count."""
        self.r[slot] = value if not self.partial else np.where(self.mask, value, self.r[slot])

    def put_active(self, slot: int, values: np.ndarray) -> None:
        """Write a register: values for the active lanes only."""
        if self.mask is None:
            self.r[slot] = values
        else:
            whole = self.whole(slot).copy()
            whole[self.index] = values
            self.r[slot] = whole

    @property
    def index(self) -> np.ndarray:
        """The active lanes."""
        if self.mask is None:
            return self.all
        if self._index is None:
            self._index = np.flatnonzero(self.mask)
        return self._index

    def access(self, instruction: Instruction) -> Access:
        """Who the active lanes are."""
        fail = partial(self.fault, instruction)
        i = slice(None) if self.mask is None else self.index
        early = None if self.early is None else self.early[i]
        who = self.cta[i], self.warp[i], self.member[i], self.identity[i]
        return Access(*who, early, self.clocks, fail)

    def fault(
        self, instruction: Instruction | None, kind: type[Fault], active: int, what: str
    ) -> Fault:
        """The error of one of the active lanes."""
        lane = int(self.index[active])
        x, y, z = self.launch.ctaid(self.first + int(self.cta[lane]))
        line = instruction.text if instruction else "(end)"
        return kind(
            f"{self.launch.program.name}: {line}: CTA ({x}, {y}, {z}), "
            f"thread {int(self.thread[lane])}: {what}"
        )

    # --- which lanes are active ---

    def activate(self, mask: Any, count: int, partial: bool) -> None:
        """Run what follows in these lanes; partial: others keep their registers."""
        self.mask, self.count, self.partial, self._index = mask, count, partial, None

    def under(self, slot: int, negated: bool, step: Step) -> None:
        """A step in the active lanes where a predicate holds."""
        chosen = self.r[slot]
        if not np.ndim(chosen):
            if bool(chosen) != negated:
                step(self)
            return
        if negated:
            chosen = ~chosen
        if self.mask is not None:
            chosen = chosen & self.mask
        count = int(np.count_nonzero(chosen))
        if count == self.count:
            step(self)
        elif count:
            before = self.mask, self.count, self.partial, self._index
            self.activate(chosen, count, True)
            step(self)
            self.mask, self.count, self.partial, self._index = before

    def require_warps(self, instruction: Instruction, members: np.ndarray | None = None) -> None:
        """Raise unless each warp that takes part does so with all of its members.

        members: for each lane the bits of those needed, ``uint32``; all 32 without it.
        """
        if self.mask is None and members is None:
            return
        active = self.mask if self.mask is not None else np.ones(self.lanes, bool)
        bits = np.packbits(active, bitorder="little").view("<u4")[self.warp]
        needed = np.uint32(0xFFFFFFFF) if members is None else members
        own = np.uint32(1) << (self.thread & 31).astype(np.uint32)
        bad = active & ((needed & ~bits != 0) | (needed & own == 0))
        if bad.any():
            lane = int(np.argmax(bad))
            raise self.fault(
                instruction,
                Divergence,
                int(np.searchsorted(self.index, lane)),
                f"active lanes {int(bits[lane]):#010x}, needed "
                f"{int(np.broadcast_to(needed, bits.shape)[lane]):#010x}",
            )

    # --- running ---

    def run(self) -> None:
        """Until all lanes have exited."""
        while (places := self._places()).size or self._waits_in_vain():
            if self._impatient:
                self._rotation += 1
            place = places[self._rotation % len(places) if self._impatient else 0]
            self._impatient = False
            others = self.position[self.position > place]
            limit = int(others.min()) if others.size else DONE
            lowest = np.repeat(self.position.reshape(-1, 32).min(1), 32)
            mask = (self.position == place) & (lowest == place)
            self._run_group(mask, int(place), limit if limit < WAITING else DONE)
            if self.launch.cluster_size > 1:
                self.peers.leave(self, (self.position.reshape(self.ctas, -1) == DONE).all(1))

    def _places(self) -> np.ndarray:
        """Positions where warps can go on, each at the lowest of its lanes."""
        lowest = np.unique(self.position.reshape(-1, 32).min(1))
        return lowest[lowest < WAITING]

    def _run_group(self, mask: np.ndarray, position: int, limit: int) -> None:
        """Run these lanes until they part, wait, exit, or come to `limit`."""
        count = int(np.count_nonzero(mask))
        alive = int(np.count_nonzero(self.position != DONE))
        self.activate(None if count == self.lanes else mask, count, count < alive)
        program = self.launch.program
        steps, control_after, jumps = program.steps, program.control_after, 0
        at: int | None = position
        while at is not None:
            stop = min(control_after[at], limit)
            for step in steps[at:stop]:
                step(self)
            self._count(stop - at + 1, stop)
            if stop == limit:
                return self.park(limit)
            at = steps[stop](self, stop)
            jumps += 1
            self._impatient = jumps > PATIENCE and limit < DONE
            if at is not None and (at >= limit or self._impatient):
                return self.park(at)

    def _count(self, steps: int, position: int) -> None:
        self._steps += steps
        if self._steps > self.launch.step_limit:
            raise self.fault(
                self.launch.program.instructions[position],
                StepLimit,
                0,
                f"after {self.launch.step_limit} instructions",
            )

    def park(self, position: int | np.ndarray) -> None:
        """The active lanes go on there when they are chosen next."""
        self.position[self.index] = position

    def split(self, taken: np.ndarray, there: int, here: int) -> int | None:
        """Active lanes go on `there` where `taken`, the others `here`."""
        if not np.ndim(taken):
            return there if taken else here
        chosen = taken if self.mask is None else taken[self.mask]
        count = int(np.count_nonzero(chosen))
        if count == self.count:
            return there
        if count == 0:
            return here
        self.park(np.where(chosen, there, here))
        return None

    def scatter(self, table: np.ndarray, index: np.ndarray) -> None:
        """Each active lane goes on where a table says."""
        self.park(table[index])

    def leave(self, gone: np.ndarray, here: int) -> int | None:
        """Active lanes exit where `gone`; the others go on `here`."""
        return self.split(gone, DONE, here)

    # --- barriers ---

    def wait(
        self, instruction: Instruction, number: np.ndarray, threads: np.ndarray, after: int
    ) -> int | None:
        """The active lanes come to a barrier of so many threads (0: all)."""
        self.require_whole_warps(instruction)
        if (
            self.count == self.ctas * self.threads
            and (threads == 0).all()
            and (number == number[0]).all()
        ):
            self.clocks.join_all()
            return after
        self.hold(self.index, number, after)
        self.expected[self.index] = np.where(threads == 0, self.threads, threads)
        self._open()
        return None

    def require_whole_warps(self, instruction: Instruction) -> None:
        """Raise unless each warp that comes to a barrier does so with all of its threads."""
        full = self.warp_threads
        here = np.bincount(self.warp[self.index], minlength=len(full))
        broken = (here > 0) & (here < full)
        if broken.any():
            warp = int(np.argmax(broken))
            raise self.fault(
                instruction,
                Divergence,
                int(np.argmax(self.warp[self.index] == warp)),
                f"{here[warp]} of {full[warp]} threads of the warp came to the barrier",
            )

    def hold(self, lanes: np.ndarray, number: int | np.ndarray, after: int) -> None:
        """Lanes wait at a barrier, to go on afterwards."""
        self.position[lanes], self.barrier[lanes], self.resume[lanes] = WAITING, number, after

    def let_go(self, lanes: np.ndarray) -> None:
        """Lanes go on after their barrier."""
        self.position[lanes], self.barrier[lanes] = self.resume[lanes], -1

    def _open(self) -> None:
        """Let go those whose barrier of a CTA is complete."""
        waiting = self.barrier >= 0
        for cta, number in {*zip(self.cta[waiting], self.barrier[waiting], strict=True)}:
            lanes = np.flatnonzero((self.cta == cta) & (self.barrier == number))
            if len(lanes) >= self.expected[lanes[0]]:
                self.clocks.join(np.unique(self.warp[lanes]))
                self.let_go(lanes)

    def _waits_in_vain(self) -> bool:
        """No lane can run: raise if some wait at a barrier."""
        waiting = self.position == WAITING
        if not waiting.any():
            return False
        first = int(np.argmax(waiting))
        mine = self.cta == self.cta[first]
        count = int(np.count_nonzero(mine & waiting))
        numbers = sorted(set(self.barrier[mine & waiting].tolist()))
        what = (
            f"{count} threads of the CTA wait at barriers {numbers}, "
            f"{self.threads - count} have exited"
        )
        if self.barrier[first] == clusters.NUMBER:
            what = self.meeting.missing(first)
        self.activate(waiting, int(np.count_nonzero(waiting)), True)
        instruction = self.launch.program.instructions[self.resume[first] - 1]
        raise self.fault(instruction, Deadlock, 0, what)


class Copies:
    """cp.async: which copies of which lane are in flight, and in which group."""

    def __init__(self, lanes: int) -> None:
        self.group = np.zeros(lanes, np.int64)
        self.flying: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def add(self, lanes: np.ndarray, grains: np.ndarray) -> None:
        """Copies to ``grains[n, k]`` begin, in the lanes' open groups."""
        self.flying.append((lanes, self.group[lanes], grains))

    def commit(self, lanes: np.ndarray) -> None:
        """Close the open group."""
        self.group[lanes] += 1

    def landed(
        self, active: np.ndarray, pending: int | None
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Lanes and grains of copies that are done when all but `pending` groups are.

        active: for each lane whether it waits. None: the open group is done as well.
        """
        limit = self.group + 1 if pending is None else self.group - pending
        done, flying = [], []
        for lanes, group, grains in self.flying:
            now = active[lanes] & (group < limit[lanes])
            if now.any():
                done.append((lanes[now], grains[now]))
            if not now.all():
                flying.append((lanes[~now], group[~now], grains[~now]))
        self.flying = flying
        return done
