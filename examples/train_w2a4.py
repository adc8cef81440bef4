"""Train a small transformer with 2-bit weights and 4-bit activations, then pack it.

    python examples/train_w2a4.py               # Wikipedia, 28 MB, fetched once
    python examples/train_w2a4.py --text FILE   # any text, 100 kB and more

The model reads bytes. It is trained in float, then trained on twice for as many steps: in float,
to be rounded to W2A4 at the end, and rounded all along. The second one is packed, and has the very
loss that its training ended with.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jax_anyprec as ap

W2A4 = ap.Quantization(weights=2, activations=4, group_size=64)


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the model and of its training."""

    width: int = 128
    layers: int = 2
    heads: int = 4
    context: int = 64
    batch: int = 32
    first_steps: int = 500
    more_steps: int = 400
    evaluation_windows: int = 256
    quantization: ap.Quantization = W2A4


class Block(nnx.Module):
    """Attention and a perceptron, each after a norm and added to its input."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        width = config.width
        linear = functools.partial(nnx.Linear, use_bias=False, rngs=rngs)
        self.heads = config.heads
        self.attention_norm = nnx.RMSNorm(width, rngs=rngs)
        zeros = nnx.initializers.zeros  # each block begins as the identity
        self.qkv, self.out = linear(width, 3 * width), linear(width, width, kernel_init=zeros)
        self.mlp_norm = nnx.RMSNorm(width, rngs=rngs)
        self.up, self.down = linear(width, 4 * width), linear(4 * width, width, kernel_init=zeros)

    def __call__(self, x: jax.Array) -> jax.Array:
        q, k, v = jnp.split(self.qkv(shift(self.attention_norm(x))), 3, axis=-1)
        split = lambda a: a.reshape(*a.shape[:-1], self.heads, -1)  # noqa: E731
        mixed = jax.nn.dot_product_attention(split(q), split(k), split(v), is_causal=True)
        x = x + self.out(mixed.reshape(x.shape))
        return x + self.down(nnx.gelu(self.up(self.mlp_norm(x))))


def shift(x: jax.Array) -> jax.Array:
    """Half of the features from the byte before: such small models learn pairs sooner (RWKV)."""
    now, before = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([now, jnp.pad(before, ((0, 0), (1, 0), (0, 0)))[:, :-1]], axis=-1)


class ByteModel(nnx.Module):
    """A causal transformer over bytes; the embedding is also the head, and stays in float."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        init = nnx.initializers.normal(config.width**-0.5)
        self.embed = nnx.Embed(256, config.width, embedding_init=init, rngs=rngs)
        self.positions = nnx.Param(init(rngs.params(), (config.context, config.width)))
        self.blocks = nnx.List([Block(config, rngs) for _ in range(config.layers)])
        self.norm = nnx.RMSNorm(config.width, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed(tokens) + self.positions[: tokens.shape[-1]]
        for block in self.blocks:
            x = block(x)
        return self.embed.attend(self.norm(x))


def loss(model: ByteModel, windows: jax.Array) -> jax.Array:
    """Mean cross-entropy of ``uint8[batch, context + 1]``, in nats a byte."""
    logits = model(windows[:, :-1].astype(jnp.int32))
    targets = windows[:, 1:].astype(jnp.int32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


compiled_loss = nnx.jit(loss)


def train(model: ByteModel, text: np.ndarray, steps: int, rate: float, config: Config) -> None:
    """Adam on random windows of `text`, in place; the rate falls to 0 by a cosine."""
    schedule = optax.warmup_cosine_decay_schedule(0, rate, min(50, steps // 10 + 1), steps + 1)
    optimizer = nnx.Optimizer(model, optax.adam(schedule), wrt=nnx.Param)

    @nnx.jit
    def step(model: ByteModel, optimizer: nnx.Optimizer, windows: jax.Array) -> jax.Array:
        value, gradient = nnx.value_and_grad(loss)(model, windows)
        optimizer.update(model, gradient)
        return value

    rng = np.random.default_rng(0)
    for i in range(steps):
        starts = rng.integers(0, len(text) - config.context, config.batch)
        value = step(model, optimizer, text[starts[:, None] + np.arange(config.context + 1)])
        if i % 100 == 0:
            print(f"  step {i:4}: {float(value):.3f}", flush=True)


def evaluate(model: ByteModel, text: np.ndarray, config: Config) -> float:
    """Loss on windows evenly spaced over `text`."""
    starts = np.linspace(0, len(text) - config.context - 1, config.evaluation_windows).astype(int)
    windows = text[starts[:, None] + np.arange(config.context + 1)]
    return float(np.mean([compiled_loss(model, batch) for batch in np.split(windows, 8)]))


def replace(model: ByteModel, kind: type, convert: Callable[[Any], nnx.Module]) -> ByteModel:
    """A copy of `model` in which each layer of class `kind` is converted."""
    replace_one = lambda _, node: convert(node) if isinstance(node, kind) else node  # noqa: E731
    return nnx.recursive_map(replace_one, nnx.clone(model))


def megabytes(model: ByteModel) -> float:
    return sum(x.nbytes for x in jax.tree.leaves(nnx.state(model))) / 1e6


def run(training: np.ndarray, validation: np.ndarray, config: Config) -> dict[str, float]:
    """Losses on `validation` of all that is made from the bytes ``uint8[n]`` in `training`."""
    quantization = config.quantization

    def to_fake_quant(layer: nnx.Linear) -> ap.nnx.FakeQuantLinear:
        return ap.nnx.FakeQuantLinear.from_linear(layer, quantization)

    model = ByteModel(config, nnx.Rngs(0))
    count = sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    print(f"{count:,} parameters, in float", flush=True)
    train(model, training, config.first_steps, 4e-3, config)

    print(f"at {quantization.weights} bits, activations at {quantization.activations}", flush=True)
    trained = replace(model, nnx.Linear, to_fake_quant)
    train(trained, training, config.more_steps, 2e-3, config)
    packed = replace(trained, ap.nnx.FakeQuantLinear, lambda layer: layer.pack())

    print("on in float", flush=True)
    train(model, training, config.more_steps, 2e-3, config)
    rounded = replace(model, nnx.Linear, lambda layer: to_fake_quant(layer).pack())

    print(f"{megabytes(model):.2f} MB in float, {megabytes(packed):.2f} MB packed")
    models = {"float": model, "rounded": rounded, "trained": trained, "packed": packed}
    return {name: evaluate(m, validation, config) for name, m in models.items()}


def read_text(path: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Bytes for training and for validation: the Wikipedia articles, or a file."""
    if path is None:
        from jax_anyprec.fetch import fetch
        from jax_anyprec.models.wikipedia import read_articles

        text = "\n\n".join(article.text for article in read_articles(fetch("wikipedia"))).encode()
    else:
        text = Path(path).read_bytes()
    if len(text) < 100_000:
        raise SystemExit(f"{path}: {len(text)} bytes are too few to train on; give 100 kB or more")
    data = np.frombuffer(text, np.uint8)
    cut = len(data) * 9 // 10
    return data[:cut], data[cut:]


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--text", help="a text file in place of the Wikipedia articles")
    training, validation = read_text(parser.parse_args().text)
    start = time.perf_counter()
    losses = run(training, validation, Config())
    print(f"\nloss on held-out text, nats a byte, after {time.perf_counter() - start:.0f} s")
    for name, value in losses.items():
        print(f"{name:>8}: {value:.6f}")
    print("packed == trained:", losses["packed"] == losses["trained"])


if __name__ == "__main__":
    main()
