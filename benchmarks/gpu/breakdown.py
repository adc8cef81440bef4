"""Where the time of a step goes: a trace of jax.profiler by the parts of a model.

While it traces, XLA runs what is in command buffers as single launches, so that each kernel has
the name of its operation. What the kernels leave of a step's time without a tracer is gaps between
them.
"""

from __future__ import annotations

import collections
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import jax

PRODUCTS = "products of linear layers"
QUANTIZING = "activations quantized by a launch of their own"
ATTENTION = "attention"
OTHER = "norms, rotary, cache, activation functions, choice of the token"
GAPS = "gaps"
PARTS = (PRODUCTS, QUANTIZING, ATTENTION, OTHER)

SCOPE = "/attend/"
"""What operations of attention have in their names: see `models.attention.attend`."""


def trace(run: Callable[[], Any]) -> Any:
    """The `jax.profiler.ProfileData` of what `run` does and waits for."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            run()
        (file,) = pathlib.Path(folder).rglob("*.xplane.pb")
        return jax.profiler.ProfileData.from_file(str(file))


def by_part(profile: Any, program: str, steps: int) -> dict[str, dict[str, float]]:
    """Launches and microseconds a step of each part.

    Args:
      profile: of so many `steps`.
      program: the compiled step, as text.

    Raises:
      RuntimeError: the profile has no kernels.
    """
    operations = operations_of(program)
    launches: dict[str, int] = collections.Counter()
    spent: dict[str, float] = collections.Counter()
    for kernel, instruction, nanoseconds in kernels(profile):
        part = part_of(kernel, operations.get(instruction, frozenset()))
        launches[part] += 1
        spent[part] += nanoseconds / 1e3
    if not launches:
        raise RuntimeError("this version of JAX traces kernels otherwise: see kernels()")
    return {part: {"launches": launches[part] / steps, "us": spent[part] / steps} for part in PARTS}


def kernels(profile: Any) -> Iterator[tuple[str, str, float]]:
    """Name, instruction and nanoseconds of each: what ran on streams of GPUs, else on the CPU."""
    gpus = [plane for plane in profile.planes if plane.name.startswith("/device:GPU")]
    for plane in gpus or profile.planes:
        for line in plane.lines:
            if gpus and not line.name.startswith("Stream"):
                continue  # sums of what is on streams
            for event in line.events:
                instruction = dict(event.stats).get("hlo_op", "")
                if gpus or instruction:
                    yield event.name, str(instruction), event.duration_ns


def part_of(kernel: str, operations: frozenset[str]) -> str:
    """The part that a kernel belongs to, by its name and those of JAX's operations in it."""
    if kernel.startswith("anyprec_prologue"):
        return QUANTIZING
    if kernel.startswith(("anyprec_", "ffi_call")):  # on a GPU, on a CPU
        return PRODUCTS
    if any(SCOPE in name for name in operations):
        return ATTENTION
    return PRODUCTS if any(name.endswith("/dot_general") for name in operations) else OTHER


def operations_of(program: str) -> dict[str, frozenset[str]]:
    """The names of JAX's operations in each instruction of a program and in what it fuses."""
    inside: dict[str, set[str]] = collections.defaultdict(set)  # of a computation
    own: dict[str, tuple[set[str], str | None]] = {}  # of an instruction; what it calls
    computation = ""
    for line in program.splitlines():
        if head := re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$", line):
            computation = head[1]
        elif instruction := re.match(r"\s+(?:ROOT )?%?([\w.-]+) = ", line):
            names = set(re.findall(r'op_name="([^"]*)"', line))
            calls = re.search(r"\bcalls=%?([\w.-]+)", line)
            inside[computation] |= names
            own[instruction[1]] = (names, calls[1] if calls else None)
    return {
        instruction: frozenset(names | (inside[calls] if calls else set()))
        for instruction, (names, calls) in own.items()
    }
