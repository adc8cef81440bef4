"""Programs that leave their process: exported, serialized, and kept in the compilation cache."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax import export
from operations import DIFFERENTIABLE, OPERATIONS, M, N, Operation, close

import jax_anyprec as ap
from jax_anyprec import _native

CHECKS = [export.DisabledSafetyCheck.custom_call(name) for name in ap.CUSTOM_CALLS]
PLATFORMS = ("cpu", "cuda", "tpu")

# The others take the bits of words apart by a bitcast, which XLA can't do at a symbolic size.
SYMBOLIC = [name for name in OPERATIONS if name not in ("quantize", "QuantEmbed")]


def exported(op: Operation, x: Any, *, vjp_order: int = 0, **options: Any) -> export.Exported:
    """An operation with its weights in it, through bytes."""
    run = jax.jit(lambda x: jax.tree.leaves(op.run(x, op.weights)))
    program = export.export(run, disabled_checks=CHECKS, **options)(x)
    return export.deserialize(program.serialize(vjp_order=vjp_order))


def test_the_published_names_are_those_of_the_extension() -> None:
    module = _native.cpu().require("cpu")
    assert set(ap.CUSTOM_CALLS) == set(module.registrations())


@pytest.mark.parametrize("name", OPERATIONS)
def test_export(name: str) -> None:
    op = OPERATIONS[name]
    close(exported(op, op.x).call(op.x), jax.tree.leaves(op()))


@pytest.mark.parametrize("name", OPERATIONS)
def test_export_to_several_platforms(name: str) -> None:
    """The CPU's part holds the kernels, that of the others plain XLA; one artifact runs on each."""
    op = OPERATIONS[name]
    several = exported(op, op.x, platforms=PLATFORMS)
    assert several.platforms == PLATFORMS
    close(several.call(op.x), jax.tree.leaves(op()))
    elsewhere = exported(op, op.x, platforms=PLATFORMS[1:])
    assert not any(call in elsewhere.mlir_module() for call in ap.CUSTOM_CALLS)


@pytest.mark.parametrize("name", SYMBOLIC)
def test_export_with_a_symbolic_batch(name: str) -> None:
    op = OPERATIONS[name]
    (size,) = export.symbolic_shape("b")
    program = exported(op, jax.ShapeDtypeStruct((size, *op.x.shape[1:]), op.x.dtype))
    for rows in (1, M, 40):
        x = np.resize(op.x, (rows, *op.x.shape[1:]))
        close(program.call(x), jax.tree.leaves(op.run(x, op.weights)))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_export_with_its_derivative(name: str) -> None:
    op = OPERATIONS[name]
    cotangent = np.ones((M, N), np.float32)
    _, pull = jax.vjp(lambda x: op.run(x, op.weights), op.x)
    program = exported(op, op.x, vjp_order=1).vjp()
    close(program.call(op.x, cotangent)[0], pull(cotangent)[0])


def test_export_needs_the_published_names() -> None:
    op = OPERATIONS["matmul"]
    with pytest.raises(ValueError, match="jax_anyprec_cpu_matmul"):
        export.export(jax.jit(lambda x: op.run(x, op.weights)))(op.x)


# --- another process ---


def in_process(code: str, *arguments: object, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-P", "-W", "error", "-c", code, *map(str, arguments)],
        capture_output=True, text=True, timeout=120, env={**os.environ, **env}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


SERVE = """
import pathlib, sys
import jax, numpy as np
import jax_anyprec as ap
program = jax.export.deserialize(bytearray(pathlib.Path(sys.argv[1]).read_bytes()))
ap.register_custom_calls()
x, y = np.load(sys.argv[2]), program.call(np.load(sys.argv[2]))[0]
np.save(sys.argv[3], y)
"""


def test_another_process_runs_what_was_exported(tmp_path: Path) -> None:
    op = OPERATIONS["matmul"]
    run = jax.jit(lambda x: [op.run(x, op.weights)])
    program = export.export(run, disabled_checks=CHECKS, platforms=PLATFORMS)(op.x)
    (tmp_path / "program").write_bytes(program.serialize())
    np.save(tmp_path / "x.npy", op.x)
    in_process(SERVE, tmp_path / "program", tmp_path / "x.npy", tmp_path / "y.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), run(op.x)[0])


def test_registering_says_why_it_can_not() -> None:
    code = """
import sys
sys.modules["jax_anyprec._cpu"] = None
import jax_anyprec as ap
try: ap.register_custom_calls()
except ap.Unavailable as error: print(error)
"""
    assert "can't be registered: jax_anyprec._cpu can't be imported" in in_process(code)


CACHED = """
import jax, numpy as np
from jax import monitoring
events = []
monitoring.register_event_listener(lambda name, **_: events.append(name))
import jax_anyprec as ap
w = ap.QuantizedTensor.from_codes(np.ones((3, 64), np.uint8), np.ones((3, 1), np.float32), bits=2)
y = jax.jit(lambda x: ap.matmul(x, w, act_bits=2))(np.ones((2, 64), np.float32))
assert (np.asarray(y) == -64).all(), y
print("hit" if "/jax/compilation_cache/cache_hits" in events else "miss")
"""


def test_the_persistent_compilation_cache(tmp_path: Path) -> None:
    """The second process takes the compiled kernel call from the first one's files."""
    env = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    programs = lambda: {f.name for f in tmp_path.iterdir() if not f.name.endswith("-atime")}  # noqa: E731
    assert in_process(CACHED, **env) == "miss"
    first = programs()
    assert any("lambda" in name for name in first), first
    assert in_process(CACHED, **env) == "hit"
    assert programs() == first
