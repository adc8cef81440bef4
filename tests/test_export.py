"""Programs that leave their process: exported, serialized, and kept in the compilation cache."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax import export
from operations import DIFFERENTIABLE, OPERATIONS, K, M, N, Operation, close

import jax_anyprec as ap
from jax_anyprec import _native

# Where there are no CUDA kernels, exporting for CUDA warns that plain XLA is what it gets.
pytestmark = pytest.mark.filterwarnings("ignore:jax_anyprec runs in plain XLA:UserWarning")

CHECKS = [export.DisabledSafetyCheck.custom_call(name) for name in ap.CUSTOM_CALLS]
PLATFORMS = ("cpu", "cuda", "tpu")


def exported(op: Operation, x: Any, *, vjp_order: int = 0, **options: Any) -> export.Exported:
    """An operation with its weights in it, through bytes."""
    run = jax.jit(lambda x: jax.tree.leaves(op.run(x, op.weights)))
    program = export.export(run, disabled_checks=CHECKS, **options)(x)
    return export.deserialize(program.serialize(vjp_order=vjp_order))


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_the_published_names_are_those_of_the_extensions(platform: str) -> None:
    module = getattr(_native, platform)().module
    if module is None:
        assert platform == "cuda"
        pytest.skip(str(_native.cuda().reason))
    published = {name for name in ap.CUSTOM_CALLS if f"_{platform}_" in name}
    assert published == set(module.registrations())


@pytest.mark.parametrize("name", OPERATIONS)
def test_export(name: str) -> None:
    op = OPERATIONS[name]
    close(exported(op, op.x).call(op.x), jax.tree.leaves(op()))


@pytest.mark.parametrize("name", OPERATIONS)
def test_export_to_several_platforms(name: str) -> None:
    """Each platform's part holds its kernels, or plain XLA; one artifact runs on each."""
    op = OPERATIONS[name]
    several = exported(op, op.x, platforms=PLATFORMS)
    assert several.platforms == PLATFORMS
    close(several.call(op.x), jax.tree.leaves(op()))
    for platform in PLATFORMS:
        text = exported(op, op.x, platforms=(platform,)).mlir_module()
        found = {call for call in ap.CUSTOM_CALLS if call in text}
        kernels = platform == "cpu" or (platform == "cuda" and _native.cuda().module is not None)
        assert all(f"_{platform}_" in call for call in found)
        assert bool(found) == (kernels and name != "quantize")  # which is the offline one


@pytest.mark.parametrize("name", OPERATIONS)
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


@pytest.mark.parametrize("prepared", [False, True])
def test_packed_tensors_cross_as_arguments_and_results(prepared: bool) -> None:
    w = OPERATIONS["matmul"].weights
    w = dataclasses.replace(w.prepare() if prepared else w, rotation=ap.Rotation(K, 3))
    run = jax.jit(lambda x, each: (ap.matmul(x, each["w"], act_bits=8), each))
    x = OPERATIONS["matmul"].x
    data = export.export(run, disabled_checks=CHECKS)(x, {"w": w}).serialize()
    close(export.deserialize(data).call(x, {"w": w}), run(x, {"w": w}))
    with pytest.raises(ValueError, match="pytree structure"):
        export.deserialize(data).call(x, {"w": dataclasses.replace(w, rotation=None)})
    with pytest.raises(ValueError, match="k -64, it must be an int from 0"):
        export.deserialize(data.replace(b'"k": 64', b'"k":-64')).call(x, {"w": w})


def test_export_needs_the_published_names() -> None:
    op = OPERATIONS["matmul"]
    with pytest.raises(ValueError, match="jax_anyprec_cpu_matmul"):
        export.export(jax.jit(lambda x: op.run(x, op.weights)))(op.x)


# --- another process ---


def in_process(code: str, *arguments: object, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-P", "-W", "error", "-c", code, *map(str, arguments)],
        capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent), **env},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


SERVE = """
import pathlib, sys
import jax, numpy as np
import jax_anyprec as ap
ap.register_custom_calls()
for path in pathlib.Path(sys.argv[1]).glob("*.program"):
    program = jax.export.deserialize(bytearray(path.read_bytes()))
    np.savez(path.with_suffix(".y.npz"), *program.call(np.load(path.with_suffix(".x.npy"))))
"""


def test_another_process_runs_what_was_exported(tmp_path: Path) -> None:
    """As if it were on another machine: with other instructions than the exporter chose for."""
    for name, op in OPERATIONS.items():
        np.save(tmp_path / f"{name}.x.npy", op.x)
        (tmp_path / f"{name}.program").write_bytes(exported(op, op.x).serialize())
    in_process(SERVE, tmp_path, JAX_ANYPREC_ISA="portable")
    for name, op in OPERATIONS.items():
        with np.load(tmp_path / f"{name}.y.npz") as arrays:
            close(list(arrays.values()), jax.tree.leaves(op()))


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
import jax
from operations import OPERATIONS
hits = []
jax.monitoring.register_event_listener(
    lambda name, **_: hits.append(name) if name == "/jax/compilation_cache/cache_hits" else None
)
for name, op in OPERATIONS.items():
    hits.clear()
    jax.jit(op.run).lower(op.x, op.weights).compile()
    print(name, len(hits))
"""


def test_the_persistent_compilation_cache(tmp_path: Path) -> None:
    """A second process finds the compiled programs, kernel calls and all, in the first's files."""
    env = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    programs = lambda: {f.name for f in tmp_path.iterdir() if not f.name.endswith("-atime")}  # noqa: E731
    assert in_process(CACHED, **env).splitlines() == [f"{name} 0" for name in OPERATIONS]
    first = programs()
    assert len(first) >= len(OPERATIONS)
    assert in_process(CACHED, **env).splitlines() == [f"{name} 1" for name in OPERATIONS]
    assert programs() == first
