"""What a kernel can do wrong, each by its own class."""

from __future__ import annotations


class Fault(Exception):
    """A kernel broke a rule. The message names entry, PTX line, CTA, thread and address."""


class OutOfBounds(Fault):
    """An access outside every allocation, the CTA's shared memory, or the parameters."""


class Misaligned(Fault):
    """An address that is no multiple of what is accessed there."""


class Uninitialised(Fault):
    """A read of a byte or register that was never written."""


class SharedHazard(Fault):
    """Two threads accessed the same shared bytes, one to write, with no barrier between."""


class ClusterHazard(Fault):
    """An access to shared memory of a CTA that may not have started, or may have exited."""


class AsyncHazard(Fault):
    """An access to shared bytes where a copy is still in flight."""


class DependencyHazard(Fault):
    """A dependent launch didn't wait for the one before it, or not before it touched its memory."""


class GlobalRace(Fault):
    """Two unordered threads wrote different values to the same global byte."""


class Divergence(Fault):
    """A warp-wide instruction without all the lanes that it needs."""


class Deadlock(Fault):
    """Threads wait for others that have exited or wait elsewhere."""


class StepLimit(Fault):
    """More instructions than a kernel was allowed: an endless loop."""


class BadPolicy(Fault):
    """A cache hint that is no policy of createpolicy, or a policy for no part of the addresses."""


class Trap(Fault):
    """The kernel stopped itself: a trap, or a device assertion that failed."""


class Unsupported(Fault):
    """PTX that this interpreter does not know."""
