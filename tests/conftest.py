"""What all tests share: their order, eight CPU devices, and the real models and texts."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import jax
import pytest

from jax_anyprec import fetch

# For tests of benchmarks, which are not installed. Last, so that the package is the installed one.
sys.path.append(str(Path(__file__).parents[1]))

jax.config.update("jax_num_cpu_devices", 8)  # one computes, unless a test asks for more


LONGEST = (
    "test_cuda_kernels", "test_products", "test_sass", "test_cli", "test_gpu_benchmarks",
    "test_fusion", "test_cuda_device_on_cpu", "test_accuracy",
)  # fmt: skip
"""Files that take the longest begin first, so that no process is left alone with one at the end."""

OPTIMIZED = ("test_accuracy", "test_products")
"""Files whose programs are compiled as users' are: products, and a real model on long texts.

In all others compiling is most of the time, so it is done quickly.
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in LONGEST)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    jax.config.update("jax_disable_most_optimizations", item.path.stem not in OPTIMIZED)


def obtain(name: str) -> Path:
    """A resource's file or folder. Without a network the test is skipped; in CI it fails."""
    try:
        return fetch.fetch(name)
    except fetch.NetworkError as error:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct, a GGUF file."""
    return obtain("smollm2")


@pytest.fixture(scope="session")
def wikipedia_path() -> Path:
    """Articles of the English Wikipedia, a compressed dump."""
    return obtain("wikipedia")


@pytest.fixture(scope="session")
def minilm_path() -> Path:
    """all-MiniLM-L6-v2, a folder."""
    return obtain("minilm")


@pytest.fixture(scope="session")
def lee_path() -> Path:
    """News texts and human judgements of how similar they are, a folder."""
    return obtain("lee")
