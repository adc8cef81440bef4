"""A whole model, SmolLM2-135M: time to the first token and decoding speed, ours and llama.cpp's.

    python -m benchmarks.model --json benchmarks/results/model-NAME.json

All settings read the same GGUF file, 4-bit weights in Q4_1; llama.cpp also has it in Q4_0. Each
number of threads gets a process of its own, held to so many cores. Settings take turns, for each
reading of the long prompt, and for every eight tokens that continue the short one, so that a change
in the machine's speed meets all of them. A speed is the median of the float32 time divided by the
setting's time of the same place in its turns.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from jax_anyprec import fetch, models
from jax_anyprec.gguf import GGUFFile

from .decoders import Decoder, LlamaCpp, OurDecoder, requantize
from .isolate import on_cores, thread_counts
from .machine import limits, machine
from .report import Row, table, write_json
from .timing import rest, speeds, spread, take_turns

PROMPT = "Explain in a few sentences why the sky is blue."
LONG_PROMPT = 512
"""Tokens of the prompt whose first answer is timed: PROMPT again and again."""
TURN = 8
"""Tokens that each setting decodes in its turn, after one that is not counted."""

SETTINGS: dict[str, tuple[models.Quantization | None, Any]] = {
    "float32": (None, jnp.float32),
    "bfloat16": (None, jnp.bfloat16),
    "W4A8 as in the file": (models.Quantization(), jnp.float32),
    "W4A16 as in the file": (models.Quantization(activations=None), jnp.float32),
    "W2A8 groups of 64": (models.Quantization(weights=2, group_size=64), jnp.float32),
    "W1A1 per channel": (models.Quantization(weights=1, activations=1), jnp.float32),
}
"""Quantization, and the dtype to compute in."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=thread_counts, default=[1], help="such as 1,2")
    parser.add_argument("--tokens", type=int, default=128, help="tokens that each setting decodes")
    parser.add_argument("--readings", type=int, default=5, help="readings of the long prompt")
    parser.add_argument("--json", type=pathlib.Path, help="write all figures to this file")
    options = parser.parse_args()
    path = fetch.fetch("smollm2")
    runs = [on_cores(n, run_model, path, options.tokens, options.readings) for n in options.threads]
    print(model_table([row for run in runs for row in run["rows"]]))
    if options.json:
        write_json(options.json, "benchmarks.model", {"runs": runs})


def run_model(path: pathlib.Path, tokens: int, readings: int) -> dict[str, Any]:
    """Limits of the machine, and a row for each setting on the cores of this process."""
    report = {"machine": machine(), "limits": limits()}
    prompt = models.Tokenizer.from_gguf(GGUFFile(path)).encode(PROMPT)
    long_prompt = (prompt * LONG_PROMPT)[:LONG_PROMPT]
    decoders: list[Decoder] = [
        OurDecoder(name, models.load_gguf(path, quantization=each, dtype=dtype).model)
        for name, (each, dtype) in SETTINGS.items()
    ]
    decoders += load_llama_cpp(path)
    log("models are loaded")
    first = take_turns([FirstToken(decoder, long_prompt) for decoder in decoders], readings)
    log("time to the first token is done")
    answers, following = decode_in_turn(decoders, prompt, tokens)
    threads = report["machine"]["cores"]
    rows = [
        {
            "setting": decoder.name,
            "threads": threads,
            "weight_bytes": decoder.weight_bytes,
            **figures("first_token", first[i], first[0]),
            **figures("next_token", following[i], following[0]),
            "prefill_tokens_per_second": LONG_PROMPT / spread(first[i]).median,
            "decode_tokens_per_second": 1 / spread(following[i]).median,
            "answer": answers[i],
        }
        for i, decoder in enumerate(decoders)
    ]
    return report | {"rows": rows}


def load_llama_cpp(path: pathlib.Path) -> list[Decoder]:
    """llama.cpp with the file as it is and in Q4_0; nothing, and why, if it isn't installed."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            smaller = pathlib.Path(folder, "q4_0.gguf")
            requantize(path, smaller, "Q4_0")  # it has the fastest of 4-bit kernels
            return [LlamaCpp("Q4_1 as in the file", path), LlamaCpp("Q4_0", smaller)]
    except ImportError as reason:
        log(f"skipped: llama.cpp, {reason}")
        return []


class FirstToken:
    """The work of reading a prompt until the first token is there."""

    def __init__(self, decoder: Decoder, prompt: Sequence[int]):
        self.name, self.decoder, self.prompt = decoder.name, decoder, prompt

    def run(self, count: int) -> None:
        for _ in range(count):
            self.decoder.start(self.prompt, max_tokens=1)


def decode_in_turn(
    decoders: list[Decoder], prompt: Sequence[int], tokens: int
) -> tuple[list[list[int]], list[list[float]]]:
    """The tokens that each model gives, and the seconds of each that counts."""
    turns = max(1, tokens // TURN)
    answers = [[decoder.start(prompt, turns * (TURN + 1) + 2)] for decoder in decoders]
    for decoder, answer in zip(decoders, answers, strict=True):
        answer.append(decoder.step())  # compiles
    seconds: list[list[float]] = [[] for _ in decoders]
    for _ in range(turns):
        for decoder, answer, times in zip(decoders, answers, seconds, strict=True):
            rest()
            answer.append(decoder.step())  # the last turn was others', who took the caches
            for _ in range(TURN):
                begin = time.perf_counter()
                answer.append(decoder.step())
                times.append(time.perf_counter() - begin)
    return answers, seconds


def figures(what: str, times: Sequence[float], baseline: Sequence[float]) -> Row:
    typical, speed = spread(times), speeds(baseline, times)
    return {
        f"{what}_speed_over_float32": speed.median,
        f"{what}_speed_quartiles": [speed.low, speed.high],
        f"{what}_median_ms": 1e3 * typical.median,
        f"{what}_quartiles_ms": [1e3 * typical.low, 1e3 * typical.high],
    }


def model_table(rows: list[Row]) -> str:
    header = [
        "threads",
        "setting",
        "weights, MB",
        "decoding speed over float32 (quartiles)",
        "tokens/s",
        f"speed to the first token after {LONG_PROMPT} over float32 (quartiles)",
        "ms",
    ]
    return table(
        header,
        (
            [
                row["threads"],
                row["setting"],
                f"{row['weight_bytes'] / 1e6:.0f}",
                speed_text(row, "next_token"),
                f"{row['decode_tokens_per_second']:.0f}",
                speed_text(row, "first_token"),
                f"{row['first_token_median_ms']:.0f}",
            ]
            for row in rows
        ),
    )


def speed_text(row: Row, what: str) -> str:
    low, high = row[f"{what}_speed_quartiles"]
    return f"{row[f'{what}_speed_over_float32']:.2f} ({low:.2f} to {high:.2f})"


def log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
