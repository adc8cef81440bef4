"""Wikipedia dumps to plain text: markup by example, and what is left out."""

from __future__ import annotations

import bz2
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_anyprec.models import wikipedia
from jax_anyprec.models.wikipedia import MIN_CHARACTERS, plain_text, read_articles

LONG = "word " * (MIN_CHARACTERS // 4)


def write_dump(path: Path, pages: list[tuple[str, int, str]], namespace: str = "") -> Path:
    """A dump of (title, namespace number, markup)."""
    body = "".join(
        f"<page><title>{title}</title><ns>{kind}</ns>"
        f"<revision><text>{markup}</text></revision></page>"
        for title, kind, markup in pages
    )
    path.write_bytes(bz2.compress(f"<mediawiki{namespace}>{body}</mediawiki>".encode()))
    return path


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        ("plain  text", "plain text"),
        ("'''bold''' and ''italic'', John's", "bold and italic, John's"),
        ("[[Cat]]s like [[Fish (animal)|fish]].", "Cats like fish."),
        ("a [[File:x.png|thumb|see [[Cat|cats]] [1] here]] b", "a b"),
        ("[[Category:Cats]]x[[de:Katze]]", "x"),
        ("see [https://example.org/a?b=c the page], [http://example.org]", "see the page,"),
        ("a<ref>no</ref> b<ref name=x /> c<ref name=y>{{cite}}</ref>", "a b c"),
        ("1<!-- [[hidden -->2", "12"),
        ("{{Infobox|a={{b|{{c}}}}|d=}}text {{x}}here", "text here"),
        ("{|\n! a\n| b\n{|\n| c\n|}\n|}\nafter", "after"),
        ("{{x|}}kept", "kept"),
        ("== History ==\nOnce.", "History\n\nOnce."),
        ("* one\n** two\n# three\n:four", "one\ntwo\nthree\nfour"),
        ("a&nbsp;b &amp;lt; &ndash; c", "a b &lt; – c"),
        ("x<br/>y <small>z</small> 1 < 2 and 3 > 2", "xy z 1 < 2 and 3 > 2"),
        ("Greek ({{lang|el|x}}, ) word", "Greek word"),
        ("<math>\\frac{a}{b}</math>x<gallery>\nA.jpg\n</gallery>", "x"),
        ("a\n\n\n\n\nb", "a\n\nb"),
        ("body\n== See also ==\n* [[Dog]]", "body"),
        ("unclosed {{template and the rest", "unclosed"),
        ("stray }} and |} and ]] end", "stray and |} and ]] end"),
    ],
)
def test_markup(markup, text):
    assert plain_text(markup) == text


@given(st.text(alphabet="[]{}|<>!-/='* \nab", max_size=200))
def test_any_markup_ends_and_leaves_no_pairs(markup):
    text = plain_text(markup)
    assert not re.search(r"\[\[[^\[\]]*\]\]", text)
    assert plain_text(markup) == text


@pytest.mark.parametrize("namespace", ["", ' xmlns="http://www.mediawiki.org/xml/export-0.10/"'])
def test_articles_in_order_without_redirects_stubs_and_other_pages(tmp_path, namespace):
    pages = [
        ("First", 0, LONG),
        ("Moved", 0, "#REDIRECT [[First]] " + LONG),
        ("Short", 0, "a stub"),
        ("Talk:First", 1, LONG),
        ("Last", 0, LONG),
    ]
    articles = list(read_articles(write_dump(tmp_path / "dump.bz2", pages, namespace)))
    assert [article.title for article in articles] == ["First", "Last"]
    assert articles[0].text == LONG.strip()


def test_cut_off_dump(tmp_path):
    path = write_dump(tmp_path / "dump.bz2", [("First", 0, LONG)])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="not a complete Wikipedia dump"):
        list(read_articles(path))


def test_foreign_files(tmp_path):
    path = tmp_path / "dump.bz2"
    path.write_bytes(bz2.compress(b"no xml at all"))
    with pytest.raises(ValueError, match="not a complete Wikipedia dump"):
        list(read_articles(path))
    path.write_bytes(b"no bzip2 either")
    with pytest.raises(ValueError, match="not a complete Wikipedia dump"):
        list(read_articles(path))


def test_dump_that_unpacks_to_too_much(tmp_path, monkeypatch):
    path = write_dump(tmp_path / "dump.bz2", [("First", 0, LONG * 100)])
    monkeypatch.setattr(wikipedia, "MAX_XML_BYTES", 10_000)
    with pytest.raises(ValueError, match="unpacks to over 10000 bytes"):
        list(read_articles(path))


def test_the_real_dump(wikipedia_path):
    articles = list(read_articles(wikipedia_path))
    assert [a.title for a in articles[:3]] == ["Anarchism", "Autism", "Albedo"]
    assert len(articles) == 96
    text = "\n".join(article.text for article in articles)
    assert not re.findall(r"\[\[|\]\]|\{\{|\}\}|''|</?[a-z]+>|https?://|^==|^[*#|]", text, re.M)
