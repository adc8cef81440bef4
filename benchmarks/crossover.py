"""Products by planes against products by codes, from which jax_anyprec/choose.py chooses.

    python -m benchmarks.crossover --json benchmarks/results/crossover-NAME.json

4096 x 4096 prepared weights, one scale a channel, on one core. A figure is the median over rounds
of the time by planes divided by the time by codes of the same round. JAX_ANYPREC_ISA, set to
another instruction set of this machine, measures that one.
"""

from __future__ import annotations

import argparse
import functools
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np

import jax_anyprec as ap
from jax_anyprec.choose import cpu_method
from tests.layers import SQUARE, Pair

from .isolate import on_cores
from .machine import machine
from .products import CHANNEL, JaxProduct, random_weights
from .report import Row, matrix, write_json
from .timing import speeds, take_turns

PAIRS = tuple(Pair(w, a) for w in range(1, 5) for a in range(1, 5) if w * a <= 4)
ROWS = (1, 16, 512)
METHODS = ("cpu_codes", "cpu_planes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="turns of each contestant")
    parser.add_argument("--json", type=pathlib.Path, help="write all figures to this file")
    options = parser.parse_args()
    run = on_cores(1, run_pairs, options.rounds)
    labels = {"W x A": lambda row: row["pair"]}
    print(matrix(run["rows"], labels, lambda row: f"{row['m']} rows", cell))
    if options.json:
        write_json(options.json, "benchmarks.crossover", {"rounds": options.rounds} | run)


def run_pairs(rounds: int) -> dict[str, Any]:
    return {
        "machine": machine(),
        "rows": [compare(pair, m, rounds) for m in ROWS for pair in PAIRS],
    }


def compare(pair: Pair, m: int, rounds: int) -> Row:
    """Time by planes over time by codes, and what choose.py says."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((m, SQUARE.k), np.float32))
    w = random_weights(SQUARE, pair.weights, CHANNEL).prepare()
    ways = [
        JaxProduct(name, functools.partial(
            ap.matmul, act_bits=pair.activations, act_scales="token", implementation=name
        ), x, w, lambda _: 1)
        for name in METHODS
    ]  # fmt: skip
    codes, planes = take_turns(ways, rounds)
    np.testing.assert_array_equal(*(way.output() for way in ways))
    choice = cpu_method(pair.activations, pair.weights, m, machine()["isa"])
    ratio = speeds(planes, codes)
    return {
        "pair": f"{pair.weights} x {pair.activations}",
        "m": m,
        "planes_over_codes": ratio.median,
        "quartiles": [ratio.low, ratio.high],
        "chosen": choice.method,
    }


def cell(row: Row) -> str:
    text = f"{row['planes_over_codes']:.2f}"
    return f"**{text}**" if row["chosen"] == "planes" else text


if __name__ == "__main__":
    main()
