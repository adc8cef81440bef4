"""The GPU benchmarks without a GPU: products on the CPU, arithmetic of figures, and compilation."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.gpu import contestants, cutlass, data, products, rates, roofline, summary, timing
from benchmarks.gpu.rates import Peaks
from benchmarks.gpu.shapes import FULL, QUICK, SMOKE
from tests.layers import Layer
from tests.ptx import toolchain
from tests.ptx.memory import Memory
from tests.ptx.module import Module

REPOSITORY = Path(__file__).parent.parent
PEAKS = Peaks({"b1": 8e15, "int8": 2e15, "bf16": 1e15}, 3e12)
SMALL = contestants.Case(Layer("small", 256, 256), 5, 2**15)


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env=os.environ | environment,
        check=False,
    )


# --- rates ---


@pytest.fixture(scope="module")
def nvcc() -> str:
    path = shutil.which("nvcc")
    if path is None:
        if os.environ.get("CI") == "true":
            pytest.fail("there is no nvcc")
        pytest.skip("there is no nvcc")
    return path


INSTRUCTIONS = {
    "8.0": {"BMMA", "IMMA", "HMMA"},
    "9.0": {"BMMA", "IMMA", "HMMA", "BGMMA", "IGMMA", "HGMMA"},
}


@pytest.mark.parametrize("arch", INSTRUCTIONS)
def test_rates_compile_to_the_instructions_they_are_named_after(
    arch: str, nvcc: str, tmp_path: Path
) -> None:
    binary = tmp_path / "rates.cubin"
    built = run(
        *rates.compile_command(rates.SOURCE, arch, "-cubin", "-Xptxas", "-v", "-o", str(binary))
    )
    assert built.returncode == 0, built.stderr
    spilled = re.findall(r"(\d+) bytes spill stores", built.stderr)
    assert len(spilled) > 15
    assert set(spilled) == {"0"}
    disassembler = shutil.which("nvdisasm")
    if disassembler is None:
        return
    code = run(disassembler, "-c", str(binary)).stdout
    opcodes = re.findall(r"\b([A-Z]+MMA)\.", code)
    assert set(opcodes) - {"FFMA"} == INSTRUCTIONS[arch]
    # Eight accumulators of a warp; sixteen products between two waits.
    assert opcodes.count("BMMA") == 2 * 8
    assert opcodes.count("BGMMA") == ("BGMMA" in INSTRUCTIONS[arch]) * 16


def elements(words: np.ndarray, kind: str) -> np.ndarray:
    """``uint32[...]`` to ``int64[..., elements]``."""
    octets = words[..., None].view(np.uint8)
    if kind == "b1":
        return np.unpackbits(octets, axis=-1).astype(np.int64)
    return octets.view(kind).astype(np.int64)


@pytest.mark.parametrize("from_shared", [0, 1])
@pytest.mark.parametrize(("number", "kind"), [(0, "b1"), (1, "int8")])
def test_rates_multiply_what_they_say(number: int, kind: str, from_shared: int, nvcc: str) -> None:
    """All products of a warp are of two fragments A by eight B; two warps do the same."""
    text = toolchain.compile(rates.SOURCE, options=["-O3"])
    module = Module(re.sub(r"mov\.u64\s+(%rd\d+), %clock64;", r"mov.u64 \1, 0;", text))
    name = f"mma_kernelIL4Type{number}ELS0_{number}ELb{from_shared}E"
    (entry,) = (e for e in module.entries if name in e)
    random = np.random.default_rng(number)
    a = random.integers(2**32, size=(2, 4, 32), dtype=np.uint32)  # fragment, word, lane
    b = random.integers(2**32, size=(4, 32, 4), dtype=np.uint32)  # pair, lane, words of both
    memory, steps, threads = Memory(), 3, 64
    sums = memory.place(np.zeros(threads, np.uint32))
    pointers = (memory.place(a), memory.place(b), sums, memory.place(np.zeros(1, np.int64)))
    params = struct.pack("<QQi4xQQ", *pointers[:2], steps, *pointers[2:])
    module.run(entry, grid=(1, 1, 1), block=(threads, 1, 1), params=params, memory=memory)
    # Lanes alike modulo 4 hold the same indices along K, the last two words of A and the second
    # of B the upper half of them.
    columns = b.reshape(4, 32, 2, 2).transpose(0, 2, 3, 1).reshape(8, 2, 8, 4)
    expected = 0
    for i, half in enumerate(columns):
        rows = a[i % 2].reshape(2, 2, 8, 4)  # half, rows and rows + 8, row, word along K
        left = elements(rows, kind).sum((1, 2))
        expected += (left * elements(half, kind).sum(1)).sum()
    found = memory.read(sums, np.uint32, threads).astype(np.int64).sum()
    assert (found - 2 * steps * expected) % 2**32 == 0


def report(**changes: object) -> dict:
    row = {"instruction": "mma", "unit": "b1", "operands": "registers", "warps_per_sm": 8}
    row |= {"right": True, "tops": 9000.0, "ops_per_clock_per_sm": 38000, "sm_mhz": 1755}
    lines = [
        {"device": "H", "l2_bytes": 2**15},
        row | changes,
        row | {"tops": 7000.0},
        row | {"unit": "scalar", "tops": 30.0},
        {"path": "read", "gigabytes_per_second": 2900.0},
        {"path": "read, second-level cache", "gigabytes_per_second": 9000.0},
    ]
    return rates.parse("\n".join(map(json.dumps, lines)))


@pytest.mark.parametrize(("right", "fastest"), [(True, 9e15), (False, 7e15)])
def test_peaks_are_the_fastest_that_was_right(right: bool, fastest: float, tmp_path: Path) -> None:
    path = tmp_path / "rates.json"
    path.write_text(json.dumps(report(right=right)))
    assert Peaks.read(path) == Peaks({"b1": fastest}, 2.9e12)
    assert ("WRONG" in rates.rate_table(report(right=right))) is not right


@pytest.mark.parametrize(("capability", "arch"), [("8.9", "89"), ("9.0", "90a"), ("12.0", "120")])
def test_architectures_are_named_as_nvcc_does(capability: str, arch: str) -> None:
    command = rates.compile_command(rates.SOURCE, capability)
    assert f"-gencode=arch=compute_{arch},code=sm_{arch}" in command


# --- the roofline ---


@pytest.mark.parametrize(
    ("bits", "wanted"),
    [
        ((1, 1), (1e12 / 8e15, "b1")),
        ((2, 2), (4e12 / 8e15, "b1")),
        ((4, 4), (1e12 / 2e15, "int8")),
        ((4, None), (1e12 / 1e15, "bf16")),
    ],
)
def test_floor_is_of_the_fastest_unit(
    bits: tuple[int, int | None], wanted: tuple[float, str]
) -> None:
    operations = {unit: int(1e12 * n) for unit, n in roofline.ways(*bits).items()}
    # At 2 x 2 bits one-bit and 8-bit units take as long.
    assert roofline.floor(PEAKS, operations, 1) == pytest.approx(wanted)
    assert roofline.floor(PEAKS, operations, 10**12) == (1e12 / 3e12, "memory")


# --- what takes part ---


def everybody(case: contestants.Case) -> list[products.Entry]:
    return list(products.choose(case, SMOKE, "cpu", families=True))


def test_selections_are_those_that_were_asked_for() -> None:
    assert FULL.rows == (1, 4, 16, 64, 256, 1024, 4096, 8192)
    assert len(FULL.precisions) == len(set(FULL.precisions)) == 16
    for selection in (FULL, QUICK):
        assert {str(p) for p in selection.precisions} >= summary.TARGETS.keys()
        for layer in selection.layers:
            assert layer.n % 32 == layer.k % 128 == 0
    assert {(layer.k, layer.n) for layer in QUICK.layers} == {
        (4096, 4096), (4096, 11008), (8192, 8192), (14336, 4096),
    }  # fmt: skip


def test_copies_exceed_the_cache_twice() -> None:
    case = contestants.Case(SMALL.layer, 1, 50 * 2**20)
    assert case.copies(10 * 2**20) == 12
    assert case.copies(2**30) == 2
    assert case.copies(1) == contestants.MOST_COPIES


@pytest.mark.parametrize(("name", "make"), everybody(SMALL), ids=lambda x: str(x)[:20])
def test_a_wrong_result_is_found(name: str, make: object) -> None:
    contestant = make()
    result = contestant.program.run(1)
    contestant.check(result)
    last = result.at[-1, -1]
    for wrong in (
        last.add(1 + jnp.abs(last.get())),
        jnp.roll(result, 1, 0),
        jnp.roll(result, 1, 1),
    ):
        with pytest.raises(AssertionError):
            contestant.check(wrong.astype(result.dtype))


def test_random_weights_are_a_valid_tensor() -> None:
    for precision in SMOKE.precisions:
        w = contestants.random_weights(1, SMALL.layer, precision)
        again = w.restore().prepare()
        assert w.shape == (SMALL.layer.k, SMALL.layer.n)
        assert w.group_size == (precision.group_size or SMALL.layer.k)
        np.testing.assert_array_equal(again.planes, w.planes)
        np.testing.assert_array_equal(again.scales, w.scales)


def test_pieces_of_the_pool_differ_and_may_exceed_it() -> None:
    first, second = (data.draw(seed, (64, 1024), jnp.bfloat16) for seed in (0, 1))
    assert (first != second).mean() > 0.9
    assert abs(first.astype(np.float32).mean()) < 0.02
    large = data.draw(3, (3, data.POOL), jnp.int8)
    assert large.min() == -127
    np.testing.assert_array_equal(large[0], large[2])


# --- timing ---


def test_programs_write_where_they_wrote_before() -> None:
    sets = [(jnp.full(8, i, jnp.float32),) for i in range(3)]
    program = timing.Program(lambda x: 2 * x, sets)
    assert all(np.isnan(result).all() for result in program.results)
    program.run(1)
    places = [result.unsafe_buffer_pointer() for result in program.results]
    np.testing.assert_array_equal(program.run(3), np.full(8, 4))
    assert [result.unsafe_buffer_pointer() for result in program.results] == places


def test_times_are_of_one_operation() -> None:
    sets = [(jnp.full((256, 256), i, jnp.float32),) for i in range(4)]
    short, long = (
        timing.Program(lambda x, count=count: jnp.linalg.matrix_power(x, count), sets)
        for count in (2, 256)
    )
    (once, _), (many, _) = timing.take_turns([short, long], 2, sample_seconds=1e-3)
    assert 0 < once < many


# --- rows and tables ---


@pytest.fixture(scope="module")
def lines() -> list[dict]:
    entries = [entry for entry in everybody(SMALL) if entry[0] in ("bf16", "int8", "W1A1, cpu")]

    def absent() -> contestants.Contestant:
        raise NotImplementedError("no such kernel")

    rows = list(products.race(SMALL, [*entries, ("W2A2", absent)], 2))
    return [row | products.bounds(row, PEAKS) for row in rows]


def test_rows_say_what_was_measured(lines: list[dict]) -> None:
    failed, bf16, int8, ours = lines
    assert failed["contestant"] == "W2A2"
    assert failed["error"] == "NotImplementedError: no such kernel"
    assert (bf16["contestant"], int8["contestant"]) == ("bf16", "int8")
    assert bf16["factor_over_bf16"] == 1
    assert ours["weight_bits"] == ours["act_bits"] == 1
    assert ours["cold"]
    assert ours["calls"] == ["jax_anyprec_cpu_matmul"]
    assert ours["kernel"]["method"] in ("planes", "codes")
    # x in bfloat16, planes, scales in float32, y in bfloat16.
    assert ours["moved_bytes"] == 2 * 5 * 256 + 256 * 256 // 8 + 4 * 256 + 2 * 5 * 256
    assert ours["tops"] == pytest.approx(2 * 5 * 256 * 256 / ours["us"] / 1e6)
    assert ours["floor_limit"] == "memory"
    assert ours["roofline_share"] == pytest.approx(ours["moved_bytes"] / 3e6 / ours["us"])


def test_without_a_baseline_nobody_runs() -> None:
    def broken() -> contestants.Contestant:
        raise RuntimeError("no memory")

    (row,) = products.race(SMALL, [("bf16", broken), ("int8", broken)], 1)
    assert (row["contestant"], row["error"]) == ("bf16", "RuntimeError: no memory")


def measured(contestant: str, m: int, factor: float) -> dict:
    row = {"layer": "square", "m": m, "n": 4096, "k": 4096, "contestant": contestant}
    row |= {"implementation": "cuda", "us": 10.0, "factor_over_bf16": factor, "cold": True}
    row |= {"kernel": {"method": "planes", "tile": "wide"}, "calls": []}
    return row | {"roofline_share": 0.5, "floor_limit": "b1"}


def test_summary_says_which_targets_are_met() -> None:
    about = dict.fromkeys(("device", "date", "commit", "jax", "command"), "x")
    rows = [
        measured("W1A1", 1024, 7.0),
        measured("W1A1", 4096, 6.5),
        measured("W2A2", 16, 0.9),  # too few rows for the target
        measured("W2A2", 1024, 2.4),
        measured("W2A2", 4096, 2.6),
        measured("W4A4", 4096, 3.0) | {"implementation": "cuda_planes"},  # asked for by name
        {"layer": "square", "m": 1, "n": 4096, "k": 4096, "contestant": "fp8", "error": "no | fp8"},
    ]
    text = summary.summarize(map(json.dumps, [about | {"platform": "cuda"}, *rows]))
    assert "| W1A1 | 6.0 | 6.50 | 7.00 | 4096 x 4096, M = 4096 | met |" in text
    assert "| W2A2 | 2.5 | 2.40 | 2.60 | 4096 x 4096, M = 1024 | missed at 1 of 2 |" in text
    assert "| W4A4 | 1.3 |  |  |  | not measured |" in text
    assert "| square | 4096 x 4096 | 16 | 0.90 |" in text  # slower than bf16
    assert "50% b1" in text
    assert "planes wide" in text
    assert "| fp8 | no \\| fp8 |" in text


def test_ours_are_compared_with_cutlass() -> None:
    ours = [measured("W1A1", 1024, 7.0), measured("W2A2", 4096, 3.0)]
    theirs = [
        measured("CUTLASS int8", 1024, 1.0) | {"us": 30.0},
        measured("CUTLASS int4", 1024, 1.0) | {"us": 25.0},
        measured("CUTLASS int8", 4096, 1.0) | {"us": 40.0},
    ]
    lines = cutlass.compare(ours, theirs).splitlines()
    assert lines[2] == "| 1024 | 4096 | 4096 | 30.0 | 25.0 |  | 3.00 / 2.50 | ? / ? | ? / ? |"
    assert lines[3] == "| 4096 | 4096 | 4096 | 40.0 |  |  | ? / ? | ? / ? | 4.00 / ? |"


# --- the commands ---


def module(name: str) -> tuple[str, ...]:
    """Runs a module of this folder; with -P the package is the installed one, not the sources."""
    code = (
        "import runpy, sys; sys.path.append('.'); "
        "runpy.run_module(sys.argv.pop(1), None, '__main__')"
    )
    return (sys.executable, "-P", "-c", code, name)


def test_a_smoke_run_writes_rows_that_the_summary_reads(tmp_path: Path) -> None:
    """The command itself; its sizes are so small that it takes seconds."""
    path, peaks = tmp_path / "rows.jsonl", tmp_path / "rates.json"
    peaks.write_text(json.dumps(report()))
    command = (*module("benchmarks.gpu.products"), "--smoke", "--platform", "cpu")
    done = run(*command, "--rounds", "1", "--peaks", str(peaks), "--rows", str(path), COMMIT="abc")
    assert done.returncode == 0, done.stderr
    about, *rows = map(json.loads, path.read_text().splitlines())
    assert about["commit"] == "abc"
    assert all("floor_us" in row for row in rows if "b1" in row["ways"] or not row["ways"])
    assert len(rows) == len(SMOKE.rows) * (3 + len(SMOKE.precisions) + 3)
    # As a run leaves it that is killed while it writes.
    path.write_text(path.read_text()[:-10])
    shown = run(*module("benchmarks.gpu.summary"), str(path))
    assert f"measured: {len(rows) - 1} rows of 1 cases" in shown.stdout


def test_the_queue_reports_each_part_that_fails(tmp_path: Path) -> None:
    if shutil.which("nvidia-smi"):
        pytest.skip("for machines without a GPU")
    done = run("benchmarks/gpu_queue.sh", "build", "sanitize", "rates", OUT=str(tmp_path))
    assert done.returncode == 1
    text = (tmp_path / "summary.md").read_text()
    assert re.findall(r"^\| (\w+) \| failed \(1\) \|", text, re.M) == ["build", "sanitize", "rates"]
    assert "| build | failed (1) | 0 | there is no GPU: nvidia-smi finds none |" in text
    assert len(list(tmp_path.iterdir())) <= 8


@pytest.mark.parametrize(
    ("tests", "verdict"), [("2 passed", "passed"), ("2 skipped", "failed (1)")]
)
def test_the_queue_builds_for_the_gpu_and_counts_no_skipped_test(
    tests: str, verdict: str, tmp_path: Path
) -> None:
    """With programs in the place of the driver's and Python that say what they are called with."""
    programs = {
        "nvidia-smi": 'case $1 in *compute_cap) echo 9.0 ;; *) echo "Some GPU" ;; esac',
        "python": f'echo "$@"; if [ "$2" = pytest ]; then echo "{tests}"; fi',
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    out = tmp_path / "out"
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = run(
        *("benchmarks/gpu_queue.sh", "build", "test"),
        **{"OUT": str(out), "PYTHON": str(tmp_path / "python"), "PATH": path, "COMMIT": "abc"},
    )
    summed = (out / "summary.md").read_text()
    assert summed.startswith("# Some GPU\n\n- driver: Some GPU\n")
    assert "- commit: abc\n" in summed
    assert "-C cmake.define.JAX_ANYPREC_CUDA_ARCHITECTURES=90a" in (out / "build.log").read_text()
    assert f"| test | {verdict} |" in summed
    assert done.returncode == (verdict != "passed")


def test_the_queue_names_its_parts() -> None:
    done = run("benchmarks/gpu_queue.sh", "polish")
    assert done.returncode == 2
    assert done.stderr == "parts are: build sanitize test rates products; got: polish\n"
