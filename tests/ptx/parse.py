"""PTX text to entries, instructions and operands, with registers and symbols resolved."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .faults import Unsupported

COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)
ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*(?:\((.*?)\))?([^{;]*)\{", re.S)
FUNCTION = re.compile(r"\.func\b[^;{]*([;{])", re.S)
VARIABLE = re.compile(
    r"\.(shared|global|const|local|param)\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)"
    r"((?:\[\d*\])*)(?:\s*=\s*([^;]*))?$"
)
PART = re.compile(r"\s*(?:([{}])|([\w$]+)\s*:(?!:)|((?:[^;{}]++|\{[^{}]*\})+);|(;))")
LINE_DIRECTIVE = re.compile(r"^\s*\.(?:loc|file|section)\b[^\n]*$", re.M)
GUARDED = re.compile(r"(?:@\s*(!?)\s*([\w$%]+)\s+)?([\w.:]+)\s*(.*)", re.S)
OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*")
NUMBER = re.compile(r"-?(?:0[xX][0-9a-fA-F]+|0[fFdD][0-9a-fA-F]+|\d+)U?$")
DECIMAL = re.compile(r"-?\d+\.\d*$")
SPECIAL = re.compile(
    r"%(?:n?tid|n?ctaid|n?clusterid|cluster_n?ctaid)\.[xyz]$"
    r"|%laneid$|%warpid$|%lanemask_\w+$|%nwarpid$|%cluster_n?ctarank$"
)
CLUSTER = re.compile(r"\.reqnctapercluster\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?")

WIDTHS = {"8": 1, "16": 2, "32": 4, "64": 8, "16x2": 4}
RAW: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def width(type_name: str) -> int:
    """Bytes of a type such as ``u32`` or ``bf16x2``."""
    digits = type_name.lstrip("abcdefghijklmnopqrstuvwxyz")
    if digits not in WIDTHS:
        raise Unsupported(f"type .{type_name}")
    return WIDTHS[digits]


@dataclass(frozen=True, slots=True)
class Register:
    """A slot of the register file; `type` is ``pred``, ``b16``, ``b32``, ``b64``, ..."""

    slot: int
    type: str


@dataclass(frozen=True, slots=True)
class Number:
    """Bits of a literal; a negative one is still a Python integer below zero."""

    value: int


@dataclass(frozen=True, slots=True)
class Decimal:
    """A literal such as ``0.5``."""

    value: float


@dataclass(frozen=True, slots=True)
class Special:
    """A special register such as ``%tid.x``."""

    name: str


@dataclass(frozen=True, slots=True)
class Symbol:
    """A variable, parameter or label, and a distance from it."""

    name: str
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Address:
    """``[base + offset]``; the base is a register, a symbol or a number."""

    base: Register | Symbol | Number
    offset: int


@dataclass(frozen=True, slots=True)
class Vector:
    """``{a, b, ...}``"""

    items: tuple[Operand, ...]


@dataclass(frozen=True, slots=True)
class Pair:
    """``register|predicate``, the results of a shuffle or a comparison; None for ``_``."""

    first: Register | None
    second: Register | None


@dataclass(frozen=True, slots=True)
class Not:
    """``!predicate``"""

    register: Register


Operand = Not | Register | Number | Decimal | Special | Symbol | Address | Vector | Pair | None


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction. `guard` is (register, negated)."""

    op: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: tuple[Register, bool] | None
    text: str


@dataclass(frozen=True, slots=True, eq=False)
class Variable:
    """A declared variable: `size` in bytes, 0 for an array without bound; bytes or None."""

    name: str
    space: str
    align: int
    size: int
    value: bytes | None


@dataclass(slots=True)
class Body:
    """What an entry executes: instructions, where labels are, and its variables."""

    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    targets: dict[str, list[str]] = field(default_factory=dict)
    variables: list[Variable] = field(default_factory=list)
    registers: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Source:
    """An entry that has not been parsed: its parameters' declarations, where it starts, and the
    dimensions of the clusters that it must be launched with, if any."""

    name: str
    parameters: list[Variable]
    start: int
    cluster: tuple[int, int, int] | None


def variable(text: str) -> Variable:
    """A declaration without its semicolon, linkage in front removed or not."""
    found = VARIABLE.search(" ".join(text.split()))
    if not found:
        raise Unsupported(f"declaration: {text.strip()}")
    space, align, element, name, bounds, value = found.groups()
    size = width(element)
    for bound in re.findall(r"\[(\d*)\]", bounds):
        size *= int(bound or 0)
    return Variable(
        name, space, int(align or width(element)), size, _initial(value, width(element), size)
    )


def _initial(text: str | None, element: int, size: int) -> bytes | None:
    if text is None:
        return None
    numbers = [_number(item.strip()) for item in text.strip("{} ").split(",") if item.strip()]
    data = b"".join((n % (1 << (8 * element))).to_bytes(element, "little") for n in numbers)
    return data.ljust(size, b"\0")


def _number(text: str) -> int:
    if not NUMBER.match(text):
        raise Unsupported(f"literal {text}")
    text = text.rstrip("U")
    if text[:2].lower() in ("0f", "0d"):
        return int(text[2:], 16)
    return int(text, 0) if not text.lstrip("-").startswith("0") or "x" in text else int(text, 8)


def scan(text: str) -> tuple[str, dict[str, Source], list[Variable]]:
    """Text without comments, its entries, and the variables of the module."""
    text = LINE_DIRECTIVE.sub("", COMMENT.sub("", text))
    entries: dict[str, Source] = {}
    variables: list[Variable] = []
    position = 0
    for found in ENTRY.finditer(text):
        variables += _module_variables(text[position : found.start()])
        name, parameters, directives = found.groups()
        declared = [variable(p) for p in (parameters or "").split(",") if p.strip()]
        entries[name] = Source(name, declared, found.end(), _cluster(directives))
        position = _closing(text, found.end())
    variables += _module_variables(text[position:])
    return text, entries, variables


def _cluster(directives: str) -> tuple[int, int, int] | None:
    found = CLUSTER.search(directives)
    if not found:
        return None
    x, y, z = (int(size or 1) for size in found.groups())
    return x, y, z


def _closing(text: str, start: int) -> int:
    """The position after the brace that closes the one before `start`."""
    depth = 1
    for brace in re.compile(r"[{}]").finditer(text, start):
        depth += 1 if brace.group() == "{" else -1
        if depth == 0:
            return brace.end()
    raise Unsupported("unbalanced braces")


def _module_variables(text: str) -> Iterator[Variable]:
    for statement in text.split(";"):
        if re.search(r"\.(?:global|const|shared)\s", statement) and ".func" not in statement:
            yield variable(statement)


def parse(text: str, source: Source) -> Body:
    """The body of an entry."""
    return _Parser(text, source).parse()


class _Parser:
    """Names are resolved while reading, since an inner scope may hide those outside."""

    def __init__(self, text: str, source: Source) -> None:
        self.text, self.source, self.body = text, source, Body()
        self.scopes: list[dict[str, Register | tuple[int, str]]] = [{}]

    def parse(self) -> Body:
        position = self.source.start
        while self.scopes:
            part = PART.match(self.text, position)
            if not part:
                line = self.text[position : position + 80].strip()
                raise Unsupported(f"{self.source.name}: {line}")
            position = part.end()
            brace, label, statement, _ = part.groups()
            if brace == "{":
                self.scopes.append({})
            elif brace == "}":
                self.scopes.pop()
            elif label:
                self.body.labels[label] = len(self.body.instructions)
            elif statement:
                self._statement(statement.strip())
        return self.body

    def _statement(self, text: str) -> None:
        if not text.startswith("."):
            try:
                self.body.instructions.append(self._instruction(text))
            except Unsupported as error:
                line = " ".join(text.split())
                raise Unsupported(f"{self.source.name}: {line}: {error}") from error
        elif text.startswith(".reg"):
            self._registers(text)
        elif text.startswith((".shared", ".local", ".global", ".const")):
            self.body.variables.append(variable(text))
        elif text.startswith(".branchtargets"):
            self.body.targets[list(self.body.labels)[-1]] = re.findall(
                r"[\w$]+", text.removeprefix(".branchtargets")
            )
        elif not text.startswith((".pragma", ".param", ".maxntid", ".minnctapersm")):
            raise Unsupported(f"{self.source.name}: {text}")

    def _registers(self, text: str) -> None:
        _, kind, names = re.split(r"\s+", text, maxsplit=2)
        kind = kind.lstrip(".")
        for name in (n.strip() for n in names.split(",")):
            family = re.match(r"([\w$%]+)<(\d+)>$", name)
            count = int(family.group(2)) if family else 1
            first = len(self.body.registers)
            self.body.registers += [kind] * count
            if family:
                self.scopes[-1][family.group(1) + "<"] = (first, kind)
            else:
                self.scopes[-1][name] = Register(first, kind)

    def _register(self, name: str) -> Register | None:
        stem = name.rstrip("0123456789")
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]  # type: ignore[return-value]
            if stem + "<" in scope and stem != name:
                first, kind = scope[stem + "<"]  # type: ignore[misc]
                scope[name] = register = Register(first + int(name[len(stem) :]), kind)
                return register
        return None

    def _instruction(self, text: str) -> Instruction:
        found = GUARDED.match(text)
        if not found:
            raise Unsupported("no instruction")
        negated, guard, op, rest = found.groups()
        line = " ".join(text.split())
        names = tuple(op.replace("::", "__").split("."))
        if names[0] == "call" or (names[0] == "st" and names[1] == "param"):
            return Instruction(names, (), self._guard(guard, negated), line)
        operands = tuple(self._operand(o.strip()) for o in OPERAND.findall(rest))
        return Instruction(names, operands, self._guard(guard, negated), line)

    def _guard(self, name: str | None, negated: str | None) -> tuple[Register, bool] | None:
        if not name:
            return None
        register = self._register(name)
        if register is None:
            raise Unsupported(f"guard {name}")
        return register, bool(negated)

    def _operand(self, text: str) -> Operand:
        if text[0] == "{":
            return Vector(tuple(self._operand(t.strip()) for t in text[1:-1].split(",")))
        if text[0] == "[":
            return self._address(text[1:-1].strip())
        if text == "_":
            return None
        if "|" in text:
            first, second = (self._operand(t.strip()) for t in text.split("|"))
            return Pair(first, second)  # type: ignore[arg-type]
        if register := self._register(text):
            return register
        if NUMBER.match(text):
            return Number(_number(text))
        if DECIMAL.match(text):
            return Decimal(float(text))
        if SPECIAL.match(text):
            return Special(text)
        if text[0] == "!" and (register := self._register(text[1:].strip())):
            return Not(register)
        if text[0] == "%":
            raise Unsupported(f"register {text}")
        name, offset = _split_offset(text)
        return Symbol(name, offset)

    def _address(self, text: str) -> Address:
        name, offset = _split_offset(text)
        base = self._register(name)
        if base is not None:
            return Address(base, offset)
        if NUMBER.match(name):
            return Address(Number(_number(name)), offset)
        return Address(Symbol(name), offset)


def _split_offset(text: str) -> tuple[str, int]:
    found = re.match(r"([\w$%]+)\s*(?:([+-])\s*(-?\w+))?$", text)
    if not found:
        raise Unsupported(f"address {text}")
    name, sign, offset = found.groups()
    value = _number(offset) if offset else 0
    return name, -value if sign == "-" else value
