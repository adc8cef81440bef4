"""Finds the compiled extensions, checks them against the running jaxlib, registers them once."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax

from .choose import has_cuda_code

ISA_VARIABLE = "JAX_ANYPREC_ISA"

CUSTOM_CALLS = (
    "jax_anyprec_cpu_quantize",
    "jax_anyprec_cpu_int_matmul",
    "jax_anyprec_cpu_matmul",
    "jax_anyprec_cuda_quantize",
    "jax_anyprec_cuda_int_matmul",
    "jax_anyprec_cuda_matmul",
    "jax_anyprec_cuda_fused_matmul",
)
"""Names of the native kernels in compiled programs. `jax.export` must be told to allow them."""


class Unavailable(RuntimeError):
    """An implementation was asked for by name and can't run; the message says why."""


def unavailable(asked: str | None, why: str) -> Unavailable:
    """The error for an implementation that was asked for by name, or None: for the best one."""
    return Unavailable(why if asked is None else f"implementation={asked!r} is unavailable: {why}")


@dataclasses.dataclass(frozen=True)
class Backend:
    """A compiled extension, or the reason why there is none."""

    module: Any
    reason: str | None

    def require(self, asked: str | None) -> Any:
        """The extension, or `Unavailable` with the reason."""
        if self.module is None:
            raise unavailable(asked, str(self.reason))
        return self.module


@functools.cache
def cpu() -> Backend:
    """The CPU extension, registered with XLA on first use."""
    return _load("jax_anyprec._cpu", "cpu")


@functools.cache
def cuda() -> Backend:
    """The CUDA extension, registered with XLA on first use. It needs no driver and no device."""
    if importlib.util.find_spec("jax_anyprec._cuda") is None:
        return Backend(
            None, "jax_anyprec was built without CUDA kernels; docs/gpu.md says how to build them"
        )
    return _load("jax_anyprec._cuda", "CUDA")


def cuda_devices(module: Any) -> tuple[dict[str, Any], ...]:
    """The GPUs that the CUDA extension finds: name, arch (90 for 9.0) and multiprocessors of each.

    They are looked for once, since that takes tens of milliseconds and each lowering asks.
    """
    return _found_by(module.devices)


@functools.cache
def _found_by(find: Callable[[], list[dict[str, Any]]]) -> tuple[dict[str, Any], ...]:
    return tuple(find())


def register_custom_calls() -> None:
    """Make the native kernels known to XLA, in a process that runs what another one exported.

    Whatever uses an operation of this package does so by itself; a deserialized function does not.
    The CUDA kernels are registered where they were built; `status` says whether they are there.

    Raises:
      Unavailable: there is no CPU extension that fits the running jaxlib; the message says why.
    """
    cuda()
    backend = cpu()
    if backend.module is None:
        raise Unavailable(f"the CPU kernels can't be registered: {backend.reason}")


def status() -> dict[str, dict[str, Any]]:
    """Whether each backend is available, why not, and what its kernels and devices are.

    Loads the extensions, and asks CUDA's driver for its devices; initialises no device of JAX.
    """
    return {
        "xla": {"available": True, "reason": None},
        "cpu": _cpu_status(cpu()),
        "cuda": _cuda_status(cuda()),
    }


def _cpu_status(backend: Backend) -> dict[str, Any]:
    entry: dict[str, Any] = {"available": backend.module is not None, "reason": backend.reason}
    if backend.module is not None:
        entry["isa"] = backend.module.isa()
        entry["isa_available"] = list(backend.module.available_isas())
    return entry


def _cuda_status(backend: Backend) -> dict[str, Any]:
    if backend.module is None:
        return {"available": False, "reason": backend.reason}
    devices, compiled = cuda_devices(backend.module), backend.module.architectures()
    reasons = [why for why in (no_code(device, compiled) for device in devices) if why is not None]
    reason = None
    if not devices:
        reason = backend.module.device_error()
    elif len(reasons) == len(devices):
        reason = "; ".join(reasons)
    return {
        "available": reason is None,
        "reason": reason,
        "architectures": list(compiled),
        "devices": [dict(device) for device in devices],
    }


def no_code(device: dict[str, Any], compiled: Sequence[str]) -> str | None:
    """Why kernels compiled for these architectures don't run on a device; None if they do."""
    if has_cuda_code(device["arch"], compiled):
        return None
    return (
        f"{device['name']} has compute capability {device['arch'] / 10}, and the CUDA kernels are "
        f"compiled for {', '.join(compiled)}"
    )


def _load(module_name: str, platform: str) -> Backend:
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        return Backend(None, f"{module_name} can't be imported: {error}")
    built, running = module.ffi_api_version(), _running_api_version()
    # A newer or foreign FFI API would be rejected at the first JAX operation and take the whole
    # process with it, so it is never registered.
    if running is None:
        return Backend(None, "the FFI API version of the installed jaxlib can't be read")
    if built[0] != running[0] or built > running:
        return Backend(
            None,
            f"built for XLA FFI {built[0]}.{built[1]}, but the installed jaxlib has "
            f"{running[0]}.{running[1]}; reinstall jax_anyprec or upgrade jaxlib",
        )
    for name, capsule in module.registrations().items():
        jax.ffi.register_ffi_target(name, capsule, platform=platform)
    return Backend(module, None)


def _running_api_version() -> tuple[int, int] | None:
    spec = importlib.util.find_spec("jaxlib")
    if spec is None or not spec.submodule_search_locations:
        return None
    header = pathlib.Path(spec.submodule_search_locations[0], "include/xla/ffi/api/c_api.h")
    try:
        text = header.read_text()
    except OSError:
        return None
    found = dict(re.findall(r"#define XLA_FFI_API_(MAJOR|MINOR) (\d+)", text))
    return (int(found["MAJOR"]), int(found["MINOR"])) if len(found) == 2 else None
