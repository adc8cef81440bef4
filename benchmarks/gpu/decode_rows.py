"""Rows of figures of whole models: what was measured, how long it took, and its parts."""

from __future__ import annotations

from collections.abc import Sequence

import jax

from ..report import Row
from ..timing import speeds, spread
from . import breakdown
from .llamas import Model, nbytes
from .rates import Peaks
from .roofline import floor
from .rows import log
from .steps import Case, State, Step, Turn, draw_state, state_shapes

BASELINE = "bf16"
TRACED_STEPS = 8


def describe_case(case: Case) -> Row:
    return {"kind": case.kind, "batch": case.batch, "context": case.context}


def contestant(model: Model) -> Row:
    if model.precision is None:
        return {"contestant": BASELINE, "weight_bits": None, "act_bits": None}
    pair = model.precision.pair
    return {
        "contestant": str(model.precision),
        "weight_bits": pair.weights,
        "act_bits": pair.activations,
    }


def describe_times(step: Step, turns: Sequence[Turn], baseline: list[float] | None) -> Row:
    """Figures of a contestant; a factor if bf16's times of the same case are known."""
    times = [turn.seconds for turn in turns]
    typical = spread(times)
    case, model = step.case, step.model
    row: Row = {
        "us": 1e6 * typical.median,
        "us_quartiles": [1e6 * typical.low, 1e6 * typical.high],
        "dispatch_us": 1e6 * spread([turn.dispatch for turn in turns]).median,
        "tokens_per_second": case.batch * case.tokens / typical.median,
        "weight_bytes": model.weight_bytes,
        "read_bytes": model.read_bytes,
        "cache_bytes": nbytes(state_shapes(model.config, case).cache),
        "weight_gigabytes_per_second": model.read_bytes / typical.median / 1e9,
        "device_memory": device_memory(step.weights[0].device),
        **step.memory(),
    }
    if baseline is not None:
        row["factor_over_bf16"] = speeds(baseline, times).median
    return row


def device_memory(device: jax.Device) -> dict[str, int] | None:
    """Bytes in use, now and at most so far, if the device counts them."""
    stats = device.memory_stats()
    if not stats:
        return None
    return {name: stats[name] for name in ("bytes_in_use", "peak_bytes_in_use") if name in stats}


def trace(step: Step, us: float) -> Row:
    """Parts of a decoding step, which took so long without a tracer."""
    row: Row = {"kind": "breakdown", "us": us}
    try:
        state = draw_state(step.model.config, step.case)
        state = jax.block_until_ready(step(state.at(step.case.context - TRACED_STEPS - 1)))

        def run_steps() -> State:
            last = state
            for _ in range(TRACED_STEPS):
                last = step(last)
            return jax.block_until_ready(last)

        profile = breakdown.trace(run_steps)
        parts = breakdown.by_part(profile, step.text(), TRACED_STEPS)
    except Exception as error:
        return row | failure(error)
    busy = sum(part["us"] for part in parts.values())
    launches = sum(part["launches"] for part in parts.values())
    parts[breakdown.GAPS] = {"launches": 0, "us": us - busy}
    return row | {
        "parts": parts,
        "launches": launches,
        "launches_per_layer": launches / step.model.config.num_layers,
    }


def bounds(row: Row, peaks: Peaks | None) -> Row:
    """The share of a decoding step that reading its weights would take at the chip's best."""
    if peaks is None or "read_bytes" not in row or row["kind"] != "decode":
        return {}
    least = 1e6 * floor(peaks, {}, row["read_bytes"]).seconds
    return {"weights_floor_us": least, "bandwidth_share": least / row["us"]}


def failure(error: Exception) -> Row:
    said = f"{type(error).__name__}: {error}"
    log(said)
    return {"error": said}
