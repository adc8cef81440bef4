"""Text to tokens and back, and chat prompts; from the metadata of a GGUF file."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jax_anyprec.gguf import GGUFError, GGUFFile

# How text is cut before byte-pair encoding, by `tokenizer.ggml.pre`. Each is a list of patterns
# that isolate their matches; None is GPT-2's own pattern, which ByteLevel has built in.
_GPT2_PATTERN = None
_LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS: dict[str, tuple[str | None, ...]] = {
    "gpt-2": (_GPT2_PATTERN,),
    "smollm": (r"\p{N}", _GPT2_PATTERN),
    "llama-bpe": (_LLAMA3_PATTERN,),
}

# Values of `tokenizer.ggml.token_type`.
_CONTROL, _USER_DEFINED = 3, 4

END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|endoftext|>", "<|end_of_text|>", "<end_of_turn>")
"""Texts of control tokens that end an answer in one model or another."""


class Tokenizer:
    """A byte-level BPE tokenizer with its special tokens and chat template.

    Args:
      tokens: text of each token, in GPT-2's printable bytes.
      token_types: GGUF's type of each token (3: control, 4: user defined).
      merges: "left right" pairs, the most frequent first.
      pre: a name of `PRE_TOKENIZERS`.
      bos_token, eos_token: ids, or None.
      add_bos: whether `encode` starts with the first.
      chat_template: in Jinja, or None.

    Attributes:
      vocab_size: number of tokens.
      stop_tokens: ids that end an answer.
    """

    def __init__(
        self,
        tokens: Sequence[str],
        token_types: Sequence[int],
        merges: Sequence[str],
        *,
        pre: str,
        bos_token: int | None = None,
        eos_token: int | None = None,
        add_bos: bool = False,
        chat_template: str | None = None,
    ):
        self.vocab_size = len(tokens)
        self.bos_token = bos_token
        self.eos_token = eos_token
        self.chat_template = chat_template
        self._prefix = [bos_token] if add_bos and bos_token is not None else []
        for name, token in (("bos", bos_token), ("eos", eos_token)):
            if token is not None and not 0 <= token < len(tokens):
                raise ValueError(f"{name}_token must be in 0..{len(tokens) - 1}, got {token}")
        self._texts = list(tokens)
        self._bpe = _build(tokens, token_types, merges, pre)
        self._bytes = _token_bytes(tokens, token_types)
        ends = {i for i, t in enumerate(tokens) if t in END_OF_TURN and token_types[i] == _CONTROL}
        self.stop_tokens = frozenset(ends | ({eos_token} if eos_token is not None else set()))

    @classmethod
    def from_gguf(cls, file: GGUFFile) -> Tokenizer:
        """The tokenizer of a GGUF file, or GGUFError if it is of another kind or broken."""
        model = file.get("tokenizer.ggml.model", str)
        if model != "gpt2":
            raise GGUFError(
                f"{file.path.name} has a tokenizer of model {model!r}, only 'gpt2' "
                "(byte-level BPE) is supported"
            )
        tokens = _strings(file, "tokenizer.ggml.tokens")
        types = file.get("tokenizer.ggml.token_type", np.ndarray, np.ones(len(tokens), np.int32))
        if len(types) != len(tokens):
            raise GGUFError(
                f"{file.path.name} has {len(tokens)} tokens but {len(types)} token types"
            )
        try:
            return cls(
                tokens,
                types.tolist(),
                _strings(file, "tokenizer.ggml.merges"),
                pre=file.get("tokenizer.ggml.pre", str, "gpt-2"),
                bos_token=file.get("tokenizer.ggml.bos_token_id", int, None),
                eos_token=file.get("tokenizer.ggml.eos_token_id", int, None),
                add_bos=file.get("tokenizer.ggml.add_bos_token", bool, False),
                chat_template=file.get("tokenizer.chat_template", str, None),
            )
        except GGUFError:
            raise
        except ValueError as error:
            raise GGUFError(f"{file.path.name}: {error}") from None

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`. Names of control tokens in it become those tokens."""
        return self._prefix + self._bpe.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of `tokens`, control tokens left out; broken UTF-8 becomes U+FFFD."""
        return "".join(self.stream(tokens))

    def stream(self, tokens: Iterable[int]) -> Iterator[str]:
        """Pieces of text, each as soon as its characters are complete; none is empty."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for token in tokens:
            if piece := decoder.decode(self._bytes[token]):
                yield piece
        if rest := decoder.decode(b"", final=True):
            yield rest

    def chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt text of `messages`, each with "role" and "content", up to the answer.

        The template comes from the file and runs in Jinja's sandbox. `encode` turns names of
        control tokens in a message's content into those tokens, as everywhere in chat templates.
        """
        if self.chat_template is None:
            raise ValueError("this checkpoint has no chat template; give the prompt as plain text")
        try:
            from jinja2 import TemplateError
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError:
            raise missing_package("chat templates", "jinja2") from None

        def refuse(message: str) -> None:
            raise TemplateError(message)

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = refuse
        try:
            return environment.from_string(self.chat_template).render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=True,
                bos_token=self._text(self.bos_token),
                eos_token=self._text(self.eos_token),
            )
        except Exception as error:  # a template can fail in any way that an expression can
            raise ValueError(f"the checkpoint's chat template failed: {error}") from error

    def _text(self, token: int | None) -> str:
        return "" if token is None else self._texts[token]


def _build(
    tokens: Sequence[str], token_types: Sequence[int], merges: Sequence[str], pre: str
) -> Any:
    """The `tokenizers.Tokenizer` of a GGUF vocabulary."""
    try:
        from tokenizers import AddedToken, Regex, models, pre_tokenizers
        from tokenizers import Tokenizer as BPETokenizer
    except ImportError:
        raise missing_package("tokenizing", "tokenizers") from None
    if pre not in PRE_TOKENIZERS:
        raise ValueError(
            f"the pre-tokenizer {pre!r} is not supported, only {', '.join(PRE_TOKENIZERS)}"
        )
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise ValueError("the vocabulary has a token twice")
    pairs = []
    for merge in merges:
        left, _, right = merge.partition(" ")
        if not {left, right, left + right} <= vocabulary.keys():
            raise ValueError(f"the merge {merge!r} is not of two tokens to a third")
        pairs.append((left, right))
    # Llama 3 takes a word that is a token whole, whatever its merges.
    bpe = BPETokenizer(models.BPE(vocabulary, pairs, ignore_merges=pre == "llama-bpe"))
    patterns = PRE_TOKENIZERS[pre]
    splits = [pre_tokenizers.Split(Regex(p), "isolated") for p in patterns if p is not None]
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=_GPT2_PATTERN in patterns)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([*splits, bytes_])
    added = [
        AddedToken(token, special=kind == _CONTROL, normalized=False)
        for token, kind in zip(tokens, token_types, strict=True)
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    bpe.add_tokens(added)
    return bpe


def _token_bytes(tokens: Sequence[str], token_types: Sequence[int]) -> list[bytes]:
    """The bytes that each token stands for; none for control tokens."""
    byte_of = _byte_of_character()

    def convert(token: str, kind: int) -> bytes:
        if kind == _CONTROL:
            return b""
        if kind == _USER_DEFINED or not byte_of.keys() >= set(token):
            return token.encode()
        return bytes(byte_of[c] for c in token)

    return [convert(*pair) for pair in zip(tokens, token_types, strict=True)]


def _byte_of_character() -> dict[str, int]:
    """GPT-2's printable stand-ins: printable Latin-1 for itself, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


def _strings(file: GGUFFile, key: str) -> list[str]:
    value = file.get(key, list)
    if not value:
        raise GGUFError(f"{file.path.name}: metadata {key!r} is empty")
    return value


def missing_package(purpose: str, package: str) -> ImportError:
    """The error where an optional package is not installed."""
    return ImportError(f"{purpose} needs {package}: pip install 'jax-anyprec[demo]'")
