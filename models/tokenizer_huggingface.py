"""Tokenizers of Hugging Face's folders: tokenizer.json, chat template, and what ends an answer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from .huggingface import Folder, HuggingFaceError, Settings
from .tokenizer import END_OF_TURN, Tokenizer, missing_package

MAX_TOKENIZER_BYTES = 2**27
MAX_TEMPLATE_BYTES = 2**20


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer of any kind that tokenizer.json can describe.

    Args:
      core: a `tokenizers.Tokenizer`.
      bos, eos: text of the tokens that begin and end a text, or None.
      stop_tokens: ids that end an answer.
      chat_template: in Jinja, or None.
    """

    def __init__(
        self,
        core: Any,
        *,
        bos: str | None = None,
        eos: str | None = None,
        stop_tokens: Iterable[int] = (),
        chat_template: str | None = None,
    ):
        self._core = core
        self.vocab_size = core.get_vocab_size()
        self.bos_token = None if bos is None else core.token_to_id(bos)
        self.eos_token = None if eos is None else core.token_to_id(eos)
        self.chat_template = chat_template
        ends = (core.token_to_id(text) for text in END_OF_TURN)
        known = {*stop_tokens, self.eos_token, *ends} - {None}
        self.stop_tokens = frozenset(known)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, with those that the tokenizer adds to every text.

        Chat templates write the first of them themselves; a text that begins with it gets none.
        """
        bos = self._text(self.bos_token)
        add = not (bos and text.startswith(bos))
        return self._core.encode(text, add_special_tokens=add).ids

    def stream(self, tokens: Iterable[int]) -> Iterator[str]:
        """Pieces of text, each as soon as its characters are complete; none is empty."""
        # A token's text may depend on the one before, so the last piece's tokens are kept.
        before: list[int] = []
        new: list[int] = []
        for token in tokens:
            new.append(token)
            piece = self._piece(before, new)
            if piece and not piece.endswith("\N{REPLACEMENT CHARACTER}"):
                yield piece
                before, new = new, []
        if piece := self._piece(before, new):
            yield piece

    def _piece(self, before: list[int], new: list[int]) -> str:
        """What tokens `new` add to the text of those `before`."""
        return self._core.decode(before + new)[len(self._core.decode(before)) :]

    def _text(self, token: int | None) -> str:
        return "" if token is None else self._core.id_to_token(token)


def load_tokenizer(folder: Folder) -> HuggingFaceTokenizer | None:
    """The tokenizer of a folder; None if it has no tokenizer.json."""
    if not (folder.path / "tokenizer.json").exists():
        return None
    try:
        from tokenizers import Tokenizer as Core
    except ImportError:
        raise missing_package("tokenizing", "tokenizers") from None
    data = folder.read("tokenizer.json", MAX_TOKENIZER_BYTES)
    try:
        core = Core.from_buffer(data)
    except Exception as error:  # the library raises no narrower one
        raise HuggingFaceError(f"{folder.name} has a broken tokenizer.json: {error}") from None
    core.no_padding()
    core.no_truncation()
    settings = folder.optional("tokenizer_config.json")
    return HuggingFaceTokenizer(
        core,
        bos=_special(settings, "bos_token"),
        eos=_special(settings, "eos_token"),
        stop_tokens=_stop_tokens(folder.optional("generation_config.json"), folder.config),
        chat_template=_chat_template(folder, settings),
    )


def _special(settings: Settings, key: str) -> str | None:
    """The text of a special token, which may be an object with more about it."""
    value = settings.get(key, str | dict | None, None)
    if isinstance(value, dict):
        value = Settings(value, f"{settings.where}: {key!r}").get("content", str)
    return value


def _stop_tokens(*settings: Settings) -> list[int]:
    """Ids at "eos_token_id" of the first that has some."""
    for each in settings:
        ids = each.get("eos_token_id", int | list | None, None)
        if ids is not None:
            ids = ids if isinstance(ids, list) else [ids]
            if not all(type(i) is int for i in ids):
                raise HuggingFaceError(
                    f"{each.where}: 'eos_token_id' must be int or a list of them"
                )
            return ids
    return []


def _chat_template(folder: Folder, settings: Settings) -> str | None:
    """chat_template.jinja, or what tokenizer_config.json has, of several the default one."""
    if (folder.path / "chat_template.jinja").exists():
        data = folder.read("chat_template.jinja", MAX_TEMPLATE_BYTES)
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise HuggingFaceError(f"{folder.name}/chat_template.jinja: {error}") from None
    value = settings.get("chat_template", str | list | None, None)
    if not isinstance(value, list):
        return value
    where = f"{settings.where}: 'chat_template'"
    for each in value:
        entry = Settings(each if isinstance(each, dict) else {}, where)
        if entry.get("name", str) == "default":
            return entry.get("template", str)
    return None
