"""Mutated checkpoints: each is refused with CheckpointError or gives a valid tree, in bounds.

    python -m tests.fuzz_checkpoint --count 10000

Every case is a sound checkpoint with one to three mutations: flipped bits, cut or spliced bytes,
and edits of the header, the manifest and the index. Loading it must end within seconds and
within a limit on memory, without a crash. Counts of outcomes are printed as JSON. The case that is
being loaded lies in the folder given by ``--keep``, so one that crashes can be loaded again.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import faulthandler
import json
import pathlib
import random
import re
import resource
import struct
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_anyprec as ap
from jax_anyprec.manifest import FORMAT
from jax_anyprec.tensor import check_tensor
from jax_anyprec.trees import is_packed

SECONDS = 10
"""For one case; then the process ends with a traceback."""

MEMORY = 256 * 2**20
"""Address space that all cases together may take beyond what the process had before."""

JUNK: tuple[Any, ...] = (
    None, True, "array", "", "\0", "../../etc/passwd", "$packed", 0, 1, -1, 31, 33, 2**31, 2**53,
    2**63 - 1, 2**63, 2**64, 10**30, 1.5, -0.0, 1e308, float("nan"), [], {}, [0], [[]], {"k": 64},
    {"$packed": {}}, {"$key": "rbg"}, {"$tuple": []}, {"$int": {"0": "array"}},
)  # fmt: skip
DTYPES = ("BOOL", "U8", "I8", "F16", "BF16", "U32", "F32", "U64", "F64", "C64", "F8_E4M3", "F4")

Case = dict[str, bytes]
"""The files of a checkpoint by name."""

INAPPLICABLE = (AttributeError, LookupError, RecursionError, TypeError, ValueError, struct.error)
"""What a mutation raises where an earlier one left it nothing to change."""

Mutation = Callable[[random.Random, bytes], bytes]


def sound_cases(folder: pathlib.Path) -> list[Case]:
    """Checkpoints of each kind: planes and tiles, one file and several."""
    rng = np.random.default_rng(0)
    dense = jnp.asarray(rng.normal(size=(96, 33)).astype(np.float32))
    codes = rng.integers(0, 8, (2, 5, 40), dtype=np.uint8)
    scales = rng.uniform(size=(2, 5, 1)).astype(np.float16)
    w = ap.quantize(dense, 3, group_size=32)
    tree = {
        "layers": {0: {"w": w, "bias": jnp.ones(33, jnp.bfloat16)}, 1: {"w": w.prepare()}},
        "stacked": [ap.QuantizedTensor.from_codes(codes, scales, scales, bits=3), None],
        "rotated": ap.quantize(dense[:64], 2, rotation=ap.Rotation(64, 7)),
        "rest": (jnp.zeros((0, 3), jnp.int8), jnp.array(True), jax.random.key(0), {}),
    }
    cases = []
    for options in ({}, {"keep_prepared": True}, {"max_shard_bytes": 2000}):
        inner = folder / str(len(cases))
        inner.mkdir()
        ap.save(inner / "m.safetensors", tree, **options)
        cases.append({path.name: path.read_bytes() for path in sorted(inner.iterdir())})
    return cases


def flip(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    end = len(data) if rng.random() < 0.3 else min(len(data), 2000)
    for _ in range(rng.choice((1, 1, 2, 8))):
        changed[rng.randrange(end)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def truncate(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.choice((0, 1, 7, 8, 9, rng.randrange(len(data)), len(data) - 1))]


def splice(rng: random.Random, data: bytes) -> bytes:
    """Bytes from one place put, or put in addition, at another."""
    begin, to = rng.randrange(len(data)), rng.randrange(len(data))
    piece = data[begin : begin + rng.choice((1, 8, 64, 1000))]
    return data[:to] + piece + data[to + rng.choice((0, len(piece))) :]


def header_length(rng: random.Random, data: bytes) -> bytes:
    (length,) = struct.unpack("<Q", data[:8])
    other = rng.choice((0, 1, length - 1, length + 1, len(data), 10**8, 2**31, 2**63, 2**64 - 1))
    return struct.pack("<Q", other) + data[8:]


def replace_number(rng: random.Random, data: bytes) -> bytes:
    """A number in the text replaced by another, as text."""
    spots = list(re.finditer(rb"(?<![\w.])\d+(?!\w)", data[:20000]))
    spot = rng.choice(spots)
    number = rng.choice((b"-1", b"0", b"1e9", b"1.0", b"9" * 5000, b"NaN", b"18446744073709551615"))
    return resized(data, data[: spot.start()] + number + data[spot.end() :])


def duplicate_name(rng: random.Random, data: bytes) -> bytes:
    """An entry of an object written twice."""
    spots = list(re.finditer(rb'"[^"\\]+":("[^"\\]*"|\{[^{}]*\}|\[[^\[\]]*\]|\d+),', data[:20000]))
    spot = rng.choice(spots)
    return resized(data, data[: spot.end()] + spot.group() + data[spot.end() :])


def nest(rng: random.Random, data: bytes) -> bytes:
    """A manifest or header with brackets many levels deep."""
    depth = rng.choice((60, 70, 500, 5000, 200000))
    deep = rng.choice(('{"a":' * depth + "1" + "}" * depth, "[" * depth + "]" * depth, "[" * depth))

    def edit(header: dict[str, Any]) -> None:
        metadata = header.get("__metadata__", {})
        metadata[FORMAT] = '{"version":1,"tree":' + deep + "}"

    return edited(data, edit) if rng.random() < 0.7 else with_header(data, deep.encode())


def edit_header(rng: random.Random, data: bytes) -> bytes:
    """Junk in place of a part of the header."""

    def edit(header: dict[str, Any]) -> None:
        name = rng.choice(list(header))
        entry = header[name]
        match rng.randrange(8):
            case 0:
                header[rng.choice([*header, "new", "../x", "a.planes"])] = header.pop(name)
            case 1:
                del header[name]
            case 2 if "dtype" in entry:
                entry["dtype"] = rng.choice(DTYPES)
            case 3 if "shape" in entry:
                entry["shape"].insert(0, rng.choice((0, 1, 2, 2**31, 2**63, -1)))
            case 4 if entry.get("shape"):
                rng.shuffle(entry["shape"])
            case 5 if "data_offsets" in entry:
                entry["data_offsets"] = header[rng.choice(list(header))].get("data_offsets", [])
            case _:
                replace_part(rng, header)

    return edited(data, edit)


def edit_manifest(rng: random.Random, data: bytes) -> bytes:
    """Junk in place of a part of the manifest."""

    def edit(header: dict[str, Any]) -> None:
        metadata = header.get("__metadata__", {})
        manifest = json.loads(metadata[FORMAT])
        replace_part(rng, manifest)
        metadata[FORMAT] = json.dumps(manifest)

    return edited(data, edit)


def replace_part(rng: random.Random, value: Any) -> None:
    """One item of a nested JSON value becomes junk, or another item, or vanishes."""
    places = list(all_places(value))
    container, key = rng.choice(places)
    match rng.randrange(4):
        case 0:
            other, other_key = rng.choice(places)
            container[key] = json.loads(json.dumps(other[other_key]))
        case 1:
            del container[key]
        case _:
            container[key] = rng.choice(JUNK)


def all_places(value: Any) -> Any:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in list(items):
        yield value, key
        if isinstance(item, dict | list):
            yield from all_places(item)


def edited(data: bytes, edit: Callable[[dict[str, Any]], None]) -> bytes:
    """A file, or an index, whose JSON was changed by a function."""
    if data[:1] == b"{":
        index = json.loads(data)
        edit(index)
        return json.dumps(index).encode()
    header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    edit(header)
    return with_header(data, json.dumps(header).encode())


def with_header(data: bytes, text: bytes) -> bytes:
    end = 8 + struct.unpack("<Q", data[:8])[0]
    return struct.pack("<Q", len(text)) + text + data[end:]


def resized(before: bytes, after: bytes) -> bytes:
    """`after`, an edit of the text in `before`, with the length of the header set right."""
    if before[:1] == b"{":
        return after
    length = struct.unpack("<Q", before[:8])[0] + len(after) - len(before)
    return struct.pack("<Q", max(length, 0) % 2**64) + after[8:]


MUTATIONS: tuple[Mutation, ...] = (
    flip, truncate, splice, header_length, replace_number, duplicate_name, nest,
    edit_header, edit_header, edit_manifest, edit_manifest, edit_manifest,
)  # fmt: skip


def mutate(rng: random.Random, case: Case) -> Case:
    """A copy with one to three mutations, in one of its files or another."""
    changed = dict(case)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        name = rng.choice(list(changed))
        with contextlib.suppress(*INAPPLICABLE):
            changed[name] = rng.choice(MUTATIONS)(rng, changed[name])
    return changed


def outcome(folder: pathlib.Path, case: Case, **options: Any) -> str:
    """What loading a case ends with; anything but a refusal or a valid tree is an exception."""
    for path in folder.iterdir():
        path.unlink()
    for name, data in case.items():
        (folder / name).write_bytes(data)
    try:
        tree = ap.load(folder / "m.safetensors", **options)
    except ap.CheckpointError:
        return "refused"
    except FileNotFoundError:
        assert len(case) > 1, "the file is there"
        return "names a file that isn't there"
    for leaf in jax.tree.leaves(tree, is_leaf=is_packed):
        if isinstance(leaf, ap.QuantizedTensor):
            check_tensor(leaf, "loaded")
        for array in jax.tree.leaves(leaf):
            array.block_until_ready()
    return "valid"


def fuzz(count: int, seed: int, folder: pathlib.Path) -> dict[str, Any]:
    """Load `count` mutated checkpoints and count the outcomes; a violation is an exception."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as made:
        cases = sound_cases(pathlib.Path(made))
    assert all(outcome(folder, case) == "valid" for case in cases)
    counts: collections.Counter[str] = collections.Counter()
    forget_peak()
    slowest, before = 0.0, resident_bytes()
    for _ in range(count):
        case = mutate(rng, rng.choice(cases))
        options = {"bits": rng.choice((None, None, 2)), "memory_map": rng.random() < 0.5}
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        begin = time.perf_counter()
        counts[outcome(folder, case, **options)] += 1
        slowest = max(slowest, time.perf_counter() - begin)
        faulthandler.cancel_dump_traceback_later()
    return {
        "count": count,
        "seed": seed,
        "outcomes": dict(counts),
        "slowest_seconds": round(slowest, 3),
        "peak_growth_bytes": peak_bytes() - before,
    }


def limit_memory() -> None:
    """From now on the process can't have more than MEMORY of additional address space."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY,) * 2)


def resident_bytes() -> int:
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak_bytes() -> int:
    """The most that was resident since `forget_peak`."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def forget_peak() -> None:
    """So that what the process had before, other tests say, doesn't count."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=pathlib.Path, help="folder for the case being loaded")
    arguments = parser.parse_args()
    warnings.simplefilter("error")
    with tempfile.TemporaryDirectory() as made:
        folder = arguments.keep or pathlib.Path(made)
        folder.mkdir(exist_ok=True)
        fuzz(20, arguments.seed, folder)  # loads all that is loaded lazily
        limit_memory()
        print(json.dumps(fuzz(arguments.count, arguments.seed, folder), indent=2))


if __name__ == "__main__":
    main()
