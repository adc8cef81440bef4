"""A module of PTX: its entries, and running one."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np

from . import access, parse
from .faults import Unsupported
from .machine import Launch, Machine, Program
from .memory import Memory, Parameters
from .translate import Translator

Triple = tuple[int, int, int]
LANES = 2048
"""Lanes that run at once, if a cluster has no more."""
MAX_CLUSTER = 16


class Module:
    """The entries of PTX text, each parsed and translated when it first runs."""

    def __init__(self, text: str) -> None:
        self._text, self._sources, self._variables = parse.scan(text)
        self._entries: dict[str, Entry] = {}

    @property
    def entries(self) -> list[str]:
        """The names of all entries."""
        return list(self._sources)

    def entry(self, name: str) -> Entry:
        """An entry, translated. Raises KeyError, and Unsupported for what isn't known."""
        if name not in self._sources:
            raise KeyError(f"no entry {name}; there are {', '.join(self._sources)}")
        if name not in self._entries:
            source = self._sources[name]
            self._entries[name] = Entry(source, parse.parse(self._text, source), self._variables)
        return self._entries[name]

    def run(
        self,
        entry: str,
        *,
        grid: Triple,
        block: Triple,
        params: bytes,
        memory: Memory,
        shared: int = 0,
        cluster: Triple = (1, 1, 1),
        dependent: bool = False,
        step_limit: int = 2_000_000,
    ) -> None:
        """Run an entry over a grid. Raises a Fault for the first rule that a thread breaks.

        params: the bytes of the parameter space; shared: bytes of dynamic shared memory; cluster:
        CTAs of a cluster along each dimension of the grid; dependent: it may start before the run
        before it on this memory has ended; step_limit: instructions that a batch of CTAs may run.
        """
        self.entry(entry).run(
            grid, block, cluster, bytes(params), shared, memory, dependent, step_limit
        )


class Entry:
    """A translated entry."""

    def __init__(
        self, source: parse.Source, body: parse.Body, module_variables: list[parse.Variable]
    ) -> None:
        self.name, self.body, self.cluster = source.name, body, source.cluster
        used = _symbols(body)
        self.variables = body.variables + [v for v in module_variables if v.name in used]
        parameters, self.parameter_size = _layout(source.parameters)
        shared = [v for v in self.variables if v.space == "shared"]
        fixed, self.static_shared = _layout([v for v in shared if v.size])
        dynamic = [v for v in shared if not v.size]
        start = _round_up(self.static_shared, max([16, *(v.align for v in dynamic)]))
        self.dynamic_start = start if dynamic else self.static_shared
        local, self.local_size = _layout([v for v in self.variables if v.space == "local"])
        self._translator = Translator(
            self.name,
            body,
            {**parameters, **fixed, **dict.fromkeys([v.name for v in dynamic], start), **local},
        )
        self.grain = access.smallest_shared(body.instructions)

    @cached_property
    def program(self) -> Program:
        return self._translator.program()

    def run(
        self,
        grid: Triple,
        block: Triple,
        cluster: Triple,
        params: bytes,
        shared: int,
        memory: Memory,
        dependent: bool,
        limit: int,
    ) -> None:
        if len(params) != self.parameter_size:
            raise ValueError(
                f"{self.name} takes {self.parameter_size} bytes of parameters, got {len(params)}"
            )
        self._check_clusters(grid, cluster)
        program = self.program
        addresses = self._place_variables(memory)
        memory.launch(dependent)
        launch = Launch(
            program, memory, Parameters(params), grid, block, cluster, dependent,
            self.dynamic_start + shared, self.local_size, self.grain, limit,
        )  # fmt: skip
        threads = -(-int(np.prod(block)) // 32) * 32
        ctas, size = int(np.prod(grid)), launch.cluster_size
        together = size * max(1, LANES // threads // size)
        with np.errstate(all="ignore"):
            for first in range(0, ctas, together):
                machine = Machine(launch, first, min(together, ctas - first), [])
                machine.r = self._registers(machine, addresses)
                machine.run()
        memory.touched.end(self.name)

    def _check_clusters(self, grid: Triple, cluster: Triple) -> None:
        if self.cluster not in (None, cluster):
            raise ValueError(f"{self.name} is for clusters of {self.cluster} CTAs, got {cluster}")
        if min(cluster) < 1 or np.prod(cluster) > MAX_CLUSTER:
            raise ValueError(f"cluster {cluster}: 1 to {MAX_CLUSTER} CTAs")
        if any(g % c for g, c in zip(grid, cluster, strict=True)):
            raise ValueError(f"grid {grid} is no multiple of the cluster {cluster}")

    def _place_variables(self, memory: Memory) -> dict[str, int]:
        """Addresses of variables in global memory, where they keep their values."""
        return {
            v.name: memory.variable(v, v.value or bytes(v.size))
            for v in self.variables
            if v.space in ("global", "const")
        }

    def _registers(self, machine: Machine, addresses: dict[str, int]) -> list[Any]:
        """Registers of a batch before its first instruction."""
        registers = list(self._translator.initial)
        for name, slot in self._translator.special.items():
            registers[slot] = machine.special(name)
        for slot, (name, offset, raw) in self._translator.late.items():
            if name not in addresses:
                raise Unsupported(f"{self.name}: symbol {name}")
            registers[slot] = raw(addresses[name] + offset)
        return registers


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _layout(variables: list[parse.Variable]) -> tuple[dict[str, int], int]:
    """Offsets of variables one after another, each aligned, and the end."""
    offsets, end = {}, 0
    for v in variables:
        offsets[v.name] = start = _round_up(end, v.align)
        end = start + v.size
    return offsets, end


def _symbols(body: parse.Body) -> set[str]:
    """Names of all variables that instructions mention."""
    out = set()
    for instruction in body.instructions:
        for operand in instruction.operands:
            base = operand.base if isinstance(operand, parse.Address) else operand
            if isinstance(base, parse.Symbol):
                out.add(base.name)
    return out


def load(text: str) -> Module:
    """A module from the text that ``nvcc -ptx`` writes."""
    return Module(text)
