"""Measures the alternatives of `plan()` on a GPU, and the constants that would have chosen best.

    python -m benchmarks.gpu.tune --peaks rates.json --json tune.json

All ways to compute one product take turns: methods, tiles, parts of K, and what a plan says with
yes or no, such as whether a single row is quantized in the product. Nothing is tuned at run time:
what is found goes into csrc/cuda/plan.cc by hand. The file has every time, the loss of each choice
of `plan()`, and what `fit` makes of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import jax_anyprec as ap
from jax_anyprec import local_cuda
from jax_anyprec.operands import absent

from ..report import Row
from . import contestants, fit
from .contestants import Case, Contestant
from .machine import gpu, provenance
from .products import CACHE_BYTES, race
from .rows import log
from .shapes import MODELS, Precision, precisions

LAYERS = (MODELS[2], MODELS[6], MODELS[4], MODELS[3])
"""Of Llama-2-7B and Llama-3-8B."""
ROWS = (1, 16, 64, 1024)
PRECISIONS = (
    *("W1A1", "W2A2", "W2A4", "W3A3", "W4A4", "W1A8", "W2A8", "W4A8", "W2A16", "W4A16"),
    *("W4A8 g128", "W4A16 g128"),
)
TILES = {
    "planes": ("narrow", "whole"),
    "codes": ("narrow", "medium", "wide", "whole"),
    "float": ("narrow", "medium", "wide", "whole"),
}
"""Of each method, beside "stream" where that can be used; "whole" needs one scale for all of K."""
SPLITS = (1, 2, 4, 8, 16)
SPLIT_ROWS = 256
"""With more rows there are blocks enough without parts of K."""
NO_ATTRIBUTES = ("reason", "workspace_row_bytes")
"""What a plan says that is not for the kernels."""

Plan = dict[str, Any]


class Problem(NamedTuple):
    """A product that is planned for."""

    case: Case
    precision: Precision

    def plan(self, implementation: str) -> Plan:
        """What `plan()` chooses, of one family if that is named."""
        (_, k, n), pair = self.case.layer, self.precision.pair
        group_size = self.precision.group_size or k
        return local_cuda.plan(
            n, k, rows=self.case.m, weight_bits=pair.weights, act_bits=pair.activations,
            group_size=group_size, act_group_size=group_size, x_dtype=jnp.bfloat16,
            implementation=implementation,
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--precisions", nargs="+", default=PRECISIONS, help='as "W4A16 g128"')
    parser.add_argument("--m", nargs="+", type=int, default=ROWS, help="rows of activations")
    parser.add_argument("--layers", type=int, default=2, help=f"up to {len(LAYERS)}")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each alternative")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after these")
    parser.add_argument("--peaks", type=pathlib.Path, help="the file of benchmarks.gpu.rates")
    parser.add_argument("--json", type=pathlib.Path, required=True, help="figures are written here")
    options = parser.parse_args()
    try:
        device = jax.devices("cuda")[0]
    except RuntimeError as error:
        sys.exit(f"there is no GPU to tune for: {error}")
    with jax.default_device(device):
        rows = list(measure(options))
    report = provenance("benchmarks.gpu.tune") | {"gpu": gpu()} | fit.report(rows)
    options.json.write_text(json.dumps(report, indent=1) + "\n")
    print(fit.tables(rows))


def measure(options: argparse.Namespace) -> Iterator[Row]:
    """A row for each alternative of each problem, until the time is over."""
    cache_bytes = CACHE_BYTES
    if options.peaks:
        cache_bytes = json.loads(options.peaks.read_text())["l2_bytes"]
    deadline = time.monotonic() + options.seconds
    table = itertools.product(options.m, LAYERS[: options.layers], precisions(*options.precisions))
    for m, layer, precision in table:
        if time.monotonic() > deadline:
            log(f"stopped after {options.seconds:.0f} s")
            return
        yield from compare(Problem(Case(layer, m, cache_bytes), precision), options.rounds)


def compare(problem: Problem, rounds: int) -> Iterator[Row]:
    """A row for each alternative: its plan, whether `plan()` chose it, and its time or an error."""
    chosen = attributes(problem.plan("cuda"))
    everyone = list(alternatives(problem))
    plans = {fit.plan_text(plan): attributes(plan) for plan in everyone}
    entries = [(fit.plan_text(plan), functools.partial(enter, problem, plan)) for plan in everyone]
    for row in race(problem.case, entries, rounds):
        plan = plans[row["contestant"]]
        yield row | {
            "precision": str(problem.precision),
            "weight_bits": problem.precision.pair.weights,
            "act_bits": problem.precision.pair.activations,
            "plan": plan,
            "chosen": plan == chosen,
        }


def alternatives(problem: Problem) -> Iterator[Plan]:
    """Plans for a problem; kernels may still refuse some."""
    for method, tiles in TILES.items():
        try:
            base = problem.plan("cuda" if method == "float" else f"cuda_{method}")
        except ap.Unavailable:
            continue
        if base["method"] != method:  # activations are floats, or they are not
            continue
        if problem.precision.group_size is not None:
            tiles = tuple(tile for tile in tiles if tile != "whole")
        if base["tile"] == "stream":
            tiles = (*tiles, "stream")
        splits = {base["splits"], *(SPLITS if problem.case.m <= SPLIT_ROWS else (1,))}
        for tile, parts in itertools.product(tiles, sorted(splits)):
            plan = base | {"tile": tile, "splits": parts}
            yield from (plan | switches for switches in switches_of(plan, problem.case.m))


def switches_of(plan: Plan, m: int) -> Iterator[Plan]:
    """What a plan says with yes or no, each way that fits its tile and parts."""
    few = plan["tile"] == "stream"
    can = {"clustered": few and plan["splits"] in (2, 4, 8), "quantizes": few and m == 1}
    names = [name for name in can if name in plan]
    for values in itertools.product(*((False, True) if can[name] else (False,) for name in names)):
        yield dict(zip(names, values, strict=True))


def attributes(plan: Plan) -> Plan:
    return {name: value for name, value in plan.items() if name not in NO_ATTRIBUTES}


def enter(problem: Problem, plan: Plan) -> Contestant:
    """The kernels of a plan as a contestant."""
    operation = functools.partial(product, plan=plan, act_bits=problem.precision.pair.activations)
    made = contestants.quantized(problem.case, problem.precision, operation, "cuda")
    return dataclasses.replace(made, about=made.about | {"contestant": fit.plan_text(plan)})


def product(x: jax.Array, w: ap.QuantizedTensor, *, plan: Plan, act_bits: int | None) -> jax.Array:
    """``x [M, K] @ w [K, N]`` by the kernels that a plan names, as `local_cuda.matmul` calls them.

    Activations have the weights' groups.
    """
    m, n = x.shape[0], w.shape[-1]
    whole = plan["splits"] == 1 or plan.get("clustered", False)
    results = (
        jax.ShapeDtypeStruct((m, n), x.dtype),
        jax.ShapeDtypeStruct((m, plan["workspace_row_bytes"]), jnp.uint8),
        jax.ShapeDtypeStruct((0 if whole else plan["splits"], m, n), jnp.float32),
    )
    call = jax.ffi.ffi_call("jax_anyprec_cuda_matmul", results)
    nothing, no_words = absent(), absent(jnp.uint32)
    return call(
        x, w.planes, w.scales, nothing, nothing, no_words, nothing,
        act_bits=act_bits or 0, group_size=w.group_size, act_group_size=w.group_size, block=0,
        **attributes(plan),
    )[0]  # fmt: skip


if __name__ == "__main__":
    main()
