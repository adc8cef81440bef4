"""Rotary embeddings and causal attention, as functions.

Shapes: B batch, S tokens of this call, T positions of the cache (T = S without one), H query
heads, G key/value heads, D head size.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

QUERY_BLOCK = 128
"""Tokens of a prompt that attention takes at once; the fewer, the less is computed in vain."""


@dataclasses.dataclass(frozen=True)
class LinearScaling:
    """Rotary embeddings for contexts `factor` times as long as in training: all turn slower."""

    factor: float

    def __post_init__(self) -> None:
        _check_positive(self)

    def __call__(self, frequencies: jax.Array) -> jax.Array:
        return frequencies / self.factor


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's rotary embeddings: what turns slowly turns slower by `factor`.

    Args:
      factor: for what turns fewer than `low_frequency` times in `original_context` positions.
      low_frequency, high_frequency: turns; above the latter nothing changes, between both the
        change is gradual.
      original_context: positions that were trained on.
    """

    factor: float
    low_frequency: float
    high_frequency: float
    original_context: int

    def __post_init__(self) -> None:
        _check_positive(self)
        if not self.low_frequency < self.high_frequency:
            raise ValueError(
                f"low_frequency must be below high_frequency = {self.high_frequency}, "
                f"got {self.low_frequency}"
            )

    def __call__(self, frequencies: jax.Array) -> jax.Array:
        turns = self.original_context * frequencies / (2 * math.pi)
        kept = (turns - self.low_frequency) / (self.high_frequency - self.low_frequency)
        kept = jnp.clip(kept, 0, 1)
        return frequencies * (kept + (1 - kept) / self.factor)


def _check_positive(scaling: LinearScaling | Llama3Scaling) -> None:
    for name, value in dataclasses.asdict(scaling).items():
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value!r}")


# Compiled also where models run eagerly, as in calibration; in a compiled model it changes nothing.
_compiled = functools.partial(jax.jit, inline=True)


@functools.partial(_compiled, static_argnames=("theta", "scaling"))
def rotary(
    x: jax.Array,
    positions: jax.Array,
    theta: float,
    scaling: LinearScaling | Llama3Scaling | None = None,
) -> jax.Array:
    """Turn each pair (2 i, 2 i + 1) of ``x [..., S, D]`` by ``position * theta**(-2 i / D)``.

    `scaling` changes that frequency.
    """
    size = x.shape[-1]
    frequencies = theta ** (-jnp.arange(0, size, 2, dtype=jnp.float32) / size)
    if scaling is not None:
        frequencies = scaling(frequencies)
    angles = positions.astype(jnp.float32)[:, None, None] * frequencies[:, None]
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], size // 2, 2)
    # (a cos - b sin, b cos + a sin) without taking the pairs apart, which XLA is slow to undo.
    signs = np.array([-1, 1], np.float32)
    turned = pairs * jnp.cos(angles) + pairs[..., ::-1] * (signs * jnp.sin(angles))
    return turned.reshape(x.shape).astype(x.dtype)


def split_heads(x: jax.Array, size: int) -> jax.Array:
    """``[B, S, H D]`` to ``[B H, S, D]``; D is `size`."""
    x = jnp.swapaxes(x.reshape(*x.shape[:2], -1, size), 1, 2)
    return x.reshape(-1, *x.shape[2:])


def join_heads(x: jax.Array, batch: int) -> jax.Array:
    """``[B H, S, D]`` to ``[B, S, H D]``; B is `batch`."""
    x = jnp.swapaxes(x.reshape(batch, -1, *x.shape[1:]), 1, 2)
    return x.reshape(*x.shape[:2], -1)


def extend(
    past: tuple[jax.Array, jax.Array] | None, k: jax.Array, v: jax.Array, positions: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Keys and values ``[B G, T, D]`` of the past, with ``[B G, S, D]`` put at their positions."""
    if past is None:
        return k, v
    put = jax.lax.dynamic_update_slice_in_dim
    return put(past[0], k, positions[0], axis=1), put(past[1], v, positions[0], axis=1)


@functools.partial(_compiled, static_argnames=("window", "scale", "soft_cap"))
def attend_causally(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    positions: jax.Array,
    *,
    window: int | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
) -> jax.Array:
    """`attend` where a query at one of ``positions int32[S]`` sees those up to it.

    With a `window` it sees the last so many, its own among them. All S positions are among the T of
    `k` and `v`, so those past T - S + s are out of sight of query s, wherever S begins. A long
    prompt is cut into blocks, which leave them out.
    """
    s, t = q.shape[1], k.shape[1]
    blocks = []
    for begin in range(0, s, QUERY_BLOCK):
        end = min(begin + QUERY_BLOCK, s)
        reach = t - s + end
        visible = positions[begin:end, None] >= jnp.arange(reach)
        if window is not None:
            visible &= positions[begin:end, None] - jnp.arange(reach) < window
        y = attend(
            q[:, begin:end], k[:, :reach], v[:, :reach], visible, scale=scale, soft_cap=soft_cap
        )
        blocks.append(y)
    return jnp.concatenate(blocks, axis=1)


@jax.named_scope("attend")
def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    visible: jax.Array,
    *,
    scale: float | None = None,
    soft_cap: float | None = None,
) -> jax.Array:
    """Attention of ``q [B H, S, D]`` over ``k, v [B G, T, D]``.

    Query s sees position t where ``visible bool[S, T]``. Scores are multiplied by `scale` (None:
    ``D**-0.5``) and then capped (`cap_softly`). They and softmax are float32; the result
    ``[B H, S, D]`` has the dtype of `q`. In traces of a profiler its operations have "attend" in
    their names.
    """
    s, size = q.shape[1:]
    grouped = q.reshape(k.shape[0], -1, size)  # the H / G query heads of a key, one after another
    scores = jnp.einsum("bsd,btd->bst", grouped, k, preferred_element_type=jnp.float32)
    scores = scores.reshape(-1, s, k.shape[1]) * (size**-0.5 if scale is None else scale)
    if soft_cap is not None:
        scores = cap_softly(scores, soft_cap)
    scores = jnp.where(visible, scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    weights = weights.reshape(*grouped.shape[:2], -1)
    y = jnp.einsum("bst,btd->bsd", weights, v, preferred_element_type=jnp.float32)
    return y.reshape(q.shape).astype(q.dtype)


def cap_softly(x: jax.Array, limit: float) -> jax.Array:
    """`x` where it is small, and never beyond ``-limit..limit``."""
    return jnp.tanh(x / limit) * limit
