r"""What quantization costs a model whose weights were float: MiniLM's sentence embeddings.

    pip download --no-deps --no-binary :all: vaderSentiment==3.3.2
    python -m benchmarks.minilm --probes vaderSentiment-3.3.2.tar.gz \
      --json benchmarks/results/minilm.json

all-MiniLM-L6-v2 in float32 embeds the 50 news texts of Lee et al. (2005). How similar it finds two
texts is the product of their embeddings, which is compared with 1,225 human judgements, and each
embedding with that of the float model. With --probes, regressions on its embeddings of labelled
sentences tell their sentiment, see `benchmarks.probes`. Calibration sees other text: articles of
Wikipedia. The model and the texts are fetched on first use (84 and 28 MB). Rows that the file of
--json has already are kept, so a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

import jax_anyprec as ap
from jax_anyprec import fetch
from jax_anyprec.models import Quantization, SentenceEncoder, load_sentence_encoder, weight_bytes
from jax_anyprec.models.calibration import batches_of, split
from jax_anyprec.models.evaluate import choose_windows
from jax_anyprec.models.wikipedia import read_articles

from .probes import TEST, Probe, accuracies, accuracy_change, read_probes
from .report import Row, rows_of, table, write_json

GROUP = 32
TOKENS, CONTEXT = 32768, 64
"""Of text to calibrate on and again to tune on, and of a window, as long as sentences to embed."""

COMPARED = {
    "mean_cosine": "mean cosine",
    "least_cosine": "least cosine",
    "pearson_with_float": "similarities",
}
"""Columns that compare with the float model."""

Make = Callable[[], SentenceEncoder]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=pathlib.Path, help="write all figures to this file")
    parser.add_argument("--probes", type=pathlib.Path, help="the file that has the labelled sets")
    parser.add_argument("--peers", action="store_true", help="with qwix, which has to be installed")
    parser.add_argument("--only", default="", help="settings that have this in their names")
    options = parser.parse_args()
    texts = fetch.fetch("lee")
    probes = {} if options.probes is None else read_probes(options.probes)
    task = Task(read_texts(texts), read_judgements(texts), probes)
    exact = task.run(load(None))
    facts = {"test_sentences": TEST if probes else 0}
    rows = rows_of(options.json, facts) or [{"setting": "float32", **exact.row()}]
    done = {row["setting"] for row in rows}
    for name, make, bits in settings(options.peers):
        if name in done or options.only not in name:
            continue
        result = task.run(make(), bits)
        rows.append({"setting": name, **result.row(), **result.differences(exact)})
        print(rows[-1], flush=True)
        if options.json:
            write_json(options.json, "benchmarks.minilm", {**facts, "rows": rows})
    print(summary(rows))


# --- settings ---


def settings(with_peers: bool) -> Iterator[tuple[str, Make, float | None]]:
    """What is compared: weights rounded to nearest, without any data, and calibrated ones.

    With the bits of a weight, or None for those of packed layers.
    """
    for name, quantization in roundings():
        yield name, functools.partial(load, quantization), None
    for name, quantization in calibrations():
        yield name, functools.partial(calibrate, quantization), None
    if with_peers:
        for weights, activations in ((4, 8), (4, 4), (3, 8), (2, 8)):
            name = f"qwix: int{weights} by int{activations}, groups of {GROUP}"
            make = functools.partial(rounded_by_qwix, weights, activations)
            yield name, make, weights + 32 / GROUP


def roundings() -> Iterator[tuple[str, Quantization]]:
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


def calibrations() -> Iterator[tuple[str, Quantization]]:
    for weights, activations, size in itertools.product((4, 3, 2), (8, 4), (GROUP, 64)):
        quantization = Quantization(
            weights=weights,
            activations=activations,
            group_size=size,
            rotate=True,
            scale_dtype="float16",
        )
        name = f"W{weights}A{activations}, groups of {size}, rotated, calibrated, tuned"
        yield name, quantization


def load(quantization: Quantization | None) -> SentenceEncoder:
    path = fetch.fetch("minilm")
    return load_sentence_encoder(path, quantization=quantization, dtype=jnp.float32)


def calibrate(quantization: Quantization) -> SentenceEncoder:
    """The encoder with all linear layers calibrated, and tuned on other windows."""

    def call(model: Any, tokens: jax.Array) -> jax.Array:
        return model(tokens, jnp.ones(tokens.shape, bool))

    encoder = load(None)
    data, others = split(windows(encoder), TOKENS)
    report = ap.calibrate_model(
        encoder.model,
        [("**", quantization)],
        batches_of(data, 64),
        call=call,
        tuning=ap.calibrate.Tuning(batches_of(others, 16), call=call),
    )
    return SentenceEncoder(report.model, encoder.tokenizer, max_tokens=encoder.max_tokens)


def rounded_by_qwix(weights: int, activations: int) -> SentenceEncoder:
    """The encoder with linear layers as qwix rounds them: symmetric, by the largest magnitude."""
    import qwix

    encoder = load(None)
    rule = qwix.QuantizationRule(
        module_path=".*(qkv|output|up|down).*",
        weight_qtype=f"int{weights}",
        act_qtype=f"int{activations}",
        tile_size=GROUP,
    )
    tokens = jnp.zeros((1, CONTEXT), jnp.int32)
    model = qwix.quantize_model(
        encoder.model, qwix.PtqProvider([rule]), tokens, jnp.ones(tokens.shape, bool)
    )
    return SentenceEncoder(model, encoder.tokenizer, max_tokens=encoder.max_tokens)


def windows(encoder: SentenceEncoder) -> np.ndarray:
    """Text to calibrate and tune on ``int32[windows, CONTEXT]``, each in a sentence's marks."""
    begin, end = encoder.tokenizer.encode("")
    articles = read_articles(fetch.fetch("wikipedia"))
    ids = [encoder.tokenizer.encode(article.text)[1:-1] for article in articles]
    text = list(itertools.chain.from_iterable(ids))
    chosen = choose_windows(text, 2 * TOKENS * (CONTEXT - 2) // CONTEXT, CONTEXT - 2)
    return np.pad(chosen, ((0, 0), (1, 1)), constant_values=((0, 0), (begin, end)))


# --- measures ---


@dataclasses.dataclass(frozen=True)
class Task:
    """Texts to embed, and what people say of them.

    Args:
      documents: of resource "lee".
      judged: how similar people find each two, 0 to 1: ``float64[50, 50]``, see `pairs`.
      probes: labelled sets by name.
    """

    documents: list[str]
    judged: np.ndarray
    probes: dict[str, Probe]

    def run(self, encoder: SentenceEncoder, bits: float | None = None) -> Result:
        """What `encoder` gives; `bits` of a weight, if it has no packed layers that say so."""
        return Result(
            self.judged,
            encoder.encode(self.documents),
            accuracies(self.probes, encoder.encode),
            weight_bytes(encoder.model).bits_per_linear_weight if bits is None else bits,
        )


@dataclasses.dataclass(frozen=True)
class Result:
    """What an encoder makes of a `Task`.

    Args:
      judged: of the task.
      embeddings: of the documents, ``float32[50, width]``.
      correct: of each probe, which test sentences it tells right.
      bits: of a weight of linear layers.
    """

    judged: np.ndarray
    embeddings: np.ndarray
    correct: dict[str, np.ndarray]
    bits: float

    @property
    def similar(self) -> np.ndarray:
        return self.embeddings @ self.embeddings.T

    def row(self) -> Row:
        return {
            "bits_per_weight": self.bits,
            "pearson": pearson(self.similar, self.judged),
            "spearman": float(stats.spearmanr(pairs(self.similar), pairs(self.judged)).statistic),
            "probes": {name: float(right.mean()) for name, right in self.correct.items()},
        }

    def differences(self, exact: Result) -> Row:
        """How far embeddings, all of length 1, are from those of the float model."""
        cosines = (self.embeddings * exact.embeddings).sum(axis=-1)
        change = pearson(self.similar, self.judged) - pearson(exact.similar, self.judged)
        probes = {
            name: accuracy_change(right, exact.correct[name])
            for name, right in self.correct.items()
        }
        return {
            "mean_cosine": float(cosines.mean()),
            "least_cosine": float(cosines.min()),
            "pearson_with_float": pearson(self.similar, exact.similar),
            "pearson_change": change,
            "pearson_change_error": change_error(self.similar, exact.similar, self.judged),
            "probe_changes": {name: each for name, (each, _) in probes.items()},
            "probe_change_errors": {name: error for name, (_, error) in probes.items()},
        }


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
        shown += [f"{row['pearson']:.3f}", change, f"{row['spearman']:.3f}"]
        return [*shown, *(_probe(row, name) for name in probes)]

    probes = rows[0]["probes"]
    header = ["setting", "bits a weight", *COMPARED.values(), "Pearson", "change", "Spearman"]
    return table([*header, *probes], map(line, rows))


def _probe(row: Row, name: str) -> str:
    """The accuracy of a probe in percent, and how many points it is from the float model's."""
    shown = f"{100 * row['probes'][name]:.1f}"
    if "probe_changes" not in row:
        return shown
    change, error = (100 * row[key][name] for key in ("probe_changes", "probe_change_errors"))
    return f"{shown} ({change:+.1f} ± {error:.1f})"


if __name__ == "__main__":
    main()
