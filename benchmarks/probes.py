"""How well sentence embeddings tell the sentiment of a sentence: ridge regression on labelled sets.

The sets are those of Hutto and Gilbert (ICWSM 2014), four kinds of sentences that people rated from
-4 to 4, which are in the source distribution of vaderSentiment:

    pip download --no-deps --no-binary :all: vaderSentiment==3.3.2
"""

from __future__ import annotations

import dataclasses
import io
import pathlib
import tarfile
from collections.abc import Callable, Sequence

import numpy as np

INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
NAMES = {
    "movies": "movieReviewSnippets",
    "products": "amazonReviewSnippets",
    "editorials": "nytEditorialSnippets",
    "tweets": "tweets",
}
TRAIN, TEST = 1500, 2000
RIDGE = 1.0
"""Added to the diagonal; embeddings have length 1, so that of 1,500 of them is about 4."""


@dataclasses.dataclass(frozen=True)
class Probe:
    """A labelled set: `TRAIN` sentences to fit and `TEST` to measure on.

    Args:
      sentences: those to fit first.
      ratings: ``float64[TRAIN + TEST]``, of which the sign is to be told.
    """

    sentences: tuple[str, ...]
    ratings: np.ndarray

    def correct(self, embeddings: np.ndarray) -> np.ndarray:
        """Of which test sentences the sign is told right: ``bool[TEST]``.

        Args:
          embeddings: ``float32[TRAIN + TEST, width]``.
        """
        x = np.concatenate([embeddings, np.ones((len(embeddings), 1))], axis=1, dtype=np.float64)
        fit, y = x[:TRAIN], self.ratings[:TRAIN]
        coefficients = np.linalg.solve(fit.T @ fit + RIDGE * np.eye(x.shape[1]), fit.T @ y)
        return (x[TRAIN:] @ coefficients > 0) == (self.ratings[TRAIN:] > 0)


def read_probes(path: pathlib.Path, seed: int = 0) -> dict[str, Probe]:
    """The four sets of the source distribution at `path`, sentences chosen by `seed`."""
    with tarfile.open(path) as outer:
        inner = outer.extractfile(INNER)
        assert inner is not None
        with tarfile.open(fileobj=io.BytesIO(inner.read())) as archive:
            return {name: _probe(archive, file, seed) for name, file in NAMES.items()}


def _probe(archive: tarfile.TarFile, name: str, seed: int) -> Probe:
    member = archive.extractfile(f"hutto_ICWSM_2014/{name}_GroundTruth.txt")
    assert member is not None
    lines = member.read().decode("latin1").splitlines()
    rows = [line.split("\t", 2) for line in lines if line.count("\t") >= 2]
    chosen = np.random.default_rng(seed).permutation(len(rows))[: TRAIN + TEST]
    return Probe(tuple(rows[i][2] for i in chosen), np.array([float(rows[i][1]) for i in chosen]))


def accuracy_change(correct: np.ndarray, expected: np.ndarray) -> tuple[float, float]:
    """Of two models' `Probe.correct` the difference in accuracy, and its standard error.

    The error is that of other test sentences for both, of which most are told alike.
    """
    each = correct.astype(float) - expected
    return float(each.mean()), float(each.std() / len(each) ** 0.5)


def accuracies(
    probes: dict[str, Probe], encode: Callable[[Sequence[str]], np.ndarray]
) -> dict[str, np.ndarray]:
    """`Probe.correct` of each set."""
    return {name: probe.correct(encode(probe.sentences)) for name, probe in probes.items()}
