"""Runs PTX on the CPU, in NumPy, and finds what kernels do wrong there.

::

    module = ptx.load(ptx.compile("kernel.cu"))
    memory = ptx.Memory()
    x, y = memory.place(array), memory.reserve(400)
    module.run("entry", grid=(2, 1, 1), block=(64, 1, 1), params=struct.pack("<QQ", x, y),
               memory=memory)
    memory.read(y, np.float32, 100)

It covers what kernels for sm_80 use, inline assembly included, thread block clusters, and launches
that depend on the one before. Every access is checked: bounds, alignment, initialisation, and that
barriers order what threads share; see `faults`.
"""

from .faults import (
    AsyncHazard,
    BadPolicy,
    ClusterHazard,
    Deadlock,
    DependencyHazard,
    Divergence,
    Fault,
    GlobalRace,
    Misaligned,
    OutOfBounds,
    SharedHazard,
    StepLimit,
    Trap,
    Uninitialised,
    Unsupported,
)
from .memory import Memory
from .module import Module, load
from .toolchain import compile, find_nvcc

__all__ = [
    "AsyncHazard",
    "BadPolicy",
    "ClusterHazard",
    "Deadlock",
    "DependencyHazard",
    "Divergence",
    "Fault",
    "GlobalRace",
    "Memory",
    "Misaligned",
    "Module",
    "OutOfBounds",
    "SharedHazard",
    "StepLimit",
    "Trap",
    "Uninitialised",
    "Unsupported",
    "compile",
    "find_nvcc",
    "load",
]
