"""Rules by path: which rule decides what, and which rules are refused."""

from __future__ import annotations

import fnmatch
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jax_anyprec as ap
from jax_anyprec.rules import Candidate, decide

W4 = ap.Quantization(weights=4)
W8 = ap.Quantization(weights=8)


def layer(path: str, kind: str = "Linear", **fields: Any) -> Candidate:
    return Candidate(path, kind, **{"matrix": (64, 64), **fields})


MODEL = [
    layer("embed", "Embed"),
    layer("layers/0/attention/query"),
    layer("layers/0/mlp/up"),
    layer("layers/0/mlp/gate", matrix=(64, 256)),
    layer("layers/0/norm", "RMSNorm", matrix=None, obstacle="no dense layer"),
    layer("layers/1/attention/query"),
    layer("layers/1/moe/router", matrix=(64, 4)),
    layer("layers/1/moe/gate", matrix=(64, 4)),
    layer("stem", "Conv", matrix=None, obstacle="convolution"),
    layer("lm_head"),
]


def decided(rules: Any) -> dict[str, ap.Quantization]:
    """What is quantized, by path."""
    decisions = decide(rules, MODEL)
    return {
        c.path: d.quantization
        for c, d in zip(MODEL, decisions, strict=True)
        if d.quantization is not None
    }


def test_a_bare_quantization_is_for_what_is_quantized_by_default() -> None:
    dense = [
        "layers/0/attention/query", "layers/0/mlp/up", "layers/0/mlp/gate",
        "layers/1/attention/query",
    ]  # fmt: skip
    assert decided(W4) == decided({"**": W4}) == decided([("**", W4)]) == dict.fromkeys(dense, W4)
    reasons = {
        c.path: d.reason
        for c, d in zip(MODEL, decide(W4, MODEL), strict=True)
        if not d.quantization
    }
    assert reasons == {
        "embed": "embedding: float unless a rule names it",
        "layers/0/norm": "no dense layer",
        "layers/1/moe/router": "router of experts: float unless a rule names it",
        "layers/1/moe/gate": "router of experts: float unless a rule names it",
        "stem": "convolution",
        "lm_head": "output head: float unless a rule names it",
    }


@pytest.mark.parametrize(
    ("path", "kind", "matrix", "reserved"),
    [
        ("output", "Linear", (64, 64), True),
        ("attention/output", "Linear", (64, 64), False),
        ("out", "LinearGeneral", (64, 64), False),  # of a model that is one attention layer
        ("out", "Linear", (64, 256), True),
        ("lm_head/dense", "Dense", (64, 64), True),
        ("moe/router/linear", "Linear", (64, 4), True),
        ("head/mlp/up", "Linear", (64, 64), False),
        ("decoder/logits", "Dense", (64, 64), True),
        ("decoder/logitdense", "Dense", (64, 64), True),
        ("value_head", "Dense", (64, 64), True),
        ("multihead", "Dense", (64, 64), False),
        ("head_norm_proj", "Dense", (64, 64), False),
        ("mlp/gate", "Dense", (64, 64), False),
        ("mlp/gate_proj", "Dense", (64, 4), False),
        ("moe/expert_router", "Dense", (64, 4), True),
        ("positions", "Embed", (64, 64), True),
        ("wte", "VocabEmbedding", (64, 64), True),
    ],
)
def test_what_stays_in_float_unless_named(
    path: str, kind: str, matrix: tuple[int, int], reserved: bool
) -> None:
    candidate = Candidate(path, kind, matrix)
    assert (decide(W4, [candidate])[0].quantization is None) == reserved
    last = path.split("/")[-1]
    assert decide({f"**/{last[:-1]}*": W4}, [candidate])[0].quantization == W4


def test_the_first_rule_that_matches_decides() -> None:
    found = decided([("layers/0/**", None), ("**/query", W8), ("**", W4)])
    assert found == {"layers/1/attention/query": W8}
    reasons = [d.reason for d in decide([("layers/0/**", None), ("**", W4)], MODEL)]
    assert reasons[1] == 'rule "layers/0/**"'
    assert reasons[5] == 'rule "**"'
    assert [d.reason for d in decide({"**/query": W4}, MODEL)][2] == "no rule matches"


def test_a_catch_all_is_passed_over_for_layers_that_must_be_named() -> None:
    found = decided([("**", W4), ("lm_head", W8), ("*bed", W8), ("**/router", W8)])
    assert found["lm_head"] == found["embed"] == found["layers/1/moe/router"] == W8
    assert "layers/1/moe/gate" not in decided({"layers/1/*/*": W4, "**": W4})


def test_obstacles_are_stronger_than_rules() -> None:
    assert decided({"ste*": W4, "layers/0/norm": None}) == {}
    assert decide({"**/stem": W4, "**/norm": None}, MODEL)[8].reason == "convolution"
    with pytest.raises(ValueError, match="rule 'stem' can't quantize 'stem': convolution"):
        decide({"stem": W4}, MODEL)


def test_a_shared_layer_answers_to_all_its_paths() -> None:
    tied = layer("embed", "Embed", aliases=("lm_head",))
    assert decide({"lm_head": W8}, [tied])[0].quantization == W8
    tied = layer("decoder/project", aliases=("lm_head",))
    assert decide(W8, [tied])[0].reason == "output head: float unless a rule names it"


@pytest.mark.parametrize(
    ("pattern", "paths", "others"),
    [
        ("**", ["", "a", "a/b"], []),
        ("*", ["a"], ["", "a/b"]),
        ("a/**", ["a", "a/b", "a/b/c"], ["ab", "b/a"]),
        ("**/q", ["q", "a/q", "a/b/q"], ["aq", "q/a"]),
        ("a/**/q", ["a/q", "a/b/c/q"], ["aq", "a/bq"]),
        ("a/*/q_*", ["a/0/q_proj", "a/0/q_"], ["a/q_proj", "a/0/1/q_proj"]),
        ("**/a/**", ["a", "x/a/y"], ["ab", "x/ab"]),
        ("a.b", ["a.b"], ["aXb"]),
    ],
)
def test_patterns(pattern: str, paths: list[str], others: list[str]) -> None:
    decisions = decide({pattern: W4}, [layer(path) for path in paths + others])
    assert [d.quantization for d in decisions] == [W4] * len(paths) + [None] * len(others)


@given(st.text("ab*", min_size=1, max_size=6), st.text("ab", min_size=1, max_size=6))
def test_stars_within_a_name_are_those_of_fnmatch(pattern: str, path: str) -> None:
    if "**" in pattern:
        return
    candidates = [layer(path), layer(pattern.replace("*", "a"))]  # the second always matches
    found = decide({pattern: W4}, candidates)[0].quantization
    assert (found is not None) == fnmatch.fnmatchcase(path, pattern)


@pytest.mark.parametrize(
    ("rules", "error", "message"),
    [
        ("**", TypeError, "rules must be a Quantization, a mapping or a sequence"),
        (4, TypeError, "got int"),
        (["**"], TypeError, r"a rule must be \(pattern, Quantization or None\), got '\*\*'"),
        ([("**", W4, 1)], TypeError, "a rule must be"),
        ({"**": 4}, TypeError, r"rule '\*\*' must give a Quantization or None, got 4"),
        ({3: W4}, TypeError, "a pattern must be a string, got 3"),
        (ap.Quantization(), ValueError, "must say how many bits"),
        ([("lm_head", W4), ("lm_head", W8)], ValueError, "rule 'lm_head' occurs twice"),
        ({"": W4}, ValueError, "empty name"),
        ({"a//b": W4}, ValueError, "empty name"),
        ({"/a": W4}, ValueError, "empty name"),
        ({"a**": W4}, ValueError, "must stand alone"),
        ({"layers/[0]": W4}, ValueError, "other than"),
        ({"layers/0/atention/query": W4}, ValueError, "come near: layers/0/attention/query"),
        ({"layers.0.mlp.up": W4}, ValueError, "matches no layer.*layers/0/mlp/up"),
        ({"**": W4, "layers/*": None}, ValueError, r"rule 'layers/\*' matches no layer"),
        ({"layers/**": W4, "**/query": W8}, ValueError, "query' decides nothing: earlier rules"),
        (
            {"layers/1/moe/*": W4},
            ValueError,
            r"matches only layers that stay in float .*: layers/1/moe/router \(router of experts\)",
        ),
    ],
)
def test_rules_that_are_refused(rules: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        decide(rules, MODEL)


def test_a_catch_all_may_be_left_with_nothing() -> None:
    assert decide([("**/up", W4), ("**", W8)], [layer("mlp/up")])[0].quantization == W4
    with pytest.raises(ValueError, match="matches no layer; these come near: none"):
        decide(W4, [])


# --- what rules give ---


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"weights": 9}, ValueError, "Quantization.weights must be from 1 to 8, got 9"),
        ({"weights": 2.0}, TypeError, "Quantization.weights must be an int from 1 to 8, got 2.0"),
        ({"activations": 0}, ValueError, "Quantization.activations must be from 1 to 8, got 0"),
        ({"act_scales": "tokn"}, ValueError, r"Quantization.act_scales must be .*, got 'tokn'"),
        ({"scales": "max"}, ValueError, r"Quantization.scales must be .*, got 'max'"),
        ({"group_size": 0}, ValueError, "Quantization.group_size must be a positive int .* got 0"),
        ({"group_size": True}, ValueError, "Quantization.group_size must be .* got True"),
        ({"group_size": 32.0}, ValueError, "Quantization.group_size must be .* got 32.0"),
    ],
)
def test_quantizations_that_are_refused(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ap.Quantization(**{"weights": 4, **options})


@pytest.mark.parametrize(
    ("options", "method"),
    [
        ({"weights": 4}, "absmax"),
        ({"weights": 3}, "mse"),
        ({"weights": 4, "group_size": 32}, "mse"),
        ({"weights": 8, "rotate": True}, "mse"),
        ({"weights": 2, "scales": "absmax"}, "absmax"),
        ({"weights": 8, "scales": "mse"}, "mse"),
    ],
)
def test_how_scales_are_chosen(options: dict[str, Any], method: Any) -> None:
    quantization = ap.Quantization(**options)
    assert quantization.scale_method == method
    kernel = np.random.default_rng(0).standard_normal((64, 3)).astype(np.float32)
    expected = ap.quantize(
        kernel, options["weights"], group_size=options.get("group_size"), scales=method,
        rotation=ap.Rotation.for_size(64) if quantization.rotate else None,
    )  # fmt: skip
    np.testing.assert_array_equal(quantization.pack(kernel).scales, expected.scales)
