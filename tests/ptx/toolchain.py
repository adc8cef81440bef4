"""Finds nvcc, and compiles CUDA sources to PTX."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path


def find_nvcc() -> Path | None:
    """nvcc on PATH, under CUDA_HOME, or of the PyPI package nvidia-cuda-nvcc."""
    if found := shutil.which("nvcc"):
        return Path(found)
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [Path(home) for home in homes if home]
    spec = importlib.util.find_spec("nvidia")
    for place in (spec.submodule_search_locations or []) if spec else []:
        folders += sorted(p for p in Path(place).iterdir() if p.is_dir())
    return next((f / "bin" / "nvcc" for f in folders if (f / "bin" / "nvcc").is_file()), None)


def compile(*sources: Path | str, arch: str = "sm_80", options: Sequence[str] = ()) -> str:
    """The PTX of CUDA files, one after another. Kept until they or what they include change."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise FileNotFoundError("nvcc: neither on PATH nor in CUDA_HOME nor in nvidia-cuda-nvcc")
    folder = Path(tempfile.gettempdir()) / f"ptx-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return "\n".join(_compile(nvcc, Path(s).resolve(), arch, options, folder) for s in sources)


def _compile(nvcc: Path, source: Path, arch: str, options: Sequence[str], folder: Path) -> str:
    command = [str(nvcc), "-ptx", f"-arch={arch}", "-std=c++20", *options, str(source)]
    name = folder / hashlib.sha256(repr(command).encode()).hexdigest()[:32]
    ptx, known = name.with_suffix(".ptx"), name.with_suffix(".json")
    if known.exists() and ptx.exists():
        digests = json.loads(known.read_text())
        if digests == {file: _digest(Path(file)) for file in digests}:
            return ptx.read_text()
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        new, depends = Path(scratch) / "new.ptx", Path(scratch) / "depends"
        outcome = subprocess.run(
            [*command, "-o", str(new), "-MD", "-MF", str(depends)], capture_output=True, text=True
        )
        if outcome.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{outcome.stdout}{outcome.stderr}")
        files = _dependencies(depends.read_text())
        os.replace(new, ptx)
        state = Path(scratch) / "state"
        state.write_text(json.dumps({file: _digest(Path(file)) for file in files}))
        os.replace(state, known)
    return ptx.read_text()


def _dependencies(text: str) -> list[str]:
    """The files of a make rule."""
    return text.split(":", 1)[1].replace("\\\n", " ").split()


def _digest(file: Path) -> str | None:
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.exists() else None
