"""Thread block clusters: their barrier, and the shared memory of the other CTAs."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from .faults import ClusterHazard, Deadlock, OutOfBounds

if TYPE_CHECKING:
    from .machine import Machine
    from .memory import Access, Clocks
    from .parse import Instruction

RANK = 24
"""An address of shared::cluster has a CTA's rank, plus 1, from this bit on; 0 means one's own."""
NUMBER = -2
"""Stands for the cluster's barrier where others have their numbers."""


class Barrier:
    """Which lanes have come to the barrier of their cluster, and which may pass it."""

    def __init__(self, exists: np.ndarray, size: int) -> None:
        lanes = np.arange(len(exists))
        self.members = [part[exists[part]] for part in lanes.reshape(-1, size)]
        self.cluster = lanes // size
        self.arrived = np.zeros(len(exists), bool)
        self.open = np.zeros(len(exists), bool)

    def arrive(self, m: Machine, instruction: Instruction, release: bool, after: int) -> int | None:
        """The active lanes come to it, and go on."""
        m.require_whole_warps(instruction)
        again = (self.arrived | self.open)[m.index]
        if again.any():
            raise m.fault(
                instruction, Deadlock, int(np.argmax(again)), "comes again without having waited"
            )
        self.arrived[m.index] = True
        m.clocks.arrive(np.unique(m.warp[m.index]), release)
        complete = [c for c in np.unique(self.cluster[m.index]) if self._is_complete(c)]
        for cluster in complete:
            self._open(m, cluster)
        if not complete:
            return after
        m.park(after)  # so that those who waited take part in the choice of who runs next
        return None

    def wait(self, m: Machine, instruction: Instruction, after: int) -> int | None:
        """The active lanes go on when all threads of their cluster have come."""
        m.require_whole_warps(instruction)
        absent = ~(self.arrived | self.open)[m.index]
        if absent.any():
            raise m.fault(
                instruction, Deadlock, int(np.argmax(absent)), "waits without having come itself"
            )
        through = self.open[m.index]
        self._pass(m, m.index[through])
        if through.all():
            return after
        m.park(after)
        m.hold(m.index[~through], NUMBER, after)
        return None

    def missing(self, lane: int) -> str:
        """Why a lane waits in vain."""
        members = self.members[self.cluster[lane]]
        count = int(np.count_nonzero(~self.arrived[members]))
        return f"{count} of the {len(members)} threads of the cluster never come to its barrier"

    def _is_complete(self, cluster: int) -> bool:
        return bool(self.arrived[self.members[cluster]].all())

    def _open(self, m: Machine, cluster: int) -> None:
        members = self.members[cluster]
        self.arrived[members], self.open[members] = False, True
        m.clocks.complete(cluster)
        waiting = members[m.barrier[members] == NUMBER]
        m.let_go(waiting)
        self._pass(m, waiting)

    def _pass(self, m: Machine, lanes: np.ndarray) -> None:
        self.open[lanes] = False
        m.clocks.acquire(np.unique(m.warp[lanes]))


class Peers:
    """Who may access the shared memory of another CTA, and who has."""

    def __init__(self, ctas: int, clocks: Clocks) -> None:
        self.clocks, self.size = clocks, clocks.cluster
        self.visits = np.full((ctas, clocks.warps), -1)  # when a warp last accessed a CTA's
        self.gone = np.full(ctas, False)

    def resolve(self, access: Access, address: np.ndarray) -> tuple[Access, np.ndarray]:
        """The CTAs that addresses of shared::cluster lie in, and the addresses in these."""
        rank = address >> RANK
        if not rank.any():
            return access, address
        access.require(
            (rank >= 0) & (rank <= self.size),
            OutOfBounds,
            lambda i: f"address {address[i]:#x} is in no CTA of the cluster of {self.size}",
        )
        own = access.cta % self.size
        rank = np.where(rank == 0, own, rank - 1)
        remote = replace(access, cta=access.cta - own + rank)
        self._require_alive(access, remote.cta, rank)
        away = np.flatnonzero(rank != own)
        self.visits[remote.cta[away], access.warp[away] % self.clocks.warps] = self.clocks.own(
            access.warp[away]
        )
        return remote, address & ((1 << RANK) - 1)

    def _require_alive(self, access: Access, cta: np.ndarray, rank: np.ndarray) -> None:
        started = self.clocks.rows[access.warp, rank * self.clocks.cta_warps] > 0
        access.require(
            started | (cta == access.cta),
            ClusterHazard,
            lambda i: f"CTA {rank[i]} of the cluster may not have started: no cluster barrier yet",
        )
        access.require(
            ~self.gone[cta],
            ClusterHazard,
            lambda i: f"CTA {rank[i]} of the cluster has exited",
        )

    def leave(self, m: Machine, done: np.ndarray) -> None:
        """CTAs exit: raise if accesses to their shared memory aren't known to be over.

        done: for each CTA whether all of its threads have exited. It is enough that one of them
        knew, since shared memory is there until the last has exited.
        """
        if (done == self.gone).all():
            return
        known = self.clocks.rows.reshape(len(done), -1, self.clocks.warps).max(1)
        late = (done & ~self.gone)[:, None] & (known <= self.visits)
        self.gone = done
        if late.any():
            cta, warp = np.argwhere(late)[0]
            rank, number = divmod(int(warp), self.clocks.cta_warps)
            raise m.fault(
                None,
                ClusterHazard,
                int(np.argmax(m.cta[m.index] == cta)),
                f"exits while warp {number} of CTA {rank} of the cluster may still access its "
                "shared memory: no cluster barrier between",
            )
