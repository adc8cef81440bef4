"""`Arena`: memory for weights that a CPU reads fast, a few large pages in place of many small."""

from __future__ import annotations

import contextlib
import math
import mmap
from typing import Any, TypeVar

import jax
import numpy as np

Tree = TypeVar("Tree")

CHUNK_BYTES = 64 * 2**20
"""Address space that is asked for at a time; what stays unused takes no memory."""
ALIGNMENT = 64
"""Of each array: a cache line, and what XLA asks of a buffer that it uses in place."""


class Arena:
    """Memory that weights are copied into, one after another, for reading them from it fast.

    Decoding reads all weights for each token, as fast as memory gives them. Arrays that XLA makes
    lie in pages of 4 KiB, at whose ends a processor's reading ahead stops. An arena asks the
    operating system for huge pages (Linux: ``madvise``), and lays out arrays without gaps.

    Its memory is freed with the last array in it, so place in one arena what is used together:

        model = arena.place(model)
    """

    def __init__(self) -> None:
        self._chunk = np.empty(0, np.uint8)
        self._used = 0

    def place(self, tree: Tree) -> Tree:
        """The same pytree with each array that lies in a CPU's memory copied into the arena.

        Arrays on other devices or on several, and leaves that are no arrays, stay as they are. Must
        not be called under tracing, whose arrays have no place yet.
        """
        return jax.tree.map(lambda leaf: self._move(leaf) if _on_cpu(leaf) else leaf, tree)

    def _move(self, array: jax.Array) -> jax.Array:
        source = np.asarray(array)
        place = self._take(source.nbytes).view(source.dtype).reshape(source.shape)
        place[...] = source
        # From here on only JAX knows of this memory, so nobody changes what it holds.
        device = array.sharding if array.committed else None
        return jax.device_put(place, device, may_alias=True)

    def _take(self, size: int) -> np.ndarray:
        """The next `size` bytes."""
        begin = -(-self._used // ALIGNMENT) * ALIGNMENT
        if begin + size > self._chunk.size:
            self._chunk, begin = _huge_pages(max(size, CHUNK_BYTES)), 0
        self._used = begin + size
        return self._chunk[begin : self._used]


def _on_cpu(leaf: Any) -> bool:
    if not isinstance(leaf, jax.Array):
        return False
    devices = leaf.devices()  # of a tracer: an error that says so
    return [d.platform for d in devices] == ["cpu"] and not jax.dtypes.issubdtype(
        leaf.dtype, jax.dtypes.extended
    )


def _huge_pages(size: int) -> np.ndarray:
    """Fresh memory ``uint8[>= size]``, in huge pages where the system has them."""
    # Private: shared memory, Python's default, has huge pages by another switch.
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = mmap.mmap(-1, math.ceil(size / mmap.PAGESIZE) * mmap.PAGESIZE, flags=private)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # of a kernel without them: it is slower, no worse
            memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)
