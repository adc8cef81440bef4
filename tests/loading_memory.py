"""Measure what loading a random checkpoint, quantized on the way, takes of memory.

    python tests/loading_memory.py --layers 24

Writes a Llama of bfloat16 weights to a temporary folder, loads it at 4 bits and prints as JSON, in
bytes: the file's size, the model's weights, the largest tensor in float32, and by how much the
process grew at most meanwhile. Pages of the mapped file don't count: the system takes them back
when it needs them. A model of one layer is loaded first, so neither do compiled programs. Linux.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from jax_anyprec.models import Quantization, load_huggingface, weight_bytes

VOCAB, HIDDEN, INNER, HEAD = 4096, 1024, 2816, 64


def write(folder: Path, layers: int) -> Path:
    """A random Llama."""
    folder.mkdir()
    config = {
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": HIDDEN // HEAD,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    for i in range(layers):
        layer = f"model.layers.{i}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes[f"{layer}.self_attn.{name}.weight"] = (HIDDEN, HIDDEN)
        for name in ("gate_proj", "up_proj"):
            shapes[f"{layer}.mlp.{name}.weight"] = (INNER, HIDDEN)
        shapes[f"{layer}.mlp.down_proj.weight"] = (HIDDEN, INNER)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{layer}.{name}.weight"] = (HIDDEN,)
    rng = np.random.default_rng(0)
    noise = rng.normal(size=INNER * HIDDEN).astype(ml_dtypes.bfloat16)
    weights = {name: np.resize(noise, shape) for name, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors")
    return folder


def anonymous_bytes() -> int:
    """Memory of this process that is not of files."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no RssAnon")


def growth(action: Callable[[], Any]) -> tuple[Any, int]:
    """What `action` returns, and by how much memory grew at most meanwhile, looked at every ms."""
    before = peak = anonymous_bytes()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        result = action()
    finally:
        done.set()
        watcher.join()
    return result, peak - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=24)
    options = parser.parse_args()
    quantization = Quantization(weights=4, group_size=32)
    with tempfile.TemporaryDirectory() as folder:
        small = write(Path(folder) / "small", 1)
        large = write(Path(folder) / "large", options.layers)
        load_huggingface(small, quantization=quantization)
        loaded, peak = growth(lambda: load_huggingface(large, quantization=quantization))
        facts = {
            "file": (large / "model.safetensors").stat().st_size,
            "weights": weight_bytes(loaded.model).total,
            "largest_tensor_float32": max(VOCAB, INNER) * HIDDEN * 4,
            "peak": peak,
        }
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
