"""Whole Llama models on a GPU: tokens a second of each precision and of bf16, memory, and a trace.

    python -m benchmarks.gpu.decode --peaks rates.json --rows decode.jsonl

Models have random weights, which are drawn on the device and packed there. All precisions that fit
into its memory together take turns, and a factor over bf16 is the median over rounds of bf16's time
divided by the other's of the same round; those that don't fit run one after another, and their rows
say so. Before, each precision's logits are compared with those of XLA in a tiny model. Afterwards
the first case that decodes is traced. Rows are written as they are measured;
`benchmarks.gpu.decode_summary` makes tables of the file.
"""

from __future__ import annotations

import argparse
import functools
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from ..report import Row
from .decode_rows import bounds, contestant, describe_case, describe_times, failure, trace
from .llamas import CONFIGS, Model, describe, draw_weights, nbytes
from .logits import check
from .rates import Peaks
from .rows import about_run, log, write_rows
from .shapes import precisions
from .steps import (
    COMMAND_BUFFERS,
    WARM_UPS,
    Case,
    Step,
    Turn,
    compile_all,
    draw_state,
    state_shapes,
    take_turn,
)

PRECISIONS = ("W8A16", "W4A16", "W4A8", "W3A8", "W2A8", "W2A16", "W1A8")
PREFILL_CALLS = 4
"""Calls of a turn that reads prompts."""
SPARE_BYTES = 3 * 2**30
"""What programs may need beside weights and caches."""


def main() -> None:
    options = parse_options()
    write_rows(options.rows, options.platform, functools.partial(run, options))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--models", nargs="+", choices=CONFIGS, default=["llama-2-7b", "llama-3-8b"])
    add("--precisions", nargs="+", default=PRECISIONS, help='such as W4A8 or "W4A16 g128"')
    add("--batches", nargs="+", type=int, default=[1, 4, 16], help="sequences that decode at once")
    add("--contexts", nargs="+", type=int, default=[128, 2048], help="tokens that each has")
    add("--prompts", nargs="*", type=int, default=[512, 2048], help="tokens of prompts")
    add("--steps", type=int, default=32, help="decoding steps of a turn")
    add("--rounds", type=int, default=5, help="turns of each precision")
    add("--command-buffers", choices=COMMAND_BUFFERS, default="all")
    add("--seconds", type=float, default=float("inf"), help="then no further case is begun")
    add("--platform", choices=("cuda", "cpu"), default="cuda")
    add("--peaks", type=pathlib.Path, help="the file of benchmarks.gpu.rates")
    add("--rows", type=pathlib.Path, required=True, help="JSON lines are written here")
    options = parser.parse_args()
    try:
        options.precisions = precisions(*options.precisions)
    except ValueError:
        parser.error(f'--precisions are such as W4A8 or "W4A16 g128", got {options.precisions}')
    longest = min(CONFIGS[name].context_length for name in options.models)
    for context in options.contexts:
        if not options.steps + 2 <= context <= longest:
            parser.error(
                f"--contexts must be from {options.steps + 2}, for --steps and one before, to "
                f"{longest}, got {context}"
            )
    return options


def run(options: argparse.Namespace, device: jax.Device) -> Iterator[Row]:
    """What the run is, the check of the tiny model, and the rows of each model."""
    yield about(options, device)
    begin = time.monotonic()
    yield from check(options.precisions, options.platform, options.command_buffers)
    peaks = Peaks.read(options.peaks) if options.peaks else None
    for name in options.models:
        deadline = begin + options.seconds
        for row in measure(options, name, device, deadline):
            yield {"model": name} | row | bounds(row, peaks)


def about(options: argparse.Namespace, device: jax.Device) -> Row:
    return about_run("benchmarks.gpu.decode", options.platform, device) | {
        "command_buffers": options.command_buffers,
        "compiler_options": COMMAND_BUFFERS[options.command_buffers],
        "rounds": options.rounds,
        "steps": options.steps,
    }


def cases(options: argparse.Namespace) -> list[Case]:
    """The first decodes, and is traced in the end."""
    decoding = [Case(b, 1, context) for context in options.contexts for b in options.batches]
    return decoding + [Case(1, tokens, tokens) for tokens in options.prompts]


def measure(
    options: argparse.Namespace, name: str, device: jax.Device, deadline: float
) -> Iterator[Row]:
    """Rows of one model: all precisions by turns, or one after another if they don't fit."""
    chosen = (None, *options.precisions)
    everyone = [describe(CONFIGS[name], precision, options.platform) for precision in chosen]
    together = fits(everyone, cases(options), device)
    groups = [everyone] if together else [[model] for model in everyone]
    baselines: dict[Case, list[float]] = {}
    for group in groups:
        for row in measure_group(options, group, baselines, deadline):
            yield row | {"interleaved": together}


def fits(everyone: Sequence[Model], wanted: Sequence[Case], device: jax.Device) -> bool:
    """Whether the device has memory for all models and the largest case; yes if it says nothing."""
    stats = device.memory_stats()
    if not stats or "bytes_limit" not in stats:
        return True
    weights = {weights_key(model): model.weight_bytes for model in everyone}
    largest = max(nbytes(state_shapes(everyone[0].config, case)) for case in wanted)
    return sum(weights.values()) + largest + SPARE_BYTES <= stats["bytes_limit"]


def weights_key(model: Model) -> tuple[int, int | None] | None:
    """What weights depend on: bits and group size, or None for bfloat16."""
    precision = model.precision
    return None if precision is None else (precision.pair.weights, precision.group_size)


def measure_group(
    options: argparse.Namespace,
    group: Sequence[Model],
    baselines: dict[Case, list[float]],
    deadline: float,
) -> Iterator[Row]:
    """Rows of models that are on the device together; `baselines` are bf16's times of a case."""
    entries: list[tuple[Model, list[jax.Array]]] = []
    traced: list[tuple[Step, float]] = []
    for case in cases(options):
        if time.monotonic() > deadline:
            yield describe_case(case) | {"skipped": f"after {options.seconds:.0f} s"}
            continue
        entries = entries or draw_all(group)
        measured = []
        for step, row in measure_case(options, entries, case, baselines):
            yield row
            if step is not None and "us" in row:
                measured.append((step, row["us"]))
        if case.decodes and not traced:
            traced = measured
    for step, us in traced:
        yield describe_case(step.case) | contestant(step.model) | trace(step, us)


def draw_all(group: Sequence[Model]) -> list[tuple[Model, list[jax.Array]]]:
    """Models with their weights, which those have in common that differ in activations alone."""
    weights: dict[Any, list[jax.Array]] = {}
    for model in group:
        if weights_key(model) not in weights:
            weights[weights_key(model)] = jax.block_until_ready(draw_weights(model))
    log(f"weights of {len(weights)} models are drawn")
    return [(model, weights[weights_key(model)]) for model in group]


def measure_case(
    options: argparse.Namespace,
    entries: Sequence[tuple[Model, list[jax.Array]]],
    case: Case,
    baselines: dict[Case, list[float]],
) -> Iterator[tuple[Step | None, Row]]:
    """The row of each model, with its step if there is one."""
    begin = time.monotonic()
    steps: list[Step] = []
    for model, step in compile_all(entries, case, options.command_buffers):
        if isinstance(step, Step):
            steps.append(step)
        else:
            yield None, describe_case(case) | contestant(model) | failure(step)
    log(f"{case}: compiled in {time.monotonic() - begin:.1f} s")
    calls = options.steps if case.decodes else PREFILL_CALLS
    yield from race(steps, case, baselines, calls, options.rounds)
    log(f"{case}: {time.monotonic() - begin:.1f} s")


def race(
    steps: Sequence[Step],
    case: Case,
    baselines: dict[Case, list[float]],
    calls: int,
    rounds: int,
) -> Iterator[tuple[Step, Row]]:
    """A row for each step. One cache serves all, who write to the same places of it."""
    turns: dict[int, list[Turn]] = {i: [] for i in range(len(steps))}
    failed: dict[int, Row] = {}
    state = draw_state(steps[0].model.config, case) if steps else None
    for counted in (False, *[True] * rounds):
        for i, step in enumerate(steps):
            if i in failed:
                continue
            try:
                state, turn = take_turn(step, state, calls if counted else WARM_UPS)
            except Exception as error:
                failed[i] = failure(error)
                state = draw_state(step.model.config, case)  # the old one may be gone
                continue
            if counted:
                turns[i].append(turn)
    for i, step in enumerate(steps):
        row = describe_case(case) | contestant(step.model)
        if i in failed:
            yield step, row | failed[i]
            continue
        times = [turn.seconds for turn in turns[i]]
        if step.model.precision is None:
            baselines[case] = times
        yield step, row | describe_times(step, turns[i], baselines.get(case))


if __name__ == "__main__":
    main()
