"""Importing the package is cheap, touches no device and loads no layers until they are used."""

from __future__ import annotations

import statistics
import subprocess
import sys

CLEAN = """
import sys
before = set(sys.modules)
import jax_anyprec
from jax._src import xla_bridge
assert not xla_bridge._backends, "a device was initialised"
loaded = {m for m in sys.modules if m.startswith("jax_anyprec")}
absent = {f"jax_anyprec.{name}" for name in ("nnx", "linen", "_cpu", "_cuda")}
assert not loaded & absent, loaded
assert not any(m == "flax" or m.startswith("flax.") for m in sys.modules), "flax was imported"
for module in ("gguf", "tokenizers", "rich", "click", "jinja2"):
    assert module not in sys.modules, module
jax_anyprec.status()
assert "jax_anyprec._cpu" in sys.modules
assert not xla_bridge._backends, "status() initialised a device"
jax_anyprec.nnx, jax_anyprec.linen
assert {"jax_anyprec.nnx", "jax_anyprec.linen"} <= set(sys.modules)
assert not xla_bridge._backends, "layers initialised a device"
try:
    jax_anyprec.nothing
except AttributeError as error:
    assert "no attribute 'nothing'" in str(error)
print("ok")
"""

TIMED = """
import time
import jax, flax
start = time.perf_counter()
import jax_anyprec
print(time.perf_counter() - start)
"""


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-P", "-W", "error", "-c", code],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_touches_no_device_and_no_layers() -> None:
    assert run(CLEAN) == "ok"


def test_import_takes_under_a_fifth_of_a_second() -> None:
    assert statistics.median(float(run(TIMED)) for _ in range(5)) < 0.2
