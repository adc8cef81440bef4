"""Each instruction set of the machine, forced by JAX_ANYPREC_ISA, runs the tests of products."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

import jax_anyprec as ap

HERE = pathlib.Path(__file__).parent
CPU = ap.status()["cpu"]
OTHERS = [isa for isa in CPU.get("isa_available", []) if isa != CPU["isa"]]

TESTS = (
    "test_integers_are_exact or test_largest_sums or test_floats or test_group_beyond or "
    "test_a_bad_token or test_non_finite or test_activation_quantizer_agrees"
)


def run(isa: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A Python process with an instruction set; XLA's own code is not what it tests."""
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
    return subprocess.run(
        # -P keeps the working directory, a source tree without the extension, off the path.
        [sys.executable, "-P", "-W", "error", *arguments],
        capture_output=True, text=True, timeout=600, check=False,
        env={**os.environ, "XLA_FLAGS": flags, "JAX_ANYPREC_ISA": isa},
    )  # fmt: skip


def test_the_best_instruction_set_is_chosen() -> None:
    """test_products.py, run plainly, covers this one."""
    if os.environ.get("JAX_ANYPREC_ISA"):
        pytest.skip("one is forced")
    assert CPU["available"], CPU["reason"]
    assert CPU["isa"] == CPU["isa_available"][0]
    assert CPU["isa_available"][-1] == "portable"


@pytest.mark.parametrize("isa", OTHERS)
def test_products_with(isa: str) -> None:
    options = ("-q", "-n", "0", "-p", "no:cacheprovider", "-k", TESTS)
    done = run(isa, "-m", "pytest", *options, str(HERE / "test_products.py"))
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout


@pytest.mark.parametrize("isa", CPU.get("isa_available", []))
def test_a_forced_instruction_set_is_the_one_in_use(isa: str) -> None:
    done = run(isa, "-c", "import jax_anyprec as ap; print(ap.status()['cpu']['isa'])")
    assert done.stdout.strip() == isa, done.stderr


UNKNOWN = """
import warnings
import numpy as np
import jax_anyprec as ap
status = ap.status()["cpu"]
assert not status["available"]
assert "JAX_ANYPREC_ISA is 'sse9'" in status["reason"], status
assert "portable" in status["reason"], status
w = ap.QuantizedTensor.from_codes(np.ones((3, 64), np.uint8), np.ones((3, 1), np.float32), bits=2)
x = np.ones((2, 64), np.float32)
for name in ("cpu", "cpu_codes", "cpu_planes"):
    try:
        ap.matmul(x, w, act_bits=2, implementation=name)
    except ap.Unavailable as error:
        assert "sse9" in str(error) and repr(name) in str(error), error
    else:
        raise AssertionError(name)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    y = ap.matmul(x, w, act_bits=2)
messages = [str(c.message) for c in caught]
assert any("plain XLA" in m and "sse9" in m for m in messages), messages
assert (np.asarray(y) == -64).all(), y
print("ok")
"""


def test_an_unknown_name_is_a_recorded_reason() -> None:
    done = run("sse9", "-c", UNKNOWN)
    assert done.stdout.strip() == "ok", done.stderr
