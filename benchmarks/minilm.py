"""What quantization costs a model whose weights were float: MiniLM's sentence embeddings.

    python -m benchmarks.minilm --json benchmarks/results/minilm.json

all-MiniLM-L6-v2 in float32 embeds the 50 news texts of Lee et al. (2005). How similar it finds two
texts is the product of their embeddings, which is compared with 1,225 human judgements, and each
embedding with that of the float model. Both files are fetched on first use (84 and 28 MB).
"""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
from scipy import stats

from jax_anyprec import fetch
from jax_anyprec.models import Quantization, load_sentence_encoder, weight_bytes

from .report import Row, table, write_json

GROUP = 32

COMPARED = {
    "mean_cosine": "mean cosine",
    "least_cosine": "least cosine",
    "pearson_with_float": "similarities",
}
"""Columns that compare with the float model."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=pathlib.Path, help="write all figures to this file")
    options = parser.parse_args()
    model, texts = fetch.fetch("minilm"), fetch.fetch("lee")
    documents, judged = read_texts(texts), read_judgements(texts)
    exact, row = measure(model, None, documents, judged)
    rows = [{"setting": "float32", **row}]
    for name, quantization in settings():
        embeddings, row = measure(model, quantization, documents, judged)
        rows.append({"setting": name, **row, **differences(embeddings, exact, judged)})
    print(summary(rows))
    if options.json:
        write_json(options.json, "benchmarks.minilm", {"rows": rows})


def settings() -> Iterator[tuple[str, Quantization]]:
    """Names and quantizations, none with any data but the weights: all is round-to-nearest."""
    yield "W8A16, a scale a channel", Quantization(weights=8, activations=None)
    yield "W8A8, a scale a channel and token", Quantization(weights=8, act_scales="token")
    rotated = Quantization(weights=8, act_scales="token", rotate=True)
    yield "W8A8, a scale a channel and token, rotated", rotated
    for weights in (4, 3, 2):
        absmax = Quantization(weights=weights, activations=None, group_size=GROUP, scales="absmax")
        yield f"W{weights}A16, groups of {GROUP}, scales by absmax", absmax
        for activations in (None, 8, 4):
            for rotate in (False, True):
                quantization = Quantization(
                    weights=weights,
                    activations=activations,
                    group_size=GROUP,
                    rotate=rotate,
                    scales="mse",
                )
                name = f"W{weights}A{activations or 16}, groups of {GROUP}"
                yield name + ", rotated" * rotate, quantization


def read_texts(folder: pathlib.Path) -> list[str]:
    """The documents of resource "lee", a line each."""
    return (folder / "lee.cor").read_text(encoding="latin1").strip().split("\n")


def read_judgements(folder: pathlib.Path) -> np.ndarray:
    """How similar people find each two documents, 0 to 1: ``float64[50, 50]``, see `pairs`."""
    return np.loadtxt(folder / "similarities0-1.txt")


def pairs(matrix: np.ndarray) -> np.ndarray:
    """The entries above the diagonal: one for each two documents."""
    return matrix[np.triu_indices(len(matrix), 1)]


def pearson(a: np.ndarray, b: np.ndarray) -> float:
    """Linear correlation of two matrices over all `pairs`."""
    return float(stats.pearsonr(pairs(a), pairs(b)).statistic)


def measure(
    model: pathlib.Path, quantization: Quantization | None, documents: list[str], judged: np.ndarray
) -> tuple[np.ndarray, Row]:
    """The embeddings of `documents`, and how their similarities agree with what people `judged`."""
    encoder = load_sentence_encoder(model, quantization=quantization, dtype=jnp.float32)
    embeddings = encoder.encode(documents)
    similar = embeddings @ embeddings.T
    size = weight_bytes(encoder.model)
    return embeddings, {
        "bits_per_weight": size.bits_per_linear_weight,
        "linear_bytes": size.linear,
        "pearson": pearson(similar, judged),
        "spearman": float(stats.spearmanr(pairs(similar), pairs(judged)).statistic),
    }


def differences(embeddings: np.ndarray, exact: np.ndarray, judged: np.ndarray) -> Row:
    """How far embeddings, all of length 1, are from those of the float model."""
    cosines = (embeddings * exact).sum(axis=-1)
    similar, expected = embeddings @ embeddings.T, exact @ exact.T
    return {
        "mean_cosine": float(cosines.mean()),
        "least_cosine": float(cosines.min()),
        "pearson_with_float": pearson(similar, expected),
        "pearson_change": pearson(similar, judged) - pearson(expected, judged),
        "pearson_change_error": change_error(similar, expected, judged),
    }


def change_error(similar: np.ndarray, expected: np.ndarray, judged: np.ndarray) -> float:
    """Standard error of the change in `pearson` for this choice of documents, by the jackknife."""

    def without(matrix: np.ndarray, i: int) -> np.ndarray:
        return np.delete(np.delete(matrix, i, axis=0), i, axis=1)

    changes = []
    for i in range(len(judged)):
        a, b, c = (without(matrix, i) for matrix in (similar, expected, judged))
        changes.append(pearson(a, c) - pearson(b, c))
    return float(np.std(changes) * (len(changes) - 1) ** 0.5)


def summary(rows: list[Row]) -> str:
    """A Markdown table; what compares with the float model is empty for itself."""

    def line(row: Row) -> list[str]:
        shown = [row["setting"], f"{row['bits_per_weight']:.2f}"]
        if "mean_cosine" in row:
            shown += [f"{row[key]:.4f}" for key in COMPARED]
            change = f"{row['pearson_change']:+.3f} ± {row['pearson_change_error']:.3f}"
        else:
            shown += [""] * len(COMPARED)
            change = ""
        return [*shown, f"{row['pearson']:.3f}", change, f"{row['spearman']:.3f}"]

    header = ["setting", "bits a weight", *COMPARED.values(), "Pearson", "change", "Spearman"]
    return table(header, map(line, rows))


if __name__ == "__main__":
    main()
