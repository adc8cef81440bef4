"""Calls of a whole model: a step that decodes, or one that reads a prompt, compiled and timed.

A step takes what the last one left and consumes it: tokens are fed back on the device, and the
cache is updated in place. So steps follow each other without the host, and a command buffer (a CUDA
graph), which holds addresses, stays valid.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_anyprec import models
from jax_anyprec.models.generate import most_likely

from . import timing
from .contestants import CUBLAS
from .llamas import Model, normal, random_keys

COMMAND_BUFFERS: dict[str, dict[str, Any]] = {
    "all": timing.IN_ORDER
    | {
        "xla_gpu_enable_command_buffer": (
            "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION"
        )
    },
    "default": {},
    "none": {"xla_gpu_enable_command_buffer": "INVALID"},
}
"""Options of XLA's compiler: everything in one command buffer, XLA's own choice, or none."""

WARM_UPS = 3
"""Calls before any is timed: XLA makes command buffers while it runs a program."""


class Case(NamedTuple):
    """What a call does, for a cache of `context` positions, all of which attention reads.

    One of `tokens` for each of the batch decodes at its end; more of them are a prompt that fills
    it.
    """

    batch: int
    tokens: int
    context: int

    @property
    def decodes(self) -> bool:
        return self.tokens == 1

    @property
    def kind(self) -> str:
        return "decode" if self.decodes else "prefill"

    def __str__(self) -> str:
        return f"{self.kind}, batch {self.batch}, context {self.context}"


class State(NamedTuple):
    """What goes from step to step.

    Attributes:
      tokens: ``int32[batch, tokens]``.
      logits: ``float32[batch, vocab]`` of the last position.
      cache: keys and values; its length is the position of the first token.
    """

    tokens: jax.Array
    logits: jax.Array
    cache: models.Cache

    def at(self, position: int) -> State:
        """At that position, and with logits that are NaN until they are computed."""
        length = jnp.asarray(position, jnp.int32)
        return self._replace(
            logits=jnp.full_like(self.logits, jnp.nan),
            cache=dataclasses.replace(self.cache, length=length),
        )

    def check(self) -> None:
        """FloatingPointError unless all logits are finite."""
        wrong = int(np.size(self.logits) - np.isfinite(np.asarray(self.logits)).sum())
        if wrong:
            raise FloatingPointError(f"{wrong} of {np.size(self.logits)} logits are not finite")


def state_shapes(config: models.LlamaConfig, case: Case, dtype: Any = jnp.bfloat16) -> State:
    return State(
        jax.ShapeDtypeStruct((case.batch, case.tokens), jnp.int32),
        jax.ShapeDtypeStruct((case.batch, config.vocab_size), jnp.float32),
        jax.eval_shape(lambda: models.Cache.zeros(config, case.batch, case.context, dtype)),
    )


def draw_state(
    config: models.LlamaConfig, case: Case, dtype: Any = jnp.bfloat16, seed: int = 1
) -> State:
    """Random tokens, and a cache that is full of random keys and values."""
    keys = random_keys(seed)

    def draw(leaf: Any) -> jax.Array:
        if leaf.dtype == jnp.int32:
            return jax.random.randint(next(keys), leaf.shape, 0, config.vocab_size, leaf.dtype)
        return normal(next(keys), leaf.shape, leaf.dtype, 1.0)

    return jax.tree.map(draw, state_shapes(config, case, dtype)).at(0)


class Step:
    """One call of a model, to be compiled and then repeated."""

    def __init__(self, model: Model, weights: list[jax.Array], case: Case):
        self.model, self.weights, self.case = model, weights, case

        def step(weights: list[jax.Array], state: State) -> State:
            built = model.build(weights)
            x, cache = built.hidden(state.tokens, state.cache)
            logits = built.logits(x[:, -1])
            if not case.decodes:  # the next call reads the same prompt again
                length = state.cache.length
                return State(state.tokens, logits, dataclasses.replace(cache, length=length))
            return State(jax.vmap(most_likely)(logits)[:, None], logits, cache)

        shapes = state_shapes(model.config, case, built_dtype(model))
        self.lowered = jax.jit(step, donate_argnums=1).lower(weights, shapes)

    def compile(self, command_buffers: str) -> Step:
        """Compiled, also on a thread of its own; so named in COMMAND_BUFFERS.

        The dots that are left to XLA are cuBLAS's.
        """
        options = CUBLAS | COMMAND_BUFFERS[command_buffers]
        self.compiled = self.lowered.compile(compiler_options=options)
        return self

    def __call__(self, state: State) -> State:
        return self.compiled(self.weights, state)

    def text(self) -> str:
        return self.compiled.as_text() or ""

    def memory(self) -> dict[str, int]:
        """Bytes that the call needs: weights, what goes from step to step, and scratch."""
        found = self.compiled.memory_analysis()
        held = found.argument_size_in_bytes + found.output_size_in_bytes
        return {
            "program_bytes": held - found.alias_size_in_bytes + found.temp_size_in_bytes,
            "scratch_bytes": found.temp_size_in_bytes,
        }


def built_dtype(model: Model) -> Any:
    return jax.tree.leaves(model.state["embed"])[0].dtype


def compile_all(
    entries: Iterable[tuple[Model, list[jax.Array]]], case: Case, command_buffers: str
) -> Iterator[tuple[Model, Step | Exception]]:
    """A step of each model with its weights, or why there is none; many compile at a time."""
    with ThreadPoolExecutor() as pool:
        futures: list[tuple[Model, Future[Step] | Exception]] = []
        for model, weights in entries:
            try:
                step = Step(model, weights, case)
                futures.append((model, pool.submit(step.compile, command_buffers)))
            except Exception as error:  # whatever it is, the others go on
                futures.append((model, error))
        for model, future in futures:
            error = future if isinstance(future, Exception) else future.exception()
            yield model, error or future.result()


class Turn(NamedTuple):
    """Seconds of one call: until it was done, and until the host had handed it over."""

    seconds: float
    dispatch: float


def take_turn(step: Step, state: State, calls: int) -> tuple[State, Turn]:
    """Time `calls` in a row, after one that doesn't count, which ends others' turns.

    Decoding ends where the context does. FloatingPointError unless the last logits are finite.
    """
    start = step.case.context - calls - 1 if step.case.decodes else 0
    state = jax.block_until_ready(step(state.at(start)))
    begin = time.perf_counter()
    for _ in range(calls):
        state = step(state)
    dispatched = time.perf_counter()
    jax.block_until_ready(state)
    end = time.perf_counter()
    state.check()
    return state, Turn((end - begin) / calls, (dispatched - begin) / calls)
