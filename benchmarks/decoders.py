"""Whole models that read a prompt and decode: ours, and llama.cpp."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from jax_anyprec import models

from . import ggml


class Decoder(Protocol):
    """A model that continues a prompt with the most likely tokens."""

    name: str
    weight_bytes: int

    def start(self, prompt: Sequence[int], max_tokens: int) -> int:
        """Read a prompt; the first of up to `max_tokens` tokens."""

    def step(self) -> int:
        """The next token."""


class OurDecoder:
    """A model of this package, by its `generate`."""

    def __init__(self, name: str, model: Any):
        self.name, self.model = name, model
        self.weight_bytes = models.weight_bytes(self.model).total

    def start(self, prompt: Sequence[int], max_tokens: int) -> int:
        self.tokens = models.generate(self.model, prompt, max_tokens=max_tokens)
        return next(self.tokens)

    def step(self) -> int:
        return next(self.tokens)


class LlamaCpp:
    """A GGUF file in llama.cpp, on the cores of this process; ImportError without it."""

    CONTEXT = 2048
    """The most tokens, prompt and answer together; also the model's."""

    def __init__(self, name: str, path: pathlib.Path):
        self.api = import_llama_cpp()
        self.name = f"llama.cpp ({importlib.metadata.version('llama-cpp-python')}) {name}"
        model = self.api.llama_model_load_from_file(
            os.fsencode(path), self.api.llama_model_default_params()
        )
        options = self.api.llama_context_default_params()
        options.n_ctx = self.CONTEXT
        options.n_threads = options.n_threads_batch = len(os.sched_getaffinity(0))
        self.context = self.api.llama_init_from_model(model, options)
        if not self.context:
            raise RuntimeError(f"llama.cpp can't load {path}")
        self.weight_bytes = self.api.llama_model_size(model)
        self.vocab_size = self.api.llama_vocab_n_tokens(self.api.llama_model_get_vocab(model))

    def start(self, prompt: Sequence[int], max_tokens: int) -> int:
        if len(prompt) + max_tokens > self.CONTEXT:
            raise ValueError(f"{self.name} has room for {self.CONTEXT} tokens")
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        return self._read(prompt)

    def step(self) -> int:
        return self._read([self.token])

    def _read(self, tokens: Sequence[int]) -> int:
        array = (self.api.llama_token * len(tokens))(*tokens)
        batch = self.api.llama_batch_get_one(array, len(tokens))
        status = self.api.llama_decode(self.context, batch)
        if status:
            raise RuntimeError(f"{self.name}: llama_decode gave {status}")
        logits = self.api.llama_get_logits_ith(self.context, -1)
        self.token = int(np.argmax(np.ctypeslib.as_array(logits, (self.vocab_size,))))
        return self.token


def import_llama_cpp() -> Any:
    """The functions of llama.cpp, which then logs nothing."""
    from llama_cpp import llama_cpp

    llama_cpp.llama_log_set(ggml.ignore, None)
    llama_cpp.llama_backend_init()
    return llama_cpp


def requantize(
    source: pathlib.Path,
    target: pathlib.Path,
    kind: str,
    importance: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Write a GGUF file's model as llama.cpp's file type `kind`, such as "Q4_0".

    `importance` has the mean square of each input of a tensor, ``float32[K]`` by the tensor's name.
    """
    api = import_llama_cpp()
    options = api.llama_model_quantize_default_params()
    options.ftype = getattr(api, f"LLAMA_FTYPE_MOSTLY_{kind}")
    options.allow_requantize = True
    rows = {name: np.ascontiguousarray(x, np.float32) for name, x in (importance or {}).items()}
    entries = (api.llama_model_imatrix_data * (len(rows) + 1))()  # one without a name ends them
    for entry, (name, x) in zip(entries, rows.items(), strict=False):
        entry.name, entry.size = name.encode(), x.size
        entry.data = x.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    if rows:
        options.imatrix = entries
    if api.llama_model_quantize(os.fsencode(source), os.fsencode(target), options):
        raise RuntimeError(f"llama.cpp can't requantize {source}")
