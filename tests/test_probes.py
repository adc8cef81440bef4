"""Benchmarks of accuracy: labelled sets are read and told, rows of earlier runs are kept."""

import io
import json
import tarfile

import numpy as np
import pytest

from benchmarks import probes, report


@pytest.fixture
def distribution(tmp_path):
    """A file made as vaderSentiment's is, with sentences that name their rating."""
    rng = np.random.default_rng(0)
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as archive:
        for name in probes.NAMES.values():
            ratings = rng.normal(size=probes.TRAIN + probes.TEST + 7)
            lines = [
                f"{i}\t{rating!r}\tof {rating}" for i, rating in enumerate(map(float, ratings))
            ]
            add(archive, f"hutto_ICWSM_2014/{name}_GroundTruth.txt", "\n".join(lines).encode())
    path = tmp_path / "vader.tar.gz"
    with tarfile.open(path, "w:gz") as outer:
        add(outer, probes.INNER, inner.getvalue())
    return path


def add(archive, name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


def test_sets_are_told_by_what_embeddings_know(distribution):
    sets = probes.read_probes(distribution)
    assert list(sets) == list(probes.NAMES)

    def knowing(sentences):
        rating = np.array([float(each.removeprefix("of ")) for each in sentences])
        return np.stack([rating, np.ones(len(rating))], axis=1).astype(np.float32)

    def ignorant(sentences):
        return np.random.default_rng(1).normal(size=(len(sentences), 4)).astype(np.float32)

    for right in probes.accuracies(sets, knowing).values():
        assert right.shape == (probes.TEST,)
        assert right.mean() > 0.99
    for right in probes.accuracies(sets, ignorant).values():
        assert 0.35 < right.mean() < 0.65


def test_changes_have_the_error_of_sentences_that_are_told_otherwise():
    expected = np.arange(100) < 80
    correct = expected.copy()
    assert probes.accuracy_change(correct, expected) == (0, 0)
    correct[:3] = False  # three are lost and one is won
    correct[-1] = True
    change, error = probes.accuracy_change(correct, expected)
    assert change == pytest.approx(-0.02)
    assert error == pytest.approx(np.sqrt((4 / 100 - 0.02**2) / 100))


def test_rows_of_the_same_facts_are_kept(tmp_path):
    rows = [
        {"part": "budgets", "setting": "at most 4.5 bits", "bits": 4.49, "kl": 0.07},
        {"part": "peers", "setting": "ggml Q4_0", "bits": 4.5, "kl": 0.2},
    ]
    path = tmp_path / "accuracy.json"
    path.write_text(json.dumps({"held_out": 8192, "rows": rows}))
    assert report.rows_of(path, {"held_out": 8192}) == rows
    assert report.rows_of(path, {"held_out": 4096}) == []
    assert report.rows_of(tmp_path / "none.json", {}) == []
    assert report.rows_of(None, {}) == []
