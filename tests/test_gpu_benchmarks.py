"""The GPU benchmarks without a GPU: products on the CPU, arithmetic of figures, and compilation."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jax_anyprec as ap
from benchmarks import machine
from benchmarks.gpu import (
    breakdown,
    contestants,
    cutlass,
    data,
    decode,
    decode_rows,
    decode_summary,
    fit,
    llamas,
    logits,
    products,
    rates,
    roofline,
    steps,
    summary,
    timing,
    tune,
)
from benchmarks.gpu.rates import Peaks
from benchmarks.gpu.shapes import FULL, QUICK, SMOKE, precisions
from jax_anyprec import _native, models
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


# --- whole models ---


CASES = (steps.Case(3, 1, 24), steps.Case(1, 20, 20))


def tiny(
    name: str | None, implementation: str = "cpu", dtype: object = jnp.float32
) -> llamas.Model:
    (precision,) = (None,) if name is None else precisions(name)
    return llamas.describe(llamas.CONFIGS["tiny"], precision, implementation, dtype)


@pytest.mark.parametrize("name", [None, "W2A8", "W3A8 g128"])
def test_random_models_are_as_the_package_makes_them(name: str | None) -> None:
    """The same structure and shapes; bits are random and outputs as large as inputs."""
    model = tiny(name)
    config, precision = model.config, model.precision
    quantization = precision and models.Quantization(
        weights=precision.pair.weights,
        activations=precision.pair.activations,
        group_size=precision.group_size,
        act_scales="group" if precision.group_size else "token",
    )
    made = models.Llama(config, quantization=quantization, rngs=nnx.Rngs(0))
    models.merge_projections(made)
    weights = llamas.draw_weights(model)
    wanted = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), nnx.state(made))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), model.state) == wanted
    assert [leaf.shape for leaf in weights] == [leaf.shape for leaf in jax.tree.leaves(model.state)]
    assert model.weight_bytes == sum(leaf.nbytes for leaf in weights)
    assert model.read_bytes == model.weight_bytes - 4 * config.vocab_size * config.hidden_size
    x = np.random.default_rng(0).standard_normal((256, config.hidden_size), np.float32)
    output = model.build(weights).layers[0].attention.output
    assert np.asarray(output(jnp.asarray(x))).std() == pytest.approx(x.std(), rel=0.2)


def test_weights_that_would_need_padding_are_refused() -> None:
    config = dataclasses.replace(llamas.CONFIGS["tiny"], vocab_size=500)
    model = llamas.describe(config, precisions("W2A8")[0], "cpu")
    with pytest.raises(ValueError, match="multiples of 32, got 256 x 500"):
        llamas.draw_weights(model)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_steps_compute_what_the_model_does_without_a_cache(case: steps.Case) -> None:
    """Tokens are fed back; a prompt is read again and again."""
    model = tiny(None)
    weights = llamas.draw_weights(model)
    step = steps.Step(model, weights, case).compile("all")
    state = steps.draw_state(model.config, case, jnp.float32)
    text = np.asarray(state.tokens)
    for _ in range(3):
        state = step(state)
        text = np.concatenate([text, state.tokens], 1) if case.decodes else text
    seen = text[:, :-1] if case.decodes else text
    logits = model.build(weights)(jnp.asarray(seen))[:, -1]
    np.testing.assert_allclose(state.logits, logits, rtol=1e-3, atol=1e-4)
    if case.decodes:
        np.testing.assert_array_equal(text[:, -1], np.argmax(logits, -1))
    assert state.cache.length == (3 if case.decodes else 0)
    memory = step.memory()
    assert memory["program_bytes"] >= model.weight_bytes + memory["scratch_bytes"]


def test_a_turn_ends_with_the_context_and_finds_logits_that_are_not_finite() -> None:
    model = tiny("W2A8")
    weights = llamas.draw_weights(model)
    case = CASES[0]
    step = steps.Step(model, weights, case).compile("none")
    state, turn = steps.take_turn(step, steps.draw_state(model.config, case, jnp.float32), 5)
    assert state.cache.length == case.context
    assert 0 < turn.dispatch <= turn.seconds
    spoiled = [jnp.full_like(leaf, jnp.nan) if leaf.ndim == 1 else leaf for leaf in weights]
    step.weights = spoiled
    with pytest.raises(FloatingPointError, match="1536 of 1536 logits are not finite"):
        steps.take_turn(step, state, 2)


def test_one_that_fails_leaves_a_row_and_the_others_run() -> None:
    case, bf16, ours = CASES[0], tiny(None, dtype=jnp.bfloat16), tiny("W2A8", dtype=jnp.bfloat16)
    broken = ours._replace(graph=None)
    entries = [
        (model, llamas.draw_weights(ours if model is broken else model))
        for model in (bf16, broken, ours)
    ]
    found = list(steps.compile_all(entries, case, "default"))
    assert [isinstance(step, steps.Step) for _, step in found] == [True, False, True]
    first, last = found[0][1], found[2][1]
    first.weights = [jnp.full_like(leaf, jnp.nan) for leaf in first.weights]
    rows = [row for _, row in decode.race([first, last], case, {}, 4, 2)]
    assert rows[0]["contestant"] == "bf16"
    assert rows[0]["error"].startswith("FloatingPointError")
    assert rows[1]["tokens_per_second"] == pytest.approx(3e6 / rows[1]["us"])
    assert "factor_over_bf16" not in rows[1]  # its baseline is missing


def test_wrong_logits_are_found() -> None:
    wanted = np.random.default_rng(0).standard_normal((3, 512))
    (quantized, floats) = precisions("W2A8", "W2A16")
    near = wanted * (1 + 1e-3)
    assert "error" not in logits.compare(near, wanted, quantized)
    assert "error" in logits.compare(near, wanted, floats)
    for wrong in (np.roll(wanted, 1, 1), np.roll(wanted, 1, 0), np.full_like(wanted, np.nan)):
        assert "error" in logits.compare(wrong, wanted, quantized)


class Device(NamedTuple):
    bytes_limit: int | None

    def memory_stats(self) -> dict[str, int] | None:
        return None if self.bytes_limit is None else {"bytes_limit": self.bytes_limit}


def test_what_does_not_fit_runs_one_after_another() -> None:
    everyone = [
        llamas.describe(llamas.CONFIGS["tiny"], precision, "cpu")
        for precision in (None, *precisions("W4A16", "W4A8"))
    ]
    case = steps.Case(16, 1, 512)
    bf16, w4, again = (model.weight_bytes for model in everyone)
    assert w4 == again  # and they have the same
    need = bf16 + w4 + llamas.nbytes(steps.state_shapes(everyone[0].config, case))
    need += decode.SPARE_BYTES
    for limit, together in ((None, True), (need, True), (need - 1, False)):
        assert decode.fits(everyone, [CASES[1], case], Device(limit)) is together


GPU_TRACE = """
planes { name: "/host:CPU"
  lines { name: "python" events { metadata_id: 1 duration_ps: 9000000 } }
  event_metadata { key: 1 value { id: 1 name: "anyprec_not_a_kernel" } } }
planes { name: "/device:GPU:0"
  lines { name: "XLA Ops" events { metadata_id: 1 duration_ps: 9000000 } }
  lines { name: "Stream #13(Compute)"
    events { metadata_id: 1 duration_ps: 4000000 }
    events { metadata_id: 1 duration_ps: 4000000 }
    events { metadata_id: 2 duration_ps: 1000000 }
    events { metadata_id: 3 duration_ps: 2000000 stats { metadata_id: 1 str_value: "dot.1" } }
    events { metadata_id: 3 duration_ps: 6000000 stats { metadata_id: 1 str_value: "dot.2" } }
    events { metadata_id: 4 duration_ps: 1000000 stats { metadata_id: 1 str_value: "fusion.3" } }
    events { metadata_id: 4 duration_ps: 500000 stats { metadata_id: 1 str_value: "other.4" } }
    events { metadata_id: 5 duration_ps: 500000 } }
  event_metadata { key: 1 value { id: 1 name: "anyprec_stream_codes_w2_m8" } }
  event_metadata { key: 2 value { id: 2 name: "anyprec_prologue_codes" } }
  event_metadata { key: 3 value { id: 3 name: "gemvNSP_kernel" } }
  event_metadata { key: 4 value { id: 4 name: "loop_fusion" } }
  event_metadata { key: 5 value { id: 5 name: "MemcpyD2D" } }
  stat_metadata { key: 1 value { id: 1 name: "hlo_op" } } }
"""
GPU_PROGRAM = """
%fused.3 (p: f32[2]) -> f32[2] {
  %p = f32[2] parameter(0)
  ROOT %e = f32[2] exponential(%p), metadata={op_name="jit(step)/attend/exp"}
}

ENTRY %main (x: f32[2]) -> f32[2] {
  %x = f32[2] parameter(0)
  %dot.1 = f32[2] custom-call(%x), metadata={op_name="jit(step)/attend/dot_general"}
  %dot.2 = f32[2] custom-call(%x), metadata={op_name="jit(step)/dot_general"}
  %fusion.3 = f32[2] fusion(%dot.2), kind=kLoop, calls=%fused.3, metadata={op_name="jit(step)/add"}
  ROOT %other.4 = f32[2] add(%x, %x), metadata={op_name="jit(step)/dot_general_like"}
}
"""


def test_a_trace_of_a_gpu_is_taken_apart() -> None:
    space = jax.profiler.ProfileData.text_proto_to_serialized_xspace(GPU_TRACE)
    profile = jax.profiler.ProfileData.from_serialized_xspace(space)
    parts = breakdown.by_part(profile, GPU_PROGRAM, steps=2)
    assert parts == {
        breakdown.PRODUCTS: {"launches": 1.5, "us": 7.0},
        breakdown.QUANTIZING: {"launches": 0.5, "us": 0.5},
        breakdown.ATTENTION: {"launches": 1.0, "us": 1.5},
        breakdown.OTHER: {"launches": 1.0, "us": 0.5},
    }
    empty = jax.profiler.ProfileData.from_serialized_xspace(b"")
    with pytest.raises(RuntimeError, match="traces kernels otherwise"):
        breakdown.by_part(empty, GPU_PROGRAM, steps=2)


def decoded(contestant: str, bits: int | None, factor: float, **changes: object) -> dict:
    row = {"model": "7b", "kind": "decode", "batch": 1, "context": 128, "contestant": contestant}
    row |= {"weight_bits": bits, "us": 500.0, "tokens_per_second": 2000.0, "interleaved": True}
    row |= {"factor_over_bf16": factor, "weight_bytes": 2e9, "program_bytes": 3e9}
    return row | changes


def test_decoding_has_targets_and_shares_of_the_bandwidth() -> None:
    names = ("device", "date", "commit", "jax", "command", "command_buffers")
    w2 = decoded("W2A8", 2, 5.6, read_bytes=6 * 10**8)
    w2 |= decode_rows.bounds(w2, PEAKS)
    parts = {"attention": {"launches": 64, "us": 100.0}, "gaps": {"launches": 0, "us": 50.0}}
    rows = [
        {"kind": "check", "contestant": "W2A8", "relative_error": 1e-4, "tolerance": 2e-2},
        decoded("bf16", None, 1.0),
        w2,
        decoded("W4A8", 4, 3.1),
        decoded("W4A8", 4, 2.0, batch=16, interleaved=False),
        {"model": "7b", "kind": "prefill", "batch": 1, "context": 512, "skipped": "after 60 s"},
        {"model": "7b", "kind": "decode", "contestant": "W1A8", "error": "no memory"},
        decoded("W2A8", 2, 0, kind="breakdown", parts=parts, launches=64, launches_per_layer=2),
    ]
    text = decode_summary.summarize(map(json.dumps, [dict.fromkeys(names, "x"), *rows]))
    assert "| 7b | 128 | W2A8 | 5.5 | 5.60 | met |" in text
    assert "| 7b | 128 | W4A8 | 3.2 | 3.10 | missed |" in text
    assert "| 7b | 1 | 128 | 40% |" in text  # 600 MB of 3 TB/s take 200 us
    assert "| 7b | W2A8 | attention | 64 | 2.0 | 100 | 20% |" in text
    assert "| 7b | prefill | 1 | 512 | after 60 s |" in text
    assert "| W1A8 | no memory |" in text
    assert "one after another for 7b" in text
    assert "| W2A8 | 1.0e-04 | 2e-02 |" in text


# --- the tuner ---


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans for an H100; the extension must be there if nvcc is."""
    backend = _native.cuda()
    if backend.module is None:
        pytest.skip(str(backend.reason))
    monkeypatch.setattr(backend.module, "devices", lambda: [])


def problem(name: str, m: int, k: int = 512, n: int = 256) -> tune.Problem:
    (precision,) = precisions(name)
    return tune.Problem(contestants.Case(Layer("small", k, n), m, 2**15), precision)


@pytest.mark.parametrize(
    ("name", "m"), [("W2A2", 1), ("W2A2", 1024), ("W4A16", 4), ("W4A8 g128", 64)]
)
@pytest.mark.usefixtures("plans")
def test_alternatives_have_the_choice_among_them_and_are_called_as_it_is(name: str, m: int) -> None:
    asked = problem(name, m)
    chosen = asked.plan("cuda")
    everyone = [tune.attributes(plan) for plan in tune.alternatives(asked)]
    assert everyone.count(tune.attributes(chosen)) == 1
    assert len({fit.plan_text(plan) for plan in everyone}) == len(everyone)
    methods = {plan["method"] for plan in everyone}
    assert methods == ({"planes", "codes"} if name == "W2A2" else {chosen["method"]})
    assert any(plan.get("quantizes") for plan in everyone) == (m == 1 and "quantizes" in chosen)
    # The call in the program is the one that `ap.matmul` makes.
    bits = asked.precision.pair.activations
    operands = (
        contestants.activations(asked.case, 0),
        contestants.random_weights(0, asked.case.layer, asked.precision),
    )
    own, package = (
        jax.jit(operation).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()
        for operation in (
            functools.partial(tune.product, plan=chosen, act_bits=bits),
            functools.partial(ap.matmul, act_bits=bits, implementation="cuda"),
        )
    )
    calls = [
        re.sub(r"%\w+", "%", call)
        for text in (own, package)
        for call in re.findall(r"@jax_anyprec_cuda_matmul\(.*", text)
    ]
    assert len(calls) == 2
    assert calls[0] == calls[1]


@pytest.mark.usefixtures("plans")
def test_alternatives_take_turns_and_refused_ones_leave_a_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the CPU's kernels in the place of CUDA's."""

    def stand_in(x: jax.Array, w: ap.QuantizedTensor, *, plan: dict, act_bits: int) -> jax.Array:
        if plan["splits"] > 2:
            raise ValueError("more splits than parts of K")
        return ap.matmul(x, w, act_bits=act_bits, implementation="cpu")

    monkeypatch.setattr(tune, "product", stand_in)
    monkeypatch.setattr(tune, "SPLITS", (1, 4))
    rows = list(tune.compare(problem("W2A2", 64, 256), 1))
    good = [row for row in rows if "error" not in row]
    assert {row["plan"]["splits"] for row in good} <= {1, 2}
    assert all("more splits" in row["error"] for row in rows if row["plan"]["splits"] == 4)
    assert sum(row["chosen"] for row in rows) == 1
    (choice,) = fit.choices(rows)
    assert choice["best_us"] == min(row["us"] for row in good)
    assert fit.tables(rows).startswith("## Up to how many")


def alternative(
    a: int, method: str, tile: str, us: float, *, m: int = 4096, chosen: bool = False
) -> dict:
    plan = {"method": method, "tile": tile, "splits": 1, "clustered": False}
    row = {"precision": f"W2A{a}", "m": m, "n": 4096, "k": 4096, "weight_bits": 2, "act_bits": a}
    return row | {"plan": plan, "us": us, "chosen": chosen}


def test_constants_are_fitted() -> None:
    rows = [
        alternative(1, "planes", "whole", 10, chosen=True),
        alternative(1, "codes", "whole", 20),
        alternative(1, "codes", "narrow", 40),
        alternative(2, "planes", "whole", 19),
        alternative(2, "codes", "whole", 20, chosen=True),
        alternative(2, "codes", "narrow", 50),
        alternative(4, "planes", "whole", 40),
        alternative(4, "codes", "whole", 20, chosen=True),
        alternative(8, "codes", "whole", 20),  # planes were not measured
        alternative(8, "planes", "whole", 1) | {"error": "wrong"},
        alternative(4, "planes", "narrow", 1, m=16),  # few rows decide otherwise
        alternative(4, "codes", "narrow", 2, m=16),
    ]
    assert fit.max_plane_products(rows) == {"products": 4, "mean_loss": 0.0, "problems": 3}
    efficiencies = fit.tile_efficiencies(rows)
    assert efficiencies == {
        "planes": {"whole": 1.0},
        "codes": {"whole": 1.0, "narrow": pytest.approx(0.45)},
    }
    losses = [line.get("loss") for line in fit.choices(rows)]
    assert losses == [0.0, pytest.approx(1 / 19), 0.0, None, None]
    text = fit.tables(rows)
    assert "4, with a mean loss of 0.0% over 3 problems" in text
    assert (
        "| W2A2 | 4096 | 4096 x 4096 | codes whole 1 | 20.0 | planes whole 1 | 19.0 | 5% |" in text
    )


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


def test_a_tiny_model_runs_from_drawing_weights_to_tables(tmp_path: Path) -> None:
    path, peaks = tmp_path / "rows.jsonl", tmp_path / "rates.json"
    peaks.write_text(json.dumps(report()))
    command = (*module("benchmarks.gpu.decode"), "--platform", "cpu", "--models", "tiny")
    sizes = ("--batches", "2", "--contexts", "16", "--prompts", "12", "--steps", "6")
    files = ("--peaks", str(peaks), "--rows", str(path))
    done = run(*command, "--precisions", "W2A8", *sizes, "--rounds", "2", *files, COMMIT="abc")
    assert done.returncode == 0, done.stderr
    about, *rows = map(json.loads, path.read_text().splitlines())
    assert about["command_buffers"] == "all"
    assert "CUSTOM_CALL" in about["compiler_options"]["xla_gpu_enable_command_buffer"]
    assert [(row["kind"], row["contestant"]) for row in rows] == [
        ("check", "W2A8"),
        *((kind, name) for kind in ("decode", "prefill", "breakdown") for name in ("bf16", "W2A8")),
    ]
    assert all(row["factor_over_bf16"] > 0 and row["interleaved"] for row in rows[1:5])
    assert 0 < rows[2]["bandwidth_share"] < 1
    layers, a_layer = llamas.CONFIGS["tiny"].num_layers, 4  # products
    assert rows[6]["parts"][breakdown.PRODUCTS]["launches"] == a_layer * layers + 1
    assert rows[6]["parts"][breakdown.ATTENTION]["launches"] > 0
    path.write_text(path.read_text()[:-10])  # as a run leaves it that is killed while it writes
    shown = run(*module("benchmarks.gpu.decode_summary"), str(path))
    assert "measured: 5 rows, by turns" in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--precisions", "W4"), "--precisions are such as W4A8"),
        (("--contexts", "33"), "--contexts must be from 34, for --steps and one before, to 512"),
    ],
)
def test_decode_says_what_is_wrong_with_its_options(
    arguments: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = ["decode", "--models", "tiny", "--contexts", "64", "--rows", "x", *arguments]
    monkeypatch.setattr(sys, "argv", given)
    with pytest.raises(SystemExit):
        decode.parse_options()
    assert message in capsys.readouterr().err


def test_a_commit_without_git_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.commit() == ""


def test_tuning_needs_a_gpu(tmp_path: Path) -> None:
    if shutil.which("nvidia-smi"):
        pytest.skip("for machines without a GPU")
    done = run(*module("benchmarks.gpu.tune"), "--json", str(tmp_path / "tune.json"))
    assert done.returncode == 1
    assert "there is no GPU to tune for" in done.stderr


def test_the_usual_parts_take_less_than_ten_minutes() -> None:
    text = (REPOSITORY / "benchmarks/gpu_queue.sh").read_text()
    limits = {name: int(limit) for name, limit in re.findall(r"\[(\w+)\]=(\d+)", text)}
    (usual,) = re.findall(r"usual=\((.*)\)", text)
    assert sum(limits[part] for part in usual.split()) < 590
    assert limits.keys() - set(usual.split()) == {"tune"}


def test_the_queue_reports_each_part_that_fails(tmp_path: Path) -> None:
    if shutil.which("nvidia-smi"):
        pytest.skip("for machines without a GPU")
    parts = ["build", "sanitize", "rates", "decode"]
    done = run("benchmarks/gpu_queue.sh", *parts, OUT=str(tmp_path))
    assert done.returncode == 1
    text = (tmp_path / "summary.md").read_text()
    assert re.findall(r"^\| (\w+) \| failed \(1\) \|", text, re.M) == parts
    assert re.findall(r"^=== (\w+)$", (tmp_path / "log.txt").read_text(), re.M) == parts
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
    assert "-C cmake.define.JAX_ANYPREC_CUDA_ARCHITECTURES=90a" in (out / "log.txt").read_text()
    assert f"| test | {verdict} |" in summed
    assert done.returncode == (verdict != "passed")


def test_the_queue_names_its_parts() -> None:
    done = run("benchmarks/gpu_queue.sh", "polish")
    assert done.returncode == 2
    assert done.stderr == "parts are: build sanitize test rates products decode tune; got: polish\n"
