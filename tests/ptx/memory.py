"""Simulated memories: global, shared with its hazards, local, and parameters.

Each load takes addresses (``int64[n]``, one for each lane that takes part) and returns
``uint[n, count]``; each store takes such values. `Access` says who and where, and raises.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .dependents import READ, WROTE, Touched
from .faults import (
    AsyncHazard,
    Fault,
    GlobalRace,
    Misaligned,
    OutOfBounds,
    SharedHazard,
    Uninitialised,
)
from .parse import RAW

Fail = Callable[[type[Fault], int, str], Fault]
GAP = 512
BASE = 0x7F00_0000_0000
RESERVED, WRITTEN = 1, 3
"""States of a byte; 0 is outside every allocation. WRITTEN has all the bits of RESERVED."""


@dataclass(slots=True)
class Access:
    """Who accesses: for each lane its CTA in the batch, its warp and its thread, and the clocks."""

    cta: np.ndarray  # int64[n], in the batch; the one whose shared memory it is, if that is remote
    warp: np.ndarray  # int64[n], in the batch
    thread: np.ndarray  # int64[n], in the cluster
    identity: np.ndarray  # int64[n], in the launch, from 1
    early: np.ndarray | None  # bool[n], whether the launch before may not have ended
    clocks: Clocks
    fail: Fail  # class, position among the lanes, what

    def take(self, lanes: np.ndarray) -> Access:
        """The same for some of the lanes, by their positions."""

        def fail(kind: type[Fault], lane: int, what: str) -> Fault:
            return self.fail(kind, int(lanes[lane]), what)

        some = self.cta[lanes], self.warp[lanes], self.thread[lanes], self.identity[lanes]
        early = None if self.early is None else self.early[lanes]
        return Access(*some, early, self.clocks, fail)

    def require(self, good: np.ndarray, kind: type[Fault], what: Callable[[int], str]) -> None:
        """Raise `kind` for the first lane that is not good (``bool[n]`` or ``bool[n, any]``)."""
        if good.all():
            return
        lane = int(np.argmin(good.reshape(len(good), -1).all(1)))
        raise self.fail(kind, lane, what(lane))


class Clocks:
    """What each warp knows of those of its cluster: a vector clock for each, moved by barriers.

    An access is stamped with its own warp's count. It comes before everything that warp u does
    from now on if ``known[u, warp] > stamp``. The first stamp is 1: that u knows more than 0 of
    a warp says that it has started.
    """

    def __init__(self, ctas: int, warps: int, cluster: int) -> None:
        self.cluster, self.cta_warps, self.warps = cluster, warps, cluster * warps
        self.known = np.zeros((ctas // cluster, self.warps, self.warps), np.int32)
        self.known[:] = np.eye(self.warps)
        self.rows = self.known.reshape(ctas * warps, self.warps)
        self._arrived = np.zeros((ctas // cluster, self.warps), np.int32)
        self._released = np.zeros_like(self._arrived)

    def own(self, warp: np.ndarray) -> np.ndarray:
        """The stamps of accesses made now by these warps of the batch."""
        return self.rows[warp, warp % self.warps]

    def join(self, warps: np.ndarray) -> None:
        """A barrier of these warps of the batch, all of one CTA."""
        joined, peers = self.rows[warps].max(0), warps % self.warps
        joined[peers] = self.own(warps) + 1
        self.rows[warps] = joined

    def join_all(self) -> None:
        """In every CTA a barrier of all its warps."""
        clusters, ranks, warps = len(self.known), np.arange(self.cluster), self.cta_warps
        own = np.einsum("cww->cw", self.known).reshape(clusters, -1, warps) + 1
        rows = self.known.reshape(clusters, self.cluster, warps, self.warps)
        joined = rows.max(2)
        joined.reshape(clusters, self.cluster, self.cluster, warps)[:, ranks, ranks] = own
        rows[:] = joined[:, :, None]

    def arrive(self, warps: np.ndarray, release: bool) -> None:
        """These warps of the batch come to the barrier of their cluster, and go on.

        Without `release` others learn that they have started, and no more.
        """
        self.step(warps)
        told = self.rows[warps]
        if not release:
            told = np.arange(self.warps) == (warps % self.warps)[:, None]
        np.maximum.at(self._arrived, warps // self.warps, told)

    def complete(self, cluster: int) -> None:
        """All warps have come to the barrier of this cluster."""
        self._released[cluster], self._arrived[cluster] = self._arrived[cluster], 0

    def acquire(self, warps: np.ndarray) -> None:
        """These warps of the batch pass the barrier of their cluster."""
        self.rows[warps] = np.maximum(self.rows[warps], self._released[warps // self.warps])

    def step(self, warps: np.ndarray) -> None:
        """A barrier inside each of these warps of the batch."""
        self.rows[warps, warps % self.warps] += 1

    def before(self, access: Access, warp: np.ndarray, stamp: np.ndarray) -> np.ndarray:
        """Whether accesses ``[n, k]`` by these warps of the cluster precede what comes now."""
        return self.rows[access.warp[:, None], warp] > stamp


def _check_aligned(access: Access, address: np.ndarray, size: int) -> None:
    if size > 1:
        access.require(
            address & (size - 1) == 0,
            Misaligned,
            lambda i: f"address {address[i]:#x} is no multiple of {size}",
        )


def _units(data: np.ndarray, unit: int, count: int) -> np.ndarray:
    """Bytes as rows of `count` integers, each `unit` bytes long."""
    return data.view(RAW[unit]).reshape(-1, count)


class Memory:
    """Global memory of a simulated device.

    Allocations lie apart, so that an address just outside one is in none.
    """

    def __init__(self) -> None:
        self._data = np.zeros(1 << 16, np.uint8)
        self._state = np.zeros(1 << 16, np.uint8)
        self._end = GAP
        self._variables: dict[object, int] = {}
        self._races = _Races(0)
        self._starts: list[int] = []
        self._sizes: list[int] = []
        self.touched = Touched()

    def reserve(self, nbytes: int) -> int:
        """The address of bytes that are not initialised."""
        start = self._end
        self._end += -(-nbytes // 256) * 256 + GAP
        while self._end > len(self._data):
            self._data = np.concatenate([self._data, np.zeros_like(self._data)])
            self._state = np.concatenate([self._state, np.zeros_like(self._state)])
        self._state[start : start + nbytes] = RESERVED
        self._starts.append(start)
        self._sizes.append(nbytes)
        return BASE + start

    def place(self, array: np.ndarray) -> int:
        """The address of a copy of an array."""
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        address = self.reserve(data.size)
        start = address - BASE
        self._data[start : start + data.size] = data
        self._state[start : start + data.size] = WRITTEN
        return address

    def variable(self, owner: object, value: bytes) -> int:
        """The address of a module's variable, placed when it is first asked for."""
        if owner not in self._variables:
            self._variables[owner] = self.place(np.frombuffer(value, np.uint8))
        return self._variables[owner]

    def read(self, address: int, dtype: Any, shape: int | tuple[int, ...]) -> np.ndarray:
        """A copy of what lies there. Raises OutOfBounds and Uninitialised."""
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        dtype = np.dtype(dtype)
        start, size = address - BASE, math.prod(shape) * dtype.itemsize
        state = self._state[start : start + size]
        if not 0 <= start <= self._end - size or not state.all():
            raise OutOfBounds(f"read of {size} bytes at {address:#x}")
        if (state != WRITTEN).any():
            first = int(np.argmax(state != WRITTEN))
            raise Uninitialised(
                f"byte {first} of {size} at {address:#x}: {np.count_nonzero(state != WRITTEN)}"
                " bytes were never written"
            )
        return self._data[start : start + size].copy().view(dtype).reshape(shape)

    def launch(self, dependent: bool) -> None:
        """Forget who wrote what: a new kernel starts, perhaps before the last one ends."""
        self._races = _Races(len(self._data))
        self.touched.launch(len(self._data), dependent)

    def load(self, access: Access, address: np.ndarray, unit: int, count: int) -> np.ndarray:
        """Values ``[n, count]``, all of them written before."""
        rows = self._rows(access, address, unit * count)
        self.touched.note(access, rows, unit * count, READ, lambda i: self._named(address[i]))
        state = self._view(self._state, unit * count)[rows]
        access.require(
            state == self._all_written(unit * count),
            Uninitialised,
            lambda i: f"global address {address[i]:#x}",
        )
        return _units(self._data, unit, count)[rows]

    def store(
        self,
        access: Access,
        address: np.ndarray,
        unit: int,
        values: np.ndarray,
        atomic: bool = False,
    ) -> None:
        """Write values ``[n, count]``."""
        size = unit * values.shape[1]
        rows = self._rows(access, address, size)
        self.touched.note(access, rows, size, WROTE, lambda i: self._named(address[i]))
        data = _units(self._data, unit, values.shape[1])
        if not atomic:
            self._races.check(access, rows, size, data[rows] != values)
        data[rows] = values
        self._view(self._state, size)[rows] = self._all_written(size)
        if not atomic:
            access.require(
                data[rows] == values,
                GlobalRace,
                lambda i: f"another thread writes address {address[i]:#x} in the same instruction",
            )

    @staticmethod
    def _view(state: np.ndarray, size: int) -> np.ndarray:
        return _units(state, min(size, 8), max(size // 8, 1))

    @staticmethod
    def _all_written(size: int) -> np.ndarray:
        return np.full(8, WRITTEN, np.uint8).view(RAW[min(size, 8)])[0]

    def _rows(self, access: Access, address: np.ndarray, size: int) -> np.ndarray:
        _check_aligned(access, address, size)
        start = address - BASE
        inside = (start >= 0) & (start <= len(self._data) - size)
        rows = np.where(inside, start, 0) // size
        inside &= self._allocated(rows, size)
        access.require(
            inside,
            OutOfBounds,
            lambda i: f"{size} bytes at global address {address[i]:#x}{self._near(start[i])}",
        )
        return rows

    def _allocated(self, rows: np.ndarray, size: int) -> np.ndarray:
        ones = np.full(8, RESERVED, np.uint8).view(RAW[min(size, 8)])[0]
        return (self._view(self._state, size)[rows] & ones == ones).all(1)

    def _named(self, address: int) -> str:
        """An address and its buffer."""
        offset = int(address) - BASE
        buffer = bisect.bisect(self._starts, offset) - 1
        byte = offset - self._starts[buffer]
        return f"global address {address:#x}, byte {byte} of a buffer of {self._sizes[buffer]},"

    def _near(self, start: int) -> str:
        """How far a bad offset is past the last allocation before it."""
        if not start >= 0:
            return ""
        used = np.flatnonzero(self._state[: int(start) + 1])
        return f", {int(start) - int(used[-1]) - 1} bytes past an allocation" if used.size else ""


class _Races:
    """Who wrote each global byte in this launch, and when."""

    def __init__(self, size: int) -> None:
        self.writer = np.zeros(size, np.int32)
        self.stamp = np.zeros(size, np.int32)

    def check(self, access: Access, rows: np.ndarray, size: int, differs: np.ndarray) -> None:
        """Raise if another thread that isn't ordered before wrote something else. Record."""
        writers = self.writer.reshape(-1, size)
        stamps = self.stamp.reshape(-1, size)
        mine = access.identity[:, None]
        writer = writers[rows]
        other = (writer != 0) & (writer != mine)
        if other.any():
            warps = access.clocks.warps
            warp = (writer - 1) // 32
            here = (mine - 1) // 32 // warps == warp // warps
            ordered = here & access.clocks.before(access, warp % warps, stamps[rows])
            bad = (other & ~ordered).any(1) & differs.any(1)
            access.require(
                ~bad,
                GlobalRace,
                lambda i: (
                    f"address {BASE + rows[i] * size:#x} was written by another thread with "
                    "another value, and nothing orders the two"
                ),
            )
        writers[rows] = mine
        stamps[rows] = access.clocks.own(access.warp)[:, None]


class Shared:
    """Shared memory of a batch of CTAs, and who read and wrote each of its grains when.

    grain: bytes that are tracked together; the smallest access of the kernel, at most 4.
    """

    MANY = 32

    def __init__(self, ctas: int, warps: int, cluster: int, size: int, grain: int) -> None:
        self.size, self.grain, self.warps, self.cluster = size, grain, warps, cluster
        self.stride = -(-size // 16) * 16
        self.data = np.zeros(ctas * self.stride, np.uint8)
        self.written = np.zeros(ctas * self.stride, np.uint8)
        grains = ctas * self.stride // grain
        self.writer = np.full(grains, -1, np.int32)
        self.write_stamp = np.full(grains, -1, np.int32)
        self.atomic = np.zeros(grains, bool)
        self.reader = np.zeros((grains, cluster * warps), np.int8)  # a lane, or MANY
        self.read_stamp = np.full((grains, cluster * warps), -1, np.int32)
        self.in_flight = np.zeros(grains, bool)

    def load(
        self,
        access: Access,
        address: np.ndarray,
        unit: int,
        count: int,
        collective: bool = False,
        atomic: bool = False,
    ) -> np.ndarray:
        """Values ``[n, count]``. Collective: for other lanes of the warp as well."""
        size = unit * count
        start = self._start(access, address, size)
        whole = (1 << 8 * min(size, 8)) // 255
        state = _units(self.written, min(size, 8), max(size // 8, 1))[start // size]
        access.require(state == whole, Uninitialised, lambda i: f"shared address {address[i]:#x}")
        grains = self._grains(start, size)
        self._landed(access, address, grains)
        self._after_writes(access, address, grains, collective, atomic)
        self._note_read(access, grains, collective)
        return _units(self.data, unit, count)[start // size]

    def store(
        self,
        access: Access,
        address: np.ndarray,
        unit: int,
        values: np.ndarray,
        atomic: bool = False,
    ) -> None:
        """Write values ``[n, count]``."""
        size = unit * values.shape[1]
        start = self._start(access, address, size)
        grains = self._grains(start, size)
        self._landed(access, address, grains)
        self._before_write(access, address, grains, atomic)
        self._put(start, unit, values)

    def copy(self, access: Access, address: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Begin an asynchronous write of ``uint32[n, count]``; what is in flight, ``[n, k]``."""
        size = 4 * values.shape[1]
        start = self._start(access, address, size)
        grains = self._grains(start, size)
        self._landed(access, address, grains)
        self._before_write(access, address, grains, False)
        self._put(start, 4, values)
        self.in_flight[grains] = True
        return grains

    def land(self, stamp: np.ndarray, grains: np.ndarray) -> None:
        """The copies to ``grains[n, k]`` are done; they count as written now, at ``stamp[n]``."""
        self.in_flight[grains] = False
        self.write_stamp[grains] = stamp[:, None]

    def _put(self, start: np.ndarray, unit: int, values: np.ndarray) -> None:
        size = unit * values.shape[1]
        _units(self.data, unit, values.shape[1])[start // size] = values
        self.written.reshape(-1, size)[start // size] = 1

    def _start(self, access: Access, address: np.ndarray, size: int) -> np.ndarray:
        access.require(
            (address >= 0) & (address <= self.size - size),
            OutOfBounds,
            lambda i: f"{size} bytes at shared address {address[i]:#x}; the CTA has {self.size}",
        )
        _check_aligned(access, address, size)
        return access.cta * self.stride + address

    def _grains(self, start: np.ndarray, size: int) -> np.ndarray:
        first = start // self.grain
        return first[:, None] + np.arange(max(size // self.grain, 1))

    def _landed(self, access: Access, address: np.ndarray, grains: np.ndarray) -> None:
        access.require(
            ~self.in_flight[grains],
            AsyncHazard,
            lambda i: f"shared address {address[i]:#x}: a copy to it is in flight",
        )

    def _after_writes(
        self,
        access: Access,
        address: np.ndarray,
        grains: np.ndarray,
        collective: bool,
        atomic: bool,
    ) -> None:
        writer = self.writer[grains]
        good = access.clocks.before(access, writer >> 5, self.write_stamp[grains])
        if not collective:
            good |= writer == access.thread[:, None]
        if atomic:
            good |= self.atomic[grains]
        access.require(
            good,
            SharedHazard,
            lambda i: (
                f"shared address {address[i]:#x} was written by "
                f"{self._named('thread', int(writer[i][np.argmin(good[i])]), 32)} "
                "with no barrier between"
            ),
        )

    def _named(self, what: str, number: int, of_a_warp: int) -> str:
        """A thread or warp of a cluster, by its number in the CTA."""
        rank, number = divmod(number, self.warps * of_a_warp)
        return f"{what} {number}" + (f" of CTA {rank} of the cluster" if self.cluster > 1 else "")

    def _note_read(self, access: Access, grains: np.ndarray, collective: bool) -> None:
        warp = (access.warp % access.clocks.warps)[:, None]
        now = access.clocks.own(access.warp)[:, None]
        lane = np.full(grains.shape, self.MANY, np.int8)
        if not collective:
            again = self.read_stamp[grains, warp] == now
            mine = (access.thread & 31).astype(np.int8)[:, None]
            lane = np.where(again & (self.reader[grains, warp] != mine), lane, mine)
        self.read_stamp[grains, warp] = now
        self.reader[grains, warp] = lane
        if not collective:
            shared = self.reader[grains, warp] != lane
            if shared.any():
                self.reader[grains[shared], np.broadcast_to(warp, shared.shape)[shared]] = self.MANY

    def _before_write(
        self, access: Access, address: np.ndarray, grains: np.ndarray, atomic: bool
    ) -> None:
        self._after_writes(access, address, grains, False, atomic)
        clocks = access.clocks
        if not atomic:
            known = clocks.rows[access.warp][:, None]  # [n, 1, warps]
            good = known > self.read_stamp[grains]
            row = np.arange(len(grains))[:, None], np.arange(grains.shape[1])
            own = access.warp % clocks.warps
            mine = self.reader[grains, own[:, None]] == (access.thread & 31)[:, None]
            good[(*row, own[:, None])] |= mine
            access.require(
                good,
                SharedHazard,
                lambda i: (
                    f"shared address {address[i]:#x} may still be read by a thread of "
                    f"{self._named('warp', int(np.argmin(good[i].all(0))), 1)}: no barrier between"
                ),
            )
        me = np.broadcast_to(access.thread[:, None], grains.shape)
        self.writer[grains] = me
        self.write_stamp[grains] = clocks.own(access.warp)[:, None]
        self.atomic[grains] = atomic
        if not atomic:
            access.require(
                self.writer[grains] == me,
                SharedHazard,
                lambda i: (
                    f"shared address {address[i]:#x}: another thread writes it in the same "
                    "instruction"
                ),
            )


class Local:
    """Local memory: `size` bytes for each lane of a batch."""

    def __init__(self, lanes: int, size: int) -> None:
        self.size = size
        self.stride = -(-size // 16) * 16
        self.data = np.zeros(lanes * self.stride, np.uint8)
        self.written = np.zeros(lanes * self.stride, np.uint8)

    def load(self, access: Access, address: np.ndarray, unit: int, count: int) -> np.ndarray:
        """Values ``[n, count]``."""
        size = unit * count
        row = self._rows(access, address, size)
        access.require(
            self.written.reshape(-1, size)[row] == 1,
            Uninitialised,
            lambda i: f"local address {address[i]:#x}",
        )
        return _units(self.data, unit, count)[row]

    def store(self, access: Access, address: np.ndarray, unit: int, values: np.ndarray) -> None:
        """Write values ``[n, count]``."""
        size = unit * values.shape[1]
        row = self._rows(access, address, size)
        _units(self.data, unit, values.shape[1])[row] = values
        self.written.reshape(-1, size)[row] = 1

    def _rows(self, access: Access, address: np.ndarray, size: int) -> np.ndarray:
        access.require(
            (address >= 0) & (address <= self.size - size),
            OutOfBounds,
            lambda i: f"{size} bytes at local address {address[i]:#x}; the thread has {self.size}",
        )
        _check_aligned(access, address, size)
        lane = access.warp * 32 + (access.thread & 31)
        return (lane * self.stride + address) // size


class Parameters:
    """The parameter space: read-only bytes, the same for every thread."""

    def __init__(self, data: bytes) -> None:
        self.size = len(data)
        self.data = np.frombuffer(data.ljust(-(-len(data) // 16) * 16, b"\0"), np.uint8)

    def load(self, access: Access, address: np.ndarray, unit: int, count: int) -> np.ndarray:
        """Values ``[n, count]``."""
        size = unit * count
        access.require(
            (address >= 0) & (address <= self.size - size),
            OutOfBounds,
            lambda i: f"{size} bytes at offset {address[i]} of {self.size} bytes of parameters",
        )
        _check_aligned(access, address, size)
        return _units(self.data, unit, count)[address // size]
