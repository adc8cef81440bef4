"""The machine code of the CUDA kernels: tensor-core instructions, wide copies, no spills in loops.

Read from the built extension, for each architecture it was compiled for, with NVIDIA's disassembler
(``pip install "jax-anyprec[sass]"``). No GPU is needed.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
from typing import NamedTuple

import pytest

from jax_anyprec import _native

_cuda = _native.cuda().module

METHODS = ("planes", "codes", "float")
TENSOR_CORES = {"planes": "BMMA", "codes": "IMMA", "float": "HMMA"}
TILES = {
    "planes": ("narrow", "whole"),
    "codes": ("narrow", "medium", "wide", "whole"),
    "float": ("narrow", "medium", "wide", "whole"),
}
REGISTERS = 64 * 1024
"""Of a multiprocessor, for all threads of its blocks."""

SHARED = 99 * 1024
"""Bytes that a block may use on every chip from compute capability 8.0 on."""

MOST_STACK = 24
"""Bytes of a thread's registers that a kernel may keep in local memory, outside its loop."""


def cuobjdump() -> str | None:
    """Where the program is: on the PATH, or among the packages of the extra."""
    found = importlib.util.find_spec("nvidia")
    folders = found.submodule_search_locations if found else None
    wheels = [str(bin) for at in folders or () for bin in pathlib.Path(at).glob("cu*/bin")]
    return shutil.which("cuobjdump", path=os.pathsep.join([os.environ.get("PATH", ""), *wheels]))


MISSING = (
    "the extension _cuda is not built"
    if _cuda is None
    else "there is no cuobjdump: pip install 'jax-anyprec[sass]'"
    if cuobjdump() is None
    else None
)
pytestmark = pytest.mark.skipif(
    MISSING is not None and (_cuda is None or os.environ.get("CI") != "true"),
    reason=str(MISSING),
)


def dump(*arguments: str) -> str:
    program = cuobjdump()
    assert program is not None, MISSING
    # It calls nvdisasm, which lies beside it.
    path = f"{pathlib.Path(program).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return subprocess.run(
        [program, *arguments, _cuda.__file__],
        capture_output=True, text=True, timeout=300, check=True, env={**os.environ, "PATH": path},
    ).stdout  # fmt: skip


def architectures() -> list[str]:
    """Those with machine code: "90a" and so on."""
    names = _cuda.architectures() if _cuda is not None else []
    return [name.removesuffix("-real") for name in names if name.endswith("-real")]


def has_planes(arch: str) -> bool:
    return int(arch.rstrip("af")) < 100


def launched() -> list[tuple[str, str]]:
    """The methods that each architecture may use."""
    return [(a, m) for a in architectures() for m in METHODS if m != "planes" or has_planes(a)]


class Usage(NamedTuple):
    registers: int
    stack: int


@functools.cache
def usage(arch: str) -> dict[str, Usage]:
    """What each kernel takes of a thread, for all kernels of an architecture."""
    text = dump("-arch", f"sm_{arch}", "-res-usage")
    found = re.findall(r"Function (\w+):\s*REG:(\d+) STACK:(\d+)", text)
    return {name: Usage(int(registers), int(stack)) for name, registers, stack in found}


def kernel(method: str, bits: int, tile: str) -> str:
    return f"anyprec_{method}_w{bits}_{tile}"


@functools.cache
def instructions(arch: str, *kernels: str) -> dict[str, list[str]]:
    """The opcodes of these kernels, with their modifiers, in order."""
    text = dump("-arch", f"sm_{arch}", "-sass", "-fun", ",".join(kernels))
    parts = re.split(r"Function : (\w+)", text)[1:]
    opcode = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ +)?([A-Z][\w.]*)", re.M)
    found = {name: opcode.findall(body) for name, body in zip(parts[::2], parts[1::2], strict=True)}
    assert set(found) == set(kernels)
    return found


def loop(opcodes: list[str]) -> list[str]:
    """From the first product of the tensor cores to the last, which is where all the time goes."""
    cores = set(TENSOR_CORES.values())
    places = [i for i, opcode in enumerate(opcodes) if opcode.split(".")[0] in cores]
    return opcodes[places[0] : places[-1] + 1]


def products(arch: str, method: str) -> dict[str, list[str]]:
    """The instructions of a method's kernels for 3 bits.

    Weights of 3 bits are taken from two fields, so their kernels have what those of others have.
    """
    return instructions(arch, *(kernel(method, 3, tile) for tile in TILES[method]))


def launch(method: str, bits: int, tile: str) -> dict[str, object]:
    """The launch of a product in such tiles, without operands."""
    addresses = dict.fromkeys(
        ("x", "tiles", "scales", "offsets", "bias", "signs", "peaks", "out", "workspace", "parts"),
        0,
    )
    dtypes = dict.fromkeys(("scale_dtype", "offset_dtype", "bias_dtype", "out_dtype"), "float32")
    all_launches = _cuda.launches(
        rows=64, n=64, k=512, act_bits=0 if method == "float" else 2, weight_bits=bits,
        group_size=512, act_group_size=512, x_dtype="float32", rotated=False, integers=False,
        method=method, tile=tile, splits=1, clustered=False, quantizes=False, arch=90,
        multiprocessors=132, block=0, **addresses, **dtypes,
    )  # fmt: skip
    return next(one for one in all_launches if one["kernel"] == kernel(method, bits, tile))


@pytest.mark.parametrize("arch", architectures())
def test_all_kernels_have_code(arch: str) -> None:
    names = {
        kernel(method, bits, tile)
        for method in METHODS
        for bits in range(1, _cuda.MAX_BITS + 1)
        for tile in TILES[method]
    }
    assert names <= set(usage(arch))


@pytest.mark.parametrize("arch", architectures())
def test_loops_spill_nothing(arch: str) -> None:
    """Some kernels use all registers there are, and keep a few values aside for the epilogue."""
    spilled = {name: use.stack for name, use in usage(arch).items() if use.stack}
    assert all(stack <= MOST_STACK for stack in spilled.values()), spilled
    launched_here = {
        kernel(method, bits, tile)
        for a, method in launched()
        for bits in range(1, _cuda.MAX_BITS + 1)
        for tile in TILES[method]
        if a == arch
    }
    names = sorted(launched_here & set(spilled))
    for name, opcodes in instructions(arch, *names).items() if names else ():
        spills = [opcode for opcode in loop(opcodes) if opcode.startswith(("LDL", "STL"))]
        assert not spills, name


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("arch", architectures())
def test_a_block_fits_a_multiprocessor(arch: str, method: str) -> None:
    for bits in range(1, _cuda.MAX_BITS + 1):
        for tile in TILES[method]:
            one = launch(method, bits, tile)
            registers = -(-usage(arch)[kernel(method, bits, tile)].registers // 8) * 8
            assert one["threads"] * registers <= REGISTERS, kernel(method, bits, tile)
            assert one["shared"] <= SHARED, kernel(method, bits, tile)


@pytest.mark.parametrize("arch", [arch for arch in architectures() if not has_planes(arch)])
def test_no_planes_without_1_bit_tensor_cores(arch: str) -> None:
    with pytest.raises(ValueError, match="no 1-bit tensor cores"):
        _cuda.plan(
            rows=64, n=64, k=512, act_bits=1, weight_bits=1, group_size=512, act_group_size=512,
            x_dtype="float32", rotated=False, integers=False, arch=int(arch.rstrip("af")),
            multiprocessors=100, clusters=True, method="planes",
        )  # fmt: skip


@pytest.mark.parametrize(("arch", "method"), launched())
def test_products_are_of_tensor_cores(arch: str, method: str) -> None:
    for name, opcodes in products(arch, method).items():
        used = {opcode.split(".")[0] for opcode in opcodes}
        assert TENSOR_CORES[method] in used, name
        assert not used & (set(TENSOR_CORES.values()) - {TENSOR_CORES[method]}), name
        inside = {opcode.split(".")[0] for opcode in loop(opcodes)}
        assert not inside & {"POPC", "CALL"}, f"{name} is emulated: {sorted(inside)}"


def streams(*bits: int) -> list[str]:
    """The kernels of few rows for these numbers of bits."""
    return [
        f"anyprec_stream_{method}_w{b}_n{columns}"
        for method in ("codes", "float")
        for b in bits
        for columns in (32, 64)
    ]


def begins_early(arch: str) -> bool:
    """Whether code has dependent launches and clusters."""
    return int(arch.rstrip("af")) >= 90


@pytest.mark.parametrize("arch", architectures())
def test_few_rows_spill_nothing(arch: str) -> None:
    for name in streams(*range(1, _cuda.MAX_BITS + 1)):
        use = usage(arch)[name]
        assert not use.stack, name
        assert use.registers * 2 * 256 <= REGISTERS, name  # two blocks of 256 threads


@pytest.mark.parametrize("arch", architectures())
def test_few_rows_are_read_with_wide_copies(arch: str) -> None:
    for name, opcodes in instructions(arch, *streams(1, 4, 8)).items():
        assert TENSOR_CORES[name.split("_")[2]] in {opcode.split(".")[0] for opcode in opcodes}
        copies = [opcode for opcode in opcodes if opcode.startswith("LDGSTS")]
        assert all(".128" in opcode and ".BYPASS" in opcode for opcode in copies), (name, copies)
        assert any(".LTC256B" in opcode for opcode in copies), (name, copies)  # weights


EARLY = {
    "anyprec_prologue_codes": {"PREEXIT"},
    "anyprec_codes_w3_narrow": {"ACQBULK", "PREEXIT"},
    "anyprec_float_w3_whole": {"ACQBULK", "PREEXIT"},
    "anyprec_reduce": {"ACQBULK"},
    **{name: {"ACQBULK", "PREEXIT", "UCGABAR_ARV", "UCGABAR_WAIT"} for name in streams(2, 3)},
}
"""Instructions that let the next launch begin, wait for the one before, and meet in a cluster."""


@pytest.mark.parametrize("arch", architectures())
def test_launches_begin_early_and_blocks_meet(arch: str) -> None:
    every = set().union(*EARLY.values())
    for name, opcodes in instructions(arch, *EARLY).items():
        used = {opcode.split(".")[0] for opcode in opcodes} & every
        assert used == (EARLY[name] if begins_early(arch) else set()), name


@pytest.mark.parametrize(("arch", "method"), launched())
def test_copies_are_16_bytes_and_asynchronous(arch: str, method: str) -> None:
    for name, opcodes in products(arch, method).items():
        copies = [opcode for opcode in opcodes if opcode.startswith("LDGSTS")]
        assert copies, name
        assert all(".128" in opcode and ".BYPASS" in opcode for opcode in copies), (name, copies)
        assert any(opcode.startswith("LDS") and ".128" in opcode for opcode in opcodes), name
