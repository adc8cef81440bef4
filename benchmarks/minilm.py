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
from typing import Any

import numpy as np
from scipy import stats

from jax_anyprec import fetch
from jax_anyprec.models import Quantization, weight_bytes
from jax_anyprec.models.sentences import load_sentence_encoder

from .report import Row, table, write_json

GROUP = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=pathlib.Path, help="write all figures to this file")
    options = parser.parse_args()
    model, texts = fetch.fetch("minilm"), fetch.fetch("lee")
    documents, judgements = read_texts(texts), read_judgements(texts)
    exact, row = measure(model, None, documents, judgements)
    rows = [{"setting": "float32", **row}]
    for name, quantization in settings():
        embeddings, row = measure(model, quantization, documents, judgements)
        rows.append({"setting": name, **row, **differences(embeddings, exact)})
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
    """How similar people find each two documents, 0 to 1: ``float64[1225]``, see `pairs`."""
    return pairs(np.loadtxt(folder / "similarities0-1.txt"))


def pairs(matrix: np.ndarray) -> np.ndarray:
    """The entries of a symmetric matrix above its diagonal."""
    return matrix[np.triu_indices(len(matrix), 1)]


def measure(
    model: pathlib.Path,
    quantization: Quantization | None,
    documents: list[str],
    judgements: np.ndarray,
) -> tuple[np.ndarray, Row]:
    """The embeddings of `documents`, and how their similarities agree with `judgements`."""
    encoder = load_sentence_encoder(model, quantization=quantization)
    embeddings = encoder.encode(documents)
    similarities = pairs(embeddings @ embeddings.T)
    size = weight_bytes(encoder.model)
    return embeddings, {
        "bits_per_weight": size.bits_per_linear_weight,
        "linear_bytes": size.linear,
        "pearson": float(stats.pearsonr(similarities, judgements).statistic),
        "spearman": float(stats.spearmanr(similarities, judgements).statistic),
    }


def differences(embeddings: np.ndarray, exact: np.ndarray) -> dict[str, Any]:
    """How far embeddings, all of length 1, are from those of the float model."""
    cosines = (embeddings * exact).sum(axis=-1)
    similarities = pairs(embeddings @ embeddings.T), pairs(exact @ exact.T)
    return {
        "mean_cosine": float(cosines.mean()),
        "least_cosine": float(cosines.min()),
        "pearson_with_float": float(stats.pearsonr(*similarities).statistic),
    }


def summary(rows: list[Row]) -> str:
    """A Markdown table; what is with the float model is empty for itself."""

    def figure(row: Row, key: str, digits: int) -> str:
        return f"{row[key]:.{digits}f}" if key in row else ""

    columns = {
        "bits_per_weight": ("bits a weight", 2),
        "mean_cosine": ("mean cosine with float", 4),
        "least_cosine": ("least", 4),
        "pearson_with_float": ("similarities: Pearson with float", 4),
        "pearson": ("Pearson with people", 3),
        "spearman": ("Spearman with people", 3),
    }
    header = ["setting", *(title for title, _ in columns.values())]
    lines = (
        [row["setting"], *(figure(row, key, digits) for key, (_, digits) in columns.items())]
        for row in rows
    )
    return table(header, lines)


if __name__ == "__main__":
    main()
