"""What quality SmolLM2 decodes with at what speed: ours, calibrated, and files of llama.cpp's.

    python -m benchmarks.quality_speed --folder FOLDER --json RESULTS.json

Ours are calibrated as by ``jax-anyprec quantize --bits N``, on fewer tokens. llama.cpp's files are
made by llama.cpp of the same GGUF file, with an importance matrix of the same tokens. Quality is
that of each file's weights, in our evaluation on held-out text; llama.cpp rounds activations to 8
bits besides. Then all take turns in decoding, as in `benchmarks.model`. Calibrations and files are
kept in --folder, so that a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import re
from typing import Any

import numpy as np

from jax_anyprec import fetch, models
from jax_anyprec.calibrate import load_calibrated
from jax_anyprec.gguf import GGUFFile
from jax_anyprec.models.calibration import (
    calibrate_decoder,
    decoder_tuning,
    default_quantization,
    default_rules,
)
from jax_anyprec.rotation import MIN_BLOCK

from .accuracy import importances, load, read_texts
from .decoders import Decoder, LlamaCpp, OurDecoder, requantize
from .isolate import on_cores, thread_counts
from .machine import limits, machine
from .model import PROMPT, decode_in_turn, figures, log, speed_text
from .report import Row, table, write_json

BITS = (4, 3, 2)
KINDS = ("Q8_0", "Q5_K_S", "Q4_K_S", "Q4_0", "IQ4_NL", "Q3_K_S", "IQ3_XXS", "Q2_K", "IQ2_XS")
ROUNDED = default_quantization(MIN_BLOCK, 4)  # the model's sizes are multiples of that
SETTINGS = {
    "W4A8 as in the file": models.Quantization(),
    "W4A16 as in the file": models.Quantization(activations=None),
    # As what is calibrated, and but for the rotation: so these show what rotating costs.
    "W4A8 rounded, rotated": ROUNDED,
    "W4A8 rounded, not rotated": dataclasses.replace(ROUNDED, rotate=False),
}
TENSORS = {
    r"layers/(\d+)/attention/qkv": ("attn_q", "attn_k", "attn_v"),
    r"layers/(\d+)/attention/output": ("attn_output",),
    r"layers/(\d+)/feed_forward/gate_up": ("ffn_gate", "ffn_up"),
    r"layers/(\d+)/feed_forward/down": ("ffn_down",),
}
"""A layer's place in our model, and its tensors in a GGUF file."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=pathlib.Path, help="write all figures to this file")
    parser.add_argument("--folder", type=pathlib.Path, required=True, help="for what is made")
    parser.add_argument("--threads", type=thread_counts, default=[1], help="such as 1,2")
    parser.add_argument("--tokens", type=int, default=16384, help="to calibrate on")
    parser.add_argument("--held-out", type=int, default=8192, help="tokens to measure on")
    parser.add_argument("--decode", type=int, default=128, help="tokens that each decodes")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    qualities = make(options.folder, options.tokens, options.held_out)
    runs = [
        on_cores(count, decode, options.folder, list(qualities), options.decode)
        for count in options.threads
    ]
    for run in runs:
        run["rows"] = [{**row, **qualities[row["setting"]]} for row in run["rows"]]
    print(summary([row for run in runs for row in run["rows"]]))
    if options.json:
        facts = {"calibration_tokens": options.tokens, "held_out": options.held_out}
        write_json(options.json, "benchmarks.quality_speed", {**facts, "runs": runs})


def make(folder: pathlib.Path, tokens: int, held_out: int) -> dict[str, Row]:
    """Make all models in a folder, and measure what each loses, by name."""
    data, others, evaluator = read_texts(tokens, held_out)
    for bits in BITS:
        calibrate(folder / calibrated(bits), bits, data, others)
    make_files(folder, data)
    kept = folder / f"quality-{held_out}.json"
    qualities: dict[str, Row] = json.loads(kept.read_text()) if kept.exists() else {}
    for name in names():
        if name not in qualities:
            result = evaluator(model_of(folder, name))
            qualities[name] = {"ratio": result.ratio, **dataclasses.asdict(result)}
            kept.write_text(json.dumps(qualities))
            log(f"{name}: KL divergence {result.kl:.4f}")
    return qualities


def names() -> list[str]:
    """Of all models, the float one first."""
    ours = ["float32", *SETTINGS, *map(calibrated, BITS)]
    return ours + [f"llama.cpp {kind}" for kind in KINDS]


def calibrated(bits: int) -> str:
    return f"W{bits}A8 calibrated"


def calibrate(store: pathlib.Path, bits: int, data: np.ndarray, others: np.ndarray) -> None:
    """Calibrate and tune into a folder, unless that is done."""
    if (store / "tuned.safetensors").exists():
        return
    model = load().model
    rules = default_rules(model, bits)
    calibrate_decoder(model, data, rules, store=store, tuning=decoder_tuning(others))
    log(f"{store.name} is done")


def make_files(folder: pathlib.Path, data: np.ndarray) -> None:
    """llama.cpp's files that are not there."""
    missing = [kind for kind in KINDS if not file_of(folder, kind).exists()]
    importance: dict[str, np.ndarray] = {}
    for path, squares in importances(data).items() if missing else ():
        for place, tensors in TENSORS.items():
            for layer in re.findall(place, path):
                importance |= {f"blk.{layer}.{each}.weight": squares for each in tensors}
    for kind in missing:
        unfinished = folder / f"{kind}.unfinished"
        requantize(fetch.fetch("smollm2"), unfinished, kind, importance)
        unfinished.rename(file_of(folder, kind))


def file_of(folder: pathlib.Path, kind: str) -> pathlib.Path:
    return folder / f"{kind}.gguf"


def model_of(folder: pathlib.Path, name: str) -> Any:
    """The model of a name; of a llama.cpp file, its weights in float."""
    if name in SETTINGS:
        return models.load_gguf(fetch.fetch("smollm2"), quantization=SETTINGS[name]).model
    maker, _, kind = name.partition(" ")
    if maker == "llama.cpp":
        return models.load_gguf(file_of(folder, kind), quantization=None).model
    model = load().model
    if name == "float32":
        return model
    model = load_calibrated(model, folder / name)
    models.pack_embedding(model, fetch.fetch("smollm2"))
    return model


def decode(folder: pathlib.Path, names: list[str], tokens: int) -> dict[str, Any]:
    """Limits of the machine, and a row for each model on the cores of this process."""
    report = {"machine": machine(), "limits": limits()}
    decoders = [decoder_of(folder, name) for name in names]
    prompt = models.Tokenizer.from_gguf(GGUFFile(fetch.fetch("smollm2"))).encode(PROMPT)
    _, seconds = decode_in_turn(decoders, prompt, tokens)
    rows = [
        {
            "setting": name,
            "threads": report["machine"]["cores"],
            "weight_bytes": decoder.weight_bytes,
            **figures("next_token", times, seconds[0]),
        }
        for name, decoder, times in zip(names, decoders, seconds, strict=True)
    ]
    return report | {"rows": rows}


def decoder_of(folder: pathlib.Path, name: str) -> Decoder:
    maker, _, kind = name.partition(" ")
    if maker == "llama.cpp":
        return LlamaCpp(kind, file_of(folder, kind))
    return OurDecoder(name, model_of(folder, name))


def summary(rows: list[Row]) -> str:
    header = [
        "threads", "setting", "weights, MB", "perplexity ratio", "KL divergence",
        "decoding speed over float32 (quartiles)",
    ]  # fmt: skip
    return table(
        header,
        (
            [
                row["threads"],
                row["setting"],
                f"{row['weight_bytes'] / 1e6:.0f}",
                f"{row['ratio']:.4f}",
                f"{row['kl']:.4f}",
                speed_text(row, "next_token"),
            ]
            for row in rows
        ),
    )


if __name__ == "__main__":
    main()
