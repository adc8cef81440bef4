"""Rules by path: which layers of a model are quantized, how, and why."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from .quantization import Quantization

Rules: TypeAlias = (
    Quantization | Mapping[str, Quantization | None] | Sequence[tuple[str, Quantization | None]]
)
"""One `Quantization` for everything that is quantized by default, or patterns with what they get.

A path is the names on the way to a layer, joined with "/": "layers/0/attention/query". In a pattern
"*" stands for any characters within a name, and "**", alone between slashes, for any number of
names. The first rule that matches a layer decides: a `Quantization`, or None for float. A layer
that no rule matches stays in float.

Embeddings, output heads and the routers of experts, known by their class, their name or that of the
module around them, stay in float unless a rule names them. A pattern names what it matches if its
last name is more than wildcards: "**/lm_head" and "*head" name a head; "**" and "decoder/*" do not,
and are passed over for such layers.
"""

EVERYTHING = "**"
HEAD = re.compile(r"(.*_)?(lm_?head|head|logits?|logit_?dense|unembed(ding)?|classifier)")
TOP_LEVEL_HEAD = re.compile(r"output|readout")
ROUTER = re.compile(r"router|.*_router|router_.*")


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A layer, as rules see it.

    Args:
      path: its names joined with "/"; "" for the model itself.
      kind: the name of its class.
      matrix: ``(..., K, N)``, the shape in which its weight would be packed; None if it has none.
      obstacle: why it can't be quantized whatever rules say, or None.
      aliases: its other paths, if the model shares it.
    """

    path: str
    kind: str
    matrix: tuple[int, ...] | None = None
    obstacle: str | None = None
    aliases: tuple[str, ...] = ()

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.path, *self.aliases)

    @property
    def reserved(self) -> str | None:
        """What this is, if it stays in float unless it is named."""
        if "Embed" in self.kind:
            return "embedding"
        return next(filter(None, map(self._role, self.paths)), None)

    def _role(self, path: str) -> str | None:
        """What a layer at this path is, going by its name and that of the module around it."""
        *around, last = path.split("/")
        names = (*around[-1:], last)
        k, n = (0, 0) if self.matrix is None else self.matrix[-2:]
        # Attention modules have an "out" too, and it does not widen.
        top_level = TOP_LEVEL_HEAD.fullmatch(last) or (last == "out" and n > k)
        if any(map(HEAD.fullmatch, names)) or (not around and top_level):
            return "output head"
        # "gate" is a router only where it narrows: a gated feed-forward layer widens.
        if any(map(ROUTER.fullmatch, names)) or (last == "gate" and n < k):
            return "router of experts"
        return None


class Decision(NamedTuple):
    """What a layer becomes (None: it stays in float), and why."""

    quantization: Quantization | None
    reason: str


class _Rule(NamedTuple):
    pattern: str
    quantization: Quantization | None
    expression: re.Pattern[str]

    def matches(self, candidate: Candidate) -> bool:
        return any(self.expression.fullmatch(path) for path in candidate.paths)

    @property
    def names(self) -> bool:
        """Whether this names what it matches."""
        return self.pattern.split("/")[-1].strip("*") != ""

    def decides(self, candidate: Candidate) -> bool:
        """Whether this matches, and names the candidate if it must."""
        return self.matches(candidate) and (self.names or candidate.reserved is None)


def decide(rules: Rules, candidates: Sequence[Candidate]) -> list[Decision]:
    """One decision for each candidate.

    Raises:
      TypeError: rules are none.
      ValueError: a pattern is malformed or occurs twice, matches nothing, or decides nothing
        (earlier rules match the same, or it would have to name what it matches); or one without
        wildcards quantizes what has an obstacle.
    """
    compiled = _compile(rules)
    deciding = [next((r for r in compiled if r.decides(c)), None) for c in candidates]
    for rule in compiled:
        if rule not in deciding:
            _refuse_unused(rule, candidates)
    return [_decision(rule, c) for rule, c in zip(deciding, candidates, strict=True)]


def _decision(rule: _Rule | None, candidate: Candidate) -> Decision:
    if candidate.obstacle is not None:
        if rule is not None and rule.quantization is not None and "*" not in rule.pattern:
            raise ValueError(
                f"rule {rule.pattern!r} can't quantize {candidate.path!r}: {candidate.obstacle}"
            )
        return Decision(None, candidate.obstacle)
    if rule is not None:
        return Decision(rule.quantization, f'rule "{rule.pattern}"')
    if candidate.reserved is not None:
        return Decision(None, f"{candidate.reserved}: float unless a rule names it")
    return Decision(None, "no rule matches")


def _refuse_unused(rule: _Rule, candidates: Sequence[Candidate]) -> None:
    """ValueError unless a rule that decides nothing is one that is meant for whatever is left."""
    if not any(rule.matches(c) for c in candidates):
        paths = [path for c in candidates for path in c.paths]
        near = difflib.get_close_matches(rule.pattern, paths, n=3, cutoff=0) or ["none"]
        raise ValueError(
            f"rule {rule.pattern!r} matches no layer; these come near: {', '.join(near)}"
        )
    if rule.pattern.strip("*/"):
        if any(rule.decides(c) for c in candidates):
            raise ValueError(f"rule {rule.pattern!r} decides nothing: earlier rules match the same")
        reserved = [f"{c.path} ({c.reserved})" for c in candidates if rule.matches(c)]
        raise ValueError(
            f"rule {rule.pattern!r} decides nothing: it matches only layers that stay in float "
            f"unless the last name of a pattern names them: {', '.join(reserved)}"
        )


def _compile(rules: Any) -> list[_Rule]:
    """Rules with their patterns as expressions, all checked."""
    if isinstance(rules, Quantization):
        rules = {EVERYTHING: rules}
    pairs = list(rules.items()) if isinstance(rules, Mapping) else rules
    if isinstance(pairs, str) or not isinstance(pairs, Sequence):
        raise TypeError(
            "rules must be a Quantization, a mapping or a sequence of (pattern, Quantization or "
            f"None), got {type(rules).__name__}"
        )
    compiled: list[_Rule] = []
    for pair in pairs:
        if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
            raise TypeError(f"a rule must be (pattern, Quantization or None), got {pair!r}")
        pattern, quantization = pair
        if quantization is not None and not isinstance(quantization, Quantization):
            raise TypeError(
                f"rule {pattern!r} must give a Quantization or None, got {quantization!r}"
            )
        if quantization is not None and quantization.weights is None:
            raise ValueError(f"rule {pattern!r} must say how many bits: weights is None")
        if any(pattern == rule.pattern for rule in compiled):
            raise ValueError(f"rule {pattern!r} occurs twice")
        compiled.append(_Rule(pattern, quantization, pattern_expression(pattern)))
    return compiled


def pattern_expression(pattern: Any) -> re.Pattern[str]:
    """What matches the paths of a pattern."""
    if not isinstance(pattern, str):
        raise TypeError(f"a pattern must be a string, got {pattern!r}")
    names = pattern.split("/")
    fault = None
    if "" in names:
        fault = 'has an empty name between "/"'
    elif any("**" in name and name != "**" for name in names):
        fault = 'has "**" within a name; it must stand alone between "/"'
    elif re.search(r"[][?{}]", pattern):
        fault = 'has wildcards other than "*" and "**"'
    if fault:
        raise ValueError(f"pattern {pattern!r} {fault}")
    # Each name takes the "/" before it, and the first one the start, so that "**" can be empty.
    start = "(?:^|/)(?=[^/])"
    parts = [
        f"(?:{start}[^/]+)*" if name == "**" else start + re.escape(name).replace(r"\*", "[^/]*")
        for name in names
    ]
    return re.compile("".join(parts))
