"""What low bits cost SmolLM2, calibrated and not, beside ggml's types, at equal bits.

    python -m benchmarks.accuracy --json benchmarks/results/accuracy.json

The reference is the checkpoint's own weights in float, which were 4-bit (Q4_1, 5 bits a weight)
before. All are calibrated on every other Wikipedia article, ggml's importance matrices too, and
measured on the articles between. What is tuned is tuned on as many tokens again, of the former.
Bits count planes, scales and offsets of the linear layers. Needs llama-cpp-python for ggml's types.
Rows that the file of --json has already, of as many tokens, are kept, so a run that was stopped
goes on where it was.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

import jax_anyprec as ap
from jax_anyprec import fetch
from jax_anyprec.calibrate.observe import mean_squares
from jax_anyprec.models import load_gguf, weight_bytes
from jax_anyprec.models.calibration import (
    batches_of,
    calibrate_decoder,
    calibration_part,
    decoder_costs,
    decoder_tuning,
    default_rules,
    held_out_part,
    hidden,
    packed_weights,
    smooth_decoder,
    split,
)
from jax_anyprec.models.evaluate import Evaluator, choose_windows, encode_texts
from jax_anyprec.models.wikipedia import read_articles
from jax_anyprec.nnx.convert import Found, quantized_by
from jax_anyprec.nnx.packed import packed_in

from . import ggml_types
from .folded import fold, folded_rules
from .machine import commit
from .report import Row, rows_of, table, write_json
from .static_scales import put_static_scales

BUDGETS = (2.3, 2.7, 3.5, 4.5, 5.5)
TYPES = ("IQ4_NL", "Q4_0", "Q3_K", "IQ3_S", "Q2_K", "IQ2_S", "Q4_K", "Q5_0", "Q5_K", "Q8_0")
JOINED = (
    "IQ2_XXS", "IQ2_XS", "IQ2_S", "Q2_K", "IQ3_XXS", "IQ3_S", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K",
)  # fmt: skip
ACTIVATIONS = (
    (None, None), (8, None), (8, 64), (6, None), (6, 64), (5, None), (4, 32), (4, 64), (4, None),
)  # fmt: skip
"""Bits, and the values that share a scale; None for those of a token."""

BOTH = (True, False)

Prepare = Callable[[Any], float | None]
"""Changes a float model in place; gives the bits of a weight if its layers don't say them."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=pathlib.Path, help="write all figures to this file")
    parser.add_argument("--tokens", type=int, default=16384, help="to calibrate on")
    parser.add_argument("--held-out", type=int, default=8192, help="tokens to measure on")
    parser.add_argument("--parts", default=",".join(PARTS), help="of: " + ", ".join(PARTS))
    parser.add_argument("--only", default="", help="settings that have this in their names")
    options = parser.parse_args()
    data, others, evaluator = read_texts(options.tokens, options.held_out)
    facts = {"calibration_tokens": data.size, "context": 512, "held_out": options.held_out}
    rows = rows_of(options.json, facts)
    done = {(row["part"], row["setting"]) for row in rows}
    for part in options.parts.split(","):
        for setting, prepare in PARTS[part](data, others):
            if (part, setting) in done or options.only not in setting:
                continue
            row = {"part": part, "setting": setting, "commit": commit()}
            rows.append({**row, **measure(evaluator, prepare)})
            print(json.dumps(rows[-1]), flush=True)
            if options.json:
                write_json(options.json, "benchmarks.accuracy", {**facts, "rows": rows})
    print(summary(rows))


def read_texts(tokens: int, held_out: int) -> tuple[np.ndarray, np.ndarray, Evaluator]:
    """Windows of so many tokens to calibrate and to tune on, and an evaluator on held-out ones."""
    loaded = load()
    articles = list(read_articles(fetch.fetch("wikipedia")))

    def windows(part: Any, tokens: int, context: int) -> np.ndarray:
        texts = (article.text for article in part(articles))
        return choose_windows(encode_texts(texts, loaded.tokenizer.encode), tokens, context)

    data, others = split(windows(calibration_part, 2 * tokens, 512), tokens)
    return data, others, Evaluator(loaded.model, windows(held_out_part, held_out, 1024))


def load() -> Any:
    """SmolLM2 in float."""
    return load_gguf(fetch.fetch("smollm2"), quantization=None)


def measure(evaluator: Evaluator, prepare: Prepare) -> Row:
    """A model's figures, and the CPU and wall time of what was done to it."""
    model = load().model
    wall, cpu = time.perf_counter(), time.process_time()
    bits = prepare(model)
    times = {
        "seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
    }
    result = evaluator(model)
    return {
        "bits": weight_bytes(model).bits_per_linear_weight if bits is None else bits,
        "ratio": result.ratio,
        **dataclasses.asdict(result),
        **times,
    }


# --- calibrated ---


def rules_for(model: Any, bits: int, rotate: bool, **options: Any) -> Any:
    """The default rules for weights beside float activations, all rotated or none."""
    rules = default_rules(model, bits, activations=None, **options)
    return [(path, dataclasses.replace(each, rotate=rotate)) for path, each in rules]


def pack(model: Any, rules: Any, data: np.ndarray, others: np.ndarray, calibrate: bool) -> None:
    """By rules: calibrated and tuned, or rounded to nearest."""
    if calibrate:
        calibrate_decoder(model, data, rules, tuning=decoder_tuning(others))
    else:
        ap.quantize_model(model, rules)


def budgets(data: np.ndarray, others: np.ndarray) -> Iterator[tuple[str, Any]]:
    """Mixed bits, or as in the file, under a budget; calibrated, and tuned on other windows."""

    @functools.cache
    def costs() -> Any:
        model = load().model
        packed = packed_weights(load_gguf(fetch.fetch("smollm2")).model, model)
        rules = default_rules(model, 3, activations=None)
        return decoder_costs(model, data, rules, packed=packed)

    def prepare(model: Any, budget: float) -> None:
        chosen, tuning = costs().allocate(budget), decoder_tuning(others)
        calibrate_decoder(model, data, chosen.rules, packed=chosen.packed, tuning=tuning)

    for budget in BUDGETS:
        yield f"at most {budget} bits, tuned", functools.partial(prepare, budget=budget)


def weights(data: np.ndarray, others: np.ndarray) -> Iterator[tuple[str, Any]]:
    """All layers at 4 or at 2 bits in groups of 64: rounded, and by default; 3 are `ablation`'s."""

    def prepare(model: Any, bits: int, nearest: bool) -> None:
        rules = default_rules(model, bits, activations=None)
        pack(model, rules, data, others, calibrate=not nearest)

    for bits in (4, 2):
        for nearest in BOTH:
            name = "rotated, round to nearest" if nearest else "calibrated, tuned"
            yield f"W{bits}, {name}", functools.partial(prepare, bits=bits, nearest=nearest)


def low_rank(data: np.ndarray, _: np.ndarray) -> Iterator[tuple[str, Any]]:
    """Products of low rank beside weights that are rounded to nearest, in groups of 64."""

    def prepare(model: Any, bits: int, extra: float) -> None:
        ap.quantize_model(model, default_rules(model, bits, activations=None))
        if extra:
            batches = batches_of(data)
            ap.calibrate.compensate(model, load().model, batches, extra, call=hidden)

    for bits in (4, 3):
        for extra in (0.0, 0.25):
            name = f"W{bits}, round to nearest, low rank of {extra} bits a weight"
            yield name, functools.partial(prepare, bits=bits, extra=extra)


def nested(data: np.ndarray, others: np.ndarray) -> Iterator[tuple[str, Any]]:
    """First planes of weights of 4 bits in groups of 64, calibrated to serve so or not."""

    @functools.cache
    def store(precisions: tuple[int, ...]) -> tempfile.TemporaryDirectory[str]:
        folder: tempfile.TemporaryDirectory[str] = tempfile.TemporaryDirectory()
        model = load().model
        calibrate_decoder(
            model,
            data,
            default_rules(model, 4, activations=None),
            tuning=decoder_tuning(others),
            store=folder.name,
            method=ap.calibrate.Method(nested=precisions),
        )
        return folder

    def serving(model: Any, bits: int | None) -> None:
        ap.calibrate.load_calibrated(model, store((3, 2)).name, bits=bits)

    def truncated(model: Any, bits: int) -> None:
        ap.calibrate.load_calibrated(model, store(()).name)
        for each in packed_in(model).values():
            each.node.set_value(each.node.get_value().truncate(bits))

    for bits in (None, 3, 2):
        yield f"W{bits or 4} of W4 for 3 and 2", functools.partial(serving, bits=bits)
    for bits in (3, 2):  # all 4 are `weights`'
        yield f"W{bits} of W4 alone", functools.partial(truncated, bits=bits)


def ablation(data: np.ndarray, others: np.ndarray) -> Iterator[tuple[str, Any]]:
    """3 bits in groups of 64: what each step of the calibration adds."""
    method = ap.calibrate.Method

    def nearest(model: Any, rotate: bool) -> None:
        ap.quantize_model(model, rules_for(model, 3, rotate))

    def calibrated(model: Any, method: Any, rotate: bool = True, tuning: Any = None) -> None:
        rules = rules_for(model, 3, rotate)
        calibrate_decoder(model, data, rules, method=method, tuning=tuning)

    yield "round to nearest", functools.partial(nearest, rotate=False)
    yield "rotated, round to nearest", functools.partial(nearest, rotate=True)
    steps = {
        "rotated, GPTQ": method(sweeps=0, cross=0.0),
        "rotated, GPTQ, sweeps": method(cross=0.0),
        "rotated, GPTQ, sweeps, float inputs": method(),
    }
    for name, each in steps.items():
        yield name, functools.partial(calibrated, method=each)
    tuned = functools.partial(calibrated, method=method(), tuning=decoder_tuning(others))
    yield "rotated, all of it, tuned (default)", tuned
    yield "not rotated, all of it", functools.partial(calibrated, method=method(), rotate=False)


def offsets(data: np.ndarray, _: np.ndarray) -> Iterator[tuple[str, Any]]:
    """Calibrated weights, not tuned: groups of 64 with offsets or, of equal bits, of 32 without."""

    def prepare(model: Any, bits: int, rotate: bool, centred: bool) -> None:
        size = 32 if centred else 64
        rules = rules_for(model, bits, rotate, group_size=size, offsets=not centred)
        calibrate_decoder(model, data, rules)

    for bits in (4, 3, 2):
        for rotate in BOTH:
            for centred in BOTH:
                name = "groups of 32" if centred else "groups of 64, offsets"
                turned = "rotated" if rotate else "not rotated"
                run = functools.partial(prepare, bits=bits, rotate=rotate, centred=centred)
                yield f"W{bits}, {turned}, {name}", run


def activations(
    data: np.ndarray, others: np.ndarray, method: str = ""
) -> Iterator[tuple[str, Any]]:
    """Rotated activations beside weights of 8 bits.

    All is rounded to nearest, after channels were smoothed, or calibrated, which smooths too, and
    tuned.
    """

    def prepare(model: Any, bits: int | None, group: int | None) -> None:
        scales: Any = "token" if group is None else "group"
        sizes = {} if group is None else {"group_size": group}
        rules = default_rules(model, 8, activations=bits, act_scales=scales, **sizes)
        if method == "smoothed":
            smooth_decoder(model, data)
        pack(model, rules, data, others, calibrate=method == "calibrated")

    for bits, group in ACTIVATIONS:
        name = f"W8A{bits or 16}, a scale a {f'group of {group}' if group else 'token'}"
        yield name, functools.partial(prepare, bits=bits, group=group)


def static(data: np.ndarray, _: np.ndarray) -> Iterator[tuple[str, Any]]:
    """Rotated activations with one scale, for a percentile of what was seen, beside float weights.

    A scale a token, found as it comes, is `activations`'.
    """

    def prepare(model: Any, bits: int, percentile: float) -> float:
        runs = [functools.partial(hidden, model, batch) for batch in batches_of(data[::4])]
        put_static_scales(linear_layers(model), runs, bits, percentile)
        return 32.0

    for bits in (8, 6):
        for percentile in (100.0, 99.99, 99.9, 99.0):
            name = f"A{bits}, one scale, for the percentile {percentile}"
            yield name, functools.partial(prepare, bits=bits, percentile=percentile)


def folded(data: np.ndarray, others: np.ndarray) -> Iterator[tuple[str, Any]]:
    """Rotations folded into weights or on line, all in groups of 64, rounded or calibrated."""

    def prepare(model: Any, bits: int, acts: int | None, into: bool, calibrate: bool) -> None:
        if into:
            fold(model)
        rules = (folded_rules if into else default_rules)(model, bits, activations=acts)
        pack(model, rules, data, others, calibrate)

    for bits, acts, calibrate in (
        (8, 8, False), (8, 4, False), (4, None, False), (4, 8, True)
    ):  # fmt: skip
        for into in BOTH:
            name = f"W{bits}A{acts or 16}, {'calibrated, tuned' if calibrate else 'rounded'}"
            run = functools.partial(prepare, bits=bits, acts=acts, into=into, calibrate=calibrate)
            yield f"{name}, {'folded' if into else 'on line'}", run


# --- ggml ---


def peers(data: np.ndarray, _: np.ndarray) -> Iterator[tuple[str, Any]]:
    """ggml's types for all linear layers, without and with an importance matrix.

    Joined are types of blocks of 256 for this model, of whose rows most have 576: what they would
    give if blocks ended where they like. llama.cpp takes larger types instead.
    """
    importance = functools.cache(lambda: importances(data))

    def prepare(model: Any, name: str, with_importance: bool, joined: bool = False) -> float:
        given = importance() if with_importance else {}
        return round_to_type(model, name, given, joined)

    for name in JOINED:
        yield (
            f"ggml {name}, joined, importance matrix",
            functools.partial(prepare, name=name, with_importance=True, joined=True),
        )

    for name in TYPES:
        # Q8_0 ignores a matrix, IQ2_S needs one.
        for with_importance in (True,) if name == "IQ2_S" else (False,) if name == "Q8_0" else BOTH:
            setting = f"ggml {name}" + ", importance matrix" * with_importance
            yield setting, functools.partial(prepare, name=name, with_importance=with_importance)


def linear_layers(model: Any) -> list[Found]:
    """The layers that are quantized by default."""
    return [found for found, _ in quantized_by(model, ap.Quantization(weights=4))]


def importances(data: np.ndarray) -> dict[str, np.ndarray]:
    """The mean square of each layer's inputs, ``float32[K]`` by path."""
    model = load().model
    runs = [functools.partial(hidden, model, batch) for batch in batches_of(data)]
    return mean_squares(linear_layers(model), runs)


def round_to_type(model: Any, name: str, importance: dict[str, np.ndarray], joined: bool) -> float:
    """Round all linear layers to a type, in place; the bits of a weight."""
    bits = weights = 0.0
    for found in linear_layers(model):
        kernel: Any = found.module
        values = np.asarray(kernel.kernel[...])
        kind = ggml_types.Type[name] if joined else ggml_types.type_for(name, values.shape[0])
        new = ggml_types.rounded(values, kind, importance.get(found.layer.path))
        kernel.kernel.set_value(jnp.asarray(new))
        bits += values.size * ggml_types.bits_of(kind)
        weights += values.size
    return bits / weights


PARTS: dict[str, Callable[[np.ndarray, np.ndarray], Iterator[tuple[str, Any]]]] = {
    "peers": peers,
    "budgets": budgets,
    "weights": weights,
    "nested": nested,
    "low rank": low_rank,
    "offsets": offsets,
    "ablation": ablation,
    "activations": activations,
    "static": static,
    "folded": folded,
    "activations smoothed": functools.partial(activations, method="smoothed"),
    "activations calibrated": functools.partial(activations, method="calibrated"),
}


def summary(rows: list[Row]) -> str:
    """A Markdown table."""
    header = ["part", "setting", "bits a weight", "ratio", "±", "KL", "top-1", "CPU s"]

    def line(row: Row) -> list[str]:
        return [
            row["part"],
            row["setting"],
            f"{row['bits']:.2f}",
            f"{row['ratio']:.4f}",
            f"{row['ratio_error']:.4f}",
            f"{row['kl']:.4f}",
            f"{row['top1']:.3f}",
            f"{row['cpu_seconds']:.0f}",
        ]

    return table(header, map(line, rows))


if __name__ == "__main__":
    main()
