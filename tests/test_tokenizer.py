"""Tokenizing and chat prompts, on a vocabulary made for the tests and on a real one."""

from __future__ import annotations

import pytest
import synthetic_gguf as tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_anyprec.gguf import GGUFError, GGUFFile
from jax_anyprec.models import Tokenizer

TOKENS, TYPES, MERGES = tiny.vocabulary()
BOS, END = 1, 2


def make(**options) -> Tokenizer:
    options = {"pre": "smollm", "bos_token": BOS, "eos_token": END} | options
    return Tokenizer(TOKENS, TYPES, MERGES, **options)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return make(chat_template=tiny.CHAT_TEMPLATE)


def ids(*tokens: str) -> list[int]:
    return [TOKENS.index(token) for token in tokens]


def test_merges_make_words(tokenizer):
    assert tokenizer.encode("hello world") == ids("hello", "Ġworld")
    assert tokenizer.encode(" hello") == ids("Ġhello")
    assert tokenizer.encode("held") == ids("he", "ld")
    assert tokenizer.encode("") == []


def test_digits_are_single_with_smollm(tokenizer):
    assert tokenizer.encode("a 12") == ids("a", "Ġ", "1", "2")


def test_control_tokens_are_whole_and_decode_to_nothing(tokenizer):
    encoded = tokenizer.encode("<|im_start|>hello<|im_end|>")
    assert encoded == ids("<|im_start|>", "hello", "<|im_end|>")
    assert tokenizer.decode(encoded) == "hello"
    assert tokenizer.stop_tokens == {0, END}


def test_user_defined_tokens_stay_text():
    types = list(TYPES)
    word = ids("hello")[0]
    types[word] = 4
    tokenizer = Tokenizer(TOKENS, types, MERGES, pre="gpt-2")
    assert tokenizer.encode("xhellox") == [*ids("x"), word, *ids("x")]
    assert tokenizer.decode(tokenizer.encode("xhellox")) == "xhellox"
    assert tokenizer.stop_tokens == {0, 2}


def test_bos_is_added_on_request():
    assert make(add_bos=True).encode("hello") == [BOS, *ids("hello")]
    assert make(add_bos=True, bos_token=None).encode("hello") == ids("hello")


@given(text=st.text(max_size=40))
@settings(deadline=None, max_examples=200)
def test_round_trip(tokenizer, text):
    if not any(name in text for name in tiny.CONTROL):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@given(data=st.binary(max_size=30))
@settings(deadline=None, max_examples=200)
def test_stream_is_decode_in_whole_characters(tokenizer, data):
    tokens = [len(tiny.CONTROL) + byte for byte in data]  # the token of each byte
    pieces = list(tokenizer.stream(tokens))
    assert "".join(pieces) == tokenizer.decode(tokens) == data.decode("utf-8", "replace")
    assert all(pieces)


def test_stream_waits_for_the_last_byte_of_a_character(tokenizer):
    seen: list[str] = []

    def feed():
        for count, token in enumerate(tokenizer.encode("h€!")):
            yield token
            progress.append((count + 1, "".join(seen)))

    progress: list[tuple[int, str]] = []
    for piece in tokenizer.stream(feed()):
        seen.append(piece)
    assert progress == [(1, "h"), (2, "h"), (3, "h"), (4, "h€"), (5, "h€!")]


def test_chat_prompt(tokenizer):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi {{ 7 * 7 }}"},
    ]
    assert tokenizer.chat(messages) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nHi {{ 7 * 7 }}<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "failed: roles must alternate"),
        ("{{ messages.__class__.__mro__ }}", "failed: access to attribute '__class__'"),
        ("{% for x in range(10**9) %}{% endfor %}", "failed: Range too big"),
        ("{% if %}", "failed: "),
        ("{{ messages.append(1) }}", "failed: "),
    ],
)
def test_templates_run_in_a_sandbox(template, message):
    with pytest.raises(ValueError, match=message):
        make(chat_template=template).chat([{"role": "user", "content": "Hi"}])


def test_bad_vocabularies_have_clear_errors():
    with pytest.raises(ValueError, match="pre-tokenizer 'qwen9' is not supported, only gpt-2, smo"):
        make(pre="qwen9")
    with pytest.raises(ValueError, match="has a token twice"):
        Tokenizer(["a", "a"], [1, 1], [], pre="gpt-2")
    for merge in ("a", "a b", "a b c", ""):
        with pytest.raises(ValueError, match="is not of two tokens to a third"):
            Tokenizer(["a", "b"], [1, 1], [merge], pre="gpt-2")
    with pytest.raises(ValueError, match=r"eos_token must be in 0..319, got 900"):
        make(eos_token=900)
    with pytest.raises(ValueError, match="has no chat template"):
        make().chat([])


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"tokenizer.ggml.model": "llama"}, "tokenizer of model 'llama', only 'gpt2'"),
        ({"tokenizer.ggml.model": None}, "no metadata key 'tokenizer.ggml.model'"),
        ({"tokenizer.ggml.merges": ["no such"]}, "the merge 'no such' is not"),
        ({"tokenizer.ggml.tokens": [1, 2]}, "'tokenizer.ggml.tokens' must be list, got ndarray"),
        ({"tokenizer.ggml.token_type": 3}, "'tokenizer.ggml.token_type' must be ndarray, got int"),
        ({"tokenizer.ggml.bos_token_id": 9999}, "bos_token must be in 0..319, got 9999"),
        ({"tokenizer.ggml.pre": "tekken"}, "pre-tokenizer 'tekken' is not supported"),
    ],
)
def test_broken_metadata(tmp_path, metadata, message):
    file = GGUFFile(tiny.write_llama(tmp_path / "broken.gguf", metadata=metadata))
    with pytest.raises(GGUFError, match=message):
        Tokenizer.from_gguf(file)


def test_llama3_words_and_digits():
    words = ["1", "2", "3", "4", "12", "123", "ab", "a", "b", "Ġ", "Ġab", "!", "Ċ"]
    tokenizer = Tokenizer(words, [1] * len(words), ["1 2", "a b", "Ġ ab"], pre="llama-bpe")
    split = [words[i] for i in tokenizer.encode("1234 ab!\n")]
    # Up to three digits are one word, and a word that is a token needs no merge ("123").
    assert split == ["123", "4", "Ġab", "!", "Ċ"]


def test_real_tokenizer(smollm2_path):
    tokenizer = Tokenizer.from_gguf(GGUFFile(smollm2_path))
    assert tokenizer.vocab_size == 49152
    assert tokenizer.encode("The capital of France is") == [504, 3575, 282, 4649, 314]
    assert (tokenizer.bos_token, tokenizer.eos_token) == (1, 2)
    assert tokenizer.stop_tokens == {0, 2}
    prompt = tokenizer.chat([{"role": "user", "content": "Hi"}])
    assert prompt.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert prompt.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    text = "Größe 12,345 — naïve 日本語 👩‍🔬\n\n\tdef f(x):  # €"
    assert tokenizer.decode(tokenizer.encode(text)) == text
