"""Rotations folded into a Llama's weights (QuaRot, arXiv 2404.00456): what they lose.

They cost nothing when the model runs: the residual stream is rotated from the embedding to the last
norm, and values of attention head by head. The scales of norms go into the weights after them, as a
rotation can't pass them. The package rotates on line: what folding loses is in docs/accuracy.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_anyprec.models.calibration import default_rules
from jax_anyprec.models.llama import Llama
from jax_anyprec.quantization import Quantization
from jax_anyprec.rotation import Rotation, hadamard

FOLDED = ("qkv", "output", "gate_up")
"""Parts of the paths of the layers whose inputs come rotated; the down projection's can't be."""


def fold(model: Llama) -> None:
    """Change a float model in place; what it computes changes by roundings only."""
    stream, head = orthogonal(model.config.hidden_size), orthogonal(model.config.head_dim)
    values = np.kron(np.eye(model.config.num_kv_heads, dtype=np.float32), head)
    taken = np.kron(np.eye(model.config.num_heads, dtype=np.float32), head)
    for layer in model.layers:
        attention, feed_forward = layer.attention, layer.feed_forward
        for norm, takers in (
            (layer.attention_norm, attention.qkv.layers),
            (layer.feed_forward_norm, feed_forward.gate_up.layers),
        ):
            for taker in takers:
                scaled = norm.scale[...][:, None] * taker.kernel[...]
                taker.kernel.set_value(stream.T @ scaled)
            norm.scale.set_value(jnp.ones_like(norm.scale[...]))
        last, width = attention.qkv.layers[-1].kernel, len(values)
        others, given = jnp.split(last[...], [last.shape[1] - width], axis=1)
        last.set_value(jnp.concatenate([others, given @ values], axis=1))
        output, down = attention.output.kernel, feed_forward.down.kernel
        output.set_value(taken.T @ output[...] @ stream)
        down.set_value(down[...] @ stream)
    model.embed = _Turned(model.embed, stream)
    model.norm = _Returned(model.norm, stream)


def folded_rules(
    model: Llama, bits: int, activations: int | None
) -> Sequence[tuple[str, Quantization]]:
    """The default rules of a model that `fold` has changed: rotated is what still has to be."""
    rules = default_rules(model, bits, activations=activations)
    return [
        (path, dataclasses.replace(each, rotate=False) if _comes_rotated(path) else each)
        for path, each in rules
    ]


def _comes_rotated(path: str) -> bool:
    return not set(FOLDED).isdisjoint(path.split("/"))


def orthogonal(size: int) -> np.ndarray:
    """An orthogonal matrix that mixes all channels alike: ``float32[size, size]``.

    Random signs, then the Hadamard matrix of the largest power of two that divides `size`, and for
    the rest that of the discrete Hartley transform.
    """
    block = size & -size
    steps = np.arange(size // block)
    angles = 2 * np.pi * np.outer(steps, steps) / len(steps)
    hartley = (np.cos(angles) + np.sin(angles)) / np.sqrt(len(steps))
    mixed = np.kron(hartley, hadamard(np.eye(block, dtype=np.float32), block))
    return (Rotation(64).signs(size)[:, None] * mixed).astype(np.float32)


class _Turned(nnx.Module):
    """An embedding into the rotated stream; as the output head it is what it was."""

    def __init__(self, embed: nnx.Embed, rotation: np.ndarray):
        self.embed, self.rotation = embed, nnx.Variable(jnp.asarray(rotation))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.embed(tokens) @ self.rotation[...]

    def attend(self, x: jax.Array) -> jax.Array:
        return self.embed.attend(x)


class _Returned(nnx.Module):
    """The last norm, of the stream rotated back."""

    def __init__(self, norm: nnx.RMSNorm, rotation: np.ndarray):
        self.norm, self.rotation = norm, nnx.Variable(jnp.asarray(rotation))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm(x @ self.rotation[...].T)
