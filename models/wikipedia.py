"""Articles of a compressed Wikipedia dump as plain text, by fixed rules and thus always the same.

The rules are few and lose a little text rather than let markup through:

- redirects and pages outside of the article namespace are left out;
- an article ends before its first section of references or links;
- comments, references, formulas, galleries, templates, tables, files and categories are dropped;
- links become their text, headings and list items plain lines;
- an article with less than `MIN_CHARACTERS` of text is left out.
"""

from __future__ import annotations

import bz2
import html
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, cast
from xml.etree import ElementTree

MIN_CHARACTERS = 2000
"""The shortest article that is of use: about half of an evaluation window."""

MAX_XML_BYTES = 256 << 20
"""The most that a dump may unpack to."""


@dataclass(frozen=True)
class Article:
    """A title and its text, paragraphs separated by empty lines."""

    title: str
    text: str


def read_articles(path: str | os.PathLike[str]) -> Iterator[Article]:
    """The usable articles of a ``.xml.bz2`` dump, in its order.

    Raises:
      ValueError: the file is not such a dump, is cut off, or unpacks to over `MAX_XML_BYTES`.
    """
    with bz2.open(path) as file:
        try:
            for title, markup in _pages(_Bounded(cast(BinaryIO, file))):
                text = plain_text(markup)
                if len(text) >= MIN_CHARACTERS:
                    yield Article(title, text)
        except (EOFError, OSError, ElementTree.ParseError) as error:
            raise ValueError(
                f"{os.fspath(path)!r} is not a complete Wikipedia dump: {error}"
            ) from None


def plain_text(markup: str) -> str:
    """The readable text of an article in MediaWiki markup."""
    text = _COMMENT.sub("", markup)
    text = _UNREADABLE.sub("", text)
    text = _drop_nested(text, _TEMPLATE)
    text = _drop_nested(text, _TABLE)
    text = _BACK_MATTER.split(text, maxsplit=1)[0]
    text = _resolve_links(text)
    text = _EXTERNAL_LINK.sub(r"\1", text)
    text = _TAG.sub("", text)
    text = html.unescape(text).replace("\xa0", " ")
    text = _EMPHASIS.sub("", text)
    text = _HEADING.sub(r"\n\1\n", text)
    text = _LIST_MARK.sub("", text)
    text = _EMPTY_BRACKETS.sub("", text)
    text = _SPACES.sub(" ", text)
    lines = [line.strip() for line in text.split("\n")]
    return _EMPTY_LINES.sub("\n\n", "\n".join(lines)).strip()


_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_UNREADABLE = re.compile(
    r"<(ref|math|gallery|timeline|source|syntaxhighlight|imagemap|score)\b"
    r"(?:[^<>]*/>|[^<>]*>.*?</\1\s*>)",
    re.DOTALL | re.IGNORECASE,
)
_TEMPLATE = re.compile(r"(\{\{)|\}\}")
_TABLE = re.compile(r"^[ :]*(\{\|)|^[ :]*\|\}", re.MULTILINE)
_BACK_MATTER = re.compile(
    r"^==\s*(?:See also|References|Notes|Footnotes|Citations|Bibliography|Sources|"
    r"Further reading|External links|Notes and references|Works cited)\s*==",
    re.MULTILINE | re.IGNORECASE,
)
_INNERMOST_LINK = re.compile(r"\[\[((?:[^\[\]]|\[(?!\[)|\](?!\]))*)\]\]")
_NO_TEXT = re.compile(r"\s*(?:file|image|category|media|[a-z]{2,3})\s*:", re.IGNORECASE)
_EXTERNAL_LINK = re.compile(r"\[(?:https?:)?//[^\s\[\]]+\s*([^\[\]]*)\]")
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
_EMPHASIS = re.compile(r"'{2,}")
_HEADING = re.compile(r"^=+[ \t]*([^=\n][^\n]*?)[ \t]*=+[ \t]*$", re.MULTILINE)
_LIST_MARK = re.compile(r"^[*#:;]+[ \t]*", re.MULTILINE)
_EMPTY_BRACKETS = re.compile(r"[ \t]*\([\s,;]*\)")
_SPACES = re.compile(r"[ \t]+")
_EMPTY_LINES = re.compile(r"\n{3,}")


def _drop_nested(text: str, mark: re.Pattern[str]) -> str:
    """`text` without what stands between an opening `mark` (its group 1) and its closing one.

    A closing mark without an opening one goes; an opening one that is never closed drops the rest.
    """
    kept, depth, start = [], 0, 0
    for match in mark.finditer(text):
        if depth == 0:
            kept.append(text[start : match.start()])
        depth = depth + 1 if match[1] else max(depth - 1, 0)
        start = match.end()
    if depth == 0:
        kept.append(text[start:])
    return "".join(kept)


def _resolve_links(text: str) -> str:
    """Internal links to their text, from the innermost out, and none for files and categories."""

    def readable(match: re.Match[str]) -> str:
        target, _, label = match[1].partition("|")
        return "" if _NO_TEXT.match(target) else label or target

    while True:
        text, count = _INNERMOST_LINK.subn(readable, text)
        if not count:
            return text


def _pages(file: _Bounded) -> Iterator[tuple[str, str]]:
    """Titles and markup of all articles that are no redirects."""
    for _, element in ElementTree.iterparse(file):
        namespace, _, tag = element.tag.rpartition("}")
        if tag != "page":
            continue
        prefix = f"{namespace}}}" if namespace else ""
        title, kind, markup = (
            element.findtext(path) or ""
            for path in (f"{prefix}title", f"{prefix}ns", f"{prefix}revision/{prefix}text")
        )
        element.clear()
        if kind == "0" and not markup.lstrip().lower().startswith("#redirect"):
            yield title, markup


class _Bounded:
    """A binary file that refuses to give more than `MAX_XML_BYTES`."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._left = MAX_XML_BYTES

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(min(size, self._left + 1) if size >= 0 else self._left + 1)
        self._left -= len(data)
        if self._left < 0:
            raise ValueError(f"the dump unpacks to over {MAX_XML_BYTES} bytes")
        return data
