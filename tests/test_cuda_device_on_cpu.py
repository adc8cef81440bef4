"""The tests of test_cuda_device.py on a CPU: they are right, wherever their GPU is."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import pytest
from test_cuda_device import *  # noqa: F403
from test_cuda_device import Target, on


@pytest.fixture
def target() -> Iterator[Target]:
    """A CPU, with its kernels in the place of CUDA's."""
    yield from on(Target(jax.devices("cpu")[0], "cpu", 0))
